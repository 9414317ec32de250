"""An embedder on the model hub: what its card says to machines, and how a folder gets there."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin

CARD = "README.md"
TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction"]
LOADING = re.compile(r'((?:PromptEmbedder\.from_pretrained|SentenceTransformer)\()"[^"]*"')
"""How the code of a card loads the embedder."""


def card_data(**others: Any) -> ModelCardData:
    """What the hub sorts and finds an embedder by."""
    return ModelCardData(library_name="promptembedder", pipeline_tag="sentence-similarity", tags=[*TAGS], **others)


def with_data(data: ModelCardData, text: str) -> str:
    """A card: its data as YAML, then its text."""
    return f"---\n{data}\n---\n{text}"


def loading(card: str, name: str) -> str:
    """The card, whose code loads the embedder by another name."""
    return LOADING.sub(lambda found: f'{found[1]}"{name}"', card)


def of_folder(folder: Path) -> ModelCardData:
    """What the card of a model's folder says to machines; nothing where there is none, or a damaged one."""
    try:
        return ModelCard.load(folder / CARD).data
    except (OSError, ValueError):
        return ModelCardData()


class Upload(ModelHubMixin):
    """What `save` writes to an empty folder, for the hub; its `push_to_hub` takes it there."""

    def __init__(self, save: Callable[[Path], None]) -> None:
        self.save = save

    def _save_pretrained(self, save_directory: Path) -> None:
        self.save(save_directory)

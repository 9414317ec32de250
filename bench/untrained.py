"""Rows of the quality table that nothing is trained for: the frozen backbone, and what users would take instead.

Legend: N texts, D embedding size.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.cases import ROOT
from pe.baselines.common import Templates
from pe.baselines.frozen import FrozenEncoder
from pe.config import Recipe
from pe.data.tasks import Floats
from pe.integrations.mteb import TextEncoder

MINILM = ROOT / "models" / "minilm"
"""Where `python -m pe.models minilm` puts it."""
PEER = "all-MiniLM-L6-v2, trained elsewhere"


class PlainEncoder(ABC):
    """What embeds texts alike under every instruction."""

    name: str
    revision: str

    @abstractmethod
    def embed(self, texts: list[str]) -> Floats:
        """L2-normalised embeddings `[N, D]` float32."""

    def encode(self, texts: Sequence[str], **_: Any) -> Floats:
        """The same of the texts, whatever instruction, side or batch size is asked for."""
        return self.embed(list(texts))


class Trigrams(PlainEncoder):
    """Counts of the character trigrams inside words, hashed to 4,096 columns."""

    name = "trigrams"
    revision = "4096"

    def embed(self, texts: list[str]) -> Floats:
        from sklearn.feature_extraction.text import HashingVectorizer

        bags = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 3), n_features=4096, alternate_sign=False)
        return np.asarray(bags.transform(texts).todense(), dtype=np.float32)


class SentenceTransformerPeer(PlainEncoder):
    """A model of sentence-transformers as its users have it."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from sentence_transformers import SentenceTransformer

        self.name = folder.name
        self.revision = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
        self.model = SentenceTransformer(str(folder), device=str(device))

    def embed(self, texts: list[str]) -> Floats:
        found: Floats = self.model.encode(texts, normalize_embeddings=True, show_progress_bar=False)
        return found


def build_frozen(templates: Templates | None) -> Callable[[Recipe, torch.device], TextEncoder]:
    """The backbone's mean pooling; the templates say what stands before a query."""

    def build(recipe: Recipe, device: torch.device) -> TextEncoder:
        options = recipe.model
        return FrozenEncoder.from_config(options.backbone, device, templates=templates, max_length=options.max_length)

    return build


UNTRAINED: dict[str, Callable[[Recipe, torch.device], TextEncoder]] = {
    "frozen backbone, mean": build_frozen(None),
    "frozen backbone, mean, instruction before queries": build_frozen(Templates()),
    "bag of character trigrams": lambda _, __: Trigrams(),
    PEER: lambda _, device: SentenceTransformerPeer(MINILM, device),
}

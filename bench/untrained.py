"""Rows of the quality table that nothing is trained for: the frozen backbone, and what users would take instead.

Legend: N texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from bench.cases import ROOT
from pe.baselines.common import Templates
from pe.baselines.frozen import FrozenEncoder
from pe.config import Recipe
from pe.data.tasks import Floats
from pe.integrations.mteb import TextEncoder
from pe.method.requests import Side

MINILM = ROOT / "models" / "minilm"
"""Where `python -m pe.models minilm` puts it."""
PEER = "all-MiniLM-L6-v2, trained elsewhere"


class Trigrams:
    """Counts of the character trigrams inside words, hashed to 4,096 columns."""

    name = "trigrams"
    revision = "4096"

    def encode(
        self,
        texts: Sequence[str],
        *,
        instruction: str,
        side: Side = "query",
        batch_tokens: int = 16_384,
        progress: bool = False,
    ) -> Floats:
        """L2-normalised counts `[N, 4096]` float32; an instruction changes nothing."""
        from sklearn.feature_extraction.text import HashingVectorizer

        bags = HashingVectorizer(analyzer="char_wb", ngram_range=(3, 3), n_features=4096, alternate_sign=False)
        return np.asarray(bags.transform(texts).todense(), dtype=np.float32)


class SentenceTransformerPeer:
    """A model of sentence-transformers as its users have it: without an instruction."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        from sentence_transformers import SentenceTransformer

        self.name = folder.name
        self.revision = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
        self.model = SentenceTransformer(str(folder), device=str(device))

    def encode(
        self,
        texts: Sequence[str],
        *,
        instruction: str,
        side: Side = "query",
        batch_tokens: int = 16_384,
        progress: bool = False,
    ) -> Floats:
        """L2-normalised embeddings `[N, 384]` float32; an instruction changes nothing."""
        found: Floats = self.model.encode(list(texts), normalize_embeddings=True, show_progress_bar=progress)
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

"""The control for `skip`: the frozen text pass and one trained matrix, without a prompt and so without instructions.

Legend: B texts, D the backbone's width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pe.backbone import Backbone
from pe.baselines.common import Floats, Reading, content_hash, encode, short_name
from pe.config import BackboneConfig
from pe.files import written_into
from pe.model import Requests, Side, Truncation, check_arguments
from pe.packing import by_length, fitting, inverse
from pe.skip import mapped, mean_states
from pe.trainable import TrainableModule
from pe.turns import in_turn


class LinearEmbedder(TrainableModule):
    """The means of the frozen text states through a trained D x D matrix."""

    def __init__(self, backbone: Backbone, *, max_length: int = 256) -> None:
        super().__init__()
        backbone.check_states()
        self.backbone, self.max_length = backbone, max_length
        self.weight = nn.Parameter(torch.eye(backbone.hidden_size, device=backbone.device))
        self.name = f"linear-{short_name(backbone.name)}"
        self.truncation = Truncation()

    @classmethod
    def from_config(
        cls, config: BackboneConfig, device: torch.device | str = "cpu", *, max_length: int = 256
    ) -> LinearEmbedder:
        """Load the backbone that `config` names."""
        return cls(Backbone.from_pretrained(config, torch.device(device)), max_length=max_length)

    @property
    def revision(self) -> str:
        return content_hash(self.trainable_state(), self.backbone.revision, self.max_length)

    @in_turn
    def forward(self, requests: Requests) -> Tensor:
        """L2-normalised embeddings `[B, D]` float32, in the order of the texts, with gradient."""
        ids = self.tokenize(requests) if requests.read is None else requests.read
        order = by_length(ids)
        return self._embed([ids[i] for i in order])[inverse(order, self.backbone.device)]

    @in_turn
    def tokenize(self, requests: Requests) -> list[list[int]]:
        """Token ids of each text, cut to `max_length` and counted; the instruction is not read."""
        return self._tokenize(requests.texts)

    def tokenized(self, requests: Requests) -> Requests:
        """The requests with their token ids, so that no pass tokenises them again."""
        return replace(requests, read=self.tokenize(requests))

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        ids = self.backbone.text_tokenizer(texts)
        self.truncation.texts += len(ids)
        self.truncation.cut += sum(len(row) > self.max_length for row in ids)
        return [row[: self.max_length] for row in ids]

    def _embed(self, ids: Sequence[Sequence[int]]) -> Tensor:
        means = self.backbone.read(ids, mean_states).pooled
        assert means is not None
        return mapped(means, self.weight)

    @torch.no_grad()
    def encode(
        self,
        texts: Iterable[str],
        *,
        instruction: str,
        side: Side = "query",
        batch_tokens: int = 16_384,
        progress: bool = False,
    ) -> Floats:
        """L2-normalised embeddings `[N, D]` float32 of N texts, in their order, whatever the instruction."""
        texts, _ = check_arguments(texts, [instruction], side)
        with self.backbone.turns.taken():
            return encode(
                lambda readings: self._embed([reading.ids for reading in readings]),
                [Reading(ids) for ids in self._tokenize(texts)],
                self.backbone.hidden_size,
                batch_tokens=fitting(batch_tokens, self.backbone.device),
                progress=progress,
            )

    def save_pretrained(self, path: str | Path, *, card: str = "") -> None:
        """Write what trains; the control is not meant to be loaded elsewhere."""
        with written_into(Path(path)) as folder:
            save_file(self.trainable_state(), folder / "linear.safetensors")
            if card:
                (folder / "README.md").write_text(card, encoding="utf-8")

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that train: the matrix."""
        return {"map": [self.weight]}

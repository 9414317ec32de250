"""The control for `skip`: the frozen text pass and one trained matrix, without a prompt and so without instructions.

Legend: B texts, D the backbone's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pe.baselines.common import content_hash, short_name
from pe.config import BackboneConfig
from pe.method.backbone import Backbone
from pe.method.encoder import Embed
from pe.method.packing import inverse
from pe.method.requests import Instruction, Requests, Truncation
from pe.method.skip import mapped, mean_states
from pe.method.trainable import TrainableModule
from pe.method.turns import in_turn
from pe.runs.files import written_into


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
        read = (self.backbone.revision, self.backbone.num_layers, self.backbone.quantize)
        return content_hash(self.trainable_state(), *read, self.max_length)

    @in_turn
    def forward(self, requests: Requests) -> Tensor:
        """L2-normalised embeddings `[B, D]` float32, in the order of the texts, with gradient."""
        order, ids = self._sorted(requests)
        return self._embed(ids)[inverse(order, self.device)]

    @in_turn
    def readings(self, requests: Requests, at_most: int | None = None) -> list[list[int]]:
        """Token ids of each text, cut to `max_length`, or to `at_most`, and counted; the instruction is not read."""
        return self.truncation.cut_to(self.max_length, self.backbone.text_tokenizer(requests.texts), at_most)

    def _embed_under(self, wanted: Sequence[Instruction]) -> Embed:
        return lambda _, ids: self._embed(ids)[None]

    def _embed(self, ids: Sequence[Sequence[int]]) -> Tensor:
        means = self.backbone.read(ids, mean_states).pooled
        assert means is not None
        return mapped(means, self.weight)

    def save_pretrained(self, path: str | Path, *, card: str = "") -> None:
        """Write what trains; the control is not meant to be loaded elsewhere."""
        with written_into(Path(path)) as folder:
            save_file(self.trainable_state(), folder / "linear.safetensors")
            if card:
                (folder / "README.md").write_text(card, encoding="utf-8")

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that train: the matrix."""
        return {"map": [self.weight]}

"""The frozen backbone without prompts: what a prompt has to beat.

Legend: N texts, D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pe.baselines.common import BARE, Pooling, Reading, Templates, content_hash, pool, short_name
from pe.config import BackboneConfig
from pe.method.backbone import Backbone
from pe.method.encoder import Embed, Encoder
from pe.method.packing import inverse, pack
from pe.method.requests import Instruction, Requests, Truncation, lesser
from pe.method.turns import in_turn


class FrozenEncoder(Encoder):
    """Pooled final states of the unchanged backbone, packed.

    Attributes:
        backbone: the frozen decoder.
        name: what tables call it.
        pooling: mean over the text's tokens, or the last token.
        templates: bare texts by default; `Templates()` puts the instruction before queries.
        truncation: counts since the encoder was made.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        pooling: Pooling = "mean",
        templates: Templates | None = None,
        max_length: int = 256,
    ) -> None:
        self.backbone, self.pooling, self.max_length = backbone, pooling, max_length
        self.templates = templates or Templates(query=BARE)
        self.name = f"frozen-{short_name(backbone.name)}-{pooling}"
        self.truncation = Truncation()

    @classmethod
    def from_config(
        cls,
        config: BackboneConfig,
        device: torch.device | str = "cpu",
        *,
        pooling: Pooling = "mean",
        templates: Templates | None = None,
        max_length: int = 256,
    ) -> FrozenEncoder:
        """Load the backbone that `config` names."""
        backbone = Backbone.from_pretrained(config, torch.device(device))
        return cls(backbone, pooling=pooling, templates=templates, max_length=max_length)

    @property
    def revision(self) -> str:
        read = (self.backbone.revision, self.backbone.num_layers, self.backbone.quantize)
        return content_hash({}, *read, self.pooling, self.templates, self.max_length)

    @in_turn
    @torch.no_grad()
    def __call__(self, requests: Requests) -> Tensor:
        """L2-normalised embeddings `[N, D]` float32, in the order of the texts."""
        order, readings = self._sorted(requests)
        return self._embed(readings)[inverse(order, self.device)]

    @in_turn
    def readings(self, requests: Requests, at_most: int | None = None) -> list[Reading]:
        limit = lesser(self.max_length, at_most)
        return self.templates.read(self.backbone.text_tokenizer, requests, limit, self.truncation)

    def _embed_under(self, wanted: Sequence[Instruction]) -> Embed:
        return lambda _, readings: self._embed(readings)[None]

    def _embed(self, readings: Sequence[Reading]) -> Tensor:
        """`[N, D]` of readings that stand sorted by length."""
        ids, segments = pack([reading.ids for reading in readings], self.device)
        with self.backbone.as_texts_are_read():
            hidden, _ = self.backbone(self.backbone.token_rows(ids), segments)
        return pool(self.backbone, hidden, readings, self.pooling)

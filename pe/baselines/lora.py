"""The peer: LoRA fine-tuning of the same backbone (PEFT, all linear layers), in three forms that compute the same.

padded        queries and documents each padded to their longest text, scaled_dot_product_attention, decoder and
              adapters as transformers and PEFT have them: common practice
checkpointed  the same with activation checkpointing, as for large models (the recipe of arXiv 2509.24291)
packed        no padding at all: one row of tokens through PromptEmbedder's own attention function, norms fused, and
              adapters where they have no dropout

Legend: B texts, L tokens of the longest, D the backbone's width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pe.baselines.common import Pooling, Reading, Templates, content_hash, pool, short_name
from pe.config import BackboneConfig, LoraSettings
from pe.method.adapters import lora_config, prepare_adapters, quantize_adapted
from pe.method.backbone import Backbone
from pe.method.encoder import Embed
from pe.method.layers import stacked_layers
from pe.method.packing import inverse, pack, to_device
from pe.method.quantized import usable
from pe.method.requests import Instruction, Requests, Side, Truncation, lesser
from pe.method.rms_norm import restore_norms
from pe.method.token_weights import TokenWeights
from pe.method.trainable import TrainableModule
from pe.method.turns import in_turn
from pe.runs.files import written_into

ADAPTER = "lora"
Form = Literal["padded", "checkpointed", "packed"]


@dataclass(frozen=True, kw_only=True)
class LoraBaselineConfig:
    """The peer's options; the defaults are those of arXiv 2509.24291."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(rank=16, alpha=64, dropout=0.1))
    form: Form = "padded"
    pooling: Pooling = "mean"
    """mean: over the text's tokens, the instruction left out; last: the last token; weighted: the mean with a learned
    weight for each token, as in PromptEmbedder's `skip: weighted` (packed alone)."""
    quantize: Literal["none", "int8"] = "none"
    """Type of the frozen weights' products, forward; their gradient is that of the rounded weights (packed alone, and
    without dropout). A device without instructions for it takes none, with a warning."""
    upper_layers: int | None = None
    """Adapters on this many of the last layers alone: those below run without gradient; None: on all."""
    max_length: int = 256
    """Tokens of a text, its instruction not counted."""
    templates: Templates = field(default_factory=Templates)

    def __post_init__(self) -> None:
        if self.pooling == "weighted" and self.form != "packed":
            raise ValueError(f"pooling: 'weighted' needs form 'packed', got {self.form!r}")
        if self.quantize != "none" and (self.form != "packed" or self.lora.dropout):
            raise ValueError(
                f"quantize: {self.quantize!r} needs form 'packed' without dropout, got {self.form!r} with"
                f" {self.lora.dropout:g}"
            )
        if self.backbone.quantize != "none":
            raise ValueError(
                f"backbone.quantize: expected 'none' for LoRA, which reads texts with gradient, got"
                f" {self.backbone.quantize!r}; give the baseline --model.backbone.quantize=none"
            )
        if self.backbone.entry_layer:
            raise ValueError(
                f"backbone.entry_layer: expected 0 for LoRA, which has no soft tokens, got {self.backbone.entry_layer}"
            )


class LoraEmbedder(TrainableModule):
    """A decoder with LoRA adapters on its linear layers, trained through all text tokens.

    Threads may share one as they may a PromptEmbedder, but for the checkpointed form under a training loop of one's
    own: its backward pass runs the decoder again, while another thread may encode.

    Attributes:
        config: the options.
        name: what tables call it.
        backbone: the decoder; of it the adapters alone train.
        token_weights: those of a weighted mean, or None.
        truncation: counts since the model was made.
    """

    def __init__(self, config: LoraBaselineConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.name = f"lora-{short_name(backbone.name)}-{config.pooling}"
        self.truncation = Truncation()
        is_weighted = config.pooling == "weighted"
        self.token_weights = TokenWeights(backbone.hidden_size, backbone.device) if is_weighted else None
        exclude = [] if config.upper_layers is None else linear_layers_below(backbone, config.upper_layers)
        backbone.model.add_adapter(lora_config(config.lora, exclude=exclude), ADAPTER)
        prepare_adapters(backbone.model, ADAPTER, fused=config.form == "packed")
        if (kind := usable(config.quantize, backbone.device)) != "none":
            quantize_adapted(backbone.model, kind)
        if config.form != "packed":
            restore_norms(backbone.model)
        if config.form == "checkpointed":
            checkpoint_activations(backbone.model)
        self.train(self.training)

    @classmethod
    def from_config(cls, config: LoraBaselineConfig, device: torch.device | str = "cpu") -> LoraEmbedder:
        """Load the backbone that `config` names and give it fresh adapters."""
        return cls(config, Backbone.from_pretrained(config.backbone, torch.device(device)))

    @property
    def revision(self) -> str:
        return content_hash(self.trainable_state(), self.backbone.revision, self.config)

    @in_turn
    def train(self, mode: bool = True) -> LoraEmbedder:
        """The whole decoder follows `mode`, as in common practice; checkpointing acts in training mode alone."""
        super().train(mode)
        self.backbone.model.train(mode)
        return self

    # From texts to embeddings.

    @in_turn
    def forward(self, requests: Requests) -> Tensor:
        """L2-normalised embeddings `[B, D]` float32, in the order of the texts, with gradient."""
        if self.config.form == "packed":
            order, readings = self._sorted(requests)
            return self._packed(readings)[inverse(order, self.device)]
        readings = list(self.readings(requests) if requests.read is None else requests.read)
        sides: dict[Side, list[int]] = {}
        for place in range(len(readings)):
            sides.setdefault(requests.instruction(place).side, []).append(place)
        order = [place for places in sides.values() for place in places]
        parts = [self._padded([readings[i] for i in places]) for places in sides.values()]
        return torch.cat(parts)[inverse(order, self.device)]

    @in_turn
    def readings(self, requests: Requests, at_most: int | None = None) -> list[Reading]:
        """Instruction and text of each request as token ids, the text cut to `max_length` or `at_most`, and counted."""
        limit = lesser(self.config.max_length, at_most)
        return self.config.templates.read(self.backbone.text_tokenizer, requests, limit, self.truncation)

    def tokenize(self, requests: Requests) -> list[list[int]]:
        """Token ids of each request."""
        return [reading.ids for reading in self.readings(requests)]

    def _embed_under(self, wanted: Sequence[Instruction]) -> Embed:
        """Packed, whatever the form."""
        return lambda _, readings: self._packed(readings)[None]

    def _packed(self, readings: Sequence[Reading]) -> Tensor:
        """`[B, D]` of readings that stand sorted by length, without padding."""
        ids, segments = pack([reading.ids for reading in readings], self.device)
        hidden, _ = self.backbone(self.backbone.token_rows(ids), segments)
        return pool(self.backbone, hidden, readings, self.config.pooling, self.token_weights)

    def _padded(self, readings: Sequence[Reading]) -> Tensor:
        """`[B, D]` of readings padded on the right to the longest."""
        longest, model = max(map(len, readings)), self.backbone.model
        ids = to_device([reading.ids + [0] * (longest - len(reading)) for reading in readings], self.device)
        lengths = to_device(list(map(len, readings)), self.device)
        places = torch.arange(longest, device=self.device)
        mask = places < lengths[:, None]
        if model.config._attn_implementation != self.backbone.stock_attention:
            model.set_attn_implementation(self.backbone.stock_attention)
        states = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state  # [B, L, D]
        if self.config.pooling == "last":
            return F.normalize(states[torch.arange(len(readings), device=self.device), lengths - 1].float(), dim=-1)
        starts = to_device([reading.start for reading in readings], self.device)
        weights = (mask & (places >= starts[:, None])).float()
        mean = torch.einsum("bl,bld->bd", weights, states.float()) / weights.sum(1, keepdim=True)
        return F.normalize(mean, dim=-1)

    # What trains, and what is saved.

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that train: the adapters, and the weights of the tokens where the mean has some."""
        return {"lora": [p for p in self.parameters() if p.requires_grad]}

    def save_pretrained(self, path: str | Path, *, card: str = "") -> None:
        """Write the adapters as a PEFT adapter, the options and the tokens' weights beside them."""
        options = {"baseline": "lora", "config": dataclasses.asdict(self.config)}
        with written_into(Path(path)) as folder:
            self.backbone.model.save_pretrained(folder)
            if self.token_weights is not None:
                save_file({"query": self.token_weights.query.detach().cpu()}, folder / "token_weights.safetensors")
            (folder / "baseline.json").write_text(json.dumps(options, indent=2), encoding="utf-8")
            if card:
                (folder / "README.md").write_text(card, encoding="utf-8")


def linear_layers_below(backbone: Backbone, upper: int) -> list[str]:
    """Names of the linear layers below the `upper` last layers of a decoder.

    Raises:
        ValueError: there are not as many layers, or they do not stand in one list.
    """
    layers = stacked_layers(backbone.model)
    count = 0 if layers is None else len(layers)
    if layers is None or not 1 <= upper <= count:
        raise ValueError(f"upper_layers: expected 1 to {count}, the layers of {backbone.name} in one list, got {upper}")
    below = {id(part) for layer in layers[: count - upper] for part in layer.modules()}
    kinds = (nn.Linear, Conv1D)
    return [name for name, part in backbone.model.named_modules() if isinstance(part, kinds) and id(part) in below]


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer's activations in the backward pass; transformers renamed the method after 5.17."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)

"""The systems whose trained embeddings are scored: titles and builders, for `bench.quality`, `instruct` and `transfer`.

They are built from a recipe, with the models and texts that it names. `bench.cases` has those whose steps are timed, on
random weights and batches of token ids: the two share options, but no builder and no name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from bench.cases import ALONE, BOTH, PREFIX
from pe.baselines.common import Pooling
from pe.baselines.linear import LinearEmbedder
from pe.baselines.lora import LoraBaselineConfig, LoraEmbedder
from pe.baselines.static import StaticPromptEmbedder
from pe.config import AlignmentConfig, BackboneConfig, LoraSettings, PrompterConfig, Recipe, TemplatesConfig
from pe.data.batches import BatchPlan
from pe.integrations.mteb import TextEncoder
from pe.losses import instructions_of
from pe.method.backbone import Backbone
from pe.method.loading import dtype_on
from pe.model import PromptEmbedder
from pe.step import Trainable


class System(Trainable, TextEncoder, Protocol):
    """Something that trains and encodes."""


Build = Callable[[Recipe, BatchPlan, torch.device], System]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A system: its row's title, how it is built for a recipe and its batches, and a multiple of the recipe's steps."""

    title: str
    build: Build
    times: int = 1


def frozen_dtype(config: BackboneConfig, device: torch.device) -> str:
    """Type of a backbone's weights on a device, `auto` where the checkpoint decides."""
    return str(dtype_on(device, config.dtype) or "auto").removeprefix("torch.")


def build_pe(**changes: Any) -> Build:
    """PromptEmbedder of the recipe, some options of the model changed; in the prefix layout nothing enters above."""

    def build(recipe: Recipe, plan: BatchPlan, device: torch.device) -> System:
        entry = 0 if changes.get("layout") == "prefix" else recipe.model.backbone.entry_layer
        backbone = dataclasses.replace(recipe.model.backbone, entry_layer=entry)
        model = PromptEmbedder.from_config(dataclasses.replace(recipe.model, **changes, backbone=backbone), device)
        model.start(instructions_of(plan))
        return model

    return build


def build_static(**changes: Any) -> Build:
    """The control: a learned prompt for each instruction of training, in the prompting LLM's place."""

    def build(recipe: Recipe, plan: BatchPlan, device: torch.device) -> System:
        config, known = dataclasses.replace(recipe.model, **changes), instructions_of(plan)
        model = StaticPromptEmbedder.from_config(config, device, instructions=known)
        model.start(known)
        return model

    return build


def build_linear(recipe: Recipe, plan: BatchPlan, device: torch.device) -> System:
    return LinearEmbedder.from_config(recipe.model.backbone, device, max_length=recipe.model.max_length)


def build_lora(pooling: Pooling, dropout: float = 0.1, upper_layers: int | None = None) -> Build:
    """LoRA in its packed form, by default with the published dropout, which costs a third of its time."""

    def build(recipe: Recipe, plan: BatchPlan, device: torch.device) -> System:
        options = dataclasses.replace(recipe.model.backbone, entry_layer=0)  # it has no soft tokens
        backbone = Backbone.from_pretrained(options, device)
        config = LoraBaselineConfig(
            backbone=options,
            lora=LoraSettings(rank=16, alpha=64, dropout=dropout),
            form="packed",
            pooling=pooling,
            upper_layers=None if upper_layers is None else min(upper_layers, backbone.num_layers),
            max_length=recipe.model.max_length,
        )
        return LoraEmbedder(config, backbone)

    return build


SYSTEMS = {
    "pe-weighted": Entry(title="PE, suffix, reader, weighted skip", build=build_pe(skip="weighted")),
    "pe-weighted-longer": Entry(
        title="PE, suffix, reader, weighted skip, 4 times the steps", build=build_pe(skip="weighted"), times=4
    ),
    "pe": Entry(title="PE, suffix, reader", build=build_pe(skip="none")),
    "pe-longer": Entry(title="PE, suffix, reader, 4 times the steps", build=build_pe(skip="none"), times=4),
    "pe-no-reader": Entry(title="PE, suffix", build=build_pe(**ALONE)),
    "pe-text": Entry(title="PE, suffix, reader, text read", build=build_pe(skip="none", conditioning=BOTH)),
    "pe-text-no-reader": Entry(title="PE, suffix, text read", build=build_pe(**ALONE, conditioning=BOTH)),
    "pe-vocabulary": Entry(
        title="PE, suffix, reader, vocabulary",
        build=build_pe(skip="none", alignment=AlignmentConfig(kind="vocabulary")),
    ),
    "pe-prefix": Entry(title="PE, prefix", build=build_pe(**PREFIX, **ALONE)),
    "pe-prefix-text": Entry(title="PE, prefix, text read", build=build_pe(**PREFIX, **ALONE, conditioning=BOTH)),
    "static-weighted": Entry(
        title="static prompts, reader, weighted skip (control)", build=build_static(skip="weighted")
    ),
    "static": Entry(title="static prompts, reader (control)", build=build_static(skip="none")),
    "linear": Entry(title="frozen text means, linear map (control)", build=build_linear),
    "lora-mean": Entry(title="LoRA, mean", build=build_lora("mean")),
    "lora-mean-dropless": Entry(title="LoRA, mean, no dropout", build=build_lora("mean", 0.0)),
    "lora-mean-longer": Entry(title="LoRA, mean, 4 times the steps", build=build_lora("mean"), times=4),
    "lora-weighted": Entry(title="LoRA, weighted mean", build=build_lora("weighted")),
    "lora-weighted-longer": Entry(
        title="LoRA, weighted mean, 4 times the steps", build=build_lora("weighted"), times=4
    ),
    "lora-weighted-dropless": Entry(title="LoRA, weighted mean, no dropout", build=build_lora("weighted", 0.0)),
    "lora-weighted-dropless-longer": Entry(
        title="LoRA, weighted mean, no dropout, 4 times the steps", build=build_lora("weighted", 0.0), times=4
    ),
    "lora-last-layers": Entry(
        title="LoRA, weighted mean, no dropout, last 3 layers", build=build_lora("weighted", 0.0, 3)
    ),
    "lora-last": Entry(title="LoRA, last token", build=build_lora("last")),
    "lora-last-dropless": Entry(title="LoRA, last token, no dropout", build=build_lora("last", 0.0)),
}
"""`pe-prefix` and `pe-prefix-text`: the paper's layout; it does not publish which of the two."""
INSTRUCTED = {
    "pe": Entry(title="PE, lens", build=build_pe()),
    "pe-no-lens": Entry(title="PE, no lens", build=build_pe(lens_rank=0)),
    "pe-tiny-prompter": Entry(
        title="PE, lens, tiny-prompter", build=build_pe(prompter=PrompterConfig(), templates=TemplatesConfig())
    ),
    "static": Entry(title="static prompts, lens (control)", build=build_static()),
    "lora": Entry(
        title="LoRA that reads the instruction, weighted mean, no dropout", build=build_lora("weighted", 0.0)
    ),
}
"""Those of the table of instructions, whose recipe has a lens."""

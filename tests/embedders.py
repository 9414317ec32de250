"""Embedders and baselines of tiny models, what they are asked, and how two of them are compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pe.baselines.lora import Form, LoraBaselineConfig, LoraEmbedder
from pe.baselines.static import StaticPromptEmbedder
from pe.config import AlignmentConfig, LoraSettings, ModelConfig, PrompterConfig
from pe.method.alignment import build_alignment
from pe.method.backbone import Backbone
from pe.method.captured import Captured
from pe.method.graphs import Work
from pe.method.prompting import PromptingLLM
from pe.model import Instruction, PromptEmbedder, Requests
from tests import oracle
from tests.tiny import PLAIN, byte_tokenizer, decoder, language_model

TEXTS = ["the cat sat", "a", "an old man walks along the other bank of the river", "the end of a day"]
REQUESTS = Requests(TEXTS, [Instruction("find the answer"), Instruction("same topic?", "document")], [0, 1, 0, 1])
LONGER = Requests(
    ["a river bank " * 9, "b", "an old man", "the end", "of " * 30],
    [Instruction("find what is said about the same river"), Instruction("same", "document")],
    [0, 0, 1, 1, 0],
)
INSTRUCTIONS = [Instruction("find the answer"), Instruction("represent it", "document")]


def backbone(architecture: str = "qwen3", bos: bool = False, **changes: Any) -> Backbone:
    return Backbone(decoder(architecture, **changes), byte_tokenizer(bos), architecture)


def build(
    architecture: str,
    *,
    prompter: str = "llama",
    bos: bool = False,
    trainable: str = "full",
    shape: Mapping[str, int] | None = None,
    **options: Any,
) -> PromptEmbedder:
    """An untrained embedder of random models, without reader and skip; `shape` changes the backbone's sizes."""
    config = ModelConfig(
        prompter=PrompterConfig(soft_tokens=3, temperature=0.7, trainable=trainable),  # type: ignore[arg-type]
        alignment=AlignmentConfig(init="orthogonal"),
        max_length=100,
        **PLAIN | options,
    )
    torch.manual_seed(0)
    written = PromptingLLM(language_model(prompter, hidden_size=24, head_dim=6), byte_tokenizer(), config.prompter)
    read = backbone(architecture, bos, **(shape or {}))
    return PromptEmbedder(config, written, build_alignment(written, read, config.alignment), read).eval()


def with_reader(architecture: str = "qwen3", **options: object) -> PromptEmbedder:
    """An embedder whose reader acts: its B matrices, zero at the start, are perturbed once."""
    settings = LoraSettings(rank=2, alpha=4, **options)  # type: ignore[arg-type]
    model = build(architecture, reader="activated_lora", reader_lora=settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.backbone.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def lora(form: Form, architecture: str = "qwen3", dropout: float = 0.0, **options: Any) -> LoraEmbedder:
    """Adapters far from the identity, the same in every form."""
    settings = LoraSettings(rank=2, alpha=4, dropout=dropout)
    model = LoraEmbedder(LoraBaselineConfig(lora=settings, form=form, **options), backbone(architecture))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.trainable_parameters()["lora"]:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def static(start: Any = "vocabulary", **options: Any) -> StaticPromptEmbedder:
    config = ModelConfig(prompter=PrompterConfig(soft_tokens=3), **PLAIN | options)
    return StaticPromptEmbedder.fresh(config, backbone(), INSTRUCTIONS, start=start)


class Recorder:
    """Counts what it records, and repeats it by running it."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, work: Work) -> Work:
        self.count += 1
        work()
        return work


def captured(model: PromptEmbedder) -> Recorder:
    """Have the model record its passes."""
    recorder = Recorder()
    model.captured = Captured(model.prompter, model.backbone, recorder)
    return recorder


def gradients(model: nn.Module, embeddings: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random functional of the embeddings, by parameter name."""
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(3))
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad((embeddings * weights).sum(), list(named.values())), strict=True))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def assert_equal(model: PromptEmbedder, requests: Requests = REQUESTS) -> None:
    got, expected = model(requests), oracle.embed(model, requests)
    assert relative_error(got, expected) < 1e-5
    packed, plain = gradients(model, got), gradients(model, expected)
    for part in ("prompter.", "alignment.", *(["skip."] if model.skip is not None else [])):
        ours, theirs = (torch.cat([g[n].flatten() for n in g if n.startswith(part)]) for g in (packed, plain))
        assert theirs.norm() > 1e-4, f"the oracle's gradient of {part} vanishes: the comparison would say nothing"
        assert relative_error(ours, theirs) < 1e-5, part

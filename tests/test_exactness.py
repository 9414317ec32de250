"""Packed passes equal the stock model's forward over each concatenated sequence: outputs and gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from pe.config import AlignmentConfig, ModelConfig, PrompterConfig
from pe.method.alignment import LinearAlignment, build_alignment
from pe.method.backbone import Backbone
from pe.method.prompting import PromptingLLM
from pe.model import Instruction, PromptEmbedder, Requests
from tests import oracle
from tests.tiny import ARCHITECTURES, PLAIN, byte_tokenizer, decoder, language_model

POOLING = {"suffix": "mean_prompt", "prefix": "mean_text"}
TEXTS = ["the cat sat", "a", "an old man walks along the other bank of the river", "the end of a day"]
REQUESTS = Requests(
    TEXTS, [Instruction("find the answer"), Instruction("same topic?", "document")], [0, 1, 0, 1]
)  # fmt: skip


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
    backbone = Backbone(decoder(architecture, **(shape or {})), byte_tokenizer(bos), architecture)
    return PromptEmbedder(config, written, build_alignment(written, backbone, config.alignment), backbone).eval()


def gradients(model: PromptEmbedder, embeddings: Tensor) -> dict[str, Tensor]:
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


@pytest.mark.parametrize("conditioning", ["instruction", "instruction_and_text"])
@pytest.mark.parametrize("layout", ["suffix", "prefix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_concatenated_forward(architecture: str, layout: str, conditioning: str) -> None:
    assert_equal(build(architecture, layout=layout, conditioning=conditioning, pooling=POOLING[layout]))


@pytest.mark.parametrize("layout", ["suffix", "prefix"])
def test_last_token_pooling(layout: str) -> None:
    assert_equal(build("qwen3", layout=layout, pooling="last"))


@pytest.mark.parametrize("layout", ["suffix", "prefix"])
def test_leading_special_token(layout: str) -> None:
    assert_equal(build("llama", bos=True, layout=layout, pooling=POOLING[layout]))


@pytest.mark.parametrize("prompter", ["qwen3", "gemma3", "granite", "gpt_neox", "gpt2"])
def test_prompting_llm_families(prompter: str) -> None:
    changes = {"n_embd": 24} if prompter == "gpt2" else {}
    config = PrompterConfig(soft_tokens=3)
    model = build("qwen3")
    model.prompter = PromptingLLM(language_model(prompter, **changes), byte_tokenizer(), config)
    width = model.prompter.hidden_size
    weight = torch.randn(width, 32, generator=torch.Generator().manual_seed(0)) / width**0.5
    assert isinstance(model.alignment, LinearAlignment)
    model.alignment.weight = torch.nn.Parameter(weight)
    assert_equal(model.eval())

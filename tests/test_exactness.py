"""Packed passes equal the stock model's forward over each concatenated sequence: outputs and gradients."""

from __future__ import annotations

import pytest
import torch

from pe.config import PrompterConfig
from pe.method.alignment import LinearAlignment
from pe.method.prompting import PromptingLLM
from tests.embedders import assert_equal, build
from tests.tiny import ARCHITECTURES, byte_tokenizer, language_model

POOLING = {"suffix": "mean_prompt", "prefix": "mean_text"}


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


@pytest.mark.parametrize(
    ("prompter", "dtype"),
    [
        ("qwen3", torch.float32),
        ("gemma3", torch.float32),
        ("granite", torch.float64),  # its scaled logits round away 2e-5 of the gradient in float32, 2e-8 in float64
        ("gpt_neox", torch.float32),
        ("gpt2", torch.float32),
    ],
)
def test_prompting_llm_families(prompter: str, dtype: torch.dtype) -> None:
    changes = {"n_embd": 24} if prompter == "gpt2" else {}
    config = PrompterConfig(soft_tokens=3)
    model = build("qwen3")
    model.prompter = PromptingLLM(language_model(prompter, **changes), byte_tokenizer(), config)
    width = model.prompter.hidden_size
    weight = torch.randn(width, 32, generator=torch.Generator().manual_seed(0)) / width**0.5
    assert isinstance(model.alignment, LinearAlignment)
    model.alignment.weight = torch.nn.Parameter(weight)
    assert_equal(model.eval().to(dtype))

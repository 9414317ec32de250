"""Fused norms against the modules that they stand for; on a CPU the fused form is asked for by hand."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pe.baselines.lora import Form, LoraBaselineConfig, LoraEmbedder
from pe.config import LoraSettings
from pe.method import rms_norm
from pe.method.backbone import Backbone
from pe.method.probes import UnsupportedBackbone, UnsupportedPrompter
from pe.method.rms_norm import fuse_norms, is_rms_norm, restore_norms, stock_norms
from tests.embedders import REQUESTS, build, gradients, relative_error
from tests.tiny import byte_tokenizer, decoder

FUSED = {"llama": 5, "qwen3": 9, "phi3": 5, "granite": 5}
OTHERS = ("gemma2", "gemma3", "olmo2", "gpt_neox", "gpt2", "gpt_oss")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The width of each norm that ran fused, which all do as long as this lasts."""
    widths: list[int] = []
    whole = rms_norm.rms_norm

    def noted(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        widths.append(len(weight))
        return whole(x, weight, eps)

    monkeypatch.setattr(rms_norm, "rms_norm", noted)
    monkeypatch.setattr(rms_norm, "is_fused_on", lambda _: True)
    return widths


def outputs(norm: nn.Module, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a norm makes of rows, and the gradients to rows and weight of a fixed functional of it."""
    x, (weight,) = rows.clone().requires_grad_(), norm.parameters()
    out = norm(x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, *torch.autograd.grad(out, (x, weight), upstream)


@pytest.mark.parametrize("architecture", FUSED)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2])
def test_equals_the_module(architecture: str, dtypes: tuple[torch.dtype, torch.dtype], calls: list[int]) -> None:
    """In float32 to rounding; in bfloat16 no further from it than the module is, and of the same types."""
    of_rows, of_weight = dtypes
    rounding = 1e-6 if of_rows == torch.float32 else 2**-9
    model = decoder(architecture)
    norms = [module for module in model.modules() if is_rms_norm(module)]
    assert len(norms) == FUSED[architecture]
    for stock in norms:
        fused = copy.deepcopy(stock)
        fuse_norms(fused)
        calls.clear()
        rows = torch.randn(3, 5, stock.weight.numel(), generator=torch.Generator().manual_seed(0)).to(of_rows)
        wide = outputs(stock, rows.float())
        ours, theirs = (outputs(norm.to(of_weight), rows) for norm in (fused, stock))
        assert len(calls) == 1
        for got, same, exact in zip(ours, theirs, wide, strict=True):
            assert got.dtype == same.dtype
            assert relative_error(got.float(), exact) <= 1.1 * relative_error(same.float(), exact) + rounding


def test_autocast_does_not_widen(calls: list[int]) -> None:
    model = decoder("llama")
    fuse_norms(model.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert model.norm(torch.ones(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert model.norm(torch.ones(2, 32)).dtype == torch.float32


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_an_embedder_of_fused_norms(architecture: str, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models of it, their text pass and their gradients."""
    options = {"layout": "suffix", "pooling": "mean_prompt", "reader": "activated_lora", "skip": "weighted"}
    model = build(architecture, **options)
    torch.manual_seed(1)
    for parameter in model.backbone.reader_parameters():  # B is zero at the start
        nn.init.normal_(parameter, std=0.1)
    calls.clear()
    ours = model(REQUESTS)
    found = gradients(model, ours)
    assert {32, 24} <= set(calls)
    monkeypatch.setattr(rms_norm, "is_fused_on", lambda _: False)
    calls.clear()
    stock = model(REQUESTS)
    assert relative_error(ours, stock) < 1e-5
    for name, gradient in gradients(model, stock).items():
        assert relative_error(found[name], gradient) < 2e-5, name
    assert not calls


@pytest.mark.parametrize("architecture", OTHERS)
def test_other_formulas_stay(architecture: str, calls: list[int]) -> None:
    model = decoder(architecture)
    fuse_norms(model)
    calls.clear()
    model(torch.tensor([[3, 4, 5]]))
    assert not calls


def test_what_only_looks_like_one_stays() -> None:
    class Scaled(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(hidden_states)

    assert is_rms_norm(LlamaRMSNorm(8))
    assert not is_rms_norm(Scaled(8))
    assert not is_rms_norm(nn.LayerNorm(8, bias=False))
    assert not is_rms_norm(nn.RMSNorm((2, 8), eps=1e-6))
    assert not is_rms_norm(nn.Linear(8, 1, bias=False))


def test_copies_and_pickles_are_their_own(calls: list[int]) -> None:
    model = decoder("llama")
    fuse_norms(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.norm.weight.fill_(2.0)
        assert relative_error(other.norm(torch.ones(1, 32)), torch.full((1, 32), 2.0)) < 1e-4
        assert relative_error(model.norm(torch.ones(1, 32)), torch.full((1, 32), 2.0)) > 0.1
    calls.clear()
    with stock_norms(model):
        model.norm(torch.ones(1, 32))
        assert not calls
    model.norm(torch.ones(1, 32))
    assert len(calls) == 1
    fuse_norms(model)
    assert len(restore_norms(model)) == 5
    model.norm(torch.ones(1, 32))
    assert len(calls) == 1


def test_a_wrong_fused_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """When an embedder is built, its fused norms are compared with those of transformers."""
    whole = rms_norm.rms_norm
    monkeypatch.setattr(rms_norm, "is_rms_norm", lambda module: "RMSNorm" in type(module).__name__)
    monkeypatch.setattr(rms_norm, "is_fused_on", lambda _: True)
    build("llama", layout="suffix", pooling="mean_prompt")
    monkeypatch.setattr(rms_norm, "rms_norm", lambda x, weight, eps: 1.01 * whole(x, weight, eps))
    with pytest.raises(UnsupportedPrompter, match="differs from the plain forward"):
        build("llama", layout="suffix", pooling="mean_prompt")
    with pytest.raises(UnsupportedBackbone, match="differs from the stock forward"):
        Backbone(decoder("llama"), byte_tokenizer(), "llama")


@pytest.mark.parametrize(("form", "is_stock"), [("padded", True), ("checkpointed", True), ("packed", False)])
def test_the_padded_peers_are_as_transformers_has_them(form: Form, is_stock: bool, calls: list[int]) -> None:
    """Common practice is what (a) and (b) are; the best LoRA that we can build has our norms."""
    backbone = build("qwen3", layout="suffix", pooling="mean_prompt").backbone
    peer = LoraEmbedder(LoraBaselineConfig(lora=LoraSettings(rank=2), form=form, max_length=100), backbone)
    calls.clear()
    peer(REQUESTS)
    assert bool(calls) != is_stock

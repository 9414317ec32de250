"""Adapters that are fused into the products, against stock PEFT layers of the same weights."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn

from pe.config import LoraSettings
from pe.method.adapters import FusedLinear, LowRankSum, lora_config, prepare_adapters, quantize_adapted
from pe.method.quantized import CENTRE, quantized_rows
from tests.embedders import with_reader
from tests.processors import sums_int8_exactly
from tests.tiny import decoder

ADAPTER = "reader"


class Layers(NamedTuple):
    """One linear layer 32 -> 48 with LoRA: PEFT's own, and the same as `prepare_adapters` leaves it."""

    stock: lora.Linear
    ours: FusedLinear


@pytest.fixture
def layers() -> Layers:
    torch.manual_seed(0)
    model = decoder("qwen3").eval()
    model.add_adapter(lora_config(LoraSettings(rank=3, alpha=5, dropout=0.5)), ADAPTER)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model.eval()
    prepared = copy.deepcopy(model)
    prepare_adapters(prepared, ADAPTER)
    return Layers(*(each.layers[0].mlp.gate_proj for each in (model, prepared)))


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the weights that are merged."""
    merged: list[torch.Size] = []
    addmm = torch.addmm

    def note(weight: Tensor, *others: Tensor, alpha: float) -> Tensor:
        merged.append(weight.shape)
        return addmm(weight, *others, alpha=alpha)

    monkeypatch.setattr(torch, "addmm", note)
    return merged


def test_one_product_gives_what_three_do(layers: Layers, sums: list[torch.Size]) -> None:
    before = layers.ours.base_layer.weight.detach().clone()
    with torch.no_grad():
        x = torch.randn(2, 20, 32)
        expected, plain = layers.stock(x), layers.stock.base_layer(x)
        torch.testing.assert_close(layers.ours(x), expected)
    assert sums == [torch.Size([48, 32])]
    assert (expected - plain).norm() > 0.1 * plain.norm()
    assert torch.equal(layers.ours.base_layer.weight, before)


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """Types of the products that an adapter's is added to."""
    dtypes: list[torch.dtype] = []
    forward = LowRankSum.forward

    def note(ctx: Any, x: Tensor, *others: Any) -> Tensor:
        dtypes.append(x.dtype)
        return forward(ctx, x, *others)

    monkeypatch.setattr(LowRankSum, "forward", staticmethod(note))
    return dtypes


def results(layer: lora.Linear, x: Tensor) -> list[Tensor]:
    """What a layer makes of rows, and the gradients of a fixed functional of it to rows, A and B."""
    out = layer(x)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    trained = [layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
    return [out, *torch.autograd.grad(out, [x, *trained] if x.requires_grad else trained, upstream)]


@sums_int8_exactly
@pytest.mark.parametrize("bias", [False, True])
def test_a_weight_in_8_bits_has_the_gradient_of_what_it_stands_for(layers: Layers, bias: bool) -> None:
    """Against PEFT's layer with that weight; its output with the input rounded, too, on the way to that weight."""
    quantize_adapted(layers.ours, "int8")
    narrow = layers.ours.eight_bits
    assert narrow is not None
    layers.stock.base_layer.weight = nn.Parameter(narrow.plain() * narrow.scale[:, None], False)
    for layer in layers if bias else ():
        layer.base_layer.bias = nn.Parameter(torch.arange(48.0), requires_grad=False)
    x = torch.randn(2, 20, 32, requires_grad=True)
    (out, *ours), (plain, *theirs) = (results(layer, x) for layer in (layers.ours, layers.stock))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    rows = quantized_rows(x.detach().flatten(0, 1), "int8")
    rounded = ((rows.values.float() - CENTRE) * rows.scale).unflatten(0, (2, 20))
    with torch.no_grad():
        expected = plain - layers.stock.base_layer(x) + layers.stock.base_layer(rounded)
        torch.testing.assert_close(layers.ours(x), out, rtol=1e-4, atol=1e-4)  # in evaluation, too
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert (out - plain).norm() > 0.1


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("of_x", [False, True])
def test_an_added_product_trains_alike(layers: Layers, added: list[torch.dtype], bias: bool, of_x: bool) -> None:
    x = torch.randn(2, 3, 32, requires_grad=of_x)
    for layer in layers if bias else ():
        layer.base_layer.bias = nn.Parameter(torch.arange(48.0), requires_grad=False)
    found = [results(layer, x) for layer in layers]
    assert added == [torch.float32]
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("of_base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_rows", [torch.float32, torch.bfloat16])
def test_autocast_adds_in_its_type(
    layers: Layers, added: list[torch.dtype], of_rows: torch.dtype, of_base: torch.dtype
) -> None:
    """No further from float32 than PEFT's layer is."""
    x = torch.randn(64, 32).to(of_rows).requires_grad_()
    exact = results(layers.stock, x.float().detach().requires_grad_())
    for layer in layers:
        layer.base_layer.to(of_base)
    with torch.autocast("cpu", torch.bfloat16):
        ours, stock = (results(layer, x) for layer in (layers.ours, layers.stock))
    assert added == [torch.bfloat16]
    for got, same, wide in zip(ours, stock, exact, strict=True):
        assert got.dtype == same.dtype
        error, allowed = ((each.float() - wide).norm() / wide.norm() for each in (got, same))
        assert error <= 1.1 * allowed + 1e-3


@pytest.mark.parametrize("trains", [False, True])
def test_a_half_type_adds_in_itself(
    layers: Layers, sums: list[torch.Size], added: list[torch.dtype], trains: bool
) -> None:
    """With gradient and without, nothing merged, and as close to float32 as roundings of the rows are."""
    x = torch.randn(64, 32)
    with torch.set_grad_enabled(trains):
        exact = layers.stock(x)
        layers.ours.base_layer.bfloat16()
        found = layers.ours(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert added == [torch.bfloat16]
    assert not sums
    assert (found.float() - exact).norm() < 2**-7 * exact.norm()


@pytest.mark.parametrize("why", ["training", "off", "two adapters"])
def test_peft_acts_where_nothing_may_be_fused(
    why: str, layers: Layers, sums: list[torch.Size], added: list[torch.dtype]
) -> None:
    x, outputs = torch.randn(32, 32), []
    for layer in layers:
        if why == "two adapters":
            layer.update_layer("second", r=2, lora_alpha=2, config=lora_config(LoraSettings(rank=2)))
            layer.set_adapter([ADAPTER, "second"])
            nn.init.ones_(layer.lora_A["second"].weight)
            nn.init.ones_(layer.lora_B["second"].weight)
        layer.train(why == "training")
        layer._disable_adapters = why == "off"
        torch.manual_seed(1)  # of dropout
        with torch.set_grad_enabled(why == "training"):
            outputs.append(layer(x))
    assert not sums
    assert not added
    assert torch.equal(outputs[0], outputs[1])


def test_the_reader_merges_where_an_embedder_encodes(sums: list[torch.Size]) -> None:
    model, texts = with_reader(), [f"text {n}" for n in range(20)]
    one_by_one = torch.cat([model.encode_tensor([text], instructions=["topic"]) for text in texts], dim=1)
    assert not sums
    together = model.encode_tensor(texts, instructions=["topic"])
    assert len(sums) == 7 * model.backbone.num_layers
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-6)

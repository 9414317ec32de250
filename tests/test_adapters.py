"""Adapters that merge, against stock PEFT layers of the same weights."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn

from pe.adapters import MergingLinear, lora_config, prepare_adapters
from pe.config import LoraSettings
from tests.test_reader import embedder
from tests.tiny import decoder

ADAPTER = "reader"


class Layers(NamedTuple):
    """One linear layer 32 -> 48 with LoRA: PEFT's own, and the same as `prepare_adapters` leaves it."""

    stock: lora.Linear
    ours: MergingLinear


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


@pytest.mark.parametrize("why", ["gradient", "training", "few rows", "autocast", "off", "half", "two adapters"])
def test_peft_acts_where_nothing_may_be_merged(why: str, layers: Layers, sums: list[torch.Size]) -> None:
    x, outputs = torch.randn(31 if why == "few rows" else 32, 32), []
    for layer in layers:
        if why == "half":
            layer.base_layer.bfloat16()
        if why == "two adapters":
            layer.update_layer("second", r=2, lora_alpha=2, config=lora_config(LoraSettings(rank=2)))
            layer.set_adapter([ADAPTER, "second"])
            nn.init.ones_(layer.lora_A["second"].weight)
            nn.init.ones_(layer.lora_B["second"].weight)
        layer.train(why == "training")
        layer._disable_adapters = why == "off"
        torch.manual_seed(1)  # of dropout
        with (
            torch.set_grad_enabled(why == "gradient"),
            torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"),
        ):
            outputs.append(layer(x.bfloat16() if why == "half" else x))
    assert not sums
    assert torch.equal(outputs[0], outputs[1])


def test_the_reader_merges_where_an_embedder_encodes(sums: list[torch.Size]) -> None:
    model, texts = embedder(), [f"text {n}" for n in range(20)]
    one_by_one = torch.cat([model.encode_tensor([text], instructions=["topic"]) for text in texts], dim=1)
    assert not sums
    together = model.encode_tensor(texts, instructions=["topic"])
    assert len(sums) == 7 * model.backbone.num_layers
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-6)

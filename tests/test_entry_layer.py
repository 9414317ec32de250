"""Soft tokens that enter at a middle layer: what stock layers make of them; less runs, trains and is kept."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from pe.baselines.lora import LoraBaselineConfig
from pe.config import BackboneConfig, LoraSettings, ModelConfig, Recipe
from pe.export import check_served
from pe.measure.footprint import estimate, heaviest_batch
from pe.method import layers
from pe.method.backbone import Backbone
from pe.method.norm_bound import NormBound
from pe.method.packing import pack
from pe.method.probes import UnsupportedBackbone
from pe.method.text_store import TextStore
from pe.model import PromptEmbedder
from tests.embedders import REQUESTS, captured, gradients, relative_error
from tests.tiny import byte_tokenizer, decoder
from tests.training import new_model

CPU = torch.device("cpu")
TEXTS = [[5, 6, 7, 8, 9, 10], [17, 18]]
SOFT = [[30, 31, 32], [40, 41, 42]]
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
DECODERS: dict[str, dict[str, object]] = {
    "qwen3": {"num_hidden_layers": 4},
    "gemma3": {"num_hidden_layers": 4, "layer_types": KINDS},  # a window of 4
    "gpt2": {"n_layer": 4},
    "gpt_neox": {"num_hidden_layers": 4},
}


def entered(architecture: str, entry: int) -> Backbone:
    return Backbone(decoder(architecture, **DECODERS[architecture]), byte_tokenizer(), architecture, entry_layer=entry)


def upper_layers(model: PreTrainedModel, entry: int) -> PreTrainedModel:
    """The stock model without its lower layers."""
    upper = copy.deepcopy(model)
    stack = layers.stacked_layers(upper)
    assert stack is not None
    del stack[:entry]
    upper.config.num_hidden_layers -= entry
    if kinds := getattr(upper.config, "layer_types", None):
        upper.config.layer_types = kinds[entry:]
    return upper


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("entry", [1, 3])
def test_states_and_gradients_are_those_of_stock_upper_layers(architecture: str, entry: int) -> None:
    """Which see the text's states of the whole model, and behind them the soft tokens as they come."""
    ours, stock = entered(architecture, entry), decoder(architecture, **DECODERS[architecture]).eval()
    upper = upper_layers(stock, entry)
    ids, segments = pack(SOFT, CPU)
    rows = ours.token_rows(ids).detach().requires_grad_()
    hidden, _ = ours(rows, segments, context=ours.read(TEXTS))
    for place, text in enumerate(TEXTS):
        part = slice(3 * place, 3 * place + 3)
        below = stock(torch.tensor([text]), use_cache=False, output_hidden_states=True).hidden_states[entry]
        soft = rows.detach()[part].requires_grad_()
        states = upper(inputs_embeds=torch.cat([below, soft[None]], dim=1), use_cache=False).last_hidden_state[0, -3:]
        got = ours.model.norm(hidden[part]) if architecture != "gpt_neox" else ours.model.final_layer_norm(hidden[part])
        assert relative_error(got, states) < 1e-5
        upstream = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
        (expected,) = torch.autograd.grad(states, soft, upstream)
        (found,) = torch.autograd.grad(got, rows, upstream, retain_graph=True)
        assert relative_error(found[part], expected) < 1e-4


@pytest.mark.parametrize("architecture", DECODERS)
def test_the_probe_passes_and_sees_layers_that_run(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions that a decoder adds before its first layer come with the soft tokens."""
    entered(architecture, 2)
    monkeypatch.setattr(layers, "passed_by", lambda kind: kind)
    with pytest.raises(UnsupportedBackbone):
        entered(architecture, 2)


def test_texts_keep_what_is_above_alone() -> None:
    whole, ours = entered("qwen3", 0), entered("qwen3", 3)
    expected, found = whole.read(TEXTS), ours.read(TEXTS)
    assert (found.first, len(found.layers)) == (3, 1)
    for one, other in zip(found.layers, expected.layers[3:], strict=True):
        assert all(map(torch.equal, one, other))
    assert whole.fingerprint != ours.fingerprint


def test_a_reader_has_no_weights_below() -> None:
    ours = entered("qwen3", 2)
    ours.add_reader(LoraSettings(rank=2))
    placed = {name.split(".")[2] for name, p in ours.named_parameters() if p.requires_grad}
    assert placed == {"2", "3"}


def test_states_are_bounded_where_soft_tokens_run() -> None:
    bound = NormBound(entered("qwen3", 2), 3.0)
    assert len(bound._handles) == 1  # of four layers the first two are passed by, the last one is free
    bound.close()


def with_entry(recipe: Recipe, entry: int) -> Recipe:
    above = dataclasses.replace(recipe.model.backbone, entry_layer=entry)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, backbone=above))


def test_an_embedder_has_gradients_and_is_the_same_when_it_is_loaded(recipe: Recipe, tmp_path: Path) -> None:
    entering = with_entry(recipe, 1)
    model, texts = new_model(entering), ["the cat sat", "bread"]
    found = gradients(model, model(REQUESTS))
    assert not any(name.startswith("backbone.model.layers.0.") for name in found)
    assert all(gradient.any() for gradient in found.values())
    recorder = captured(model)
    again = gradients(model, model(REQUESTS))
    assert recorder.count
    assert all(relative_error(again[name], gradient) < 1e-5 for name, gradient in found.items())
    model.captured = None
    model.eval()
    expected = model.encode(texts, instruction="find")
    assert (expected == model.encode(texts, instruction="find", store=TextStore.open("memory"))).all()
    model.save_pretrained(tmp_path / "saved")
    again = PromptEmbedder.from_pretrained(tmp_path / "saved")
    assert again.backbone.entry_layer == 1
    assert (again.encode(texts, instruction="find") == expected).all()


def test_memory_is_predicted(recipe: Recipe) -> None:
    batch = heaviest_batch(recipe)
    whole, above = (estimate(with_entry(recipe, entry), "pe", batch, CPU).peak for entry in (0, 1))
    assert above < whole


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"entry_layer": -1}, r"^backbone\.entry_layer: expected at least 0, got -1$"),
        ({"entry_layer": 2}, r"^backbone\.entry_layer: expected 0 to 1, below the last layer of .*one, got 2$"),
        (
            {"entry_layer": 1, "layers": 1},
            r"^backbone\.entry_layer: expected 0 to 0, below the last layer of .*, got 1$",
        ),
    ],
)
def test_layers_that_are_not_there_are_refused(options: dict[str, int], said: str, tiny_models: Path) -> None:
    with pytest.raises(ValueError, match=said):
        Backbone.from_pretrained(BackboneConfig(model=str(tiny_models / "one"), **options), CPU)  # type: ignore[arg-type]


def test_where_it_would_do_nothing_it_is_refused() -> None:
    entering = BackboneConfig(entry_layer=1)
    with pytest.raises(
        ValueError, match=r"^backbone\.entry_layer: expected 0 in the prefix layout, got 1; there texts"
    ):
        ModelConfig(layout="prefix", pooling="mean_text", reader="none", skip="none", backbone=entering)
    with pytest.raises(ValueError, match=r"^backbone\.entry_layer: expected 0 for LoRA"):
        LoraBaselineConfig(backbone=entering)


def test_a_server_of_whole_models_is_refused_it(recipe: Recipe) -> None:
    with pytest.raises(ValueError, match=r"entry_layer: expected 0, got 1 \(it runs all layers on the prompt\)"):
        check_served(new_model(with_entry(recipe, 1)), "query", "vllm")

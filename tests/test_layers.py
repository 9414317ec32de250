"""A backbone of its first layers: what the stock model has there, and a smaller model to all that comes after."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pe.baselines.frozen import FrozenEncoder
from pe.baselines.lora import LoraBaselineConfig, LoraEmbedder
from pe.config import BackboneConfig, Recipe
from pe.measure.footprint import without_data
from pe.method.attention import KeyValues
from pe.method.backbone import Backbone
from pe.method.layers import keep_first_layers
from pe.method.packing import pack
from pe.model import PromptEmbedder
from tests.embedders import relative_error
from tests.tiny import byte_tokenizer, decoder
from tests.training import new_model

CPU = torch.device("cpu")
TEXTS = [[5, 6, 7, 8, 9, 10], [17, 18]]
SOFT = [[30, 31, 32], [40, 41, 42]]
SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def with_layers(recipe: Recipe, count: int) -> Recipe:
    fewer = dataclasses.replace(recipe.model.backbone, layers=count)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, backbone=fewer))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("qwen3", {"num_hidden_layers": 4}), ("gemma3", {"num_hidden_layers": 4, "layer_types": SLIDING})],
)
@pytest.mark.parametrize("count", [1, 3])
def test_states_are_those_of_the_whole_stock_model(
    architecture: str, changes: dict[str, object], count: int, tmp_path: Path
) -> None:
    """Both passes, with the final norm behind; longer than gemma3's window of 4."""
    saved = str(tmp_path / architecture)
    decoder(architecture, **changes).save_pretrained(saved)
    byte_tokenizer().save_pretrained(saved)
    whole, cut = (Backbone.from_pretrained(BackboneConfig(model=saved, layers=n), CPU) for n in (None, count))
    assert cut.num_layers == cut.model.config.num_hidden_layers == count
    type(cut.model.config)(**cut.model.config.to_dict())  # which looks whether its parts fit together
    cut.check_states()
    ids, segments = pack(SOFT, CPU)
    context: KeyValues = cut.read(TEXTS)
    for ours, theirs in zip(context.layers, whole.read(TEXTS).layers[:count], strict=True):
        assert all(map(torch.allclose, ours, theirs))
    hidden, _ = cut(cut.token_rows(ids), segments, context=context)
    whole.model.set_attn_implementation(whole.stock_attention)
    for place, (text, soft) in enumerate(zip(TEXTS, SOFT, strict=True)):
        tokens = torch.tensor([text + soft])
        states = whole.model(tokens, use_cache=False, output_hidden_states=True).hidden_states[count]
        expected = whole.model.norm(states)[0, -3:]
        got = cut.model.norm(hidden[3 * place : 3 * place + 3])
        assert relative_error(got, expected) < 1e-5
    assert cut.fingerprint != whole.fingerprint  # a text store has both apart


def test_an_embedder_keeps_its_layers_where_it_is_saved(recipe: Recipe, tmp_path: Path) -> None:
    model = new_model(with_layers(recipe, 1)).eval()
    texts = ["the cat sat", "bread"]
    expected = model.encode(texts, instruction="find")
    assert (expected != new_model(recipe).eval().encode(texts, instruction="find")).any()
    for included in (False, True):
        model.save_pretrained(tmp_path / f"saved-{included}", include_backbone=included)
        again = PromptEmbedder.from_pretrained(tmp_path / f"saved-{included}")
        assert (again.config.backbone.layers, again.backbone.num_layers) == (1, 1)
        assert (again.encode(texts, instruction="find") == expected).all()


def test_baselines_and_the_prediction_have_as_many(recipe: Recipe, tiny_models: Path) -> None:
    fewer = BackboneConfig(model=str(tiny_models / "one"), layers=1)
    lora = LoraEmbedder.from_config(LoraBaselineConfig(backbone=fewer))
    assert {name.split(".")[1] for name, p in lora.backbone.model.named_parameters() if p.requires_grad} == {"0"}
    whole = FrozenEncoder.from_config(dataclasses.replace(fewer, layers=None))
    assert FrozenEncoder.from_config(fewer).revision != whole.revision
    shapes = [
        {name: p.shape for name, p in model.named_parameters()}
        for model in (new_model(with_layers(recipe, 1)), without_data(with_layers(recipe, 1), "pe", CPU))
    ]
    assert shapes[0] == shapes[1]


def test_layers_that_are_not_there_are_refused() -> None:
    model = decoder("qwen3")
    with pytest.raises(ValueError, match=r"^backbone\.layers: expected 1 to 2, the layers of a model, got 3$"):
        keep_first_layers(model, 3, "a model")
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"^backbone\.layers: expected null for a model, whose layers do not stand"):
        keep_first_layers(model, 1, "a model")

"""The text pass in 8 bits: its arithmetic, what it leaves as it was, and who may not have it."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe.baselines.frozen import FrozenEncoder
from pe.baselines.lora import LoraBaselineConfig
from pe.config import BackboneConfig, LoraSettings, ModelConfig, RecipeError
from pe.losses import batch_requests
from pe.measure.footprint import MeteredStep, estimate, heaviest_batch, load, lora_of
from pe.method import probes, quantized
from pe.method.backbone import Backbone
from pe.method.probes import UnsupportedBackbone
from pe.method.quantized import EightBitLinear, EightBitLinears, Kind, Rows, quantized_rows, usable
from pe.model import PromptEmbedder
from pe.runs.recipes import load_recipe
from pe.step import Step
from pe.train import build_accelerator
from tests.embedders import REQUESTS, gradients, lora, relative_error
from tests.processors import sums_int8_exactly
from tests.tiny import byte_tokenizer, decoder
from tests.training import new_model, plan_of, write_recipe

CPU = torch.device("cpu")
KINDS: tuple[Kind, ...] = ("int8", "float8")
EXACT_KINDS = (pytest.param("int8", marks=sums_int8_exactly), "float8")
TEXTS = [[5, 6, 7, 8], [9, 4, 200], [17], list(range(30, 70))]
LARGEST = {"int8": 127, "float8": 448}
HALF_STEP = {"int8": 0.5 / 127, "float8": 2**-4}
"""Largest error of a rounded number: of int8 relative to its row's largest, of float8 (three bits) to itself."""


@pytest.fixture(autouse=True)
def _has_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not depend on exact sums is the same on a processor without them."""
    monkeypatch.setattr(quantized, "has_eight_bits", lambda kind, device: True)


def backbone(kind: str = "int8", architecture: str = "qwen3", **changes: int) -> Backbone:
    return Backbone(decoder(architecture, **changes), byte_tokenizer(), architecture, quantize=kind)  # type: ignore[arg-type]


def plain(rows: Rows) -> Tensor:
    """The numbers that quantised rows stand for, float64."""
    values = rows.values.double()
    return (values - quantized.CENTRE if rows.values.dtype == torch.uint8 else values) * rows.scale.double()


def random_rows(count: int, width: int = 48) -> Tensor:
    """Rows of very different sizes, one of them zeros."""
    rows = torch.randn(count, width) * torch.logspace(-3, 3, count)[:, None]
    rows[count // 2] = 0
    return rows


# The arithmetic.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_rounded_to_the_nearest(kind: Kind, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "CHUNK", 3 * 48)
    x = random_rows(10).to(dtype)
    rows = quantized_rows(x, kind)
    largest = x.double().abs().amax(1, keepdim=True)
    torch.testing.assert_close(rows.scale.double(), largest.clamp_min(1e-30) / LARGEST[kind], rtol=1e-6, atol=0)
    allowed = HALF_STEP[kind] * (largest if kind == "int8" else x.double().abs()) + 1e-5 * largest
    assert bool(((plain(rows) - x.double()).abs() <= allowed).all())


@pytest.mark.parametrize("kind", EXACT_KINDS)
@pytest.mark.parametrize("count", [1, 7, 300])
def test_a_product_is_that_of_the_rounded_numbers(kind: Kind, count: int) -> None:
    """Against float64 on the same rounded numbers."""
    weight = torch.randn(80, 48) * torch.logspace(-2, 2, 80)[:, None]
    layer, x = EightBitLinear.of(weight, kind), random_rows(count)
    rows = quantized_rows(x, kind)
    rounded = layer.plain().double() * layer.scale.double()[:, None]
    assert relative_error(rounded, weight.double()) < (0.01 if kind == "int8" else 0.05)
    exact = plain(rows) @ rounded.T
    size = (plain(rows).norm(dim=1, keepdim=True) * rounded.norm(dim=1)).clamp_min(1e-30)
    assert ((layer(rows).double() - exact).abs() / size).max() < 1e-6


def test_products_whose_pairs_fit_16_bits_are_exact_on_every_processor() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-1, 2, (80, 48), generator=generator).float()
    x = torch.randint(-127, 128, (300, 48), generator=generator).float()
    weight[:, 0], x[:, 1] = 127, 127  # so scales are 1
    found = EightBitLinear.of(weight, "int8")(quantized_rows(x, "int8"))
    assert torch.equal(found, x @ weight.T)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "CHUNK", 5 * 48)
    layer, x = EightBitLinear.of(torch.randn(80, 48), kind), random_rows(40)
    whole = layer(quantized_rows(x, kind))
    for part in (slice(0, 1), slice(3, 20), slice(39, 40)):
        alone = quantized_rows(x[part], kind)
        assert torch.equal(alone.scale, quantized_rows(x, kind).scale[part])
        if kind == "int8":  # whose sums are exact, in whatever order
            assert torch.equal(layer(alone), whole[part])
        torch.testing.assert_close(layer(alone), whole[part], rtol=1e-5, atol=1e-6 * float(whole[part].abs().max()))


def test_no_rows_are_no_rows() -> None:
    layer = EightBitLinear.of(torch.randn(80, 48), "int8")
    assert layer(quantized_rows(torch.empty(0, 48), "int8")).shape == (0, 80)


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    layer, x = EightBitLinear.of(torch.randn(80, 48), "int8"), random_rows(4)
    expected = layer(quantized_rows(x, "int8"))
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    got = layer(quantized_rows(x, "int8"))
    assert torch.equal(got[[0, 3]], expected[[0, 3]])
    assert not got[[1, 2]].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_computes_the_same(kind: Kind) -> None:
    layer, rows = EightBitLinear.of(torch.randn(80, 48), kind), quantized_rows(random_rows(9), kind)
    copies = [copy.deepcopy(layer)]
    if kind == "int8":  # torch pickles no float8
        copies.append(pickle.loads(pickle.dumps(layer)))
    for copied in copies:
        assert torch.equal(copied(rows), layer(rows))


# In a decoder.


@pytest.mark.parametrize("kind", EXACT_KINDS)
@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "gpt_neox", "phi3"])
def test_texts_are_read_as_the_stock_model_reads_them_so(kind: Kind, architecture: str) -> None:
    """Biases (qwen2, gpt_neox), fused projections (phi3), norms behind (gemma3): both probes pass, and it acts."""
    changes = {"hidden_size": 32, "intermediate_size": 64}
    model = backbone(kind, architecture, **changes)
    model.check_states()
    keys = [model.read(TEXTS).layers[-1][0], backbone("none", architecture, **changes).read(TEXTS).layers[-1][0]]
    assert 1e-3 < relative_error(*keys) < (0.05 if kind == "int8" else 0.2)


def test_the_probe_sees_another_quantisation(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the packed pass does, the stock model must do too."""
    model, forward = backbone(), Backbone.stock_forward
    monkeypatch.setattr(Backbone, "stock_forward", lambda self, ids, read=0: forward(self, ids))
    with pytest.raises(UnsupportedBackbone, match=r"differs from the stock forward by .*e-0"):
        probes.check_parity(model)


def test_a_text_is_read_by_itself() -> None:
    model = backbone()
    together = model.read(TEXTS)
    for place, text in enumerate(TEXTS):
        first = sum(map(len, TEXTS[:place]))
        for (k, v), (k_alone, v_alone) in zip(together.layers, model.read([text]).layers, strict=True):
            torch.testing.assert_close(k[first : first + len(text)], k_alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(v[first : first + len(text)], v_alone, rtol=1e-5, atol=1e-5)


def test_what_has_a_common_input_is_quantised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four inputs a layer: of queries, keys and values; of the output; of gate and up; of down."""
    model, count = backbone(), 0

    def counted(x: Tensor, kind: Kind) -> Rows:
        nonlocal count
        count += 1
        return quantized_rows(x, kind)

    monkeypatch.setattr(quantized, "quantized_rows", counted)
    model.read(TEXTS)
    assert count == 4 * (model.num_layers - 1) + 1  # the last layer stops at its keys and values


def test_outside_the_text_pass_the_decoder_is_as_it_was() -> None:
    ours, theirs = backbone(), backbone("none")
    ids = torch.tensor([3, 4, 5])
    ours.read(TEXTS)
    assert torch.equal(ours.stock_forward(ids.tolist()), theirs.stock_forward(ids.tolist()))
    with pytest.raises(RuntimeError, match="stop"), ours.as_texts_are_read():
        raise RuntimeError("stop")
    assert not any("forward" in vars(module) for module in ours.model.modules() if isinstance(module, nn.Linear))


def test_a_reader_does_not_act_on_texts() -> None:
    model = backbone()
    before = model.read(TEXTS).layers[-1]
    model.add_reader(LoraSettings(rank=2))
    for name, parameter in model.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert all(map(torch.equal, model.read(TEXTS).layers[-1], before))


def test_half_precision_weights_stay_in_their_type() -> None:
    model = Backbone(decoder("qwen3").to(torch.bfloat16), byte_tokenizer(), "q", quantize="int8")
    assert {x.dtype for pair in model.read(TEXTS).layers for x in pair} == {torch.bfloat16}


def test_a_decoder_without_linear_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"quantize: expected a decoder with linear layers .* got GPT2Model .*: none"):
        backbone("int8", "gpt2")


# In an embedder.


def recipe_file(models: Path, folder: Path, kind: str = "int8", **changes: object) -> Path:
    return write_recipe(models, folder, model__backbone={"model": str(models / "one"), "quantize": kind}, **changes)


@sums_int8_exactly
def test_embeddings_stay_near_and_all_parts_train(tiny_models: Path, tmp_path: Path) -> None:
    """The gradient is that of the model's own weights behind quantised texts: near the unquantised one."""
    recipe = load_recipe(recipe_file(tiny_models, tmp_path))
    unquantised = load_recipe(recipe_file(tiny_models, tmp_path / "plain", "none"))
    model, other = new_model(recipe), new_model(unquantised)
    step = Step(model, recipe.loss, recipe.train, build_accelerator(recipe))
    plan = plan_of(recipe)
    requests = model.tokenized(batch_requests(plan.batch(0)))
    ours, theirs = model(requests), other(requests)
    assert 0.99 < F.cosine_similarity(ours, theirs).min() < 1 - 1e-6
    near = [torch.cat([g.flatten() for g in gradients(m, e).values()]) for m, e in ((model, ours), (other, theirs))]
    assert relative_error(*near) < 0.3
    before = {name: tensor.clone() for name, tensor in model.trainable_state().items()}
    losses = [step(plan.batch(n)).loss for n in range(2)]
    assert all(loss > 0 for loss in losses)
    changed = {name.split(".")[0] for name, tensor in model.trainable_state().items() if not before[name].equal(tensor)}
    assert changed >= {"prompter", "alignment", "backbone", "skip"}


def test_a_saved_embedder_loads_as_it_was_trained(tiny_models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(tiny_models, tmp_path))
    model = new_model(recipe).eval()
    model.save_pretrained(tmp_path / "saved")
    again = PromptEmbedder.from_pretrained(tmp_path / "saved")
    assert again.backbone.quantize == again.config.backbone.quantize == "int8"
    texts = ["a river", "bread and glass"]
    ours, theirs = (m.encode(texts, instruction="find") for m in (model, again))
    assert (ours == theirs).all()
    copied = copy.deepcopy(model)
    # Equal to rounding: where a copy's weights lie decides how some processors add up
    np.testing.assert_allclose(copied.encode(texts, instruction="find"), ours, atol=1e-6)


def test_a_device_without_instructions_reads_unquantised(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "has_eight_bits", lambda kind, device: False)
    for kind in KINDS:
        config = BackboneConfig(model=str(tiny_models / "one"), quantize=kind)
        with pytest.warns(UserWarning, match=rf"^backbone\.quantize: this device .* {kind}, .* read unquantised$"):
            model = Backbone.from_pretrained(config, CPU)
        assert model.quantize == "none"
        assert model.eight_bits is None


def test_instructions_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda has=has: has)
        assert quantized.has_eight_bits("int8", CPU) == has
        assert not quantized.has_eight_bits("float8", CPU)
        assert not quantized.has_eight_bits("int8", torch.device("meta"))
    for capability, kinds in (((7, 5), set()), ((8, 0), {"int8"}), ((8, 9), set(KINDS)), ((9, 0), set(KINDS))):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, is_=capability: is_)
        assert {kind for kind in KINDS if quantized.has_eight_bits(kind, torch.device("cuda"))} == kinds
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert usable("none", CPU) == "none"


def test_who_reads_with_gradient_refuses() -> None:
    config = BackboneConfig(quantize="int8")
    with pytest.raises(
        RecipeError, match=r"backbone\.quantize: expected 'none' in the prefix layout, got 'int8'; there"
    ):
        ModelConfig(backbone=config, layout="prefix", pooling="mean_text", reader="none", skip="none")
    with pytest.raises(
        ValueError, match=r"expected 'none' for LoRA, which reads texts with gradient, got 'int8'; give"
    ):
        LoraBaselineConfig(backbone=config)
    with pytest.raises(
        ValueError, match=r"^quantize: 'int8' needs form 'packed' without dropout, got 'packed' with 0\.1"
    ):
        LoraBaselineConfig(form="packed", quantize="int8")
    with pytest.raises(RecipeError, match=r"backbone\.quantize: expected one of none, int8, float8, got 'int4'"):
        BackboneConfig(quantize="int4")  # type: ignore[arg-type]


@sums_int8_exactly
def test_lora_reads_near_what_it_would_read_unquantised() -> None:
    ours, theirs = (lora("packed", "gemma3", quantize=kind)(REQUESTS) for kind in ("int8", "none"))
    assert 0.99 < F.cosine_similarity(ours, theirs).min() < 1 - 1e-6


@sums_int8_exactly
def test_the_frozen_baseline_reads_so_too(tiny_models: Path) -> None:
    models = [
        FrozenEncoder.from_config(BackboneConfig(model=str(tiny_models / "one"), quantize=kind))
        for kind in ("int8", "none")
    ]
    ours, theirs = (torch.from_numpy(m.encode(["a river", "the moon"], instruction="x")) for m in models)
    assert 0.99 < F.cosine_similarity(ours, theirs).min() < 1 - 1e-6
    assert models[0].revision != models[1].revision


def test_memory_counts_the_second_weights(tiny_models: Path, tmp_path: Path) -> None:
    """Predicted as measured, and as many bytes more as the layers have weights, scales aside."""
    recipe = load_recipe(recipe_file(tiny_models, tmp_path))
    assert lora_of(recipe, "lora-padded").backbone.quantize == "none"
    batch = heaviest_batch(recipe)
    found = estimate(recipe, "pe", batch, CPU)
    plain_recipe = load_recipe(recipe_file(tiny_models, tmp_path / "plain", "none"))
    more = found.loaded - estimate(plain_recipe, "pe", batch, CPU).loaded
    step = MeteredStep(load(recipe, "pe", CPU), recipe)
    step(batch)
    measured = step.footprint(batch)
    assert measured.loaded == found.loaded
    assert abs(found.peak / measured.peak - 1) < 0.02
    eight_bits = step.model.backbone.eight_bits
    assert isinstance(eight_bits, EightBitLinears)
    assert more == sum(layer.values.numel() + 4 * layer.scale.numel() for layer in eight_bits.layers)

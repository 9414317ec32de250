"""Scaling runs at toy size; what the suffix layout saves for its backward pass does not grow with the texts."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import plots, records, scaling
from bench.cases import CASES, Setting
from bench.plots import Panel, Series
from bench.scaling import AXES, Point
from pe.kernels.context_attention import context_attention
from pe.model import PromptEmbedder

CPU = Setting.of("cpu")
TOY = CASES["toy"]
BASE = dataclasses.replace(Point.base(TOY), queries=2, length=6)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def saved_beyond_keys_values(variant: str, length: int) -> int:
    """Bytes that a toy step keeps for its backward pass, less keys and values of its texts."""
    point = dataclasses.replace(BASE, length=length)
    case, load = point.case(TOY), point.load(TOY)
    step = scaling.prepare_at(case, variant, load, length, CPU)
    _, saved = scaling.step_bytes(step, load.batches[0])
    return saved - scaling.key_value_bytes(case, load.batches[0].tokens, torch.float32)


@pytest.mark.parametrize("variant", ["pe-suffix", "pe-suffix-reader"])
def test_suffix_saves_nothing_of_the_text_beyond_keys_and_values(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = functools.partial(context_attention, impl="triton")
    monkeypatch.setattr("pe.method.attention.context_attention", kernel)
    short, long = (saved_beyond_keys_values(variant, length) for length in (8, 64))
    assert short == long > 0


@pytest.mark.parametrize("variant", ["pe-suffix", "pe-suffix-reader"])
def test_plain_torch_attention_saves_its_probabilities_at_most(variant: str) -> None:
    short, long = (saved_beyond_keys_values(variant, length) for length in (8, 64))
    config = TOY.backbone.config()
    texts, rows = 2 * BASE.queries, BASE.soft_tokens * config.num_attention_heads
    a_token = config.num_hidden_layers * texts * (4 * rows + BASE.soft_tokens)  # probabilities, and a mask of bytes
    assert 0 <= long - short <= (64 - 8) * a_token


@pytest.mark.parametrize("variant", ["lora-padded", "lora-packed", "pe-prefix"])
def test_gradients_through_the_text_save_more_with_every_token(variant: str) -> None:
    short, long = (saved_beyond_keys_values(variant, length) for length in (8, 64))
    assert long > 3 * short


def test_keys_and_values_are_those_of_the_text_pass() -> None:
    load = BASE.load(TOY)
    model = scaling.prepare_at(BASE.case(TOY), "pe-suffix", load, BASE.length, CPU).model
    assert isinstance(model, PromptEmbedder)
    kept = model.backbone.read(model.tokenize(load.batches[0].requests))
    held = sum(tensor.nbytes for layer in kept.layers for tensor in layer)
    assert scaling.key_value_bytes(BASE.case(TOY), load.batches[0].tokens, torch.float32) == held


def test_points_vary_one_thing() -> None:
    base = Point.base(CASES["tiny"])
    assert [point.depth for point in AXES["depth"].points(base)] == [3, 6, 12, 24]
    widths = AXES["width"].points(base)
    assert [point.width for point in widths] == [128, 256, 512, 1024]
    sizes = widths[2].case(CASES["tiny"]).backbone.config()
    assert (sizes.num_attention_heads, sizes.num_key_value_heads, sizes.intermediate_size) == (16, 8, 1280)
    assert sizes.head_dim == CASES["tiny"].backbone.config().head_dim
    for axis in AXES.values():
        points = axis.points(base)
        assert [dataclasses.replace(point, **{axis.field: 0}) for point in points[1:]] == [
            dataclasses.replace(points[0], **{axis.field: 0})
        ] * (len(points) - 1)


def test_a_batch_has_so_many_instructions() -> None:
    point = dataclasses.replace(BASE, queries=6, instructions=4)
    (batch,) = point.load(TOY).batches
    asked = {batch.requests.instruction(n) for n in range(6)}
    assert len(asked) == 4
    assert {batch.requests.instruction(n).side for n in range(6, 12)} == {"document"}
    assert batch.tokens == 12 * BASE.length


def test_predictions_grow_as_between_the_last_two() -> None:
    assert scaling.predict([], 8) == 0
    assert scaling.predict([(4, 10.0)], 8) == 20
    assert scaling.predict([(2, 10.0), (4, 10.0)], 8) == pytest.approx(10)
    assert scaling.predict([(2, 12.0), (4, 10.0)], 8) == 10
    assert scaling.predict([(2, 10.0), (4, 40.0)], 8) == pytest.approx(160)


def test_slopes() -> None:
    assert scaling.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert scaling.slope([1, 2, 4], [5, 5, 5]) == pytest.approx(0)
    assert scaling.slope([1, 2], [0, 5]) is None
    assert (scaling.shown(-0.0001), scaling.shown(0.994), scaling.shown(None)) == ("0.00", "0.99", "-")


def test_command_records_prints_and_draws(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(AXES, "batch", dataclasses.replace(AXES["batch"], values=(2, 3, 64)))
    chosen = ["--case", "toy", "--axes", "batch", "--variants", "lora-padded", "pe-suffix", "--rounds", "1"]
    scaling.main([*chosen, "--points", "2"])
    found = records.read("scaling", results)
    assert [(r["value"], r["variant"]) for r in found] == [
        (value, variant) for value in (2, 3) for variant in ("lora-padded", "pe-suffix")
    ]
    assert all(r["ms"]["median"] > 0 and r["above_mib"] >= r["saved_mib"] > r["kv_mib"] > 0 for r in found)
    assert found[0]["sizes"]["tokens"] == 4 * 16
    assert "queries of a batch" in capsys.readouterr().out

    text = scaling.render(results)
    assert "| queries of a batch |" in text
    assert "(../plots/scaling-toy-batch.svg)" in text
    (path,) = scaling.draw(results, tmp_path / "plots")
    first = path.read_bytes()
    assert path.name == "scaling-toy-batch.svg"
    assert b"(a) LoRA" in first
    assert b"slope" in first
    assert [file.read_bytes() for file in scaling.draw(results, tmp_path / "plots")] == [first]

    scaling.main([*chosen, "--budget", "0.001", "--dry"])
    assert "skipped, predicted" in capsys.readouterr().out
    assert len(records.read("scaling", results)) == 4


def test_page_names_what_was_left_out(results: Path) -> None:
    fields = {"case": "tiny", "axis": "length", "device": "cpu", "dtype": "float32", "variant": "lora-padded"}
    memory = {"above_mib": 8.0, "kv_mib": 1.0, "saved_mib": 5.0}
    sizes = dataclasses.asdict(BASE)

    def record(value: int, **own: Any) -> records.Record:
        return {**fields, "value": value, "sizes": sizes, **own}

    measured = [record(n, ms={"median": float(n * n)}, **memory) for n in (64, 128)]
    records.append("scaling", [*measured, record(256, skipped="predicted 9 s a step")])
    text = scaling.render(results)
    assert "| tokens of a text | 2.00 / 0.00 / 0.00 |" in text
    assert "- (a) LoRA, padded, SDPA, tokens of a text, 256: predicted 9 s a step" in text
    assert "GPU: not yet measured." in text


def test_page_without_records(results: Path, tmp_path: Path) -> None:
    assert "Not yet measured." in scaling.render(results)
    assert scaling.draw(results, tmp_path) == []


def test_points_have_error_bars(tmp_path: Path) -> None:
    bars = Series(label="PE", x=[3.0], y=[50.0], y_range=[(48.0, 53.0)])
    plain = dataclasses.replace(bars, y_range=None)
    sizes = []
    for name, series in (("bars", bars), ("plain", plain)):
        path = tmp_path / f"{name}.svg"
        plots.points(path, Panel(x="seconds of training", y="score", series=[series], log="x"))
        text = path.read_text()
        assert "seconds of training" in text
        assert "PE" in text
        sizes.append(len(text))
    assert sizes[0] > sizes[1]

"""Memory of a training step: what is counted, what is predicted without weights, and the report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bench import records
from pe import memory
from pe.config import Recipe
from pe.data.batches import Batch
from pe.losses import batch_requests
from pe.measure import footprint, meters
from pe.measure.footprint import SYSTEMS, MeteredStep, estimate, heaviest_batch, load, longest_batch
from pe.measure.meters import (
    ACTIVATIONS,
    CATEGORIES,
    FROZEN,
    GRADIENTS,
    KEY_VALUES,
    OPTIMISER,
    TRAINABLE,
    WORKSPACE,
    Footprint,
    LiveTensors,
    Phases,
    Sampler,
)
from pe.runs.extras import MissingPackage, extra
from pe.runs.recipes import load_recipe
from tests.training import write_recipe

CPU = torch.device("cpu")
CLOSE = 0.02
"""Share of the measured peak by which a prediction may miss it; on the versions this was written with it is exact."""
VARIANTS: dict[str, dict[str, object]] = {
    "suffix": {},
    "prefix": {
        "model__reader": "none",
        "model__skip": "none",
        "model__layout": "prefix",
        "model__pooling": "mean_text",
    },
    "text, micro batches": {
        "model__conditioning": "instruction_and_text",
        "train__batch_size": 2,
        "train__micro_batch_size": 1,
    },
    "vocabulary, adapters": {"model__alignment": {"kind": "vocabulary"}, "model__reader": "none"},
}


def recipe_of(models: Path, folder: Path, **changes: object) -> Recipe:
    return load_recipe(write_recipe(models, folder, **changes))


def measured(recipe: Recipe, system: footprint.System, batch: Batch) -> tuple[MeteredStep, Footprint]:
    step = MeteredStep(load(recipe, system, CPU), recipe)
    step(batch)
    return step, step.footprint(batch)


# What is counted.


class NvmlFails(types.ModuleType):
    """NVML that is installed and does not run, as where a container has no driver library."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self) -> None:  # noqa: N802
        raise self.NVMLError


@pytest.mark.parametrize("module", [None, NvmlFails("pynvml")])
def test_without_nvml_cuda_says_what_is_used(module: types.ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30, 100))
    source, read = meters.device_used(torch.device("cuda"))
    assert (source, read()) == ("cuda", 70)
    assert meters.driver_reserved(torch.device("cuda")) is None
    assert meters.process_used(torch.device("cuda")) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert records.hardware.__wrapped__()["driver"] is None


def test_tensors_count_from_their_operation_to_their_last_reference() -> None:
    weight, phases = nn.Parameter(torch.ones(256)), Phases()
    with LiveTensors({TRAINABLE: [weight]}, [weight], phases) as live:
        phases.enter("forward")
        kept = weight * 2
        same = kept.view(16, 16)
        passing = torch.empty(1024)
        del passing
        phases.enter("backward")
        same.square().sum().backward()
        phases.enter("optimiser")
        del kept, same
    found = live.footprint()
    assert found.bytes[TRAINABLE] == [1024] * len(found.times)
    assert found.loaded == 1024
    assert max(found.bytes[ACTIVATIONS]) == 1024, "one storage, though two tensors view it"
    assert found.bytes[ACTIVATIONS][-1] == 0
    assert found.peak_in("forward") == 1024 + 1024 + 4096
    assert found.bytes[GRADIENTS][-1] == 1024
    assert found.peak == sum(found.at_peak.values()) == max(found.totals)
    assert found.thinned(3).peak == found.peak
    assert len(found.thinned(3).times) == 3


def test_what_autograd_saves_is_told_from_what_it_made() -> None:
    weight = torch.ones(64, 64, requires_grad=True)
    live = LiveTensors({FROZEN: [weight]}, [], Phases())
    with torch.autograd.graph.saved_tensors_hooks(live.save, lambda tensor: tensor), live:
        x = torch.ones(8, 64)
        loss = (x @ weight).exp().sum()
        loss.backward()
        del loss
    found = live.footprint()
    assert max(found.bytes[ACTIVATIONS]) == 2 * 8 * 64 * 4, "x and exp's result; the weight was there before"
    assert found.bytes[ACTIVATIONS][-1] == 8 * 64 * 4, "x alone is alive at the end"
    assert found.above >= 2 * 8 * 64 * 4 + weight.nbytes, "and the gradient"
    assert weight.grad is not None
    assert torch.allclose(weight.grad, (torch.e**64 * torch.ones(64, 64)) * 8, rtol=1e-3)


def test_sampler_keeps_a_peak_for_each_phase() -> None:
    phases, value = Phases(), [1]
    with Sampler(lambda: value[0], 0.001, phases) as sampler:
        for phase, size in (("forward", 5), ("backward", 3)):
            phases.enter(phase)
            value[0] = size
            time.sleep(0.03)
    assert sampler.peaks["loaded"] == 1
    assert sampler.peaks["backward"] in (3, 5)  # the sample may fall between the phase and the value
    assert sampler.highest == sampler.peaks["forward"] == 5
    assert sampler.longest_gap > 0


def test_weights_optimiser_and_key_values_are_what_the_formulas_say(tiny_models: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_models, tmp_path)
    batch = heaviest_batch(recipe)
    step, found = measured(recipe, "pe", batch)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in step.model.parameters()}
    held |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in step.model.buffers()}
    assert found.loaded == sum(held.values())
    trained = sum(4 * p.numel() for p in step.parameters)
    assert set(found.bytes[TRAINABLE]) == {trained}
    assert set(found.bytes[OPTIMISER]) == {2 * trained + 4 * len(step.parameters)}
    assert max(found.bytes[GRADIENTS]) == trained
    assert set(found.bytes[FROZEN]) == {found.loaded - trained}
    assert max(found.bytes[WORKSPACE]) > 10 * found.bytes[WORKSPACE][-1]
    config = step.model.backbone.model.config
    tokens = sum(map(len, step.model.tokenize(batch_requests(batch))))
    layer = 2 * tokens * config.num_key_value_heads * config.head_dim * 4
    assert max(found.bytes[KEY_VALUES]) == config.num_hidden_layers * layer


def test_activations_are_what_autograd_saves(tiny_models: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_models, tmp_path)
    batch = heaviest_batch(recipe)
    step, found = measured(recipe, "lora-packed", batch)
    assert not any(isinstance(part, nn.Dropout) for part in step.model.modules())
    weights = {p.untyped_storage()._cdata for p in (*step.model.parameters(), *step.model.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embeddings = step.model(batch_requests(batch))
    assert embeddings.requires_grad
    bytes_saved = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    assert max(found.bytes[ACTIVATIONS]) == pytest.approx(bytes_saved, rel=0.05)


# What is predicted.


@pytest.mark.parametrize("name", VARIANTS)
def test_prediction_meets_the_measured_peak(name: str, tiny_models: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_models, tmp_path, **VARIANTS[name])
    batch = heaviest_batch(recipe)
    _, found = measured(recipe, "pe", batch)
    agree(estimate(recipe, "pe", batch, CPU), found)


@pytest.mark.parametrize("system", SYSTEMS[1:])
def test_prediction_meets_the_measured_peak_of_lora(
    system: footprint.System, tiny_models: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_models, tmp_path)
    batch = heaviest_batch(recipe)
    _, found = measured(recipe, system, batch)
    agree(estimate(recipe, system, batch, CPU), found)


def agree(predicted: Footprint, found: Footprint) -> None:
    assert predicted.loaded == found.loaded
    assert predicted.above == pytest.approx(found.above, rel=CLOSE)
    for name in CATEGORIES:
        assert abs(predicted.at_peak[name] - found.at_peak[name]) <= CLOSE * found.above, name


def test_prediction_reads_no_weights_and_follows_the_sizes(tiny_models: Path, tmp_path: Path) -> None:
    bare = tmp_path / "models"
    shutil.copytree(tiny_models, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    recipe = recipe_of(bare, tmp_path)
    batch = heaviest_batch(recipe)
    before = estimate(recipe, "lora-packed", batch, CPU)
    with pytest.raises((OSError, ValueError)):
        load(recipe, "lora-packed", CPU)
    file = bare / "one" / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}), "utf-8")
    deeper = estimate(recipe, "lora-packed", batch, CPU)
    assert deeper.above == pytest.approx(2 * before.above, rel=0.1)


def test_longest_batch_fills_every_text(tiny_models: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_models, tmp_path)
    batch = longest_batch(recipe)
    model = load(recipe, "pe", CPU)
    assert [len(row) for row in model.tokenize(batch_requests(batch))] == [32] * 18


def test_heaviest_batch_has_the_most_tokens(tiny_models: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_models, tmp_path)
    plan = footprint.build_plan(recipe, footprint.Console(quiet=True))
    model = load(recipe, "pe", CPU)
    tokens = [sum(map(len, model.tokenize(batch_requests(plan.batch(step))))) for step in range(recipe.train.steps)]
    assert len(set(tokens)) > 1
    assert sum(map(len, model.tokenize(batch_requests(heaviest_batch(recipe))))) == max(tokens)


# The report.


def test_report_of_fresh_processes(
    tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("measured in the process that writes the report")

    monkeypatch.setattr(memory, "measure", refuse)
    output = tmp_path / "report"
    path = write_recipe(tiny_models, tmp_path)
    memory.main(
        [str(path), "--systems", "lora-packed", "--steps", "1", "--output", str(output), "--train.batch_size=4"]
    )
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    (record,) = report["systems"]
    assert report["batch"]["queries"] == 4
    live, rss = record["live"], record["process"]["rss"]
    assert sum(live["categories_mib"].values()) == pytest.approx(live["peak_mib"], abs=0.05)
    assert live["peak_mib"] == pytest.approx(live["loaded_mib"] + live["above_mib"], abs=0.02)
    assert max(live["phases_mib"].values()) == live["peak_mib"]
    assert rss["peak_mib"] > rss["loaded_mib"] > 50
    assert abs(record["deviation"]["live"]) <= CLOSE
    assert record["deviation"]["rss"] == pytest.approx(
        record["predicted"]["above_mib"] / rss["above_mib"] - 1, abs=0.01
    )
    assert record["interval_ms"] > 0
    assert record["tokens"] > 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("RSS", "live tensors", "keys and values", "LoRA, packed", "optimiser"))
    check_charts(output)


def check_charts(folder: Path) -> None:
    root = ElementTree.parse(folder / "memory.svg").getroot()
    words = " ".join(text.strip() for text in root.itertext())
    assert root.tag.endswith("svg")
    assert all(name in words for name in ("saved activations", "backward", "predicted peak"))
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pixels = pyplot.imread(folder / "memory.png")
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels[..., :3].reshape(-1, 3), axis=0)) > 10


def test_estimate_alone_measures_nothing_and_needs_no_data(
    tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "in_fresh_process", lambda *_: pytest.fail("measured"))
    output, path = tmp_path / "report", write_recipe(tiny_models, tmp_path)
    shutil.rmtree(tmp_path / "data")
    arguments = [str(path), "--estimate", "--systems", "lora-packed", "--output", str(output)]
    memory.main(arguments)
    shown = capsys.readouterr()
    assert "predicted" in shown.out
    assert "texts of max_length tokens" in shown.err
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert [sorted(record) for record in report["systems"]] == [["predicted", "system"]]
    check_charts(output)
    fails(capsys, arguments, "--overwrite")
    memory.check_output(output, overwrite=True)


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], *words: str) -> None:
    """The command ends with code 2 and one message that holds the words."""
    with pytest.raises(SystemExit) as ended:
        memory.main(arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("pe.memory: ")
    assert all(word in message for word in words), message


def test_bad_input_is_one_message(tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = write_recipe(tiny_models, tmp_path), ["--output", str(tmp_path / "report")]
    fails(capsys, [str(tmp_path / "none.yaml"), *output], "none.yaml")
    fails(capsys, [str(path), "--train.batch_sise=4", *output], "--train.batch_sise", "batch_size")
    fails(capsys, [str(path), "--steps", "0", *output], "--steps", "at least 1")
    fails(capsys, [str(path), "--estimate", f"--model.backbone.model={tmp_path}/nowhere", *output], "nowhere")
    shutil.rmtree(tmp_path / "data")
    fails(capsys, [str(path), *output], "pairs.jsonl")
    assert not (tmp_path / "report").exists()
    for output in (path, path / "report"):
        fails(capsys, [str(path), "--output", str(output)], "--output: expected a folder", f"{path} is a file")


def test_a_process_that_dies_is_a_row(
    tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    died = subprocess.CompletedProcess[Any]([], -9, "", "RuntimeError: out of memory\n")
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: died)
    path = write_recipe(tiny_models, tmp_path)
    with pytest.raises(SystemExit) as ended:
        memory.main([str(path), "--systems", "lora-packed", "--output", str(tmp_path / "report")])
    shown = capsys.readouterr()
    assert ended.value.code == 1
    assert "out of memory" in shown.out
    assert shown.err == "pe.memory: no system measured: RuntimeError: out of memory\n"
    (record,) = json.loads((tmp_path / "report" / "report.json").read_text(encoding="utf-8"))["systems"]
    assert record["failed"] == "RuntimeError: out of memory"
    assert record["predicted"]["above_mib"] > 0


def test_only_files_that_were_written_are_listed(
    tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "predict", lambda *_: {"failed": "no such operation"})
    path, output = write_recipe(tiny_models, tmp_path), tmp_path / "report"
    output.mkdir()
    (output / "memory.svg").write_text("of an earlier report")
    with pytest.raises(SystemExit) as ended:
        memory.main([str(path), "--estimate", "--systems", "lora-packed", "--overwrite", "--output", str(output)])
    assert ended.value.code == 1
    shown = capsys.readouterr()
    assert "no system predicted: no such operation" in shown.err
    assert "report.json" in shown.out
    assert "memory." not in shown.out
    assert [file.name for file in output.iterdir()] == ["report.json"]


def test_a_missing_package_names_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy.py").write_text("import nowhere_too")
    monkeypatch.syspath_prepend(tmp_path)
    for name, missing in (("nowhere", "nowhere"), ("needy", "nowhere_too")):
        with pytest.raises(MissingPackage, match=rf"^{missing} is .* pip install 'promptembedder\[bench\]'"):
            extra(name, "bench")

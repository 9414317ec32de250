"""Every benchmark runs at toy size, its records are whole, and the page follows them."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode, addmm_flop
from transformers import AutoModel, AutoModelForCausalLM
from triton.errors import TritonError

from bench import (
    aot,
    bfloat16,
    breakdown,
    cases,
    largest,
    lengths,
    markdown,
    memory,
    quality,
    records,
    report,
    step,
    step_tables,
    summary,
    transfer,
)
from bench import test_step as benchmarked
from bench.cases import CASES, VARIANTS, Case, Embedder, IdTokenizer, Setting, Shape, default_variants
from bench.flops import step_flops
from bench.lengths import DISTRIBUTIONS, Distribution, SetLengths, workload
from bench.systems import SYSTEMS
from bench.untrained import UNTRAINED
from pe import losses
from pe import step as stepping
from pe.baselines.lora import LoraEmbedder
from pe.config import Recipe
from pe.model import PromptEmbedder, Requests
from pe.runs.recipes import load_recipe
from pe.step import Step
from pe.train import build_accelerator, build_plan, train
from tests.benchmarks import FakeBenchmark
from tests.training import new_model, write_recipe

CPU = Setting.of("cpu")
TOY = CASES["toy"]
SETS = [
    SetLengths(
        name="short", weight=2, instruction=4, document_instruction=3, queries=[3, 5, 2, 4], documents=[2, 2, 3, 1]
    ),
    SetLengths(
        name="long", weight=1, instruction=5, document_instruction=3, queries=[2, 6, 3, 4], documents=[9, 12, 7, 8]
    ),
]


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Records go to a folder of the test's own, and batches have toy lengths."""
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(lengths, "read", lambda: SETS)
    return tmp_path / "results"


def test_ids_are_read_from_the_text() -> None:
    tokenizer = IdTokenizer()
    assert tokenizer("Instruct: 5 17\nQuery:3")["input_ids"] == [5, 17, 3]
    assert tokenizer(["1 2", "", "40"], add_special_tokens=False)["input_ids"] == [[1, 2], [], [40]]


@pytest.mark.parametrize("distribution", ["fixed", "real", "mixed"])
def test_workloads_are_the_same_for_everyone(distribution: Distribution) -> None:
    load, again = workload(distribution, TOY), workload(distribution, TOY)
    assert [batch.requests for batch in load.batches] == [batch.requests for batch in again.batches]
    for batch in load.batches:
        ids = IdTokenizer()(list(batch.requests.texts))["input_ids"]
        assert [len(row) for row in ids] == [*batch.lengths[0], *batch.lengths[1]]
        assert len(ids) == 2 * len(batch.queries) == 6
        assert max(map(max, ids)) < TOY.vocabulary == 64


def test_workload_means_are_weighted() -> None:
    real = workload("real", TOY)
    assert real.mean([3.0, 6.0]) == pytest.approx(4.0)
    assert real.tokens == pytest.approx((2 * (10 + 7) + (11 + 28)) / 3)
    assert [batch.padded_tokens for batch in real.batches] == [3 * 5 + 3 * 3, 3 * 6 + 3 * 12]
    assert lengths.interleaved(SETS, 6) == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (1, 1)]
    assert workload("fixed", TOY).padding_share == 0
    (long,) = workload("long", CASES["tiny"]).batches
    assert long.lengths == ([512] * 16, [512] * 16)
    many = workload("real", dataclasses.replace(TOY, queries=6)).batches[0]
    assert many.lengths[0] == [3, 5, 2, 4, 3, 5]


def test_lora_and_prompt_embedder_read_the_same_texts() -> None:
    (batch,) = workload("fixed", TOY).batches
    lora = VARIANTS["lora-padded"].build(TOY, False, CPU)
    ours = VARIANTS["pe-suffix"].build(TOY, False, CPU)
    assert lora.tokenize(batch.requests) == ours.tokenize(batch.requests)
    batch = workload("real", TOY).batches[0]
    instructed = VARIANTS["lora-padded"].build(TOY, True, CPU)
    longer = [len(row) for row in instructed.tokenize(batch.requests)]
    assert [a - len(b) for a, b in zip(longer, ours.tokenize(batch.requests), strict=True)] == [4] * 3 + [0] * 3


@pytest.mark.parametrize("variant", default_variants("cpu"))
def test_a_step_trains_the_same_loss(variant: str) -> None:
    load = workload("real", TOY)
    taken = step.prepare(TOY, variant, load, CPU)
    before = [parameter.detach().clone() for parameter in taken.parameters]
    assert taken(load.batches[0]).loss > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, taken.parameters, strict=True))
    assert isinstance(taken.model, LoraEmbedder if "lora" in variant else PromptEmbedder)
    backbone = dict(taken.model.backbone.model.named_parameters())
    assert all(".lora." in name or ".reader." in name for name, p in backbone.items() if p.requires_grad)


def test_the_forms_of_lora_take_the_same_step() -> None:
    load = workload("real", TOY)
    found = []
    for form in ("lora-padded", "lora-checkpointed", "lora-packed", "lora-cached"):
        taken = step.prepare(TOY, form, load, CPU)
        for part in taken.model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
        found += [taken(load.batches[1]).loss for _ in range(2)]
    assert found[::2] == pytest.approx([found[0]] * 4, rel=1e-4)
    assert found[1::2] == pytest.approx([found[1]] * 4, rel=1e-4)


@pytest.mark.parametrize("name", ["lora-packed-compiled", "pe-suffix-weighted-compiled"])
def test_compiled_parts_take_the_same_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the last stage of the compiler, which is torch's and slow; what is captured is the same."""
    compile_module = torch.nn.Module.compile
    compiled: list[torch.nn.Module] = []

    def capture(module: torch.nn.Module) -> None:
        compiled.append(module)
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", capture)
    torch.compiler.reset()
    load = workload("real", TOY)
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        expected, taken = (step.prepare(TOY, way, load, CPU) for way in (name.removesuffix("-compiled"), name))
        found = [[way(batch).loss for batch in load.batches * 2] for way in (expected, taken)]
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert len(compiled) == 2 * (1 + 4) + 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("variant", ["lora-packed", "lora-cached", "pe-suffix", "pe-suffix-weighted-ahead"])
def test_a_timed_step_is_one_of_training(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It tokenises each text once, masks what is no negative, checks, and moves the schedule on."""
    load = workload("real", TOY)
    taken, given, masks, checks = step.prepare(TOY, variant, load, CPU), list[int](), list[Any](), list[int]()
    tokenizer, loss, check = taken.model.backbone.text_tokenizer, losses.info_nce, stepping.check

    def tokenize(texts: Sequence[str], **options: Any) -> list[list[int]]:
        given.append(len(texts))
        return tokenizer(texts, **options)

    def noted(*arguments: Any, **options: Any) -> torch.Tensor:
        masks.append(options["query_ids"])
        return loss(*arguments, **options)

    monkeypatch.setattr(taken.model.backbone, "text_tokenizer", tokenize)
    monkeypatch.setattr(losses, "info_nce", noted)
    monkeypatch.setattr(stepping, "check", lambda loss, parts, done: checks.append(done) or check(loss, parts, done))
    for batch, following in load.turns():
        taken(batch, following)
    reads_ahead, instructions = taken.ahead is not None, len(load.batches) * ("lora" in variant)
    assert sum(given) == 6 * (len(load.batches) + reads_ahead) + instructions
    assert [rows.tolist() for rows in masks] == [batch.query_ids.tolist() for batch in load.batches]
    assert checks == [0]
    assert taken.done == 2


def test_turns_rotate() -> None:
    order: list[str] = []
    steps = {name: lambda *_, name=name: order.append(name) for name in "abc"}
    times = step.time_rounds(steps, workload("fixed", TOY), 2)
    assert "".join(order) == "abc" + "bca"
    assert [len(found) for found in times.values()] == [2, 2, 2]


def test_a_variant_that_fails_is_a_row(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load, whole = workload("fixed", TOY), step.prepare

    def prepare(case: Case, variant: str, *others: Any) -> Step[Embedder]:
        if variant == "lora-padded":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        if variant == "lora-packed":
            raise TritonError("no such instruction\nin line 3")
        return whole(case, variant, *others)

    monkeypatch.setattr(step, "prepare", prepare)
    variants = ["lora-padded", "lora-packed", "pe-suffix"]
    found = [record for group in step.measure(TOY, load, variants, 1, CPU, in_turns=False) for record in group]
    assert [record.get("failed") for record in found] == [
        "CUDA out of memory.",
        "TritonError: no such instruction",
        None,
    ]
    assert 0 < step.use(found[2]) < 1
    assert step.utilisation({**found[2], "peak_flops_per_s": step.rate(found[2])}) == "100%"
    assert step.table(found).row_count == 3
    monkeypatch.setattr(step_tables, "MEASURED", ("toy",))
    records.append("step", found)
    assert "| (a) LoRA, padded, SDPA | failed: CUDA out of memory. |" in step_tables.render_step(results)


@pytest.mark.parametrize("variant", [name for name in default_variants("cpu") if "int8" not in name])
def test_flops_are_those_that_run(variant: str) -> None:
    """Nothing is padded here, so only recomputation and what the formulas leave out stand between the two.

    torch counts no products of 8 bits.
    """
    case = dataclasses.replace(CASES["tiny"], queries=4)
    load = workload("fixed", case)
    taken, (batch,) = step.prepare(case, variant, load, CPU), load.batches
    in_place = {torch.ops.aten.addmm_: lambda *shapes, **_: addmm_flop(*shapes)}  # torch's counter leaves it out
    with step.finding_texts(variant, taken.model) as store:
        if store is not None:
            taken(batch)
        with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
            taken(batch)
        recomputed = {"lora-checkpointed": 1.5, "lora-cached": 1.5}.get(variant, 1.0)
        expected = step_flops(taken.model, batch.requests) * recomputed
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("variant", ["lora-padded", "lora-packed", "pe-suffix", "pe-prefix-text"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_texts_are_read_whole(distribution: Distribution, variant: str) -> None:
    load = workload(distribution, TOY)
    model = step.prepare(TOY, variant, load, CPU).model
    for batch in load.batches:
        read, texts = model.tokenize(batch.requests), [*batch.lengths[0], *batch.lengths[1]]
        assert all(len(row) >= length for row, length in zip(read, texts, strict=True))
    assert model.truncation.cut == 0


def test_cut_texts_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "MAX_LENGTH", 511)
    with pytest.raises(RuntimeError, match="pe-suffix, long: expected texts that are read whole, got 4 cut ones"):
        list(step.measure(TOY, workload("long", TOY), ["pe-suffix"], 1, CPU, in_turns=True))


def test_step_command_records_and_prints(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step.main(["--cases", "toy", "--rounds", "2"])
    shown = capsys.readouterr().out
    assert "(b) LoRA" in shown
    assert "toy, mixed" in shown
    found = records.read("step", results)
    assert len(found) == 4 * len(default_variants("cpu"))
    first = found[0]
    assert first["ms"]["p20"] <= first["ms"]["median"] <= first["ms"]["p80"]
    assert {"hardware", "versions", "commit", "dirty", "date", "run", "dtype", "sizes"} <= first.keys()
    assert first["hardware"]["cores"] >= 1
    assert f"({first['hardware']['instructions']})" in markdown.where(first)
    assert first["versions"]["torch"].startswith("2.")
    step.main(["--cases", "toy", "--distributions", "fixed", "--variants", "pe-prefix", "--rounds", "1", "--dry"])
    assert len(records.read("step", results)) == len(found)


def test_every_part_of_a_step_has_its_time(recipe: Recipe, results: Path) -> None:
    """With the texts found next to nothing is left of reading them, and the step is as it was before."""
    few = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=2))
    read, found = breakdown.measure("tiny", few, 1)
    records.append("breakdown", [read, found])
    for record in (read, found):
        assert list(record["ms"]) == list(breakdown.PARTS)
        assert all(part["median"] > 0 for part in record["ms"].values())
        assert sum(part["median"] for part in record["ms"].values()) == pytest.approx(
            record["total"]["median"], abs=0.1
        )
    page = breakdown.render(results)
    assert "| texts read, ms | share | texts found, ms | share |" in page
    assert len([line for line in page.splitlines() if line.startswith("| ")]) == 3 + len(breakdown.PARTS)


def test_a_charged_step_is_left_as_it_was(recipe: Recipe) -> None:
    model = new_model(recipe)
    taken = Step(model, recipe.loss, recipe.train, build_accelerator(recipe))
    owners = (model, model.backbone, model.skip, taken, taken.accelerator)
    before, clock = [dict(vars(owner)) for owner in owners], breakdown.Clock()
    with breakdown.charging(taken, clock), clock.part("outer"), clock.part("inner"):
        clock.go_on("after")
        assert [dict(vars(owner)) for owner in owners] != before
    assert [dict(vars(owner)) for owner in owners] == before
    assert list(clock.take()) == [breakdown.REST, "outer", "inner", "after"]


def test_sampler_sees_the_highest_value() -> None:
    values = iter([1, 7, 3])
    with memory.Sampler(lambda: next(values, 2), 0.001) as sampler:
        while sampler.samples < 4:
            pass
    assert sampler.highest == 7
    assert sampler.longest_gap > 0


def test_memory_of_this_process() -> None:
    found = memory.measure("toy", "real", "pe-suffix", 1, CPU)
    measured = found["memory"]
    assert measured["source"] == "rss"
    assert measured["peak_mib"] >= measured["loaded_mib"] > 0
    assert measured["above_mib"] == pytest.approx(measured["peak_mib"] - measured["loaded_mib"], abs=0.11)
    assert memory.above(measured) == measured["live_mib"] > 0
    assert memory.above({"above_mib": 3.0}) == 3.0


def test_memory_command_uses_a_fresh_process(
    results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.main(["--cases", "toy", "--distributions", "fixed", "--variants", "lora-packed", "--passes", "1"])
    (found,) = records.read("memory", results)
    assert found["memory"]["peak_mib"] > found["memory"]["above_mib"]
    assert "process, above" in capsys.readouterr().out

    failed = subprocess.CompletedProcess([], -9, "", "RuntimeError: out of memory\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    lost = memory.in_fresh_process("toy", "fixed", "pe-suffix", 1, CPU)
    assert lost["memory"] == {"failed": "RuntimeError: out of memory"}
    assert memory.table([lost]).row_count == 1


def test_lengths_come_from_the_recipe(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(lengths, "FILE", tmp_path / "lengths.json")
    monkeypatch.setattr(lengths, "ROWS", 6)
    lengths.main([str(write_recipe(tiny_models, tmp_path))])
    pairs, labelled = lengths.read(tmp_path / "lengths.json")
    assert len(pairs.queries) == len(pairs.documents) == 6
    assert labelled.instruction != labelled.document_instruction
    assert pairs.name in capsys.readouterr().out


def test_stored_lengths_fill_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    sets = lengths.read()
    assert {item.name for item in sets} == {"nli", "medquad", "headline", "banking77", "clinc150"}
    assert all(len(item.queries) == len(item.documents) == lengths.ROWS for item in sets)


def test_a_shape_is_a_checkpoint_where_there_is_one(tiny_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModel

    monkeypatch.setattr("bench.cases.ROOT", tiny_models)
    shape = Shape(kind="llama", sizes=dict(TOY.prompter.sizes), folder="one")
    stored = AutoModel.from_pretrained(tiny_models / "one", dtype=torch.float32)
    loaded = shape.load(AutoModel, torch.float32, CPU.device)
    assert torch.equal(loaded.get_input_embeddings().weight, stored.get_input_embeddings().weight)
    missing = Shape(kind="llama", sizes=dict(TOY.prompter.sizes), folder="none")
    assert missing.path is None
    assert missing.vocabulary == 64


def write_sts(folder: Path) -> None:
    (folder / "eval").mkdir(parents=True)
    pairs = [("a red cat", "a red dog", 4.0), ("the old man", "a cat", 1.0), ("one day", "one day", 5.0)]
    lines = [json.dumps({"sentence1": a, "sentence2": b, "score": s}) for a, b, s in [*pairs, *pairs]]
    (folder / "eval" / "stsb_dev.jsonl").write_text("\n".join(lines), encoding="utf-8")


def test_quality_tunes_trains_and_scores(
    tiny_models: Path,
    tmp_path: Path,
    results: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_sts(tmp_path / "tasks")
    file = write_recipe(tiny_models, tmp_path, train__steps=2)
    overrides = ["--evaluate.tasks=[PE-STSb-dev]", f"--evaluate.data={tmp_path / 'tasks'}"]
    systems = ["pe", "static", "lora-mean"]
    command = ["--recipe", str(file), "--systems", *systems, *overrides]
    monkeypatch.setattr(quality, "TUNING_STEPS", 2)
    monkeypatch.setattr(quality, "MINILM", tmp_path / "minilm")
    quality.main([*command, "--tune", "1e-3", "2e-1"])
    tuned = records.read("tuning", results)
    assert [(row["system"], row["rate"]) for row in tuned] == [(name, rate) for name in systems for rate in (1e-3, 0.2)]
    best = max((row for row in tuned if row["system"] == "pe"), key=lambda row: row["mean"])["rate"]

    run = [*command, "--seeds", "0", "1", "--rates", "static=0.1", "--data", str(tmp_path / "tasks")]
    quality.main(run)
    shown = capsys.readouterr().out
    assert "PE, suffix, reader, seed 1" in shown
    assert "left out; python -m pe.models minilm fetches it" in shown
    found = records.read("quality", results)
    assert len(found) == len(UNTRAINED) - 1 + 1 + 2 * len(systems)
    by_name = {(record["variant"], record["seed"]): record for record in found}
    assert by_name["static prompts, reader (control)", 1]["rate"] == 0.1
    assert by_name["PE, suffix, reader", 1]["rate"] == best
    assert by_name["LoRA, mean", 0]["cpu_seconds"] > 0
    assert by_name["PE, suffix, reader, untrained", 0]["seconds"] is None
    assert by_name["LoRA, mean", 0]["unseen"] == by_name["LoRA, mean", 0]["mean"]
    page = quality.render(results)
    assert "| PE, suffix, reader | " in page
    assert "| 100% |" in page
    quality.draw(results, tmp_path / "plots")
    assert [path.suffix for path in (tmp_path / "plots").iterdir()] == [".svg"]

    quality.main([*run, "--resume"])
    quality.main([*run, "--resume", "--seeds", "1", "--untrained"])
    assert len(records.read("quality", results)) == len(found)


def test_quality_looks_for_the_tasks_before_it_trains(
    tmp_path: Path, results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(quality, "measure")
    with pytest.raises(SystemExit) as stopped:
        quality.main(["--data", str(tmp_path)])
    assert stopped.value.code == 2
    assert "expected the files of at least one task, such as eval/stsb_dev.jsonl" in capsys.readouterr().err
    assert not records.read("quality", results)


def test_quality_scores_on_some_of_a_folders_tasks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Recipe] = []
    monkeypatch.setattr(quality, "measure", lambda recipe, *_, **__: asked.append(recipe))
    quality.main(["--data", "data", "--tasks", "PE-XQuAD", "PE-STSb-test"])
    assert (asked[0].evaluate.tasks, asked[0].evaluate.data) == (("PE-XQuAD", "PE-STSb-test"), "data")
    with pytest.raises(SystemExit):
        quality.main(["--tasks", "PE-XQuAD"])
    assert "--tasks: of which folder?" in capsys.readouterr().err
    assert len(asked) == 1


@pytest.mark.parametrize("op", ["linear", "linear, bias", "matmul", "added in place"])
def test_products_of_bfloat16_through_float32_are_rounded_once(op: str) -> None:
    """Outputs and gradients are the exact ones, rounded; float32 keeps its own."""
    x, w = torch.randn(2, 33, 48), torch.randn(2, 24, 48)
    ops: dict[str, Any] = {
        "linear": lambda x, w: torch.nn.functional.linear(x, w[0]),
        "linear, bias": lambda x, w: torch.nn.functional.linear(x[0], w[0], w[1, :, 0]),
        "matmul": lambda x, w: x @ w.mT,
        "added in place": lambda x, w: torch.zeros(33, 24, dtype=x.dtype).addmm_(x[0], w[0].T, alpha=2),
    }
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [part.bfloat16().to(dtype).requires_grad_() for part in (x, w)]
        with bfloat16.WideProducts():
            out = ops[op](*leaves)
            out.backward(torch.ones_like(out))
        found.append([out, *(leaf.grad for leaf in leaves)])
    for got, exact in zip(*found, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=1e-6)
    expected = x[0] @ w[0].T
    with bfloat16.WideProducts():
        assert torch.equal(x[0] @ w[0].T, expected)


@pytest.mark.parametrize("has", [False, True])
def test_products_go_through_float32_where_there_is_nothing_better(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "has_instructions", lambda dtype, device: has)
    with bfloat16.products(CPU.device):
        assert isinstance(_get_current_dispatch_mode(), bfloat16.WideProducts) is not has


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_of_the_quality_table_is_built(name: str, tiny_models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tiny_models, tmp_path))
    plan = build_plan(recipe, Console(quiet=True))
    model = SYSTEMS[name].build(recipe, plan, CPU.device)
    assert model.trainable_parameters()
    assert model.encode(["a cat"], instruction="Find the same thing").shape[0] == 1


def write_page(folder: Path) -> Path:
    page = folder / "BENCHMARKS.md"
    markers = "\n".join(f"<!-- begin:{name} -->\n<!-- end:{name} -->\nprose" for name in report.SECTIONS)
    page.write_text(markers, encoding="utf-8")
    return page


def fake(variant: str, **fields: Any) -> records.Record:
    load = workload("fixed", CASES["tiny"])
    return {**step.describe(CASES["tiny"], load, CPU), "variant": variant, **fields}


def test_page_follows_the_records(results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = write_page(tmp_path)
    monkeypatch.setattr(summary, "STEPS", (("tiny", "cpu", summary.OURS),))
    assert report.main(["--check"], pages=[page], folder=results) == 1
    assert report.main([], pages=[page], folder=results) == 0
    assert report.main(["--check"], pages=[page], folder=results) == 0
    assert page.read_text().count("Not yet measured.") == 15
    assert "GPU: not yet measured." in page.read_text()

    times = {"lora-padded": 300.0, "lora-checkpointed": 400.0, "lora-packed": 200.0}
    times |= {"pe-suffix": 100.0, "pe-suffix-weighted": 50.0}
    spreads = {name: {"median": ms, "p20": ms - 1, "p80": ms + 1} for name, ms in times.items()}
    rates = {"flops": 5e9, "product_flops_per_s": 1e11}
    records.append("step", [fake(name, ms=ms, rounds=5, **rates) for name, ms in spreads.items()])
    peaks = {"lora-padded": 100.0, "lora-packed": 60.0, "pe-suffix": 31.0, "pe-suffix-weighted": 30.0}
    above = {name: {"above_mib": peak} for name, peak in peaks.items()}
    sizes = {"loaded_mib": 50.0, "peak_mib": 150.0, "interval_ms": 2.0, "longest_gap_ms": 3.0}
    found = [fake(name, memory={**sizes, **memory}) for name, memory in above.items()]
    records.append("memory", [*found, fake("pe-prefix", memory={"failed": "out of memory"})])
    assert report.main(["--check"], pages=[page], folder=results) == 1
    report.main([], pages=[page], folder=results)
    text = page.read_text()
    assert "| PE, suffix | 100 | 99 to 101 | 163,840 | 5, 50% | 3.00 | 4.00 | 2.00 |" in text
    assert "| tiny, fixed | 3.00 | 4.00 | 2.00 | 6.00 | 8.00 | 4.00 | 0.31 | 0.30 |" in text
    assert "| PE, suffix | 31 | 0.31 | - | 31 | 50 | 150 |" in text
    assert "| PE, prefix | failed: out of memory |" in text
    assert "texts of one length |" in text
    assert "| 50 ms | 200 ms | 4.00 | 0.50 |  |" in text


def test_a_run_that_was_cut_short_takes_no_row_away(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def take(run: str, ms: float, *variants: str, **fields: Any) -> None:
        monkeypatch.setattr(records, "run_id", lambda: run)
        spread = {"median": ms, "p20": ms, "p80": ms}
        records.append("step", [fake(name, ms=spread, rounds=5, **fields) for name in variants])

    def shown() -> list[list[float]]:
        return [[record["ms"]["median"] for record in group] for group in step_tables.measured("step", results)]

    take("first", 1.0, "lora-padded", "pe-suffix")
    take("second", 2.0, "lora-padded")
    assert shown() == [[1.0, 1.0]]
    take("third", 3.0, "pe-suffix", "lora-padded")
    assert shown() == [[3.0, 3.0]]

    for gpu, variants in (("NVIDIA H100 80GB HBM3", ["lora-padded"]), ("NVIDIA H200", ["lora-padded", "pe-suffix"])):
        monkeypatch.setattr(records, "hardware", lambda gpu=gpu: {"gpu": gpu, "driver": "1"})
        take("third", 4.0, *variants, device="cuda")
    assert shown() == [[3.0, 3.0], [4.0], [4.0, 4.0]]
    shares = step_tables.render_shares(results)
    assert "NVIDIA H200, driver 1" in shares
    assert "to be taken again" not in shares
    assert "H100" not in shares  # LoRA alone is no share
    assert "H100" in step_tables.render_step(results)


def test_tables_say_which_steps_were_timed_in_part(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of steps without masks, scheduler and checks have no protocol."""
    spread = {"median": 2.0, "p20": 2.0, "p80": 2.0}
    former = [fake(name, ms=spread, rounds=5) for name in ("lora-padded", "pe-suffix")]
    records.append("step", [{name: value for name, value in row.items() if name != "protocol"} for row in former])
    remark = "timed without masks, scheduler and checks; to be taken again"
    assert step_tables.render_step(results).count(remark) == 1
    assert step_tables.render_shares(results).count(f"Steps: {remark}.") == 1
    monkeypatch.setattr(records, "run_id", lambda: "later")
    records.append("step", former)
    assert "to be taken again" not in step_tables.render_step(results) + step_tables.render_shares(results)


THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not THP.exists() or "[never]" in THP.read_text(), reason="a kernel without huge pages")
def test_large_tensors_stand_on_huge_pages() -> None:
    code = """
import re, bench, torch
kept = torch.zeros(2**24)
print(re.search(r"AnonHugePages: *([0-9]+)", open("/proc/self/smaps_rollup").read())[1])
"""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=records.ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert int(run.stdout) > 32 * 1024


def test_a_copy_without_history_says_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PE_COMMIT", "0123456789abcdef")
    assert records.origin() == {"commit": "0123456789ab", "dirty": False}
    monkeypatch.setenv("PE_DIRTY", "1")
    assert records.origin()["dirty"]


PUBLISHED = {
    "Llama-3.2-1B": ("1b", "backbone", 1.236e9),
    "Qwen3-4B": ("4b", "backbone", 4.022e9),
    "Qwen3-8B": ("8b", "backbone", 7.568e9),
    "Qwen3-0.6B": ("1b", "prompter", 0.596e9),
}
"""Parameters of the published models without an output embedding of their own (Qwen3-8B alone has one)."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name: str) -> None:
    case, part, parameters = PUBLISHED[name]
    shape: Shape = getattr(CASES[case], part)
    auto = AutoModel if part == "backbone" else AutoModelForCausalLM
    model = shape.load(auto, torch.bfloat16, torch.device("meta"))
    assert sum(weight.numel() for weight in model.parameters()) == pytest.approx(parameters, rel=1e-3)


def test_transfer_and_training_from_scratch_are_recorded(tiny_models: Path, tmp_path: Path, results: Path) -> None:
    write_sts(tmp_path / "tasks")
    file = write_recipe(tiny_models, tmp_path, train__steps=2)
    tasks = ["--evaluate.tasks=[PE-STSb-dev]", f"--evaluate.data={tmp_path / 'tasks'}"]
    train(load_recipe(file, tasks))
    command = [str(tmp_path / "run" / "model"), "--backbone", str(tiny_models / "two"), "--steps", "2"]
    transfer.main([*command, "--scratch", "lora-mean", "--rate", "0.01", "--train.eval_every=1"])
    moved, scratch = records.read("transfer", results)
    assert moved["variant"] == "PE: alignment, reader and weighted skip"
    assert scratch["variant"] == "LoRA, mean, from scratch"
    assert (moved["source"], moved["target"]) == (scratch["source"], scratch["target"]) == ("one", "two")
    assert [point[0] for point in moved["curve"]] == [point[0] for point in scratch["curve"]] == [0, 1, 2]
    assert scratch["source_score"] == moved["source_score"]
    assert (moved["rate"], scratch["rate"]) == (0.003, 0.01)
    assert moved["by_task"]["trained"] == {"PE-STSb-dev": moved["end_score"]}
    assert list(moved["by_task"]) == list(transfer.STAGES)
    assert scratch["by_task"]["trained"] == {"PE-STSb-dev": scratch["end_score"]}
    level = ["--scratch", "lora-last", "--only-scratch", "-1.0", "--output", str(tmp_path / "other")]
    transfer.main([*command, *level])
    assert records.read("transfer", results)[-1]["reached"]["0.99"][:2] == [0, 0.0]


def test_the_quality_table_names_every_machine_of_its_rows(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"recipe": "tiny", "protocol": quality.PROTOCOL, "mean": 1.0, "seen": 1.0, "unseen": 1.0, "cpu_seconds": 1.0}
    more: dict[str, Any] = {"by_type": {}, "by_task": {}, "rate": 0.1}
    for seed, instructions in enumerate(("AVX512", "AVX2", "AVX512")):
        machine = records.hardware() | {"cpu": "Chip", "instructions": instructions}
        monkeypatch.setattr(records, "hardware", lambda machine=machine: machine)
        records.append("quality", [row | more | {"variant": "LoRA, mean", "seed": seed}])
    page = quality.render(results)
    assert page.count("Chip (AVX512)") == page.count("Chip (AVX2)") == 1
    assert "| 1 A |" in page
    assert "A: Chip (AVX512)" in page


def scored(variant: str, mean: float, seconds: float | None, seed: int = 0, **fields: Any) -> None:
    """Record a training of the quality table."""
    row = {"recipe": "tiny --x=1", "variant": variant, "seed": seed, "mean": mean, "cpu_seconds": seconds}
    more = {"seen": mean, "unseen": mean, "by_type": {}, "by_task": {"PE-A": mean, "PE-B": mean}, "rate": 0.003}
    more |= {"steps": 120, "device": "cpu", "dtype": "float32"}
    records.append("quality", [row | more | {"protocol": quality.PROTOCOL} | fields])


def test_a_training_whose_texts_a_store_may_have_had_is_no_measure_of_time(results: Path) -> None:
    scored("LoRA, mean", 50.0, 90.0)
    scored("PE, suffix, reader", 50.0, 10.0, stored=True)
    (variants,) = quality.newest(results).values()
    assert quality.seconds_of(variants, "PE, suffix, reader") is None
    assert quality.seconds_of(variants, "LoRA, mean") == 90.0
    scored("PE, suffix, reader", 50.0, 40.0)
    (variants,) = quality.newest(results).values()
    assert quality.seconds_of(variants, "PE, suffix, reader") == 40.0


def test_trainings_that_all_had_a_store_stand_in_a_table_without_seconds(results: Path) -> None:
    scored("frozen backbone, mean", 20.0, None)
    assert not quality.newest(results), "nothing was trained"
    scored("PE, suffix, reader", 50.0, 10.0, stored=True)
    rows = {row[0]: row for row in rows_of(quality.render(results).split("\n\n")[1])}
    assert rows["PE, suffix, reader"][1:] == ["50.0", "-", "50.0", "50.0", "-", "0.003", "1"]
    assert "![" not in quality.render(results)


def test_a_table_is_named_by_what_changes_its_scores() -> None:
    rounded = "--train.text_store_dtype=int8"
    assert (
        quality.table_name("tiny", ["--train.text_store=x", rounded, "--train.text_store_gib=9"]) == f"tiny {rounded}"
    )


def test_real_trainings_stand_beside_lora_with_what_they_follow(results: Path) -> None:
    ours, lora = (quality.SYSTEMS[name].title for name in ("pe-weighted", "lora-weighted-dropless"))
    for recipe, steps in zip(summary.REAL, (120, 105), strict=True):
        for title, seconds, stored, right in (
            (ours, 100.0, False, 80.0),
            (ours, 40.0, True, 90.0),
            (lora, 250.0, False, 50.0),
        ):
            row = {"recipe": recipe, "protocol": quality.PROTOCOL, "variant": title, "seed": 0, "mean": 80.0}
            row |= {"by_type": {}, "by_task": {"PE-A": 80.0, summary.FOLLOWED: right}, "steps": steps, "rate": 1e-3}
            row |= {"dtype": "bfloat16", "device": "cpu", "cpu_seconds": seconds, "stored": stored}
            records.append("quality", [row])
    found = rows_of(summary.render(results))
    assert [row[0] for row in found] == [
        f"training of *SmolLM2-135M*, {steps} steps, scored on 1 task, in bfloat16" for steps in (120, 105)
    ]
    for row in found:
        cells = ["100 s, score 80.0, follows 90.0", "250 s, score 80.0, follows 50.0"]
        assert row[2:] == [*cells, "2.50", "", "100% of 80.0"]
    assert not summary.scored(results), "the rows of small models are of others"


def rows_of(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in table.splitlines()[2:]]


def test_shares_of_time_are_of_the_quickest_lora_that_scores_as_well(results: Path) -> None:
    def short() -> list[str] | None:
        row = summary.training_row("pe-weighted", "tiny", summary.scored(results))
        return row and row[2:]

    for seed, mean in enumerate((52.0, 54.0, 56.0)):
        scored("LoRA, weighted mean", mean, 300.0, seed)
    assert short() is None
    scored("PE, suffix, reader, weighted skip", 45.9, 50.0)
    scored("LoRA, mean", 51.9, 100.0)
    assert short() == ["50 s, score 45.9", "300 s, score 54.0", "6.00", "", "85% of 54.0"]
    scored("LoRA, weighted mean, no dropout", 52.0, 200.0)  # as low as the best one's lowest seed
    assert short() == ["50 s, score 45.9", "200 s, score 52.0", "4.00", "", "85% of 54.0"]
    scored("static prompts, reader, weighted skip (control)", 40.5, 40.0)
    lost = summary.render_losses(results)
    assert "score 40.5 there, ours 45.9; on instructions unseen in training 40.5 and 45.9" in lost

    def longer() -> list[str] | None:
        row = summary.training_row("pe-weighted-longer", "tiny", summary.scored(results))
        return row and row[2:]

    scored("PE, suffix, reader, weighted skip, 4 times the steps", 48.0, 240.0)
    assert longer() is None, "no LoRA of as many steps"
    scored("LoRA, weighted mean, no dropout, 4 times the steps", 60.0, 800.0)
    scored("LoRA, weighted mean, 4 times the steps", 59.4, 400.0)
    assert longer() == ["240 s, score 48.0", "800 s, score 60.0", "3.33", "", "80% of 60.0"]
    lost = summary.render_losses(results)
    assert "60.0 in 800 s, ours 48.0 in 240 s. LoRA's short run has 52.0 in 200 s" in lost
    scored("LoRA, weighted mean, 4 times the steps", 59.5, 400.0)  # half a point below one seed
    assert longer() == ["240 s, score 48.0", "400 s, score 59.5", "1.67", "", "80% of 60.0"]


def test_the_best_lora_counts_though_it_was_not_timed(results: Path) -> None:
    scored("PE, suffix, reader, weighted skip", 45.0, 50.0)
    scored("LoRA, mean", 50.0, 200.0)
    assert quality.match("pe-weighted", summary.scored(results)) == (
        "PE, suffix, reader, weighted skip",
        "LoRA, mean",
        "LoRA, mean",
    )
    scored("LoRA, weighted mean", 60.0, None)
    assert quality.match("pe-weighted", summary.scored(results)) is None


def test_the_order_and_the_frontier_of_the_quality_table(results: Path, tmp_path: Path) -> None:
    scored("LoRA, mean", 50.0, 200.0)
    scored("PE, of long ago", 99.0, 1.0)
    scored("LoRA, last token", 40.0, 100.0)
    scored("PE, suffix, reader, weighted skip", 44.0, 50.0)
    scored("PE, suffix, reader, weighted skip", 46.0, 70.0, seed=1)
    scored("PE, suffix, reader, weighted skip", 11.0, 40.0, seed=2, protocol=1)
    scored("PE, suffix, reader, weighted skip, untrained", 9.0, None)
    scored("PE, suffix, reader", 43.0, 40.0, protocol=1)
    rows = [line.split(" | ")[0] for line in quality.render(results).splitlines() if line.startswith("| ")][2:]
    skip = "| PE, suffix, reader, weighted skip"
    assert rows == [f"{skip}, untrained", skip, "| PE, suffix, reader †", "| LoRA, mean", "| LoRA, last token"]
    named = quality.frontier(quality.series(summary.scored(results)))
    assert [(item.label, item.x[0]) for item in named] == [
        ("PE, suffix, reader, weighted skip", 40.0),
        ("LoRA, mean", 200.0),
    ]
    quality.draw(results, tmp_path)
    (drawn,) = tmp_path.glob("*.svg")
    assert "all others" in drawn.read_text()
    assert "last token" not in drawn.read_text()


COMMANDS = sorted(path.stem for path in (records.ROOT / "bench").glob("*.py") if "\ndef main(" in path.read_text())


@pytest.mark.parametrize("name", COMMANDS, ids="bench.{}".format)
def test_every_command_says_what_it_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"bench.{name}")
    with pytest.raises(SystemExit) as stopped:
        module.main(["--help"])
    assert stopped.value.code == 0
    assert f"python -m bench.{name}" in capsys.readouterr().out


def test_aot_is_recorded(results: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What compilers say is `tests/kernels/test_aot.py`'s; of two launches of a kernel and case the larger is kept."""
    named = {"op": "pool_normalize", "kernel": "k", "case": "default", "dtype": "bf16", "spills": 0}
    said = [named | {"target": target, "registers": n} for target in ("sm_80", "gfx942") for n in (40, 64, 32)]

    def compiled(command: list[str], *, env: dict[str, str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[1:] == [str(aot.SCRIPT), "--op", "pool_normalize"]
        assert aot.SCRIPT.exists()
        assert "TRITON_INTERPRET" not in env
        return subprocess.CompletedProcess(command, 0, json.dumps(said), "")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(subprocess, "run", compiled)
    monkeypatch.setattr(records, "origin", lambda: {"commit": "0", "dirty": False})
    aot.main(["--op", "pool_normalize"])
    found = records.read("kernels", results)
    assert [(record["target"], record["registers"]) for record in found] == [("sm_80", 64), ("gfx942", 64)]
    assert "2 records in" in capsys.readouterr().out


def test_page_shows_transfer_and_kernels(results: Path, tmp_path: Path) -> None:
    reached = {"0.95": [12, 3.4], "0.99": None}
    scores = {"source_score": 60.0, "start_score": 40.0, "end_score": 58.0}
    moved = {"source": "one", "target": "two", "variant": "W alone", "seed": 0, "reached": reached, **scores}
    records.append("transfer", [moved | {"curve": [(0, 0.0, 40.0), (20, 7.0, 58.0)]}])
    assert "| W alone, seed 0 | 60.0 | 40.0 | 58.0 | 7 | 12 steps, 3 s | not reached |" in transfer.render(results)
    stages = {"source": {transfer.FOLLOWED: 80.0}, "trained": {transfer.FOLLOWED: 77.5}}
    records.append("transfer", [moved | {"curve": [(0, 5.0, 40.0)], "by_task": stages}])
    assert transfer.render(results).count("![Score against") == 1
    assert "| not reached | 80.0, 77.5 |" in transfer.render(results)
    transfer.draw(results, tmp_path / "plots")
    (image,) = (tmp_path / "plots").iterdir()
    assert image.name == "transfer-one-to-two-float32-20-steps.svg"
    assert image.read_text().count("level: one") == 1
    resources = {"registers": 128, "spills": 0, "shared": 4096, "matrix": "wgmma", "dtype": "bf16", "case": "default"}
    records.append("kernels", [{"op": "pool", "kernel": "pool_normalize", "target": "sm_90", **resources}])
    assert "| `pool_normalize`, default | 128 / 4 / 0 wgmma |" in aot.render(results)


def test_page_without_markers_is_refused(results: Path, tmp_path: Path) -> None:
    page = write_page(tmp_path)
    page.write_text(page.read_text().replace("<!-- end:step -->", ""))
    with pytest.raises(ValueError, match=r"between one pair of markers, got otherwise: \[\'step\'\]"):
        report.main([], pages=[page], folder=results)


def test_the_page_of_the_repository_is_not_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert report.main(["--check"]) == 0


def test_spread_and_scores() -> None:
    assert records.spread([1, 2, 3, 4, 5, 6]) == {"median": 3.5, "p20": 2.0, "p80": 5.0}
    assert quality.mean_and_spread([46.0, 47.0]) == "46.5 (46.0 to 47.0)"
    assert quality.mean_and_spread([46.0, 46.0]) == "46.0"
    assert quality.mean_and_spread([46.0, None]) == "-"


def test_benchmark_says_what_it_ran_on() -> None:
    benchmark = FakeBenchmark()
    benchmarked.test_step(benchmark, "toy", "real", "pe-suffix")
    assert (benchmark.group, len(benchmark.found)) == ("toy, real", 1)
    assert benchmark.extra_info["hardware"]["gpu"] is None or torch.cuda.is_available()
    assert benchmark.extra_info["sizes"]["queries"] == 3


@pytest.mark.parametrize("limit", [0, 1, 5, 64, 1000])
def test_largest_batch_is_found(limit: int) -> None:
    asked: list[int] = []

    def fits(count: int) -> bool:
        asked.append(count)
        return count <= limit

    found = largest.largest(fits, most=512)
    assert found <= limit
    assert limit == 1000 or limit - found <= max(1, found // 8)
    assert found == 512 or limit < 1000
    assert len(asked) < 20


def test_a_batch_that_does_not_fit_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = step.prepare(TOY, "pe-suffix", workload("long", TOY), CPU)
    sizes: list[int] = []

    def forward(requests: Requests) -> torch.Tensor:
        sizes.append(len(requests.texts))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert largest.batch_fits(taken, TOY, "fixed", 2)
    monkeypatch.setattr(taken.model, "forward", forward)
    assert not largest.batch_fits(taken, TOY, "long", 3)
    assert not largest.batch_fits(taken, TOY, "long", 4, parts=2)
    assert sizes == [6, 4]


def test_largest_batch_is_rendered_and_needs_a_gpu(results: Path) -> None:
    assert largest.render(results) == "GPU: not yet measured."
    records.append("largest", [fake("pe-suffix", gib=24, queries=96, tokens=24_576)])
    assert "| PE, suffix | 96 (24,576) |" in largest.render(results)
    with pytest.raises(SystemExit, match="needs a GPU"):
        largest.main(["--cases", "toy", "--device", "cpu"])

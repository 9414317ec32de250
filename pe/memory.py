"""`python -m pe.memory [RECIPE.yaml] [--section.option=value ...] [--estimate] [--output FOLDER]`

Memory of a training step of the recipe, PromptEmbedder beside LoRA on the same backbone and batch: the batch with the
most tokens among the recipe's first steps. Every system is measured in a process of its own, first by plain steps under
a sampler (the process's RSS on a CPU; NVML, and torch's allocator, on a GPU), then by one more that counts every live
tensor, which says where the memory goes. The same step is predicted from the models' configurations alone; `--estimate`
does only that. Without a recipe it takes `recipes/tiny.yaml`. The steps run without CUDA graphs, which hold the
gradients and a copy of the texts' keys and values besides, without texts read ahead and without a text store; with
`train.text_store` the report says how large the store of a run will be.

RSS is more than the live tensors at one moment: glibc keeps freed blocks for later. With MALLOC_MMAP_THRESHOLD_=65536
and MALLOC_TRIM_THRESHOLD_=65536 in the environment it returns them at once, and RSS follows the tensors, more slowly.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table

from pe.config import Recipe, RecipeError
from pe.data.batches import Batch
from pe.data.records import DataError
from pe.measure.footprint import (
    SYSTEMS,
    MeteredStep,
    System,
    estimate,
    heaviest_batch,
    load,
    longest_batch,
    text_store_size,
)
from pe.measure.meters import (
    CATEGORIES,
    INTERVAL,
    MIB,
    AllocatorPeaks,
    Footprint,
    Sampler,
    device_used,
    driver_reserved,
    give_back_freed,
    highest_resident,
    process_used,
    resident,
)
from pe.method.loading import quiet
from pe.runs.cli import user_errors
from pe.runs.extras import extra
from pe.runs.files import write_text
from pe.runs.parsers import Parser
from pe.runs.recipes import load_recipe
from pe.train import DEFAULT_RECIPE, build_accelerator

Record = dict[str, Any]

SOURCES = {"nvml": "NVML", "cuda": "CUDA", "rss": "RSS"}
"""Who says how much of the GPU, or of a CPU's memory for the process, is in use."""
TITLES: dict[System, str] = {
    "pe": "PromptEmbedder",
    "lora-padded": "LoRA, padded",
    "lora-checkpointed": "LoRA, checkpointed",
    "lora-packed": "LoRA, packed, no dropout",
}
STORE = ("texts", "tokens", "bytes_a_token")
PHASES = ("forward", "backward", "optimiser")
FILES = ("report.json", "memory.svg", "memory.png")
POINTS = 300
COLOURS = ("#9aa5b1", "#52606d", "#c79a3b", "#e2c27f", "#4c9f70", "#3d7ab8", "#c2c9d1")
"""Of the categories, in their order."""


class ReportError(ValueError):
    """A report that cannot be written as asked."""


class NothingMeasured(RuntimeError):
    """Every system failed; the report says why each did."""


def mib(size: int) -> float:
    return round(size / MIB, 2)


# Measuring one system.


def summary(found: Footprint) -> Record:
    """Peak, categories and course of a step's live tensors, in MiB and seconds."""
    course = found.thinned(POINTS)
    return {
        "loaded_mib": mib(found.loaded),
        "peak_mib": mib(found.peak),
        "above_mib": mib(found.above),
        "categories_mib": {name: mib(size) for name, size in found.at_peak.items()},
        "phases_mib": {phase: mib(found.peak_in(phase)) for phase in PHASES},
        "course": {
            "seconds": [round(when, 5) for when in course.times],
            "mib": {name: [mib(size) for size in sizes] for name, sizes in course.bytes.items()},
            "phases": [[name, round(begin, 5)] for name, begin in course.phases],
        },
    }


def measure(recipe: Recipe, system: System, batch: Batch, steps: int, interval: float = INTERVAL) -> Record:
    """Memory of this process over `steps` plain steps and one that counts live tensors; meant for a fresh process.

    Returns:
        `live`: see `summary`; `process`: each source's loaded figure, peak, and peak above loaded, in MiB.
    """
    device = build_accelerator(recipe).device
    torch.manual_seed(recipe.train.seed)
    step = MeteredStep(load(recipe, system, device), recipe)
    give_back_freed()
    on_gpu = device.type == "cuda"
    source, read = device_used(device) if on_gpu else resident()
    loaded, highest_before, seconds = read(), highest_resident(), []
    torch_loaded = (
        {"allocated": torch.cuda.memory_allocated(device), "reserved": torch.cuda.memory_reserved(device)}
        if on_gpu
        else {}
    )
    allocator = AllocatorPeaks(device, step.phases) if on_gpu else None
    with Sampler(read, interval, step.phases) as sampler:
        for _ in range(steps):
            started = time.perf_counter()
            taken = step(batch)
            seconds.append(time.perf_counter() - started)
    peak = max(sampler.highest, read())
    if not on_gpu and highest_resident() > highest_before:
        peak = max(peak, highest_resident())
    process: Record = {source: source_of(loaded, peak, sampler.peaks)}
    if allocator:
        for name, peaks in (("allocated", allocator.allocated), ("reserved", allocator.reserved)):
            process[name] = source_of(torch_loaded[name], max(peaks.values()), peaks)
        for name, size in (("driver_reserved", driver_reserved(device)), ("nvml_process", process_used(device))):
            process[name] = None if size is None else {"now_mib": mib(size)}
    return {
        "dtype": str(step.model.backbone.dtype).removeprefix("torch."),
        "autocast": step.accelerator.mixed_precision,
        "tokens": taken.tokens,
        "step_seconds": round(sorted(seconds)[len(seconds) // 2], 4),
        "interval_ms": 1000 * interval,
        "longest_gap_ms": round(1000 * sampler.longest_gap, 1),
        "process": process,
        "live": summary(step.footprint(batch)),
    }


def source_of(loaded: int, peak: int, phases: dict[str, int]) -> Record:
    return {
        "loaded_mib": mib(loaded),
        "peak_mib": mib(peak),
        "above_mib": mib(peak - loaded),
        "phases_mib": {phase: mib(phases[phase]) for phase in PHASES if phase in phases},
    }


def in_fresh_process(arguments: argparse.Namespace, overrides: Sequence[str], system: System) -> Record:
    """`measure` in a new interpreter.

    Returns:
        its record; where it fails (out of memory, say), one with the reason under `failed`.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "record.json"
        command = [sys.executable, "-m", "pe.memory", str(arguments.recipe), "--worker", system]
        command += ["--output", str(target), "--steps", str(arguments.steps), *overrides]
        run = subprocess.run([*command, *["--longest"] * arguments.longest], stderr=subprocess.PIPE, text=True)
        if run.returncode == 0 and target.exists():
            return cast(Record, json.loads(target.read_text(encoding="utf-8")))
    reason = run.stderr.strip().splitlines()[-1:] or [f"ended by signal or code {run.returncode}"]
    return {"failed": reason[0]}


# The report.


def compare(record: Record) -> None:
    """Add the deviation of the predicted peak above the loaded model from each source's: predicted / measured - 1."""
    if "live" in record and "above_mib" in record["predicted"]:
        predicted = record["predicted"]["above_mib"]
        measured = {"live": record["live"]["above_mib"]}
        measured |= {
            name: item["above_mib"] for name, item in record["process"].items() if item and "above_mib" in item
        }
        record["deviation"] = {name: round(predicted / above - 1, 4) for name, above in measured.items() if above > 0}


def predict(recipe: Recipe, system: System, batch: Batch, device: torch.device) -> Record:
    """`summary` of the predicted step; where torch cannot run it without data, the reason under `failed`."""
    try:
        return summary(estimate(recipe, system, batch, device))
    except (RuntimeError, ValueError) as error:
        return {"failed": str(error).partition("\n")[0]}


def build_report(arguments: argparse.Namespace, overrides: Sequence[str], recipe: Recipe, batch: Batch) -> Record:
    """Measure and predict every system asked for.

    The prediction comes last: on a GPU it needs a context, which the measured processes would see.
    """
    systems: list[Record] = []
    for system in arguments.systems:
        found = {} if arguments.estimate else in_fresh_process(arguments, overrides, system)
        systems.append({"system": system, **found})
    accelerator = build_accelerator(recipe)
    for record in systems:
        record["predicted"] = predict(recipe, record["system"], batch, accelerator.device)
        compare(record)
    on_gpu = accelerator.device.type == "cuda"
    return {
        "recipe": arguments.recipe.name,
        "overrides": list(overrides),
        "backbone": Path(recipe.model.backbone.model).name,
        "prompter": Path(recipe.model.prompter.model).name,
        "layout": recipe.model.layout,
        "device": torch.cuda.get_device_name(accelerator.device) if on_gpu else "cpu",
        "precision": accelerator.mixed_precision,
        "torch": torch.__version__,
        "batch": {"queries": len(batch.queries), "texts": len(batch.queries) + len(batch.documents)},
        "micro_batch_size": recipe.train.micro_batch_size,
        "max_length": recipe.trained_length,
        "texts": "of max_length tokens" if arguments.longest else "the recipe's",
        "systems": systems,
    }


def peaks_table(report: Record) -> Table:
    """Measured beside predicted peaks above the loaded model."""
    records, is_gpu = report["systems"], report["device"] != "cpu"
    measured = [name for record in records for name in SOURCES if name in record.get("process", {})]
    source = measured[0] if measured else "nvml" if is_gpu else "rss"
    name = SOURCES[source]
    note = ", without the CUDA context" if is_gpu else ""
    title = "Peak of a step above the loaded model, MiB"
    grid = Table("", *(TITLES[record["system"]] for record in records), title=title, title_justify="left")
    rows: dict[str, Callable[[Record], str]] = {
        f"predicted{note}": lambda r: f"{r['predicted']['above_mib']:,.1f}",
        "live tensors, measured": lambda r: f"{r['live']['above_mib']:,.1f}",
        "predicted / measured": lambda r: f"{r['deviation']['live']:+.1%}",
        f"{name}, measured": lambda r: f"{r['process'][source]['above_mib']:,.1f}",
        f"predicted / {name}": lambda r: f"{r['deviation'][source]:+.1%}",
        f"whole process by {name}": lambda r: f"{r['process'][source]['peak_mib']:,.1f}",
        "tokens": lambda r: f"{r['tokens']:,}",
        "seconds a step": lambda r: f"{r['step_seconds']:.2f}",
        "longest gap of samples, ms": lambda r: f"{r['longest_gap_ms']:.0f}",
        "not measured": lambda r: r["failed"],
        "not predicted": lambda r: r["predicted"]["failed"],
    }
    for row, text in rows.items():
        cells = [cell(record, text) for record in records]
        if any(cells):
            grid.add_row(row, *(found or "-" for found in cells))
    return grid


def cell(record: Record, text: Callable[[Record], str]) -> str:
    """What `text` makes of a record, or nothing where the record lacks it."""
    try:
        return text(record)
    except KeyError:
        return ""


def shown(record: Record) -> Record | None:
    """The course of a system that is drawn and broken down: the measured, else the predicted."""
    return next((part for part in (record.get("live"), record["predicted"]) if part and "course" in part), None)


def label(record: Record) -> str:
    return TITLES[record["system"]] + ("" if "live" in record else ", predicted")


def categories_table(report: Record) -> Table:
    """Where the memory is when it peaks, by category."""
    courses = {label(record): found for record in report["systems"] if (found := shown(record))}
    grid = Table("", *courses, title="Live tensors at the peak, MiB", title_justify="left")
    for name in CATEGORIES:
        grid.add_row(name, *(f"{found['categories_mib'][name]:,.1f}" for found in courses.values()))
    grid.add_row("sum", *(f"{found['peak_mib']:,.1f}" for found in courses.values()), style="bold")
    return grid


def phases_table(report: Record) -> Table:
    """The highest figure of every source in each phase."""
    grid = Table("", "source", *PHASES, title="Peak in each phase, MiB", title_justify="left")
    for record in report["systems"]:
        sources = {"live tensors" if "live" in record else "predicted": shown(record), **record.get("process", {})}
        sources = {name: item["phases_mib"] for name, item in sources.items() if item and "phases_mib" in item}
        for number, (name, phases) in enumerate(sources.items()):
            values = (f"{phases[phase]:,.1f}" if phase in phases else "-" for phase in PHASES)
            grid.add_row("" if number else TITLES[record["system"]], name, *values)
    return grid


def draw(report: Record, paths: Sequence[Path]) -> list[Path]:
    """Stacked areas of the live tensors over the step, one panel a system, all with the same y axis.

    Returns:
        the paths that were written: none where no system has a course.
    """
    matplotlib = extra("matplotlib", "bench")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [record for record in report["systems"] if shown(record)]
    if not records:
        return []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pe.memory"}):
        figure, axes = pyplot.subplots(
            1, len(records), figsize=(1.5 + 4.2 * len(records), 5), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, record in zip(axes[0], records, strict=True):
            draw_course(axis, record)
        axes[0][0].set_ylabel("MiB of live tensors")
        handles, names = axes[0][0].get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside right center", frameon=False)
        texts = f"{report['batch']['texts']} texts a step"
        title = f"{report['recipe']}: {report['backbone']}, {report['layout']} layout, {texts}, {report['device']}"
        figure.suptitle(title, x=0.01, ha="left")
        for path in paths:
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)
    return list(paths)


def draw_course(axis: Any, record: Record) -> None:
    found, is_measured = shown(record), "live" in record
    assert found is not None
    course, phases = found["course"], found["course"]["phases"]
    end = phases[-1][1]
    times = [0, *course["seconds"], end]
    layers = [[sizes[0], *sizes, sizes[-1]] for sizes in (course["mib"][name] for name in CATEGORIES)]
    axis.stackplot(times, layers, labels=CATEGORIES, colors=COLOURS, step="post", linewidth=0)
    named: set[str] = set()  # micro batches go to and fro: a phase is named where it first begins
    for name, begin in phases[:-1]:
        axis.axvline(begin, color="black", linewidth=0.8, linestyle=":", alpha=0.6)
        if name not in named and not (name == "forward" and named):
            side = "right" if begin > 0.7 * end else "left"
            axis.text(begin, 1.01, name, ha=side, va="bottom", fontsize=8, transform=axis.get_xaxis_transform())
        named.add(name)
    if "peak_mib" in record["predicted"]:
        predicted = record["predicted"]["peak_mib"]
        axis.axhline(predicted, color="#b03a2e", linewidth=1, linestyle="--")
        axis.text(
            0.99 * end,
            predicted,
            f"predicted peak {predicted:,.0f}",
            ha="right",
            va="bottom",
            fontsize=8,
            color="#b03a2e",
        )
    kind = "measured" if is_measured else "predicted"
    axis.set_title(f"{TITLES[record['system']]}\n{kind} peak {found['peak_mib']:,.0f} MiB", fontsize=10, pad=18)
    axis.set_xlabel("seconds of a step under the meter" if is_measured else "in the order of the step's operations")
    axis.set_xlim(0, end)
    axis.margins(y=0.12)
    if not is_measured:
        axis.set_xticks([])


# The command.


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Own options, and the recipe's overrides."""
    parser = Parser("python -m pe.memory", __doc__)
    parser.add_argument("recipe", nargs="?", type=Path, default=DEFAULT_RECIPE)
    parser.add_argument("--estimate", action="store_true", help="predict only; no weights are loaded")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS[:3]))
    parser.add_argument("--longest", action="store_true", help="texts of max_length tokens, not the recipe's")
    parser.add_argument("--steps", type=int, default=3, help="plain steps under the sampler (default: 3)")
    parser.add_argument("--output", type=Path, help="folder of the report (default: runs/memory-RECIPE)")
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is there")
    parser.add_argument("--worker", choices=SYSTEMS, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.steps < 1:
        raise ReportError(f"--steps: expected at least 1, got {arguments.steps}")
    arguments.output = arguments.output or Path("runs") / f"memory-{arguments.recipe.stem}"
    return arguments, overrides


def check_output(folder: Path, overwrite: bool) -> None:
    place = folder.absolute()
    nearest = next(path for path in (place, *place.parents) if path.exists())
    if not nearest.is_dir():
        raise ReportError(f"--output: expected a folder, got {folder}, where {nearest} is a file")
    there = [name for name in FILES if (folder / name).exists()]
    if there and not overwrite:
        raise ReportError(f"{folder}: holds a report already ({', '.join(there)}); --overwrite replaces it")


def choose_batch(recipe: Recipe, arguments: argparse.Namespace) -> Batch:
    """The recipe's heaviest batch; where that was asked for, or an estimate finds no data, one of longest texts."""
    if not arguments.longest:
        try:
            return heaviest_batch(recipe)
        except (DataError, RecipeError) as error:
            if not arguments.estimate:
                raise
            print(f"pe.memory: {error}; predicting for texts of max_length tokens", file=sys.stderr)
            arguments.longest = True
    return longest_batch(recipe)


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    recipe = load_recipe(arguments.recipe, overrides)
    if not arguments.worker:
        check_output(arguments.output, arguments.overwrite)
        for name in ("matplotlib",) if arguments.estimate else ("matplotlib", "psutil"):
            extra(name, "bench")
    batch = choose_batch(recipe, arguments)
    if arguments.worker:
        record = measure(recipe, arguments.worker, batch, arguments.steps)
        arguments.output.write_text(json.dumps(record), encoding="utf-8")
        return
    report = build_report(arguments, overrides, recipe, batch)
    if recipe.train.text_store != "none":
        device = build_accelerator(recipe).device
        report["text_store"] = dict(zip(STORE, text_store_size(recipe, device), strict=True))
    write_text(arguments.output / FILES[0], json.dumps(report, indent=1) + "\n")
    for name in FILES[1:]:
        (arguments.output / name).unlink(missing_ok=True)
    charts = draw(report, [arguments.output / name for name in FILES[1:]])
    console = Console()
    for table in (peaks_table(report), categories_table(report), phases_table(report)):
        console.print(table)
    if "text_store" in report:
        texts, tokens, size = (report["text_store"][name] for name in STORE)
        needed = f"{texts:,} texts, {tokens:,} tokens of {size:,} bytes: {tokens * size / 2**30:.3g} GiB"
        console.print(f"text store of a run: {needed}, of {recipe.train.text_store_gib:g} allowed", highlight=False)
    written = ", ".join([FILES[0], *(path.name for path in charts)])
    console.print(f"written to {arguments.output}: {written}", highlight=False)
    reasons = [failure(record, arguments.estimate) for record in report["systems"]]
    if all(reasons):
        raise NothingMeasured(f"no system {'predicted' if arguments.estimate else 'measured'}: {reasons[0]}")


def failure(record: Record, is_estimate: bool) -> str | None:
    """Why a system has not what was asked for: its measurement, or its prediction."""
    asked: Record = record["predicted"] if is_estimate else record
    return asked.get("failed")


def main(argv: Sequence[str] | None = None) -> None:
    """Report as the command line says; ends with one message and exit code 2 for bad input, 1 if every system fails."""
    quiet()
    try:
        with user_errors("pe.memory"):
            run(*parse(argv))
    except NothingMeasured as error:
        print(f"pe.memory: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()

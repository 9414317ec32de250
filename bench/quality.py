"""`python -m bench.quality [--seeds 0 1 2] [--systems pe lora-mean ...] [--data FOLDER] [--section.option=value ...]`

Trains the default recipe's embedder, its variants and its peers on the same backbone, data, batches and steps, and
scores each on the recipe's tasks, or with `--data` on every task whose files are in a folder, or of these on `--tasks`.
Tasks whose instruction stands in the training sets are called seen, all others unseen. Overrides are as for `pe.train`.

`--tune` looks for each system's learning rate first: short trainings under a seed of their own, scored on the recipe's
tasks, to the records. A system is then trained at its best recorded rate (`--rates lora-mean=5e-4` overrules it).
`--resume` leaves out what is in the records already.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import set_seed
from rich.console import Console

from bench import bfloat16, plots, records
from bench.cases import ROOT
from bench.markdown import NOT_YET, grid, hardware, letters, origins
from bench.plots import Panel, Series
from bench.systems import SYSTEMS, frozen_dtype
from bench.untrained import MINILM, PEER, UNTRAINED
from pe.config import Recipe
from pe.data.instruct_score import INSTRUCT
from pe.evaluate import Scores, find_tasks, score
from pe.integrations.mteb import TextEncoder
from pe.method.loading import has_instructions, quiet
from pe.runs.cli import user_errors
from pe.runs.recipes import load_recipe
from pe.train import build_accelerator, build_plan, fit, stored_texts


class Row(NamedTuple):
    """A line of the table; wall-clock and processor seconds of training, None before it."""

    title: str
    scores: Scores
    seconds: float | None = None
    cpu_seconds: float | None = None


PROTOCOL = 2
"""Of new records. 2: LoRA adapters (LoRA's, the reader's) train in float32; before, in the frozen weights' bfloat16."""
AS_ONE = ("--train.text_store=", "--train.text_store_gib=", "--train.micro_batch_size=")
"""Options that change no score: a table is named by all others."""
TUNING_SEED = 100
TUNING_STEPS = 60
EARLIER = "† Not yet measured again: its adapters trained in the frozen weights' type instead of float32."
PEERS = tuple(
    SYSTEMS[f"lora-{pooling}{dropout}"].title
    for pooling in ("mean", "weighted", "last")
    for dropout in ("", "-dropless")
)
WITHIN = 0.5
"""Points below the best LoRA's mean that score as well as it does, or down to its lowest seed where that is less."""
ORDER = [*UNTRAINED, *(title for own in SYSTEMS.values() for title in (f"{own.title}, untrained", own.title))]
"""Of the table's rows."""
Variants = Mapping[str, Sequence[records.Record]]


def evaluate(encoder: TextEncoder, recipe: Recipe) -> Scores:
    options = recipe.evaluate
    return score(encoder, options.tasks, data=Path(options.data), instructions=options.instructions)


def train_one(name: str, recipe: Recipe, device: torch.device) -> Row:
    """The trained system under the recipe's seed."""
    set_seed(recipe.train.seed)
    plan = build_plan(recipe, Console(quiet=True))
    model = SYSTEMS[name].build(recipe, plan, device)
    accelerator = build_accelerator(recipe)
    with stored_texts(model, plan, recipe.train, accelerator, None):
        started = time.process_time()
        history = fit(model, plan, recipe, accelerator)
        spent = time.process_time() - started
        return Row(SYSTEMS[name].title, evaluate(model, recipe), history.seconds, spent)


def score_peer(title: str, recipe: Recipe, device: torch.device) -> Row:
    """What has nothing to train."""
    return Row(title, evaluate(UNTRAINED[title](recipe, device), recipe))


def untrained(name: str, recipe: Recipe, device: torch.device) -> Row:
    """The system as it is built, under the recipe's seed."""
    set_seed(recipe.train.seed)
    model = SYSTEMS[name].build(recipe, build_plan(recipe, Console(quiet=True)), device)
    return Row(f"{SYSTEMS[name].title}, untrained", evaluate(model, recipe))


def as_record(row: Row, recipe: Recipe, name: str, device: torch.device) -> records.Record:
    """What was trained how, and its scores: by task, by type, over tasks of seen and of unseen instructions."""
    found = row.scores.to_dict()
    trained_on = {item.instruction for item in recipe.data}
    sides: dict[str, list[float]] = {"seen": [], "unseen": []}
    for task in (task for task in row.scores.tasks.values() if task.type != INSTRUCT):
        sides["seen" if task.instruction in trained_on else "unseen"].append(task.score)
    return {
        "recipe": name,
        "protocol": PROTOCOL,
        "variant": row.title,
        "seed": recipe.train.seed,
        "device": device.type,
        "dtype": frozen_dtype(recipe.model.backbone, device),
        "native_bfloat16": has_instructions(torch.bfloat16, device),
        "backbone": recipe.model.backbone.model,
        "steps": recipe.train.total_steps,
        "rate": recipe.train.lr,
        "stored": recipe.train.text_store != "none",
        "micro_batch_size": recipe.train.micro_batch_size,
        "temperature": recipe.loss.temperature,
        "seconds": None if row.seconds is None else round(row.seconds, 3),
        "cpu_seconds": None if row.cpu_seconds is None else round(row.cpu_seconds, 3),
        "mean": found["mean"],
        **{side: sum(scores) / len(scores) if scores else None for side, scores in sides.items()},
        "by_type": found["by_type"],
        "by_task": {task: result["score"] for task, result in found["tasks"].items()},
    }


def with_train(recipe: Recipe, **options: Any) -> Recipe:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **options))


def is_current(record: records.Record) -> bool:
    """Whether a system was trained as it would be now: what trains no adapters is the same in every protocol."""
    variant = record["variant"]
    trains_adapters = ("reader" in variant or "LoRA" in variant) and not variant.endswith("untrained")
    return not trains_adapters or record.get("protocol", 1) == PROTOCOL


def best_rate(name: str, recipe: Recipe, recipe_name: str) -> float:
    """The rate whose tuning run of this system and recipe scored highest; the recipe's own where there is none."""
    runs = [
        record
        for record in records.read("tuning")
        if (record["system"], record["recipe"]) == (name, recipe_name) and record["mean"] is not None
    ]
    runs = [record for record in runs if is_current(record)] or runs
    return max(runs, key=lambda record: record["mean"])["rate"] if runs else recipe.train.lr


def tune(recipe: Recipe, name: str, systems: Sequence[str], rates: Sequence[float], device: torch.device) -> None:
    """Short trainings of every system at every rate, under a seed that no measurement uses; one record each."""
    done = {
        (record["recipe"], record["system"], record["rate"]) for record in records.read("tuning") if is_current(record)
    }
    for system in systems:
        for rate in rates:
            if (name, system, rate) in done:
                continue
            own = with_train(recipe, lr=rate, seed=TUNING_SEED, steps=TUNING_STEPS)
            record = {**as_record(train_one(system, own, device), own, name, device), "system": system}
            records.append("tuning", [record])
            print(f"{system} at {rate:g}: {record['mean']:.2f}, {record['seconds']:.0f} s", flush=True)


def measure(
    recipe: Recipe,
    name: str,
    systems: Sequence[str],
    seeds: Sequence[int],
    rates: Mapping[str, float],
    device: torch.device,
    *,
    before: Sequence[str] = (),
    resume: bool = False,
) -> None:
    """Train and score every system under every seed, those in `before` untrained too; a record as each one ends."""
    done = {
        (record["recipe"], record["variant"], record["seed"])
        for record in records.read("quality")
        if is_current(record)
    }

    def keep(run: Callable[[str, Recipe, torch.device], Row], what: str, title: str, own: Recipe) -> None:
        if resume and (name, title, own.train.seed) in done:
            return
        record = as_record(run(what, own, device), own, name, device)
        records.append("quality", [record])
        types = ", ".join(f"{kind} {value:.1f}" for kind, value in record["by_type"].items())
        spent = "" if record["seconds"] is None else f", {record['seconds']:.0f} s"
        print(f"{title}, seed {own.train.seed}: mean {record['mean']:.1f} ({types}){spent}", flush=True)

    for title in UNTRAINED:
        if title == PEER and not MINILM.is_dir():
            print(f"{title}: left out; python -m pe.models {MINILM.name} fetches it", flush=True)
            continue
        keep(score_peer, title, title, with_train(recipe, seed=0))  # which no seed changes
    first = with_train(recipe, seed=seeds[0])
    for system in before:
        keep(untrained, system, f"{SYSTEMS[system].title}, untrained", first)
    for seed in seeds:
        for system in systems:
            rate, steps = rates.get(system) or best_rate(system, recipe, name), recipe.train.total_steps
            own = with_train(recipe, seed=seed, lr=rate, steps=steps * SYSTEMS[system].times)
            keep(train_one, system, SYSTEMS[system].title, own)


def newest(folder: Path) -> dict[str, dict[str, list[records.Record]]]:
    """The newest record of every seed, by recipe and variant; of an earlier protocol where none is current.

    Variants stand in the table's order. Those that are measured no more are left out, with what nothing else stands by.
    Each row's `quickest` is the record of its variant's fastest training, of every protocol: what else the machine does
    only adds to its seconds. Bfloat16 that a processor has no instructions for is no measure of time, nor is a training
    whose texts a store may have had, or one that took its batches in parts for want of memory.
    """
    rows = [row for row in records.read("quality", folder) if row["variant"] in ORDER]
    latest = {(row["recipe"], row["variant"], row["seed"]): row for row in rows}
    found: dict[str, dict[str, list[records.Record]]] = {}
    for row in sorted(latest.values(), key=lambda row: ORDER.index(row["variant"])):
        same = [other for other in rows if (other["recipe"], other["variant"]) == (row["recipe"], row["variant"])]
        timed = [other for other in same if other.get("native_bfloat16", True) or other["dtype"] != "bfloat16"]
        timed = [other for other in timed if other.get("cpu_seconds") is not None]
        timed = [other for other in timed if not other.get("stored") and not other.get("micro_batch_size")]
        quickest = min(timed, key=lambda other: other["cpu_seconds"], default=None)
        found.setdefault(row["recipe"], {}).setdefault(row["variant"], []).append(row | {"quickest": quickest})
    for variants in found.values():
        for name, own in variants.items():
            variants[name] = [row for row in own if is_current(row)] or own
    return {recipe: variants for recipe, variants in found.items() if is_trained(variants)}


def is_trained(variants: Variants) -> bool:
    """Whether any of them was trained, with a store or without."""
    return any(row.get("cpu_seconds") is not None for rows in variants.values() for row in rows)


def is_tiny(variants: Variants) -> bool:
    """Whether they stand on a model of this repository, whose tables come last."""
    return all("tiny" in row.get("backbone", "tiny") for rows in variants.values() for row in rows)


def values(rows: Sequence[records.Record], field: str) -> list[float | None]:
    return [row.get(field, row["by_type"].get(field)) for row in rows]


def middle(found: Sequence[float | None]) -> float | None:
    """The mean, or None where one is undefined."""
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if found and len(known) == len(found) else None


def mean_of(variants: Variants, title: str) -> float | None:
    """A variant's mean score over its tasks and seeds; None where it has none."""
    return middle(values(variants.get(title, []), "mean"))


def seconds_of(variants: Variants, title: str) -> float | None:
    """Processor seconds of a variant's fastest training; None where none was timed."""
    quickest = next((row["quickest"] for row in variants.get(title, [])), None)
    return None if quickest is None else float(quickest["cpu_seconds"])


def mean_and_spread(scores: Sequence[float | None]) -> str:
    """`46.1 (45.0 to 47.0)`: mean, lowest, highest; the value alone where all agree, a dash where one is undefined."""
    mean, known = middle(scores), [value for value in scores if value is not None]
    if mean is None:
        return "-"
    if max(known) - min(known) < 0.05:
        return f"{mean:.1f}"
    return f"{mean:.1f} ({min(known):.1f} to {max(known):.1f})"


def plot_name(recipe: str) -> str:
    return f"quality-{zlib.crc32(recipe.encode()):08x}.svg"


def render(folder: Path) -> str:
    """Mean and spread over the seeds, x100: all tasks, seen and unseen instructions, kinds of task."""
    parts = []
    for recipe, variants in sorted(newest(folder).items(), key=lambda item: is_tiny(item[1])):
        every = [row for rows in variants.values() for row in rows]
        kinds = list(dict.fromkeys(kind for row in every for kind in row["by_type"]))
        timed = [rows[0]["quickest"] for rows in variants.values() if rows[0]["quickest"]]
        machines = letters([*every, *timed])
        best = max((mean_of(variants, name) or 0.0 for name in variants if name in PEERS), default=0)
        table = []
        for name, rows in variants.items():
            mean, seconds = mean_of(variants, name), seconds_of(variants, name)
            own = f"{mean / best:.0%}" if mean and best else "-"
            sides = [mean_and_spread(values(rows, side)) for side in ("seen", "unseen")]
            by_kind = ["-" if (score := middle(values(rows, kind))) is None else f"{score:.1f}" for kind in kinds]
            time = "-" if seconds is None else f"{seconds:,.0f} {machines[hardware(rows[0]['quickest'])]}"
            seeds, rate = str(len(rows)), f"{rows[0]['rate']:g}" if rows[0].get("cpu_seconds") else "-"
            title = name if all(map(is_current, rows)) else f"{name} †"
            table.append([title, mean_and_spread(values(rows, "mean")), own, *sides, *by_kind, time, rate, seeds])
        sides = ["seen instructions", "unseen instructions"]
        header = ["", "mean of all tasks", "share of LoRA", *sides, *kinds, "processor s, machine", "rate", "seeds"]
        tasks = ", ".join(name.removeprefix("PE-") for name in every[-1]["by_task"])
        image = f"![Score against training time](../plots/{plot_name(recipe)})\n\n" if series(variants) else ""
        note = "" if all(map(is_current, every)) else f"{EARLIER}\n\n"
        parts.append(
            f"**{recipe}** ({tasks})\n\n{grid(header, table)}\n\n{note}{image}{origins([*every, *timed], machines)}"
        )
    return "\n\n".join(parts or [NOT_YET])


class Match(NamedTuple):
    """Titles: one of ours, the LoRA that scores highest in as many steps, and the quickest as good (`WITHIN`)."""

    ours: str
    best: str
    quickest: str


def match(name: str, variants: Variants) -> Match | None:
    """A system beside the LoRAs of as many steps; None where it, or every LoRA that scores as well, lacks a figure."""
    ours, times = SYSTEMS[name].title, SYSTEMS[name].times
    titles = [own.title for key, own in SYSTEMS.items() if key.startswith("lora-") and own.times == times]
    means = {title: mean for title in titles if (mean := mean_of(variants, title))}
    if not means or not mean_of(variants, ours) or not seconds_of(variants, ours):
        return None
    best = max(means, key=means.__getitem__)
    lowest = min([means[best] - WITHIN, *(row["mean"] for row in variants[best])])
    as_good = {title: at for title, mean in means.items() if mean >= lowest and (at := seconds_of(variants, title))}
    return Match(ours, best, min(as_good, key=as_good.__getitem__)) if as_good else None


def series(variants: Variants) -> list[Series]:
    """Each trained variant's score and processor seconds of training, with the spread over the seeds."""
    found = []
    for name, rows in variants.items():
        seconds, scores = seconds_of(variants, name), [v for v in values(rows, "mean") if v is not None]
        if seconds is not None and len(scores) == len(rows):
            ends = (min(scores), max(scores))
            found.append(Series(label=name, x=[seconds], y=[sum(scores) / len(scores)], y_range=[ends]))
    return found


def frontier(found: Sequence[Series]) -> list[Series]:
    """The points that no quicker one matches, quickest first."""
    kept: list[Series] = []
    for point in sorted(found, key=lambda point: (point.x[0], -point.y[0])):
        if not kept or point.y[0] > kept[-1].y[0]:
            kept.append(point)
    return kept


def draw(folder: Path, target: Path = plots.FOLDER) -> None:
    """Score against processor seconds of training, one file a recipe; only the frontier's points have names."""
    for recipe, variants in newest(folder).items():
        if trained := series(variants):
            best = frontier(trained)
            rest = [point for point in trained if point not in best]
            others = Series(
                label="all others: another one is quicker and scores as well",
                x=[point.x[0] for point in rest],
                y=[point.y[0] for point in rest],
                is_background=True,
            )
            panel = Panel(
                x="processor seconds of training",
                y="mean of all tasks",
                series=[*best, *([others] if rest else [])],
                log="x",
            )
            plots.points(target / plot_name(recipe), panel)


def table_name(recipe: str, overrides: Sequence[str]) -> str:
    """A recipe's name, and the options that change scores."""
    return " ".join([recipe, *(item for item in overrides if not item.startswith(AS_ONE))])


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "tiny.yaml")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--systems", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    options.add_argument("--untrained", nargs="*", choices=SYSTEMS, default=["pe"], help="score these untrained too")
    options.add_argument("--data", type=Path, help="score on every task whose files are in this folder")
    options.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="of these, with --data, on some alone")
    options.add_argument("--rates", nargs="*", default=[], metavar="SYSTEM=RATE")
    options.add_argument("--tune", type=float, nargs="+", metavar="RATE", help="only look for learning rates")
    options.add_argument("--resume", action="store_true")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments, overrides = options.parse_known_args(argv)
    quiet()
    rates = {name: float(value) for name, _, value in (item.partition("=") for item in arguments.rates)}
    if arguments.tasks and not arguments.data:
        options.error("--tasks: of which folder? give --data as well")
    recipe, device = load_recipe(arguments.recipe, overrides), torch.device(arguments.device)
    name = table_name(arguments.recipe.stem, overrides)
    if arguments.data and not arguments.tune:
        whole = dataclasses.replace(recipe.evaluate, tasks=tuple(arguments.tasks), data=str(arguments.data))
        recipe = dataclasses.replace(recipe, evaluate=whole)
    with user_errors("bench.quality"):
        find_tasks(recipe.evaluate.tasks, Path(recipe.evaluate.data))  # a training takes minutes, scores come last
    before, resume = arguments.untrained, arguments.resume
    with bfloat16.products(device):
        if arguments.tune:
            tune(recipe, name, arguments.systems, arguments.tune, device)
        else:
            measure(recipe, name, arguments.systems, arguments.seeds, rates, device, before=before, resume=resume)


if __name__ == "__main__":
    main()

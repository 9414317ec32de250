"""`python -m bench.quality [--seeds 0 1 2] [--systems pe lora-mean ...] [--data FOLDER] [--section.option=value ...]`

Trains the default recipe's embedder, its variants and its peers on the same backbone, data, batches and steps, and
scores each on the recipe's tasks, or with `--data` on every task whose files are in a folder. Tasks whose instruction
stands in the training sets are called seen, all others unseen. Overrides are those of `pe.train`.

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils import set_seed
from rich.console import Console

from bench import bfloat16, plots, records
from bench.cases import ALONE, ROOT
from bench.markdown import NOT_YET, grid, origins
from bench.plots import Panel, Series
from pe.backbone import Backbone
from pe.baselines.common import Pooling, Templates
from pe.baselines.frozen import FrozenEncoder
from pe.baselines.linear import LinearEmbedder
from pe.baselines.lora import LoraBaselineConfig, LoraEmbedder
from pe.baselines.static import StaticPromptEmbedder
from pe.cli import user_errors
from pe.config import AlignmentConfig, LoraSettings, Recipe, Skip
from pe.evaluate import Scores, find_tasks, score
from pe.integrations.mteb import TextEncoder
from pe.loading import has_instructions, quiet
from pe.losses import instructions_of
from pe.model import Instruction, PromptEmbedder
from pe.recipes import load_recipe
from pe.step import Trainable
from pe.train import build_accelerator, build_plan, fit


class System(Trainable, TextEncoder, Protocol):
    """Something that trains and encodes."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A system: its row's title, how it is built for a recipe, and how often it takes the recipe's steps."""

    title: str
    build: Callable[[Recipe, torch.device], System]
    times: int = 1


class Row(NamedTuple):
    """A line of the table; wall-clock and processor seconds of training, None before it."""

    title: str
    scores: Scores
    seconds: float | None = None
    cpu_seconds: float | None = None


def build_pe(**changes: Any) -> Callable[[Recipe, torch.device], System]:
    """PromptEmbedder of the recipe, with some options changed."""

    def build(recipe: Recipe, device: torch.device) -> System:
        return PromptEmbedder.from_config(dataclasses.replace(recipe.model, **changes), device)

    return build


def build_static(skip: Skip) -> Callable[[Recipe, torch.device], System]:
    def build(recipe: Recipe, device: torch.device) -> System:
        config = dataclasses.replace(recipe.model, skip=skip)
        return StaticPromptEmbedder.from_config(config, device, instructions=instructions(recipe))

    return build


def build_linear(recipe: Recipe, device: torch.device) -> System:
    return LinearEmbedder.from_config(recipe.model.backbone, device, max_length=recipe.model.max_length)


def build_lora(
    pooling: Pooling, dropout: float = 0.1, upper_layers: int | None = None
) -> Callable[[Recipe, torch.device], System]:
    """LoRA in its packed form, by default with the published dropout, which costs a third of its time."""

    def build(recipe: Recipe, device: torch.device) -> System:
        backbone = Backbone.from_pretrained(recipe.model.backbone, device)
        config = LoraBaselineConfig(
            backbone=recipe.model.backbone,
            lora=LoraSettings(rank=16, alpha=64, dropout=dropout),
            form="packed",
            pooling=pooling,
            upper_layers=None if upper_layers is None else min(upper_layers, backbone.num_layers),
            max_length=recipe.model.max_length,
        )
        return LoraEmbedder(config, backbone)

    return build


PROTOCOL = 2
"""Of new records. 2: LoRA adapters (LoRA's, the reader's) train in float32; before, in the frozen weights' bfloat16."""
TUNING_SEED = 100
TUNING_STEPS = 60
EARLIER = "† Not yet measured again: its adapters trained in the frozen weights' type instead of float32."
FROZEN = {
    "frozen backbone, mean": None,
    "frozen backbone, mean, instruction before queries": Templates(),
}
BOTH = "instruction_and_text"
PREFIX = {"layout": "prefix", "pooling": "mean_text", **ALONE}
SYSTEMS = {
    "pe-weighted": Entry(title="PE, suffix, reader, weighted skip", build=build_pe(skip="weighted")),
    "pe-weighted-longer": Entry(
        title="PE, suffix, reader, weighted skip, 4 times the steps", build=build_pe(skip="weighted"), times=4
    ),
    "pe-skip": Entry(title="PE, suffix, reader, skip", build=build_pe(skip="linear")),
    "pe-skip-longer": Entry(
        title="PE, suffix, reader, skip, 4 times the steps", build=build_pe(skip="linear"), times=4
    ),
    "pe-skip-no-reader": Entry(title="PE, suffix, skip", build=build_pe(skip="linear", reader="none")),
    "pe": Entry(title="PE, suffix, reader", build=build_pe(skip="none")),
    "pe-longer": Entry(title="PE, suffix, reader, 4 times the steps", build=build_pe(skip="none"), times=4),
    "pe-no-reader": Entry(title="PE, suffix", build=build_pe(**ALONE)),
    "pe-text": Entry(title="PE, suffix, reader, text read", build=build_pe(skip="none", conditioning=BOTH)),
    "pe-text-no-reader": Entry(title="PE, suffix, text read", build=build_pe(**ALONE, conditioning=BOTH)),
    "pe-vocabulary": Entry(
        title="PE, suffix, reader, vocabulary",
        build=build_pe(skip="none", alignment=AlignmentConfig(kind="vocabulary")),
    ),
    "pe-prefix": Entry(title="PE, prefix", build=build_pe(**PREFIX)),
    "pe-prefix-text": Entry(title="PE, prefix, text read", build=build_pe(**PREFIX, conditioning=BOTH)),
    "static-weighted": Entry(title="static prompts, reader, weighted skip (control)", build=build_static("weighted")),
    "static-skip": Entry(title="static prompts, reader, skip (control)", build=build_static("linear")),
    "static": Entry(title="static prompts, reader (control)", build=build_static("none")),
    "linear": Entry(title="frozen text means, linear map (control)", build=build_linear),
    "lora-mean": Entry(title="LoRA, mean", build=build_lora("mean")),
    "lora-mean-longer": Entry(title="LoRA, mean, 4 times the steps", build=build_lora("mean"), times=4),
    "lora-weighted": Entry(title="LoRA, weighted mean", build=build_lora("weighted")),
    "lora-weighted-longer": Entry(
        title="LoRA, weighted mean, 4 times the steps", build=build_lora("weighted"), times=4
    ),
    "lora-weighted-dropless": Entry(title="LoRA, weighted mean, no dropout", build=build_lora("weighted", 0.0)),
    "lora-weighted-dropless-longer": Entry(
        title="LoRA, weighted mean, no dropout, 4 times the steps", build=build_lora("weighted", 0.0), times=4
    ),
    "lora-last-layers": Entry(
        title="LoRA, weighted mean, no dropout, last 3 layers", build=build_lora("weighted", 0.0, 3)
    ),
    "lora-last": Entry(title="LoRA, last token", build=build_lora("last")),
}
"""`pe-prefix` and `pe-prefix-text`: the paper's layout; it does not publish which of the two."""
PEERS = tuple(SYSTEMS[name].title for name in ("lora-mean", "lora-weighted", "lora-weighted-dropless", "lora-last"))
CLAIMED = ("pe-weighted", "static-weighted", "pe-weighted-longer")
"""What the page's first lines set against LoRA of as many steps: ours, and the control without a prompting LLM."""
WITHIN = 0.5
"""Points below the best LoRA's mean that score as well as it does, or down to its lowest seed where that is less."""
ORDER = [*FROZEN, *(title for own in SYSTEMS.values() for title in (f"{own.title}, untrained", own.title))]
"""Of the table's rows."""


def instructions(recipe: Recipe) -> list[Instruction]:
    """Every instruction of the training sets, both sides."""
    return instructions_of(build_plan(recipe, Console(quiet=True)))


def evaluate(encoder: TextEncoder, recipe: Recipe) -> Scores:
    options = recipe.evaluate
    return score(encoder, options.tasks, data=Path(options.data), instructions=options.instructions)


def train_one(name: str, recipe: Recipe, device: torch.device) -> Row:
    """The trained system under the recipe's seed."""
    set_seed(recipe.train.seed)
    plan = build_plan(recipe, Console(quiet=True))
    model = SYSTEMS[name].build(recipe, device)
    started = time.process_time()
    history = fit(model, plan, recipe, build_accelerator(recipe))
    spent = time.process_time() - started
    return Row(SYSTEMS[name].title, evaluate(model, recipe), history.seconds, spent)


def untrained(name: str, recipe: Recipe, device: torch.device) -> Row:
    """The system as it is built, under the recipe's seed."""
    set_seed(recipe.train.seed)
    return Row(f"{SYSTEMS[name].title}, untrained", evaluate(SYSTEMS[name].build(recipe, device), recipe))


def frozen(title: str, recipe: Recipe, device: torch.device) -> Row:
    """The frozen backbone's mean pooling."""
    options = recipe.model
    templates = FROZEN[title]
    encoder = FrozenEncoder.from_config(options.backbone, device, templates=templates, max_length=options.max_length)
    return Row(title, evaluate(encoder, recipe))


def as_record(row: Row, recipe: Recipe, name: str, device: torch.device) -> records.Record:
    """What was trained how, and its scores: by task, by type, over tasks of seen and of unseen instructions."""
    found = row.scores.to_dict()
    trained_on = {item.instruction for item in recipe.data}
    sides: dict[str, list[float]] = {"seen": [], "unseen": []}
    for task in row.scores.tasks.values():
        sides["seen" if task.instruction in trained_on else "unseen"].append(task.score)
    return {
        "recipe": name,
        "protocol": PROTOCOL,
        "variant": row.title,
        "seed": recipe.train.seed,
        "device": device.type,
        "dtype": recipe.model.backbone.dtype,
        "native_bfloat16": has_instructions(torch.bfloat16, device),
        "backbone": recipe.model.backbone.model,
        "steps": recipe.train.steps,
        "rate": recipe.train.lr,
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

    for title in FROZEN:
        keep(frozen, title, title, with_train(recipe, seed=0))  # which no seed changes
    first = with_train(recipe, seed=seeds[0])
    for system in before:
        keep(untrained, system, f"{SYSTEMS[system].title}, untrained", first)
    for seed in seeds:
        for system in systems:
            rate, steps = rates.get(system) or best_rate(system, recipe, name), recipe.train.steps
            own = with_train(recipe, seed=seed, lr=rate, steps=steps * SYSTEMS[system].times)
            keep(train_one, system, SYSTEMS[system].title, own)


def newest(folder: Path) -> dict[str, dict[str, list[records.Record]]]:
    """The newest record of every seed, by recipe and variant; of an earlier protocol where none is current.

    Variants stand in the table's order. Those that are measured no more are left out, with what nothing else stands by.
    Each row's `least_seconds` are the processor seconds of its variant's fastest training, of every protocol: what else
    the machine does only adds to them. Bfloat16 that a processor has no instructions for is no measure of time.
    """
    rows = [row for row in records.read("quality", folder) if row["variant"] in ORDER]
    latest = {(row["recipe"], row["variant"], row["seed"]): row for row in rows}
    found: dict[str, dict[str, list[records.Record]]] = {}
    for row in sorted(latest.values(), key=lambda row: ORDER.index(row["variant"])):
        same = [other for other in rows if (other["recipe"], other["variant"]) == (row["recipe"], row["variant"])]
        timed = [other for other in same if other.get("native_bfloat16", True) or other["dtype"] != "bfloat16"]
        spent = [seconds for other in timed if (seconds := other.get("cpu_seconds")) is not None]
        least = {"least_seconds": min(spent, default=None)}
        found.setdefault(row["recipe"], {}).setdefault(row["variant"], []).append(row | least)
    for variants in found.values():
        for name, own in variants.items():
            variants[name] = [row for row in own if is_current(row)] or own
    return {recipe: variants for recipe, variants in found.items() if series(variants)}


def values(rows: Sequence[records.Record], field: str) -> list[float | None]:
    return [row.get(field, row["by_type"].get(field)) for row in rows]


def middle(found: Sequence[float | None]) -> float | None:
    """The mean, or None where one is undefined."""
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if found and len(known) == len(found) else None


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
    for recipe, variants in newest(folder).items():
        every = [row for rows in variants.values() for row in rows]
        kinds = list(dict.fromkeys(kind for row in every for kind in row["by_type"]))
        best = max((middle(values(rows, "mean")) or 0.0 for name, rows in variants.items() if name in PEERS), default=0)
        table = []
        for name, rows in variants.items():
            mean = middle(values(rows, "mean"))
            own = f"{mean / best:.0%}" if mean and best else "-"
            spent = rows[0]["least_seconds"]
            sides = [mean_and_spread(values(rows, side)) for side in ("seen", "unseen")]
            by_kind = ["-" if (score := middle(values(rows, kind))) is None else f"{score:.1f}" for kind in kinds]
            seconds = "-" if spent is None else f"{spent:,.0f}"
            seeds, rate = str(len(rows)), f"{rows[0]['rate']:g}" if rows[0].get("cpu_seconds") else "-"
            title = name if all(map(is_current, rows)) else f"{name} †"
            table.append([title, mean_and_spread(values(rows, "mean")), own, *sides, *by_kind, seconds, rate, seeds])
        sides = ["seen instructions", "unseen instructions"]
        header = ["", "mean of all tasks", "share of LoRA", *sides, *kinds, "processor s", "rate", "seeds"]
        tasks = ", ".join(name.removeprefix("PE-") for name in every[-1]["by_task"])
        image = f"![Score against training time](bench/plots/{plot_name(recipe)})\n\n" if series(variants) else ""
        note = "" if all(map(is_current, every)) else f"{EARLIER}\n\n"
        parts.append(f"**{recipe}** ({tasks})\n\n{grid(header, table)}\n\n{note}{image}{origins(every)}")
    return "\n\n".join(parts or [NOT_YET])


def claims(folder: Path) -> list[str]:
    """What `CLAIMED` score and cost beside LoRA of as many steps: a paragraph for each recipe."""
    paragraphs = []
    for recipe, variants in newest(folder).items():
        found = [claim(variants, times) for times in sorted({entry.times for entry in SYSTEMS.values()})]
        if sentences := [sentence for sentence in found if sentence]:
            tasks = len(next(iter(variants.values()))[-1]["by_task"])
            paragraphs.append(f"Scores of {recipe.split()[0]}, mean of {tasks} tasks. {' '.join(sentences)}")
    return paragraphs


def claim(variants: Mapping[str, Sequence[records.Record]], times: int) -> str:
    """A sentence about the systems of `times` the recipe's steps; empty without a LoRA or anything that is claimed.

    Shares of the score are of the best LoRA, shares of the time of the quickest one that scores as well (see `WITHIN`).
    """
    means = {title: mean for title, rows in variants.items() if (mean := middle(values(rows, "mean")))}
    spent = {title: seconds for title, rows in variants.items() if (seconds := rows[0]["least_seconds"])}
    titles = {name: own.title for name, own in SYSTEMS.items() if own.times == times and own.title in means}
    peers = [title for name, title in titles.items() if name.startswith("lora-")]
    claimed = [titles[name] for name in CLAIMED if name in titles]
    if not peers or not claimed:
        return ""
    best = max(peers, key=means.__getitem__)
    lowest = min([means[best] - WITHIN, *(row["mean"] for row in variants[best])])
    as_good = [peer for peer in peers if peer in spent and means[peer] >= lowest]
    quickest = min(as_good, key=spent.__getitem__, default=best)
    longer = f", {times} times the steps"

    def scored(title: str) -> str:
        return f"{title.removesuffix(longer)} {means[title]:.1f}"

    parts = [f"{scored(best)}, the best LoRA{' and the quickest within its spread' * (best in spent)}"]
    if quickest != best:
        parts = [f"{scored(best)}, the best LoRA", f"{scored(quickest)}, the quickest within its spread"]
    for title in claimed:
        is_timed = title in spent and quickest in spent
        time = f" in {spent[title] / spent[quickest]:.0%} of the quickest's time" if is_timed else ""
        parts.append(f"{scored(title)}, {means[title] / means[best]:.0%} of the best LoRA's score{time}")
    steps = "the recipe's steps" if times == 1 else f"{times} times its steps"
    return f"In {steps}: {'; '.join(parts)}."


def series(variants: Mapping[str, Sequence[records.Record]]) -> list[Series]:
    """Each trained variant's score and processor seconds of training, with the spread over the seeds."""
    found = []
    for name, rows in variants.items():
        spent, scores = rows[0]["least_seconds"], [v for v in values(rows, "mean") if v is not None]
        if spent is not None and len(scores) == len(rows):
            ends = (min(scores), max(scores))
            found.append(Series(label=name, x=[spent], y=[sum(scores) / len(scores)], y_range=[ends]))
    return found


def draw(folder: Path, target: Path = plots.FOLDER) -> None:
    """Score against processor seconds of training, one file a recipe."""
    for recipe, variants in newest(folder).items():
        if trained := series(variants):
            panel = Panel(x="processor seconds of training", y="mean of all tasks", series=trained)
            plots.points(target / plot_name(recipe), panel)


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "tiny.yaml")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    options.add_argument("--untrained", nargs="*", choices=SYSTEMS, default=["pe"], help="score these untrained too")
    options.add_argument("--data", type=Path, help="score on every task whose files are in this folder")
    options.add_argument("--rates", nargs="*", default=[], metavar="SYSTEM=RATE")
    options.add_argument("--tune", type=float, nargs="+", metavar="RATE", help="only look for learning rates")
    options.add_argument("--resume", action="store_true")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments, overrides = options.parse_known_args(argv)
    quiet()
    rates = {name: float(value) for name, _, value in (item.partition("=") for item in arguments.rates)}
    recipe, device = load_recipe(arguments.recipe, overrides), torch.device(arguments.device)
    name = " ".join([arguments.recipe.stem, *overrides])
    if arguments.data and not arguments.tune:
        whole = dataclasses.replace(recipe.evaluate, tasks=(), data=str(arguments.data))
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

"""`python -m bench.transfer CHECKPOINT --backbone NEW [--steps N] [--scratch lora-mean ...]`

Moves a trained PromptEmbedder as `pe.transfer` does, and trains each system of `--scratch` (names of `bench.systems`)
from scratch on the new backbone with the same data, batches and steps. The level that all are timed to is the source's
score on its own backbone; scores along the way go to the records as a curve.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate.utils import set_seed
from rich.console import Console

from bench import plots, records
from bench.markdown import NOT_YET, dtype_of, grid, origins
from bench.plots import Panel, Series
from bench.quality import with_train
from bench.records import Record
from bench.systems import SYSTEMS, frozen_dtype
from pe.config import Recipe
from pe.evaluate import Scores
from pe.method.loading import quiet
from pe.saving import read_config
from pe.train import build_accelerator, build_plan, fit, measurer
from pe.transfer import Transfer, parse, reached, transfer, transfer_recipe

Curve = Sequence[tuple[int, float, float]]
STAGES = ("source", "untrained", "trained")
FOLLOWED = "PE-Instruct-NLI"
"""What says whether instructions are followed; no part of a mean."""
LEFT_OUT = ("PE: alignment, reader and skip",)
"""Variants of the records that cannot be measured any more."""


def record(
    variant: str, level: float, curve: Curve, recipe: Recipe, source: str, scores: Mapping[str, Scores]
) -> Record:
    """Scores at the start and the end of a curve, steps and seconds to each share of the level, and scores by task."""
    return {
        "source": source,
        "target": Path(recipe.model.backbone.model).name,
        "variant": variant,
        "seed": recipe.train.seed,
        "rate": recipe.train.lr,
        "dtype": frozen_dtype(recipe.model.backbone, build_accelerator(recipe).device),
        "source_score": level,
        "start_score": curve[0][2],
        "end_score": curve[-1][2],
        "curve": list(curve),
        "reached": {f"{item.share:.2f}": item.at for item in reached(curve, level)},
        "by_task": {stage: found.by_task for stage, found in scores.items()},
    }


def moved(result: Transfer, recipe: Recipe, source: str, texts: int | None) -> Record:
    """The record of a transfer whose skip was fitted on that many texts; None: the default."""
    trained = ["alignment"]
    trained += ["reader"] if recipe.model.reader != "none" else []
    trained += ["weighted skip"] if recipe.model.skip != "none" else []
    trained += ["lens"] if recipe.model.lens_rank else []
    variant = f"PE: {', '.join(trained[:-1])} and {trained[-1]}" if len(trained) > 1 else "PE: alignment alone"
    if not recipe.train.total_steps:
        variant = "PE: least squares alone"
    elif texts:
        variant += ", skip fitted first"
    scores = dict(zip(STAGES, result.scores.values(), strict=False))
    return record(variant, scores["source"].mean, result.curve, recipe, source, scores)


def from_scratch(system: str, recipe: Recipe, level: float, source: str) -> Record:
    """A system trained on the recipe's backbone alone, scored as often as the recipe says."""
    set_seed(recipe.train.seed)
    accelerator, plan = build_accelerator(recipe), build_plan(recipe, Console(quiet=True))
    model, measure = SYSTEMS[system].build(recipe, plan, accelerator.device), measurer(recipe)
    scores = {"untrained": measure(model)}

    def evaluate() -> float:
        scores["trained"] = measure(model)
        return scores["trained"].mean

    history = fit(model, plan, recipe, accelerator, evaluate=evaluate)
    curve = [(0, 0.0, scores["untrained"].mean), *history.scores]
    return record(f"{SYSTEMS[system].title}, from scratch", level, curve, recipe, source, scores)


def title(row: Record) -> str:
    """What rows have in common that can be compared: backbones, type and steps."""
    return f"{row['source']} to {row['target']}, {dtype_of(row)}, {row['curve'][-1][0]} steps"


def newest(folder: Path) -> dict[str, list[Record]]:
    """The newest record of every variant and seed, by title."""
    rows = [row for row in records.read("transfer", folder) if row["variant"] not in LEFT_OUT]
    latest = {(title(row), row["variant"], row["seed"]): row for row in rows}
    groups: dict[str, list[Record]] = {}
    for row in latest.values():
        groups.setdefault(title(row), []).append(row)
    return groups


def has_curves(group: Sequence[Record]) -> bool:
    """Whether anything was trained, so that there is more to draw than a point."""
    return any(len(row["curve"]) > 1 for row in group)


def rights(row: Record) -> str:
    """How often the instruction was followed under unseen wordings, stage by stage; nothing where it was not scored."""
    stages = [row.get("by_task", {}).get(stage, {}) for stage in STAGES]
    found = [f"{tasks[FOLLOWED]:.1f}" for tasks in stages if FOLLOWED in tasks]
    return ", ".join(found)


def plot_name(title: str) -> str:
    return f"transfer-{title.replace(', ', '-').replace(' ', '-')}.svg"


def render(folder: Path) -> str:
    """Score on the new backbone before and after, and when the shares of the source's score were reached."""
    parts = []
    for name, group in newest(folder).items():
        rows = []
        for row in group:
            at = [row["reached"].get(share) for share in ("0.95", "0.99")]
            cells = ["not reached" if found is None else f"{found[0]} steps, {found[1]:,.0f} s" for found in at]
            scores = [f"{row[field]:.1f}" for field in ("source_score", "start_score", "end_score")]
            seconds, right = f"{row['curve'][-1][1]:,.0f}", [rights(row)] if any(map(rights, group)) else []
            rows.append([f"{row['variant']}, seed {row['seed']}", *scores, seconds, *cells, *right])
        header = ["", "level", "untrained", "trained", "seconds", "95 % of the level", "99 % of the level"]
        header += [f"{FOLLOWED}: source, untrained, trained"] if any(map(rights, group)) else []
        image = f"![Score against seconds of training](../plots/{plot_name(name)})\n\n" if has_curves(group) else ""
        parts.append(f"**{name}**\n\n{grid(header, rows)}\n\n{image}{origins(group)}")
    return "\n\n".join(parts or [NOT_YET])


def draw(folder: Path, images: Path = plots.FOLDER) -> None:
    """The curves, one file a title."""
    for name, group in newest(folder).items():
        if not has_curves(group):
            continue
        series = [
            Series(label=row["variant"], x=[point[1] for point in row["curve"]], y=[point[2] for point in row["curve"]])
            for row in group
        ]
        ends = [0.0, max(max(line.x) for line in series)]
        for level in dict.fromkeys(row["source_score"] for row in group):
            series.append(Series(label=f"level: {group[0]['source']}, {level:.1f}", x=ends, y=[level, level]))
        panel = Panel(x="seconds of training", y=f"mean score on {group[-1]['target']}", series=series)
        plots.lines(images / plot_name(name), panel)


def main(argv: Sequence[str] | None = None) -> None:
    """Transfer, then train from scratch, and append a record as each one ends."""
    quiet()
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("--scratch", nargs="*", choices=SYSTEMS, default=[])
    own.add_argument("--rate", type=float, help="learning rate of what is trained from scratch")
    own.add_argument("--only-scratch", type=float, metavar="LEVEL", help="move nothing; the level is this score")
    mine, rest = own.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    arguments, overrides = parse(rest)
    recipe = transfer_recipe(arguments, overrides)
    if not recipe.evaluate.tasks:
        raise SystemExit("bench.transfer: the recipe names no tasks, so there is nothing to record")
    source = Path(read_config(Path(arguments.checkpoint))["backbone"]["name"]).name
    level = mine.only_scratch
    if level is None:
        result = transfer(Path(arguments.checkpoint), recipe, texts=arguments.texts, fresh=arguments.fresh)
        row = moved(result, recipe, source, arguments.texts)
        level = row["source_score"]
        records.append("transfer", [row])
        Console().print(result)
    for system in mine.scratch:
        row = from_scratch(system, with_train(recipe, lr=mine.rate or recipe.train.lr), level, source)
        records.append("transfer", [row])
        Console().print(f"{row['variant']}: {row['start_score']:.1f} to {row['end_score']:.1f}")


if __name__ == "__main__":
    main()

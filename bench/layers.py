"""`python -m bench.layers [--layers 10 15 20 24 30] [--recipe RECIPE] [--seed S] [--section.option=value ...]`

What a backbone's upper layers are worth: trains the embedder of a recipe on the first N layers of its backbone alone
(`backbone.layers`), with the same data, batches and steps, and scores each. A record is written as each one ends.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import plots, records
from bench.cases import ROOT
from bench.markdown import NOT_YET, grid, origins
from bench.plots import Panel, Series
from bench.quality import as_record, table_name, train_one, with_train
from bench.records import Record
from bench.transfer import FOLLOWED
from pe.config import Recipe
from pe.method.loading import quiet
from pe.runs.cli import user_errors
from pe.runs.recipes import load_recipe

SYSTEM = "pe-weighted"
PLOT = "layers.svg"


def with_layers(recipe: Recipe, count: int) -> Recipe:
    """The recipe on the first so many layers of its backbone."""
    backbone = dataclasses.replace(recipe.model.backbone, layers=count)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, backbone=backbone))


def newest(folder: Path) -> list[Record]:
    """The newest record of every recipe and number of layers, fewest first."""
    rows = {(row["recipe"], row["layers"]): row for row in records.read("layers", folder)}
    return [rows[key] for key in sorted(rows)]


def render(folder: Path) -> str:
    """Scores and seconds of training by the number of layers, a table for each recipe."""
    if not (rows := newest(folder)):
        return NOT_YET
    recipes = dict.fromkeys(row["recipe"] for row in rows)
    tables = [table_of([row for row in rows if row["recipe"] == recipe]) for recipe in recipes]
    return "\n\n".join([*tables, f"![Score against seconds of training](../plots/{PLOT})", origins(rows)])


def table_of(rows: Sequence[Record]) -> str:
    """The table of one recipe, under its name."""
    tasks = list(rows[0]["by_task"])
    header = ["layers", "mean of the plain tasks", *(task.removeprefix("PE-") for task in tasks), "processor s"]
    table = [
        [
            str(row["layers"]),
            f"{row['mean']:.1f}",
            *(f"{row['by_task'][task]:.1f}" for task in tasks),
            f"{row['cpu_seconds']:,.0f}",
        ]
        for row in rows
    ]
    return f"**{rows[0]['recipe']}**\n\n{grid(header, table)}"


def draw(folder: Path, target: Path = plots.FOLDER) -> None:
    """Scores against processor seconds of training."""
    rows, series = newest(folder), []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        own = [row for row in rows if row["recipe"] == recipe]
        seconds, counts = [row["cpu_seconds"] for row in own], ", ".join(str(row["layers"]) for row in own)
        title = f"{recipe}, plain tasks; {counts} layers, left to right"
        series.append(Series(label=title, x=seconds, y=[row["mean"] for row in own]))
        if all(FOLLOWED in row["by_task"] for row in own):
            followed = [row["by_task"][FOLLOWED] for row in own]
            title = f"{recipe}, instructions followed, unseen wordings"
            series.append(Series(label=title, x=seconds, y=followed))
    if series:
        plots.lines(target / PLOT, Panel(x="processor seconds of training", y="score", series=series))


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "smollm2-135m.yaml")
    options.add_argument("--layers", type=int, nargs="+", default=[10, 15, 20, 24, 30])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments, overrides = options.parse_known_args(argv)
    quiet()
    device, name = torch.device(arguments.device), table_name(arguments.recipe.stem, overrides)
    with user_errors("bench.layers"):
        recipe = with_train(load_recipe(arguments.recipe, overrides), seed=arguments.seed)
        for count in arguments.layers:
            own = with_layers(recipe, count)
            record = {**as_record(train_one(SYSTEM, own, device), own, name, device), "layers": count}
            records.append("layers", [record])
            print(f"{count} layers: mean {record['mean']:.1f}, {record['cpu_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()

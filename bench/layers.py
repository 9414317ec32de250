"""`python -m bench.layers [--layers 10 15 20 24 30] [--entries 0 10] [--recipe RECIPE] [--section.option=value ...]`

What a backbone's layers are worth: trains the embedder of a recipe on the first N layers of its backbone alone
(`backbone.layers`), or with soft tokens that enter before layer E (`backbone.entry_layer`), with the same data, batches
and steps, and scores each. A record is written as each one ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

from bench import plots, records
from bench.cases import ROOT
from bench.markdown import NOT_YET, grid, origins
from bench.plots import Panel, Series
from bench.quality import as_record, mean_and_spread, table_name, train_one, with_train
from bench.records import Record
from bench.transfer import FOLLOWED
from pe.config import Recipe
from pe.method.loading import quiet
from pe.runs.cli import user_errors
from pe.runs.recipes import load_recipe

SYSTEM = "pe-weighted"
PLOT = "layers.svg"


def with_layers(recipe: Recipe, count: int, entry: int) -> Recipe:
    """The recipe on the first so many layers of its backbone, soft tokens entering at layer `entry` of them."""
    backbone = dataclasses.replace(recipe.model.backbone, layers=count, entry_layer=entry)
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, backbone=backbone))


def newest(folder: Path) -> list[Record]:
    """The newest record of every recipe, number of layers, entry and seed, fewest layers that soft tokens run first."""
    rows = {
        (row["recipe"], run_by_soft_tokens(row), row["layers"], row["seed"]): row
        for row in records.read("layers", folder)
    }
    return [rows[key] for key in sorted(rows)]


def by_layers(rows: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of all seeds, by what `layers_of` says."""
    found: dict[str, list[Record]] = {}
    for row in rows:
        found.setdefault(layers_of(row), []).append(row)
    return found


def run_by_soft_tokens(row: Record) -> int:
    """How many layers soft tokens run."""
    return int(row["layers"] - row.get("entry", 0))


def layers_of(row: Record) -> str:
    """`20`, or `20 of 30` where soft tokens enter behind the first ten."""
    own = run_by_soft_tokens(row)
    return f"{own} of {row['layers']}" if own < row["layers"] else f"{own}"


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
    header = [
        "layers",
        "mean of the plain tasks",
        *(task.removeprefix("PE-") for task in tasks),
        "processor s",
        "seeds",
    ]
    table = [
        [
            layers,
            mean_and_spread([row["mean"] for row in own]),
            *(f"{mean(row['by_task'][task] for row in own):.1f}" for task in tasks),
            f"{min(row['cpu_seconds'] for row in own):,.0f}",
            str(len(own)),
        ]
        for layers, own in by_layers(rows).items()
    ]
    return f"**{rows[0]['recipe']}**\n\n{grid(header, table)}"


def draw(folder: Path, target: Path = plots.FOLDER) -> None:
    """Scores against processor seconds of training."""
    rows, series = newest(folder), []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        groups = by_layers([row for row in rows if row["recipe"] == recipe])
        seconds = [min(row["cpu_seconds"] for row in own) for own in groups.values()]
        title = f"{recipe}, plain tasks; {', '.join(groups)} layers, left to right"
        series.append(Series(label=title, x=seconds, y=[mean(row["mean"] for row in own) for own in groups.values()]))
        if all(FOLLOWED in row["by_task"] for own in groups.values() for row in own):
            followed = [mean(row["by_task"][FOLLOWED] for row in own) for own in groups.values()]
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
    options.add_argument("--entries", type=int, nargs="+", default=[0])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments, overrides = options.parse_known_args(argv)
    quiet()
    device, name = torch.device(arguments.device), table_name(arguments.recipe.stem, overrides)
    with user_errors("bench.layers"):
        recipe = with_train(load_recipe(arguments.recipe, overrides), seed=arguments.seed)
        for count, entry in itertools.product(arguments.layers, arguments.entries):
            own = with_layers(recipe, count, entry)
            trained = as_record(train_one(SYSTEM, own, device), own, name, device)
            records.append("layers", [record := {**trained, "layers": count, "entry": entry}])
            print(f"{layers_of(record)} layers: {record['mean']:.1f}, {record['cpu_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()

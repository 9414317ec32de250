"""`python -m pe.sweep [RECIPE.yaml] --train.lr 1e-3,3e-3 --train.seed 0,1,2 [--section.option=value ...]`

Trains the recipe once for every combination of the values, which stand with commas between them, each run in a folder
of its own in the recipe's output folder. The runs share one text store: the recipe's, else `texts` in that folder. What
is there already is not repeated: a finished run is taken as it is, an unfinished one goes on. One table has what was
varied, scores and seconds, and `sweep.json` the same; the run with the best mean is named.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from pe.config import Recipe, RecipeError
from pe.method.loading import quiet
from pe.method.text_store import TextStore
from pe.runs.cli import check_alone, user_errors
from pe.runs.files import write_text
from pe.runs.folder import RunFolder, read_checkpoint
from pe.runs.recipes import load_recipe
from pe.step import TrainingError
from pe.train import DEFAULT_RECIPE, build_plan, train

Values = dict[str, str]
"""Option -> its value, such as `train.lr` -> `1e-3`."""
REPORT = "sweep.json"
STORE = {"train.text_store", "train.text_store_gib", "train.text_store_dtype"}
"""Options of what the runs share."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run: what was varied, its folder, score of each task and their mean, seconds of training."""

    varied: Values
    folder: str
    scores: dict[str, float]
    mean: float
    seconds: float


def values_of(text: str) -> list[str]:
    """What stands between the commas outside brackets, quotes and braces."""
    return [part.strip() for part in re.findall(r"""(?:\[[^]]*]|\{[^}]*}|"[^"]*"|'[^']*'|[^,])+""", text)]


def split(arguments: Sequence[str]) -> tuple[Path, list[str], dict[str, list[str]]]:
    """Recipe, options with one value as overrides of it, and the values of the others.

    Raises:
        RecipeError: an option without a value or given twice, a value given twice, `output` with several, or no option
            with several.
    """
    rest, options = list(arguments), dict[str, list[str]]()
    recipe = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else DEFAULT_RECIPE
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if not option.startswith("--") or not (equals or rest):
            raise RecipeError(f"{option}: expected the recipe first, then --option value,value")
        name, values = option.removeprefix("--"), values_of(value if equals else rest.pop(0))
        if name in options or len(set(map(plain, values))) < max(1, len(values)):
            told = "expected it once, with each value once, where all but letters, digits, + - . and _ counts as _"
            raise RecipeError(f"--{name}: {told}; got {', '.join(values) or 'nothing'}")
        options[name] = values
    varied = {name: values for name, values in options.items() if len(values) > 1}
    if not varied or (STORE | {"output"}) & varied.keys():
        raise RecipeError("expected options of the runs with several values, such as --train.lr 1e-3,3e-3")
    return recipe, [f"--{name}={values[0]}" for name, values in options.items() if name not in varied], varied


def recipes_of(
    path: Path, overrides: Sequence[str], varied: dict[str, list[str]], output: Path
) -> Iterator[tuple[Recipe, Values]]:
    """A recipe for each of the product of the values, and its values; all are checked before the first run."""
    for product in itertools.product(*varied.values()):
        values = dict(zip(varied, product, strict=True))
        own = [f"--{name}={value}" for name, value in values.items()]
        yield load_recipe(path, [*overrides, *own, f"--output={output / name_of(values)}"]), values


def name_of(values: Values) -> str:
    """A run's folder, such as `lr=1e-3,seed=0`."""
    return ",".join(f"{name.rpartition('.')[2]}={plain(value)}" for name, value in values.items())


def plain(value: str) -> str:
    """A value as it stands in a folder's name."""
    return re.sub(r"[^-+.0-9A-Za-z_]", "_", value)


def with_steps(recipe: Recipe) -> Recipe:
    """The recipe as a finished run has it, with steps in place of epochs."""
    if recipe.train.epochs is None:
        return recipe
    steps = build_plan(recipe, Console(quiet=True)).steps
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=steps, epochs=None))


def run(recipe: Recipe, values: Values, store: TextStore | None) -> Outcome:
    """Train, go on with, or only read a run.

    Raises:
        RunError: its folder holds a run of another recipe.
    """
    folder = RunFolder(recipe.output)
    if not (folder.checkpoints and folder.is_finished(with_steps(recipe))):
        train(recipe, resume=bool(folder.checkpoints), store=store)
    scores = json.loads((folder.path / "scores.json").read_text(encoding="utf-8"))["trained"]
    seconds = read_checkpoint(folder.checkpoints[-1], torch.device("cpu"), mmap=True)["history"]["seconds"]
    by_task = {name: task["score"] for name, task in scores["tasks"].items()}
    return Outcome(values, recipe.output, by_task, scores["mean"], seconds)


def sweep(recipes: Sequence[tuple[Recipe, Values]], output: Path) -> list[Outcome]:
    """Every run, with one text store; what is finished stands in `sweep.json` from then on.

    Raises:
        RecipeError: no task to compare the runs by.
        RunError, and what `pe.train.train` raises: the runs before are finished.
    """
    first = recipes[0][0]
    if not first.evaluate.tasks:
        raise RecipeError("evaluate.tasks: expected at least one, by which the runs are compared, got none")
    outcomes: list[Outcome] = []
    with ExitStack() as stack:
        store = None
        if all(recipe.model.layout == "suffix" for recipe, _ in recipes):
            where = str(output / "texts") if first.train.text_store == "none" else first.train.text_store
            size, dtype = first.train.text_store_gib, first.train.text_store_dtype
            store = stack.enter_context(TextStore.open(where, size, dtype))
        for recipe, values in recipes:
            outcomes.append(run(recipe, values, store))
            write_text(output / REPORT, json.dumps([dataclasses.asdict(item) for item in outcomes], indent=2))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> Table:
    """A row a run."""
    varied, tasks = outcomes[0].varied, dict.fromkeys(name for item in outcomes for name in item.scores)
    grid = Table(*varied, *tasks, "mean", "seconds", title_justify="left")
    for item in outcomes:
        scores = (f"{item.scores[name]:.2f}" if name in item.scores else "-" for name in tasks)
        grid.add_row(*item.varied.values(), *scores, f"{item.mean:.2f}", f"{item.seconds:.0f}")
    return grid


def main(argv: Sequence[str] | None = None) -> None:
    """Sweep as the command line says; bad input ends with one message and exit code 2."""
    quiet()
    arguments = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    with user_errors("pe.sweep", TrainingError):
        check_alone("make every run", "share a run's batches by pe.train")
        path, overrides, varied = split(arguments)
        output = Path(load_recipe(path, overrides).output)
        outcomes = sweep(list(recipes_of(path, overrides, varied, output)), output)
    Console().print(table(outcomes))
    best = max(outcomes, key=lambda item: item.mean)
    print(f"best: {best.mean:.2f} in {best.folder}")


if __name__ == "__main__":
    main()

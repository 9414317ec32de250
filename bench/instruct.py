"""`python -m bench.instruct [RECIPE] [--systems pe static lora ...] [--seeds 0] [--section.option=value ...]`

Whether an embedder does what its instruction asks. Trains the embedder of a recipe (`recipes/tiny-instruct.yaml` where
none is given), its variants and its peers on the same backbone, data, batches and steps, and scores each on the tasks
of the recipe: the plain ones, and those whose instructions contradict each other, under wordings of training, under
wordings never seen, and on a task never trained on. A record is written as each one ends.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console

from bench import records
from bench.cases import ROOT
from bench.markdown import NOT_YET, dtype_of, grid, origins
from bench.quality import evaluate, with_train
from bench.systems import INSTRUCTED, System, frozen_dtype
from pe.baselines.static import StaticPromptEmbedder
from pe.config import Recipe
from pe.data.batches import BatchPlan
from pe.data.instruct_score import INSTRUCT_TASKS
from pe.evaluate import Scores
from pe.losses import instructions_of
from pe.measure.spread import spread
from pe.method.loading import quiet
from pe.method.prompted import PromptedEmbedder
from pe.runs.cli import user_errors
from pe.runs.recipes import load_recipe
from pe.train import build_accelerator, build_plan, fit, stored_texts

RECIPE = ROOT / "recipes" / "tiny-instruct.yaml"
PARTS = ("right_seen", "right_unseen")


def as_record(name: str, title: str, scores: Scores, recipe: Recipe, recipe_name: str, **others: Any) -> records.Record:
    """What was trained how, and what it got right."""
    plain = [task.score for task in scores.tasks.values() if task.type != "Instruct"]
    return {
        "recipe": recipe_name,
        "system": name,
        "variant": title,
        "seed": recipe.train.seed,
        "backbone": recipe.model.backbone.model,
        "steps": recipe.train.total_steps,
        "rate": recipe.train.lr,
        "counterpart": recipe.loss.counterpart,
        "stored": recipe.train.text_store != "none",
        "plain": sum(plain) / len(plain) if plain else None,
        "by_task": scores.by_task,
        "instruct": {task: scores.tasks[task].parts for task in INSTRUCT_TASKS if task in scores.tasks},
        **others,
    }


def measure(name: str, recipe: Recipe, recipe_name: str) -> list[records.Record]:
    """Train a system under the recipe's seed; a record, or two of a control with two ways to meet what it never saw."""
    set_seed(recipe.train.seed)
    plan, accelerator = build_plan(recipe, Console(quiet=True)), build_accelerator(recipe)
    model = INSTRUCTED[name].build(recipe, plan, accelerator.device)
    with stored_texts(model, plan, recipe.train, accelerator, None):
        return trained_and_scored(name, model, plan, recipe, recipe_name, accelerator)


def trained_and_scored(
    name: str, model: System, plan: BatchPlan, recipe: Recipe, recipe_name: str, accelerator: Accelerator
) -> list[records.Record]:
    """The records of `measure` for a model as it starts."""
    title, started = INSTRUCTED[name].title, time.process_time()
    history = fit(model, plan, recipe, accelerator)
    known: dict[str, Any] = {"seconds": history.seconds, "cpu_seconds": time.process_time() - started}
    known["dtype"] = frozen_dtype(recipe.model.backbone, accelerator.device)
    if isinstance(model, PromptedEmbedder):
        wanted = [item.text for item in instructions_of(plan) if item.side == "query"]
        found = spread(model, wanted, plan.batch(0).queries)
        known["alike"] = found and dataclasses.asdict(found)
    rows = []
    is_static = isinstance(model, StaticPromptEmbedder)
    ways: tuple[Literal["mean", "nearest"] | None, ...] = ("mean", "nearest") if is_static else (None,)
    for way in ways:
        if way and isinstance(model, StaticPromptEmbedder):
            model.meet_unknown(way)
        shown = f"{title}, unseen wordings: {way}" if way else title
        rows.append(as_record(name, shown, evaluate(model, recipe), recipe, recipe_name, **known))
    return rows


def render(folder: Path) -> str:
    """Right answers, times 100, by task and kind of wording; the newest record of every system and seed."""
    latest = {
        (row["recipe"], row["backbone"], row["steps"], dtype_of(row), row["variant"], row["seed"], row["rate"]): row
        for row in records.read("instruct", folder)
    }
    groups: dict[str, list[records.Record]] = {}
    for row in latest.values():
        where = f"{row['recipe']}, on {Path(row['backbone']).name}"
        groups.setdefault(f"{where}, {row['steps']} steps, {dtype_of(row)}", []).append(row)
    parts = []
    for name, group in groups.items():
        tasks = list(dict.fromkeys(task for row in group for task in row["instruct"]))
        titles = [
            f"{task.removeprefix('PE-Instruct-')} {kind.removeprefix('right_')}"
            for task, kind in _columns(tasks, group)
        ]
        header = ["", *titles, "plain tasks", "prompts alike", "embeddings alike", "processor s"]
        parts.append(f"**{name}**\n\n{grid(header, [_cells(row, tasks, group) for row in group])}\n\n{origins(group)}")
    return "\n\n".join(parts or [NOT_YET])


def _columns(tasks: Sequence[str], group: Sequence[records.Record]) -> list[tuple[str, str]]:
    """Tasks and parts that any row has; a task never trained on has unseen wordings alone."""
    return [
        (task, part) for task in tasks for part in PARTS if any(part in row["instruct"].get(task, {}) for row in group)
    ]


def _cells(row: records.Record, tasks: Sequence[str], group: Sequence[records.Record]) -> list[str]:
    got = [row["instruct"].get(task, {}).get(part) for task, part in _columns(tasks, group)]
    alike: Mapping[str, float | None] = row.get("alike") or {}
    others = [other for other in group if other["variant"] == row["variant"] and other["rate"] != row["rate"]]
    rate = f", rate {row['rate']:g}" if others else ""
    figures = [alike.get("prompts"), alike.get("embeddings")]
    return [
        f"{row['variant']}, seed {row['seed']}{rate}",
        *("" if value is None else f"{value:.1f}" for value in [*got, row["plain"]]),
        *("" if value is None else f"{value:.3f}" for value in figures),
        f"{row['cpu_seconds']:,.0f}{' (texts stored)' if row.get('stored') else ''}",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Train and score as the command line says."""
    quiet()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPE)
    parser.add_argument("--systems", nargs="+", choices=INSTRUCTED, default=list(INSTRUCTED))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    given, overrides = parser.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    with user_errors("bench.instruct"):
        recipe = load_recipe(given.recipe, overrides)
        for seed in given.seeds:
            for name in given.systems:
                rows = measure(name, with_train(recipe, seed=seed), given.recipe.name)
                records.append("instruct", rows)
                for row in rows:
                    print(f"{row['variant']}, seed {seed}: plain {row['plain']}, {row['instruct']}", flush=True)


if __name__ == "__main__":
    main()

"""`python -m pe.report RUN [--output FILE]`

Writes one HTML page on a run of `pe.train` or `pe.transfer`, also while it trains: loss, score, tokens a second and how
alike instructions are over the steps, scores by task, what the prompting LLM writes, and what the run was made of. The
page needs nothing beside it, no network and no script. It goes to `report.html` in the run's folder; an earlier report
is replaced, another file is not. Needs the extra `report`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pe.card import shown
from pe.config import DatasetConfig, Recipe
from pe.runs.cli import user_errors
from pe.runs.files import write_text
from pe.runs.folder import RunFolder
from pe.runs.history import Record
from pe.runs.parsers import Parser
from pe.runs.plots import charts, last_words, printable, svg_of
from pe.runs.recipes import load_recipe

GENERATOR = "pe.report"
PAGE = "report.html"
"""The template beside this module, and what it becomes in a run's folder."""


class ReportError(ValueError):
    """A report that cannot be made as asked."""


class Row(NamedTuple):
    """A line of the table of scores."""

    task: str
    measure: str
    values: list[str]


def page(run: RunFolder) -> str:
    """The report of a run's folder, as it is now.

    Raises:
        ReportError: the folder has no run.
        RecipeError, HistoryError: its `recipe.yaml` or `history.jsonl` cannot be read.
        MissingPackage: no matplotlib.
    """
    file = run.path / "recipe.yaml"
    if not file.exists():
        raise ReportError(f"{run.path}: expected the folder of a run, which has a recipe.yaml, found none")
    recipe, records, scores = load_recipe(file), run.history.records(), scores_of(run)
    drawn, words = charts(records), last_words(records)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(PAGE).render(
        generator=GENERATOR,
        name=run.path.resolve().name,
        made_of=made_of(recipe),
        figures=figures(recipe, records, scores),
        charts=[svg_of(chart) for chart in drawn],
        alike=any(chart.name == "alike" for chart in drawn),
        scores=table(scores),
        words=words and {"step": words[0], "prompts": prompts(words[1])},
        options=options(recipe),
        data=[row_of(item) for item in recipe.data],
    )


def scores_of(run: RunFolder) -> dict[str, Any]:
    """What was scored -> its scores, as `pe.train` or `pe.transfer` wrote them; empty before.

    Raises:
        ReportError: the file is damaged.
    """
    for name, key in (("scores.json", None), ("transfer.json", "scores")):
        path = run.path / name
        if path.exists():
            try:
                read = json.loads(path.read_text(encoding="utf-8"))
                scores: dict[str, Any] = read[key] if key else read
                table(scores)  # which fails on what is missing
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ReportError(f"{path}: expected scores as a run writes them ({error!r})") from error
            return scores
    return {}


def table(scores: dict[str, Any]) -> dict[str, Any] | None:
    """Columns and rows, one a task and the mean last; None without scores."""
    if not scores:
        return None
    tasks = {name: task for found in scores.values() for name, task in found["tasks"].items()}
    rows = [
        Row(
            shown(name),
            task["metric"],
            [figure(found["tasks"].get(name, {}).get("score")) for found in scores.values()],
        )
        for name, task in tasks.items()
    ]
    rows.append(Row("mean", "", [figure(found["mean"]) for found in scores.values()]))
    return {"columns": list(scores), "rows": rows}


def figure(score: float | None) -> str:
    """A score, or a dash for none."""
    return "–" if score is None else f"{score:.2f}"


def figures(recipe: Recipe, records: Sequence[Record], scores: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands large on top: how far the run is, how long it took, and what it scores."""
    last = records[-1] if records else {"step": 0, "seconds": 0.0, "tokens": 0}
    found = [("steps", f"{last['step']:,} of {recipe.train.total_steps:,}")]
    if last["seconds"]:
        found += [("training", duration(last["seconds"]))]
        found += [("tokens a second", f"{last['tokens'] / last['seconds']:,.0f}")]
    losses = [record["loss"] for record in records if record.get("loss") is not None]
    if losses:
        found.append(("loss, last", f"{losses[-1]:.3f}"))
    if scores:
        name, newest = list(scores.items())[-1]
        found.append((f"score, {name}", figure(newest["mean"])))
    else:
        evaluated = [record["score"] for record in records if "score" in record]
        found += [("score, last", figure(evaluated[-1]))] if evaluated else []
    return found


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `3 min 20 s`, `5 h 7 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def prompts(words: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Instructions with the words of their soft tokens."""
    return [
        {
            "instruction": printable(instruction),
            "tokens": [[(printable(word), weight) for word, weight in token] for token in tokens],
        }
        for instruction, tokens in words.items()
    ]


def made_of(recipe: Recipe) -> str:
    """The models, in a sentence."""
    model = recipe.model
    return (
        f"{shown(model.prompter.model)} writes {model.prompter.soft_tokens} soft tokens for the frozen"
        f" {shown(model.backbone.model)}."
    )


def options(recipe: Recipe) -> list[tuple[str, str]]:
    """The main options; all of them stand in the run's recipe.yaml."""
    model, train = recipe.model, recipe.train
    return [
        ("prompting LLM", f"{shown(model.prompter.model)}, trained: {model.prompter.trainable}"),
        ("soft tokens", f"{model.prompter.soft_tokens}, temperature {model.prompter.temperature:g}"),
        ("backbone", f"{shown(model.backbone.model)}, {model.backbone.dtype}"),
        ("alignment", f"{model.alignment.kind}, from {model.alignment.init}"),
        ("layout, pooling", f"{model.layout}, {model.pooling}"),
        ("conditioning", model.conditioning),
        ("reader", model.reader),
        ("skip", model.skip),
        ("lens", f"rank {model.lens_rank}" if model.lens_rank else "none"),
        ("tokens of a text", f"up to {model.max_length:,}"),
        ("steps", f"{train.total_steps:,} of {train.batch_size:,} queries"),
        ("rate", f"{train.lr:g}, {train.schedule}, warm-up {train.warmup:.0%}"),
        ("loss", f"temperature {recipe.loss.temperature:g}, up to {recipe.loss.hard_negatives} hard negatives"),
        ("seed", str(train.seed)),
        ("best weights by", recipe.evaluate.best_by or "none chosen: the last ones"),
    ]


def row_of(item: DatasetConfig) -> dict[str, str]:
    """A line of the table of data sets."""
    wordings = f"drawn from {shown(item.instruct)}" if item.instruct else ""
    queries = item.instruction or wordings or "of each row"
    documents = wordings or item.of_documents or "of each row"
    return {"path": shown(item.path), "weight": f"{item.weight:g}", "queries": queries, "documents": documents}


def check_output(path: Path) -> None:
    """Refuse a file that is no earlier report.

    Raises:
        ReportError: a folder, or another file.
    """
    if path.is_dir():
        raise ReportError(f"--output: expected a file, got the folder {path}")
    if path.exists():
        with path.open("rb") as file:
            if f'content="{GENERATOR}"'.encode() not in file.read(1024):
                raise ReportError(f"{path}: holds something other than a report; --output FILE writes elsewhere")


def main(argv: Sequence[str] | None = None) -> None:
    """Report as the command line says; bad input ends with one message and exit code 2."""
    parser = Parser("python -m pe.report", __doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--output", type=Path, help=f"file of the page (default: {PAGE} in the run's folder)")
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.run / PAGE
    with user_errors("pe.report"):
        check_output(output)
        write_text(output, page(RunFolder(arguments.run)))
    print(f"written to {output}")


if __name__ == "__main__":
    main()

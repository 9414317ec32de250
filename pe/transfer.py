"""`python -m pe.transfer CHECKPOINT --backbone NEW [--steps N] [--output FOLDER] [--section.option=value ...]`

Moves a trained PromptEmbedder to another backbone: the prompting LLM stays as it is, the alignment matrix (and reader
and skip, where there are any) is trained anew. `--steps 0` stops at the least-squares or vocabulary start. Of the
options of the model, `backbone`, `alignment`, `reader`, `reader_lora`, `skip` and `max_length` may be given anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table

from pe.alignment import build_alignment
from pe.backbone import Backbone
from pe.card import model_card
from pe.cli import user_errors
from pe.config import ModelConfig, Recipe, RecipeError, to_dict
from pe.evaluate import Scores, comparison
from pe.loading import quiet
from pe.model import PromptEmbedder
from pe.recipes import load_recipe, write_yaml
from pe.runs import RunFolder, differences, flatten
from pe.train import (
    History,
    TrainingError,
    build_accelerator,
    build_plan,
    check_evaluation,
    check_widths,
    describe,
    fit,
    measurer,
)

SHARES = (0.95, 0.99)
MOVABLE = ("backbone", "alignment", "reader", "reader_lora", "skip", "max_length")
"""Options of the model that are free in a move; all others belong to the prompting LLM as it was trained."""
REPORT = "transfer.json"


@dataclass(frozen=True)
class Reached:
    """When a share of the source's score was reached: (steps, training seconds), or None."""

    share: float
    score: float
    at: tuple[int, float] | None


@dataclass(frozen=True)
class Transfer:
    """What a move to another backbone took.

    Attributes:
        scores: of the source, of the start without training, and of the end.
        curve: (steps, training seconds, mean score), the start first.
        reached: steps and seconds to 95 % and 99 % of the source's mean score.
    """

    scores: dict[str, Scores]
    curve: list[tuple[int, float, float]]
    reached: list[Reached]

    def __rich__(self) -> Table:
        table = Table("share of the source's score", "score", "steps", "seconds")
        for item in self.reached:
            steps, seconds = ("not reached", "") if item.at is None else (str(item.at[0]), f"{item.at[1]:.1f}")
            table.add_row(f"{item.share:.0%}", f"{item.score:.1f}", steps, seconds)
        return table


def move(source: PromptEmbedder, config: ModelConfig) -> PromptEmbedder:
    """The embedder under other options, its backbone first of all, untrained: frozen prompting LLM, all else fresh.

    The source's prompting LLM is shared, so it is frozen in the source too.

    Raises:
        RecipeError: options that differ from the source's and are not in `MOVABLE`.
    """
    kept = [
        flatten({name: value for name, value in to_dict(options).items() if name not in MOVABLE}, "model")
        for options in (source.config, config)
    ]
    if changed := differences(*kept):
        raise RecipeError(
            f"a move changes nothing but model.{', '.join(MOVABLE)}; expected the other options as they were trained,"
            f" got {', '.join(changed)}"
        )
    prompter = source.prompter.requires_grad_(False)
    target = Backbone.from_pretrained(config.backbone, source.device)
    alignment = build_alignment(prompter, target, config.alignment)
    if config.reader == "activated_lora":
        target.add_reader(config.reader_lora)
    return PromptEmbedder(config, prompter, alignment, target)


def reached(curve: Sequence[tuple[int, float, float]], source: float) -> list[Reached]:
    """The first point of the curve at or above each share of the source's score."""
    found = []
    for share in SHARES:
        first = next(((steps, seconds) for steps, seconds, value in curve if value >= share * source), None)
        found.append(Reached(share, share * source, first))
    return found


def transfer(checkpoint: Path, recipe: Recipe, *, fresh: bool = False) -> Transfer:
    """Move the embedder in `checkpoint` to `recipe.model.backbone` and train what the new backbone needs.

    Raises:
        RecipeError: nothing to train, though steps were asked for, or options that a move cannot change.
        EvaluationError, DataError, RunError, FileNotFoundError: before the run's folder is touched.
        TrainingError: see `fit`.
    """
    check_evaluation(recipe.evaluate)
    console = Console(stderr=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plan = build_plan(recipe, console) if recipe.train.steps else None
    source = PromptEmbedder.from_pretrained(checkpoint, device=device)
    run = RunFolder(recipe.output)
    set_seed(recipe.train.seed)
    target = move(source, recipe.model)
    target.name = run.path.name
    console.print(describe(target), highlight=False)
    if plan and not target.trainable_parameters():
        raise RecipeError(
            f"train.steps: expected 0, got {recipe.train.steps}: a {target.config.alignment.kind} alignment without"
            " reader and skip has nothing to train; --steps 0, or give the model a reader or a skip"
        )
    check_widths(recipe, target)
    measure = measurer(recipe)
    run.start(recipe, resume=False, fresh=fresh)
    scores = {"source": measure(source), "moved, untrained": measure(target)} if recipe.evaluate.tasks else {}
    curve = [(0, 0.0, scores["moved, untrained"].mean)] if scores else []
    history = History()
    if plan:
        accelerator = build_accelerator(recipe)
        evaluate = (lambda: measure(target).mean) if scores else None
        history = fit(target, plan, recipe, accelerator, run, evaluate=evaluate)
        if scores:
            scores["moved, trained"] = measure(target)
            end = (recipe.train.steps, history.seconds, scores["moved, trained"].mean)
            curve += [point for point in history.scores if point[0] != end[0]] + [end]
    result = Transfer(scores, curve, reached(curve, scores["source"].mean) if scores else [])
    target.save_pretrained(run.model, card=model_card(recipe, target, history.seconds, scores))
    write_yaml(recipe, run.model / "recipe.yaml")
    report: dict[str, object] = {"curve": curve, "reached": [dataclasses.asdict(item) for item in result.reached]}
    report["scores"] = {name: found.to_dict() for name, found in scores.items()}
    (run.path / REPORT).write_text(json.dumps(report, indent=2), encoding="utf-8")
    console.print(f"saved {run.model}", highlight=False)
    return result


def transfer_recipe(arguments: argparse.Namespace, overrides: Sequence[str]) -> Recipe:
    """The recipe that trained the checkpoint, with the new backbone, steps and output.

    Raises:
        RecipeError: the checkpoint has no recipe beside it.
    """
    checkpoint = Path(arguments.checkpoint)
    file = checkpoint / "recipe.yaml"
    if not file.exists():
        raise RecipeError(f"{file}: no such file; CHECKPOINT is the `model` folder of a run of pe.train")
    name = Path(arguments.backbone).name
    output = arguments.output or f"{load_recipe(file).output}-{name}"
    every = max(1, arguments.steps // 5)
    fixed = [f"--model.backbone.model={arguments.backbone}", f"--output={output}", f"--train.eval_every={every}"]
    fixed += [f"--train.steps={arguments.steps}", "--model.backbone.revision=null"]
    return load_recipe(file, [*fixed, *overrides])


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m pe.transfer", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", help="the `model` folder of a run")
    parser.add_argument("--backbone", required=True, help="folder or hub name of the new backbone")
    parser.add_argument("--steps", type=int, default=200, help="training steps; 0: none (default 200)")
    parser.add_argument("--output", help="run folder (default: the source's with the backbone's name)")
    parser.add_argument("--fresh", action="store_true", help="move an earlier run in that folder aside")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Transfer as the command line says; bad input ends with one message and exit code 2."""
    quiet()
    arguments, overrides = parse(sys.argv[1:] if argv is None else list(argv))
    with user_errors("pe.transfer", TrainingError):
        result = transfer(Path(arguments.checkpoint), transfer_recipe(arguments, overrides), fresh=arguments.fresh)
    console = Console()
    if result.scores:
        console.print(comparison(result.scores))
        console.print(result)


if __name__ == "__main__":
    main()

"""`python -m pe.transfer CHECKPOINT --backbone NEW [--steps N] [--texts N] [--output FOLDER] [--section.option=value]`

Moves a trained PromptEmbedder to another backbone: the prompting LLM stays as it is, the alignment matrix (and reader
and skip, where there are any) is trained anew. `--steps 0` trains nothing: the matrix is least squares over the shared
tokens, the skip least squares over training texts, as the source embeds them. Of the options of the model, `backbone`,
`alignment`, `reader`, `reader_lora`, `skip`, `lens_rank` and `max_length` may be given anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate.utils import set_seed
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from pe.card import model_card
from pe.config import BackboneConfig, ModelConfig, Recipe, RecipeError, to_dict
from pe.data.batches import BatchPlan
from pe.evaluate import Scores, comparison
from pe.losses import batch_requests
from pe.method.alignment import build_alignment
from pe.method.backbone import Backbone
from pe.method.loading import load_config, quiet, usable_device
from pe.method.skip_start import fit_skip
from pe.model import PromptEmbedder
from pe.runs.cli import check_alone, user_errors
from pe.runs.files import write_text
from pe.runs.folder import RunFolder, differences, flatten
from pe.runs.parsers import Parser
from pe.runs.recipes import load_recipe, write_yaml
from pe.step import TrainingError
from pe.train import (
    History,
    build_accelerator,
    build_plan,
    check_evaluation,
    check_widths,
    describe,
    fit,
    measurer,
    spread_of,
    stored_texts,
    tell,
)

SHARES = (0.95, 0.99)
MOVABLE = ("backbone", "alignment", "reader", "reader_lora", "skip", "lens_rank", "max_length")
"""Options of the model that are free in a move; all others belong to the prompting LLM as it was trained."""
TEXTS_PER_DIMENSION = 8
"""Training texts that a skip is fitted on where nothing is trained, for each dimension of the new backbone."""
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
        curve: (steps, seconds of fitting and training, mean score), the start first.
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
    moved = PromptEmbedder(config, prompter, alignment, target, instructions=source.instructions)
    moved.training_sets = source.training_sets
    if moved.lens is not None and source.lens is not None and moved.lens.reading.shape == source.lens.reading.shape:
        moved.lens.keep_reading(source.lens)
    return moved


def reached(curve: Sequence[tuple[int, float, float]], source: float) -> list[Reached]:
    """The first point of the curve at or above each share of the source's score."""
    found = []
    for share in SHARES:
        first = next(((steps, seconds) for steps, seconds, value in curve if value >= share * source), None)
        found.append(Reached(share, share * source, first))
    return found


def start_skip(target: PromptEmbedder, source: PromptEmbedder, plan: BatchPlan, texts: int) -> int:
    """Fit the skip on about that many texts of the plan's data sets; how many they were."""
    steps = math.ceil(texts / (2 * plan.batch_size))
    weights = [dataset.config.weight for dataset in plan.datasets]
    plan = BatchPlan(plan.datasets, weights, steps, plan.batch_size, plan.seed, plan.hard_negatives)
    bar = tqdm(range(steps), desc="fit skip")
    return fit_skip(target, source, (batch_requests(plan.batch(step)) for step in bar))


def transfer(
    checkpoint: Path,
    recipe: Recipe,
    *,
    texts: int | None = None,
    fresh: bool = False,
    backbone: str | None = None,
    prompter: str | None = None,
) -> Transfer:
    """Move the embedder in `checkpoint` to `recipe.model.backbone` and train what the new backbone needs.

    Args:
        checkpoint: the `model` folder of a run.
        recipe: that run's, with the new backbone, steps and output.
        texts: training texts that the skip is fitted on; 0: it starts fresh; None: `TEXTS_PER_DIMENSION` for each where
            nothing is trained, else 0.
        fresh: move an earlier run aside.
        backbone, prompter: where models of the source are now, see `PromptEmbedder.from_pretrained`.

    Raises:
        RecipeError: nothing to train, though steps were asked for, options that a move cannot change, or `texts` < 0.
        EvaluationError, DataError, RunError, FileNotFoundError: before the run's folder is touched.
        TrainingError: see `fit`.
    """
    if recipe.train.shard_backbone:
        raise RecipeError("train.shard_backbone: expected false, a move is of one process, got true")
    if recipe.evaluate.best_by is not None:
        raise RecipeError("evaluate.best_by: expected null, a move ends with its last weights, got a task")
    check_evaluation(recipe.evaluate)
    console = Console(stderr=True)
    if texts is not None and texts < 0:
        raise RecipeError(f"--texts: expected at least 0, got {texts}")
    fits_skip = recipe.model.skip != "none" and (not recipe.train.total_steps if texts is None else texts > 0)
    at_least_one = dataclasses.replace(recipe.train, steps=max(1, recipe.train.total_steps))
    needs_data = recipe.train.total_steps or fits_skip
    plan = build_plan(dataclasses.replace(recipe, train=at_least_one), console) if needs_data else None
    source = PromptEmbedder.from_pretrained(checkpoint, backbone=backbone, prompter=prompter, device=usable_device())
    run = RunFolder(recipe.output)
    set_seed(recipe.train.seed)
    target = move(source, recipe.model)
    target.name = run.path.name
    console.print(describe(target), highlight=False)
    if (steps := recipe.train.total_steps) and not target.trainable_parameters():
        raise RecipeError(
            f"train.steps: expected 0, got {steps}: a {target.config.alignment.kind} alignment without"
            " reader and skip has nothing to train; --steps 0, or give the model a reader or a skip"
        )
    check_widths(recipe, target)
    measure, accelerator = measurer(recipe), build_accelerator(recipe)
    with stored_texts(target, plan, recipe.train, accelerator, None) as store:
        run.start(recipe, resume=False, fresh=fresh, resumable=False)
        with stored_texts(source, None, recipe.train, accelerator, store):
            scores = {"source": measure(source)} if recipe.evaluate.tasks else {}
            started = time.perf_counter()
            if plan and fits_skip:
                wanted = TEXTS_PER_DIMENSION * target.backbone.hidden_size if texts is None else texts
                count = start_skip(target, source, plan, wanted)
                console.print(f"skip: fitted on the source's embeddings of {count:,} texts", highlight=False)
            spent = time.perf_counter() - started
        del source  # on a GPU its backbone would stay beside the new one
        curve: list[tuple[int, float, float]] = []
        if recipe.evaluate.tasks:
            scores["moved, untrained"] = measure(target)
            curve = [(0, spent, scores["moved, untrained"].mean)]
        history = History()
        if plan and recipe.train.total_steps:
            evaluate = (lambda: measure(target).mean) if scores else None
            history = fit(target, plan, recipe, accelerator, run, evaluate=evaluate)
            if scores:
                scores["moved, trained"] = measure(target)
                end = (recipe.train.total_steps, history.seconds, scores["moved, trained"].mean)
                points = [point for point in history.scores if point[0] != end[0]] + [end]
                curve += [(step, spent + seconds, score) for step, seconds, score in points]
        found = history.spread or (spread_of(target, plan) if plan else None)
        if store is not None:
            console.print(str(store), highlight=False)
    result = Transfer(scores, curve, reached(curve, scores["source"].mean) if scores else [])
    tell(found, console)
    target.save_pretrained(run.model, card=model_card(recipe, target, history.seconds, scores, found))
    write_yaml(recipe, run.model / "recipe.yaml")
    report: dict[str, object] = {"curve": curve, "reached": [dataclasses.asdict(item) for item in result.reached]}
    report["scores"] = {name: found.to_dict() for name, found in scores.items()}
    write_text(run.path / REPORT, json.dumps(report, indent=2))
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
    fixed += ["--evaluate.best_by=null", "--train.patience=null", "--train.shard_backbone=false"]
    source = load_recipe(file).model.backbone
    if source.entry_layer:
        fixed.append(f"--model.backbone.entry_layer={entry_layer_of(arguments, source)}")
    return load_recipe(file, [*fixed, *overrides])


def entry_layer_of(arguments: argparse.Namespace, source: BackboneConfig) -> int:
    """The new backbone's layer that is as far up as the one where soft tokens enter the source's.

    Raises:
        FileNotFoundError, ValueError: see `load_config`.
    """
    of_source = (arguments.source_backbone, None) if arguments.source_backbone else (source.model, source.revision)
    depths = [load_config(*of).get_text_config().num_hidden_layers for of in (of_source, (arguments.backbone, None))]
    before, after = (depth if source.layers is None else min(depth, source.layers) for depth in depths)
    return min(round(source.entry_layer * after / before), after - 1)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = Parser("python -m pe.transfer", __doc__)
    parser.add_argument("checkpoint", help="the `model` folder of a run")
    parser.add_argument("--backbone", required=True, help="folder or hub name of the new backbone")
    parser.add_argument("--source-backbone", help="where the source's own backbone is now, if it has moved")
    parser.add_argument("--prompter", help="where the base of the source's prompting LLM with adapters is, if moved")
    parser.add_argument("--steps", type=int, default=200, help="training steps; 0: none (default 200)")
    default = f"default: {TEXTS_PER_DIMENSION} a dimension with --steps 0, else 0"
    parser.add_argument("--texts", type=int, help=f"training texts that a skip is fitted on ({default})")
    parser.add_argument("--output", help="run folder (default: the source's with the backbone's name)")
    parser.add_argument("--fresh", action="store_true", help="move an earlier run in that folder aside")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Transfer as the command line says; bad input ends with one message and exit code 2."""
    quiet()
    arguments, overrides = parse(sys.argv[1:] if argv is None else list(argv))
    with user_errors("pe.transfer", TrainingError):
        check_alone("make the whole move", "let it run on one GPU")
        recipe = transfer_recipe(arguments, overrides)
        moved = {"backbone": arguments.source_backbone, "prompter": arguments.prompter}
        result = transfer(Path(arguments.checkpoint), recipe, texts=arguments.texts, fresh=arguments.fresh, **moved)
    console = Console()
    if result.scores:
        console.print(comparison(result.scores))
        console.print(result)


if __name__ == "__main__":
    main()

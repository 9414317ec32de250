"""`python -m pe.train [RECIPE.yaml] [--resume | --fresh] [--section.option=value ...]`

Trains the prompting LLM, the alignment and, where there are any, reader and skip, by a contrastive loss; the backbone
stays frozen. Without a recipe it runs `recipes/tiny.yaml`. `--resume` continues the run in the recipe's output folder,
`--fresh` moves that run aside first.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import InitProcessGroupKwargs, gather_object, set_seed
from rich.console import Console
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm.auto import tqdm
from transformers.utils import logging

from pe.baselines.frozen import FrozenEncoder
from pe.card import model_card, shown
from pe.config import EvaluateConfig, Recipe, RecipeError, TrainConfig, to_dict
from pe.data.batches import Batch, BatchPlan, steps_of
from pe.data.instruct_set import first_wordings, load_training_set
from pe.data.instructions import trained_instructions, training_sets
from pe.data.tasks import TASKS
from pe.evaluate import Scores, check_instructions, comparison, find_tasks, score
from pe.losses import batch_requests, instructions_of, random_state, set_random_state
from pe.measure.by_process import Held, table
from pe.measure.spread import Spread, spread
from pe.measure.words import Words, written_words
from pe.method.loading import one_line, quiet, warn_of_slow_products
from pe.method.prompted import PromptedEmbedder
from pe.method.text_store import TextStore
from pe.model import PromptEmbedder, Requests
from pe.runs.cli import user_errors
from pe.runs.extras import MissingPackage
from pe.runs.files import write_text
from pe.runs.folder import RunError, RunFolder, conditions_of, flatten
from pe.runs.history import HistoryError
from pe.runs.peers import watching
from pe.runs.plots import draw
from pe.runs.recipes import build_parser, load_recipe, write_yaml
from pe.step import Step, Taken, Trainable, TrainingError, not_finite

if TYPE_CHECKING:  # mteb is an extra: training without tasks does without it
    from pe.integrations.mteb import TextEncoder

logger = logging.get_logger(__name__)

DEFAULT_RECIPE = Path(__file__).parent.parent / "recipes" / "tiny.yaml"
CHECK_STEPS = 5
PROJECT = "promptembedder"
"""Under which trackers of many runs keep this package's."""
PACKAGES = {"mlflow": "mlflow-skinny"}
"""Packages that are not called as their tracker is."""
MOST_SKIPPED = 3
"""Steps in a row that may be skipped, the last of which ends the run."""
PATIENCE = timedelta(days=1)
"""How long processes wait for the main one, which alone scores; one that has ended is noticed at once."""


@dataclass
class History:
    """What a run went through.

    Attributes:
        losses: by step, those that were skipped included.
        skipped: steps whose loss or gradient was not finite, counted from 1; none of them changed a weight.
        scores: (steps done, training seconds, score) of every evaluation while training; the score is that of
            `evaluate.best_by`, else the mean.
        spreads: (steps done, fields of `Spread`) at every checkpoint of a run.
        seconds: training time, evaluations left out.
        texts, truncated: texts read on this process, and how many of them were cut to the token limit.
        tokens, padded: their tokens, and the tokens of the same batches with padding.
        most: tokens of the step that had the most of them.
    """

    losses: list[float] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)
    scores: list[tuple[int, float, float]] = field(default_factory=list)
    spreads: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0.0
    texts: int = 0
    truncated: int = 0
    tokens: int = 0
    padded: int = 0
    most: int = 0

    @property
    def spread(self) -> Spread | None:
        """How alike instructions are to the model at the last checkpoint; None without one, or of fewer than two."""
        return Spread(**self.spreads[-1][1]) if self.spreads else None

    @property
    def best(self) -> int:
        """Place of the best score, the first on ties; not a number is the worst."""
        values = [-math.inf if math.isnan(score) else score for _, _, score in self.scores]
        return values.index(max(values))

    def is_over(self, patience: int | None) -> bool:
        """Whether the last `patience` scores are no better than one before them."""
        return patience is not None and bool(self.scores) and len(self.scores) - 1 - self.best >= patience

    @property
    def padding_share(self) -> float:
        """The share of a padded batch that packing leaves out."""
        return 1 - self.tokens / self.padded if self.padded else 0.0

    @property
    def summary(self) -> str:
        """Steps, time, padding and cut texts, in a line."""
        skipped = f", {len(self.skipped)} of them skipped" if self.skipped else ""
        return (
            f"{len(self.losses)} steps{skipped} in {self.seconds:.0f} s, {self.tokens / self.seconds:,.0f} tokens/s,"
            f" {self.padding_share:.0%} padding left out,"
            f" {self.truncated:,} of {self.texts:,} texts truncated"
        )

    def count(self, taken: Taken, seconds: float) -> None:
        """Note what a step came to, and how long it took."""
        self.losses.append(taken.loss)
        if not taken.is_finite:
            self.skipped.append(len(self.losses))
        self.seconds += seconds
        self.texts += taken.texts
        self.truncated += taken.truncated
        self.tokens += taken.tokens
        self.padded += taken.padded
        self.most = max(self.most, taken.tokens)


@contextmanager
def stored_texts(
    model: Trainable, plan: BatchPlan | None, options: TrainConfig, accelerator: Accelerator, store: TextStore | None
) -> Iterator[TextStore | None]:
    """Inside it the model reads its texts from `store` or, where that is None and it has none yet, the options'.

    Raises:
        RecipeError: the model has no frozen text pass of its own.
        ValueError: the store cannot be used, or not for one batch of the plan.
    """
    if store is None and (options.text_store == "none" or model.backbone.text_store is not None):
        yield model.backbone.text_store
        return
    if not isinstance(model, PromptedEmbedder):
        raise RecipeError(
            f"train.text_store: expected 'none' for {type(model).__name__}, whose passes over texts have weights that"
            f" train, got {options.text_store!r}"
        )
    with ExitStack() as stack:
        size, dtype = options.text_store_gib, options.text_store_dtype
        opened = store or stack.enter_context(TextStore.open(options.text_store, size, dtype))
        with accelerator.autocast():  # which decides the types of what is kept
            stack.enter_context(model.reading_from(opened))
        if plan is not None:
            processes = accelerator.process_index, accelerator.num_processes
            first = model.tokenized(batch_requests(plan.batch(0, *processes)), options.max_length).read or ()
            opened.check_room(sum(map(len, first)), "train.text_store_gib")
        yield opened


def fit(
    model: Trainable,
    plan: BatchPlan,
    recipe: Recipe,
    accelerator: Accelerator,
    run: RunFolder | None = None,
    *,
    resume: bool = False,
    evaluate: Callable[[], float] | None = None,
) -> History:
    """Train for `recipe.train.total_steps` steps.

    Until it returns no other thread may use the model, nor anything else on its backbone (see `pe/method/turns.py`).

    Args:
        model: trains in place.
        plan: the batch of every step.
        recipe: loss and training options.
        accelerator: device, precision, processes, trackers.
        run: where checkpoints go; None: nowhere.
        resume: start from the run's newest checkpoint.
        evaluate: the score now; called every `eval_every` steps, on the main process alone or, where the backbone is
            sharded, on all. With `evaluate.best_by` and a run also after the last step, and the model ends with the
            weights of its best score.

    Raises:
        TrainingError: a part without gradient, outputs that stay the same, embeddings that are not finite, too many
            steps in a row that are not, or no memory for a query at a time.
        RunError, HistoryError: a checkpoint, or a record of the run's history, cannot be written.
        RecipeError, ValueError: a text store that cannot be used (see `stored_texts`).
        BeingTrained: another thread trains it.
    """
    options, history, last = recipe.train, History(), recipe.train.total_steps
    by_best = run is not None and evaluate is not None and recipe.evaluate.best_by is not None
    with (
        model.backbone.turns.training(),
        stored_texts(model, plan, options, accelerator, None),
        closing(Step(model, recipe.loss, options, accelerator, is_tolerant=True)) as step,
    ):
        if resume and run:
            restore(run, step, history)
        batch_of = functools.partial(
            plan.batch, process_index=accelerator.process_index, process_count=accelerator.num_processes
        )
        probe = batch_requests(plan.batch(0)).part(range(2))
        before, first, following = detached(model, probe), step.done, None
        last = first if history.is_over(options.patience) else last
        with tqdm(total=last, initial=first, desc="train", disable=not accelerator.is_main_process) as bar:
            for done in range(first + 1, last + 1):
                started = time.perf_counter()
                batch, size = following or batch_of(done - 1), step.micro_batch_size
                following = batch_of(done) if done < last else None
                taken = step(batch, following)
                history.count(taken, time.perf_counter() - started)
                bar.update()
                if step.micro_batch_size != size:
                    note_halved(step, history, run)
                if not taken.is_finite:
                    note_skipped(step, history, taken, batch, run)
                if done == first + CHECK_STEPS and torch.equal(detached(model, probe), before):
                    raise TrainingError(
                        f"step {done}: the embeddings are what they were at the start; check the rates (lr)"
                    )
                if done % options.log_every == 0:
                    log(step, history, taken, bar, run)
                is_due = options.eval_every and done % options.eval_every == 0
                is_scored = evaluate is not None and (is_due or (by_best and done == last))
                if evaluate and is_scored:
                    note_score(step, history, evaluate, run)
                    if run and by_best:
                        keep_best(run, step, history)
                is_over = history.is_over(options.patience)
                is_saved = done % options.save_every == 0 or done == last or is_over
                if is_saved:
                    if not detached(model, probe).isfinite().all():
                        raise TrainingError(f"step {done}: the embeddings are not finite; lower the rates (lr)")
                    if run:
                        checkpoint(run, step, history, plan)
                if run and (is_scored or is_saved):
                    draw_plots(run, accelerator)
                if is_over:
                    break
        if run and by_best:
            model.load_trainable_state(run.load_best(accelerator.device)["model"])
    return history


def log(step: Step[Any], history: History, taken: Taken, bar: tqdm[Any], run: RunFolder | None) -> None:
    """Show and write the mean loss since the last record, and what the last step came to."""
    finite = [loss for loss in history.losses[-step.options.log_every :] if math.isfinite(loss)]
    values = {
        "loss": sum(finite) / len(finite) if finite else math.nan,
        "skipped": len(history.skipped),
        "gradient_norm": float(taken.gradient_norm),
        "rate": float(step.scheduler.get_last_lr()[0]),
        "tokens_per_second": history.tokens / history.seconds,
    }
    bar.set_postfix(loss=f"{values['loss']:.3f}", tokens_per_s=f"{values['tokens_per_second']:,.0f}")
    write(step, history, run, values)


def note_halved(step: Step[Any], history: History, run: RunFolder | None) -> None:
    """Say that memory ran out, and how many queries are taken at a time from now on."""
    size = step.micro_batch_size
    write(step, history, run, {"micro_batch_size": float(size or 0)})
    tqdm.write(
        f"step {step.done}: out of memory; from now on micro batches of {size} queries, of the same loss"
        f" (train.micro_batch_size={size} begins so)",
        file=sys.stderr,
    )


def note_skipped(step: Step[Any], history: History, taken: Taken, batch: Batch, run: RunFolder | None) -> None:
    """Write down the batch of a step that was skipped, and say so.

    Raises:
        TrainingError: it is the last of too many in a row.
    """
    done, place = step.done, ""
    if run is not None:
        found = {"step": done, "loss": str(taken.loss), "gradient_norm": str(taken.gradient_norm.item())}
        texts = {name: value for name, value in vars(batch).items() if isinstance(value, str | int | list)}
        run.save_fault(done, step.accelerator.process_index, found | texts)
        place = f" (the batch: {run.faults})"
    problem = f"step {done}: {not_finite(taken.loss, taken.gradient_norm)}{place}"
    if history.skipped[-MOST_SKIPPED:] == list(range(done - MOST_SKIPPED + 1, done + 1)):
        raise TrainingError(f"{problem}; {MOST_SKIPPED} steps in a row were skipped")
    if step.accelerator.is_main_process:
        tqdm.write(f"{problem}; skipped", file=sys.stderr)


def write(step: Step[Any], history: History, run: RunFolder | None, values: Mapping[str, float]) -> None:
    """Give numbers to the trackers and to the run's history.

    Raises:
        HistoryError: see `HistoryFile.append`.
    """
    step.accelerator.log(dict(values), step=step.done)
    note(step, history, run, values)


def note(step: Step[Any], history: History, run: RunFolder | None, values: Mapping[str, Any]) -> None:
    """Add a record to the run's history.

    Raises:
        HistoryError: see `HistoryFile.append`.
    """
    if run and step.accelerator.is_main_process:
        run.history.append({"step": step.done, "seconds": history.seconds, "tokens": history.tokens, **values})


def takes_part(accelerator: Accelerator, model: Trainable) -> bool:
    """Whether this process runs the model outside the steps: the main one or, with a sharded backbone, every one."""
    return accelerator.is_main_process or model.backbone.is_sharded


def note_score(step: Step[Any], history: History, evaluate: Callable[[], float], run: RunFolder | None) -> None:
    """Score, where others have no part in it while they wait, and write the main process's score down on all."""
    (found, *_) = gather_object([evaluate() if takes_part(step.accelerator, step.model) else 0.0])
    history.scores.append((step.done, history.seconds, found))
    write(step, history, run, {"score": found})


def draw_plots(run: RunFolder, accelerator: Accelerator) -> None:
    """Draw what the run has logged so far, on the main process, where matplotlib is there; no picture ends a run."""
    if not accelerator.is_main_process:
        return
    try:
        draw(run.history.records(), run.plots)
    except MissingPackage:
        pass
    except (HistoryError, OSError) as error:
        logger.error(f"{run.plots}: not drawn: {error}")


def keep_best(run: RunFolder, step: Step[Any], history: History) -> None:
    """Write the weights down where the last score is the best one; all processes wait for it."""
    if history.best == len(history.scores) - 1 and step.accelerator.is_main_process:
        run.save_best({"step": step.done, "score": history.scores[-1][2], "model": step.model.trainable_state()})
    step.accelerator.wait_for_everyone()


def spread_of(model: PromptedEmbedder, plan: BatchPlan) -> Spread | None:
    """How alike the training instructions are to the model, on queries of the first batch."""
    wanted = [item.text for item in instructions_of(plan) if item.side == "query"]
    return spread(model, wanted, plan.batch(0).queries)


def words_of(model: PromptEmbedder, plan: BatchPlan) -> Words:
    """What is written for some training instructions, in words."""
    return written_words(model, [item.text for item in instructions_of(plan) if item.side == "query"])


def tell_memory(model: PromptEmbedder, history: History, accelerator: Accelerator, console: Console) -> None:
    """Print what each of several processes held."""
    if accelerator.num_processes > 1:
        with accelerator.autocast():  # which decides the types of keys and values
            own = Held.of(model, history.most)
        console.print(table(gather_object([own])))


def tell(found: Spread | None, console: Console) -> None:
    """Print how alike instructions are, and a warning where they are not followed."""
    if found is not None:
        console.print(str(found), highlight=False)
        if found.is_alike:
            console.print(f"warning: {found.warning}", highlight=False)


@torch.no_grad()
def detached(model: Trainable, requests: Requests) -> Tensor:
    model.train(False)
    return model(requests).clone()


def checkpoint(run: RunFolder, step: Step[Any], history: History, plan: BatchPlan) -> None:
    """Write a checkpoint, and note how alike instructions are now and what is written for them.

    Raises:
        RunError, HistoryError: it cannot be written.
    """
    is_main, model = step.accelerator.is_main_process, step.model
    found = None
    if takes_part(step.accelerator, model) and isinstance(model, PromptedEmbedder):
        found = spread_of(model, plan)
    if found is not None:
        history.spreads.append((step.done, asdict(found)))
        write(step, history, run, {"instructions_alike": found.embeddings})
    if is_main and isinstance(model, PromptEmbedder) and (words := words_of(model, plan)):
        note(step, history, run, {"words": words})
    states = gather_object([random_state()])
    if is_main:
        save(run, step, history, states)


def save(run: RunFolder, step: Step[Any], history: History, random_states: list[list[Tensor]]) -> None:
    """Write a checkpoint; `random_states` are those of every process."""
    state = {**step.state(), "history": vars(history), "random_states": random_states}
    run.save_checkpoint(step.done, state, step.options.keep_checkpoints)


def restore(run: RunFolder, step: Step[Any], history: History) -> None:
    """Put the newest checkpoint back; what the run logged behind it is dropped.

    A process that the run did not have draws random numbers as at its start.

    Raises:
        RunError: it cannot be read, is not one of this model, or takes a sharded backbone's queries a few at a time.
    """
    state = run.load_checkpoint(step.accelerator.device)
    try:
        step.load_state(state)
        vars(history).update(state["history"])
    except (KeyError, ValueError, TypeError) as error:
        raise RunError(
            f"{run.checkpoints[-1]}: expected a checkpoint of this model, got another or a damaged one"
            f" ({type(error).__name__}: {error}); remove it, and --resume takes the one before"
        ) from error
    if step.model.backbone.is_sharded and step.micro_batch_size is not None:
        raise RunError(
            f"{run.checkpoints[-1]}: expected a step of whole batches with train.shard_backbone, got micro batches of"
            f" {step.micro_batch_size} queries, to which the run came when memory ran out; go on without the option"
        )
    if step.accelerator.is_main_process:
        run.history.keep(step.done)
    if "random_states" in state:
        if (place := step.accelerator.process_index) < len(state["random_states"]):
            set_random_state(state["random_states"][place])
    else:  # of a checkpoint that kept the main process's CPU state alone
        set_random_state([state["random_state"]])


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Device, precision and trackers by accelerate; `auto` is bfloat16 on a GPU that has it.

    Raises:
        RecipeError: a tracker whose package is not installed.
    """
    options, precision = recipe.train, recipe.train.precision
    if precision == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if has_bf16 else "float32"
    board = TensorBoardTracker("tensorboard", RunFolder(recipe.output).logs)
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bfloat16" else "no",
        log_with=[board if name == board.name else name for name in options.log_with] or None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    found = [board.name, *map(str, accelerator.log_with)]  # without those that are not installed
    if missing := [name for name in options.log_with if name not in found]:
        package = PACKAGES.get(missing[0], missing[0])
        raise RecipeError(f"train.log_with: {missing[0]} is not installed: pip install {package}")
    if precision == "bfloat16":
        warn_of_slow_products("train.precision", torch.bfloat16, accelerator.device)
    return accelerator


def start_trackers(accelerator: Accelerator, recipe: Recipe, run: RunFolder) -> None:
    """Begin a record of the run by its resolved options; trackers of many runs have it by its name.

    Raises:
        RunError: a tracker cannot start, since nobody is logged in or there is no server.
    """
    run.logs.mkdir(exist_ok=True)
    name = run.path.resolve().name
    told = {"wandb": {"name": name, "dir": str(run.logs)}, "trackio": {"name": name}, "mlflow": {"run_name": name}}
    flat = flatten(to_dict(recipe))
    options = {key.replace("[", ".").replace("]", ""): str(value) for key, value in flat.items()}  # MLflow's letters
    try:
        accelerator.init_trackers(PROJECT, options, told)
    except Exception as error:  # each tracker has kinds of its own
        raise RunError(f"train.log_with: a tracker cannot start: {one_line(error)}") from error


def check_evaluation(options: EvaluateConfig) -> None:
    """Find the tasks, so that a run does not end at its first score.

    mteb seeds the random generators: seed them after this.

    Raises:
        EvaluationError: an unknown task, missing files, no mteb, or an instruction for an unknown task.
    """
    if options.tasks:
        found = find_tasks(options.tasks, Path(options.data))
        check_instructions(options.instructions, [*found, *TASKS])


def check_widths(recipe: Recipe, model: PromptEmbedder) -> None:
    """Raise RecipeError for a size to train that is larger than the embedding."""
    if too_large := [size for size in recipe.loss.matryoshka if size > model.dimensions]:
        raise RecipeError(
            f"loss.matryoshka: expected sizes up to {model.dimensions}, the backbone's width, got {too_large}"
        )


def measurer(recipe: Recipe) -> Callable[[TextEncoder], Scores]:
    """Scores an encoder on the recipe's tasks."""
    options = recipe.evaluate
    return functools.partial(
        score,
        tasks=options.tasks,
        data=Path(options.data),
        instructions=options.instructions,
        batch_tokens=options.batch_tokens,
    )


def chosen(scores: Scores, name: str | None) -> float:
    """The score of a task, or the mean."""
    return scores.mean if name in (None, "mean") else scores.by_task[name]


def early_end(history: History, options: TrainConfig) -> str:
    """A sentence on a run that patience ended; nothing for one that took all its steps."""
    taken, wanted = len(history.losses), options.total_steps
    if taken == wanted:
        return ""
    return (
        f"stopped after {taken} of {wanted} steps: the last {options.patience} scores were no better (train.patience)"
    )


def best_of(history: History, name: str | None) -> str:
    """A sentence on which weights a run ends with; nothing where these are the last."""
    if name is None:
        return ""
    step, _, found = history.scores[history.best]
    return f"The weights are those after {step} steps, the best by {shown(name)}: {found:.2f}."


def write_scores(path: Path, scores: Mapping[str, Scores]) -> None:
    values = {name: found.to_dict() for name, found in scores.items()}
    write_text(path, json.dumps(values, indent=2))


def build_plan(recipe: Recipe, console: Console, processes: int = 1) -> BatchPlan:
    """Read the data sets, report what became of every row, and plan the batches, whose number `epochs` may say.

    A batch has `train.batch_size` queries for each of so many processes.

    Raises:
        RecipeError: no data set, or no step.
        DataError: see `load_dataset` and `BatchPlan`.
    """
    if not recipe.data:
        raise RecipeError("data: expected at least one data set, got none")
    if recipe.train.steps == 0:
        raise RecipeError("train.steps: expected at least 1, got 0; only pe.transfer does without training")
    datasets = [load_training_set(item) for item in recipe.data]
    for dataset in datasets:
        console.print(str(dataset.report), highlight=False)
    train = recipe.train
    weights, size = [item.weight for item in recipe.data], train.batch_size * processes
    if train.epochs is None:
        steps = train.total_steps
    else:
        steps = steps_of(train.epochs, datasets, weights, size, train.seed)
        console.print(f"train.epochs = {train.epochs}: {steps:,} steps", highlight=False)
    return BatchPlan(datasets, weights, steps, size, train.seed, recipe.loss.hard_negatives)


def describe(model: PromptEmbedder) -> str:
    """Trainable and frozen parameter counts, and what the alignment starts from."""
    trained = {name: sum(p.numel() for p in group) for name, group in model.trainable_parameters().items()}
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    parts = ", ".join(f"{name} {count:,}" for name, count in trained.items())
    return f"trainable {sum(trained.values()):,} ({parts}), frozen {frozen:,}; alignment: {model.alignment.report}"


def mesh_of(recipe: Recipe, accelerator: Accelerator) -> DeviceMesh | None:
    """The processes of which each holds a part of the backbone; None: each holds the whole.

    Raises:
        RecipeError: there is one process alone.
    """
    if not recipe.train.shard_backbone:
        return None
    if accelerator.num_processes == 1:
        raise RecipeError(
            "train.shard_backbone: expected several processes, which share the backbone, got one; start them by"
            " accelerate launch or torchrun, or give --train.shard_backbone=false"
        )
    return init_device_mesh(accelerator.device.type, (accelerator.num_processes,))


def build_model(
    recipe: Recipe, plan: BatchPlan, device: torch.device, mesh: DeviceMesh | None = None
) -> PromptEmbedder:
    """The untrained embedder under the recipe's seed, which knows the instructions it will be trained under.

    Raises:
        FileNotFoundError, UnsupportedBackbone, UnsupportedPrompter: see `PromptEmbedder.from_config`.
        RecipeError: see `check_widths`.
    """
    set_seed(recipe.train.seed)
    model = PromptEmbedder.from_config(recipe.model, device, mesh)
    model.instructions = trained_instructions(recipe.data) | first_wordings(plan.datasets)
    model.training_sets = training_sets(recipe.data)
    model.start(instructions_of(plan))
    check_widths(recipe, model)
    return model


def start_run(
    run: RunFolder, recipe: Recipe, model: PromptEmbedder, processes: int, *, resume: bool, fresh: bool
) -> list[str]:
    """Make the run's folder, or check that the run in it goes on under the same conditions; notes for its user.

    Raises:
        RunError: see `RunFolder.start`.
    """
    contents = {"backbone": model.backbone.revision, "prompter": model.prompter.revision}
    contents["backbone's tokenizer"] = model.backbone.text_tokenizer.behaviour
    contents["prompter's tokenizer"] = model.prompter.text_tokenizer.behaviour
    return run.start(recipe, resume=resume, fresh=fresh, conditions=conditions_of(recipe, processes, **contents))


def train(
    recipe: Recipe, *, resume: bool = False, fresh: bool = False, store: TextStore | None = None
) -> dict[str, Scores]:
    """One whole run: data, model, scores before, training, scores after, saved model.

    Of several processes each ends soon after one that ends before its time (see `pe/runs/peers.py`).

    Args:
        recipe: what it is made of.
        resume, fresh: see `RunFolder.start`.
        store: a text store that is open already, in place of the recipe's.

    Returns:
        scores of the trained model and, with `evaluate.before`, of the frozen mean-pooled backbone and the untrained
        prompt; empty without tasks, and on all processes but the main one, which alone scores.

    Raises:
        RecipeError, EvaluationError, DataError, RunError, FileNotFoundError: before the run's folder is touched.
        TrainingError: see `fit`.
    """
    accelerator, run = build_accelerator(recipe), RunFolder(recipe.output)
    with watching(accelerator, "pe.train", lambda: run.going_on):
        scores = train_on(accelerator, recipe, run, resume=resume, fresh=fresh, store=store)
    accelerator.end_training()
    return scores


def train_on(
    accelerator: Accelerator, recipe: Recipe, run: RunFolder, *, resume: bool, fresh: bool, store: TextStore | None
) -> dict[str, Scores]:
    """See `train`."""
    is_main, count = accelerator.is_main_process, accelerator.num_processes
    console = Console(stderr=True, quiet=not is_main)
    mesh = mesh_of(recipe, accelerator)
    check_evaluation(recipe.evaluate)
    planned = (run.began_with() if resume else None) or count
    plan = build_plan(recipe, console, planned)
    if planned != count:
        queries = f"{plan.batch_size:,} queries a step"
        console.print(f"the batches stay those of {planned} processes, {queries}, now on {count}", highlight=False)
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=plan.steps, epochs=None))
    model = build_model(recipe, plan, accelerator.device, mesh)
    model.name = run.path.name
    with stored_texts(model, plan, recipe.train, accelerator, store) as texts:
        if is_main:
            for note in start_run(run, recipe, model, planned, resume=resume, fresh=fresh):
                console.print(note, highlight=False)
        accelerator.wait_for_everyone()
        start_trackers(accelerator, recipe, run)
        console.print(describe(model), highlight=False)
        scores = run_training(model, plan, recipe, accelerator, run, console, resume=resume)
        if texts is not None:
            console.print(str(texts), highlight=False)
    return scores


def run_training(
    model: PromptEmbedder,
    plan: BatchPlan,
    recipe: Recipe,
    accelerator: Accelerator,
    run: RunFolder,
    console: Console,
    *,
    resume: bool,
) -> dict[str, Scores]:
    """Of a run whose folder is there: scores before, training, scores after, saved model; the scores."""
    is_main, has_tasks = accelerator.is_main_process, bool(recipe.evaluate.tasks)
    is_scoring = has_tasks and takes_part(accelerator, model)
    measure, scores = measurer(recipe), dict[str, Scores]()
    if is_scoring and recipe.evaluate.before:
        scores["frozen backbone, mean"] = measure(FrozenEncoder(model.backbone, max_length=recipe.model.max_length))
        scores["untrained prompt"] = measure(model)
    accelerator.wait_for_everyone()
    evaluate = (lambda: chosen(measure(model), recipe.evaluate.best_by)) if has_tasks else None
    try:
        history = fit(model, plan, recipe, accelerator, run, resume=resume, evaluate=evaluate)
    except KeyboardInterrupt:
        console.print(f"interrupted; {run.going_on}", highlight=False)
        raise
    console.print(history.summary, highlight=False)
    tell_memory(model, history, accelerator, console)
    if early := early_end(history, recipe.train):
        console.print(early, highlight=False)
    weights = best_of(history, recipe.evaluate.best_by)
    if weights:
        console.print(weights, highlight=False)
    tell(history.spread, console)
    if is_scoring:
        scores["trained"] = measure(model)
    if is_main:
        write_scores(run.path / "scores.json", scores)
        taken = len(history.losses)
        card = model_card(recipe, model, history.seconds, scores, history.spread, steps=taken, weights=weights)
        model.save_pretrained(run.model, card=card)
        write_yaml(recipe, run.model / "recipe.yaml")
        console.print(f"saved {run.model}", highlight=False)
    return scores if is_main else {}


def split_arguments(argv: Sequence[str]) -> tuple[Path, list[str], bool, bool]:
    """Recipe, overrides, --resume, --fresh."""
    rest = [word for word in argv if word not in ("--resume", "--fresh")]
    recipe = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else DEFAULT_RECIPE
    return recipe, rest, "--resume" in argv, "--fresh" in argv


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; bad input ends with one message and exit code 2."""
    quiet()
    arguments = sys.argv[1:] if argv is None else list(argv)
    if "-h" in arguments or "--help" in arguments:
        print(__doc__)
        build_parser(Recipe).print_help()
        return
    recipe, overrides, resume, fresh = split_arguments(arguments)
    with user_errors("pe.train", TrainingError):
        scores = train(load_recipe(recipe, overrides), resume=resume, fresh=fresh)
    if scores:
        Console().print(comparison(scores))


if __name__ == "__main__":
    main()

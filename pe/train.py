"""`python -m pe.train [RECIPE.yaml] [--resume | --fresh] [--section.option=value ...]`

Trains the prompting LLM, the alignment and, where there are any, reader and skip, by a contrastive loss; the backbone
stays frozen. Without a recipe it runs `recipes/tiny.yaml`. `--resume` continues the run in the recipe's output folder,
`--fresh` moves that run aside first.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object, set_seed
from rich.console import Console
from torch import Tensor, nn
from tqdm.auto import tqdm

from pe.ahead import ReadAhead
from pe.backbone import Backbone
from pe.baselines.frozen import FrozenEncoder
from pe.batches import Batch, BatchPlan
from pe.card import model_card
from pe.cli import user_errors
from pe.config import EvaluateConfig, Recipe, RecipeError, TrainConfig, to_dict
from pe.evaluate import Scores, check_instructions, comparison, find_tasks, score
from pe.files import write_text
from pe.instruct_set import first_wordings, load_training_set
from pe.instructions import trained_instructions
from pe.loading import quiet, warn_of_slow_products
from pe.losses import backward, batch_requests, instructions_of, random_state, set_random_state
from pe.model import PromptEmbedder, Requests, Texts, Truncation
from pe.prompted import PromptedEmbedder
from pe.recipes import build_parser, load_recipe, write_yaml
from pe.runs import RunFolder, conditions_of, flatten
from pe.spread import Spread, spread
from pe.tasks import TASKS

if TYPE_CHECKING:  # mteb is an extra: training without tasks does without it
    from pe.integrations.mteb import TextEncoder

DEFAULT_RECIPE = Path(__file__).parent.parent / "recipes" / "tiny.yaml"
CHECK_STEPS = 5


class TrainingError(RuntimeError):
    """Training that cannot go on: no gradient, unchanged outputs, or a loss that is not a number."""


class Trainable(Protocol):
    """What `fit` trains: a PromptEmbedder or a baseline."""

    truncation: Truncation

    @property
    def backbone(self) -> Backbone: ...
    def __call__(self, requests: Requests) -> Tensor: ...
    def tokenized(self, requests: Requests) -> Requests: ...
    def train(self, mode: bool = True) -> nn.Module: ...
    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]: ...
    def trainable_state(self) -> dict[str, Tensor]: ...
    def load_trainable_state(self, state: dict[str, Tensor]) -> None: ...


@dataclass
class History:
    """What a run went through.

    Attributes:
        losses: by step.
        scores: (steps done, training seconds, mean score) of every evaluation while training.
        spreads: (steps done, fields of `Spread`) at every checkpoint of a run.
        seconds: training time, evaluations left out.
        texts, truncated: texts read on this process, and how many of them were cut to the token limit.
        tokens, padded: their tokens, and the tokens of the same batches with padding.
    """

    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float, float]] = field(default_factory=list)
    spreads: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    seconds: float = 0.0
    texts: int = 0
    truncated: int = 0
    tokens: int = 0
    padded: int = 0

    @property
    def spread(self) -> Spread | None:
        """How alike instructions are to the model at the last checkpoint; None without one, or of fewer than two."""
        return Spread(**self.spreads[-1][1]) if self.spreads else None

    @property
    def padding_share(self) -> float:
        """The share of a padded batch that packing leaves out."""
        return 1 - self.tokens / self.padded if self.padded else 0.0

    def count(self, step: StepTexts) -> None:
        """Note a step's texts, their tokens, how many were cut, and what a padded batch would hold."""
        lengths = [len(row) for row in step.requests.read or ()]
        self.texts += len(lengths)
        self.truncated += step.truncated
        self.tokens += sum(lengths)
        self.padded += len(lengths) * max(lengths)


class StepTexts:
    """A step's batch and its texts, tokenised once: when they are first asked for."""

    def __init__(self, model: Trainable, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.truncated = 0

    @functools.cached_property
    def requests(self) -> Requests:
        """The batch's texts as the model reads them; `truncated` says from then on how many were cut."""
        before = self.model.truncation.cut
        requests = self.model.tokenized(batch_requests(self.batch))
        self.truncated = self.model.truncation.cut - before
        return requests


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
    """Train for `recipe.train.steps` steps.

    Until it returns no other thread may use the model, nor anything else on its backbone (see `pe/turns.py`).

    Args:
        model: trains in place.
        plan: the batch of every step.
        recipe: loss and training options.
        accelerator: device, precision, processes, trackers.
        run: where checkpoints go; None: nowhere.
        resume: start from the run's newest checkpoint.
        evaluate: the mean score now; called every `eval_every` steps.

    Raises:
        TrainingError: a part without gradient, outputs that stay the same, a loss or embeddings that are not finite.
        RunError: a checkpoint cannot be written.
        BeingTrained: another thread trains it.
    """
    with model.backbone.turns.training():
        return _fit(model, plan, recipe, accelerator, run, resume, evaluate)


def _fit(
    model: Trainable,
    plan: BatchPlan,
    recipe: Recipe,
    accelerator: Accelerator,
    run: RunFolder | None,
    resume: bool,
    evaluate: Callable[[], float] | None,
) -> History:
    options, history = recipe.train, History()
    parts = model.trainable_parameters()
    parameters = [p for group in parts.values() for p in group]
    fused = accelerator.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameter_groups(parts, options), weight_decay=options.weight_decay, fused=fused)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, functools.partial(rate, options=options))
    first = 0
    if resume and run:
        first = restore(run, model, optimizer, scheduler, history, accelerator)
    probe = batch_requests(plan.batch(0)).part(range(2))
    before = detached(model, probe)
    ahead = None
    if isinstance(model, PromptedEmbedder):
        model.use_graphs(options.cuda_graphs)
        if options.read_ahead and model.config.layout == "suffix" and options.micro_batch_size is None:
            ahead = ReadAhead(model, accelerator.autocast)

    def texts_of(step: int) -> StepTexts:
        return StepTexts(model, plan.batch(step, accelerator.process_index, accelerator.num_processes))

    def embed(requests: Requests) -> Tensor:
        if ahead is None:
            return embeddings_of(model, recipe.loss.stepwise, requests)
        embeddings = embeddings_of(model, recipe.loss.stepwise, ahead.take(requests))
        if following:
            ahead.start(following.requests)
        return embeddings

    following = None
    bar = tqdm(total=options.steps, initial=first, desc="train", disable=not accelerator.is_main_process)
    try:
        for step in range(first, options.steps):
            started = time.perf_counter()
            model.train()
            texts = following or texts_of(step)
            following = texts_of(step + 1) if ahead and step + 1 < options.steps else None
            loss = backward(embed, texts.batch, recipe.loss, accelerator, options.micro_batch_size, texts.requests)
            loss = average(loss, parameters, accelerator)
            check_gradients(parts, loss, step)
            norm = torch.nn.utils.clip_grad_norm_(parameters, options.clip_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            history.losses.append(loss.item())
            history.seconds += time.perf_counter() - started
            history.count(texts)
            if step + 1 == first + CHECK_STEPS and torch.equal(detached(model, probe), before):
                raise TrainingError(
                    f"step {step + 1}: the embeddings are what they were at the start; check the rates (lr)"
                )
            bar.update()
            if (step + 1) % options.log_every == 0:
                recent = sum(history.losses[-options.log_every :]) / options.log_every
                bar.set_postfix(loss=f"{recent:.3f}", tokens_per_s=f"{history.tokens / history.seconds:,.0f}")
                values = {"loss": recent, "gradient_norm": float(norm), "rate": scheduler.get_last_lr()[0]}
                accelerator.log(values | {"tokens_per_second": history.tokens / history.seconds}, step=step + 1)
            if evaluate and options.eval_every and (step + 1) % options.eval_every == 0:
                history.scores.append((step + 1, history.seconds, evaluate()))
                accelerator.log({"score": history.scores[-1][2]}, step=step + 1)
            if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
                if not detached(model, probe).isfinite().all():
                    raise TrainingError(f"step {step + 1}: the embeddings are not finite; lower the rates (lr)")
                if run and isinstance(model, PromptedEmbedder) and (found := spread_of(model, plan)):
                    history.spreads.append((step + 1, asdict(found)))
                    accelerator.log({"instructions_alike": found.embeddings}, step=step + 1)
                if run:
                    states = gather_object([random_state()])
                    if accelerator.is_main_process:
                        save(run, step + 1, model, optimizer, scheduler, history, states, options.keep_checkpoints)
    finally:
        bar.close()
        if isinstance(model, PromptedEmbedder):
            model.use_graphs(False)
    return history


def spread_of(model: PromptedEmbedder, plan: BatchPlan) -> Spread | None:
    """How alike the training instructions are to the model, on queries of the first batch."""
    wanted = [item.text for item in instructions_of(plan) if item.side == "query"]
    return spread(model, wanted, plan.batch(0).queries)


def tell(found: Spread | None, console: Console) -> None:
    """Print how alike instructions are, and a warning where they are not followed."""
    if found is not None:
        console.print(str(found), highlight=False)
        if found.is_alike:
            console.print(f"warning: {found.warning}", highlight=False)


def average(loss: Tensor, parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> Tensor:
    """The loss as the mean of all processes, and in place each gradient."""
    if accelerator.num_processes == 1:
        return loss
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
    mean: Tensor = accelerator.reduce(loss.detach(), "mean")
    return mean


def embeddings_of(model: Trainable, stepwise: bool, requests: Requests | Texts) -> Tensor:
    """`[S, B, D]`: all soft-token steps for the step-wise loss, else the last alone."""
    if isinstance(model, PromptedEmbedder):
        return model.stepwise(requests) if stepwise else model(requests)[None]
    assert isinstance(requests, Requests)
    assert not stepwise
    return model(requests)[None]


def parameter_groups(parts: dict[str, list[nn.Parameter]], options: TrainConfig) -> list[dict[str, object]]:
    """One group a part with its own peak rate."""
    rates = {name: getattr(options, f"{name}_lr") for name in ("alignment", "reader", "skip", "lens")}
    return [
        {"params": group, "lr": options.lr if (own := rates.get(name)) is None else own, "name": name}
        for name, group in parts.items()
    ]


def rate(step: int, options: TrainConfig) -> float:
    """Share of the peak rate at a step: linear warm-up, then the schedule down to zero."""
    warm = max(1, round(options.warmup * options.steps))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, options.steps - warm)
    return {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[options.schedule]


def check_gradients(parts: dict[str, list[nn.Parameter]], loss: Tensor, step: int) -> None:
    """Raise TrainingError for a loss that is not finite, or at the first step a part that nothing reaches."""
    if not torch.isfinite(loss):
        raise TrainingError(f"step {step + 1}: the loss is {loss.item()}; lower the rates, or check the data")
    if step == 0 and not parts:
        raise TrainingError("nothing to train: no parameter requires a gradient")
    if step == 0 and not loss:
        raise TrainingError(
            "step 1: the loss is 0, no query has a negative; expected a batch of at least two documents that differ in"
            " text and label (train.batch_size, data)"
        )
    for name, group in parts.items() if step == 0 else ():
        if not any(p.grad is not None and bool(p.grad.any()) for p in group):
            raise TrainingError(f"step 1: no parameter of the {name} got a gradient; it would not train")


@torch.no_grad()
def detached(model: Trainable, requests: Requests) -> Tensor:
    model.train(False)
    return model(requests).clone()


def save(
    run: RunFolder,
    step: int,
    model: Trainable,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    history: History,
    random_states: list[list[Tensor]],
    keep: int,
) -> None:
    """Write a checkpoint; `random_states` are those of every process."""
    state = {
        "step": step,
        "model": model.trainable_state(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "history": vars(history),
        "random_states": random_states,
    }
    run.save_checkpoint(step, state, keep)


def restore(
    run: RunFolder,
    model: Trainable,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    history: History,
    accelerator: Accelerator,
) -> int:
    """Put the newest checkpoint back; the number of steps done."""
    state = run.load_checkpoint(accelerator.device)
    model.load_trainable_state(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    vars(history).update(state["history"])
    if "random_states" in state:
        set_random_state(state["random_states"][accelerator.process_index])
    else:  # of a checkpoint that kept the main process's CPU state alone
        set_random_state([state["random_state"]])
    return int(state["step"])


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Device, precision and TensorBoard by accelerate; `auto` is bfloat16 on a GPU that has it."""
    precision = recipe.train.precision
    if precision == "auto":
        has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bfloat16" if has_bf16 else "float32"
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bfloat16" else "no",
        log_with="tensorboard",
        project_dir=str(Path(recipe.output) / "logs"),
    )
    if precision == "bfloat16":
        warn_of_slow_products("train.precision", torch.bfloat16, accelerator.device)
    return accelerator


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


def write_scores(path: Path, scores: Mapping[str, Scores]) -> None:
    values = {name: found.to_dict() for name, found in scores.items()}
    write_text(path, json.dumps(values, indent=2))


def build_plan(recipe: Recipe, console: Console) -> BatchPlan:
    """Read the data sets, report what became of every row, and plan the batches.

    Raises:
        RecipeError: no data set, or no step.
        DataError: see `load_dataset` and `BatchPlan`.
    """
    if not recipe.data:
        raise RecipeError("data: expected at least one data set, got none")
    if not recipe.train.steps:
        raise RecipeError("train.steps: expected at least 1, got 0; only pe.transfer does without training")
    datasets = [load_training_set(item) for item in recipe.data]
    for dataset in datasets:
        console.print(str(dataset.report), highlight=False)
    train = recipe.train
    weights = [item.weight for item in recipe.data]
    return BatchPlan(datasets, weights, train.steps, train.batch_size, train.seed, recipe.loss.hard_negatives)


def describe(model: PromptEmbedder) -> str:
    """Trainable and frozen parameter counts, and what the alignment starts from."""
    trained = {name: sum(p.numel() for p in group) for name, group in model.trainable_parameters().items()}
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    parts = ", ".join(f"{name} {count:,}" for name, count in trained.items())
    return f"trainable {sum(trained.values()):,} ({parts}), frozen {frozen:,}; alignment: {model.alignment.report}"


def train(recipe: Recipe, *, resume: bool = False, fresh: bool = False) -> dict[str, Scores]:
    """One whole run: data, model, scores before, training, scores after, saved model.

    Returns:
        scores of the frozen mean-pooled backbone, the untrained prompt and the trained model; empty without tasks.

    Raises:
        RecipeError, EvaluationError, DataError, RunError, FileNotFoundError: before the run's folder is touched.
        TrainingError: see `fit`.
    """
    accelerator = build_accelerator(recipe)
    console = Console(stderr=True, quiet=not accelerator.is_main_process)
    run = RunFolder(recipe.output)
    check_evaluation(recipe.evaluate)
    plan = build_plan(recipe, console)
    set_seed(recipe.train.seed)
    model = PromptEmbedder.from_config(recipe.model, accelerator.device)
    model.name = run.path.name
    model.instructions = trained_instructions(recipe.data) | first_wordings(plan.datasets)
    model.start_lens(instructions_of(plan))
    check_widths(recipe, model)
    if accelerator.is_main_process:
        contents = {"backbone": model.backbone.revision, "prompter": model.prompter.revision}
        contents["backbone's tokenizer"] = model.backbone.text_tokenizer.behaviour
        contents["prompter's tokenizer"] = model.prompter.text_tokenizer.behaviour
        conditions = conditions_of(recipe, accelerator.num_processes, **contents)
        for note in run.start(recipe, resume=resume, fresh=fresh, conditions=conditions):
            console.print(note, highlight=False)
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tensorboard", {key: str(value) for key, value in flatten(to_dict(recipe)).items()})
    console.print(describe(model), highlight=False)

    measure, scores = measurer(recipe), {}
    if recipe.evaluate.tasks:
        scores["frozen backbone, mean"] = measure(FrozenEncoder(model.backbone, max_length=recipe.model.max_length))
        scores["untrained prompt"] = measure(model)
    evaluate = (lambda: measure(model).mean) if recipe.evaluate.tasks else None
    try:
        history = fit(model, plan, recipe, accelerator, run, resume=resume, evaluate=evaluate)
    except KeyboardInterrupt:
        kept = f"--resume goes on from {run.checkpoints[-1].name}" if run.checkpoints else "no checkpoint was due yet"
        console.print(f"interrupted; {kept}", highlight=False)
        raise
    accelerator.end_training()
    console.print(
        f"{len(history.losses)} steps in {history.seconds:.0f} s, {history.tokens / history.seconds:,.0f} tokens/s,"
        f" {history.padding_share:.0%} padding left out,"
        f" {history.truncated:,} of {history.texts:,} texts truncated",
        highlight=False,
    )
    tell(history.spread, console)
    if recipe.evaluate.tasks:
        scores["trained"] = measure(model)
    if accelerator.is_main_process:
        write_scores(run.path / "scores.json", scores)
        model.save_pretrained(run.model, card=model_card(recipe, model, history.seconds, scores, history.spread))
        write_yaml(recipe, run.model / "recipe.yaml")
        console.print(f"saved {run.model}", highlight=False)
    return scores


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
    if scores and PartialState().is_main_process:
        Console().print(comparison(scores))


if __name__ == "__main__":
    main()

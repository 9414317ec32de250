"""What a run does about steps that cannot be taken: losses and gradients that are not finite, and too little memory."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pe.config import Recipe
from pe.model import PromptEmbedder
from pe.runs.folder import RunFolder
from pe.step import Step, TrainingError
from pe.train import History, fit
from tests.training import accelerator, new_model, plan_of

Spoil = Callable[[Tensor], Tensor]


def spoilt_loss(embeddings: Tensor) -> Tensor:
    return embeddings * torch.nan


def spoilt_gradient(embeddings: Tensor) -> Tensor:
    embeddings = embeddings * 1.0
    embeddings.register_hook(lambda gradient: gradient * torch.inf)
    return embeddings


def spoiling(model: PromptEmbedder, steps: Collection[int], spoil: Spoil, first: int = 1) -> PromptEmbedder:
    """The model, whose embeddings are spoilt in some of the steps that begin with step `first`."""
    whole, done = model.forward, first - 1

    def forward(requests: Any) -> Tensor:
        nonlocal done
        embeddings = whole(requests)
        done += model.training
        return spoil(embeddings) if model.training and done in steps else embeddings

    model.forward = forward  # type: ignore[method-assign]
    return model


def started(recipe: Recipe, folder: Path) -> RunFolder:
    run = RunFolder(folder)
    run.start(recipe, resume=False, fresh=False)
    return run


def assert_same(one: PromptEmbedder, other: PromptEmbedder) -> None:
    states = one.trainable_state(), other.trainable_state()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("spoil", [spoilt_loss, spoilt_gradient])
def test_a_step_that_is_not_finite_changes_nothing_but_the_rate(recipe: Recipe, spoil: Spoil) -> None:
    """Also the first one, which finds the optimiser without a state."""
    plan, model = plan_of(recipe), spoiling(new_model(recipe), {1, 3}, spoil)
    step = Step(model, recipe.loss, recipe.train, accelerator(), is_tolerant=True)
    for number in range(4):
        before = {name: value.clone() for name, value in model.trainable_state().items()}
        moments = [value.clone() for state in step.optimizer.state.values() for value in state.values()]
        taken = step(plan.batch(number))
        is_same = all(torch.equal(before[name], value) for name, value in model.trainable_state().items())
        assert is_same is (number in (0, 2)) is not taken.is_finite
        if not taken.is_finite:
            after = [value for state in step.optimizer.state.values() for value in state.values()]
            assert all(map(torch.equal, moments, after))
            assert len(moments) == len(after)
        assert step.done == number + 1
        assert all(parameter.grad is None for parameter in step.parameters)
    plain = Step(spoiling(new_model(recipe), {1}, spoil), recipe.loss, recipe.train, accelerator())
    with pytest.raises(TrainingError, match=r"step 1: the loss is .* the norm of the gradients .*; lower the rates"):
        plain(plan.batch(0))


def test_a_skipped_step_is_counted_told_and_its_batch_kept(recipe: Recipe, tmp_path: Path, capsys: Any) -> None:
    plan, run = plan_of(recipe), started(recipe, tmp_path / "r")
    model = spoiling(new_model(recipe), {2, 3, 5}, spoilt_loss)
    history = fit(model, plan, recipe, accelerator(), run)
    assert history.skipped == [2, 3, 5]
    assert "6 steps, 3 of them skipped" in history.summary
    assert "step 5: the loss is nan and the norm of the gradients nan, expected finite" in capsys.readouterr().err
    names = [f"step-{number:06d}-process-0.json" for number in (2, 3, 5)]
    assert sorted(path.name for path in run.faults.iterdir()) == names
    found = json.loads((run.faults / names[0]).read_text(encoding="utf-8"))
    batch = plan.batch(1)
    assert (found["step"], found["loss"]) == (2, "nan")
    assert {name: found[name] for name in ("queries", "documents", "instructions", "asked", "dataset")} == {
        name: getattr(batch, name) for name in ("queries", "documents", "instructions", "asked", "dataset")
    }
    assert all(value.isfinite().all() for value in model.trainable_state().values())


@pytest.mark.parametrize("steps", [(1, 2, 3), (4, 5, 6)])
def test_three_in_a_row_end_the_run(recipe: Recipe, tmp_path: Path, steps: Sequence[int]) -> None:
    run = started(recipe, tmp_path / "r")
    ends = rf"^step {steps[-1]}: the loss is nan .*\(the batch: {run.faults}\); 3 steps in a row were skipped$"
    with pytest.raises(TrainingError, match=ends):
        fit(spoiling(new_model(recipe), steps, spoilt_loss), plan_of(recipe), recipe, accelerator(), run)
    assert [path.name for path in run.checkpoints] == ([] if steps[0] == 1 else ["step-000003.pt"])
    if steps[0] == 1:
        (run.path / "writing-abc").mkdir()  # of a process that was killed as it wrote
        run.start(recipe, resume=False, fresh=False)
        assert {path.name for path in run.path.iterdir()} == {"checkpoints", "recipe.yaml", "writing-abc"}


def test_a_run_with_skipped_steps_resumes_to_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    whole = spoiling(new_model(recipe), {2, 3, 5}, spoilt_loss)
    fit(whole, plan_of(recipe), recipe, accelerator())
    run = interrupted(recipe, tmp_path / "r", spoiling(new_model(recipe), {2, 3}, spoilt_loss))
    resumed = spoiling(new_model(recipe), {5}, spoilt_loss, first=4)
    history = fit(resumed, plan_of(recipe), recipe, accelerator(), run, resume=True)
    assert history.skipped == [2, 3, 5]
    assert_same(whole, resumed)
    again = spoiling(new_model(recipe), {4}, spoilt_loss, first=4)
    run = interrupted(recipe, tmp_path / "s", spoiling(new_model(recipe), {2, 3}, spoilt_loss))
    with pytest.raises(TrainingError, match="3 steps in a row"):
        fit(again, plan_of(recipe), recipe, accelerator(), run, resume=True)


def interrupted(recipe: Recipe, folder: Path, model: PromptEmbedder) -> RunFolder:
    """A run that ended after its fourth step, with a checkpoint of the third."""

    def stop() -> float:
        raise KeyboardInterrupt

    run = started(recipe, folder)
    stopping = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, eval_every=4))
    with pytest.raises(KeyboardInterrupt):
        fit(model, plan_of(recipe), stopping, accelerator(), run, evaluate=stop)
    return run


# Memory.


class Allocator(TorchDispatchMode):
    """Refuses tensors above a size, with the words of torch's own allocator.

    Attributes:
        largest: bytes of the largest tensor that was made.
        refused: how often.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.largest, self.refused = limit, 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and tensor._base is None:
                self.largest = max(self.largest, tensor.nbytes)
                if tensor.nbytes > self.limit:
                    self.refused += 1
                    torch.empty(1 << 60, dtype=torch.uint8)
        return made


def train_within(
    recipe: Recipe, limit: int, run: RunFolder | None = None, *, resume: bool = False
) -> tuple[PromptEmbedder, History, Allocator]:
    """A training under an allocator that refuses more than `limit` bytes at once."""
    model = new_model(recipe)
    with Allocator(limit) as allocator:
        history = fit(model, plan_of(recipe), recipe, accelerator(), run, resume=resume)
    return model, history, allocator


ANY = 1 << 40


@pytest.fixture
def long(recipe: Recipe) -> Recipe:
    """The recipe with texts so long that their activations are the largest tensors of a step."""
    templates = recipe.model.templates
    filled = dataclasses.replace(templates.query, text="word " * 10 + "{text}")
    texts = dataclasses.replace(templates, query=filled, document=filled)
    model = dataclasses.replace(recipe.model, templates=texts, max_length=60)
    return dataclasses.replace(recipe, model=model, train=dataclasses.replace(recipe.train, batch_size=8))


def test_out_of_memory_halves_the_micro_batch_and_the_run_goes_on(long: Recipe, tmp_path: Path, capsys: Any) -> None:
    _, expected, allocator = train_within(long, ANY)
    run = started(long, tmp_path / "r")
    _, history, refusing = train_within(long, allocator.largest * 2 // 3, run)
    assert refusing.refused == 1
    said = capsys.readouterr().err
    assert "step 1: out of memory; from now on micro batches of 4 queries, of the same loss" in said
    assert history.losses[0] == pytest.approx(expected.losses[0], rel=1e-6)
    assert history.losses == pytest.approx(expected.losses, rel=1e-3), "AdamW magnifies a last digit"
    assert (history.skipped, history.texts, history.tokens) == ([], expected.texts, expected.tokens)
    assert run.load_checkpoint(torch.device("cpu"))["micro_batch_size"] == 4


def test_a_run_that_was_short_of_memory_resumes_to_the_same_bytes(long: Recipe, tmp_path: Path) -> None:
    """With dropout, whose random numbers a repeated step draws again; the resumed run begins with the halved size."""
    lora = dataclasses.replace(long.model.reader_lora, dropout=0.1)
    long = dataclasses.replace(long, model=dataclasses.replace(long.model, reader_lora=lora))
    limit = train_within(long, ANY)[2].largest * 2 // 3
    whole, _, _ = train_within(long, limit)
    model = new_model(long)
    with Allocator(limit):
        run = interrupted(long, tmp_path / "r", model)
    resumed, _, refusing = train_within(long, limit, run, resume=True)
    assert refusing.refused == 0
    assert_same(whole, resumed)


def test_memory_for_less_than_a_query_ends_the_run(long: Recipe) -> None:
    model, batch = new_model(long), plan_of(long).batch(0)
    tolerant = Step(model, long.loss, long.train, accelerator(), is_tolerant=True)
    with (
        Allocator(1 << 12),
        pytest.raises(TrainingError, match=r"step 1: out of memory with one query at a time .*; give"),
    ):
        tolerant(batch)
    assert tolerant.micro_batch_size == 1
    plain = Step(model, long.loss, long.train, accelerator())
    with Allocator(1 << 12), pytest.raises(RuntimeError, match="can't allocate memory"):
        plain(batch)

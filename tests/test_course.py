"""How long a run goes and which weights it ends with: epochs, the best checkpoint, early stopping, a longer run."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pe.config import Recipe, RecipeError, TrainConfig
from pe.data.batches import BatchPlan, steps_of
from pe.runs.folder import RunError, RunFolder
from pe.runs.recipes import load_recipe
from pe.train import History, early_end, fit, main
from tests.tiny import write_rows
from tests.training import accelerator, new_model, plan_of, write_recipe


def with_options(recipe: Recipe, best_by: str | None = None, **options: Any) -> Recipe:
    evaluate = dataclasses.replace(recipe.evaluate, tasks=("own/dev.csv",), best_by=best_by)
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, **options), evaluate=evaluate)


def run_in(folder: Path, recipe: Recipe) -> RunFolder:
    run = RunFolder(folder)
    run.start(recipe, resume=False, fresh=False)
    return run


class Scripted:
    """Gives scores in turn, and keeps a copy of the weights that had each."""

    def __init__(self, model: Any, *scores: float) -> None:
        self.model, self.left = model, list(scores)
        self.weights: list[dict[str, torch.Tensor]] = []

    def __call__(self) -> float:
        self.weights.append({name: value.clone() for name, value in self.model.trainable_state().items()})
        return self.left.pop(0)


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


# Epochs


@pytest.mark.parametrize("weights", [(1.0, 1.0), (5.0, 1.0), (0.2, 1.0)])
@pytest.mark.parametrize("epochs", [1, 3])
def test_an_epoch_has_every_row_of_every_set(recipe: Recipe, weights: tuple[float, ...], epochs: int) -> None:
    data = [dataclasses.replace(item, weight=share) for item, share in zip(recipe.data, weights, strict=True)]
    train = dataclasses.replace(recipe.train, steps=None, epochs=epochs)
    plan = plan_of(dataclasses.replace(recipe, data=data, train=train))

    def least_seen(steps: int) -> int:
        seen: list[Counter[int]] = [Counter(dict.fromkeys(range(len(dataset)), 0)) for dataset in plan.datasets]
        for step in range(steps):
            seen[plan.sets[step]].update(plan.rows(step)[1].tolist())
        return min(count for rows in seen for count in rows.values())

    assert least_seen(plan.steps) >= epochs
    assert least_seen(plan.steps - 1) < epochs
    shorter = BatchPlan(plan.datasets, weights, plan.steps, plan.batch_size, plan.seed)
    np.testing.assert_array_equal(shorter.sets, plan.sets)
    alone = steps_of(epochs, plan.datasets[:1], [1.0], 40, 0)
    assert alone == epochs, "40 rows, 40 queries a step"


def test_processes_share_an_epoch(recipe: Recipe) -> None:
    plan = plan_of(recipe)
    assert steps_of(1, plan.datasets[:1], [1.0], 10, 0) == 2 * steps_of(1, plan.datasets[:1], [1.0], 20, 0)


def test_steps_and_epochs_are_not_given_together(tiny_models: Path, tmp_path: Path) -> None:
    assert TrainConfig().total_steps == 200
    with pytest.raises(RecipeError, match=r"train.steps: expected null beside `epochs`, which say how many, got 6"):
        load_recipe(write_recipe(tiny_models, tmp_path), ["--train.epochs=2"])
    found = load_recipe(tmp_path / "recipe.yaml", ["--train.epochs=2", "--train.steps=null"])
    assert (found.train.steps, found.train.epochs) == (None, 2)
    with pytest.raises(RecipeError, match="expected a number of steps, got 2 epochs"):
        _ = found.train.total_steps
    with pytest.raises(RecipeError, match=r"train.epochs: expected at least 1, or null, got 0"):
        TrainConfig(epochs=0)


# The best weights, and when to stop


def test_the_best_weights_are_the_last(recipe: Recipe, tmp_path: Path) -> None:
    chosen, model = with_options(recipe, "own/dev.csv", eval_every=2, steps=7), new_model(recipe)
    scores = Scripted(model, 1.0, 5.0, 5.0, 2.0)
    history = fit(model, plan_of(chosen), chosen, accelerator(), run_in(tmp_path / "r", chosen), evaluate=scores)
    assert [(step, score) for step, _, score in history.scores] == [(2, 1.0), (4, 5.0), (6, 5.0), (7, 2.0)]
    assert same(model.trainable_state(), scores.weights[1])
    assert not same(model.trainable_state(), scores.weights[2])
    last = RunFolder(tmp_path / "r").load_checkpoint(torch.device("cpu"))
    assert (last["step"], same(last["model"], scores.weights[3])) == (7, True)


def test_patience_ends_a_run_and_a_resumed_one(recipe: Recipe, tmp_path: Path) -> None:
    chosen, model = with_options(recipe, "mean", eval_every=1, patience=2, save_every=100), new_model(recipe)
    run, scores = run_in(tmp_path / "r", chosen), Scripted(model, 1.0, 3.0, float("nan"), 2.0)
    history = fit(model, plan_of(chosen), chosen, accelerator(), run, evaluate=scores)
    assert len(history.losses) == 4
    assert early_end(history, chosen.train) == (
        "stopped after 4 of 6 steps: the last 2 scores were no better (train.patience)"
    )
    assert early_end(History(losses=[1.0] * 6), chosen.train) == ""
    assert same(model.trainable_state(), scores.weights[1])
    assert [path.name for path in run.checkpoints] == ["step-000004.pt"]
    again = new_model(recipe)
    nothing = Scripted(again)
    assert len(fit(again, plan_of(chosen), chosen, accelerator(), run, resume=True, evaluate=nothing).losses) == 4
    assert same(again.trainable_state(), scores.weights[1])
    more = with_options(chosen, "mean", patience=4)
    (*notes,) = run.start(more, resume=True, fresh=False)
    assert notes == []
    history = fit(again, plan_of(more), more, accelerator(), run, resume=True, evaluate=Scripted(again, 4.0, 1.0))
    assert [score for _, _, score in history.scores][-2:] == [4.0, 1.0]


def test_scores_that_are_no_numbers_are_the_worst() -> None:
    history = History(scores=[(1, 0.0, float("nan")), (2, 0.0, 1.0), (3, 0.0, 1.0), (4, 0.0, 0.0)])
    assert history.best == 1
    assert (history.is_over(2), history.is_over(3), history.is_over(None)) == (True, False, False)
    assert not History().is_over(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--evaluate.best_by=mean"], "evaluate.best_by: expected null without evaluate.tasks, got 'mean'"),
        (
            ["--evaluate.tasks=[STS17]", "--evaluate.best_by=STS12"],
            "evaluate.best_by: expected one of STS17, mean, got 'STS12'",
        ),
        (
            ["--evaluate.tasks=[STS17]", "--evaluate.best_by=mean"],
            "train.eval_every: expected 1 or more with evaluate.best_by",
        ),
        (["--train.patience=2"], "train.patience: expected null without evaluate.best_by, got 2"),
    ],
)
def test_options_that_would_not_be_used(tiny_models: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(tiny_models, tmp_path), options)


# A longer run


def test_a_longer_run_has_its_batches_and_rates(recipe: Recipe, tmp_path: Path) -> None:
    """Constant rates: then the extended run is bitwise the one that was longer from its start."""
    short = with_options(recipe, schedule="constant", warmup=0.0, steps=3)
    longer = with_options(short, steps=6)
    whole, run = new_model(recipe), run_in(tmp_path / "r", short)
    fit(whole, plan_of(longer), longer, accelerator())
    fit(new_model(recipe), plan_of(short), short, accelerator(), run)
    with pytest.raises(RunError, match=r"train.steps may .*changed: train.steps \(was 3, now 2\)|only train.steps"):
        run.start(with_options(short, steps=2), resume=True, fresh=False)
    notes = run.start(longer, resume=True, fresh=False)
    assert notes == ["extended from 3 to 6 steps: from the next step on the rates are those of a run of 6 steps"]
    resumed = new_model(recipe)
    fit(resumed, plan_of(longer), longer, accelerator(), run, resume=True)
    assert same(resumed.trainable_state(), whole.trainable_state())


def test_the_first_new_step_has_the_rate_of_the_longer_schedule(recipe: Recipe, tmp_path: Path) -> None:
    short = with_options(recipe, schedule="linear", warmup=0.0, steps=3)
    run = run_in(tmp_path / "r", short)
    fit(new_model(recipe), plan_of(short), short, accelerator(), run)
    before = run.load_checkpoint(torch.device("cpu"))
    assert before["optimizer"]["param_groups"][0]["lr"] == 0
    longer = with_options(short, steps=4)
    resumed = new_model(recipe)
    fit(resumed, plan_of(longer), longer, accelerator(), run, resume=True)
    after = run.load_checkpoint(torch.device("cpu"))
    assert not same(after["model"], before["model"]), "a step at the old rate, 0, would change nothing"


def test_a_run_by_epochs_on_its_own_dev_set(
    tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mteb")
    rows = [{"query": f"{word} 1?", "positive": f"the {word} number 1"} for word in ("river", "moon", "bread")]
    dev = str(write_rows(tmp_path / "dev.jsonl", *rows))
    evaluate = {"tasks": [dev], "instructions": {dev: "Find the same thing"}, "best_by": dev, "before": False}
    train = {"epochs": 1, "batch_size": 20, "eval_every": 2, "save_every": 100, "lr": 0.003}
    path = str(write_recipe(tiny_models, tmp_path, evaluate=evaluate, train=train))
    main([path])
    said = capsys.readouterr().err
    assert "train.epochs = 1: " in said
    assert "steps, the best by dev.jsonl: " in " ".join(said.split())
    assert "steps, the best by dev.jsonl: " in (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")
    steps = load_recipe(tmp_path / "run" / "recipe.yaml").train.steps
    assert steps is not None
    assert steps >= 4
    main([path, "--resume", "--train.epochs=2"])
    assert f"extended from {steps} to " in " ".join(capsys.readouterr().err.split())

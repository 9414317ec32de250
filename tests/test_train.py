"""Training: the loss, its cached gradient, several processes, resuming, and what stops a run."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from tqdm.auto import tqdm

from pe import step as stepping
from pe import train as training
from pe.baselines.linear import LinearEmbedder
from pe.baselines.lora import Form, LoraBaselineConfig, LoraEmbedder
from pe.config import LossConfig, Recipe, RecipeError, TrainConfig
from pe.data.batches import Batch, BatchPlan
from pe.evaluate import Scores, TaskScore
from pe.losses import backward, batch_requests, contrastive_loss, cut
from pe.method.loading import TextTokenizer
from pe.model import Instruction, PromptEmbedder, Requests
from pe.runs.cli import user_errors
from pe.runs.folder import RunError, RunFolder, conditions_of, flatten
from pe.runs.recipes import load_recipe
from pe.step import Step, Trainable, TrainingError, check, rate
from pe.train import History, fit, main, train
from tests.training import accelerator, new_model, plan_of, write_recipe


def gradients(model: PromptEmbedder) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_loss(embeddings: Tensor, batch: Batch, temperature: float) -> float:
    """InfoNCE with its masks, one pair of texts at a time."""
    count, losses = len(batch.queries), []
    queries, documents = embeddings[:count], embeddings[count:]
    for i in range(count):
        terms = []
        for j in range(len(documents)):
            same_label = batch.labels[i] >= 0 and batch.document_labels[0, j] == batch.labels[i]
            same_text = batch.document_ids[j] in (batch.document_ids[i], batch.query_ids[i])
            same_query = j < count and batch.query_ids[j] == batch.query_ids[i]
            if j == i or not (same_label or same_text or same_query):
                terms.append((queries[i] @ documents[j] / temperature).double())
        losses.append(torch.logsumexp(torch.stack(terms), 0) - (queries[i] @ documents[i] / temperature).double())
    return torch.stack(losses).mean().item()


def test_loss_equals_the_plain_one_and_masks_labels(recipe: Recipe) -> None:
    plan = plan_of(recipe)
    batches = (plan.batch(int(step)) for step in np.flatnonzero(plan.sets == 1))
    batch = next(batch for batch in batches if (np.bincount(batch.labels) > 1).any())
    embeddings = torch.nn.functional.normalize(torch.randn(len(batch.queries) + len(batch.documents), 16), dim=-1)
    config = LossConfig(temperature=0.1)
    got = contrastive_loss(embeddings, batch, config, accelerator()).item()
    assert got == pytest.approx(plain_loss(embeddings, batch, 0.1), rel=1e-5)
    unmasked = dataclasses.replace(config, mask_false_negatives=False)
    assert contrastive_loss(embeddings, batch, unmasked, accelerator()).item() > got + 1e-3


def test_other_positives_of_a_query_are_none_of_its_negatives(recipe: Recipe) -> None:
    plan = plan_of(recipe)
    batch = next(batch for batch in map(plan.batch, range(plan.steps)) if (batch.labels < 0).all())
    twice = dataclasses.replace(batch, query_ids=batch.query_ids.copy())
    twice.query_ids[1] = twice.query_ids[0]
    embeddings = torch.nn.functional.normalize(torch.randn(len(batch.queries) + len(batch.documents), 16), dim=-1)
    config = LossConfig(temperature=0.02)
    losses = [contrastive_loss(embeddings, one, config, accelerator()).item() for one in (batch, twice)]
    assert losses[1] == pytest.approx(plain_loss(embeddings, twice, 0.02), rel=1e-5)
    assert losses[1] < losses[0]


def test_matryoshka_is_a_mean(recipe: Recipe) -> None:
    batch = plan_of(recipe).batch(0)
    count = len(batch.queries) + len(batch.documents)
    embeddings = torch.nn.functional.normalize(torch.randn(count, 16), dim=-1)
    config = LossConfig(matryoshka=(4,), temperature=0.1)
    single = LossConfig(temperature=0.1)
    expected = [contrastive_loss(cut(embeddings, width), batch, single, accelerator()).item() for width in (16, 4)]
    got = contrastive_loss(embeddings, batch, config, accelerator()).item()
    assert got == pytest.approx(np.mean(expected), rel=1e-5)
    with pytest.raises(ValueError, match=r"matryoshka: expected sizes up to 16.*\[99\]"):
        contrastive_loss(embeddings, batch, LossConfig(matryoshka=(99,)), accelerator())


@pytest.mark.parametrize("micro", [1, 4])
def test_cached_gradient_equals_the_whole_batch(recipe: Recipe, micro: int) -> None:
    batch = plan_of(recipe).batch(0)
    found = []
    for size in (None, micro):
        model = new_model(recipe).eval()
        loss = backward(model, batch, recipe.loss, accelerator(), size)
        found.append((loss.item(), gradients(model)))
    (loss, whole), (cached_loss, cached) = found
    assert cached_loss == pytest.approx(loss, rel=1e-5)
    assert whole.keys() == cached.keys()
    scale = max(g.norm().item() for g in whole.values())
    assert all((whole[name] - cached[name]).norm().item() < 1e-4 * scale for name in whole)


def test_cached_gradient_replays_dropout(tiny_models: Path, tmp_path: Path) -> None:
    path = write_recipe(tiny_models, tmp_path, model__reader_lora={"rank": 2, "alpha": 8, "dropout": 0.5})
    recipe = load_recipe(path)
    batch = plan_of(recipe).batch(0)
    model = new_model(recipe).train()
    seen: list[Tensor] = []

    def embed(requests: object) -> Tensor:
        seen.append(model(requests))  # type: ignore[arg-type]
        return seen[-1]

    torch.manual_seed(1)
    backward(embed, batch, recipe.loss, accelerator(), 3)
    half = len(seen) // 2
    assert half > 1
    assert all(torch.equal(a, b) for a, b in zip(seen[:half], seen[half:], strict=True))
    assert not torch.equal(model(batch_requests(batch)), model(batch_requests(batch))), "dropout does not act"


def test_training_lowers_the_loss_and_changes_every_part(recipe: Recipe) -> None:
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=25, save_every=25))
    model = new_model(recipe)
    before = {name: value.clone() for name, value in model.trainable_state().items()}
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    history = fit(model, plan_of(recipe), recipe, accelerator())
    assert np.mean(history.losses[-5:]) < 0.7 * np.mean(history.losses[:5])
    assert all(not torch.equal(before[name], value) for name, value in model.trainable_state().items())
    assert all(torch.equal(frozen[n], p) for n, p in model.named_parameters() if not p.requires_grad)
    assert 0 < history.padding_share < 1
    assert history.texts == sum(len(batch_requests(plan_of(recipe).batch(step)).texts) for step in range(25))
    assert history.truncated == 0
    assert history.tokens > 0


class Counting:
    """A tokenizer that notes how many texts it was given."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer, self.given = tokenizer, 0

    def __call__(self, texts: Sequence[str], *, lead: bool = True) -> list[list[int]]:
        self.given += len(texts)
        return self.tokenizer(texts, lead=lead)


def counted(model: Trainable, plan: BatchPlan, recipe: Recipe) -> History:
    """What `fit` counts, from every batch tokenised on its own."""
    expected = History()
    for step in range(recipe.train.steps):
        model.truncation.cut = 0
        read = model.tokenized(batch_requests(plan.batch(step)), recipe.train.max_length).read or ()
        lengths = list(map(len, read))
        expected.texts += len(lengths)
        expected.truncated += model.truncation.cut
        expected.tokens += sum(lengths)
        expected.padded += len(lengths) * max(lengths)
    return expected


SYSTEMS: dict[str, Callable[[Recipe], Trainable]] = {
    "ours": lambda recipe: new_model(recipe),
    "linear": lambda recipe: LinearEmbedder.from_config(recipe.model.backbone, max_length=recipe.model.max_length),
    "lora, padded": lambda recipe: lora_of(recipe, "padded"),
    "lora, packed": lambda recipe: lora_of(recipe, "packed"),
}


def lora_of(recipe: Recipe, form: Form) -> Trainable:
    options = LoraBaselineConfig(backbone=recipe.model.backbone, form=form, max_length=recipe.model.max_length)
    return LoraEmbedder.from_config(options)


@pytest.mark.parametrize(
    ("system", "options"),
    [
        ("ours", {}),
        ("ours", {"max_length": 14}),
        ("ours", {"micro_batch_size": 4, "max_length": 14}),
        ("ours", {"read_ahead": True, "max_length": 14}),
        ("linear", {"max_length": 14}),
        ("lora, padded", {"max_length": 14}),
        ("lora, packed", {"micro_batch_size": 4}),
    ],
)
def test_a_step_tokenises_each_text_once_and_counts_that(
    recipe: Recipe, system: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a text goes through the model twice, is read before its step, or an evaluation comes in between."""
    changed = dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, max_length=16),
        train=dataclasses.replace(recipe.train, eval_every=2, save_every=100, **options),
    )
    model, plan = SYSTEMS[system](changed), plan_of(changed)
    expected = counted(model, plan, changed)
    assert 0 < expected.truncated < expected.texts
    tokenizer = Counting(model.backbone.text_tokenizer)
    monkeypatch.setattr(model.backbone, "text_tokenizer", tokenizer)
    monkeypatch.setattr(training, "detached", lambda model, requests: torch.rand(2))
    probe = batch_requests(plan.batch(0))

    def evaluate() -> float:
        before = tokenizer.given
        model(probe)
        tokenizer.given = before
        return 0.0

    history = fit(model, plan, changed, accelerator(), evaluate=evaluate)
    for name in ("texts", "truncated", "tokens", "padded"):
        assert getattr(history, name) == getattr(expected, name), name
    instructions = tokenizer.given - expected.texts
    assert instructions == (recipe.train.steps if "lora" in system else 0), "LoRA reads the query's, once a step"


def test_texts_are_cut_further_in_training_alone(recipe: Recipe) -> None:
    """The same weights as with a model that reads no more, and afterwards the whole text is read."""
    short = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, max_length=6))
    cut = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, max_length=6))
    models = [new_model(short), new_model(cut)]
    for model, own in zip(models, (short, cut), strict=True):
        fit(model, plan_of(own), own, accelerator())
    expected, found = (model.trainable_state() for model in models)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    text = "the man in the red house walks to the river and back again"
    before, after = (len(model.tokenize(Requests([text], [Instruction("a")], [0]))[0]) for model in models)
    assert before == 6 < after


def test_tokenising_is_part_of_the_time(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, model = [0.0], new_model(recipe)
    monkeypatch.setattr(training.time, "perf_counter", lambda: seconds[0])
    whole = model.readings

    def slow(requests: Requests, at_most: int | None = None) -> list[list[int]]:
        seconds[0] += 1.0
        return whole(requests, at_most)

    monkeypatch.setattr(model, "readings", slow)
    assert fit(model, plan_of(recipe), recipe, accelerator()).seconds == recipe.train.steps


class Generators:
    """What torch says of the random generators of two GPUs that are not here."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 2) -> None:
        self.states = [torch.full((16,), number, dtype=torch.uint8) for number in range(1, count + 1)]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(self.states))
        monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [state.clone() for state in self.states])
        monkeypatch.setattr(torch.cuda, "set_rng_state_all", self.put)

    def put(self, states: Sequence[Tensor]) -> None:
        assert len(states) <= len(self.states), "torch knows no such GPU"
        self.states[: len(states)] = states


def test_resuming_restores_every_random_state(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, gpus = RunFolder(tmp_path / "r"), Generators(monkeypatch)
    run.start(recipe, resume=False, fresh=False)
    shorter = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=3))
    fit(new_model(recipe), plan_of(recipe), shorter, accelerator(), run)
    cpu = torch.get_rng_state()
    torch.manual_seed(99)
    gpus.states = [torch.zeros(16, dtype=torch.uint8) for _ in range(2)]
    model = new_model(recipe)
    fit(model, plan_of(recipe), shorter, accelerator(), run, resume=True)
    assert torch.equal(torch.get_rng_state(), cpu)
    assert [state.tolist() for state in gpus.states] == [[1] * 16, [2] * 16]

    gpus.states = [torch.zeros(16, dtype=torch.uint8)]  # a machine with fewer of them
    fit(model, plan_of(recipe), shorter, accelerator(), run, resume=True)
    assert gpus.states[0].tolist() == [1] * 16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fit(model, plan_of(recipe), shorter, accelerator(), run, resume=True)


def test_every_process_gets_its_own_random_state_back(recipe: Recipe, tmp_path: Path) -> None:
    run, model = RunFolder(tmp_path / "r"), new_model(recipe)
    run.start(recipe, resume=False, fresh=False)
    states = [[torch.Generator().manual_seed(seed).get_state()] for seed in (1, 2)]
    training.save(run, Step(model, recipe.loss, recipe.train, accelerator()), History(), states)
    for number, (state,) in enumerate(states):
        cpu = torch.device("cpu", 0)  # as accelerate has it
        process = SimpleNamespace(device=cpu, process_index=number, is_main_process=number == 0)
        step = Step(model, recipe.loss, recipe.train, cast(Accelerator, process))
        training.restore(run, step, History())
        assert torch.equal(torch.get_rng_state(), state)


def test_a_checkpoint_of_before_keeps_its_one_random_state(recipe: Recipe, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r")
    run.start(recipe, resume=False, fresh=False)
    shorter = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=3))
    fit(new_model(recipe), plan_of(recipe), shorter, accelerator(), run)
    state = run.load_checkpoint(torch.device("cpu"))
    ((cpu,),) = state.pop("random_states")
    torch.save({**state, "random_state": cpu}, run.checkpoints[-1])
    torch.manual_seed(99)
    fit(new_model(recipe), plan_of(recipe), shorter, accelerator(), run, resume=True)
    assert torch.equal(torch.get_rng_state(), cpu)


def test_the_bar_is_closed_when_training_stops(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    bars = []

    def bar(**options: Any) -> object:
        bars.append(tqdm(**options))
        return bars[-1]

    monkeypatch.setattr(training, "tqdm", bar)
    fit(new_model(recipe), plan_of(recipe), recipe, accelerator())
    monkeypatch.setattr(stepping, "check", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(new_model(recipe), plan_of(recipe), recipe, accelerator())
    assert [bar.disable for bar in bars] == [True, True], "a closed bar is one that is off"


def test_resume_is_bitwise_the_uninterrupted_run(recipe: Recipe, tmp_path: Path) -> None:
    whole = new_model(recipe)
    fit(whole, plan_of(recipe), recipe, accelerator())
    run = RunFolder(tmp_path / "interrupted")
    run.start(recipe, resume=False, fresh=False)

    class StoppedError(Exception):
        pass

    def stop_at_four() -> float:
        raise StoppedError

    stopping = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, eval_every=4))
    with pytest.raises(StoppedError):
        fit(new_model(recipe), plan_of(recipe), stopping, accelerator(), run, evaluate=stop_at_four)
    assert [path.name for path in run.checkpoints] == ["step-000003.pt"]
    resumed = new_model(recipe)
    history = fit(resumed, plan_of(recipe), recipe, accelerator(), run, resume=True)
    assert len(history.losses) == 6
    for name, value in whole.trainable_state().items():
        assert torch.equal(value, resumed.trainable_state()[name]), name


def test_checkpoints_are_pruned_and_atomic(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path / "r")
    run.start(recipe, resume=False, fresh=False)
    for step in (1, 2, 3):
        run.save_checkpoint(step, {"step": step}, keep=2)
    assert [path.name for path in run.checkpoints] == ["step-000002.pt", "step-000003.pt"]

    def stop(error: Exception, expected: type[Exception], message: str) -> None:
        def torn(state: object, path: Path) -> None:
            path.write_bytes(b"half")
            raise error

        monkeypatch.setattr(torch, "save", torn)
        with pytest.raises(expected, match=message):
            run.save_checkpoint(4, {"step": 4}, keep=2)

    refused = r"step-000004\.pt: the checkpoint cannot be written"
    stop(OSError("disk full"), RunError, rf"{refused}.*\(disk full\)")
    stop(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), RunError, refused)
    stop(torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError, "no memory")
    assert run.load_checkpoint(torch.device("cpu"))["step"] == 3
    assert not list((run.path / "checkpoints").glob("*.part"))


def test_a_run_is_never_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r")
    run.start(recipe, resume=False, fresh=False)
    with pytest.raises(RunError, match="nothing to resume"):
        run.start(recipe, resume=True, fresh=False)
    run.save_checkpoint(1, {"step": 1}, keep=1)
    with pytest.raises(RunError, match=r"--resume continues.*--fresh moves it aside"):
        run.start(recipe, resume=False, fresh=False)
    other = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, lr=0.5))
    with pytest.raises(RunError, match=r"train.lr \(was 0.003, now 0.5\)"):
        run.start(other, resume=True, fresh=False)
    run.start(other, resume=False, fresh=True)
    assert (tmp_path / "r.1" / "checkpoints" / "step-000001.pt").exists()
    assert load_recipe(run.path / "recipe.yaml") == other


def test_checkpoints_are_ordered_by_step(recipe: Recipe, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r")
    run.start(recipe, resume=False, fresh=False)
    for step in (999_999, 1_000_000):
        run.save_checkpoint(step, {"step": step}, keep=1)
    assert [path.name for path in run.checkpoints] == ["step-1000000.pt"]


def test_resume_compares_keys_of_both_recipes(recipe: Recipe, tmp_path: Path) -> None:
    run, longer = RunFolder(tmp_path / "r"), dataclasses.replace(recipe.loss, matryoshka=(16,))
    run.start(dataclasses.replace(recipe, loss=longer), resume=False, fresh=False)
    run.save_checkpoint(1, {"step": 1}, keep=1)
    with pytest.raises(RunError, match=r"changed: loss\.matryoshka\[0\] \(was 16, now absent\)"):
        run.start(recipe, resume=True, fresh=False)
    fewer = dataclasses.replace(recipe, data=recipe.data[:1], loss=longer)
    with pytest.raises(RunError, match=r"data\[1\]\.path \(was .*labelled\.jsonl, now absent\)"):
        run.start(fewer, resume=True, fresh=False)


def test_resume_needs_the_same_data_and_processes(recipe: Recipe, tmp_path: Path) -> None:
    run, data = RunFolder(tmp_path / "r"), Path(recipe.data[0].path)
    run.start(recipe, resume=False, fresh=False, conditions=conditions_of(recipe, 1))
    run.save_checkpoint(1, {"step": 1}, keep=1)
    run.start(recipe, resume=True, fresh=False, conditions=conditions_of(recipe, 1))
    with pytest.raises(RunError, match=r"changed: processes \(was 1, now 2\)"):
        run.start(recipe, resume=True, fresh=False, conditions=conditions_of(recipe, 2))
    data.write_text(data.read_text(encoding="utf-8").replace("moon", "noon"), encoding="utf-8")
    with pytest.raises(RunError, match=rf"changed: content of {data} \(was"):
        run.start(recipe, resume=True, fresh=False, conditions=conditions_of(recipe, 1))
    torch.save({"step": 1, "conditions": conditions_of(recipe, 1, backbone="a")}, run.checkpoints[-1])
    with pytest.raises(RunError, match=r"changed: content of the backbone \(was a, now b\)"):
        run.start(recipe, resume=True, fresh=False, conditions=conditions_of(recipe, 1, backbone="b"))
    torch.save({"step": 1}, run.checkpoints[-1])
    run.start(recipe, resume=True, fresh=False, conditions=conditions_of(recipe, 2))


def test_resume_and_fresh_together_move_nothing(recipe: Recipe, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r")
    run.start(recipe, resume=False, fresh=False)
    run.save_checkpoint(1, {"step": 1}, keep=1)
    with pytest.raises(RunError, match="--resume continues the run, --fresh moves it aside; expected one of them"):
        run.start(recipe, resume=True, fresh=True)
    assert len(run.checkpoints) == 1


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_resume_goes_back_to_the_newest_whole_checkpoint(recipe: Recipe, tmp_path: Path, share: float) -> None:
    run = RunFolder(tmp_path / "r")
    run.start(recipe, resume=False, fresh=False)
    for step in (1, 2):
        run.save_checkpoint(step, {"step": step, "model": {"w": torch.ones(1000)}}, keep=2)
    older, newest = run.checkpoints
    newest.write_bytes(newest.read_bytes()[: int(share * newest.stat().st_size)])
    with pytest.raises(RunError, match=r"step-000002\.pt: expected a checkpoint, got a file that cannot be read"):
        run.load_checkpoint(torch.device("cpu"))
    (note,) = run.start(recipe, resume=True, fresh=False)
    assert note.startswith(f"{newest}: expected a checkpoint")
    assert note.endswith("going on from step-000001.pt")
    assert run.load_checkpoint(torch.device("cpu"))["step"] == 1
    older.write_bytes(b"")
    with pytest.raises(RunError, match=r"step-000001\.pt.*\n.*no other checkpoint is left; --fresh starts anew"):
        run.start(recipe, resume=True, fresh=False)


def test_what_no_checkpoint_followed_blocks_nothing(recipe: Recipe, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r")
    run.start(recipe, resume=False, fresh=False)
    (run.path / "logs").mkdir()
    run.start(recipe, resume=False, fresh=False)
    (run.path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds files already"):
        run.start(recipe, resume=False, fresh=False)
    hand_written = RunFolder(tmp_path / "own")
    hand_written.path.mkdir()
    (hand_written.path / "recipe.yaml").write_text("output: own")
    with pytest.raises(RunError, match="holds files already"):
        hand_written.start(recipe, resume=False, fresh=False)


def test_a_run_that_was_moved_is_resumed(recipe: Recipe, tmp_path: Path) -> None:
    run = RunFolder(recipe.output)
    run.start(recipe, resume=False, fresh=False)
    run.save_checkpoint(1, {"step": 1}, keep=1)
    run.path.rename(tmp_path / "moved")
    moved = dataclasses.replace(recipe, output=str(tmp_path / "moved"))
    RunFolder(moved.output).start(moved, resume=True, fresh=False)
    assert load_recipe(tmp_path / "moved" / "recipe.yaml").output == moved.output


def test_the_run_of_a_move_is_not_resumed(recipe: Recipe, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r")
    run.start(recipe, resume=False, fresh=False, resumable=False)
    run.save_checkpoint(1, {"step": 1}, keep=1)
    with pytest.raises(RunError, match="holds files already; --fresh moves it aside"):
        run.start(recipe, resume=False, fresh=False, resumable=False)
    with pytest.raises(RunError, match=r"the run of a move \(pe.transfer\), which is never resumed"):
        run.start(recipe, resume=True, fresh=False)


def test_fresh_moves_neither_the_working_directory_nor_a_model(
    recipe: Recipe, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "r")
    shutil.copytree(tiny_models / "one", run.path / "backbone")
    backbone = dataclasses.replace(recipe.model.backbone, model=str(run.path / "backbone"))
    own = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, backbone=backbone))
    with pytest.raises(RunError, match=r"--fresh would move .*backbone, which the run starts from"):
        run.start(own, resume=False, fresh=True)
    monkeypatch.chdir(run.path)
    with pytest.raises(RunError, match="--fresh would move the working directory"):
        RunFolder(".").start(recipe, resume=False, fresh=True)
    assert (run.path / "backbone" / "config.json").exists()


def test_fresh_moves_a_link_and_not_what_it_points_to(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "notes.txt").write_text("mine")
    (tmp_path / "r").symlink_to("elsewhere")
    run = RunFolder(tmp_path / "r")
    run.start(recipe, resume=False, fresh=True)
    assert (tmp_path / "r.1" / "notes.txt").exists()
    assert sorted(path.name for path in run.path.iterdir()) == ["checkpoints", "recipe.yaml"]


def test_a_file_is_no_run_folder(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "r").write_text("precious")
    for fresh in (False, True):
        with pytest.raises(RunError, match="expected a folder, got a file"):
            RunFolder(tmp_path / "r").start(recipe, resume=False, fresh=fresh)
    assert (tmp_path / "r").read_text() == "precious"


def test_stops_when_a_part_gets_no_gradient(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model(recipe)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda requests: forward(requests).detach().requires_grad_())
    with pytest.raises(TrainingError, match="no parameter of the prompter got a gradient"):
        fit(model, plan_of(recipe), recipe, accelerator())


def test_stops_when_outputs_do_not_change(recipe: Recipe) -> None:
    tiny_rate = TrainConfig(steps=6, batch_size=6, lr=1e-30, weight_decay=0.0)
    with pytest.raises(TrainingError, match="the embeddings are what they were at the start"):
        fit(new_model(recipe), plan_of(recipe), dataclasses.replace(recipe, train=tiny_rate), accelerator())


def test_stops_when_nothing_trains(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model(recipe)
    with pytest.raises(TrainingError, match="step 1: the loss is 0, no query has a negative"):
        check(torch.tensor(0.0), {"skip": []}, 0)
    monkeypatch.setattr(model, "trainable_parameters", dict)
    with pytest.raises(TrainingError, match="nothing to train"):
        fit(model, plan_of(recipe), recipe, accelerator())


def test_a_diverged_model_is_not_saved(recipe: Recipe, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r")
    run.start(recipe, resume=False, fresh=False)
    diverging = dataclasses.replace(recipe, train=TrainConfig(steps=1, batch_size=6, lr=1e30, warmup=0.0))
    with pytest.raises(TrainingError, match="step 1: the embeddings are not finite; lower the rates"):
        fit(new_model(recipe), plan_of(recipe), diverging, accelerator(), run)
    assert not run.checkpoints


def test_ctrl_c_is_one_sentence(
    tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = iter(range(100))

    def interrupted(*arguments: object) -> Tensor:
        if next(steps) == 4:
            raise KeyboardInterrupt
        return backward(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stepping, "backward", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main([str(write_recipe(tiny_models, tmp_path))])
    assert stopped.value.code == 130
    error = capsys.readouterr().err
    assert "--resume goes on from step-000003.pt" in error
    assert "pe.train: interrupted" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(("schedule", "end"), [("linear", 0.0), ("cosine", 0.0), ("constant", 1.0)])
def test_rate_warms_up_and_decays(schedule: str, end: float) -> None:
    options = TrainConfig(steps=200, warmup=0.1, schedule=schedule)  # type: ignore[arg-type]
    values = [rate(step, options) for step in range(200)]
    assert values[0] == pytest.approx(0.05)
    assert max(values) == pytest.approx(1.0)
    assert values.index(max(values)) == 19
    assert values[-1] == pytest.approx(end, abs=0.01)
    assert values[-1] > 0


@pytest.mark.parametrize("before", [False, True])
def test_scores_before_training_may_be_left_out(
    tiny_models: Path, tmp_path: Path, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(encoder: Any) -> Scores:
        sides = {"instruction": "Find", "document_instruction": None}
        task = TaskScore(type="STS", metric="cosine_spearman", score=50.0, seconds=1.0, **sides)
        return Scores(model=encoder.name, revision="", tasks={"a task": task})

    monkeypatch.setattr("pe.train.check_evaluation", lambda options: None)
    monkeypatch.setattr("pe.train.measurer", lambda recipe: measure)
    recipe = write_recipe(tiny_models, tmp_path, evaluate={"tasks": ["a task"], "before": before})
    expected = ["frozen backbone, mean", "untrained prompt", "trained"] if before else ["trained"]
    assert list(train(load_recipe(recipe))) == expected
    assert list(json.loads((tmp_path / "run" / "scores.json").read_text(encoding="utf-8"))) == expected


def test_a_whole_run_writes_what_it_promises(tiny_models: Path, tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tiny_models, tmp_path))
    assert train(recipe) == {}
    run = RunFolder(tmp_path / "run")
    assert load_recipe(run.path / "recipe.yaml") == recipe
    assert list((run.path / "logs").rglob("events.*"))
    assert [path.name for path in run.checkpoints] == ["step-000003.pt", "step-000006.pt"]
    assert "Find the same thing" in (run.model / "README.md").read_text(encoding="utf-8")
    loaded = PromptEmbedder.from_pretrained(run.model)
    embeddings = loaded.encode(["the river", "moon"], instruction="Find the same thing")
    assert embeddings.shape == (2, 32)
    assert not list(run.model.glob("backbone*"))


def test_a_run_is_logged_where_it_is_asked(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network: MLflow has the figures of TensorBoard, and wandb a record to send later."""
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    names = ["tensorboard", "mlflow", "wandb"]
    recipe = load_recipe(write_recipe(tiny_models, tmp_path, train__log_with=names))
    train(recipe)
    logs = tmp_path / "run" / "logs"
    board = EventAccumulator(str(logs / "tensorboard")).Reload()
    client = mlflow.MlflowClient()
    (kept,) = client.search_runs([client.get_experiment_by_name("promptembedder").experiment_id])
    assert (kept.info.run_name, kept.data.params["train.steps"]) == ("run", "6")
    for name in ("loss", "rate", "gradient_norm"):
        expected = {event.step: event.value for event in board.Scalars(name)}
        found = {item.step: item.value for item in client.get_metric_history(kept.info.run_id, name)}
        assert list(found) == [2, 4, 6]
        assert found == pytest.approx(expected, rel=1e-6)
    (record,) = logs.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 30  # a process of wandb's own writes it, and may do so behind its run's end
    while b"gradient_norm" not in record.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"gradient_norm" in record.read_bytes()


def test_a_tracker_that_is_not_there(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    recipe = load_recipe(write_recipe(tiny_models, tmp_path, train__log_with=["mlflow"]))
    with pytest.raises(RecipeError, match=r"train\.log_with: mlflow is not installed: pip install mlflow-skinny"):
        train(recipe)
    assert not (tmp_path / "run").exists()
    train(dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, log_with=())))
    assert not list((tmp_path / "run" / "logs").iterdir())


def test_command_line(tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_recipe(tiny_models, tmp_path))
    main([path, "--train.steps=2"])
    main([path, "--train.steps=2", "--resume"])
    main([path, "--train.steps=2", "--fresh"])
    assert (tmp_path / "run.1").exists()
    for arguments, message in (
        ([path], "--fresh moves it aside"),
        ([path, "--train.stps=2"], "train.stps"),
        ([str(tmp_path / "absent.yaml")], "absent.yaml"),
        ([path, "--fresh", "--model.backbone.model=nowhere/at-all"], "nowhere/at-all: no model there"),
        ([path, "--fresh", "--data=[]"], "expected at least one data set"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    main(["--help"])
    assert "--train.steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--evaluate.tasks=[PE-Nothing]", "unknown task 'PE-Nothing'"),
        ("--evaluate.instructions={PE-Nothing: do it}", "instructions: no task 'PE-Nothing'"),
        ("--loss.matryoshka=[99]", "loss.matryoshka: expected sizes up to 32, the backbone's width, got [99]"),
        ("--train.steps=0", "train.steps: expected at least 1, got 0; only pe.transfer"),
    ],
)
def test_a_run_is_checked_before_its_folder_is_made(
    tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    evaluate = {"tasks": ["PE-STSb-dev"]} if "instructions" in option else {}
    path = str(write_recipe(tiny_models, tmp_path, evaluate=evaluate))
    with pytest.raises(SystemExit) as stopped:
        main([path, option])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["no weights", "half of the weights", "no folder"])
def test_a_damaged_backbone_ends_with_one_message(
    tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    backbone = tmp_path / "backbone"
    if damage != "no folder":
        shutil.copytree(tiny_models / "one", backbone)
        weights = backbone / "model.safetensors"
        content = weights.read_bytes()
        weights.unlink()
        if damage == "half of the weights":
            weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit) as stopped:
        main([str(write_recipe(tiny_models, tmp_path)), f"--model.backbone.model={backbone}"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "pe.train: " in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()


def test_what_is_not_the_users_fault_keeps_its_traceback() -> None:
    with pytest.raises(SystemExit), user_errors("pe.train", TrainingError):
        raise TrainingError("no gradient")
    with pytest.raises(RuntimeError, match="CUDA"), user_errors("pe.train", TrainingError):
        raise RuntimeError("CUDA error")


def test_bfloat16_is_chosen_where_the_hardware_has_it(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(training, "Accelerator", lambda **options: SimpleNamespace(**options))
    assert training.build_accelerator(recipe).mixed_precision == "no"


def test_default_recipe_and_flatten() -> None:
    recipe = load_recipe(training.DEFAULT_RECIPE)
    assert recipe.data
    assert all(Path(item.path).exists() for item in recipe.data)
    assert flatten({"a": [{"b": 1}], "c": 2}) == {"a[0].b": 1, "c": 2}
    assert json.dumps(training.to_dict(recipe))

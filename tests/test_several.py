"""Training by several processes: as one would, in parts of the backbone, and with an end when one of them ends."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pe.model import PromptEmbedder
from pe.runs.folder import RunError, RunFolder
from pe.runs.recipes import load_recipe
from pe.step import Step
from pe.sweep import main as sweep
from pe.train import History, restore, train
from pe.transfer import main as transfer
from tests.training import accelerator, new_model, write_recipe
from tests.two_processes import CASES, gradients, measuring

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Ended:
    """How a process ended: its code, what it wrote to stderr, and how long after process 1 that was."""

    code: int
    message: str
    seconds: float


def run_two(folder: Path, *command: str) -> list[Ended]:
    """Run a command of Python as both processes of a training."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    messages, started = [folder / f"stderr-{rank}.txt" for rank in range(2)], []
    for rank, file in enumerate(messages):
        with file.open("w") as stderr:
            env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(subprocess.Popen([sys.executable, *command], env=env, stderr=stderr))
    try:
        started[1].wait(timeout=300)
        before = time.monotonic()
        started[0].wait(timeout=120)
        seconds = time.monotonic() - before
    finally:
        for process in started:
            process.kill()
    codes = [process.wait() for process in started]
    return [Ended(code, file.read_text(), seconds) for code, file in zip(codes, messages, strict=True)]


@dataclass(frozen=True)
class Together:
    """What two processes found that ran `tests/two_processes.py`, and how they ended."""

    recipe: Path
    found: list[dict[str, Any]]
    ends: list[Ended]

    def run(self, name: str = "run") -> RunFolder:
        return RunFolder(self.recipe.parent / name)


@pytest.fixture(scope="module")
def together(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("two")
    options = {"train__steps": 4, "train__batch_size": 6, "train__eval_every": 2, "train__save_every": 2}
    path = write_recipe(tiny_models, folder, evaluate={"tasks": ["a task"]}, **options)
    ends = run_two(folder, "-m", "tests.two_processes", str(path), str(folder))
    assert len(list(folder.glob("of-*.pt"))) == 2, ends
    return Together(path, [torch.load(folder / f"of-{rank}.pt", weights_only=True) for rank in range(2)], ends)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradients_of_one(case: str, together: Together) -> None:
    options, size = CASES[case]
    expected = gradients(load_recipe(together.recipe, options), accelerator(), size)
    whole = expected.pop("bytes").item()
    scale = max(gradient.norm() for name, gradient in expected.items() if name != "loss")
    for own in (process[case] for process in together.found):
        share = own.pop("bytes").item() / whole
        assert share == pytest.approx(0.5 if "sharded" in case else 1.0, abs=0.02)
        assert own.keys() == expected.keys()
        assert own["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)
        assert all((own[name] - expected[name]).norm() < 1e-5 * scale for name in expected)


def test_one_process_scores_and_of_a_sharded_backbone_all(together: Together) -> None:
    main, other = together.found
    names = ["frozen backbone, mean", "untrained prompt", "trained"]
    assert [len(main["run"]["asked"]), len(other["run"]["asked"])] == [5, 0], "before, twice while training, at the end"
    assert [main["run"]["scores"], other["run"]["scores"]] == [names, []]
    assert main["run-sharded"]["asked"] == other["run-sharded"]["asked"]
    assert [main["run-sharded"]["scores"], other["run-sharded"]["scores"]] == [names, []]
    state = together.run().load_checkpoint(torch.device("cpu"))
    assert [score[::2] for score in state["history"]["scores"]] == [(2, 53.0), (4, 54.0)]


def same(first: RunFolder, second: RunFolder) -> None:
    """Two runs end with the same weights and losses, but for rounding."""
    before, after = (run.load_checkpoint(torch.device("cpu")) for run in (first, second))
    assert before["history"]["losses"] == pytest.approx(after["history"]["losses"], rel=1e-4)
    assert before["model"].keys() == after["model"].keys()
    for name, value in before["model"].items():
        torch.testing.assert_close(after["model"][name], value, rtol=1e-3, atol=1e-4)


def test_a_run_with_a_sharded_backbone_is_the_same(together: Together) -> None:
    runs = together.run(), together.run("run-sharded")
    same(*runs)
    one, two = (PromptEmbedder.from_pretrained(run.model).encode(["moon"], instruction="Find") for run in runs)
    assert abs(one - two).max() < 1e-4
    assert together.ends[0].message.count("Memory by process, MiB") == 2


def test_a_run_goes_on_with_another_number_of_processes(
    together: Together, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pe.train.check_evaluation", lambda options: None)
    monkeypatch.setattr("pe.train.measurer", lambda recipe: measuring([]))
    here = RunFolder(tmp_path / "run")
    shutil.copytree(together.run().path, here.path)
    here.checkpoints[-1].unlink()
    train(load_recipe(together.recipe, [f"--output={here.path}"]), resume=True)
    assert "the batches stay those of 2 processes, 12 queries a step, now on 1" in capsys.readouterr().err
    same(together.run(), here)
    assert here.began_with() == 2


def test_micro_batches_of_a_checkpoint_do_not_reach_a_sharded_backbone(together: Together, tmp_path: Path) -> None:
    here, recipe = RunFolder(tmp_path / "run"), load_recipe(together.recipe)
    shutil.copytree(together.run().path, here.path)
    state = here.load_checkpoint(torch.device("cpu"))
    torch.save({**state, "micro_batch_size": 2}, here.checkpoints[-1])
    model = new_model(recipe)
    model.backbone.is_sharded = True
    with pytest.raises(RunError, match=r"step-000004\.pt: expected a step of whole batches .* micro batches of 2"):
        restore(here, Step(model, recipe.loss, recipe.train, accelerator()), History())


def test_a_process_that_is_killed_ends_the_other(together: Together) -> None:
    other, killed = together.ends
    assert (killed.code, other.code) == (-9, 2)
    assert other.seconds < 60
    assert "pe.train: another of the 2 processes has ended before its time, so process 0 ends, too" in other.message
    assert "--resume goes on from step-000004.pt" in other.message
    assert "Traceback" not in other.message


FAILS = """
import torch
from types import SimpleNamespace
from pe.runs.peers import watching
torch.distributed.init_process_group("gloo")
place = torch.distributed.get_rank()
with watching(SimpleNamespace(process_index=place, num_processes=2), "pe.train", lambda: "advice"):
    if place == 1:
        raise ValueError("no memory here")
    torch.distributed.barrier()
"""


def test_a_process_that_fails_ends_one_that_waits(tmp_path: Path) -> None:
    waiting, failed = run_two(tmp_path, "-c", FAILS)
    assert failed.code == 1
    assert "no memory here" in failed.message
    assert (waiting.code, waiting.message.count("\n")) == (2, 2)
    assert "pe.train: process 1 of the 2 processes has ended before its time, so process 0 ends" in waiting.message
    assert waiting.message.endswith("advice\n")
    assert waiting.seconds < 60


def test_what_is_of_one_process_is_refused_to_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command, arguments in ((sweep, ["--train.lr", "1,2"]), (transfer, ["model", "--backbone", "other"])):
        with pytest.raises(SystemExit) as stopped:
            command(arguments)
        assert stopped.value.code == 2
        assert "expected one process, got 2 of torch.distributed" in capsys.readouterr().err

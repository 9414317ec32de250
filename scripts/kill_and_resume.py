"""`python scripts/kill_and_resume.py [RECIPE.yaml] [--kills 13] [--seed 0] [--section.option=value ...]`

Trains a recipe twice: once in peace, and once killed by SIGKILL at random moments and resumed each time. Both must end
in the same bytes: the saved model's tensors and the losses of every step. Without a recipe a tiny one is trained on the
models of this repository, with a checkpoint every second step.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from pe.runs.folder import RunFolder
from pe.runs.recipes import load_recipe
from pe.train import DEFAULT_RECIPE

ROOT = Path(__file__).parent.parent
TINY = [
    *("--train.steps=80", "--train.save_every=2", "--train.batch_size=8", "--train.eval_every=0"),
    *("--train.patience=null", "--evaluate.tasks=[]", "--evaluate.best_by=null"),
]
"""Of a training without a recipe."""
BEGINS = b"train: "
"""What stands before the progress of the steps."""


def command(recipe: Path, overrides: Sequence[str], output: Path, *, resume: bool) -> list[str]:
    """One training, in a process of its own."""
    words = [sys.executable, "-m", "pe.train", str(recipe), *overrides, f"--output={output}"]
    return [*words, "--resume"] if resume else words


def finish(words: Sequence[str]) -> None:
    """Train to the end."""
    subprocess.run(words, check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_after(words: Sequence[str], seconds: float) -> bool:
    """Begin to train, and kill the process so many seconds after its first step began; whether it was still at it."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = b""
    while BEGINS not in said and (more := cast(io.BufferedReader, process.stderr).read1()):
        said += more
    try:
        _, rest = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
    if process.returncode:
        last = ((said + rest).decode().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise RuntimeError(f"{' '.join(words)}: expected a training, got: {last}")
    return False


def outcome(run: RunFolder) -> dict[str, bytes | str]:
    """What two runs are compared by: the bytes of each weights file, and the losses."""
    state = run.load_checkpoint(torch.device("cpu"))
    found: dict[str, bytes | str] = {"losses": json.dumps(state["history"]["losses"])}
    files = sorted(run.model.rglob("*.safetensors"))
    return found | {str(file.relative_to(run.model)): file.read_bytes() for file in files}


def kill_and_resume(recipe: Path, overrides: Sequence[str], folder: Path, kills: int, seed: int) -> list[str]:
    """Train in peace and among kills; a line for each kill and for the end.

    Args:
        recipe, overrides: what is trained.
        folder: where both runs go.
        kills: how often the second run is killed, each time within `2 / (kills + 1)` of all steps.
        seed: of the moments.

    Raises:
        RuntimeError: the runs differ, or one failed.
    """
    whole, other = RunFolder(folder / "whole"), RunFolder(folder / "killed")
    finish(command(recipe, overrides, whole.path, resume=False))
    seconds = float(whole.load_checkpoint(torch.device("cpu"))["history"]["seconds"])
    moments, lines = random.Random(seed), [f"in peace: steps of {seconds:.1f} s"]
    for number in range(1, kills + 1):
        after = moments.uniform(0, 2 * seconds / (kills + 1))
        resume = bool(other.checkpoints)
        was_killed = kill_after(command(recipe, overrides, other.path, resume=resume), after)
        at = other.checkpoints[-1].stem if other.checkpoints else "no checkpoint"
        lines.append(f"kill {number}: after {after:.1f} s, {at}{'' if was_killed else ', it had ended'}")
    finish(command(recipe, overrides, other.path, resume=bool(other.checkpoints)))
    expected, got = outcome(whole), outcome(other)
    if different := sorted(name for name in expected | got if expected.get(name) != got.get(name)):
        raise RuntimeError(f"{folder}: expected the same bytes in both runs, got others in {', '.join(different)}")
    return [*lines, f"the same bytes: {', '.join(sorted(expected))}"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", type=Path, default=DEFAULT_RECIPE)
    parser.add_argument("--kills", type=int, default=13)
    parser.add_argument("--seed", type=int, default=0)
    given, overrides = parser.parse_known_args(argv)
    overrides = [*(TINY if given.recipe == DEFAULT_RECIPE else []), *overrides]
    load_recipe(given.recipe, overrides)
    with tempfile.TemporaryDirectory() as folder:
        for line in kill_and_resume(given.recipe, overrides, Path(folder), given.kills, given.seed):
            print(line)


if __name__ == "__main__":
    main()

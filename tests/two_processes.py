"""One of the two processes that `tests/test_several.py` starts: what they work out together, and how they end.

Each writes what it found to `OUT/of-RANK.pt`; then process 1 is killed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from pe import train as training
from pe.config import Recipe
from pe.evaluate import Scores, TaskScore
from pe.losses import backward
from pe.method.sharded import frozen_bytes
from pe.runs.folder import RunFolder
from pe.runs.peers import watching
from pe.runs.recipes import load_recipe
from pe.step import average
from pe.train import build_accelerator, mesh_of, train_on
from tests.training import new_model, plan_of

SHARDED = "--train.shard_backbone=true"
CASES: dict[str, tuple[list[str], int | None]] = {
    "even": ([], None),
    "uneven": (["--train.batch_size=5"], None),
    "uneven, cached": (["--train.batch_size=5"], 2),
    "sharded": ([SHARDED], None),
}
"""Options beside the recipe's, and queries at a time."""


def gradients(recipe: Recipe, accelerator: Accelerator, size: int | None) -> dict[str, Tensor]:
    """Loss and gradients of the first batch, of which this process has a part; and bytes of the frozen layers here."""
    mesh = mesh_of(recipe, accelerator) if accelerator.num_processes > 1 else None
    model = new_model(recipe, mesh).eval()
    batch = plan_of(recipe).batch(0, accelerator.process_index, accelerator.num_processes)
    loss = backward(model, batch, recipe.loss, accelerator, size)
    found = {"loss": average(loss, list(model.parameters()), accelerator)}
    found["bytes"] = torch.tensor(frozen_bytes(model.backbone.model.layers))  # type: ignore[arg-type]
    return found | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def measuring(asked: list[str]) -> Callable[[Any], Scores]:
    """In place of `pe.train.measurer`: scores by one more than the encoder before, and notes its name."""

    def measure(encoder: Any) -> Scores:
        encoder.encode(["the river"], instruction="Find")  # with a sharded backbone all must come here
        asked.append(encoder.name)
        sides = {"instruction": "Find", "document_instruction": None}
        task = TaskScore(type="STS", metric="cosine_spearman", score=50.0 + len(asked), seconds=1.0, **sides)
        return Scores(model=encoder.name, revision="", tasks={"a task": task})

    return measure


def trained(recipe: Recipe, accelerator: Accelerator) -> dict[str, list[str]]:
    """A whole run: what was scored here, and the names of the scores."""
    asked: list[str] = []
    training.check_evaluation = lambda options: None
    training.measurer = lambda recipe: measuring(asked)  # type: ignore[assignment]
    run = RunFolder(recipe.output)
    scores = train_on(accelerator, recipe, run, resume=False, fresh=False, store=None)
    return {"asked": asked, "scores": list(scores)}


def main() -> None:
    path, out = Path(sys.argv[1]), Path(sys.argv[2])
    recipe = load_recipe(path)
    accelerator = build_accelerator(recipe)
    with watching(accelerator, "pe.train", lambda: RunFolder(recipe.output).going_on):
        found: dict[str, Any] = {}
        for name, (options, size) in CASES.items():
            found[name] = gradients(load_recipe(path, options), accelerator, size)
        found["run"] = trained(recipe, accelerator)
        found["run-sharded"] = trained(load_recipe(path, [SHARDED, f"--output={recipe.output}-sharded"]), accelerator)
        torch.save(found, out / f"of-{accelerator.process_index}.pt")
        accelerator.wait_for_everyone()
        if accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(300)  # as one that waits in a GPU


if __name__ == "__main__":
    main()

"""`python -m scripts.soak [--steps 2000] [--output FILE.json]`

Takes many steps of the tests' tiny models with evaluations and checkpoints on the way, and says whether anything grows:
resident memory, open files, threads, the time of a step. Each is compared between the steps behind the warm-up and the
last ones; Ctrl-C compares those that were taken.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from pe.config import Recipe
from pe.losses import batch_requests
from pe.measure.meters import MIB
from pe.method.loading import quiet
from pe.runs.folder import RunFolder
from pe.runs.recipes import load_recipe
from pe.train import build_accelerator, build_model, build_plan, fit
from tests.tiny import save_models
from tests.training import write_recipe

WARM_UP = 200
"""Steps before what is compared: caches fill, and the allocator finds its size."""
EVERY = 20
"""Steps between evaluations, at each of which is measured; checkpoints are made at every fifth."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """The process at a step."""

    step: int
    resident_mib: float
    files: int
    threads: int
    step_ms: float


def soak(recipe: Recipe, samples: list[Sample]) -> None:
    """Train, and measure at every evaluation; `samples` grows."""
    options = dataclasses.replace(recipe.train, eval_every=EVERY, save_every=5 * EVERY, patience=None)
    evaluate = dataclasses.replace(recipe.evaluate, best_by=None, tasks=())
    recipe = dataclasses.replace(recipe, train=options, evaluate=evaluate)
    plan, process = build_plan(recipe, Console(quiet=True)), psutil.Process()
    accelerator = build_accelerator(recipe)
    model, run = build_model(recipe, plan, accelerator.device), RunFolder(recipe.output)
    run.start(recipe, resume=False, fresh=False)
    texts, began = batch_requests(plan.batch(0)).texts, time.perf_counter()

    def measure() -> float:
        """An evaluation, outside the time of the steps."""
        nonlocal began
        spent = (time.perf_counter() - began) / EVERY
        score = float(model.encode(texts, instruction=model.default_instruction())[0] @ model.encode(texts[:1])[0])
        memory = process.memory_info().rss / MIB
        step = EVERY * (len(samples) + 1)
        samples.append(Sample(step, round(memory, 1), process.num_fds(), process.num_threads(), round(1e3 * spent, 2)))
        began = time.perf_counter()
        return score

    fit(model, plan, recipe, accelerator, run, evaluate=measure)


def growth(samples: Sequence[Sample]) -> dict[str, Any]:
    """Medians of the fifth of the samples behind the warm-up and of the last fifth, and their ratio."""
    settled = [sample for sample in samples if sample.step >= WARM_UP] or list(samples)
    share = max(1, len(settled) // 5)
    found: dict[str, Any] = {"steps": samples[-1].step}
    for name in ("resident_mib", "files", "threads", "step_ms"):
        first, last = (
            statistics.median(getattr(sample, name) for sample in part) for part in (settled[:share], settled[-share:])
        )
        found[name] = {"first": first, "last": last, "ratio": round(last / first, 4)}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="JSON of every sample")
    given = parser.parse_args(argv)
    quiet()
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(KeyboardInterrupt):
        models = Path(folder) / "models"
        save_models(models)
        recipe = load_recipe(write_recipe(models, Path(folder)), [f"--train.steps={given.steps}"])
        soak(recipe, samples)
    print(json.dumps(growth(samples), indent=2))
    if given.output is not None:
        given.output.write_text(json.dumps([dataclasses.asdict(sample) for sample in samples]), encoding="utf-8")


if __name__ == "__main__":
    main()

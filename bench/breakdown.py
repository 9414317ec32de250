"""`python -m bench.breakdown [--cases tiny smollm2] [--steps N] [--rounds N] [--dry]`

Where the time of a training step goes: the first steps of a recipe, taken by `pe.step.Step` as `pe.train` takes them,
with every text read and with every text found in a store in memory. One thread of a CPU, in processor time, of which
nothing is lost to other processes but what they take of the caches.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import records
from bench.markdown import NOT_YET, grid, where
from bench.records import ROOT, Record
from pe.config import Recipe
from pe.data.batches import BatchPlan
from pe.losses import instructions_of
from pe.method.text_store import TextStore
from pe.model import PromptEmbedder
from pe.runs.recipes import load_recipe
from pe.step import Step
from pe.train import build_accelerator, build_plan

CASES = {"tiny": ROOT / "recipes" / "tiny.yaml", "smollm2": ROOT / "recipes" / "smollm2-135m.yaml"}
REST = "the rest"
HEAD, SOFT, BELOW = "backward: loss, lens, pooling", "backward: soft tokens", "backward: prompts, skip"
PARTS = (
    "making the batch",
    "tokenising",
    "texts, read or found",
    "writing the prompts",
    "soft tokens, forward",
    "pooling, skip, lens",
    "loss with its masks",
    HEAD,
    SOFT,
    BELOW,
    "clipping, AdamW, rates",
    REST,
)


class Clock:
    """Processor milliseconds by part; the time of a part within another one is its own alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._open, self._since = [REST], time.process_time()

    def _note(self) -> None:
        now, part = time.process_time(), self._open[-1]
        self.spent[part] = self.spent.get(part, 0.0) + 1000 * (now - self._since)
        self._since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._note()
        self._open.append(name)
        try:
            yield
        finally:
            self._note()
            self._open.pop()

    def go_on(self, name: str) -> None:
        """From now on what runs is another part, until the open one ends."""
        self._note()
        self._open[-1] = name

    def take(self) -> dict[str, float]:
        """What was spent since the last time."""
        self._note()
        found, self.spent = self.spent, {}
        return found


@contextlib.contextmanager
def charging(step: Step[PromptEmbedder], clock: Clock) -> Iterator[None]:
    """Inside it the clock knows which part of the step runs; the backward pass tells where it is by its gradients."""
    model = step.model
    assert model.skip is not None
    owners: list[tuple[Any, str, str]] = [
        (model, "tokenized", "tokenising"),
        (model.backbone, "read", "texts, read or found"),
        (model, "write_prompts", "writing the prompts"),
        (model, "prompt_states", "soft tokens, forward"),
        (model.skip, "pool", "pooling, skip, lens"),
        (step, "_embed", "pooling, skip, lens"),
        (step, "gradients", "loss with its masks"),
        (step.accelerator, "backward", HEAD),
        (step, "update", "clipping, AdamW, rates"),
    ]
    marks = {(model, "prompt_states"): SOFT, (model.backbone, "prompt_rows"): BELOW}

    def charged(plain: Callable[..., Any], part: str, *arguments: Any, **options: Any) -> Any:
        with clock.part(part):
            return plain(*arguments, **options)

    def marked(plain: Callable[..., Any], part: str, *arguments: Any, **options: Any) -> Any:
        made = plain(*arguments, **options)
        if made.requires_grad:
            made.register_hook(lambda _: clock.go_on(part))
        return made

    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, by: Callable[..., Any], part: str) -> None:
            before = vars(owner).get(name)
            setattr(owner, name, functools.partial(by, getattr(owner, name), part))
            stack.callback(delattr, owner, name) if before is None else stack.callback(setattr, owner, name, before)

        for owner, name, part in owners:
            replace(owner, name, charged, part)
        for (owner, name), part in marks.items():
            replace(owner, name, marked, part)
        yield


def take_steps(step: Step[PromptEmbedder], plan: BatchPlan, clock: Clock) -> dict[str, float]:
    """Milliseconds of each part of a step, the mean over the plan's steps."""
    clock.take()
    for number in range(plan.steps):
        with clock.part("making the batch"):
            batch = plan.batch(number)
        step(batch)
    return {part: spent / plan.steps for part, spent in clock.take().items()}


def measure(case: str, recipe: Recipe, rounds: int) -> list[Record]:
    """Records of a recipe's steps with its texts read, and with its texts found."""
    torch.manual_seed(recipe.train.seed)
    accelerator, plan = build_accelerator(recipe), build_plan(recipe, Console(quiet=True))
    model = PromptEmbedder.from_config(recipe.model)
    model.start(instructions_of(plan))
    step, clock = Step(model, recipe.loss, recipe.train, accelerator), Clock()
    tokens = [step(plan.batch(number)).tokens for number in range(plan.steps)]
    found = []
    with TextStore.open("memory") as store, charging(step, clock):
        for texts in ("read", "found"):
            with model.reading_from(store if texts == "found" else None):
                if texts == "found":
                    take_steps(step, plan, clock)
                taken = [take_steps(step, plan, clock) for _ in range(rounds)]
            common = {
                "case": case,
                "texts": texts,
                "device": "cpu",
                "dtype": str(model.backbone.dtype).removeprefix("torch."),
                "steps": plan.steps,
                "rounds": rounds,
                "tokens": round(sum(tokens) / len(tokens)),
                "queries": recipe.train.batch_size,
            }
            parts = {part: records.spread([round_[part] for round_ in taken]) for part in PARTS if part in taken[0]}
            found.append({**common, "ms": parts, "total": records.spread([sum(round_.values()) for round_ in taken])})
    return found


def rows_of(group: Sequence[Record]) -> list[list[str]]:
    """A row a part: milliseconds and share of a step that reads, then of one that finds."""

    def cells(part: str) -> list[str]:
        found = []
        for record in group:
            spent, whole = record["ms"].get(part, {}).get("median", 0.0), record["total"]["median"]
            found += [f"{spent:,.0f}", f"{spent / whole:.0%}"]
        return found

    totals = [cell for record in group for cell in (f"{record['total']['median']:,.0f}", "")]
    return [*([part, *cells(part)] for part in PARTS), ["a step", *totals]]


def header(group: Sequence[Record]) -> list[str]:
    return ["", *(cell for record in group for cell in (f"texts {record['texts']}, ms", "share"))]


def render(folder: Path) -> str:
    """A table a case."""
    parts = []
    for group in records.newest("breakdown", ("case", "dtype"), folder):
        first = group[0]
        title = f"**{first['case']}, {first['dtype']}** ({first['queries']} queries, {first['tokens']:,} text tokens)"
        remark = f"{where(first)}; the first {first['steps']} steps, median of {first['rounds']} rounds."
        parts.append(f"{title}\n\n{grid(header(group), rows_of(group))}\n\n{remark}")
    return "\n\n".join(parts or [NOT_YET])


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    options.add_argument("--steps", type=int, default=4, help="of the recipe's first ones")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--dry", action="store_true", help="print only, add no records")
    arguments = options.parse_args(argv)
    torch.set_num_threads(1)
    for case in arguments.cases:
        recipe = load_recipe(CASES[case], [f"--train.steps={arguments.steps}"])
        found = measure(case, recipe, arguments.rounds)
        if not arguments.dry:
            records.append("breakdown", found)
        table = Table(*header(found), title=case)
        for row in rows_of(found):
            table.add_row(*row)
        Console().print(table)


if __name__ == "__main__":
    main()

"""`python -m bench.gpu --quick | --full`: everything that needs a GPU, in one command, from a bare checkout.

Needs torch, triton, transformers, peft, accelerate, rich and pytest. Correctness comes first: the `gpu` tests of every
op, and of packed passes, graphs and fused norms. Then whole training steps and their memory, and the ops
(`bench.kernels`), of which those whose tests fail have no figures; with `--full` the largest batches, scaling and
encoding besides. Every stage is a process group of its own that appends its records as it goes, so what is measured
stays when one is stopped. `--quick` ends within nine minutes: a step may use its share of what is left.
Exit code: 0, 1 where a stage failed or was stopped, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from bench.ops import OPS
from bench.records import ROOT

SECONDS = 520.0  # of --quick, the summary and the start of Python besides
GRACE = 5.0  # seconds between asking a stage to stop and killing it
POLL = 0.05  # seconds
KERNEL_SECONDS = 180.0  # of --quick, shared out among the ops
QUICK_CASES, FULL_CASES = ("8b", "1b"), ("1b", "4b", "8b")
QUICK_VARIANTS = (
    "lora-padded",
    "pe-suffix-weighted",
    "lora-checkpointed",
    "lora-packed",
    "pe-suffix-weighted-ahead",
    "pe-suffix-weighted-launched",
    "pe-suffix-weighted-stored",
    "pe-suffix-weighted-entered",
)
"""The two sides of the claim first: where time runs out, what comes last is lost first."""
IN_MEMORY = QUICK_VARIANTS[:4]
"""Of `--quick`; each takes a process of its own."""
KEYWORDS = {
    "vocab_mixture": "mixture",
    "prompt_rows": "rows and not mixture",
    "context_attention": "attention",
    "pool_normalize": "pool",
    "info_nce": "contrast or info_nce",
}
"""What the names of an op's tests have in common, for pytest's -k."""
IN_FLOAT32 = ("prompt_rows", "info_nce")
"""Ops that take float32 in a training step under autocast too; `--quick` tests the others in bfloat16 alone."""
SANITIZER = "tests under compute-sanitizer"
"""Of `--full` alone; skipped where the tool is not installed."""
HUGE = "past_2_31"
"""Tests of tensors that fill half of an 80 GB card, so one comes after another; an op's figures do not hang on them."""
PYTEST = (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-o", "addopts=-p no:cacheprovider")
"""Without the repository's --strict-config, which would ask for pytest-timeout."""


@dataclass(frozen=True)
class Stage:
    """A command that runs from the repository's root."""

    name: str
    command: Sequence[str]


@dataclass(frozen=True)
class Step:
    """Stages that run side by side; together they may use `share` of the time that is left."""

    stages: Sequence[Stage]
    share: float


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: "passed", "failed (exit code)" or "stopped after ... s"."""

    name: str
    seconds: float
    result: str

    @property
    def passed(self) -> bool:
        return self.result == "passed"

    @property
    def failed(self) -> bool:
        return self.result.startswith("failed")


Plan = Callable[[Sequence[Outcome]], Iterator[Step]]
"""Steps one after another; each may depend on the outcomes so far."""


def tests_of(op: str) -> str:
    return f"tests of {op}"


def tests(quick: bool) -> list[Stage]:
    """The `gpu` tests, a process an op: one that faults takes no other with it."""
    fewer = {op: " and not compiles and not fp16" + " and not fp32" * (op not in IN_FLOAT32) for op in OPS if quick}
    pytest = [*PYTEST, "-x"] if quick else [*PYTEST]
    file = "tests/kernels/test_gpu.py"
    names = {op: f"({KEYWORDS[op]}) and not {HUGE}{fewer.get(op, '')}" for op in OPS}
    return [
        *(Stage(tests_of(op), [*pytest, file, "-k", names[op]]) for op in OPS),
        Stage("tests of huge tensors", [*pytest, file, "-k", HUGE]),
        Stage("tests of packed passes", [*pytest, "tests/test_packed_gpu.py"]),
        *([] if quick else [Stage(SANITIZER, [*pytest, file, "-k", "sanitizer"])]),
    ]


def plan(quick: bool) -> Plan:
    """Tests, steps, memory, ops, and what `--quick` has no time for."""
    cases = QUICK_CASES if quick else FULL_CASES

    def steps(outcomes: Sequence[Outcome]) -> Iterator[Step]:
        yield Step(tests(quick), 0.25)
        few = ["--distributions", "fixed", "--rounds", "3", "--variants", *QUICK_VARIANTS] if quick else []
        yield module("step", 0.45, "bench.step", "--cases", *cases, *few)
        few = ["--distributions", "fixed", "--passes", "1", "--variants", *IN_MEMORY] if quick else []
        yield module("memory", 0.45, "bench.memory", "--cases", *cases, *few)
        failed = {outcome.name for outcome in outcomes if outcome.failed}
        red = [op for op in OPS if tests_of(op) in failed]
        limits = ["--quick", "--seconds", f"{KERNEL_SECONDS:g}"] if quick else []
        yield module("kernels", 1.0, "bench.kernels", *limits, "--red", *red)
        if not quick:
            yield module("largest batch", 1.0, "bench.largest")
            yield module("scaling", 1.0, "bench.scaling", "--case", cases[0])
            yield module("encoding", 1.0, "bench.encoding")

    return steps


def module(name: str, share: float, *arguments: str) -> Step:
    return Step([Stage(name, [sys.executable, "-m", *arguments])], share)


def run_step(step: Step, seconds: float | None) -> list[Outcome]:
    """Run stages side by side, their output streamed; stop those that need more than `seconds`. None: no limit."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    started = time.perf_counter()
    processes: list[subprocess.Popen[bytes]] = []
    ended: dict[str, Outcome] = {}
    try:
        for stage in step.stages:
            print(f"{stage.name}: {' '.join(stage.command)}", flush=True)
            processes.append(subprocess.Popen(stage.command, cwd=ROOT, env=environment, start_new_session=True))
        while len(ended) < len(processes):
            spent = time.perf_counter() - started
            for stage, process in zip(step.stages, processes, strict=True):
                if stage.name in ended:
                    continue
                code = process.poll()
                if code is not None:
                    ended[stage.name] = Outcome(stage.name, spent, "passed" if code == 0 else f"failed ({code})")
                elif seconds is not None and spent >= seconds:
                    ended[stage.name] = Outcome(stage.name, spent, f"stopped after {seconds:.0f} s")
            time.sleep(POLL)
    finally:
        stop(processes)
    return [ended[stage.name] for stage in step.stages]


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs of the stages' process groups: ask, then kill."""
    for ending in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, ending)
        deadline = time.perf_counter() + GRACE
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.perf_counter()))


def run(steps: Plan, seconds: float | None) -> list[Outcome]:
    """Run every step of a plan, all within `seconds`; None: no limit."""
    outcomes: list[Outcome] = []
    started = time.perf_counter()
    for step in steps(outcomes):
        left = None if seconds is None else max(0.0, seconds - (time.perf_counter() - started))
        outcomes += run_step(step, None if left is None else step.share * left)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> Table:
    shown = Table("stage", "seconds", "outcome", title="bench.gpu", title_justify="left")
    for outcome in outcomes:
        shown.add_row(outcome.name, f"{outcome.seconds:.0f}", outcome.result)
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = options.add_mutually_exclusive_group(required=True)
    size.add_argument("--quick", action="store_true", help="fewer sizes, under nine minutes")
    size.add_argument("--full", action="store_true", help="all sizes and distributions, no limit")
    arguments = options.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench.gpu: no GPU that torch can use; on a CPU run bench.step and bench.memory", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the stages end with this process
    outcomes = run(plan(arguments.quick), SECONDS if arguments.quick else None)
    Console().print(table(outcomes))
    return int(not all(outcome.passed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

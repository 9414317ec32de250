"""`pytest bench/ --benchmark-only`: every op and implementation under pytest-benchmark's own options.

On a GPU at the sizes of `bench.kernels --quick`; without one at toy sizes, where ours is plain torch.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import records
from bench.kernels import COMPILED, EAGER, FAILURES, OURS, check, clean, expected, our_impl, passes, ways
from bench.ops import CASES, PEERS, Case
from bench.step import synchronise

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
QUICK = {f"{case.op}, {case.name}": case for case in CASES if case.quick}


@pytest.mark.skipif(our_impl(DEVICE) == "interpreter", reason="Triton's interpreter measures nothing")
@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize("implementation", [OURS, EAGER, COMPILED, *PEERS])
@pytest.mark.parametrize("case", QUICK.values(), ids=QUICK)
def test_kernel(benchmark: BenchmarkFixture, case: Case, implementation: str, mode: str) -> None:
    torch.manual_seed(0)
    sizes = case.sizes if DEVICE.type == "cuda" else case.toy
    problem = case.build(sizes, DTYPE, DEVICE)
    make = ways(problem, DEVICE).get(implementation)
    if make is None:
        pytest.skip("does not compute this op")
    try:
        way = make()
        check(way, problem, expected(problem))
    except FAILURES as error:
        if implementation == OURS:
            raise
        pytest.skip(f"{type(error).__name__}: {error}")
    prepare, action = passes(way, problem.inputs)[mode]

    def run() -> None:
        action(prepare())
        synchronise(DEVICE)

    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    benchmark.group = f"{case.op}, {case.name}, {mode}"
    benchmark(run)
    benchmark.extra_info |= {"sizes": dict(sizes), "dtype": str(DTYPE), "hardware": records.hardware()}
    if DEVICE.type == "cuda":
        benchmark.extra_info["gpu"] = torch.cuda.get_device_name()
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated()
    torch.compiler.reset()
    clean(DEVICE)

"""`pytest bench/ --benchmark-only`: every op and implementation under pytest-benchmark's own options.

On a GPU at the sizes of `bench.kernels --quick`; without one at toy sizes, where ours is plain torch.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import records
from bench.device import free, synchronise
from bench.kernels import FAILURES, check, expected, our_impl, passes, ways, why
from bench.ops import CASES, PEERS, Case

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
QUICK = {f"{case.op}, {case.name}": case for case in CASES if case.quick}


def sizes_of(case: Case) -> Mapping[str, int]:
    return case.sizes if DEVICE.type == "cuda" else case.toy


def implementations(case: Case) -> list[str]:
    """Who computes the case; what a toy problem says holds for every size."""
    return list(ways(case.build(case.toy, torch.float32, torch.device("cpu")), torch.device("cpu")))


PAIRS = [(name, implementation) for name, case in QUICK.items() for implementation in implementations(case)]


@pytest.mark.skipif(our_impl(DEVICE) == "interpreter", reason="Triton's interpreter measures nothing")
@pytest.mark.parametrize("mode", ["forward", "both"])
@pytest.mark.parametrize(("name", "implementation"), PAIRS)
def test_kernel(benchmark: BenchmarkFixture, name: str, implementation: str, mode: str) -> None:
    """Only a peer, an optional package of somebody else, may be left out where it does not run, with its reason."""
    torch.manual_seed(0)
    case = QUICK[name]
    problem = case.build(sizes_of(case), DTYPE, DEVICE)
    try:
        way = ways(problem, DEVICE)[implementation]()
        check(way, problem, expected(problem))
    except FAILURES as error:
        if implementation not in PEERS:
            raise
        pytest.skip(f"{implementation}: {why(error)}")
    prepare, action = passes(way, problem.inputs)[mode]

    def run() -> None:
        action(prepare())
        synchronise(DEVICE)

    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    benchmark.group = f"{case.op}, {case.name}, {mode}"
    benchmark(run)
    benchmark.extra_info |= {"sizes": dict(sizes_of(case)), "dtype": str(DTYPE), "hardware": records.hardware()}
    if DEVICE.type == "cuda":
        benchmark.extra_info["gpu"] = torch.cuda.get_device_name()
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated()
    torch.compiler.reset()
    free(DEVICE)

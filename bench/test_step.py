"""`pytest bench/ --benchmark-only`: one training step of every way to train, under pytest-benchmark's own options."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import records
from bench.cases import CASES, GPU_CASES, Setting, default_variants
from bench.device import free
from bench.lengths import Distribution, workload
from bench.step import describe, finding_texts, prepare

SETTING = Setting.of("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("variant", default_variants(SETTING.device.type))
@pytest.mark.parametrize("distribution", ["fixed", "real"])
@pytest.mark.parametrize("case", ["tiny"] if SETTING.device.type == "cpu" else GPU_CASES)
def test_step(benchmark: BenchmarkFixture, case: str, distribution: Distribution, variant: str) -> None:
    """`real` takes one step on a batch of every data set; the others take a single step."""
    load = workload(distribution, CASES[case])
    free(SETTING.device)
    if SETTING.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = prepare(CASES[case], variant, load, SETTING)

    def take() -> None:
        for batch, following in load.turns():
            step(batch, following)

    benchmark.group = f"{case}, {distribution}"
    with finding_texts(variant, step.model) as store:
        if store is not None:
            take()
        benchmark(take)
    benchmark.extra_info |= {**describe(CASES[case], load, SETTING), "hardware": records.hardware()}
    if SETTING.device.type == "cuda":
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated()

"""`pytest bench/ --benchmark-only`: encoding of real texts by every system, under pytest-benchmark's own options."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench import records
from bench.cases import ROOT
from bench.encoding import (
    TITLES,
    Encode,
    SentenceEncoder,
    check_agreement,
    instructions,
    sample,
    systems,
)
from pe.baselines.frozen import FrozenEncoder
from pe.runs.recipes import load_recipe

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RECIPE = ROOT / "recipes" / "tiny.yaml"
TEXTS = 100


@pytest.fixture(scope="module")
def encoders() -> dict[str, Encode]:
    """Every system, checked and with the best batch size."""
    config = dataclasses.replace(load_recipe(RECIPE).model, max_length=512)
    frozen = FrozenEncoder.from_config(config.backbone, DEVICE, max_length=config.max_length)
    sentences = SentenceEncoder(config, frozen.backbone)
    check_agreement(sentences, frozen, sample(TEXTS))
    return systems(config, sentences, frozen, sentences.best_batch_size(sample(TEXTS)))


READS_INSTRUCTIONS = [system for system in TITLES if system not in ("st", "frozen")]


@pytest.mark.parametrize(
    ("system", "count"), [*((system, 1) for system in TITLES), *((system, 10) for system in READS_INSTRUCTIONS)]
)
def test_encoding(benchmark: BenchmarkFixture, encoders: dict[str, Encode], system: str, count: int) -> None:
    """Texts under one instruction, and under ten where the system reads instructions."""
    texts, asked = sample(TEXTS), instructions(count, 0)
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    benchmark.group = f"{TEXTS} texts, {count} instructions"
    benchmark(encoders[system], texts, asked)
    benchmark.extra_info |= {"texts": TEXTS, "instructions": count, "hardware": records.hardware()}
    if DEVICE.type == "cuda":
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated()

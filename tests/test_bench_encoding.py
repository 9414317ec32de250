"""The encoding benchmark at toy size: what is compared reads the same, and its records are whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import encoding, records
from bench import test_encoding as benchmarked
from bench.encoding import SentenceEncoder
from pe.baselines.frozen import FrozenEncoder
from pe.config import ModelConfig
from pe.method.quantized import has_eight_bits
from pe.runs.recipes import load_recipe
from tests.benchmarks import FakeBenchmark
from tests.training import write_recipe

TEXTS = ["a red cat", "the old man and the sea, and a long text that is cut at thirty-two tokens", "one", "the day"]
DEVICE = torch.device("cpu")
HERE = [name for name in encoding.TITLES if name != "pe-suffix-int8" or has_eight_bits("int8", DEVICE)]
"""Systems that this device can run."""


@pytest.fixture
def recipe(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    return write_recipe(tiny_models, tmp_path)


@pytest.fixture
def config(recipe: Path) -> ModelConfig:
    return load_recipe(recipe).model


@pytest.fixture
def frozen(config: ModelConfig) -> FrozenEncoder:
    return FrozenEncoder.from_config(config.backbone, DEVICE, max_length=config.max_length)


def test_sentence_transformers_and_the_packed_backbone_agree(config: ModelConfig, frozen: FrozenEncoder) -> None:
    sentences = SentenceEncoder(config, frozen.backbone)
    lengths = encoding.check_agreement(sentences, frozen, TEXTS)
    assert lengths[1] == config.max_length == 32
    one, many = (sentences.encode(TEXTS, size) for size in (1, 4))
    assert np.abs(one - many).max() < 1e-5
    assert sentences.best_batch_size(TEXTS) in encoding.BATCH_SIZES


def test_the_instruction_is_read_before_the_whole_text(config: ModelConfig, frozen: FrozenEncoder) -> None:
    sentences = SentenceEncoder(config, frozen.backbone)
    head = "Instruct: x\nQuery:"
    longer = SentenceEncoder(dataclasses.replace(config, max_length=100), frozen.backbone)
    assert np.allclose(sentences.encode(["one"], 1, head), longer.encode([head + "one"], 1), atol=1e-6)
    assert not np.allclose(sentences.encode(["one"], 1, head), sentences.encode(["one"], 1), atol=1e-3)
    cut = len(sentences.tokenize([head])[0]) + config.max_length
    read = longer.tokenize([head + TEXTS[1]])[0]
    sentences.encode(TEXTS, 2, head)
    assert sentences.model.max_seq_length == cut
    assert sentences.tokenize([head + TEXTS[1]])[0] == read[:cut]


def test_other_weights_are_noticed(config: ModelConfig, frozen: FrozenEncoder) -> None:
    sentences = SentenceEncoder(config, frozen.backbone)
    with torch.no_grad():
        next(sentences.model.parameters()).add_(0.1)
    with pytest.raises(RuntimeError, match="embeddings: expected a difference of at most"):
        encoding.check_agreement(sentences, frozen, TEXTS)


def test_other_tokens_are_noticed(config: ModelConfig, frozen: FrozenEncoder) -> None:
    longer = SentenceEncoder(dataclasses.replace(config, max_length=33), frozen.backbone)
    with pytest.raises(RuntimeError, match="expected the tokens"):
        encoding.check_agreement(longer, frozen, TEXTS)


def test_every_system_embeds_every_instruction(config: ModelConfig, frozen: FrozenEncoder) -> None:
    sentences = SentenceEncoder(config, frozen.backbone)
    encoders = encoding.systems(config, sentences, frozen, 2)
    assert list(encoders) == HERE
    asked = ["one", "two", "three"]
    for name in ("pe-suffix", "pe-prefix", "st-instructed"):
        found = np.stack(encoders[name](TEXTS, asked))
        assert found.shape == (3, 4, frozen.backbone.hidden_size)
        assert np.abs(found[0] - found[1]).max() > 1e-5
    assert np.abs(encoders["st"](TEXTS, asked) - encoders["frozen"](TEXTS, asked)).max() < 1e-4


def test_what_reads_the_texts_again_is_measured_once() -> None:
    called: list[tuple[str, int]] = []
    encoders = {name: lambda _, asked, name=name: called.append((name, len(asked))) for name in encoding.TITLES}
    times = encoding.time_calls(encoders, TEXTS, [1, 10, 100], 2)
    assert {key: len(spent) for key, spent in times.items()} == {
        **{(name, 1): 2 for name in encoding.TITLES},
        ("st-instructed", 10): 1,
        ("pe-prefix", 10): 1,
        ("pe-suffix", 10): 2,
        ("pe-suffix", 100): 1,
    }
    assert len(called) == sum(map(len, times.values()))


def test_texts_are_the_same_at_every_call() -> None:
    texts = encoding.sample(40)
    assert texts == encoding.sample(40)
    assert len(set(texts)) > 35
    short, long = min(map(len, texts)), max(map(len, texts))
    assert long > 5 * short
    documents = encoding.sample(40, "documents")
    assert sum(map(len, documents)) > 2 * sum(map(len, texts))


def test_command_records_and_prints(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--recipe", str(recipe), "--texts", "6", "--max-length", "24", "--instructions", "1", "2"]
    options += ["--sources", "documents"]
    encoding.main([*options, "--rounds", "2"])
    found = records.read("encoding", tmp_path / "results")
    assert {r["source"] for r in found} == {"documents"}
    assert [(r["system"], r["instructions"], r["rounds"]) for r in found] == [
        *((name, 1, 2) for name in HERE),
        ("st-instructed", 2, 1),
        ("pe-prefix", 2, 1),
        ("pe-suffix", 2, 2),
    ]
    assert found[0]["sizes"]["longest"] == 24
    assert found[0]["texts"] == 6
    assert all(record["ms"]["median"] > 0 for record in found)
    shown = capsys.readouterr().out
    assert "| sentence-transformers |" in shown
    text = encoding.render(tmp_path / "results")
    assert "**recipe, cpu, documents**" in text
    assert "| PE, suffix |" in text
    assert "2 instructions" in text
    encoding.main([*options, "--rounds", "1", "--dry"])
    assert len(records.read("encoding", tmp_path / "results")) == len(found)


def test_page_shows_rates_and_multiples(tmp_path: Path) -> None:
    sizes = {"max_length": 512, "soft_tokens": 5, "reader": "none", "batch_size": 32, "backbone": "qwen3"}
    common = {
        "recipe": "tiny",
        "source": "all",
        "device": "cpu",
        "dtype": "float32",
        "texts": 100,
        "tokens": 5000,
        "sizes": sizes,
    }
    times = {("st", 1): 2000, ("st-instructed", 1): 3000, ("st-instructed", 10): 30000}
    times |= {("pe-suffix", 1): 1000, ("pe-suffix", 10): 1250}
    rows = [{**common, "system": name, "instructions": n, "ms": {"median": ms}} for (name, n), ms in times.items()]
    records.append("encoding", rows, tmp_path)
    text = encoding.render(tmp_path)
    assert "| PE, suffix | 100 | 5,000 | 2.00 |" in text
    assert "| PE, suffix | 1.0 s (1.00) | 1.2 s (1.25) |" in text
    assert "instruction before each text | 3.0 s (1.00) | 30.0 s (10.00) |" in text
    assert "Not yet measured." in encoding.render(tmp_path / "none")


def test_benchmark_says_what_it_ran_on(
    config: ModelConfig, frozen: FrozenEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmarked, "TEXTS", 3)
    encoders = encoding.systems(config, SentenceEncoder(config, frozen.backbone), frozen, 2)
    benchmark = FakeBenchmark()
    benchmarked.test_encoding(benchmark, encoders, "pe-suffix", 10)
    assert benchmark.found[0].shape[:2] == (10, 3)
    assert benchmark.extra_info["instructions"] == 10

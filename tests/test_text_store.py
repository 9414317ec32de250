"""The store of the text pass: what is found is what would be read, and nothing breaks it."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pe import encode
from pe.config import LoraSettings, Recipe, RecipeError
from pe.measure.footprint import text_store_size
from pe.method.attention import KeyValues
from pe.method.backbone import Backbone
from pe.method.entries import FolderEntries, MemoryEntries
from pe.method.skip import unpooled
from pe.method.text_store import TextStore, tensors_of
from pe.model import PromptEmbedder
from pe.runs.recipes import load_recipe
from pe.train import fit, train
from tests.embedders import backbone, build, lora
from tests.training import accelerator, new_model, plan_of, write_recipe

IDS = [[5], [5, 6, 7], [8, 9, 10, 11], [12] * 30, [5, 6, 7]]
KILLED = """
import sys, numpy as np
from pathlib import Path
from pe.method.entries import FolderEntries
entries, first = FolderEntries(Path(sys.argv[1]), 1 << 34), int(sys.argv[2])
for number in range(first, first + int(sys.argv[3])):
    keys = [f"{number:07}-{part:08}".encode() for part in range(3)]
    entries.add({key: np.full(5_000, number % 251, np.uint8) for key in keys})
    print(number, flush=True)
"""
"""Adds batches of three entries whose bytes say which batch they are of."""


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TextStore]:
    with TextStore.open("memory" if request.param == "memory" else tmp_path / "texts") as opened:
        yield opened


def loaded(name: str = "qwen3", revision: str | None = "r1", **sizes: int) -> Backbone:
    made = backbone(name, **sizes)
    made.revision = revision
    return made


def assert_same(got: KeyValues, expected: KeyValues) -> None:
    assert got.lengths == expected.lengths
    assert all(map(torch.equal, tensors_of(got), tensors_of(expected)))


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each text pass from now on reads."""
    counted: list[int] = []
    plain = Backbone.text_pass

    def counting(self: Backbone, texts: list[list[int]], *arguments: object, **options: object) -> KeyValues:
        counted.append(len(texts))
        return plain(self, texts, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Backbone, "text_pass", counting)
    return counted


def writer(folder: Path, first: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED, str(folder), str(first), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)


def batches_in(folder: Path, numbers: range) -> set[int]:
    """The batches of `KILLED` that are there; none may be there in part, and all bytes must be right."""
    entries, there = FolderEntries(folder, 1 << 34), set()
    for number in numbers:
        found = entries.get({f"{number:07}-{part:08}".encode(): 5_000 for part in range(3)})
        assert len(found) in (0, 3)
        assert all(bool((entry == number % 251).all()) for entry in found.values())
        there |= {number} if found else set()
    assert entries.damaged == 0
    entries.close()
    return there


# What is found is what would be read.


@pytest.mark.parametrize(("architecture", "sizes"), [("qwen3", {}), ("gemma3", {"sliding_window": 64}), ("gpt2", {})])
def test_what_is_found_is_bit_for_bit_what_is_read(architecture: str, sizes: dict[str, int], store: TextStore) -> None:
    model = loaded(architecture, **sizes)
    expected = model.read(IDS, unpooled, exact=True)
    with model.reading_from(store):
        assert_same(model.read(IDS[:2], unpooled), model.read(IDS[:2], unpooled))
        for _ in range(2):  # some found, then all
            assert_same(model.read(IDS, unpooled), expected)
        assert model.read(IDS).pooled is None
    assert (store.read.texts, store.found.texts) == (4, 2 + 2 + 4 + 4)
    assert model.text_store is None


def test_a_text_has_the_same_bits_in_any_company() -> None:
    model = backbone("qwen3", hidden_size=256, intermediate_size=768)
    rows = torch.randint(2, 290, (40, 9)).tolist()
    whole = tensors_of(model.read(rows, unpooled, exact=True))
    alone = [tensors_of(model.read([row], unpooled, exact=True)) for row in rows]
    assert all(map(torch.equal, whole, (torch.cat(parts) for parts in zip(*alone, strict=True))))


def test_texts_longer_than_a_sliding_window_are_found_to_rounding(store: TextStore) -> None:
    model = loaded("gemma3")  # whose window of 4 is left out of a row in which no text is longer
    expected = tensors_of(model.read(IDS, unpooled))
    with model.reading_from(store):
        model.read(IDS[:2])
        for got, wanted in zip(tensors_of(model.read(IDS, unpooled)), expected, strict=True):
            assert torch.allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_int8_rounds_heads_and_takes_half(kind: torch.dtype, store: TextStore) -> None:
    """Found, read, or both: always the same, near what was read, and in entries of its own."""
    model = loaded()
    model.model.to(kind)
    narrow = TextStore(store.entries, "narrow", "int8")
    expected = model.read(IDS, unpooled, exact=True)
    with model.reading_from(store):
        model.read(IDS)
    with model.reading_from(narrow):
        read, again = (model.read(IDS, unpooled) for _ in range(2))
        assert_same(model.read(IDS[:2], unpooled), model.read(IDS[:2], unpooled))
    assert_same(again, read)
    assert (narrow.read.texts, narrow.kept.texts) == (4, 4)
    assert torch.equal(read.pooled, expected.pooled)  # the states are not rounded
    for got, wanted in zip(tensors_of(read)[:-1], tensors_of(expected)[:-1], strict=True):
        assert got.dtype == kind
        error, largest = (got - wanted).abs().float(), wanted.abs().float().amax(-1, keepdim=True)
        allowed = largest * (0.5 / 127 + torch.finfo(kind).eps)
        assert error.max() > 0
        assert bool((error <= allowed).all())
    heads, numbers, states = 2 * 2 * 2, 2 * 2 * 2 * 8, 32  # layers, keys and values, heads of eight numbers
    assert narrow.bytes_a_token == numbers + 4 * heads + states * kind.itemsize


def test_half_precision_weights_are_kept_as_they_are(store: TextStore) -> None:
    model = loaded()
    model.model.bfloat16()
    with model.reading_from(store):
        first, second = (model.read(IDS, unpooled) for _ in range(2))
        with torch.autocast("cpu", torch.float16):
            model.read(IDS[:1])
    assert_same(second, first)
    assert first.layers[0][0].dtype == torch.bfloat16
    assert store.read.texts == 4 + 1  # under other products the numbers are others


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_training_ends_in_the_same_weights(where: str, recipe: Recipe, tmp_path: Path) -> None:
    def run(text_store: str) -> dict[str, Tensor]:
        options = dataclasses.replace(recipe.train, steps=12, text_store=text_store)
        changed = dataclasses.replace(recipe, train=options)
        model = new_model(changed)
        fit(model, plan_of(changed), changed, accelerator())
        return model.trainable_state()

    expected = run("none")
    for _ in range(2):  # with an empty store, and with a full one where it stays
        got = run("memory" if where == "memory" else str(tmp_path / "texts"))
        assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_a_run_says_what_the_store_was_good_for(
    tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts"
    options = {"train": {"steps": 2, "batch_size": 6, "text_store": str(texts), "text_store_gib": 0.5}}
    recipe = load_recipe(write_recipe(tiny_models, tmp_path, **options))
    train(recipe)
    assert "of 0.5 GiB, 384 bytes a token" in " ".join(capsys.readouterr().err.split())
    train(recipe, fresh=True)
    assert " texts found, 0 read; " in " ".join(capsys.readouterr().err.split())


def test_the_size_of_a_runs_store_is_known_before_anything_is_loaded(recipe: Recipe) -> None:
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, text_store_dtype="int8"))
    texts, tokens, size = text_store_size(recipe, torch.device("cpu"))
    model, plan = new_model(recipe), plan_of(recipe)
    with TextStore.open("memory", dtype="int8") as store, model.reading_from(store):
        fit(model, plan, recipe, accelerator())
        assert (store.read.texts, store.bytes_a_token, store.entries.used) == (texts, size, tokens * size)


# In a folder.


def test_another_process_finds_what_was_kept(tmp_path: Path) -> None:
    model = loaded()
    with TextStore.open(tmp_path / "texts") as store, model.reading_from(store):
        expected = model.read(IDS, unpooled)

    def other() -> None:
        with TextStore.open(tmp_path / "texts") as store, model.reading_from(store):
            assert_same(model.read(IDS, unpooled), expected)
        assert (store.found.texts, store.read.texts) == (4, 0)

    process = multiprocessing.get_context("fork").Process(target=other)
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_writer_may_be_killed_at_any_moment(tmp_path: Path) -> None:
    acknowledged: set[int] = set()
    for turn in range(3):
        process = writer(tmp_path, 10_000 * turn, 10_000)
        assert process.stdout is not None
        acknowledged.add(int(process.stdout.readline()))
        time.sleep(0.03 * turn)
        process.send_signal(signal.SIGKILL)
        acknowledged |= {int(line) for line in process.stdout.read().splitlines()}
        process.wait()
    there = batches_in(tmp_path, range(30_000))
    assert acknowledged <= there
    assert len(there - acknowledged) <= 3  # written, and killed before it was said
    entries = FolderEntries(tmp_path, 1 << 34)
    assert entries.used == 15_000 * len(there)  # what a killed writer left is written over
    assert entries.add({b"after": np.ones(10, np.uint8)}) == {b"after"}
    entries.close()


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    writers = [writer(tmp_path, first, 60) for first in (0, 30)]  # half of their keys are the same
    assert [process.wait() for process in writers if process.communicate()] == [0, 0]
    assert batches_in(tmp_path, range(100)) == set(range(90))
    assert (tmp_path / "entries.bin").stat().st_size == 90 * 15_000


@pytest.mark.parametrize("damage", ["flipped", "cut"])
def test_a_damaged_entry_is_read_anew_and_counted(damage: str, tmp_path: Path) -> None:
    folder, model = tmp_path / "texts", loaded()
    with TextStore.open(folder) as store, model.reading_from(store):
        expected = model.read(IDS, unpooled)
        size = store.entries.used
    with (folder / "entries.bin").open("r+b") as file:
        if damage == "cut":
            file.truncate(size - 10)
        else:
            file.seek(size - 10)
            byte = file.read(1)[0]
            file.seek(size - 10)
            file.write(bytes([byte ^ 1]))
    for read in (1, 0):  # mended
        with TextStore.open(folder) as store, model.reading_from(store):
            assert_same(model.read(IDS, unpooled), expected)
        assert (store.read.texts, store.entries.damaged) == (read, read)


def test_a_full_store_keeps_what_it_has_and_says_so(tmp_path: Path) -> None:
    for entries in (MemoryEntries(250), FolderEntries(tmp_path, 250)):
        first, second, small = (np.full(size, 7, np.uint8) for size in (200, 100, 50))
        assert entries.add({b"first": first}) == {b"first"}
        assert entries.full == ""
        assert entries.add({b"second": second, b"small": small}) == {b"small"}
        assert entries.full == "its size is reached"
        assert set(entries.get({b"first": 200, b"second": 100, b"small": 50})) == {b"first", b"small"}
        assert entries.used == 250
    model = loaded()
    with TextStore.open("memory", gib=30 * 384 / 2**30) as store, model.reading_from(store):
        model.read(IDS, unpooled)
        assert "1 texts were not kept: its size is reached" in str(store)


def test_a_disk_without_room_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(28, "No space left on device")

    model = loaded()
    with TextStore.open(tmp_path / "texts") as store, model.reading_from(store):
        monkeypatch.setattr(os, "pwrite", refuse)
        model.read(IDS, unpooled)
        assert "4 texts were not kept: it cannot be written" in str(store)
        monkeypatch.undo()
        model.read(IDS, unpooled)
    assert store.kept.texts == 4


def test_backbones_do_not_mix(tmp_path: Path) -> None:
    one, other = loaded(), loaded(revision="r2")
    with TextStore.open(tmp_path / "texts") as store:
        for model in (one, other):
            with model.reading_from(store):
                model.read(IDS)
    assert (store.found.texts, store.read.texts) == (0, 8)


# What is refused.


def test_folders_that_cannot_be_used_are_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.sqlite").write_bytes(b"no database at all" * 100)
    FolderEntries(tmp_path / "later", 100).close()
    with sqlite3.connect(tmp_path / "later" / "index.sqlite") as index:
        index.execute("PRAGMA user_version = 2")
    for name, said in (
        ("file", "expected a folder that can be written"),
        ("file/under", "expected a folder that can be written"),
        ("other", "its index.sqlite cannot be used"),
        ("later", "expected a text store of format 1, got format 2"),
    ):
        with pytest.raises(ValueError, match=said):
            TextStore.open(tmp_path / name)
    with pytest.raises(ValueError, match="a positive number of GiB, got 0"):
        TextStore.open("memory", 0)


def test_what_reads_no_text_apart_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the suffix layout"):
        build("qwen3", layout="prefix", pooling="mean_text").encode(["a"], instruction="b", store=tmp_path)
    with pytest.raises(ValueError, match="reads no text apart from what trains"):
        lora("packed").encode(["a"], instruction="b", store=tmp_path)
    with pytest.raises(ValueError, match="whose content is known"):
        build("qwen3").encode(["a"], instruction="b", store=tmp_path / "texts")
    stored = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, text_store="memory"))
    with pytest.raises(RecipeError, match=r"train\.text_store: expected 'none' for LoraEmbedder"):
        fit(lora("packed"), plan_of(recipe), stored, accelerator())


def test_a_size_that_holds_not_one_batch_is_refused_before_the_run_starts(recipe: Recipe) -> None:
    options = dataclasses.replace(recipe.train, text_store="memory", text_store_gib=1e-5)
    with pytest.raises(ValueError, match=r"train\.text_store_gib: expected at least .* one batch \(\d+ tokens of 384"):
        train(dataclasses.replace(recipe, train=options))
    assert not Path(recipe.output).exists()


# Encoding.


def test_a_second_encoding_reads_no_text(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, source = ["the river", "moon", "bread and honey"], tmp_path / "in.txt"
    source.write_text("\n".join(texts), encoding="utf-8")

    def encoded(name: str, *options: str) -> np.ndarray:
        encode.main([str(checkpoint), str(source), str(tmp_path / name), "--instruction=Find it", *options])
        return np.load(tmp_path / name)

    plain, first = encoded("plain.npy"), encoded("first.npy", f"--store={tmp_path / 'texts'}")
    model = PromptEmbedder.from_pretrained(checkpoint)
    counted = count_passes(monkeypatch)
    again = model.encode(texts, instruction="Find it", store=tmp_path / "texts")
    assert counted == [1]  # of a single token, which tells the types
    assert np.array_equal(first, again)
    model.encode(texts, instruction="Find it")
    assert counted == [1, 3]
    assert np.allclose(first, plain, atol=1e-6)
    for name in ("read.npy", "found.npy"):
        rounded = encoded(name, f"--store={tmp_path / 'texts'}", "--store_dtype=int8")
        assert 1e-5 < np.abs(rounded - plain).max() < 0.02


def test_encode_refuses_a_store_that_would_be_gone(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.txt").write_text("a", encoding="utf-8")
    with pytest.raises(SystemExit):
        encode.main([str(checkpoint), str(tmp_path / "in.txt"), str(tmp_path / "o.npy"), "--store=memory"])
    assert "--store: expected a folder, got 'memory'" in capsys.readouterr().err
    assert not (tmp_path / "o.npy").exists()


def test_several_instructions_share_an_open_store(checkpoint: Path) -> None:
    model = PromptEmbedder.from_pretrained(checkpoint)
    with TextStore.open("memory") as store:
        one = model.encode(["the river", "moon"], instruction="Find it", store=store)
        both = model.encode_many(["moon", "the river"], instructions=["Find it", "Or not"], store=store)
    assert (store.read.texts, store.found.texts) == (2, 2)
    assert np.allclose(both[0, ::-1], one, atol=1e-6)


def test_a_weight_that_differs_is_another_backbone_with_a_reader_or_without() -> None:
    """A revision reads the ends of large files alone."""
    one, other = loaded(), loaded()
    with_reader = loaded()
    with_reader.add_reader(LoraSettings())
    assert one.fingerprint == other.fingerprint == with_reader.fingerprint
    changed = loaded()
    next(changed.model.layers[1].parameters()).data[0, 0] += 1  # type: ignore[union-attr, operator]
    assert changed.fingerprint != one.fingerprint

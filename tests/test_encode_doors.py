"""What `python -m pe.encode` reads, keeps, cuts and quantises."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pe import encode
from pe.model import PromptEmbedder

TEXTS = ["the river", "moon", "bread, and honey"]
TASK = "Find the same thing"
ROWS: list[dict[str, Any]] = [{"id": n, "body": text, "tags": ["a"]} for n, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> np.ndarray:
    return PromptEmbedder.from_pretrained(checkpoint).encode(TEXTS, instruction=TASK)


def encoded(checkpoint: Path, source: object, target: Path, *options: str) -> None:
    encode.main([str(checkpoint), str(source), str(target), f"--instruction={TASK}", *options])


def refused(capsys: pytest.CaptureFixture[str], checkpoint: Path, source: object, target: Path, *options: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        encoded(checkpoint, source, target, *options)
    assert stopped.value.code == 2
    assert not target.exists()
    return capsys.readouterr().err


def write(path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".csv":
        path.write_text('id,body\n0,the river\n1,moon\n2,"bread, and honey"\n', encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["in.csv", "in.parquet", "in.json", "in.jsonl"])
def test_rows_of_every_file(name: str, checkpoint: Path, expected: np.ndarray, tmp_path: Path) -> None:
    encoded(checkpoint, write(tmp_path / name), tmp_path / "out.npy", "--field=body", "--device=cpu")
    assert np.allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)


def test_standard_input(
    checkpoint: Path, expected: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS).encode())))
    encoded(checkpoint, "-", tmp_path / "out.npy")
    assert np.allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)


def test_an_address_of_the_hub_stays_one(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[object] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **_: asked.append(names) or ROWS)
    encoded(checkpoint, "hf://owner/name:hard@dev", tmp_path / "out.npy", "--field=body")
    assert asked == [("owner/name", "hard")]


@pytest.mark.parametrize("name", ["out.jsonl", "out.parquet"])
@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ([], ["text"]),
        (["--id-column=id"], ["id", "text"]),
        (["--keep"], ["id", "body", "tags"]),
    ],
)
def test_columns_that_stay(
    name: str, options: Sequence[str], columns: list[str], checkpoint: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    target = tmp_path / name
    encoded(checkpoint, write(tmp_path / "in.parquet"), target, "--field=body", *options)
    if name.endswith("jsonl"):
        found = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    else:
        found = pq.read_table(target).to_pylist()
    assert [list(row) for row in found] == [[*columns, "embedding"]] * 3
    assert [row[columns[-1]] for row in found] == (TEXTS if columns[-1] == "text" else [["a"]] * 3)
    assert np.allclose([row["embedding"] for row in found], expected, atol=1e-6)


def test_a_column_that_comes_late_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n{"text": "b", "n": 1}\n', encoding="utf-8")
    encoded(checkpoint, source, tmp_path / "out.parquet", "--keep")
    assert pq.read_table(tmp_path / "out.parquet")["n"].to_pylist() == [None, 1]


def test_half_precision(checkpoint: Path, expected: np.ndarray, tmp_path: Path) -> None:
    encoded(checkpoint, write(tmp_path / "in.csv"), tmp_path / "out.npy", "--field=body", "--precision=float16")
    found = np.load(tmp_path / "out.npy")
    assert found.dtype == np.float16
    assert np.allclose(found, expected, atol=1e-3)


def test_what_cannot_be_kept_is_known_before_encoding(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PromptEmbedder, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    source, lines = write(tmp_path / "in.jsonl"), tmp_path / "in.txt"
    lines.write_text("a\n", encoding="utf-8")
    taken = tmp_path / "taken.jsonl"
    taken.write_text('{"text": "a", "embedding": [1]}\n', encoding="utf-8")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": "a", "n": 1}\n{"text": "b", "n": "x"}\n', encoding="utf-8")
    blob = tmp_path / "blob.parquet"
    pq.write_table(pa.table({"text": ["a"], "blob": pa.array([b"x"])}), blob)
    for name, options, target, message in (
        (
            source,
            ["--field=body", "--keep"],
            "o.npy",
            "output: expected .jsonl or .parquet, which hold further columns",
        ),
        (source, ["--field=body", "--id-column=id"], "o.npy", "output: expected .jsonl or .parquet"),
        (
            source,
            ["--field=body", "--id-column=no"],
            "o.jsonl",
            "in.jsonl:1: expected an id under 'no', got none in {id",
        ),
        (source, ["--field=body", "--id-column=id", "--keep"], "o.jsonl", "--id-column: expected none beside --keep"),
        (source, ["--field=body", "--id-column=text"], "o.jsonl", "--id-column: expected another column than that of"),
        (lines, ["--id-column=id"], "o.jsonl", "in.txt: --id-column: expected none, lines have no ids"),
        (taken, ["--keep"], "o.jsonl", "--keep: expected an input without the column 'embedding'"),
        (mixed, ["--keep"], "o.parquet", "--keep: a column cannot be written as .parquet"),
        (blob, ["--keep"], "o.jsonl", "--keep: a column cannot be written as .jsonl"),
        (source, [], "o.jsonl", "in.jsonl:1: expected the key 'text', got {id, body, tags}"),
        ("hf://", [], "o.npy", "hf://: expected hf://owner/name[:config][@split], got no name"),
        (tmp_path / "in.pdf", [], "o.npy", "expected a .jsonl"),
    ):
        assert message in refused(capsys, checkpoint, name, tmp_path / target, *options)


def test_fewer_dimensions_are_of_length_one(checkpoint: Path, expected: np.ndarray, tmp_path: Path) -> None:
    encoded(checkpoint, write(tmp_path / "in.csv"), tmp_path / "out.npy", "--field=body", "--dimensions=8")
    cut = expected[:, :8]
    assert np.allclose(np.load(tmp_path / "out.npy"), cut / np.linalg.norm(cut, axis=1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize(
    ("precision", "dtype", "size"),
    [("int8", "int8", 16), ("uint8", "uint8", 16), ("binary", "int8", 2), ("ubinary", "uint8", 2)],
)
def test_precisions_are_those_of_sentence_transformers(
    precision: str, dtype: str, size: int, checkpoint: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    util = pytest.importorskip("sentence_transformers.util")
    source, options = write(tmp_path / "in.csv"), ["--field=body", "--dimensions=16", f"--precision={precision}"]
    for name in ("out.npy", "out.jsonl", "out.parquet"):
        encoded(checkpoint, source, tmp_path / name, *options)
    found = np.load(tmp_path / "out.npy")
    assert (found.dtype, found.shape) == (np.dtype(dtype), (3, size))
    cut = expected[:, :16] / np.linalg.norm(expected[:, :16], axis=1, keepdims=True)
    theirs = util.quantize_embeddings(cut, precision=precision)
    assert np.abs(found.astype(int) - theirs.astype(int)).max() <= ("int8" in precision or precision == "uint8")
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["embedding"] for line in lines] == found.tolist()
    assert pq.read_table(tmp_path / "out.parquet")["embedding"].to_pylist() == found.tolist()


def test_the_printed_shape_is_that_of_the_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, both = write(tmp_path / "in.csv"), f"--instruction={json.dumps([TASK, 'Another'])}"
    for name, options, message in (
        ("a.npy", [], r"a\.npy: \[3, 32\] float32;"),
        ("b.npy", [both], r"b\.npy: \[2, 3, 32\] float32;"),
        ("c.npy", ["--precision=ubinary", "--dimensions=16"], r"c\.npy: \[3, 2\] uint8;"),
        ("d.jsonl", [], r"d\.jsonl: 3 rows with embedding \[32\] float32;"),
        ("e.parquet", [both], r"e\.parquet: 3 rows with embedding_0 \[32\], embedding_1 \[32\] float32;"),
    ):
        encoded(checkpoint, source, tmp_path / name, "--field=body", *options)
        assert re.search(message, capsys.readouterr().err)


def test_sizes_that_cannot_be(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, one = write(tmp_path / "in.jsonl"), tmp_path / "one.txt"
    one.write_text("a\n", encoding="utf-8")
    for name, options, message in (
        (source, ["--dimensions=33"], "--dimensions: expected 1 to 32, the model's, got 33"),
        (source, ["--dimensions=0"], "--dimensions: expected 1 to 32, the model's, got 0"),
        (source, ["--dimensions=12", "--precision=binary"], "--precision: binary packs 8 dimensions into a byte"),
        (one, ["--precision=int8"], "--precision: int8 takes its ranges from the texts, expected at least 2, got 1"),
        (source, ["--device=cuda:7"], "cuda:7"),
    ):
        assert message in refused(capsys, checkpoint, name, tmp_path / "o.npy", "--field=body", *options)

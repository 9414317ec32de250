"""`python -m pe.encode` into a folder of shards: what it reads, keeps, refuses, and goes on with."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from pe import encode
from pe.bulk.folder import Plan
from pe.bulk.rows import BLOCK_ROWS, blocks, scan
from pe.bulk.source import find
from pe.model import PromptEmbedder
from pe.saving import summary
from tests.tiny import write_rows

TASK = "Find the same thing"
TEXTS = ["the river", "moon", "bread,\nand honey", 'a "glass"', "horse", "train of thought", "cloud\u2028nine", "stone"]
ROWS: list[dict[str, Any]] = [{"id": f"{n:03}", "body": text} for n, text in enumerate(TEXTS)]
LATER = [row | {"tags": ["a", None]} if n > 4 else row for n, row in enumerate(ROWS)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> np.ndarray:
    return PromptEmbedder.from_pretrained(checkpoint).encode(TEXTS, instruction=TASK)


def encoded(checkpoint: Path, source: object, target: object, *options: str) -> None:
    encode.main([str(checkpoint), str(source), str(target), f"--instruction={TASK}", "--field=body", *options])


def refused(capsys: pytest.CaptureFixture[str], checkpoint: Path, source: object, target: object, *more: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        encoded(checkpoint, source, target, *more)
    assert stopped.value.code == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pe.encode: ")]
    assert len(said) == 1
    return said[0]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"))


def vectors(folder: Path, name: str = "embedding") -> np.ndarray:
    return np.array(pq.read_table(folder)[name].to_pylist(), dtype=np.float64)


def as_csv(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf")
    with path.open("ab") as file:
        pyarrow.csv.write_csv(pa.Table.from_pylist(ROWS), file)


def as_lines(path: Path) -> None:
    with fsspec.open(str(path), "wt", compression="infer", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n\n" for row in LATER))


def as_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=5)


def as_folder(path: Path) -> None:
    for part, rows in (("b/2", ROWS[3:4]), ("b/3", ROWS[4:]), ("a", ROWS[:3])):
        (path / part).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path / f"{part}.parquet")
    write_rows(path / "_temporary" / "x.parquet", "no parquet")
    write_rows(path / ".crc" / "x.parquet", "no parquet")
    write_rows(path / "README.md", "no rows")


@pytest.mark.parametrize(
    ("name", "write", "pattern", "rows"),
    [
        ("in.csv", as_csv, "", ROWS),
        ("in.jsonl", as_lines, "", LATER),
        ("IN.JSONL.GZ", as_lines, "", LATER),
        ("in.jsonl.xz", as_lines, "", LATER),
        ("in.parquet", as_parquet, "", ROWS),
        ("in", as_folder, "", ROWS),
        ("in", as_folder, "/b/*.parquet", ROWS[3:]),
    ],
)
def test_every_input_is_cut_and_keeps_its_columns(
    name: str,
    write: Callable[[Path], None],
    pattern: str,
    rows: list[dict[str, Any]],
    checkpoint: Path,
    expected: np.ndarray,
    tmp_path: Path,
) -> None:
    write(tmp_path / name)
    encoded(checkpoint, f"{tmp_path / name}{pattern}", tmp_path / "out", "--shard_rows=3")
    table = pq.read_table(tmp_path / "out").drop_columns(["embedding"])
    assert table.equals(pa.Table.from_pylist(rows, table.schema))
    assert table.column_names == list(rows[-1])
    assert np.abs(vectors(tmp_path / "out") - expected[-len(rows) :]).max() < 1e-6
    sizes = [pq.read_metadata(file).num_rows for file in shards(tmp_path / "out")]
    assert max(sizes) == 3
    assert sum(sizes) == len(rows)


def test_texts_and_an_address_of_fsspec(checkpoint: Path, expected: np.ndarray, tmp_path: Path) -> None:
    memory, lines = fsspec.filesystem("memory"), [text.replace("\n", " ") for text in TEXTS]
    memory.pipe("/bulk/in.txt", "\r\n".join(lines).encode())
    encoded(checkpoint, "memory://bulk/in.txt", "memory://bulk/out", "--shard_rows=5")
    names = sorted(Path(name).name for name in memory.ls("/bulk/out", detail=False))
    assert names == ["_manifest.json", "_plan.json", "part-000000.parquet", "part-000001.parquet"]
    memory.get("/bulk/out", str(tmp_path / "out"), recursive=True)
    assert pq.read_table(tmp_path / "out")["body"].to_pylist() == lines
    same = [place for place, text in enumerate(TEXTS) if "\n" not in text]
    assert np.abs(vectors(tmp_path / "out") - expected)[same].max() < 1e-6


def test_instructions_dimensions_and_precisions(checkpoint: Path, expected: np.ndarray, tmp_path: Path) -> None:
    as_parquet(tmp_path / "in.parquet")
    cut = expected[:, :8] / np.linalg.norm(expected[:, :8], axis=1, keepdims=True)
    for precision, kind, error in (("float32", pa.float32(), 1e-6), ("float16", pa.float16(), 5e-4)):
        out = tmp_path / precision
        encoded(checkpoint, tmp_path / "in.parquet", out, "--dimensions=8", f"--precision={precision}")
        assert pq.read_schema(shards(out)[0]).field("embedding").type.value_type == kind
        assert np.abs(vectors(out) - cut).max() < error
    both = f"--instruction={json.dumps([TASK, 'Another task'])}"
    encoded(checkpoint, tmp_path / "in.parquet", tmp_path / "int8", both, "--precision=int8")
    table = pq.read_table(tmp_path / "int8")
    assert table.column_names[2:] == ["embedding_0", "embedding_0_scale", "embedding_1", "embedding_1_scale"]
    scale = table["embedding_0_scale"].to_numpy()[:, None]
    levels = vectors(tmp_path / "int8", "embedding_0")
    assert (np.abs(levels).max(axis=1) == 127).all()
    assert np.abs(levels * scale - expected).max() <= scale.max() / 2 + 1e-6
    assert not np.array_equal(levels, vectors(tmp_path / "int8", "embedding_1"))


def test_what_is_missing_or_damaged_is_done_again_and_nothing_else(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    as_parquet(tmp_path / "in.parquet")
    out = tmp_path / "out"
    encoded(checkpoint, tmp_path / "in.parquet", out, "--shard_rows=2")
    first, before = pq.read_table(out), {file.name: file.stat().st_mtime_ns for file in shards(out)}
    manifest = json.loads((out / "_manifest.json").read_text(encoding="utf-8"))["finished"]
    assert [(shard["name"], shard["rows"]) for shard in manifest] == [(name, 2) for name in before]
    (out / "part-000001.parquet").unlink()
    (out / "part-000002.parquet").write_bytes(b"cut off")
    (out / "_writing").mkdir()
    (out / "_writing" / "left-over").write_bytes(b"of a killed process")
    encoded(checkpoint, tmp_path / "in.parquet", out, "--shard_rows=2", "--overwrite=true")
    after = {file.name: file.stat().st_mtime_ns for file in shards(out)}
    assert [name for name in after if after[name] != before[name]] == ["part-000001.parquet", "part-000002.parquet"]
    assert pq.read_table(out).equals(first)
    assert not (out / "_writing").exists()
    shard = '{"format": 1, "job": {"files": []}, "shards": [[0, 0, 0, 1]], "schema": ""}'
    for name, content in (
        ("_manifest.json", "{}"),
        ("_manifest.json", '{"finished": [{}]}'),
        ("_plan.json", '{"format": 1}'),
        ("_plan.json", shard),
    ):
        whole = (out / name).read_text(encoding="utf-8")
        (out / name).write_text(content, encoding="utf-8")
        assert f"{name}: damaged" in refused(capsys, checkpoint, tmp_path / "in.parquet", out, "--shard_rows=2")
        (out / name).write_text(whole, encoding="utf-8")


def test_a_model_is_known_in_whatever_order_its_files_are_listed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, plain = summary(checkpoint).content, Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda folder, pattern: reversed(list(plain(folder, pattern))))
    assert summary(checkpoint).content == known


def test_another_encoding_is_replaced_only_if_asked(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = write_rows(tmp_path / "in.jsonl", *ROWS), tmp_path / "out"
    encoded(checkpoint, source, out, "--shard_rows=2")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for options, message in (
        (
            ["--precision=int8"],
            r"out: holds another encoding; changed: precision \(was float32, now int8\); name",
        ),
        (["--shard_rows=3"], r"changed: shard_rows \(was 2, now 3\)"),
        (["--instruction=Other"], r"changed: instructions\[0\] \(was Find the same thing, now Other\)"),
    ):
        assert re.search(message, refused(capsys, checkpoint, source, out, "--shard_rows=2", *options))
    write_rows(source, *ROWS[:-1])
    assert "changed: files[0].size" in refused(capsys, checkpoint, source, out, "--shard_rows=2")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    encoded(checkpoint, source, out, "--shard_rows=4", "--overwrite=true")
    assert len(shards(out)) == 2
    assert pq.read_table(out)["body"].to_pylist() == TEXTS[:-1]


def test_bad_input_is_one_sentence_and_nothing_is_written(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other = write_rows(tmp_path / "good.jsonl", *ROWS), write_rows(tmp_path / "other" / "mine.txt", "precious")
    folder = tmp_path / "shards"
    for name in ("part-000000.parquet", "part-000001.parquet"):
        folder.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(ROWS), folder / name)
    late = write_rows(tmp_path / "late.jsonl", *ROWS, {"id": 1, "body": None})
    cut = write_rows(tmp_path / "cut.csv", "id,body", *["1,a"] * 9, '2,"b')
    wide = write_rows(tmp_path / "wide.csv", "id,body", "1,a,b")
    types = write_rows(tmp_path / "types.jsonl", *[{"body": "a", "n": 1}] * BLOCK_ROWS, {"body": "b", "n": "x"})
    taken = write_rows(tmp_path / "taken.jsonl", {"body": "a", "embedding": [1]})
    empty = write_rows(tmp_path / "empty.jsonl", "", " ")
    hollow = write_rows(tmp_path / "hollow.jsonl", {"body": "a", "n": {}})
    nulls, numbers = tmp_path / "nulls.parquet", tmp_path / "numbers.parquet"
    pq.write_table(pa.table({"body": ["a", None]}), nulls)
    pq.write_table(pa.table({"body": [1]}), numbers)
    damaged = tmp_path / "damaged.jsonl.gz"
    damaged.write_bytes(b"\x1f\x8b no gzip")
    for source, target, options, message in (
        (tmp_path / "none.jsonl", "o", [], "expected a file, a folder or a pattern of .parquet, or .jsonl, "),
        (tmp_path / "*.nothing", "o", [], "expected a file, a folder or a pattern of"),
        (folder, "shards/o", [], "o: expected a folder outside of the input"),
        (folder, "shards", [], "expected a folder outside of the input"),
        (f"{folder}/*.parquet", "shards", [], "expected a folder outside of the input"),
        (good, "shards", [], "shards: holds other files, 'part-000000.parquet' first; name a folder of its own"),
        (good, "other", ["--overwrite=true"], "other: holds other files, 'mine.txt' first"),
        (f"{tmp_path}/*.jsonl*", "o", [], "damaged.jsonl.gz: the file cannot be read"),
        (f"{tmp_path}/*[ds].[jp]*", "o", [], "expected files of one kind, got .jsonl and .parquet; give a pattern"),
        (f"{tmp_path}/**.jsonl", "o", [], "**.jsonl: the pattern cannot be used"),
        (late, "o", [], "late.jsonl:9: body: expected a string, got null"),
        (cut, "o", [], "cut.csv:11: the row cannot be read: unexpected end of data"),
        (wide, "o", [], "wide.csv:2: expected 2 cells, one a column, got 3"),
        (types, "o", [], "types.jsonl:4097: expected the columns of the rows before, got others"),
        (taken, "o", [], "input: expected no column 'embedding', which the output has"),
        (empty, "o", [], "empty.jsonl: expected at least one row, got none in 1 files"),
        (hollow, "o", [], "input: a column cannot be written as parquet"),
        (nulls, "o", [], "nulls.parquet: body: expected a string in every row, got null in 1"),
        (numbers, "o", [], "numbers.parquet: body: expected strings, got int64"),
        (good, "o", ["--field=text"], "good.jsonl:1: expected the key 'text', got {id, body}"),
        (damaged, "o", [], "damaged.jsonl.gz: the file cannot be read"),
        ("-", "o", [], "-: expected a file, a folder or a pattern of"),
        ("hf://owner/name", "o", [], "hf://owner/name: expected files, such as hf://datasets/OWNER/NAME/*.parquet"),
        ("nope://a.jsonl", "o", [], "nope://a.jsonl: the address cannot be used: Protocol not known: nope"),
        (good, "nope://o", [], "nope://o: the address cannot be used"),
        (good, "s3://b/o.npy", [], "output: expected a path, or a folder of shards at an address"),
        (good, "o", ["--id-column=id"], "--id-column: expected none for a folder, whose rows have all columns"),
        (good, "o", ["--store=x"], "--store: expected none for a folder"),
        (good, "o", ["--precision=binary"], "--precision: expected float32, float16, int8 for a folder, got binary"),
        (good, "o", ["--dimensions=99"], "--dimensions: expected 1 to 32, the model's, got 99"),
        (good, "o", ["--shard_rows=0"], "--shard_rows: expected at least 1, got 0"),
        (good, "o", ["--batch_tokens=0"], "--batch_tokens: expected at least 1, got 0"),
        (good, "o", ["--workers=2"], "--workers: expected none without --engine ray, got 2"),
        (good, "o", ["--engine=ray", "--device=cpu"], "--device: expected none with --engine ray"),
        (good, "o", ["--store_gib=1"], "--store_gib: expected none for a folder"),
        (good, "o.npy", ["--field=body", "--store_gib=1"], "--store_gib: expected --store beside it, got 1.0 alone"),
        (good, "o.npy", ["--engine=ray"], "--engine: expected a folder as OUTPUT, got 'ray'"),
        (good, "o.jsonl", ["--shard_rows=5"], "--shard_rows: expected a folder as OUTPUT, got 5"),
    ):
        goal = target if "://" in target else tmp_path / target
        assert message in refused(capsys, checkpoint, source, goal, *options)
        assert not (tmp_path / "o").exists()
    assert [file.name for file in other.parent.iterdir()] == ["mine.txt"]
    assert sorted(file.name for file in folder.iterdir()) == ["part-000000.parquet", "part-000001.parquet"]


@pytest.mark.parametrize("output", ["o.npy", "o"])
def test_several_processes_are_refused(
    output: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    source = write_rows(tmp_path / "in.jsonl", *ROWS)
    assert "expected one process, got 2 of torch.distributed" in refused(capsys, checkpoint, source, tmp_path / output)
    assert not (tmp_path / output).exists()


def peak(work: Callable[[], Iterator[object]]) -> int:
    """Bytes that Python and Arrow hold at once, at most, beside what they held before."""
    tracemalloc.start()
    before, most = pa.total_allocated_bytes(), 0
    for _ in work():
        most = max(most, pa.total_allocated_bytes() - before)
    _, traced = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most + traced


@pytest.mark.parametrize("name", ["in.jsonl", "in.parquet"])
def test_reading_holds_a_block_however_many_rows_there_are(name: str, tmp_path: Path) -> None:
    most = []
    for rows in (3 * BLOCK_ROWS, 12 * BLOCK_ROWS):
        path = tmp_path / str(rows) / name
        if name == "in.jsonl":
            write_rows(path, *({"text": f"row {n}"} for n in range(rows)))
        else:
            path.parent.mkdir()
            pq.write_table(pa.table({"text": [f"row {n}" for n in range(rows)]}), path, use_dictionary=False)
        (file,) = find(str(path))

        def read(file: Any = file) -> Iterator[object]:
            found = scan(file, "text", 2 * BLOCK_ROWS + 1)
            plan = Plan.of({"files": []}, [file], [found])
            for shard in plan.shards:
                yield from blocks(file, shard.cut, "text", plan.schema)

        assert sum(len(table) for table in read()) == rows  # type: ignore[arg-type]
        most.append(peak(read))
    assert most[1] < 1.5 * most[0]

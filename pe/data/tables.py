"""Files to rows: JSON Lines, JSON, csv, tsv, parquet, saved data sets and those of the hub, all by `rows`.

Errors count rows as a reader of the file would: by their lines in JSON Lines, csv and tsv, else from 1.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pe.data.records import (
    DAMAGED,
    DataError,
    Record,
    RecordError,
    braced,
    check_string,
    filled_lines,
    open_binary,
    parse,
    short,
)

HUB = "hf://"
NAME = re.compile(r"(.*?)(?:(\.jsonl|\.json|\.csv|\.tsv)(?:\.xz|\.gz)?|(\.parquet))", re.IGNORECASE | re.DOTALL)
"""A file's name: its stem, and the suffix that says what it holds."""
EXPECTED = (
    "a .jsonl, .json, .csv, .tsv (each also .xz, .gz) or .parquet file, a folder of save_to_disk, or"
    f" {HUB}owner/name[:config][@split]"
)

Row = Record | RecordError
"""A row by its columns, or why it has none."""


def named(path: str) -> tuple[str, str]:
    """Stem and suffix of a file's name, the suffix in small letters and without that of compression; '' for others."""
    name = Path(path).name
    found = NAME.fullmatch(name)
    return (found[1], (found[2] or found[3]).lower()) if found else (name, "")


def rows(path: str) -> Iterator[tuple[int, Row]]:
    """Numbered rows of whatever `path` names; one that cannot be read comes as the error that says why.

    Raises:
        DataError: nothing is there, it is damaged, or of a kind that is not read.
    """
    if path.startswith(HUB):
        return _hub(path)
    suffix = named(path)[1]
    if suffix in READERS:
        return READERS[suffix](Path(path))
    folder, split = saved(path)
    if folder.is_dir():
        return _saved(folder, split)
    raise DataError(f"{path}: expected {EXPECTED}, got {Path(path).name!r}")


def records(path: str) -> Iterator[tuple[int, Record]]:
    """Numbered rows, of which each can be read.

    Raises:
        DataError: see `rows`; or a row that cannot be read, or no row.
    """
    number = 0
    for number, row in rows(path):
        if isinstance(row, RecordError):
            raise DataError(f"{path}:{number}: {row}") from row
        yield number, row
    if not number:
        raise DataError(f"{path}: expected at least one record, got an empty file")


def text_under(field: str, row: Record) -> str:
    """The text of a row; RecordError where the field is not there, or holds something else."""
    if field not in row:
        detail = f"expected the key {field!r}, got {braced(row)}; name the key of the texts with --field"
        raise RecordError("missing key", detail)
    check_string(field, row[field])
    return row[field]


def files(path: str) -> list[str]:
    """The local files behind a path: none of the hub, all of a folder."""
    if path.startswith(HUB):
        return []
    folder, _ = saved(path)
    return sorted(str(file) for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else [path]


def hub_parts(path: str) -> tuple[str, str, str]:
    """Name, configuration and split of `hf://owner/name[:config][@split]`, empty where none is named."""
    name, _, split = path.removeprefix(HUB).partition("@")
    name, _, configuration = name.partition(":")
    return name, configuration, split


def saved(path: str) -> tuple[Path, str]:
    """Folder and split of `FOLDER[@split]`; no split where none is named."""
    folder, at, split = path.rpartition("@")
    return (Path(folder), split) if at and Path(folder).is_dir() else (Path(path), "")


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    return parsed(filled_lines(path))


def parsed(lines: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, Row]]:
    """Numbered lines of JSON as rows."""
    for number, line in lines:
        try:
            yield number, parse(line)
        except RecordError as bad:
            yield number, bad


def _json(path: Path) -> Iterator[tuple[int, Row]]:
    """A list of objects, or JSON Lines by another name."""
    lines = filled_lines(path)
    first = next(lines, None)
    if first is None or not first[1].lstrip().startswith(b"["):
        yield from parsed(lines if first is None else chain([first], lines))
        return
    try:
        content = json.loads(b"".join(line for _, line in chain([first], lines)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: expected a JSON list of objects, or an object a line ({error})") from error
    for number, item in enumerate(content, start=1):
        is_row = isinstance(item, dict)
        yield number, item if is_row else RecordError("not an object", f"expected an object, got {short(item)}")


def _csv(path: Path) -> Iterator[tuple[int, Row]]:
    """Cells by the names in the first line, all of them texts; an empty one is None."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if named(path.name)[1] == ".tsv" else ","
    header: list[str] | None = None
    start, cells = 1, []
    try:
        with io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            for cells in reader:
                number, start = start, reader.line_num + 1
                if cells and header is None:
                    header = check_header(path, number, cells)
                elif cells and header is not None:
                    yield number, by_name(header, cells)
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a file, found none") from error
    except (csv.Error, *DAMAGED, ValueError) as error:
        raise DataError(f"{path}:{start}: the file cannot be read: {error}") from error


def check_header(path: Path | str, number: int, names: list[str]) -> list[str]:
    """The names of columns as a file's line says them; DataError for one that is empty or comes twice."""
    if not all(name.strip() for name in names) or len(set(names)) < len(names):
        raise DataError(f"{path}:{number}: expected the names of the columns, each once, got {short(names)}")
    return names


def by_name(header: Sequence[str], cells: Sequence[str]) -> Row:
    """Cells of one row by the names of their columns; an empty one is None."""
    if len(cells) != len(header):
        return RecordError("wrong cells", f"expected {len(header)} cells, one a column, got {len(cells)}")
    return {name: cell or None for name, cell in zip(header, cells, strict=True)}


def _parquet(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        with pq.ParquetFile(path) as file:
            batches = (batch.to_pylist() for batch in file.iter_batches())
            yield from enumerate(chain.from_iterable(batches), start=1)
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a file, found none") from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: the file cannot be read: {error}") from error


def _saved(folder: Path, split: str) -> Iterator[tuple[int, Row]]:
    """Rows of a folder that `datasets` saved; of several splits `train`, unless one is named."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{folder}: expected a folder of `save_to_disk` of `datasets`, got another ({error})"
        ) from error
    parts = found if isinstance(found, datasets.DatasetDict) else {"": found}
    wanted = split or ("train" if "" not in parts else "")
    if wanted not in parts:
        known = ", ".join(filter(None, parts)) or "one without splits"
        raise DataError(f"{folder}: expected {known}, got the split {wanted!r}; name one as {folder}@SPLIT")
    yield from enumerate(parts[wanted], start=1)


def _hub(path: str) -> Iterator[tuple[int, Row]]:
    """Rows of `hf://owner/name[:config][@split]`; the split is `train` unless named."""
    name, configuration, split = hub_parts(path)
    if not name:
        raise DataError(f"{path}: expected {HUB}owner/name[:config][@split], got no name")
    import datasets

    try:
        table = datasets.load_dataset(name, configuration or None, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
        raise DataError(f"{path}: the data set cannot be loaded: {why}") from error
    yield from enumerate(table, start=1)


READERS: dict[str, Any] = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}

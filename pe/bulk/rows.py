"""The rows of a file, and the places where it may be cut.

A file is read twice: by `scan`, which checks every row and says where to cut, and by `blocks`, which starts at a cut.
Both hold one block at a time.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pe.bulk.columns import table_of
from pe.bulk.source import BUFFER, SourceFile, opened
from pe.data.records import BOM, DataError, Record, RecordError, decode, is_filled
from pe.data.tables import Row, by_name, check_header, parsed, text_under

BLOCK_ROWS = 4096
"""Rows that are read, sorted by length and encoded together."""


@dataclass(frozen=True)
class Cut:
    """Rows of one file, from a place on.

    Attributes:
        start: of lines the byte where they begin, uncompressed; of parquet the number of rows before.
        number: what messages call the first: its line, or its row, from 1.
        rows: how many there are.
    """

    start: int
    number: int
    rows: int


@dataclass(frozen=True)
class Scan:
    """What one reading of a file says: where to cut it, and the types of its columns."""

    path: str
    cuts: Sequence[Cut]
    schema: pa.Schema


def scan(file: SourceFile, field: str, shard_rows: int) -> Scan:
    """Check all rows of a file, of parquet as far as its statistics say, and cut it every `shard_rows`.

    Raises:
        DataError: it cannot be read, has a row without a text, or columns that parquet cannot hold.
    """
    return (_scan_parquet if file.kind == "parquet" else _scan_lines)(file, field, shard_rows)


def blocks(file: SourceFile, cut: Cut, field: str, schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows of a cut, `BLOCK_ROWS` at a time, in the columns of `schema`.

    Raises:
        DataError: the file cannot be read, is not the one that was scanned, or has a row without a text.
    """
    left, number = cut.rows, cut.number
    for table in (_parquet_blocks if file.kind == "parquet" else _line_blocks)(file, cut, field, schema):
        if table[field].null_count:
            row = number + table[field].is_null().to_pylist().index(True)
            raise DataError(f"{file.path}:{row}: {field}: expected a string, got null")
        left, number = left - len(table), number + len(table)
        yield table
    if left:
        raise DataError(f"{file.path}: expected {cut.rows} rows from {cut.number} on, as there were, got {left} less")


def joined(schemas: Iterable[tuple[str, pa.Schema]]) -> pa.Schema:
    """One schema for tables of several, each with the name of where it is from.

    Raises:
        DataError: a column holds values of types that do not go together.
    """
    found = pa.schema([])
    for where, schema in schemas:
        try:
            found = pa.unify_schemas([found, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise DataError(f"{where}: expected the columns of the rows before, got others ({error})") from error
    return found


# Parquet.


def _scan_parquet(file: SourceFile, field: str, shard_rows: int) -> Scan:
    with opened(file.path) as stream, pq.ParquetFile(stream) as source:
        schema, metadata = source.schema_arrow.remove_metadata(), source.metadata
    if len(set(schema.names)) < len(schema.names):
        raise DataError(f"{file.path}: expected the names of the columns, each once, got {schema.names}")
    if field not in schema.names:
        names = ", ".join(schema.names)
        raise DataError(f"{file.path}: expected the column {field!r}, got {{{names}}}; name the texts with --field")
    kind = schema.field(field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise DataError(f"{file.path}: {field}: expected strings, got {kind}")
    if nulls := sum(_known_nulls(metadata.row_group(place), field) for place in range(metadata.num_row_groups)):
        raise DataError(f"{file.path}: {field}: expected a string in every row, got null in {nulls}")
    starts = range(0, metadata.num_rows, shard_rows)
    cuts = [Cut(start, start + 1, min(shard_rows, metadata.num_rows - start)) for start in starts]
    return Scan(file.path, cuts, schema)


def _known_nulls(group: Any, field: str) -> int:
    """How many rows of a row group have no text, as far as its statistics say."""
    columns = map(group.column, range(group.num_columns))
    statistics = next(column.statistics for column in columns if column.path_in_schema == field)
    return (statistics.null_count or 0) if statistics is not None else 0


def _parquet_blocks(file: SourceFile, cut: Cut, field: str, schema: pa.Schema) -> Iterator[pa.Table]:
    end = cut.start + cut.rows
    with opened(file.path) as stream, pq.ParquetFile(stream, buffer_size=BUFFER, pre_buffer=False) as source:
        first, wanted, before = 0, [], 0
        for group in range(source.num_row_groups):
            rows = source.metadata.row_group(group).num_rows
            if first < end and cut.start < first + rows:
                wanted.append(group)
            elif not wanted:
                before += rows
            first += rows
        for batch in source.iter_batches(BLOCK_ROWS, row_groups=wanted):
            begin, stop = (min(max(place - before, 0), len(batch)) for place in (cut.start, end))
            before += len(batch)
            if begin < stop:
                yield _as(schema, pa.Table.from_batches([batch.slice(begin, stop - begin)]))


def _as(schema: pa.Schema, table: pa.Table) -> pa.Table:
    """A table in the columns of a schema that has all of its own; what it lacks is null."""
    columns = [
        table[item.name].cast(item.type) if item.name in table.column_names else pa.nulls(len(table), item.type)
        for item in schema
    ]
    return pa.table(columns, schema=schema)


# Lines.


@dataclass
class Lines:
    """The lines of a stream, and the byte and the number of the next."""

    stream: BinaryIO
    start: int = 0
    number: int = 1

    def __iter__(self) -> Iterator[bytes]:
        for line in self.stream:
            is_first = self.start == 0
            self.start += len(line)
            self.number += 1
            yield line.removeprefix(BOM) if is_first else line

    def go_to(self, cut: Cut) -> None:
        """Go on from where a cut begins."""
        self.stream.seek(cut.start)
        self.start, self.number = cut.start, cut.number


def _texts(lines: Lines, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    for line in lines:
        try:
            yield lines.number - 1, {columns[0]: decode(line).removesuffix("\r\n").removesuffix("\n")}
        except RecordError as bad:
            yield lines.number - 1, bad


def _json(lines: Lines, columns: Sequence[str]) -> Iterator[tuple[int, Row]]:
    return parsed((lines.number - 1, line) for line in lines if is_filled(line))


def _cells(lines: Lines, delimiter: str) -> Iterator[tuple[int, list[str] | RecordError]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(map(decode, lines), delimiter=delimiter, strict=True)
    while True:
        number = lines.number
        try:
            cells = next(reader, None)
        except (csv.Error, RecordError) as error:
            yield number, RecordError("damaged", f"the row cannot be read: {error}")
            return
        if cells is None:
            return
        if cells:
            yield number, cells


def _csv(lines: Lines, columns: Sequence[str], delimiter: str = ",") -> Iterator[tuple[int, Row]]:
    for number, cells in _cells(lines, delimiter):
        yield number, cells if isinstance(cells, RecordError) else by_name(columns, cells)


READERS: dict[str, Callable[[Lines, Sequence[str]], Iterator[tuple[int, Row]]]] = {
    "txt": _texts,
    "jsonl": _json,
    "csv": _csv,
    "tsv": partial(_csv, delimiter="\t"),
}
"""Numbered rows of lines, by the kind of their file and the columns that `_columns` says."""


def _columns(file: SourceFile, lines: Lines, field: str) -> Sequence[str]:
    """The columns of a file where its kind or its first line says them; the lines go on behind that."""
    if file.kind in ("txt", "jsonl"):
        return [field] if file.kind == "txt" else []
    for number, cells in _cells(lines, "\t" if file.kind == "tsv" else ","):
        if isinstance(cells, RecordError):
            raise DataError(f"{file.path}:{number}: {cells}")
        return check_header(file.path, number, cells)
    return []


def _checked(file: SourceFile, lines: Lines, columns: Sequence[str], field: str) -> Iterator[Record]:
    for number, row in READERS[file.kind](lines, columns):
        try:
            if isinstance(row, RecordError):
                raise row
            text_under(field, row)
        except RecordError as bad:
            raise DataError(f"{file.path}:{number}: {bad}") from bad
        yield row


def _scan_lines(file: SourceFile, field: str, shard_rows: int) -> Scan:
    cuts, schema = [], pa.schema([])
    with opened(file.path) as stream:
        lines = Lines(stream)
        columns = _columns(file, lines, field)
        rows = _checked(file, lines, columns, field)
        begin, count = (lines.start, lines.number), 0
        while part := list(islice(rows, min(BLOCK_ROWS, shard_rows - count))):
            where = f"{file.path}:{lines.number - 1}"
            found = pa.schema([(name, pa.string()) for name in columns]) if columns else table_of(part, where).schema
            schema, count = joined([(where, schema), (where, found)]), count + len(part)
            if count == shard_rows:
                cuts.append(Cut(*begin, count))
                begin, count = (lines.start, lines.number), 0
    if count:
        cuts.append(Cut(*begin, count))
    return Scan(file.path, cuts, schema)


def _line_blocks(file: SourceFile, cut: Cut, field: str, schema: pa.Schema) -> Iterator[pa.Table]:
    with opened(file.path) as stream:
        lines = Lines(stream)
        columns = _columns(file, lines, field)
        lines.go_to(cut)
        rows = islice(_checked(file, lines, columns, field), cut.rows)
        while part := list(islice(rows, BLOCK_ROWS)):
            yield table_of(part, f"{file.path}:{lines.number - 1}", schema)

"""Files to records: JSON Lines, relevance judgements and hub data sets, each record checked.

A training record is one of three kinds: `{"query", "positive", "negatives"?}`, `{"text", "label"}` or
`{"sentence1", "sentence2", "score"}`.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from pe.config import nearest

Record = dict[str, Any]

HUB = "hf://"
OPTIONAL = ("negatives",)


class DataError(ValueError):
    """Data that cannot be used; the message says file and line, what was expected, what came."""


class RecordError(Exception):
    """One record that cannot be used: a reason to count by, and the sentence for the user."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".xz":
        return cast(BinaryIO, lzma.open(path))
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, from 1, of a plain, xz or gzip file."""
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a file, found none") from error
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise DataError(f"{path}:{number + 1}: the file cannot be read: {error}") from error


def _decode(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError("not UTF-8", f"expected UTF-8, got byte {line[error.start]:#04x}") from error


def parse(line: bytes) -> Record:
    text = _decode(line).strip()
    if not text:
        raise RecordError("empty line", "expected a JSON object, got an empty line")
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        detail = f"expected a JSON object, got {_short(text)} ({error.msg} at column {error.colno})"
        raise RecordError("not JSON", detail) from error
    except (ValueError, RecursionError) as error:
        raise RecordError("not JSON", f"expected a JSON object, got {_short(text)} ({error})") from error
    if not isinstance(record, dict):
        raise RecordError("not an object", f"expected a JSON object, got {_short(record)}")
    return record


def jsonl_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.name.endswith((".jsonl", ".jsonl.xz", ".jsonl.gz")):
        expected = f"a .jsonl, .jsonl.xz or .jsonl.gz file, or {HUB}owner/name[:config][@split]"
        raise DataError(f"{path}: expected {expected}, got {path.name!r}")
    yield from _lines(path)


def read_jsonl(path: str | Path, keys: Sequence[str] = (), *, checked: bool = False) -> list[Record]:
    """All records of a `.jsonl`, `.jsonl.xz` or `.jsonl.gz` file; with `checked` their values are what `VALUES` says.

    Raises:
        DataError: the file is missing, damaged or empty, a line is no JSON object, or one of `keys` is missing in it or
            of another type.
    """
    records = []
    for number, line in jsonl_lines(Path(path)):
        try:
            record = parse(line)
            for key in keys:
                if key not in record:
                    raise RecordError("missing key", f"expected the key {key!r}, got {braced(record)}")
                if checked:
                    VALUES[key](key, record[key])
        except RecordError as bad:
            raise DataError(f"{path}:{number}: {bad}") from bad
        records.append(record)
    if not records:
        raise DataError(f"{path}: expected at least one record, got an empty file")
    return records


def read_lines(path: str | Path) -> list[str]:
    """All lines of a UTF-8 file, each without the `\\n` or `\\r\\n` that ends it; other separators are part of a line.

    Raises:
        DataError: the file is missing, damaged or not UTF-8, or no line of it holds anything.
    """
    lines = []
    for number, line in _lines(Path(path)):
        try:
            lines.append(_decode(line).removesuffix("\r\n").removesuffix("\n"))
        except RecordError as bad:
            raise DataError(f"{path}:{number}: {bad}") from bad
    if not any(lines):
        raise DataError(f"{path}: expected at least one text, got none")
    return lines


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Relevance judgements `{query id: {document id: score}}` of a tab-separated file.

    Raises:
        DataError: the file is missing or damaged, its header is not `query-id, corpus-id, score`, a line has not three
            fields, a score is no integer, or a pair is judged twice.
    """
    header = ["query-id", "corpus-id", "score"]
    qrels: dict[str, dict[str, int]] = {}
    number = 0
    for number, line in _lines(Path(path)):
        try:
            fields = _decode(line).rstrip("\r\n").split("\t")
        except RecordError as bad:
            raise DataError(f"{path}:{number}: {bad}") from bad
        if number == 1:
            if fields != header:
                raise DataError(f"{path}:1: expected the header {header}, got {_short(fields)}")
            continue
        if len(fields) != 3 or not all(fields):
            raise DataError(f"{path}:{number}: expected three tab-separated fields {header}, got {_short(fields)}")
        query, document, score = fields
        if not score.removeprefix("-").isdecimal():
            raise DataError(f"{path}:{number}: score: expected an integer, got {score!r}")
        if document in qrels.setdefault(query, {}):
            raise DataError(f"{path}:{number}: expected each pair once, got {query!r}, {document!r} again")
        qrels[query][document] = int(score)
    if not qrels:
        raise DataError(f"{path}:{number + 1}: expected at least one judgement, got none")
    return qrels


def hub_rows(path: str) -> Iterator[tuple[int, Record]]:
    """Numbered rows, from 1, of `hf://owner/name[:config][@split]`; the split is `train` unless named."""
    name, _, split = path.removeprefix(HUB).partition("@")
    name, _, configuration = name.partition(":")
    if not name:
        raise DataError(f"{path}: expected {HUB}owner/name[:config][@split], got no name")
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{path}: expected the package `datasets` (pip install datasets), got none") from error
    try:
        table = datasets.load_dataset(name, configuration or None, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = f"{error} ({error.__cause__})" if error.__cause__ else str(error)
        raise DataError(f"{path}: the data set cannot be loaded: {why}") from error
    yield from enumerate(table, start=1)


def _string(key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise RecordError("wrong type", f"{key}: expected a string, got {_short(value)}")
    check_unicode(key, value)


def _text(key: str, value: Any) -> None:
    _string(key, value)
    if not value.strip():
        raise RecordError("empty text", f"{key}: expected a text, got {_short(value)}")


def check_unicode(key: str, value: str) -> None:
    """Raise RecordError for a string that no tokenizer reads."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError("not Unicode", f"{key}: expected Unicode text, got half a surrogate pair") from error


def _texts(key: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list):
        raise RecordError("wrong type", f"{key}: expected a list of strings, got {_short(value)}")
    for number, item in enumerate(value):
        _text(f"{key}[{number}]", item)


def _strings(key: str, value: Any) -> None:
    if not isinstance(value, list):
        raise RecordError("wrong type", f"{key}: expected a list of strings, got {_short(value)}")
    for number, item in enumerate(value):
        _string(f"{key}[{number}]", item)


def _label(key: str, value: Any) -> None:
    if isinstance(value, str):
        _text(key, value)
    elif not isinstance(value, int) or isinstance(value, bool):
        raise RecordError("wrong type", f"{key}: expected a string or an integer, got {_short(value)}")


def _score(key: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise RecordError("wrong type", f"{key}: expected a finite number, got {_short(value)}")


Kind = dict[str, Callable[[str, Any], None]]
PAIRS: Kind = {"query": _text, "positive": _text, "negatives": _texts}
LABELLED: Kind = {"text": _text, "label": _label}
SCORED: Kind = {"sentence1": _text, "sentence2": _text, "score": _score}
KINDS = (PAIRS, LABELLED, SCORED)
VALUES: Kind = {
    **dict.fromkeys(("_id", "title", "text", "sentence1", "sentence2", "query"), _string),
    **dict.fromkeys(("positive", "negative"), _strings),
    "label": _label,
    "score": _score,
}
"""What stands under a key of an evaluation file."""


def braced(names: Any) -> str:
    """Keys as a message shows them; an optional one has a question mark."""
    return "{" + ", ".join(f"{name}?" if name in OPTIONAL else str(name) for name in names) + "}"


def _missing(record: Record, kind: Kind) -> list[str]:
    return [key for key in kind if key not in record and key not in OPTIONAL]


def detect(record: Record) -> Kind:
    """The kind whose keys a record has."""
    for kind in KINDS:
        if not _missing(record, kind):
            return kind
    known = [key for kind in KINDS for key in kind]
    unknown = next((key for key in record if key not in known), "")
    expected = " or ".join(map(braced, KINDS))
    raise RecordError("unknown kind", f"expected {expected}, got {braced(record)}{nearest(unknown, known)}")


def check(record: Record, kind: Kind, strict: bool) -> None:
    """Raise RecordError unless a record is a good one of this kind; `strict` forbids further keys."""
    missing = _missing(record, kind)
    if missing and kind in KINDS and any(not _missing(record, other) for other in KINDS):
        raise RecordError("mixed kinds", f"expected {braced(kind)} as in the first record, got {braced(record)}")
    if strict and (unknown := [key for key in record if key not in kind]):
        hint = nearest(unknown[0], list(kind))
        raise RecordError("unknown key", f"expected {braced(kind)}, got the key {unknown[0]!r}{hint}")
    if missing:
        raise RecordError("missing key", f"expected the key {missing[0]!r}, got {braced(record)}")
    for key, check in kind.items():
        if key in record:
            check(key, record[key])

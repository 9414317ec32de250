"""Lines to records: JSON Lines, texts and relevance judgements, and what may stand under a key of a record.

Lines of JSON Lines and of relevance judgements that hold nothing but white space are passed over; errors count them.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
import re
import reprlib
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from pe.config import nearest

Record = dict[str, Any]
Check = Callable[[str, Any], None]
"""Raises RecordError for a value that may not stand under a key."""
Kind = dict[str, Check]

JSONL = (".jsonl", ".jsonl.xz", ".jsonl.gz")
OPTIONAL = ("negatives", "shared_label", "other_label")
DAMAGED = (EOFError, lzma.LZMAError, zlib.error, OSError)
"""What reading a damaged file raises."""
BOM = b"\xef\xbb\xbf"
INT64 = range(-(2**63), 2**63)


class DataError(ValueError):
    """Data that cannot be used; the message says file and line, what was expected, what came."""


class RecordError(Exception):
    """One record that cannot be used: a reason to count by, and the sentence for the user."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


_repr = reprlib.Repr()  # never writes out whole what is long or nested deeply
_repr.maxlevel, _repr.maxstring, _repr.maxother = 4, 200, 200


def _cut(shown: str, length: int) -> str:
    return shown if len(shown) <= length else f"{shown[: length - 3]}..."


def short(value: object) -> str:
    return "null" if value is None else _cut(_repr.repr(value), 80)


def open_binary(path: Path) -> BinaryIO:
    """The bytes of a plain, xz or gzip file, or of standard input for `-`."""
    if str(path) == "-":
        return cast(BinaryIO, sys.stdin.buffer)
    suffix = path.suffix.lower()
    if suffix == ".xz":
        return cast(BinaryIO, lzma.open(path))
    return cast(BinaryIO, gzip.open(path)) if suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines, from 1, of a plain, xz or gzip file."""
    number = 0
    try:
        with open_binary(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line.removeprefix(BOM) if number == 1 else line
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a file, found none") from error
    except DAMAGED as error:
        raise DataError(f"{path}:{number + 1}: the file cannot be read: {error}") from error


def decode(line: bytes) -> str:
    """A line as text; RecordError where it is no UTF-8."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecordError("not UTF-8", f"expected UTF-8, got byte {line[error.start]:#04x}") from error


def is_filled(line: bytes) -> bool:
    """Whether a line holds anything but white space."""
    return bool(line.decode("utf-8", "replace").strip())


def filled_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that hold anything but white space, with their numbers in the file."""
    return ((number, line) for number, line in _lines(path) if is_filled(line))


def _object(pairs: list[tuple[str, Any]]) -> Record:
    record = dict(pairs)
    if len(record) < len(pairs):
        (repeated, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise RecordError("repeated key", f"expected each key once, got {short(repeated)} again")
    return record


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def parse(line: bytes) -> Record:
    """The JSON object of a line.

    Raises:
        RecordError: bytes that are no UTF-8, no JSON or no object, or a key that an object has twice.
    """
    text = decode(line).strip()
    try:
        record = _decoder.decode(text)
    except json.JSONDecodeError as error:
        detail = f"expected a JSON object, got {short(text)} ({error.msg} at column {error.colno})"
        raise RecordError("not JSON", detail) from error
    except (ValueError, RecursionError) as error:
        raise RecordError("not JSON", f"expected a JSON object, got {short(text)} ({error})") from error
    if not isinstance(record, dict):
        raise RecordError("not an object", f"expected a JSON object, got {short(record)}")
    return record


def jsonl_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a `.jsonl`, `.jsonl.xz` or `.jsonl.gz` file, without those that hold nothing."""
    if not path.name.lower().endswith(JSONL):
        raise DataError(f"{path}: expected a .jsonl, .jsonl.xz or .jsonl.gz file, got {path.name!r}")
    yield from filled_lines(path)


def jsonl_records(path: Path) -> Iterator[tuple[int, Record]]:
    """The records of a `.jsonl`, `.jsonl.xz` or `.jsonl.gz` file with the numbers of their lines.

    Raises:
        DataError: the file is missing, damaged or empty, or a line is no JSON object.
    """
    number = 0
    for number, line in jsonl_lines(path):
        try:
            record = parse(line)
        except RecordError as bad:
            raise DataError(f"{path}:{number}: {bad}") from bad
        yield number, record
    if not number:
        raise DataError(f"{path}: expected at least one record, got an empty file")


def read_jsonl(path: str | Path, keys: Sequence[str] = (), *, checked: bool = False) -> list[Record]:
    """All records of a `.jsonl`, `.jsonl.xz` or `.jsonl.gz` file; with `checked` their values are what `VALUES` says.

    Raises:
        DataError: see `jsonl_records`; or one of `keys` is missing in a record or of another type.
    """
    records = []
    for number, record in jsonl_records(Path(path)):
        try:
            for key in keys:
                if key not in record:
                    raise RecordError("missing key", f"expected the key {key!r}, got {braced(record)}")
                if checked:
                    VALUES[key](key, record[key])
        except RecordError as bad:
            raise DataError(f"{path}:{number}: {bad}") from bad
        records.append(record)
    return records


def read_lines(path: str | Path) -> list[str]:
    """All lines of a UTF-8 file, each without the `\\n` or `\\r\\n` that ends it; other separators are part of a line.

    A line that holds nothing is a text too, so that line N is text N.

    Raises:
        DataError: the file is missing, damaged or not UTF-8, or no line of it holds anything.
    """
    lines = []
    for number, line in _lines(Path(path)):
        try:
            lines.append(decode(line).removesuffix("\r\n").removesuffix("\n"))
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
    for place, (number, line) in enumerate(filled_lines(Path(path))):
        try:
            fields = decode(line).rstrip("\r\n").split("\t")
        except RecordError as bad:
            raise DataError(f"{path}:{number}: {bad}") from bad
        if place == 0:
            if fields != header:
                raise DataError(f"{path}:{number}: expected the header {header}, got {short(fields)}")
            continue
        if len(fields) != 3 or not all(fields):
            raise DataError(f"{path}:{number}: expected three tab-separated fields {header}, got {short(fields)}")
        query, document, score = fields
        if not re.fullmatch(r"-?\d{1,18}", score):
            raise DataError(f"{path}:{number}: score: expected an integer of up to 18 digits, got {short(score)}")
        if document in qrels.setdefault(query, {}):
            raise DataError(f"{path}:{number}: expected each pair once, got {query!r}, {document!r} again")
        qrels[query][document] = int(score)
    if not qrels:
        raise DataError(f"{path}:{number + 1}: expected at least one judgement, got none")
    return qrels


def check_string(key: str, value: Any) -> None:
    """Raise RecordError for what is no string, or one that no tokenizer reads."""
    if not isinstance(value, str):
        raise RecordError("wrong type", f"{key}: expected a string, got {short(value)}")
    check_unicode(key, value)


def check_text(key: str, value: Any) -> None:
    check_string(key, value)
    if not value.strip():
        raise RecordError("empty text", f"{key}: expected a text, got {short(value)}")


def check_unicode(key: str, value: str) -> None:
    """Raise RecordError for a string that no tokenizer reads."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError("not Unicode", f"{key}: expected Unicode text, got half a surrogate pair") from error


def _strings(key: str, value: Any, check_item: Check = check_string) -> None:
    if not isinstance(value, list):
        raise RecordError("wrong type", f"{key}: expected a list of strings, got {short(value)}")
    for number, item in enumerate(value):
        check_item(f"{key}[{number}]", item)


def check_texts(key: str, value: Any) -> None:
    """Raise RecordError for what is neither null nor a list of texts."""
    if value is not None:
        _strings(key, value, check_text)


def _integer(key: str, value: int) -> None:
    if value not in INT64:
        raise RecordError("out of range", f"{key}: expected an integer of up to 64 bits, got {short(value)}")


def check_label(key: str, value: Any) -> None:
    if isinstance(value, str):
        check_text(key, value)
    elif not isinstance(value, int) or isinstance(value, bool):
        raise RecordError("wrong type", f"{key}: expected a string or an integer, got {short(value)}")
    else:
        _integer(key, value)


def check_score(key: str, value: Any) -> None:
    if isinstance(value, int) and not isinstance(value, bool):
        _integer(key, value)
    elif not isinstance(value, float) or not math.isfinite(value):
        raise RecordError("wrong type", f"{key}: expected a finite number, got {short(value)}")


VALUES: Kind = {
    **dict.fromkeys(("_id", "title", "text", "sentence1", "sentence2", "query"), check_string),
    **dict.fromkeys(("positive", "negative"), _strings),
    "label": check_label,
    "score": check_score,
}
"""What stands under a key of an evaluation file."""


def braced(names: Any) -> str:
    """Keys as a message shows them."""
    shown = (name if name.isprintable() else repr(name) for name in names)
    return "{" + _cut(", ".join(shown), 200) + "}"


def check(record: Record, kind: Kind) -> None:
    """Raise RecordError for a record that is not of this kind: a key is missing, unknown, or holds another value."""
    for key in record:
        if key not in kind:
            hint = nearest(key, list(kind)) or "; leave it out"
            expected = braced(f"{name}?" if name in OPTIONAL else name for name in kind)
            raise RecordError("unknown key", f"expected {expected}, got the key {short(key)}{hint}")
    for key, check_value in kind.items():
        if key in record:
            check_value(key, record[key])
        elif key not in OPTIONAL:
            raise RecordError("missing key", f"expected the key {key!r}, got {braced(record)}")

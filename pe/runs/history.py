"""What a run logged: a JSON object a line, in its folder's `history.jsonl`.

Each record has `step` and, of training until then, `seconds` and `tokens` (of the main process). With them stands what
was logged there: `loss`, `gradient_norm`, `rate` and `tokens_per_second`; or `score`; or `instructions_alike`; or
`words` (see `pe/measure/words.py`). What is not a finite number is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pe.runs.files import write_text

Record = dict[str, Any]
NUMBERS = ("step", "seconds", "tokens")
"""Of every record."""


class HistoryError(ValueError):
    """A history that cannot be read or written."""


class HistoryFile:
    """The records of one run, in the order of its steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a record in one write, behind the others.

        Raises:
            HistoryError: the disk is full, or the file cannot be written for another reason.
        """
        try:
            with self.path.open("ab") as file:
                file.write(line_of(record).encode())
        except OSError as error:
            raise HistoryError(f"{self.path}: the record cannot be written; is the disk full? ({error})") from error

    def records(self) -> list[Record]:
        """All whole records; none without a file. The half line that a killed run may leave at the end is none.

        Raises:
            HistoryError: a line that is no record.
        """
        if not self.path.exists():
            return []
        *lines, _ = self.path.read_bytes().split(b"\n")
        return [self._parsed(line, number) for number, line in enumerate(lines, start=1)]

    def _parsed(self, line: bytes, number: int) -> Record:
        try:
            record: Record = json.loads(line)
            if all(isinstance(record[name], int | float) for name in NUMBERS):
                return record
        except (ValueError, KeyError, TypeError):
            pass
        expected, got = f"an object with numbers under {', '.join(NUMBERS)}", line[:40].decode(errors="replace")
        raise HistoryError(f"{self.path}:{number}: expected {expected}, got {got!r}; remove the line")

    def keep(self, last: int) -> None:
        """Drop what is behind step `last`, which a run that goes on from there logs again.

        Raises:
            HistoryError: a line that is no record.
        """
        if self.path.exists():
            write_text(self.path, "".join(line_of(record) for record in self.records() if record["step"] <= last))


def line_of(record: Mapping[str, Any]) -> str:
    """A record as its line."""
    plain = {key: _finite_or_none(value) for key, value in record.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value

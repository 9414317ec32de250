"""Layouts of training data: the columns of a row, and what each becomes in a record of ours.

A record is a query with its `positives` and `negatives`, a `text` with its `label`, or `sentence1` and `sentence2` with
their `score`, each with the row's own `instruction` or without. `LAYOUTS` has a line a layout; a data set has the first
one whose needed columns its first row has and that leaves the fewest others. A column that its layout does not know
is refused by name. Columns may stand in any order, and so may negatives: `negative_2` comes before `negative_10`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pe.config import nearest
from pe.data.records import Record, RecordError, braced, check_label, check_score, check_text, short

Read = Callable[[str, Any], Record]
"""Name and value of a column -> what it gives to the record; lists of several columns are joined."""


def text(name: str) -> Read:
    """One text."""

    return lambda column, value: {name: _text(column, value)}


def texts(name: str) -> Read:
    """A text, or a list of texts."""
    return lambda column, value: {
        name: [_text(column, value)] if isinstance(value, str) else _each(column, value, _text)
    }


def passages(name: str) -> Read:
    """A list of passages, whose title stands before the text."""
    return lambda column, value: {name: _each(column, value, _passage)}


def conversation(name: str) -> Read:
    """The message of a user; that of a system before it is the instruction."""

    def read(column: str, value: Any) -> Record:
        *system, user = _messages(column, value)
        return {name: user} | ({"instruction": system[0]} if system else {})

    return read


def conversations(name: str) -> Read:
    """A list of conversations, each the message of a user."""
    return lambda column, value: {name: _each(column, value, _user)}


def only_conversation(name: str) -> Read:
    """The one conversation of a list."""

    def read(column: str, value: Any) -> Record:
        found = _each(column, value, _user)
        if len(found) != 1:
            raise RecordError("wrong number", f"{column}: expected one conversation beside a label, got {len(found)}")
        return {name: found[0]}

    return read


def label(column: str, value: Any) -> Record:
    """What a text is, a string or an integer."""
    check_label(column, value)
    return {"label": value}


def group(column: str, value: Any) -> Record:
    """What a row belongs to, a string or an integer."""
    check_label(column, value)
    return {"group": value}


def score(column: str, value: Any) -> Record:
    """A number; csv and tsv have it in letters."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    check_score(column, value)
    return {"score": value}


def left_out(column: str, value: Any) -> Record:
    """An id, which training does not need."""
    return {}


def _each(column: str, value: Any, read: Callable[[str, Any], str]) -> list[str]:
    if not isinstance(value, list):
        raise RecordError("wrong type", f"{column}: expected a text or a list, got {short(value)}")
    return [read(f"{column}[{place}]", item) for place, item in enumerate(value)]


def _text(place: str, value: Any) -> str:
    check_text(place, value)
    return str(value)


def _passage(place: str, value: Any) -> str:
    if not isinstance(value, dict) or not {"text"} <= value.keys() <= {"docid", "title", "text"}:
        raise RecordError("wrong type", f"{place}: expected {{docid?, title?, text}}, got {short(value)}")
    title = [_text(f"{place}.title", value["title"])] if value.get("title") else []
    return " ".join([*title, _text(f"{place}.text", value["text"])])


def _user(place: str, value: Any) -> str:
    *system, user = _messages(place, value)
    if system:
        cure = "; leave it out and give document_instruction in the recipe"
        raise RecordError("document's instruction", f"{place}: expected no message of the system, got one{cure}")
    return user


def _messages(place: str, value: Any) -> list[str]:
    """Contents of `[system?, user]`."""
    is_list = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    roles = [item.get("role") for item in value] if is_list else None
    if roles not in (["user"], ["system", "user"]) or not all(item.keys() == {"role", "content"} for item in value):
        expected = "a message {role, content} of the user, or of the system and the user"
        raise RecordError("wrong messages", f"{place}: expected {expected}, got {short(value)}")
    return [_text(f"{place}[{number}].content", item["content"]) for number, item in enumerate(value)]


Kind = Literal["pairs", "labelled", "scored"]


@dataclass(frozen=True)
class Layout:
    """Columns by name; a number may follow `negative`."""

    name: str
    kind: Kind
    needed: Mapping[str, Read]
    optional: Mapping[str, Read] = field(default_factory=dict)

    def __str__(self) -> str:
        return braced([*self.needed, *(f"{name}?" for name in self.optional)])

    @cached_property
    def columns(self) -> Mapping[str, Read]:
        return {**self.needed, **self.optional}

    def reading(self, column: str) -> Read | None:
        """What reads a column; None of one that is not known."""
        return self.columns.get(column) or (self.optional.get("negative") if NUMBERED.fullmatch(column) else None)

    def unknown(self, columns: Iterable[str]) -> list[str]:
        return [column for column in columns if self.reading(column) is None]

    def record(self, row: Record) -> Record:
        """A row as a record of ours.

        Raises:
            RecordError: a column is missing or unknown, or its value is not what it should be.
        """
        missing = [column for column in self.needed if column not in row]
        if missing and any(other.needed.keys() <= row.keys() for other in LAYOUTS):
            raise RecordError("mixed kinds", f"expected {self} as in the first record, got {braced(row)}")
        if unknown := self.unknown(row):
            column = short(unknown[0])
            hint = nearest(unknown[0], list(self.columns)) or ";"
            cure = f"a training set's `columns` names it, or leaves it out, as {{{column}: null}}"
            raise RecordError("unknown key", f"expected {self}, got the key {column}{hint} {cure}")
        if missing:
            raise RecordError("missing key", f"expected the key {missing[0]!r}, got {braced(row)}")
        record: Record = {}
        for column in sorted(row, key=_in_order):
            read, value = self.reading(column), row[column]
            assert read is not None
            for key, part in {} if value is None and column not in self.needed else read(column, value).items():
                record[key] = record[key] + part if isinstance(part, list) and key in record else part
        if not record.get("positives", True):
            raise RecordError("no positive", f"expected at least one positive, got none in {braced(row)}")
        return record


NUMBERED = re.compile(r"negative_?(\d+)")


def _in_order(column: str) -> tuple[str, int]:
    numbered = NUMBERED.fullmatch(column)
    return ("negative", int(numbered[1])) if numbered else (column, 0)


INSTRUCTION = {"instruction": text("instruction")}
GROUP = {"group": group}
NEGATIVES = {"negatives": texts("negatives"), "negative": texts("negatives")}
SENTENCES = {"sentence1": text("sentence1"), "sentence2": text("sentence2")}
POSITIVES = texts("positives")

LAYOUTS = (
    Layout("pairs", "pairs", {"query": text("query"), "positive": POSITIVES}, NEGATIVES | INSTRUCTION | GROUP),
    Layout("labelled texts", "labelled", {"text": text("text"), "label": label}, INSTRUCTION),
    Layout("scored pairs", "scored", SENTENCES | {"score": score}, INSTRUCTION),
    Layout("sentence-transformers, labelled pairs", "scored", SENTENCES | {"label": score}, INSTRUCTION),
    Layout(
        "sentence-transformers",
        "pairs",
        {"anchor": text("query"), "positive": POSITIVES},
        NEGATIVES | INSTRUCTION | GROUP,
    ),
    Layout(
        "FlagEmbedding",
        "pairs",
        {"query": text("query"), "pos": POSITIVES},
        {"neg": texts("negatives"), "prompt": text("instruction")},
    ),
    Layout(
        "Tevatron, MS MARCO",
        "pairs",
        {"query": text("query"), "positive_passages": passages("positives")},
        {"negative_passages": passages("negatives"), "query_id": left_out},
    ),
    Layout(
        "ms-swift",
        "pairs",
        {"messages": conversation("query"), "positive_messages": conversations("positives")},
        {"negative_messages": conversations("negatives"), "rejected_messages": conversations("negatives")},
    ),
    Layout(
        "ms-swift, labelled pairs",
        "scored",
        {
            "messages": conversation("sentence1"),
            "positive_messages": only_conversation("sentence2"),
            "label": score,
        },
    ),
    Layout(
        "ms-swift, earlier",
        "pairs",
        {"query": text("query"), "response": POSITIVES},
        {"rejected_response": texts("negatives"), "system": text("instruction")},
    ),
    Layout(
        "ms-swift, earlier, labelled pairs",
        "scored",
        {"query": text("sentence1"), "response": text("sentence2"), "label": score},
        {"system": text("instruction")},
    ),
)


def detect(row: Record) -> Layout:
    """The layout of a row.

    Raises:
        RecordError: none has its columns.
    """
    known = [layout for layout in LAYOUTS if layout.needed.keys() <= row.keys()]
    if known:
        return min(known, key=lambda layout: len(layout.unknown(row)))
    names = {name: None for layout in LAYOUTS for name in layout.needed}
    other = next((column for column in row if column not in names), "")
    hint = nearest(other, list(names))
    expected = " or ".join(dict.fromkeys(braced(layout.needed) for layout in LAYOUTS))
    cure = "say in the recipe what yours are, as `columns: {question: query, answer: positive, id: null}`"
    raise RecordError("unknown kind", f"expected the columns {expected}, got {braced(row)}{hint}; {cure}")


def renamed(row: Record, columns: Mapping[str, str | None]) -> Record:
    """A row under the names that a recipe gives its columns, without those that it leaves out.

    Raises:
        RecordError: two columns have one name.
    """
    found: Record = {}
    for column, value in row.items():
        name = columns.get(column, column)
        if name in found:
            raise RecordError("repeated column", f"expected one column of the name {name!r}, got {short(column)} too")
        if name is not None:
            found[name] = value
    return found

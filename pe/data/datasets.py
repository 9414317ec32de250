"""Records to examples: a training set, and what became of every row of its file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pe.config import DatasetConfig
from pe.data.records import (
    HUB,
    LABELLED,
    SCORED,
    DataError,
    Kind,
    Record,
    RecordError,
    braced,
    check,
    detect,
    hub_rows,
    jsonl_lines,
    parse,
)

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Count:
    """How many rows, and the line (the row, for `hf://`) of the first one."""

    rows: int
    first: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of every row read: `rows == used + skipped + unused`."""

    path: str
    keys: tuple[str, ...]
    """The keys of the record kind."""
    rows: int
    examples: int
    hard_negative_rows: int = 0
    """Scored pairs below `positive_from` that serve as hard negatives."""
    skipped: Mapping[str, Count] = field(default_factory=dict)
    """Bad records by reason."""
    unused: Mapping[str, Count] = field(default_factory=dict)
    """Good records that no example can be made of, by reason."""
    ignored_keys: tuple[str, ...] = ()
    """Further columns of a hub data set."""
    max_rows: int | None = None
    """Set where reading stopped before the end."""

    @property
    def used(self) -> int:
        return self.examples + self.hard_negative_rows

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.rows:,} rows of {braced(self.keys)}, {self.examples:,} examples"]
        if self.hard_negative_rows:
            parts[0] += f", {self.hard_negative_rows:,} more rows as hard negatives"
        for title, counts in (("skipped", self.skipped), ("unused", self.unused)):
            parts += [f"{title} {count.rows:,}: {why} (first: {count.first})" for why, count in counts.items()]
        if self.ignored_keys:
            parts.append(f"ignored columns: {', '.join(self.ignored_keys)}")
        if self.max_rows is not None:
            parts.append(f"stopped at max_rows = {self.max_rows:,}; the set has more")
        return "\n  ".join(parts)


class _Tally:
    """Rows by reason while a data set is read."""

    def __init__(self) -> None:
        self.counts: dict[str, Count] = {}

    def add(self, reason: str, number: int) -> None:
        known = self.counts.get(reason, Count(0, number))
        self.counts[reason] = Count(known.rows + 1, min(known.first, number))


@dataclass(frozen=True)
class Example:
    """A query, a document that answers it, documents that do not, and its instruction."""

    query: str
    positive: str
    negatives: tuple[str, ...]
    label: int
    """What query and positive share; -1: none."""
    instruction: str
    side: int = 0
    """Which of the contradicting sides the query is on; labels of one side say nothing of another's."""
    other_label: int = -1
    """The positive's label on the other side; -1: none."""


class TrainingSet(Protocol):
    """What batches are made of.

    Attributes:
        queries_of_a_row: examples that a row gives to a batch.
        contradicts: whether a query stands under several instructions, each of which makes the others' positives wrong.
    """

    queries_of_a_row: ClassVar[int]
    contradicts: ClassVar[bool]

    @property
    def config(self) -> DatasetConfig: ...

    @property
    def report(self) -> Report: ...

    @property
    def wordings(self) -> tuple[str, ...]:
        """Every instruction that queries may be under."""
        ...

    @property
    def document_instruction(self) -> str:
        """Instruction of the documents."""
        ...

    def __len__(self) -> int:
        """Rows."""
        ...

    def examples(self, index: int, rng: np.random.Generator) -> list[Example]:
        """What row `index` gives to a batch."""
        ...


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """The examples of one training set. Build it with `load_dataset`."""

    config: DatasetConfig
    report: Report
    queries: list[str]
    positives: list[str]
    """Empty for labelled texts, whose positive is drawn."""
    negatives: list[tuple[str, ...]]
    """Empty for labelled texts."""
    labels: Ints
    """Ascending; -1 where there is none."""

    queries_of_a_row: ClassVar[int] = 1
    contradicts: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def wordings(self) -> tuple[str, ...]:
        return (self.config.instruction,)

    @property
    def document_instruction(self) -> str:
        return self.config.of_documents

    def examples(self, index: int, rng: np.random.Generator) -> list[Example]:
        """What row `index` gives to a batch."""
        return [self.draw(index, rng)]

    def draw(self, index: int, rng: np.random.Generator) -> Example:
        """Row `index` as it stands in the file; a labelled text's positive is another text of its label."""
        label, instruction = int(self.labels[index]), self.config.instruction
        if label < 0:
            return Example(self.queries[index], self.positives[index], self.negatives[index], label, instruction)
        first, end = np.searchsorted(self.labels, (label, label + 1))
        other = first + (index - first + rng.integers(1, end - first)) % (end - first)
        return Example(self.queries[index], self.queries[other], (), label, instruction)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Row `index` in its templates."""
        raw, of_documents = self.draw(index, rng), self.config.document_text
        return replace(
            raw,
            query=self.config.query_text(raw.query),
            positive=of_documents(raw.positive),
            negatives=tuple(map(of_documents, raw.negatives)),
        )


class _Parts(NamedTuple):
    """What a data set is made of, for one record kind."""

    queries: list[str]
    labels: list[int]
    positives: list[str]
    negatives: list[tuple[str, ...]]
    hard_negative_rows: int = 0


Rows = list[tuple[int, Record]]


def _build_pairs(rows: Rows) -> _Parts:
    return _Parts(
        queries=[record["query"] for _, record in rows],
        labels=[-1] * len(rows),
        positives=[record["positive"] for _, record in rows],
        negatives=[tuple(record.get("negatives") or ()) for _, record in rows],
    )


def _build_labelled(rows: Rows, unused: _Tally) -> _Parts:
    groups: dict[str | int, dict[str, int]] = {}
    for number, record in rows:
        group = groups.setdefault(record["label"], {})
        if record["text"] in group:
            unused.add("the text and label of an earlier row", number)
        group.setdefault(record["text"], number)
    parts = _Parts([], [], [], [])
    for group in groups.values():
        if len(group) == 1:
            unused.add("the only text of its label", *group.values())
            continue
        parts.labels.extend([parts.labels[-1] + 1 if parts.labels else 0] * len(group))
        parts.queries.extend(group)
    return parts


def _build_scored(rows: Rows, positive_from: float, unused: _Tally) -> _Parts:
    positives = [record for _, record in rows if record["score"] >= positive_from]
    negatives: dict[str, list[str]] = {record["sentence1"]: [] for record in positives}
    for number, record in rows:
        if record["score"] < positive_from and record["sentence1"] in negatives:
            negatives[record["sentence1"]].append(record["sentence2"])
        elif record["score"] < positive_from:
            unused.add("a score below positive_from, and no positive pair with its sentence1", number)
    return _Parts(
        queries=[record["sentence1"] for record in positives],
        labels=[-1] * len(positives),
        positives=[record["sentence2"] for record in positives],
        negatives=[tuple(negatives[record["sentence1"]]) for record in positives],
        hard_negative_rows=sum(map(len, negatives.values())),
    )


def _build(kind: Kind, rows: Rows, config: DatasetConfig, unused: _Tally) -> _Parts:
    if kind is SCORED:
        assert config.positive_from is not None
        return _build_scored(rows, config.positive_from, unused)
    return _build_labelled(rows, unused) if kind is LABELLED else _build_pairs(rows)


def _check_positive_from(config: DatasetConfig, kind: Kind, where: str) -> None:
    if kind is SCORED and config.positive_from is None:
        raise DataError(f"{where}: positive_from: expected the score from which a pair is a positive, got none")
    if kind is not SCORED and config.positive_from is not None:
        raise DataError(f"{where}: positive_from: expected null for {braced(kind)}, got {config.positive_from}")


def check_limit(config: DatasetConfig) -> None:
    """Raise DataError for a limit that leaves no row."""
    if config.max_rows is not None and config.max_rows < 1:
        raise DataError(f"{config.path}: max_rows: expected at least 1, or null, got {config.max_rows}")


def load_dataset(config: DatasetConfig) -> Dataset:
    """Read a data set and check every record of it.

    Raises:
        DataError: the set is missing, damaged or holds no usable row; a record is bad and `on_bad_record` is `error`;
            `positive_from` is missing for scored pairs or given for others.
    """
    path, limit = config.path, config.max_rows
    check_limit(config)
    on_hub = path.startswith(HUB)
    source: Iterator[tuple[int, Any]] = hub_rows(path) if on_hub else jsonl_lines(Path(path))
    kind: Kind | None = None
    rows: Rows = []
    skipped, unused = _Tally(), _Tally()
    extra: dict[str, None] = {}
    count, cut = 0, False
    for number, item in source:
        if cut := count == limit:
            break
        count += 1
        try:
            record = item if on_hub else parse(item)
            if kind is None:
                kind = detect(record)
                _check_positive_from(config, kind, f"{path}:{number}")
            record = check(record, kind, strict=not on_hub)
        except RecordError as bad:
            if config.on_bad_record == "error":
                raise DataError(f"{path}:{number}: {bad}") from bad
            skipped.add(bad.reason, number)
        else:
            extra.update(dict.fromkeys(key for key in record if key not in kind))
            rows.append((number, record))
    parts = _build(kind, rows, config, unused) if kind else _Parts([], [], [], [])
    report = Report(
        path=path,
        keys=tuple(kind or ()),
        rows=count,
        examples=len(parts.queries),
        hard_negative_rows=parts.hard_negative_rows,
        skipped=skipped.counts,
        unused=unused.counts,
        ignored_keys=tuple(extra),
        max_rows=limit if cut else None,
    )
    if not parts.queries:
        raise DataError(f"{path}: expected at least one usable record, got none\n{report}")
    return Dataset(
        config=config,
        report=report,
        queries=parts.queries,
        positives=parts.positives,
        negatives=parts.negatives,
        labels=np.array(parts.labels, dtype=np.int64),
    )

"""Records to examples: a training set, and what became of every row of its file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pe.config import DatasetConfig
from pe.data.layouts import Kind, Layout, detect, left_out, renamed
from pe.data.records import DataError, Record, RecordError, braced
from pe.data.tables import rows

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Count:
    """How many rows, and the number of the first one."""

    rows: int
    first: int


@dataclass(frozen=True, kw_only=True)
class Report:
    """What became of every row read: `rows == used + skipped + unused`."""

    path: str
    columns: str
    """Those that are used, by the names of the layout."""
    rows: int
    examples: int
    hard_negative_rows: int = 0
    """Scored pairs below `positive_from` that serve as hard negatives."""
    skipped: Mapping[str, Count] = field(default_factory=dict)
    """Bad records by reason."""
    unused: Mapping[str, Count] = field(default_factory=dict)
    """Good records that no example can be made of, by reason."""
    left_out: tuple[str, ...] = ()
    """Columns that the recipe leaves out, and ids."""
    max_rows: int | None = None
    """Set where reading stopped before the end."""

    @property
    def used(self) -> int:
        return self.examples + self.hard_negative_rows

    def __str__(self) -> str:
        parts = [f"{self.path}: {self.rows:,} rows of {self.columns}, {self.examples:,} examples"]
        if self.hard_negative_rows:
            parts[0] += f", {self.hard_negative_rows:,} more rows as hard negatives"
        for title, counts in (("skipped", self.skipped), ("unused", self.unused)):
            parts += [f"{title} {count.rows:,}: {why} (first: {count.first})" for why, count in counts.items()]
        if self.left_out:
            parts.append(f"columns left out: {', '.join(self.left_out)}")
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
    def groups(self) -> Ints:
        """A number for every row; rows of one number stand together in every epoch."""
        ...

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
    instructions: list[str]
    """A row's own, or the recipe's."""
    positives: list[tuple[str, ...]]
    """Of which one is drawn; empty for labelled texts, whose positive is another text."""
    negatives: list[tuple[str, ...]]
    """Empty for labelled texts."""
    labels: Ints
    """Ascending; -1 where there is none."""
    groups: Ints

    queries_of_a_row: ClassVar[int] = 1
    contradicts: ClassVar[bool] = False

    def __len__(self) -> int:
        return len(self.queries)

    @property
    def wordings(self) -> tuple[str, ...]:
        return tuple(sentence for sentence, _ in Counter(self.instructions).most_common())

    @property
    def document_instruction(self) -> str:
        return self.config.of_documents

    def examples(self, index: int, rng: np.random.Generator) -> list[Example]:
        """What row `index` gives to a batch."""
        return [self.draw(index, rng)]

    def draw(self, index: int, rng: np.random.Generator) -> Example:
        """Row `index` as it stands in the file; a labelled text's positive is another text of its label."""
        label, instruction = int(self.labels[index]), self.instructions[index]
        if label < 0:
            positives = self.positives[index]
            drawn = positives[0 if len(positives) == 1 else rng.integers(len(positives))]
            return Example(self.queries[index], drawn, self.negatives[index], label, instruction)
        first, end = np.searchsorted(self.labels, (label, label + 1))
        other = first + (index - first + rng.integers(1, end - first)) % (end - first)
        return Example(self.queries[index], self.queries[other], (), label, instruction)


class _Parts(NamedTuple):
    """What a data set is made of."""

    queries: list[str]
    instructions: list[str]
    labels: list[int]
    positives: list[tuple[str, ...]]
    negatives: list[tuple[str, ...]]
    hard_negative_rows: int = 0
    groups: Sequence[str | int | None] = ()
    """Of every row, or of none."""


Rows = list[tuple[int, Record]]


def _build_pairs(rows: Rows) -> _Parts:
    return _Parts(
        queries=[record["query"] for _, record in rows],
        instructions=[record["instruction"] for _, record in rows],
        labels=[-1] * len(rows),
        positives=[tuple(record["positives"]) for _, record in rows],
        negatives=[tuple(record.get("negatives", ())) for _, record in rows],
        groups=[record.get("group") for _, record in rows],
    )


def _build_labelled(rows: Rows, unused: _Tally) -> _Parts:
    groups: dict[str | int, dict[str, tuple[int, str]]] = {}
    for number, record in rows:
        group = groups.setdefault(record["label"], {})
        if record["text"] in group:
            unused.add("the text and label of an earlier row", number)
        group.setdefault(record["text"], (number, record["instruction"]))
    parts = _Parts([], [], [], [], [])
    for group in groups.values():
        if len(group) == 1:
            ((number, _),) = group.values()
            unused.add("the only text of its label", number)
            continue
        parts.labels.extend([parts.labels[-1] + 1 if parts.labels else 0] * len(group))
        parts.queries.extend(group)
        parts.instructions.extend(instruction for _, instruction in group.values())
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
        instructions=[record["instruction"] for record in positives],
        labels=[-1] * len(positives),
        positives=[(record["sentence2"],) for record in positives],
        negatives=[tuple(negatives[record["sentence1"]]) for record in positives],
        hard_negative_rows=sum(map(len, negatives.values())),
    )


def _build(kind: Kind, rows: Rows, config: DatasetConfig, unused: _Tally) -> _Parts:
    if kind == "scored":
        assert config.positive_from is not None
        return _build_scored(rows, config.positive_from, unused)
    return _build_labelled(rows, unused) if kind == "labelled" else _build_pairs(rows)


def _check_positive_from(config: DatasetConfig, layout: Layout, where: str) -> None:
    if layout.kind == "scored" and config.positive_from is None:
        raise DataError(f"{where}: positive_from: expected the score from which a pair is a positive, got none")
    if layout.kind != "scored" and config.positive_from is not None:
        raise DataError(f"{where}: positive_from: expected null for {layout}, got {config.positive_from}")


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
    layout: Layout | None = None
    found: Rows = []
    skipped, unused = _Tally(), _Tally()
    columns: dict[str, None] = {}
    count, cut = 0, False
    for number, row in rows(path):
        if cut := count == limit:
            break
        count += 1
        try:
            if isinstance(row, RecordError):
                raise row
            columns.update(dict.fromkeys(row))
            row = renamed(row, config.columns)
            if layout is None:
                layout = detect(row)
                _check_positive_from(config, layout, f"{path}:{number}")
            found.append((number, _instructed(layout.record(row), config)))
        except RecordError as bad:
            if config.on_bad_record == "error":
                raise DataError(f"{path}:{number}: {bad}") from bad
            skipped.add(bad.reason, number)
    if absent := [name for name in config.columns if name not in columns]:
        raise DataError(f"{path}: columns: expected names of its columns, {braced(columns)}, got {absent[0]!r}")
    parts = _build(layout.kind, found, config, unused) if layout else _Parts([], [], [], [], [])
    report = Report(
        path=path,
        columns=braced(_used(columns, config, layout)),
        rows=count,
        examples=len(parts.queries),
        hard_negative_rows=parts.hard_negative_rows,
        skipped=skipped.counts,
        unused=unused.counts,
        left_out=tuple(name for name in columns if _is_left_out(config.columns.get(name, name), layout)),
        max_rows=limit if cut else None,
    )
    if not parts.queries:
        raise DataError(f"{path}: expected at least one usable record, got none;\n{report}")
    return Dataset(
        config=config,
        report=report,
        queries=parts.queries,
        instructions=parts.instructions,
        positives=parts.positives,
        negatives=parts.negatives,
        labels=np.array(parts.labels, dtype=np.int64),
        groups=_numbered(parts.groups or [None] * len(parts.queries)),
    )


def _numbered(groups: Sequence[str | int | None]) -> Ints:
    """The row with which each row's group begins; its own where it has no group."""
    first: dict[str | int, int] = {}
    places = (row if group is None else first.setdefault(group, row) for row, group in enumerate(groups))
    return np.fromiter(places, dtype=np.int64)


def _instructed(record: Record, config: DatasetConfig) -> Record:
    """The record with its own instruction, or the recipe's.

    Raises:
        RecordError: there is neither.
    """
    if not record.setdefault("instruction", config.instruction):
        raise RecordError("no instruction", "expected an instruction in the row, or one in the recipe, got none")
    return record


def _used(columns: Iterable[str], config: DatasetConfig, layout: Layout | None) -> list[str]:
    """Columns of a file that the layout reads, by its names."""
    names = [config.columns.get(name, name) for name in columns]
    return [name for name in names if name and layout and layout.reading(name) not in (None, left_out)]


def _is_left_out(name: str | None, layout: Layout | None) -> bool:
    return name is None or (layout is not None and layout.reading(name) is left_out)

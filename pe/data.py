"""Records, data sets and the batch plan: from files to the texts of every training step.

A data set holds one of three kinds of record: `{"query", "positive", "negatives"?}`, `{"text", "label"}` or
`{"sentence1", "sentence2", "score"}`. The batch plan keeps no state: batch `step` is a function of (seed, step), so a
resumed run continues where it stopped.

Legend: B queries of a batch on one process, N its documents (B positives, then hard negatives).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from pe.config import DatasetConfig, nearest

Ints = npt.NDArray[np.int64]
Record = dict[str, Any]

HUB = "hf://"
OPTIONAL = ("negatives",)


class DataError(ValueError):
    """Data that cannot be used; the message says file and line, what was expected, what came."""


class _RecordError(Exception):
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
        raise _RecordError("not UTF-8", f"expected UTF-8, got byte {line[error.start]:#04x}") from error


def _parse(line: bytes) -> Record:
    text = _decode(line).strip()
    if not text:
        raise _RecordError("empty line", "expected a JSON object, got an empty line")
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        detail = f"expected a JSON object, got {_short(text)} ({error.msg} at column {error.colno})"
        raise _RecordError("not JSON", detail) from error
    except (ValueError, RecursionError) as error:
        raise _RecordError("not JSON", f"expected a JSON object, got {_short(text)} ({error})") from error
    if not isinstance(record, dict):
        raise _RecordError("not an object", f"expected a JSON object, got {_short(record)}")
    return record


def _jsonl_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    if not path.name.endswith((".jsonl", ".jsonl.xz", ".jsonl.gz")):
        expected = f"a .jsonl, .jsonl.xz or .jsonl.gz file, or {HUB}owner/name[:config][@split]"
        raise DataError(f"{path}: expected {expected}, got {path.name!r}")
    yield from _lines(path)


def read_jsonl(path: str | Path, keys: Sequence[str] = ()) -> list[Record]:
    """All records of a `.jsonl`, `.jsonl.xz` or `.jsonl.gz` file.

    Raises:
        DataError: the file is missing, damaged or empty, a line is no JSON object, or one of `keys` is missing in it.
    """
    records = []
    for number, line in _jsonl_lines(Path(path)):
        try:
            record = _parse(line)
            for key in keys:
                if key not in record:
                    raise _RecordError("missing key", f"expected the key {key!r}, got {_keys(record)}")
        except _RecordError as bad:
            raise DataError(f"{path}:{number}: {bad}") from bad
        records.append(record)
    if not records:
        raise DataError(f"{path}: expected at least one record, got an empty file")
    return records


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
        except _RecordError as bad:
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


def _hub_rows(path: str) -> Iterator[tuple[int, Record]]:
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


def _text(key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise _RecordError("wrong type", f"{key}: expected a string, got {_short(value)}")
    if not value.strip():
        raise _RecordError("empty text", f"{key}: expected a text, got {_short(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _RecordError("not Unicode", f"{key}: expected Unicode text, got half a surrogate pair") from error


def _texts(key: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, list):
        raise _RecordError("wrong type", f"{key}: expected a list of strings, got {_short(value)}")
    for number, item in enumerate(value):
        _text(f"{key}[{number}]", item)


def _label(key: str, value: Any) -> None:
    if isinstance(value, str):
        _text(key, value)
    elif not isinstance(value, int) or isinstance(value, bool):
        raise _RecordError("wrong type", f"{key}: expected a string or an integer, got {_short(value)}")


def _score(key: str, value: Any) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise _RecordError("wrong type", f"{key}: expected a finite number, got {_short(value)}")


Kind = dict[str, Callable[[str, Any], None]]
PAIRS: Kind = {"query": _text, "positive": _text, "negatives": _texts}
LABELLED: Kind = {"text": _text, "label": _label}
SCORED: Kind = {"sentence1": _text, "sentence2": _text, "score": _score}
KINDS = (PAIRS, LABELLED, SCORED)


def _keys(names: Any) -> str:
    """Keys as a message shows them; an optional one has a question mark."""
    return "{" + ", ".join(f"{name}?" if name in OPTIONAL else str(name) for name in names) + "}"


def _missing(record: Record, kind: Kind) -> list[str]:
    return [key for key in kind if key not in record and key not in OPTIONAL]


def _detect(record: Record) -> Kind:
    """The kind whose keys a record has."""
    for kind in KINDS:
        if not _missing(record, kind):
            return kind
    known = [key for kind in KINDS for key in kind]
    unknown = next((key for key in record if key not in known), "")
    expected = " or ".join(map(_keys, KINDS))
    raise _RecordError("unknown kind", f"expected {expected}, got {_keys(record)}{nearest(unknown, known)}")


def _check(record: Record, kind: Kind, strict: bool) -> None:
    """Raise _RecordError unless a record is a good one of this kind; `strict` forbids further keys."""
    missing = _missing(record, kind)
    if missing and any(not _missing(record, other) for other in KINDS):
        raise _RecordError("mixed kinds", f"expected {_keys(kind)} as in the first record, got {_keys(record)}")
    if strict and (unknown := [key for key in record if key not in kind]):
        hint = nearest(unknown[0], list(kind))
        raise _RecordError("unknown key", f"expected {_keys(kind)}, got the key {unknown[0]!r}{hint}")
    if missing:
        raise _RecordError("missing key", f"expected the key {missing[0]!r}, got {_keys(record)}")
    for key, check in kind.items():
        if key in record:
            check(key, record[key])


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
        parts = [f"{self.path}: {self.rows:,} rows of {_keys(self.keys)}, {self.examples:,} examples"]
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
    """A query, a document that answers it, documents that do not, and its label (-1: none)."""

    query: str
    positive: str
    negatives: tuple[str, ...]
    label: int


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

    def __len__(self) -> int:
        return len(self.queries)

    def draw(self, index: int, rng: np.random.Generator) -> Example:
        """Row `index` as it stands in the file; a labelled text's positive is another text of its label."""
        label = int(self.labels[index])
        if label < 0:
            return Example(self.queries[index], self.positives[index], self.negatives[index], label)
        first, end = np.searchsorted(self.labels, (label, label + 1))
        other = first + (index - first + rng.integers(1, end - first)) % (end - first)
        return Example(self.queries[index], self.queries[other], (), label)

    def query_text(self, text: str) -> str:
        return self.config.query_template.replace("{text}", text)

    def document_text(self, text: str) -> str:
        return self.config.document_template.replace("{text}", text)

    def example(self, index: int, rng: np.random.Generator) -> Example:
        """Row `index` in its templates."""
        raw = self.draw(index, rng)
        negatives = tuple(map(self.document_text, raw.negatives))
        return Example(self.query_text(raw.query), self.document_text(raw.positive), negatives, raw.label)


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
        raise DataError(f"{where}: positive_from: expected null for {_keys(kind)}, got {config.positive_from}")


def load_dataset(config: DatasetConfig) -> Dataset:
    """Read a data set and check every record of it.

    Raises:
        DataError: the set is missing, damaged or holds no usable row; a record is bad and `on_bad_record` is `error`;
            `positive_from` is missing for scored pairs or given for others.
    """
    path, limit = config.path, config.max_rows
    if limit is not None and limit < 1:
        raise DataError(f"{path}: max_rows: expected at least 1, or null, got {limit}")
    on_hub = path.startswith(HUB)
    source: Iterator[tuple[int, Any]] = _hub_rows(path) if on_hub else _jsonl_lines(Path(path))
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
            record = item if on_hub else _parse(item)
            if kind is None:
                kind = _detect(record)
                _check_positive_from(config, kind, f"{path}:{number}")
            _check(record, kind, strict=not on_hub)
        except _RecordError as bad:
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


def text_id(text: str) -> int:
    """A hash of a text in [0, 2^63), the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big") >> 1


def _ids(texts: Sequence[str]) -> Ints:
    return np.array([text_id(text) for text in texts], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The texts of one step on one process, all from one data set."""

    dataset: int
    """Place of the data set in the plan."""
    instruction: str
    document_instruction: str
    queries: list[str]
    """B texts."""
    documents: list[str]
    """N texts: the positives in the order of the queries, then the hard negatives in that order."""
    labels: Ints
    """[B]; -1: none."""
    document_labels: Ints
    """[N]; -1: none, as for every hard negative."""
    query_ids: Ints
    """[B] `text_id` of the texts before their template, so a query can be compared with a document."""
    document_ids: Ints
    """[N]"""


def _later(order: Ints, avoid: Ints, head: int) -> Ints:
    """`order` with the rows to avoid swapped out of its first `head` places."""
    bad = np.isin(order, avoid)
    early = np.flatnonzero(bad[:head])
    spare = head + np.flatnonzero(~bad[head:])[: len(early)]
    order[early], order[spare] = order[spare], order[early]
    return order


class BatchPlan:
    """Which rows every step trains on.

    Each step's data set is drawn by weight. Within a data set the rows follow seeded permutations, one an epoch; the
    batch that ends an epoch is filled from the next one and holds no row twice. More steps or a later start change
    nothing in the batches before, and the P batches of P processes are together the one batch of P times the size.

    Raises:
        DataError: no data set, or one with fewer rows than a batch.
        ValueError: weights that are not positive, or not one a data set.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        weights: Sequence[float],
        steps: int,
        batch_size: int,
        seed: int,
        hard_negatives: int = 1,
    ) -> None:
        if not datasets:
            raise DataError("data: expected at least one data set, got none")
        if len(weights) != len(datasets) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights: expected {len(datasets)} positive numbers, got {list(weights)}")
        for name, value, least in (("steps", steps, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.datasets = tuple(datasets)
        self.steps, self.batch_size, self.seed, self.hard_negatives = steps, batch_size, seed, hard_negatives
        for which in range(len(self.datasets)):
            self._require_rows(which, batch_size)
        shares = np.asarray(weights, dtype=np.float64)
        self.sets: Ints = np.random.default_rng((seed, 0)).choice(len(shares), size=steps, p=shares / shares.sum())
        """Place of each step's data set, [steps]."""
        self._turns = np.zeros(steps, dtype=np.int64)  # how many earlier steps drew the same set
        for which in range(len(self.datasets)):
            mine = self.sets == which
            self._turns[mine] = np.arange(mine.sum())
        self._orders: dict[tuple[int, int], dict[int, Ints]] = {}

    def _require_rows(self, which: int, size: int) -> None:
        dataset = self.datasets[which]
        if len(dataset) < size:
            raise DataError(
                f"{dataset.config.path}: expected at least {size} examples, one for each query of a batch, got "
                f"{len(dataset)}; lower batch_size or drop this data set"
            )

    def _order(self, which: int, epoch: int, size: int) -> Ints:
        """Row order of an epoch for batches of `size`.

        It depends on the epoch before, with which it may share a batch, so orders are built from the first epoch on;
        the last two are kept.
        """
        known = self._orders.setdefault((which, size), {})
        rows = len(self.datasets[which])
        start = max((built for built in known if built <= epoch), default=-1)
        if start < 0:
            known.clear()
        for number in range(start + 1, epoch + 1):
            order = np.random.default_rng((self.seed, 1, which, number)).permutation(rows)
            if shared := number * rows % size:  # rows of the epoch before in the batch that crosses into this one
                order = _later(order, known[number - 1][-shared:], size - shared)
            known[number] = order
            known.pop(number - 2, None)
        return known[epoch]

    def rows(self, step: int, process_index: int = 0, process_count: int = 1) -> tuple[Ints, Ints]:
        """Epochs and row numbers of one process's queries, both [B]."""
        if not 0 <= step < self.steps:
            raise ValueError(f"step: expected a value in [0, {self.steps}), got {step}")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index: expected a value in [0, {process_count}), got {process_index}")
        which, size = int(self.sets[step]), self.batch_size * process_count
        self._require_rows(which, size)
        start = int(self._turns[step]) * size + process_index * self.batch_size
        epochs, places = np.divmod(np.arange(start, start + self.batch_size), len(self.datasets[which]))
        chosen = [self._order(which, int(epoch), size)[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return epochs, np.concatenate(chosen)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The texts of a step on one of the processes, each with `batch_size` queries.

        Raises:
            DataError: the data set has fewer rows than the batches of all processes together.
        """
        epochs, rows = self.rows(step, process_index, process_count)
        which = int(self.sets[step])
        dataset = self.datasets[which]
        examples, negatives = [], []
        for epoch, row in zip(epochs.tolist(), rows.tolist(), strict=True):
            rng = np.random.default_rng((self.seed, 2, which, epoch, row))
            example = dataset.draw(row, rng)
            examples.append(example)
            negatives += self._cut(example.negatives, rng)
        documents = [example.positive for example in examples] + negatives
        labels = np.array([example.label for example in examples], dtype=np.int64)
        instruction, document_instruction = dataset.config.instruction, dataset.config.document_instruction
        return Batch(
            dataset=which,
            instruction=instruction,
            document_instruction=instruction if document_instruction is None else document_instruction,
            queries=[dataset.query_text(example.query) for example in examples],
            documents=[dataset.document_text(text) for text in documents],
            labels=labels,
            document_labels=np.concatenate([labels, np.full(len(negatives), -1, dtype=np.int64)]),
            query_ids=_ids([example.query for example in examples]),
            document_ids=_ids(documents),
        )

    def _cut(self, negatives: tuple[str, ...], rng: np.random.Generator) -> list[str]:
        if len(negatives) <= self.hard_negatives:
            return list(negatives)
        return [negatives[i] for i in np.sort(rng.choice(len(negatives), self.hard_negatives, replace=False))]

"""Examples to batches: the texts of every training step.

The plan keeps no state: batch `step` is a function of (seed, step), so a resumed run continues where it stopped.

Legend: B queries of a batch on one process, N its documents (B positives, then hard negatives).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from pe.data.datasets import Ints, TrainingSet
from pe.data.records import DataError


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
    instructions: list[str]
    """Of the queries; several where the set asks for several things."""
    asked: list[int]
    """[B] which of them each query is under."""
    document_instruction: str
    queries: list[str]
    """B texts."""
    documents: list[str]
    """N texts: the positives in the order of the queries, then the hard negatives in that order."""
    sides: Ints
    """[B] which of S contradicting sides each query is on; S is 1 where nothing contradicts."""
    labels: Ints
    """[B] what a query and its positive share on the query's side; -1: none."""
    document_labels: Ints
    """[S, N] what a document is on each side; -1: none, as for every hard negative."""
    query_ids: Ints
    """[B] `text_id` of the texts before their template, so a query can be compared with a document."""
    document_ids: Ints
    """[N]"""
    counterparts: Ints
    """[B] place of a document that is wrong here and, as a rule, right under the contradicting instruction; or -1."""

    @classmethod
    def unlabelled(
        cls,
        instructions: list[str],
        queries: list[str],
        documents: list[str],
        *,
        asked: list[int] | None = None,
        document_instruction: str | None = None,
        **others: Any,
    ) -> Self:
        """A batch of no data set: texts as they are, without labels, nothing contradicted.

        Args:
            instructions: of the queries.
            queries: B texts.
            documents: N texts, the positives first.
            asked: `[B]` which instruction each query is under; None: the first one.
            document_instruction: None: the first of the queries'.
            others: fields of a subclass.
        """
        return cls(
            dataset=0,
            instructions=instructions,
            asked=[0] * len(queries) if asked is None else asked,
            document_instruction=document_instruction or instructions[0],
            queries=queries,
            documents=documents,
            sides=np.zeros(len(queries), dtype=np.int64),
            labels=np.full(len(queries), -1),
            document_labels=np.full((1, len(documents)), -1),
            query_ids=_ids(queries),
            document_ids=_ids(documents),
            counterparts=np.full(len(queries), -1),
            **others,
        )


def _later(order: Ints, avoid: Ints, head: int) -> Ints:
    """`order` with the rows to avoid swapped out of its first `head` places."""
    bad = np.isin(order, avoid)
    early = np.flatnonzero(bad[:head])
    spare = head + np.flatnonzero(~bad[head:])[: len(early)]
    order[early], order[spare] = order[spare], order[early]
    return order


def shuffled(groups: Ints, rng: np.random.Generator) -> Ints:
    """Rows in random order, those of a group next to one another, where its first one falls."""
    order = rng.permutation(len(groups))
    _, first, group = np.unique(groups[order], return_index=True, return_inverse=True)
    return order[np.argsort(first[group], kind="stable")]


def draws(weights: Sequence[float], steps: int, seed: int) -> Ints:
    """Place of each step's data set, [steps]; more steps change none before."""
    shares = np.asarray(weights, dtype=np.float64)
    return np.random.default_rng((seed, 0)).choice(len(shares), size=steps, p=shares / shares.sum())


def steps_of(epochs: int, datasets: Sequence[TrainingSet], weights: Sequence[float], batch: int, seed: int) -> int:
    """The first step after which each row of every set has been in so many batches of a plan.

    Args:
        epochs: how often each row is seen, at least.
        datasets: in the order of the plan.
        weights: of the data sets.
        batch: queries of a step on all processes together.
        seed: of the plan.
    """
    needed = [-(-epochs * len(dataset) * dataset.queries_of_a_row // batch) for dataset in datasets]
    steps = sum(needed)
    while True:
        sets = draws(weights, steps, seed)
        turns = [np.flatnonzero(sets == which) for which in range(len(datasets))]
        if all(len(own) >= count for own, count in zip(turns, needed, strict=True)):
            return 1 + max(int(own[count - 1]) for own, count in zip(turns, needed, strict=True))
        steps *= 2


class BatchPlan:
    """Which rows every step trains on.

    Each step's data set is drawn by weight. Within a data set the rows follow seeded permutations, one an epoch, in
    which those of a group stay together; the batch that ends an epoch is filled from the next one and holds no row
    twice. More steps or a later start change nothing in the batches before, and the parts of several processes are
    together the batch, whether or not they are of one size.

    Raises:
        DataError: no data set, or one with fewer rows than a batch.
        ValueError: weights that are not positive, or not one a data set.
    """

    def __init__(
        self,
        datasets: Sequence[TrainingSet],
        weights: Sequence[float],
        steps: int,
        batch_size: int,
        seed: int,
        hard_negatives: int = 1,
    ) -> None:
        """Plan so many steps of `batch_size` queries, on all processes together."""
        if not datasets:
            raise DataError("data: expected at least one data set, got none")
        if len(weights) != len(datasets) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"weights: expected {len(datasets)} positive numbers, got {list(weights)}")
        for name, value, least in (("steps", steps, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self.datasets = tuple(datasets)
        self.steps, self.batch_size, self.seed, self.hard_negatives = steps, batch_size, seed, hard_negatives
        self._rows: list[int] = [self._rows_of_a_batch(dataset) for dataset in self.datasets]
        self.sets: Ints = draws(weights, steps, seed)
        """Place of each step's data set, [steps]."""
        self._turns = np.zeros(steps, dtype=np.int64)  # how many earlier steps drew the same set
        for which in range(len(self.datasets)):
            mine = self.sets == which
            self._turns[mine] = np.arange(mine.sum())
        self._orders: list[dict[int, Ints]] = [{} for _ in self.datasets]

    def _rows_of_a_batch(self, dataset: TrainingSet) -> int:
        """Rows of a data set that the queries of a batch are made of.

        Raises:
            DataError: it has fewer, or a row's queries would be parted.
        """
        size = self.batch_size
        rows, left = divmod(size, dataset.queries_of_a_row)
        if left:
            raise DataError(
                f"{dataset.config.path}: expected a batch_size that {dataset.queries_of_a_row} divides, the queries of"
                f" a row, got {size}"
            )
        if len(dataset) < rows:
            raise DataError(
                f"{dataset.config.path}: expected at least {rows} examples for the queries of a batch, got "
                f"{len(dataset)}; lower batch_size or drop this data set"
            )
        return rows

    def _order(self, which: int, epoch: int) -> Ints:
        """Row order of an epoch.

        It depends on the epoch before, with which it may share a batch, so orders are built from the first epoch on;
        the last two are kept.
        """
        known, groups, size = self._orders[which], self.datasets[which].groups, self._rows[which]
        start = max((built for built in known if built <= epoch), default=-1)
        if start < 0:
            known.clear()
        for number in range(start + 1, epoch + 1):
            order = shuffled(groups, np.random.default_rng((self.seed, 1, which, number)))
            if shared := number * len(groups) % size:  # rows of the epoch before in the batch that both have part in
                order = _later(order, known[number - 1][-shared:], size - shared)
            known[number] = order
            known.pop(number - 2, None)
        return known[epoch]

    def rows(self, step: int, process_index: int = 0, process_count: int = 1) -> tuple[Ints, Ints]:
        """Epochs and row numbers that one process's part of a batch is made of, both [B], or fewer.

        Raises:
            DataError: there are fewer rows than processes.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"step: expected a value in [0, {self.steps}), got {step}")
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index: expected a value in [0, {process_count}), got {process_index}")
        which = int(self.sets[step])
        size = self._rows[which]
        if size < process_count:
            raise DataError(
                f"{self.datasets[which].config.path}: expected a batch of at least {process_count} rows, one for each"
                f" process, got {size}; give a larger batch_size, or start fewer processes"
            )
        first, end = (
            int(self._turns[step]) * size + n * size // process_count for n in (process_index, process_index + 1)
        )
        epochs, places = np.divmod(np.arange(first, end), len(self.datasets[which]))
        chosen = [self._order(which, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return epochs, np.concatenate(chosen)

    def batch(self, step: int, process_index: int = 0, process_count: int = 1) -> Batch:
        """The texts of a step on one of the processes, which share the rows as evenly as they can.

        Raises:
            DataError: see `rows`.
        """
        epochs, rows = self.rows(step, process_index, process_count)
        which = int(self.sets[step])
        dataset = self.datasets[which]
        examples, negatives = [], []
        for epoch, row in zip(epochs.tolist(), rows.tolist(), strict=True):
            rng = np.random.default_rng((self.seed, 2, which, epoch, row))
            for example in dataset.examples(row, rng):
                examples.append(example)
                negatives += self._cut(example.negatives, rng)
        documents = [example.positive for example in examples]
        if dataset.contradicts:  # what is wrong for one side is right for the other, and stands there already
            known = set(documents)
            negatives = [text for text in dict.fromkeys(negatives) if text not in known]
        documents += negatives
        places = {text: place for place, text in reversed(list(enumerate(documents)))}
        counterparts = [places[example.negatives[0]] if dataset.contradicts else -1 for example in examples]
        sides, labels, other_labels = np.array(
            [(example.side, example.label, example.other_label) for example in examples], dtype=np.int64
        ).T
        document_labels = np.full((dataset.queries_of_a_row, len(documents)), -1, dtype=np.int64)
        document_labels[:, : len(examples)] = other_labels
        document_labels[sides, np.arange(len(examples))] = labels
        instructions = list(dict.fromkeys(example.instruction for example in examples))
        return Batch(
            dataset=which,
            instructions=instructions,
            asked=[instructions.index(example.instruction) for example in examples],
            document_instruction=dataset.document_instruction,
            queries=[dataset.config.query_text(example.query) for example in examples],
            documents=[dataset.config.document_text(text) for text in documents],
            sides=sides,
            labels=labels,
            document_labels=document_labels,
            query_ids=_ids([example.query for example in examples]),
            document_ids=_ids(documents),
            counterparts=np.array(counterparts, dtype=np.int64),
        )

    def _cut(self, negatives: tuple[str, ...], rng: np.random.Generator) -> list[str]:
        if len(negatives) <= self.hard_negatives:
            return list(negatives)
        return [negatives[i] for i in np.sort(rng.choice(len(negatives), self.hard_negatives, replace=False))]

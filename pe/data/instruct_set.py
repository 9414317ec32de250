"""A training set whose queries stand under instructions that contradict each other; see `pe/data/instruct.py`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pe.config import DatasetConfig
from pe.data.datasets import Example, Ints, Report, TrainingSet, check_limit, load_dataset
from pe.data.instruct import InstructRow, InstructTask, read_instructions, read_rows
from pe.data.instructions import set_name
from pe.data.records import DataError, braced


@dataclass(frozen=True, kw_only=True)
class InstructSet:
    """Rows whose query asks for one document under one task and for another under the task that contradicts it.

    A batch holds both sides of each of its rows, so that one's positive is the other's negative. Build it with
    `load_instruct_set`.
    """

    config: DatasetConfig
    report: Report
    tasks: tuple[InstructTask, InstructTask]
    rows: list[InstructRow]
    labels: dict[tuple[int, str], int]
    """A number for each label of a side, and for the query of each row without one: another row of the same query is
    none of its negatives."""

    queries_of_a_row: ClassVar[int] = 2
    contradicts: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def groups(self) -> Ints:
        return np.arange(len(self.rows))

    @property
    def wordings(self) -> tuple[str, ...]:
        return tuple(text for task in self.tasks for text in task.train)

    @property
    def document_instruction(self) -> str:
        return self.tasks[0].document

    def examples(self, index: int, rng: np.random.Generator) -> list[Example]:
        """Row `index` under both tasks, each in one of its wordings."""
        row, found = self.rows[index], []
        for place, task in enumerate(self.tasks):
            side, wording = row.sides[task.name], task.train[rng.integers(len(task.train))]
            label = self.labels[place, side.shared_label or row.query]
            other = self.labels.get((1 - place, side.other_label or ""), -1)
            found.append(Example(row.query, side.positive, side.negatives, label, wording, place, other))
        return found


def load_instruct_set(config: DatasetConfig) -> InstructSet:
    """Read the rows of `config.path` under the tasks of `config.instruct`.

    Raises:
        DataError: a damaged file or row, a row with other sides than the rest, or tasks without wordings for training.
    """
    assert config.instruct is not None
    check_limit(config)
    known = read_instructions(config.instruct)
    whole = read_rows(config.path, known)
    rows = whole[: config.max_rows]
    names = tuple(rows[0].sides)
    for number, row in enumerate(rows, start=1):
        if set(row.sides) != set(names) or len(names) != 2:
            raise DataError(
                f"{config.path}: row {number}: expected the two sides of one contradiction, the same in every row, got"
                f" {', '.join(row.sides)}"
            )
    first, second = (known[name] for name in names)
    if not first.train or not second.train:
        raise DataError(f"{config.path}: {first.name}: expected wordings to train on, got none in {config.instruct}")
    keys = ((place, row.sides[task].shared_label or row.query) for row in rows for place, task in enumerate(names))
    labels = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    report = Report(
        path=config.path,
        columns=braced(["query", *names]),
        rows=len(rows),
        examples=len(rows),
        max_rows=config.max_rows if len(rows) < len(whole) else None,
    )
    return InstructSet(config=config, report=report, tasks=(first, second), rows=rows, labels=labels)


def load_training_set(config: DatasetConfig) -> TrainingSet:
    """Read a training set of either kind; errors as of `load_dataset` and `load_instruct_set`."""
    return load_instruct_set(config) if config.instruct else load_dataset(config)


def first_wordings(datasets: Sequence[TrainingSet]) -> dict[str, str]:
    """The first wording of every task that is trained on, and the most frequent one of rows that bring theirs."""
    found: dict[str, str] = {}
    for dataset in datasets:
        if isinstance(dataset, InstructSet):
            found |= {task.name: task.train[0] for task in dataset.tasks}
        elif not dataset.config.instruction:
            found[set_name(dataset.config.path)] = dataset.wordings[0]
    return found

"""Instructions that contradict each other, and texts that each of them orders in its own way.

`instructions.yaml` names tasks in pairs: what is right under one is wrong under the other, so an embedder must read the
instruction. A task has wordings for training and wordings that are never trained on:

    nli-follows:
      contradicts: nli-contradicts
      dataset: nli
      document: Represent the sentence for retrieval
      train: [Find a sentence that follows from this one., ...]
      unseen: [...]

A row of a data set holds a query and both sides of the contradiction:

    {"query": text, "sides": {"nli-follows": {"positive": text, "negatives": [text]}, "nli-contradicts": {...}}}

Where positives of other rows may be right too, labels say which: a side's `shared_label` is what its positive has in
common with the query (a disease), `other_label` what the positive is under the task that contradicts it (symptoms).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pe.config import nearest
from pe.data.records import DataError, Kind, Record, RecordError, check, check_text, check_texts, jsonl_lines, parse


@dataclass(frozen=True, kw_only=True)
class InstructTask:
    """One side of a contradiction, and the sentences that ask for it."""

    name: str
    contradicts: str
    """Name of the other side, which names this one."""
    document: str
    """Instruction of the documents, the same on both sides: it must not give away which is meant."""
    train: tuple[str, ...]
    """Wordings for training; none for a task that is never trained on."""
    unseen: tuple[str, ...]
    """Wordings that are never trained on."""
    dataset: str
    """Stem of the files with its rows, the same on both sides."""


@dataclass(frozen=True)
class Side:
    """What one task takes for right and for wrong."""

    positive: str
    negatives: tuple[str, ...]
    shared_label: str | None = None
    """What the positive has in common with the query."""
    other_label: str | None = None
    """What the positive is under the contradicting task."""


@dataclass(frozen=True)
class InstructRow:
    """A query, and by task name what belongs to it."""

    query: str
    sides: dict[str, Side]


def letters(text: str) -> str:
    """Letters and digits in one case: texts that agree in them count as the same."""
    return "".join(filter(str.isalnum, text.casefold()))


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice: YAML would keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_instructions(path: str | Path) -> dict[str, InstructTask]:
    """The tasks of an instruction file by name, in its order.

    Raises:
        DataError: the file is missing or no YAML; a key or a task's partner is unknown; a task contradicts one that
            does not contradict it, or that has another data set or document instruction, or is trained on where this
            one is not; a task has no wording, or an empty one; a wording stands twice, in both parts or two tasks.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise DataError(f"{path}: expected a file of instructions, found none") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the file cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or error
        raise DataError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {problem}") from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: expected a mapping of tasks, got {content!r:.80}")
    try:
        tasks = {name: _task(name, values) for name, values in content.items()}
        _check_pairs(tasks)
        _check_wordings(tasks)
    except RecordError as bad:
        raise DataError(f"{path}: {bad}") from bad
    return tasks


def _wordings(key: str, value: Any) -> None:
    if not isinstance(value, list):
        raise RecordError("wrong type", f"{key}: expected a list of wordings, got {value!r:.80}")
    check_texts(key, value)


TASK: Kind = {
    "contradicts": check_text,
    "document": check_text,
    "train": _wordings,
    "unseen": _wordings,
    "dataset": check_text,
}


def _task(name: Any, values: Any) -> InstructTask:
    if not isinstance(name, str):
        raise RecordError("wrong type", f"expected a task's name, got {name!r}")
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecordError("wrong type", f"{name}: expected a mapping of {', '.join(TASK)}, got {values!r:.80}")
    _check_under(name, values, TASK)
    if not values["train"] and not values["unseen"]:
        raise RecordError("no wording", f"{name}: expected a wording in train or in unseen, got none")
    train, unseen = tuple(values["train"]), tuple(values["unseen"])
    return InstructTask(**{**values, "name": name, "train": train, "unseen": unseen})


def _check_under(where: str, record: Record, kind: Kind) -> None:
    """Check a nested record; the message starts with where it stands."""
    try:
        check(record, kind)
    except RecordError as bad:
        raise RecordError(bad.reason, f"{where}: {bad}") from bad


def _check_pairs(tasks: Mapping[str, InstructTask]) -> None:
    for task in tasks.values():
        where, other = f"{task.name}: contradicts", tasks.get(task.contradicts)
        if other is None:
            hint = nearest(task.contradicts, list(tasks))
            raise RecordError("unknown task", f"{where}: expected a task of this file, got {task.contradicts!r}{hint}")
        if other is task or other.contradicts != task.name:
            got = "itself" if other is task else f"{other.name}, which contradicts {other.contradicts}"
            raise RecordError("not mutual", f"{where}: expected a task that contradicts this one, got {got}")
        for key in ("dataset", "document"):
            ours, theirs = getattr(task, key), getattr(other, key)
            if ours != theirs:
                detail = f"{task.name}: {key}: expected that of {other.name}, {theirs!r}, got {ours!r}"
                raise RecordError("unlike sides", detail)
        if other.train and not task.train:
            detail = f"{task.name}: train: expected wordings as {other.name} has them, or none on either side, got none"
            raise RecordError("one side", detail)


def _check_wordings(tasks: Mapping[str, InstructTask]) -> None:
    """A wording stands in one place, whatever its case, spaces and punctuation."""
    places: dict[str, str] = {}
    for task in tasks.values():
        for part in ("train", "unseen"):
            for number, wording in enumerate(getattr(task, part)):
                place = f"{task.name}: {part}[{number}]"
                first = places.setdefault(letters(wording), place)
                if first != place:
                    detail = f"{place}: expected a wording that stands nowhere else, got {wording!r} of {first}"
                    raise RecordError("repeated wording", detail)


def read_rows(path: str | Path, tasks: Mapping[str, InstructTask]) -> list[InstructRow]:
    """All rows of a `.jsonl`, `.jsonl.xz` or `.jsonl.gz` file, whose sides are those of `tasks`.

    Raises:
        DataError: the file is missing, damaged or empty, or a row is not as the top of this module shows it: a key or a
            task is unknown, a side stands without the one it contradicts or without negatives, a text is empty.
    """
    rows = []
    for number, line in jsonl_lines(Path(path)):
        try:
            rows.append(_row(parse(line), tasks))
        except RecordError as bad:
            raise DataError(f"{path}:{number}: {bad}") from bad
    if not rows:
        raise DataError(f"{path}: expected at least one row, got an empty file")
    return rows


def _mapping(key: str, value: Any) -> None:
    if not isinstance(value, dict) or not value:
        raise RecordError("wrong type", f"{key}: expected a mapping of tasks, got {value!r:.80}")


ROW: Kind = {"query": check_text, "sides": _mapping}
SIDE: Kind = {"positive": check_text, "negatives": check_texts, "shared_label": check_text, "other_label": check_text}


def _row(record: Record, tasks: Mapping[str, InstructTask]) -> InstructRow:
    check(record, ROW)
    sides: dict[str, Any] = record["sides"]
    for name in sides:
        if name not in tasks:
            hint = nearest(name, list(tasks))
            raise RecordError("unknown task", f"sides: expected tasks of the instructions, got {name!r}{hint}")
        other = tasks[name].contradicts
        if other not in sides:
            detail = f"sides: expected {other!r} beside {name!r}, which it contradicts, got {', '.join(sides)}"
            raise RecordError("one side", detail)
    return InstructRow(record["query"], {name: _side(f"sides.{name}", side) for name, side in sides.items()})


def _side(where: str, side: Any) -> Side:
    if not isinstance(side, dict):
        raise RecordError("wrong type", f"{where}: expected a positive and negatives, got {side!r:.80}")
    _check_under(where, side, SIDE)
    if not side.get("negatives"):
        raise RecordError("no negatives", f"{where}.negatives: expected at least one text, got none")
    if side["positive"] in side["negatives"]:
        raise RecordError(
            "both", f"{where}: expected another positive than the negatives, got {side['positive']!r:.80}"
        )
    return Side(side["positive"], tuple(side["negatives"]), side.get("shared_label"), side.get("other_label"))

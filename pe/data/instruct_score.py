"""Does an embedder do what it is told? Scores on instructions that contradict each other.

A row has a query and, for either side of a contradiction, a document that is right and others that are wrong. An answer
is *right* when the right document is more similar to the query, embedded under a wording of that side, than each wrong
one; documents stand under one neutral instruction. What is right on one side is wrong on the other, so an embedder that
reads nothing of the instruction gets about half of the answers (in CLINC150, where the sides are nested, others).

Legend: W wordings, Q queries, N documents, R rows, D embedding size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pe.data.instruct import InstructRow, InstructTask, Side, read_instructions, read_rows
from pe.data.records import DataError
from pe.data.tasks import EvaluationError, Floats, check_embeddings, locate

if TYPE_CHECKING:
    from pe.integrations.mteb import TextEncoder

INSTRUCT = "Instruct"
"""Type of these tasks, beside those of mteb."""
INSTRUCT_METRIC = "right_unseen"
PARTS = ("unseen", "seen")

INSTRUCT_TASKS = {
    "PE-Instruct-NLI": "nli",
    "PE-Instruct-MedQuAD": "medquad",
    "PE-Instruct-CLINC150": "clinc150",
    "PE-Instruct-Banking77": "banking77",
}
"""Data set of each task; Banking77's is never trained on."""

INSTRUCTIONS = "instruct/instructions.yaml"


@dataclass(frozen=True)
class ContradictingTasks:
    """Two tasks that contradict each other, and the rows that both are measured on."""

    sides: tuple[InstructTask, InstructTask]
    rows: list[InstructRow]


def available_sets(data: Path) -> list[str]:
    """Names of the tasks whose files are in a data folder."""
    return [
        name for name, stem in INSTRUCT_TASKS.items() if (data / INSTRUCTIONS).is_file() and locate(data, _file(stem))
    ]


def _file(stem: str) -> str:
    return f"instruct/eval/{stem}.jsonl"


def read_set(name: str, data: Path) -> ContradictingTasks:
    """The task of this name, over the files in `data`.

    Raises:
        EvaluationError: a file is missing.
        DataError: a file is damaged, or the instructions have no pair of tasks, or no unseen wordings, for it.
    """
    stem = INSTRUCT_TASKS[name]
    path, instructions = locate(data, _file(stem)), data / INSTRUCTIONS
    if path is None or not instructions.is_file():
        missing = f"{data / _file(stem)} or {_file(stem)}.xz" if path is None else instructions
        raise EvaluationError(f"{name}: expected {missing}, found none")
    tasks = {task.name: task for task in read_instructions(instructions).values() if task.dataset == stem}
    if len(tasks) != 2:
        got = ", ".join(tasks) or "none"
        raise DataError(f"{instructions}: expected two tasks of the data set {stem!r}, for {name}, got {got}")
    first, second = tasks.values()
    for task in (first, second):
        if not task.unseen:
            raise DataError(f"{instructions}: {task.name}: unseen: expected a wording to measure with, got none")
    return ContradictingTasks((first, second), read_rows(path, tasks))


def rights(encoder: TextEncoder, found: ContradictingTasks, *, batch_tokens: int = 16_384) -> dict[str, float]:
    """Right answers of 100: `right_unseen` and `right_seen`, and of either side, such as `follows_unseen`.

    A side's share is the mean over its wordings, `right_...` the mean of both sides. Seen are as many training wordings
    as there are unseen ones, at equal distances; a task that is never trained on has none. Each distinct text is
    embedded once under each instruction.

    Raises:
        ValueError: the encoder returned another shape, or values that are not finite.
    """
    texts = [text for row in found.rows for side in row.sides.values() for text in (side.positive, *side.negatives)]
    documents, queries = _places(texts), _places([row.query for row in found.rows])
    instruction = found.sides[0].document
    rows = encoder.encode(list(documents), instruction=instruction, side="document", batch_tokens=batch_tokens)
    documents_ND = _unit(check_embeddings(encoder.name, rows, len(documents)))
    asked = [(part, task, wording) for part in PARTS for task in found.sides for wording in _wordings(task, part)]
    queries_WQD = _encode_many(encoder, list(queries), [wording for *_, wording in asked], batch_tokens)
    index = [queries[row.query] for row in found.rows]
    shares: dict[str, dict[str, list[float]]] = {part: defaultdict(list) for part in PARTS}
    for (part, task, _), queries_QD in zip(asked, queries_WQD, strict=True):
        sides = [row.sides[task.name] for row in found.rows]
        shares[part][task.name].append(_percent_right(_unit(queries_QD)[index], documents_ND, sides, documents))
    parts: dict[str, float] = {}
    for part, of_side in shares.items():
        means = {f"{_short(name)}_{part}": sum(values) / len(values) for name, values in of_side.items()}
        if means:
            parts |= {f"right_{part}": sum(means.values()) / len(means), **means}
    return parts


def _places(texts: Sequence[str]) -> dict[str, int]:
    """The distinct texts, numbered."""
    return {text: number for number, text in enumerate(dict.fromkeys(texts))}


def _wordings(task: InstructTask, part: str) -> Sequence[str]:
    if part == "unseen":
        return task.unseen
    count = min(len(task.unseen), len(task.train))
    return [task.train[number * len(task.train) // count] for number in range(count)]


def _short(name: str) -> str:
    """A side's own name: `follows` of `nli-follows`."""
    return name.partition("-")[2] or name


def _encode_many(encoder: TextEncoder, texts: list[str], wordings: list[str], batch_tokens: int) -> list[Floats]:
    """W embeddings `[Q, D]`; where the encoder has `encode_many`, the wordings share what they can."""
    many = getattr(encoder, "encode_many", None)
    if many is None:
        found = [encoder.encode(texts, instruction=wording, batch_tokens=batch_tokens) for wording in wordings]
    else:
        found = list(many(texts, instructions=wordings, batch_tokens=batch_tokens))
    return [check_embeddings(encoder.name, rows, len(texts)) for rows in found]


def _unit(rows: Floats) -> Floats:
    unit: Floats = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)
    return unit


def _percent_right(queries_RD: Floats, documents_ND: Floats, sides: Sequence[Side], place: Mapping[str, int]) -> float:
    """Of 100 rows, those whose positive is more similar to the query than each negative; a tie is wrong."""
    owner = [row for row, side in enumerate(sides) for _ in side.negatives]
    right = [place[side.positive] for side in sides]
    wrong = [place[text] for side in sides for text in side.negatives]
    near_R = (queries_RD * documents_ND[right]).sum(axis=1)
    far = (queries_RD[owner] * documents_ND[wrong]).sum(axis=1)
    failed = {row for row, score in zip(owner, far, strict=True) if score >= near_R[row]}
    return 100 * (len(sides) - len(failed)) / len(sides)

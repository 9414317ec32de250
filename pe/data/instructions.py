"""The instructions an embedder was trained under, by name.

`query` and `document` are what the two sides take where none is given: the instruction with the largest weight in
training, and the one of its documents. A training set's own goes by the name of its file, that of its documents by
`NAME-document` where it differs.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from pe.config import DatasetConfig
from pe.data.tables import HUB, hub_parts, named


def trained_instructions(data: Sequence[DatasetConfig]) -> dict[str, str]:
    """Name -> instruction of a recipe's training sets, `query` and `document` first; none without sets.

    Sets without an instruction, whose tasks contradict each other or whose rows bring their own, are left out.
    """
    data = [item for item in data if item.instruction]
    if not data:
        return {}
    query = heaviest((item.instruction, item.weight) for item in data)
    beside = [item for item in data if item.instruction == query]
    known = {"query": query, "document": heaviest((item.of_documents, item.weight) for item in beside)}
    for item in data:
        name, documents = set_name(item.path), item.of_documents
        known[free_name(name, item.instruction, known)] = item.instruction
        if documents != item.instruction:
            known[free_name(f"{name}-document", documents, known)] = documents
    return known


def default_instruction(instructions: Mapping[str, str], side: str) -> str | None:
    """What a side takes where no instruction is given; documents without one of their own take the queries'."""
    return instructions.get(side) or instructions.get("query")


def as_prompts(instructions: Mapping[str, str]) -> dict[str, str]:
    """The prompts of sentence-transformers: all instructions, and the default of each side that has one."""
    defaults = {side: default_instruction(instructions, side) for side in ("query", "document")}
    return {side: default for side, default in defaults.items() if default} | dict(instructions)


def heaviest(weighted: Iterable[tuple[str, float]]) -> str:
    """The sentence with the largest sum of weights, the first on ties."""
    sums: dict[str, float] = defaultdict(float)
    for sentence, weight in weighted:
        sums[sentence] += weight
    return max(sums, key=sums.__getitem__)


def set_name(path: str) -> str:
    """What a training set is called: `nli` for `data/nli.jsonl.xz`, `pairs-hard` for `hf://owner/pairs:hard@train`."""
    if path.startswith(HUB):
        path = path.removeprefix(HUB).partition("@")[0].replace(":", "-")
    return named(path)[0]


def training_sets(data: Sequence[DatasetConfig]) -> tuple[str, ...]:
    """What a recipe trains on: the names of its files, and of the hub's sets as the hub has them."""
    names = [hub_parts(item.path)[0] if item.path.startswith(HUB) else set_name(item.path) for item in data]
    return tuple(dict.fromkeys(names))


def free_name(name: str, sentence: str, named: Mapping[str, str]) -> str:
    """The name, or NAME-2, NAME-3, ... where it stands for another sentence already."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(found for found in names if named.get(found, sentence) == sentence)

"""What is asked of an embedder: texts under instructions, and the checks of what a caller gives.

Legend: B texts, T tokens of all texts, D the backbone's width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Tensor

from pe.data.records import RecordError, check_unicode
from pe.method.attention import KeyValues

Side = Literal["query", "document"]
SIDES: tuple[Side, ...] = ("query", "document")
Item = TypeVar("Item")


class Instruction(NamedTuple):
    """What a prompt is written for."""

    text: str
    side: Side = "query"


@dataclass(frozen=True)
class Requests:
    """Texts to embed, each under one of the instructions.

    Attributes:
        texts: B texts.
        instructions: the distinct instructions.
        index: for each text the place of its instruction.
        read: what the model reads of each text, where it has been tokenised already (see `Encoder.tokenized`).
    """

    texts: Sequence[str]
    instructions: Sequence[Instruction]
    index: Sequence[int]
    read: Sequence[Any] | None = field(default=None, compare=False)

    def instruction(self, place: int) -> Instruction:
        """The instruction of the text at a place."""
        return self.instructions[self.index[place]]

    def part(self, places: Sequence[int]) -> Requests:
        """The requests at some places, in that order."""
        read = None if self.read is None else [self.read[i] for i in places]
        return Requests([self.texts[i] for i in places], self.instructions, [self.index[i] for i in places], read)


@dataclass(frozen=True)
class Texts:
    """Requests whose texts the frozen backbone has read, in the suffix layout; no weight that trains was in it.

    Attributes:
        requests: shortest text first.
        order: the places where they stood before.
        context: keys and values and, where the embedder has a skip, each token's state `[T, D]` before the last layer.
    """

    requests: Requests
    order: list[int]
    context: KeyValues

    def tensors(self) -> list[Tensor]:
        """All that a step reads of them on the device."""
        states = self.context.pooled
        small = [self.context.segments.cu_seqlens, *([] if states is None else [states])]
        return [*small, *(x for pair in self.context.layers for x in pair)]


@dataclass
class Truncation:
    """How many texts were tokenised, and how many of them were cut to `max_length`.

    A prompting LLM that reads the text as well cuts it by its own tokens: `prompter_cut` of its readings.
    """

    texts: int = 0
    cut: int = 0
    prompter_cut: int = 0

    def __str__(self) -> str:
        readings = f", {self.prompter_cut:,} readings of the prompting LLM too" if self.prompter_cut else ""
        return f"{self.cut:,} of {self.texts:,} texts truncated{readings}"

    def cut_to(self, length: int, ids: Sequence[list[int]], at_most: int | None = None) -> list[list[int]]:
        """Count texts of token ids, and cut each to `length` tokens, or to `at_most` where that is less."""
        length = lesser(length, at_most)
        self.texts += len(ids)
        self.cut += sum(len(row) > length for row in ids)
        return [row[:length] for row in ids]


def lesser(length: int, at_most: int | None) -> int:
    """A limit of tokens, or another one that is given and lower."""
    return length if at_most is None else min(length, at_most)


def listed(name: str, given: Iterable[Item], of: str = "strings") -> list[Item]:
    """What was given, read once: an iterator has nothing left for a second reading.

    Raises:
        ValueError: a string, whose characters would be the items; a mapping or a table, whose keys would be; a set,
            which has no order; or what cannot be iterated at all.
    """
    if isinstance(given, str):
        raise ValueError(f"{name}: expected a sequence of {of}, got a single string; wrap it in a list")
    is_iterable = hasattr(given, "__iter__") or hasattr(given, "__getitem__")
    if not is_iterable or isinstance(given, Mapping | set | frozenset) or getattr(given, "ndim", 1) != 1:
        raise ValueError(
            f"{name}: expected a sequence of {of}, got {type(given).__name__}; give them as a list, in the order that"
            " their results shall have"
        )
    return list(given)


def check_arguments(
    texts: Iterable[str], instructions: Iterable[str], side: str, batch_tokens: int = 1
) -> tuple[list[str], list[str]]:
    """Texts and instructions as lists, each read once.

    Raises:
        ValueError: what is no sequence of texts, an unknown side, or batches of nothing, and what to give instead.
    """
    found = listed("texts", texts), listed("instructions", instructions)
    for name, given in zip(("texts", "instructions"), found, strict=True):
        for place, text in enumerate(given):
            if not isinstance(text, str):
                raise ValueError(f"{name}: expected strings, got {type(text).__name__} at place {place}: {text!r:.80}")
            if name == "instructions" and not text.strip():
                raise ValueError(f"instructions: expected a sentence, got {text!r} at place {place}")
            try:
                check_unicode(f"{name}, place {place}", text)
            except RecordError as bad:
                raise ValueError(str(bad)) from bad
    if side not in SIDES:
        raise ValueError(f"side: expected {' or '.join(map(repr, SIDES))}, got {side!r}")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens: expected at least 1, got {batch_tokens}")
    return found


def check_instructions(given: Iterable[Instruction]) -> list[Instruction]:
    """Instructions as a list, read once.

    Raises:
        ValueError: no sequence of `Instruction`, each with a sentence and a side.
    """
    wanted = listed("instructions", given, "Instruction")
    for place, item in enumerate(wanted):
        if not isinstance(item, Instruction):
            raise ValueError(
                f"instructions: expected pe.model.Instruction, got {type(item).__name__} at place {place}: {item!r:.80}"
            )
    check_arguments((), [item.text for item in wanted], SIDES[0])
    return wanted

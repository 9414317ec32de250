"""What the frozen text pass gives for a text, kept and read back where it would be computed again.

An entry is all that later passes may ask of a text: the keys and values of every layer, and the states that enter the
last one. Its key is made of what these depend on and of nothing else: the token ids, and the backbone's fingerprint
(content, types). So runs, embedders and instructions share a store, and backbones do not mix in one.

Legend: B texts, T tokens of a packed row, L layers.
"""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pe.method.attention import KeyValues
from pe.method.entries import Bytes, Entries, FolderEntries, MemoryEntries
from pe.method.packing import Segments

GIB = 1 << 30
DEFAULT_GIB = 8.0
TextPass = Callable[[Sequence[Sequence[int]]], KeyValues]
"""Token ids of texts -> keys, values and, as `pooled`, the states `[T, D]` that enter the last layer."""


class Column(NamedTuple):
    """One tensor of an entry: its type, and its shape for one token."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """Bytes of a token."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass
class Tally:
    """Texts, their tokens, and the seconds that they took."""

    texts: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Seconds a token."""
        return self.seconds / self.tokens if self.tokens else 0.0

    def count(self, texts: Collection[Sequence[int]]) -> None:
        self.texts += len(texts)
        self.tokens += sum(map(len, texts))


class TextStore:
    """Texts that were read, in memory or in a folder.

    Attributes:
        name: what messages call it.
        entries: the bytes.
        bytes_a_token: what the backbone that used it last takes; 0 before one did.
        found, read, kept: texts asked for that were there; that were read; and of these, those that are there now.
            Equal texts of one pass count once.
    """

    def __init__(self, entries: Entries, name: str) -> None:
        self.entries, self.name, self.bytes_a_token = entries, name, 0
        self.found, self.read, self.kept = Tally(), Tally(), Tally()
        self._columns: dict[str, list[Column]] = {}

    @classmethod
    def open(cls, where: str | Path, gib: float = DEFAULT_GIB) -> TextStore:
        """The store in a folder, which is made where there is none, or, for `memory`, one of this process's own.

        Args:
            where: `memory`, or a folder.
            gib: its size, in 2^30 bytes; a full store keeps what it has.

        Raises:
            ValueError: no size, or a folder that cannot be used (see `FolderEntries`).
        """
        if not 0 < gib < math.inf:
            raise ValueError(f"size of the text store: expected a positive number of GiB, got {gib}")
        if where == "memory":
            return cls(MemoryEntries(int(gib * GIB)), "text store in memory")
        return cls(FolderEntries(Path(where), int(gib * GIB)), f"text store {where}")

    @property
    def is_shared(self) -> bool:
        """Whether other processes, and later ones, read what is kept."""
        return isinstance(self.entries, FolderEntries)

    def __enter__(self) -> TextStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.entries.close()

    def __str__(self) -> str:
        """What was asked of it, what it holds, and what another pass over the same texts will take."""
        found, read, entries = self.found, self.read, self.entries
        parts = [
            f"{self.name}: {found.texts:,} texts found, {read.texts:,} read",
            f"{entries.used / GIB:.3g} of {entries.limit / GIB:.3g} GiB, {self.bytes_a_token:,} bytes a token",
        ]
        if entries.damaged:
            parts.append(f"{entries.damaged:,} damaged entries were read anew")
        if lost := read.texts - self.kept.texts:
            parts.append(f"{lost:,} texts were not kept: {entries.full}")
        if read.tokens and found.tokens:
            unkept = (read.tokens - self.kept.tokens) * read.rate
            again = (found.tokens + self.kept.tokens) * found.rate + unkept
            whole = (found.tokens + read.tokens) * read.rate
            parts.append(f"once more all of them would take about {again:.0f} s, without a store {whole:.0f} s")
        return "; ".join(parts)

    def prepare(self, fingerprint: str, text_pass: TextPass) -> None:
        """Learn from a text of one token what a backbone's entries are made of."""
        if fingerprint not in self._columns:
            self._columns[fingerprint] = [Column(x.dtype, tuple(x.shape[1:])) for x in tensors_of(text_pass([[0]]))]
        self.bytes_a_token = sum(column.width for column in self._columns[fingerprint])

    def check_room(self, tokens: int, option: str) -> None:
        """Refuse a size that one batch of so many tokens does not fit into.

        Raises:
            ValueError: it is too small.
        """
        if (needed := tokens * self.bytes_a_token) > self.entries.limit:
            raise ValueError(
                f"{option}: expected at least {needed / GIB:.3g}, the GiB of one batch ({tokens:,} tokens of"
                f" {self.bytes_a_token:,} bytes), got {self.entries.limit / GIB:.3g}"
            )

    def through(
        self, texts: Sequence[Sequence[int]], fingerprint: str, text_pass: TextPass, device: torch.device
    ) -> KeyValues:
        """What `text_pass` gives for B texts; those that are not in the store are read by it, and kept.

        Args:
            texts: token ids of each.
            fingerprint: of the backbone.
            text_pass: what reads those that are missing, equal ones once.
            device: where the backbone is.
        """
        self.prepare(fingerprint, text_pass)
        started = time.perf_counter()
        keys = [key_of(fingerprint, text) for text in texts]
        by_key = dict(zip(keys, texts, strict=True))
        entries = self.entries.get({key: len(text) * self.bytes_a_token for key, text in by_key.items()})
        missing = {key: text for key, text in by_key.items() if key not in entries}
        looked_up = time.perf_counter() - started
        if missing:
            computed = self._read(missing, text_pass)
            new = dict(zip(missing, split(computed), strict=True))
            there = self.entries.add(new)
            self.kept.count([missing[key] for key in there])
            if len(missing) == len(texts):
                return computed
            entries |= new
        started = time.perf_counter()
        lengths = [len(text) for text in texts]
        gathered = together([entries[key] for key in keys], lengths, self._columns[fingerprint], device)
        self.found.count([text for key, text in by_key.items() if key not in missing])
        self.found.seconds += looked_up + time.perf_counter() - started
        return gathered

    def _read(self, missing: Mapping[bytes, Sequence[int]], text_pass: TextPass) -> KeyValues:
        started = time.perf_counter()
        computed = text_pass(list(missing.values()))
        self.read.count(missing.values())
        self.read.seconds += time.perf_counter() - started
        return computed


def key_of(fingerprint: str, text: Sequence[int]) -> bytes:
    """Sixteen bytes."""
    return hashlib.blake2b(np.array(text, np.int64).tobytes(), digest_size=16, key=digest_of(fingerprint)).digest()


@functools.cache
def digest_of(fingerprint: str) -> bytes:
    return hashlib.blake2b(fingerprint.encode(), digest_size=32).digest()


def tensors_of(texts: KeyValues) -> list[Tensor]:
    """What an entry is made of, `[T, ...]` each: the layers' keys and values, then the states."""
    assert texts.pooled is not None
    return [*(x for pair in texts.layers for x in pair), texts.pooled]


def split(texts: KeyValues) -> Iterator[Bytes]:
    """The entry of each text: one tensor after another, each of the text's tokens alone."""
    columns = [x.flatten(1).contiguous().view(torch.uint8).numpy(force=True) for x in tensors_of(texts)]
    first = 0
    for length in texts.lengths:
        yield np.concatenate([rows[first : first + length].reshape(-1) for rows in columns])
        first += length


def together(
    entries: Sequence[Bytes], lengths: Sequence[int], columns: Sequence[Column], device: torch.device
) -> KeyValues:
    """A packed row of the entries of texts of these lengths."""
    total = sum(lengths)
    packed = [np.empty((total, column.width), np.uint8) for column in columns]
    first = 0
    for entry, length in zip(entries, lengths, strict=True):
        place, rows = 0, slice(first, first + length)
        for column in packed:
            size = length * column.shape[1]
            column[rows] = entry[place : place + size].reshape(length, -1)
            place += size
        first += length
    *layers, states = (
        torch.from_numpy(rows).view(column.dtype).reshape(total, *column.shape).to(device)
        for rows, column in zip(packed, columns, strict=True)
    )
    return KeyValues(list(zip(layers[::2], layers[1::2], strict=True)), Segments(tuple(lengths), device), states)

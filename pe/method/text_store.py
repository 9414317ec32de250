"""What the frozen text pass gives for a text, kept and read back where it would be computed again.

An entry is all that later passes may ask of a text: the keys and values of every layer that soft tokens run, and the
states that enter the last one. Its key is made of what these depend on and of nothing else: the token ids, the
backbone's fingerprint (content, types, layers), and whether keys and values are kept in int8. So runs, embedders and
instructions share a store, and neither backbones nor types mix in one.

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

from pe.config import StoreDtype
from pe.method.attention import KeyValues
from pe.method.entries import Bytes, Entries, FolderEntries, MemoryEntries
from pe.method.packing import Segments

GIB = 1 << 30
LARGEST, SMALLEST = 127.0, 1e-30
"""Of int8 what the largest of a row becomes; what a row of zeros is divided by."""
DEFAULT_GIB = 8.0
INT8 = "keys and values in int8, a float32 scale a head"
"""Of the keys of such entries; other words where they are kept in another way."""
TextPass = Callable[[Sequence[Sequence[int]]], KeyValues]
"""Token ids of texts -> keys, values and, as `pooled`, the states `[T, D]` that enter the last layer."""


class Column(NamedTuple):
    """One tensor of an entry: its type, its shape for one token, and whether it is kept in int8.

    Then each row of its last dimension, a head of a token, has a scale of its own, float32, behind all values.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    is_narrow: bool

    @property
    def width(self) -> int:
        """Bytes of a token."""
        count = math.prod(self.shape)
        return count + 4 * (count // self.shape[-1]) if self.is_narrow else self.dtype.itemsize * count

    def to_bytes(self, x: Tensor) -> Bytes:
        """`[T, *shape]` -> `[T, width]`."""
        if not self.is_narrow:
            return as_bytes(x)
        wide = x.float()
        scale = wide.abs().amax(-1, keepdim=True).clamp_min_(SMALLEST).div_(LARGEST)
        return np.concatenate([as_bytes((wide / scale).round_().to(torch.int8)), as_bytes(scale)], axis=1)

    def from_bytes(self, rows: Bytes, device: torch.device) -> Tensor:
        """`[T, width]` -> `[T, *shape]`."""
        if not self.is_narrow:
            return torch.from_numpy(rows).view(self.dtype).reshape(-1, *self.shape).to(device)
        values, scale = np.split(rows, [math.prod(self.shape)], axis=1)
        narrow = torch.from_numpy(values).to(device).view(torch.int8).unflatten(1, self.shape)
        own = torch.from_numpy(scale.copy()).to(device).view(torch.float32).reshape(-1, *self.shape[:-1], 1)
        return (narrow * own).to(self.dtype)


def as_bytes(x: Tensor) -> Bytes:
    """`[T, ...]` -> `[T, bytes of a token]`."""
    found: Bytes = x.flatten(1).contiguous().view(torch.uint8).numpy(force=True)
    return found


def columns_of(texts: KeyValues, dtype: StoreDtype) -> list[Column]:
    """Those of an entry; the states keep their type, since the largest of them would take most of int8's range."""
    *keys_and_values, states = tensors_of(texts)
    narrow = [Column(x.dtype, tuple(x.shape[1:]), dtype == "int8") for x in keys_and_values]
    return [*narrow, Column(states.dtype, tuple(states.shape[1:]), False)]


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
        dtype: same: what is found is what was read; int8: keys and values are rounded, whether found or read.
        bytes_a_token: what the backbone that used it last takes; 0 before one did.
        found, read, kept: texts asked for that were there; that were read; and of these, those that are there now.
            Equal texts of one pass count once.
    """

    def __init__(self, entries: Entries, name: str, dtype: StoreDtype = "same") -> None:
        self.entries, self.name, self.dtype, self.bytes_a_token = entries, name, dtype, 0
        self.found, self.read, self.kept = Tally(), Tally(), Tally()
        self._columns: dict[str, list[Column]] = {}

    @classmethod
    def open(cls, where: str | Path, gib: float = DEFAULT_GIB, dtype: StoreDtype = "same") -> TextStore:
        """The store in a folder, which is made where there is none, or, for `memory`, one of this process's own.

        Args:
            where: `memory`, or a folder.
            gib: its size, in 2^30 bytes; a full store keeps what it has.
            dtype: what keys and values are kept in; a folder may hold both.

        Raises:
            ValueError: no size, or a folder that cannot be used (see `FolderEntries`).
        """
        if not 0 < gib < math.inf:
            raise ValueError(f"size of the text store: expected a positive number of GiB, got {gib}")
        if where == "memory":
            return cls(MemoryEntries(int(gib * GIB)), "text store in memory", dtype)
        return cls(FolderEntries(Path(where), int(gib * GIB)), f"text store {where}", dtype)

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
            self._columns[fingerprint] = columns_of(text_pass([[0]]), self.dtype)
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
        """What `text_pass` gives for B texts, in int8 rounded; those that are not there are read by it, and kept.

        Args:
            texts: token ids of each.
            fingerprint: of the backbone.
            text_pass: what reads those that are missing, equal ones once.
            device: where the backbone is.
        """
        self.prepare(fingerprint, text_pass)
        started = time.perf_counter()
        columns = self._columns[fingerprint]
        keys = [key_of(fingerprint if self.dtype == "same" else f"{fingerprint}, {INT8}", text) for text in texts]
        by_key = dict(zip(keys, texts, strict=True))
        entries = self.entries.get({key: len(text) * self.bytes_a_token for key, text in by_key.items()})
        missing = {key: text for key, text in by_key.items() if key not in entries}
        looked_up = time.perf_counter() - started
        if missing:
            computed = self._read(missing, text_pass)
            new = dict(zip(missing, split(computed, columns), strict=True))
            there = self.entries.add(new)
            self.kept.count([missing[key] for key in there])
            if len(missing) == len(texts) and self.dtype == "same":
                return computed
            entries |= new
        started = time.perf_counter()
        lengths = [len(text) for text in texts]
        gathered = together([entries[key] for key in keys], lengths, columns, device)
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


def split(texts: KeyValues, columns: Sequence[Column]) -> Iterator[Bytes]:
    """The entry of each text: one tensor after another, each of the text's tokens alone."""
    packed = [column.to_bytes(x) for column, x in zip(columns, tensors_of(texts), strict=True)]
    first = 0
    for length in texts.lengths:
        yield np.concatenate([rows[first : first + length].reshape(-1) for rows in packed])
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
    *layers, states = (column.from_bytes(rows, device) for rows, column in zip(packed, columns, strict=True))
    return KeyValues(list(zip(layers[::2], layers[1::2], strict=True)), Segments(tuple(lengths), device), states)

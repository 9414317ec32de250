"""Texts of different lengths as one row of tokens without padding.

Legend: B texts, T tokens of all texts together, L tokens of one text.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby

import torch
from torch import Tensor


def to_device(values: Tensor | Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Integers of the host, `int64` where they are no tensor, on `device`: a GPU's stream is not waited for."""
    host = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.int64, device="cpu")
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


CPU_TOKENS = 2048
"""Tokens that a CPU reads at once: larger tensors leave its caches, and each is mapped and cleared anew."""


@dataclass(frozen=True)
class Segments:
    """Where the texts of a packed row begin and end.

    Lengths live on the host, so that no kernel launch waits for the device.
    """

    lengths: tuple[int, ...]
    device: torch.device

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Begin of each text and the end of the last, `[B + 1] int32`."""
        return to_device(torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device="cpu"), self.device)

    @cached_property
    def positions(self) -> Tensor:
        """Position of each token in its text, `[T] int64`."""
        ranges = [torch.arange(length, device="cpu") for length in self.lengths]
        return to_device(torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64, device="cpu"), self.device)

    @cached_property
    def runs(self) -> list[tuple[int, int, int]]:
        """Neighbouring texts of equal length: (first token, number of texts, length of each)."""
        runs, first = [], 0
        for length, group in groupby(self.lengths):
            count = len(list(group))
            runs.append((first, count, length))
            first += count * length
        return runs


@dataclass(frozen=True)
class DeviceSegments:
    """Segments whose lengths only the device knows: `cu_seqlens` `[B + 1] int32`, none longer than `longest`."""

    cu_seqlens: Tensor
    longest: int


def pack(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Segments]:
    """Token ids one text after another, `[T] int64`, and their segments."""
    flat = [token for text in texts for token in text]
    return to_device(flat, device), Segments(tuple(map(len, texts)), device)


def by_length(texts: Sequence[Sized]) -> list[int]:
    """Indices of the texts from short to long; equal lengths keep their order."""
    return sorted(range(len(texts)), key=lambda i: len(texts[i]))


def inverse(order: Sequence[int], device: torch.device) -> Tensor:
    """The permutation that undoes `order`, as an index `[B] int64`."""
    back = torch.empty(len(order), dtype=torch.int64, device="cpu")
    back[torch.tensor(order, dtype=torch.int64, device="cpu")] = torch.arange(len(order), device="cpu")
    return to_device(back, device)


def budget_on(device: torch.device, most: int) -> int:
    """Tokens of a batch without gradient on `device`, `most` at most; a CPU takes what its caches hold."""
    return min(most, CPU_TOKENS) if device.type == "cpu" else most


def neighbours(texts: Sequence[Sequence[int]], budget: int) -> list[Sequence[Sequence[int]]]:
    """The texts in their order, cut where a part would exceed `budget` tokens; a longer text stands alone."""
    parts, first, used = [], 0, 0
    for place, text in enumerate(texts):
        if used and used + len(text) > budget:
            parts.append(texts[first:place])
            first, used = place, 0
        used += len(text)
    return [*parts, texts[first:]]


def token_batches(lengths: Sequence[int], budget: int, *, padded: bool = False) -> list[list[int]]:
    """Indices from short to long, cut where a batch would exceed `budget` tokens; a longer text stands alone.

    With `padded` each text of a batch counts as many tokens as the longest of them.
    """
    batches: list[list[int]] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        grown = (len(batches[-1]) + 1) * lengths[index] if batches and padded else used + lengths[index]
        if not batches or grown > budget:
            batches.append([])
            grown = lengths[index]
        batches[-1].append(index)
        used = grown
    return batches

"""What is written once and used until the weights that wrote it change.

The one rule, for finished prompts and for those of a frozen prompting LLM: a `Stamp` of the weights is taken at every
look, and another stamp than before empties the bank. It says where each weight is (a model that was moved or cast), the
sum of the version counters (loading, plain optimisers, any write that autograd sees) and a few values of each weight
(fused optimisers and writes through `.data`, as averages of weights are, raise no version). Looking at values waits for
a GPU, so a pass with gradient there, whose kernels are to be launched ahead, goes by the first two.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

SAMPLED = 16
"""Values of each weight in a stamp, where it has as many; less than twice as many."""
Key = TypeVar("Key", bound=Hashable)
Written = TypeVar("Written")


class Stamp(NamedTuple):
    """What tells weights from other or changed ones, without reading them whole.

    Attributes:
        places: device, type and address of each.
        versions: sum of the version counters; blind to fused optimisers and `.data`, and to tensors of inference mode.
        values: some of each, spread over it; blind to a write that leaves all of them as they are.
    """

    places: tuple[tuple[torch.device, torch.dtype, int], ...]
    versions: int
    values: tuple[float, ...]


def stamp(weights: Sequence[Tensor], *, with_values: bool = True) -> Stamp:
    """The stamp of some weights; with values it waits for a GPU's stream."""
    return Stamp(
        tuple((p.device, p.dtype, address(p)) for p in weights),
        sum(p._version for p in weights if not p.is_inference()),
        sample(weights) if with_values else (),
    )


def address(weight: Tensor) -> int:
    """Where a weight's values are; 0 where it has none."""
    return 0 if isinstance(weight, FakeTensor) else weight.data_ptr()


def may_wait(weights: Iterable[Tensor]) -> bool:
    """Whether a look at values holds nothing up."""
    return not torch.is_grad_enabled() or not any(p.is_cuda for p in weights)


@torch.no_grad()
def sample(weights: Iterable[Tensor]) -> tuple[float, ...]:
    """Some values of each weight, spread over it, by one transfer a device and type; none of a weight without data."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for weight in weights:
        if not weight.is_meta:
            # An even stride would meet the same few columns of a matrix in every row
            values = weight.reshape(-1)[:: weight.numel() // SAMPLED | 1]
            groups.setdefault((weight.device, weight.dtype), []).append(values)
    return tuple(value for group in groups.values() for value in torch.cat(group).tolist())


class PromptBank(Generic[Key, Written]):
    """What was written, by what it was written for, as long as the weights that wrote it stay as they were."""

    def __init__(self, most: int) -> None:
        """`most`: entries that are kept; the oldest goes first."""
        self._most = most
        self._stamp: Stamp | None = None
        self._entries: dict[Hashable, Written] = {}

    def get(
        self, keys: Sequence[Key], writers: Iterable[nn.Module], write: Callable[[list[Key]], Iterable[Written]]
    ) -> list[Written]:
        """The entry of each key; those that are not kept are written now.

        What was written in another precision of autocast, or on the other side of inference mode, is another entry.
        """
        weights = [p for writer in writers for p in writer.parameters()]
        now = stamp(weights, with_values=may_wait(weights))
        known = self._stamp
        if known is None or now[:2] != known[:2] or (now.values and now.values != known.values):
            self._entries, self._stamp = {}, now if now.values else stamp(weights)
        types = sorted({device.type for device, _, _ in now.places} - {"meta"})
        precisions = [torch.get_autocast_dtype(name) if torch.is_autocast_enabled(name) else None for name in types]
        context = (*precisions, torch.is_inference_mode_enabled())
        found = {key: self._entries[key, *context] for key in keys if (key, *context) in self._entries}
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        for key, entry in zip(missing, write(missing) if missing else (), strict=True):
            while len(self._entries) >= self._most:
                del self._entries[next(iter(self._entries))]
            found[key] = self._entries[key, *context] = entry
        return [found[key] for key in keys]

    def clear(self) -> None:
        """Forget everything, where something other than a weight has changed."""
        self._entries.clear()

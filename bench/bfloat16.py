"""Products of bfloat16 on a CPU that has no instructions for them: in float32, rounded once, as such instructions do.

torch's own take 7 to 75 times as long as float32's there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pe.method.loading import has_instructions

PRODUCTS = frozenset(
    (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.addmm_.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.baddbmm.default,
    )
)


@contextmanager
def products(device: torch.device) -> Iterator[None]:
    """Inside it products of bfloat16 on `device` go through float32 where it has no instructions for them."""
    if has_instructions(torch.bfloat16, device):
        yield
        return
    with WideProducts(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*has no instructions for bfloat16")
        yield


class WideProducts(TorchDispatchMode):
    """Products of bfloat16 matrices through float32; everything else as it is."""

    def __torch_dispatch__(
        self, op: Callable[..., Any], _: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if op not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return op(*args, **(kwargs or {}))
        wide = (x.float() if isinstance(x, Tensor) else x for x in args)
        product = op(*wide, **(kwargs or {}))
        return args[0].copy_(product) if op is torch.ops.aten.addmm_.default else product.bfloat16()

"""Products of bfloat16 on a CPU that has no instructions for them: in float32, rounded once, as such instructions do.

torch's own take 7 to 75 times as long as float32's there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = frozenset(
    (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.baddbmm.default,
    )
)


def is_native(device: torch.device) -> bool:
    """Whether products of bfloat16 run on instructions of their own; true of every GPU."""
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def products(device: torch.device) -> AbstractContextManager[Any]:
    """Inside it products of bfloat16 on `device` go through float32 where they are not native."""
    return nullcontext() if is_native(device) else WideProducts()


class WideProducts(TorchDispatchMode):
    """Products of bfloat16 matrices through float32; everything else as it is."""

    def __torch_dispatch__(
        self, op: Callable[..., Any], _: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if op not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return op(*args, **(kwargs or {}))
        wide = (x.float() if isinstance(x, Tensor) else x for x in args)
        return op(*wide, **(kwargs or {})).bfloat16()

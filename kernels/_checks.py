"""What every op checks on its arguments: host-side facts always, values only where reading them costs no sync."""

from __future__ import annotations

from typing import Literal

import torch
import triton
from torch import Tensor

Impl = Literal["auto", "triton", "torch"]
INTERPRETED: bool = triton.knobs.runtime.interpret


def require(ok: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError "name: expected ..., got ..." unless `ok`; `got` is formatted only then."""
    if not ok:
        shown = tuple(got) if isinstance(got, torch.Size) else got
        raise ValueError(f"{name}: expected {expected}, got {shown}")


def require_float(name: str, tensor: Tensor, ndim: int) -> None:
    require(tensor.dim() == ndim, name, f"{ndim} dimensions", tensor.shape)
    require(tensor.is_floating_point(), name, "a floating-point tensor", tensor.dtype)


def require_same_device(name: str, tensor: Tensor, device: torch.device) -> None:
    require(tensor.device == device, name, f"a tensor on {device}", tensor.device)


def require_offsets(name: str, offsets: Tensor, total: int, *, has_rest: bool = False) -> None:
    """`offsets` [B + 1] int32 starts at 0, never falls, ends at `total`, or with `has_rest` not after it.

    The values are read on CPU tensors only.
    """
    require(offsets.dim() == 1 and offsets.shape[0] >= 1, name, "shape [segments + 1]", offsets.shape)
    require(offsets.dtype == torch.int32, name, "int32", offsets.dtype)
    if values_are_free(offsets):
        require(int(offsets[0]) == 0, name, "a first entry of 0", int(offsets[0]))
        last = int(offsets[-1])
        require(last == total or (has_rest and last < total), name, f"a last entry of {total}", last)
        require(bool((offsets.diff() >= 0).all()), name, "entries that never fall", offsets.tolist())


def require_longest(name: str, longest: int, offsets: Tensor, total: int) -> None:
    """`longest` bounds every segment of `offsets`; on a GPU only what `total` tokens in so many segments tell."""
    require(longest >= 0, name, "an int >= 0", longest)
    mean = -(-total // max(1, offsets.shape[0] - 1))
    if not values_are_free(offsets):
        require(longest >= mean, name, f"at least the mean segment, {mean}", longest)
    elif offsets.shape[0] > 1:
        actual = int(offsets.diff().max())
        require(longest >= actual, name, f"at least the longest segment, {actual}", longest)


def require_range(name: str, index: Tensor, low: int, high: int) -> None:
    """Every entry of the integer tensor `index` lies in [low, high); read on CPU tensors only."""
    if values_are_free(index) and index.numel() > 0:
        smallest, largest = int(index.min()), int(index.max())
        require(low <= smallest and largest < high, name, f"entries in [{low}, {high})", f"[{smallest}, {largest}]")


def values_are_free(tensor: Tensor) -> bool:
    """Reading the tensor's values costs no device sync and breaks no graph that is being captured."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def use_triton(impl: Impl, tensor: Tensor) -> bool:
    """Whether the Triton path runs; an explicit "triton" that cannot run raises rather than falls back."""
    require(impl in ("auto", "triton", "torch"), "impl", '"auto", "triton" or "torch"', repr(impl))
    has_kernels = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
    if impl == "triton":
        require(has_kernels, "impl", '"auto" or "torch" for this dtype', f'"triton" with {tensor.dtype}')
        runs_here = tensor.is_cuda or (tensor.device.type == "cpu" and INTERPRETED)
        require(runs_here, "impl", '"triton" with tensors on a GPU, or TRITON_INTERPRET=1', f"{tensor.device} tensors")
    return impl == "triton" or (impl == "auto" and has_kernels and tensor.is_cuda)

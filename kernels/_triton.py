"""How the ops register and launch their Triton kernels, and the plain matrix product that several of them share.

Every kernel begins by taking its real numbers to float32: torch.compile passes them in float64.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, ClassVar

import torch
import torch.library
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from pe.kernels._checks import INTERPRETED

LOG2E = 1.4426950408889634
Config = dict[str, int]  # keyword arguments of a launch: BLOCKs, num_warps, num_stages
MATMUL_CONFIGS: tuple[Config, ...] = ({"BLOCK_K": 32, "num_stages": 4}, {"num_stages": 4}, {"num_warps": 8})


class _Interpreted:
    """A kernel of Triton's interpreter, launched as `wrap_triton` would; on fake tensors a launch computes nothing."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            if not any(isinstance(value, Tensor) and is_fake(value) for value in arguments.values()):
                self.kernel[grid](**arguments)

        return launch


def triton_op(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function that allocates, launches and mutates nothing; torch.compile sees through to its kernels.

    Its kernels run on the GPU of its first argument, whichever is the current one. Interpreted kernels cannot be
    traced, so there the op is an opaque one with the same schema.
    """
    if not INTERPRETED:
        return lambda fn: torch.library.triton_op(name, _on_its_gpu(fn), mutates_args=())

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        op = torch.library.custom_op(name, fn, mutates_args=())
        op.register_fake(fn)
        return op

    return register


def _on_its_gpu(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` with the GPU of its first tensor as the current one, on which alone Triton launches."""

    @functools.wraps(fn)
    def run(first: Tensor, *arguments: Any, **options: Any) -> Any:
        if not _are_real_and_on_a_gpu([first]):
            return fn(first, *arguments, **options)
        with torch.cuda.device(first.device):
            return fn(first, *arguments, **options)

    return run


class _Tuned:
    """A kernel that is launched with the fastest of its default and its candidate configurations.

    Timed once a kernel, GPU, dtypes, constants and sizes to a power of two (the arguments in capitals), on the tensors
    of the first such launch. A traced launch takes the default, a captured one the winner if it is known.
    """

    winners: ClassVar[dict[tuple[Hashable, ...], Config]] = {}

    def __init__(self, kernel: Any, candidates: Sequence[Config], updates: str) -> None:
        self.kernel, self.candidates, self.updates = kernel, candidates, updates

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            torch.library.wrap_triton(self.kernel)[grid](**arguments | self.winner(grid, arguments))

        return launch

    def winner(self, grid: tuple[int, ...], arguments: dict[str, Any]) -> Config:
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        if not _are_real_and_on_a_gpu(tensors):
            return {}
        sizes = (value for name, value in arguments.items() if name == name.upper())
        sizes = (value.bit_length() if isinstance(value, int) else value for value in sizes)
        key = (self.kernel.__name__, str(tensors[0].device), *(x.dtype for x in tensors), *sizes)
        if key not in self.winners and not torch.cuda.is_current_stream_capturing():
            before = arguments[self.updates].clone() if self.updates else None
            self.winners[key] = min(({}, *self.candidates), key=lambda config: self.time(grid, arguments | config))
            if before is not None:
                arguments[self.updates].copy_(before)
        return self.winners.get(key, {})

    def time(self, grid: tuple[int, ...], arguments: dict[str, Any]) -> float:
        """Median ms of a launch, infinite where the configuration does not fit the chip."""
        try:
            return triton.testing.do_bench(lambda: self.kernel[grid](**arguments), return_mode="median")
        except triton.OutOfResources:
            return math.inf


def _are_real_and_on_a_gpu(tensors: Sequence[Tensor]) -> bool:
    return all(type(x) in (Tensor, torch.nn.Parameter) and x.is_cuda for x in tensors)


def wrap_triton(kernel: Any, candidates: Sequence[Config] = (), updates: str = "") -> Any:
    """`torch.library.wrap_triton`, for interpreted kernels too. The name is what torch looks for in an op's source.

    With PE_AUTOTUNE=1 in the environment the launch is tuned over `candidates`: changes to the default launch's keyword
    arguments that leave the grid as it is. `updates` names the buffer that the kernel adds to, if any. Interpreted
    kernels are never tuned.
    """
    if INTERPRETED:
        return _Interpreted(kernel)
    if candidates and os.environ.get("PE_AUTOTUNE") == "1":
        return _Tuned(kernel, candidates, updates)
    return torch.library.wrap_triton(kernel)


def generation(device: torch.device) -> int:
    """8, 9 or 10 for NVIDIA's data-centre chips (163 KB of shared memory and up), 0 for all others (64 KB).

    It picks the default tiles; off a GPU, where kernels are interpreted, those of generation 9.
    """
    if device.type != "cuda":
        return 9
    capability = torch.cuda.get_device_capability(device)
    is_known = torch.version.hip is None and capability in ((8, 0), (9, 0), (10, 0), (10, 3))
    return capability[0] if is_known else 0


def tile(size: int, smallest: int, largest: int) -> int:
    """The smallest power of two that covers `size`, kept within [smallest, largest]."""
    return min(largest, max(smallest, triton.next_power_of_2(size)))


def floor_power(count: int) -> int:
    """The largest power of two up to `count`, at least 1: a kernel is compiled for each number of splits."""
    return 1 << (max(1, count).bit_length() - 1)


def unit_stride(x: Tensor) -> Tensor:
    """`x` itself where its last dimension is contiguous, else a copy: the kernels take every other stride as it is."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def distinct(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same tensors, a repeated one as a view of itself: torch.compile hands none to an autograd Function twice."""
    out: list[Tensor | None] = []
    for tensor in tensors:
        is_new = tensor is None or all(tensor is not other for other in tensors[: len(out)])
        out.append(tensor if is_new or tensor is None else tensor.view_as(tensor))
    return out


@triton.jit
def _matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    scale_ptr,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    stride_cm,
    first_row,
    ACCUMULATE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program owns a tile of c = a b scale, or of c += a b, in rows of c from `first_row`.

    Operands of two dtypes meet in float32.
    """
    n_tiles = tl.cdiv(N, BLOCK_N)
    pid_m = (tl.program_id(0) // n_tiles).to(tl.int64)
    pid_n = (tl.program_id(0) % n_tiles).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    c_ptrs = c_ptr + (first_row + offs_m)[:, None] * stride_cm + offs_n[None, :]
    if ACCUMULATE:
        acc = tl.load(c_ptrs, mask=mask_m[:, None] & mask_n[None, :], other=0.0).to(tl.float32)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        a_ptrs = a_ptr + offs_m[:, None] * stride_am + (k + offs_k)[None, :] * stride_ak
        b_ptrs = b_ptr + (k + offs_k)[:, None] * stride_bk + offs_n[None, :] * stride_bn
        a = tl.load(a_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BM, BK]
        b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # [BK, BN]
        if a_ptr.dtype.element_ty != b_ptr.dtype.element_ty:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if HAS_SCALE:
        acc = acc * tl.load(scale_ptr)
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def matmul_into(
    c: Tensor, a: Tensor, b: Tensor, *, first_row: int = 0, accumulate: bool = False, scale: Tensor | None = None
) -> None:
    """M rows of c [.., N] from `first_row` = a [M, K] b [K, N] times a scale [1], or += a b.

    float32 inside, one cast at the store; c has unit column stride. Rows are named instead of sliced, for a compiled
    graph: it copies all of c for every slice that is written, which torch 2.11 got wrong besides (an illegal access).
    """
    (M, K), N = a.shape, b.shape[1]
    if M == 0 or N == 0:
        return
    block_m, block_n = tile(M, 16, 128), tile(N, 16, 128)
    wrap_triton(_matmul_kernel, MATMUL_CONFIGS, updates="c_ptr" if accumulate else "")[
        (triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)
    ](
        a_ptr=a,
        b_ptr=b,
        c_ptr=c,
        scale_ptr=a if scale is None else scale,
        M=M,
        N=N,
        K=K,
        stride_am=a.stride(0),
        stride_ak=a.stride(1),
        stride_bk=b.stride(0),
        stride_bn=b.stride(1),
        stride_cm=c.stride(0),
        first_row=first_row,
        ACCUMULATE=accumulate,
        HAS_SCALE=scale is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=64 if a.element_size() == 2 and b.element_size() == 2 else 32,
        num_warps=8 if block_m * block_n > 64 * 128 else 4,
        num_stages=3 if generation(a.device) else 1,
    )

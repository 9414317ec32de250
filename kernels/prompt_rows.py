"""Input rows of a packed batch: frozen token rows and aligned soft-prompt rows, placed by `ids` alone.

Forward: A = prompts.view(N·K, Dp) W, every soft row once however many texts use it, then one copy:
row t is embedding[ids[t]] * scale where ids[t] >= 0, else A[-1 - ids[t]].
Backward: dA[r] = sum of dX[t] over the uses t of soft row r, in the order of a stable sort (no atomics, so runs repeat
bitwise), dprompts = dA Wᵀ, dW = promptsᵀ dA. `embedding` gets no gradient. Nothing is saved but the inputs.
Bytes: forward the rows of X twice (read, written), W, and A twice; backward dX's soft rows, dA, W.

Shape legend: T packed rows, V vocabulary, De the backbone's width, N prompts of K soft tokens of width Dp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pe.kernels._checks import Impl, require, require_float, require_range, require_same_device, use_triton
from pe.kernels._triton import matmul_into, tile, triton_op, unit_stride, wrap_triton

CONFIGS = ({"num_warps": 8}, {"num_warps": 2}, {"num_warps": 1})


def prompt_rows_ref(ids: Tensor, embedding: Tensor, prompts: Tensor, weight: Tensor | None, *, scale: float) -> Tensor:
    """Plain torch: every soft row is aligned once, however many texts use it, then rows are gathered by `ids`."""
    soft, dtype = prompts.reshape(-1, prompts.shape[2]), torch.promote_types(prompts.dtype, torch.float32)  # [N·K, Dp]
    if weight is not None:
        dtype = torch.promote_types(dtype, weight.dtype)
        soft = soft.to(dtype) @ weight.to(dtype)
    soft = F.pad(soft.to(dtype), (0, 0, 0, 1))  # a zero row for the text positions to point to
    text = embedding.detach()[ids.clamp(min=0)]
    if scale != 1.0:
        text = (text.to(torch.promote_types(text.dtype, torch.float32)) * scale).to(text.dtype)
    is_soft = ids < 0
    rows = soft[torch.where(is_soft, -1 - ids, soft.shape[0] - 1)].to(text.dtype)
    return torch.where(is_soft[:, None], rows, text)


@triton.jit
def _prompt_rows_fwd_kernel(
    ids_ptr, embedding_ptr, aligned_ptr, x_ptr, scale, D,
    stride_ev, stride_ar, stride_xt,
    HAS_SOFT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program copies BLOCK_D columns of one packed row."""
    scale = tl.cast(scale, tl.float32)
    t = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    row = tl.load(ids_ptr + t)
    is_soft = tl.full([BLOCK_D], row, tl.int64) < 0
    text = tl.load(embedding_ptr + row * stride_ev + offs_d, mask=mask_d & ~is_soft, other=0.0)
    x = text.to(tl.float32) * scale
    if HAS_SOFT:
        soft = tl.load(aligned_ptr + (-1 - row) * stride_ar + offs_d, mask=mask_d & is_soft, other=0.0)
        x = tl.where(is_soft, soft.to(tl.float32), x)
    tl.store(x_ptr + t * stride_xt + offs_d, x.to(x_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def _prompt_rows_bwd_kernel(
    order_ptr, begin_ptr, dx_ptr, da_ptr, D,
    stride_xt, stride_ar,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_D columns of one soft row's gradient: the sum over its uses, BLOCK_T at a time."""
    r = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    first, last = tl.load(begin_ptr + r), tl.load(begin_ptr + r + 1)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for use in range(first, last, BLOCK_T):
        offs_u = use + tl.arange(0, BLOCK_T)
        mask_u = offs_u < last
        t = tl.load(order_ptr + offs_u, mask=mask_u, other=0)
        dx_ptrs = dx_ptr + t[:, None] * stride_xt + offs_d[None, :]
        acc += tl.load(dx_ptrs, mask=mask_u[:, None] & mask_d[None, :], other=0.0).to(tl.float32)  # [BT, BD]
    da = tl.sum(acc, axis=0)
    tl.store(da_ptr + r * stride_ar + offs_d, da.to(da_ptr.dtype.element_ty), mask=mask_d)


@triton_op("pe::prompt_rows_fwd")
def _prompt_rows_fwd(ids: Tensor, embedding: Tensor, soft: Tensor, weight: Tensor | None, scale: float) -> Tensor:
    """X [T, De] from ids [T], embedding [V, De], soft [N·K, Dp] and weight [Dp, De]."""
    T, D = ids.shape[0], embedding.shape[1]
    x = embedding.new_empty(T, D)
    if T == 0 or D == 0:
        return x
    aligned = soft
    if weight is not None:
        aligned = embedding.new_empty(soft.shape[0], D)
        matmul_into(aligned, soft, weight)
    block_d = tile(D, 16, 1024)
    wrap_triton(_prompt_rows_fwd_kernel, CONFIGS)[(T, triton.cdiv(D, block_d))](
        ids_ptr=ids, embedding_ptr=embedding, aligned_ptr=aligned, x_ptr=x, scale=scale, D=D,
        stride_ev=embedding.stride(0), stride_ar=aligned.stride(0), stride_xt=x.stride(0),
        HAS_SOFT=soft.shape[0] > 0, BLOCK_D=block_d, num_warps=4,
    )  # fmt: skip
    return x


@triton_op("pe::prompt_rows_bwd")
def _prompt_rows_bwd(
    dx: Tensor, ids: Tensor, soft: Tensor, weight: Tensor | None, needs_soft: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """dsoft [N·K, Dp] and dweight [Dp, De]; an empty tensor for each that is not asked for."""
    R, D = soft.shape[0], dx.shape[1]
    dsoft = torch.empty_like(soft) if needs_soft else soft.new_empty(0)
    dweight = soft.new_empty(0) if weight is None or not needs_weight else torch.empty_like(weight)
    key, order = torch.sort(-1 - ids, stable=True)  # soft rows 0..R-1 in order, text rows before them
    begin = torch.searchsorted(key, torch.arange(R + 1, device=ids.device))
    da = dsoft
    if weight is not None:
        same = dx.dtype == soft.dtype == weight.dtype
        da = dx.new_empty(R, D, dtype=dx.dtype if same else torch.float32)
    if R > 0 and D > 0:
        block_d = tile(D, 16, 128)
        wrap_triton(_prompt_rows_bwd_kernel, CONFIGS)[(R, triton.cdiv(D, block_d))](
            order_ptr=order, begin_ptr=begin, dx_ptr=dx, da_ptr=da, D=D,
            stride_xt=dx.stride(0), stride_ar=da.stride(0),
            BLOCK_T=16, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    if weight is not None and needs_soft:
        matmul_into(dsoft, da, weight.T)
    if weight is not None and needs_weight:
        matmul_into(dweight, soft.T, da)
    return dsoft, dweight


class _PromptRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, ids: Tensor, embedding: Tensor, soft: Tensor, weight: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(ids, soft, weight)
        return _prompt_rows_fwd(ids, embedding, soft, weight, scale)

    @staticmethod
    def backward(ctx: FunctionCtx, dx: Tensor) -> tuple[Tensor | None, ...]:
        ids, soft, weight = ctx.saved_tensors
        needs_soft, needs_weight = ctx.needs_input_grad[2:4]
        dsoft, dweight = _prompt_rows_bwd(unit_stride(dx), ids, soft, weight, needs_soft, needs_weight)
        return None, None, dsoft if needs_soft else None, dweight if needs_weight else None, None


def prompt_rows(
    ids: Tensor, embedding: Tensor, prompts: Tensor, weight: Tensor | None, *, scale: float = 1.0, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Rows of a packed batch: `embedding[id] * scale` for id >= 0, aligned soft row number -1 - id for id < 0.

    ids [T] int64, embedding [V, De], prompts [N, K, Dp], weight [Dp, De] or None (Dp == De, rows copied)
    -> [T, De] in embedding's dtype. Soft rows are not scaled. A soft row may be used by many positions: the gradients
    to `prompts` and `weight` are sums over its uses. `embedding` gets none.
    Raises ValueError on shapes, dtypes or devices that do not fit, and (CPU) on ids out of range.
    """
    require(ids.dim() == 1, "ids", "shape [T]", ids.shape)
    require(ids.dtype == torch.int64, "ids", "int64", ids.dtype)
    require_float("embedding", embedding, 2)
    require_float("prompts", prompts, 3)
    width = embedding.shape[1]
    if weight is None:
        require(prompts.shape[2] == width, "prompts", f"shape [N, K, {width}] without a weight", prompts.shape)
    else:
        require_float("weight", weight, 2)
        expected = (prompts.shape[2], width)
        require(tuple(weight.shape) == expected, "weight", f"shape {expected}", weight.shape)
        require_same_device("weight", weight, embedding.device)
    require_same_device("ids", ids, embedding.device)
    require_same_device("prompts", prompts, embedding.device)
    require_range("ids", ids, -prompts.shape[0] * prompts.shape[1], embedding.shape[0])
    if use_triton(impl, embedding):
        soft = prompts.reshape(-1, prompts.shape[2]).contiguous()
        return _PromptRows.apply(
            ids.contiguous(), unit_stride(embedding.detach()), soft, None if weight is None else weight.contiguous(),
            float(scale),
        )  # fmt: skip
    return prompt_rows_ref(ids, embedding, prompts, weight, scale=scale)

"""Final norm, segment pooling and L2 normalisation of packed hidden states, each row read once.

Forward: x̂_t = rstd_t (h_t - mean_t), n_t = x̂_t w + b ("none": n_t = h_t, "rms": no mean), u_b = sum_t share_t n_t,
y_b = u_b / |u_b|, where share_t is 1 / length, 1 at the last row, or w_t / sum(w).
Backward: du = (g - y (y·g)) / |u|, dn_t = share_t du, dx̂ = dn w,
dh_t = rstd_t (dx̂ - x̂_t mean(dx̂ x̂_t)), for "layer" also less mean(dx̂); dw_t = du·(n_t - u_b) / sum(w).
Saved: h, y and 1 / |u|.
Bytes: T·D forward; backward T·D read (none without a norm) and T·D written, of row weights T·D read. Long segments
are split over programs and merged through a partial buffer, so runs repeat bitwise.

Shape legend: T packed rows, D width, B segments, S splits of a segment.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd.function import FunctionCtx

from pe.kernels._checks import (
    Impl,
    require,
    require_float,
    require_offsets,
    require_same_device,
    use_triton,
    values_are_free,
)
from pe.kernels._triton import floor_power, triton_op, unit_stride, wrap_triton

L2_EPS = 1e-12  # torch.nn.functional.normalize's
PROGRAMS = 528  # split segments until about this many programs run: four for each of 132 multiprocessors
TILE_ELEMENTS = 8192  # elements of a [BLOCK_T, BLOCK_D] tile
MAX_WIDTH = 16384
CONFIGS = ({"num_warps": 16}, {"num_warps": 8}, {"num_warps": 4})

Mode = Literal["mean", "last", "weighted"]
Norm = Literal["none", "rms", "layer"]


def pool_normalize_ref(
    h: Tensor, cu_seqlens: Tensor, *, mode: Mode = "mean",
    norm: Norm = "none", weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6,
    token_weights: Tensor | None = None, normalize: bool = True,
) -> Tensor:  # fmt: skip
    """Plain torch, at least float32 inside and out."""
    n_segments = cu_seqlens.shape[0] - 1
    dtype = torch.promote_types(h.dtype, torch.float32)
    if mode == "last":
        h = h[(cu_seqlens[1:] - 1).clamp(min=0)] if h.shape[0] else h.new_zeros(n_segments, h.shape[1])
        segment, w = torch.arange(n_segments, device=h.device), cu_seqlens.diff().gt(0).to(dtype)
        cu_seqlens = torch.arange(n_segments + 1, device=h.device)
    else:
        segment = torch.searchsorted(cu_seqlens[1:], torch.arange(h.shape[0], device=h.device), right=True)
        w = h.new_ones(h.shape[0], dtype=dtype) if token_weights is None else token_weights.to(dtype)
    x = h.to(dtype)
    left_out = w == 0
    may_leave_out = token_weights is not None or mode == "last"
    if may_leave_out and not (values_are_free(w) and (is_fake(w) or not left_out.any())):
        x = x.masked_fill(left_out[:, None], 0.0)  # what is left out may be infinite
    if norm == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    if norm != "none":
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        x = x * weight.to(dtype)
    if bias is not None:
        x = x + bias.to(dtype)
    w = torch.where(left_out, 0.0, w)  # without a gradient where a row is left out
    total = w.new_zeros(n_segments).index_add(0, segment, w)
    share = torch.where(total == 0, 0.0, 1 / torch.where(total == 0, 1.0, total))[segment] * w  # [T]
    rows = torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
    pooled = F.embedding_bag(rows, x, cu_seqlens, mode="sum", per_sample_weights=share, include_last_offset=True)
    return F.normalize(pooled, dim=-1, eps=L2_EPS) if normalize else pooled


@triton.jit
def _share_factor(w_ptr, begin, end, MODE: tl.constexpr, BLOCK_W: tl.constexpr):
    """1 / the sum of the segment's row weights, 0 where that sum is 0."""
    if MODE == "weighted":
        total = tl.zeros([BLOCK_W], tl.float32)
        for t in range(begin, end, BLOCK_W):
            offs_w = t + tl.arange(0, BLOCK_W)
            total += tl.load(w_ptr + offs_w, mask=offs_w < end, other=0.0).to(tl.float32)
        total = tl.sum(total, axis=0)
    elif MODE == "mean":
        total = (end - begin).to(tl.float32)
    else:
        total = tl.where(end > begin, 1.0, 0.0)
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


@triton.jit
def _row_weight(w_ptr, offs_t, mask_t, end, MODE: tl.constexpr):
    """Weight of each row before the segment's common factor."""
    if MODE == "weighted":
        weight = tl.load(w_ptr + offs_t, mask=mask_t, other=0.0).to(tl.float32)
    elif MODE == "mean":
        weight = tl.where(mask_t, 1.0, 0.0)
    else:
        weight = tl.where(mask_t & (offs_t == end - 1), 1.0, 0.0)
    return weight


@triton.jit
def _standardize(h_ptr, offs_t, offs_d, mask, stride_ht, D, eps, NORM: tl.constexpr):
    """Rows x̂ [BT, BD] of h and their rstd [BT]; rows outside the mask are zero."""
    x = tl.load(h_ptr + offs_t[:, None] * stride_ht + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM == "layer":
        x = tl.where(mask, x - (tl.sum(x, axis=1) / D)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    if NORM != "none":
        x = x * rstd[:, None]
    return x, rstd


@triton.jit
def _finish(u, y_ptrs, inv_ptr, mask_d, l2_eps, NORMALIZE: tl.constexpr):
    """Store y = u / |u| and 1 / |u|."""
    if NORMALIZE:
        norm = tl.sqrt(tl.sum(u * u, axis=0))
        inverse = 1.0 / tl.where(norm < l2_eps, l2_eps, norm)
        u = u * inverse
        tl.store(inv_ptr, inverse)
    tl.store(y_ptrs, u, mask=mask_d)


@triton.jit
def _pool_normalize_fwd_kernel(
    h_ptr, cu_ptr, weight_ptr, bias_ptr, w_ptr, partial_ptr, y_ptr, inv_ptr, eps, l2_eps, D, stride_ht,
    MODE: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program pools every SPLITS-th block of rows of one segment, and finishes it where it is the only one."""
    eps, l2_eps = tl.cast(eps, tl.float32), tl.cast(l2_eps, tl.float32)
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(cu_ptr + b).to(tl.int64), tl.load(cu_ptr + b + 1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    factor = _share_factor(w_ptr, begin, end, MODE, BLOCK_W)
    first = begin
    if MODE == "last":
        first = tl.maximum(begin, end - 1)
    gain = tl.full([BLOCK_D], 1.0, tl.float32)
    if HAS_WEIGHT:
        gain = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    shift = tl.zeros([BLOCK_D], tl.float32)
    if HAS_BIAS:
        shift = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for t in range(first + split * BLOCK_T, end, SPLITS * BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        x, _ = _standardize(h_ptr, offs_t, offs_d, mask_t[:, None] & mask_d[None, :], stride_ht, D, eps, NORM)
        weight = _row_weight(w_ptr, offs_t, mask_t, end, MODE)
        if MODE == "weighted":
            x = tl.where((weight == 0.0)[:, None], 0.0, x)
        acc += weight[:, None] * (x * gain[None, :] + shift[None, :])
    u = tl.sum(acc, axis=0) * factor
    if SPLITS == 1:
        _finish(u, y_ptr + b * D + offs_d, inv_ptr + b, mask_d, l2_eps, NORMALIZE)
    else:
        tl.store(partial_ptr + (b * SPLITS + split) * D + offs_d, u, mask=mask_d)


@triton.jit
def _pool_normalize_merge_kernel(
    partial_ptr, y_ptr, inv_ptr, l2_eps, D,
    NORMALIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program sums the splits of one segment and normalises the sum."""
    l2_eps = tl.cast(l2_eps, tl.float32)
    b = tl.program_id(0).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    u = tl.zeros([BLOCK_D], tl.float32)
    for split in range(SPLITS):
        u += tl.load(partial_ptr + (b * SPLITS + split) * D + offs_d, mask=mask_d, other=0.0)
    _finish(u, y_ptr + b * D + offs_d, inv_ptr + b, mask_d, l2_eps, NORMALIZE)


@triton.jit
def _pooled_gradient(g_ptr, y_ptr, inv_ptr, b, offs_d, mask_d, D, NORMALIZE: tl.constexpr):
    """du [BD] of a segment's pooled row u, and du·u."""
    du = tl.load(g_ptr + b * D + offs_d, mask=mask_d, other=0.0)
    y = tl.load(y_ptr + b * D + offs_d, mask=mask_d, other=0.0)
    along = tl.sum(y * du, axis=0)
    if NORMALIZE:
        du = (du - y * along) * tl.load(inv_ptr + b)
        along = 0.0
    return du, along


@triton.jit
def _pool_normalize_bwd_kernel(
    h_ptr, cu_ptr, weight_ptr, w_ptr, y_ptr, inv_ptr, g_ptr, dh_ptr, eps, D, stride_ht,
    MODE: tl.constexpr, NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, NORMALIZE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program writes dh for every SPLITS-th block of rows of one segment."""
    eps = tl.cast(eps, tl.float32)
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(cu_ptr + b).to(tl.int64), tl.load(cu_ptr + b + 1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    factor = _share_factor(w_ptr, begin, end, MODE, BLOCK_W)
    du, _ = _pooled_gradient(g_ptr, y_ptr, inv_ptr, b, offs_d, mask_d, D, NORMALIZE)
    du = du * factor
    if HAS_WEIGHT:
        du = du * tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    for t in range(begin + split * BLOCK_T, end, SPLITS * BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        mask = mask_t[:, None] & mask_d[None, :]
        weight = _row_weight(w_ptr, offs_t, mask_t, end, MODE)
        dx = weight[:, None] * du[None, :]  # [BT, BD]
        if NORM != "none":
            x, rstd = _standardize(h_ptr, offs_t, offs_d, mask & (weight != 0.0)[:, None], stride_ht, D, eps, NORM)
            if NORM == "layer":
                dx = dx - (tl.sum(dx, axis=1) / D)[:, None]
            dx = rstd[:, None] * (dx - x * (tl.sum(dx * x, axis=1) / D)[:, None])
        dh_ptrs = dh_ptr + offs_t[:, None] * D + offs_d[None, :]
        tl.store(dh_ptrs, dx.to(dh_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pool_normalize_bwd_weights_kernel(
    h_ptr, cu_ptr, weight_ptr, bias_ptr, w_ptr, y_ptr, inv_ptr, g_ptr, dw_ptr, eps, D, stride_ht,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, NORMALIZE: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program writes dw for every SPLITS-th block of rows of one segment."""
    eps = tl.cast(eps, tl.float32)
    b, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = tl.load(cu_ptr + b).to(tl.int64), tl.load(cu_ptr + b + 1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    factor = _share_factor(w_ptr, begin, end, "weighted", BLOCK_W)
    du, along = _pooled_gradient(g_ptr, y_ptr, inv_ptr, b, offs_d, mask_d, D, NORMALIZE)
    constant = -along
    if HAS_BIAS:
        constant += tl.sum(du * tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32), axis=0)
    if HAS_WEIGHT:
        du = du * tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    for t in range(begin + split * BLOCK_T, end, SPLITS * BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        is_read = _row_weight(w_ptr, offs_t, mask_t, end, "weighted") != 0.0
        x, _ = _standardize(h_ptr, offs_t, offs_d, is_read[:, None] & mask_d[None, :], stride_ht, D, eps, NORM)
        dw = tl.where(is_read, factor * (tl.sum(x * du[None, :], axis=1) + constant), 0.0)
        tl.store(dw_ptr + offs_t, dw, mask=mask_t)


def _tiles(n_rows: int, width: int, n_segments: int, mode: str) -> dict[str, int]:
    """How a kernel that walks the segments is divided and compiled.

    One program a segment is enough for a single row, or where there are many segments or few blocks in each.
    """
    block_d = max(16, triton.next_power_of_2(width))
    block_t = max(1, min(16, TILE_ELEMENTS // block_d)) if mode != "last" else 1
    blocks_each = triton.cdiv(n_rows, n_segments * block_t)
    splits = 1 if mode == "last" else floor_power(min(PROGRAMS // n_segments, blocks_each))
    num_warps = 8 if block_d * block_t >= 4096 else 4
    return {"SPLITS": splits, "BLOCK_T": block_t, "BLOCK_D": block_d, "BLOCK_W": 128, "num_warps": num_warps}


@triton_op("pe::pool_normalize_fwd")
def _pool_normalize_fwd(
    h: Tensor, cu_seqlens: Tensor, weight: Tensor | None, bias: Tensor | None, token_weights: Tensor | None,
    mode: str, norm: str, eps: float, normalize: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y [B, D] and 1 / |u| [B], float32."""
    (T, D), B = h.shape, cu_seqlens.shape[0] - 1
    y, inverse = h.new_empty(B, D, dtype=torch.float32), h.new_empty(B, dtype=torch.float32)
    if B == 0:
        return y, inverse
    tiles = _tiles(T, D, B, mode)
    splits = tiles["SPLITS"]
    partial = h.new_empty(B, splits, D, dtype=torch.float32) if splits > 1 else h
    wrap_triton(_pool_normalize_fwd_kernel, CONFIGS)[(B, splits)](
        h_ptr=h, cu_ptr=cu_seqlens, weight_ptr=h if weight is None else weight, bias_ptr=h if bias is None else bias,
        w_ptr=h if token_weights is None else token_weights, partial_ptr=partial, y_ptr=y, inv_ptr=inverse,
        eps=eps, l2_eps=L2_EPS, D=D, stride_ht=h.stride(0),
        MODE=mode, NORM=norm, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, NORMALIZE=normalize, **tiles,
    )  # fmt: skip
    if splits > 1:
        wrap_triton(_pool_normalize_merge_kernel)[(B,)](
            partial_ptr=partial, y_ptr=y, inv_ptr=inverse, l2_eps=L2_EPS, D=D,
            NORMALIZE=normalize, SPLITS=splits, BLOCK_D=tiles["BLOCK_D"], num_warps=tiles["num_warps"],
        )  # fmt: skip
    return y, inverse


@triton_op("pe::pool_normalize_bwd")
def _pool_normalize_bwd(
    g: Tensor, h: Tensor, cu_seqlens: Tensor, weight: Tensor | None, token_weights: Tensor | None,
    y: Tensor, inverse: Tensor, mode: str, norm: str, eps: float, normalize: bool,
) -> Tensor:  # fmt: skip
    """dh [T, D] in h's dtype."""
    (T, D), B = h.shape, cu_seqlens.shape[0] - 1
    dh = h.new_empty(T, D)
    if T == 0 or B == 0:
        return dh
    tiles = _tiles(T, D, B, "mean")  # every row has a gradient
    wrap_triton(_pool_normalize_bwd_kernel, CONFIGS)[(B, tiles["SPLITS"])](
        h_ptr=h, cu_ptr=cu_seqlens, weight_ptr=h if weight is None else weight,
        w_ptr=h if token_weights is None else token_weights, y_ptr=y, inv_ptr=inverse, g_ptr=g, dh_ptr=dh,
        eps=eps, D=D, stride_ht=h.stride(0),
        MODE=mode, NORM=norm, HAS_WEIGHT=weight is not None, NORMALIZE=normalize, **tiles,
    )  # fmt: skip
    return dh


@triton_op("pe::pool_normalize_bwd_weights")
def _pool_normalize_bwd_weights(
    g: Tensor, h: Tensor, cu_seqlens: Tensor, weight: Tensor | None, bias: Tensor | None, token_weights: Tensor,
    y: Tensor, inverse: Tensor, norm: str, eps: float, normalize: bool,
) -> Tensor:  # fmt: skip
    """dw [T] float32."""
    (T, D), B = h.shape, cu_seqlens.shape[0] - 1
    dw = h.new_empty(T, dtype=torch.float32)
    if T == 0 or B == 0:
        return dw
    tiles = _tiles(T, D, B, "weighted")
    wrap_triton(_pool_normalize_bwd_weights_kernel, CONFIGS)[(B, tiles["SPLITS"])](
        h_ptr=h, cu_ptr=cu_seqlens, weight_ptr=h if weight is None else weight, bias_ptr=h if bias is None else bias,
        w_ptr=token_weights, y_ptr=y, inv_ptr=inverse, g_ptr=g, dw_ptr=dw,
        eps=eps, D=D, stride_ht=h.stride(0),
        NORM=norm, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, NORMALIZE=normalize, **tiles,
    )  # fmt: skip
    return dw


class _PoolNormalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, h: Tensor, cu_seqlens: Tensor,
        weight: Tensor | None, bias: Tensor | None, token_weights: Tensor | None,
        mode: str, norm: str, eps: float, normalize: bool,
    ) -> Tensor:  # fmt: skip
        y, inverse = _pool_normalize_fwd(h, cu_seqlens, weight, bias, token_weights, mode, norm, eps, normalize)
        ctx.save_for_backward(h, cu_seqlens, weight, bias, token_weights, y, inverse)
        ctx.options = mode, norm, eps, normalize
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        h, cu_seqlens, weight, bias, token_weights, y, inverse = ctx.saved_tensors
        mode, norm, eps, normalize = ctx.options
        g, dh, dw = g.contiguous(), None, None
        if ctx.needs_input_grad[0]:
            dh = _pool_normalize_bwd(
                g, h, cu_seqlens, weight, token_weights, y, inverse, mode, norm, eps, normalize
            )  # fmt: skip
        if ctx.needs_input_grad[4]:
            dw = _pool_normalize_bwd_weights(
                g, h, cu_seqlens, weight, bias, token_weights, y, inverse, norm, eps, normalize
            ).to(token_weights.dtype)
        return dh, None, None, None, dw, None, None, None, None


def pool_normalize(
    h: Tensor, cu_seqlens: Tensor, *, mode: Mode = "mean",
    norm: Norm = "none", weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6,
    token_weights: Tensor | None = None, normalize: bool = True, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Pool the rows of each segment of `h`, after an optional final norm, to one L2-normalised row.

    h [T, D], cu_seqlens [B + 1] int32 -> [B, D] float32 (float64 stays float64).
    norm: "none", "rms" or "layer", with `weight` and `bias` [D]. mode: "mean", "last" (the last row) or "weighted",
    sum(w h) / sum(w) with `token_weights` [T]. normalize: divide by the L2 norm. A segment that is empty, or whose
    weights sum to zero, gives a zero row and no gradient; a row of weight zero is left out and gives its weight none.
    Differentiable in `h` and `token_weights`: the other tensors are constants.
    Raises ValueError on shapes, dtypes or devices that do not fit, on a constant that requires grad, and (CPU) on
    offsets that fall or do not end at T.
    """
    require_float("h", h, 2)
    require(h.shape[1] >= 1, "h", "a width of at least 1", h.shape)
    require_offsets("cu_seqlens", cu_seqlens, h.shape[0])
    require_same_device("cu_seqlens", cu_seqlens, h.device)
    require(mode in ("mean", "last", "weighted"), "mode", '"mean", "last" or "weighted"', repr(mode))
    require(norm in ("none", "rms", "layer"), "norm", '"none", "rms" or "layer"', repr(norm))
    require(norm != "none" or weight is None, "weight", 'None with norm="none"', "a tensor")
    require(norm == "layer" or bias is None, "bias", f'None with norm="{norm}"', "a tensor")
    if (mode == "weighted") != (token_weights is not None):
        got = "None" if token_weights is None else "a tensor"
        raise ValueError(f'token_weights: expected a tensor exactly with mode="weighted", got {got} with mode="{mode}"')
    require(norm == "none" or eps > 0, "eps", "a number > 0", eps)
    for name, tensor, size in (
        ("weight", weight, h.shape[1]),
        ("bias", bias, h.shape[1]),
        ("token_weights", token_weights, h.shape[0]),
    ):
        if tensor is not None:
            require_float(name, tensor, 1)
            require(tensor.shape[0] == size, name, f"shape [{size}]", tensor.shape)
            require_same_device(name, tensor, h.device)
            constant = name == "token_weights" or not (tensor.requires_grad and torch.is_grad_enabled())
            require(constant, name, "a tensor that requires no grad (it is a constant here)", "one that does")
    if use_triton(impl, h):
        require(h.shape[1] <= MAX_WIDTH, "h", f"a width of at most {MAX_WIDTH} for the Triton path", h.shape)
        constants = (None if tensor is None else tensor.contiguous() for tensor in (weight, bias, token_weights))
        return _PoolNormalize.apply(
            unit_stride(h), cu_seqlens.contiguous(), *constants, mode, norm, float(eps), normalize
        )  # fmt: skip
    return pool_normalize_ref(
        h, cu_seqlens, mode=mode, norm=norm, weight=weight, bias=bias, eps=eps, token_weights=token_weights,
        normalize=normalize,
    )  # fmt: skip

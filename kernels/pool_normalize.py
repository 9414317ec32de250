"""Final norm, segment pooling and L2 normalisation of packed hidden states.

y_b = l2(pool over the rows t of segment b of norm(h_t)).
Shape legend: T packed rows, D width, B segments.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pe.kernels._checks import Impl, require, require_float, require_offsets, require_same_device, use_triton

L2_EPS = 1e-12  # torch.nn.functional.normalize's

Mode = Literal["mean", "last", "weighted"]
Norm = Literal["none", "rms", "layer"]


def pool_normalize_ref(
    h: Tensor,
    cu_seqlens: Tensor,
    *,
    mode: Mode = "mean",
    norm: Norm = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    token_weights: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """Plain torch, at least float32 inside and out."""
    n_segments = cu_seqlens.shape[0] - 1
    dtype = torch.promote_types(h.dtype, torch.float32)
    if mode == "last":
        h = h[(cu_seqlens[1:] - 1).clamp(min=0)] if h.shape[0] else h.new_zeros(n_segments, h.shape[1])
        segment, w = torch.arange(n_segments, device=h.device), cu_seqlens.diff().gt(0).to(dtype)
    else:
        segment = torch.searchsorted(cu_seqlens[1:], torch.arange(h.shape[0], device=h.device), right=True)
        w = h.new_ones(h.shape[0], dtype=dtype) if token_weights is None else token_weights.to(dtype)
    x = h.to(dtype)
    if norm == "layer":
        x = x - x.mean(dim=-1, keepdim=True)
    if norm != "none":
        x = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        x = x * weight.to(dtype)
    if bias is not None:
        x = x + bias.to(dtype)
    total = w.new_zeros(n_segments).index_add(0, segment, w)
    share = torch.where(total == 0, 0.0, 1 / total)[segment] * w  # [T]
    pooled = x.new_zeros(n_segments, x.shape[1]).index_add(0, segment, torch.where(w == 0, 0.0, share)[:, None] * x)
    return torch.nn.functional.normalize(pooled, dim=-1, eps=L2_EPS) if normalize else pooled


def pool_normalize(
    h: Tensor,
    cu_seqlens: Tensor,
    *,
    mode: Mode = "mean",
    norm: Norm = "none",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    token_weights: Tensor | None = None,
    normalize: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """Pool the rows of each segment of `h`, after an optional final norm, to one L2-normalised row.

    h [T, D], cu_seqlens [B + 1] int32 -> [B, D] float32 (float64 stays float64).
    norm: "none", "rms" or "layer", with `weight` and `bias` [D]. mode: "mean", "last" (the last row) or "weighted",
    sum(w h) / sum(w) with `token_weights` [T]. normalize: divide by the L2 norm. A segment that is empty, or whose
    weights sum to zero, gives a zero row and no gradient. Differentiable in `h` only: the other tensors are constants.
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
    require((mode == "weighted") == (token_weights is not None), "token_weights", 'a tensor exactly with mode="weighted"',
            f"mode={mode!r}, {'None' if token_weights is None else 'a tensor'}")  # fmt: skip
    for name, tensor, size in (
        ("weight", weight, h.shape[1]),
        ("bias", bias, h.shape[1]),
        ("token_weights", token_weights, h.shape[0]),
    ):
        if tensor is not None:
            require_float(name, tensor, 1)
            require(tensor.shape[0] == size, name, f"shape [{size}]", tensor.shape)
            require_same_device(name, tensor, h.device)
            constant = not (tensor.requires_grad and torch.is_grad_enabled())
            require(constant, name, "a tensor that requires no grad (it is a constant here)", "one that does")
    use_triton(impl, h)
    return pool_normalize_ref(
        h, cu_seqlens, mode=mode, norm=norm, weight=weight, bias=bias, eps=eps, token_weights=token_weights,
        normalize=normalize,
    )  # fmt: skip

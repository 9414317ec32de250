"""Expected vocabulary embedding of a soft token: softmax(h E_outᵀ / T) E_in.

Shape legend: M rows, V vocabulary entries, D width of `h` and `e_out`, Din width of `e_in`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pe.kernels._checks import Impl, require, require_float, require_same_device, use_triton


def vocab_mixture_ref(h: Tensor, e_out: Tensor, e_in: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(h e_outᵀ / temperature) e_in in plain torch, at least float32 inside; builds the [M, V] matrix."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    logits = (h.to(dtype) / temperature) @ e_out.to(dtype).T  # [M, V]
    return (logits.softmax(dim=-1) @ e_in.to(dtype)).to(h.dtype)


def vocab_mixture(
    h: Tensor, e_out: Tensor, e_in: Tensor, temperature: float = 1.0, *, impl: Impl = "auto"
) -> Tensor:
    """Mix the rows of `e_in` with the probabilities softmax(h e_outᵀ / temperature).

    h [M, D], e_out [V, D], e_in [V, Din], one floating dtype -> [M, Din] in that dtype. Differentiable in all three.
    Raises ValueError on shapes, dtypes or devices that do not fit and on a temperature that is not positive.
    """
    require_float("h", h, 2)
    require_float("e_out", e_out, 2)
    require_float("e_in", e_in, 2)
    require(e_out.shape[1] == h.shape[1], "e_out", f"shape [V, {h.shape[1]}]", e_out.shape)
    require(e_out.shape[0] >= 1, "e_out", "at least one vocabulary entry", e_out.shape)
    require(e_in.shape[0] == e_out.shape[0], "e_in", f"shape [{e_out.shape[0]}, Din]", e_in.shape)
    require(e_out.dtype == h.dtype, "e_out", f"h's dtype {h.dtype}", e_out.dtype)
    require(e_in.dtype == h.dtype, "e_in", f"h's dtype {h.dtype}", e_in.dtype)
    require_same_device("e_out", e_out, h.device)
    require_same_device("e_in", e_in, h.device)
    require(temperature > 0, "temperature", "a number > 0", temperature)
    use_triton(impl, h)
    return vocab_mixture_ref(h, e_out, e_in, temperature)

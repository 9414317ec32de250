"""Input rows of a packed batch: frozen token rows and aligned soft-prompt rows, placed by `ids` alone.

Row t is embedding[ids[t]] * scale where ids[t] >= 0, else (prompts.view(N·K, Dp) @ weight)[-1 - ids[t]].
Shape legend: T packed rows, V vocabulary, De the backbone's width, N prompts of K soft tokens of width Dp.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pe.kernels._checks import Impl, require, require_float, require_range, require_same_device, use_triton


def prompt_rows_ref(ids: Tensor, embedding: Tensor, prompts: Tensor, weight: Tensor | None, *, scale: float) -> Tensor:
    """Plain torch: every soft row is aligned once, however many texts use it, then rows are gathered by `ids`."""
    soft = prompts.reshape(-1, prompts.shape[2])  # [N·K, Dp]
    if weight is not None:
        dtype = torch.promote_types(torch.promote_types(soft.dtype, weight.dtype), torch.float32)
        soft = soft.to(dtype) @ weight.to(dtype)
    soft = F.pad(soft.to(embedding.dtype), (0, 0, 0, 1))  # a zero row for the text positions to point to
    text = embedding.detach()[ids.clamp(min=0)]
    if scale != 1.0:
        text = (text.to(torch.promote_types(text.dtype, torch.float32)) * scale).to(text.dtype)
    is_soft = ids < 0
    return torch.where(is_soft[:, None], soft[torch.where(is_soft, -1 - ids, soft.shape[0] - 1)], text)


def prompt_rows(
    ids: Tensor,
    embedding: Tensor,
    prompts: Tensor,
    weight: Tensor | None,
    *,
    scale: float = 1.0,
    impl: Impl = "auto",
) -> Tensor:
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
    use_triton(impl, embedding)
    return prompt_rows_ref(ids, embedding, prompts, weight, scale=scale)

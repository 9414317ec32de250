"""Causal attention over a sequence's own packed tokens plus a context of keys and values that is never concatenated.

o = softmax(cap(q [K_context; K]ᵀ · scale) + mask) [V_context; V], one extra logit a head where sinks are given.
Shape legend: T packed tokens, B sequences, C packed context tokens, N segments, H query heads, Hkv key/value heads,
G = H / Hkv, D key width, Dv value width, Lq longest sequence, Lc longest context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pe.kernels._checks import (
    Impl,
    require,
    require_float,
    require_longest,
    require_offsets,
    require_range,
    require_same_device,
    use_triton,
    values_are_free,
)

BY_SEQUENCE_FROM = 1 << 16  # padded key and value elements a sequence, from which the torch path on CPUs goes by sequence


def context_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    cu_context: Tensor | None = None,
    context_index: Tensor | None = None,
    max_context: int = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Plain torch on a padded [B, Lq] x [B, Lc + Lq] problem: one masked softmax, no host sync."""
    (T, H, D), Hkv, B = q.shape, k.shape[1], cu_seqlens.shape[0] - 1
    if T == 0:
        return q.new_zeros(0, H, v.shape[2]) + 0 * (q.sum() + k.sum() + v.sum())
    scale = D**-0.5 if scale is None else scale
    i = torch.arange(max_seqlen, device=q.device)
    begin, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    own = torch.minimum(begin + i, end - 1).clamp(min=0)  # [B, Lq], past the end the sequence's last token again
    keys, values = [k[own].transpose(1, 2)], [v[own].transpose(1, 2)]  # [B, Hkv, Lq, D]
    visible, position = (i <= i[:, None]).expand(B, -1, -1), i.expand(B, -1)
    key_position = position
    if context_k is not None and context_v is not None and cu_context is not None and max_context > 0:
        segment = torch.arange(B, device=q.device) if context_index is None else context_index
        begin, end = cu_context[:-1][segment, None], cu_context[1:][segment, None]
        c = torch.arange(max_context, device=q.device)
        context = torch.minimum(begin + c, end - 1).clamp(min=0)  # [B, Lc]
        keys.insert(0, context_k[context].transpose(1, 2))
        values.insert(0, context_v[context].transpose(1, 2))
        visible = torch.cat([(c < end - begin)[:, None, :].expand(-1, max_seqlen, -1), visible], dim=2)
        position = position + (end - begin)
        key_position = torch.cat([c.expand(B, -1), position], dim=1)
    if window is not None:
        visible = visible & (position[:, :, None] - key_position[:, None, :] < window)
    q_pad = q[own].unflatten(2, (Hkv, H // Hkv)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, Lq, D]
    out = _attend(q_pad, keys, values, visible[:, None, None], scale, softcap, sinks)
    out = out.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, Lq, H, Dv]
    sequence = torch.searchsorted(cu_seqlens[1:], torch.arange(T, device=q.device), right=True)
    return out[sequence, torch.arange(T, device=q.device) - cu_seqlens[sequence]].to(q.dtype)


def _attend(
    q: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    visible: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """q [..., Hkv, G, Lq, D] on key and value parts [..., Hkv, L, D]: the parts' scores are joined, they are not.

    visible is broadcast to [..., Hkv, G, Lq, sum of L]; -> [..., Hkv, G, Lq, Dv], at least float32.
    """
    dtype, group = torch.promote_types(q.dtype, torch.float32), q.shape[-3:-1]
    rows = (q.to(dtype) * scale).flatten(-3, -2)  # [..., Hkv, G·Lq, D]
    scores = torch.cat([rows @ part.to(dtype).transpose(-2, -1) for part in keys], dim=-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(-2, group).masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype).view(*q.shape[-4:-2], 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    p = scores.softmax(dim=-1).flatten(-3, -2)
    first, out = 0, rows.new_zeros(())
    for part in values:
        out = out + p[..., first : first + part.shape[-2]] @ part.to(dtype)
        first += part.shape[-2]
    return out.unflatten(-2, group)


def _by_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    context: tuple[Tensor, Tensor, Tensor] | None,
    context_index: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The reference one sequence after another on views: nothing is gathered, padded or saved twice.

    Reads the lengths on the host, so it is for CPUs; there it is 3-8 times faster than the padded form once a padded
    context no longer fits the cache.
    """
    Hkv, lengths = k.shape[1], cu_seqlens.diff().tolist()
    segments = range(len(lengths)) if context_index is None else context_index.tolist()
    context_parts = [part.split(context[2].diff().tolist()) for part in context[:2]] if context is not None else None
    out = []
    for n, segment, q_own, k_own, v_own in zip(lengths, segments, q.split(lengths), k.split(lengths), v.split(lengths)):
        if n == 0:
            continue
        keys, values, n_context = [k_own.transpose(0, 1)], [v_own.transpose(0, 1)], 0
        if context_parts is not None:
            keys.insert(0, context_parts[0][segment].transpose(0, 1))
            values.insert(0, context_parts[1][segment].transpose(0, 1))
            n_context = keys[0].shape[1]
        distance = torch.arange(n_context, n_context + n)[:, None] - torch.arange(n_context + n)
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        rows = q_own.unflatten(1, (Hkv, -1)).permute(1, 2, 0, 3)  # [Hkv, G, Lq, D]
        out.append(_attend(rows, keys, values, visible, scale, softcap, sinks).permute(2, 0, 1, 3).flatten(1, 2))
    return torch.cat(out).to(q.dtype)


def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    cu_context: Tensor | None = None,
    context_index: Tensor | None = None,
    max_context: int = 0,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of packed sequences over their own earlier tokens and a context segment each.

    q [T, H, D], k [T, Hkv, D], v [T, Hkv, Dv], cu_seqlens [B + 1] int32 -> [T, H, Dv] in q's dtype.
    context_k [C, Hkv, D], context_v [C, Hkv, Dv], cu_context [N + 1] int32; context_index [B] the segment of each
    sequence (one may serve many), None for segment b of sequence b (then N == B). max_seqlen and max_context bound
    the lengths. Token i of sequence b stands at position len(context b) + i and sees its whole context and its own
    tokens up to i; with `window` only keys less than `window` positions back. Query head h reads key/value head
    h // (H / Hkv). scale: default D ** -0.5. softcap: s tanh(score / s) before masking. sinks [H]: one more logit a
    head in the denominator. Differentiable in q, k, v, context_k, context_v and sinks; what requires no grad costs none.
    Raises ValueError on shapes, dtypes or devices that do not fit, and (CPU) on offsets or indices out of range.
    """
    require_float("q", q, 3)
    require_float("k", k, 3)
    require_float("v", v, 3)
    (T, H, D), Hkv, B = q.shape, k.shape[1], cu_seqlens.shape[0] - 1
    require(k.shape[0] == T and k.shape[2] == D, "k", f"shape [{T}, Hkv, {D}]", k.shape)
    require(v.shape[0] == T and v.shape[1] == Hkv, "v", f"shape [{T}, {Hkv}, Dv]", v.shape)
    require(Hkv >= 1 and H % Hkv == 0, "k", f"a number of heads that divides q's {H}", k.shape)
    require_offsets("cu_seqlens", cu_seqlens, T)
    require_longest("max_seqlen", max_seqlen, cu_seqlens)
    given = (context_k is not None, context_v is not None, cu_context is not None)
    require(len(set(given)) == 1, "context_k, context_v, cu_context", "all three or none", given)
    if context_k is not None and context_v is not None and cu_context is not None:
        C = context_k.shape[0]
        expected_k, expected_v = (C, Hkv, D), (C, Hkv, v.shape[2])
        require(tuple(context_k.shape) == expected_k, "context_k", f"shape [C, {Hkv}, {D}]", context_k.shape)
        require(tuple(context_v.shape) == expected_v, "context_v", f"shape {expected_v}", context_v.shape)
        require_offsets("cu_context", cu_context, C)
        require_longest("max_context", max_context, cu_context)
        n_segments = cu_context.shape[0] - 1
        if context_index is None:
            require(n_segments == B, "cu_context", f"shape [{B + 1}] without a context_index", cu_context.shape)
        else:
            require(context_index.dim() == 1 and context_index.shape[0] == B, "context_index", f"shape [{B}]",
                    context_index.shape)  # fmt: skip
            is_integer = context_index.dtype in (torch.int32, torch.int64)
            require(is_integer, "context_index", "int32 or int64", context_index.dtype)
            require_range("context_index", context_index, 0, n_segments)
    else:
        require(context_index is None, "context_index", "None without a context", "a tensor")
    if sinks is not None:
        require_float("sinks", sinks, 1)
        require(sinks.shape[0] == H, "sinks", f"shape [{H}]", sinks.shape)
    for name, tensor in (("k", k), ("v", v), ("context_k", context_k), ("context_v", context_v)):
        if tensor is not None:
            require(tensor.dtype == q.dtype, name, f"q's dtype {q.dtype}", tensor.dtype)
    for name, tensor in (("k", k), ("v", v), ("cu_seqlens", cu_seqlens), ("context_k", context_k),
                         ("context_v", context_v), ("cu_context", cu_context), ("context_index", context_index),
                         ("sinks", sinks)):  # fmt: skip
        if tensor is not None:
            require_same_device(name, tensor, q.device)
    require(window is None or window >= 1, "window", "None or an int >= 1", window)
    require(softcap is None or softcap > 0, "softcap", "None or a number > 0", softcap)
    use_triton(impl, q)
    if T > 0 and values_are_free(q) and (max_seqlen + max_context) * Hkv * (D + v.shape[2]) > BY_SEQUENCE_FROM:
        context = None
        if context_k is not None and context_v is not None and cu_context is not None:
            context = (context_k, context_v, cu_context)
        scale = D**-0.5 if scale is None else scale
        return _by_sequence(q, k, v, cu_seqlens, context, context_index, scale, window, softcap, sinks)
    return context_attention_ref(
        q, k, v, cu_seqlens, max_seqlen=max_seqlen, context_k=context_k, context_v=context_v, cu_context=cu_context,
        context_index=context_index, max_context=max_context, scale=scale, window=window, softcap=softcap, sinks=sinks,
    )  # fmt: skip

"""`context_attention` in plain torch: the padded reference, and sequence by sequence for CPUs, without padding.

The letters of shapes are those of `context_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pe.kernels._checks import values_are_free

BY_SEQUENCE_FROM = 1 << 16  # padded key and value elements a sequence from which CPUs go sequence by sequence
SCORES_AT_ONCE = 1 << 20  # of segments that a CPU puts together; from 2^17 to 2^23 all measured alike


def context_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, max_seqlen: int,
    context_k: Tensor | None = None, context_v: Tensor | None = None, cu_context: Tensor | None = None,
    context_index: Tensor | None = None, max_context: int = 0,
    scale: float | None = None, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Plain torch on a padded [B, Lq] x [B, Lc + Lq] problem: one masked softmax, no host sync."""
    (T, H, D), Hkv, B = q.shape, k.shape[1], cu_seqlens.shape[0] - 1
    if T == 0:
        related = [x[:0].sum() for x in (q, k, v, context_k, context_v, sinks) if x is not None]
        return q.new_zeros(0, H, v.shape[2]) + sum(related)
    scale = D**-0.5 if scale is None else scale
    i = torch.arange(max_seqlen, device=q.device)
    begin, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    own = torch.minimum(begin + i, end - 1).clamp(min=0)  # [B, Lq], past the end the sequence's last token again
    keys, values = [_padded_heads(k, own)], [_padded_heads(v, own)]  # [B, Hkv, Lq, D]
    visible, position = (i <= i[:, None]).expand(B, -1, -1), i.expand(B, -1)
    key_position = position
    if context_k is not None and context_v is not None and cu_context is not None and context_k.shape[0] > 0:
        segment = torch.arange(B, device=q.device) if context_index is None else context_index
        begin, end = cu_context[:-1][segment, None], cu_context[1:][segment, None]
        c = torch.arange(max_context, device=q.device)
        context = torch.minimum(begin + c, end - 1).clamp(min=0)  # [B, Lc]
        dtype = torch.promote_types(q.dtype, torch.float32)  # gradients of a shared segment add up in it
        keys.insert(0, _padded_heads(context_k.to(dtype), context))
        values.insert(0, _padded_heads(context_v.to(dtype), context))
        visible = torch.cat([(c < end - begin)[:, None, :].expand(-1, max_seqlen, -1), visible], dim=2)
        position = position + (end - begin)
        key_position = torch.cat([c.expand(B, -1), position], dim=1)
    if window is not None:
        visible = visible & (position[:, :, None] - key_position[:, None, :] < window)
    q_pad = _padded(q, own).unflatten(2, (Hkv, H // Hkv)).permute(0, 2, 3, 1, 4)  # [B, Hkv, G, Lq, D]
    out = _attend_ref(q_pad, keys, values, visible[:, None, None], scale, softcap, sinks)
    out = out.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, Lq, H, Dv]
    sequence = torch.searchsorted(cu_seqlens[1:], torch.arange(T, device=q.device), right=True)
    return out[sequence, torch.arange(T, device=q.device) - cu_seqlens[sequence]].to(q.dtype)


def _padded(rows: Tensor, index: Tensor) -> Tensor:
    """rows [T, ...] at index [B, ...] -> [B, ..., ...]; whole rows are copied, twice as fast as by `rows[index]`."""
    return rows.index_select(0, index.flatten()).unflatten(0, index.shape)


def _padded_heads(rows: Tensor, index: Tensor) -> Tensor:
    """rows [T, H, D] at index [B, L] -> [B, H, L, D], contiguous: a product would copy a transposed one again."""
    heads = rows.shape[1]
    place = index[:, None] * heads + torch.arange(heads, device=rows.device)[:, None]  # [B, H, L]
    return _padded(rows.flatten(0, 1), place)


def _attend_ref(
    q: Tensor, keys: list[Tensor], values: list[Tensor], visible: Tensor, scale: float, softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """q [..., U, Hkv, G, Lq, D] on key and value parts [..., U, Hkv, L, D]: the parts' scores are joined, they are not.

    A part [..., Hkv, L, D] is shared by all U, not copied. visible is broadcast to [..., U, Hkv, G, Lq, sum of L];
    -> [..., U, Hkv, G, Lq, Dv], at least float32.
    """
    dtype, group = torch.promote_types(q.dtype, torch.float32), q.shape[-3:-1]
    rows = (q.to(dtype) * scale).flatten(-3, -2)  # [..., Hkv, G·Lq, D]
    scores = torch.cat([_product(rows, part.to(dtype).transpose(-2, -1)) for part in keys], dim=-1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.unflatten(-2, group).masked_fill(~visible, -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype).view(*q.shape[-4:-2], 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    p = scores.softmax(dim=-1).flatten(-3, -2)
    first, out = 0, rows.new_zeros(())
    for part in values:
        out = out + _product(p[..., first : first + part.shape[-2]], part.to(dtype))
        first += part.shape[-2]
    return out.unflatten(-2, group)


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows [..., U, Hkv, R, X] times a matrix [..., U, Hkv, X, Y], or times one [..., Hkv, X, Y] that all U share."""
    if rows.dim() == matrix.dim():
        return rows @ matrix
    return (rows.transpose(-4, -3).flatten(-3, -2) @ matrix).unflatten(-2, (rows.shape[-4], -1)).transpose(-4, -3)


def _by_sequence(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
    context_k: Tensor | None, context_v: Tensor | None, cu_context: Tensor | None, context_index: Tensor | None,
    scale: float, window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """The reference without padding: S segments of one length, each with U sequences of one length, at a time.

    A sequence shares its segment, which is then read once for all, if it has fewer tokens; else it stands alone, where
    it can behind a copy of its segment (`_behind_copies`). With gradient S is 1, a view: backward would keep a copy of
    several. Reads the lengths on the host, so it is for CPUs, where it is several times faster than the padded form
    once the padded contexts no longer fit the cache.
    """
    H, Hkv, lengths = q.shape[1], k.shape[1], cu_seqlens.diff().tolist()
    is_plain = window is None and softcap is None and sinks is None
    index = range(len(lengths)) if context_index is None else context_index.tolist()
    context_lengths, context_parts = [0] * len(lengths), None
    if context_k is not None and context_v is not None and cu_context is not None:
        dtype = torch.promote_types(q.dtype, torch.float32)  # gradients of a shared segment add up in it
        context_lengths = cu_context.diff().tolist()
        whole = (part[: sum(context_lengths)].to(dtype) for part in (context_k, context_v))
        context_parts = [part.split(context_lengths) for part in whole]
    users: dict[tuple[int, int, int], list[int]] = {}
    copied: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for b, (n, segment) in enumerate(zip(lengths, index, strict=True)):
        is_longer = n >= context_lengths[segment]
        if n > 0 and is_longer and is_plain:
            copied.setdefault((n, context_lengths[segment]), []).append((segment, b))
        elif n > 0:
            users.setdefault((n, segment, b if is_longer else -1), []).append(b)
    alike: dict[tuple[int, int, int, int], list[tuple[int, list[int]]]] = {}
    for (n, segment, alone), members in users.items():
        alike.setdefault((n, context_lengths[segment], len(members), alone), []).append((segment, members))
    own, out = [part.split(lengths) for part in (q, k, v)], dict[int, Tensor]()
    for pairs in copied.values():
        behind, places = zip(*pairs, strict=True)
        rows, *own_kv = (_stacked(part, places) for part in own)
        context_kv = [_stacked(part, behind).to(q.dtype) for part in context_parts or ()]
        out.update(zip(places, _behind_copies(rows, own_kv, context_kv, scale), strict=True))
    tensors = (q, k, v, context_k, context_v, sinks)
    keeps = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    for (n, n_context, count, _), groups in alike.items():
        at_once = 1 if keeps else max(1, SCORES_AT_ONCE // (count * H * n * (n_context + n)))
        for first in range(0, len(groups), at_once):
            segments, sharing = zip(*groups[first : first + at_once], strict=True)
            members = [b for several in sharing for b in several]
            rows, *own_kv = (_stacked(part, members).unflatten(0, (-1, count)) for part in own)  # [S, U, n, heads, D]
            keys, values = ([part.transpose(2, 3)] for part in own_kv)
            if context_parts is not None:
                keys.insert(0, _stacked(context_parts[0], segments).transpose(1, 2))  # [S, Hkv, L, D]
                values.insert(0, _stacked(context_parts[1], segments).transpose(1, 2))
            distance = torch.arange(n_context, n_context + n)[:, None] - torch.arange(n_context + n)
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            rows = rows.unflatten(3, (Hkv, -1)).permute(0, 1, 3, 4, 2, 5)  # [S, U, Hkv, G, n, D]
            attended = _attend_ref(rows, keys, values, visible, scale, softcap, sinks)
            attended = attended.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(0, 1)  # [S·U, n, H, Dv]
            out.update(zip(members, attended.to(q.dtype), strict=True))
    return torch.cat([out[b] for b in sorted(out)])


def _behind_copies(rows: Tensor, own: Sequence[Tensor], context: Sequence[Tensor], scale: float) -> Tensor:
    """torch's causal attention, which keeps no scores, over a copy of the context and what follows.

    rows [S, n, H, D], own keys and values [S, n, Hkv, D], those of a context [S, L, Hkv, D] or none -> [S, n, H, Dv].
    The context asks nothing: zeros stand for its queries.
    """
    n = rows.shape[1]
    both = [torch.cat([x, y], dim=1) for x, y in zip(context, own, strict=True)] if context else own
    q, k, v = (x.transpose(1, 2) for x in (rows, *both))
    q = F.pad(q, (0, 0, k.shape[2] - n, 0))
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return attended[:, :, -n:].transpose(1, 2)


def _stacked(parts: Sequence[Tensor], places: Sequence[int]) -> Tensor:
    return torch.stack([parts[i] for i in places]) if len(places) > 1 else parts[places[0]][None]


def context_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, max_seqlen: int,
    context_k: Tensor | None, context_v: Tensor | None, cu_context: Tensor | None, context_index: Tensor | None,
    max_context: int, scale: float | None, window: int | None, softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """The faster of both on checked arguments: by sequence on a CPU with much to pad or contexts that several share."""
    (T, _, D), (_, Hkv, Dv), B = q.shape, v.shape, cu_seqlens.shape[0] - 1
    is_large = (max_seqlen + max_context) * Hkv * (D + Dv) > BY_SEQUENCE_FROM
    is_shared = cu_context is not None and 2 * (cu_context.shape[0] - 1) < B
    scale = D**-0.5 if scale is None else scale
    if T > 0 and values_are_free(q) and (is_large or is_shared):
        context = context_k, context_v, cu_context, context_index
        return _by_sequence(q, k, v, cu_seqlens, *context, scale, window, softcap, sinks)
    return context_attention_ref(
        q, k, v, cu_seqlens, max_seqlen=max_seqlen, context_k=context_k, context_v=context_v, cu_context=cu_context,
        context_index=context_index, max_context=max_context, scale=scale, window=window, softcap=softcap, sinks=sinks,
    )  # fmt: skip

"""Attention of a packed row, registered with transformers so that any decoder runs on it unforked.

The model hands queries, keys and values of one row `[1, H, T, D]` to `packed_attention`, together with the
`AttentionPlan` that travels through the model's keyword arguments. The plan says where the texts begin, which stored
keys and values they see before their own tokens, and whether this pass's keys and values are kept.

Legend: H heads, G key/value heads, T tokens of the row, D head size, B texts, L tokens of a text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from pe.kernels.context_attention import context_attention
from pe.method.flash import flash_attention
from pe.method.packing import DeviceSegments, Segments

NAME = "pe_packed"
PROBE = "pe_mask_probe"


@dataclass(frozen=True)
class KeyValues:
    """Keys and values `[T, G, D]` of the texts of a packed row in each layer, and what was asked of their states.

    Attributes:
        layers: those of layer `first` and all above it.
        pooled: what the text pass was asked to make of the texts' states before the last layer, such as a mean each.
    """

    layers: list[tuple[Tensor, Tensor]]
    segments: Segments | DeviceSegments
    pooled: Tensor | None = None
    first: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each text, of segments that the host knows."""
        assert isinstance(self.segments, Segments)
        return self.segments.lengths


class LastLayerReached(Exception):
    """The last layer's keys and values are stored; nothing behind them is needed."""


@dataclass
class AttentionPlan:
    """What the attention of one pass over a packed row needs to know.

    Attributes:
        segments: the texts of the row.
        context: keys and values that stand before the texts, or None.
        context_index: for each text the segment of `context` it sees, `[B]`; None: text b sees segment b.
        keep: whether the pass stores its own keys and values in `stored`.
        first: the lowest layer whose keys and values are stored.
        filler: tokens at the end of the row whose keys and values are not stored.
        stop_after: layer whose stored keys end the pass by LastLayerReached; None: run to the end.
    """

    segments: Segments
    context: KeyValues | None = None
    context_index: Tensor | None = None
    keep: bool = False
    first: int = 0
    filler: int = 0
    stop_after: int | None = None
    stored: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        if self.keep and layer >= self.first:
            own = self.segments.total - self.filler
            self.stored[layer] = (compact(k[:own]), compact(v[:own]))
        if layer == self.stop_after:
            raise LastLayerReached


def compact(x: Tensor) -> Tensor:
    """Copy `x`, where it needs no gradient, out of a larger buffer such as a fused projection's output."""
    is_part = x.untyped_storage().nbytes() > x.numel() * x.element_size()
    return x.clone() if is_part and not x.requires_grad else x


def causal_attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None) -> Tensor:
    """Plain causal attention inside each text: q `[T, H, D]`, k, v `[T, G, D]` -> `[T, H, D]`.

    Half-precision CUDA rows go through variable-length flash attention (see `pe.method.flash`); elsewhere neighbouring
    texts of equal length share one scaled_dot_product_attention, so a row sorted by length costs few calls and no
    padding. With gradient these are in float32: torch's backward on a CPU is several times slower in half types.
    """
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        cu, longest = segments.cu_seqlens, segments.longest
        return flash_attention(q, k, v, cu, cu, longest, longest, scale=scale)
    trains = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    sizes = [count * length for _, count, length in segments.runs]
    parts = (x.to(torch.promote_types(x.dtype, torch.float32) if trains else x.dtype).split(sizes) for x in (q, k, v))
    outputs = []
    for (_, count, length), *rows in zip(segments.runs, *parts, strict=True):
        qh, kh, vh = (x.unflatten(0, (count, length)).transpose(1, 2) for x in rows)
        attended = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(attended.transpose(1, 2).flatten(0, 1))
    return (torch.cat(outputs) if len(outputs) != 1 else outputs[0]).to(v.dtype)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface: `[1, H, T, D]` in, `[1, T, H, D]` out."""
    dtype = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else value.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    layer, segments, context = int(module.layer_idx), plan.segments, plan.context  # type: ignore[arg-type]
    plan.store(layer, k, v)
    before = context.segments.longest if context else 0
    window = sliding_window if sliding_window is not None and sliding_window < before + segments.longest else None
    if context is None and window is None and softcap is None and s_aux is None:
        return causal_attention(q, k, v, segments, scaling)[None], None
    context_k, context_v = context.layers[layer - context.first] if context else (None, None)
    attended = context_attention(
        q,
        k,
        v,
        segments.cu_seqlens,
        max_seqlen=segments.longest,
        context_k=context_k,
        context_v=context_v,
        cu_context=context.segments.cu_seqlens if context else None,
        context_index=plan.context_index if context else None,
        max_context=before,
        scale=scaling,
        window=window,
        softcap=softcap,
        sinks=s_aux,
    )
    return attended[None], None


def note_mask(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    *,
    seen: dict[int, tuple[object, int | None]],
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """An attention function that only notes each layer's mask rule and the window its attention is told of."""
    seen[int(module.layer_idx)] = (attention_mask, sliding_window)  # type: ignore[arg-type]
    return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous(), None


def mask_rule(*_: object, mask_function: Callable[..., Tensor], **__: object) -> Callable[..., Tensor]:
    """The rule `(batch, head, query, key) -> seen?` itself, in place of the mask that it fills."""
    return mask_function


def is_causal_window(rule: Callable[..., Tensor], window: int | None) -> bool:
    """Whether a mask rule is what `packed_attention` does: causal, within `window`; asked at long distances too."""
    for last in (1, 64, 4_097, 131_071):
        keys = torch.arange(last + 1)
        ours = keys > last - window if window is not None else torch.ones(last + 1, dtype=torch.bool)
        if not torch.equal(rule(torch.tensor(0), torch.tensor(0), torch.tensor(last), keys).expand_as(ours), ours):
            return False
    return True


def register() -> None:
    """Make the attention functions known to transformers.

    `pe_packed` has no mask function on purpose: the plan carries the mask, nothing is padded, and transformers then
    neither builds a mask nor searches the positions for packed texts, which would wait for the device.
    """
    AttentionInterface.register(NAME, packed_attention)
    AttentionInterface.register(PROBE, note_mask)
    AttentionMaskInterface.register(PROBE, mask_rule)


def joined(parts: Sequence[KeyValues]) -> KeyValues:
    """Keys and values of neighbouring parts as those of one row."""
    if len(parts) == 1:
        return parts[0]
    layers = [
        (torch.cat([k for k, _ in pairs]), torch.cat([v for _, v in pairs]))
        for pairs in zip(*(part.layers for part in parts), strict=True)
    ]
    lengths = tuple(length for part in parts for length in part.lengths)
    pooled = [part.pooled for part in parts if part.pooled is not None]
    segments = Segments(lengths, layers[0][0].device)
    return KeyValues(layers, segments, torch.cat(pooled) if pooled else None, parts[0].first)


def keep_all(plan: AttentionPlan, count: int) -> KeyValues:
    """The stored keys and values in layer order, of a decoder of `count` layers."""
    return KeyValues([plan.stored[layer] for layer in range(plan.first, count)], plan.segments, first=plan.first)

"""A bound on how long training makes the states of soft tokens.

Decoders make the states of a few tokens, such as the first, many times as long as all others, nearly all of it in one
coordinate, for attention to rest on (*massive activations*, arXiv 2402.17762). Training drives soft tokens there, too:
their mean then says little of the text, and gradients behind such a state are too steep and noisy to lead back.

Legend: D hidden size, L layers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pe.method.attention import AttentionPlan
from pe.method.backbone import Backbone

TEXTS, LENGTH, AT_ONCE = 64, 16, 4
"""Texts of rows of the vocabulary, evenly spaced, that say how long states usually are; read few at a time, which takes
little memory."""


class NormBound:
    """Bounds the states of soft tokens behind a text, in every layer of a backbone that they run but the last, until
    `close`.

    A state longer than `factor` times what is usual in its layer gets no gradient by which a step would lengthen it.
    What the passes give stays the same, and so do passes without gradient.
    """

    def __init__(self, backbone: Backbone, factor: float) -> None:
        """Read some tokens, and bound from now on.

        Raises:
            ValueError: the layers do not stand in one list.
        """
        layers = backbone.layers()[backbone.entry_layer : -1]
        limits = factor * usual_norms(backbone)[backbone.entry_layer :]
        self._handles = [
            layer.register_forward_hook(_Bounded(limit), with_kwargs=True)
            for layer, limit in zip(layers, limits, strict=True)
        ]

    def close(self) -> None:
        """Bound nothing any more."""
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def usual_norms(backbone: Backbone) -> Tensor:
    """Median norm `[L - 1]` float32 of the states that leave each layer but the last, of tokens from all of the
    vocabulary.
    """
    layers = backbone.layers()[:-1]
    norms: list[list[Tensor]] = [[] for _ in layers]

    def note(place: int, _: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        norms[place].append(states_of(output).float().norm(dim=-1).flatten())

    count, last = TEXTS * LENGTH, len(backbone.embedding) - 1
    ids = [place * last // (count - 1) for place in range(count)]
    texts = [ids[first : first + LENGTH] for first in range(0, count, LENGTH)]
    handles = [layer.register_forward_hook(functools.partial(note, place)) for place, layer in enumerate(layers)]
    try:
        for first in range(0, TEXTS, AT_ONCE):
            backbone.text_pass(texts[first : first + AT_ONCE])
    finally:
        for handle in handles:
            handle.remove()
    medians = [torch.cat(found).median() for found in norms]
    return torch.stack(medians) if medians else torch.empty(0, device=backbone.device)


def states_of(output: Tensor | Sequence[Any]) -> Tensor:
    """The states of what a layer returns."""
    return output if isinstance(output, Tensor) else output[0]


class _Bounded:
    """A layer's hook."""

    def __init__(self, limit: Tensor) -> None:
        self.limit = limit

    def __call__(self, _: nn.Module, __: object, options: dict[str, Any], output: Any) -> Any:
        plan: AttentionPlan | None = options.get("plan")
        if plan is None or plan.context is None or not torch.is_grad_enabled():
            return output
        bounded = BoundedNorm.apply(states_of(output), self.limit)
        return bounded if isinstance(output, Tensor) else (bounded, *output[1:])


class BoundedNorm(torch.autograd.Function):
    """The identity on states `[..., D]`, whose gradient g does not lengthen those above a limit.

    Of a state h with |h| > limit and g·h < 0, g loses what lies along h: g - h (g·h) / |h|².
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, limit: Tensor) -> Tensor:
        ctx.save_for_backward(states, limit)
        return states.view_as(states)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        states, limit = ctx.saved_tensors
        h, g = states.float(), upstream.float()
        square, along = (h * h).sum(-1, keepdim=True), (g * h).sum(-1, keepdim=True)
        is_lengthened = (square > limit * limit) & (along < 0)
        share = torch.where(is_lengthened, along / square.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        return torch.addcmul(g, share, h, value=-1).to(upstream.dtype), None

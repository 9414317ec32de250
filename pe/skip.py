"""A way around the soft prompt: what the frozen text pass knows of a text, added to its embedding.

e' = normalise(e + normalise(m M)), where e is the soft tokens' embedding and m a mean of the text's standardised
states x̂ before the backbone's last layer, all alike or weighted by exp(x̂·q). The text pass has the states for nothing
and without running its last layer, so a step costs one D x D matrix more.

Legend: B texts, T tokens of a packed row, D the backbone's width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe.config import Skip
from pe.kernels.pool_normalize import pool_normalize
from pe.packing import Segments
from pe.token_weights import STATES_EPS, TokenWeights, standardize


def mean_states(states: Tensor, segments: Segments) -> Tensor:
    """Unit vectors `[B, D]` float32: the mean of each text's standardised states `[T, D]`."""
    return pool_normalize(states, segments.cu_seqlens, norm="rms", eps=STATES_EPS)


def unpooled(states: Tensor, segments: Segments) -> Tensor:
    """The states `[T, D]` themselves, for a pass whose means are taken later."""
    return states


class LinearSkip(nn.Module):
    """M `[D, D]` float32, the identity at the start, behind the plain mean."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width, device=device))

    def pool(self, states: Tensor, segments: Segments) -> Tensor:
        """Unit vectors `[B, D]` float32 of the texts' states `[T, D]` before the last layer."""
        return mean_states(states, segments)

    def forward(self, pooled: Tensor) -> Tensor:
        """Unit vectors `[B, D]` float32 of what `pool` gave."""
        return F.normalize((pooled.to(self.weight.dtype) @ self.weight).float(), dim=-1)


class WeightedSkip(LinearSkip):
    """The same behind a mean in which each token has a weight of its own, learned; at the start all have the same."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.tokens = TokenWeights(width, device)

    def pool(self, states: Tensor, segments: Segments) -> Tensor:
        """As in `LinearSkip`, with gradient to the weights; the states are kept for it."""
        states = standardize(states)
        return pool_normalize(states, segments.cu_seqlens, mode="weighted", token_weights=self.tokens(states))


def build_skip(kind: Skip, width: int, device: torch.device) -> LinearSkip | None:
    """A fresh one, or None."""
    if kind == "none":
        return None
    return (WeightedSkip if kind == "weighted" else LinearSkip)(width, device)


def with_skip(embeddings: Tensor, skipped: Tensor | None) -> Tensor:
    """Add what the skip makes of the texts to their embeddings: unit vectors `[B, D]`; None: no skip."""
    return embeddings if skipped is None else F.normalize(embeddings + skipped, dim=-1)

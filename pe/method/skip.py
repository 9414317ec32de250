"""A way around the soft prompt: what the frozen text pass knows of a text, added to its embedding.

e' = normalise(e + normalise(m M)), where e is the soft tokens' embedding and m the mean of the text's standardised
states x̂ before the backbone's last layer, weighted by exp(x̂·q). The text pass has the states for nothing and without
running its last layer, so a step costs one D x D matrix more.

Legend: B texts, T tokens of a packed row, D the backbone's width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe.config import Skip
from pe.kernels.pool_normalize import pool_normalize
from pe.method.packing import Segments
from pe.method.token_weights import STATES_EPS, TokenWeights, standardize


def mean_states(states: Tensor, segments: Segments) -> Tensor:
    """Unit vectors `[B, D]` float32: the mean of each text's standardised states `[T, D]`."""
    return pool_normalize(states, segments.cu_seqlens, norm="rms", eps=STATES_EPS)


def unpooled(states: Tensor, segments: Segments) -> Tensor:
    """The states `[T, D]` themselves, for a pass whose means are taken later."""
    return states


def mapped(means: Tensor, weight: Tensor) -> Tensor:
    """Unit vectors `[B, D]` float32 of means `[B, D]` through a matrix `[D, D]`."""
    return F.normalize((means.to(weight.dtype) @ weight).float(), dim=-1)


class WeightedSkip(nn.Module):
    """M `[D, D]` float32, the identity at first, behind a mean whose weights are learned, all alike at first."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width, device=device))
        self.tokens = TokenWeights(width, device)

    def pool(self, states: Tensor, segments: Segments) -> Tensor:
        """Unit vectors `[B, D]` float32 of the texts' states `[T, D]` before the last layer.

        With gradient to the tokens' weights, for which the states are kept.
        """
        states = standardize(states)
        return pool_normalize(states, segments.cu_seqlens, mode="weighted", token_weights=self.tokens(states))

    def forward(self, pooled: Tensor) -> Tensor:
        """Unit vectors `[B, D]` float32 of what `pool` gave."""
        return mapped(pooled, self.weight)


def build_skip(kind: Skip, width: int, device: torch.device) -> WeightedSkip | None:
    """A fresh one, or None."""
    return None if kind == "none" else WeightedSkip(width, device)


def with_skip(embeddings: Tensor, skipped: Tensor | None) -> Tensor:
    """Add what the skip makes of the texts to their embeddings: unit vectors `[B, D]`; None: no skip."""
    return embeddings if skipped is None else F.normalize(embeddings + skipped, dim=-1)

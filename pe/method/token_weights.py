"""How much each token counts in a text's mean: w = exp(x̂·q), learned.

Legend: T tokens of a packed row, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STATES_EPS = 1e-6
"""Added to a state's mean square before it is divided by its root."""
LIMIT = 30.0
"""Largest exponent: sums of weights and their ratios stay finite in float32."""


def standardize(states: Tensor) -> Tensor:
    """x̂: states `[T, D]`, each divided by its root mean square; in their own type, which autocast would raise."""
    with torch.autocast(states.device.type, enabled=False):
        return F.rms_norm(states, states.shape[-1:], eps=STATES_EPS)


class TokenWeights(nn.Module):
    """q `[D]` float32, zero at the start, where every token has weight 1."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(width, device=device))

    def forward(self, states: Tensor) -> Tensor:
        """Weights `[T]` float32 of standardised states `[T, D]`."""
        return (states @ self.query.to(states.dtype)).float().clamp(-LIMIT, LIMIT).exp()

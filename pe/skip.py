"""A way around the soft prompt: what the frozen text pass knows of a text, added to its embedding.

e' = normalise(e + normalise(m M)), where e is the soft tokens' embedding and m the mean of the text's standardised
states before the backbone's last layer. The text pass leaves m behind without a gradient and without running its last
layer, so a step costs one D x D matrix more.

Legend: B texts, D the backbone's width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearSkip(nn.Module):
    """M `[D, D]` float32, the identity at the start."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(width, device=device))

    def forward(self, means: Tensor) -> Tensor:
        """Unit vectors `[B, D]` float32 of the texts' means `[B, D]`."""
        return F.normalize((means.to(self.weight.dtype) @ self.weight).float(), dim=-1)


def around(embeddings: Tensor, skipped: Tensor | None) -> Tensor:
    """Unit vectors `[B, D]` of embeddings and what goes around the soft prompt; None: nothing does."""
    return embeddings if skipped is None else F.normalize(embeddings + skipped, dim=-1)

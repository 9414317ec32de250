"""What an instruction changes in an embedding: e' = normalise(e ⊙ (1 + G A h)), a factor for each of its dimensions.

h is the prompting LLM's last hidden state as it wrote the first soft token, standardised, less c, at first the mean
over the instructions of training (what these have in common says nothing of what one asks for), and standardised again.
A soft prompt alone moves all embeddings alike; factors turn directions round, so that what is near under one
instruction is far under another. They cost one product a dimension and text.

Legend: B texts, N prompts, H width of the hidden state, D the backbone's width, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe.method.token_weights import standardize


class Lens(nn.Module):
    """A `[R, H]`, random at first, G `[D, R]`, zero at first so that nothing changes, and c `[H]`; float32.

    A low rank carries over to wordings that were never trained on: a full matrix learns its wordings by heart.
    """

    def __init__(self, width: int, hidden: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.reading = nn.Parameter(torch.randn(rank, hidden, device=device) * hidden**-0.5)
        self.factors = nn.Parameter(torch.zeros(width, rank, device=device))
        self.origin = nn.Parameter(torch.zeros(hidden, device=device))

    @torch.no_grad()
    def start_at(self, hidden: Tensor) -> None:
        """Set c to the mean over the hidden states `[N, H]` of some instructions."""
        self.origin.copy_(self._standardized(hidden).mean(0))

    @torch.no_grad()
    def keep_reading(self, other: Lens) -> None:
        """Take over how an instruction is read, which does not depend on the backbone; G stays to be trained."""
        self.reading.copy_(other.reading)
        self.origin.copy_(other.origin)

    def _standardized(self, hidden: Tensor) -> Tensor:
        """`[N, H]` float32, where the weights are."""
        return standardize(hidden.to(self.reading.device, torch.float32))

    def gates(self, hidden: Tensor) -> Tensor:
        """G A h `[N, D]` float32 of the hidden state `[N, H]` that began each prompt."""
        return F.linear(F.linear(standardize(self._standardized(hidden) - self.origin), self.reading), self.factors)

    def forward(self, embeddings: Tensor, gates: Tensor) -> Tensor:
        """Unit vectors `[..., B, D]` float32 of embeddings `[..., B, D]` and the gates `[B, D]` of their prompts."""
        return F.normalize(embeddings * (1 + gates), dim=-1)

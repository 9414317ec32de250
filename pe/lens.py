"""What an instruction changes in an embedding, by its soft prompt: e' = normalise(e + U (g ⊙ V e)), g = G p + b.

p is the mean of the prompt's rows in the backbone's input space, each standardised. A soft prompt alone moves an
embedding little, for all texts alike; through the lens it can turn directions round, so that what is near under one
instruction is far under another. It costs two products of D x R a text, and an embedding under many instructions is
made of one.

Legend: B texts, N prompts, K soft tokens, D the backbone's width, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe.alignment import AlignedPrompts
from pe.token_weights import standardize


class Lens(nn.Module):
    """V `[R, D]`, G `[R, D]` and U `[D, R]`, float32; U is zero at the start, where nothing changes."""

    def __init__(self, width: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, width, device=device) / width**0.5)
        self.gate = nn.Parameter(torch.randn(rank, width, device=device) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(rank, device=device))
        self.up = nn.Parameter(torch.zeros(width, rank, device=device))

    def gates(self, prompts: AlignedPrompts) -> Tensor:
        """g `[N, R]` float32 of each prompt."""
        rows = prompts.prompts if prompts.weight is None else prompts.prompts.to(prompts.weight.dtype) @ prompts.weight
        return F.linear(standardize(rows.float()).mean(1), self.gate, self.bias)

    def forward(self, embeddings: Tensor, gates: Tensor) -> Tensor:
        """Unit vectors `[B, D]` float32 of embeddings `[B, D]` and the gates `[B, R]` of their prompts."""
        turned = (gates * (embeddings @ self.down.T)) @ self.up.T
        return F.normalize(embeddings + turned.float(), dim=-1)

"""What an instruction changes in an embedding: e' = normalise(e + U (g ⊙ V e)), g = G h.

h is the prompting LLM's last hidden state as it wrote the first soft token, standardised, less c, at first the mean
over the instructions of training (what these have in common says nothing of what one asks for), and standardised again.
A soft prompt alone moves all embeddings alike; through the lens an instruction turns directions round, so that what is
near under one is far under another. It costs two products of D x R a text.

Legend: B texts, N prompts, H width of the hidden state, D the backbone's width, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe.method.token_weights import standardize


class Lens(nn.Module):
    """V `[R, D]`, G `[R, H]`, U `[D, R]` and c `[H]`, float32.

    At the start V has orthonormal rows, U is its transpose and G is zero, so nothing changes: a random G, with U zero,
    turns the embeddings of every instruction at random before it learns which directions matter.
    """

    def __init__(self, width: int, hidden: int, rank: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, width, device=device)))
        self.gate = nn.Parameter(torch.zeros(rank, hidden, device=device))
        self.up = nn.Parameter(self.down.detach().T.clone())
        self.origin = nn.Parameter(torch.zeros(hidden, device=device))

    @torch.no_grad()
    def start_at(self, hidden: Tensor) -> None:
        """Set c to the mean over the hidden states `[N, H]` of some instructions."""
        self.origin.copy_(self._standardized(hidden).mean(0))

    @torch.no_grad()
    def keep_gates(self, other: Lens) -> None:
        """Take over what does not depend on the backbone, how an instruction is read; U is zero until it is trained."""
        self.gate.copy_(other.gate)
        self.origin.copy_(other.origin)
        self.up.zero_()

    def _standardized(self, hidden: Tensor) -> Tensor:
        """`[N, H]` float32, where the gates are."""
        return standardize(hidden.to(self.gate.device, torch.float32))

    def gates(self, hidden: Tensor) -> Tensor:
        """g `[N, R]` float32 of the hidden state `[N, H]` that began each prompt."""
        return F.linear(standardize(self._standardized(hidden) - self.origin), self.gate)

    def forward(self, embeddings: Tensor, gates: Tensor) -> Tensor:
        """Unit vectors `[..., B, D]` float32 of embeddings `[..., B, D]` and the gates `[B, R]` of their prompts."""
        turned = (gates * (embeddings @ self.down.T)) @ self.up.T
        return F.normalize(embeddings + turned.float(), dim=-1)

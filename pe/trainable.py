"""What every embedder that trains has in common: its own tensors apart from the frozen ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TrainableModule(nn.Module):
    """A module of frozen and of trained parameters."""

    def trainable_state(self) -> dict[str, Tensor]:
        """Named tensors of everything that trains."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `trainable_state` gave.

        Raises:
            ValueError: other names than this model's.
        """
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if own.keys() != state.keys():
            raise ValueError(
                f"state: expected the {len(own)} trainable tensors of this model, got {len(state)};"
                f" not on both sides: {sorted(own.keys() ^ state.keys())[:5]}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

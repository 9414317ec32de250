"""What every embedder that trains has in common: its mode, and its own tensors apart from the frozen ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Self

import torch
from torch import Tensor, nn

from pe.method.encoder import Encoder
from pe.method.turns import in_turn


class TrainableModule(Encoder, nn.Module):
    """A module of frozen and of trained parameters, which threads may share.

    What changes its mode, type, place or weights waits for calls that run its backbone.
    """

    @in_turn
    def train(self, mode: bool = True) -> Self:
        return super().train(mode)

    @contextlib.contextmanager
    def _at_rest(self) -> Iterator[None]:
        in_training = [module for module in self.modules() if module.training]
        for module in in_training:
            module.training = False
        try:
            yield
        finally:
            for module in in_training:
                module.training = True

    @in_turn
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `float`, `cuda` and their kin do."""
        return super()._apply(fn, recurse)

    def trainable_state(self) -> dict[str, Tensor]:
        """Named tensors of everything that trains."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    @in_turn
    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `trainable_state` gave.

        Raises:
            ValueError: other names or shapes than this model's.
        """
        own = {name: p for name, p in self.named_parameters() if p.requires_grad}
        if own.keys() != state.keys():
            raise ValueError(
                f"state: expected the {len(own)} trainable tensors of this model, got {len(state)};"
                f" not on both sides: {sorted(own.keys() ^ state.keys())[:5]}"
            )
        if other := [name for name, parameter in own.items() if parameter.shape != state[name].shape]:
            raise ValueError(
                f"state: {other[0]}: expected the shape {list(own[other[0]].shape)}, got {list(state[other[0]].shape)}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

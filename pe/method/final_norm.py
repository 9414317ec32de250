"""A decoder's final norm, recognised, so that pooling applies it in its own pass over the states.

Legend: D hidden size.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pe.kernels.pool_normalize import Norm, pool_normalize
from pe.method.rms_norm import eps_of

TOLERANCE = 1e-5  # relative, in float32


class NormOptions(NamedTuple):
    """What `pool_normalize` needs to apply a norm; weight and bias `[D]`."""

    norm: Norm = "none"
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6


class FinalNorm:
    """The last module of a decoder: an RMS or layer norm of the usual formula."""

    def __init__(self, owner: nn.Module, name: str, kind: Norm, shift: float, eps: float) -> None:
        """`shift` is added to the module's weight: Gemma stores w - 1."""
        self.owner, self.name, self.kind, self.shift, self.eps = owner, name, kind, shift, eps
        self.module = getattr(owner, name)
        self.identity = nn.Identity()

    @property
    def options(self) -> NormOptions:
        weight = self.module.weight.detach()
        bias = getattr(self.module, "bias", None)
        shifted = weight + self.shift if self.shift else weight
        return NormOptions(self.kind, shifted, None if bias is None else bias.detach(), self.eps)

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """The decoder runs without it; what it returns are the states before its final norm."""
        setattr(self.owner, self.name, self.identity)
        try:
            yield
        finally:
            setattr(self.owner, self.name, self.module)


def find_final_norm(model: PreTrainedModel) -> FinalNorm | None:
    """The final norm of a decoder; None where it has none, several candidates, or one of another formula."""
    width = int(cast(Tensor, model.get_input_embeddings().weight).shape[1])
    found = [
        name
        for name, module in model.named_children()
        if not list(module.children()) and getattr(getattr(module, "weight", None), "shape", None) == (width,)
    ]
    if len(found) != 1:
        return None
    module = copy.deepcopy(getattr(model, found[0])).float().cpu()
    eps = eps_of(module)
    if not eps:
        return None
    kinds: tuple[tuple[Norm, float], ...] = (("rms", 0.0), ("rms", 1.0), ("layer", 0.0), ("layer", 1.0))
    for kind, shift in kinds:
        norm = FinalNorm(model, found[0], kind, shift, eps)
        if _agrees(module, norm.options, width):
            return norm
    return None


@torch.no_grad()
def _agrees(module: nn.Module, options: NormOptions, width: int) -> bool:
    """Whether the module does what the options say, on rows small enough for eps to count."""
    rows = 3e-3 * torch.randn(4, width, generator=torch.Generator().manual_seed(0)) + 1e-3
    bias = None if options.bias is None else options.bias.float().cpu()
    if options.norm == "rms" and bias is not None:
        return False
    assert options.weight is not None
    ours = pool_normalize(
        rows,
        torch.arange(5, dtype=torch.int32),
        norm=options.norm,
        weight=options.weight.float().cpu(),
        bias=bias,
        eps=options.eps,
        normalize=False,
    )
    theirs = module(rows)
    return bool((ours - theirs).norm() <= TOLERANCE * theirs.norm())

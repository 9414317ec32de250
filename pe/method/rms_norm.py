"""A decoder's RMS norms by torch's fused kernel on a GPU: one launch, or two with a cast, instead of six to eight.

A step's small passes are made of thousands of kernels too short to fill a GPU, and nearly half of them were norms.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOLERANCE = 1e-5  # relative, in float32
EPS_NAMES = ("variance_epsilon", "eps", "epsilon")


def fuse_norms(model: nn.Module) -> None:
    """Let every RMS norm of the usual formula run fused on a GPU; others, such as Gemma's, stay."""
    for module in model.modules():
        if "forward" not in vars(module) and is_rms_norm(module):
            module.forward = functools.partial(forward, module)


def restore_norms(model: nn.Module) -> list[nn.Module]:
    """Undo `fuse_norms`; which norms it had fused."""
    fused = [module for module in model.modules() if is_fused(module)]
    for module in fused:
        del module.forward
    return fused


@contextlib.contextmanager
def stock_norms(model: nn.Module) -> Iterator[None]:
    """Inside it the model is as transformers has it."""
    fused = restore_norms(model)
    try:
        yield
    finally:
        for module in fused:
            module.forward = functools.partial(forward, module)


def is_fused(module: nn.Module) -> bool:
    own = vars(module).get("forward")
    return isinstance(own, functools.partial) and own.func is forward


def forward(module: nn.Module, x: Tensor) -> Tensor:
    """x `[..., D]` -> `[..., D]` in the wider type of x and weight."""
    if is_fused_on(x):
        return rms_norm(x, cast(Tensor, module.weight), cast(float, eps_of(module)))
    return cast(Tensor, type(module).forward(module, x))


def is_fused_on(x: Tensor) -> bool:
    """Whether torch has a fused kernel where `x` is."""
    return x.is_cuda


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """w x / sqrt(mean(x²) + eps) of rows `[..., D]` and a weight `[D]`, in float32 inside, rounded once.

    Autocast is off: it would copy rows of a half type to float32 first.
    """
    dtype = torch.promote_types(x.dtype, weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps)


def eps_of(module: nn.Module) -> float | None:
    return next((value for name in EPS_NAMES if isinstance(value := getattr(module, name, None), float)), None)


@torch.no_grad()
def is_rms_norm(module: nn.Module) -> bool:
    """Whether a module has one weight `[D]` and does with it what `rms_norm` does, to the type of what it returns."""
    weight, eps = getattr(module, "weight", None), eps_of(module)
    has_one = [name for name, _ in module.named_parameters()] == ["weight"] and not list(module.children())
    takes_rows = len(inspect.signature(type(module).forward).parameters) == 2
    if not has_one or not takes_rows or not eps or not isinstance(weight, Tensor) or weight.ndim != 1:
        return False
    generator, probe = torch.Generator().manual_seed(0), copy.copy(module)
    own = torch.rand(len(weight), generator=generator, device="cpu") + 0.5
    probe._parameters = {**module._parameters, "weight": nn.Parameter(own)}  # the module's own may hold no values
    rows = 3e-3 * torch.randn(4, len(weight), generator=generator, device="cpu")  # small: eps counts
    ours, theirs = rms_norm(rows, own, eps), probe(rows)
    is_wider = probe(rows.bfloat16()).dtype == torch.float32
    return is_wider and bool((ours - theirs).norm() <= TOLERANCE * theirs.norm())

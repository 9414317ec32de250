"""A frozen decoder of which each process holds a part (FSDP2).

Each layer's weights are cut along their first dimension. A layer that runs gathers them whole, and lets them go behind
it, in the backward pass too; so every process must run each layer as often as the others, and at the same time. What
stands outside the layers, the vocabulary's embedding and the final norm, is whole everywhere, and read without asking.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def shard(model: nn.Module, layers: nn.ModuleList, mesh: DeviceMesh) -> None:
    """Keep this process's part of the layers, and all else of the model, on its device; layers come there one by one.

    Args:
        model: frozen, with equal weights on all processes, on the CPU where it is too large for the device.
        layers: of the model, first to last.
        mesh: the processes.
    """
    inside = set(layers.parameters())
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p not in inside})
    model.to(torch.device(mesh.device_type))  # of several GPUs the one that this process has chosen


def frozen_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters that do not train, on this process."""
    frozen = (p for p in module.parameters() if not p.requires_grad)
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in frozen)

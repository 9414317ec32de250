"""What every benchmark asks of the device, and does with it between two measurements."""

from __future__ import annotations

import gc

import torch

from pe.config import BackboneConfig
from pe.method.loading import dtype_on


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what a measurement left behind.

    Raises:
        RuntimeError: a GPU that no longer answers, after an illegal access for example.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def frozen_dtype(config: BackboneConfig, device: torch.device) -> str:
    """Type of a backbone's weights on a device, `auto` where the checkpoint decides."""
    return str(dtype_on(device, config.dtype) or "auto").removeprefix("torch.")

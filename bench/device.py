"""What every benchmark does with the device between two measurements."""

from __future__ import annotations

import gc

import torch


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

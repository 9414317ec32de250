"""The least time that a GPU needs for given bytes and FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Roof:
    """Data-sheet figures of one GPU: memory bandwidth in TB/s, dense bf16 (and fp16) TFLOP/s."""

    bandwidth: float
    compute: float


ROOFS = {
    "NVIDIA A100-SXM4-80GB": Roof(2.04, 312),
    "NVIDIA H100 80GB HBM3": Roof(3.35, 989),
    "NVIDIA H200": Roof(4.8, 989),
    "NVIDIA B200": Roof(8.0, 2250),
}
"""By the name that the driver gives; a GPU that is not here has no floor."""


@dataclass(frozen=True)
class Cost:
    """Bytes that an op must read and write once, and FLOPs that it must do."""

    bytes: float
    flops: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def gbps(self, ms: float) -> float:
        return self.bytes / ms / 1e6

    def tflops(self, ms: float) -> float:
        return self.flops / ms / 1e9

    def floor_ms(self, gpu: str | None, dtype: torch.dtype) -> float | None:
        """The larger of memory time and compute time; None for an unknown GPU, and for types without a roof here."""
        roof = ROOFS.get(gpu or "")
        if roof is None or dtype not in (torch.bfloat16, torch.float16):
            return None
        return max(self.bytes / roof.bandwidth, self.flops / roof.compute) / 1e9

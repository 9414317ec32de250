"""The one comparison and the one tolerance table of the kernel tests."""

from __future__ import annotations

import torch
from torch import Tensor

# Floor of the allowed error, relative to the largest reference magnitude: what rounding one result costs, a few times.
FLOOR = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def assert_no_worse(got: Tensor, ref32: Tensor, ref_same_dtype: Tensor, what: str = "") -> None:
    """`got` errs against `ref32` (float32 or float64) at most twice as much as plain torch in got's dtype, plus a floor.

    NaNs must stand at the same places as in ref32, and infinities are compared exactly.
    """
    assert got.shape == ref32.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(ref32.shape)}"
    assert got.dtype == ref_same_dtype.dtype, f"{what}: dtype {got.dtype}, expected {ref_same_dtype.dtype}"
    assert torch.equal(got.isnan(), ref32.isnan()), f"{what}: NaN at other places than in the reference"
    if got.numel() == 0:
        return
    ref = ref32.double().nan_to_num(nan=0.0)
    error = (got.double().nan_to_num(nan=0.0) - ref).abs().max().item()
    torch_error = (ref_same_dtype.double().nan_to_num(nan=0.0) - ref).abs().max().item()
    allowed = 2 * torch_error + FLOOR[got.dtype] * ref.abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}, torch {torch_error:.3e}"

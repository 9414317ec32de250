"""The one comparison and the one tolerance table of the kernel tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Floor of the allowed error, relative to the largest reference magnitude: a few roundings of one result; in float32,
# which takes no tensor cores, sums of hundreds of products in another order than cuBLAS's (5e-6 on an H100).
FLOOR = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

Run = Callable[[Sequence[Tensor], str], Tensor]


def assert_no_worse(got: Tensor, ref32: Tensor, ref_same_dtype: Tensor, what: str = "") -> None:
    """`got` errs against `ref32` (float32 or better) at most twice as much as torch in got's dtype, plus a floor.

    NaNs must stand at the same places as in ref32.
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


def forward_backward(run: Run, inputs: Sequence[Tensor], impl: str, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradient of every floating input that requires one, for a fixed upstream gradient."""
    leaves = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs]
    out = run(leaves, impl)
    generator = torch.Generator(out.device).manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, device=out.device, dtype=torch.float32).to(out.dtype)
    asked = [leaf for leaf in leaves if leaf.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out, asked, upstream) if asked else ())]


def assert_matches_reference(run: Run, inputs: Sequence[Tensor], wide: torch.dtype = torch.float64) -> None:
    """Triton's output and gradients against plain torch in `wide` and in the inputs' own dtype."""
    dtype = inputs[0].dtype
    got = forward_backward(run, inputs, "triton", dtype)
    ref32 = forward_backward(run, inputs, "torch", wide)
    same = forward_backward(run, inputs, "torch", dtype)
    for i, (a, b, c) in enumerate(zip(got, ref32, same, strict=True)):
        assert_no_worse(a, b, c, f"gradient {i - 1}" if i else "output")

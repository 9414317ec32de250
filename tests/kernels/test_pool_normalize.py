from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import offsets
from torch import Tensor
from torch.autograd import gradcheck

from pe.kernels.pool_normalize import pool_normalize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [3, 0, 1, 4]
MODES, NORMS = ["mean", "last", "weighted"], ["none", "rms", "layer"]


def options(mode: str, norm: str) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"mode": mode, "norm": norm}
    kwargs["weight"] = torch.randn(6, dtype=torch.float64) if norm != "none" else None
    kwargs["bias"] = torch.randn(6, dtype=torch.float64) if norm == "layer" else None
    kwargs["token_weights"] = torch.rand(8, dtype=torch.float64) if mode == "weighted" else None
    return kwargs


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mode", MODES)
def test_reference_is_the_modules_segment_by_segment(mode: str, norm: str, normalize: bool) -> None:
    h, kwargs = torch.randn(8, 6, dtype=torch.float64, requires_grad=True), options(mode, norm)
    out = pool_normalize(h, offsets(LENGTHS), **kwargs, normalize=normalize)
    for rows, weights, row in zip(
        h.split(LENGTHS), (kwargs["token_weights"] if mode == "weighted" else torch.ones(8)).split(LENGTHS), out,
        strict=True,
    ):  # fmt: skip
        if norm == "rms":
            rows = F.rms_norm(rows, (6,), kwargs["weight"], 1e-6)
        if norm == "layer":
            rows = F.layer_norm(rows, (6,), kwargs["weight"], kwargs["bias"], 1e-6)
        if len(rows) == 0:
            expected = torch.zeros(6, dtype=torch.float64)
        else:
            expected = (
                rows[-1] if mode == "last" else sum(w * r for w, r in zip(weights, rows, strict=True)) / weights.sum()
            )
            expected = expected / expected.norm() if normalize else expected
        torch.testing.assert_close(row, expected)
    weights = (kwargs.pop("token_weights").requires_grad_(),) if mode == "weighted" else ()

    def run(x: Tensor, *token_weights: Tensor) -> Tensor:
        given = {"token_weights": token_weights[0]} if token_weights else {}
        return pool_normalize(x, offsets(LENGTHS), **kwargs | given, normalize=normalize)[[0, 2, 3]]

    assert gradcheck(run, (h, *weights))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("mode", MODES)
def test_empty_and_weightless_segments_are_zero(impl: str, mode: str) -> None:
    h = torch.randn(8, 20, device=DEVICE)
    weights = None
    if mode == "weighted":
        h[6] = torch.nan  # of weight zero: left out
        weights = torch.tensor([0.0, 0, 0, 1, 1, 2, 0, 3], device=DEVICE, requires_grad=True)
    h.requires_grad_()
    out = pool_normalize(h, offsets(LENGTHS, DEVICE), mode=mode, norm="rms", token_weights=weights, impl=impl)
    out.square().sum().backward()
    zero = torch.tensor([mode == "weighted", True, False, False], device=DEVICE)
    assert torch.equal((out == 0).all(dim=1), zero)
    torch.testing.assert_close(out[~zero].norm(dim=1), torch.ones(int((~zero).sum()), device=DEVICE))
    assert h.grad is not None
    assert torch.isfinite(h.grad).all()
    if weights is not None:
        assert not h.grad[:3].any()
        assert weights.grad is not None
        assert torch.isfinite(weights.grad).all()
        assert not weights.grad[weights == 0].any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_rows(impl: str, lengths: list[int]) -> None:
    h = torch.randn(0, 20, device=DEVICE, requires_grad=True)
    out = pool_normalize(h, offsets(lengths, DEVICE), impl=impl)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(len(lengths), 20, device=DEVICE))


def test_packed_equals_alone() -> None:
    h, lengths = torch.randn(36, 40, device=DEVICE), [30, 1, 5]
    packed = pool_normalize(h, offsets(lengths, DEVICE), norm="rms", impl="triton")
    for row, part in zip(packed, h.split(lengths), strict=True):
        alone = pool_normalize(part.contiguous(), offsets([len(part)], DEVICE), norm="rms", impl="triton")
        torch.testing.assert_close(alone[0], row)


def test_a_bad_row_stays_in_its_segment() -> None:
    h = torch.randn(8, 40, device=DEVICE)
    h[5, 7] = torch.inf
    out = pool_normalize(h, offsets(LENGTHS, DEVICE), norm="rms", impl="triton")
    assert torch.equal(out.isnan().any(dim=1), torch.tensor([False, False, False, True], device=DEVICE))


H, CU = torch.randn(8, 6), offsets(LENGTHS)


@pytest.mark.parametrize(
    ("arguments", "kwargs", "message"),
    [
        ((H[0], CU), {}, "h: expected 2 dimensions"),
        ((H, CU.long()), {}, "cu_seqlens: expected int32, got torch.int64"),
        ((H, CU[None]), {}, r"cu_seqlens: expected shape \[segments \+ 1\], got \(1, 5\)"),
        ((H, CU[:-1]), {}, "cu_seqlens: expected a last entry of 8, got 4"),
        ((H, CU[1:]), {}, "cu_seqlens: expected a first entry of 0, got 3"),
        ((H, torch.tensor([0, 5, 3, 8], dtype=torch.int32)), {}, "cu_seqlens: expected entries that never fall"),
        ((H, CU), {"mode": "max"}, "mode: expected"),
        ((H, CU), {"norm": "batch"}, "norm: expected"),
        ((H, CU), {"weight": torch.ones(6)}, 'weight: expected None with norm="none"'),
        ((H, CU), {"norm": "rms", "weight": torch.ones(5)}, r"weight: expected shape \[6\], got \(5,\)"),
        ((H, CU), {"norm": "rms", "bias": torch.ones(6)}, "bias: expected None"),
        ((H, CU), {"norm": "rms", "eps": 0.0}, "eps: expected a number > 0"),
        ((H, CU), {"mode": "weighted"}, "token_weights: expected a tensor exactly with"),
        ((H, CU), {"token_weights": torch.ones(8)}, "token_weights: expected a tensor exactly with"),
        ((H, CU), {"mode": "weighted", "token_weights": torch.ones(7)}, r"token_weights: expected shape \[8\]"),
        ((H, CU), {"norm": "rms", "weight": torch.ones(6).requires_grad_()}, "weight: expected a tensor that requires"),
    ],
)  # fmt: skip
def test_bad_input_raises(arguments: tuple[Tensor, Tensor], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pool_normalize(*arguments, **kwargs)

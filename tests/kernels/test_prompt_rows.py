from __future__ import annotations

import pytest
import torch
from tolerance import assert_no_worse
from torch import Tensor
from torch.autograd import gradcheck

from pe.kernels.prompt_rows import prompt_rows, prompt_rows_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = torch.tensor([3, -1, -2, 0, -6, -2, 6], device=DEVICE)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE, requires_grad=True)


def test_reference_is_the_layout_row_by_row() -> None:
    embedding, prompts, weight = double(7, 5), double(2, 3, 4), double(4, 5)
    out = prompt_rows(IDS, embedding, prompts, weight, scale=2.0)
    for row, i in zip(out, IDS.tolist(), strict=True):
        expected = embedding[i] * 2 if i >= 0 else prompts[(-1 - i) // 3, (-1 - i) % 3] @ weight
        torch.testing.assert_close(row, expected)


def test_reference_gradients() -> None:
    embedding = double(7, 5)
    assert gradcheck(
        lambda p, w: prompt_rows(IDS, embedding.detach(), p, w, scale=2.0), (double(2, 3, 4), double(4, 5))
    )
    assert gradcheck(lambda p: prompt_rows(IDS, embedding.detach(), p, None), (double(2, 3, 5),))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_the_embedding_gets_no_gradient(impl: str) -> None:
    embedding, prompts = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((7, 16), (2, 3, 16)))
    prompt_rows(IDS, embedding, prompts, None, impl=impl).sum().backward()
    assert embedding.grad is None
    assert prompts.grad is not None
    uses = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 1.0], device=DEVICE)
    assert torch.equal(prompts.grad.view(6, 16), uses[:, None].expand(6, 16))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("case", ["no rows", "text only", "no prompts", "one soft row"])
def test_edges(impl: str, case: str) -> None:
    ids = {"no rows": IDS[:0], "one soft row": IDS[1:2]}.get(case, IDS.clamp(min=0))
    embedding = torch.randn(7, 20, device=DEVICE)
    prompts = torch.randn(0 if case == "no prompts" else 2, 3, 24, device=DEVICE, requires_grad=True)
    weight = torch.randn(24, 20, device=DEVICE, requires_grad=True)
    out = prompt_rows(ids, embedding, prompts, weight, impl=impl)
    out.sum().backward()
    assert out.shape == (len(ids), 20)
    assert prompts.grad is not None
    assert weight.grad is not None
    if case == "one soft row":
        torch.testing.assert_close(weight.grad, prompts.detach()[0, 0, :, None].expand(-1, 20))
    else:
        assert torch.equal(out, embedding[ids])
        assert not prompts.grad.any()
        assert not weight.grad.any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_text_rows_are_bitwise_copies(impl: str) -> None:
    embedding = torch.randn(7, 200, device=DEVICE).half()
    prompts, weight = torch.randn(2, 3, 24, device=DEVICE).half(), torch.randn(24, 200, device=DEVICE).half()
    out = prompt_rows(IDS, embedding, prompts, weight, impl=impl)
    assert torch.equal(out[IDS >= 0], embedding[IDS[IDS >= 0]])


def test_a_bad_prompt_stays_in_its_rows() -> None:
    embedding, weight = torch.randn(7, 20, device=DEVICE), torch.randn(24, 20, device=DEVICE)
    prompts = torch.randn(2, 3, 24, device=DEVICE)
    prompts[0, 1, 3] = torch.nan
    out = prompt_rows(IDS, embedding, prompts, weight, impl="triton")
    assert torch.equal(out.isnan().all(dim=1), IDS == -2)
    assert torch.equal(out.isnan().any(dim=1), IDS == -2)


CPU_IDS, EMBEDDING, PROMPTS, WEIGHT = IDS.cpu(), torch.randn(7, 5), torch.randn(2, 3, 4), torch.randn(4, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((CPU_IDS[None], EMBEDDING, PROMPTS, WEIGHT), r"ids: expected shape \[T\], got \(1, 7\)"),
        ((CPU_IDS.int(), EMBEDDING, PROMPTS, WEIGHT), "ids: expected int64, got torch.int32"),
        ((CPU_IDS + 1, EMBEDDING, PROMPTS, WEIGHT), r"ids: expected entries in \[-6, 7\), got \[-5, 7\]"),
        ((CPU_IDS - 1, EMBEDDING, PROMPTS, WEIGHT), r"ids: expected entries in \[-6, 7\), got \[-7, 5\]"),
        ((CPU_IDS, EMBEDDING[0], PROMPTS, WEIGHT), "embedding: expected 2 dimensions"),
        ((CPU_IDS, EMBEDDING, PROMPTS[0], WEIGHT), "prompts: expected 3 dimensions"),
        ((CPU_IDS, EMBEDDING, PROMPTS, None), r"prompts: expected shape \[N, K, 5\] without a weight"),
        ((CPU_IDS, EMBEDDING, PROMPTS, WEIGHT.T), r"weight: expected shape \(4, 5\), got \(5, 4\)"),
        ((CPU_IDS, EMBEDDING, PROMPTS, WEIGHT.long()), "weight: expected a floating-point tensor"),
        ((CPU_IDS, EMBEDDING, PROMPTS.to("meta"), WEIGHT), "prompts: expected a tensor on cpu, got meta"),
    ],
)
def test_bad_input_raises(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_rows(*arguments)


def test_types_may_differ() -> None:
    """As in a training step under autocast: a frozen half-precision embedding, float32 prompts and alignment."""
    embedding = torch.randn(30, 24, device=DEVICE).half()
    ids = torch.tensor([5, -1, -2, 29, -3, -6, 0, -1], device=DEVICE)
    soft = torch.randn(2, 3, 16, device=DEVICE, requires_grad=True), torch.randn(16, 24, device=DEVICE) / 4
    soft[1].requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in soft]
    out, expected = (
        prompt_rows(ids, embedding, *soft, impl="triton"),
        prompt_rows_ref(ids, embedding.double(), *wide, scale=1.0),
    )
    assert out.dtype == torch.float16
    assert_no_worse(out, expected, expected.half())
    upstream = torch.randn(8, 24, device=DEVICE).half()
    got = torch.autograd.grad(out, soft, upstream)
    for ours, reference in zip(got, torch.autograd.grad(expected, wide, upstream.double()), strict=True):
        assert ours.dtype == torch.float32
        assert_no_worse(ours, reference, reference.half().float())

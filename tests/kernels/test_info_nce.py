from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_no_worse
from torch import Tensor
from torch.autograd import gradcheck

from pe.kernels.info_nce import _row_losses, info_nce, info_nce_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POSITIVE = torch.tensor([3, 0, 7, 7, 2])


def plain_loop(q: Tensor, d: Tensor, positive: Tensor, ids: Any, labels: Any) -> Tensor:
    (query_ids, doc_ids), (query_labels, doc_labels) = ids, labels

    def answers(i: int, j: int) -> bool:
        same_id = query_ids is not None and doc_ids is not None and query_ids[i] == doc_ids[j]
        return bool(same_id or (query_labels is not None and query_labels[i] >= 0 and query_labels[i] == doc_labels[j]))

    def loss(scores: dict[int, Tensor], right: int) -> Tensor:
        return -(scores[right] - torch.stack(list(scores.values())).exp().sum().log())

    total = torch.zeros((), dtype=q.dtype)
    for i, p in enumerate(positive.tolist()):
        same = lambda j, p=p: doc_ids is not None and bool(doc_ids[j] == doc_ids[p])  # noqa: E731
        scores = {j: q[i] @ d[j] / 0.3 for j in range(len(d)) if j == p or not (answers(i, j) or same(j))}
        total = total + loss(scores, p) / len(q)
    return total


@pytest.mark.parametrize("ids", ["none", "queries", "documents", "both"])
@pytest.mark.parametrize("labelled", [False, True])
def test_reference_is_the_loss_pair_by_pair(ids: str, labelled: bool) -> None:
    q, d = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 9))
    query_ids = torch.randint(0, 6, (5,)) if ids in ("queries", "both") else None
    doc_ids = torch.randint(0, 6, (9,)) if ids in ("documents", "both") else None
    labels = (torch.randint(-1, 2, (5,)), torch.randint(-1, 2, (9,))) if labelled else (None, None)
    kwargs: Any = {"temperature": 0.3, "query_ids": query_ids, "doc_ids": doc_ids,
                   "query_labels": labels[0], "doc_labels": labels[1]}  # fmt: skip
    expected = plain_loop(q, d, POSITIVE, (query_ids, doc_ids), labels)
    torch.testing.assert_close(info_nce(q, d, POSITIVE, **kwargs), expected)
    assert gradcheck(lambda *x: info_nce(*x, POSITIVE, **kwargs), (q, d))
    half = [x.detach().float().to(DEVICE) for x in (q, d)]
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    triton = info_nce(half[0], half[1], POSITIVE.to(DEVICE), impl="triton", **moved)
    torch.testing.assert_close(triton.cpu().double(), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_no_query_is_zero_with_zero_gradients(impl: str) -> None:
    q, d = (torch.randn(n, 16, device=DEVICE, requires_grad=True) for n in (0, 5))
    loss = info_nce(q, d, POSITIVE[:0].to(DEVICE), temperature=0.1, impl=impl)
    loss.backward()
    assert loss.item() == 0.0
    assert loss.dtype == torch.float32
    assert d.grad is not None
    assert not d.grad.any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_lone_pair_costs_nothing(impl: str) -> None:
    q, d = (torch.randn(1, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    loss = info_nce(q, d, POSITIVE[1:2].to(DEVICE), temperature=0.1, impl=impl)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert q.grad is not None
    assert q.grad.abs().max() < 1e-5


def test_duplicates_change_nothing() -> None:
    """A second copy of a positive, known by its id, leaves the loss as it was; an unknown one does not."""
    q, d = (F.normalize(torch.randn(n, 24, device=DEVICE), dim=1) for n in (20, 30))
    positive, ids = torch.arange(20, device=DEVICE), torch.arange(30, device=DEVICE)
    plain = info_nce(q, d, positive, temperature=0.05, doc_ids=ids, impl="triton")
    twice, twice_ids = torch.cat([d, d[4:5]]), torch.cat([ids, ids[4:5]])
    rows = torch.tensor([4], device=DEVICE)
    known = info_nce(q[rows], twice, positive[rows], temperature=0.05, doc_ids=twice_ids, impl="triton")
    alone = info_nce(q[rows], d, positive[rows], temperature=0.05, doc_ids=ids, impl="triton")
    unknown = info_nce(q[rows], twice, positive[rows], temperature=0.05, impl="triton")
    torch.testing.assert_close(known, alone)
    assert unknown > alone
    order = torch.randperm(20, device=DEVICE)
    torch.testing.assert_close(
        info_nce(q[order], d, positive[order], temperature=0.05, doc_ids=ids, impl="triton"), plain
    )


def test_small_gradients_survive_half_precision() -> None:
    """The mean over many queries and a small loss scale must not underflow in the fp16 tiles of the backward pass."""
    q, d = (F.normalize(torch.randn(40, 24, device=DEVICE), dim=1).half().requires_grad_() for _ in range(2))
    positive = torch.arange(40, device=DEVICE)
    scale = 1e-3
    got = torch.autograd.grad(info_nce(q, d, positive, temperature=1.0, impl="triton") * scale, (q, d))
    wide = [x.detach().double().requires_grad_() for x in (q, d)]
    ref = torch.autograd.grad(info_nce_ref(wide[0], wide[1], positive, temperature=1.0) * scale, wide)
    for a, b in zip(got, ref, strict=True):
        assert (a.double() - b).abs().max() < 0.01 * b.abs().max()


def test_rows_of_different_weight() -> None:
    """The mean gives every row one gradient; the op itself takes any."""
    q, d = (torch.randn(n, 24, device=DEVICE, requires_grad=True) for n in (20, 30))
    positive, weights = torch.arange(20, device=DEVICE), torch.randn(20, device=DEVICE)
    got = torch.autograd.grad(_row_losses(q, d, positive, 0.5, None, None, None, None) @ weights, (q, d))
    for leaf, grad in zip((q, d), got, strict=True):
        refs = []
        for dtype in (torch.float64, torch.float32):
            wide_q, wide_d = q.to(dtype), d.to(dtype)
            rows = [info_nce_ref(wide_q[i : i + 1], wide_d, positive[i : i + 1], temperature=0.5) for i in range(20)]
            refs.append(torch.autograd.grad(torch.stack(rows) @ weights.to(dtype), leaf)[0])
        assert_no_worse(grad, refs[0], refs[1])


def test_a_bad_query_stays_in_its_gradient() -> None:
    q, d = (torch.randn(n, 24, device=DEVICE) for n in (20, 30))
    q[3, 5] = torch.nan
    q.requires_grad_()
    loss = info_nce(q, d, torch.arange(20, device=DEVICE), temperature=1.0, impl="triton")
    loss.backward()
    assert loss.isnan()
    assert q.grad is not None
    assert torch.equal(q.grad.isnan().any(dim=1), torch.arange(20, device=DEVICE) == 3)


Q, D, P, IDS = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 4, 2]), torch.arange(5)


@pytest.mark.parametrize(
    ("arguments", "kwargs", "message"),
    [
        ((Q[0], D, P), {}, "q: expected 2 dimensions"),
        ((Q, D[:, :3], P), {}, r"d: expected shape \[N, 4\], got \(5, 3\)"),
        ((Q, D.half(), P), {}, "d: expected q's dtype"),
        ((Q, D, P[:2]), {}, r"positive: expected shape \[3\], got \(2,\)"),
        ((Q, D, P.int()), {}, "positive: expected int64, got torch.int32"),
        ((Q, D, P + 1), {}, r"positive: expected entries in \[0, 5\), got \[1, 5\]"),
        ((Q, D, P), {"temperature": 0.0}, "temperature: expected a number > 0"),
        ((Q, D, P), {"doc_ids": IDS[:3]}, r"doc_ids: expected shape \[5\]"),
        ((Q, D, P), {"query_ids": IDS}, r"query_ids: expected shape \[3\]"),
        ((Q, D, P), {"doc_labels": IDS}, "doc_labels: expected given exactly with query_labels"),
        ((Q, D.to("meta"), P), {}, "d: expected a tensor on cpu, got meta"),
    ],
)
def test_bad_input_raises(arguments: tuple[Tensor, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        info_nce(*arguments, **{"temperature": 0.1, **kwargs})

"""Contrastive loss with hard negatives and duplicate masks: mean over queries of -log softmax(q dᵀ / τ)[positive].

Shape legend: B queries, N candidate documents, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pe.kernels._checks import Impl, require, require_float, require_range, require_same_device, use_triton


def info_nce_ref(
    q: Tensor,
    d: Tensor,
    positive: Tensor,
    *,
    temperature: float,
    query_ids: Tensor | None = None,
    doc_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    doc_labels: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """Plain torch, at least float32 inside and out; builds the [B, N] matrix and its masks."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if q.shape[0] == 0:
        return q[:0].to(dtype).sum() + d[:0].to(dtype).sum()
    scores = (q.to(dtype) / temperature) @ d.to(dtype).T  # [B, N]
    is_match = torch.zeros_like(scores, dtype=torch.bool)  # document j answers query i though it is not its positive
    if query_ids is not None and doc_ids is not None:
        is_match |= query_ids[:, None] == doc_ids
    if query_labels is not None and doc_labels is not None:
        is_match |= (query_labels[:, None] >= 0) & (query_labels[:, None] == doc_labels)
    is_same = is_match if doc_ids is None else is_match | (doc_ids[positive][:, None] == doc_ids)
    rows = torch.arange(q.shape[0], device=q.device)
    is_positive = torch.arange(d.shape[0], device=q.device) == positive[:, None]
    loss = scores.masked_fill(is_same & ~is_positive, -torch.inf).logsumexp(dim=1) - scores[rows, positive]
    if symmetric:  # row i: the positive document of query i against every query j
        back, is_same = scores[:, positive].T, is_match[:, positive].T
        if query_ids is not None:
            is_same = is_same | (query_ids[:, None] == query_ids)
        if doc_ids is not None:
            is_same = is_same | (doc_ids[positive][:, None] == doc_ids[positive])
        is_self = torch.eye(q.shape[0], dtype=torch.bool, device=q.device)
        loss = (loss + back.masked_fill(is_same & ~is_self, -torch.inf).logsumexp(dim=1) - back.diagonal()) / 2
    return loss.mean()


def info_nce(
    q: Tensor,
    d: Tensor,
    positive: Tensor,
    *,
    temperature: float,
    query_ids: Tensor | None = None,
    doc_ids: Tensor | None = None,
    query_labels: Tensor | None = None,
    doc_labels: Tensor | None = None,
    symmetric: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Mean over queries of -log softmax(q dᵀ / temperature)[positive], duplicates of the positive left out.

    q [B, D], d [N, D] (positives and hard negatives in any order), positive [B] int64 the column of each query's
    positive -> scalar float32 (float64 stays float64), differentiable in q and d. Document j != positive[i] leaves row
    i where doc_ids[j] == doc_ids[positive[i]], doc_ids[j] == query_ids[i], or doc_labels[j] == query_labels[i] >= 0
    (ids and labels int64, each optional; the labels come as a pair).
    symmetric: the mean of that and of each positive document against all queries, where query j != i leaves row i when
    query_ids[j] == query_ids[i], doc_ids[positive[j]] == doc_ids[positive[i]], or query j and document positive[i] are
    a pair that the first rule leaves out. B == 0 gives 0 with zero gradients.
    Raises ValueError on shapes, dtypes or devices that do not fit, and (CPU) on a positive out of range.
    """
    require_float("q", q, 2)
    require_float("d", d, 2)
    n_queries, n_docs = q.shape[0], d.shape[0]
    require(d.shape[1] == q.shape[1], "d", f"shape [N, {q.shape[1]}]", d.shape)
    require(d.dtype == q.dtype, "d", f"q's dtype {q.dtype}", d.dtype)
    require_same_device("d", d, q.device)
    require(temperature > 0, "temperature", "a number > 0", temperature)
    require((query_labels is None) == (doc_labels is None), "doc_labels", "given exactly with query_labels",
            f"query_labels {query_labels is not None}, doc_labels {doc_labels is not None}")  # fmt: skip
    for name, tensor, size in (
        ("positive", positive, n_queries),
        ("query_ids", query_ids, n_queries),
        ("doc_ids", doc_ids, n_docs),
        ("query_labels", query_labels, n_queries),
        ("doc_labels", doc_labels, n_docs),
    ):
        if tensor is not None:
            require(tensor.dim() == 1 and tensor.shape[0] == size, name, f"shape [{size}]", tensor.shape)
            require(tensor.dtype == torch.int64, name, "int64", tensor.dtype)
            require_same_device(name, tensor, q.device)
    require_range("positive", positive, 0, n_docs)
    use_triton(impl, q)
    return info_nce_ref(
        q, d, positive, temperature=temperature, query_ids=query_ids, doc_ids=doc_ids, query_labels=query_labels,
        doc_labels=doc_labels, symmetric=symmetric,
    )  # fmt: skip

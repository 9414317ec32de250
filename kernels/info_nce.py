"""Contrastive loss with hard negatives and duplicate masks: mean over queries of -log softmax(q dᵀ / τ)[positive].

Forward, in base 2: every program keeps the running (maximum, sum) of its rows over a range of documents and meets the
positive on the way; loss_i = ln 2 (lse_i - z_i,positive). Backward: G = r (P - 1[positive]) with r = dloss / max|dloss|
(so that half precision does not underflow), dq = G d max|dloss| / τ, dd = Gᵀ q max|dloss| / τ.
The largest buffer is a [B, chunk] block of G, chunk = 4 D: memory is O(B·D), FLOPs 2·B·N·D forward, 6·B·N·D backward.
Saved: the inputs and the log-sum-exp. Reductions go through partial buffers, so runs repeat bitwise.

Shape legend: B queries, N candidate documents, D width, S splits of the documents, C documents of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pe.kernels._checks import Impl, require, require_float, require_range, require_same_device, use_triton
from pe.kernels._triton import LOG2E, distinct, generation, matmul_into, tile, triton_op, unit_stride, wrap_triton

PROGRAMS = 264  # split the documents until about this many programs run: two for each of 132 multiprocessors
CONFIGS = ({"BLOCK_D": 128, "num_stages": 2}, {"BLOCK_D": 32, "num_stages": 4}, {"num_warps": 4})
CHUNK = 1024  # documents a chunk of the backward pass, at least


def info_nce_ref(
    q: Tensor, d: Tensor, positive: Tensor, *, temperature: float,
    query_ids: Tensor | None = None, doc_ids: Tensor | None = None,
    query_labels: Tensor | None = None, doc_labels: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Plain torch, at least float32 inside and out; builds the [B, N] matrix and its masks."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if q.shape[0] == 0:
        return q[:0].to(dtype).sum() + d[:0].to(dtype).sum()
    scores = (q.to(dtype) / temperature) @ d.to(dtype).T  # [B, N]
    is_same = torch.zeros_like(scores, dtype=torch.bool)  # document j answers query i though it is not its positive
    if doc_ids is not None:
        is_same |= doc_ids[positive][:, None] == doc_ids
        if query_ids is not None:
            is_same |= query_ids[:, None] == doc_ids
    if query_labels is not None and doc_labels is not None:
        is_same |= (query_labels[:, None] >= 0) & (query_labels[:, None] == doc_labels)
    rows = torch.arange(q.shape[0], device=q.device)
    is_positive = torch.arange(d.shape[0], device=q.device) == positive[:, None]
    loss = scores.masked_fill(is_same & ~is_positive, -torch.inf).logsumexp(dim=1) - scores[rows, positive]
    return loss.mean()


@triton.jit
def _scores(
    q_ptr, d_ptr, offs_m, offs_n, mask_m, mask_n, D, stride_qm, stride_dn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Tile [BM, BN] of q dᵀ."""
    offs_d = tl.arange(0, BLOCK_D)
    q_ptrs = q_ptr + offs_m[:, None] * stride_qm + offs_d[None, :]
    d_ptrs = d_ptr + offs_n.to(tl.int64)[None, :] * stride_dn + offs_d[:, None]
    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, D, BLOCK_D):
        mask_d = offs_d < D - k
        q = tl.load(q_ptrs + k, mask=mask_m[:, None] & mask_d[None, :], other=0.0)  # [BM, BD]
        d = tl.load(d_ptrs + k, mask=mask_d[:, None] & mask_n[None, :], other=0.0)  # [BD, BN]
        z = tl.dot(q, d, z, input_precision="ieee")
    return z


@triton.jit
def _left_out(
    row_text_ptr, row_positive_ptr, row_label_ptr, column_text_ptr, column_label_ptr,
    offs_m, offs_n, mask_m, mask_n, TEXT_TEXT: tl.constexpr, POSITIVE_TEXT: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Whether column n leaves row m unless it is its positive: the query's or the positive's text, or one label."""
    out = (mask_m[:, None] & mask_n[None, :]) == 0
    if TEXT_TEXT:
        rows = tl.load(row_text_ptr + offs_m, mask=mask_m, other=0)
        out = out | (rows[:, None] == tl.load(column_text_ptr + offs_n, mask=mask_n, other=0)[None, :])
    if POSITIVE_TEXT:
        rows = tl.load(row_positive_ptr + offs_m, mask=mask_m, other=0)
        out = out | (rows[:, None] == tl.load(column_text_ptr + offs_n, mask=mask_n, other=0)[None, :])
    if LABELS:
        rows = tl.load(row_label_ptr + offs_m, mask=mask_m, other=-1)
        columns = tl.load(column_label_ptr + offs_n, mask=mask_n, other=-1)
        out = out | ((rows[:, None] == columns[None, :]) & (rows >= 0)[:, None])
    return out


@triton.jit
def _info_nce_fwd_kernel(
    q_ptr, d_ptr, positive_ptr, row_text_ptr, row_positive_ptr, row_label_ptr, column_text_ptr, column_label_ptr,
    max_ptr, sum_ptr, score_ptr, scale, B, N, D, tiles_per_split,
    stride_qm, stride_dn,
    TEXT_TEXT: tl.constexpr, POSITIVE_TEXT: tl.constexpr, LABELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M queries on one split of the documents: maximum, sum and the positive's score if met."""
    scale = tl.cast(scale, tl.float32)
    pid_m, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < B
    positive = tl.load(positive_ptr + offs_m, mask=mask_m, other=-1).to(tl.int32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    score = tl.zeros([BLOCK_M], tl.float32)
    begin = split * tiles_per_split * BLOCK_N
    end = tl.minimum(begin + tiles_per_split * BLOCK_N, N)
    for n in range(begin, end, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        z = _scores(
            q_ptr, d_ptr, offs_m, offs_n, mask_m, mask_n, D, stride_qm, stride_dn, BLOCK_M, BLOCK_N, BLOCK_D
        )  # fmt: skip
        z = z * scale
        out = _left_out(
            row_text_ptr, row_positive_ptr, row_label_ptr, column_text_ptr, column_label_ptr,
            offs_m, offs_n, mask_m, mask_n, TEXT_TEXT, POSITIVE_TEXT, LABELS,
        )  # fmt: skip
        is_positive = positive[:, None] == offs_n[None, :]
        score += tl.sum(tl.where(is_positive, z, 0.0), axis=1)
        z = tl.where(out & ~is_positive, -float("inf"), z)
        new_top = tl.maximum(top, tl.max(z, axis=1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(z - base[:, None]), axis=1)
        top = new_top
    tl.store(max_ptr + split.to(tl.int64) * B + offs_m, top, mask=mask_m)
    tl.store(sum_ptr + split.to(tl.int64) * B + offs_m, total, mask=mask_m)
    tl.store(score_ptr + split.to(tl.int64) * B + offs_m, score, mask=mask_m)


@triton.jit
def _info_nce_bwd_kernel(
    q_ptr, d_ptr, positive_ptr, row_text_ptr, row_positive_ptr, row_label_ptr, column_text_ptr, column_label_ptr,
    lse_ptr, row_scale_ptr, g_ptr, scale, B, N, D, n_begin,
    stride_qm, stride_dn, stride_gm,
    TEXT_TEXT: tl.constexpr, POSITIVE_TEXT: tl.constexpr, LABELS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a tile [BLOCK_M, BLOCK_N] of G = r (P - 1[positive])."""
    scale = tl.cast(scale, tl.float32)
    pid_n, pid_m = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_n = n_begin + offs_c
    mask_m, mask_n = offs_m < B, offs_n < N
    z = _scores(q_ptr, d_ptr, offs_m, offs_n, mask_m, mask_n, D, stride_qm, stride_dn, BLOCK_M, BLOCK_N, BLOCK_D)
    out = _left_out(
        row_text_ptr, row_positive_ptr, row_label_ptr, column_text_ptr, column_label_ptr,
        offs_m, offs_n, mask_m, mask_n, TEXT_TEXT, POSITIVE_TEXT, LABELS,
    )  # fmt: skip
    positive = tl.load(positive_ptr + offs_m, mask=mask_m, other=-1).to(tl.int32)
    is_positive = positive[:, None] == offs_n[None, :]
    lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=0.0)
    row_scale = tl.load(row_scale_ptr + offs_m, mask=mask_m, other=0.0)
    z = tl.where(out & ~is_positive, -float("inf"), z * scale - lse[:, None])
    g = (tl.exp2(z) - tl.where(is_positive, 1.0, 0.0)) * row_scale[:, None]
    g_ptrs = g_ptr + offs_m[:, None] * stride_gm + offs_c[None, :]
    tl.store(g_ptrs, g.to(g_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def _shared(
    q: Tensor, d: Tensor, positive: Tensor,
    row_text: Tensor | None, row_positive: Tensor | None, row_label: Tensor | None,
    column_text: Tensor | None, column_label: Tensor | None,
    temperature: float, block_m: int, block_n: int,
) -> dict[str, Any]:  # fmt: skip
    """Arguments that both kernels have in common."""
    return {
        "q_ptr": q, "d_ptr": d, "positive_ptr": positive,
        "row_text_ptr": positive if row_text is None else row_text,
        "row_positive_ptr": positive if row_positive is None else row_positive,
        "row_label_ptr": positive if row_label is None else row_label,
        "column_text_ptr": positive if column_text is None else column_text,
        "column_label_ptr": positive if column_label is None else column_label,
        "scale": LOG2E / temperature, "B": q.shape[0], "N": d.shape[0], "D": q.shape[1],
        "stride_qm": q.stride(0), "stride_dn": d.stride(0),
        "TEXT_TEXT": row_text is not None and column_text is not None,
        "POSITIVE_TEXT": row_positive is not None and column_text is not None,
        "LABELS": row_label is not None and column_label is not None,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_D": 64 if q.element_size() == 2 else 32,
        "num_warps": 8 if block_m == 128 else 4, "num_stages": 3 if generation(q.device) else 1,
    }  # fmt: skip


@triton_op("pe::info_nce_fwd")
def _info_nce_fwd(
    q: Tensor, d: Tensor, positive: Tensor,
    row_text: Tensor | None, row_positive: Tensor | None, row_label: Tensor | None,
    column_text: Tensor | None, column_label: Tensor | None, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss of each row and the base-2 log-sum-exp of its scaled scores, [B] float32."""
    B, N = q.shape[0], d.shape[0]
    block_m, block_n = tile(B, 16, 128), tile(N, 16, 64 if generation(q.device) == 8 else 128)
    row_tiles, column_tiles = triton.cdiv(B, block_m), triton.cdiv(N, block_n)
    splits = max(1, min(PROGRAMS // row_tiles, column_tiles))
    top, total, score = (q.new_empty(splits, B, dtype=torch.float32) for _ in range(3))
    ids = row_text, row_positive, row_label, column_text, column_label
    wrap_triton(_info_nce_fwd_kernel, CONFIGS)[(row_tiles, splits)](
        **_shared(q, d, positive, *ids, temperature, block_m, block_n),
        max_ptr=top, sum_ptr=total, score_ptr=score, tiles_per_split=triton.cdiv(column_tiles, splits),
    )  # fmt: skip
    largest = top.amax(dim=0)
    lse = largest + (total * torch.exp2(top - largest)).sum(dim=0).log2()
    return (lse - score.sum(dim=0)) / LOG2E, lse


@triton_op("pe::info_nce_bwd")
def _info_nce_bwd(
    g: Tensor, q: Tensor, d: Tensor, positive: Tensor,
    row_text: Tensor | None, row_positive: Tensor | None, row_label: Tensor | None,
    column_text: Tensor | None, column_label: Tensor | None, lse: Tensor,
    temperature: float, needs_q: bool, needs_d: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dq and dd for the rows' gradients g [B]; an empty tensor for what is not asked for."""
    (B, D), N = q.shape, d.shape[0]
    largest = g.abs().amax().clamp(min=torch.finfo(torch.float32).tiny).reshape(1)
    row_scale, factor = g / largest, largest / temperature
    block_m, block_n = tile(B, 16, 128), tile(N, 16, 128)
    chunk = min(triton.cdiv(max(CHUNK, 4 * D), 128) * 128, triton.cdiv(N, block_n) * block_n)
    tile_g = q.new_empty(B, chunk)
    dq = q.new_empty(B, D, dtype=torch.float32) if needs_q else q.new_empty(0)
    dd = d.new_empty(N, D) if needs_d else d.new_empty(0)
    ids = row_text, row_positive, row_label, column_text, column_label
    shared = _shared(q, d, positive, *ids, temperature, block_m, block_n)
    for n in range(0, N, chunk):
        size = min(chunk, N - n)
        wrap_triton(_info_nce_bwd_kernel, CONFIGS)[(triton.cdiv(size, block_n), triton.cdiv(B, block_m))](
            **shared, lse_ptr=lse, row_scale_ptr=row_scale, g_ptr=tile_g, n_begin=n, stride_gm=tile_g.stride(0)
        )
        if needs_q:
            matmul_into(dq, tile_g[:, :size], d[n : n + size], accumulate=n > 0)
        if needs_d:
            matmul_into(dd, tile_g[:, :size].T, q, first_row=n, scale=factor)
    return (dq * factor).to(q.dtype) if needs_q else dq, dd


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, d: Tensor, positive: Tensor,
        row_text: Tensor | None, row_positive: Tensor | None, row_label: Tensor | None,
        column_text: Tensor | None, column_label: Tensor | None, temperature: float,
    ) -> Tensor:  # fmt: skip
        ids = row_text, row_positive, row_label, column_text, column_label
        loss, lse = _info_nce_fwd(q, d, positive, *ids, temperature)
        ctx.save_for_backward(q, d, positive, *ids, lse)
        ctx.temperature = temperature
        return loss

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor) -> tuple[Tensor | None, ...]:
        needs_q, needs_d = ctx.needs_input_grad[:2]
        dq, dd = _info_nce_bwd(g.contiguous(), *ctx.saved_tensors, ctx.temperature, needs_q, needs_d)
        return dq if needs_q else None, dd if needs_d else None, *[None] * 7


def _row_losses(
    q: Tensor, d: Tensor, positive: Tensor, temperature: float,
    query_ids: Tensor | None, doc_ids: Tensor | None, query_labels: Tensor | None, doc_labels: Tensor | None,
) -> Tensor:  # fmt: skip
    """Loss of each query, [B] float32."""
    positive_ids = None if doc_ids is None else doc_ids[positive]
    texts = query_ids, positive_ids, query_labels, doc_ids, doc_labels
    loss: Tensor = _InfoNCE.apply(*distinct(q, d, positive, *texts), temperature)
    return loss


def info_nce(
    q: Tensor, d: Tensor, positive: Tensor, *, temperature: float,
    query_ids: Tensor | None = None, doc_ids: Tensor | None = None,
    query_labels: Tensor | None = None, doc_labels: Tensor | None = None, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Mean over queries of -log softmax(q dᵀ / temperature)[positive], duplicates of the positive left out.

    q [B, D], d [N, D] (positives and hard negatives in any order), positive [B] int64 the column of each query's
    positive -> scalar float32 (float64 stays float64), differentiable in q and d. Document j != positive[i] leaves row
    i where doc_ids[j] == doc_ids[positive[i]], doc_ids[j] == query_ids[i], or doc_labels[j] == query_labels[i] >= 0
    (ids and labels int64, each optional; the labels come as a pair). B == 0 gives 0 with zero gradients.
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
    if use_triton(impl, q) and n_queries > 0:
        ids = (None if ids is None else ids.contiguous() for ids in (query_ids, doc_ids, query_labels, doc_labels))
        return _row_losses(unit_stride(q), unit_stride(d), positive.contiguous(), float(temperature), *ids).mean()
    return info_nce_ref(
        q, d, positive, temperature=temperature, query_ids=query_ids, doc_ids=doc_ids, query_labels=query_labels,
        doc_labels=doc_labels,
    )  # fmt: skip

"""Causal attention over a sequence's own packed tokens plus a context of keys and values that is never concatenated.

Forward: z = cap(q [K_context; K]ᵀ · scale), P = softmax(z + mask), with one extra logit a head where sinks are given,
o = P [V_context; V]. Backward: dP = do Vᵀ, dz = P * (dP - rowsum(do * o)), through cap: dz * (1 - (z / cap)²),
dq = scale dz K, dK = scale dzᵀ q, dV = Pᵀ do, dsink = -sum over tokens of P_sink rowsum(do * o).
Saved: the inputs, o and the log-sum-exp. A context that requires no grad costs nothing backward; one that does sums
over its users in the order of a stable sort, without atomics.

The query heads of one key/value head are packed as rows, so K queries of G heads read a context once. With few
queries the context's keys are split over programs and merged by log-sum-exp. Sequences of more than one block of keys
(IS_LONG) take no mask but in the blocks on their diagonal and at their end.
Bytes with few queries: the context once forward, once backward. FLOPs with many: 4·D a query, key and head forward.

Shape legend: T packed tokens, B sequences, C packed context tokens, N segments, H query heads, Hkv key/value heads,
G = H / Hkv, D key width, Dv value width, Lq longest sequence, Lc longest context, R = Lq·G rows a key/value head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pe.kernels._checks import (
    Impl,
    require,
    require_float,
    require_longest,
    require_offsets,
    require_range,
    require_same_device,
    use_triton,
)
from pe.kernels._triton import LOG2E, distinct, floor_power, generation, tile, triton_op, unit_stride, wrap_triton
from pe.kernels.context_attention_torch import context_attention_torch

PROGRAMS = 264  # split a context's keys or users until about this many programs run: two for each of 132 processors
MAX_ROWS = 65_535 * 32  # the largest second axis of a grid, in the smallest tiles that a long sequence gets
MAX_WIDTH = 256
CONFIGS = ({"num_warps": 8, "num_stages": 3}, {"num_warps": 4, "num_stages": 3}, {"num_warps": 4, "num_stages": 1})


@triton.jit
def _logits(products, qk_scale, cap_scale, HAS_SOFTCAP: tl.constexpr):
    """Base-2 logits of the products q·k, capped where asked for."""
    z = products * qk_scale
    if HAS_SOFTCAP:
        z = cap_scale * (1.0 - 2.0 / (tl.exp2(z * 2.8853900817779268) + 1.0))  # tanh(z), 2 log2(e) = 2.885...
    return z


@triton.jit
def _visible(distance, window, HAS_WINDOW: tl.constexpr):
    """Which keys are seen, by how far they stand before their queries."""
    visible = distance >= 0
    if HAS_WINDOW:
        visible = visible & (distance < window)
    return visible


@triton.jit
def _rows(begin, length, kv_head, first_row, BLOCK_M: tl.constexpr, G: tl.constexpr):
    """Of a block of packed rows: token in the sequence, packed token, head and mask."""
    rows = first_row + tl.arange(0, BLOCK_M)
    return rows // G, begin + rows // G, kv_head * G + rows % G, rows < length * G


@triton.jit
def _context_of(b, cu_context_ptr, context_index_ptr, HAS_CONTEXT: tl.constexpr, HAS_INDEX: tl.constexpr):
    """First packed context token of sequence b, int64, and the context's length, int32."""
    begin, length = b * 0, (b * 0).to(tl.int32)
    if HAS_CONTEXT:
        segment = b
        if HAS_INDEX:
            segment = tl.load(context_index_ptr + b).to(tl.int64)
        begin = tl.load(cu_context_ptr + segment)
        length = tl.load(cu_context_ptr + segment + 1) - begin
        begin = begin.to(tl.int64)
    return begin, length


@triton.jit
def _attend_blocks(
    acc, total, top, q, k_ptr, v_ptr,
    first, last, shift, position_m, window, qk_scale, cap_scale, stride_kt, stride_vt,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ALL_VISIBLE: tl.constexpr,
):  # fmt: skip
    """Online softmax of a tile of rows over keys [first, last) of one segment, key n at position n + shift."""
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_d, mask_dv = offs_d < D, offs_dv < DV
    for n in range(first, last, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = (offs_n < last) | ALL_VISIBLE
        k_ptrs = k_ptr + offs_n.to(tl.int64)[None, :] * stride_kt + offs_d[:, None]
        k = tl.load(k_ptrs, mask=mask_d[:, None] & mask_n[None, :], other=0.0)  # [D, BN]
        z = _logits(tl.dot(q, k, input_precision="ieee"), qk_scale, cap_scale, HAS_SOFTCAP)
        if not ALL_VISIBLE:
            distance = position_m[:, None] - (offs_n + shift)[None, :]
            z = tl.where(mask_n[None, :] & _visible(distance, window, HAS_WINDOW), z, -float("inf"))
        new_top = tl.maximum(top, tl.max(z, axis=1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2(z - base[:, None])
        alpha = tl.exp2(top - base)
        total = total * alpha + tl.sum(p, axis=1)
        v_ptrs = v_ptr + offs_n.to(tl.int64)[:, None] * stride_vt + offs_dv[None, :]
        v = tl.load(v_ptrs, mask=mask_n[:, None] & mask_dv[None, :], other=0.0)  # [BN, DV]
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
        top = new_top
    return acc, total, top


@triton.jit
def _whole_blocks(first, last, seen_by_all, BLOCK_N: tl.constexpr):
    """End of the blocks from `first` that lie below `seen_by_all`, the keys that every row of a tile sees."""
    return first + tl.maximum(tl.minimum(seen_by_all, last) - first, 0) // BLOCK_N * BLOCK_N


@triton.jit
def _attend(
    acc, total, top, q, k_ptr, v_ptr,
    first, last, seen_by_all, shift, position_m, window, qk_scale, cap_scale, stride_kt, stride_vt,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SOME_WHOLE: tl.constexpr,
):  # fmt: skip
    """The same, where SOME_WHOLE masked only from the first block that holds a key some row does not see."""
    if SOME_WHOLE:
        whole = _whole_blocks(first, last, seen_by_all, BLOCK_N)
        acc, total, top = _attend_blocks(
            acc, total, top, q, k_ptr, v_ptr, first, whole, shift, position_m, window, qk_scale, cap_scale, stride_kt,
            stride_vt, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_WINDOW, HAS_SOFTCAP, True,
        )  # fmt: skip
        first = whole
    return _attend_blocks(
        acc, total, top, q, k_ptr, v_ptr, first, last, shift, position_m, window, qk_scale, cap_scale, stride_kt,
        stride_vt, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_WINDOW, HAS_SOFTCAP, False,
    )  # fmt: skip


@triton.jit
def _context_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, context_k_ptr, context_v_ptr, cu_context_ptr, context_index_ptr, sinks_ptr,
    o_ptr, lse_ptr, T, n_kv_heads, window, qk_scale, cap_scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ckt, stride_ckh, stride_cvt, stride_cvh,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HAS_CONTEXT: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, IS_LONG: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OWN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_M rows (tokens x grouped heads) of one sequence and key/value head, on one key split."""
    qk_scale, cap_scale = tl.cast(qk_scale, tl.float32), tl.cast(cap_scale, tl.float32)
    b, kv_head = (tl.program_id(0) // n_kv_heads).to(tl.int64), (tl.program_id(0) % n_kv_heads).to(tl.int64)
    row_tile, split = tl.program_id(1), tl.program_id(2)
    first_row = row_tile * BLOCK_M
    begin = tl.load(cu_ptr + b)
    length = tl.load(cu_ptr + b + 1) - begin
    begin = begin.to(tl.int64)
    token, t, head, mask_m = _rows(begin, length, kv_head, first_row, BLOCK_M, G)
    context_begin, context = _context_of(b, cu_context_ptr, context_index_ptr, HAS_CONTEXT, HAS_INDEX)
    position_m = context + token
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_ptrs = q_ptr + t[:, None] * stride_qt + head[:, None] * stride_qh + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0)  # [BM, D]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if HAS_SINKS:
        is_first = tl.full([BLOCK_M], split, tl.int32) == 0
        top = tl.where(is_first, tl.load(sinks_ptr + head, mask=mask_m, other=0.0).to(tl.float32) * 1.442695041, top)
        total = tl.where(is_first, 1.0, total)
    is_live = first_row < length * G
    first_token = first_row // G
    if HAS_CONTEXT:
        per_split = tl.cdiv(tl.cdiv(context, BLOCK_N), SPLITS) * BLOCK_N
        first, last = split * per_split, tl.minimum((split + 1) * per_split, context)
        if HAS_WINDOW:
            first = tl.maximum(first, (context + first_token - window + 1) // BLOCK_N * BLOCK_N)
        last = tl.where(is_live, last, 0)
        acc, total, top = _attend(
            acc, total, top, q, context_k_ptr + context_begin * stride_ckt + kv_head * stride_ckh,
            context_v_ptr + context_begin * stride_cvt + kv_head * stride_cvh, first, last, last, 0, position_m, window,
            qk_scale, cap_scale, stride_ckt, stride_cvt, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_WINDOW, HAS_SOFTCAP,
            IS_LONG and not HAS_WINDOW,
        )  # fmt: skip
    if split == SPLITS - 1:
        first, last = first_row * 0, tl.minimum(length, (first_row + BLOCK_M - 1) // G + 1)
        if HAS_WINDOW:
            first = tl.maximum(first, (first_token - window + 1) // BLOCK_OWN * BLOCK_OWN)
        last = tl.where(is_live, last, 0)
        acc, total, top = _attend(
            acc, total, top, q, k_ptr + begin * stride_kt + kv_head * stride_kh,
            v_ptr + begin * stride_vt + kv_head * stride_vh, first, last, first_token + 1, context, position_m, window,
            qk_scale, cap_scale, stride_kt, stride_vt, D, DV, BLOCK_OWN, BLOCK_D, BLOCK_DV, HAS_WINDOW, HAS_SOFTCAP,
            IS_LONG and not HAS_WINDOW,
        )  # fmt: skip
    row = (split.to(tl.int64) * T + t) * (n_kv_heads * G) + head  # row of [SPLITS, T, H]
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(lse_ptr + row, top + tl.log2(divisor), mask=mask_m)
    o = (acc / divisor[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + row[:, None] * DV + offs_dv[None, :], o, mask=mask_m[:, None] & (offs_dv < DV)[None, :])


@triton.jit
def _context_attention_merge_kernel(
    partial_ptr, partial_lse_ptr, o_ptr, lse_ptr, n_rows,
    DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program merges the splits of BLOCK_R rows (token, head) by their log-sum-exps."""
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_dv = tl.arange(0, BLOCK_DV)
    mask_r, mask_dv = offs_r < n_rows, offs_dv < DV
    top = tl.full([BLOCK_R], -float("inf"), tl.float32)
    for split in range(SPLITS):
        rows = tl.cast(split, tl.int64) * n_rows + offs_r
        top = tl.maximum(top, tl.load(partial_lse_ptr + rows, mask=mask_r, other=0.0))
    acc = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    for split in range(SPLITS):
        rows = tl.cast(split, tl.int64) * n_rows + offs_r
        weight = tl.exp2(tl.load(partial_lse_ptr + rows, mask=mask_r, other=0.0) - top)
        partial_ptrs = partial_ptr + rows[:, None] * DV + offs_dv[None, :]
        acc += weight[:, None] * tl.load(partial_ptrs, mask=mask_r[:, None] & mask_dv[None, :], other=0.0)
        total += weight
    tl.store(lse_ptr + offs_r, top + tl.log2(total), mask=mask_r)
    o_ptrs = o_ptr + offs_r[:, None] * DV + offs_dv[None, :]
    o = (acc / total[:, None]).to(o_ptr.dtype.element_ty)
    tl.store(o_ptrs, o, mask=mask_r[:, None] & mask_dv[None, :])


@triton.jit
def _probabilities(z, lse, visible, ALL_VISIBLE: tl.constexpr):
    """P of base-2 logits; lse fits their rows or columns."""
    p = tl.exp2(z - lse)
    if not ALL_VISIBLE:
        p = tl.where(visible, p, 0.0)
    return p


@triton.jit
def _dlogits(p, z, dp, delta, cap_scale, HAS_SOFTCAP: tl.constexpr):
    """dz of P, its logits and the products do·v, without the factor `scale`; delta fits their rows or columns."""
    dz = p * (dp - delta)
    if HAS_SOFTCAP:
        tanh = z / cap_scale
        dz = dz * (1.0 - tanh * tanh)
    return dz


@triton.jit
def _accumulate_dq_blocks(
    dq, q, do, lse, delta, k_ptr, v_ptr,
    first, last, shift, position_m, window, qk_scale, cap_scale, stride_kt, stride_vt,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ALL_VISIBLE: tl.constexpr,
):  # fmt: skip
    """dq += dz K over keys [first, last) of one segment."""
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_d, mask_dv = offs_d < D, offs_dv < DV
    for n in range(first, last, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = (offs_n < last) | ALL_VISIBLE
        k_ptrs = k_ptr + offs_n.to(tl.int64)[None, :] * stride_kt + offs_d[:, None]
        v_ptrs = v_ptr + offs_n.to(tl.int64)[None, :] * stride_vt + offs_dv[:, None]
        k = tl.load(k_ptrs, mask=mask_d[:, None] & mask_n[None, :], other=0.0)  # [D, BN]
        v = tl.load(v_ptrs, mask=mask_dv[:, None] & mask_n[None, :], other=0.0)  # [DV, BN]
        visible = mask_n[None, :] & _visible(position_m[:, None] - (offs_n + shift)[None, :], window, HAS_WINDOW)
        z = _logits(tl.dot(q, k, input_precision="ieee"), qk_scale, cap_scale, HAS_SOFTCAP)
        p = _probabilities(z, lse[:, None], visible, ALL_VISIBLE)
        dz = _dlogits(p, z, tl.dot(do, v, input_precision="ieee"), delta[:, None], cap_scale, HAS_SOFTCAP)
        dq = tl.dot(dz.to(k.dtype), tl.trans(k), dq, input_precision="ieee")
    return dq


@triton.jit
def _accumulate_dq(
    dq, q, do, lse, delta, k_ptr, v_ptr,
    first, last, seen_by_all, shift, position_m, window, qk_scale, cap_scale, stride_kt, stride_vt,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SOME_WHOLE: tl.constexpr,
):  # fmt: skip
    """The same, where SOME_WHOLE masked only from the first block that holds a key some row does not see."""
    if SOME_WHOLE:
        whole = _whole_blocks(first, last, seen_by_all, BLOCK_N)
        dq = _accumulate_dq_blocks(
            dq, q, do, lse, delta, k_ptr, v_ptr, first, whole, shift, position_m, window, qk_scale, cap_scale,
            stride_kt, stride_vt, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_WINDOW, HAS_SOFTCAP, True,
        )  # fmt: skip
        first = whole
    return _accumulate_dq_blocks(
        dq, q, do, lse, delta, k_ptr, v_ptr, first, last, shift, position_m, window, qk_scale, cap_scale, stride_kt,
        stride_vt, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_WINDOW, HAS_SOFTCAP, False,
    )  # fmt: skip


@triton.jit
def _context_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, context_k_ptr, context_v_ptr, cu_context_ptr, context_index_ptr,
    o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, T, n_kv_heads, window, scale, qk_scale, cap_scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ckt, stride_ckh, stride_cvt, stride_cvh,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HAS_CONTEXT: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_LONG: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OWN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program owns dq of BLOCK_M rows of one sequence and key/value head on one key split, and their delta."""
    scale = tl.cast(scale, tl.float32)
    qk_scale, cap_scale = tl.cast(qk_scale, tl.float32), tl.cast(cap_scale, tl.float32)
    b, kv_head = (tl.program_id(0) // n_kv_heads).to(tl.int64), (tl.program_id(0) % n_kv_heads).to(tl.int64)
    row_tile, split = tl.program_id(1), tl.program_id(2)
    first_row = row_tile * BLOCK_M
    begin = tl.load(cu_ptr + b)
    length = tl.load(cu_ptr + b + 1) - begin
    begin = begin.to(tl.int64)
    token, t, head, mask_m = _rows(begin, length, kv_head, first_row, BLOCK_M, G)
    context_begin, context = _context_of(b, cu_context_ptr, context_index_ptr, HAS_CONTEXT, HAS_INDEX)
    position_m = context + token
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_q, mask_o = mask_m[:, None] & (offs_d < D)[None, :], mask_m[:, None] & (offs_dv < DV)[None, :]
    row = t * (n_kv_heads * G) + head  # row of [T, H]
    q_ptrs = q_ptr + t[:, None] * stride_qt + head[:, None] * stride_qh + offs_d[None, :]
    q = tl.load(q_ptrs, mask=mask_q, other=0.0)  # [BM, D]
    do = tl.load(do_ptr + row[:, None] * DV + offs_dv[None, :], mask=mask_o, other=0.0)  # [BM, DV]
    o = tl.load(o_ptr + row[:, None] * DV + offs_dv[None, :], mask=mask_o, other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1)  # [BM]
    if split == 0:
        tl.store(delta_ptr + row, delta, mask=mask_m)
    lse = tl.load(lse_ptr + row, mask=mask_m, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    is_live = first_row < length * G
    first_token = first_row // G
    if HAS_CONTEXT:
        per_split = tl.cdiv(tl.cdiv(context, BLOCK_N), SPLITS) * BLOCK_N
        first, last = split * per_split, tl.minimum((split + 1) * per_split, context)
        if HAS_WINDOW:
            first = tl.maximum(first, (context + first_token - window + 1) // BLOCK_N * BLOCK_N)
        last = tl.where(is_live, last, 0)
        dq = _accumulate_dq(
            dq, q, do, lse, delta, context_k_ptr + context_begin * stride_ckt + kv_head * stride_ckh,
            context_v_ptr + context_begin * stride_cvt + kv_head * stride_cvh, first, last, last, 0, position_m, window,
            qk_scale, cap_scale, stride_ckt, stride_cvt, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, HAS_WINDOW, HAS_SOFTCAP,
            IS_LONG and not HAS_WINDOW,
        )  # fmt: skip
    if split == SPLITS - 1:
        first, last = first_row * 0, tl.minimum(length, (first_row + BLOCK_M - 1) // G + 1)
        if HAS_WINDOW:
            first = tl.maximum(first, (first_token - window + 1) // BLOCK_OWN * BLOCK_OWN)
        last = tl.where(is_live, last, 0)
        dq = _accumulate_dq(
            dq, q, do, lse, delta, k_ptr + begin * stride_kt + kv_head * stride_kh,
            v_ptr + begin * stride_vt + kv_head * stride_vh, first, last, first_token + 1, context, position_m, window,
            qk_scale, cap_scale, stride_kt, stride_vt, D, DV, BLOCK_OWN, BLOCK_D, BLOCK_DV, HAS_WINDOW, HAS_SOFTCAP,
            IS_LONG and not HAS_WINDOW,
        )  # fmt: skip
    row = (split.to(tl.int64) * T + t) * (n_kv_heads * G) + head  # row of [SPLITS, T, H]
    tl.store(dq_ptr + row[:, None] * D + offs_d[None, :], (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask_q)


@triton.jit
def _accumulate_dkv(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, begin, length, kv_head, begin_row, end_row,
    context, position_n, mask_n, n_kv_heads, window, qk_scale, cap_scale, stride_qt, stride_qh,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ALL_VISIBLE: tl.constexpr,
):  # fmt: skip
    """dk += dzᵀ q and dv += Pᵀ do over rows [begin_row, end_row) of one sequence, in whole tiles up to its last row.

    P and dz are [keys, rows]: as they come out they are operands of the next products. Rows and keys past the end are
    zero: as visible ones they add nothing to what is stored.
    """
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for first_row in range(begin_row, end_row, BLOCK_M):
        token, t, head, mask_m = _rows(begin, length, kv_head, first_row, BLOCK_M, G)
        row = t * (n_kv_heads * G) + head  # row of [T, H]
        q_ptrs = q_ptr + t[:, None] * stride_qt + head[:, None] * stride_qh + offs_d[None, :]
        do_ptrs = do_ptr + row[:, None] * DV + offs_dv[None, :]
        q = tl.load(q_ptrs, mask=mask_m[:, None] & (offs_d < D)[None, :], other=0.0)  # [BM, D]
        do = tl.load(do_ptrs, mask=mask_m[:, None] & (offs_dv < DV)[None, :], other=0.0)  # [BM, DV]
        lse = tl.load(lse_ptr + row, mask=mask_m, other=0.0)
        delta = tl.load(delta_ptr + row, mask=mask_m, other=0.0)
        distance = (context + token)[None, :] - position_n[:, None]
        visible = mask_n[:, None] & mask_m[None, :] & _visible(distance, window, HAS_WINDOW)
        z = _logits(tl.dot(k, tl.trans(q), input_precision="ieee"), qk_scale, cap_scale, HAS_SOFTCAP)  # [BN, BM]
        p = _probabilities(z, lse[None, :], visible, ALL_VISIBLE)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        dz = _dlogits(p, z, dp, delta[None, :], cap_scale, HAS_SOFTCAP)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dk = tl.dot(dz.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _context_attention_bwd_own_kernel(
    q_ptr, k_ptr, v_ptr, cu_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    n_kv_heads, window, scale, qk_scale, cap_scale,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_LONG: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program owns dk and dv of BLOCK_N own keys of one sequence and key/value head."""
    scale = tl.cast(scale, tl.float32)
    qk_scale, cap_scale = tl.cast(qk_scale, tl.float32), tl.cast(cap_scale, tl.float32)
    b, kv_head = (tl.program_id(0) // n_kv_heads).to(tl.int64), (tl.program_id(0) % n_kv_heads).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N
    begin = tl.load(cu_ptr + b)
    length = tl.load(cu_ptr + b + 1) - begin
    begin = begin.to(tl.int64)
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_n, mask_d, mask_dv = offs_n < length, offs_d < D, offs_dv < DV
    k_ptrs = k_ptr + (begin + offs_n)[:, None] * stride_kt + kv_head * stride_kh + offs_d[None, :]
    v_ptrs = v_ptr + (begin + offs_n)[:, None] * stride_vt + kv_head * stride_vh + offs_dv[None, :]
    k = tl.load(k_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)  # [BN, D]
    v = tl.load(v_ptrs, mask=mask_n[:, None] & mask_dv[None, :], other=0.0)  # [BN, DV]
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    end_row = length * G
    some = tl.minimum(n * G + tl.cdiv(BLOCK_N * G, BLOCK_M) * BLOCK_M, end_row)  # rows from here on see all these keys
    if HAS_WINDOW:
        end_row = tl.minimum(length, n + BLOCK_N - 1 + window) * G
        some = end_row
    dk, dv = _accumulate_dkv(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, begin, length, kv_head, n * G, some, n * 0, offs_n, mask_n,
        n_kv_heads, window, qk_scale, cap_scale, stride_qt, stride_qh, G, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
        HAS_WINDOW, HAS_SOFTCAP, False,
    )  # fmt: skip
    if IS_LONG and not HAS_WINDOW:
        dk, dv = _accumulate_dkv(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, begin, length, kv_head, some, end_row, n * 0, offs_n,
            mask_n, n_kv_heads, window, qk_scale, cap_scale, stride_qt, stride_qh, G, D, DV, BLOCK_M, BLOCK_D, BLOCK_DV,
            HAS_WINDOW, HAS_SOFTCAP, True,
        )  # fmt: skip
    row = (begin + offs_n) * n_kv_heads + kv_head  # row of [T, Hkv]
    dk_ptrs, dv_ptrs = dk_ptr + row[:, None] * D + offs_d[None, :], dv_ptr + row[:, None] * DV + offs_dv[None, :]
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_d[None, :])
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_dv[None, :])


@triton.jit
def _context_attention_bwd_context_kernel(
    q_ptr, context_k_ptr, context_v_ptr, cu_ptr, cu_context_ptr, user_ptr, user_begin_ptr,
    do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, C, n_kv_heads, window, scale, qk_scale, cap_scale,
    stride_qt, stride_qh, stride_ckt, stride_ckh, stride_cvt, stride_cvh,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_N keys of one context segment and key/value head, for every SPLITS-th of its users."""
    scale = tl.cast(scale, tl.float32)
    qk_scale, cap_scale = tl.cast(qk_scale, tl.float32), tl.cast(cap_scale, tl.float32)
    segment, kv_head = (tl.program_id(0) // n_kv_heads).to(tl.int64), (tl.program_id(0) % n_kv_heads).to(tl.int64)
    n, split = tl.program_id(1) * BLOCK_N, tl.program_id(2).to(tl.int64)
    begin = tl.load(cu_context_ptr + segment)
    context = tl.load(cu_context_ptr + segment + 1) - begin
    begin = begin.to(tl.int64)
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_d, offs_dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    mask_n, mask_d, mask_dv = offs_n < context, offs_d < D, offs_dv < DV
    k_ptrs = context_k_ptr + (begin + offs_n)[:, None] * stride_ckt + kv_head * stride_ckh + offs_d[None, :]
    v_ptrs = context_v_ptr + (begin + offs_n)[:, None] * stride_cvt + kv_head * stride_cvh + offs_dv[None, :]
    k = tl.load(k_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)  # [BN, D]
    v = tl.load(v_ptrs, mask=mask_n[:, None] & mask_dv[None, :], other=0.0)  # [BN, DV]
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    first_user, last_user = segment, segment + 1
    if HAS_INDEX:
        first_user, last_user = tl.load(user_begin_ptr + segment), tl.load(user_begin_ptr + segment + 1)
    last_user = tl.where(n < context, last_user, first_user)
    for user in range(first_user + split, last_user, SPLITS):
        b = segment
        if HAS_INDEX:
            b = tl.load(user_ptr + user)
        first_token = tl.load(cu_ptr + b)
        length = tl.load(cu_ptr + b + 1) - first_token
        first_token, last_token = first_token.to(tl.int64), length
        if HAS_WINDOW:
            last_token = tl.minimum(last_token, tl.maximum(n + BLOCK_N - 1 + window - context, 0))
        dk, dv = _accumulate_dkv(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, first_token, length, kv_head, n * 0, last_token * G,
            context, offs_n, mask_n, n_kv_heads, window, qk_scale, cap_scale, stride_qt, stride_qh, G, D, DV, BLOCK_M,
            BLOCK_D, BLOCK_DV, HAS_WINDOW, HAS_SOFTCAP, not HAS_WINDOW,
        )  # fmt: skip
    row = (split * C + begin + offs_n) * n_kv_heads + kv_head  # row of [SPLITS, C, Hkv]
    dk_ptrs, dv_ptrs = dk_ptr + row[:, None] * D + offs_d[None, :], dv_ptr + row[:, None] * DV + offs_dv[None, :]
    tl.store(dk_ptrs, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_d[None, :])
    tl.store(dv_ptrs, dv.to(dv_ptr.dtype.element_ty), mask=mask_n[:, None] & mask_dv[None, :])


def _blocks(q: Tensor, v: Tensor, n_rows: int, n_keys: int, largest_m: int) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, num_warps and num_stages of a program that owns rows and walks over keys."""
    width, chip = max(q.shape[2], v.shape[2]), generation(q.device)
    is_wide, is_half = width > 128, q.element_size() == 2
    if is_wide or chip == 0:
        largest_m //= 2
    block_m = tile(n_rows, 16, min(largest_m, 64) if chip == 8 else largest_m)
    block_n = tile(n_keys, 16, 32 if is_wide or not is_half or chip == 0 else 64)
    return block_m, block_n, 8 if block_m > 64 or (width > 64 and block_m > 32) else 4, 2 if chip else 1


def _key_blocks(q: Tensor, v: Tensor, n_rows: int, n_keys: int) -> tuple[int, int, int, int]:
    """The same of a program that owns keys and walks over rows; it holds two accumulators, so its rows are few."""
    _, block_n, _, num_stages = _blocks(q, v, n_rows, n_keys, 32)
    is_full = block_n * max(q.shape[2], v.shape[2]) >= 32 * 128 and generation(q.device) > 0
    return tile(n_rows, 16, 32), block_n, 8 if is_full else 4, num_stages


def _common(q: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> dict[str, Any]:
    """Arguments of every kernel but the merge; qk_scale goes before tanh, cap_scale behind it."""
    (_, H, D), (_, Hkv, Dv) = q.shape, v.shape
    qk_scale, cap_scale = (scale * LOG2E, 0.0) if softcap is None else (scale / softcap, softcap * LOG2E)
    return {
        "n_kv_heads": Hkv, "window": window or 0, "qk_scale": qk_scale, "cap_scale": cap_scale,
        "stride_qt": q.stride(0), "stride_qh": q.stride(1),
        "G": H // Hkv, "D": D, "DV": Dv, "HAS_WINDOW": window is not None, "HAS_SOFTCAP": softcap is not None,
        "BLOCK_D": tile(D, 16, MAX_WIDTH), "BLOCK_DV": tile(Dv, 16, MAX_WIDTH),
    }  # fmt: skip


def _over_rows(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
    context_k: Tensor | None, context_v: Tensor | None, cu_context: Tensor | None, context_index: Tensor | None,
    max_seqlen: int, max_context: int, largest_m: int,
) -> tuple[tuple[int, int, int], dict[str, Any]]:  # fmt: skip
    """Grid, and what the kernels that own rows take besides, such as the splits of the context's keys."""
    B, Hkv, G = cu_seqlens.shape[0] - 1, v.shape[1], q.shape[1] // v.shape[1]
    has_context = context_k is not None and max_context > 0
    block_m, block_n, num_warps, num_stages = _blocks(q, v, max_seqlen * G, max(max_context, max_seqlen), largest_m)
    row_tiles, block_own = triton.cdiv(max_seqlen * G, block_m), tile(max_seqlen, 16, block_n)
    splits = min(PROGRAMS // (B * Hkv * row_tiles), triton.cdiv(max_context, block_n)) if has_context else 1
    splits = floor_power(splits)
    ck, cv = k if context_k is None else context_k, v if context_v is None else context_v
    arguments = {
        "q_ptr": q, "k_ptr": k, "v_ptr": v, "cu_ptr": cu_seqlens, "context_k_ptr": ck, "context_v_ptr": cv,
        "cu_context_ptr": cu_seqlens if cu_context is None else cu_context,
        "context_index_ptr": cu_seqlens if context_index is None else context_index, "T": q.shape[0],
        "stride_kt": k.stride(0), "stride_kh": k.stride(1), "stride_vt": v.stride(0), "stride_vh": v.stride(1),
        "stride_ckt": ck.stride(0), "stride_ckh": ck.stride(1), "stride_cvt": cv.stride(0), "stride_cvh": cv.stride(1),
        "HAS_CONTEXT": has_context, "HAS_INDEX": context_index is not None, "IS_LONG": max_seqlen > block_own,
        "SPLITS": splits, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_OWN": block_own,
        "num_warps": num_warps, "num_stages": num_stages,
    }  # fmt: skip
    return (B * Hkv, row_tiles, splits), arguments


@triton_op("pe::context_attention_fwd")
def _context_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
    context_k: Tensor | None, context_v: Tensor | None, cu_context: Tensor | None, context_index: Tensor | None,
    sinks: Tensor | None,
    max_seqlen: int, max_context: int, scale: float, window: int | None, softcap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o [T, H, Dv] in q's dtype and the base-2 log-sum-exp [T, H] float32."""
    (T, H), Dv = q.shape[:2], v.shape[2]
    common = _common(q, v, scale, window, softcap)
    context = context_k, context_v, cu_context, context_index
    grid, arguments = _over_rows(q, k, v, cu_seqlens, *context, max_seqlen, max_context, 128)
    o, lse, splits = q.new_empty(T, H, Dv), q.new_empty(T, H, dtype=torch.float32), arguments["SPLITS"]
    partial, partial_lse = o, lse
    if splits > 1:
        partial = q.new_empty(splits, T, H, Dv, dtype=torch.float32)
        partial_lse = q.new_empty(splits, T, H, dtype=torch.float32)
    wrap_triton(_context_attention_fwd_kernel, CONFIGS)[grid](
        **common, **arguments, sinks_ptr=q if sinks is None else sinks, o_ptr=partial, lse_ptr=partial_lse,
        HAS_SINKS=sinks is not None,
    )  # fmt: skip
    if splits > 1:
        wrap_triton(_context_attention_merge_kernel)[(triton.cdiv(T * H, 16),)](
            partial_ptr=partial, partial_lse_ptr=partial_lse, o_ptr=o, lse_ptr=lse, n_rows=T * H,
            DV=Dv, SPLITS=splits, BLOCK_R=16, BLOCK_DV=common["BLOCK_DV"], num_warps=4,
        )  # fmt: skip
    return o, lse


@triton_op("pe::context_attention_bwd")
def _context_attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
    context_k: Tensor | None, context_v: Tensor | None, cu_context: Tensor | None, context_index: Tensor | None,
    sinks: Tensor | None, o: Tensor, lse: Tensor,
    max_seqlen: int, max_context: int, scale: float, window: int | None, softcap: float | None,
    needs_own: bool, needs_context: bool, needs_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dcontext_k, dcontext_v and dsinks; an empty tensor for each that is not asked for."""
    (T, H, D), (_, Hkv, Dv), B = q.shape, v.shape, cu_seqlens.shape[0] - 1
    common = _common(q, v, scale, window, softcap)
    context = context_k, context_v, cu_context, context_index
    grid, arguments = _over_rows(q, k, v, cu_seqlens, *context, max_seqlen, max_context, 64)
    delta, splits = torch.empty_like(lse), arguments["SPLITS"]
    dq = q.new_empty(splits, T, H, D, dtype=torch.float32 if splits > 1 else q.dtype)
    wrap_triton(_context_attention_bwd_dq_kernel, CONFIGS)[grid](
        **common, **arguments, o_ptr=o, do_ptr=do, lse_ptr=lse, delta_ptr=delta, dq_ptr=dq, scale=scale
    )
    common |= {"q_ptr": q, "cu_ptr": cu_seqlens, "do_ptr": do, "lse_ptr": lse, "delta_ptr": delta, "scale": scale}
    dk, dv, dck, dcv, dsinks = (q.new_empty(0) for _ in range(5))
    if needs_own:
        dk, dv = k.new_empty(T, Hkv, D), v.new_empty(T, Hkv, Dv)
        block_m, block_n, num_warps, num_stages = _key_blocks(q, v, max_seqlen * H // Hkv, max_seqlen)
        wrap_triton(_context_attention_bwd_own_kernel, CONFIGS)[(B * Hkv, triton.cdiv(max_seqlen, block_n))](
            **common, k_ptr=k, v_ptr=v, dk_ptr=dk, dv_ptr=dv,
            stride_kt=k.stride(0), stride_kh=k.stride(1), stride_vt=v.stride(0), stride_vh=v.stride(1),
            IS_LONG=max_seqlen > block_n, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
    if needs_context and context_k is not None and context_v is not None and cu_context is not None:
        C, N = context_k.shape[0], cu_context.shape[0] - 1
        users = user_begin = cu_context
        if context_index is not None:
            key, users = torch.sort(context_index, stable=True)
            user_begin = torch.searchsorted(key, torch.arange(N + 1, device=q.device, dtype=key.dtype))
        block_m, block_n, num_warps, num_stages = _key_blocks(q, v, max_seqlen * H // Hkv, max_context)
        key_tiles = triton.cdiv(max_context, block_n)
        user_splits = floor_power(min(PROGRAMS // max(1, N * Hkv * key_tiles), B // max(1, N)))
        dtype = torch.float32 if user_splits > 1 else q.dtype
        dck, dcv = q.new_empty(user_splits, C, Hkv, D, dtype=dtype), q.new_empty(user_splits, C, Hkv, Dv, dtype=dtype)
        if key_tiles > 0 and N > 0:
            wrap_triton(_context_attention_bwd_context_kernel, CONFIGS)[(N * Hkv, key_tiles, user_splits)](
                **common, context_k_ptr=context_k, context_v_ptr=context_v, cu_context_ptr=cu_context, user_ptr=users,
                user_begin_ptr=user_begin, dk_ptr=dck, dv_ptr=dcv, C=C,
                stride_ckt=context_k.stride(0), stride_ckh=context_k.stride(1),
                stride_cvt=context_v.stride(0), stride_cvh=context_v.stride(1),
                HAS_INDEX=context_index is not None, SPLITS=user_splits, BLOCK_M=block_m, BLOCK_N=block_n,
                num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
        dck, dcv = _sum_splits(dck, q.dtype), _sum_splits(dcv, q.dtype)
    if needs_sinks and sinks is not None:
        dsinks = -(torch.exp2(sinks.float() * LOG2E - lse) * delta).sum(dim=0).to(sinks.dtype)
    return _sum_splits(dq, q.dtype), dk, dv, dck, dcv, dsinks


def _sum_splits(partial: Tensor, dtype: torch.dtype) -> Tensor:
    return partial.squeeze(0) if partial.shape[0] == 1 else partial.sum(dim=0).to(dtype)


class _ContextAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor,
        context_k: Tensor | None, context_v: Tensor | None, cu_context: Tensor | None, context_index: Tensor | None,
        sinks: Tensor | None,
        max_seqlen: int, max_context: int, scale: float, window: int | None, softcap: float | None,
    ) -> Tensor:  # fmt: skip
        tensors = q, k, v, cu_seqlens, context_k, context_v, cu_context, context_index, sinks
        options = max_seqlen, max_context, scale, window, softcap
        o, lse = _context_attention_fwd(*tensors, *options)
        ctx.save_for_backward(*tensors, o, lse)
        ctx.options = options
        return o

    @staticmethod
    def backward(ctx: FunctionCtx, do: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        needs_own, needs_context, needs_sinks = needs[1] or needs[2], needs[4] or needs[5], needs[8]
        grads = _context_attention_bwd(
            do.contiguous(), *ctx.saved_tensors, *ctx.options, needs_own, needs_context, needs_sinks
        )  # fmt: skip
        asked = (grad if needs[i] else None for grad, i in zip(grads, (0, 1, 2, 4, 5, 8), strict=True))
        dq, dk, dv, dck, dcv, dsinks = asked
        return dq, dk, dv, None, dck, dcv, None, None, dsinks, None, None, None, None, None


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    context_k: Tensor | None, context_v: Tensor | None, cu_context: Tensor | None, context_index: Tensor | None,
    max_context: int, window: int | None, softcap: float | None, sinks: Tensor | None, is_triton: bool,
) -> None:  # fmt: skip
    """Raise ValueError on what `context_attention` does not take, or its kernels do not where `is_triton`."""
    require_float("q", q, 3)
    require_float("k", k, 3)
    require_float("v", v, 3)
    (T, H, D), Hkv, Dv = q.shape, k.shape[1], v.shape[2]
    require(k.shape[0] == T and k.shape[2] == D, "k", f"shape [{T}, Hkv, {D}]", k.shape)
    require(v.shape[0] == T and v.shape[1] == Hkv, "v", f"shape [{T}, {Hkv}, Dv]", v.shape)
    require(Hkv >= 1 and H % Hkv == 0, "k", f"a number of heads that divides q's {H}", k.shape)
    require_offsets("cu_seqlens", cu_seqlens, T)
    require_longest("max_seqlen", max_seqlen, cu_seqlens, T)
    B = cu_seqlens.shape[0] - 1
    given = (context_k is not None, context_v is not None, cu_context is not None)
    require(len(set(given)) == 1, "context_k, context_v, cu_context", "all three or none", given)
    if context_k is not None and context_v is not None and cu_context is not None:
        C = context_k.shape[0]
        require(tuple(context_k.shape) == (C, Hkv, D), "context_k", f"shape [C, {Hkv}, {D}]", context_k.shape)
        require(tuple(context_v.shape) == (C, Hkv, Dv), "context_v", f"shape {C, Hkv, Dv}", context_v.shape)
        has_grad = context_k.requires_grad or context_v.requires_grad
        require_offsets("cu_context", cu_context, C, has_rest=not has_grad)
        require_longest("max_context", max_context, cu_context, C if has_grad else 0)
        n_segments = cu_context.shape[0] - 1
        if context_index is None:
            require(n_segments == B, "cu_context", f"shape [{B + 1}] without a context_index", cu_context.shape)
        else:
            require(tuple(context_index.shape) == (B,), "context_index", f"shape [{B}]", context_index.shape)
            is_integer = context_index.dtype in (torch.int32, torch.int64)
            require(is_integer, "context_index", "int32 or int64", context_index.dtype)
            require_range("context_index", context_index, 0, n_segments)
    else:
        require(context_index is None, "context_index", "None without a context", "a tensor")
    if sinks is not None:
        require_float("sinks", sinks, 1)
        require(sinks.shape[0] == H, "sinks", f"shape [{H}]", sinks.shape)
    states = {"k": k, "v": v, "context_k": context_k, "context_v": context_v}
    for name, tensor in states.items():
        if tensor is not None:
            require(tensor.dtype == q.dtype, name, f"q's dtype {q.dtype}", tensor.dtype)
    others = {"cu_seqlens": cu_seqlens, "cu_context": cu_context, "context_index": context_index, "sinks": sinks}
    for name, tensor in (states | others).items():
        if tensor is not None:
            require_same_device(name, tensor, q.device)
    require(window is None or window >= 1, "window", "None or an int >= 1", window)
    require(softcap is None or softcap > 0, "softcap", "None or a number > 0", softcap)
    if is_triton:
        for name, width in (("q", D), ("v", Dv)):
            require(width <= MAX_WIDTH, name, f"a head width of at most {MAX_WIDTH} for the Triton path", width)
        longest = f"at most {MAX_ROWS // (H // Hkv)} for the Triton path at {H} heads to {Hkv}"
        require(max_seqlen * (H // Hkv) <= MAX_ROWS, "max_seqlen", longest, max_seqlen)


def context_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, max_seqlen: int,
    context_k: Tensor | None = None, context_v: Tensor | None = None, cu_context: Tensor | None = None,
    context_index: Tensor | None = None, max_context: int = 0,
    scale: float | None = None, window: int | None = None, softcap: float | None = None,
    sinks: Tensor | None = None, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Attention of packed sequences over their own earlier tokens and a context segment each.

    q [T, H, D], k [T, Hkv, D], v [T, Hkv, Dv], cu_seqlens [B + 1] int32 -> [T, H, Dv] in q's dtype.
    context_k [C, Hkv, D], context_v [C, Hkv, Dv], cu_context [N + 1] int32; context_index [B] the segment of each
    sequence (one may serve many), None for segment b of sequence b (then N == B). Rows of a context that needs no
    gradient may follow the last segment; nobody sees them. max_seqlen and max_context bound the lengths.
    Token i of sequence b stands at position len(context b) + i and sees its whole context and its own tokens up to i;
    with `window` only keys less than `window` positions back. Query head h reads key/value head h // (H / Hkv).
    scale: default D ** -0.5. softcap: s tanh(score / s) before masking. sinks [H]: one more logit a head in the
    denominator. Differentiable in q, k, v, context_k, context_v and sinks; what asks for no gradient costs none, but q.
    Raises ValueError on shapes, dtypes or devices that do not fit, (CPU) on offsets or indices out of range, and
    (Triton) on heads wider than MAX_WIDTH or a max_seqlen of more than MAX_ROWS rows a key/value head.
    """
    is_triton = use_triton(impl, q) and q.numel() > 0
    _check(
        q, k, v, cu_seqlens, max_seqlen, context_k, context_v, cu_context, context_index, max_context, window, softcap,
        sinks, is_triton,
    )  # fmt: skip
    if window is not None and window >= max_seqlen + max_context:
        window = None
    if not is_triton:
        return context_attention_torch(
            q, k, v, cu_seqlens, max_seqlen=max_seqlen, context_k=context_k, context_v=context_v,
            cu_context=cu_context, context_index=context_index, max_context=max_context, scale=scale, window=window,
            softcap=softcap, sinks=sinks,
        )  # fmt: skip
    own = unit_stride(q), unit_stride(k), unit_stride(v), cu_seqlens.contiguous()
    context = (None if x is None else unit_stride(x) for x in (context_k, context_v))
    rest = (None if x is None else x.contiguous() for x in (cu_context, context_index, sinks))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    tensors = distinct(*own, *context, *rest)
    return _ContextAttention.apply(*tensors, max_seqlen, max_context, scale, window, softcap)

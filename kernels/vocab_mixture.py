"""Expected vocabulary embedding of a soft token: S = softmax(h E_outᵀ / T) E_in.

Forward, in base 2 with z = h E_outᵀ log2(e) / T: every tile of the vocabulary writes 2^(z - k) with an integer offset k
a row, so that bringing tiles to a common offset is exact; S = sum 2^(k - k_max) (2^(z - k) E_in) / sum 2^(z - k_max).
Backward: P = 2^(z - lse) again, dP = dS E_inᵀ, rowsum(P * dP) = rowsum(dS * S), dZ = P * (dP - rowsum) / T,
dh = dZ E_out, dE_out = dZᵀ h, dE_in = Pᵀ dS. Saved: the inputs, and S and the log-sum-exp in float32: where one entry
holds most of a row, dP - rowsum is a small difference of large numbers, and a rounded S would be most of it.

Chunked form, any shape: two products for each chunk of the vocabulary. [M, chunk] is the largest buffer, and a chunk of
tied rows up to 1,024 wide is still in the L2 cache when its second product reads it. Floor 4·M·V·D FLOPs forward,
6·M·V·D backward without embedding gradients.

Fused form, few rows (`_fused_rows` is the rule): one launch and a merge. The vocabulary is split over programs; one
walks over its tiles, reads a tile of E once into shared memory, takes both products from it (all three backward, where
only dh is asked for) and adds to an accumulator [BLOCK_M, Din] that its warps share out by columns. Floor: E from
memory once forward and once backward, 2·V·D bytes of half precision where E_out is E_in, 4·V·D else; at V = 151,936 and
D = 1,024, tied, 311 MB or 65 us at 4.8 TB/s. On top come the float32 partials, at most PROGRAMS·16·Din·4 bytes (17 MB
at Din = 1,024) written and read once. The accumulator bounds BLOCK_M: 32 rows of 1,024 columns fill half the register
file. Up to 64 rows are two blocks, and E crosses from the L2 cache to a multiprocessor twice, as often as chunked.

Reductions of both go through partial buffers, so runs repeat bitwise.

Shape legend: M rows, V vocabulary entries, D width of `h` and `e_out`, Din width of `e_in`, C entries of a chunk.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx

from pe.kernels._checks import Impl, require, require_float, require_same_device, use_triton
from pe.kernels._triton import LOG2E, distinct, generation, matmul_into, tile, triton_op, unit_stride, wrap_triton

BLOCK_V = 128  # vocabulary entries that share an offset
CHUNK = 16384  # vocabulary entries a chunk, at most: 32 MB of 1024-wide half-precision rows
CHUNK_ELEMENTS = 1 << 25  # elements of a [M, chunk] buffer, at most
PROGRAMS = 264  # split a product until about this many programs share it: two for each of 132 multiprocessors
LOGITS_CONFIGS = ({"BLOCK_D": 128, "num_stages": 2}, {"BLOCK_D": 32, "num_stages": 4}, {"num_warps": 4})
MIX_CONFIGS = ({"BLOCK_K": 128, "num_stages": 2}, {"BLOCK_K": 32, "num_stages": 4}, {"num_warps": 4})
FUSED_CONFIGS = ({"BLOCK_V": 32, "num_stages": 2}, {"num_stages": 2})
FUSED_SLICES = 8  # column slices of a fused tile, one a warp: each is a product of its own (fewer repeat work)
FUSED_WIDTH = 1024  # widest embedding of the fused form
FUSED_TILE = 16 * FUSED_WIDTH  # elements of a tile of E: 32 KB of half-precision rows


def vocab_mixture_ref(h: Tensor, e_out: Tensor, e_in: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(h e_outᵀ / temperature) e_in in plain torch, at least float32 inside; builds the [M, V] matrix."""
    dtype = torch.promote_types(h.dtype, torch.float32)
    logits = (h.to(dtype) / temperature) @ e_out.to(dtype).T  # [M, V]
    return (logits.softmax(dim=-1) @ e_in.to(dtype)).to(h.dtype)


@triton.jit
def _rows_by_entries(
    x_ptr, e_ptr, offs_m, offs_v, mask_m, mask_v, D, stride_xm, stride_ev,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x eᵀ [BLOCK_M, BLOCK_V] in float32 for rows `offs_m` of x and `offs_v` of e, both D wide."""
    offs_d = tl.arange(0, BLOCK_D)
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_d[None, :]
    e_ptrs = e_ptr + offs_v[None, :] * stride_ev + offs_d[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for d in range(0, D, BLOCK_D):
        mask_d = offs_d < D - d
        x = tl.load(x_ptrs + d, mask=mask_m[:, None] & mask_d[None, :], other=0.0)  # [BM, BD]
        e = tl.load(e_ptrs + d, mask=mask_d[:, None] & mask_v[None, :], other=0.0)  # [BD, BV]
        acc = tl.dot(x, e, acc, input_precision="ieee")
    return acc


@triton.jit
def _vocab_mixture_fwd_probs_kernel(
    h_ptr, e_out_ptr, p_ptr, offset_ptr, sum_ptr, scale, M, V, D, v_begin,
    stride_hm, stride_ev, stride_pm, stride_om,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a tile [BLOCK_M, BLOCK_V] of logits: 2^(z - k), the offset k and the tile's row sums."""
    scale = tl.cast(scale, tl.float32)
    pid_m, pid_v = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_v = v_begin + offs_c
    mask_m, mask_v = offs_m < M, offs_v < V
    z = _rows_by_entries(
        h_ptr, e_out_ptr, offs_m, offs_v, mask_m, mask_v, D, stride_hm, stride_ev, BLOCK_M, BLOCK_V, BLOCK_D
    )
    z = tl.where(mask_v[None, :], z * scale, -float("inf"))
    offset = tl.ceil(tl.max(z, axis=1))  # [BM]
    p = tl.exp2(z - offset[:, None]).to(p_ptr.dtype.element_ty)
    p_ptrs = p_ptr + offs_m[:, None] * stride_pm + offs_c[None, :]
    tl.store(p_ptrs, p, mask=mask_m[:, None] & mask_v[None, :])
    tile_ptrs = offs_m * stride_om + v_begin // BLOCK_V + pid_v
    tl.store(offset_ptr + tile_ptrs, offset, mask=mask_m)
    tl.store(sum_ptr + tile_ptrs, tl.sum(p.to(tl.float32), axis=1), mask=mask_m)  # of what is mixed: S stays a mean


@triton.jit
def _row_offset(offset_ptrs, mask_m, first, last, start, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr):
    """Largest of `start` [BM] and a row's tile offsets [first, last)."""
    top = tl.full([BLOCK_M, BLOCK_T], -float("inf"), tl.float32)  # Triton 3.6 fails on a float32 reduction in the loop
    for t in range(first, last, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = mask_m[:, None] & (offs_t < last)[None, :]
        top = tl.maximum(top, tl.load(offset_ptrs[:, None] + offs_t[None, :], mask=mask, other=-float("inf")))
    return tl.maximum(start, tl.max(top, axis=1))


@triton.jit
def _vocab_mixture_mix_kernel(
    p_ptr, e_ptr, offset_ptr, partial_ptr, M, N, n_entries, first_tile, tiles_per_split,
    stride_pm, stride_ev, stride_om, stride_as, stride_am,
    HAS_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program adds its split of a chunk to a tile of partial[split], at the row's largest offset so far."""
    pid_n, pid_m = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask_out = mask_m[:, None] & mask_n[None, :]
    partial_ptrs = partial_ptr + split * stride_as + offs_m[:, None] * stride_am + offs_n[None, :]
    offset_ptrs = offset_ptr + offs_m * stride_om
    if HAS_OFFSET:
        before = tl.full([BLOCK_M], -float("inf"), tl.float32)
        before = _row_offset(offset_ptrs, mask_m, 0, first_tile, before, BLOCK_M, BLOCK_T)
        last_tile = first_tile + tl.cdiv(n_entries, BLOCK_V)
        now = _row_offset(offset_ptrs, mask_m, first_tile, last_tile, before, BLOCK_M, BLOCK_T)
        now = tl.where(mask_m, now, 0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if first_tile > 0:
        acc = tl.load(partial_ptrs, mask=mask_out, other=0.0)
        if HAS_OFFSET:
            acc = acc * tl.exp2(before - now)[:, None]
    begin = split * tiles_per_split * BLOCK_V
    end = tl.minimum(begin + tiles_per_split * BLOCK_V, n_entries)
    for k in range(begin, end, BLOCK_K):
        if HAS_OFFSET:  # before p: behind it, sm_90 takes 128 registers instead of 91 for few rows
            offset = tl.load(offset_ptrs + first_tile + k // BLOCK_V, mask=mask_m, other=0.0)
        mask_k = k + offs_k < end
        p_ptrs = p_ptr + offs_m[:, None] * stride_pm + (k + offs_k)[None, :]
        p = tl.load(p_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BM, BK]
        if HAS_OFFSET:
            p = (p * tl.exp2(offset - now)[:, None]).to(p_ptr.dtype.element_ty)  # a power of two: exact
        e_ptrs = e_ptr + (k + offs_k)[:, None] * stride_ev + offs_n[None, :]
        e = tl.load(e_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # [BK, BN]
        acc = tl.dot(p, e, acc, input_precision="ieee")
    tl.store(partial_ptrs, acc, mask=mask_out)


@triton.jit
def _vocab_mixture_merge_kernel(
    partial_ptr, offset_ptr, sum_ptr, s_ptr, lse_ptr, M, N, n_splits, n_tiles,
    stride_as, stride_am, stride_om, stride_sm,
    HAS_OFFSET: tl.constexpr, TILES_ARE_SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One program sums the splits of one row's BLOCK_N columns and, forward, divides by the sum of probabilities.

    The splits stand at one offset, or each at its own where TILES_ARE_SPLITS.
    """
    row, pid_n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if HAS_OFFSET:
        total = tl.zeros([BLOCK_T], tl.float32)
        top = tl.full([BLOCK_T], -float("inf"), tl.float32)
        for t in range(0, n_tiles, BLOCK_T):
            offs_t = t + tl.arange(0, BLOCK_T)
            offsets = tl.load(offset_ptr + row * stride_om + offs_t, mask=offs_t < n_tiles, other=-float("inf"))
            top = tl.maximum(top, offsets)
        offset = tl.max(top, axis=0)
        for t in range(0, n_tiles, BLOCK_T):
            offs_t = t + tl.arange(0, BLOCK_T)
            offsets = tl.load(offset_ptr + row * stride_om + offs_t, mask=offs_t < n_tiles, other=-float("inf"))
            sums = tl.load(sum_ptr + row * stride_om + offs_t, mask=offs_t < n_tiles, other=0.0)
            total += sums * tl.exp2(offsets - offset)
        denominator = tl.sum(total, axis=0)
        tl.store(lse_ptr + row, offset + tl.log2(denominator), mask=pid_n == 0)
    acc = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for split in range(0, n_splits, BLOCK_S):
        offs_s = (split + tl.arange(0, BLOCK_S)).to(tl.int64)
        mask_s = offs_s < n_splits
        partial_ptrs = partial_ptr + offs_s[:, None] * stride_as + row * stride_am + offs_n[None, :]
        partial = tl.load(partial_ptrs, mask=mask_s[:, None] & mask_n[None, :], other=0.0)
        if TILES_ARE_SPLITS:
            offsets = tl.load(offset_ptr + row * stride_om + offs_s, mask=mask_s, other=-float("inf"))
            partial = partial * tl.exp2(offsets - offset)[:, None]
        acc += partial
    out = tl.sum(acc, axis=0)
    if HAS_OFFSET:
        out = out / denominator
    tl.store(s_ptr + row * stride_sm + offs_n, out.to(s_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _vocab_mixture_bwd_logits_kernel(
    h_ptr, e_out_ptr, e_in_ptr, ds_ptr, lse_ptr, delta_ptr, dz_ptr, p_ptr,
    scale, inverse_temperature, M, V, D, DIN, v_begin,
    stride_hm, stride_ov, stride_iv, stride_sm, stride_zm,
    NEEDS_DZ: tl.constexpr, NEEDS_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program owns a tile [BLOCK_M, BLOCK_V] of dZ = P (dS E_inᵀ - delta) / T, and of P if dE_in needs it."""
    scale, inverse_temperature = tl.cast(scale, tl.float32), tl.cast(inverse_temperature, tl.float32)
    pid_m, pid_v = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_v = v_begin + offs_c
    mask_m, mask_v = offs_m < M, offs_v < V
    z = _rows_by_entries(
        h_ptr, e_out_ptr, offs_m, offs_v, mask_m, mask_v, D, stride_hm, stride_ov, BLOCK_M, BLOCK_V, BLOCK_D
    )
    lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=0.0)
    p = tl.exp2(z * scale - lse[:, None])
    out = offs_m[:, None] * stride_zm + offs_c[None, :]
    mask_out = mask_m[:, None] & mask_v[None, :]
    if NEEDS_P:
        tl.store(p_ptr + out, p.to(p_ptr.dtype.element_ty), mask=mask_out)
    if NEEDS_DZ:
        dp = _rows_by_entries(
            ds_ptr, e_in_ptr, offs_m, offs_v, mask_m, mask_v, DIN, stride_sm, stride_iv, BLOCK_M, BLOCK_V, BLOCK_D
        )
        delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
        dz = p * (dp - delta[:, None]) * inverse_temperature
        tl.store(dz_ptr + out, dz.to(dz_ptr.dtype.element_ty), mask=mask_out)


@triton.jit
def _vocab_mixture_fused_kernel(
    h_ptr, e_out_ptr, e_in_ptr, ds_ptr, lse_ptr, delta_ptr, partial_ptr, offset_ptr, sum_ptr,
    scale, inverse_temperature, M, V, D, DIN,
    stride_hm, stride_ov, stride_iv, stride_sm, stride_as, stride_am, stride_om,
    IS_BACKWARD: tl.constexpr, IS_TIED: tl.constexpr,
    SLICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program owns a split's tiles of the vocabulary for BLOCK_M rows: partial[split] of S, or of dh backward.

    Operands are [SLICES, rows, columns of a slice]: D = SLICES * BLOCK_D, Din = SLICES * BLOCK_N, less what is masked.
    Logits are [entries, rows], so that both products take E as it was loaded: one pipelined copy in shared memory.
    """
    scale, inverse_temperature = tl.cast(scale, tl.float32), tl.cast(inverse_temperature, tl.float32)
    pid_m, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_s = tl.arange(0, SLICES)[:, None, None]
    offs_d = offs_s * BLOCK_D + tl.arange(0, BLOCK_D)[None, None, :]  # [S, 1, BD]
    offs_n = offs_s * BLOCK_N + tl.arange(0, BLOCK_N)[None, None, :]  # [S, 1, BN]
    mask_m, mask_d, mask_n = offs_m < M, offs_d < D, offs_n < DIN
    rows, mask_rows = offs_m[None, :, None], mask_m[None, :, None]
    h = tl.load(h_ptr + rows * stride_hm + offs_d, mask=mask_rows & mask_d, other=0.0)
    h = tl.permute(h, (0, 2, 1))  # [S, BD, BM]
    if IS_BACKWARD:
        ds = tl.load(ds_ptr + rows * stride_sm + offs_n, mask=mask_rows & mask_n, other=0.0)
        ds = tl.permute(ds, (0, 2, 1))  # [S, BN, BM]
        lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=0.0)
        delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
        acc = tl.zeros([SLICES, BLOCK_M, BLOCK_D], tl.float32)
    else:
        offset = tl.full([BLOCK_M], -float("inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([SLICES, BLOCK_M, BLOCK_N], tl.float32)
    for tile_v in range(split, tl.cdiv(V, BLOCK_V), tl.num_programs(1)):
        offs_v = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        entries, mask_e = offs_v[None, :, None], mask_v[None, :, None]
        e_out = tl.load(e_out_ptr + entries * stride_ov + offs_d, mask=mask_e & mask_d, other=0.0)  # [S, BV, BD]
        if IS_TIED:  # noqa: SIM108 (a compile-time branch)
            e_in = e_out
        else:
            e_in = tl.load(e_in_ptr + entries * stride_iv + offs_n, mask=mask_e & mask_n, other=0.0)  # [S, BV, BN]
        z = tl.sum(tl.dot(e_out, h, input_precision="ieee"), axis=0) * scale  # [BV, BM]
        if IS_BACKWARD:
            dp = tl.sum(tl.dot(e_in, ds, input_precision="ieee"), axis=0)
            dz = tl.exp2(z - lse[None, :]) * (dp - delta[None, :]) * inverse_temperature
            factors = tl.broadcast_to(tl.trans(dz.to(h.dtype))[None, :, :], [SLICES, BLOCK_M, BLOCK_V])
            acc = tl.dot(factors, e_out, acc, input_precision="ieee")
        else:
            z = tl.where(mask_v[:, None], z, -float("inf"))
            before = offset
            offset = tl.maximum(before, tl.ceil(tl.max(z, axis=0)))
            shrink = tl.exp2(before - offset)
            acc = acc * shrink[None, :, None]
            p = tl.exp2(z - offset[None, :]).to(h.dtype)  # here, not before acc: of 32 rows something would spill
            total = total * shrink + tl.sum(p.to(tl.float32), axis=0)
            factors = tl.broadcast_to(tl.trans(p)[None, :, :], [SLICES, BLOCK_M, BLOCK_V])
            acc = tl.dot(factors, e_in, acc, input_precision="ieee")
    out_ptrs = partial_ptr + split * stride_as + rows * stride_am
    if IS_BACKWARD:
        tl.store(out_ptrs + offs_d, acc, mask=mask_rows & mask_d)
    else:
        tl.store(out_ptrs + offs_n, acc, mask=mask_rows & mask_n)
        tl.store(offset_ptr + offs_m * stride_om + split, offset, mask=mask_m)
        tl.store(sum_ptr + offs_m * stride_om + split, total, mask=mask_m)


def _fused_rows(h: Tensor, width_in: int, is_tied: bool, is_backward: bool) -> int:
    """BLOCK_M of the fused form, or 0 where the chunked form runs.

    Fused are half-precision rows, embeddings up to FUSED_WIDTH wide, as many rows as two blocks hold: 64 of tied
    embeddings forward, 32 of others and backward above 512 columns; 64 of all below. A chip with 64 KB of shared memory
    goes by the backward limits.
    """
    width = max(tile(h.shape[1], 128, FUSED_WIDTH), tile(width_in, 128, FUSED_WIDTH))
    is_small = is_backward or not is_tied or not generation(h.device)
    block_m = min(tile(h.shape[0], 16, 32), 32 * (512 if is_small else 1024) // width)
    fits = h.element_size() == 2 and max(h.shape[1], width_in) <= FUSED_WIDTH and h.shape[0] <= 2 * block_m
    return block_m if fits else 0


def _chunk(n_rows: int, n_entries: int) -> int:
    """Vocabulary entries a chunk: a multiple of BLOCK_V within CHUNK, CHUNK_ELEMENTS and the vocabulary."""
    entries = min(CHUNK, CHUNK_ELEMENTS // n_rows, triton.cdiv(n_entries, BLOCK_V) * BLOCK_V)
    return max(BLOCK_V, entries // BLOCK_V * BLOCK_V)


def _splits(n_rows: int, width: int, n_tiles: int) -> int:
    """How many programs share the entries of one output tile in `_vocab_mixture_mix_kernel`."""
    output_tiles = triton.cdiv(n_rows, tile(n_rows, 16, 128)) * triton.cdiv(width, tile(width, 16, 128))
    return max(1, min(PROGRAMS // output_tiles, n_tiles // 2))


def _mix(p: Tensor, e: Tensor, partial: Tensor, first_tile: int, offset: Tensor | None = None) -> None:
    """partial [splits, M, N] += p [M, C] e [C, N], split over C; the first chunk writes without reading."""
    n_splits, M, N = partial.shape
    block_m, block_n = tile(M, 16, 128), tile(N, 16, 128)
    wrap_triton(_vocab_mixture_mix_kernel, MIX_CONFIGS, updates="partial_ptr")[
        (triton.cdiv(N, block_n), triton.cdiv(M, block_m), n_splits)
    ](
        p_ptr=p, e_ptr=e, offset_ptr=p if offset is None else offset, partial_ptr=partial,
        M=M, N=N, n_entries=e.shape[0], first_tile=first_tile,
        tiles_per_split=triton.cdiv(triton.cdiv(e.shape[0], BLOCK_V), n_splits),
        stride_pm=p.stride(0), stride_ev=e.stride(0), stride_om=0 if offset is None else offset.stride(0),
        stride_as=partial.stride(0), stride_am=partial.stride(1),
        HAS_OFFSET=offset is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=64 if p.element_size() == 2 else 32, BLOCK_V=BLOCK_V, BLOCK_T=32,
        num_warps=8 if block_m == 128 else 4, num_stages=3 if generation(p.device) else 1,
    )  # fmt: skip


def _merge(
    partial: Tensor, out: Tensor, lse: Tensor | None = None, offset: Tensor | None = None,
    sums: Tensor | None = None, tiles_are_splits: bool = False,
) -> None:  # fmt: skip
    """out [M, N] = the sum of the splits, divided by the sum of probabilities where offsets are given."""
    n_splits, M, N = partial.shape
    block_n = tile(N, 16, 128)
    wrap_triton(_vocab_mixture_merge_kernel)[(M, triton.cdiv(N, block_n))](
        partial_ptr=partial, offset_ptr=partial if offset is None else offset,
        sum_ptr=partial if sums is None else sums, s_ptr=out, lse_ptr=partial if lse is None else lse,
        M=M, N=N, n_splits=n_splits, n_tiles=0 if offset is None else offset.shape[1],
        stride_as=partial.stride(0), stride_am=partial.stride(1),
        stride_om=0 if offset is None else offset.stride(0), stride_sm=out.stride(0),
        HAS_OFFSET=offset is not None, TILES_ARE_SPLITS=tiles_are_splits,
        BLOCK_S=tile(n_splits, 1, 32), BLOCK_N=block_n, BLOCK_T=256, num_warps=4,
    )  # fmt: skip


def _fused(
    h: Tensor, e_out: Tensor, e_in: Tensor, temperature: float, is_tied: bool, block_m: int,
    out: Tensor, lse: Tensor, ds: Tensor | None = None, delta: Tensor | None = None,
) -> None:  # fmt: skip
    """out = S, and lse with it; or out = dh where `ds` and `delta` are given."""
    (M, D), (V, Din) = h.shape, e_in.shape
    width_out, width_in = tile(D, 128, FUSED_WIDTH), tile(Din, 128, FUSED_WIDTH)
    block_v = min(512 // block_m, FUSED_TILE // max(width_out, width_in))
    n_blocks = triton.cdiv(M, block_m)
    n_splits = max(1, min(16 * PROGRAMS // (n_blocks * block_m), triton.cdiv(V, block_v)))
    partial = h.new_empty(n_splits, M, out.shape[1], dtype=torch.float32)
    offset, sums = h.new_empty(M, n_splits, dtype=torch.float32), h.new_empty(M, n_splits, dtype=torch.float32)
    chip = generation(h.device)
    wrap_triton(_vocab_mixture_fused_kernel, FUSED_CONFIGS)[(n_blocks, n_splits)](
        h_ptr=h, e_out_ptr=e_out, e_in_ptr=e_in, ds_ptr=h if ds is None else ds, lse_ptr=lse,
        delta_ptr=lse if delta is None else delta, partial_ptr=partial, offset_ptr=offset, sum_ptr=sums,
        scale=LOG2E / temperature, inverse_temperature=1.0 / temperature, M=M, V=V, D=D, DIN=Din,
        stride_hm=h.stride(0), stride_ov=e_out.stride(0), stride_iv=e_in.stride(0),
        stride_sm=0 if ds is None else ds.stride(0), stride_as=partial.stride(0), stride_am=partial.stride(1),
        stride_om=offset.stride(0),
        IS_BACKWARD=ds is not None, IS_TIED=is_tied,
        SLICES=FUSED_SLICES, BLOCK_M=block_m, BLOCK_V=block_v, BLOCK_D=width_out // FUSED_SLICES,
        BLOCK_N=width_in // FUSED_SLICES,
        num_warps=FUSED_SLICES, num_stages=1 if chip == 0 else 3 if is_tied or chip > 8 else 2,
    )  # fmt: skip
    if ds is None:
        _merge(partial, out, lse, offset, sums, tiles_are_splits=True)
    else:
        _merge(partial, out)


@triton_op("pe::vocab_mixture_fwd")
def _vocab_mixture_fwd(
    h: Tensor, e_out: Tensor, e_in: Tensor, temperature: float, is_tied: bool
) -> tuple[Tensor, Tensor]:
    """S [M, Din] and the base-2 log-sum-exp of the scaled logits, [M], both float32."""
    (M, D), (V, Din) = h.shape, e_in.shape
    out, lse = h.new_empty(M, Din, dtype=torch.float32), h.new_empty(M, dtype=torch.float32)
    if M == 0:
        return out, lse
    if fused_rows := _fused_rows(h, Din, is_tied, is_backward=False):
        _fused(h, e_out, e_in, temperature, is_tied, fused_rows, out, lse)
        return out, lse
    chunk, n_tiles = _chunk(M, V), triton.cdiv(V, BLOCK_V)
    p = h.new_empty(M, chunk)
    offset, sums = h.new_empty(M, n_tiles, dtype=torch.float32), h.new_empty(M, n_tiles, dtype=torch.float32)
    partial = h.new_empty(_splits(M, Din, chunk // BLOCK_V), M, Din, dtype=torch.float32)
    block_m = tile(M, 16, 128)
    for v in range(0, V, chunk):
        size = min(chunk, V - v)
        wrap_triton(_vocab_mixture_fwd_probs_kernel, LOGITS_CONFIGS)[
            (triton.cdiv(size, BLOCK_V), triton.cdiv(M, block_m))
        ](
            h_ptr=h, e_out_ptr=e_out, p_ptr=p, offset_ptr=offset, sum_ptr=sums,
            scale=LOG2E / temperature, M=M, V=V, D=D, v_begin=v,
            stride_hm=h.stride(0), stride_ev=e_out.stride(0), stride_pm=p.stride(0), stride_om=offset.stride(0),
            BLOCK_M=block_m, BLOCK_V=BLOCK_V, BLOCK_D=64 if h.element_size() == 2 else 32,
            num_warps=8 if block_m == 128 else 4, num_stages=3 if generation(h.device) else 1,
        )  # fmt: skip
        _mix(p, e_in[v : v + size], partial, v // BLOCK_V, offset)
    _merge(partial, out, lse, offset, sums)
    return out, lse


@triton_op("pe::vocab_mixture_bwd")
def _vocab_mixture_bwd(
    ds: Tensor, h: Tensor, e_out: Tensor, e_in: Tensor, s: Tensor, lse: Tensor,
    temperature: float, is_tied: bool, needs_h: bool, needs_out: bool, needs_in: bool, scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dh [M, D] float32, dE_out and dE_in, times `scale` [1]; an empty tensor for each that is not asked for."""
    (M, D), (V, Din) = h.shape, e_in.shape
    dh = h.new_empty(M, D, dtype=torch.float32) if needs_h else h.new_empty(0)
    de_out = torch.zeros_like(e_out, memory_format=torch.contiguous_format) if needs_out else h.new_empty(0)
    de_in = torch.zeros_like(e_in, memory_format=torch.contiguous_format) if needs_in else h.new_empty(0)
    if M == 0:
        return dh, de_out, de_in
    delta = (ds.float() * s).sum(dim=1)
    fused_rows = _fused_rows(h, Din, is_tied, is_backward=True)
    if fused_rows and needs_h and not (needs_out or needs_in):
        _fused(h, e_out, e_in, temperature, is_tied, fused_rows, dh, lse, ds=ds, delta=delta)
        return dh if scale is None else dh * scale, de_out, de_in
    chunk, needs_dz = _chunk(M, V), needs_h or needs_out
    dz = h.new_empty(M, chunk) if needs_dz else h
    p = h.new_empty(M, chunk) if needs_in else h
    n_splits = _splits(M, D, chunk // BLOCK_V)
    partial = h.new_empty(n_splits, M, D, dtype=torch.float32) if needs_h else h
    block_m = tile(M, 16, 128)
    for v in range(0, V, chunk):
        size = min(chunk, V - v)
        wrap_triton(_vocab_mixture_bwd_logits_kernel, LOGITS_CONFIGS)[
            (triton.cdiv(size, BLOCK_V), triton.cdiv(M, block_m))
        ](
            h_ptr=h, e_out_ptr=e_out, e_in_ptr=e_in, ds_ptr=ds, lse_ptr=lse, delta_ptr=delta, dz_ptr=dz, p_ptr=p,
            scale=LOG2E / temperature, inverse_temperature=1.0 / temperature, M=M, V=V, D=D, DIN=Din, v_begin=v,
            stride_hm=h.stride(0), stride_ov=e_out.stride(0), stride_iv=e_in.stride(0),
            stride_sm=ds.stride(0), stride_zm=chunk,
            NEEDS_DZ=needs_dz, NEEDS_P=needs_in,
            BLOCK_M=block_m, BLOCK_V=BLOCK_V, BLOCK_D=64 if h.element_size() == 2 else 32,
            num_warps=8 if block_m == 128 else 4, num_stages=3 if generation(h.device) else 1,
        )  # fmt: skip
        if needs_h:
            _mix(dz, e_out[v : v + size], partial, v // BLOCK_V)
        if needs_out:
            matmul_into(de_out, dz[:, :size].T, h, first_row=v, scale=scale)
        if needs_in:
            matmul_into(de_in, p[:, :size].T, ds, first_row=v, scale=scale)
    if needs_h:
        _merge(partial, dh)
    return dh if scale is None else dh * scale, de_out, de_in


def _gradient_scale(ds: Tensor) -> Tensor:
    """Power of two `[1]` float32 that brings the largest of ds into (4, 8], so that P (dP - delta) does not underflow.

    Not a scalar tensor, which a product on a GPU would take to ds's type, where it may be infinite.
    """
    top = ds.abs().amax().float()[None]
    return torch.where((top > 0) & top.isfinite(), torch.exp2(3 - torch.ceil(torch.log2(top))), 1.0)


class _VocabMixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, h: Tensor, e_out: Tensor, e_in: Tensor, temperature: float, is_tied: bool) -> Tensor:
        s, lse = _vocab_mixture_fwd(h, e_out, e_in, temperature, is_tied)
        ctx.save_for_backward(h, e_out, e_in, s, lse)
        ctx.temperature, ctx.is_tied = temperature, is_tied
        return s.to(h.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, ds: Tensor) -> tuple[Tensor | None, ...]:
        h, e_out, e_in, s, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        scale = None
        if ds.dtype == torch.float16 and ds.numel():
            factor = _gradient_scale(ds)
            ds, scale = (ds.float() * factor).to(ds.dtype), 1 / factor
        own = ds.contiguous(), h, e_out, e_in, s, lse
        dh, de_out, de_in = _vocab_mixture_bwd(*own, ctx.temperature, ctx.is_tied, *needs, scale)
        grads = dh.to(h.dtype), de_out, de_in
        return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None


def vocab_mixture(h: Tensor, e_out: Tensor, e_in: Tensor, temperature: float = 1.0, *, impl: Impl = "auto") -> Tensor:
    """Mix the rows of `e_in` with the probabilities softmax(h e_outᵀ / temperature).

    h [M, D], e_out [V, D], e_in [V, Din], one floating dtype -> [M, Din] in that dtype. Differentiable in all three.

    Pass one tensor as `e_out` and `e_in` where embeddings are tied: the fused form then reads it once.
    Raises ValueError on shapes, dtypes or devices that do not fit and on a temperature that is not positive.
    """
    require_float("h", h, 2)
    require_float("e_out", e_out, 2)
    require_float("e_in", e_in, 2)
    require(e_out.shape[1] == h.shape[1], "e_out", f"shape [V, {h.shape[1]}]", e_out.shape)
    require(e_out.shape[0] >= 1, "e_out", "at least one vocabulary entry", e_out.shape)
    require(e_in.shape[0] == e_out.shape[0], "e_in", f"shape [{e_out.shape[0]}, Din]", e_in.shape)
    require(e_out.dtype == h.dtype, "e_out", f"h's dtype {h.dtype}", e_out.dtype)
    require(e_in.dtype == h.dtype, "e_in", f"h's dtype {h.dtype}", e_in.dtype)
    require_same_device("e_out", e_out, h.device)
    require_same_device("e_in", e_in, h.device)
    require(temperature > 0, "temperature", "a number > 0", temperature)
    if use_triton(impl, h):
        tensors = distinct(unit_stride(h), unit_stride(e_out), unit_stride(e_in))
        return _VocabMixture.apply(*tensors, float(temperature), e_in is e_out)
    return vocab_mixture_ref(h, e_out, e_in, temperature)

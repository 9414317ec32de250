"""What `bench.kernels` times: the five ops at the sizes they have in training, and who else computes the same.

Every op has a function that builds its problem from sizes: inputs, our op, its reference, peers, and the bytes and
FLOPs of a pass. Costs count each operand once, and the FLOPs of an algorithm that keeps no matrix of scores or
probabilities, so it computes that matrix again backward.

Peers are only what computes the same function; a check against the reference stands before every figure. Liger has no
row for `info_nce` and cut-cross-entropy none where documents are masked. Inf-CL (arXiv 2410.17243) publishes figures of
whole trainings alone, which the page cites, so it has no row.

Legend: s bytes of an element; the rest as in the kernels' files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.roofline import Cost
from pe.kernels.context_attention import context_attention
from pe.kernels.context_attention_torch import context_attention_ref
from pe.kernels.info_nce import info_nce, info_nce_ref
from pe.kernels.pool_normalize import Norm, pool_normalize, pool_normalize_ref
from pe.kernels.prompt_rows import prompt_rows, prompt_rows_ref
from pe.kernels.vocab_mixture import vocab_mixture, vocab_mixture_ref
from pe.method.flash import PACKAGES, Attend, package_attention, torch_attention

TEMPERATURE = 1 / 32  # a power of two: peers take q / temperature, which is exact then
EPS = 1e-6
VARLEN, FLEX, LIGER = "flash varlen", "FlexAttention", "Liger RMSNorm, torch pooling"
FLASH = tuple(PACKAGES)
CUT, CHUNKED = "cut-cross-entropy, exact", "torch chunked linear_cross_entropy"
PEERS = (VARLEN, *FLASH, FLEX, LIGER, CUT, CHUNKED)

Sizes = Mapping[str, int]
Tensors = tuple[Tensor, ...]
Run = Callable[..., Tensor]


def as_given(*inputs: Tensor) -> Tensors:
    return inputs


@dataclass(frozen=True)
class Way:
    """One implementation.

    Attributes:
        run: from its own inputs to the op's output.
        arrange: from the op's inputs to its own; neither its time nor its memory is charged.
    """

    run: Run
    arrange: Callable[..., Tensors] = as_given


@dataclass(frozen=True, kw_only=True)
class Problem:
    """An op on inputs.

    Attributes:
        inputs: floating-point tensors; those that require grad get one.
        ours: the op, with `impl`.
        reference: plain torch, from the op's file.
        forward, backward: what a pass costs at least.
        peers: others that compute the same, imported when they are asked for.
    """

    inputs: Tensors
    ours: Run
    reference: Run
    forward: Cost
    backward: Cost
    peers: Mapping[str, Callable[[], Way]] = field(default_factory=dict)


Build = Callable[[Sizes, torch.dtype, torch.device], Problem]


def mixture(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """A tied, frozen vocabulary: E is read once in each direction."""
    m, v, d = sizes["M"], sizes["V"], sizes["D"]
    h = torch.randn(m, d, device=device, dtype=dtype).requires_grad_()
    e = torch.randn(v, d, device=device, dtype=dtype) * (2 * d**-0.5)
    table, rows = nbytes(e), nbytes(h)
    return Problem(
        inputs=(h, e),
        ours=lambda h, e, impl: vocab_mixture(h, e, e, impl=impl),
        reference=lambda h, e: vocab_mixture_ref(h, e, e),
        forward=Cost(table + 2 * rows, 4 * m * v * d),
        backward=Cost(table + 4 * rows, 6 * m * v * d),
    )


def rows(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    """B texts of L rows, the last K of each a soft prompt, one of N."""
    b, length, n, k = sizes["B"], sizes["L"], sizes["N"], sizes["K"]
    v, de, dp = sizes["V"], sizes["De"], sizes["Dp"]
    ids = torch.randint(v, (b, length), device=device)
    prompt = torch.arange(b, device=device) % n
    ids[:, length - k :] = -1 - (prompt[:, None] * k + torch.arange(k, device=device))
    ids = ids.flatten()
    embedding = torch.randn(v, de, device=device, dtype=dtype)
    prompts = torch.randn(n, k, dp, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(dp, de, device=device, dtype=dtype) * dp**-0.5).requires_grad_()
    row, matrix, soft = de * dtype.itemsize, nbytes(weight), nbytes(prompts)
    return Problem(
        inputs=(embedding, prompts, weight),
        ours=lambda e, p, w, impl: prompt_rows(ids, e, p, w, impl=impl),
        reference=lambda e, p, w: prompt_rows_ref(ids, e, p, w, scale=1.0),
        forward=Cost(nbytes(ids) + (2 * length - k) * b * row + matrix + soft, 2 * n * k * dp * de),
        backward=Cost(nbytes(ids) + b * k * row + 2 * matrix + 2 * soft, 4 * n * k * dp * de),
    )


def attention(context_grad: bool) -> Build:
    """B texts of L own tokens, each behind one of N contexts of C tokens, N == B or shared; all of equal length."""

    def build(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
        b, length, n, before = sizes["B"], sizes["L"], sizes["N"], sizes["C"]
        h, hkv, d = sizes["H"], sizes["Hkv"], sizes["D"]
        q = torch.randn(b * length, h, d, device=device, dtype=dtype).requires_grad_()
        k, v = (torch.randn(b * length, hkv, d, device=device, dtype=dtype).requires_grad_() for _ in range(2))
        contexts = [torch.randn(n * before, hkv, d, device=device, dtype=dtype) for _ in range(2)]
        context_k, context_v = (x.requires_grad_(context_grad) for x in contexts)
        cu = offsets(b, length, device)
        segment = torch.arange(b, device=device) * n // b
        placed: dict[str, Any] = {
            "cu_seqlens": cu,
            "max_seqlen": length,
            "cu_context": offsets(n, before, device),
            "max_context": before,
            "context_index": None if n == b else segment,
        }

        def whole(own: Tensor, context: Tensor) -> Tensor:
            """Context and own tokens of each text, `[B, C + L, Hkv, D]`."""
            return torch.cat([context.unflatten(0, (n, before))[segment], own.unflatten(0, (b, length))], dim=1)

        def packed(q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor) -> Tensors:
            return q, whole(k, context_k).flatten(0, 1), whole(v, context_v).flatten(0, 1)

        def batched(q: Tensor, k: Tensor, v: Tensor, context_k: Tensor, context_v: Tensor) -> Tensors:
            queries = q.unflatten(0, (b, length))
            return tuple(x.transpose(1, 2) for x in (queries, whole(k, context_k), whole(v, context_v)))

        def flash(attend: Attend) -> Way:
            cu_whole, total = offsets(b, before + length, device), before + length

            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return attend(q, k, v, cu, cu_whole, length, total, scale=None)

            return Way(run, packed)

        def package(name: str) -> Way:
            return flash(package_attention(name))

        def flex() -> Way:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                return key <= query + before

            mask = create_block_mask(sees, None, None, length, before + length, device=device)
            attend = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

            def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                attended = attend(q, k, v, block_mask=mask, enable_gqa=True)
                assert isinstance(attended, Tensor)
                return attended.transpose(1, 2).flatten(0, 1)

            return Way(run, batched)

        own_pairs, context_pairs = b * h * length * (length + 1) // 2, b * h * length * before
        queries, own, context = nbytes(q), 2 * nbytes(k), 2 * nbytes(context_k)
        again = 10 if context_grad else 6  # scores, dP and dq, and with gradients to the context dK and dV
        return Problem(
            inputs=(q, k, v, context_k, context_v),
            ours=lambda *x, impl: context_attention(*x[:3], context_k=x[3], context_v=x[4], impl=impl, **placed),
            reference=lambda *x: context_attention_ref(*x[:3], context_k=x[3], context_v=x[4], **placed),
            forward=Cost(2 * queries + own + context, 4 * d * (own_pairs + context_pairs)),
            backward=Cost(
                4 * queries + 2 * own + (2 if context_grad else 1) * context,
                d * (10 * own_pairs + again * context_pairs),
            ),
            peers={
                VARLEN: lambda: flash(torch_attention),
                **{name: functools.partial(package, name) for name in FLASH},
                FLEX: flex,
            },
        )

    return build


def pooling(norm: Norm) -> Build:
    """B segments of L rows, their mean."""

    def build(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
        b, length, d = sizes["B"], sizes["L"], sizes["D"]
        h = torch.randn(b * length, d, device=device, dtype=dtype).requires_grad_()
        weight = torch.randn(d, device=device, dtype=dtype) if norm == "rms" else None
        cu = offsets(b, length, device)

        def liger() -> Way:
            from liger_kernel.transformers.functional import liger_rms_norm

            return Way(lambda h: pool_normalize_ref(liger_rms_norm(h, weight, EPS), cu))

        pooled, per_value = 4 * b * d, 6 if norm == "rms" else 2
        return Problem(
            inputs=(h,),
            ours=lambda h, impl: pool_normalize(h, cu, norm=norm, weight=weight, eps=EPS, impl=impl),
            reference=lambda h: pool_normalize_ref(h, cu, norm=norm, weight=weight, eps=EPS),
            forward=Cost(nbytes(h) + pooled, per_value * h.numel()),
            backward=Cost((2 if norm == "rms" else 1) * nbytes(h) + 2 * pooled, per_value * h.numel()),
            peers={LIGER: liger} if norm == "rms" else {},
        )

    return build


def contrast(masked: bool) -> Build:
    """B queries, N documents, the first B of them the positives; with `masked` duplicates are left out by their ids."""

    def build(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
        b, n, d = sizes["B"], sizes["N"], sizes["D"]
        q, docs = (F.normalize(torch.randn(count, d, device=device), dim=1).to(dtype) for count in (b, n))
        positive = torch.arange(b, device=device)
        query_ids, doc_ids = (torch.randint(n, (count,), device=device) if masked else None for count in (b, n))

        def scaled(q: Tensor, d: Tensor) -> Tensors:
            return q / TEMPERATURE, d

        def cut() -> Way:
            from cut_cross_entropy import linear_cross_entropy

            return Way(lambda q, d: linear_cross_entropy(q, d, positive, filter_eps=None), scaled)

        def chunked() -> Way:
            from torch.nn import LinearCrossEntropyOptions
            from torch.nn.functional import linear_cross_entropy

            options = LinearCrossEntropyOptions()
            return Way(lambda q, d: linear_cross_entropy(q, d, positive, options=options), scaled)

        operands = nbytes(q) + nbytes(docs)
        return Problem(
            inputs=(q.requires_grad_(), docs.requires_grad_()),
            ours=lambda q, d, impl: info_nce(
                q, d, positive, temperature=TEMPERATURE, query_ids=query_ids, doc_ids=doc_ids, impl=impl
            ),
            reference=lambda q, d: info_nce_ref(
                q, d, positive, temperature=TEMPERATURE, query_ids=query_ids, doc_ids=doc_ids
            ),
            forward=Cost(operands, 2 * b * n * d),
            backward=Cost(2 * operands, 6 * b * n * d),
            peers={} if masked else {CUT: cut, CHUNKED: chunked},
        )

    return build


def nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def offsets(count: int, length: int, device: torch.device) -> Tensor:
    """`cu_seqlens` of `count` segments of equal length."""
    return torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op at sizes.

    Attributes:
        toy: sizes of the same form for a CPU.
        quick: whether `--quick` has it.
    """

    op: str
    name: str
    build: Build
    sizes: Sizes
    toy: Sizes
    quick: bool = False


QWEN3 = {"V": 151_936, "De": 4096, "Dp": 1024, "K": 5}
HEADS = {"H": 32, "Hkv": 8, "D": 128}
TOY_ROWS = {"V": 30, "De": 20, "Dp": 12, "K": 2}
TOY_HEADS = {"H": 4, "Hkv": 2, "D": 16}

CASES = (
    *(
        Case(
            op="vocab_mixture",
            name=f"{m} rows",
            build=mixture,
            sizes={"M": m, "V": 151_936, "D": 1024},
            toy={"M": 3, "V": 200, "D": 16},
            quick=m in (64, 1024),
        )
        for m in (5, 64, 256, 1024)
    ),
    Case(
        op="prompt_rows",
        name="suffix, one prompt a text",
        build=rows,
        sizes={"B": 2048, "L": 5, "N": 2048, **QWEN3},
        toy={"B": 3, "L": 2, "N": 3, **TOY_ROWS},
        quick=True,
    ),
    Case(
        op="prompt_rows",
        name="prefix, two shared prompts",
        build=rows,
        sizes={"B": 512, "L": 32, "N": 2, **QWEN3},
        toy={"B": 4, "L": 7, "N": 2, **TOY_ROWS},
        quick=True,
    ),
    *(
        Case(
            op="context_attention",
            name=f"suffix, {b} texts of {c}",
            build=attention(context_grad=False),
            sizes={"B": b, "L": 5, "N": b, "C": c, **HEADS},
            toy={"B": 4, "L": 3, "N": 4, "C": 9, **TOY_HEADS},
            quick=c == 512,
        )
        for b, c in ((1024, 128), (256, 512), (32, 4096))
    ),
    *(
        Case(
            op="context_attention",
            name=f"prefix, {b} texts of {length}",
            build=attention(context_grad=True),
            sizes={"B": b, "L": length, "N": 4, "C": 64, **HEADS},
            toy={"B": 4, "L": 6, "N": 2, "C": 5, **TOY_HEADS},
            quick=length == 256,
        )
        for b, length in ((512, 128), (256, 256), (64, 1024))
    ),
    Case(
        op="pool_normalize",
        name="RMSNorm, 32 texts of 512",
        build=pooling("rms"),
        sizes={"B": 32, "L": 512, "D": 4096},
        toy={"B": 3, "L": 5, "D": 24},
        quick=True,
    ),
    Case(
        op="pool_normalize",
        name="no norm, 32 texts of 512",
        build=pooling("none"),
        sizes={"B": 32, "L": 512, "D": 4096},
        toy={"B": 3, "L": 5, "D": 24},
    ),
    Case(
        op="pool_normalize",
        name="no norm, 3276 prompts of 5",
        build=pooling("none"),
        sizes={"B": 3276, "L": 5, "D": 4096},
        toy={"B": 3, "L": 5, "D": 24},
        quick=True,
    ),
    *(
        Case(
            op="info_nce",
            name=f"{b:,} pairs{', duplicates masked' if masked else ''}",
            build=contrast(masked),
            sizes={"B": b, "N": b, "D": 4096},
            toy={"B": 6, "N": 9, "D": 24},
            quick=not masked and b in (4096, 16384),
        )
        for b, masked in ((4096, False), (4096, True), (8192, False), (16384, False), (32768, False))
    ),
)
OPS = tuple(dict.fromkeys(case.op for case in CASES))

"""One problem a form of each op: inputs that require grad and a function of them. Small for the interpreter, large for
a GPU; both are ragged, hold an empty segment, are no power of two and span several blocks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pe.kernels.context_attention import context_attention
from pe.kernels.info_nce import info_nce
from pe.kernels.pool_normalize import pool_normalize
from pe.kernels.prompt_rows import prompt_rows
from pe.kernels.vocab_mixture import vocab_mixture


@dataclass(frozen=True)
class Problem:
    inputs: tuple[Tensor, ...]
    run: Callable[[Sequence[Tensor], Any], Tensor]


Build = Callable[[torch.dtype, str, bool], Problem]


def offsets(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def leaf(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()


def mixture(
    rows: tuple[int, int], vocabulary: tuple[int, int], width: tuple[int, int], tied: bool, frozen: bool = False
) -> Build:
    def build(dtype: torch.dtype, device: str, large: bool) -> Problem:
        m, v, d = rows[large], vocabulary[large], width[large]
        h = leaf(m, d, dtype=dtype, device=device)
        e_out = leaf(v, d, dtype=dtype, device=device, scale=2 * d**-0.5)
        if frozen:
            entries = {kind: e_out.detach().to(kind) for kind in (dtype, torch.float64)}

            def run(x: Sequence[Tensor], impl: Any) -> Tensor:
                e = entries[x[0].dtype]
                return vocab_mixture(x[0], e, e, 0.8, impl=impl)

            return Problem((h,), run)
        if tied:
            return Problem((h, e_out), lambda x, impl: vocab_mixture(x[0], x[1], x[1], 0.8, impl=impl))
        e_in = leaf(v, d // 2 + 3, dtype=dtype, device=device)
        return Problem((h, e_out, e_in), lambda x, impl: vocab_mixture(*x, 0.8, impl=impl))

    return build


def rows(aligned: bool) -> Build:
    def build(dtype: torch.dtype, device: str, large: bool) -> Problem:
        t, v, de, n, k, dp = (5003, 4000, 1096, 61, 5, 520) if large else (45, 20, 40, 3, 2, 24)
        ids = torch.randint(-n * k, v, (t,), device=device)
        ids[::3] = -1  # one soft row that many positions use
        embedding = leaf(v, de, dtype=dtype, device=device).detach()
        prompts = leaf(n, k, dp if aligned else de, dtype=dtype, device=device)

        def run(x: Sequence[Tensor], impl: Any) -> Tensor:
            weight = x[1] if aligned else None
            return prompt_rows(ids, embedding.to(x[0].dtype), x[0], weight, scale=1.5, impl=impl)

        weight = (leaf(dp, de, dtype=dtype, device=device, scale=dp**-0.5),) if aligned else ()
        return Problem((prompts, *weight), run)

    return build


def attention(
    lengths: tuple[int, ...],
    contexts: tuple[int, ...],
    index: tuple[int, ...] | None = None,
    heads: tuple[int, int] = (4, 2),
    widths: tuple[int, int] = (16, 16),
    sinks: bool = False,
    **options: Any,
) -> Build:
    def build(dtype: torch.dtype, device: str, large: bool) -> Problem:
        factor, (d, dv), (h, hkv) = (11, (128, 128), (16, 4)) if large else (1, widths, heads)
        own, context = [n * factor for n in lengths], [n * factor for n in contexts]
        shapes = [(sum(own), h, d), (sum(own), hkv, d), (sum(own), hkv, dv)]
        shapes += [(sum(context), hkv, d), (sum(context), hkv, dv)] if contexts else []
        shapes += [(h,)] if sinks else []
        cu = offsets(own, device)
        fixed: dict[str, Any] = dict(options, max_seqlen=max(own))
        if contexts:
            fixed |= {"cu_context": offsets(context, device), "max_context": max(context)}
        if index is not None:
            fixed["context_index"] = torch.tensor(index, device=device)

        def run(x: Sequence[Tensor], impl: Any) -> Tensor:
            given = {"context_k": x[3], "context_v": x[4]} if contexts else {}
            return context_attention(*x[:3], cu, **given, sinks=x[-1] if sinks else None, impl=impl, **fixed)

        return Problem(tuple(leaf(*shape, dtype=dtype, device=device) for shape in shapes), run)

    return build


def pooling(mode: str, norm: str, normalize: bool = True, weights_alone: bool = False) -> Build:
    def build(dtype: torch.dtype, device: str, large: bool) -> Problem:
        lengths, d = ([300, 0, 1, 2900, 17] * 9, 1100) if large else ([3, 0, 1, 29], 40)
        h, cu = leaf(sum(lengths), d, dtype=dtype, device=device), offsets(lengths, device)
        weight = torch.randn(d, device=device) if norm != "none" else None
        bias = torch.randn(d, device=device) if norm == "layer" else None
        options: Any = {"mode": mode, "norm": norm, "weight": weight, "bias": bias, "normalize": normalize}
        if mode != "weighted":
            return Problem((h,), lambda x, impl: pool_normalize(x[0], cu, **options, impl=impl))
        tokens = torch.rand(sum(lengths), device=device)
        tokens[::4] = 0  # rows that are left out
        inputs = (h.detach() if weights_alone else h, tokens.to(dtype).requires_grad_())
        return Problem(inputs, lambda x, impl: pool_normalize(x[0], cu, token_weights=x[1], **options, impl=impl))

    return build


def contrast(masked: bool) -> Build:
    def build(dtype: torch.dtype, device: str, large: bool) -> Problem:
        b, n, d = (1031, 3000, 520) if large else (37, 150, 24)
        q, docs = (F.normalize(torch.randn(size, d, device=device), dim=1).to(dtype) for size in (b, n))
        positive = torch.randint(0, n, (b,), device=device)
        options: dict[str, Any] = {"temperature": 0.05}
        if masked:
            options |= {name: torch.randint(0, n, (size,), device=device) for name, size in
                        (("query_ids", b), ("doc_ids", n))}  # fmt: skip
            options |= {name: torch.randint(-2, 9, (size,), device=device) for name, size in
                        (("query_labels", b), ("doc_labels", n))}  # fmt: skip
        return Problem(
            (q.requires_grad_(), docs.requires_grad_()), lambda x, impl: info_nce(*x, positive, impl=impl, **options)
        )

    return build


PROBLEMS: dict[str, Build] = {
    "mixture untied": mixture((5, 300), (300, 20011), (24, 520), tied=False),
    "mixture tied": mixture((35, 70), (300, 9001), (40, 1096), tied=True),
    "mixture few rows": mixture((19, 61), (300, 20011), (40, 896), tied=True, frozen=True),
    "rows aligned": rows(aligned=True),
    "rows copied": rows(aligned=False),
    "attention suffix": attention((3, 0, 5, 2), (70, 4, 0, 9), heads=(6, 2), widths=(24, 40)),
    "attention shared": attention((23, 0, 3, 1), (20, 70), (1, 0, 1, 0), heads=(3, 1)),
    "attention many heads": attention((40, 3), (), heads=(17, 1)),  # a tile begins just below a block's end
    "attention own only": attention((40, 3), (), heads=(2, 2), window=20),
    "attention options": attention((5, 21), (70, 4), heads=(3, 1), sinks=True, window=30, softcap=5.0, scale=0.3),
    "attention sinks": attention((5, 2, 3), (33, 4), (0, 0, 0), heads=(2, 2), sinks=True),
    "pool mean rms": pooling("mean", "rms"),
    "pool mean": pooling("mean", "none", normalize=False),
    "pool last layer": pooling("last", "layer"),
    "pool weighted layer": pooling("weighted", "layer"),
    "pool weighted rms": pooling("weighted", "rms", normalize=False),
    "pool weighted": pooling("weighted", "none", weights_alone=True),
    "contrast": contrast(masked=False),
    "contrast masked": contrast(masked=True),
}

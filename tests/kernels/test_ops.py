"""What torch asks of a registered op: schema, fake tensors, tracing; and torch.compile on the public functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import PROBLEMS, offsets
from torch import Tensor

from pe.kernels import context_attention, info_nce, pool_normalize, prompt_rows, vocab_mixture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def registered() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each op with arguments for it; backward ops get the forward's real outputs."""
    h, e_out, e_in = rand(3, 16), rand(40, 16), rand(40, 24)
    s, lse = vocab_mixture._vocab_mixture_fwd(h, e_out, e_in, 0.8, False)
    ids, embedding, soft, weight = torch.tensor([1, -1, 0, -3], device=DEVICE), rand(4, 24), rand(3, 16), rand(16, 24)
    x = rand(4, 24)
    q, k, v, ck, cv = (rand(*shape) for shape in ((5, 4, 16), (5, 2, 16), (5, 2, 16), (9, 2, 16), (9, 2, 16)))
    tensors = (
        q,
        k,
        v,
        offsets([2, 3], DEVICE),
        ck,
        cv,
        offsets([9], DEVICE),
        torch.zeros(2, device=DEVICE).long(),
        rand(4),
    )
    options = 3, 9, 0.25, 4, 5.0
    o, o_lse = context_attention._context_attention_fwd(*tensors, *options)
    rows, cu, gain = rand(6, 24), offsets([4, 2], DEVICE), rand(24)
    y, inverse = pool_normalize._pool_normalize_fwd(rows, cu, gain, None, None, "mean", "rms", 1e-6, True)
    docs, positive, texts = rand(5, 16), torch.tensor([0, 4, 2], device=DEVICE), torch.arange(5, device=DEVICE)
    ids_of = texts[:3], texts[:3], None, texts, None
    losses, loss_lse = info_nce._info_nce_fwd(h, docs, positive, *ids_of, 0.1)
    return {
        "vocab_mixture_fwd": (vocab_mixture._vocab_mixture_fwd, (h, e_out, e_in, 0.8, False)),
        "vocab_mixture_bwd": (
            vocab_mixture._vocab_mixture_bwd, (s, h, e_out, e_in, s, lse, 0.8, False, True, False, True, rand(1))
        ),
        "prompt_rows_fwd": (prompt_rows._prompt_rows_fwd, (ids, embedding, soft, weight, 1.0)),
        "prompt_rows_bwd": (prompt_rows._prompt_rows_bwd, (x, ids, soft, weight, True, True)),
        "context_attention_fwd": (context_attention._context_attention_fwd, (*tensors, *options)),
        "context_attention_bwd": (
            context_attention._context_attention_bwd, (o, *tensors, o, o_lse, *options, True, True, True)
        ),
        "pool_normalize_fwd": (
            pool_normalize._pool_normalize_fwd, (rows, cu, gain, None, None, "mean", "rms", 1e-6, True)
        ),
        "pool_normalize_bwd": (
            pool_normalize._pool_normalize_bwd, (y, rows, cu, gain, None, y, inverse, "mean", "rms", 1e-6, True)
        ),
        "pool_normalize_bwd_weights": (
            pool_normalize._pool_normalize_bwd_weights,
            (y, rows, cu, gain, None, rows[:, 0].contiguous(), y, inverse, "rms", 1e-6, True),
        ),
        "info_nce_fwd": (info_nce._info_nce_fwd, (h, docs, positive, *ids_of, 0.1)),
        "info_nce_bwd": (
            info_nce._info_nce_bwd, (losses, h, docs, positive, *ids_of, loss_lse, 0.1, True, True)
        ),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", [f"{op}_{way}" for op in ("vocab_mixture", "prompt_rows", "context_attention", "pool_normalize", "info_nce")
             for way in ("fwd", "bwd")] + ["pool_normalize_bwd_weights"]
)  # fmt: skip
def test_opcheck(name: str) -> None:
    op, arguments = registered()[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize(
    "name",
    ["mixture tied", "rows aligned", "attention options", "pool mean rms", "pool weighted layer", "contrast masked"],
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_compiles_without_a_graph_break(name: str, impl: str) -> None:
    problem = PROBLEMS[name](torch.float32, DEVICE, False)
    torch.compiler.reset()  # one function, many problems: each is a recompilation
    compiled = torch.compile(lambda *x: problem.run(x, impl), fullgraph=True, backend="aot_eager")
    expected = problem.run(problem.inputs, impl)
    got = compiled(*problem.inputs)
    torch.testing.assert_close(got, expected)
    upstream = torch.ones_like(got)
    grads = [torch.autograd.grad(out, problem.inputs, upstream) for out in (got, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)

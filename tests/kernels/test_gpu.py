"""What only a GPU can show: bf16, large and ragged sizes, compilation, races, device syncs, 64-bit addressing."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from problems import PROBLEMS, offsets
from tolerance import assert_matches_reference, assert_no_worse, forward_backward
from torch import Tensor

from pe.kernels.context_attention import context_attention
from pe.kernels.info_nce import info_nce
from pe.kernels.pool_normalize import pool_normalize
from pe.kernels.prompt_rows import prompt_rows
from pe.kernels.vocab_mixture import vocab_mixture

pytestmark = pytest.mark.gpu
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
NAMES = pytest.mark.parametrize("name", PROBLEMS)
ROWS = 2**31 // 4096 + 5000  # of 4096 columns: past 2^31 elements


@NAMES
@DTYPES
def test_large_and_ragged(name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name](dtype, "cuda", True)
    assert_matches_reference(problem.run, problem.inputs, wide=torch.float64)


@NAMES
def test_bfloat16_small(name: str) -> None:
    problem = PROBLEMS[name](torch.bfloat16, "cuda", False)
    assert_matches_reference(problem.run, problem.inputs)


@NAMES
def test_two_runs_are_bitwise_equal(name: str) -> None:
    problem = PROBLEMS[name](torch.bfloat16, "cuda", True)
    first = forward_backward(problem.run, problem.inputs, "auto", torch.bfloat16)
    for _ in range(5):
        again = forward_backward(problem.run, problem.inputs, "auto", torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@NAMES
def test_compiles_in_one_graph(name: str) -> None:
    problem = PROBLEMS[name](torch.bfloat16, "cuda", True)
    torch.compiler.reset()  # one function, many problems: each is a recompilation
    compiled = torch.compile(lambda *x: problem.run(x, "auto"), fullgraph=True)
    expected = forward_backward(problem.run, problem.inputs, "auto", torch.bfloat16)
    got = forward_backward(lambda x, _: compiled(*x), problem.inputs, "auto", torch.bfloat16)
    for a, b in zip(got, expected, strict=True):
        assert_no_worse(a, b.float(), b)


@NAMES
def test_no_device_sync(name: str) -> None:
    problem = PROBLEMS[name](torch.bfloat16, "cuda", True)
    forward_backward(problem.run, problem.inputs, "auto", torch.bfloat16)  # the first call compiles
    out = problem.run(problem.inputs, "auto")
    upstream = torch.ones_like(out)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = problem.run(problem.inputs, "auto")
        torch.autograd.grad(out, problem.inputs, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@NAMES
def test_runs_on_a_gpu_that_is_not_the_current_one(name: str) -> None:
    problem = PROBLEMS[name](torch.bfloat16, "cuda:1", False)
    assert torch.cuda.current_device() == 0
    assert_matches_reference(problem.run, problem.inputs)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.timeout(3600)
def test_sanitizer_finds_no_access_out_of_bounds() -> None:
    """Every allocation by itself, so that a step over its end is seen."""
    cases = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        __file__,
        "-k",
        "bfloat16_small or large_and_ragged and bf16",
    ]
    checked = subprocess.run(
        ["compute-sanitizer", "--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "9", *cases],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout[-4000:]


def test_vocab_mixture_needs_no_rows_times_vocabulary_buffer() -> None:
    m, v, d = 4096, 151_936, 256
    h = torch.randn(m, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    e = torch.randn(v, d, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vocab_mixture(h, e, e).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < m * v * 2 / 4


def test_vocab_mixture_past_2_31_elements() -> None:
    e = torch.zeros(ROWS, 4096, device="cuda", dtype=torch.bfloat16)
    e[-1] = 1
    h = torch.full((3, 4096), 0.05, device="cuda", dtype=torch.bfloat16)
    torch.testing.assert_close(vocab_mixture(h, e, e), torch.ones_like(h))


def test_fused_vocab_mixture_past_2_31_elements() -> None:
    e = torch.zeros(2**31 // 1024 + 5000, 1024, device="cuda", dtype=torch.bfloat16)
    e[-1] = 1
    h = torch.full((3, 1024), 0.05, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    out = vocab_mixture(h, e, e)
    torch.testing.assert_close(out, torch.ones_like(h))
    assert torch.isfinite(torch.autograd.grad(out.sum(), h)[0]).all()


def test_prompt_rows_past_2_31_elements() -> None:
    embedding = torch.zeros(ROWS, 4096, device="cuda", dtype=torch.bfloat16)
    embedding[-3:] = torch.randn(3, 4096, device="cuda")
    ids = torch.tensor([ROWS - 1, -1, ROWS - 3, ROWS - 2], device="cuda")
    prompts = torch.ones(1, 1, 4096, device="cuda", dtype=torch.bfloat16)
    out = prompt_rows(ids, embedding, prompts, None)
    assert torch.equal(out[[0, 2, 3]], embedding[ids[[0, 2, 3]]])
    assert torch.equal(out[1], prompts[0, 0])


def test_prompt_rows_of_mixed_types() -> None:
    """As in a training step under autocast: a frozen bfloat16 embedding, float32 prompts and alignment."""
    embedding = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16)
    ids = torch.tensor([5, -1, -2, 299, -3, -6, 0, -1], device="cuda")
    prompts, weight = torch.randn(2, 3, 96, device="cuda"), torch.randn(96, 256, device="cuda") / 10

    def run(leaves: Sequence[Tensor], impl: str) -> Tensor:
        return prompt_rows(ids, embedding.to(leaves[0].dtype if impl == "torch" else embedding.dtype), *leaves)

    leaves = [x.requires_grad_() for x in (prompts, weight)]
    got = forward_backward(run, leaves, "auto", torch.float32)
    wide = forward_backward(run, leaves, "torch", torch.float64)
    for ours, reference in zip(got, wide, strict=True):
        assert_no_worse(ours, reference, reference.to(torch.bfloat16).to(ours.dtype))


def test_context_attention_past_2_31_elements() -> None:
    lengths, heads, d = [2**31 // 1024 - 40, 100], 8, 128
    q, k, v = (torch.randn(10, h, d, device="cuda", dtype=torch.bfloat16) for h in (16, heads, heads))
    context = [torch.zeros(sum(lengths), heads, d, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    for part in context:
        part[-100:] = torch.randn(100, heads, d, device="cuda")
        part.requires_grad_()
    cu, index = offsets([5, 5], "cuda"), torch.tensor([1, 1], device="cuda")
    out = context_attention(
        q, k, v, cu, max_seqlen=5, context_k=context[0], context_v=context[1], cu_context=offsets(lengths, "cuda"),
        context_index=index, max_context=lengths[0],
    )  # fmt: skip
    ends = [part.detach()[-100:].requires_grad_() for part in context]
    expected = context_attention(
        q, k, v, cu, max_seqlen=5, context_k=ends[0], context_v=ends[1], cu_context=offsets([100], "cuda"),
        context_index=index * 0, max_context=100,
    )  # fmt: skip
    assert_no_worse(out, expected.float(), expected)
    for a, b in zip(torch.autograd.grad(out.sum(), context), torch.autograd.grad(expected.sum(), ends), strict=True):
        assert_no_worse(a[-100:], b.float(), b)


def test_pool_normalize_past_2_31_elements() -> None:
    h = torch.randn(4096, device="cuda", dtype=torch.bfloat16).expand(ROWS, 4096).contiguous().requires_grad_()
    out = pool_normalize(h, offsets([ROWS - 7, 7], "cuda"), norm="rms")
    torch.testing.assert_close(out[1], pool_normalize(h.detach()[-7:], offsets([7], "cuda"), norm="rms")[0])
    grad = torch.autograd.grad(out[1, 0], h)[0]
    assert grad[-7:].any()
    assert not grad[:7].any()


def test_info_nce_past_2_31_elements() -> None:
    d = torch.zeros(ROWS, 4096, device="cuda", dtype=torch.bfloat16)
    d[-1] = 1 / 64
    q = torch.full((3, 4096), 1 / 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    positive = torch.full((3,), ROWS - 1, device="cuda")
    loss = info_nce(q, d, positive, temperature=0.1)
    expected = torch.log1p((ROWS - 1) * torch.exp(torch.tensor(-10.0, dtype=torch.float64)))
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-2, atol=1e-4)

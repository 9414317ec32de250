"""Every op's Triton path, in the interpreter where there is no GPU, against its reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from problems import PROBLEMS
from tolerance import assert_matches_reference, assert_no_worse, forward_backward
from torch import Tensor

from pe.kernels import context_attention, info_nce, pool_normalize, vocab_mixture
from pe.kernels.prompt_rows import prompt_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def small_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is split and chunked as it would be on large inputs."""
    monkeypatch.setattr(vocab_mixture, "CHUNK", 128)
    monkeypatch.setattr(vocab_mixture, "PROGRAMS", 4)
    monkeypatch.setattr(info_nce, "CHUNK", 1)
    monkeypatch.setattr(info_nce, "PROGRAMS", 1)
    monkeypatch.setattr(pool_normalize, "PROGRAMS", 12)
    monkeypatch.setattr(pool_normalize, "TILE_ELEMENTS", 128)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_matches_reference(name: str, dtype: torch.dtype) -> None:
    problem = PROBLEMS[name](dtype, DEVICE, False)
    assert_matches_reference(problem.run, problem.inputs)


@pytest.mark.usefixtures("small_work")
@pytest.mark.parametrize("name", [name for name in PROBLEMS if not name.startswith(("rows", "attention"))])
def test_matches_reference_when_chunked_and_split(name: str) -> None:
    problem = PROBLEMS[name](torch.float32, DEVICE, False)
    assert_matches_reference(problem.run, problem.inputs)


@pytest.mark.parametrize("name", ["attention suffix", "attention shared", "attention options"])
def test_attention_without_splits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_attention, "PROGRAMS", 1)
    problem = PROBLEMS[name](torch.float32, DEVICE, False)
    assert_matches_reference(problem.run, problem.inputs)


@pytest.mark.parametrize(
    ("name", "alone"),
    [("mixture untied", 0), ("mixture untied", 1), ("mixture untied", 2), ("rows aligned", 0), ("rows aligned", 1),
     ("attention suffix", 0), ("attention suffix", 2), ("attention suffix", 3), ("attention sinks", 5),
     ("contrast", 0), ("contrast", 1)],
)  # fmt: skip
def test_partial_requires_grad(name: str, alone: int) -> None:
    problem = PROBLEMS[name](torch.float32, DEVICE, False)
    inputs = [x.detach().requires_grad_(i == alone) for i, x in enumerate(problem.inputs)]
    assert_matches_reference(problem.run, inputs)


@pytest.mark.parametrize("name", ["mixture untied", "rows aligned", "attention shared", "pool mean rms", "contrast"])
def test_no_grad_needs_no_graph(name: str) -> None:
    problem = PROBLEMS[name](torch.float32, DEVICE, False)
    out = problem.run([x.detach() for x in problem.inputs], "triton")
    assert not out.requires_grad
    with torch.no_grad():
        assert torch.equal(problem.run(problem.inputs, "triton"), out)


@pytest.mark.parametrize("name", ["mixture untied", "rows aligned", "attention suffix", "pool mean rms", "contrast"])
@pytest.mark.parametrize("strided", ["rows", "columns"])
def test_non_contiguous_input(name: str, strided: str) -> None:
    problem = PROBLEMS[name](torch.float32, DEVICE, False)

    def view(x: Tensor) -> Tensor:
        """The same values, every second row or column of a larger tensor."""
        return (
            torch.stack([x, x], dim=-1)[..., 0]
            if strided == "columns"
            else torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
        )

    def run(inputs: Sequence[Tensor], impl: Any) -> Tensor:
        return problem.run([view(x) for x in inputs] if impl == "triton" else inputs, impl)

    assert_matches_reference(run, problem.inputs)


@pytest.mark.parametrize(
    "name", ["mixture tied", "rows aligned", "attention shared", "pool mean rms", "contrast masked"]
)
def test_two_runs_are_bitwise_equal(name: str) -> None:
    problem = PROBLEMS[name](torch.float32, DEVICE, False)
    runs = [forward_backward(problem.run, problem.inputs, "triton", torch.float32) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("name", ["mixture untied", "rows aligned", "attention suffix", "pool mean rms", "contrast"])
def test_nothing_outside_a_buffer_is_read_or_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs stand between NaNs, and every buffer that an op allocates between untouched canaries."""
    canary, guard, buffers, plain_new_empty = 12345.0, 512, [], Tensor.new_empty
    problem = PROBLEMS[name](torch.float32, DEVICE, False)

    def fenced(x: Tensor) -> Tensor:
        buffer = torch.full((x.numel() + 2 * guard,), torch.nan, device=DEVICE)
        buffer[guard:-guard] = x.detach().flatten()
        return buffer[guard:-guard].view(x.shape).requires_grad_()

    def new_empty(self: Tensor, *shape: Any, dtype: torch.dtype | None = None, **others: Any) -> Tensor:
        if others or not all(isinstance(size, int) for size in shape):  # torch's own
            return plain_new_empty(self, *shape, dtype=dtype, **others)
        numel = math.prod(shape)
        buffer = torch.full((numel + 2 * guard,), canary, dtype=dtype or self.dtype, device=self.device)
        buffers.append(buffer)
        return buffer[guard : guard + numel].view(shape)

    inputs = [fenced(x) for x in problem.inputs]
    expected = forward_backward(problem.run, problem.inputs, "triton", torch.float32)
    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    out = problem.run(inputs, "triton")
    generator = torch.Generator(out.device).manual_seed(1)
    upstream = torch.randn(out.shape, generator=generator, device=out.device)
    got = [out, *torch.autograd.grad(out, inputs, upstream)]
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert buffers
    for buffer in buffers:
        assert (buffer[:guard] == canary).all()
        assert (buffer[-guard:] == canary).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_prompts_may_be_wider_than_the_embedding(impl: Any) -> None:
    """Half-precision embedding rows with float32 prompts and weight: gradients keep the parameters' dtype."""
    ids, embedding = torch.tensor([0, -1, -4, 2, -1], device=DEVICE), torch.randn(3, 40, device=DEVICE).half()
    prompts, weight = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((3, 2, 24), (24, 40)))
    out = prompt_rows(ids, embedding, prompts, weight, impl=impl)
    upstream = torch.randn(5, 40, device=DEVICE).half()
    grads = torch.autograd.grad(out, (prompts, weight), upstream)
    wide = prompt_rows(ids, embedding.double(), prompts.double(), weight.double())
    expected = torch.autograd.grad(wide, (prompts, weight), upstream.double())
    assert_no_worse(out, wide, wide.half())
    for got, ref in zip(grads, expected, strict=True):
        assert_no_worse(got, ref, ref.float())


def test_explicit_triton_raises_rather_than_falls_back() -> None:
    problem = PROBLEMS["mixture tied"](torch.float32, DEVICE, False)
    with pytest.raises(ValueError, match="impl: expected"):
        problem.run([x.double() for x in problem.inputs], "triton")
    with pytest.raises(ValueError, match="impl: expected"):
        problem.run(problem.inputs, "cuda")

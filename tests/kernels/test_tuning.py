"""PE_AUTOTUNE=1: what is timed, what is launched, and that nothing is where it must not be."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import PROBLEMS
from tolerance import forward_backward
from torch._subclasses.fake_tensor import FakeTensorMode

from pe.kernels import _triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Kernel:
    """Adds `amount` to a buffer and notes each launch's configuration."""

    __name__ = "_add_kernel"

    def __init__(self) -> None:
        self.launches: list[int] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(x_ptr: torch.Tensor, amount: float, N: int, num_warps: int) -> None:
            self.launches.append(num_warps)
            if type(x_ptr) is torch.Tensor:
                x_ptr += amount

        return launch


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A launch of 4 warps takes 3 ms, one of 8 does not fit the chip, one of 2 takes 1 ms, one of 1 takes 2 ms."""

    def bench(launch: Callable[[], None], return_mode: str) -> float:
        launch()
        if kernel.launches[-1] == 8:
            raise _triton.triton.OutOfResources(1, 0, "shared memory")
        return {4: 3.0, 2: 1.0, 1: 2.0}[kernel.launches[-1]]

    kernel = Kernel()
    monkeypatch.setenv("PE_AUTOTUNE", "1")
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(_triton._Tuned, "winners", {})
    monkeypatch.setattr(_triton.triton.testing, "do_bench", bench)
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return kernel


CANDIDATES = ({"num_warps": 8}, {"num_warps": 2}, {"num_warps": 1})


def add(kernel: Kernel, x: torch.Tensor, updates: str = "x_ptr") -> None:
    wrapped = _triton.wrap_triton(kernel, CANDIDATES, updates)
    wrapped[(1,)](x_ptr=x, amount=1.0, N=x.shape[0], num_warps=4)


def test_the_fastest_that_fits_is_kept(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_are_real_and_on_a_gpu", lambda tensors: True)
    x = torch.zeros(20)
    add(kernel, x)
    assert kernel.launches == [4, 8, 2, 1, 2]  # every configuration once, then the winner
    assert torch.equal(x, torch.ones(20))  # what the timed launches added is undone
    add(kernel, torch.zeros(31))  # the same size to a power of two
    assert kernel.launches[5:] == [2]
    add(kernel, torch.zeros(32))
    assert kernel.launches[6:] == [4, 8, 2, 1, 2]


def test_nothing_is_timed_off_a_gpu_or_in_a_trace(kernel: Kernel) -> None:
    with FakeTensorMode():
        add(kernel, torch.zeros(20))
    add(kernel, torch.zeros(20))
    assert kernel.launches == [4, 4]


def test_nothing_is_timed_in_a_graph_capture(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_are_real_and_on_a_gpu", lambda tensors: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    add(kernel, torch.zeros(20))
    assert kernel.launches == [4]


@pytest.mark.parametrize("value", [None, "0", ""])
def test_off_unless_asked_for(kernel: Kernel, value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_are_real_and_on_a_gpu", lambda tensors: True)
    monkeypatch.delenv("PE_AUTOTUNE") if value is None else monkeypatch.setenv("PE_AUTOTUNE", value)
    add(kernel, torch.zeros(20))
    assert kernel.launches == [4]


def test_a_chip_that_fits_nothing_else_keeps_the_default(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_are_real_and_on_a_gpu", lambda tensors: True)
    times = iter([math.inf] * 4)
    monkeypatch.setattr(_triton._Tuned, "time", lambda *_: next(times))
    add(kernel, torch.zeros(20))
    assert kernel.launches == [4]


@pytest.mark.parametrize(
    "name",
    ["rows aligned"]
    + (["mixture tied", "attention shared", "pool mean rms", "contrast masked"] if DEVICE == "cuda" else []),
)
def test_a_tuned_op_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter nothing is tuned, of whichever op; on a GPU something is, and the result stands."""
    problem: Any = PROBLEMS[name](torch.float32, DEVICE, DEVICE == "cuda")
    expected = forward_backward(problem.run, problem.inputs, "triton", torch.float32)
    monkeypatch.setenv("PE_AUTOTUNE", "1")
    monkeypatch.setattr(_triton._Tuned, "winners", {})
    got = forward_backward(problem.run, problem.inputs, "triton", torch.float32)
    assert bool(_triton._Tuned.winners) == (not _triton.INTERPRETED)
    for a, b in zip(got, expected, strict=True):
        if _triton.INTERPRETED:
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b)

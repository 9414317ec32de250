from __future__ import annotations

import pytest
import torch
from tolerance import assert_no_worse
from torch import Tensor
from torch.autograd import gradcheck

from pe.kernels import vocab_mixture as module
from pe.kernels.vocab_mixture import vocab_mixture, vocab_mixture_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_reference_is_the_formula_in_plain_loops() -> None:
    h, e_out, e_in = double(3, 4), double(11, 4), double(11, 5)
    for row, out in zip(h, vocab_mixture_ref(h, e_out, e_in, 0.7), strict=True):
        weights = [torch.exp(row @ e / 0.7) for e in e_out]
        expected = sum(w * e for w, e in zip(weights, e_in, strict=True)) / sum(weights)
        torch.testing.assert_close(out, expected)


def test_reference_gradients() -> None:
    assert gradcheck(lambda *x: vocab_mixture(*x, 0.7), (double(3, 4), double(11, 4), double(11, 5)))
    assert gradcheck(lambda h, e: vocab_mixture(h, e, e, 1.3), (double(2, 4), double(7, 4)))


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row(impl: str, rows: int) -> None:
    h, e = (torch.randn(n, 16, device=DEVICE, requires_grad=True) for n in (rows, 30))
    out = vocab_mixture(h, e, e, impl=impl)
    out.sum().backward()
    assert out.shape == (rows, 16)
    assert h.grad is not None
    assert e.grad is not None
    assert torch.isfinite(e.grad).all()
    if rows == 0:
        assert not e.grad.any()


def test_one_entry_is_copied() -> None:
    e = torch.randn(1, 24, device=DEVICE)
    out = vocab_mixture(torch.randn(3, 24, device=DEVICE), e, e, impl="triton")
    torch.testing.assert_close(out, e.expand(3, -1))


def test_a_logit_shift_changes_nothing() -> None:
    """A column of ones in e_out adds h's last entry to every logit, here far beyond what exp can hold."""
    h, e_out, e_in = (
        torch.randn(4, 15, device=DEVICE),
        torch.randn(300, 15, device=DEVICE),
        torch.eye(300, device=DEVICE),
    )
    ones, shift = torch.ones(300, 1, device=DEVICE), torch.tensor([[0.0], [300.0], [-300.0], [50.0]], device=DEVICE)
    plain = vocab_mixture(h, e_out, e_in, impl="triton")
    shifted = vocab_mixture(torch.cat([h, shift], 1), torch.cat([e_out, ones], 1), e_in, impl="triton")
    assert (shifted - plain).abs().max() < 1e-3 * plain.max()


def test_chunks_and_splits_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    h, e = torch.randn(5, 24, device=DEVICE), torch.randn(700, 24, device=DEVICE)
    whole = vocab_mixture(h, e, e, impl="triton")
    monkeypatch.setattr(module, "CHUNK", 256)
    monkeypatch.setattr(module, "PROGRAMS", 1)
    chunked = vocab_mixture(h, e, e, impl="triton")
    reference = vocab_mixture_ref(h.double(), e.double(), e.double())
    assert_no_worse(chunked, reference, reference.float())
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def test_permuting_the_rows_permutes_the_result() -> None:
    h, e = torch.randn(20, 24, device=DEVICE), torch.randn(150, 24, device=DEVICE)
    order = torch.randperm(20, device=DEVICE)
    out = vocab_mixture(h, e, e, impl="triton")
    torch.testing.assert_close(vocab_mixture(h[order], e, e, impl="triton"), out[order])


def test_no_buffer_grows_with_rows_times_vocabulary() -> None:
    for rows, vocabulary in ((5, 151_936), (64, 32_000), (1024, 151_936), (4096, 262_144)):
        chunk = module._chunk(rows, vocabulary)
        assert chunk <= module.CHUNK < vocabulary
        assert rows * chunk <= module.CHUNK_ELEMENTS


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_alone(bad: float) -> None:
    h, e = torch.randn(20, 24, device=DEVICE), torch.randn(300, 24, device=DEVICE)
    clean = vocab_mixture(h, e, e, impl="triton")
    h[3, 5] = bad
    out = vocab_mixture(h, e, e, impl="triton")
    assert out[3].isnan().all()
    others = torch.arange(20, device=DEVICE) != 3
    assert torch.equal(out[others], clean[others])


H, E = torch.randn(3, 4), torch.randn(7, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((H[0], E, E), r"h: expected 2 dimensions, got \(4,\)"),
        ((H.long(), E, E), "h: expected a floating-point tensor, got torch.int64"),
        ((H, E[:, :3], E), r"e_out: expected shape \[V, 4\], got \(7, 3\)"),
        ((H, E[:0], E[:0]), "e_out: expected at least one vocabulary entry"),
        ((H, E, E[:6]), r"e_in: expected shape \[7, Din\], got \(6, 4\)"),
        ((H, E.half(), E), "e_out: expected h's dtype torch.float32, got torch.float16"),
        ((H, E, E.double()), "e_in: expected h's dtype"),
        ((H, E.to("meta"), E), "e_out: expected a tensor on cpu, got meta"),
        ((H, E, E, 0.0), "temperature: expected a number > 0, got 0.0"),
        ((H, E, E, -1.0), "temperature: expected"),
    ],
)
def test_bad_input_raises(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vocab_mixture(*arguments)  # type: ignore[arg-type]

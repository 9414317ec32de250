from __future__ import annotations

import pytest
import torch
from tolerance import assert_matches_reference, assert_no_worse
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


@pytest.mark.parametrize("frozen", [True, False], ids=["fused", "chunked"])
@pytest.mark.parametrize("upstream", [1e-6, 1e-4, 100.0])
def test_half_precision_gradients_of_any_size(upstream: float, frozen: bool) -> None:
    """P (dP - delta) of an entry is far below fp16's smallest number where the upstream gradient is small."""
    h, e, ds = (torch.randn(n, 32, device=DEVICE).half() for n in (3, 1000, 3))
    e, ds = e / 4, ds * upstream
    got, wide = ([h.clone().requires_grad_(), e.clone().requires_grad_(not frozen)] for _ in range(2))
    vocab_mixture(*got, got[1], impl="triton").backward(ds)
    vocab_mixture_ref(*(x.double() for x in wide), wide[1].double()).backward(ds.double())
    for ours, reference in zip(got[: 1 if frozen else 2], wide, strict=False):
        assert ours.grad is not None
        assert reference.grad is not None
        error = (ours.grad.double() - reference.grad.double()).norm() / reference.grad.double().norm()
        assert error < 5e-3


@pytest.mark.parametrize("frozen", [True, False], ids=["fused", "chunked"])
@pytest.mark.parametrize(("temperature", "peak"), [(0.12, 0.8), (0.09, 0.97), (0.06, 0.999)])
def test_gradients_of_a_peaked_row(temperature: float, peak: float, frozen: bool) -> None:
    """P (dP - delta) is a small difference of large numbers where one entry holds most of the probability."""
    e = torch.nn.functional.normalize(torch.randn(300, 64, device=DEVICE), dim=1).half()
    h, ds = e[:6].clone(), torch.randn(6, 64, device=DEVICE).half()
    wide, leaves = h.double().requires_grad_(), (h.requires_grad_(), e.clone().requires_grad_(not frozen))
    vocab_mixture_ref(wide, e.double(), e.double(), temperature).backward(ds.double())
    highest = torch.softmax(wide @ e.double().T / temperature, dim=1).amax(1)
    assert (highest > peak).all()
    vocab_mixture(leaves[0], leaves[1], leaves[1], temperature, impl="triton").backward(ds)
    assert h.grad is not None
    assert wide.grad is not None
    errors = (h.grad.double() - wide.grad).norm(dim=1) / wide.grad.norm(dim=1)
    assert errors.max() < 0.01


@pytest.mark.parametrize("frozen", [True, False], ids=["fused", "chunked"])
def test_a_transposed_upstream(frozen: bool) -> None:
    h, e, ds = (torch.randn(n, 32, device=DEVICE).half() for n in (6, 300, 6))
    grads = []
    for upstream in (ds, ds.T.contiguous().T):
        leaves = h.clone().requires_grad_(), e.clone().requires_grad_(not frozen)
        vocab_mixture(leaves[0], leaves[1], leaves[1], impl="triton").backward(upstream)
        grads.append(leaves[0].grad)
    assert torch.equal(*grads)


def test_sums_over_rows_keep_their_room() -> None:
    """The gradient of an embedding is a sum over rows that fits fp16, but not at the scale of its summands."""
    h, e_in = torch.zeros(100, 16, device=DEVICE).half(), torch.randn(40, 16, device=DEVICE).half()
    h[:, 0] = 960.0
    e_out = (1e-4 * torch.randn(40, 16, device=DEVICE)).half().requires_grad_()
    vocab_mixture(h, e_out, e_in, impl="triton").backward(torch.full((100, 16), 1e-3, device=DEVICE).half())
    assert e_out.grad is not None
    assert 8 < e_out.grad.abs().max() < 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["chunked", "fused"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_alone(bad: float, dtype: torch.dtype) -> None:
    h, e = (torch.randn(n, 24, device=DEVICE).to(dtype) for n in (20, 300))
    clean = vocab_mixture(h, e, e, impl="triton")
    h[3, 5] = bad
    out = vocab_mixture(h, e, e, impl="triton")
    assert out[3].isnan().all()
    others = torch.arange(20, device=DEVICE) != 3
    assert torch.equal(out[others], clean[others])


def test_which_form_runs() -> None:
    def rows(m: int, d: int, d_in: int, *, backward: bool = False, dtype: torch.dtype = torch.float16) -> int:
        return module._fused_rows(torch.empty(m, d, dtype=dtype), d_in, d == d_in, backward)

    assert [rows(m, 1024, 1024) for m in (1, 16, 17, 64, 65)] == [16, 16, 32, 32, 0]
    assert [rows(m, 1024, 896) for m in (1, 16, 17, 32, 33)] == [16, 16, 16, 16, 0]
    assert [rows(m, 1024, 1024, backward=True) for m in (1, 16, 17, 32, 33)] == [16, 16, 16, 16, 0]
    assert [rows(m, 512, 24, backward=True) for m in (5, 33, 64, 65)] == [16, 32, 32, 0]
    assert rows(5, 1025, 24) == rows(5, 24, 1025) == rows(5, 24, 24, dtype=torch.float32) == 0


@pytest.mark.parametrize("programs", [264, 4])
@pytest.mark.parametrize(
    ("m", "v", "d", "d_in"), [(1, 15, 24, 24), (5, 300, 72, 24), (37, 301, 40, 40), (19, 130, 8, 96)]
)
def test_fused_form_matches_reference(
    m: int, v: int, d: int, d_in: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half precision and frozen embeddings: both directions are fused, over one or many tiles a program."""
    monkeypatch.setattr(module, "PROGRAMS", programs)
    h, e = (
        torch.randn(m, d, device=DEVICE).half().requires_grad_(),
        torch.randn(v, d, device=DEVICE).half() * 2 * d**-0.5,
    )
    e_in = e if d == d_in else torch.randn(v, d_in, device=DEVICE).half()
    assert_matches_reference(
        lambda x, impl: vocab_mixture(x[0], x[1], x[1] if e_in is e else x[2], 0.8, impl=impl), (h, e, e_in)
    )


def test_fused_form_equals_chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    h, e = (torch.randn(n, 24, device=DEVICE).half() for n in (20, 300))
    results = []
    for width in (module.FUSED_WIDTH, 16):
        monkeypatch.setattr(module, "FUSED_WIDTH", width)
        assert bool(module._fused_rows(h, 24, True, False)) == (width != 16)
        leaf = h.clone().requires_grad_()
        out = vocab_mixture(leaf, e, e, 0.7, impl="triton")
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaf)))
    for fused, chunked in zip(*results, strict=True):
        torch.testing.assert_close(fused, chunked, rtol=4e-3, atol=4e-3)


def test_tying_changes_nothing() -> None:
    h, e = (torch.randn(n, 24, device=DEVICE).half() for n in (5, 300))
    assert torch.equal(vocab_mixture(h, e, e, impl="triton"), vocab_mixture(h, e, e.clone(), impl="triton"))


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

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from problems import offsets
from torch import Tensor
from torch.autograd import gradcheck

from pe.kernels import context_attention as module
from pe.kernels import context_attention_torch
from pe.kernels.context_attention import context_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [2, 0, 3, 1]


def plain_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    contexts: list[tuple[Tensor, Tensor]],
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    lengths: Sequence[int] = LENGTHS,
) -> Tensor:
    """One query, head and key at a time."""
    rows, group = [], q.shape[1] // k.shape[1]
    own = zip(*(part.split(list(lengths)) for part in (q, k, v)), strict=True)
    for (queries, own_k, own_v), (context_k, context_v) in zip(own, contexts, strict=True):
        keys, values, n_context = torch.cat([context_k, own_k]), torch.cat([context_v, own_v]), len(context_k)
        for i, query in enumerate(queries):
            heads = []
            for h, x in enumerate(query):
                seen = [j for j in range(n_context + i + 1) if window is None or n_context + i - j < window]
                scores = torch.stack([x @ keys[j, h // group] * x.shape[0] ** -0.5 for j in seen])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = scores.exp()
                total = weights.sum() if sinks is None else weights.sum() + sinks[h].exp()
                heads.append(sum(w * values[j, h // group] for w, j in zip(weights, seen, strict=True)) / total)
            rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "by_sequence"])
@pytest.mark.parametrize("context", ["none", "own", "shared"])
@pytest.mark.parametrize(("window", "softcap", "with_sinks"), [(None, None, False), (3, None, True), (None, 5.0, True)])
def test_reference_is_attention_key_by_key(
    context: str, window: int | None, softcap: float | None, with_sinks: bool, padded: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(context_attention_torch, "BY_SEQUENCE_FROM", 1 << 30 if padded else 0)
    double: Any = {"dtype": torch.float64, "requires_grad": True}
    q, k, v = (torch.randn(6, heads, d, **double) for heads, d in ((4, 3), (2, 3), (2, 5)))
    sinks = torch.randn(4, **double) if with_sinks else None
    lengths = {"none": [0, 0, 0, 0], "own": [3, 0, 4, 2], "shared": [4, 3]}[context]
    index = [1, 0, 1, 1] if context == "shared" else [0, 1, 2, 3]
    context_k, context_v = (torch.randn(sum(lengths), 2, d, **double) for d in (3, 5))
    kwargs: Any = {"max_seqlen": 4, "window": window, "softcap": softcap, "sinks": sinks}
    if context != "none":
        kwargs |= {"context_k": context_k, "context_v": context_v, "cu_context": offsets(lengths), "max_context": 5}
    if context == "shared":
        kwargs["context_index"] = torch.tensor(index)
    parts = list(zip(context_k.split(lengths), context_v.split(lengths), strict=True))
    expected = plain_loop(q, k, v, [parts[i] for i in index], window, softcap, sinks)
    torch.testing.assert_close(context_attention(q, k, v, offsets(LENGTHS), **kwargs), expected)
    leaves = [q, k, v, *([context_k, context_v] if context != "none" else []), *([sinks] if with_sinks else [])]
    assert gradcheck(lambda *_: context_attention(q, k, v, offsets(LENGTHS), **kwargs), leaves, fast_mode=True)


@pytest.mark.parametrize("at_once", [1, 1 << 20])
def test_sequences_that_share_a_segment_go_together(at_once: int, monkeypatch: Any) -> None:
    """Of two tokens five each behind two segments of six, one behind a third, three behind one of two; and two more."""
    monkeypatch.setattr(context_attention_torch, "SCORES_AT_ONCE", at_once)
    double: Any = {"dtype": torch.float64, "requires_grad": True}
    lengths = [2, 2, 3, 2, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    index, parts = [0, 1, 0, 0, 1, 1, 0, 1, 0, 0, 2, 2, 3, 2, 2, 2], [6, 2, 6, 6]
    q, k, v = (torch.randn(sum(lengths), heads, d, **double) for heads, d in ((4, 3), (2, 3), (2, 5)))
    context_k, context_v = (torch.randn(sum(parts), 2, d, **double) for d in (3, 5))
    kwargs: Any = {
        "max_seqlen": 3, "context_k": context_k, "context_v": context_v, "cu_context": offsets(parts),
        "max_context": 6, "context_index": torch.tensor(index),
    }  # fmt: skip
    split = list(zip(context_k.split(parts), context_v.split(parts), strict=True))
    expected = plain_loop(q, k, v, [split[i] for i in index], None, None, None, lengths)
    torch.testing.assert_close(context_attention(q, k, v, offsets(lengths), **kwargs), expected)
    with torch.no_grad():  # several segments at a time
        torch.testing.assert_close(context_attention(q, k, v, offsets(lengths), **kwargs), expected)
    leaves = [q, k, v, context_k, context_v]
    assert gradcheck(lambda *_: context_attention(q, k, v, offsets(lengths), **kwargs), leaves, fast_mode=True)


def kept_bytes(run: Callable[[], object], given: Sequence[Tensor]) -> int:
    """What autograd saves of `run` beside the tensors it was given."""
    known, saved = {x.untyped_storage().data_ptr() for x in given}, dict[int, Tensor]()

    def note(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run()
    return sum(x.untyped_storage().nbytes() for place, x in saved.items() if place not in known)


@pytest.mark.parametrize("parts", [[512] * 8, list(range(508, 516))], ids=["equal", "different"])
def test_backward_keeps_no_copy_of_the_context(parts: list[int]) -> None:
    """On a CPU what is saved beside the inputs is smaller than the keys and values before the sequences."""
    q, k, v = (torch.randn(8 * 2, heads, 64, requires_grad=True) for heads in (4, 4, 4))
    context_k, context_v = (torch.randn(sum(parts), 4, 64) for _ in range(2))
    kwargs: Any = {
        "max_seqlen": 2, "context_k": context_k, "context_v": context_v, "cu_context": offsets(parts),
        "max_context": max(parts), "impl": "torch",
    }  # fmt: skip
    kept = kept_bytes(lambda: context_attention(q, k, v, offsets([2] * 8), **kwargs), (q, k, v, context_k, context_v))
    assert 0 < kept < (context_k.nbytes + context_v.nbytes) / 8


def test_backward_keeps_no_scores_of_long_sequences() -> None:
    """On a CPU what is saved of a sequence behind a short context grows with its length, not with its square."""
    context_k, context_v = (torch.randn(6, 2, 64, requires_grad=True) for _ in range(2))

    def kept(length: int) -> int:
        q, k, v = (torch.randn(3 * length, heads, 64, requires_grad=True) for heads in (4, 2, 2))
        kwargs: Any = {
            "max_seqlen": length, "context_k": context_k, "context_v": context_v, "cu_context": offsets([6]),
            "max_context": 6, "context_index": torch.zeros(3, dtype=torch.int32), "impl": "torch",
        }  # fmt: skip
        given = (q, k, v, context_k, context_v)
        return kept_bytes(lambda: context_attention(q, k, v, offsets([length] * 3), **kwargs), given)

    assert 0 < kept(1024) < 4.1 * kept(256)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_no_token(impl: str, lengths: list[int]) -> None:
    q, k, v = (torch.randn(0, 2, 16, device=DEVICE, requires_grad=True) for _ in range(3))
    sinks = torch.zeros(2, device=DEVICE, requires_grad=True)
    out = context_attention(q, k, v, offsets(lengths, DEVICE), max_seqlen=0, sinks=sinks, impl=impl)
    out.sum().backward()
    assert out.shape == (0, 2, 16)
    assert all(x.grad is not None and not x.grad.any() for x in (q, k, v, sinks))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_one_token_alone_returns_its_value(impl: str) -> None:
    q, k, v = (torch.randn(1, 2, 16, device=DEVICE) for _ in range(3))
    out = context_attention(q, k, v, offsets([1], DEVICE), max_seqlen=1, impl=impl)
    torch.testing.assert_close(out, v)


def split_problem(window: int | None, impl: str) -> tuple[Tensor, Tensor]:
    """Causal attention over 12 tokens, whole and as 7 of context and 5 own."""
    q, k, v = (torch.randn(12, heads, 16, device=DEVICE) for heads in (4, 2, 2))
    whole = context_attention(q, k, v, offsets([12], DEVICE), max_seqlen=12, window=window, impl=impl)
    own = context_attention(
        q[7:], k[7:], v[7:], offsets([5], DEVICE), max_seqlen=5, context_k=k[:7], context_v=v[:7],
        cu_context=offsets([7], DEVICE), max_context=7, window=window, impl=impl,
    )  # fmt: skip
    return own, whole[7:]


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("window", [None, 4])
def test_a_context_stands_where_its_tokens_stood(impl: str, window: int | None) -> None:
    own, whole = split_problem(window, impl)
    torch.testing.assert_close(own, whole)


def test_packed_equals_alone() -> None:
    lengths = [3, 20]
    q, k, v = (torch.randn(23, heads, 16, device=DEVICE) for heads in (4, 2, 2))
    packed = context_attention(q, k, v, offsets(lengths, DEVICE), max_seqlen=20, impl="triton")
    alone = [
        context_attention(*part, offsets([len(part[0])], DEVICE), max_seqlen=len(part[0]), impl="triton")
        for part in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    ]
    torch.testing.assert_close(packed, torch.cat(alone))


def test_a_shared_context_sums_over_its_users() -> None:
    """Sharing one segment gives the gradient that copies of it give, summed."""
    q, k, v = (torch.randn(9, heads, 16, device=DEVICE) for heads in (4, 2, 2))
    context = [torch.randn(7, 2, 16, device=DEVICE, requires_grad=True) for _ in range(2)]
    kwargs: Any = {"max_seqlen": 3, "max_context": 7, "impl": "triton"}
    cu = offsets([3, 3, 3], DEVICE)
    shared = context_attention(
        q, k, v, cu, context_k=context[0], context_v=context[1], cu_context=offsets([7], DEVICE),
        context_index=torch.zeros(3, dtype=torch.int64, device=DEVICE), **kwargs,
    )  # fmt: skip
    copied = context_attention(
        q, k, v, cu, context_k=context[0].repeat(3, 1, 1), context_v=context[1].repeat(3, 1, 1),
        cu_context=offsets([7, 7, 7], DEVICE), **kwargs,
    )  # fmt: skip
    assert torch.equal(shared, copied)
    upstream = torch.randn_like(shared)
    for a, b in zip(*(torch.autograd.grad(out, context, upstream) for out in (shared, copied)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_an_unused_segment_gets_a_zero_gradient(impl: str) -> None:
    q, k, v = (torch.randn(3, 2, 16, device=DEVICE) for _ in range(3))
    context = [torch.randn(9, 2, 16, device=DEVICE, requires_grad=True) for _ in range(2)]
    out = context_attention(
        q, k, v, offsets([3], DEVICE), max_seqlen=3, context_k=context[0], context_v=context[1], max_context=5,
        cu_context=offsets([5, 4], DEVICE), context_index=torch.ones(1, dtype=torch.int64, device=DEVICE), impl=impl,
    )  # fmt: skip
    for grad in torch.autograd.grad(out.sum(), context):
        assert not grad[:5].any()
        assert grad[5:].any()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_bad_sequence_stays_alone(impl: str) -> None:
    q, k, v = (torch.randn(6, 2, 16, device=DEVICE) for _ in range(3))
    k[3] = torch.nan
    out = context_attention(q, k, v, offsets(LENGTHS, DEVICE), max_seqlen=3, impl=impl)
    bad = torch.tensor([False, False, False, True, True, False], device=DEVICE)  # tokens 3 and 4 see key 3
    assert torch.equal(out.isfinite().all(dim=2).all(dim=1), ~bad)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_a_window_of_everything_is_none(impl: str) -> None:
    """Near 2^31 it would wrap around where it is added to a position."""
    lengths, parts = [40, 5], [70, 9]
    q, k, v = (torch.randn(45, heads, 16, device=DEVICE, requires_grad=True) for heads in (2, 1, 1))
    context_k, context_v = (torch.randn(79, 1, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    leaves, results = (q, k, v, context_k, context_v), []
    for window in (None, 2**31 - 1, 110):
        out = context_attention(
            q, k, v, offsets(lengths, DEVICE), max_seqlen=40, context_k=context_k, context_v=context_v,
            cu_context=offsets(parts, DEVICE), max_context=70, window=window, impl=impl,
        )  # fmt: skip
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for widest in results[1:]:
        assert all(map(torch.equal, results[0], widest))


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_an_empty_context_changes_nothing(impl: str) -> None:
    q, k, v = (torch.randn(3, 2, 16, device=DEVICE) for _ in range(3))
    nothing = torch.randn(0, 2, 16, device=DEVICE)
    own = context_attention(q, k, v, offsets([3], DEVICE), max_seqlen=3, impl=impl)
    behind = context_attention(
        q, k, v, offsets([3], DEVICE), max_seqlen=3, context_k=nothing, context_v=nothing,
        cu_context=offsets([0], DEVICE), max_context=4, impl=impl,
    )  # fmt: skip
    torch.testing.assert_close(behind, own)


@pytest.mark.parametrize("chip", [0, 8, 9, 10])
@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 128)])
def test_the_longest_sequence_fits_the_grid(chip: int, dtype: torch.dtype, width: int, monkeypatch: Any) -> None:
    """The first axis of a launch ends at 2^31 - 1, the others at 65,535."""
    monkeypatch.setattr(module, "generation", lambda device: chip)
    heads, kv_heads = 64, 8
    tokens = module.MAX_ROWS * kv_heads // heads
    q, k = (torch.empty(tokens, n, width, dtype=dtype, device="meta") for n in (heads, kv_heads))
    for largest in (64, 128):
        grid, arguments = module._over_rows(q, k, k, torch.empty(2), None, None, None, None, tokens, 0, largest)
        assert grid[0] == kv_heads
        assert tokens * heads // kv_heads <= grid[1] * arguments["BLOCK_M"]
        assert max(grid[1:]) < 1 << 16
    _, block_n, _, _ = module._key_blocks(q, k, module.MAX_ROWS, module.MAX_ROWS)
    assert -(-module.MAX_ROWS // block_n) < 1 << 16


@pytest.mark.parametrize(
    ("widths", "max_seqlen", "message"),
    [
        ((272, 16), 3, "q: expected a head width of at most 256 for the Triton path, got 272"),
        ((16, 272), 3, "v: expected a head width of at most 256 for the Triton path, got 272"),
        ((16, 16), 1048561, "max_seqlen: expected at most 1048560 for the Triton path at 4 heads to 2, got 1048561"),
    ],
)
def test_what_the_kernels_do_not_take_raises(widths: tuple[int, int], max_seqlen: int, message: str) -> None:
    q, k, v = (torch.randn(3, heads, d, device=DEVICE) for heads, d in ((4, widths[0]), (2, widths[0]), (2, widths[1])))
    with pytest.raises(ValueError, match=message):
        context_attention(q, k, v, offsets([3], DEVICE), max_seqlen=max_seqlen, impl="triton")


def test_rows_behind_the_last_segment_bound_nothing() -> None:
    """Off a CPU lengths are not read; a buffer of 512 rows may hold one segment of 300."""
    q, context = torch.empty(3, 2, 16, device="meta"), torch.empty(512, 2, 16, device="meta")
    kwargs: Any = {
        "max_seqlen": 3, "context_k": context, "context_v": context, "cu_context": offsets([1]).to("meta"),
        "max_context": 300, "impl": "torch",
    }  # fmt: skip
    assert context_attention(q, q, q, offsets([3]).to("meta"), **kwargs).shape == (3, 2, 16)
    with pytest.raises(ValueError, match="max_context: expected at least the mean segment, 512, got 300"):
        context_attention(q, q, q, offsets([3]).to("meta"), **kwargs | {"context_k": context.requires_grad_()})


Q, K, V = (torch.randn(6, heads, 8) for heads in (4, 2, 2))
CK, CV = torch.randn(9, 2, 8), torch.randn(9, 2, 8)
CU, CU_CONTEXT = offsets(LENGTHS), offsets([3, 0, 4, 2])
CONTEXT: dict[str, Any] = {"context_k": CK, "context_v": CV, "cu_context": CU_CONTEXT, "max_context": 4}
SHARED: dict[str, Any] = CONTEXT | {"cu_context": offsets([9]), "max_context": 9}


@pytest.mark.parametrize(
    ("arguments", "kwargs", "message"),
    [
        ((Q[0], K, V), {}, "q: expected 3 dimensions"),
        ((Q, K[:5], V), {}, r"k: expected shape \[6, Hkv, 8\], got \(5, 2, 8\)"),
        ((Q, K, V[:, :1]), {}, r"v: expected shape \[6, 2, Dv\], got \(6, 1, 8\)"),
        ((Q[:, :3], K, V), {}, "k: expected a number of heads that divides q's 3"),
        ((Q, K.half(), V), {}, "k: expected q's dtype"),
        ((Q, K, V.to("meta")), {}, "v: expected a tensor on cpu, got meta"),
        ((Q, K, V), {"max_seqlen": 2}, "max_seqlen: expected at least the longest segment, 3, got 2"),
        ((Q, K, V), {"context_k": CK}, "context_k, context_v, cu_context: expected all three or none"),
        ((Q, K, V), {"context_index": torch.zeros(4, dtype=torch.int64)}, "context_index: expected None without"),
        ((Q, K, V), CONTEXT | {"context_v": CV[:8]}, r"context_v: expected shape \(9, 2, 8\), got \(8, 2, 8\)"),
        ((Q, K, V), CONTEXT | {"max_context": 3}, "max_context: expected at least the longest segment, 4, got 3"),
        ((Q, K, V), CONTEXT | {"cu_context": CU_CONTEXT.long()}, "cu_context: expected int32"),
        ((Q, K, V), SHARED, r"cu_context: expected shape \[5\] without a context_index, got \(2,\)"),
        (
            (Q, K, V),
            SHARED | {"context_index": torch.zeros(3, dtype=torch.int64)},
            r"context_index: expected shape \[4\]",
        ),
        (
            (Q, K, V),
            SHARED | {"context_index": torch.ones(4, dtype=torch.int64)},
            r"context_index: expected entries in",
        ),
        ((Q, K, V), SHARED | {"context_index": torch.zeros(4)}, "context_index: expected int32 or int64"),
        ((Q, K, V), {"sinks": torch.zeros(2)}, r"sinks: expected shape \[4\], got \(2,\)"),
        ((Q, K, V), {"window": 0}, "window: expected None or an int >= 1"),
        ((Q, K, V), {"softcap": 0.0}, "softcap: expected None or a number > 0"),
    ],
)
def test_bad_input_raises(arguments: tuple[Tensor, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        context_attention(*arguments, CU, **{"max_seqlen": 3, **kwargs})


def test_offsets_are_checked() -> None:
    for bad in itertools.chain([CU[1:], CU[:-1], torch.tensor([0, 4, 2, 6], dtype=torch.int32)]):
        with pytest.raises(ValueError, match="cu_seqlens: expected"):
            context_attention(Q, K, V, bad, max_seqlen=6)

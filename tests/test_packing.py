"""Packed rows: positions, runs, batches by a token budget, orders and their inverses."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from pe.method.packing import CPU_TOKENS, Segments, budget_on, by_length, inverse, neighbours, pack, token_batches

CPU = torch.device("cpu")


def test_pack_lays_texts_end_to_end() -> None:
    ids, segments = pack([[5, 6], [7], [], [8, 9, 10]], CPU)
    assert ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert ids.dtype == torch.int64
    assert segments.lengths == (2, 1, 0, 3)
    assert segments.cu_seqlens.tolist() == [0, 2, 3, 3, 6]
    assert segments.cu_seqlens.dtype == torch.int32
    assert segments.positions.tolist() == [0, 1, 0, 0, 1, 2]
    assert (len(segments), segments.total, segments.longest) == (4, 6, 3)


def test_nothing_to_pack() -> None:
    ids, segments = pack([], CPU)
    assert ids.shape == (0,)
    assert segments.positions.dtype == torch.int64
    assert segments.cu_seqlens.tolist() == [0]
    assert (len(segments), segments.total, segments.longest, segments.runs) == (0, 0, 0, [])


def test_runs_join_neighbours_of_equal_length_only() -> None:
    assert Segments((3, 3, 5, 3, 1, 1, 1), CPU).runs == [(0, 2, 3), (6, 1, 5), (11, 1, 3), (14, 3, 1)]


def test_by_length_is_stable() -> None:
    assert by_length(["ccc", "a", "bb", "d", "ee"]) == [1, 3, 2, 4, 0]


def test_inverse_undoes_an_order() -> None:
    order = random.Random(1).sample(range(20), 20)
    items = [f"text {i}" for i in range(20)]
    shuffled = [items[i] for i in order]
    assert [shuffled[i] for i in inverse(order, CPU).tolist()] == items
    assert inverse([], CPU).shape == (0,)


@pytest.mark.parametrize("budget", [1, 7, 20, 50, 10_000])
def test_token_batches_keep_the_budget_and_lose_nothing(budget: int) -> None:
    lengths = [random.Random(2).randint(1, 12) for _ in range(3)] + [30, 1, 9, 9, 2, 17, 5, 5]
    batches = token_batches(lengths, budget)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths)
    for batch in batches:
        assert sum(lengths[i] for i in batch) <= budget or len(batch) == 1
    for batch, following in itertools.pairwise(batches):
        filled = sum(lengths[i] for i in batch)
        assert filled + lengths[following[0]] > budget, "a batch was closed although the next text still fitted"


def test_no_texts_no_batches() -> None:
    assert token_batches([], 10) == []


def test_a_batch_may_fill_its_budget_exactly() -> None:
    assert token_batches([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert token_batches([4, 6], 10) == [[0, 1]]


@pytest.mark.parametrize("budget", [1, 12, 40, 10_000])
def test_padded_batches_keep_the_budget_with_their_padding(budget: int) -> None:
    lengths = random.Random(3).choices(range(1, 13), k=20)
    batches = token_batches(lengths, budget, padded=True)
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths)
    for batch, following in itertools.pairwise([*batches, []]):
        longest = max(lengths[i] for i in batch)
        assert len(batch) * longest <= budget or len(batch) == 1
        assert not following or (len(batch) + 1) * lengths[following[0]] > budget
    assert token_batches([1, 1, 6], 10, padded=True) == [[0, 1], [2]]


def test_neighbours_keep_order_and_budget() -> None:
    texts = [[1], [2, 2], [3, 3, 3], [4] * 9, [5]]
    assert neighbours(texts, 3) == [[[1], [2, 2]], [[3, 3, 3]], [[4] * 9], [[5]]]
    assert neighbours(texts, 100) == [texts]
    assert neighbours([], 5) == [[]]


def test_a_cpu_takes_smaller_batches() -> None:
    assert budget_on(CPU, 16_384) == CPU_TOKENS
    assert budget_on(CPU, 100) == 100
    assert budget_on(torch.device("cuda"), 16_384) == 16_384

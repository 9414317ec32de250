"""The start of a moved skip against least squares over all texts at once, and what it gives on unseen texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pe.method.skip_start import RIDGE, directions, fit_skip
from pe.model import Instruction, PromptEmbedder, Requests
from tests.embedders import build
from tests.tiny import WORDS

INSTRUCTIONS = [Instruction("Find the same thing"), Instruction("Another task", "document")]


def requests(first: int, count: int) -> Requests:
    texts = [f"{WORDS[n % 10]} {WORDS[n // 10 % 10]} and {n} {WORDS[n * 7 % 10]}" for n in range(first, first + count)]
    return Requests(texts, INSTRUCTIONS, [n % 2 for n in range(count)])


def pair(source_width: int = 32) -> tuple[PromptEmbedder, PromptEmbedder]:
    """A fresh model to fit and a source of that width."""
    width = {"hidden_size": source_width, "head_dim": source_width // 4}
    return build("mistral_window", skip="weighted", reader="none"), build("qwen3", skip="weighted", shape=width)


def cosines(rows: Tensor) -> Tensor:
    return (rows @ rows.T)[*torch.triu_indices(len(rows), len(rows), 1)]


def agreement(model: PromptEmbedder, source: PromptEmbedder, texts: Requests) -> float:
    """Correlation of the two models' cosines between the texts."""
    with torch.no_grad():
        both = torch.stack([cosines(embedder(texts)) for embedder in (model, source)])
    return float(torch.corrcoef(both)[0, 1])


@pytest.mark.parametrize("source_width", [16, 32, 48])
def test_it_is_ridge_regression_of_what_the_soft_tokens_lack(source_width: int) -> None:
    model, source = pair(source_width)
    batches = [requests(0, 50), requests(50, 41)]
    prompted, means, wanted = [], [], []
    for batch in batches:
        with torch.no_grad():
            for found, part in zip((prompted, means), model.prompted_and_means(batch), strict=True):
                found.append(part.double())
            wanted.append(source(batch).double())
    e, m, t = (torch.cat(parts) for parts in (prompted, means, wanted))
    assert fit_skip(model, source, batches) == 91
    ridge = RIDGE * (m * m).sum(0).mean()
    rows = torch.cat([m, ridge.sqrt() * torch.eye(32, dtype=m.dtype)])
    goal = 2 * t @ directions(t.T @ t, 32) - e
    expected = torch.linalg.lstsq(rows, F.pad(goal, (0, 0, 0, 32))).solution
    assert model.skip is not None
    found = model.skip.weight.detach().double()
    assert torch.allclose(found / found.norm(), expected / expected.norm(), atol=1e-5)
    assert found.norm().item() == pytest.approx(32**0.5, rel=1e-5)


@pytest.mark.parametrize("source_width", [16, 32, 48])
def test_texts_it_has_not_seen_come_closer_to_the_source(source_width: int) -> None:
    model, source = pair(source_width)
    before = agreement(model, source, requests(2000, 60))
    fit_skip(model, source, [requests(0, 400)])
    assert agreement(model, source, requests(2000, 60)) > before + 0.25


def test_modes_and_everything_but_the_skip_stay(tiny_models: Path) -> None:
    model, source = pair()
    model.train()
    source.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit_skip(model, source, [requests(0, 20)])
    assert model.training
    assert not source.training
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"skip.weight"}


def test_directions_keep_what_varies_most() -> None:
    rows = torch.randn(200, 6, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1, 3.0, 0.2, 2.0])
    kept = directions(rows.T @ rows, 3)
    assert torch.allclose(kept.T @ kept, torch.eye(3, dtype=kept.dtype))
    assert (rows @ kept).square().sum() > 0.95 * rows.square().sum()
    assert torch.equal(rows @ directions(rows.T @ rows, 8), F.pad(rows, (0, 2)))


def test_a_model_without_a_skip_is_refused() -> None:
    source = pair()[1]
    with pytest.raises(ValueError, match="skip: expected weighted, got none"):
        fit_skip(build("qwen3"), source, [requests(0, 4)])

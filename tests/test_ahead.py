"""Texts read before their step: the same embeddings, gradients and training as texts read in it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pe.config import Recipe
from pe.method.ahead import ReadAhead
from pe.method.attention import KeyValues
from pe.method.backbone import Backbone, Pool
from pe.model import PromptEmbedder, Requests
from pe.train import fit
from tests.embedders import LONGER, REQUESTS, build, captured, gradients, relative_error
from tests.training import accelerator, new_model, plan_of

SKIPS = pytest.mark.parametrize("skip", ["none", "weighted"])


def ahead_of(model: PromptEmbedder) -> ReadAhead:
    return ReadAhead(model, contextlib.nullcontext)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each pass of the backbone over texts had."""
    counts: list[int] = []
    whole = Backbone.read

    def read(
        self: Backbone, texts: Sequence[Sequence[int]], pool: Pool | None = None, *, exact: bool = False
    ) -> KeyValues:
        counts.append(len(texts))
        return whole(self, texts, pool, exact=exact)

    monkeypatch.setattr(Backbone, "read", read)
    return counts


@SKIPS
@pytest.mark.parametrize("pooling", ["mean_prompt", "last"])
def test_read_texts_embed_alike(skip: str, pooling: str) -> None:
    model = build("qwen3", layout="suffix", pooling=pooling, reader="activated_lora", skip=skip)
    expected, out = model(LONGER), model(model.read_texts(LONGER))
    assert torch.equal(out, expected)
    right = gradients(model, expected)
    for name, gradient in gradients(model, out).items():
        assert torch.equal(gradient, right[name]), name


def test_texts_in_parts_embed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU reads a large batch in parts and pools the states of each; read ahead, all of them at once."""
    monkeypatch.setattr("pe.method.backbone.CPU_TOKENS", 16)
    model = build("qwen3", skip="weighted")
    expected, out = model(LONGER), model(model.read_texts(LONGER))
    assert relative_error(out, expected) < 1e-6
    right = gradients(model, expected)
    for name, gradient in gradients(model, out).items():
        assert relative_error(gradient, right[name]) < 1e-5, name


@SKIPS
def test_weights_may_train_in_between(skip: str) -> None:
    """Texts read before a change of every trained weight embed as those read after it."""
    model = build("qwen3", reader="activated_lora", skip=skip)
    texts, before = model.read_texts(REQUESTS), model(REQUESTS)
    with torch.no_grad():
        for part in model.trainable_parameters().values():
            for parameter in part:
                parameter += 0.1 * torch.randn_like(parameter)
    assert relative_error(model(REQUESTS), before) > 1e-2
    assert torch.equal(model(texts), model(REQUESTS))


def test_the_prefix_layout_reads_behind_its_prompt() -> None:
    model = build("qwen3", layout="prefix", pooling="mean_text")
    with pytest.raises(ValueError, match="texts are read before their prompts in 'suffix', got 'prefix'"):
        model.read_texts(REQUESTS)


def test_what_was_begun_is_taken_once(reads: list[int]) -> None:
    ahead = ahead_of(build("qwen3"))
    same = Requests(list(REQUESTS.texts), list(REQUESTS.instructions), list(REQUESTS.index))
    reads.clear()
    ahead.start(REQUESTS)
    assert reads == [4]
    assert sorted(ahead.take(same).order) == [0, 1, 2, 3]
    assert reads == [4]
    ahead.take(same)
    assert reads == [4, 4]


def test_another_batch_is_not_mistaken(reads: list[int]) -> None:
    model = build("qwen3")
    ahead, expected = ahead_of(model), model(LONGER)
    other = dataclasses.replace(LONGER, index=[1, 1, 1, 1, 1])
    reads.clear()
    ahead.start(other)
    assert torch.equal(model(ahead.take(LONGER)), expected)
    assert reads == [5, 5]


def test_with_recorded_passes() -> None:
    model, other = build("llama", skip="weighted"), build("llama", skip="weighted")
    ahead, found = ahead_of(model), []
    captured(model)
    batches = [REQUESTS, LONGER, REQUESTS, LONGER]
    for embedder in (model, other):
        optimizer = torch.optim.SGD([p for part in embedder.trainable_parameters().values() for p in part], lr=0.5)
        losses: list[Tensor] = []
        for number, batch in enumerate(batches):
            embeddings = embedder(ahead.take(batch) if embedder is model else batch)
            if embedder is model and number + 1 < len(batches):
                ahead.start(batches[number + 1])
            losses.append((embeddings[0] @ embeddings[1:].T).exp().sum())
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(torch.stack(losses).detach())
    assert relative_error(found[0], found[1]) < 1e-4
    assert found[0].unique().numel() == len(batches)


def test_training_is_the_same(recipe: Recipe, reads: list[int]) -> None:
    found = []
    for on in (False, True):
        changed = dataclasses.replace(
            recipe,
            train=dataclasses.replace(recipe.train, read_ahead=on, save_every=recipe.train.steps),
        )
        model = new_model(changed)
        reads.clear()
        history = fit(model, plan_of(changed), changed, accelerator())
        found.append((history, model.trainable_state(), list(reads)))
    (plain, weights, texts), (ahead, ahead_weights, ahead_texts) = found
    assert ahead.losses == plain.losses
    assert (ahead.texts, ahead.truncated, ahead.tokens) == (plain.texts, plain.truncated, plain.tokens)
    assert all(torch.equal(value, ahead_weights[name]) for name, value in weights.items())
    # A probe of two texts goes before all steps, behind the fifth, here behind the texts of the sixth, and behind all
    assert texts == [2, *texts[1:6], 2, texts[7], 2]
    assert ahead_texts == [2, *texts[1:6], texts[7], 2, 2]
    assert recipe.train.steps == 6

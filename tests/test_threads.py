"""Threads that share an embedder get what they would get one after another, or one sentence while it trains."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pe.baselines.frozen import FrozenEncoder
from pe.baselines.linear import LinearEmbedder
from pe.baselines.lora import Form, LoraEmbedder
from pe.config import Recipe
from pe.method.turns import BeingTrained
from pe.model import Instruction, PromptEmbedder, Requests
from pe.train import fit
from tests.embedders import backbone, build, lora, static
from tests.training import accelerator, new_model, plan_of

WORKERS = pytest.mark.parametrize("workers", [2, 4])
CALLS = 24
FIND, SAME = "find the answer", "same topic?"
BATCHES = [
    ["the cat sat", "a"],
    ["an old man walks along the other bank of the river", "", "the end"],
    ["naïve 日本語", "one more", "the end of a day", "b"],
    ["moon"],
]
Call = Callable[[list[str]], np.ndarray]


@pytest.fixture(autouse=True)
def _often_switching() -> Iterator[None]:
    """Threads take turns in the middle of every call, not only in long ones."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def acting(model: PromptEmbedder) -> PromptEmbedder:
    """The model with a reader and a skip that are not what they were at the start."""
    generator = torch.Generator().manual_seed(7)
    parts = model.trainable_parameters()
    with torch.no_grad():
        for parameter in (*parts["reader"], *parts["skip"]):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def embedder() -> PromptEmbedder:
    return acting(build("qwen3", reader="activated_lora", skip="weighted"))


def assert_as_serial(workers: int, calls: list[Callable[[], np.ndarray]]) -> None:
    """Every call gives in a pool of threads what it gives alone."""
    expected = [call() for call in calls]
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(calls[number % len(calls)]) for number in range(CALLS)]
    for number, future in enumerate(futures):
        np.testing.assert_allclose(future.result(), expected[number % len(calls)], atol=1e-6)


def each_batch(*calls: Call) -> list[Callable[[], np.ndarray]]:
    return [lambda call=call, texts=texts: call(texts) for texts in BATCHES for call in calls]


@WORKERS
def test_encode(workers: int) -> None:
    model = embedder()
    assert_as_serial(
        workers,
        each_batch(
            lambda texts: model.encode(texts, instruction=FIND),
            lambda texts: model.encode(texts, instruction=SAME, side="document", batch_tokens=20),
        ),
    )
    texts = sum(len(texts) for texts in BATCHES)
    assert model.truncation.texts == 2 * texts + 2 * texts * CALLS // (2 * len(BATCHES))


@WORKERS
def test_encode_many(workers: int) -> None:
    model = embedder().train()
    wanted = ([FIND, SAME], [SAME])
    calls = (lambda texts, own=own: model.encode_many(texts, instructions=own) for own in wanted)
    assert_as_serial(workers, each_batch(*calls))
    assert model.training


@WORKERS
def test_a_prefix(workers: int) -> None:
    model = build("qwen3", layout="prefix", pooling="mean_text", conditioning="instruction_and_text")
    assert_as_serial(workers, each_batch(lambda texts: model.encode(texts, instruction=FIND)))


@WORKERS
def test_prompt_bank(workers: int) -> None:
    """Prompts that are written while others are asked for, of weights that change in between."""
    model = embedder()

    def write(texts: list[str]) -> np.ndarray:
        with torch.no_grad():
            next(model.prompter.parameters()).add_(0)  # the same weights under another version: all are written anew
        return model.prompt_bank([Instruction(f"find {text}") for text in texts]).numpy()

    assert_as_serial(workers, each_batch(write, lambda texts: model.encode(texts, instruction=SAME)))


@WORKERS
def test_sentence_transformers(workers: int, tmp_path: Path, tiny_models: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from pe.config import BackboneConfig, ModelConfig, PrompterConfig

    config = ModelConfig(
        prompter=PrompterConfig(model=str(tiny_models / "prompter"), soft_tokens=3),
        backbone=BackboneConfig(model=str(tiny_models / "one")),
        reader="activated_lora",
        skip="weighted",
    )
    acting(PromptEmbedder.from_config(config)).save_pretrained(tmp_path / "model")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu", trust_remote_code=True)
    assert_as_serial(
        workers,
        each_batch(
            lambda texts: model.encode(texts, prompt=FIND, batch_size=2),
            lambda texts: model.encode_document(texts, prompt=SAME),
        ),
    )


def baselines() -> dict[str, Callable[[], Any]]:
    forms: tuple[Form, ...] = ("padded", "packed")
    return {
        **{form: lambda form=form: lora(form, dropout=0.5) for form in forms},
        "static": lambda: static(reader="activated_lora", skip="weighted"),
        "linear": lambda: LinearEmbedder(backbone()),
        "frozen": lambda: FrozenEncoder(backbone()),
    }


@pytest.mark.parametrize("kind", baselines())
def test_baselines(kind: str) -> None:
    model = baselines()[kind]()
    forward = model.eval() if isinstance(model, nn.Module) else model

    def embed(texts: list[str]) -> np.ndarray:
        return forward(Requests(texts, [Instruction(FIND)], [0] * len(texts))).numpy(force=True)

    assert_as_serial(4, each_batch(embed, lambda texts: model.encode(texts, instruction=FIND)))


def test_systems_of_one_backbone() -> None:
    """What a call switches is the backbone's, whoever calls."""
    model = embedder()
    frozen = FrozenEncoder(model.backbone)
    encoders = (model, frozen, LinearEmbedder(model.backbone))
    assert_as_serial(4, each_batch(*(lambda texts, own=own: own.encode(texts, instruction=FIND) for own in encoders)))


def test_a_loop_of_ones_own_beside_an_encoding_thread() -> None:
    """Forward and backward in one thread, under weights that stay; encoding in another."""
    model = embedder().train()
    requests = Requests(BATCHES[2], [Instruction(FIND)], [0] * 4)
    parameters = [p for part in model.trainable_parameters().values() for p in part]

    def step() -> np.ndarray:
        model.train()
        embeddings = model(requests)
        gradients = torch.autograd.grad(embeddings[:, 0].sum(), parameters)
        return np.append(embeddings.numpy(force=True).ravel(), float(gradients[0].norm()))

    assert_as_serial(2, each_batch(lambda _: step(), lambda texts: model.encode(texts, instruction=FIND).ravel()))
    assert model.training


def evaluating(recipe: Recipe) -> Recipe:
    """The recipe for two steps, with an evaluation behind each."""
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, steps=2, eval_every=1))


def in_another_thread(call: Callable[[], object]) -> BaseException | None:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).exception(timeout=60)


def test_other_threads_are_refused_while_it_trains(recipe: Recipe) -> None:
    model, errors, scores = new_model(recipe), [], []
    frozen = FrozenEncoder(model.backbone)
    calls: list[Callable[[], object]] = [
        lambda: model.encode(["the river"], instruction=FIND),
        lambda: model.encode_many(["the river"], instructions=[FIND]),
        lambda: model.prompt_bank([Instruction(FIND)]),
        lambda: model(Requests(["the river"], [Instruction(FIND)], [0])),
        lambda: frozen.encode(["the river"], instruction=FIND),
        lambda: model.tokenize(Requests(["the river"], [Instruction(FIND)], [0])),
        lambda: model.load_trainable_state(model.trainable_state()),
        model.eval,
        model.float,
    ]

    def evaluate() -> float:
        scores.append(float(model.encode(["the river"], instruction=FIND).sum()))
        errors.extend(map(in_another_thread, calls))
        return scores[-1]

    fit(model, plan_of(recipe), evaluating(recipe), accelerator(), evaluate=evaluate)
    assert len(scores) == 2
    assert scores[0] != scores[1]
    assert len(errors) == 2 * len(calls)
    assert all(isinstance(error, BeingTrained) for error in errors)
    assert str(errors[0]) == (
        "the model is being trained by another thread, so what it would give now belongs to no step; encode with a copy"
        " made before training (copy.deepcopy), or after it"
    )
    assert all(in_another_thread(call) is None for call in calls)


@pytest.mark.parametrize("end", [KeyboardInterrupt, RuntimeError])
def test_training_that_fails_leaves_the_model_to_all(recipe: Recipe, end: type[BaseException]) -> None:
    model = new_model(recipe)

    def stop() -> float:
        raise end

    with pytest.raises(end):
        fit(model, plan_of(recipe), evaluating(recipe), accelerator(), evaluate=stop)
    assert in_another_thread(lambda: model.encode(["the river"], instruction=FIND)) is None


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_waits_for_nobody(kind: str) -> None:
    model = embedder()
    expected = model.encode(BATCHES[0], instruction=FIND)
    with model.backbone.turns.training():
        model.encode(BATCHES[1], instruction=FIND)
        copied = COPIES[kind](model)
        with ThreadPoolExecutor(1) as pool:
            got = pool.submit(copied.encode, BATCHES[0], instruction=FIND).result(timeout=60)
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert copied.backbone.turns is not model.backbone.turns


def test_lora_copies_too() -> None:
    model = lora("packed")
    copied: LoraEmbedder = copy.deepcopy(model)
    np.testing.assert_array_equal(
        copied.encode(BATCHES[0], instruction=FIND), model.encode(BATCHES[0], instruction=FIND)
    )

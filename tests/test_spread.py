"""How alike an embedder's instructions are to it, seen in training and told to its user."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pe.card import alike
from pe.config import BackboneConfig, DatasetConfig, LossConfig, ModelConfig, PrompterConfig, Recipe, TrainConfig
from pe.measure.spread import Spread, mean_cosine, spread
from pe.model import PromptEmbedder
from pe.train import build_accelerator, build_plan, fit, instructions_of, spread_of, train

WORDS = ["red", "green", "blue", "round", "square", "flat", "soft", "hard", "old", "new", "wet", "dry"]


def written(folder: Path) -> DatasetConfig:
    """Under `same` a text goes with its own word, under `other` with the next one."""
    tasks = {
        name: {"contradicts": other, "dataset": "x", "document": "a word", "train": train, "unseen": []}
        for name, other, train in (("same", "other", ["equal word"]), ("other", "same", ["unlike: find the next"]))
    }
    rows = []
    for number, word in enumerate(WORDS):
        follows = WORDS[(number + 1) % len(WORDS)]
        sides = {
            "same": {"positive": word, "negatives": [follows]},
            "other": {"positive": follows, "negatives": [word]},
        }
        rows.append({"query": f"the {word} one", "sides": sides})
    (folder / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DatasetConfig(path=str(folder / "x.jsonl"), instruct=str(folder / "tasks.yaml"))


def recipe(tiny_models: Path, folder: Path, steps: int, **model: Any) -> Recipe:
    return Recipe(
        output=str(folder / "run"),
        model=ModelConfig(
            prompter=PrompterConfig(model=str(tiny_models / "prompter"), soft_tokens=2, trainable="none"),
            backbone=BackboneConfig(model=str(tiny_models / "one")),
            max_length=32,
            **model,
        ),
        data=[written(folder)],
        loss=LossConfig(),
        train=TrainConfig(steps=steps, batch_size=8, lr=1e-2),
    )


def test_the_mean_is_over_pairs() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    assert mean_cosine(rows) == pytest.approx((0 + 2 * 0.5**0.5) / 3)


def test_training_on_contradicting_instructions_parts_them(tiny_models: Path, tmp_path: Path) -> None:
    """With a lens the two instructions end far apart; the losses fall below those of guessing a side."""
    options = recipe(tiny_models, tmp_path, 60, lens_rank=8)
    torch.manual_seed(0)
    from rich.console import Console

    plan = build_plan(options, Console(quiet=True))
    model = PromptEmbedder.from_config(options.model)
    model.start(instructions_of(plan))
    fit(model, plan, options, build_accelerator(options))
    found = spread_of(model, plan)
    assert found is not None
    assert found.prompts is not None
    assert found.embeddings < 0.9


def test_a_run_says_when_they_stay_alike(tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe(tiny_models, tmp_path, 6))
    told = " ".join(capsys.readouterr().err.split())
    assert "mean cosine between 2 instructions: prompts" in told
    assert "warning: the embeddings of a text under 2 instructions are alike" in told
    assert "**Warning: the embeddings" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_of_one_instruction_there_is_nothing_to_say(tiny_models: Path, tmp_path: Path) -> None:
    model = PromptEmbedder.from_config(recipe(tiny_models, tmp_path, 1).model)
    assert spread(model, ["find it", "find it"], ["a"]) is None
    assert alike(None) == ""


def test_many_instructions_are_sampled(tiny_models: Path, tmp_path: Path) -> None:
    model = PromptEmbedder.from_config(recipe(tiny_models, tmp_path, 1).model)
    found = spread(model, [f"find number {n}" for n in range(40)], ["a", "b"])
    assert found is not None
    assert found.instructions == 14


def test_prompts_that_read_the_text_have_no_figure_of_their_own(tiny_models: Path, tmp_path: Path) -> None:
    model = PromptEmbedder.from_config(recipe(tiny_models, tmp_path, 1, conditioning="instruction_and_text").model)
    found = spread(model, ["find it", "avoid it"], ["a"])
    assert found is not None
    assert found.prompts is None
    assert str(found).startswith("mean cosine between 2 instructions: embeddings ")


def test_the_card_shows_it() -> None:
    apart = alike(Spread(instructions=3, prompts=0.5, embeddings=0.25))
    assert apart == "Mean cosine between 3 instructions: prompts 0.5000, embeddings 0.2500 (1: alike).\n\n"
    assert "Warning" in alike(Spread(instructions=3, prompts=0.99, embeddings=0.999))

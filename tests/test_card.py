"""The model card: its code runs, its instructions have names, and it tells of no machine."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pe.card import model_card, shown
from pe.config import BackboneConfig, DatasetConfig, ModelConfig, PrompterConfig, Recipe
from pe.data.instructions import trained_instructions
from pe.model import PromptEmbedder

KINDS = 'Say "which" \\ of a|b\nit is'


@pytest.fixture(scope="module")
def model(tiny_models: Path) -> PromptEmbedder:
    prompter = PrompterConfig(model=str(tiny_models / "prompter"), soft_tokens=2)
    config = ModelConfig(prompter=prompter, backbone=BackboneConfig(model=str(tiny_models / "one")), max_length=16)
    return PromptEmbedder.from_config(config).eval()


@pytest.fixture
def recipe(model: PromptEmbedder, tmp_path: Path) -> Recipe:
    data = [
        DatasetConfig(path=str(tmp_path / "nli.jsonl"), instruction="Find the same", weight=2),
        DatasetConfig(path="hf://owner/kinds", instruction=KINDS, document_instruction="A kind"),
    ]
    return Recipe(output=str(tmp_path / "run"), model=model.config, data=data)


def test_the_code_of_a_card_runs(model: PromptEmbedder, recipe: Recipe, tmp_path: Path) -> None:
    model.instructions = trained_instructions(recipe.data)
    model.save_pretrained(tmp_path / "model")
    code = re.findall(r"```python\n(.*?)```", model_card(recipe, model, 1.0, {}), re.DOTALL)
    assert len(code) == 1
    found: dict[str, np.ndarray] = {}
    exec(code[0].replace('"MODEL"', repr(str(tmp_path / "model"))), found)
    expected = {"queries": ("Find the same", "query"), "documents": ("Find the same", "document")}
    for name, (instruction, side) in (expected | {"embeddings": (KINDS, "query")}).items():
        rows = model.encode(["a text"], instruction=instruction, side=side)  # type: ignore[arg-type]
        assert np.allclose(found[name], rows, atol=1e-6), name


def test_a_card_names_instructions_and_no_machine(model: PromptEmbedder, recipe: Recipe, tmp_path: Path) -> None:
    model.instructions = trained_instructions(recipe.data)
    card = model_card(recipe, model, 1.0, {})
    assert "| `query` | Find the same |\n| `document` | Find the same |\n| `nli` | Find the same |\n" in card
    assert '| `kinds` | Say "which" \\ of a\\|b it is |\n| `kinds-document` | A kind |\n' in card
    assert "| `nli.jsonl` | 2 |\n| `hf://owner/kinds` | 1 |\n" in card
    assert "`prompter` writes 2 soft tokens that turn the frozen\n`one` into" in card
    assert str(tmp_path.parent) not in card
    assert str(Path(model.config.backbone.model).parent) not in card


def test_a_card_without_a_default(model: PromptEmbedder, recipe: Recipe) -> None:
    model.instructions = {}
    card = model_card(recipe, model, 1.0, {})
    assert 'model.encode(["a text"], instruction="Retrieve semantically similar text")' in card
    assert 'model.encode(["a text"])' not in card
    assert "## Instructions" not in card


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B"),
        ("models/tiny", "models/tiny"),
        ("hf://owner/name:x@train", "hf://owner/name:x@train"),
        ("/home/me/models/tiny", "tiny"),
        ("~/models/tiny", "tiny"),
        ("../../me/tiny", "tiny"),
    ],
)
def test_what_is_shown_of_a_name(name: str, expected: str) -> None:
    assert shown(name) == expected

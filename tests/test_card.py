"""The model card: its code runs, its instructions have names, and it tells of no machine."""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard, ModelCardData

from pe.card import model_card, shown
from pe.config import BackboneConfig, DatasetConfig, ModelConfig, PrompterConfig, Recipe
from pe.data.instructions import trained_instructions
from pe.evaluate import Scores, TaskScore
from pe.hub import with_data
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
    assert [("SentenceTransformer" in block, "PromptEmbedder" in block) for block in code] == [
        (False, True),
        (True, False),
    ]
    expected = {"queries": ("Find the same", "query"), "documents": ("Find the same", "document")}
    for block in code:
        found: dict[str, np.ndarray] = {}
        exec(block.replace('"MODEL"', repr(str(tmp_path / "model"))), found)
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


def test_what_a_card_says_to_machines(
    model: PromptEmbedder, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Licence and origins of the models, names of the hub's sets, and the last scores, as the hub reads them back."""
    for name in ("prompter", "one"):
        shutil.copytree(Path(model.config.backbone.model).parent / name, tmp_path / name)
        data = ModelCardData(license="mit", base_model=f"owner/{name}")
        (tmp_path / name / "README.md").write_text(with_data(data, "A model.\n"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    config = ModelConfig(prompter=PrompterConfig(model="prompter"), backbone=BackboneConfig(model="one"), max_length=16)
    made = PromptEmbedder.from_config(config)
    made.name = "mine"
    task = TaskScore(
        type="STS", metric="cosine_spearman", score=61.237, seconds=1.0, instruction="x", document_instruction=None
    )
    tasks = {
        "PE-STSb-dev": task,
        str(tmp_path / "own.jsonl"): replace(task, score=5.0),
        "bad": replace(task, score=math.nan),
    }
    scores = {name: Scores(model="mine", revision="", tasks=tasks) for name in ("before", "trained")}
    card = ModelCard(model_card(replace(recipe, model=config), made, 1.0, scores))
    data = card.data
    assert (data.license, data.base_model, data.datasets) == ("mit", ["owner/one", "owner/prompter"], ["owner/kinds"])
    assert (data.model_name, data.pipeline_tag) == ("mine", "sentence-similarity")
    assert [(x.task_type, x.dataset_name, x.metric_type, x.metric_value) for x in data.eval_results] == [
        ("STS", "PE-STSb-dev", "cosine_spearman", 61.24),
        ("STS", "own.jsonl", "cosine_spearman", 5.0),
    ]
    assert str(tmp_path) not in str(card)
    other = ModelCard(model_card(replace(recipe, license="apache-2.0"), model, 1.0, {})).data
    assert (other.license, other.base_model, other.eval_results) == ("apache-2.0", None, None)


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

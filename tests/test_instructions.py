"""The instructions of training: their names, the default, and that saved, moved and older folders have them."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pe import encode
from pe.config import BackboneConfig, DatasetConfig, ModelConfig, PrompterConfig
from pe.data.instructions import trained_instructions
from pe.model import PromptEmbedder
from pe.saving import read_config
from pe.transfer import move

TEXTS = ["the river", "moon", "bread and honey"]


def sets(*rows: tuple[str, float, str, str | None]) -> list[DatasetConfig]:
    """Data sets of (path, weight, instruction, document instruction)."""
    return [DatasetConfig(path=p, weight=w, instruction=i, document_instruction=d) for p, w, i, d in rows]


def test_every_set_goes_by_its_name() -> None:
    named = trained_instructions(
        sets(
            ("data/nli.v2.JSONL.xz", 2, "Same meaning", None),
            ("/home/me/medquad.jsonl", 1, "Find answers", "A passage"),
            ("hf://owner/pairs-1.5:hard@dev", 1, "Find pairs", "A pair"),
            ("hf://owner/plain", 1, "Same meaning", None),
        )
    )
    assert named == {
        "query": "Same meaning",
        "document": "Same meaning",
        "nli.v2": "Same meaning",
        "medquad": "Find answers",
        "medquad-document": "A passage",
        "pairs-1.5-hard": "Find pairs",
        "pairs-1.5-hard-document": "A pair",
        "plain": "Same meaning",
    }
    assert list(named)[:2] == ["query", "document"]
    assert trained_instructions([]) == {}


def test_no_name_stands_for_two_instructions() -> None:
    named = trained_instructions(
        sets(("a/x.jsonl", 3, "One", None), ("b/x.jsonl", 1, "Two", None), ("c/x.jsonl", 1, "One", None))
        + sets(("query.jsonl", 1, "Three", None), ("document.jsonl", 1, "One", None), ("d/x.jsonl", 1, "Four", None))
    )
    assert named == {
        "query": "One",
        "document": "One",
        "x": "One",
        "x-2": "Two",
        "query-2": "Three",
        "x-3": "Four",
    }


@pytest.mark.parametrize(
    ("rows", "query", "document"),
    [
        ([("a", 1, "A", None), ("b", 2, "B", "P")], "B", "P"),
        ([("a", 1, "A", "P"), ("b", 1, "B", None)], "A", "P"),
        ([("a", 2, "A", None), ("b", 1.5, "B", "P"), ("c", 1, "B", "Q")], "B", "P"),
        ([("a", 1, "A", "P"), ("b", 1.5, "A", "Q"), ("c", 1, "A", "P")], "A", "P"),
        ([("a", 2, "A", "P"), ("b", 1, "B", "Q"), ("c", 1.5, "C", "Q")], "A", "P"),
    ],
)
def test_the_default_has_the_largest_weight(rows: list[Any], query: str, document: str) -> None:
    named = trained_instructions(sets(*rows))
    assert (named["query"], named["document"]) == (query, document)


NAMED = {
    "query": "Find the same thing",
    "document": "Find the same thing",
    "pairs": "Find the same thing",
    "labelled": "Find the kind",
    "labelled-document": "A thing",
}


def test_a_trained_embedder_needs_no_instruction(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = PromptEmbedder.from_pretrained(checkpoint)
    assert model.instructions == NAMED == read_config(checkpoint)["instructions"]
    model.name = str(tmp_path)  # what is said once is said once by name
    model.instructions |= {"document": "A thing"}
    with caplog.at_level(logging.WARNING):
        for side, instruction in (("query", "Find the same thing"), ("document", "A thing")):
            expected = model.encode(TEXTS, instruction=instruction, side=side)  # type: ignore[arg-type]
            for _ in range(2):
                assert np.array_equal(model.encode(TEXTS, side=side), expected)  # type: ignore[arg-type]
    said = [record.getMessage() for record in caplog.records if record.name == "pe.method.encoder"]
    assert [("'Find the same thing'" in line, "'A thing'" in line) for line in said] == [(True, False), (False, True)]
    model.save_pretrained(tmp_path / "again")
    assert PromptEmbedder.from_pretrained(tmp_path / "again").instructions == model.instructions


def test_a_move_keeps_them(checkpoint: Path, tiny_models: Path) -> None:
    source = PromptEmbedder.from_pretrained(checkpoint)
    config = dataclasses.replace(source.config, backbone=BackboneConfig(model=str(tiny_models / "two")))
    assert move(source, config).instructions == NAMED


def test_documents_without_an_instruction_take_the_queries(checkpoint: Path, tmp_path: Path) -> None:
    model = PromptEmbedder.from_pretrained(checkpoint)
    model.instructions = {"query": "Mine"}
    expected = model.encode(TEXTS, instruction="Mine", side="document")
    assert np.array_equal(model.encode(TEXTS, side="document"), expected)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config_sentence_transformers.json").read_text(encoding="utf-8"))
    assert saved["prompts"] == {"query": "Mine", "document": "Mine"}


def test_without_training_there_is_no_default(tiny_models: Path, tmp_path: Path) -> None:
    prompter = PrompterConfig(model=str(tiny_models / "prompter"), soft_tokens=2)
    config = ModelConfig(prompter=prompter, backbone=BackboneConfig(model=str(tiny_models / "one")), max_length=16)
    PromptEmbedder.from_config(config).save_pretrained(tmp_path / "saved")
    model = PromptEmbedder.from_pretrained(tmp_path / "saved")
    assert model.instructions == {}
    with pytest.raises(ValueError, match=r"instruction: expected a sentence, got none, .* no default"):
        model.encode(TEXTS)


def as_before(checkpoint: Path, folder: Path) -> dict[str, Any]:
    """Copy a saved embedder's config, as it was before it had instructions, into a copy of the folder."""
    shutil.copytree(checkpoint, folder)
    saved: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del saved["instructions"]
    (folder / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    return saved


def test_an_older_folder_has_those_of_its_recipe(checkpoint: Path, tmp_path: Path) -> None:
    as_before(checkpoint, tmp_path / "old")
    assert PromptEmbedder.from_pretrained(tmp_path / "old").instructions == NAMED
    for recipe in ("nothing: known\n", None):
        file = tmp_path / "old" / "recipe.yaml"
        file.unlink() if recipe is None else file.write_text(recipe, encoding="utf-8")
        model = PromptEmbedder.from_pretrained(tmp_path / "old")
        assert model.instructions == {}
        assert model.encode(TEXTS, instruction="Find it").shape == (3, model.dimensions)


@pytest.mark.parametrize("damaged", [["a"], {"query": 3}, "a"])
def test_damaged_instructions_are_refused(checkpoint: Path, tmp_path: Path, damaged: object) -> None:
    saved = as_before(checkpoint, tmp_path / "bad") | {"instructions": damaged}
    (tmp_path / "bad" / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: instructions: expected sentences by name, got"):
        PromptEmbedder.from_pretrained(tmp_path / "bad")


def test_the_command_line_says_which_it_takes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.txt"
    source.write_text("\n".join(TEXTS), encoding="utf-8")
    encode.main([str(checkpoint), str(source), str(tmp_path / "out.npy")])
    assert "no --instruction, so query texts go under 'Find the same thing'" in capsys.readouterr().err
    expected = PromptEmbedder.from_pretrained(checkpoint).encode(TEXTS, instruction="Find the same thing")
    assert np.allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)


def test_the_command_line_needs_one_where_there_is_no_default(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = as_before(checkpoint, tmp_path / "bare") | {"instructions": {}}
    (tmp_path / "bare" / "config.json").write_text(json.dumps(saved), encoding="utf-8")
    (tmp_path / "in.txt").write_text("a", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        encode.main([str(tmp_path / "bare"), str(tmp_path / "in.txt"), str(tmp_path / "out.npy")])
    assert stopped.value.code == 2
    assert "instruction: expected a sentence, got none" in capsys.readouterr().err
    assert not (tmp_path / "out.npy").exists()

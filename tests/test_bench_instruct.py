"""The table of instructions: every system trains and is scored by its command; records become rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench import instruct, layers, records

SIDES = ("yea", "nay")


@pytest.fixture
def recipe(tiny_models: Path, tmp_path: Path) -> Path:
    tasks = {
        name: {
            "contradicts": other,
            "dataset": "nli",
            "document": "a text",
            "train": [f"find {name}"],
            "unseen": [f"{name}!"],
        }
        for name, other in (SIDES, SIDES[::-1])
    }
    folder = tmp_path / "data" / "instruct"
    (folder / "eval").mkdir(parents=True)
    (folder / "instructions.yaml").write_text(yaml.safe_dump(tasks))
    rows = [
        {
            "query": f"number {n}",
            "sides": {
                "yea": {"positive": f"yes {n}", "negatives": [f"no {n}"]},
                "nay": {"positive": f"no {n}", "negatives": [f"yes {n}"]},
            },
        }
        for n in range(8)
    ]
    for file in (folder / "train.jsonl", folder / "eval" / "nli.jsonl"):
        file.write_text("\n".join(map(json.dumps, rows)))
    values: dict[str, Any] = {
        "output": str(tmp_path / "run"),
        "model": {
            "prompter": {"model": str(tiny_models / "prompter"), "soft_tokens": 2, "trainable": "none"},
            "backbone": {"model": str(tiny_models / "one")},
            "lens_rank": 4,
            "max_length": 32,
        },
        "data": [{"path": str(folder / "train.jsonl"), "instruct": str(folder / "instructions.yaml")}],
        "train": {"steps": 2, "batch_size": 4},
        "evaluate": {"tasks": ["PE-Instruct-NLI"], "data": str(tmp_path / "data")},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "recipe.yaml"


def test_every_system_is_trained_and_scored(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    instruct.main([str(recipe), "--systems", "pe", "pe-no-lens", "static", "lora"])
    rows = records.read("instruct")
    assert [row["system"] for row in rows] == ["pe", "pe-no-lens", "static", "static", "lora"]
    assert all(0 <= row["instruct"]["PE-Instruct-NLI"]["right_unseen"] <= 100 for row in rows)
    assert rows[0]["alike"]["instructions"] == 2
    assert "alike" not in rows[-1]
    page = instruct.render(tmp_path / "results")
    assert "NLI seen" in page
    assert "static prompts, lens (control), unseen wordings: nearest, seed 0" in page


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    assert instruct.render(tmp_path) == instruct.NOT_YET


def test_fewer_layers_are_trained_and_scored(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    layers.main(["--recipe", str(recipe), "--layers", "2", "--entries", "0", "1"])
    layers.main(["--recipe", str(recipe), "--layers", "1", "--train.text_store=memory"])
    rows = layers.newest(tmp_path / "results")
    assert [layers.layers_of(row) for row in rows] == ["1", "1 of 2", "2"]
    assert rows[0]["stored"], "the newest record of a number of layers stands for it"
    assert rows[0]["unseen"] is None, "what is followed is no part of a mean"
    assert "| 1 | " in layers.render(tmp_path / "results")
    layers.draw(tmp_path / "results", tmp_path)
    assert "1, 1 of 2, 2 layers, left to right" in (tmp_path / layers.PLOT).read_text()


def test_more_layers_than_there_are_are_refused(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        layers.main(["--recipe", str(recipe), "--layers", "9"])
    assert "layers" in capsys.readouterr().err

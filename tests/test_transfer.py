"""`python -m pe.transfer`: what a move may change, what it refuses, and what it leaves when it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from pe import transfer
from pe.model import PromptEmbedder
from pe.runs.recipes import load_recipe
from pe.saving import read_config


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        transfer.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_options_given_to_a_move_are_those_of_the_moved_model(
    checkpoint: Path, tiny_models: Path, tmp_path: Path
) -> None:
    out, new = tmp_path / "moved", str(tiny_models / "two")
    given = ["--model.backbone.dtype=bfloat16", "--model.alignment.init=orthogonal", "--model.skip=none"]
    given += ["--model.reader_lora.rank=3", "--model.max_length=9"]
    transfer.main([str(checkpoint), f"--backbone={new}", "--steps=2", f"--output={out}", *given])
    moved = PromptEmbedder.from_pretrained(out / "model")
    assert moved.backbone.dtype == torch.bfloat16
    assert moved.skip is None
    assert {min(p.shape) for p in moved.backbone.reader_parameters()} == {3}
    assert moved.config.alignment.init == "orthogonal"
    assert moved.alignment.report.residual is None
    assert moved.config.max_length == 9
    for file in (out / "recipe.yaml", out / "model" / "recipe.yaml"):
        assert load_recipe(file).model == moved.config
    card = (out / "model" / "README.md").read_text(encoding="utf-8")
    assert "| skip | none |" in card
    assert "| alignment | linear, orthogonal |" in card


@pytest.mark.parametrize(("given", "expected"), [([], 3), (["--model.backbone.entry_layer=2"], 2)])
def test_soft_tokens_enter_a_deeper_backbone_as_far_up(
    checkpoint: Path, tiny_models: Path, tmp_path: Path, given: list[str], expected: int
) -> None:
    source, deeper = tmp_path / "source", tmp_path / "deeper"
    for folder in (source, deeper):
        folder.mkdir()
    recipe = yaml.safe_load((checkpoint / "recipe.yaml").read_text())
    recipe["model"]["backbone"]["entry_layer"] = 1
    (source / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = json.loads((tiny_models / "two" / "config.json").read_text())
    layers = config.pop("num_hidden_layers")
    config.pop("layer_types", None)
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3 * layers}))

    arguments, overrides = transfer.parse([str(source), f"--backbone={deeper}", *given])
    assert transfer.transfer_recipe(arguments, overrides).model.backbone.entry_layer == expected


def test_a_move_refuses_what_belongs_to_the_prompting_llm(
    checkpoint: Path, tmp_path: Path, tiny_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "moved"
    given = ["--model.prompter.soft_tokens=2", "--model.conditioning=instruction_and_text"]
    given += ["--model.templates.query.text=a {text}"]
    arguments = [str(checkpoint), f"--backbone={tiny_models / 'two'}", "--steps=0", f"--output={out}"]
    message = refused(capsys, *arguments, *given)
    assert "model.prompter.soft_tokens (was 3, now 2)" in message
    assert "model.conditioning (was instruction, now instruction_and_text)" in message
    assert "model.templates.query.text (was {text}, now a {text})" in message
    assert not out.exists()


def test_steps_with_nothing_to_train_are_refused(
    checkpoint: Path, tmp_path: Path, tiny_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "moved"
    arguments = [str(checkpoint), f"--backbone={tiny_models / 'two'}", f"--output={out}"]
    bare = ["--model.alignment.kind=vocabulary", "--model.reader=none", "--model.skip=none"]
    assert "train.steps: expected 0, got 3" in refused(capsys, *arguments, "--steps=3", *bare)
    assert not out.exists()
    transfer.main([*arguments, "--steps=0", *bare])
    assert read_config(out / "model")["model"]["alignment"]["kind"] == "vocabulary"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--evaluate.tasks=[PE-Nothing]", "unknown task 'PE-Nothing'"),
        ("--loss.matryoshka=[99]", "loss.matryoshka: expected sizes up to 40, the backbone's width, got [99]"),
        ("--data=[]", "expected at least one data set"),
        ("--texts=-1", "--texts: expected at least 0, got -1"),
    ],
)
def test_a_move_is_checked_before_its_folder_is_made(
    checkpoint: Path, tmp_path: Path, tiny_models: Path, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    out = tmp_path / "moved"
    arguments = [str(checkpoint), f"--backbone={tiny_models / 'two'}", "--steps=2", f"--output={out}", option]
    assert message in refused(capsys, *arguments)
    assert not out.exists()


def test_damaged_weights_end_with_one_message(
    checkpoint: Path, tmp_path: Path, tiny_models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(checkpoint), "--backbone", str(damaged_backbone(tiny_models, tmp_path)), "--steps=0"]
    assert "cannot be read" in refused(capsys, *arguments, f"--output={tmp_path / 'moved'}")


def damaged_backbone(tiny_models: Path, folder: Path) -> Path:
    """A copy of a backbone with half of its weights file."""
    copy = folder / "damaged"
    copy.mkdir()
    for path in (tiny_models / "two").iterdir():
        content = path.read_bytes()
        (copy / path.name).write_bytes(content[: len(content) // 2] if path.suffix == ".safetensors" else content)
    return copy

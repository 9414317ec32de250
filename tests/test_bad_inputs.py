"""Each bad input of `tests/bad_inputs.py` ends its command with one sentence and code 2, and writes nothing over."""

from __future__ import annotations

import hashlib
import importlib
import shlex
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import yaml

from pe.runs.recipes import load_recipe
from pe.train import train
from tests.bad_inputs import BAD, Bad
from tests.tiny import WORDS, write_rows

RECIPE: dict[str, Any] = {
    "output": "run",
    "model": {
        "prompter": {"model": "prompter", "soft_tokens": 3},
        "backbone": {"model": "backbone"},
        "reader_lora": {"rank": 2, "alpha": 8},
        "max_length": 32,
    },
    "data": [{"path": "rows.jsonl", "instruction": "Find the same thing"}],
    "train": {"steps": 2, "batch_size": 4, "save_every": 1},
}

LEFT = ("run/logs/", "store/")
"""What a command may have begun: the log of a run that is resumed, and an empty store."""


@pytest.fixture(scope="module")
def project(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good project: recipe, data, models, and the run of a short training."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(tiny_models / "prompter", folder / "prompter")
    shutil.copytree(tiny_models / "one", folder / "backbone")
    write_rows(folder / "rows.jsonl", *({"query": f"{word}?", "positive": f"the {word}"} for word in WORDS))
    (folder / "texts.txt").write_text("a\nb\n", encoding="utf-8")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train(load_recipe("recipe.yaml"))
    return folder


def spoil(folder: Path, bad: Bad) -> None:
    for name, content in bad.files.items():
        place = folder / name
        if content is None:
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(place)
        else:
            place.write_bytes(content.encode() if isinstance(content, str) else content)


def contents(folder: Path) -> dict[str, str]:
    """Every file and link by its name, and what is in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or path.is_file():
            found[str(path.relative_to(folder))] = (
                str(path.readlink()) if path.is_symlink() else hashlib.md5(path.read_bytes()).hexdigest()
            )
    return found


@pytest.mark.parametrize("bad", BAD, ids=[bad.name for bad in BAD])
def test_bad_input(bad: Bad, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    folder = tmp_path / "here"
    shutil.copytree(project, folder, symlinks=True)
    spoil(folder, bad)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = contents(folder)
    command, *arguments = shlex.split(bad.command)
    capsys.readouterr()
    try:
        code: Any = importlib.import_module(f"pe.{command}").main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    *log, sentence = capsys.readouterr().err.strip().splitlines() or [""]
    assert code == 2, sentence
    assert sentence.startswith(f"pe.{command}: "), sentence
    assert all(part in sentence for part in bad.says), sentence
    assert not any(line.startswith(("pe.", "Traceback")) for line in log), log
    after = contents(folder)
    assert before.items() <= after.items(), "something was written over"
    assert all(name.startswith(LEFT) for name in after.keys() - before.keys()), "something was begun"


def test_names_are_unique_and_the_table_is_long() -> None:
    assert len({bad.name for bad in BAD}) == len(BAD) >= 200

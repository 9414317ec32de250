"""`python -m pe.sweep` as a user calls it: every combination once, one store, what is there is not repeated."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pe import sweep
from pe.config import Recipe, RecipeError
from pe.evaluate import Scores, TaskScore
from pe.runs.folder import RunFolder
from tests.training import write_recipe


@pytest.fixture
def path(tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of two steps whose scores are its rates."""
    monkeypatch.setattr("pe.train.check_evaluation", lambda _: None)

    def measurer(recipe: Recipe) -> object:
        task = TaskScore(
            type="STS",
            metric="spearman",
            score=1e4 * recipe.train.lr,
            seconds=1,
            instruction="a",
            document_instruction="",
        )
        return lambda model: Scores(model=model.name, revision="", tasks={"T": task})

    monkeypatch.setattr("pe.train.measurer", measurer)
    train = {"steps": 2, "batch_size": 6, "save_every": 1}
    return write_recipe(tiny_models, tmp_path, train=train, evaluate={"tasks": ["T"], "before": False})


def test_every_combination_once_and_the_best_is_named(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(path), "--train.lr", "1e-3,3e-3", "--train.seed=0,1", "--train.clip_norm=2"]
    sweep.main(arguments)
    told = capsys.readouterr()
    run = tmp_path / "run"
    assert told.out.splitlines()[-1] == f"best: 30.00 in {run}/lr=3e-3,seed=0"
    names = {f"lr={rate},seed={seed}" for rate in ("1e-3", "3e-3") for seed in (0, 1)}
    assert {file.name for file in run.iterdir()} == names | {"texts", "sweep.json"}
    rows = json.loads((run / "sweep.json").read_text())
    assert [(row["varied"]["train.lr"], row["mean"]) for row in rows] == [
        ("1e-3", 10),
        ("1e-3", 10),
        ("3e-3", 30),
        ("3e-3", 30),
    ]
    assert all(row["seconds"] > 0 for row in rows)
    read = re.findall(r"texts found, (\d+) read", told.err.replace("\n", " "))
    assert read[1] == read[2] == read[3]  # a seed's second rate finds all of its texts
    monkeypatch.setattr(sweep, "train", lambda *_, **__: pytest.fail("repeated a finished run"))
    sweep.main(arguments)
    assert json.loads((run / "sweep.json").read_text()) == rows
    with pytest.raises(SystemExit):
        sweep.main([*arguments, "--train.warmup=0.5"])
    assert "changed: train.warmup (was 0.1, now 0.5)" in capsys.readouterr().err


def test_an_unfinished_run_goes_on(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a finished one, which is taken as it is: its recipe has steps where the sweep's has epochs."""
    epochs = ["--train.steps=null", "--train.epochs=1", "--train.batch_size=40"]
    arguments, run = [str(path), "--train.lr=1e-3,3e-3", *epochs], tmp_path / "run" / "lr=3e-3"
    sweep.main(arguments)
    (run / "model" / "recipe.yaml").unlink()
    last = RunFolder(run).checkpoints[-1]
    last.unlink()
    resumed, plain = [], sweep.train
    monkeypatch.setattr(sweep, "train", lambda recipe, **how: resumed.append(how["resume"]) or plain(recipe, **how))
    sweep.main(arguments)
    assert resumed == [True]
    assert last.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--train.lr=1e-3"], "expected options of the runs with several values"),
        (["--output=a,b"], "expected options of the runs with several values"),
        (["--train.lr", "1e-3,1e-3"], "with each value once"),
        (["--train.lr"], "expected the recipe first, then --option value,value"),
        (["--train.lr=1e-3,2e-3", "--train.lr=1"], "expected it once"),
        (["--train.rate=1e-3,2e-3"], "unknown option --train.rate"),
        (["--train.lr=1e-3,-1"], "train.lr"),
        (["--train.lr=1e-3,2e-3", "--evaluate.tasks=[]"], "evaluate.tasks: expected at least one"),
        (["--evaluate.data=a/b,a_b"], "--evaluate.data: expected it once, with each value once, where all but"),
    ],
)
def test_what_cannot_be_swept_is_one_sentence(
    arguments: list[str], said: str, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        sweep.main([str(path), *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_commas_inside_brackets_and_quotes_split_nothing() -> None:
    assert sweep.values_of("[64, 128],[],1e-3,'a, b'") == ["[64, 128]", "[]", "1e-3", "'a, b'"]
    with pytest.raises(RecipeError):
        sweep.split(["recipe.yaml", "1e-3,3e-3"])

"""What a run logs, the pictures of it, and the page of `pe.report`."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from pe import report
from pe.config import Recipe
from pe.evaluate import Scores, TaskScore
from pe.measure.words import spelled, written_words
from pe.runs import plots
from pe.runs.folder import RunFolder
from pe.runs.history import HistoryError, HistoryFile, Record
from pe.runs.recipes import load_recipe
from pe.train import fit, train
from tests.embedders import INSTRUCTIONS, build
from tests.training import accelerator, new_model, plan_of, write_recipe

TIMES = ("seconds", "tokens_per_second")
HOSTILE = '<script>alert("1")</script> & $x$'


def timeless(records: list[Record]) -> list[Record]:
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


class Falling:
    """Scores that fall by one each time."""

    def __init__(self) -> None:
        self.next = 50.0

    def __call__(self) -> float:
        self.next -= 1
        return self.next


# The history.


def test_a_resumed_history_is_the_uninterrupted_one(recipe: Recipe, tmp_path: Path) -> None:
    """Also of a run that was killed as it wrote a record behind its checkpoint."""
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, eval_every=2, log_every=1))
    whole, run = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "killed")
    whole.start(recipe, resume=False, fresh=False)
    fit(new_model(recipe), plan_of(recipe), recipe, accelerator(), whole, evaluate=Falling())
    records = timeless(whole.history.records())
    keys = {key for record in records for key in record}
    numbers = {"loss", "skipped", "gradient_norm", "rate", "score", "instructions_alike"}
    assert keys == {"step", "tokens", "words"} | numbers
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    assert [(record["step"], record["score"]) for record in records if "score" in record] == [(2, 49), (4, 48), (6, 47)]

    class KilledError(Exception):
        pass

    scores = Falling()

    def killed_at_four() -> float:
        if scores.next < 50:
            raise KilledError
        return scores()

    run.start(recipe, resume=False, fresh=False)
    with pytest.raises(KilledError):
        fit(new_model(recipe), plan_of(recipe), recipe, accelerator(), run, evaluate=killed_at_four)
    assert run.history.records()[-1]["step"] == 4, "behind the checkpoint of step 3"
    with run.history.path.open("a") as file:
        file.write('{"step": 4, "sco')
    assert run.history.records()[-1]["loss"]
    run.start(recipe, resume=True, fresh=False)
    fit(new_model(recipe), plan_of(recipe), recipe, accelerator(), run, resume=True, evaluate=scores)
    assert timeless(run.history.records()) == records


def test_a_run_begun_anew_has_a_history_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r")
    run.start(recipe, resume=False, fresh=False)
    run.history.append({"step": 1, "seconds": 1.0, "tokens": 9})
    run.start(recipe, resume=False, fresh=False)  # no checkpoint followed
    assert run.history.records() == []


def test_history_of_what_is_no_number_and_of_a_damaged_line(tmp_path: Path) -> None:
    file = HistoryFile(tmp_path / "history.jsonl")
    file.append({"step": 1, "score": float("nan")})
    assert json.loads(file.path.read_text()) == {"step": 1, "score": None}
    good = '{"step": 1, "seconds": 1, "tokens": 9}\n'
    for bad in ("hello", '{"step": 2}', '{"step": 2, "seconds": "1", "tokens": 9}', "[1]"):
        file.path.write_text(f"{good}{bad}\n{good}")
        with pytest.raises(HistoryError, match=r"history\.jsonl:2: expected an object with numbers under step,"):
            file.records()
        with pytest.raises(HistoryError, match="remove the line"):
            file.keep(1)
        assert file.path.read_text() == f"{good}{bad}\n{good}"


# Pictures.


def test_speed_is_of_the_steps_since_the_record_before() -> None:
    logged = [{"step": 10, "loss": 1.0, "tokens": 100, "seconds": 1.0}, {"step": 15, "score": 1.0}]
    logged += [{"step": 20, "loss": 1.0, "tokens": 500, "seconds": 2.0}]
    assert plots.speeds(logged) == [(10, 100.0), (20, 400.0)]


def test_pictures_are_whole_and_those_without_data_go(tmp_path: Path) -> None:
    others = [[[f"word-{number}", 0.001]] for number in range(7)]
    words = {HOSTILE: [[["a\x00b", 0.9], ["<b>", 0.1]], *others]}
    records: list[Record] = [{"step": 1, "loss": 2.0, "tokens": 9, "seconds": 1.0}, {"step": 1, "words": words}]
    (tmp_path / "score.svg").write_text("of an earlier run")
    plots.draw(records, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"loss.svg", "speed.svg", "words.svg"}
    written = " ".join(ET.parse(tmp_path / "words.svg").getroot().itertext())
    assert HOSTILE in written
    assert "a\\x00b  90%" in written
    assert all(f"word-{number}" in written for number in range(7))
    loss = (tmp_path / "loss.svg").read_text()
    assert "prefers-color-scheme" in loss
    assert plots.INK not in loss
    ids = set(re.findall(r'id="([^"]+)', loss))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', loss)) <= ids
    assert not ids & set(re.findall(r'id="([^"]+)', (tmp_path / "speed.svg").read_text()))


def test_words_are_those_that_a_soft_token_is_mixed_from() -> None:
    """At a temperature of almost 0 a soft token is the embedding of one word."""
    model = build("qwen3")
    model.prompter.config = dataclasses.replace(model.prompter.config, temperature=1e-4)
    instruction = INSTRUCTIONS[0]
    (tokens,) = written_words(model, [instruction.text]).values()
    head = model.prompter_text(instruction)
    with torch.no_grad():
        written = model.prompter(model.prompter_ids([(head, head)])).tokens[0]
    nearest = torch.cdist(written, model.prompter.embedding).argmin(1).tolist()
    tokenizer = model.prompter.text_tokenizer.tokenizer
    assert [token[0][0] for token in tokens] == [spelled(tokenizer, number) for number in nearest]
    assert all(token[0][1] > 0.9 for token in tokens)


def test_no_words_where_each_text_has_a_prompt_of_its_own() -> None:
    assert written_words(build("qwen3", conditioning="instruction_and_text"), ["find"]) == {}


# The page.


class Page(HTMLParser):
    """Tags and texts of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.references: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def hostile_run(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose texts of the user's look like HTML; no test may change what it holds."""
    folder = tmp_path_factory.mktemp("hostile")

    def measure(model: Any) -> Scores:
        sides = {"instruction": HOSTILE, "document_instruction": None}
        task = TaskScore(type="STS", metric="spearman", score=61.25, seconds=1.0, **sides)
        return Scores(model=model.name, revision="", tasks={"<i>T</i>": task})

    path = write_recipe(tiny_models, folder, evaluate={"tasks": ["<i>T</i>"], "before": False}, train__eval_every=3)
    recipe = load_recipe(path, [f"--output={folder / 'run & <b>'}"])
    data = [dataclasses.replace(recipe.data[0], instruction=HOSTILE), recipe.data[1]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pe.train.check_evaluation", lambda _: None)
        patch.setattr("pe.train.measurer", lambda _: measure)
        train(dataclasses.replace(recipe, data=data))
    return folder / "run & <b>"


def test_a_page_says_all_and_escapes_what_is_the_users(hostile_run: Path, tmp_path: Path) -> None:
    report.main([str(hostile_run), "--output", str(tmp_path / "new" / "page.html")])
    text = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "i", "b", "img", "link"} & set(page.tags)
    assert page.tags.count("svg") == 4, "loss, score, speed, how alike instructions are"
    assert all(reference.startswith("#") for reference in page.references)
    assert page.texts.count(HOSTILE) == 3, "as what is written for, and as instruction of both sides of a data set"
    assert {"run & <b>", "<i>T</i>", "61.25", "6 of 6"} <= set(page.texts)
    words = plots.last_words(RunFolder(hostile_run).history.records())
    assert words
    assert words[0] == 6
    assert all(plots.printable(word) in page.texts for token in words[1][HOSTILE] for word, _ in token)


def test_training_leaves_pictures(hostile_run: Path) -> None:
    names = {path.name for path in (hostile_run / "plots").iterdir()}
    assert names == {"loss.svg", "score.svg", "speed.svg", "alike.svg", "words.svg"}
    for name in names:
        assert ET.parse(hostile_run / "plots" / name).getroot().tag.endswith("svg")


def test_a_run_without_evaluations_or_a_history_has_a_page(recipe: Recipe, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "r")
    run.start(recipe, resume=False, fresh=False)
    assert "Nothing is logged yet" in report.page(run)
    fit(new_model(recipe), plan_of(recipe), recipe, accelerator(), run)
    assert not (run.plots / "score.svg").exists()
    page = report.page(run)
    assert "None: the recipe names no tasks" in page
    assert "What the prompting LLM writes" in page
    assert Page(page).tags.count("svg") == 3


def test_scores_of_a_move_and_a_task_that_one_lacks(tmp_path: Path) -> None:
    scores = {"source": {"tasks": {"T": {"metric": "m", "score": 50.0}}, "mean": 50.0}}
    scores["moved"] = {"tasks": {"U": {"metric": "m", "score": None}}, "mean": None}  # type: ignore[dict-item]
    (tmp_path / "transfer.json").write_text(json.dumps({"scores": scores}))
    found = report.table(report.scores_of(RunFolder(tmp_path)))
    assert found
    assert found["columns"] == ["source", "moved"]
    assert found["rows"] == [("T", "m", ["50.00", "–"]), ("U", "m", ["–", "–"]), ("mean", "", ["50.00", "–"])]
    for damaged in ({}, {"scores": [1]}, {"scores": {"source": {}}}, {"scores": {"source": {"tasks": {"T": 1}}}}):
        (tmp_path / "transfer.json").write_text(json.dumps(damaged))
        with pytest.raises(report.ReportError, match=r"transfer\.json: expected scores as a run writes them"):
            report.scores_of(RunFolder(tmp_path))


def test_without_matplotlib_training_goes_on_and_the_report_names_the_extra(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = RunFolder(tmp_path / "r")
    run.start(recipe, resume=False, fresh=False)
    fit(new_model(recipe), plan_of(recipe), recipe, accelerator(), run)
    assert not run.plots.exists()
    assert run.history.records()[-1]["step"] == 6
    with pytest.raises(SystemExit) as stopped:
        report.main([str(run.path)])
    assert stopped.value.code == 2
    assert "pip install 'promptembedder[report]'" in capsys.readouterr().err
    assert not (run.path / "report.html").exists()


def test_a_report_replaces_a_report_and_nothing_else(
    hostile_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "page.html"
    for _ in range(2):
        report.main([str(hostile_run), "--output", str(output)])
    output.write_text("mine")
    for arguments, message in (
        ([str(hostile_run), "--output", str(output)], "holds something other than a report"),
        ([str(hostile_run), "--output", str(tmp_path)], "expected a file, got the folder"),
        ([str(tmp_path)], "expected the folder of a run, which has a recipe.yaml, found none"),
    ):
        with pytest.raises(SystemExit) as stopped:
            report.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert output.read_text() == "mine"


@pytest.mark.parametrize(("seconds", "shown"), [(59.4, "59 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min")])
def test_durations(seconds: float, shown: str) -> None:
    assert report.duration(seconds) == shown

"""Instructions that contradict each other: their files, what is made of the shipped sets, and the score."""

from __future__ import annotations

import difflib
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

import pe.evaluate
from pe.data.instruct import InstructRow, InstructTask, Side, letters, read_instructions, read_rows
from pe.data.instruct_score import INSTRUCT_TASKS, available_sets, read_set, rights
from pe.data.records import DataError, read_jsonl
from pe.evaluate import EvaluationError, comparison, main, score
from tests.scripts import load_script
from tests.tiny import write_rows

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
INSTRUCT = DATA / "instruct"

TASKS: dict[str, Any] = {
    "nli-follows": {
        "contradicts": "nli-contradicts",
        "document": "Represent it",
        "dataset": "nli",
        "train": ["What follows?", "entailed", "Conclude."],
        "unseen": ["So what?", "Infer."],
    },
    "nli-contradicts": {
        "contradicts": "nli-follows",
        "document": "Represent it",
        "dataset": "nli",
        "train": ["Deny this.", "lies", "Refute."],
        "unseen": ["Wrong!", "Oppose."],
    },
}
ROW: dict[str, Any] = {
    "query": "a dog runs",
    "sides": {
        "nli-follows": {"positive": "a dog moves", "negatives": ["a dog sleeps"]},
        "nli-contradicts": {"positive": "a dog sleeps", "negatives": ["a dog moves"]},
    },
}


def instructions(path: Path, **changes: Any) -> Path:
    """A file of `TASKS`; a change replaces a key of `nli-follows`, None removes it."""
    tasks = {name: dict(task) for name, task in TASKS.items()}
    task = {**tasks["nli-follows"], **changes}
    tasks["nli-follows"] = {key: value for key, value in task.items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tasks, sort_keys=False), encoding="utf-8")
    return path


def with_side(**changes: Any) -> dict[str, Any]:
    """`ROW` with another side `nli-follows`."""
    sides = ROW["sides"]
    return {**ROW, "sides": {**sides, "nli-follows": {**sides["nli-follows"], **changes}}}


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, InstructTask]:
    return read_instructions(instructions(tmp_path / "instructions.yaml"))


# Reading.


def test_instructions_and_rows_are_read(tasks: dict[str, InstructTask], tmp_path: Path) -> None:
    assert list(tasks) == ["nli-follows", "nli-contradicts"]
    assert tasks["nli-follows"] == InstructTask(
        name="nli-follows",
        contradicts="nli-contradicts",
        document="Represent it",
        train=("What follows?", "entailed", "Conclude."),
        unseen=("So what?", "Infer."),
        dataset="nli",
    )
    moves, sleeps = Side("a dog moves", ("a dog sleeps",)), Side("a dog sleeps", ("a dog moves",))
    row = InstructRow("a dog runs", {"nli-follows": moves, "nli-contradicts": sleeps})
    assert read_rows(write_rows(tmp_path / "rows.jsonl", ROW, ROW), tasks) == [row, row]


def test_the_reader_needs_no_torch() -> None:
    program = "import sys, pe.data.instruct; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trian": []},
            "nli-follows: expected {contradicts, document, train, unseen, dataset}, got the key 'trian'; did",
        ),
        ({"unseen": None}, "nli-follows: expected the key 'unseen', got {contradicts, document, dataset, train}"),
        ({"contradicts": "nli-contradict"}, "nli-follows: contradicts: expected a task of this file, got"),
        ({"contradicts": "nli-contradict"}, "'nli-contradict'; did you mean 'nli-contradicts'?"),
        (
            {"contradicts": "nli-follows"},
            "nli-follows: contradicts: expected a task that contradicts this one, got itself",
        ),
        ({"dataset": "snli"}, "nli-follows: dataset: expected that of nli-contradicts, 'nli', got 'snli'"),
        ({"document": "Other"}, "nli-follows: document: expected that of nli-contradicts, 'Represent it', got 'Other'"),
        ({"unseen": ["So what?", " "]}, "nli-follows: unseen[1]: expected a text, got ' '"),
        ({"train": "entailed"}, "nli-follows: train: expected a list of wordings, got 'entailed'"),
        ({"train": [True]}, "nli-follows: train[0]: expected a string, got True"),
        ({"train": [], "unseen": []}, "nli-follows: expected a wording in train or in unseen, got none"),
        ({"train": []}, "nli-follows: train: expected wordings as nli-contradicts has them, or none on either side"),
        (
            {"unseen": ["what FOLLOWS"]},
            "nli-follows: unseen[0]: expected a wording that stands nowhere else, got 'what FOLLOWS' of "
            "nli-follows: train[0]",
        ),
        ({"unseen": ["Deny this"]}, "nli-contradicts: train[0]: expected a wording that stands nowhere else"),
        ({"train": ["a", "a"]}, "nli-follows: train[1]: expected a wording that stands nowhere else"),
    ],
)
def test_bad_instructions(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = instructions(tmp_path / "instructions.yaml", **changes)
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}: ')}") as caught:
        read_instructions(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_contradiction_that_is_not_mutual(tmp_path: Path) -> None:
    path = tmp_path / "instructions.yaml"
    other = {**TASKS["nli-follows"], "train": ["one"], "unseen": ["two"]}
    path.write_text(yaml.safe_dump({"nli-other": other, **TASKS}, sort_keys=False))
    with pytest.raises(
        DataError, match=r"nli-other: contradicts: .* got nli-contradicts, which contradicts nli-follows"
    ):
        read_instructions(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", ":1: not valid YAML: "),
        ("a: {train: [x], train: [y]}", ":1: not valid YAML: key 'train' stands twice"),
        ("", ": expected a mapping of tasks, got None"),
        ("- a", ": expected a mapping of tasks, got ['a']"),
        ("a: b", ": a: expected a mapping of contradicts, document, train, unseen, dataset, got 'b'"),
        ("a: {1: b}", ": a: expected a mapping of contradicts, document, train, unseen, dataset, got {1: 'b'}"),
        ("1: {}", ": expected a task's name, got 1"),
        ("!!python/object/apply:os.getcwd []", ":1: not valid YAML: could not determine a constructor"),
    ],
)
def test_files_that_are_no_instructions(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "instructions.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=re.escape(f"{path}{message}")):
        read_instructions(path)


def test_instructions_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.yaml: expected a file of instructions, found none"):
        read_instructions(tmp_path / "none.yaml")
    with pytest.raises(DataError, match="the file cannot be read: "):
        read_instructions(tmp_path)


FOLLOWS, CONTRADICTS = ROW["sides"].values()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {**ROW, "sides": {"nli-folows": FOLLOWS, "nli-contradicts": CONTRADICTS}},
            "sides: expected tasks of the instructions, got 'nli-folows'; did you mean 'nli-follows'?",
        ),
        (
            {**ROW, "sides": {"nli-follows": FOLLOWS}},
            "sides: expected 'nli-contradicts' beside 'nli-follows', which it contradicts, got nli-follows",
        ),
        ({**ROW, "sides": {}}, "sides: expected a mapping of tasks, got {}"),
        ({**ROW, "sides": [FOLLOWS]}, "sides: expected a mapping of tasks, got [{'positive'"),
        ({**ROW, "query": " "}, "query: expected a text, got ' '"),
        ({**ROW, "positive": "p"}, "expected {query, sides}, got the key 'positive'"),
        ({"query": "q", "positive": "p"}, "expected {query, sides}, got the key 'positive'"),
        ({"query": "q"}, "expected the key 'sides', got {query}"),
        (
            {**ROW, "sides": {**ROW["sides"], "nli-follows": "a"}},
            "sides.nli-follows: expected a positive and negatives",
        ),
        (with_side(positive=""), "sides.nli-follows: positive: expected a text, got ''"),
        (with_side(positive=3), "sides.nli-follows: positive: expected a string, got 3"),
        (with_side(negatives=["a", ""]), "sides.nli-follows: negatives[1]: expected a text, got ''"),
        (with_side(negatives="a"), "sides.nli-follows: negatives: expected a list of strings, got 'a'"),
        (with_side(negatives=[]), "sides.nli-follows.negatives: expected at least one text, got none"),
        (with_side(negatives=None), "sides.nli-follows.negatives: expected at least one text, got none"),
        (
            with_side(negatives=["a dog moves"]),
            "sides.nli-follows: expected another positive than the negatives, got 'a dog m",
        ),
        (
            with_side(negative=["a"]),
            "expected {positive, negatives?, shared_label?, other_label?}, got the key 'negative'; did",
        ),
    ],
)
def test_bad_rows(row: object, message: str, tasks: dict[str, InstructTask], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROW, row)
    with pytest.raises(DataError, match=f"^{re.escape(f'{path}:2: ')}") as caught:
        read_rows(path, tasks)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_rows(tasks: dict[str, InstructTask], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected at least one row, got an empty file"):
        read_rows(write_rows(tmp_path / "rows.jsonl"), tasks)


# What ships.


@pytest.fixture(scope="module")
def shipped() -> dict[str, InstructTask]:
    return read_instructions(INSTRUCT / "instructions.yaml")


def words(wording: str) -> list[str]:
    return re.findall(r"\w+", wording.lower())


def test_every_task_has_its_wordings(shipped: dict[str, InstructTask]) -> None:
    assert {task.dataset for task in shipped.values()} == set(INSTRUCT_TASKS.values())
    for task in shipped.values():
        assert len(task.train) >= (0 if task.dataset == "banking77" else 12), task.name
        assert len(task.unseen) >= 4
        assert all(len(words(wording)) >= 3 for wording in task.unseen), "whole sentences"
    untrained = [task.name for task in shipped.values() if not task.train]
    assert untrained == ["banking-product", "banking-problem"]


def test_no_wording_is_another_with_words_changed(shipped: dict[str, InstructTask]) -> None:
    def likeness(one: str, other: str) -> float:
        return difflib.SequenceMatcher(None, words(one), words(other)).ratio()

    for task in shipped.values():
        other = shipped[task.contradicts]
        opposed = [(ours, its) for ours in (*task.train, *task.unseen) for its in (*other.train, *other.unseen)]
        known = [(ours, its) for ours in task.unseen for its in task.train]
        assert [pair for pair in opposed if likeness(*pair) > 0.55] == []
        assert [pair for pair in known if likeness(*pair) > 0.65] == []


def test_half_of_the_unseen_wordings_use_words_of_their_own(shipped: dict[str, InstructTask]) -> None:
    for task in shipped.values():
        known = {word for wording in task.train for word in words(wording)}
        new = [[word for word in words(wording) if len(word) > 3 and word not in known] for wording in task.unseen]
        long = [[word for word in words(wording) if len(word) > 3] for wording in task.unseen]
        of_their_own = sum(2 * len(a) > len(b) for a, b in zip(new, long, strict=True))
        assert 2 * of_their_own >= len(task.unseen), task.name


FILES = ["train/nli", "train/medquad", "train/clinc150", *(f"eval/{stem}" for stem in INSTRUCT_TASKS.values())]


@pytest.fixture(scope="module")
def rows(shipped: dict[str, InstructTask]) -> dict[str, list[InstructRow]]:
    return {name: read_rows(INSTRUCT / f"{name}.jsonl.xz", shipped) for name in FILES}


def texts(some: Sequence[InstructRow]) -> set[str]:
    """All texts of some rows, whatever their case and punctuation."""
    sides = [side for row in some for side in row.sides.values()]
    every = [row.query for row in some] + [text for side in sides for text in (side.positive, *side.negatives)]
    return set(map(letters, every))


def test_shipped_rows(shipped: dict[str, InstructTask], rows: dict[str, list[InstructRow]]) -> None:
    found = {str(path.relative_to(INSTRUCT)) for path in INSTRUCT.rglob("*.xz")}
    assert found == {f"{name}.jsonl.xz" for name in (*FILES, "train/similar")}
    for name, some in rows.items():
        stem = name.partition("/")[2]
        sides = {task.name for task in shipped.values() if task.dataset == stem}
        assert all(set(row.sides) == sides for row in some)
        assert 400 <= len(some) <= (4_200 if name.startswith("train") else 600)
        assert (INSTRUCT / f"{name}.jsonl.xz").stat().st_size < 1_000_000
        assert len({(row.query, *sorted(side.positive for side in row.sides.values())) for row in some}) == len(some)
        for row in some:
            assert letters(row.query) not in {letters(side.positive) for side in row.sides.values()}
            one, other = row.sides.values()
            if stem != "clinc150":
                assert (one.positive, other.positive) == (other.negatives[0], one.negatives[0])


def test_nothing_of_evaluation_is_trained_on(rows: dict[str, list[InstructRow]]) -> None:
    trained = set().union(*(texts(some) for name, some in rows.items() if name.startswith("train")))
    measured = set().union(*(texts(some) for name, some in rows.items() if name.startswith("eval")))
    assert not trained & measured
    plain = {letters(value) for name in ("medquad", "clinc150", "banking77") for value in plain_texts(name)}
    assert not plain & measured
    similar = read_jsonl(INSTRUCT / "train/similar.jsonl.xz")
    held = {letters(text) for row in similar for text in (row["query"], row["positive"], *row["negatives"])}
    assert not held & measured
    premises = {letters(row.query) for row in rows["eval/nli"]}
    assert len(premises) == len(rows["eval/nli"]) >= 400


def plain_texts(name: str) -> list[str]:
    return [record.get("text") or record["query"] for record in read_jsonl(DATA / f"train/{name}.jsonl.xz")]


# scripts/make_instruct.py


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("make_instruct")


def test_the_script_makes_what_ships(script: ModuleType) -> None:
    train, held_out, plain = script.nli(read_jsonl(DATA / "train/nli.jsonl.xz"))
    assert train == read_jsonl(INSTRUCT / "train/nli.jsonl.xz")
    assert plain == read_jsonl(INSTRUCT / "train/similar.jsonl.xz")
    queries = {row["query"] for row in held_out}
    assert not queries & {text for row in plain for text in (row["query"], row["positive"], *row["negatives"])}
    assert held_out == read_jsonl(INSTRUCT / "eval/nli.jsonl.xz")
    items = script.banking(read_jsonl(DATA / "eval/banking77_test.jsonl.xz"))
    made = script.crossed(items, ("banking_product", "banking_problem"), script.EVAL_ROWS)
    assert made == read_jsonl(INSTRUCT / "eval/banking77.jsonl.xz")


def test_files_are_the_same_each_time(script: ModuleType, tmp_path: Path) -> None:
    for name in ("one", "two"):
        script.write([ROW, ROW], tmp_path / f"{name}.jsonl.xz")
    assert (tmp_path / "one.jsonl.xz").read_bytes() == (tmp_path / "two.jsonl.xz").read_bytes()
    assert read_jsonl(tmp_path / "one.jsonl.xz") == [ROW, ROW]


def test_a_row_depends_on_no_other(script: ModuleType) -> None:
    requests = read_jsonl(DATA / "eval/clinc150_test.jsonl.xz")
    few = script.clinc(requests, 5)
    assert few == script.clinc(requests, 5)
    assert all(row in script.clinc(requests, 20) for row in few)


def test_domains_are_ten_of_fifteen(script: ModuleType) -> None:
    assert [len(intents.split()) for intents in script.DOMAINS.values()] == [15] * 10
    assert set(script.DOMAIN_OF) == {record["label"] for record in read_jsonl(DATA / "eval/clinc150_test.jsonl.xz")}


def test_a_medical_question_is_a_kind_and_a_disease(script: ModuleType) -> None:
    questions = [
        "Is Ovarian Cancer inherited ?",
        "What are the symptoms of ovarian cancer ?",
        "how common is botulism?",
    ]
    assert script.medical(questions) == [
        (questions[0], "ovarian cancer", "inheritance"),
        (questions[1], "ovarian cancer", "symptoms"),
    ]


def test_what_shares_one_property_differs_in_the_other(script: ModuleType) -> None:
    items = [
        script.Item(f"{a} {b}", a, b) for a in ("gout", "childhood gout", "flu", "rabies") for b in ("s", "t", "u")
    ]
    made = script.crossed(items, ("x_disease", "x_kind"), 100)
    assert len(made) == len(items)
    for row in made:
        *disease, kind = row["query"].split()
        same, other = (row["sides"][f"x-{side}"]["positive"].split() for side in ("disease", "kind"))
        assert same[:-1] == disease
        assert same[-1] != kind
        assert other[-1] == kind
        assert "gout" not in disease or "gout" not in other, "a disease within another is no other disease"
        labels = [(side["shared_label"], side["other_label"]) for side in row["sides"].values()]
        assert labels == [(" ".join(disease), same[-1]), (kind, " ".join(other[:-1]))]


def test_sides_of_a_request(script: ModuleType) -> None:
    requests = read_jsonl(DATA / "eval/clinc150_test.jsonl.xz")
    intent = {record["text"]: record["label"] for record in requests}
    for row in script.clinc(requests, 30):
        ours, sides = intent[row["query"]], row["sides"]
        domain = script.DOMAIN_OF[ours]
        found = {
            name: [intent[text] for text in (side["positive"], *side["negatives"])] for name, side in sides.items()
        }
        assert found["clinc-intent"][0] == ours
        assert ours not in (found["clinc-intent"][1], found["clinc-domain"][0])
        assert script.DOMAIN_OF[found["clinc-intent"][1]] == script.DOMAIN_OF[found["clinc-domain"][0]] == domain
        assert script.DOMAIN_OF[found["clinc-domain"][1]] != domain
        assert sides["clinc-intent"]["shared_label"] == ours
        assert sides["clinc-domain"]["shared_label"] == sides["clinc-intent"]["other_label"] == domain
        assert sides["clinc-domain"]["other_label"] == found["clinc-domain"][0]


# The score.


SIDES = {"follows": ("So what?", "Infer."), "contradicts": ("Wrong!", "Oppose.")}


class Reader:
    """Embeds a text as its number; a query points to `n + 1` where `obeys` says so of the wording, else to `n - 1`.

    Queries are the numbers 0, 10, 20, ..., what follows from n is n + 1, and n - 1 contradicts it.
    """

    name, revision = "reader", "1"

    def __init__(self, up: Sequence[str] = (), size: int = 64) -> None:
        self.up, self.size = up, size
        self.calls: list[tuple[str, str, tuple[str, ...]]] = []

    def encode(
        self,
        texts: Sequence[str],
        *,
        instruction: str,
        side: str = "query",
        batch_tokens: int = 16_384,
        progress: bool = False,
    ) -> np.ndarray:
        self.calls.append((side, instruction, tuple(texts)))
        step = 0 if side == "document" else 1 if instruction in self.up else -1
        rows = np.zeros((len(texts), self.size), np.float32)
        rows[np.arange(len(texts)), [int(text) + 1 + step for text in texts]] = 3
        return rows


class ManyReader(Reader):
    """The same, under several wordings at once."""

    asked: Sequence[str] = ()

    def encode_many(
        self, texts: Sequence[str], *, instructions: Sequence[str], batch_tokens: int = 16_384
    ) -> np.ndarray:
        self.asked = instructions
        return np.stack([Reader(self.up).encode(texts, instruction=wording) for wording in instructions])


def numbers(count: int = 5) -> list[dict[str, Any]]:
    made = []
    for n in range(10, 10 + 10 * count, 10):
        up, down = str(n + 1), str(n - 1)
        follows = {"positive": up, "negatives": [down, "0"]}
        made.append(
            {
                "query": str(n),
                "sides": {"nli-follows": follows, "nli-contradicts": {"positive": down, "negatives": [up]}},
            }
        )
    return made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data folder with PE-Instruct-NLI alone."""
    instructions(tmp_path / "instruct/instructions.yaml")
    write_rows(tmp_path / "instruct/eval/nli.jsonl", *numbers())
    return tmp_path


UP = [*TASKS["nli-follows"]["train"], *TASKS["nli-follows"]["unseen"]]


@pytest.mark.parametrize("kind", [Reader, ManyReader])
@pytest.mark.parametrize(
    ("up", "unseen", "seen"),
    [
        (UP, (100, 100), (100, 100)),
        ([], (0, 100), (0, 100)),
        (UP[:3], (0, 100), (100, 100)),
        ([*UP[:4], "Wrong!"], (50, 50), (100, 100)),
    ],
)
def test_right_by_side_and_by_part(
    kind: type[Reader], up: list[str], unseen: tuple[int, int], seen: tuple[int, int], folder: Path
) -> None:
    parts = rights(kind(up), read_set("PE-Instruct-NLI", folder))
    assert parts == {
        "right_unseen": sum(unseen) / 2,
        "follows_unseen": unseen[0],
        "contradicts_unseen": unseen[1],
        "right_seen": sum(seen) / 2,
        "follows_seen": seen[0],
        "contradicts_seen": seen[1],
    }


def test_a_tie_is_not_right(folder: Path) -> None:
    class Constant(Reader):
        def encode(self, texts: Sequence[str], **_: Any) -> np.ndarray:
            return np.full((len(texts), 4), 0.5, np.float32)

    assert set(rights(Constant(), read_set("PE-Instruct-NLI", folder)).values()) == {0.0}


def test_length_of_an_embedding_does_not_count(folder: Path) -> None:
    class Long(Reader):
        def encode(self, texts: Sequence[str], **options: Any) -> np.ndarray:
            rows = super().encode(texts, **options) + 1e-3
            return rows * (1 + 99 * (np.array([int(text) % 10 for text in texts]) == 9))[:, None]

    assert rights(Long(UP), read_set("PE-Instruct-NLI", folder))["right_unseen"] == 100


def test_texts_are_distinct_and_documents_stand_under_their_instruction(folder: Path) -> None:
    write_rows(folder / "instruct/eval/nli.jsonl", *numbers(), *numbers())
    encoder = Reader(UP)
    rights(encoder, read_set("PE-Instruct-NLI", folder))
    (documents,) = [call for call in encoder.calls if call[0] == "document"]
    assert documents[1] == "Represent it"
    assert all(len(set(texts)) == len(texts) for _, _, texts in encoder.calls)
    queries = [wording for side, wording, _ in encoder.calls if side == "query"]
    assert queries == ["So what?", "Infer.", "Wrong!", "Oppose.", "What follows?", "entailed", "Deny this.", "lies"]
    many = ManyReader(UP)
    rights(many, read_set("PE-Instruct-NLI", folder))
    assert many.asked == queries


def test_both_sides_count_the_same_whatever_their_wordings(folder: Path) -> None:
    instructions(folder / "instruct/instructions.yaml", unseen=["a", "b", "c", "d"])
    assert rights(Reader(), read_set("PE-Instruct-NLI", folder))["right_unseen"] == 50


def test_a_task_without_training_has_no_seen_wordings(folder: Path) -> None:
    path = folder / "instruct/instructions.yaml"
    path.write_text(yaml.safe_dump({name: {**task, "train": []} for name, task in TASKS.items()}))
    parts = rights(Reader(), read_set("PE-Instruct-NLI", folder))
    assert list(parts) == ["right_unseen", "contradicts_unseen", "follows_unseen"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [(np.ones((2, 3), np.float32), r"reader: encode: expected \[11, D\], got \[2, 3\]"), (None, "are not finite")],
)
def test_embeddings_that_cannot_be(rows: np.ndarray | None, message: str, folder: Path) -> None:
    class Broken(Reader):
        def encode(self, texts: Sequence[str], **_: Any) -> np.ndarray:
            return np.full((len(texts), 3), np.nan, np.float32) if rows is None else rows

    with pytest.raises(ValueError, match=message):
        rights(Broken(), read_set("PE-Instruct-NLI", folder))


def test_blind_is_half_on_the_shipped_rows() -> None:
    class Blind(Reader):
        def encode(self, texts: Sequence[str], **_: Any) -> np.ndarray:
            seeds = [[*text.encode()] for text in texts]
            return np.stack([np.random.default_rng(seed).normal(size=16) for seed in seeds]).astype(np.float32)

    found = read_set("PE-Instruct-Banking77", DATA)
    parts = rights(Blind(), found)
    assert parts["right_unseen"] == pytest.approx(50)
    assert parts["product_unseen"] == pytest.approx(50, abs=15)


# pe.evaluate


def test_scores_of_instructions_stand_apart(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from pe.evaluate import Scores, TaskScore

    monkeypatch.setitem(sys.modules, "mteb", None)  # it is not needed
    assert available_sets(folder) == ["PE-Instruct-NLI"]
    found = score(Reader(), data=folder)
    assert found.by_task == {"PE-Instruct-NLI": 50}
    assert found.by_type == {"Instruct": 50}
    assert found.mean == 50
    task = found.tasks["PE-Instruct-NLI"]
    assert (task.type, task.metric, task.document_instruction) == ("Instruct", "right_unseen", "Represent it")
    assert found.to_dict()["tasks"]["PE-Instruct-NLI"]["parts"]["contradicts_seen"] == 100

    plain = TaskScore(type="STS", metric="m", score=80, seconds=1, instruction="i", document_instruction=None)
    both = Scores(model="m", revision="1", tasks={"PE-STS12": plain, **found.tasks})
    assert both.mean == 80
    assert both.by_type == {"STS": 80, "Instruct": 50}
    console = Console(width=100)
    with console.capture() as captured:
        console.print(comparison({"both": both, "found": found}))
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in captured.get().splitlines()]
    lines = [row for row in cells if row]
    assert ["PE-Instruct-NLI", "right_unseen", "50.00", "50.00"] in lines
    assert ["", "contradicts_unseen", "100.00", "100.00"] in lines
    assert ["", "right_unseen", "50.00", "50.00"] not in lines, "it is the main score"
    assert ["All but Instruct", "mean", "80.00", "50.00"] in lines


def test_a_name_that_is_nearly_one_of_these(folder: Path) -> None:
    pytest.importorskip("mteb")
    known = r"unknown task 'PE-Instruct-NLY'; did you mean 'PE-Instruct-NLI'\?; tasks in .*: PE-Instruct-NLI; "
    with pytest.raises(EvaluationError, match=known):
        score(Reader(), ["PE-Instruct-NLY"], data=folder)


def test_tasks_without_their_rows(folder: Path) -> None:
    expected = r"PE-Instruct-CLINC150: expected .*clinc150\.jsonl or instruct/eval/clinc150\.jsonl\.xz, found none"
    with pytest.raises(EvaluationError, match=expected):
        score(Reader(), ["PE-Instruct-CLINC150"], data=folder)


def test_tasks_without_their_instructions(folder: Path) -> None:
    (folder / "instruct/instructions.yaml").unlink()
    with pytest.raises(EvaluationError, match=r"PE-Instruct-NLI: expected .*instructions\.yaml, found none"):
        score(Reader(), ["PE-Instruct-NLI"], data=folder)
    with pytest.raises(EvaluationError, match="expected a folder of tasks, found none"):
        score(Reader(), ["PE-Instruct-NLI"], data=folder / "none")


def test_instructions_without_the_task_or_unseen_wordings(folder: Path) -> None:
    path = folder / "instruct/instructions.yaml"
    path.write_text(yaml.safe_dump({name: {**task, "unseen": []} for name, task in TASKS.items()}))
    with pytest.raises(DataError, match=r"nli-contradicts: unseen: expected a wording to measure with, got none"):
        read_set("PE-Instruct-NLI", folder)
    path.write_text(yaml.safe_dump({name: {**task, "dataset": "other"} for name, task in TASKS.items()}))
    with pytest.raises(DataError, match=r"expected two tasks of the data set 'nli', for PE-Instruct-NLI, got none"):
        read_set("PE-Instruct-NLI", folder)


def refuse(options: list[str]) -> None:
    """Run the command, which ends with code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2


def test_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pe.evaluate, "load_encoder", lambda *_, **__: ManyReader(UP))
    output = folder / "scores.json"
    options = ["model", "--data", str(folder), "--tasks", "PE-Instruct-NLI", "--output", str(output)]
    main(options)
    assert "contradicts_unseen" in capsys.readouterr().out
    assert json.loads(output.read_text())["tasks"]["PE-Instruct-NLI"]["parts"]["right_unseen"] == 100
    refuse([*options, "--overwrite", "--instruction", "PE-Instruct-NLI=Find"])
    error = capsys.readouterr().err
    assert "PE-Instruct-NLI: expected none, it is measured on those of instruct/instructions.yaml" in error


def test_the_command_refuses_bad_files_before_it_loads_a_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pe.evaluate, "load_encoder", lambda *_, **__: pytest.fail("a model was loaded"))
    write_rows(folder / "instruct/eval/nli.jsonl", {**ROW, "sides": {"nli-follows": FOLLOWS}})
    refuse(["model", "--data", str(folder), "--tasks", "PE-Instruct-NLI"])
    assert "nli.jsonl:1: sides: expected 'nli-contradicts' beside 'nli-follows'" in capsys.readouterr().err
    instructions(folder / "instruct/instructions.yaml", unseen=["entailed"])
    refuse(["model", "--data", str(folder), "--tasks", "PE-Instruct-NLI"])
    assert "unseen[0]: expected a wording that stands nowhere else, got 'entailed'" in capsys.readouterr().err

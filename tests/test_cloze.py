"""`scripts/make_cloze.py`: questions with a gap, the passages they are made from, and what is kept back."""

from __future__ import annotations

import hashlib
import json
import lzma
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.scripts import SCRIPTS, load_script

OTHERS = "It is known to many people who live near the coast and to those who visit it in summer. " * 2
NAMES = ("Anna Stone", "Captain Reed", "Mary Fell", "Doctor Bly", "Old Tom")
PASSAGES = tuple(f"The house of the bay was built by {name} after a storm. {OTHERS}".strip() for name in NAMES)
FIRST, SECOND, *_ = PASSAGES
ARTICLE = "\nHistory.\n".join(PASSAGES)


@pytest.fixture
def cloze(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return load_script("make_cloze")


@pytest.mark.parametrize(
    ("sentence", "openings", "gone"),
    [
        ("the old bridge was opened in 1894 after long work.", {"When"}, "1894"),
        ("the club has won 27 cups since it was made.", {"How many"}, "27"),
        ("the song was written by Clara Weiss for a film.", {"Who", "What", "Which", "Where"}, "Clara Weiss"),
    ],
)
def test_a_question_asks_for_what_it_lacks(cloze: ModuleType, sentence: str, openings: set[str], gone: str) -> None:
    found = cloze.question(sentence)

    opening = next(opening for opening in openings if found.startswith(f"{opening} "))
    assert found.endswith("?")
    kept = found.removeprefix(f"{opening} ").removesuffix("?").split()
    whole = sentence.rstrip(".").split()
    assert kept in [[word for word in whole if word not in lost] for lost in (gone.split(), ["in", gone])]


def test_nothing_is_asked_of_a_sentence_without_name_or_number(cloze: ModuleType) -> None:
    assert cloze.question("the road leads down to the sea.") is None


def test_a_long_sentence_is_cut_around_its_gap(cloze: ModuleType) -> None:
    words = [f"word{chr(97 + place % 26)}" for place in range(28)]
    found = cloze.question(" ".join([*words[:20], "Berlin", *words[20:]]))

    assert found.split()[1:] == [*words[13:20], *words[20:26], f"{words[26]}?"]


def test_a_passage_is_of_one_paragraph_and_long_enough(cloze: ModuleType) -> None:
    found = [" ".join(sentences) for sentences in cloze.passages(ARTICLE)]

    assert found == list(PASSAGES)
    assert list(cloze.passages("Too short.\nHistory.")) == []


def test_an_article_gives_a_group_of_four_neighbours(cloze: ModuleType) -> None:
    rows = cloze.rows_of("Bay Light", ARTICLE)

    assert [row.group for row in rows] == ["Bay Light"] * 4
    texts = [f"Bay Light {passage}" for passage in PASSAGES]
    assert [row.positive for row in rows] in (texts[:4], texts[1:])
    for row in rows:
        asked_for = next(name for name in NAMES if name in row.positive)
        assert asked_for not in row.query
    assert cloze.rows_of("Bay Light", "\n".join(PASSAGES[:3])) == [], "three passages are too few"
    assert cloze.rows_of("Bay Light", ARTICLE.replace("Anna Stone", "a man").replace("Old Tom", "a man")) == []


def write_source(folder: Path, articles: list[dict[str, str]]) -> None:
    packed = lzma.compress("".join(json.dumps(article) + "\n" for article in articles).encode())
    (folder / "pretrain").mkdir(parents=True)
    (folder / "pretrain/wikipedia.jsonl.xz").write_bytes(packed)
    entry: dict[str, Any] = {"file": "pretrain/wikipedia.jsonl.xz", "sha256": hashlib.sha256(packed).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps([entry | {"ship": True}]))


def test_articles_that_are_scored_on_are_left_out(cloze: ModuleType, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "data"
    for folder in ("eval/xquad", "train"):
        (target / folder).mkdir(parents=True)
    held_out = {"_id": "0", "title": "Known Title", "text": "The tower of the town fell in 1920. It was rebuilt."}
    (target / "eval/xquad/corpus.jsonl.xz").write_bytes(lzma.compress(json.dumps(held_out).encode()))
    same_sentence = f"{ARTICLE}\nIt is so. The tower of the town fell in 1920."
    articles = [("Bay Light", ARTICLE), ("Known Title", ARTICLE), ("Other", same_sentence)]
    write_source(source, [{"title": title, "text": text} for title, text in articles])

    first = cloze.make(source, target).read_bytes()
    rows = [json.loads(line) for line in lzma.decompress(first).splitlines()]
    assert [row["positive"].startswith("Bay Light ") for row in rows] == [True] * 4
    assert cloze.make(source, target).read_bytes() == first, "the same source gives the same bytes"


def test_a_changed_source_is_refused(cloze: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "data/eval/xquad").mkdir(parents=True)
    (tmp_path / "data/eval/xquad/corpus.jsonl.xz").write_bytes(lzma.compress(b'{"title": "a", "text": "b"}'))
    write_source(tmp_path, [{"title": "Bay Light", "text": ARTICLE}])
    (tmp_path / "pretrain/wikipedia.jsonl.xz").write_bytes(lzma.compress(b"{}"))

    with pytest.raises(SystemExit, match="expected SHA-256"):
        cloze.make(tmp_path, tmp_path / "data")

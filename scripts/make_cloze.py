"""Make cloze questions and the passages they were made from, out of the articles of an encyclopedia.

    python scripts/make_cloze.py SOURCE data/

SOURCE holds `manifest.json` and `pretrain/wikipedia.jsonl.xz`, rows of `{"title", "text"}`. An article gives a group of
four rows, a passage each: a sentence of the passage loses a name or a number and gets a question word in its place
(after Patrick Lewis, Ludovic Denoyer, Sebastian Riedel: Unsupervised Question Answering by Cloze Translation, ACL
2019). In a batch the passages of an article are one another's hard negatives. Articles with fewer such passages, and
those with a title or a sentence of `eval/xquad` in `data/`, are left out. Every choice is a hash of texts: the same
source and xz library give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from make_data import checked_bytes, spread

SOURCE_FILE = "pretrain/wikipedia.jsonl.xz"
ARTICLES = 1_500
ROWS_OF_AN_ARTICLE = 4
PASSAGE_WORDS = range(40, 91)
SENTENCE_WORDS = range(8, 31)
QUESTION_WORDS = 14
"""A clause is cut to so many words around its gap."""

SENTENCE_END = re.compile(r"(?<=[a-z0-9)\"][.!?]) (?=[A-Z\"])")
YEAR = re.compile(r"(?:[Ii]n |[Ss]ince |[Bb]y )?\b(?:1[0-9]|20)\d\d\b")
NUMBER = re.compile(r"\b(?!(?:1[0-9]|20)\d\d\b)\d[\d,.]*\b")
"""No year."""
NAME = re.compile(r"(?<=[a-z,] )[A-Z][\w'-]+(?: [A-Z][\w'-]+)*")
QUESTION_OF: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (YEAR, ("When",)),
    (NUMBER, ("How many",)),
    (NAME, ("Who", "What", "Which", "Where")),
)


class Row(NamedTuple):
    query: str
    positive: str
    group: str


def choice(text: str, count: int) -> int:
    """A number below `count` that the text decides."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:8], "big") % count


def passages(article: str) -> Iterator[list[str]]:
    """Sentences of a paragraph, as many as make a passage; headings and what is left over go."""
    for paragraph in article.split("\n"):
        taken: list[str] = []
        for sentence in SENTENCE_END.split(paragraph):
            taken.append(sentence)
            count = sum(len(part.split()) for part in taken)
            if count in PASSAGE_WORDS:
                yield taken
            if count >= PASSAGE_WORDS.start:
                taken = []


def question(sentence: str) -> str | None:
    """The sentence with a gap, its question word in front; None where it has no name and no number."""
    gaps = [(kind, match) for kind, _ in QUESTION_OF for match in kind.finditer(sentence)]
    if not gaps:
        return None
    kind, gap = gaps[choice(sentence, len(gaps))]
    before, after = sentence[: gap.start()].split(), sentence[gap.end() :].split()
    around = max(QUESTION_WORDS - len(before), QUESTION_WORDS // 2)
    clause = [*before[-(QUESTION_WORDS - min(len(after), around)) :], *after[:around]]
    openings = dict(QUESTION_OF)[kind]
    return f"{openings[choice(sentence + gap.group(), len(openings))]} {' '.join(clause).strip(' .,;:')}?"


def asked(passage: Sequence[str]) -> str | None:
    """A question that the passage, its sentences, answers; None where none of them has a gap."""
    found = [
        text
        for sentence in passage
        if len(sentence.split()) in SENTENCE_WORDS and (text := question(sentence)) is not None
    ]
    return found[choice(" ".join(passage), len(found))] if found else None


def rows_of(title: str, article: str) -> list[Row]:
    """Cloze questions of an article, in the order of their passages; none where too few passages answer one."""
    found = [
        Row(query, f"{title} {' '.join(passage)}", title)
        for passage in passages(article)
        if (query := asked(passage)) is not None
    ]
    if len(found) < ROWS_OF_AN_ARTICLE:
        return []
    first = choice(article, len(found) - ROWS_OF_AN_ARTICLE + 1)
    return found[first : first + ROWS_OF_AN_ARTICLE]


def sentences(text: str) -> set[str]:
    """What two texts must not share: their sentences, letters and digits alone."""
    return {re.sub(r"\W+", "", sentence.casefold()) for sentence in SENTENCE_END.split(text)}


def make(source: Path, target: Path) -> Path:
    """Write `train/cloze.jsonl.xz` under `target`."""
    manifest = {entry["file"]: entry for entry in json.loads((source / "manifest.json").read_text(encoding="utf-8"))}
    with lzma.open(target / "eval/xquad/corpus.jsonl.xz", "rt", encoding="utf-8") as file:
        held_out = [json.loads(line) for line in file]
    titles = {row["title"].casefold() for row in held_out}
    kept_back = {text for row in held_out for text in sentences(row["text"])}
    articles = []
    for line in checked_bytes(source, manifest[SOURCE_FILE]).splitlines():
        article = json.loads(line)
        if article["title"].casefold() in titles or sentences(article["text"].replace("\n", " ")) & kept_back:
            continue
        if rows := rows_of(article["title"], article["text"]):
            articles.append("".join(f"{json.dumps(row._asdict(), ensure_ascii=False)}\n" for row in rows).encode())
    kept = spread(articles, ARTICLES)
    output = target / "train/cloze.jsonl.xz"
    output.write_bytes(lzma.compress(b"".join(kept), preset=9 | lzma.PRESET_EXTREME))
    print(f"{output}: {len(kept):,} of {len(articles):,} articles, {output.stat().st_size:,} bytes")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    make(arguments.source, arguments.target)


if __name__ == "__main__":
    main()

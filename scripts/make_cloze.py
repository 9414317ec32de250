"""Make cloze questions and the passages they were made from, out of the articles of an encyclopedia.

    python scripts/make_cloze.py SOURCE data/

SOURCE holds `manifest.json` and `pretrain/wikipedia.jsonl.xz`, rows of `{"title", "text"}`. An article gives one row: a
sentence of a passage loses a name or a number and gets a question word in its place (after Patrick Lewis, Ludovic
Denoyer, Sebastian Riedel: Unsupervised Question Answering by Cloze Translation, ACL 2019); that passage is the positive
and the other passage of the article that shares most words with the question the negative. Articles with a title or a
sentence of `eval/xquad` in `data/` are left out. Every choice is a hash of texts: the same source and xz library give
the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from make_data import checked_bytes, spread

SOURCE_FILE = "pretrain/wikipedia.jsonl.xz"
ROWS = 6_000
PASSAGE_WORDS = range(40, 91)
SENTENCE_WORDS = range(8, 31)
QUESTION_WORDS = 14
"""A clause is cut to so many words around its gap."""

SENTENCE_END = re.compile(r"(?<=[a-z0-9)\"][.!?]) (?=[A-Z\"])")
YEAR = re.compile(r"(?:[Ii]n |[Ss]ince |[Bb]y )?\b(?:1[0-9]|20)\d\d\b")
NUMBER = re.compile(r"\b\d[\d,.]*\b")
NAME = re.compile(r"(?<=[a-z,] )[A-Z][\w'-]+(?: [A-Z][\w'-]+)*")
QUESTION_OF: tuple[tuple[re.Pattern[str], tuple[str, ...]], ...] = (
    (YEAR, ("When",)),
    (NUMBER, ("How many",)),
    (NAME, ("Who", "What", "Which", "Where")),
)


class Row(NamedTuple):
    query: str
    positive: str
    negatives: list[str]


def choice(text: str, count: int) -> int:
    """A number below `count` that the text decides."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:8], "big") % count


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


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


def row_of(title: str, article: str) -> Row | None:
    """A cloze question, its passage and the passage of the article that is most like it; None without a second one."""
    found = list(passages(article))
    if len(found) < 2:
        return None
    number = choice(article, len(found))
    asked = [
        text
        for sentence in found[number]
        if len(sentence.split()) in SENTENCE_WORDS and (text := question(sentence)) is not None
    ]
    if not asked:
        return None
    query = asked[choice(title, len(asked))]
    texts = [f"{title} {' '.join(passage)}" for passage in found]
    positive = texts.pop(number)
    return Row(query, positive, [max(texts, key=lambda text: len(words(text) & words(query)))])


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
    lines = []
    for line in checked_bytes(source, manifest[SOURCE_FILE]).splitlines():
        article = json.loads(line)
        if article["title"].casefold() in titles or sentences(article["text"].replace("\n", " ")) & kept_back:
            continue
        if (row := row_of(article["title"], article["text"])) is not None:
            lines.append(f"{json.dumps(row._asdict(), ensure_ascii=False)}\n".encode())
    kept = spread(lines, ROWS)
    output = target / "train/cloze.jsonl.xz"
    output.write_bytes(lzma.compress(b"".join(kept), preset=9 | lzma.PRESET_EXTREME))
    print(f"{output}: {len(kept):,} of {len(lines):,} rows, {output.stat().st_size:,} bytes")
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    make(arguments.source, arguments.target)


if __name__ == "__main__":
    main()

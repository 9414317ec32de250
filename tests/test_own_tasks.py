"""Tasks of a user's own files: which they become, what they score, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pe.data.own_tasks import is_own, own_task
from pe.data.records import DataError
from pe.evaluate import EvaluationError, Scores, find_tasks, score
from tests.tiny import write_rows

pytest.importorskip("mteb")

PAIRS = [
    {"anchor": "aaa", "positive": "a", "negative": "z"},
    {"anchor": "bbb", "positive": "b", "negative": "y"},
    {"anchor": "aaa", "positive": "aa", "negative": "x"},
]


class Letters:
    """Counts of letters; it remembers under which instruction of which side texts were encoded."""

    name, revision = "letters", "1"

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift
        self.calls: list[tuple[str, str]] = []

    def encode(self, texts: Sequence[str], *, instruction: str, side: str = "query", **_: Any) -> np.ndarray:
        self.calls.append((side, instruction))
        rows = np.zeros((len(texts), 26), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for letter in filter(str.isalpha, text):
                row[(ord(letter) - 97 + self.shift * (side == "query")) % 26] += 1
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def scored(name: str, encoder: Letters, **instructions: str) -> Scores:
    given = {name: "Find it"} | {f"{name}-{side}": text for side, text in instructions.items()}
    return score(encoder, [name], instructions=given)


def test_pairs_are_retrieved_among_all_documents(tmp_path: Path) -> None:
    name, encoder = str(write_rows(tmp_path / "dev.jsonl", *PAIRS)), Letters()
    found = scored(name, encoder, document="Be found").tasks[name]
    assert (found.type, found.metric, found.score) == ("Retrieval", "ndcg_at_10", 100.0)
    assert {*encoder.calls} == {("query", "Find it"), ("document", "Be found")}
    assert scored(name, Letters(shift=1)).mean < 60, "a's are looked for among b's"


@pytest.mark.parametrize(
    ("scores", "kind", "metric"),
    [((1, 0, 0, 1), "PairClassification", "max_ap"), ((4.5, 1, 0, 5), "STS", "cosine_spearman")],
)
def test_scored_pairs(tmp_path: Path, scores: Sequence[float], kind: str, metric: str) -> None:
    texts = [("aab", "aa"), ("aa", "bc"), ("aa", "z"), ("b", "b")]
    lines = [f"{a},{b},{value}" for (a, b), value in zip(texts, scores, strict=True)]
    path = tmp_path / "dev.csv"
    path.write_text("\n".join(["sentence1,sentence2,label", *lines]), encoding="utf-8")
    found = scored(str(path), Letters()).tasks[str(path)]
    assert (found.type, found.metric) == (kind, metric)
    assert found.score > 90
    swapped = [f"{a},{b},{-value if kind == 'STS' else 1 - value}" for (a, b), value in zip(texts, scores, strict=True)]
    path.write_text("\n".join(["sentence1,sentence2,label", *swapped]), encoding="utf-8")
    assert scored(str(path), Letters()).mean < 60


def beir(folder: Path, judged: str = "q1\td1\t1\nq2\td2\t1\n") -> str:
    write_rows(
        folder / "corpus.jsonl",
        *({"_id": f"d{n}", "title": "" if n else "z", "text": text, "metadata": {}} for n, text in enumerate("xab")),
    )
    (folder / "queries.csv").write_text("id,text\nq1,aa\nq2,bb\nq3,cc\n", encoding="utf-8")
    (folder / "qrels").mkdir()
    (folder / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged, encoding="utf-8")
    return str(folder)


def test_a_folder_of_corpus_queries_and_judgements(tmp_path: Path) -> None:
    name = beir(tmp_path / "dev")
    assert scored(name, Letters()).by_task == {name: 100.0}
    task = own_task(name)
    task.load_data()
    part = task.dataset["default"]["test"]
    assert part["corpus"]["text"][0] == "z x"
    assert part["queries"]["id"][:] == ["q1", "q2"], "one that nobody judged is not asked"


@pytest.mark.parametrize(
    ("judged", "message"),
    [
        ("q1\td9\t1\n", "dev.tsv: expected judgements of what is there, got the document 'd9'"),
        ("q9\td1\t1\n", "dev.tsv: expected judgements of what is there, got the query 'q9'"),
        ("q1\td1\n", "dev.tsv:2: expected three tab-separated fields"),
    ],
)
def test_a_damaged_folder(judged: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        own_task(beir(tmp_path / "dev", judged))


def test_a_folder_that_lacks_a_part(tmp_path: Path) -> None:
    folder = Path(beir(tmp_path / "dev"))
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"expected one file such as qrels.tsv, got dev.tsv, qrels.tsv"):
        own_task(str(folder))
    (folder / "queries.csv").write_text("id,text\nq1,aa\nq1,bb\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"queries.csv:3: expected each id once, got 'q1' again"):
        own_task(str(folder))
    (folder / "queries.csv").write_text("number,text\nq1,aa\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"queries.csv:2: expected the columns _id, title\?, text, got number, text"):
        own_task(str(folder))
    (folder / "queries.csv").unlink()
    with pytest.raises(DataError, match=r"expected one file such as queries.jsonl, got none"):
        own_task(str(folder))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "t", "label": 1},
            "expected pairs, scored pairs or a folder with corpus, queries and qrels, got labels",
        ),
        ({"sentence1": "a", "sentence2": "b", "score": 1}, "expected scores that differ, got 1 throughout"),
        ({"query": "a", "positive": "b", "instruction": "c"}, ":1: expected a row without an instruction of its own"),
        ({"query": "a", "positive": ""}, ":1: positive: expected a text, got ''"),
        ({"question": "a"}, ":1: expected the columns"),
    ],
)
def test_files_that_are_no_task(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        own_task(str(write_rows(tmp_path / "dev.jsonl", row)))


def test_an_own_task_needs_an_instruction(tmp_path: Path) -> None:
    name = str(write_rows(tmp_path / "dev.jsonl", *PAIRS))
    with pytest.raises(EvaluationError, match=re.escape(f"instructions: {name}: expected a sentence")):
        score(Letters(), [name])
    with pytest.raises(DataError, match=r"absent.csv: expected a file, found none"):
        find_tasks([str(tmp_path / "absent.csv")], tmp_path)


def test_which_names_are_files() -> None:
    assert all(map(is_own, ("a.csv", "A.JSONL.XZ", "./dev", "hf://owner/name", "a.parquet")))
    assert not any(map(is_own, ("PE-STSb-dev", "STS17", "CQADupstackRetrieval-v2.1")))


def test_a_saved_score_names_the_file(tmp_path: Path) -> None:
    name = str(write_rows(tmp_path / "dev.jsonl", *PAIRS))
    scored(name, Letters()).write(tmp_path / "scores.json")
    assert list(json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["tasks"]) == [name]

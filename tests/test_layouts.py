"""Layouts of training data, and the doors that rows come through."""

from __future__ import annotations

import csv
import gzip
import json
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pe.config import DatasetConfig, Recipe, RecipeError
from pe.data.batches import BatchPlan
from pe.data.datasets import Dataset, Example, load_dataset
from pe.data.instruct_set import first_wordings
from pe.data.instructions import set_name, trained_instructions
from pe.data.layouts import LAYOUTS, detect
from pe.data.records import DataError
from pe.data.tables import named
from pe.runs.folder import conditions_of
from tests.tiny import write_rows

PAGE = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^### (\w+): ([^\n]+)\n.*?```(\w+)\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
ROWS: list[dict[str, Any]] = [
    {"query": "q0", "positive": "p, 0", "negative_1": "n0", "negative_2": 'n"1"'},
    {"query": "q1", "positive": "p1\nin two lines", "negative_1": None, "negative_2": None},
]


def config(path: object, **values: Any) -> DatasetConfig:
    return DatasetConfig(path=str(path), **{"instruction": "Find the answer"} | values)


def examples(dataset: Dataset, draws: int = 8) -> list[Example]:
    """What each row gives to batches, over some draws."""
    return [found for n in range(len(dataset)) for seed in range(draws) for found in drawn(dataset, n, seed)]


def drawn(dataset: Dataset, row: int, seed: int) -> list[Example]:
    return dataset.examples(row, np.random.default_rng(seed))


def shuffled(lines: str) -> Iterator[str]:
    """JSON lines with their keys in another order."""
    for line in lines.splitlines():
        items = list(json.loads(line).items())
        random.Random(0).shuffle(items)
        yield json.dumps(dict(items))


@pytest.mark.parametrize(("kind", "name", "suffix", "rows"), BLOCKS, ids=[f"{b[0]}: {b[1]}" for b in BLOCKS])
def test_a_layout_of_the_page_gives_the_examples_of_our_own(
    kind: str, name: str, suffix: str, rows: str, tmp_path: Path
) -> None:
    values = {"positive_from": 0.5} if kind == "scored" else {}
    first = next(block for block in BLOCKS if block[0] == kind)
    assert first[1] == "our own"
    for file, content in (("own.jsonl", first[3]), (f"set.{suffix}", rows)):
        (tmp_path / file).write_text(content, encoding="utf-8")
    own, other = (load_dataset(config(tmp_path / file, **values)) for file in ("own.jsonl", f"set.{suffix}"))
    assert examples(other) == examples(own)
    assert other.instructions == ["Find the answer"] * len(other)
    assert other.report.used == 2
    if suffix == "jsonl":
        write_rows(tmp_path / "shuffled.jsonl", *shuffled(rows))
        assert examples(load_dataset(config(tmp_path / "shuffled.jsonl", **values))) == examples(own)


def test_the_page_has_every_layout() -> None:
    found = set()
    for _, _, suffix, rows in BLOCKS:
        lines = rows.splitlines()
        row = json.loads(lines[0]) if suffix == "jsonl" else dict.fromkeys(lines[0].split(","))
        found.add(detect(row).name)
    assert found == {layout.name for layout in LAYOUTS}


def written(door: str, folder: Path) -> str:
    """The rows of `ROWS` behind a door."""
    import datasets

    path = folder / f"set.{door}"
    if door.startswith("json") and "[" not in door:
        content = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
        path.write_bytes(gzip.compress(content) if door.endswith("gz") else content)
    elif door == "json[]":
        path = folder / "set.json"
        path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")
    elif door.startswith(("csv", "tsv")):
        with (lzma.open if door.endswith("xz") else open)(path, "wt", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(ROWS[0]), delimiter="\t" if door[0] == "t" else ",")
            writer.writeheader()
            writer.writerows(ROWS)
    elif door == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif door == "folder":
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    else:
        parts = {"train": datasets.Dataset.from_list(ROWS), "dev": datasets.Dataset.from_list(ROWS[:1])}
        datasets.DatasetDict(parts).save_to_disk(path)
    return str(path)


DOORS = ["jsonl", "jsonl.gz", "json", "json[]", "csv", "csv.xz", "tsv", "parquet", "folder", "splits"]


@pytest.mark.parametrize("door", DOORS)
def test_every_door_gives_the_same_rows_and_refuses_the_same_column(door: str, tmp_path: Path) -> None:
    path = written(door, tmp_path)
    dataset = load_dataset(config(path))
    assert dataset.queries == ["q0", "q1"]
    assert dataset.positives == [("p, 0",), ("p1\nin two lines",)]
    assert dataset.negatives == [("n0", 'n"1"'), ()]
    number = 2 if door[:3] in ("csv", "tsv") else 1
    with pytest.raises(DataError, match=re.escape(f"{path}:{number}: expected {{query, positive, ")) as caught:
        load_dataset(config(path, columns={"negative_1": "id"}))
    assert "got the key 'id'; a training set's `columns` names it, or leaves it out, as {'id': null}" in str(
        caught.value
    )
    renamed = load_dataset(config(path, columns={"negative_1": None, "negative_2": "negative"}))
    assert renamed.negatives == [('n"1"',), ()]
    assert renamed.report.left_out == ("negative_1",)
    assert conditions_of_files(path)


def conditions_of_files(path: str) -> dict[str, Any]:
    found = conditions_of(Recipe(data=[config(path)]), 1)
    return {name: value for name, value in found.items() if name.startswith("content of ")}


def test_a_split_of_a_saved_folder(tmp_path: Path) -> None:
    path = written("splits", tmp_path)
    assert load_dataset(config(f"{path}@dev")).queries == ["q0"]
    with pytest.raises(DataError, match="expected train, dev, got the split 'test'"):
        load_dataset(config(f"{path}@test"))
    with pytest.raises(DataError, match="expected one without splits, got the split 'dev'"):
        load_dataset(config(written("folder", tmp_path) + "@dev"))
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="expected a folder of `save_to_disk`"):
        load_dataset(config(tmp_path / "other"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'query,positive\nq,p\n\n"a\nb",p,x\n', "4: expected 2 cells, one a column, got 3"),
        ("a.csv", 'query,positive\nq,"p" x\n', "2: the file cannot be read: "),
        ("a.csv", "query,query\nq,p\n", "1: expected the names of the columns, each once, got ['query', 'query']"),
        ("a.csv", "query,positive\nq,\n", "2: positive: expected a text or a list, got null"),
        ("a.tsv", "sentence1\tsentence2\tscore\na\tb\thigh\n", "2: score: expected a finite number, got 'high'"),
        ("a.json", '[{"query": "q", "positive": "p"}, 3]', "2: expected an object, got 3"),
        ("a.json", "[{]", " expected a JSON list of objects, or an object a line"),
        ("a.parquet", "no parquet", " the file cannot be read: "),
    ],
)
def test_a_damaged_row_is_told_by_file_and_row(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(f"{path}:{message}")):
        load_dataset(config(path, positive_from=1.0 if "score" in content else None))


@pytest.mark.parametrize("name", ["a.csv", "a.csv.xz", "a.parquet", "a.json"])
def test_a_file_that_is_not_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(f"{tmp_path / name}: expected a file, found none")):
        load_dataset(config(tmp_path / name))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "pos": ["p"], "pos_scores": [1]}, "got the key 'pos_scores'"),
        ({"query": "q", "pos": [], "neg": []}, "expected at least one positive, got none"),
        ({"query": "q", "positive_passages": [{"text": "t", "score": 1}]}, "expected {docid?, title?, text}, got {'sc"),
        ({"query": "q", "positive_passages": ["p"]}, "positive_passages[0]: expected {docid?, title?, text}, got 'p'"),
        ({"messages": "q", "positive_messages": []}, "messages: expected a message {role, content} of the user"),
        (
            {"messages": [{"role": "user", "content": "q"}], "positive_messages": [[{"role": "assistant"}]]},
            "positive_messages[0]: expected a message {role, content} of the user",
        ),
        (
            {
                "messages": [{"role": "user", "content": "q"}],
                "positive_messages": [[{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]],
            },
            "positive_messages[0]: expected no message of the system, got one; leave it out and give document_instr",
        ),
        (
            {"messages": [{"role": "user", "content": "q"}], "positive_messages": [], "label": 1},
            "positive_messages: expected one conversation beside a label, got 0",
        ),
        ({"question": "q", "answer": "p"}, "`columns: {question: query, answer: positive, id: null}`"),
    ],
)
def test_what_a_layout_refuses(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "set.jsonl", row)
    with pytest.raises(DataError, match=re.escape(f"{path}:1: ")) as caught:
        load_dataset(config(path, positive_from=1.0 if "label" in row else None))
    assert message in str(caught.value)


def test_columns_that_are_not_used_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "set.jsonl", {"query": "q", "positive": "p", "answer": "a"})
    with pytest.raises(DataError, match=re.escape("columns: expected names of its columns, {query, positive, answer}")):
        load_dataset(config(path, columns={"answer": None, "anser": None}))
    with pytest.raises(DataError, match="expected one column of the name 'positive', got 'answer' too"):
        load_dataset(config(path, columns={"answer": "positive"}))
    with pytest.raises(RecipeError, match="columns: expected none beside `instruct`"):
        DatasetConfig(path="x", instruct="y", columns={"answer": None})


def test_one_of_several_positives_is_drawn(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "set.jsonl", {"query": "q", "positive": ["a", "b", "c"]})
    found = [example.positive for example in examples(load_dataset(config(path)), draws=60)]
    assert {text: 5 < found.count(text) < 40 for text in "abc"} == dict.fromkeys("abc", True)


def test_an_instruction_a_row(tmp_path: Path) -> None:
    rows = [{"query": f"q{n}", "pos": [f"p{n}"], "prompt": f"Task {n % 2}"} for n in range(5)]
    path = write_rows(tmp_path / "mixed.jsonl", *rows)
    dataset = load_dataset(config(path, instruction="", document_instruction="Be found"))
    assert dataset.wordings == ("Task 0", "Task 1")
    batch = BatchPlan([dataset], [1.0], steps=1, batch_size=5, seed=0).batch(0)
    asked = {query: batch.instructions[place] for query, place in zip(batch.queries, batch.asked, strict=True)}
    assert asked == {row["query"]: row["prompt"] for row in rows}
    assert batch.document_instruction == "Be found"
    assert trained_instructions([dataset.config]) == {}
    assert first_wordings([dataset]) == {"mixed": "Task 0"}
    with pytest.raises(
        RecipeError, match="expected a sentence, got ''; where every row has its own, give document_ins"
    ):
        config(path, instruction="")
    write_rows(path, *rows, {"query": "q", "pos": ["p"], "prompt": None})
    assert load_dataset(config(path)).instructions[-1] == "Find the answer"
    with pytest.raises(DataError, match=":6: expected an instruction in the row, or one in the recipe, got none"):
        load_dataset(config(path, instruction="", document_instruction="Be found"))


def test_names_of_sets() -> None:
    paths = ("a/nli.jsonl.xz", "nli.CSV", "nli.parquet", "saved/nli", "nli.json.gz")
    assert {set_name(path) for path in paths} == {"nli"}
    others = {"a.csv.jsonl": ("a.csv", ".jsonl"), ".csv": ("", ".csv"), "a.parquet.xz": ("a.parquet.xz", "")}
    assert {path: named(path) for path in others} == others


# Hard negatives of sentence-transformers' miner

MINER = re.search(r"## Hard negatives.*?```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


QUERIES = ("river", "moon", "bread", "glass", "horse", "train")


def mined(checkpoint: Path, folder: Path, **changes: str) -> str:
    """Run the page's code on a small file; where it saves what it found."""
    assert MINER
    pairs = ({"query": f"{word}?", "positive": f"the {word} number {n}"} for n, word in enumerate(QUERIES))
    write_rows(folder / "pairs.jsonl", *pairs)
    code = MINER[1].replace("my/", f"{folder}/").replace("runs/tiny/model", str(checkpoint))
    code = re.sub(r"relative_margin=[\d.]+", "range_max=5", code)  # a model that learned nothing has no such negatives
    for old, new in changes.items():
        code = code.replace(f'output_format="{old.replace("_", "-")}"', new)
    exec(compile(code, "docs/data.md", "exec"), {})
    return f"{folder}/mined"


@pytest.mark.usefixtures("_cache")
def test_mined_negatives_train_as_they_are(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    dataset = load_dataset(config(mined(checkpoint, tmp_path)))
    positives = {positive for (positive,) in dataset.positives}
    assert (len(dataset), len(positives)) == (6, 6)
    for example in examples(dataset, draws=1):
        assert len(example.negatives) == 4
        assert set(example.negatives) < positives - {example.positive}


@pytest.mark.usefixtures("_cache")
def test_other_formats_of_the_miner(checkpoint: Path, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    triplets = load_dataset(config(mined(checkpoint, tmp_path / "a", n_tuple='output_format="triplet"')))
    assert (len(triplets), {len(found) for found in triplets.negatives}) == (24, {1})
    with_scores = mined(checkpoint, tmp_path / "b", n_tuple='output_format="n-tuple", output_scores=True')
    with pytest.raises(DataError, match="got the key 'scores'; "):
        load_dataset(config(with_scores))
    scored = load_dataset(config(with_scores, columns={"scores": None}))
    assert [len(found) for found in scored.negatives] == [4] * 6
    pairs = mined(checkpoint, tmp_path / "c", n_tuple='output_format="labeled-pair"')
    columns = {"query": "sentence1", "positive": "sentence2"}
    labelled = load_dataset(config(pairs, columns=columns, positive_from=1))
    assert [len(found) for found in labelled.negatives] == [4] * 6
    assert labelled.report.hard_negative_rows == 24

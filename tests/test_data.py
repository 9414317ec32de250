"""Records, reports, batch plans and the shipped data."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import itertools
import json
import lzma
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pe import encode
from pe.config import DatasetConfig
from pe.data.batches import Batch, BatchPlan, text_id
from pe.data.datasets import Count, Dataset, Report, load_dataset
from pe.data.instruct import read_instructions, read_rows
from pe.data.records import DataError, read_jsonl, read_lines, read_qrels
from tests.scripts import load_script
from tests.tiny import write_rows

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "data"
GOOD = '{"query": "q", "positive": "p"}'


def config(path: object, **values: Any) -> DatasetConfig:
    return DatasetConfig(path=str(path), instruction="Find the answer.", **values)


def pairs(path: Path, count: int, negatives: int = 0, **values: Any) -> Dataset:
    name = path.stem
    rows = [
        {
            "query": f"{name} q{i}",
            "positive": f"{name} p{i}",
            "negatives": [f"{name} n{i}.{j}" for j in range(negatives)],
        }
        for i in range(count)
    ]
    return load_dataset(config(write_rows(path, *rows), **values))


def labelled(path: Path, per_label: Sequence[int]) -> Dataset:
    rows = [{"text": f"t{k}.{i}", "label": f"label {k}"} for k, count in enumerate(per_label) for i in range(count)]
    return load_dataset(config(write_rows(path, *rows)))


def assert_same(left: Batch, right: Batch) -> None:
    for name in vars(left):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


# Reading


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.xz", "jsonl.gz"])
def test_reads_plain_and_compressed_files(tmp_path: Path, suffix: str) -> None:
    opener: Any = {"jsonl": open, "jsonl.xz": lzma.open, "jsonl.gz": gzip.open}[suffix]
    path = tmp_path / f"set.{suffix}"
    with opener(path, "wt", encoding="utf-8") as file:
        file.write('\ufeff{"query": "Grüße \u2028 x", "positive": "p"}\r\n{"query": "b", "positive": "c"}')
    dataset = load_dataset(config(path))
    assert dataset.queries == ["Grüße \u2028 x", "b"]
    assert read_jsonl(path)[0] == {"query": "Grüße \u2028 x", "positive": "p"}


PAIRS = "{query, positive, negatives?, negative?, instruction?, group?}"
BAD_LINES = {
    "not JSON": ("{'query': 1}", "expected a JSON object, got \"{'query': 1}\" (Expecting property name"),
    "not an object": ("[1, 2]", "expected a JSON object, got [1, 2]"),
    "repeated key": ('{"query": "q", "query": "r", "positive": "p"}', "expected each key once, got 'query' again"),
    "wrong type": ('{"query": 3, "positive": "p"}', "query: expected a string, got 3"),
    "empty text": ('{"query": "q", "positive": " \\n"}', "positive: expected a text, got ' \\n'"),
    "not Unicode": ('{"query": "\\ud800", "positive": "p"}', "query: expected Unicode text, got half a surrogate pair"),
    "missing key": ('{"query": "q"}', "expected the key 'positive', got {query}"),
    "unknown key": (
        '{"query": "q", "positive": "p", "hard_negatives": ["n"]}',
        f"expected {PAIRS}, got the key 'hard_negatives'; did you mean 'negatives'?",
    ),
    "no positive": ('{"query": "q", "positive": []}', "expected at least one positive, got none in {query, positive}"),
    "mixed kinds": ('{"text": "t", "label": "l"}', f"expected {PAIRS} as in the first record, got {{text, label}}"),
}
MORE_BAD_LINES = [
    ('{"query": "q", "positive": "p", "negatives": 3}', "negatives: expected a text or a list, got 3"),
    ('{"query": "q", "positive": {}}', "positive: expected a text or a list, got {}"),
    ('{"query": "q", "positive": "p", "negatives": ["n", ""]}', "negatives[1]: expected a text, got ''"),
    ('{"query": "q", "positive": "p", "negatives": [7]}', "negatives[0]: expected a string, got 7"),
    ('{"query": "q", "positve": "p"}', "got the key 'positve'; did you mean 'positive'?"),
    ('{"query": "q", "positive": "p", "negative_1": ""}', "negative_1: expected a text, got ''"),
    ('{"query": "q", "positive": "p", "source": "s"}', "got the key 'source'; a training set's `columns` names it"),
    ('{"query": null, "positive": "p"}', "query: expected a string, got null"),
    ('{"query": "q"', "expected a JSON object, got '{\"query\": \"q\"' (Expecting ',' delimiter at column 14)"),
    ('{"query": ' + "[" * 100_000, "expected a JSON object"),
    ('{"query": "q", "positive": ["' + "x" * 200, "x..."),
]


@pytest.mark.parametrize(("line", "message"), [*BAD_LINES.values(), *MORE_BAD_LINES])
def test_bad_record_names_file_line_expected_and_got(tmp_path: Path, line: str, message: str) -> None:
    path = write_rows(tmp_path / "set.jsonl", GOOD, line)
    with pytest.raises(DataError, match=re.escape(f"{path}:2: ")) as caught:
        load_dataset(config(path))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"text": "t", "label": 1}, {"text": "t", "label": 1.5}, "label: expected a string or an integer, got 1.5"),
        ({"text": "t", "label": 1}, {"text": "t", "label": True}, "label: expected a string or an integer, got True"),
        ({"text": "t", "label": "a"}, {"text": "t", "label": ""}, "label: expected a text, got ''"),
        (
            {"text": "t", "label": 1},
            {"text": "t", "label": -(2**63) - 1},
            "label: expected an integer of up to 64 bits, got -9223372036854775809",
        ),
        (
            {"sentence1": "a", "sentence2": "b", "score": 1},
            {"sentence1": "a", "sentence2": "b", "score": 10**400},
            "score: expected an integer of up to 64 bits, got 100000000000000000...0000000000000000000",
        ),
        (
            {"sentence1": "a", "sentence2": "b", "score": 1},
            {"sentence1": "a", "sentence2": "b", "score": "high"},
            "score: expected a finite number, got 'high'",
        ),
        (
            {"sentence1": "a", "sentence2": "b", "score": 1},
            {"sentence1": "a", "sentence2": "b", "score": math.nan},
            "score: expected a finite number, got nan",
        ),
    ],
)
def test_bad_label_or_score(tmp_path: Path, first: object, second: object, message: str) -> None:
    path = write_rows(tmp_path / "set.jsonl", first, second)
    positive_from = 0.0 if "score" in json.dumps(first) else None
    with pytest.raises(DataError, match=re.escape(f"{path}:2: {message}")):
        load_dataset(config(path, positive_from=positive_from))


NASTY = [
    *(
        "null",
        "true",
        "[]",
        "{}",
        '""',
        '" "',
        '"a"',
        "0",
        "-1",
        "1.5",
        "-0.0",
        "1e999",
        "NaN",
        "Infinity",
        "-Infinity",
    ),
    *("9" * 400, "-" + "9" * 4300, "9" * 4301, str(2**63), str(-(2**63)), "1" + "0" * 400 + ".0", "1e-999"),
    *(
        '"\\ud800"',
        '"\\u0000"',
        '"a\\nb"',
        '"' + "x" * 10_000 + '"',
        '["\\udfff"]',
        "[null]",
        "[[]]",
        '[{"a": {"a": 1}}]',
    ),
    *(
        '{"a": 1, "a": 1}',
        '{"": {"\\ud800": 0, "\\ud800": 0}}',
        "01",
        "'a'",
        "nan",
        "[1,]",
        '"a',
        "{",
        "\ufeff",
        "\x00",
    ),
    *(
        opening * depth + closing * depth
        for depth in (5, 900, 5_000)
        for opening, closing in (("[", "]"), ('{"a": ', "0}"))
    ),
]
KINDS = {
    "pairs": {"query": '"q"', "positive": '"p"'},
    "labelled": {"text": '"t"', "label": "1"},
    "scored": {"sentence1": '"a"', "sentence2": '"b"', "score": "1"},
}
FURTHER = ["negatives", "negative", "negative_1", "\\ud800", "a\\nb", "k" * 10_000]


def line_of(fields: Mapping[str, str]) -> str:
    return "{" + ", ".join(f'"{key}": {value}' for key, value in fields.items()) + "}"


@pytest.mark.parametrize("kind", KINDS)
def test_no_value_raises_anything_but_a_sentence(tmp_path: Path, kind: str) -> None:
    """Under every key in turn, and in place of the whole record; training, evaluation and encoding read it."""
    good, path = KINDS[kind], tmp_path / "set.jsonl"
    chosen = config(path, positive_from=0.0 if kind == "scored" else None)
    asked = [key for key in good if key != "positive"]
    readers: list[Callable[[], object]] = [
        lambda: load_dataset(chosen),
        lambda: read_jsonl(path, asked, checked=True),
        lambda: encode.read_rows(str(path), asked[0]),
    ]
    lines = [*NASTY, *(line_of(good | {key: value}) for key in [*good, *FURTHER] for value in NASTY)]
    refused: Counter[int] = Counter()
    for (place, read), line in itertools.product(enumerate(readers), lines):
        path.write_text(f"{line_of(good)}\n{line}\n", encoding="utf-8")
        try:
            read()
        except DataError as error:
            refused[place] += 1
            message = str(error).removeprefix(str(path))
            if "at least one usable record" not in message:  # a good label may stand alone
                assert message.startswith(":2: ")
                assert message.isprintable()
                assert len(message) < 500
    assert min(refused[place] for place in range(3)) > len(NASTY)


@pytest.mark.parametrize("blanks", ["\n", "\n\n\n", " \t\r\n", "\u00a0\n", "  "])
def test_blank_lines_are_passed_over_and_counted(tmp_path: Path, blanks: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n{blanks}", encoding="utf-8")
    assert load_dataset(config(path)).report.rows == len(read_jsonl(path)) == 2
    if not blanks.endswith("\n"):
        return
    path.write_text(f"{blanks}{GOOD}\n{blanks}{{}}\n{blanks}", encoding="utf-8")
    line = 2 * blanks.count("\n") + 2
    for read in (lambda: load_dataset(config(path)), lambda: read_jsonl(path, ("query",))):
        with pytest.raises(DataError, match=re.escape(f"{path}:{line}: expected the key 'query', got {{}}")):
            read()
    assert load_dataset(config(path, on_bad_record="skip")).report.skipped == {"missing key": Count(1, line)}
    path.write_text(blanks, encoding="utf-8")
    for read in (lambda: load_dataset(config(path)), lambda: read_jsonl(path)):
        with pytest.raises(DataError, match=f"{path}: expected at least one"):
            read()


def test_blank_lines_of_judgements(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "qrels.tsv", "", "query-id\tcorpus-id\tscore", " ", "q\td\t1", "", "")
    assert read_qrels(path) == {"q": {"d": 1}}
    with pytest.raises(DataError, match=re.escape(f"{path}:4: expected three")):
        read_qrels(write_rows(path, "query-id\tcorpus-id\tscore", "", "", "q"))


@pytest.mark.parametrize("name", ["X.JSONL", "x.Jsonl.XZ", "x.jsonl.Gz", "X.JSONL.GZ"])
def test_suffixes_in_capitals(tmp_path: Path, name: str) -> None:
    opener: Any = {"l": open, "z": gzip.open}[name[-1].lower()]
    with (lzma.open if name.endswith("XZ") else opener)(tmp_path / name, "wt", encoding="utf-8") as file:
        file.write(GOOD)
    assert load_dataset(config(tmp_path / name)).queries == ["q"]
    assert read_jsonl(tmp_path / name)[0]["positive"] == "p"


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"query": "\xe9"}\n')
    for read in (lambda: load_dataset(config(path)), lambda: read_jsonl(path)):
        with pytest.raises(DataError, match=re.escape(f"{path}:2: expected UTF-8, got byte 0xe9")):
            read()


def test_first_record_of_no_kind(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "set.jsonl", {"querry": "q", "positive": "p"})
    with pytest.raises(
        DataError, match=re.escape(f"{path}:1: expected the columns {{query, positive}} or {{")
    ) as caught:
        load_dataset(config(path))
    assert "got {querry, positive}; did you mean 'query'?; say in the recipe what yours are" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "{path}: expected a file, found none"),
        ("set.txt", b"", "{path}: expected a"),
        ("set.jsonl", b"", "{path}: expected at least one"),
        ("set.jsonl.xz", b"no xz", "{path}:1: the file cannot be read: "),
        ("set.jsonl.gz", b"no gzip", "{path}:1: the file cannot be read: "),
        ("cut.jsonl.gz", gzip.compress(f"{GOOD}\n".encode(), mtime=0)[:-6], "the file cannot be read: "),
        ("cut.jsonl.xz", lzma.compress(f"{GOOD}\n".encode())[:-6], "the file cannot be read: "),
        ("folder.jsonl", "folder", "{path}:1: the file cannot be read: "),
    ],
)
def test_unreadable_file(tmp_path: Path, name: str, content: bytes | str | None, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        path.mkdir()
    for read in (lambda: load_dataset(config(path)), lambda: read_jsonl(path)):
        with pytest.raises(DataError, match=re.escape(message.format(path=path))):
            read()


def test_skip_counts_every_reason_and_its_first_line(tmp_path: Path) -> None:
    lines = [line for line, _ in BAD_LINES.values()]
    path = write_rows(tmp_path / "set.jsonl", lines[0], GOOD, *lines, GOOD, *lines)
    dataset = load_dataset(config(path, on_bad_record="skip"))
    expected = {reason: Count(2, 3 + place) for place, reason in enumerate(BAD_LINES)}
    assert dataset.report.skipped == expected | {"not JSON": Count(3, 1)}
    assert (dataset.report.rows, dataset.report.used, len(dataset)) == (2 * len(lines) + 3, 2, 2)
    shown = str(dataset.report)
    assert f"{path}: {dataset.report.rows} rows of {{query, positive}}, 2 examples" in shown
    assert "skipped 3: not JSON (first: 1)" in shown
    assert f"skipped 2: mixed kinds (first: {2 + len(lines)})" in shown


def test_nothing_usable_is_an_error_that_tells_the_counts(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "set.jsonl", "nonsense", {"query": "", "positive": "p"})
    with pytest.raises(DataError, match="expected at least one usable record, got none") as caught:
        load_dataset(config(path, on_bad_record="skip"))
    assert "skipped 1: empty text (first: 2)" in str(caught.value)


def test_max_rows_reads_the_first_rows_and_says_so(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "set.jsonl", GOOD, GOOD, "nonsense")
    report = load_dataset(config(path, max_rows=2)).report
    assert (report.rows, report.examples) == (2, 2)
    assert "stopped at max_rows = 2" in str(report)
    assert load_dataset(config(path, max_rows=3, on_bad_record="skip")).report.max_rows is None
    with pytest.raises(DataError, match="max_rows: expected at least 1, or null, got 0"):
        load_dataset(config(path, max_rows=0))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["query\tdoc\tscore"], "1: expected the header ['query-id', 'corpus-id', 'score'], got ['query'"),
        (["query-id\tcorpus-id\tscore"], "2: expected at least one judgement, got none"),
        ([], "1: expected at least one judgement, got none"),
        (["query-id\tcorpus-id\tscore", "q\td"], "2: expected three tab-separated fields"),
        (
            ["query-id\tcorpus-id\tscore", "q\td\t1", "q\te\t0.5"],
            "3: score: expected an integer of up to 18 digits, got '0.5'",
        ),
        (
            ["query-id\tcorpus-id\tscore", "q\td\t" + "9" * 5000],
            "2: score: expected an integer of up to 18 digits, got '99",
        ),
        (["query-id\tcorpus-id\tscore", "q\td\t1", "q\td\t0"], "3: expected each pair once, got 'q', 'd' again"),
    ],
)
def test_bad_qrels(tmp_path: Path, lines: list[str], message: str) -> None:
    path = write_rows(tmp_path / "qrels.tsv", *lines)
    with pytest.raises(DataError, match=re.escape(f"{path}:{message}")):
        read_qrels(path)


def test_qrels(tmp_path: Path) -> None:
    path = tmp_path / "qrels.tsv.xz"
    path.write_bytes(lzma.compress(b"query-id\tcorpus-id\tscore\r\na\tx\t1\r\na\ty\t-1\nb\tx\t2\n"))
    assert read_qrels(path) == {"a": {"x": 1, "y": -1}, "b": {"x": 2}}
    with pytest.raises(DataError, match="expected a file, found none"):
        read_qrels(tmp_path / "absent.tsv")
    path.write_bytes(lzma.compress(b"query-id\tcorpus-id\tscore\n\xff\tx\t1\n"))
    with pytest.raises(DataError, match=":2: expected UTF-8, got byte 0xff"):
        read_qrels(path)


def test_read_lines_keeps_every_separator_but_the_line_feed(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_bytes("\ufeffa\u2028b\r\n\n\x0cc\r".encode())
    assert read_lines(file) == ["a\u2028b", "", "\x0cc\r"]


def test_read_jsonl_asks_for_keys(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "corpus.jsonl", {"_id": "a", "text": "t"}, {"_id": "b", "txt": "t"})
    assert [record["_id"] for record in read_jsonl(path, keys=("_id",))] == ["a", "b"]
    message = re.escape(f"{path}:2: expected the key 'text', got {{_id, txt}}")
    with pytest.raises(DataError, match=message):
        read_jsonl(path, keys=("_id", "text"))
    with pytest.raises(DataError, match=re.escape(f"{write_rows(path, GOOD, 'x')}:2: expected a JSON object")):
        read_jsonl(path)


# hf://


def test_hub_reads_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [
        {"query": "q0", "positive": "p0", "negatives": ["n0", "n1"], "source": "a"},
        {"query": "q1", "positive": " ", "negatives": None, "source": "b"},
        {"query": "q2", "positive": "p2", "negatives": None, "source": "b"},
    ]
    write_rows(folder / "train.jsonl", *rows)
    write_rows(folder / "test.jsonl", *rows[::2])
    other = tmp_path / "labelled"
    other.mkdir()
    write_rows(other / "test.jsonl", {"text": "t0", "label": 3}, {"text": "t1", "label": 3})
    aside: dict[str, Any] = {"columns": {"source": None}}
    dataset = load_dataset(config(f"hf://{folder}", on_bad_record="skip", **aside))
    assert (dataset.queries, dataset.negatives) == (["q0", "q2"], [("n0", "n1"), ()])
    assert dataset.report.skipped == {"empty text": Count(1, 2)}
    assert dataset.report.left_out == ("source",)
    assert "columns left out: source" in str(dataset.report)
    with pytest.raises(DataError, match=re.escape(f"hf://{folder}@train:2: positive: expected a text, got ' '")):
        load_dataset(config(f"hf://{folder}@train", **aside))
    assert load_dataset(config(f"hf://{folder}:default@test", **aside)).queries == ["q0", "q2"]
    assert load_dataset(config(f"hf://{other}@test")).labels.tolist() == [0, 0]
    with pytest.raises(
        DataError, match=re.escape("positive_from: expected null for {text, label, instruction?}, got 2")
    ):
        load_dataset(config(f"hf://{other}@test", positive_from=2))
    for path in (f"hf://{folder}@dev", f"hf://{folder}:nothing", f"hf://{tmp_path}/absent"):
        with pytest.raises(DataError, match=re.escape(f"{path}: the data set cannot be loaded: ")):
            load_dataset(config(path))
    with pytest.raises(DataError, match="got no name"):
        load_dataset(config("hf://@train"))


def fake_hub(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, object]) -> DatasetConfig:
    """The configuration of a hub data set of these rows."""
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: list(rows))
    return config("hf://owner/name")


DOORS = ["file", "hub"]


def through(door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *rows: dict[str, object]) -> DatasetConfig:
    return fake_hub(monkeypatch, *rows) if door == "hub" else config(write_rows(tmp_path / "set.jsonl", *rows))


@pytest.mark.parametrize("door", DOORS)
def test_negatives_are_taken_under_every_key(door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair: dict[str, object] = {"query": "q", "positive": "p"}
    rows = [
        pair | {"negatives": ["a", "b"]},
        pair | {"negative": "c"},
        pair | {"negative_1": "d", "negative_2": "e", "negative_3": None},
        pair | {"negative": None, "negatives": ["f"]},
        pair | {"negative": "g", "negatives": None},
        pair | {"negative": None},
        pair | {"negative_10": "k", "negative_2": "i", "negatives": "h", "negative": "j"},
        pair,
    ]
    dataset = load_dataset(through(door, tmp_path, monkeypatch, *rows))
    assert dataset.negatives == [
        *[("a", "b"), ("c",), ("d", "e"), ("f",), ("g",), ()],
        *[("j", "i", "k", "h"), ()],
    ]
    assert not dataset.report.left_out


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("key", "meant"),
    [
        *((name, "negatives") for name in ("hard_negatives", "negativs", "negatives_1", "Negatives")),
        *((name, "negative") for name in ("negatve", "negative_x")),
        *((name, "positive") for name in ("positives", "positve")),
        *((name, None) for name in ("score", "label", "id", "source", "title", "metadata", "\n")),
    ],
)
def test_a_further_column_is_refused_by_name_wherever_it_comes_from(
    door: str, key: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = through(door, tmp_path, monkeypatch, {"query": "q", "positive": "p", key: "x"})
    hint = f"did you mean '{meant}'?" if meant else "a training set's"
    with pytest.raises(DataError, match=re.escape(f":1: expected {PAIRS}, got the key {key!r}; {hint}")):
        load_dataset(chosen)
    aside = dataclasses.replace(chosen, columns={key: None})
    assert load_dataset(aside).report.left_out == (key,)


# Kinds


def test_pairs_and_templates(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "set.jsonl", {"query": "{q} {text}", "positive": "p", "negatives": ["n0", "n1"]}, GOOD)
    dataset = load_dataset(config(path, query_template="query: {text}", document_template="{{doc}} {text}!"))
    example = dataset.draw(0, np.random.default_rng(0))
    assert (example.query, example.positive) == ("{q} {text}", "p")
    assert (example.negatives, example.label) == (("n0", "n1"), -1)
    assert dataset.draw(1, np.random.default_rng(0)).negatives == ()
    batch = BatchPlan([dataset], [1.0], steps=1, batch_size=2, seed=0, hard_negatives=2).batch(0)
    assert "query: {q} {text}" in batch.queries
    assert {"{{doc}} p!", "{{doc}} n0!", "{{doc}} n1!"} <= set(batch.documents)
    assert text_id("{q} {text}") in batch.query_ids


def test_labelled_positive_is_every_other_text_of_the_label(tmp_path: Path) -> None:
    rows = [("a0", "a"), ("b0", "b"), ("a1", "a"), ("a0", "a"), ("c0", "c"), ("a2", "a"), ("b1", "b"), ("a0", "d")]
    path = write_rows(tmp_path / "set.jsonl", *({"text": text, "label": label} for text, label in rows))
    dataset = load_dataset(config(path))
    assert dict(zip(dataset.queries, dataset.labels.tolist(), strict=True)) == {
        "a0": 0,
        "a1": 0,
        "a2": 0,
        "b0": 1,
        "b1": 1,
    }
    report = dataset.report
    assert report.unused == {
        "the text and label of an earlier row": Count(1, 4),
        "the only text of its label": Count(2, 5),
    }
    assert report.rows == report.used + sum(count.rows for count in report.unused.values())
    rng = np.random.default_rng(0)
    drawn = Counter(dataset.draw(dataset.queries.index("a1"), rng).positive for _ in range(2000))
    assert set(drawn) == {"a0", "a2"}
    assert abs(drawn["a0"] - 1000) < 5 * math.sqrt(2000 * 0.25)
    for index in range(len(dataset)):
        example = dataset.draw(index, rng)
        assert example.positive != example.query
        assert example.positive[0] == example.query[0]


def test_integer_and_string_labels_are_different(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate([1, "1", 1, "1"])]
    assert load_dataset(config(write_rows(tmp_path / "set.jsonl", *rows))).labels.tolist() == [0, 0, 1, 1]


def test_scored_pairs(tmp_path: Path) -> None:
    rows = [("a", "low", 1), ("a", "high", 4), ("b", "low", 0.5), ("a", "edge", 3.5), ("c", "high", 5.0), ("b", "l", 3)]
    path = write_rows(tmp_path / "set.jsonl", *({"sentence1": a, "sentence2": b, "score": s} for a, b, s in rows))
    dataset = load_dataset(config(path, positive_from=3.5))
    examples = [dataset.draw(index, np.random.default_rng(0)) for index in range(len(dataset))]
    shown = [(example.query, example.positive, example.negatives) for example in examples]
    assert shown == [("a", "high", ("low",)), ("a", "edge", ("low",)), ("c", "high", ())]
    (reason,) = dataset.report.unused
    assert "below positive_from" in reason
    assert dataset.report.unused[reason] == Count(2, 3)
    assert (dataset.report.rows, dataset.report.used, dataset.report.hard_negative_rows) == (6, 4, 1)
    assert "3 examples, 1 more rows as hard negatives" in str(dataset.report)
    with pytest.raises(DataError, match=re.escape(f"{path}:1: positive_from: expected the score from which")):
        load_dataset(config(path))
    with pytest.raises(DataError, match="expected at least one usable record, got none"):
        load_dataset(config(path, positive_from=6))
    with pytest.raises(DataError, match=re.escape("positive_from: expected null for {query, positive")):
        load_dataset(config(write_rows(tmp_path / "pairs.jsonl", GOOD), positive_from=3))


def test_report_of_a_clean_set_is_one_line() -> None:
    report = Report(path="x.jsonl", columns="{text, label}", rows=1200, examples=1200)
    assert str(report) == "x.jsonl: 1,200 rows of {text, label}, 1,200 examples"


# The batch plan


@pytest.fixture
def three(tmp_path: Path) -> list[Dataset]:
    return [
        pairs(tmp_path / "a.jsonl", 50, negatives=4, document_instruction="Represent the document."),
        labelled(tmp_path / "b.jsonl", [7, 2, 12]),
        pairs(tmp_path / "c.jsonl", 23),
    ]


def three_plan(three: list[Dataset], **values: Any) -> BatchPlan:
    return BatchPlan(three, [2.0, 1.0, 1.0], **{"steps": 60, "batch_size": 8, "seed": 3} | values)


def test_batches_are_homogeneous_and_laid_out_as_said(three: list[Dataset]) -> None:
    plan = three_plan(three, hard_negatives=2)
    assert {plan.batch(step).dataset for step in range(60)} == {0, 1, 2}
    for step in range(60):
        batch = plan.batch(step)
        assert len(batch.queries) == len(batch.labels) == len(batch.query_ids) == 8
        assert batch.document_labels.shape == (1, len(batch.documents))
        assert len(batch.documents) == len(batch.document_ids)
        assert not batch.sides.any()
        assert batch.instructions == ["Find the answer."]
        assert {array.dtype for array in (batch.labels, batch.document_labels)} == {np.dtype(np.int64)}
        np.testing.assert_array_equal(batch.document_labels[0, :8], batch.labels)
        assert (batch.document_labels[0, 8:] == -1).all()
        if batch.dataset == 1:
            assert len(batch.documents) == 8
            numbers = [int(query[1 : query.index(".")]) for query in batch.queries]
            assert numbers == batch.labels.tolist()
            assert [int(text[1 : text.index(".")]) for text in batch.documents] == numbers
        else:
            assert (batch.labels == -1).all()
            name = "a" if batch.dataset == 0 else "c"
            assert all(query.startswith(f"{name} q") for query in batch.queries)
            assert batch.documents[:8] == [query.replace("q", "p") for query in batch.queries]
            owners = [query.removeprefix("a q") for query in batch.queries for _ in range(2)]
            expected = owners if batch.dataset == 0 else []
            assert [text.removeprefix("a n").split(".")[0] for text in batch.documents[8:]] == expected
            assert len(set(batch.documents[8:])) == len(expected)
    instructions = {plan.batch(step).dataset: plan.batch(step).document_instruction for step in range(60)}
    assert instructions == {0: "Represent the document.", 1: "Find the answer.", 2: "Find the answer."}


def test_hard_negatives_are_cut_to_any_number(three: list[Dataset]) -> None:
    for cut, expected in ((0, 0), (1, 8), (3, 24), (9, 32)):
        plan = BatchPlan(three[:1], [1.0], steps=3, batch_size=8, seed=0, hard_negatives=cut)
        assert len(plan.batch(2).documents) == 8 + expected
    plan = BatchPlan(three[:1], [1.0], steps=300, batch_size=8, seed=0, hard_negatives=1)
    places = Counter(text.split(".")[1] for step in range(300) for text in plan.batch(step).documents[8:])
    assert all(abs(places[str(j)] - 600) < 5 * math.sqrt(2400 * 0.25 * 0.75) for j in range(4))


def test_plan_is_a_function_of_seed_and_step(three: list[Dataset]) -> None:
    first = [three_plan(three).batch(step) for step in range(60)]
    whole = three_plan(three)
    for step in [59, 0, 31, 31, 30, 58, 7]:  # any order, as after a resume
        assert_same(whole.batch(step), first[step])
    longer = three_plan(three, steps=90)
    for step in range(60):
        assert_same(longer.batch(step), first[step])
    other = three_plan(three, seed=4)
    assert any(other.batch(step).queries != first[step].queries for step in range(3))


@pytest.mark.parametrize("count", [8, 9, 11, 15, 16, 17, 20, 29, 100])
@pytest.mark.parametrize("process_count", [1, 3])
def test_no_row_twice_within_an_epoch_or_a_batch(tmp_path: Path, count: int, process_count: int) -> None:
    dataset = pairs(tmp_path / "set.jsonl", count)
    plan = BatchPlan([dataset], [1.0], steps=97, batch_size=8, seed=1)
    stream = []
    for step in range(97):
        parts = [plan.batch(step, index, process_count).queries for index in range(process_count)]
        queries = [query for part in parts for query in part]
        assert len(set(queries)) == 8
        stream += queries
    epochs = [stream[start : start + count] for start in range(0, len(stream) - count + 1, count)]
    assert all(len(set(epoch)) == count for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("name", ["query", "anchor"])
def test_rows_of_a_group_stand_together(tmp_path: Path, name: str) -> None:
    """Groups of one to four rows scattered over the file, rows without one, and an epoch that ends within a batch."""
    groups = [*(f"g{row % 7}" for row in range(22)), None, 7, 7]
    written = [{name: f"q{row}", "positive": f"p{row}", "group": group} for row, group in enumerate(groups)]
    del written[22]["group"]
    dataset = load_dataset(config(write_rows(tmp_path / "set.jsonl", *written)))
    assert dataset.report.columns == f"{{{name}, positive, group}}"
    plan = BatchPlan([dataset], [1.0], steps=25, batch_size=5, seed=0)

    orders = np.concatenate([plan.rows(step)[1] for step in range(25)]).reshape(5, 25)

    assert len({tuple(order) for order in orders}) == 5
    for order in orders:
        assert sorted(order) == list(range(25))
        met = [groups[row] for row in order]
        for group in {*groups} - {None}:
            places = [place for place, other in enumerate(met) if other == group]
            assert places == list(range(places[0], places[0] + len(places)))
    assert len({tuple(order[np.isin(order, [0, 7, 14, 21])]) for order in orders}) > 1, "rows of a group are shuffled"


def test_rows_without_groups_are_in_the_order_that_they_always_had(tmp_path: Path) -> None:
    plan = BatchPlan([pairs(tmp_path / "set.jsonl", 40)], [1.0], steps=5, batch_size=8, seed=3)

    order = np.concatenate([plan.rows(step)[1] for step in range(5)])
    np.testing.assert_array_equal(order, np.random.default_rng((3, 1, 0, 0)).permutation(40))


def test_a_group_that_is_no_name_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "set.jsonl", {"query": "q", "positive": "p", "group": 1.5})
    with pytest.raises(DataError, match=r"set\.jsonl:1: group: expected a string or an integer, got 1\.5"):
        load_dataset(config(path))


def test_every_set_of_a_mixture_follows_its_own_epochs(three: list[Dataset]) -> None:
    plan = three_plan(three)
    for which, dataset in enumerate(three):
        steps = np.flatnonzero(plan.sets == which)
        stream = np.concatenate([plan.rows(int(step))[1] for step in steps])
        epochs = np.concatenate([plan.rows(int(step))[0] for step in steps])
        np.testing.assert_array_equal(epochs, np.arange(len(stream)) // len(dataset))
        for epoch in range(len(stream) // len(dataset)):
            assert sorted(stream[epochs == epoch]) == list(range(len(dataset)))


def test_orders_of_a_later_epoch_stay_uniform(tmp_path: Path) -> None:
    """Keeping a batch free of repeats must not favour any row over the seeds."""
    dataset = pairs(tmp_path / "set.jsonl", 12)
    firsts = Counter(
        int(BatchPlan([dataset], [1.0], steps=5, batch_size=8, seed=seed).rows(1)[1][4]) for seed in range(1200)
    )
    assert set(firsts) == set(range(12))
    assert sum((firsts[row] - 100) ** 2 / 100 for row in range(12)) < 40  # chi-square, 11 degrees: p < 4e-5


@pytest.mark.parametrize(("process_count", "sizes"), [(2, [4, 4]), (3, [2, 3, 3]), (8, [1] * 8)])
def test_processes_share_the_global_batch(three: list[Dataset], process_count: int, sizes: list[int]) -> None:
    plan = three_plan(three)
    for step in range(60):
        batch = plan.batch(step)
        parts = [plan.batch(step, index, process_count) for index in range(process_count)]
        assert [len(part.queries) for part in parts] == sizes
        assert {part.dataset for part in parts} == {batch.dataset}
        for name in ("queries", "labels", "query_ids"):
            assert [item for part in parts for item in getattr(part, name)] == list(getattr(batch, name))
        documents = [text for part in parts for text in part.documents[: len(part.queries)]]
        documents += [text for part in parts for text in part.documents[len(part.queries) :]]
        assert documents == batch.documents


def test_weights_are_respected(three: list[Dataset]) -> None:
    weights = [0.5, 3.0, 1.5]
    counts = np.bincount(BatchPlan(three, weights, steps=3000, batch_size=2, seed=11).sets, minlength=3)
    expected = 3000 * np.array(weights) / 5.0
    assert ((counts - expected) ** 2 / expected).sum() < 18.4  # chi-square, 2 degrees: p = 1e-4
    wrong = 3000 * np.array([1.0, 1.0, 1.0]) / 3
    assert ((counts - wrong) ** 2 / wrong).sum() > 18.4


def test_ids_find_false_negatives(tmp_path: Path) -> None:
    rows = [
        {"query": "same", "positive": "p0", "negatives": ["shared"]},
        {"query": "same", "positive": "p1", "negatives": []},
        {"query": "other", "positive": "same", "negatives": ["p0"]},
        {"query": "last", "positive": "shared", "negatives": []},
    ]
    dataset = load_dataset(config(write_rows(tmp_path / "set.jsonl", *rows), query_template="q: {text}"))
    batch = BatchPlan([dataset], [1.0], steps=1, batch_size=4, seed=0).batch(0)
    place = {(query, text): i for i, (query, text) in enumerate(zip(batch.queries, batch.documents, strict=False))}
    zero, one = place["q: same", "p0"], place["q: same", "p1"]
    other, last = place["q: other", "same"], place["q: last", "shared"]
    assert batch.query_ids[zero] == batch.query_ids[one] == batch.document_ids[other]
    assert batch.query_ids[other] != batch.query_ids[last]
    hard = dict(zip(batch.documents[4:], batch.document_ids[4:], strict=True))
    assert hard == {"shared": batch.document_ids[last], "p0": batch.document_ids[zero]}
    assert batch.query_ids.dtype == batch.document_ids.dtype == np.int64


def test_text_id_is_stable_and_63_bits() -> None:
    digest = hashlib.blake2b("Grüße".encode(), digest_size=8).digest()
    assert text_id("Grüße") == int.from_bytes(digest, "big") >> 1
    ids = {text_id(str(number)) for number in range(10_000)}
    assert len(ids) == 10_000
    assert 2**62 < max(ids) < 2**63
    assert min(ids) >= 0


def test_plan_refuses_what_it_cannot_do(three: list[Dataset]) -> None:
    message = "b.jsonl: expected at least 22 examples for the queries of a batch, got 21; lower batch_size or drop"
    with pytest.raises(DataError, match=message):
        three_plan(three, batch_size=22)
    plan = three_plan(three)
    with pytest.raises(DataError, match="expected a batch of at least 9 rows, one for each process, got 8"):
        plan.batch(0, 3, 9)
    with pytest.raises(DataError, match="expected at least one data set, got none"):
        BatchPlan([], [], steps=1, batch_size=1, seed=0)
    for weights in ([1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, math.inf]):
        with pytest.raises(ValueError, match="weights: expected 3 positive numbers"):
            BatchPlan(three, weights, steps=1, batch_size=1, seed=0)
    for name, value in (("steps", 0), ("batch_size", 0), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name}: expected at least"):
            three_plan(three, **{name: value})
    for step in (-1, 60):
        with pytest.raises(ValueError, match=re.escape("step: expected a value in [0, 60)")):
            plan.batch(step)
    with pytest.raises(ValueError, match=re.escape("process_index: expected a value in [0, 2)")):
        plan.batch(0, 2, 2)


# The shipped data


def shipped_rows() -> dict[str, int]:
    """Files and row counts of the table in data/README.md."""
    table = re.findall(r"^\| `([^`]+)` \| ([\d,]+)", (SHIPPED / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    return {name: int(rows.replace(",", "")) for name, rows in table}


def test_shipped_files_are_small_and_all_listed() -> None:
    files = {path for path in SHIPPED.rglob("*") if path.is_file()}
    assert sum(path.stat().st_size for path in files) < 6_000_000
    assert {str(path.relative_to(SHIPPED)) for path in files if path.suffix in (".xz", ".tsv")} == set(shipped_rows())


@pytest.mark.parametrize(("name", "rows"), shipped_rows().items())
def test_shipped_file_loads(name: str, rows: int) -> None:
    path = SHIPPED / name
    if name.endswith(".tsv"):
        qrels = read_qrels(path)
        assert sum(map(len, qrels.values())) == rows
        assert set(qrels) == {record["_id"] for record in read_jsonl(path.parent / "queries.jsonl.xz")}
        documents = {record["_id"] for record in read_jsonl(path.parent / "corpus.jsonl.xz")}
        assert {document for judged in qrels.values() for document in judged} <= documents
    elif path.name in ("corpus.jsonl.xz", "queries.jsonl.xz"):
        records = read_jsonl(path, keys=("_id", "text"))
        assert len({record["_id"] for record in records}) == len(records) == rows
        assert all(record["text"].strip() for record in records)
    elif name.startswith("instruct/") and "similar" not in name:
        assert len(read_rows(path, read_instructions(SHIPPED / "instruct/instructions.yaml"))) == rows
    else:
        report = load_dataset(config(path, positive_from=4.0 if "stsb" in name else None)).report
        assert report.rows == rows
        assert not report.skipped
        assert "stsb" in name or report.used == rows


# scripts/make_data.py


def test_make_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = load_script("make_data")
    caps = {"train/a.jsonl.xz": 3, "eval/b.jsonl": None, "eval/qrels.tsv": None}
    monkeypatch.setattr(script, "CAPS", caps)
    texts = {
        "train/a.jsonl.xz": "".join(f'{{"n": {number}}}\n' for number in range(10)),
        "eval/b.jsonl": '{"n": 1}\n{"n": 2}\n',
        "eval/qrels.tsv": "query-id\tcorpus-id\tscore\nq\td\t1\n",
    }
    source, entries = tmp_path / "source", []
    for name, text in texts.items():
        packed = lzma.compress(text.encode()) if name.endswith(".xz") else text.encode()
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(packed)
        rows = text.count("\n") - name.endswith(".tsv")
        entries.append({"file": name, "rows": rows, "ship": True, "sha256": hashlib.sha256(packed).hexdigest()})
    manifest = source / "manifest.json"
    manifest.write_text(json.dumps(entries))
    targets = [tmp_path / "one", tmp_path / "two"]
    written = [script.make(source, target) for target in targets]
    assert [(name, rows) for name, rows, _ in written[0]] == [
        ("train/a.jsonl.xz", 3),
        ("eval/b.jsonl.xz", 2),
        ("eval/qrels.tsv", 1),
    ]
    assert [record["n"] for record in read_jsonl(targets[0] / "train/a.jsonl.xz")] == [0, 3, 6]
    for name, _, size in written[0]:
        assert (targets[0] / name).read_bytes() == (targets[1] / name).read_bytes()
        assert (targets[0] / name).stat().st_size == size
    for change, message in (
        ({"ship": False}, "does not let it ship"),
        ({"rows": 3}, "expected 3 rows, got 2"),
        ({"sha256": "0"}, "expected SHA-256 0, got"),
        ({"file": "c"}, "expected an entry for eval/b.jsonl, got none"),
    ):
        manifest.write_text(json.dumps([entries[0], entries[1] | change, entries[2]]))
        with pytest.raises(SystemExit, match=message):
            script.make(source, tmp_path / "three")

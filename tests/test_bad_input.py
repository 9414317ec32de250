"""What a user types: strings come through as they are, and bad input ends a command with one sentence and code 2."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pe import encode, evaluate, memory, train, transfer
from pe.config import DatasetConfig, EvaluateConfig, RecipeError
from pe.model import Instruction, PromptEmbedder
from pe.runs.recipes import load_recipe
from tests.embedders import build

AS_TYPED = [
    *("yes", "null", "~", "1e3", "007", "key: value", "{a: b}", "#x", "&x", "*x", "---", "- item", "[a, b]", "[1]"),
    *('"a"', "'a'", '["a", 1]', '["a"', "a\n- b", "2026-01-01", "!x", "%x", "@x", "|", "nan", "true", "-", " x "),
]


def string_options(function: Callable[..., Any]) -> list[str]:
    """The keyword-only parameters whose type has a string in it."""
    hints, parameters = typing.get_type_hints(function), inspect.signature(function).parameters.values()
    options = [item.name for item in parameters if item.kind is item.KEYWORD_ONLY]
    return [name for name in options if hints[name] is str or str in typing.get_args(hints[name])]


@pytest.mark.parametrize("typed", AS_TYPED)
def test_a_string_comes_through_as_it_is_typed(typed: str) -> None:
    """Every option with a string in its type: nothing in it is read as YAML."""
    options = string_options(encode.encode_file)
    assert {"instruction", "field", "backbone"} <= set(options)
    parsed = encode.parse(["m", "in.txt", "o.npy", *(f"--{name}={typed}" for name in options)])
    assert {name: parsed[name] for name in options} == dict.fromkeys(options, typed)
    options = ["tasks", "data", "output", "backbone", "device"]
    parsed = evaluate._parser().parse_args(
        ["m", *(f"--{name}={typed}" for name in options), f"--instruction=A={typed}"]
    )
    assert {name: str(parsed[name]) for name in options} == dict.fromkeys(options, str(Path(typed)))
    assert parsed.instruction == [f"A={typed}"]


@pytest.mark.parametrize("typed", AS_TYPED)
def test_an_instruction_is_a_sentence_unless_it_is_a_json_list_of_strings(typed: str) -> None:
    assert encode.sentences(typed) == [typed]
    assert encode.sentences(json.dumps([typed, "b"])) == [typed, "b"]


@pytest.mark.parametrize("typed", AS_TYPED)
def test_a_string_of_a_recipe_is_what_was_typed(typed: str, recipe: Path) -> None:
    """A recipe's options are YAML, so one that may be null can be so; it is never null by accident."""
    options = {"output": typed, "model.backbone.model": typed, "model.templates.query.text": f"{typed}{{text}}"}
    by_accident = typed in ("#x", "&x", "---")
    revision = {} if by_accident else {"model.backbone.revision": typed}
    got = load_recipe(recipe, [f"--{name}={value}" for name, value in (options | revision).items()])
    assert (got.output, got.model.backbone.model) == (typed, typed)
    assert got.model.templates.query.text == f"{typed}{{text}}"
    assert got.model.backbone.revision == (None if typed in ("null", "~") or by_accident else typed)
    if by_accident:
        with pytest.raises(RecipeError, match=r"^--model\.backbone\.revision=.*: expected a value or null, got '"):
            load_recipe(recipe, [f"--model.backbone.revision={typed}"])


def test_a_value_apart_from_its_option(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"^--model\.backbone\.revision: .*: expected a value or null, got '#x'"):
        load_recipe(recipe, ["--model.backbone.revision", "#x"])
    assert load_recipe(recipe, ["--model.backbone.revision", "- x"]).model.backbone.revision == "- x"


# One sentence and code 2.


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose data set is `rows.jsonl`, of one good pair, and whose models are nowhere."""
    (tmp_path / "rows.jsonl").write_text('{"query": "q", "positive": "p"}\n', encoding="utf-8")
    part = {"model": str(tmp_path / "no-model")}
    values = {
        "output": str(tmp_path / "run"),
        "model": {"prompter": part, "backbone": part},
        "data": [{"path": str(tmp_path / "rows.jsonl"), "instruction": "Find the same"}],
        "train": {"batch_size": 1},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def refused(command: Callable[[Sequence[str]], int | None], arguments: Sequence[str], capsys: Any) -> str:
    """What a command says that ends with code 2: one line."""
    capsys.readouterr()
    try:
        code: Any = command(arguments)
    except SystemExit as stopped:
        code = stopped.code
    said: str = capsys.readouterr().err.lstrip("\n")  # of a progress bar's end
    assert code == 2, said
    assert said.count("\n") == 1, said
    return said


LONG = "9" * 400
ROWS = {
    "a null": ('{"query": null, "positive": "p"}', "query: expected a string, got null"),
    "a number": ('{"query": 5, "positive": "p"}', "query: expected a string, got 5"),
    "no key": ('{"positive": "p"}', "expected the columns {query, positive} or {text, label} or"),
    "a key twice": ('{"query": "q", "query": "r", "positive": "p"}', "expected each key once, got 'query' again"),
    "no object": ("[1]", "expected a JSON object, got [1]"),
    "not a number": ('{"text": "t", "label": NaN}', "label: expected a string or an integer, got nan"),
    "a long label": (f'{{"text": "t", "label": {LONG}}}', "label: expected an integer of up to 64 bits, got 9999"),
    "no positive": ('{"query": "q", "positive": []}', "expected at least one positive, got none"),
    "another name": (
        '{"query": "q", "positive": "p", "neg": ["n"]}',
        "expected {query, positive, negatives?, negative?, instruction?, group?}, got the key 'neg'; a training set's",
    ),
    "deep": ("[" * 5000, "expected a JSON object, got '[[[["),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("command", [train.main, memory.main])
def test_rows_that_train_nothing(command: Any, kind: str, recipe: Path, tmp_path: Path, capsys: Any) -> None:
    row, message = ROWS[kind]
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f"\n{row}\n\n", encoding="utf-8")
    output = [f"--output={tmp_path / 'report'}"] if command is memory.main else []
    said = refused(command, [str(recipe), *output], capsys)
    assert f"{rows}:2: {message}" in said
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "recipe.yaml"}


def test_a_long_score_among_scored_pairs(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    rows = tmp_path / "ROWS.JSONL"
    rows.write_text(f'{{"sentence1": "a", "sentence2": "b", "score": {LONG}}}', encoding="utf-8")
    data = f"--data=[{{path: {rows}, instruction: i, positive_from: 1}}]"
    assert "ROWS.JSONL:1: score: expected an integer of up to 64 bits, got 9" in refused(
        train.main, [str(recipe), data], capsys
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--data=[{path: a, instruction: b, document_instruction: ' '}]", "or null for the queries', got ' '"),
        ("--data=[{path: a, instruction: b, document_instruction: ''}]", "or null for the queries', got ''"),
        ("--data=[{path: a, instruction: ''}]", "a: instruction: expected a sentence, got ''"),
        ("--evaluate.instructions={PE-STS12: ' '}", "evaluate.instructions: PE-STS12: expected a sentence, got ' '"),
        ("--model.prompter.revision=#main", "expected a value or null, got '#main', in which YAML finds neither"),
    ],
)
@pytest.mark.parametrize("command", [train.main, memory.main, transfer.main])
def test_recipes_with_an_empty_instruction(
    command: Any, change: str, message: str, recipe: Path, tmp_path: Path, capsys: Any
) -> None:
    first = [str(tmp_path), "--backbone=x"] if command is transfer.main else [str(recipe)]
    assert message in refused(command, [*first, change], capsys)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": null}', "text: expected a string, got null"),
        ('{"text": 1.5}', "text: expected a string, got 1.5"),
        ('{"txt": "a"}', "expected the key 'text', got {txt}; name the key of the texts with --field"),
        ('{"text": "a", "text": "b"}', "expected each key once, got 'text' again"),
        ("null", "expected a JSON object, got null"),
    ],
)
def test_rows_that_are_not_encoded(row: str, message: str, tmp_path: Path, capsys: Any) -> None:
    rows = tmp_path / "ROWS.Jsonl"
    rows.write_text(f'{{"text": "a"}}\n\n{row}\n', encoding="utf-8")
    said = refused(encode.main, ["model", str(rows), str(tmp_path / "new" / "O.NPY"), "--instruction=x"], capsys)
    assert said == f"pe.encode: {rows}:3: {message}\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("typed", ["", " ", "\t\n", "[]", '[""]', '["a", " "]'])
def test_no_command_takes_an_empty_instruction(typed: str, tmp_path: Path, capsys: Any) -> None:
    said = refused(encode.main, ["model", "in.txt", str(tmp_path / "o.npy"), f"--instruction={typed}"], capsys)
    assert f"--instruction: expected a sentence, or a JSON list of sentences, got {typed!r}" in said
    if typed.strip():
        return
    data = str(Path(__file__).parents[1] / "data")
    said = refused(evaluate.main, ["model", f"--data={data}", f"--instruction=PE-STSb-dev={typed}"], capsys)
    assert "instructions: PE-STSb-dev: expected a sentence, got ''" in said


@pytest.mark.parametrize(
    ("file", "task", "rows", "message"),
    [
        (
            "sts12",
            "PE-STS12",
            [{"sentence1": "a", "sentence2": "b", "score": int(LONG)}],
            ":1: score: expected an integer",
        ),
        (
            "qqp_test",
            "PE-QQP",
            [{"sentence1": "a", "sentence2": "b", "label": label} for label in (0, "x")],
            "throughout",
        ),
        (
            "qqp_test",
            "PE-QQP",
            [{"sentence1": "a", "sentence2": "b", "label": label} for label in ("x", 0)],
            "throughout",
        ),
    ],
)
def test_rows_that_are_not_scored(
    file: str, task: str, rows: list[object], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(evaluate, "load_encoder", lambda *_, **__: build("qwen3"))
    (tmp_path / "eval").mkdir()
    (tmp_path / f"eval/{file}.JSONL").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    assert message in refused(evaluate.main, ["model", f"--tasks={task}", f"--data={tmp_path}"], capsys)


@pytest.mark.parametrize("dtype", ["null", "#x", "float"])
@pytest.mark.parametrize("command", [encode.main, evaluate.main])
def test_a_type_of_weights_is_not_passed_over(command: Any, dtype: str, capsys: Any) -> None:
    rest = ["in.txt", "o.npy", "--instruction=x"] if command is encode.main else []
    with pytest.raises(SystemExit) as stopped:
        command(["model", *rest, f"--dtype={dtype}"])
    assert stopped.value.code == 2
    assert ": dtype: expected 'auto', 'fastest', 'float32'" in capsys.readouterr().err


# An instruction is a sentence, whichever door it comes through.


@pytest.mark.parametrize("blank", ["", " ", "\n"])
def test_no_door_takes_an_empty_instruction(blank: str) -> None:
    model: PromptEmbedder = build("qwen3")
    for call in (
        lambda: model.encode(["a"], instruction=blank),
        lambda: model.encode_many(["a"], instructions=["a", blank]),
        lambda: model.prompt_bank([Instruction(blank)]),
        lambda: DatasetConfig(path="a", instruction=blank),
        lambda: DatasetConfig(path="a", instruction="b", document_instruction=blank),
        lambda: EvaluateConfig(instructions={"PE-STS12": blank}),
    ):
        with pytest.raises(ValueError, match=r"instructions?:.* expected a sentence.*, got '"):
            call()


def test_documents_without_an_instruction_of_their_own_take_the_queries() -> None:
    assert DatasetConfig(path="a", instruction="b").document_instruction is None

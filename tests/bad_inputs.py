"""Bad input, a row each: what is wrong with which file, the command, and what its one sentence must say.

A row starts from the good project of `tests/test_bad_inputs.py`: `recipe.yaml` with `rows.jsonl`, the models
`prompter/` and `backbone/`, the finished run `run/` with `run/model`, and `texts.txt`. `files` says what stands in it
instead: text or bytes; a function that spoils the file, or the folder, of that name; or None, which removes it.
"""

from __future__ import annotations

import gzip
import json
import lzma
import pickle
import shutil
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file

from tests.gguf_files import write_gguf

Content = str | bytes | Callable[[Path], object] | None


class Bad(NamedTuple):
    """A bad input.

    Attributes:
        name: what is wrong.
        command: what is typed behind `python -m pe.`, in the project's folder.
        says: what the sentence must have in it, besides the command's name at its start.
        files: what differs from the good project.
    """

    name: str
    command: str
    says: tuple[str, ...]
    files: Mapping[str, Content] = {}


# How a good file is spoilt.


def cut(share: float) -> Callable[[Path], object]:
    """Keep so much of the file."""
    return lambda file: file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def values(**changes: Any) -> Callable[[Path], object]:
    """Change keys of a JSON or YAML file, `a__b` for a key in a section; None removes one."""

    def change(file: Path) -> None:
        read: Any = json.loads if file.suffix == ".json" else yaml.safe_load
        content = read(file.read_text(encoding="utf-8"))
        for key, value in changes.items():
            *sections, name = key.split("__")
            place = content
            for section in sections:
                place = place.setdefault(section, {})
            if value is None:
                del place[name]
            else:
                place[name] = value
        file.write_text(json.dumps(content), encoding="utf-8")

    return change


def text(before: str, after: str) -> Callable[[Path], object]:
    """Replace a part of a file."""

    def change(file: Path) -> None:
        content = file.read_text(encoding="utf-8")
        assert before in content
        file.write_text(content.replace(before, after), encoding="utf-8")

    return change


def swapped(one: str, other: str) -> Callable[[Path], object]:
    """Let two tokens of a tokenizer.json change places."""

    def change(file: Path) -> None:
        content = json.loads(file.read_text(encoding="utf-8"))
        ids = content["model"]["vocab"]
        ids[one], ids[other] = ids[other], ids[one]
        file.write_text(json.dumps(content), encoding="utf-8")

    return change


def tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change what a safetensors file holds."""

    def changed(file: Path) -> None:
        content = load_file(file)
        change(content)
        save_file(content, file, {"format": "pt"})

    return changed


def checkpoint(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Change what the newest checkpoint holds."""

    def changed(folder: Path) -> None:
        file = sorted(folder.glob("step-*.pt"))[-1]
        content = torch.load(file, weights_only=True)
        change(content)
        torch.save(content, file)

    return changed


def checkpoints(content: bytes) -> Callable[[Path], object]:
    """The same bytes in all of them."""

    def change(folder: Path) -> None:
        for file in folder.glob("step-*.pt"):
            file.write_bytes(content)

    return change


def parquet(**columns: Any) -> Callable[[Path], object]:
    return lambda file: pq.write_table(pa.table(columns), file)


def saved(**columns: Any) -> Callable[[Path], object]:
    return lambda folder: Dataset.from_dict(columns).save_to_disk(str(folder))


def splits(*names: str) -> Callable[[Path], object]:
    rows = {"query": ["q"], "positive": ["p"]}
    return lambda folder: DatasetDict({name: Dataset.from_dict(rows) for name in names}).save_to_disk(str(folder))


def link(target: str) -> Callable[[Path], object]:
    """A link in place of the file, whose content stands at `target`, seen from the link's folder."""

    def change(file: Path) -> None:
        place = file.parent / target
        place.parent.mkdir(parents=True, exist_ok=True)
        file.rename(place)
        file.symlink_to(target)

    return change


def gguf(change: Callable[[bytes], bytes] = bytes, architecture: str = "llama") -> Callable[[Path], object]:
    """A GGUF file of tiny weights, with its bytes changed."""

    def write(file: Path) -> None:
        write_gguf(file, architecture)
        file.write_bytes(change(file.read_bytes()))

    return write


def database(*statements: str) -> Callable[[Path], object]:
    """An SQLite file that somebody else has written."""

    def write(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with sqlite3.connect(file) as index:
            for statement in statements:
                index.execute(statement)

    return write


class Code:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("code-has-run"),)


PICKLE = pickle.dumps(Code())


def torch_pickle(file: Path) -> None:
    torch.save({"step": 1, "code": Code()}, file)


# Recipes.

LONG = "9" * 400
RECIPES = (
    Bad("no recipe there", "train nowhere.yaml", ("nowhere.yaml: the recipe cannot be read", "No such file")),
    Bad("a folder", "train prompter", ("prompter: the recipe cannot be read", "directory")),
    Bad(
        "empty",
        "train recipe.yaml",
        ("recipe.yaml:1: expected a mapping of output", "got nothing"),
        {"recipe.yaml": ""},
    ),
    Bad("a comment alone", "train recipe.yaml", ("recipe.yaml:1: expected a mapping",), {"recipe.yaml": "# later\n"}),
    Bad(
        "a list",
        "train recipe.yaml",
        ("recipe.yaml:1: the recipe: expected a mapping", "a list"),
        {"recipe.yaml": "- a\n"},
    ),
    Bad(
        "a word",
        "train recipe.yaml",
        ("recipe.yaml:1: the recipe: expected a mapping", "got 'tiny'"),
        {"recipe.yaml": "tiny\n"},
    ),
    Bad("an open bracket", "train recipe.yaml", ("recipe.yaml:2: not valid YAML",), {"recipe.yaml": "data: [\n"}),
    Bad("a tab", "train recipe.yaml", ("recipe.yaml:2: not valid YAML",), {"recipe.yaml": "train:\n\tsteps: 1\n"}),
    Bad(
        "no UTF-8",
        "train recipe.yaml",
        ("recipe.yaml: the recipe cannot be read", "utf-8"),
        {"recipe.yaml": b"output: \xff\n"},
    ),
    Bad(
        "a control character", "train recipe.yaml", ("recipe.yaml", "not valid YAML"), {"recipe.yaml": "output: \x00\n"}
    ),
    Bad(
        "two documents",
        "train recipe.yaml",
        ("recipe.yaml:2: not valid YAML", "another document"),
        {"recipe.yaml": "output: a\n---\noutput: b\n"},
    ),
    Bad(
        "a tag that makes an object",
        "train recipe.yaml",
        ("recipe.yaml",),
        {"recipe.yaml": "output: !!python/object/apply:os.getcwd []\n"},
    ),
    Bad("deep", "train recipe.yaml", ("recipe.yaml",), {"recipe.yaml": "data: " + "[" * 3000}),
    Bad("an alias of itself", "train recipe.yaml", ("recipe.yaml",), {"recipe.yaml": "data: &a [*a]\n"}),
    Bad(
        "an unknown section",
        "train recipe.yaml",
        ("recipe.yaml:", "unknown key 'trian'", "did you mean 'train'"),
        {"recipe.yaml": text("train:", "trian:")},
    ),
    Bad(
        "an unknown key",
        "train recipe.yaml",
        ("unknown key 'stepz' in train", "did you mean 'steps'"),
        {"recipe.yaml": text("steps:", "stepz:")},
    ),
    Bad(
        "a key twice",
        "train recipe.yaml",
        ("recipe.yaml:", "key 'output' stands twice"),
        {"recipe.yaml": lambda file: file.write_text(file.read_text() + "output: b\n")},
    ),
    Bad(
        "a key that is a list",
        "train recipe.yaml",
        ("expected a key", "got a list or mapping"),
        {"recipe.yaml": "? [a]\n: b\n"},
    ),
    Bad(
        "a section that is a number",
        "train recipe.yaml",
        ("train: expected a mapping", "got '5'"),
        {"recipe.yaml": values(train=5)},
    ),
    Bad(
        "a section that is empty",
        "train recipe.yaml",
        ("model: expected a mapping", "got nothing"),
        {"recipe.yaml": "model:\n"},
    ),
    Bad(
        "data that is a mapping",
        "train recipe.yaml",
        ("recipe.yaml:", "data"),
        {"recipe.yaml": values(data={"path": "rows.jsonl"})},
    ),
    Bad(
        "data without a path",
        "train recipe.yaml",
        ("recipe.yaml:", "path"),
        {"recipe.yaml": values(data=[{"instruction": "i"}])},
    ),
    Bad("no data", "train recipe.yaml --data=[]", ("data: expected at least one data set, got none",)),
    Bad(
        "an option that is gone",
        "train recipe.yaml --loss.symmetric=true",
        ("loss.symmetric is no longer there; leave it out",),
    ),
    Bad(
        "a value that is gone",
        "train recipe.yaml --model.skip=linear",
        ("model.skip: linear is no longer there", "weighted"),
    ),
    Bad(
        "steps in letters",
        "train recipe.yaml --train.steps=abc",
        ("--train.steps=abc: train.steps: expected int or null, got 'abc'",),
    ),
    Bad("steps of none", "train recipe.yaml --train.steps=0", ("train.steps: expected at least 1, got 0",)),
    Bad("steps below none", "train recipe.yaml --train.steps=-1", ("train.steps: expected 0 or more, got -1",)),
    Bad(
        "half a step",
        "train recipe.yaml --train.steps=1.5",
        ("--train.steps=1.5: train.steps: expected int or null, got '1.5'",),
    ),
    Bad("steps and epochs", "train recipe.yaml --train.epochs=1", ("train.steps: expected null beside `epochs`",)),
    Bad("a batch of none", "train recipe.yaml --train.batch_size=0", ("train.batch_size: expected at least 1, got 0",)),
    Bad(
        "a micro batch of none",
        "train recipe.yaml --train.micro_batch_size=0",
        ("train.micro_batch_size: expected at least 1, or null, got 0",),
    ),
    Bad("a rate of 0", "train recipe.yaml --train.lr=0", ("train.lr: expected a positive number, got 0",)),
    Bad(
        "a rate that is not a number",
        "train recipe.yaml --train.lr=.nan",
        ("train.lr: expected a positive number, got nan",),
    ),
    Bad("a rate without end", "train recipe.yaml --train.lr=.inf", ("train.lr: expected a positive number, got inf",)),
    Bad(
        "a rate below 0",
        "train recipe.yaml --train.reader_lr=-1",
        ("train.reader_lr: expected a non-negative number, or null",),
    ),
    Bad(
        "a rate in words",
        "train recipe.yaml --train.lr=fast",
        ("--train.lr=fast: train.lr: expected float, got 'fast'",),
    ),
    Bad("a share above 1", "train recipe.yaml --train.warmup=2", ("train.warmup: expected a share in [0, 1], got 2",)),
    Bad("a large seed", "train recipe.yaml --train.seed=4294967296", ("train.seed: expected less than 2^32",)),
    Bad(
        "an unknown schedule",
        "train recipe.yaml --train.schedule=step",
        ("--train.schedule=step: train.schedule: expected 'linear', 'cosine' or 'constant', got 'step'",),
    ),
    Bad(
        "an unknown precision",
        "train recipe.yaml --train.precision=fp8",
        ("--train.precision=fp8: train.precision: expected 'auto'", "got 'fp8'"),
    ),
    Bad(
        "a switch in words",
        "train recipe.yaml --train.read_ahead=maybe",
        ("--train.read_ahead=maybe: train.read_ahead: expected bool, got 'maybe'",),
    ),
    Bad(
        "no checkpoint that stays",
        "train recipe.yaml --train.keep_checkpoints=0",
        ("train.keep_checkpoints: expected at least 1",),
    ),
    Bad(
        "patience without a task",
        "train recipe.yaml --train.patience=2",
        ("train.patience: expected null without evaluate.best_by",),
    ),
    Bad(
        "texts longer in training than later",
        "train recipe.yaml --train.max_length=100000",
        ("train.max_length: expected at most model.max_length,", "or null, got 100000"),
    ),
    Bad(
        "texts of no token in training",
        "train recipe.yaml --train.max_length=0",
        ("train.max_length: expected at least 1, or null, got 0",),
    ),
    Bad(
        "a limit that the prompting LLM would not keep",
        "train recipe.yaml --train.max_length=4 --model.conditioning=instruction_and_text",
        (
            "train.max_length: expected null with conditioning: instruction_and_text, got 4",
            "what the prompting LLM reads",
        ),
    ),
    Bad(
        "a store without a name",
        "train recipe.yaml --train.text_store=",
        ("train.text_store: expected none, memory or a folder",),
    ),
    Bad(
        "a store without room",
        "train recipe.yaml --train.text_store_gib=0",
        ("train.text_store_gib: expected a positive number",),
    ),
    Bad(
        "a backbone shared by one process",
        "train recipe.yaml --train.shard_backbone=true --output=new",
        ("train.shard_backbone: expected several processes, which share the backbone, got one", "torchrun"),
    ),
    Bad(
        "a shared backbone and a store",
        "train recipe.yaml --train.shard_backbone=true --train.text_store=memory",
        ("train.text_store: expected 'none' with train.shard_backbone",),
    ),
    Bad(
        "a shared backbone and micro batches",
        "train recipe.yaml --train.shard_backbone=true --train.micro_batch_size=2",
        ("train.micro_batch_size: expected null with train.shard_backbone",),
    ),
    Bad(
        "a shared backbone and texts read ahead",
        "train recipe.yaml --train.shard_backbone=true --train.read_ahead=true",
        ("train.read_ahead: expected false with train.shard_backbone",),
    ),
    Bad(
        "a shared backbone in 8 bits",
        "train recipe.yaml --train.shard_backbone=true --model.backbone.quantize=int8",
        ("backbone.quantize: expected 'none' with train.shard_backbone, got 'int8'",),
    ),
    Bad(
        "a shared backbone that soft tokens enter higher up",
        "train recipe.yaml --train.shard_backbone=true --model.backbone.entry_layer=1",
        ("backbone.entry_layer: expected 0 with train.shard_backbone, got 1",),
    ),
    Bad(
        "soft tokens that enter above the last layer",
        "train recipe.yaml --model.backbone.entry_layer=2 --output=new",
        ("backbone.entry_layer: expected 0 to 1, below the last layer of", "got 2"),
    ),
    Bad(
        "soft tokens that enter higher up in the prefix layout",
        "train recipe.yaml --model.backbone.entry_layer=1 --model.layout=prefix --model.pooling=last"
        " --model.reader=none --model.skip=none",
        ("backbone.entry_layer: expected 0 in the prefix layout", "see it in every layer"),
    ),
    Bad(
        "a shared backbone in the prefix layout",
        "train recipe.yaml --train.shard_backbone=true --model.layout=prefix --model.pooling=last --model.reader=none"
        " --model.skip=none",
        ("layout: expected 'suffix' with train.shard_backbone",),
    ),
    Bad(
        "a store of an unknown type",
        "train recipe.yaml --train.text_store_dtype=int4",
        ("train.text_store_dtype: expected 'same' or 'int8', got 'int4'",),
    ),
    Bad("an empty output", "train recipe.yaml --output=", ("output: expected", "got ''")),
    Bad(
        "no soft token",
        "train recipe.yaml --model.prompter.soft_tokens=0",
        ("prompter.soft_tokens: expected at least 1, got 0",),
    ),
    Bad(
        "a temperature of 0",
        "train recipe.yaml --loss.temperature=0",
        ("loss.temperature: expected a positive number",),
    ),
    Bad("an adapter of rank 0", "train recipe.yaml --model.reader_lora.rank=0", ("rank: expected at least 1, got 0",)),
    Bad(
        "all dropped out",
        "train recipe.yaml --model.reader_lora.dropout=1",
        ("dropout: expected a value in [0, 1), got 1",),
    ),
    Bad("texts of no token", "train recipe.yaml --model.max_length=0", ("max_length: expected at least 1, got 0",)),
    Bad(
        "a pooling of the other layout",
        "train recipe.yaml --model.pooling=mean_text",
        ("pooling: expected one of", "got 'mean_text'"),
    ),
    Bad(
        "a reader in the prefix layout",
        "train recipe.yaml --model.layout=prefix --model.pooling=last",
        ("reader: expected 'none' in the prefix layout", "in the prefix layout give"),
    ),
    Bad(
        "a template without its text",
        "train recipe.yaml --model.templates.query.text=a",
        ("templates.text: expected a template with {text}",),
    ),
    Bad(
        "a template without its instruction",
        "train recipe.yaml --model.templates.query.prompter={text}",
        ("templates.prompter", "{instruction}"),
    ),
    Bad(
        "a wide Matryoshka size",
        "train recipe.yaml --loss.matryoshka=[99] --output=new",
        ("loss.matryoshka: expected sizes up to 32", "[99]"),
    ),
    Bad(
        "a Matryoshka size of 0",
        "train recipe.yaml --loss.matryoshka=[0]",
        ("loss.matryoshka: expected sizes of 1 or more",),
    ),
    Bad("an unknown task", "train recipe.yaml --evaluate.tasks=[PE-STS99] --output=new", ("unknown task 'PE-STS99'",)),
    Bad(
        "best by what is not scored",
        "train recipe.yaml --evaluate.best_by=mean",
        ("evaluate.best_by: expected null without evaluate.tasks",),
    ),
)

# Records of training data, and of texts to encode.


def rows(name: str, content: Content, *says: str, command: str = "train recipe.yaml", file: str = "rows.jsonl") -> Bad:
    """A row whose training set is `file`."""
    option = "" if file == "rows.jsonl" or "{" in command else f" --data='[{{path: {file}, instruction: i}}]'"
    return Bad(f"{file}: {name}", command + option, says, {file: content})


def encoded(name: str, content: Content, *says: str, file: str = "in.jsonl", options: str = "") -> Bad:
    """A row whose texts to encode are `file`."""
    return Bad(
        f"encode {file}: {name}", f"encode run/model {file} out.jsonl --instruction=i {options}", says, {file: content}
    )


SCORED = "train recipe.yaml --data='[{{path: {}, instruction: i, positive_from: 1}}]'"
RECORDS = (
    rows("not there", None, "rows.jsonl: expected a file, found none"),
    rows("empty", "", "rows.jsonl: expected at least one usable record, got none"),
    rows("blank lines alone", "\n \n", "rows.jsonl: expected at least one usable record, got none"),
    rows("no JSON", '{"query": "q"', "rows.jsonl:1: expected a JSON object", "column"),
    rows("a text", "hello", "rows.jsonl:1: expected a JSON object, got 'hello'"),
    rows("a list", "[1]", "rows.jsonl:1: expected a JSON object, got [1]"),
    rows("deep", "[" * 5000, "rows.jsonl:1: expected a JSON object, got '[[["),
    rows("no UTF-8", b'{"query": "\xff", "positive": "p"}', "rows.jsonl:1: expected UTF-8, got byte 0xff"),
    rows("UTF-16", '{"query": "q", "positive": "p"}'.encode("utf-16"), "rows.jsonl:1: expected UTF-8, got byte 0xff"),
    rows(
        "half a surrogate pair", '{"query": "\\ud800", "positive": "p"}', "rows.jsonl:1: query: expected Unicode text"
    ),
    rows("a null", '{"query": null, "positive": "p"}', "rows.jsonl:1: query: expected a string, got null"),
    rows("a number", '{"query": 5, "positive": "p"}', "rows.jsonl:1: query: expected a string, got 5"),
    rows("an empty text", '{"query": " ", "positive": "p"}', "rows.jsonl:1: query: expected a text, got ' '"),
    rows("no positive", '{"query": "q", "positive": []}', "rows.jsonl:1: expected at least one positive, got none"),
    rows(
        "a positive that is a number",
        '{"query": "q", "positive": 1}',
        "rows.jsonl:1: positive: expected a text or a list",
    ),
    rows(
        "a null among negatives",
        '{"query": "q", "positive": "p", "negatives": [null]}',
        "rows.jsonl:1: negatives[0]: expected a string, got null",
    ),
    rows(
        "a key twice",
        '{"query": "q", "query": "r", "positive": "p"}',
        "rows.jsonl:1: expected each key once, got 'query' again",
    ),
    rows(
        "an unknown key",
        '{"query": "q", "positive": "p", "neg": ["n"]}',
        "rows.jsonl:1: expected {query",
        "got the key 'neg'",
        "`columns`",
    ),
    rows("no known key", '{"a": "b"}', "rows.jsonl:1: expected the columns {query, positive}", "got {a}", "columns"),
    rows(
        "two kinds",
        '{"query": "q", "positive": "p"}\n{"text": "t", "label": 1}',
        "rows.jsonl:2: expected {query",
        "as in the first record",
    ),
    rows(
        "a label that is not a number",
        '{"text": "t", "label": NaN}',
        "rows.jsonl:1: label: expected a string or an integer, got nan",
    ),
    rows(
        "a long label", f'{{"text": "t", "label": {LONG}}}', "rows.jsonl:1: label: expected an integer of up to 64 bits"
    ),
    rows(
        "labels that stand alone",
        '{"text": "t", "label": 1}\n{"text": "u", "label": 2}',
        "rows.jsonl: expected at least one usable record",
        "the only text of its label",
    ),
    rows(
        "scores without a limit",
        '{"sentence1": "a", "sentence2": "b", "score": 1}',
        "rows.jsonl:1: positive_from: expected the score",
    ),
    rows(
        "a score that is not a number",
        '{"sentence1": "a", "sentence2": "b", "score": NaN}',
        "rows.jsonl:1: score: expected a finite number, got nan",
        command=SCORED.format("rows.jsonl"),
    ),
    rows(
        "a score in letters",
        '{"sentence1": "a", "sentence2": "b", "score": "high"}',
        "rows.jsonl:1: score: expected a finite number, got 'high'",
        command=SCORED.format("rows.jsonl"),
    ),
    rows(
        "a limit among pairs",
        '{"query": "q", "positive": "p"}',
        "rows.jsonl:1: positive_from: expected null",
        command=SCORED.format("rows.jsonl"),
    ),
    rows("fewer rows than a batch", '{"query": "q", "positive": "p"}', "rows.jsonl", "batch_size"),
    rows(
        "bad rows alone, skipped",
        "1\n2\n",
        "rows.jsonl: expected at least one usable record",
        "skipped 2",
        command="train recipe.yaml --data='[{path: rows.jsonl, instruction: i, on_bad_record: skip}]'",
    ),
    rows(
        "a column renamed that is not there",
        '{"query": "q", "positive": "p"}',
        "rows.jsonl: columns: expected names of its columns",
        "got 'x'",
        command="train recipe.yaml --data='[{path: rows.jsonl, instruction: i, columns: {x: null}}]'",
    ),
    rows(
        "no instruction anywhere",
        '{"query": "q", "positive": "p"}',
        "rows.jsonl:1: expected an instruction in the row",
        command="train recipe.yaml --data='[{path: rows.jsonl, document_instruction: d}]'",
    ),
    rows(
        "no row wanted",
        '{"query": "q", "positive": "p"}',
        "rows.jsonl: max_rows: expected at least 1",
        command="train recipe.yaml --data='[{path: rows.jsonl, instruction: i, max_rows: 0}]'",
    ),
    rows(
        "cut short",
        lambda file: file.write_bytes(lzma.compress(b'{"query": "q", "positive": "p"}\n' * 99)[:50]),
        "rows.jsonl.xz:",
        "the file cannot be read",
        file="rows.jsonl.xz",
    ),
    rows(
        "not compressed",
        '{"query": "q", "positive": "p"}',
        "rows.jsonl.gz:1: the file cannot be read",
        "gzip",
        file="rows.jsonl.gz",
    ),
    rows(
        "a wrong checksum",
        lambda file: file.write_bytes(gzip.compress(b'{"query": "q", "positive": "p"}\n')[:-8] + bytes(8)),
        "rows.jsonl.gz:",
        "the file cannot be read",
        file="rows.jsonl.gz",
    ),
    rows("a folder", lambda file: file.mkdir(), "rows2.jsonl", file="rows2.jsonl"),
    rows("not a list", '{"query": ', "rows.json", "expected", file="rows.json"),
    rows("a list of numbers", "[1]", "rows.json:1: expected an object, got 1", file="rows.json"),
    rows(
        "a column without a name",
        "query,,positive\nq,x,p\n",
        "rows.csv:1: expected the names of the columns",
        file="rows.csv",
    ),
    rows(
        "a column twice",
        "query,query,positive\nq,r,p\n",
        "rows.csv:1: expected the names of the columns, each once",
        file="rows.csv",
    ),
    rows(
        "a cell too many",
        "query,positive\nq,p,x\n",
        "rows.csv:2: expected 2 cells, one a column, got 3",
        file="rows.csv",
    ),
    rows("an open quote", 'query,positive\nq,"p\n', "rows.csv:2: the file cannot be read", file="rows.csv"),
    rows("an empty cell", "query,positive\nq,\n", "rows.csv:2: positive: expected a", file="rows.csv"),
    rows("a header alone", "query,positive\n", "rows.csv: expected at least one usable record", file="rows.csv"),
    rows("no UTF-8", b"query\tpositive\nq\t\xff\n", "rows.tsv:", "the file cannot be read", file="rows.tsv"),
    rows("no parquet", "PAR1", "rows.parquet: the file cannot be read", file="rows.parquet"),
    rows(
        "cut short",
        lambda file: (parquet(query=["q"], positive=["p"])(file), cut(0.5)(file)),
        "rows.parquet: the file cannot be read",
        file="rows.parquet",
    ),
    rows(
        "a column of numbers",
        parquet(query=[1], positive=["p"]),
        "rows.parquet:1: query: expected a string, got 1",
        file="rows.parquet",
    ),
    rows(
        "no row",
        parquet(query=pa.array([], pa.string()), positive=pa.array([], pa.string())),
        "rows.parquet: expected at least one usable record",
        file="rows.parquet",
    ),
    rows("another format", "q,p", "rows.xlsx: expected a .jsonl, .json, .csv, .tsv", file="rows.xlsx"),
    rows("a name without an ending", "q", "rows: expected a .jsonl", file="rows"),
    encoded("not there", None, "in.jsonl: expected a file, found none"),
    encoded("empty", "", "in.jsonl: expected at least one record, got an empty file"),
    encoded("a null", '{"text": null}', "in.jsonl:1: text: expected a string, got null"),
    encoded("another key", '{"txt": "a"}', "in.jsonl:1: expected the key 'text', got {txt}", "--field"),
    encoded("no id", '{"text": "a"}', "in.jsonl:1: expected an id under 'n'", options="--id-column=n"),
    encoded(
        "a column of the output",
        '{"text": "a", "embedding": 1}',
        "--keep: expected an input without the column 'embedding'",
        options="--keep",
    ),
    encoded("no UTF-8", b"a\n\xff\n", "in.txt:2: expected UTF-8, got byte 0xff", file="in.txt"),
    encoded("no line", "", "in.txt: expected at least one text, got none", file="in.txt"),
    encoded("blank lines alone", "\n\n", "in.txt: expected at least one text, got none", file="in.txt"),
    encoded("ids of lines", "a\n", "in.txt: --id-column: expected none", file="in.txt", options="--id-column=n"),
)

# Folders of data, and sets of instructions that contradict each other.

SIDES = {name: {"positive": f"p {name}", "negatives": [f"n {name}"]} for name in ("a", "b")}
TASK = {"document": "d", "dataset": "s"}
TASKS = {
    "a": {"contradicts": "b", "train": ["do a"], "unseen": ["make a"], **TASK},
    "b": {"contradicts": "a", "train": ["do b"], "unseen": ["make b"], **TASK},
}


def folder(name: str, spoil: Content, *says: str, path: str = "set") -> Bad:
    return Bad(f"set/: {name}", f"train recipe.yaml --data='[{{path: {path}, instruction: i}}]'", says, {"set": spoil})


def instruct(name: str, *says: str, row: Any = None, tasks: Any = None) -> Bad:
    """A set whose rows ask for one thing under `a` and for another under `b`."""
    found = {"query": "q", "sides": SIDES} if row is None else row
    files: dict[str, Content] = {"s.jsonl": json.dumps(found) + "\n"}
    files["tasks.yaml"] = tasks if isinstance(tasks, str) else json.dumps(TASKS | (tasks or {}))
    return Bad(f"instruct: {name}", "train recipe.yaml --data='[{path: s.jsonl, instruct: tasks.yaml}]'", says, files)


FOLDERS = (
    folder("not there", None, "set: expected a .jsonl", "a folder of save_to_disk", "got 'set'"),
    folder("empty", lambda place: place.mkdir(), "set: expected a folder of `save_to_disk`"),
    folder(
        "a folder of files",
        lambda place: (place.mkdir(), (place / "a.jsonl").write_text("{}")),
        "set: expected a folder of `save_to_disk`",
    ),
    folder(
        "no arrow file",
        lambda place: (saved(query=["q"], positive=["p"])(place), *map(Path.unlink, place.glob("*.arrow"))),
        "set: expected a folder of `save_to_disk`",
    ),
    folder(
        "an arrow file cut short",
        lambda place: (saved(query=["q"] * 99, positive=["p"] * 99)(place), *map(cut(0.5), place.glob("*.arrow"))),
        "set: expected a folder of `save_to_disk`",
    ),
    folder(
        "damaged info",
        lambda place: (saved(query=["q"], positive=["p"])(place), (place / "dataset_info.json").write_text("{")),
        "set: expected a folder of `save_to_disk`",
    ),
    folder(
        "an unknown split",
        splits("train", "test"),
        "set: expected train, test, got the split 'dev'",
        "set@SPLIT",
        path="set@dev",
    ),
    folder("splits without train", splits("a", "b"), "set: expected a, b, got the split 'train'", "set@SPLIT"),
    folder(
        "a split of one without",
        saved(query=["q"], positive=["p"]),
        "set: expected one without splits, got the split 'x'",
        path="set@x",
    ),
    folder("a null", saved(query=[None, "q"], positive=["p", "p"]), "set:1: query: expected a string, got null"),
    Bad(
        "hub: no name",
        "train recipe.yaml --data='[{path: hf://, instruction: i}]'",
        ("hf://: expected hf://owner/name",),
    ),
    instruct("no task", "tasks.yaml: expected a mapping of tasks", tasks="# none\n"),
    instruct("tasks that are no YAML", "tasks.yaml:2: not valid YAML", tasks="a: [\n"),
    instruct("a task twice", "tasks.yaml:2: not valid YAML: key 'a' stands twice", tasks="a: {}\na: {}\n"),
    instruct(
        "an unknown partner",
        "tasks.yaml: a: contradicts: expected a task of this file, got 'c'",
        tasks={"a": TASKS["a"] | {"contradicts": "c"}},
    ),
    instruct(
        "one that contradicts itself",
        "tasks.yaml: a: contradicts: expected a task that contradicts this one, got itself",
        tasks={"a": TASKS["a"] | {"contradicts": "a"}},
    ),
    instruct(
        "a wording twice",
        "tasks.yaml",
        "expected a wording that stands nowhere else",
        tasks={"b": TASKS["b"] | {"train": ["Do a!"]}},
    ),
    instruct(
        "no wording",
        "tasks.yaml: a: expected a wording in train or in unseen",
        tasks={"a": TASKS["a"] | {"train": [], "unseen": []}},
    ),
    instruct(
        "an unknown task",
        "s.jsonl:1: sides: expected tasks of the instructions, got 'c'",
        row={"query": "q", "sides": {"c": {}}},
    ),
    instruct("one side", "s.jsonl:1: sides: expected 'b' beside 'a'", row={"query": "q", "sides": {"a": SIDES["a"]}}),
    instruct(
        "no negatives",
        "s.jsonl:1: sides.a.negatives: expected at least one text",
        row={"query": "q", "sides": SIDES | {"a": {"positive": "p", "negatives": []}}},
    ),
    instruct(
        "right and wrong at once",
        "s.jsonl:1: sides.a: expected another positive than the negatives",
        row={"query": "q", "sides": SIDES | {"a": {"positive": "p", "negatives": ["p"]}}},
    ),
)

# Folders of models, and GGUF files.


def model(name: str, files: Mapping[str, Content], *says: str, part: str = "backbone") -> Bad:
    """A model to train on; a file's name without a folder is one of `part`'s."""
    placed = {file if "/" in file or file == part else f"{part}/{file}": content for file, content in files.items()}
    return Bad(f"{part}/: {name}", "train recipe.yaml --output=new", says, placed)


WEIGHTS, CONFIG = "model.safetensors", "config.json"
INDEX = "model.safetensors.index.json"
MODELS = (
    model("not there", {"backbone": None}, "backbone: no model there; tried the folder", "config.json"),
    model(
        "a file", {"backbone": lambda place: (shutil.rmtree(place), place.write_text("x"))}, "backbone: no model there"
    ),
    model("no config.json", {CONFIG: None}, "backbone: no model there", "config.json"),
    model("config.json damaged", {CONFIG: "{"}, "backbone: no model there", "config.json"),
    model("config.json a list", {CONFIG: "[]"}, "backbone", "config.json"),
    model("config.json empty", {CONFIG: "{}"}, "backbone", "model_type"),
    model("config.json of no UTF-8", {CONFIG: b"\xff"}, "backbone", "config.json"),
    model("an unknown architecture", {CONFIG: values(model_type="nonsense")}, "backbone: no model there", "nonsense"),
    model("an encoder", {CONFIG: values(model_type="bert", architectures=["BertModel"])}, "backbone"),
    model("a width that does not fit", {CONFIG: values(hidden_size=40)}, "backbone"),
    model("a width in letters", {CONFIG: values(hidden_size="wide")}, "backbone", "hidden_size"),
    model("no layer", {CONFIG: values(num_hidden_layers=0)}, "backbone"),
    Bad(
        "none of its layers",
        "train recipe.yaml --model.backbone.layers=0",
        ("backbone.layers: expected at least 1, or null, got 0",),
    ),
    Bad(
        "more layers than it has",
        "train recipe.yaml --output=new --model.backbone.layers=9",
        ("backbone.layers: expected 1 to 2, the layers of", "got 9"),
    ),
    model(
        "code of its own",
        {CONFIG: values(auto_map={"AutoModel": "m.M"}, model_type="own")},
        "backbone: expected an architecture that transformers has",
        "never run",
    ),
    model(
        "quantised",
        {CONFIG: values(quantization_config={"quant_method": "gptq"})},
        "backbone: expected weights in bfloat16, float16 or float32, got quantised ones",
        "gptq",
    ),
    model(
        "an adapter",
        {"adapter_config.json": '{"peft_type": "LORA"}'},
        "backbone/adapter_config.json: expected what PEFT writes of an adapter",
    ),
    model(
        "no weights", {WEIGHTS: None}, "backbone: expected weights in model.safetensors", "copy or download them again"
    ),
    model("weights of none", {WEIGHTS: b""}, "backbone/model.safetensors: the weights cannot be read"),
    model(
        "weights cut short",
        {WEIGHTS: cut(0.5)},
        "backbone/model.safetensors: the weights cannot be read",
        "copy or download",
    ),
    model(
        "weights that are no weights", {WEIGHTS: b"\0" * 64}, "backbone/model.safetensors: the weights cannot be read"
    ),
    model(
        "a pickle alone",
        {WEIGHTS: None, "pytorch_model.bin": PICKLE},
        "backbone: expected weights in model.safetensors, got pytorch_model.bin, a pickle",
        "save_pretrained()",
    ),
    model("a pickle by another name", {WEIGHTS: PICKLE}, "backbone/model.safetensors: the weights cannot be read"),
    model(
        "a tensor is missing",
        {WEIGHTS: tensors(lambda found: found.pop(max(found)))},
        "backbone: expected weights for all of the model",
        "norm.weight",
        "(1 are missing)",
    ),
    model(
        "weights that are not finite",
        {WEIGHTS: tensors(lambda found: found[max(found)].fill_(torch.nan))},
        "backbone",
        "finite",
    ),
    model("an index of nothing", {WEIGHTS: None, INDEX: '{"weight_map": {}}'}, "backbone"),
    model(
        "an index that leaves the folder",
        {WEIGHTS: None, INDEX: '{"metadata": {}, "weight_map": {"a": "../prompter/model.safetensors"}}'},
        "backbone",
        "../prompter/model.safetensors",
    ),
    model(
        "an index of an absolute path",
        {WEIGHTS: None, INDEX: '{"metadata": {}, "weight_map": {"a": "/etc/hostname"}}'},
        "backbone",
        "/etc/hostname",
    ),
    model(
        "weights that are linked from outside",
        {WEIGHTS: link("../elsewhere/w.safetensors")},
        "backbone/model.safetensors",
        "leads out of",
    ),
    model(
        "a tokenizer that is linked from outside",
        {"tokenizer.json": link("../elsewhere/t.json")},
        "backbone/tokenizer.json",
        "leads out of",
    ),
    model("no tokenizer", {"tokenizer.json": None, "tokenizer_config.json": None}, "backbone", "tokenizer"),
    model("tokenizer.json damaged", {"tokenizer.json": "{"}, "backbone", "tokenizer.json", "copy or download"),
    model("tokenizer.json empty", {"tokenizer.json": "{}"}, "backbone", "tokenizer.json"),
    model("tokenizer_config.json damaged", {"tokenizer_config.json": "{"}, "backbone", "tokenizer_config.json"),
    model("a prompting LLM that is not there", {"prompter": None}, "prompter: no model there", part="prompter"),
    model(
        "a prompting LLM without weights",
        {WEIGHTS: None},
        "prompter: expected weights in model.safetensors",
        part="prompter",
    ),
    model(
        "a prompting LLM with a pickle",
        {WEIGHTS: None, "pytorch_model.bin": PICKLE},
        "prompter: expected weights",
        "a pickle",
        part="prompter",
    ),
    Bad(
        "hub: no such name",
        "train recipe.yaml --output=new --model.backbone.model=a/b/c/d",
        ("a/b/c/d: no model there",),
    ),
)


def embedder(name: str, files: Mapping[str, Content], *says: str, options: str = "") -> Bad:
    """A saved embedder to encode with; the files are those of `run/model`."""
    placed = {f"run/model/{file}": content for file, content in files.items()}
    return Bad(f"run/model/: {name}", f"encode run/model texts.txt out.npy --instruction=i {options}", says, placed)


EMBEDDERS = (
    Bad(
        "embedder: not there",
        "encode nowhere texts.txt out.npy --instruction=i",
        ("nowhere: no saved PromptEmbedder there",),
    ),
    Bad(
        "embedder: a model of transformers",
        "encode backbone texts.txt out.npy --instruction=i",
        ("backbone/config.json: expected a PromptEmbedder of format 1, got None",),
    ),
    Bad(
        "embedder: a file",
        "encode texts.txt texts.txt out.npy --instruction=i",
        ("texts.txt: no saved PromptEmbedder there",),
    ),
    embedder("no config.json", {CONFIG: None}, "run/model", "config.json"),
    embedder(
        "config.json damaged", {CONFIG: cut(0.5)}, "run/model/config.json: damaged", "copy the saved embedder again"
    ),
    embedder(
        "config.json a list", {CONFIG: "[]"}, "run/model/config.json: expected a PromptEmbedder of format 1, got 'list'"
    ),
    embedder(
        "a later format",
        {CONFIG: values(format=2)},
        "run/model/config.json: expected a PromptEmbedder of format 1, got 2",
    ),
    embedder("no backbone named", {CONFIG: values(backbone=None)}, "run/model/config.json: damaged: expected backbone"),
    embedder("an option of later", {CONFIG: values(model__novel=1)}, "run/model/config.json", "novel"),
    embedder(
        "an option out of its range",
        {CONFIG: values(model__max_length=0)},
        "run/model/config.json",
        "max_length: expected at least 1",
    ),
    embedder(
        "an option of another type",
        {CONFIG: values(model__max_length="long")},
        "run/model/config.json",
        "max_length",
        "'long'",
    ),
    embedder("a section that is a list", {CONFIG: values(model=[])}, "run/model/config.json"),
    embedder("a backbone's name that is a number", {CONFIG: values(backbone__name=5)}, "run/model"),
    embedder(
        "instructions that are a list",
        {CONFIG: values(instructions=["a"])},
        "run/model/config.json: instructions: expected sentences by name",
    ),
    embedder(
        "no alignment",
        {"alignment.safetensors": None},
        "run/model/alignment.safetensors: expected a weights file, found none",
    ),
    embedder(
        "an alignment cut short",
        {"alignment.safetensors": cut(0.9)},
        "run/model/alignment.safetensors: the weights cannot be read",
    ),
    embedder(
        "an alignment of another width",
        {"alignment.safetensors": tensors(lambda found: found.update(weight=torch.ones(3, 3)))},
        "run/model/alignment.safetensors: expected tensors of shapes",
        "[3, 3]",
    ),
    embedder(
        "an alignment that is not finite",
        {"alignment.safetensors": tensors(lambda found: found["weight"].fill_(torch.nan))},
        "run/model/alignment.safetensors",
        "finite",
    ),
    embedder(
        "a skip of other names",
        {"skip.safetensors": tensors(lambda found: found.update(x=torch.ones(1)))},
        "run/model/skip.safetensors: expected tensors of shapes",
    ),
    embedder(
        "no reader",
        {"reader/adapter_model.safetensors": None},
        "run/model/reader/adapter_model.safetensors: expected a weights file, found none",
    ),
    embedder(
        "a reader's config damaged",
        {"reader/adapter_config.json": "{"},
        "run/model/reader/adapter_config.json: damaged",
    ),
    embedder(
        "a reader that is a pickle",
        {"reader/adapter_model.safetensors": None, "reader/adapter_model.bin": PICKLE},
        "run/model/reader/adapter_model.safetensors",
        "got adapter_model.bin, a pickle",
    ),
    embedder(
        "a reader of other layers",
        {"reader/adapter_model.safetensors": tensors(lambda found: found.clear() or found.update(x=torch.ones(1)))},
        "run/model/reader",
    ),
    embedder("no prompting LLM", {"prompter/model.safetensors": None}, "run/model/prompter: expected weights"),
    embedder(
        "a prompting LLM cut short",
        {"prompter/model.safetensors": cut(0.5)},
        "run/model/prompter/model.safetensors: the weights cannot be read",
    ),
    embedder(
        "a prompting LLM with another tokenizer",
        {"prompter/tokenizer.json": swapped("b", "c")},
        "run/model",
        "tokenizer",
    ),
    embedder(
        "weights that are linked from outside",
        {"skip.safetensors": link("../../elsewhere/s.safetensors")},
        "run/model/skip.safetensors",
        "leads out of",
    ),
    Bad(
        "embedder: its backbone is gone",
        "encode run/model texts.txt out.npy --instruction=i",
        ("run/model: its backbone cannot be had", "--backbone"),
        {"backbone": None},
    ),
    Bad(
        "embedder: its backbone has changed",
        "encode run/model texts.txt out.npy --instruction=i",
        ("run/model: trained on backbone", "give the right folder as backbone="),
        {"backbone/model.safetensors": tensors(lambda found: found[min(found)].add_(1))},
    ),
    Bad(
        "embedder: another backbone",
        "encode run/model texts.txt out.npy --instruction=i --backbone=prompter",
        ("run/model: trained on backbone", "but prompter has content"),
    ),
    Bad(
        "embedder: a backbone with another tokenizer",
        "encode run/model texts.txt out.npy --instruction=i",
        ("run/model: expected the tokenizer that it was trained with",),
        {"backbone/tokenizer.json": swapped("b", "c")},
    ),
    embedder(
        "a prompting LLM that it does not need",
        {},
        "prompter: expected none",
        "'backbone'",
        options="--prompter=backbone",
    ),
)

GGUF = tuple(
    Bad(f"GGUF: {name}", "train recipe.yaml --output=new --model.backbone.model=w.gguf", says, {"w.gguf": content})
    for name, content, says in (
        ("not there", None, ("w.gguf: expected a GGUF file, found none",)),
        ("empty", b"", ("w.gguf: expected a GGUF file, got one that does not begin with GGUF",)),
        ("another file", PICKLE, ("w.gguf: expected a GGUF file, got one that does not begin with GGUF",)),
        ("a header alone", b"GGUF", ("w.gguf: the GGUF file is cut short or damaged",)),
        (
            "an unknown version",
            gguf(lambda found: found[:4] + b"\x63\0\0\0" + found[8:]),
            ("w.gguf: the GGUF file is cut short or damaged",),
        ),
        (
            "too many tensors",
            gguf(lambda found: found[:8] + b"\xff" * 7 + b"\x7f" + found[16:]),
            ("w.gguf: the GGUF file is cut short or damaged",),
        ),
        (
            "too many keys",
            gguf(lambda found: found[:16] + b"\xff" * 7 + b"\x7f" + found[24:]),
            ("w.gguf: the GGUF file is cut short or damaged",),
        ),
        ("half of the header", gguf(lambda found: found[:600]), ("w.gguf: the GGUF file is cut short or damaged",)),
        (
            "half of the weights",
            gguf(lambda found: found[: len(found) * 3 // 4]),
            ("w.gguf: the GGUF file is cut short",),
        ),
        (
            "an unknown architecture",
            gguf(architecture="nonsense"),
            ("w.gguf: transformers cannot read this GGUF file", "nonsense"),
        ),
        ("a folder", lambda place: place.mkdir(), ("w.gguf: expected a GGUF file, found none",)),
        ("a link to nothing", lambda place: place.symlink_to("gone"), ("w.gguf: expected a GGUF file, found none",)),
    )
)

# Runs and their checkpoints.


def resumed(name: str, files: Mapping[str, Content], *says: str, options: str = "--train.steps=4") -> Bad:
    return Bad(f"resume: {name}", f"train recipe.yaml --resume {options}", says, files)


CHECKPOINTS = "run/checkpoints"
RUNS = (
    Bad(
        "run: there already",
        "train recipe.yaml",
        ("run: holds files already; --resume continues that run, --fresh moves it aside",),
    ),
    Bad(
        "run: a file in its place",
        "train recipe.yaml --output=texts.txt",
        ("texts.txt: expected a folder, got a file; --output=FOLDER",),
    ),
    Bad("run: below a file", "train recipe.yaml --output=texts.txt/run", ("texts.txt",)),
    Bad(
        "run: both ways at once",
        "train recipe.yaml --resume --fresh",
        ("run: --resume continues the run, --fresh moves it aside; expected one of them",),
    ),
    Bad(
        "run: nothing to resume",
        "train recipe.yaml --resume --output=new",
        ("new: nothing to resume", "run without --resume"),
    ),
    Bad(
        "run: a model that would be moved",
        "train recipe.yaml --fresh --output=backbone",
        ("backbone: --fresh would move backbone",),
    ),
    resumed("another rate", {}, "run: --resume needs the same recipe", "train.lr (was", options="--train.lr=1"),
    resumed(
        "fewer steps",
        {},
        "run: --resume needs the same recipe",
        "train.steps (was 2, now 1)",
        options="--train.steps=1",
    ),
    resumed(
        "other data",
        {"rows.jsonl": text("moon", "noon")},
        "run: --resume needs what the run had; changed: content of rows.jsonl",
    ),
    resumed(
        "another backbone",
        {"backbone/model.safetensors": tensors(lambda found: found[min(found)].add_(1))},
        "run: --resume needs what the run had; changed: content of the backbone",
    ),
    resumed("no checkpoint", {CHECKPOINTS: None}, "run: nothing to resume"),
    resumed("no recipe", {"run/recipe.yaml": None}, "run: nothing to resume"),
    resumed("a damaged recipe", {"run/recipe.yaml": "a: ["}, "run/recipe.yaml:1: not valid YAML"),
    resumed(
        "empty checkpoints",
        {CHECKPOINTS: checkpoints(b"")},
        "run/checkpoints/step-000002.pt: expected a checkpoint",
        "no other checkpoint is left; --fresh starts anew",
    ),
    resumed(
        "checkpoints that are texts",
        {CHECKPOINTS: checkpoints(b"text")},
        "step-000002.pt: expected a checkpoint, got a file that cannot be read",
    ),
    resumed(
        "plain pickles",
        {CHECKPOINTS: checkpoints(PICKLE)},
        "step-000002.pt: expected a checkpoint, got a file that cannot be read",
    ),
    resumed(
        "pickles in torch's files",
        {CHECKPOINTS: lambda place: [torch_pickle(file) for file in place.glob("step-*")]},
        "step-000002.pt: expected a checkpoint, got a file that cannot be read",
    ),
    resumed(
        "checkpoints that are lists",
        {CHECKPOINTS: lambda place: [torch.save([1], file) for file in place.glob("step-*")]},
        "step-000002.pt: expected a checkpoint",
    ),
    resumed(
        "a checkpoint without its weights",
        {CHECKPOINTS: checkpoint(lambda found: found.pop("model"))},
        "step-000002.pt: expected a checkpoint",
        "model",
        options="",
    ),
    resumed(
        "a checkpoint without a part",
        {CHECKPOINTS: checkpoint(lambda found: found["model"].pop(min(found["model"])))},
        "step-000002.pt",
        "model",
        options="",
    ),
    resumed(
        "a checkpoint of other shapes",
        {CHECKPOINTS: checkpoint(lambda found: found["model"].update({min(found["model"]): torch.ones(1)}))},
        "step-000002.pt",
        "shape",
        options="",
    ),
    resumed(
        "a checkpoint without an optimiser",
        {CHECKPOINTS: checkpoint(lambda found: found.update(optimizer={}))},
        "step-000002.pt: expected a checkpoint of this model",
        "param_groups",
        options="",
    ),
    Bad("move: nowhere", "transfer run/model --backbone=nowhere --output=new --steps=1", ("nowhere: no model there",)),
    Bad(
        "move: no recipe",
        "transfer run/model --backbone=prompter",
        ("run/model/recipe.yaml: no such file", "the `model` folder of a run"),
        {"run/model/recipe.yaml": None},
    ),
    Bad(
        "move: an option of the prompting LLM",
        "transfer run/model --backbone=backbone --output=new --steps=1 --model.prompter.soft_tokens=2",
        ("a move changes nothing but model.backbone", "soft_tokens"),
    ),
    Bad(
        "move: onto its run",
        "transfer run/model --backbone=backbone --output=run --steps=1",
        ("run: holds files already; --fresh moves it aside",),
    ),
    Bad(
        "move: steps below none",
        "transfer run/model --backbone=backbone --output=new --steps=-1",
        ("train.steps: expected 0 or more, got -1",),
    ),
    Bad(
        "move: texts below none",
        "transfer run/model --backbone=backbone --output=new --steps=1 --texts=-1",
        ("--texts: expected at least 0, got -1",),
    ),
)

# Stores of texts that were read.

STORE = "encode run/model texts.txt out.npy --instruction=i --store=store"
STORES = (
    Bad("store: a file", STORE, ("store: expected a folder that can be written",), {"store": "x"}),
    Bad(
        "store: below a file",
        "encode run/model texts.txt out.npy --instruction=i --store=texts.txt/s",
        ("texts.txt/s: expected a folder that can be written",),
    ),
    Bad(
        "store: memory",
        "encode run/model texts.txt out.npy --instruction=i --store=memory",
        ("--store: expected a folder, got 'memory'",),
    ),
    Bad(
        "store: no name",
        "encode run/model texts.txt out.npy --instruction=i --store=",
        ("--store: expected a folder, got ''",),
    ),
    Bad(
        "store: no room",
        STORE + " --store_gib=0",
        ("size of the text store: expected a positive number of GiB, got 0",),
    ),
    Bad("store: room that is not a number", STORE + " --store_gib=.nan", ("store", "got nan")),
    Bad("store: endless room", STORE + " --store_gib=.inf", ("store", "got inf")),
    Bad(
        "store: an index of text",
        STORE,
        ("store: its index.sqlite cannot be used", "remove the folder"),
        {"store/index.sqlite": "text" * 99},
    ),
    Bad(
        "store: an index of another",
        STORE,
        ("store: expected a text store of format 1",),
        {"store/index.sqlite": database("CREATE TABLE a (b)")},
    ),
    Bad(
        "store: a later format",
        STORE,
        ("store: expected a text store of format 1, got format 7",),
        {"store/index.sqlite": database("PRAGMA user_version = 7", "CREATE TABLE a (b)")},
    ),
    Bad(
        "store: an index that is a folder",
        STORE,
        ("store: its index.sqlite cannot be used",),
        {"store/index.sqlite": lambda place: place.mkdir(parents=True)},
    ),
    Bad(
        "store: entries that are a folder",
        STORE,
        ("store: expected a folder that can be written",),
        {"store/entries.bin": lambda place: place.mkdir(parents=True)},
    ),
    Bad(
        "store: tables of another kind",
        STORE,
        ("store: its index.sqlite cannot be used",),
        {
            "store/index.sqlite": database(
                "PRAGMA user_version = 1", f"PRAGMA application_id = {0x70657478}", "CREATE TABLE a (b)"
            )
        },
    ),
    Bad(
        "store: too small for a batch",
        "train recipe.yaml --output=new --train.text_store=store --train.text_store_gib=1e-9",
        ("train.text_store_gib: expected at least",),
    ),
    Bad(
        "store: of a prefix layout",
        "train recipe.yaml --output=new --train.text_store=store --model.layout=prefix --model.pooling=last"
        " --model.reader=none --model.skip=none",
        ("text store: expected the suffix layout",),
    ),
)

# Command lines.

ENCODE = "encode run/model texts.txt out.npy --instruction=i"
COMMANDS = (
    Bad("report: no run", "report", ("the following arguments are required: run",)),
    Bad("report: an unknown option", "report run --outptu=x", ("unrecognized arguments: --outptu=x",)),
    Bad("report: a folder without a run", "report prompter", ("prompter: expected the folder of a run",)),
    Bad(
        "train: an unknown option",
        "train recipe.yaml --train.stps=2",
        ("unknown option --train.stps; did you mean '--train.steps'",),
    ),
    Bad(
        "train: an option before its recipe",
        "train --train.steps=2 recipe.yaml",
        ("unexpected 'recipe.yaml'; expected the recipe first",),
    ),
    Bad(
        "train: two recipes", "train recipe.yaml recipe.yaml", ("unexpected 'recipe.yaml'; expected the recipe first",)
    ),
    Bad("train: an option without its value", "train recipe.yaml --train.steps", ("train.steps",)),
    Bad("train: one dash", "train recipe.yaml -train.steps=2", ("-train.steps",)),
    Bad(
        "train: a comment for a value",
        "train recipe.yaml --model.backbone.revision='#main'",
        ("expected a value or null, got '#main', in which YAML finds neither",),
    ),
    Bad("encode: nothing", "encode", ("model, input, output",)),
    Bad("encode: an unknown option", ENCODE + " --sdie=document", ("--sdie",)),
    Bad("encode: an unknown side", ENCODE + " --side=both", ("side", "'query' or 'document'", "'both'")),
    Bad("encode: an unknown type", ENCODE + " --dtype=int4", ("dtype", "'int4'")),
    Bad(
        "encode: an unknown device",
        ENCODE + " --device=tpu9",
        ("device: expected one that can be used here, such as cpu, got 'tpu9'",),
    ),
    Bad("encode: batches of none", ENCODE + " --batch_tokens=0", ("batch_tokens: expected at least 1, got 0",)),
    Bad("encode: batches in letters", ENCODE + " --batch_tokens=many", ("batch_tokens", "'many'")),
    Bad("encode: no dimension", ENCODE + " --dimensions=0", ("--dimensions: expected 1 to 32, the model's, got 0",)),
    Bad(
        "encode: too many dimensions",
        ENCODE + " --dimensions=99",
        ("--dimensions: expected 1 to 32, the model's, got 99",),
    ),
    Bad(
        "encode: bits that fill no byte",
        ENCODE + " --dimensions=3 --precision=binary",
        ("--precision: binary packs 8 dimensions into a byte", "got 3"),
    ),
    Bad(
        "encode: another format",
        "encode run/model texts.txt out.csv --instruction=i",
        ("output: expected a name ending in .npy, .jsonl, .parquet, or a folder, got out.csv",),
    ),
    Bad(
        "encode: onto a file",
        "encode run/model texts.txt texts.npy --instruction=i",
        ("texts.npy: exists already; give --overwrite=true",),
        {"texts.npy": "mine"},
    ),
    Bad(
        "encode: onto a folder",
        "encode run/model texts.txt out.npy --instruction=i",
        ("output: expected a file, got the folder out.npy",),
        {"out.npy": lambda place: place.mkdir()},
    ),
    Bad("encode: below a file", "encode run/model texts.txt texts.txt/out.npy --instruction=i", ("texts.txt",)),
    Bad(
        "encode: an empty instruction",
        "encode run/model texts.txt out.npy --instruction=' '",
        ("--instruction: expected a sentence, or a JSON list of sentences, got ' '",),
    ),
    Bad("encode: columns into .npy", ENCODE + " --keep", ("output: expected .jsonl or .parquet",)),
    Bad(
        "encode: ids and all columns",
        "encode run/model texts.txt out.jsonl --instruction=i --keep --id-column=n",
        ("--id-column: expected none beside --keep",),
    ),
    Bad("evaluate: nothing", "evaluate", ("model",)),
    Bad("evaluate: an unknown option", "evaluate run/model --taks=A", ("--taks",)),
    Bad(
        "evaluate: a task without its sentence",
        "evaluate run/model --instruction=PE-STSb-dev --data=eval",
        ("--instruction: expected TASK=TEXT, got 'PE-STSb-dev'",),
    ),
    Bad("export: nothing", "export", ("model, output",)),
    Bad("export: to nobody", "export run/model out --to=nobody", ("to", "'safetensors'", "'nobody'")),
    Bad(
        "export: onto a file", "export run/model texts.txt --to=peft", ("texts.txt: exists already; give another name",)
    ),
    Bad(
        "export: a folder for a file",
        "export run/model out --to=safetensors",
        ("output: --to safetensors: expected a name ending in .safetensors, got out",),
    ),
    Bad(
        "export: what it cannot serve",
        "export run/model out --to=vllm --instruction=i",
        ("--to vllm", "reader: expected 'none'"),
    ),
    Bad(
        "export: an empty instruction",
        "export run/model out.safetensors --to=safetensors --instruction=' '",
        ("instructions: expected a sentence, got ' '",),
    ),
    Bad("serve: nothing", "serve", ("model",)),
    Bad("serve: a port in letters", "serve run/model --port=http", ("port", "'http'")),
    Bad("serve: a port below all", "serve run/model --port=0", ("--port: expected at least 1, got 0",)),
    Bad("serve: a port above all", "serve run/model --port=70000", ("--port: expected", "65535", "70000")),
    Bad("serve: a time that has passed", "serve run/model --timeout=-1", ("--timeout: expected at least 1, got -1",)),
    Bad("serve: no embedder", "serve nowhere", ("nowhere: no saved PromptEmbedder there",)),
    Bad("memory: no recipe", "memory nowhere.yaml", ("nowhere.yaml: the recipe cannot be read",)),
    Bad("memory: an unknown option", "memory recipe.yaml --estimat", ("unknown option --estimat",)),
    Bad("memory: onto a file", "memory recipe.yaml --estimate --output=texts.txt", ("texts.txt",)),
    Bad("models: nothing", "models", ("expected the name of a model, one of smollm2-135m", "got none")),
    Bad("models: an unknown name", "models gpt", ("expected one of smollm2-135m", "got 'gpt'")),
    Bad("models: an unknown place", "models smollm2-135m --from=disk", ("--from", "'disk'", "'pip'")),
    Bad(
        "models: onto a folder of something else",
        "models smollm2-135m --output=run",
        ("run: expected no such folder or a whole model, got one without config.json",),
    ),
    Bad(
        "models: cut short",
        "models smollm2-135m --output=backbone",
        ("the weights cannot be read", "moved the folder away"),
        {"backbone/README.md": "x", "backbone/model.safetensors": cut(0.5)},
    ),
    Bad(
        "sweep: nothing varies",
        "sweep recipe.yaml --train.lr=1e-3",
        ("expected options of the runs with several values",),
    ),
    Bad(
        "sweep: a value twice",
        "sweep recipe.yaml --train.lr 1e-3,1e-3",
        ("--train.lr: expected it once, with each value once",),
    ),
    Bad("sweep: outputs", "sweep recipe.yaml --output a,b", ("expected options of the runs with several values",)),
    Bad(
        "sweep: no task", "sweep recipe.yaml --train.seed 0,1 --output=new", ("evaluate.tasks: expected at least one",)
    ),
    Bad(
        "sweep: one value that is none",
        "sweep recipe.yaml --train.lr 1e-3,fast --output=new",
        ("--train.lr=fast: train.lr: expected float, got 'fast'",),
    ),
    Bad("transfer: nothing", "transfer", ("checkpoint, --backbone",)),
    Bad("transfer: steps in letters", "transfer run/model --backbone=backbone --steps=many", ("--steps", "'many'")),
)

# Sets to score on.


def scored(name: str, files: Mapping[str, Content], *says: str, tasks: str = "set/a.jsonl") -> Bad:
    """A task of the user's own."""
    command = f"evaluate run/model --tasks={tasks} --instruction='{tasks}=i'"
    return Bad(f"score: {name}", command, says, files)


CORPUS = '{"_id": "d1", "title": "", "text": "t"}\n'
QUERIES = '{"_id": "q1", "text": "t"}\n'
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t1\n"


def corpus(name: str, *says: str, **changes: Content) -> Bad:
    parts: dict[str, Content] = {"corpus": CORPUS, "queries": QUERIES, "qrels": QRELS} | changes
    names = {"corpus": "set/corpus.jsonl", "queries": "set/queries.jsonl", "qrels": "set/qrels.tsv"}
    return scored(name, {names[part]: content for part, content in parts.items()}, *says, tasks="./set")


def offline(name: str, task: str, file: str, content: Content, *says: str) -> Bad:
    """A task of `data/eval`, in a folder of its own."""
    return Bad(f"score: {name}", f"evaluate run/model --data=sets --tasks={task}", says, {f"sets/eval/{file}": content})


EVALUATION = (
    Bad(
        "score: no folder",
        "evaluate run/model --data=nowhere",
        ("data: expected a folder of tasks, found none at nowhere",),
    ),
    Bad(
        "score: a folder without tasks",
        "evaluate run/model --data=backbone",
        ("backbone: expected the files of at least one task",),
    ),
    Bad(
        "score: a task without its file",
        "evaluate run/model --data=backbone --tasks=PE-STS12",
        ("PE-STS12: expected backbone/eval/sts12.jsonl",),
    ),
    Bad("score: an unknown task", "evaluate run/model --data=backbone --tasks=PE-STS1", ("unknown task 'PE-STS1'",)),
    Bad(
        "score: an instruction of no task",
        "evaluate run/model --data=sets --tasks=PE-STS12 --instruction=X=i",
        ("instructions: no task 'X' here",),
        {"sets/eval/sts12.jsonl": '{"sentence1": "a", "sentence2": "b", "score": 1}'},
    ),
    Bad(
        "score: onto a file",
        "evaluate run/model --data=sets --tasks=PE-STS12 --output=texts.txt",
        ("--output: texts.txt exists already; give --overwrite",),
        {"sets/eval/sts12.jsonl": '{"sentence1": "a", "sentence2": "b", "score": 1}'},
    ),
    Bad(
        "score: one's own task without a sentence",
        "evaluate run/model --tasks=set/a.jsonl",
        ("set/a.jsonl: expected a sentence for the user's own task",),
        {"set/a.jsonl": '{"query": "q", "positive": "p"}'},
    ),
    offline(
        "no score",
        "PE-STS12",
        "sts12.jsonl",
        '{"sentence1": "a", "sentence2": "b"}',
        "sts12.jsonl:1: expected the key 'score'",
    ),
    offline(
        "a score in letters",
        "PE-STS12",
        "sts12.jsonl",
        '{"sentence1": "a", "sentence2": "b", "score": "x"}',
        "sts12.jsonl:1: score: expected a finite number",
    ),
    offline(
        "an empty file", "PE-STS12", "sts12.jsonl", "", "sts12.jsonl: expected at least one record, got an empty file"
    ),
    offline("a damaged file", "PE-STS12", "sts12.jsonl.xz", "x", "sts12.jsonl.xz:1: the file cannot be read"),
    offline(
        "labels of two types",
        "PE-QQP",
        "qqp_test.jsonl",
        '{"sentence1": "a", "sentence2": "b", "label": 1}\n{"sentence1": "a", "sentence2": "b", "label": "x"}',
        "qqp_test.jsonl: label: expected strings or integers throughout",
    ),
    scored("no file", {}, "set/a.jsonl: expected a file, found none"),
    scored("no JSON", {"set/a.jsonl": "{"}, "set/a.jsonl:1: expected a JSON object"),
    scored(
        "labelled texts",
        {"set/a.jsonl": '{"text": "t", "label": 1}'},
        "set/a.jsonl: expected pairs, scored pairs or a folder",
        "got labels",
    ),
    scored(
        "the same score throughout",
        {"set/a.jsonl": '{"sentence1": "a", "sentence2": "b", "score": 0.5}'},
        "set/a.jsonl: expected scores that differ, got 0.5 throughout",
    ),
    scored(
        "an instruction of a row",
        {"set/a.jsonl": '{"query": "q", "positive": "p", "instruction": "i"}'},
        "set/a.jsonl:1: expected a row without an instruction",
    ),
    corpus("no queries", "set: expected one file such as queries.jsonl, got none", queries=None),
    corpus("no judgements", "set: expected one file such as qrels.tsv, got none", qrels=None),
    corpus("an id twice", "corpus.jsonl:2: expected each id once, got 'd1' again", corpus=CORPUS * 2),
    corpus("an id that is a number", "corpus.jsonl:1: _id: expected a string, got 1", corpus='{"_id": 1, "text": "t"}'),
    corpus(
        "a text that is none", "corpus.jsonl:1: text: expected a string, got null", corpus='{"_id": "d1", "text": null}'
    ),
    corpus(
        "another column",
        "corpus.jsonl:1: expected the columns _id, title?, text",
        corpus='{"_id": "d1", "text": "t", "url": "u"}',
    ),
    corpus("judgements without a header", "qrels.tsv:1: expected the header", qrels="q1\td1\t1\n"),
    corpus(
        "judgements of two fields",
        "qrels.tsv:2: expected three tab-separated fields",
        qrels=QRELS.replace("\t1\n", "\n"),
    ),
    corpus(
        "a judgement in letters", "qrels.tsv:2: score: expected an integer", qrels=QRELS.replace("\t1\n", "\tgood\n")
    ),
    corpus("a judgement twice", "qrels.tsv:3: expected each pair once", qrels=QRELS + "q1\td1\t1\n"),
    corpus(
        "judgements of what is not there",
        "qrels.tsv: expected judgements of what is there, got the document 'd2'",
        qrels=QRELS.replace("d1", "d2"),
    ),
    corpus(
        "no judgement", "qrels.tsv", "expected at least one judgement, got none", qrels="query-id\tcorpus-id\tscore\n"
    ),
)

BAD = (*RECIPES, *RECORDS, *FOLDERS, *MODELS, *EMBEDDERS, *GGUF, *RUNS, *STORES, *COMMANDS, *EVALUATION)

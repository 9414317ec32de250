"""Every code block of README.md and `docs/` does what its page says, on tiny models in the places that pages name.

A page's blocks are run in their order, in a folder of its own: Python in one namespace, `python -m pe...` by the
command's own `main`, YAML by the loader of recipes, rows by that of training sets; text must be what the block before
it printed. Two marks stand on the line before a block: `<!-- file: NAME -->` writes it there, and
`<!-- not run: REASON -->` is for what takes minutes, a network or another machine; its options are checked all
the same.
"""

from __future__ import annotations

import functools
import importlib
import io
import lzma
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pe import encode, evaluate, export, memory, serve, sweep, transfer
from pe import train as training
from pe.config import DatasetConfig
from pe.data.datasets import load_dataset
from pe.data.layouts import detect
from pe.data.tables import records
from pe.model import PromptEmbedder
from pe.runs.recipes import load_recipe
from tests.tiny import byte_tokenizer, language_model, save_models

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"(?:^<!-- ([^\n]+?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(`+)(.+?)\1")
OPTION = re.compile(r"--[a-z][\w.-]*[a-z]")
KEY = re.compile(r"(?:model|loss|train|evaluate)(?:\.[a-z_]+)+")
PLACE = re.compile(r"(?:pe|kernels|tests|bench|scripts|recipes|docs|data)/[\w./*-]*")
ROWS = ("jsonl", "csv")
OTHERS = {"--no-build-isolation", "--benchmark-only"}
"""Options of pip and pytest in running text."""
NO_KEYS = {"model.instructions", "loss.svg"}
"""An attribute of an embedder and a picture, which look like options."""
MODELS = {"prompter": "tiny-prompter", "one": "tiny-qwen3", "two": "tiny-mistral"}
"""Name of a model of the tests -> of the one whose place it takes."""
DATA_ROWS = 60

PARSERS: dict[str, Callable[[list[str]], Any]] = {
    "train": lambda words: load_recipe(*training.split_arguments(words)[:2]),
    "sweep": lambda words: list(sweep.recipes_of(*sweep.split(words), Path("runs"))),
    "transfer": lambda words: load_recipe("recipes/tiny.yaml", transfer.parse(words)[1]),
    "memory": lambda words: load_recipe(memory.parse(words)[0].recipe, memory.parse(words)[1]),
    "encode": encode.parse,
    "serve": serve.parse,
    "export": export.parse,
    "evaluate": evaluate._parser().parse_args,
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its mark, its language, what is in it and the line that it begins on."""

    mark: str
    kind: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match[1] or "", match[2], match[3], text.count("\n", 0, match.start(3)) + 1)
        for match in FENCE.finditer(text)
    ]
    assert 2 * len(found) == len(re.findall(r"^\s*```", text, re.MULTILINE)), f"{page}: a fence that is not understood"
    return found


def write_file(block: Block) -> None:
    """Write a block where its mark says, if it says so."""
    kind, _, name = block.mark.partition(": ")
    if kind == "file":
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(block.code, encoding="utf-8")


def cut(file: Path, target: Path) -> None:
    """Some rows of a file of `data/`, three neighbours at equal distances, so that labels have several texts."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with lzma.open(file, "rt", encoding="utf-8") as source, lzma.open(target, "wt", encoding="utf-8", preset=0) as copy:
        lines = source.readlines()
        step = max(3, 3 * len(lines) // DATA_ROWS)
        copy.writelines(line for number, line in enumerate(lines) if number % step < 3)


def shrink(recipe: Path, target: Path) -> None:
    """A recipe of the repository, of two small steps and without scores."""
    values = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    values["train"] |= {"steps": 2, "batch_size": 4}
    values["evaluate"] = {}
    target.write_text(yaml.safe_dump(values), encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout as the pages take it for granted: models, data, recipes, a reader's files, runs that have ended."""
    folder = tmp_path_factory.mktemp("world")
    save_models(folder / "models")
    for ours, theirs in MODELS.items():
        (folder / "models" / ours).rename(folder / "models" / theirs)
    for part in (language_model("llama", 3, num_hidden_layers=12), byte_tokenizer()):
        part.save_pretrained(folder / "models" / "smollm2-135m")
    (folder / "models" / "smollm2-135m" / "README.md").touch()
    for file in (ROOT / "data").glob("**/*.xz"):
        if "medquad" not in file.parts:  # whose judgements name rows that would be cut
            cut(file, folder / file.relative_to(ROOT))
    shutil.copy(ROOT / "data" / "instruct" / "instructions.yaml", folder / "data" / "instruct")
    shutil.copytree(ROOT / "data" / "eval" / "xquad", folder / "data" / "eval" / "xquad", dirs_exist_ok=True)
    (folder / "recipes").mkdir()
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        shrink(recipe, folder / "recipes" / recipe.name)
    (folder / "texts.txt").write_text("a river bank\nthe old man\n", encoding="utf-8")
    (folder / "texts").mkdir()
    pq.write_table(pa.table({"text": ["a river", "bread"], "id": [1, 2]}), folder / "texts" / "one.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in (block for page in PAGES for block in blocks(page)):
            write_file(block)
        training.main(["recipes/tiny.yaml"])
        shutil.copytree("runs/tiny", "runs/smollm2-135m")
        named = PromptEmbedder.from_pretrained("runs/tiny/model").instructions
        for name in ("servable", "tiny-paper"):
            model = PromptEmbedder.from_config(load_recipe(f"recipes/{name}.yaml").model)
            model.instructions = named
            model.save_pretrained(f"runs/{name}/model")
    return folder


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world, where the test now is."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "here"
    shutil.copytree(world, folder)
    monkeypatch.chdir(folder)
    return folder


def commands(code: str) -> Iterator[list[str]]:
    """The simple commands of a block of bash, without comments and variables set before a command."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set(";&|"):
                if command:
                    yield command
                command = []
            elif command or not (word == "do" or re.fullmatch(r"[A-Z_]+=.*", word)):
                command.append(word)


def module_of(words: Sequence[str]) -> tuple[str, list[str]]:
    """What `python -m` is to run, and its arguments; "" for another command."""
    match words:
        case ["python", "-m", name, *rest] | ["accelerate", "launch", "-m", name, *rest]:
            return name, rest
        case ["python", script, *rest] if script.endswith(".py"):
            return script.removesuffix(".py").replace("/", "."), rest
    return "", []


@functools.cache
def options_of(command: str) -> frozenset[str]:
    """Options that a command of `pe` knows, with a recipe's where it takes one; of a script those that it names."""
    if not command.startswith("pe."):
        return frozenset(OPTION.findall((ROOT / command.replace(".", "/")).with_suffix(".py").read_text("utf-8")))
    told = io.StringIO()
    with redirect_stdout(told), suppress(SystemExit):
        importlib.import_module(command).main(["--help"])
    found = frozenset(OPTION.findall(told.getvalue()))
    return found | options_of("pe.train") if command in ("pe.sweep", "pe.transfer", "pe.memory") else found


def run(words: list[str]) -> None:
    """One command of a block that has no mark."""
    if words == [".", ".venv/bin/activate"]:
        return
    name, arguments = module_of(words)
    assert name.startswith("pe."), "expected `python -m pe...`, or a mark on the block"
    try:
        code = importlib.import_module(name).main(arguments)
    except SystemExit as end:
        code = end.code
    assert not code, f"ended with {code}"


def check(words: list[str]) -> None:
    """What can be said of a command without running it."""
    name, arguments = module_of(words)
    if name:
        unknown = {word.partition("=")[0] for word in arguments if word.startswith("--")} - options_of(name)
        assert not unknown
    if name.startswith("pe.") and name[3:] in PARSERS:
        PARSERS[name[3:]](arguments)
    if words[0] == "make":
        targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    if words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        for asked in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(asked.split(",")) <= set(project["optional-dependencies"])


def read_rows(file: Path) -> None:
    """Rows of training data in any layout."""
    _, first = next(iter(records(str(file))))
    is_scored = "score" in detect(first).record(first)
    load_dataset(DatasetConfig(path=str(file), instruction="Find it", positive_from=0.5 if is_scored else None))


def try_block(block: Block, page: Path, namespace: dict[str, Any], printed: str) -> str:
    """Do what a block says, and give what it printed."""
    told = io.StringIO()
    mark, _, value = block.mark.partition(": ")
    assert mark in ("", "file", "not run"), "expected `file: NAME` or `not run: REASON` before the block"
    is_run = mark != "not run"
    assert is_run or value, "expected a reason"
    if block.kind == "python":
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if is_run:
            with redirect_stdout(told):
                exec(code, namespace)
    elif block.kind == "bash":
        for words in commands(block.code):
            try:
                (run if is_run else check)(words)
            except (Exception, SystemExit) as error:
                raise AssertionError(f"{' '.join(words)}: {error!r}") from error
    elif block.kind in ("yaml", *ROWS) and is_run:
        file = Path(f"block.{block.kind}")
        file.write_text(block.code, encoding="utf-8")
        load_recipe(file) if block.kind == "yaml" else read_rows(file)
    elif block.kind == "text" and is_run:
        assert block.code == printed
    else:
        assert not is_run, f"{block.kind or 'a block without language'}: expected the mark `not run: REASON`"
    return told.getvalue()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_blocks_of_a_page(page: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for block in blocks(page):
        try:
            printed = try_block(block, page, namespace, printed)
        except Exception as error:
            raise AssertionError(f"{page.relative_to(ROOT)}:{block.line}: {error}") from error


def spans(page: Path) -> Iterator[str]:
    """What stands between backticks in running text and tables."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for match in INLINE.finditer(text):
        yield match[2].replace("\\|", "|")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_keys_and_files_in_the_text_exist(page: Path) -> None:
    every = frozenset[str]().union(*map(options_of, (f"pe.{name}" for name in (*PARSERS, "models", "report"))))
    wrong = []
    for span in spans(page):
        command = re.match(r"python -m ((?:pe|bench|scripts)\.\w+)|(pe\.\w+) |python (scripts/\w+)\.py", span)
        name = next(filter(None, command.groups())).replace("/", ".") if command else ""
        known = options_of(name) if name else every | OTHERS
        wrong += [f"{span}: {option}" for option in OPTION.findall(span) if option not in known]
        if KEY.fullmatch(span) and span not in NO_KEYS and not any(f"{o}.".startswith(f"--{span}.") for o in every):
            wrong.append(span)
        if PLACE.fullmatch(span) and not any(ROOT.glob(span)):
            wrong.append(span)
    assert wrong == []

"""Recipes: what a run is made of, as frozen dataclasses read from YAML and the command line.

A recipe is checked twice: the file's keys against the dataclasses (errors name file, line and nearest known key), then
every value where its dataclass is built.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class RecipeError(ValueError):
    """A recipe that cannot be used; the message says where, what was expected, what came."""


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise RecipeError(f"{name}: expected {expected}, got {got!r}")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Rank, scaling numerator and dropout of LoRA adapters on all linear layers."""

    rank: int = 16
    alpha: int = 64
    dropout: float = 0.0

    def __post_init__(self) -> None:
        _require(self.rank >= 1, "rank", "at least 1", self.rank)
        _require(0 <= self.dropout < 1, "dropout", "a value in [0, 1)", self.dropout)


@dataclass(frozen=True, kw_only=True)
class PrompterConfig:
    """The prompting LLM and its continuous relaxation (DESIGN 1)."""

    model: str = "models/tiny-prompter"
    """Folder or hub name of a causal language model."""
    revision: str | None = None
    soft_tokens: int = 5
    """K, the soft tokens of a prompt."""
    temperature: float = 1.0
    """T of softmax(logits / T)."""
    trainable: Literal["full", "lora"] = "full"
    """What trains: all weights, or LoRA adapters; the vocabulary embedding is frozen in both."""
    lora: LoraSettings = field(default_factory=LoraSettings)

    def __post_init__(self) -> None:
        _require(self.soft_tokens >= 1, "prompter.soft_tokens", "at least 1", self.soft_tokens)
        _require(self.temperature > 0, "prompter.temperature", "a positive number", self.temperature)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The frozen embedding LLM."""

    model: str = "models/tiny-qwen3"
    """Folder or hub name of a causal decoder."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen weights; auto: the checkpoint's on a GPU, float32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class AlignmentConfig:
    """How soft tokens reach the backbone's input space."""

    kind: Literal["linear", "vocabulary"] = "linear"
    """linear: a d_p x d_e matrix (the paper). vocabulary: no matrix, a mixture of the backbone's own rows."""
    init: Literal["least_squares", "orthogonal", "identity"] = "least_squares"
    ridge: float = 1e-3
    """Ridge weight of the least-squares start, relative to the mean eigenvalue of the Gram matrix."""

    def __post_init__(self) -> None:
        _require(self.ridge >= 0, "alignment.ridge", "a non-negative number", self.ridge)


@dataclass(frozen=True, kw_only=True)
class SideTemplates:
    """What is read for one side (query or document). `{instruction}` and `{text}` are filled in."""

    prompter: str = "Instruct: {instruction}\nQuery: {text}"
    """Read by the prompting LLM; it ends before `{text}` where it is conditioned on the instruction alone."""
    prefix: str = "Instruct: {instruction}\nQuery:"
    """Read by the backbone before the soft prompt in the prefix layout."""
    text: str = "{text}"
    """Read by the backbone as the text."""

    def __post_init__(self) -> None:
        _require("{text}" in self.text, "templates.text", "a template with {text}", self.text)
        _require("{instruction}" not in self.text, "templates.text", "no {instruction} (texts are shared)", self.text)
        _require("{text}" not in self.prefix, "templates.prefix", "no {text} (it follows the prompt)", self.prefix)
        _require("{instruction}" in self.prompter, "templates.prompter", "a template with {instruction}", self.prompter)


@dataclass(frozen=True, kw_only=True)
class TemplatesConfig:
    query: SideTemplates = field(default_factory=SideTemplates)
    document: SideTemplates = field(default_factory=SideTemplates)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A PromptEmbedder: the options of DESIGN 2."""

    prompter: PrompterConfig = field(default_factory=PrompterConfig)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    layout: Literal["suffix", "prefix"] = "suffix"
    """Where the soft prompt stands: after the text (fast), or between instruction and text (the paper)."""
    conditioning: Literal["instruction", "instruction_and_text"] = "instruction"
    """What the prompting LLM reads."""
    pooling: Literal["mean_prompt", "last", "mean_text"] = "mean_prompt"
    """mean_prompt: over the K soft-token states (suffix); last: the last token; mean_text: over the text (prefix)."""
    reader: Literal["none", "activated_lora"] = "none"
    """activated_lora: adapters on the backbone that act in the K-token pass alone (suffix)."""
    reader_lora: LoraSettings = field(default_factory=LoraSettings)
    max_length: int = 256
    """Tokens of a text; longer texts are truncated, counted and reported."""
    templates: TemplatesConfig = field(default_factory=TemplatesConfig)

    def __post_init__(self) -> None:
        allowed = ("mean_prompt", "last") if self.layout == "suffix" else ("mean_text", "last")
        _require(self.pooling in allowed, "pooling", f"one of {allowed} in the {self.layout} layout", self.pooling)
        if self.layout == "prefix":
            _require(self.reader == "none", "reader", "'none' in the prefix layout", self.reader)
        _require(self.max_length >= 1, "max_length", "at least 1", self.max_length)


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """One training set: where it is, and how its rows are read."""

    path: str
    """`.jsonl`, `.jsonl.xz`, `.jsonl.gz`, or `hf://owner/name[:config][@split]`."""
    instruction: str
    """Instruction of the queries."""
    document_instruction: str | None = None
    """Instruction of the documents; null: the same as the queries'."""
    weight: float = 1.0
    """Share of the training batches, relative to the other sets."""
    query_template: str = "{text}"
    document_template: str = "{text}"
    positive_from: float | None = None
    """Scored pairs: a pair counts as positive from this score on; required for them."""
    max_rows: int | None = None
    """Use the first rows only."""
    on_bad_record: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        _require(bool(self.instruction.strip()), f"{self.path}: instruction", "a sentence", self.instruction)
        _require(self.weight > 0, f"{self.path}: weight", "a positive number", self.weight)
        for name in ("query_template", "document_template"):
            _require("{text}" in getattr(self, name), f"{self.path}: {name}", "{text} in it", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """InfoNCE over in-batch and hard negatives."""

    temperature: float = 0.02
    hard_negatives: int = 1
    """Hard negatives of a query, at most."""
    mask_false_negatives: bool = True
    """Leave out in-batch documents with the query's label, its own text or its positive's text."""
    symmetric: bool = False
    """Also score each positive against all queries."""
    stepwise: bool = False
    """Mean of the losses after k = 1..K soft tokens (suffix layout)."""
    matryoshka: tuple[int, ...] = ()
    """Further embedding sizes to train; each is cut, normalised and weighted equally."""

    def __post_init__(self) -> None:
        _require(self.temperature > 0, "loss.temperature", "a positive number", self.temperature)
        _require(self.hard_negatives >= 0, "loss.hard_negatives", "0 or more", self.hard_negatives)
        _require(all(d >= 1 for d in self.matryoshka), "loss.matryoshka", "sizes of 1 or more", self.matryoshka)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimiser, schedule, precision, logging."""

    steps: int = 200
    batch_size: int = 64
    """Queries of a step (on each process); their positives and hard negatives come on top."""
    micro_batch_size: int | None = None
    """Queries at a time: representations are cached, so the negatives stay those of the whole batch."""
    lr: float = 1e-3
    """Peak rate of the prompting LLM."""
    alignment_lr: float | None = None
    """Peak rate of the alignment matrix; null: lr."""
    reader_lr: float | None = None
    """Peak rate of the reader's adapters; null: lr."""
    weight_decay: float = 0.01
    warmup: float = 0.1
    """Share of the steps."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip_norm: float = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 autocast where the hardware multiplies it faster."""
    seed: int = 0
    eval_every: int = 0
    """Steps between evaluations while training; 0: only at the end."""
    save_every: int = 100
    log_every: int = 10
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        _require(self.steps >= 0, "train.steps", "0 or more", self.steps)
        for name in ("batch_size", "save_every", "log_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"train.{name}", "at least 1", getattr(self, name))
        _require(0 <= self.warmup <= 1, "train.warmup", "a share in [0, 1]", self.warmup)
        _require(self.lr > 0, "train.lr", "a positive number", self.lr)
        micro = self.micro_batch_size
        _require(micro is None or micro >= 1, "train.micro_batch_size", "at least 1, or null", micro)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """The tasks a run is scored on: names of `pe.tasks` or of MTEB; instructions by task name."""

    tasks: tuple[str, ...] = ()
    data: str = "data"
    """Folder of the offline tasks' files."""
    instructions: dict[str, str] = field(default_factory=dict)
    """Query-side instruction of a task, where it differs from the task's own."""
    batch_tokens: int = 16_384


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything a training run is made of."""

    output: str = "runs/tiny"
    """Folder of the run: checkpoints, model, logs, resolved recipe."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: list[DatasetConfig] = field(default_factory=list)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        stepwise_ok = not self.loss.stepwise or self.model.layout == "suffix"
        _require(stepwise_ok, "loss.stepwise", "false in the prefix layout", self.loss.stepwise)


def nearest(name: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no known name is near."""
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _nested_dataclass(annotation: Any) -> type | None:
    """The dataclass inside an annotation such as `X`, `X | None`, `list[X]`."""
    if dataclasses.is_dataclass(annotation):
        return typing.cast(type, annotation)
    if typing.get_origin(annotation) in (list, tuple, typing.Union, types.UnionType):
        return next(filter(None, map(_nested_dataclass, typing.get_args(annotation))), None)
    return None


def _problems(node: yaml.Node, annotation: Any, where: str) -> Iterator[tuple[int, str]]:
    """Line and message of each unknown or repeated key under the dataclass in `annotation`, and of sections without."""
    kind = _nested_dataclass(annotation)
    if kind is None:
        return
    hints = typing.get_type_hints(kind)
    name = where or "the recipe"
    if isinstance(node, yaml.SequenceNode) and annotation is not kind:
        for number, item in enumerate(node.value):
            yield from _problems(item, kind, f"{where}[{number}]")
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line, known = key.start_mark.line + 1, f"Known keys: {', '.join(hints)}"
            if not isinstance(key, yaml.ScalarNode):
                yield line, f"expected a key in {name}, got a list or mapping. {known}"
            elif key.value not in hints:
                yield line, f"unknown key {key.value!r} in {name}{nearest(key.value, list(hints)) or '.'} {known}"
            elif key.value in seen:
                yield line, f"key {key.value!r} stands twice in {name}"
            else:
                seen.add(key.value)
                yield from _problems(value, hints[key.value], f"{where}.{key.value}" if where else key.value)
    elif annotation is kind:
        got = "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value) if node.value else "nothing"
        yield node.start_mark.line + 1, f"{name}: expected a mapping of {', '.join(hints)}, got {got}"


def read_yaml(path: Path, kind: type) -> yaml.Node:
    """The YAML document of a recipe.

    Raises:
        RecipeError: with file and line, for YAML that does not parse, a key that `kind` does not know, a key given
            twice, or a section that is no mapping.
    """
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the recipe cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise RecipeError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {error}") from error
    if node is None:
        raise RecipeError(f"{path}:1: expected a mapping of {', '.join(typing.get_type_hints(kind))}, got nothing")
    for line, problem in _problems(node, kind, ""):
        raise RecipeError(f"{path}:{line}: {problem}")
    return node


def _line_of(node: yaml.Node, option: str) -> int | None:
    """Line of a dotted option in a YAML document, or of the section that holds it."""
    line = None
    for name in option.split("."):
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        found = next(((key, value) for key, value in entries if key.value == name), None)
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def build_parser(kind: type, **settings: Any) -> ArgumentParser:
    """An argument parser with every field of `kind` as an option; errors are raised, not printed."""
    parser = ArgumentParser(exit_on_error=False, **settings)
    parser.add_argument("--config", action="config", help=argparse.SUPPRESS)
    parser.add_class_arguments(kind)
    return parser


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `--train.steps=50`.

    Raises:
        RecipeError: unreadable file, unknown key, wrong type or value; the message names file, line or option.
    """
    path = Path(path)
    node = read_yaml(path, Recipe)
    parser = build_parser(Recipe)
    for override in overrides:
        option = override.partition("=")[0]
        known = [name for action in parser._actions for name in action.option_strings]
        if option.startswith("--") and option not in known:
            raise RecipeError(f"unknown option {option}{nearest(option, known)}")
    try:
        parsed = parser.parse_args(["--config", str(path), *overrides])
        parsed.pop("config", None)
        return Recipe(**vars(parser.instantiate_classes(parsed)))
    except (ArgumentError, TypeError, ValueError) as error:
        match = re.match(r'(?:Parser key "|argument --)?([\w.]+)', str(error))
        option = match[1] if match else ""
        names = (option, f"model.{option}")
        given = next((item for item in overrides if item.partition("=")[0].removeprefix("--") in names), None)
        line = next(filter(None, (_line_of(node, name) for name in names)), None)
        where = given or (f"{path}:{line}" if line else str(path))
        raise RecipeError(f"{where}: {error}") from error


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain YAML-ready values."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def write_yaml(config: Any, path: Path) -> None:
    path.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def model_config_from_dict(values: dict[str, Any], where: str) -> ModelConfig:
    """A ModelConfig from saved values.

    Raises:
        RecipeError: a key or value that this version does not know.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ModelConfig)
    try:
        return ModelConfig(**vars(parser.instantiate_classes(parser.parse_object(values))))
    except (ArgumentError, TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {error}") from error

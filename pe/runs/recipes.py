"""Recipes read from YAML and the command line.

A recipe is checked twice: the file's keys against the dataclasses of `pe.config` (errors name file, line and nearest
known key), then every value where its dataclass is built.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from pe.config import ModelConfig, Recipe, RecipeError, nearest, to_dict
from pe.runs.files import write_text
from pe.runs.parsers import sentence

set_parsing_settings(docstring_parse_attribute_docstrings=True)

REMOVED = {
    "loss.symmetric": "leave it out",
    "loss.stepwise": "leave it out",
    "model.skip: linear": "train with weighted",
    "model.alignment.init: identity": "write least_squares",
}
"""Options, and values of one, that are no longer there, and what to do instead; see `_drop_what_was_off`."""
NULLS = ("null", "Null", "NULL", "~")
"""How YAML writes None; it also finds nothing in a comment, in an anchor and in `---`."""


def _nested_dataclass(annotation: Any) -> type | None:
    """The dataclass inside an annotation such as `X`, `X | None`, `list[X]`."""
    if dataclasses.is_dataclass(annotation):
        return typing.cast(type, annotation)
    if typing.get_origin(annotation) in (list, tuple, typing.Union, types.UnionType):
        return next(filter(None, map(_nested_dataclass, typing.get_args(annotation))), None)
    return None


def _drop_what_was_off(node: yaml.Node) -> None:
    """Take removed keys out of a recipe where they say false, as every recipe does that an earlier run wrote."""
    for option in REMOVED:
        section, _, name = option.partition(".")
        for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
            if key.value == section and isinstance(value, yaml.MappingNode):
                value.value = [pair for pair in value.value if [part.value for part in pair] != [name, "false"]]


def _removed(name: str) -> str | None:
    """What to say of an option, or of one with its value, that is no longer there."""
    return f"{name} is no longer there; {REMOVED[name]}" if name in REMOVED else None


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
            option = f"{where}.{key.value}" if where else str(key.value)
            if not isinstance(key, yaml.ScalarNode):
                yield line, f"expected a key in {name}, got a list or mapping. {known}"
            elif key.value not in hints:
                unknown = f"unknown key {key.value!r} in {name}{nearest(key.value, list(hints)) or '.'} {known}"
                yield line, _removed(option) or unknown
            elif key.value in seen:
                yield line, f"key {key.value!r} stands twice in {name}"
            elif said := _removed(f"{option}: {value.value}"):
                yield line, said
            else:
                seen.add(key.value)
                yield from _problems(value, hints[key.value], option)
    elif annotation is kind:
        got = "a list" if isinstance(node, yaml.SequenceNode) else repr(node.value) if node.value else "nothing"
        yield node.start_mark.line + 1, f"{name}: expected a mapping of {', '.join(hints)}, got {got}"


def read_yaml(path: Path, kind: type) -> yaml.Node:
    """The YAML document of a recipe, without removed keys that were off.

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
        said = " ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None)))) or error
        raise RecipeError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {said}") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: expected a recipe, got brackets nested too deeply") from error
    if node is None:
        raise RecipeError(f"{path}:1: expected a mapping of {', '.join(typing.get_type_hints(kind))}, got nothing")
    _drop_what_was_off(node)
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


def build_parser(kind: type) -> ArgumentParser:
    """An argument parser with every field of `kind` as an option; errors are raised, not printed."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    return parser


_model_parser = functools.cache(lambda: build_parser(ModelConfig))


@functools.cache
def _recipe_parser() -> ArgumentParser:
    """Made once, as the model's: most of the time of reading a recipe or a saved configuration."""
    parser = build_parser(Recipe)
    parser.add_argument("--config", action="config", help=argparse.SUPPRESS)
    return parser


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `--train.steps=50`.

    Raises:
        RecipeError: unreadable file, unknown key, wrong type or value; the message names file, line or option.
    """
    path = Path(path)
    node = read_yaml(path, Recipe)
    parser = _recipe_parser()
    values: dict[str, str] = {}
    for before, override in zip(["", *overrides], overrides, strict=False):
        if not override.startswith("--") and not (before.startswith("--") and "=" not in before):
            raise RecipeError(f"unexpected {override!r}; expected the recipe first, then --option=value")
        option, equals, value = override.partition("=") if override.startswith("--") else (before, "=", override)
        name = option.removeprefix("--")
        if equals:
            values[name] = value
        known = [string for action in parser._actions for string in action.option_strings]
        if said := _removed(f"{name}: {value}"):
            raise RecipeError(said)
        if option not in known:
            raise RecipeError(_removed(name) or f"unknown option {option}{nearest(option, known)}")
    if any(override.partition("=")[0] == "--data" for override in overrides):  # it replaces the sets, not their keys
        node.value = [pair for pair in node.value if pair[0].value != "data"]
    try:
        parsed = parser.parse_args(["--config", yaml.serialize(node), *overrides])
        for option, value in values.items():
            if parsed.get(option) is None and value.strip() not in NULLS:
                raise RecipeError(f"{option}: expected a value or null, got {value!r}, in which YAML finds neither")
        parsed.pop("config", None)
        return Recipe(**vars(parser.instantiate_classes(parsed)))
    except (ArgumentError, TypeError, ValueError) as error:
        match = re.match(r'(?:Parser key "|argument --)?([\w.]+)', str(error))
        option = match[1] if match else ""
        names = (option, f"model.{option}")
        given = next((item for item in overrides if item.partition("=")[0].removeprefix("--") in names), None)
        line = next(filter(None, (_line_of(node, name) for name in names)), None)
        where = given or (f"{path}:{line}" if line else str(path))
        raise RecipeError(f"{where}: {sentence(str(error))}") from error


def write_yaml(config: Any, path: Path) -> None:
    """Write a recipe whole or not at all."""
    write_text(path, yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


YOUNGER = {"reader": "none", "skip": "none"}
"""What a saved configuration means that was written before these options were."""


def model_config_from_dict(values: dict[str, Any], where: str) -> ModelConfig:
    """A ModelConfig from saved values.

    Raises:
        RecipeError: a key or value that this version does not know.
    """
    if said := _removed(f"model.skip: {values.get('skip')}"):
        raise RecipeError(f"{where}: {said}")
    alignment = values.get("alignment")
    if isinstance(alignment, dict) and _removed(f"model.alignment.init: {alignment.get('init')}"):
        values = values | {"alignment": alignment | {"init": "least_squares"}}  # it told where training started
    parser = _model_parser()
    try:
        return ModelConfig(**vars(parser.instantiate_classes(parser.parse_object(YOUNGER | values))))
    except (ArgumentError, TypeError, ValueError) as error:
        raise RecipeError(f"{where}: {sentence(str(error))}") from error

"""Parsers of command lines, whose errors are one sentence and exit code 2, as all errors of a command are."""

from __future__ import annotations

import argparse
import re
from typing import Any, NoReturn

import jsonargparse

from pe.config import Dtype
from pe.runs.cli import end, one_line

TYPE = r"<class '([\w.]+)'>|(?:typing\.)?Literal\[([^]]*)\]"
"""How jsonargparse names a type."""
SINGLE = re.compile(rf"Expected an? ({TYPE})\. Got value: (.*)", re.DOTALL)
UNION = re.compile(
    r"Does not validate against any of the Union subtypes\s+Subtypes: \[(.*?)\]\s+Errors:.*Given value: (.*)", re.DOTALL
)
KEY = re.compile(r'^Parser key "([^"]+)":\s*')


def sentence(error: str) -> str:
    """What jsonargparse says of a value, with types as a user writes them."""
    found = SINGLE.sub(lambda match: expected(match[1], match[4]), error)
    found = UNION.sub(lambda match: expected(match[1], match[2]), found)
    return one_line(KEY.sub(r"\1: ", found))


def expected(kinds: str, given: str) -> str:
    names: list[str] = []
    for kind, values in re.findall(TYPE, kinds):
        names += re.findall(r"'[^']*'", values) or [{"NoneType": "null"}.get(kind, kind)]
    *before, last = sorted(names, key="null".__eq__) or [kinds]
    return f"expected {', '.join(before)}{' or ' if before else ''}{last}, got {given.strip()!r}"


class Parser(argparse.ArgumentParser):
    """argparse's, for a command whose module says what it does."""

    def __init__(self, prog: str, description: str | None) -> None:
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(prog=prog, description=description, formatter_class=kind, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        end(self.prog, f"{message}; --help lists what is expected")


MODEL_OPTIONS: dict[str, tuple[Any, str]] = {
    "backbone": (str, "where the backbone is now, if not where it was"),
    "prompter": (str, "where the base of its adapters is, if moved"),
    "dtype": (Dtype, "of the backbone's weights (default: as in training)"),
    "device": (str, "cpu, cuda, cuda:1 (default: a GPU if any)"),
}
"""Options of what loads an embedder: type and help."""


class TypedParser(jsonargparse.ArgumentParser):
    """jsonargparse's."""

    def add_typed(self, name: str, kind: Any, told: str) -> None:
        """Add an option that is None where it is not given.

        Of a function's `str | None` the parser would read `null`, and what YAML takes for a comment, as None.
        """
        self.add_argument(f"--{name}", type=kind, default=None, help=told)

    def add_model_options(self, *names: str) -> None:
        """Add these of `MODEL_OPTIONS`."""
        for name in names:
            self.add_typed(name, *MODEL_OPTIONS[name])

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # of a parser inside another
            super().error(message, ex)
        end(self.prog, f"{sentence(message)}; --help lists what is expected")

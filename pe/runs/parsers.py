"""Parsers of command lines, whose errors are one sentence and exit code 2, as all errors of a command are."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

import jsonargparse

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
    """argparse's."""

    def error(self, message: str) -> NoReturn:
        end(self.prog, f"{message}; --help lists what is expected")


class TypedParser(jsonargparse.ArgumentParser):
    """jsonargparse's."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # of a parser inside another
            super().error(message, ex)
        end(self.prog, f"{sentence(message)}; --help lists what is expected")

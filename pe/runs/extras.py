"""Packages of this library's extras, imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingPackage(ValueError):
    """A package of an extra is not installed."""


def extra(name: str, group: str) -> ModuleType:
    """A module of the extra `group`.

    Raises:
        MissingPackage: it, or a package that it needs, is missing; with the command that installs it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackage(f"{error.name} is not installed: pip install 'promptembedder[{group}]'") from error

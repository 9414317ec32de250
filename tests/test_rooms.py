"""Imports go one way: see ARCHITECTURE.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "kernels": {"kernels"},
    "config": {"config"},
    "data": {"config", "data"},
    "method": {"config", "data", "kernels", "method"},
    "runs": {"config", "data", "runs"},
}
"""What each room may import of `pe`."""


def imported(tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports when it runs, `TYPE_CHECKING` left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pe":
            yield from (f"{node.module}.{item.name}" for item in node.names)
        elif isinstance(node, ast.Import):
            yield from (item.name for item in node.names if item.name.split(".")[0] == "pe")


def graph() -> dict[str, set[str]]:
    """Module -> modules of `pe` that it imports."""
    files = [file for file in (ROOT / "pe").glob("**/*.py") if file.name != "__init__.py"]
    files += (ROOT / "pe" / "kernels").glob("*.py")  # a link, which ** does not follow
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    found = {}
    for name, file in names.items():
        targets = imported(ast.parse(file.read_text(encoding="utf-8")))
        found[name] = {known for target in targets for known in names if f"{target}.".startswith(f"{known}.")}
    return found


IMPORTS = graph()


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_what_stands_below_it_alone(room: str) -> None:
    mine = {name: targets for name, targets in IMPORTS.items() if name.split(".")[1] == room}
    assert mine
    above = {
        (name, target)
        for name, targets in mine.items()
        for target in targets
        if target.split(".")[1] not in BELOW[room]
    }
    assert not above


def test_modules_import_in_no_circle() -> None:
    left = dict(IMPORTS)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_no_room_is_forgotten() -> None:
    """The graph sees imports of every room, through the link to the kernels too."""
    assert "pe.kernels.info_nce" in IMPORTS["pe.losses"]
    assert {"pe.step", "pe.data.batches", "pe.runs.folder"} <= IMPORTS["pe.train"]
    assert len(IMPORTS) > 60

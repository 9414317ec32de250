"""`python scripts/oldest.py`: the least versions that `pyproject.toml` allows, as constraints for pip.

`make oldest` installs them into an environment of their own and runs the tests there: the lower bounds are promises.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

BOUND = re.compile(r"([\w.-]+)(?:\[[^]]*\])?>=([\w.]+)")
PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
EXTRA = "test"


def requirements(project: dict[str, object], extra: str) -> Iterator[str]:
    """What a project needs, and an extra with the extras of its own that it names."""
    dependencies, extras, own = project["dependencies"], project["optional-dependencies"], str(project["name"])
    assert isinstance(dependencies, list)
    assert isinstance(extras, dict)
    yield from dependencies
    names = [extra]
    for name in names:
        for item in extras[name]:
            if found := re.fullmatch(rf"{own}\[([^]]*)\]", item):
                names += found[1].split(",")
            else:
                yield item


def pins(extra: str = EXTRA) -> dict[str, str]:
    """Name -> least version, of what has a lower bound."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    found = (BOUND.match(item) for item in requirements(project, extra))
    return {match[1]: match[2] for match in found if match}


if __name__ == "__main__":
    for name, version in pins().items():
        print(f"{name}=={version}")

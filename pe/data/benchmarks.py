"""What is known here of mteb's benchmarks, as data in `benchmarks.yaml`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import yaml


@functools.cache
def known() -> dict[str, Any]:
    """`instructions` by benchmark, and `trained`, tasks by training set."""
    return yaml.safe_load(files("pe.data").joinpath("benchmarks.yaml").read_text(encoding="utf-8"))


def instructions_of(benchmark: str) -> dict[str, str]:
    """The sentences of a benchmark's tasks, as `score` takes them; none for one that is not in the table."""
    return dict(known()["instructions"].get(benchmark, {}))


def trained_tasks(sets: Sequence[str]) -> set[str]:
    """Training sets as mteb's `ModelMeta` names them: by tasks over the same data where there are any."""
    return {task for name in sets for task in known()["trained"].get(name, [name])}

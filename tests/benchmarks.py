"""What stands for pytest-benchmark's fixture."""

from __future__ import annotations

from typing import Any


class FakeBenchmark:
    """What the benchmarks of `bench/` use of it: each call runs once, and its result is kept."""

    group = ""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.found: list[Any] = []

    def __call__(self, function: Any, *arguments: Any) -> None:
        self.found.append(function(*arguments))

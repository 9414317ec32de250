"""Where shards are encoded: in this process, or by the workers of a Ray cluster.

An engine is given `make`, which makes a worker (a function of one item), and the items; it yields results as they come.
"""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from pe.runs.cli import USER_ERRORS
from pe.runs.extras import extra

Item = TypeVar("Item")
Result = TypeVar("Result")
EngineName = Literal["local", "ray"]


@dataclass(frozen=True, kw_only=True)
class Workers:
    """The workers of a cluster.

    Attributes:
        count: how many; None: as many as the nodes hold.
        cores, gpus: of each; a part of a GPU is shared.
    """

    count: int | None = None
    cores: int = 1
    gpus: float = 0


class Engine(Protocol):
    """Calls `make` once in each worker, and what it made on every item; results come in any order."""

    def __call__(
        self, make: Callable[[], Callable[[Item], Result]], items: Sequence[Item], workers: Workers
    ) -> Iterator[Result]: ...


def on_this_process(
    make: Callable[[], Callable[[Item], Result]], items: Sequence[Item], workers: Workers
) -> Iterator[Result]:
    """One worker, here, item by item."""
    if items:
        yield from map(make(), items)


def on_ray(make: Callable[[], Callable[[Item], Result]], items: Sequence[Item], workers: Workers) -> Iterator[Result]:
    """Actors of Ray Data, each with a worker of its own. One that is lost is replaced, and its item done again.

    Raises:
        ValueError: the message of the first item that could not be done.
    """
    import ray.data

    if not items:
        return
    count = min(len(items), workers.count or places(workers))
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    pool = ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=1)
    rows = ray.data.from_items([{"item": pickle.dumps(item)} for item in items], override_num_blocks=len(items))
    actor: Any = _Actor
    done = rows.map(
        actor, fn_constructor_args=[make], compute=pool, num_cpus=workers.cores, num_gpus=workers.gpus or None
    )
    for row in done.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, _Refused):
            raise ValueError(result.message)
        yield result


@dataclass(frozen=True)
class _Refused:
    """The message of an error that is the user's."""

    message: str


class _Actor:
    """Makes its worker with the first item; errors of the user's come back as results, so that they stay sentences."""

    def __init__(self, make: Callable[[], Callable[[Any], Any]]) -> None:
        self._make = make
        self._worker: Callable[[Any], Any] | None = None

    def __call__(self, row: dict[str, bytes]) -> dict[str, bytes]:
        try:
            if self._worker is None:
                self._worker = self._make()
            result = self._worker(pickle.loads(row["item"]))
        except USER_ERRORS as error:
            result = _Refused(str(error))
        return {"result": pickle.dumps(result)}


def start_ray() -> None:
    """Join the Ray cluster that RAY_ADDRESS or this machine has, or start one here.

    Raises:
        MissingPackage: no Ray.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = extra("ray", "scale")
    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR)


def has_gpus() -> bool:
    """Whether the cluster has any now."""
    import ray

    return bool(ray.cluster_resources().get("GPU"))


def places(workers: Workers) -> int:
    """How many such workers the nodes of the cluster hold now."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    by_cores = (node.get("CPU", 0) // workers.cores for node in nodes)
    by_gpus = (node.get("GPU", 0) // workers.gpus if workers.gpus else float("inf") for node in nodes)
    return int(sum(map(min, by_cores, by_gpus)))


def check_workers(workers: Workers) -> None:
    """Raise ValueError for workers that the cluster does not hold."""
    most = places(workers)
    each = f"{workers.cores} cores" + (f" and {workers.gpus:g} GPUs" if workers.gpus else "")
    if not most:
        raise ValueError(f"--engine: expected a node with {each} for a worker, got none in the cluster")
    if workers.count is not None and not 1 <= workers.count <= most:
        raise ValueError(
            f"--workers: expected 1 to {most}, which the cluster holds with {each} each, got {workers.count}"
        )

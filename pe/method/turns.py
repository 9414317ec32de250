"""Who may use a model now: threads that share one take turns.

A call switches the decoder for its length (its adapters, its final norm, how it attends, what it notes) and the model's
mode, and keeps counts and prompts on the model. So whatever runs a decoder holds the one lock that goes with it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, Protocol, TypeVar


class BeingTrained(RuntimeError):
    """A call to a model that another thread trains."""


class Turns:
    """A lock that a thread may take again while it holds it, and who trains what it guards."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._trainer: int | None = None

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        """A copy of a model, in this process or another, waits for nobody."""
        return Turns, ()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for the calls of other threads to end, and let theirs wait.

        Raises:
            BeingTrained: another thread is inside `training`.
        """
        with self._lock:
            if self._trainer not in (None, threading.get_ident()):
                raise BeingTrained(
                    "the model is being trained by another thread, so what it would give now belongs to no step; encode"
                    " with a copy made before training (copy.deepcopy), or after it"
                )
            yield

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Refuse other threads meanwhile, between this one's calls too.

        Raises:
            BeingTrained: another thread trains it already.
        """
        with self.taken():
            before, self._trainer = self._trainer, threading.get_ident()
        try:
            yield
        finally:
            self._trainer = before


class HasTurns(Protocol):
    """A decoder, whoever runs it."""

    turns: Turns


class RunsBackbone(Protocol):
    """What embeds by a decoder."""

    @property
    def backbone(self) -> HasTurns: ...


Self = TypeVar("Self", bound=RunsBackbone)
P = ParamSpec("P")
R = TypeVar("R")


def in_turn(method: Callable[Concatenate[Self, P], R]) -> Callable[Concatenate[Self, P], R]:
    """A method that has the backbone to itself."""

    @functools.wraps(method)
    def alone(self: Self, /, *arguments: P.args, **options: P.kwargs) -> R:
        with self.backbone.turns.taken():
            return method(self, *arguments, **options)

    return alone

"""Calls that arrive within a few milliseconds, run as one.

While a batch runs, the calls that arrive wait, and are the next one: the busier, the larger the batches.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, Self, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


class Busy(RuntimeError):
    """As many calls wait as may."""


class Call(NamedTuple):
    """What is to be done, and where its result goes."""

    job: Any
    result: asyncio.Future[Any]


class Batcher(Generic[Job, Result]):
    """Runs jobs in batches, in one thread of its own, while it is entered (`async with`)."""

    def __init__(
        self,
        run: Callable[[Sequence[Job]], Sequence[Result]],
        size: Callable[[Job], int],
        *,
        window: float,
        most: int,
        waiting: int,
    ) -> None:
        """Take over what runs a batch and gives a result for each job.

        Args:
            run: called with one batch at a time.
            size: what a job counts in a batch.
            window: seconds that a first job waits for others.
            most: size of a batch; a larger job runs alone.
            waiting: calls that may wait.
        """
        self._run, self._size, self._window, self._most, self._limit = run, size, window, most, waiting
        self._calls: deque[Call] = deque()
        self._arrived = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._worker.cancel()
        for call in self._calls:
            call.result.cancel()
        self._thread.shutdown()

    @property
    def running(self) -> bool:
        """Whether calls are taken from the queue."""
        return not self._worker.done()

    @property
    def waiting(self) -> int:
        """Calls whose batch has not begun."""
        return len(self._calls)

    async def submit(self, job: Job) -> Result:
        """The result of a job; who is cancelled meanwhile, as by a time-out, leaves the queue.

        Raises:
            Busy: as many calls wait as may.
            Exception: what the job raised when it was run alone.
        """
        if len(self._calls) >= self._limit:
            raise Busy(f"{self._limit} calls wait already")
        call = Call(job, asyncio.get_running_loop().create_future())
        self._calls.append(call)
        self._arrived.set()
        try:
            return await call.result
        except asyncio.CancelledError:
            with contextlib.suppress(ValueError):
                self._calls.remove(call)
            raise

    async def _work(self) -> None:
        while True:
            if not self._calls:
                self._arrived.clear()
                await self._arrived.wait()
                await asyncio.sleep(self._window)
            batch = self._next()
            jobs = [call.job for call in batch]
            outcomes = await asyncio.get_running_loop().run_in_executor(self._thread, self._outcomes, jobs)
            for call, outcome in zip(batch, outcomes, strict=True):
                if call.result.done():
                    continue
                if isinstance(outcome, Exception):
                    call.result.set_exception(outcome)
                else:
                    call.result.set_result(outcome)

    def _next(self) -> list[Call]:
        """The oldest calls, as many as fit, at least one where any waits."""
        batch: list[Call] = []
        left = self._most
        while self._calls and (not batch or self._size(self._calls[0].job) <= left):
            batch.append(self._calls.popleft())
            left -= self._size(batch[-1].job)
        return batch

    def _outcomes(self, jobs: Sequence[Job]) -> Sequence[Result | Exception]:
        """A result or an error for each job; one that fails in a batch takes no other with it."""
        if not jobs:
            return []
        try:
            return self._run(jobs)
        except Exception as error:
            return [error] if len(jobs) == 1 else [found for job in jobs for found in self._outcomes([job])]

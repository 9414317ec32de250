"""Processes that train together watch each other, so that none waits for one that has ended.

A thread of each tells the others, again and again, whether its process runs, on a group of gloo beside the one that
trains: gloo notices at once when a process is gone, and after `SILENCE` when its machine is, also while a GPU waits.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed
from accelerate import Accelerator

RUNS, DONE, FAILED = range(3)
BEAT = 1.0
"""Seconds between two messages."""
SILENCE = timedelta(seconds=50)
"""How long a message is waited for."""
GRACE = 5.0
"""Seconds in which a process may come to the error that another has told of, and tell it itself."""


class Watch(threading.Thread):
    """Ends this process where another has ended before its time."""

    def __init__(self, accelerator: Accelerator, command: str, advice: Callable[[], str]) -> None:
        """Begin to watch; all processes do so at the same place.

        Args:
            accelerator: knows the others.
            command: what the message starts with.
            advice: what to do, for the end of the message.
        """
        super().__init__(daemon=True)
        self.place, self.count = accelerator.process_index, accelerator.num_processes
        self.command, self.advice = command, advice
        self.group = torch.distributed.new_group(backend="gloo", timeout=SILENCE)
        self._state, self._follows, self._over = RUNS, False, threading.Event()
        self.start()

    def leave(self, error: BaseException | None = None) -> None:
        """Say that this process is done or has failed, and wait until all know and, if it is done, are done too."""
        self._follows = type(error) is RuntimeError or isinstance(error, torch.distributed.DistError)
        self._state = DONE if error is None else FAILED
        self._over.set()
        self.join()
        torch.distributed.destroy_process_group(self.group)
        del self.group  # its threads end before the interpreter does

    def run(self) -> None:
        try:
            states = self._exchanged()
            while FAILED not in states and set(states) != {DONE}:
                if self._over.is_set():
                    time.sleep(BEAT)
                else:
                    self._over.wait(BEAT)
                states = self._exchanged()
        except RuntimeError:  # gloo's: one is gone, or silent
            self._end("another")
        if states[self.place] != FAILED and FAILED in states and not self._fails_too():
            self._end(f"process {states.index(FAILED)}")

    def _exchanged(self) -> list[int]:
        """The state of every process."""
        states = torch.zeros(self.count, dtype=torch.int64)
        states[self.place] = self._state
        torch.distributed.all_reduce(states, group=self.group)
        found: list[int] = states.tolist()
        return found

    def _fails_too(self) -> bool:
        """Whether this process ends by an error of its own, such as one of the data that all have.

        What gloo and NCCL raise follows from the other's end.
        """
        return self._over.wait(GRACE) and self._state == FAILED and not self._follows

    def _end(self, which: str) -> NoReturn:
        """End this process, whatever its main thread waits for."""
        sys.stdout.flush()
        print(
            f"\n{self.command}: {which} of the {self.count} processes has ended before its time, so process"
            f" {self.place} ends, too; what that one or the launcher printed says why; {self.advice()}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)


@contextmanager
def watching(accelerator: Accelerator, command: str, advice: Callable[[], str]) -> Iterator[None]:
    """Inside it this process ends, with one sentence and code 2, soon after another has ended before its time.

    At its end every process waits for all others. For the arguments see `Watch`; a process alone watches nothing.
    """
    if accelerator.num_processes == 1:
        yield
        return
    watch = Watch(accelerator, command, advice)
    try:
        yield
    except BaseException as error:
        watch.leave(error)
        raise
    watch.leave()

"""How every command ends when its input cannot be used, or on Ctrl-C: one message on stderr and an exit code."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from safetensors import SafetensorError

USER_ERRORS: tuple[type[Exception], ...] = (ValueError, OSError, SafetensorError)
"""Errors that are the user's: ValueError are all of this library but `TrainingError`."""


def one_line(message: object) -> str:
    """A message of several lines, as other libraries have them, in one."""
    return re.sub(r"\s*\n\s*", " ", str(message).strip())


def end(command: str, message: str) -> NoReturn:
    """End the program with code 2 and one sentence on stderr."""
    print(f"{command.removeprefix('python -m ')}: {one_line(message)}", file=sys.stderr)
    sys.exit(2)


def check_alone(deed: str, advice: str) -> None:
    """Raise ValueError where torch.distributed has started several processes, each of which would do the same."""
    if (processes := int(os.environ.get("WORLD_SIZE") or 1)) > 1:
        raise ValueError(
            f"expected one process, got {processes} of torch.distributed (WORLD_SIZE), each of which would {deed};"
            f" start it once, and {advice}"
        )


@contextmanager
def user_errors(command: str, *others: type[Exception]) -> Iterator[None]:
    """End the program with code 2 and the error's message where the input is at fault, with 130 on Ctrl-C.

    Every other error keeps its traceback, an error of CUDA or of torch among them: it is a fault of ours or of the
    machine.

    Args:
        command: what the message starts with, such as `pe.train`.
        others: errors that count as the user's beside ValueError (all errors of this library but `TrainingError`),
            OSError and a damaged weights file.
    """
    users = (*USER_ERRORS, *others)
    try:
        yield
    except users as error:
        damaged = "a .safetensors file cannot be read; is it whole? " if isinstance(error, SafetensorError) else ""
        end(command, f"{damaged}{error}")
    except KeyboardInterrupt:
        print(f"{command}: interrupted", file=sys.stderr)
        sys.exit(130)

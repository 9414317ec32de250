"""Files that are written new and renamed into place: what they replace stays whole until then, and a link is replaced
itself, not the file that it leads to.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRITING = "writing-"
"""How the folders begin that files are written in; a killed process leaves one."""
AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux: paths are relative to the working directory; both exist and change places."""


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with written_into(path.parent) as folder:
        (folder / path.name).write_text(text, encoding="utf-8")


@contextmanager
def written_into(path: Path) -> Iterator[Path]:
    """A new folder, whose files go into the folder `path` once all of them are written."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=WRITING, dir=path) as folder:
        yield Path(folder)
        for file in Path(folder).iterdir():
            os.replace(file, path / file.name)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change places at once; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    paths = os.fsencode(one), os.fsencode(other)
    return rename is not None and rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0

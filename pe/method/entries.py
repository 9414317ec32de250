"""Bytes under keys, kept up to a size: in memory, or in a folder that several processes read and write at once.

A folder holds `entries.bin`, to whose end bytes are written and which is read memory-mapped, and `index.sqlite`, which
says where each entry stands. Whoever adds holds SQLite's write lock: the bytes go in first, and the index names them
when it commits. A process that is killed on its way leaves bytes that no index names, and the next one writes over
them. Every entry has a checksum of its key and its bytes; after a loss of power it tells those that were not on the
disk yet.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

Bytes = npt.NDArray[np.uint8]
FORMAT = 1
"""Of what stands in a folder."""
APPLICATION = 0x70657478
"""By which SQLite's files say whose they are."""
PATIENCE = 60.0
"""Seconds that a process waits for another one's write to end."""
KEYS_AT_ONCE = 500
"""Of one SQL statement."""


class Entries(Protocol):
    """Bytes under keys.

    Attributes:
        limit, used: bytes that may be kept, and that are.
        damaged: entries that were found not to be what was written.
        full: why something was not kept, in a few words; empty where everything was.
    """

    limit: int
    damaged: int
    full: str

    @property
    def used(self) -> int: ...
    def get(self, sizes: Mapping[bytes, int]) -> dict[bytes, Bytes]: ...
    def add(self, new: Mapping[bytes, Bytes]) -> set[bytes]: ...
    def close(self) -> None: ...


class MemoryEntries:
    """In this process's memory."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self.damaged, self.full = limit, 0, 0, ""
        self._kept: dict[bytes, Bytes] = {}

    def get(self, sizes: Mapping[bytes, int]) -> dict[bytes, Bytes]:
        """Those of the keys that are there."""
        return {key: self._kept[key] for key in sizes if key in self._kept}

    def add(self, new: Mapping[bytes, Bytes]) -> set[bytes]:
        """Keep what fits; the keys that are there now."""
        for key, entry in new.items():
            if self.used + len(entry) > self.limit:
                self.full = "its size is reached"
            else:
                self._kept[key] = entry
                self.used += len(entry)
        return new.keys() & self._kept.keys()

    def close(self) -> None:
        """Keep nothing any longer."""
        self._kept.clear()


class FolderEntries:
    """In a folder; see the top of this file."""

    def __init__(self, folder: Path, limit: int) -> None:
        """Open the folder, or make it.

        Raises:
            ValueError: it cannot be written, or holds something else, or entries in another format.
        """
        self.folder, self.limit, self.damaged, self.full = folder, limit, 0, ""
        self._broken: set[bytes] = set()
        self._map: Bytes = np.empty(0, np.uint8)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._index = sqlite3.connect(
                folder / "index.sqlite", timeout=PATIENCE, isolation_level=None, check_same_thread=False
            )
            self._prepare()
            self._file = os.open(folder / "entries.bin", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ValueError(f"{folder}: expected a folder that can be written, got: {error.strerror}") from error
        except sqlite3.Error as error:
            raise ValueError(
                f"{folder}: its index.sqlite cannot be used ({error}); remove the folder, or name another"
            ) from error

    def _prepare(self) -> None:
        with self._writing() as index:
            if (found := self._pragma("user_version")) == 0 and self._pragma("schema_version") == 0:
                index.execute(f"PRAGMA application_id = {APPLICATION}")
                index.execute(f"PRAGMA user_version = {FORMAT}")
                index.execute(
                    "CREATE TABLE entries"
                    " (start INTEGER PRIMARY KEY, size INTEGER NOT NULL, key BLOB UNIQUE, checksum BLOB NOT NULL)"
                )
            elif found != FORMAT or self._pragma("application_id") != APPLICATION:
                raise ValueError(
                    f"{self.folder}: expected a text store of format {FORMAT}, got format {found}; remove the folder,"
                    " which can be made anew, or name another"
                )
            index.execute("SELECT start, size, key, checksum FROM entries LIMIT 1")

    def _pragma(self, name: str) -> int:
        return int(self._index.execute(f"PRAGMA {name}").fetchone()[0])

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """Nobody else writes meanwhile; what was done counts whole, or not at all."""
        self._index.execute("BEGIN IMMEDIATE")
        try:
            yield self._index
        except BaseException:
            self._index.execute("ROLLBACK")
            raise
        self._index.execute("COMMIT")

    @property
    def used(self) -> int:
        last = self._index.execute("SELECT start + size FROM entries ORDER BY start DESC LIMIT 1").fetchone()
        return int(last[0]) if last else 0

    def get(self, sizes: Mapping[bytes, int]) -> dict[bytes, Bytes]:
        """Those of the keys that are there, whole and of the size that is expected, as parts of the mapped file."""
        found, wanted = {}, list(sizes)
        for first in range(0, len(wanted), KEYS_AT_ONCE):
            keys = wanted[first : first + KEYS_AT_ONCE]
            places = ",".join("?" * len(keys))
            query = f"SELECT key, start, size, checksum FROM entries WHERE key IN ({places})"
            for key, start, size, checksum in self._index.execute(query, keys).fetchall():
                entry = self._mapped(start, size)
                if size == sizes[key] and len(entry) == size and checksum_of(key, entry) == checksum:
                    found[key] = entry
                elif key not in self._broken:
                    self._broken.add(key)
                    self.damaged += 1
        return found

    def _mapped(self, start: int, size: int) -> Bytes:
        """Bytes of the file, fewer where it ends before."""
        if start + size > len(self._map) and (length := os.fstat(self._file).st_size):
            self._map = np.asarray(np.memmap(self.folder / "entries.bin", np.uint8, "r", shape=(length,)))
        return self._map[start : start + size]

    def add(self, new: Mapping[bytes, Bytes]) -> set[bytes]:
        """Keep what fits, but what another process has kept meanwhile; the keys that are there now.

        A disk that is full, or a lock that is not to be had, keeps nothing; `full` says so.
        """
        try:
            with self._writing() as index:
                return self._append(index, new)
        except (OSError, sqlite3.OperationalError) as error:
            self.full = f"it cannot be written ({error})"
            return set()

    def _append(self, index: sqlite3.Connection, new: Mapping[bytes, Bytes]) -> set[bytes]:
        end, kept = self.used, set()
        for key, entry in new.items():
            if key in self._broken:  # its bytes may be mapped by others, so the new ones go elsewhere
                index.execute("UPDATE entries SET key = NULL WHERE key = ?", (key,))
            elif index.execute("SELECT 1 FROM entries WHERE key = ?", (key,)).fetchone():
                kept.add(key)
                continue
            if end + len(entry) > self.limit:
                self.full = "its size is reached"
                continue
            write_at(self._file, entry, end)
            index.execute("INSERT INTO entries VALUES (?, ?, ?, ?)", (end, len(entry), key, checksum_of(key, entry)))
            self._broken.discard(key)
            end += len(entry)
            kept.add(key)
        return kept

    def close(self) -> None:
        """Close the files; the entries stay."""
        self._index.close()
        os.close(self._file)
        self._map = np.empty(0, np.uint8)


def checksum_of(key: bytes, entry: Bytes) -> bytes:
    """Eight bytes."""
    digest = xxhash.xxh3_64(key)
    digest.update(entry.data)
    return digest.digest()


def write_at(file: int, entry: Bytes, start: int) -> None:
    """Write all of the bytes: one call may write fewer."""
    done = 0
    while done < len(entry):
        done += os.pwrite(file, entry[done:].data, start + done)

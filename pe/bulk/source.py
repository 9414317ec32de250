"""The files of an input, by their names: a path, a folder, a pattern, here or at any address that fsspec knows."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import fsspec
import pyarrow as pa
from fsspec.core import url_to_fs

from pe.data.records import DAMAGED, DataError

BUFFER = 1 << 20
"""Bytes that are read at once."""
KIND = re.compile(r".*\.(?:(parquet)|(jsonl|csv|tsv|txt)(?:\.(?:gz|xz|bz2))?)", re.IGNORECASE | re.DOTALL)
"""A file's name, and what it holds."""
EXPECTED = ".parquet, or .jsonl, .csv, .tsv, .txt (each also .gz, .xz, .bz2)"
HIDDEN = re.compile(r"(^|/)[._]")
VERSIONS = ("ETag", "etag", "md5Hash", "mtime", "last_modified", "LastModified", "created")
"""Where file systems say which version of a file is there."""
HUB, HUB_FILES = "hf://", "hf://datasets/"


@dataclass(frozen=True)
class SourceFile:
    """A file of the input: its address, bytes, and what changes when it is written anew."""

    path: str
    size: int
    version: str

    @property
    def kind(self) -> str:
        """parquet, jsonl, csv, tsv or txt."""
        return kind_of(self.path)


def kind_of(path: str) -> str:
    """What a file holds by its name; '' for what is not read."""
    found = KIND.fullmatch(path)
    return (found[1] or found[2]).lower() if found else ""


def file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it.

    Raises:
        DataError: fsspec does not know the protocol, or its package is not installed.
    """
    try:
        return cast(tuple[Any, str], url_to_fs(address))
    except (ImportError, ValueError) as error:
        raise DataError(f"{address}: the address cannot be used: {error}") from error


def address_of(system: Any, path: str) -> str:
    """The address of a path, which on the local disk is the path itself."""
    return cast(str, system.unstrip_protocol(path)).removeprefix("file://")


def matching(system: Any, pattern: str) -> list[dict[str, Any]]:
    """What a file system says of the files and folders that a pattern fits.

    Raises:
        DataError: it is none.
    """
    try:
        return list(system.glob(pattern, detail=True).values())
    except ValueError as error:
        raise DataError(f"{pattern}: the pattern cannot be used: {error}") from error


def find(address: str) -> list[SourceFile]:
    """The files of an address, sorted by name: one file, all of a folder, or those that a pattern fits.

    In a folder what starts with a dot or `_` is passed over, and so is what its name does not know as rows.

    Raises:
        DataError: nothing is there, or files of several kinds.
    """
    if address.startswith(HUB) and not address.startswith(HUB_FILES):
        raise DataError(f"{address}: expected files, such as {HUB_FILES}OWNER/NAME/*.parquet, got the name of a set")
    system, path = file_system(address)
    if system.isdir(path):
        found = system.find(path, detail=True)
        infos = [info for name, info in found.items() if kind_of(name) and not HIDDEN.search(name.removeprefix(path))]
    elif system.exists(path):
        infos = [system.info(path)]
    else:
        infos = [info for info in matching(system, path) if info["type"] != "directory"]
    files = [
        SourceFile(
            address_of(system, info["name"]),
            info["size"] or 0,
            next((str(info[key]) for key in VERSIONS if info.get(key)), ""),
        )
        for info in infos
    ]
    if not files:
        raise DataError(f"{address}: expected a file, a folder or a pattern of {EXPECTED}, found none")
    if other := next((file.path for file in files if not file.kind), None):
        raise DataError(f"{other}: expected {EXPECTED}, whose rows can be cut into shards")
    if len(kinds := sorted({file.kind for file in files})) > 1:
        raise DataError(f"{address}: expected files of one kind, got .{' and .'.join(kinds)}; give a pattern")
    return sorted(files, key=lambda file: file.path)


@contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed.

    Raises:
        DataError: they cannot be read.
    """
    try:
        with fsspec.open(path, "rb", compression="infer") as stream, io.BufferedReader(stream, BUFFER) as buffered:
            yield cast(BinaryIO, buffered)
    except (*DAMAGED, pa.ArrowException) as error:
        raise DataError(f"{path}: the file cannot be read: {error}") from error

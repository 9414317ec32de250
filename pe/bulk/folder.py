"""The folder that shards are written to, at any address of fsspec: `part-000000.parquet`, ..., `_plan.json`, and
`_manifest.json`, which lists the shards that are whole.

Every file is written under `_writing/` and moved to its place. Readers of data sets pass over names that begin with
`_`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, cast
from uuid import uuid4

from pe.bulk.plan import Plan
from pe.bulk.source import SourceFile, address_of, file_system
from pe.data.records import DataError

PLAN, MANIFEST, WRITING = "_plan.json", "_manifest.json", "_writing"
OURS = re.compile(rf"{PLAN}|{MANIFEST}|{WRITING}|part-\d{{6,}}\.parquet")


@dataclass(frozen=True)
class Finished:
    """A shard that is whole: its file, rows, bytes, and how many of its texts were cut to the embedder's length."""

    name: str
    rows: int
    bytes: int
    truncated: int


class ShardFolder:
    """Where an encoding goes."""

    def __init__(self, address: str) -> None:
        self.system, self.path = file_system(address)
        self.address = address_of(self.system, self.path)

    def _place(self, *names: str) -> str:
        return "/".join([self.path.rstrip("/"), *names])

    def _sizes(self) -> dict[str, int]:
        """What is in the folder, with its bytes; nothing where there is no folder."""
        if not self.system.exists(self.path):
            return {}
        self.system.invalidate_cache()
        found = self.system.ls(self.path, detail=True)
        return {info["name"].rstrip("/").rpartition("/")[2]: info["size"] or 0 for info in found}

    def check(self, source: str, files: Sequence[SourceFile]) -> None:
        """Refuse to write where something else is, or into the input.

        Raises:
            FileExistsError: a file, a folder with files that no encoding wrote, or one that the input holds.
        """
        if self.system.isfile(self.path):
            raise FileExistsError(f"{self.address}: expected a folder, got a file; name another")
        inside = [file.path for file in files if file.path.startswith(f"{self.address}/")]
        if inside or f"{self.address}/".startswith(f"{address_of(*file_system(source))}/"):
            raise FileExistsError(f"{self.address}: expected a folder apart from the input, {source}; name another")
        names = self._sizes().keys()
        others = [name for name in sorted(names) if not OURS.fullmatch(name)]
        if others or (PLAN not in names and names - {WRITING}):
            first = (others or sorted(names))[0]
            raise FileExistsError(f"{self.address}: holds other files, {first!r} first; name a folder of its own")

    @contextmanager
    def written(self, name: str) -> Iterator[BinaryIO]:
        """A file of the folder, which is there when it is whole."""
        self.system.makedirs(self._place(WRITING), exist_ok=True)
        own = self._place(WRITING, f"{uuid4().hex}-{name}")
        with self.system.open(own, "wb") as file:
            yield cast(BinaryIO, file)
        self.system.mv(own, self._place(name))

    def size(self, name: str) -> int:
        """Bytes of a file."""
        return cast(int, self.system.size(self._place(name)))

    def _read(self, name: str) -> Any:
        try:
            return json.loads(self.system.cat_file(self._place(name)))
        except ValueError as error:
            raise DataError(f"{self.address}/{name}: damaged ({error}); write to another folder") from error

    def _write(self, name: str, content: Any) -> None:
        with self.written(name) as file:
            file.write(json.dumps(content).encode())

    def plan(self) -> Plan | None:
        """The plan of the encoding that is there.

        Raises:
            DataError: it is damaged, or of another format.
        """
        if not self.system.exists(self._place(PLAN)):
            return None
        try:
            return Plan.from_dict(self._read(PLAN))
        except ValueError as error:
            raise DataError(f"{self.address}/{PLAN}: {error}") from error

    def finished(self) -> dict[str, Finished]:
        """The shards of the manifest that are there with all their bytes, by name."""
        if not self.system.exists(self._place(MANIFEST)):
            return {}
        sizes = self._sizes()
        listed = [Finished(**item) for item in self._read(MANIFEST)["finished"]]
        return {shard.name: shard for shard in listed if sizes.get(shard.name) == shard.bytes}

    def start(self, plan: Plan) -> None:
        """Remove the shards of an earlier encoding, and write the plan of the next."""
        self._remove(MANIFEST)
        for name in self._sizes().keys() - {PLAN}:
            self._remove(name)
        self._write(PLAN, plan.to_dict())

    def clean(self) -> None:
        """Remove what writers that were killed have left."""
        self._remove(WRITING)

    def _remove(self, name: str) -> None:
        if self.system.exists(self._place(name)):
            self.system.rm(self._place(name), recursive=True)

    def record(self, finished: Mapping[str, Finished]) -> None:
        """Write the manifest."""
        self._write(MANIFEST, {"finished": [asdict(shard) for _, shard in sorted(finished.items())]})

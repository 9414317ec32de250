"""The folder that shards are written to, at any address of fsspec: `part-000000.parquet`, ..., `_plan.json`, which says
what each will hold, and `_manifest.json`, which lists those that are whole.

Every file is written under `_writing/` and moved to its place. Readers of data sets pass over names that begin with
`_`.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Self, TypeVar, cast
from uuid import uuid4

import pyarrow as pa

from pe.bulk.rows import Cut, Scan, joined
from pe.bulk.source import SourceFile, address_of, file_system
from pe.data.records import DataError

T = TypeVar("T")
PLAN, MANIFEST, WRITING = "_plan.json", "_manifest.json", "_writing"
OURS = re.compile(rf"{PLAN}|{MANIFEST}|{WRITING}|part-\d{{6,}}\.parquet")
FORMAT = 1
"""Of `_plan.json`."""
Job = dict[str, Any]
"""What must be the same when an encoding goes on, as JSON: the embedder's content, options, files of the input."""


@dataclass(frozen=True)
class Shard:
    """Rows of one file, which become one file."""

    number: int
    file: SourceFile
    cut: Cut

    @property
    def name(self) -> str:
        return f"part-{self.number:06d}.parquet"


@dataclass(frozen=True)
class Plan:
    """The shards of an encoding, in the order of the input's rows, and the columns that all of them have."""

    job: Job
    shards: Sequence[Shard]
    schema: pa.Schema

    @property
    def rows(self) -> int:
        return sum(shard.cut.rows for shard in self.shards)

    @classmethod
    def of(cls, job: Job, files: Sequence[SourceFile], scans: Iterable[Scan]) -> Self:
        """Shards of the files in their order, whatever the order of the scans.

        Raises:
            DataError: no rows, or columns that do not go together.
        """
        by_path = {scan.path: scan for scan in scans}
        places = [(file, cut) for file in files for cut in by_path[file.path].cuts]
        if not places:
            raise DataError(f"{files[0].path}: expected at least one row, got none in {len(files)} files")
        schema = joined((file.path, by_path[file.path].schema) for file in files)
        return cls(job, [Shard(number, *place) for number, place in enumerate(places)], schema)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `from_dict` reads it."""
        place = {file["path"]: number for number, file in enumerate(self.job["files"])}
        rows = [[place[shard.file.path], shard.cut.start, shard.cut.number, shard.cut.rows] for shard in self.shards]
        schema = base64.b64encode(self.schema.serialize()).decode()
        return {"format": FORMAT, "job": self.job, "shards": rows, "schema": schema}

    @classmethod
    def from_dict(cls, saved: Any) -> Self:
        """What `to_dict` gave.

        Raises:
            ValueError: another format.
        """
        if not isinstance(saved, dict) or saved.get("format") != FORMAT:
            raise ValueError(f"expected a plan of format {FORMAT}, got another")
        files = [SourceFile(**file) for file in saved["job"]["files"]]
        shards = [
            Shard(number, files[place], Cut(*numbers)) for number, (place, *numbers) in enumerate(saved["shards"])
        ]
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(saved["schema"])))
        return cls(saved["job"], shards, schema)


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
            raise FileExistsError(f"{self.address}: expected a folder outside of the input, {source}; name another")
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

    def _read(self, name: str, made_of: Callable[[Any], T]) -> T | None:
        """What is made of a JSON file; None where there is none.

        Raises:
            DataError: it is damaged, or of another version.
        """
        if not self.system.exists(self._place(name)):
            return None
        try:
            return made_of(json.loads(self.system.cat_file(self._place(name))))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"{self.address}/{name}: damaged, or of another version ({error!r}); write to another folder"
            ) from error

    def _write(self, name: str, content: Any) -> None:
        with self.written(name) as file:
            file.write(json.dumps(content).encode())

    def plan(self) -> Plan | None:
        """The plan of the encoding that is there; errors as of `_read`."""
        return self._read(PLAN, Plan.from_dict)

    def finished(self) -> dict[str, Finished]:
        """The shards of the manifest that are there with all their bytes, by name; errors as of `_read`."""
        listed = self._read(MANIFEST, lambda content: [Finished(**item) for item in content["finished"]])
        sizes = self._sizes()
        return {shard.name: shard for shard in listed or () if sizes.get(shard.name) == shard.bytes}

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

"""What is to be encoded, and in which shards: a function of the input, the embedder and the options alone."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import pyarrow as pa

from pe.bulk.rows import Cut, Scan, joined
from pe.bulk.source import SourceFile
from pe.data.records import DataError

FORMAT = 1
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


def job_of(files: Sequence[SourceFile], options: Job) -> Job:
    """What tells an encoding from another: its options, and its files with their versions."""
    return options | {"files": [asdict(file) for file in files]}

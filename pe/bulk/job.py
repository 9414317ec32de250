"""An encoding of many rows from beginning to end: plan, shards that are missing, manifest; killed, it goes on there."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from pe.bulk.engines import Engine, Workers, on_this_process
from pe.bulk.folder import Finished, Job, Plan, ShardFolder
from pe.bulk.rows import scan
from pe.bulk.shard import Embedding, ShardEncoder
from pe.bulk.source import SourceFile, find
from pe.runs.folder import differences, flatten
from pe.saving import Summary

SHARD_ROWS = 65_536
SHOWN = 3
"""Differences that a message names."""


def encode_to_shards(
    source: str,
    output: str,
    options: Embedding,
    saved: Summary,
    *,
    engine: Engine,
    workers: Workers,
    shard_rows: int,
    overwrite: bool,
) -> str:
    """Encode what is missing of an input in the shards of a folder, and give a sentence on what is there then.

    Args:
        source: file, folder or pattern, at any address of fsspec: see `pe/bulk/source.py`.
        output: the folder, at such an address too.
        options: how to embed.
        saved: of the embedder that `options` names.
        engine: where the work is done.
        workers: by whom, on a cluster.
        shard_rows: rows of a shard; the last of each file may have fewer.
        overwrite: replace an encoding of something else, or by something else.

    Raises:
        DataError: the input cannot be read or cut, or has rows without a text; found before anything is written,
            except in parquet without statistics.
        FileExistsError: the folder holds something else.
        ValueError: see `ShardEncoder` and the engine.
    """
    files, folder = find(source), ShardFolder(output)
    folder.check(source, files)
    job = job_of(files, options, saved, shard_rows)
    plan, finished = folder.plan(), folder.finished()
    if plan is None or plan.job != job:
        if plan is not None and finished and not overwrite:
            raise FileExistsError(f"{folder.address}: {changes(plan.job, job)}")
        plan, finished = planned(job, files, options, saved, engine, shard_rows), {}
        folder.start(plan)
    folder.clean()
    missing = [shard for shard in plan.shards if shard.name not in finished]
    make = partial(ShardEncoder, options, plan.schema, folder.address)
    done = sum(shard.rows for shard in finished.values())
    with tqdm(total=plan.rows, initial=done, unit="text", desc=f"{len(plan.shards)} shards") as bar:
        for shard in recorded(folder, finished, engine(make, missing, workers)):
            bar.update(shard.rows)
    folder.clean()
    return report(folder, plan, finished, len(missing))


def recorded(folder: ShardFolder, finished: dict[str, Finished], new: Iterable[Finished]) -> Iterator[Finished]:
    """Pass shards on as they are finished, and write the manifest, a long one in a twentieth of the time at most.

    What a killed process has finished since it wrote is done again.
    """
    due = 0.0
    try:
        for shard in new:
            finished[shard.name] = shard
            start = time.monotonic()
            if start >= due:
                folder.record(finished)
                due = time.monotonic() + 19 * (time.monotonic() - start)
            yield shard
    finally:
        folder.record(finished)


def job_of(files: Sequence[SourceFile], options: Embedding, saved: Summary, shard_rows: int) -> Job:
    """What tells an encoding from another: whatever changes a result by more than rounding."""
    names = ("side", "field", "dimensions", "precision", "dtype")
    own = {name: getattr(options, name) for name in names}
    asked = {"shard_rows": shard_rows, "model": saved.content, "instructions": list(options.instructions)}
    return asked | own | {"files": [asdict(file) for file in files]}


def changes(before: Job, now: Job) -> str:
    """Why an encoding cannot go on as another."""
    changed = differences(flatten(before), flatten(now))
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return (
        f"holds another encoding; changed: {', '.join(changed[:SHOWN])}{more}; name another folder, or replace it with"
        " --overwrite=true"
    )


def planned(
    job: Job, files: list[SourceFile], options: Embedding, saved: Summary, engine: Engine, shard_rows: int
) -> Plan:
    """Read the input once, and cut it.

    Raises:
        DataError: see `pe.bulk.rows.scan`.
        ValueError: the input has a column of an embedding's name, or one that parquet cannot hold.
    """
    read = engine if len(files) > 1 else on_this_process  # of one file a cluster reads no more at once
    scans = read(lambda: partial(scan, field=options.field, shard_rows=shard_rows), files, Workers())
    plan = Plan.of(job, files, scans)
    check_columns(plan.schema, options, saved)
    return plan


def check_columns(schema: pa.Schema, options: Embedding, saved: Summary) -> None:
    """Refuse columns that no shard could hold.

    Raises:
        ValueError: one has the name of an embedding's, or parquet does not know its type.
    """
    written = options.written(schema, saved.dimensions or 1)
    if taken := next((name for name in written.names[len(schema) :] if name in schema.names), None):
        raise ValueError(f"input: expected no column {taken!r}, which the output has, got one")
    try:
        pq.ParquetWriter(io.BytesIO(), written).close()
    except pa.ArrowException as error:
        raise ValueError(f"input: a column cannot be written as parquet ({error}); leave it out") from error


def report(folder: ShardFolder, plan: Plan, finished: Mapping[str, Finished], new: int) -> str:
    """The last line of a run."""
    truncated = sum(shard.truncated for shard in finished.values())
    size = sum(shard.bytes for shard in finished.values())
    return (
        f"{folder.address}: {plan.rows:,} rows in {len(plan.shards):,} shards ({new:,} new), {size / 2**20:,.1f} MiB;"
        f" {truncated:,} of {plan.rows:,} texts truncated"
    )

"""What bulk encoding promises, checked on a model of yours: killed it goes on, and memory does not grow with the rows.

`python scripts/bulk.py kill MODEL FOLDER [--engine ray] [--rows 100000] [--kills 2]` encodes rows in one process, then
again under another that it kills and starts anew, and compares the two. `python scripts/bulk.py memory MODEL FOLDER
--rows 10000,1000000` says how much memory one process took at most.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

WORDS = ("river", "moon", "bread", "glass", "horse", "train", "cloud", "stone", "paper", "honey")
OPTIONS = ("--instruction=Find the same thing", "--precision=int8")


def write_rows(folder: Path, rows: int, files: int = 2) -> Path:
    """Short texts with an id, as JSON Lines."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for place in range(files):
        with (folder / f"{place}.jsonl").open("w", encoding="utf-8") as file:
            for number in range(place, rows, files):
                text = " ".join(draw.choices(WORDS, k=draw.randint(1, 5)))
                file.write(json.dumps({"id": number, "text": text}) + "\n")
    return folder


def command(model: str, source: Path, output: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "pe.encode", model, str(source), str(output), *OPTIONS, *options]


def finished(output: Path) -> dict[str, float]:
    """The shards of the manifest, and when each was written."""
    manifest = output / "_manifest.json"
    listed = json.loads(manifest.read_text(encoding="utf-8"))["finished"] if manifest.exists() else []
    return {shard["name"]: (output / shard["name"]).stat().st_mtime for shard in listed}


def killed(line: Sequence[str], output: Path, more: int) -> dict[str, float]:
    """Start a command, kill it when it has finished `more` further shards, and give those that it left.

    Raises:
        RuntimeError: it ended before.
    """
    wanted = len(finished(output)) + more
    process = subprocess.Popen(line, stderr=subprocess.DEVNULL)
    while len(finished(output)) < wanted:
        if process.poll() is not None:
            raise RuntimeError(f"{' '.join(line)}: ended with {process.returncode} before it could be killed")
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return finished(output)


def kill_and_compare(model: str, folder: Path, rows: int, shard_rows: int, kills: int, engine: Sequence[str]) -> str:
    """See the top of this module.

    Raises:
        RuntimeError: rows differ, or a finished shard was written again.
    """
    source, whole, broken = write_rows(folder / "in", rows), folder / "whole", folder / "killed"
    size = f"--shard_rows={shard_rows}"
    subprocess.run(command(model, source, whole, size), check=True)
    line = command(model, source, broken, size, *engine)
    shards = len(finished(whole))
    left: dict[str, float] = {}
    counts = []
    for _ in range(kills):
        now = killed(line, broken, max(1, shards // (kills + 2)))
        if any(now[name] != written for name, written in left.items()):
            raise RuntimeError(f"{broken}: a finished shard was written again")
        left = now
        counts.append(len(now))
    subprocess.run(line, check=True)
    last = finished(broken)
    if any(last[name] != written for name, written in left.items()):
        raise RuntimeError(f"{broken}: a finished shard was written again")
    if not pq.read_table(whole).equals(pq.read_table(broken)):
        raise RuntimeError(f"{broken}: its rows are not those of {whole}")
    return f"{rows:,} rows, {shards} shards, killed with {counts} finished: equal to one process, row for row"


def peak_mib(line: Sequence[str]) -> tuple[float, float]:
    """MiB that a command took at most, and its seconds."""
    start = time.monotonic()
    process = subprocess.Popen(line)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(line)}: ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss / 1024, time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kill", "memory"])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default="100000", help="one number, or several with commas")
    parser.add_argument("--shard_rows", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--engine", default="local")
    given = parser.parse_args()
    for rows in map(int, given.rows.split(",")):
        if given.what == "kill":
            engine = [f"--engine={given.engine}"]
            said = kill_and_compare(given.model, given.folder, rows, given.shard_rows, given.kills, engine)
        else:
            source, output = write_rows(given.folder / f"in-{rows}", rows), given.folder / f"out-{rows}"
            mib, seconds = peak_mib(command(given.model, source, output, f"--shard_rows={given.shard_rows}"))
            said = f"{rows:,} rows: {mib:,.0f} MiB at most, {seconds:,.0f} s"
        print(said)


if __name__ == "__main__":
    main()

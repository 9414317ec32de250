"""What the pages of benchmarks share: tables, and the sentence that says where a record was taken."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import records
from bench.records import Record

NOT_YET = "Not yet measured."


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def dtype_of(record: Record) -> str:
    """Type of the frozen weights; `auto` is float32 on a CPU and the checkpoint's own on a GPU."""
    dtype, on_gpu = record.get("dtype", "auto"), record.get("hardware", {}).get("gpu")
    return "float32" if dtype == "auto" and not on_gpu else str(dtype)


def hardware(record: Record) -> str:
    """What a record was taken on."""
    found = record["hardware"]
    on_gpu = record.get("device", "cpu") != "cpu"
    if on_gpu:
        return f"{found['gpu']}, driver {found['driver']}"
    instructions = f" ({found['instructions']})" if "instructions" in found else ""
    return f"{found['cpu']}{instructions}, {several(found['cores'], 'core')}"


def several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def where(record: Record) -> str:
    """Hardware, versions, commit and date of a record, in a sentence, and what is no longer right about it."""
    on = hardware(record)
    if record.get("device", "cpu") == "cpu":
        on += f", {several(record['hardware']['threads'], 'thread')}"
        on += ", huge pages" if record["hardware"].get("huge_pages") else ""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    commit = f"commit {record['commit']}" if record["commit"] else "no commit"
    if record["dirty"]:
        commit += " with changes"
    return f"{on}; {dtype_of(record)}; {versions}; {commit}; {record['date'][:10]}" + (
        f"; {remark}" if (remark := outdated(record)) else ""
    )


def outdated(record: Record) -> str:
    """What was left out of the steps that a record timed; nothing of those that were timed as today."""
    is_current = record.get("kind") not in ("step", "scaling") or record.get("protocol", 1) == records.PROTOCOL
    return "" if is_current else "timed without masks, scheduler and checks; to be taken again"


def machines(rows: Sequence[Record]) -> dict[str, Record]:
    """The newest record of every machine, in the order of its first one."""
    return {hardware(row): row for row in sorted(rows, key=lambda row: str(row["date"]))}


def letters(rows: Sequence[Record]) -> dict[str, str]:
    """A letter for every machine, for columns that mix them."""
    return dict(zip(machines(rows), string.ascii_uppercase, strict=False))


def origins(rows: Sequence[Record], marks: Mapping[str, str] | None = None) -> str:
    """Where rows were taken, a paragraph for every machine, behind its letter of `marks`."""
    shown = [(f"{marks[name]}: " if marks else "", row) for name, row in machines(rows).items()]
    return "\n\n".join(f"{mark}{where(row)}." for mark, row in shown)


def gpu_line(kind: str, folder: Path) -> list[str]:
    on_gpu = any(record.get("device", "cpu") != "cpu" for record in records.read(kind, folder))
    return [] if on_gpu else ["GPU: not yet measured."]


def share(base: float | None, value: float | None) -> str:
    return f"{value / base:.2f}" if base and value else "-"

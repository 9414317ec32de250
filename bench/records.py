"""Records of measurements: JSON Lines under `bench/results/`, one file a kind, newest last.

Every record says what was measured, on which hardware, with which versions, from which commit, and when.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
RENDERED = ("bench/results", "bench/plots", "bench/tables", "BENCHMARKS.md")
"""What measuring and rendering write: a commit is clean whatever they hold."""
PROTOCOL = 2
"""How steps are taken: 2 as in `pe.train`; 1, in records without one, without masks, scheduler and checks."""
PACKAGES = ("torch", "transformers", "peft", "triton", "mteb", "flash-attn", "flash-attn-3")
Record = dict[str, Any]


@functools.cache
def hardware() -> Record:
    """Processor, its instructions, cores, memory and its pages, and the GPU with its driver where there is one."""
    found: Record = {
        "cpu": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "huge_pages": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1",
        "gpu": None,
    }
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found["memory_gib"] = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "driver": _driver(), "cuda": torch.version.cuda}
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None


@functools.cache
def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def origin() -> Record:
    """Commit, and whether anything but results differs from it; None outside a git checkout.

    A copy without its history takes both from the environment: PE_COMMIT, and PE_DIRTY=1 where it differs.
    """
    if commit := os.environ.get("PE_COMMIT"):
        return {"commit": commit[:12], "dirty": os.environ.get("PE_DIRTY") == "1"}
    status = _git("status", "--porcelain", "--", ".", *(f":!{path}" for path in RENDERED))
    return {"commit": _git("rev-parse", "--short=12", "HEAD"), "dirty": None if status is None else bool(status)}


@functools.cache
def run_id() -> str:
    """What the records of one process have in common: its start, UTC."""
    return now()


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    low, middle, high = np.percentile(np.asarray(values, dtype=float), (20, 50, 80))
    return {"median": round(float(middle), 3), "p20": round(float(low), 3), "p80": round(float(high), 3)}


def append(kind: str, records: Iterable[Record], folder: Path | None = None) -> Path:
    """Add records to the file of their kind, completed by hardware, versions, commit and date."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.jsonl"
    common = {"hardware": hardware(), "versions": versions(), **origin(), "run": run_id(), "date": now()}
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({"kind": kind, **record, **common}, ensure_ascii=False) + "\n")
    return path


def read(kind: str, folder: Path | None = None) -> list[Record]:
    """All records of a kind, oldest first."""
    path = (folder or RESULTS) / f"{kind}.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def newest(kind: str, by: Sequence[str], folder: Path | None = None) -> list[list[Record]]:
    """The records of the newest run for each combination of the fields `by`, as groups in order of appearance.

    Rows of one group come from one run, so their ratios compare what was measured side by side.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in read(kind, folder):
        key = tuple(record.get(name) for name in by)
        group = groups.setdefault(key, [])
        if group and group[-1]["run"] != record["run"]:
            group.clear()
        group.append(record)
    return list(groups.values())

"""The tables of a training step: its time, its memory, and both as shares of LoRA's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import records
from bench.cases import BASELINE, CASES, MEASURED, VARIANTS
from bench.lengths import DISTRIBUTIONS
from bench.markdown import NOT_YET, gpu_line, grid, hardware, outdated, share, where
from bench.memory import above
from bench.records import Record
from bench.step import use, utilisation

BASES = {BASELINE: "(a)", "lora-checkpointed": "(b)", "lora-packed": "(c)"}
CLAIMED = {"pe-suffix": "suffix alone", "pe-suffix-weighted": "default"}
"""Of the table of shares: the plain form, and the recipes' default, which has a reader and a weighted skip besides."""


def measured(kind: str, folder: Path) -> list[list[Record]]:
    """Of every case, distribution, hardware and type the newest of the fullest runs, in the order of the page.

    The fullest is, of those of the latest protocol, the one with the most ways to train: a run that was cut short takes
    no row away.
    """
    runs: dict[tuple[str | None, ...], dict[str, list[Record]]] = {}
    for record in records.read(kind, folder):
        if record["case"] in MEASURED and record["variant"] in VARIANTS:
            hardware = record["hardware"]["gpu"] if record["device"] != "cpu" else None
            key = (record["case"], record["distribution"], hardware, record["dtype"])
            runs.setdefault(key, {}).setdefault(record["run"], []).append(record)
    groups = [max(reversed(group.values()), key=fullness) for group in runs.values()]
    cases, distributions = list(CASES), list(DISTRIBUTIONS)
    return sorted(
        groups, key=lambda group: (cases.index(group[0]["case"]), distributions.index(group[0]["distribution"]))
    )


def fullness(run: Sequence[Record]) -> tuple[int, int]:
    """The protocol of a run and its ways to train: the larger one is shown."""
    return run[0].get("protocol", 1), len(in_order(run))


def in_order(group: Sequence[Record]) -> list[Record]:
    """One record a variant, the newest, in the order of the variants."""
    latest = {record["variant"]: record for record in group}
    return [latest[name] for name in VARIANTS if name in latest]


def heading(record: Record) -> str:
    sizes = record["sizes"]
    texts = f"{sizes['queries']} queries and as many positives, {sizes['tokens']:,} text tokens"
    padding = f"{sizes['padding_share']:.0%} padding in (a) and (b)"
    instruction = "reads the instruction" if sizes["instructed"] else "reads no instruction"
    return f"**{place(record)}** ({sizes['backbone']}; {texts}, {padding}; LoRA {instruction})"


def place(record: Record) -> str:
    on_gpu = "" if record["device"] == "cpu" else f", {record['hardware']['gpu']}"
    dtype = "" if record["dtype"] == "float32" else f", {record['dtype']}"
    return f"{record['case']}, {record['distribution']}{on_gpu}{dtype}"


def timed(group: Sequence[Record]) -> dict[str, Record]:
    """The records that have a time, by variant."""
    return {record["variant"]: record for record in group if "ms" in record}


def ratio(base: Record | None, record: Record | None) -> str:
    """How many steps of `record` fit into one of `base`."""
    return f"{base['ms']['median'] / record['ms']['median']:.2f}" if base and record else "-"


def work(record: Record) -> str:
    """FLOPs of a step, its rate as a share of the matrix product's, and where there is one of the data sheet's."""
    found = utilisation(record)
    return f"{record['flops'] / 1e9:,.0f}, {use(record):.0%}" + (f", MFU {found}" if found != "-" else "")


def render_step(folder: Path) -> str:
    """Step times of every case and distribution, with the ratios to LoRA (a), (b) and (c)."""
    parts = []
    for group in measured("step", folder):
        rows, by_name = [], timed(group)
        for record in in_order(group):
            if "failed" in record:
                rows.append(
                    [VARIANTS[record["variant"]].title, f"failed: {record['failed']}", *[""] * (3 + len(BASES))]
                )
                continue
            ms = record["ms"]
            rate = 1000 * record["sizes"]["tokens"] / ms["median"]
            rows.append(
                [
                    VARIANTS[record["variant"]].title,
                    f"{ms['median']:,.0f}",
                    f"{ms['p20']:,.0f} to {ms['p80']:,.0f}",
                    f"{rate:,.0f}",
                    work(record) if "flops" in record else "-",
                    *(ratio(by_name.get(base), record) for base in BASES),
                ]
            )
        times = [f"times as fast as {letter}" for letter in BASES.values()]
        header = ["", "ms a step", "20th to 80th percentile", "text tokens/s", "GFLOP a step, use", *times]
        table = grid(header, rows)
        parts.append(f"{heading(group[0])}\n\n{table}\n\n{where(group[0])}; {group[0]['rounds']} rounds.")
    return "\n\n".join([*(parts or [NOT_YET]), *gpu_line("step", folder)])


def render_memory(folder: Path) -> str:
    """Peaks of every configuration, each from a process of its own."""
    parts = []
    for group in measured("memory", folder):
        found = in_order(group)
        base = next((above(r["memory"]) for r in found if r["variant"] == BASELINE), None)
        on_gpu = found[0]["device"] != "cpu"
        rows = []
        for record in found:
            memory, title = record["memory"], VARIANTS[record["variant"]].title
            if "failed" in memory:
                rows.append([title, f"failed: {memory['failed']}", "", "", "", "", ""])
                continue
            own = ("allocated_mib", "reserved_mib") if on_gpu else ("live_mib", "above_mib")
            cells = [memory.get(name) for name in (*own, "loaded_mib", "peak_mib")]
            shown = ["-" if cell is None else f"{cell:,.0f}" for cell in cells]
            rows.append([title, f"{above(memory):,.0f}", share(base, above(memory)), *shown])
        more = ["allocated", "reserved"] if on_gpu else ["live tensors above it", "process above it"]
        header = ["", "above the loaded model, MiB", "share of (a)", *more, "loaded", "whole process"]
        table = grid(header, rows)
        gaps = [record["memory"].get("longest_gap_ms", 0.0) for record in found]
        interval = next((r["memory"]["interval_ms"] for r in found if "interval_ms" in r["memory"]), 0.0)
        sampling = f"sampled every {interval:g} ms (longest gap {max(gaps):g} ms)"
        parts.append(f"{heading(group[0])}\n\n{table}\n\n{where(group[0])}; {sampling}.")
    return "\n\n".join([*(parts or [NOT_YET]), *gpu_line("memory", folder)])


def render_shares(folder: Path) -> str:
    """How many times as fast as each form of LoRA ours is, and its share of the memory of (a): a row a case."""
    steps, memory = ({place(group[0]): group for group in measured(kind, folder)} for kind in ("step", "memory"))
    rows, shown = [], []
    for key in dict.fromkeys([*steps, *memory]):
        times = timed(steps.get(key, []))
        peaks = {record["variant"]: above(record["memory"]) for record in memory.get(key, [])}
        faster = [ratio(times.get(base), times.get(name)) for name in CLAIMED for base in BASES]
        shares = [share(peaks.get(BASELINE), peaks.get(name)) for name in CLAIMED]
        if set(found := [*faster, *shares]) != {"-"}:
            rows.append([key, *found])
            shown += [group[0] for group in (steps.get(key), memory.get(key)) if group]
    ratios = [f"{name}: times as fast as {letter}" for name in CLAIMED.values() for letter in BASES.values()]
    table = grid(["", *ratios, *(f"{name}: memory, share of (a)" for name in CLAIMED.values())], rows)
    machines = [f"{machine}." for machine in dict.fromkeys(map(hardware, shown))]
    remarks = [f"Steps: {remark}." for remark in dict.fromkeys(map(outdated, shown)) if remark]
    return "\n\n".join([table, *machines, *remarks] if rows else [NOT_YET])

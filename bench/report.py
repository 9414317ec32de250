"""`python -m bench.report [--check]`

Renders the tables of BENCHMARKS.md from the newest records under `bench/results/`, between the markers
`<!-- begin:NAME -->` and `<!-- end:NAME -->`; the prose around them is written by hand. `--check` changes nothing and
exits with 1 where the page is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import records
from bench.cases import BASELINE, CASES, MEASURED, VARIANTS
from bench.lengths import DISTRIBUTIONS
from bench.markdown import NOT_YET, gpu_line, grid, share, where
from bench.records import ROOT, Record

PAGE = ROOT / "BENCHMARKS.md"
CHECKPOINTED = "lora-checkpointed"
CLAIMED = {"pe-suffix": "without reader", "pe-suffix-reader": "with reader"}
LORA = "PEFT LoRA on the same backbone, texts and batch, padded (a) and with activation checkpointing besides (b)"
PAPER = "The paper (arXiv 2605.28066) claims training 3.7 times faster than LoRA and 36 to 40 % less GPU memory."

Render = Callable[[Path], str]


def measured(kind: str, folder: Path) -> list[list[Record]]:
    """The newest run of every case, distribution, device and type, in the order of the page."""
    groups = records.newest(kind, ("case", "distribution", "device", "dtype"), folder)
    groups = [group for group in groups if group[0]["case"] in MEASURED]
    cases, distributions = list(CASES), list(DISTRIBUTIONS)
    return sorted(
        groups, key=lambda group: (cases.index(group[0]["case"]), distributions.index(group[0]["distribution"]))
    )


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


def ratio(base: Record | None, record: Record | None) -> str:
    """How many steps of `record` fit into one of `base`."""
    return f"{base['ms']['median'] / record['ms']['median']:.2f}" if base and record else "-"


def render_step(folder: Path) -> str:
    """Step times of every case and distribution, with the ratios to LoRA (a) and (b)."""
    parts = []
    for group in measured("step", folder):
        rows, by_name = [], {record["variant"]: record for record in group}
        for record in in_order(group):
            ms = record["ms"]
            rate = 1000 * record["sizes"]["tokens"] / ms["median"]
            rows.append(
                [
                    VARIANTS[record["variant"]].title,
                    f"{ms['median']:,.0f}",
                    f"{ms['p20']:,.0f} to {ms['p80']:,.0f}",
                    f"{rate:,.0f}",
                    ratio(by_name.get(BASELINE), record),
                    ratio(by_name.get(CHECKPOINTED), record),
                ]
            )
        table = grid(["", "ms a step", "p20 to p80", "tokens/s", "times (a)", "times (b)"], rows)
        parts.append(f"{heading(group[0])}\n\n{table}\n\n{where(group[0])}; {group[0]['rounds']} rounds.")
    return "\n\n".join([*(parts or [NOT_YET]), *gpu_line("step", folder)])


def render_memory(folder: Path) -> str:
    """Peaks of every configuration, each from a process of its own."""
    parts = []
    for group in measured("memory", folder):
        found = in_order(group)
        base = next((r["memory"].get("above_mib") for r in found if r["variant"] == BASELINE), None)
        rows = []
        for record in found:
            memory, title = record["memory"], VARIANTS[record["variant"]].title
            if "failed" in memory:
                rows.append([title, f"failed: {memory['failed']}", "", "", ""])
                continue
            cells = (memory["above_mib"], memory["loaded_mib"], memory["peak_mib"])
            rows.append([title, f"{cells[0]:,.0f}", share(base, cells[0]), *(f"{cell:,.0f}" for cell in cells[1:])])
        table = grid(["", "above the loaded model, MiB", "share of (a)", "loaded, MiB", "whole process, MiB"], rows)
        gaps = [record["memory"].get("longest_gap_ms", 0.0) for record in found]
        interval = next((r["memory"]["interval_ms"] for r in found if "interval_ms" in r["memory"]), 0.0)
        sampling = f"sampled every {interval:g} ms (longest gap {max(gaps):g} ms)"
        parts.append(f"{heading(group[0])}\n\n{table}\n\n{where(group[0])}; {sampling}.")
    return "\n\n".join([*(parts or [NOT_YET]), *gpu_line("memory", folder)])


def render_headline(folder: Path) -> str:
    """The claim, our figures, the hardware, the command."""
    step, memory = ({place(group[0]): group for group in measured(kind, folder)} for kind in ("step", "memory"))
    rows = []
    for key in dict.fromkeys([*step, *memory]):
        times = {record["variant"]: record for record in step.get(key, [])}
        above = {record["variant"]: record["memory"].get("above_mib") for record in memory.get(key, [])}
        faster = [ratio(times.get(base), times.get(name)) for name in CLAIMED for base in (BASELINE, CHECKPOINTED)]
        shares = [share(above.get(BASELINE), above.get(name)) for name in CLAIMED]
        rows.append([key, *faster, *shares])
    suffix = [f"{name}: {value}" for name in CLAIMED.values() for value in ("times (a)", "times (b)")]
    table = grid(["", *suffix, *(f"{name}: memory, share of (a)" for name in CLAIMED.values())], rows)
    newest = [*step.values(), *memory.values()]
    lines = [
        PAPER,
        "",
        f"Our training step in the suffix layout, against {LORA}:" if rows else NOT_YET,
        *(["", table, "", f"{where(newest[0][0])}."] if rows else []),
        "",
        "Repeat: `python -m bench.step && python -m bench.memory && python -m bench.report`",
    ]
    return "\n".join(lines)


def render_quality(folder: Path) -> str:
    """Mean and spread over the seeds, x100, by kind of task."""
    parts = []
    for group in records.newest("quality", ("recipe",), folder):
        rows_by_name: dict[str, list[Record]] = {}
        for record in group:
            rows_by_name.setdefault(record["variant"], []).append(record)
        kinds = list(dict.fromkeys(kind for record in group for kind in record["by_type"]))
        rows = []
        for name, found in rows_by_name.items():
            cells = [mean_and_spread([record["by_type"][kind] for record in found]) for kind in kinds]
            seconds = [record["seconds"] for record in found if record["seconds"] is not None]
            time = f"{sum(seconds) / len(seconds):,.0f}" if seconds else "-"
            rows.append([name, *cells, mean_and_spread([record["mean"] for record in found]), time])
        seeds = sorted({record["seed"] for record in group})
        table = grid(["", *kinds, "mean of all tasks", "seconds of training"], rows)
        parts.append(f"**{group[0]['recipe']}**, seeds {', '.join(map(str, seeds))}\n\n{table}\n\n{where(group[0])}.")
    return "\n\n".join(parts or [NOT_YET])


def mean_and_spread(scores: Sequence[float | None]) -> str:
    """`46.1 (45.0 to 47.0)`: mean, lowest, highest; the value alone where all agree, a dash where one is undefined."""
    values = [value for value in scores if value is not None]
    if len(values) < len(scores):
        return "-"
    mean = sum(values) / len(values)
    if max(values) - min(values) < 0.05:
        return f"{mean:.1f}"
    return f"{mean:.1f} ({min(values):.1f} to {max(values):.1f})"


def render_transfer(folder: Path) -> str:
    """Score on the new backbone before and after, and when the shares of the source's score were reached."""
    parts = []
    for group in records.newest("transfer", ("source", "target"), folder):
        rows = []
        for record in group:
            reached = [record["reached"].get(share) for share in ("0.95", "0.99")]
            cells = ["not reached" if at is None else f"{at[0]} steps, {at[1]:,.0f} s" for at in reached]
            scores = [f"{record[name]:.1f}" for name in ("source_score", "start_score", "end_score")]
            rows.append([f"{record['variant']}, seed {record['seed']}", *scores, *cells])
        table = grid(["", "source", "moved, untrained", "moved, trained", "95 % reached", "99 % reached"], rows)
        parts.append(f"**{group[0]['source']} to {group[0]['target']}**\n\n{table}\n\n{where(group[0])}.")
    return "\n\n".join(parts or [NOT_YET])


def render_kernels(folder: Path) -> str:
    """What compilers say of each kernel in bfloat16: registers, shared KiB, spilled bytes, matrix instruction."""
    latest = [group[-1] for group in records.newest("kernels", ("op", "kernel", "case", "dtype", "target"), folder)]
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for record in latest:
        if record["dtype"] == "bf16":
            cell = f"{record['registers']} / {record['shared'] / 1024:.0f} / {record['spills']} {record['matrix']}"
            cells.setdefault((record["kernel"], record["case"]), {})[record["target"]] = cell.strip()
    targets = sorted(
        {target for row in cells.values() for target in row}, key=lambda name: (name[0] != "s", len(name), name)
    )
    rows = [
        [f"`{kernel}`, {case}", *(row.get(target, "-") for target in targets)] for (kernel, case), row in cells.items()
    ]
    table = grid(["kernel, configuration", *targets], rows)
    return "\n\n".join([table if rows else NOT_YET, *gpu_line("kernels", folder)])


SECTIONS: dict[str, Render] = {
    "headline": render_headline,
    "step": render_step,
    "memory": render_memory,
    "quality": render_quality,
    "transfer": render_transfer,
    "kernels": render_kernels,
}


def rendered(text: str, folder: Path) -> str:
    """The page with every section rendered anew.

    Raises:
        ValueError: a section without its pair of markers.
    """
    for name, render in SECTIONS.items():
        begin, end = f"<!-- begin:{name} -->", f"<!-- end:{name} -->"
        pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"the page: expected one pair {begin} ... {end}, got {len(pattern.findall(text))}")
        body = f"{begin}\n{render(folder)}\n{end}"
        text = pattern.sub(lambda _, body=body: body, text)  # type: ignore[misc]
    return text


def main(argv: Sequence[str] | None = None, *, page: Path = PAGE, folder: Path = records.RESULTS) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="exit with 1 where the page is stale")
    arguments = options.parse_args(argv)
    text = page.read_text(encoding="utf-8")
    fresh = rendered(text, folder)
    if arguments.check:
        if fresh != text:
            print(f"{page.name} is stale: run python -m bench.report", file=sys.stderr)
        return int(fresh != text)
    page.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

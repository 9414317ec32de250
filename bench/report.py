"""`python -m bench.report [--check]`

Renders the tables of BENCHMARKS.md from the newest records under `bench/results/`, between the markers
`<!-- begin:NAME -->` and `<!-- end:NAME -->`, and the plots in `bench/plots/`; the prose around the tables is written
by hand. `--check` changes nothing and exits with 1 where the page is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import encoding, instruct, kernels, largest, plots, quality, records, scaling, transfer
from bench.cases import BASELINE, CASES, MEASURED, VARIANTS
from bench.lengths import DISTRIBUTIONS
from bench.markdown import NOT_YET, gpu_line, grid, hardware, outdated, share, where
from bench.memory import above
from bench.records import ROOT, Record
from bench.step import use, utilisation

PAGE = ROOT / "BENCHMARKS.md"
BASES = {BASELINE: "(a)", "lora-checkpointed": "(b)", "lora-packed": "(c)"}
CLAIMED = {"pe-suffix": "without reader", "pe-suffix-weighted": "with reader and weighted skip"}
LORA = (
    "PEFT LoRA on the same backbone, texts and batch, padded (a), with activation checkpointing besides (b), and the"
    " best LoRA we can build, without padding or dropout (c)"
)
BELOW = "Threads, versions, commit and date stand under each table below."
PAPER = (
    "The paper (arXiv 2605.28066) claims 96.0 to 99.8 % of LoRA's score on MTEB, training 3.7 times faster and 36 to"
    " 40 % less GPU memory."
)

Render = Callable[[Path], str]


def measured(kind: str, folder: Path) -> list[list[Record]]:
    """Of every case, distribution, hardware and type the newest of the fullest runs, in the order of the page.

    The fullest is the one with the most ways to train: a run that was cut short takes no row away.
    """
    runs: dict[tuple[str | None, ...], dict[str, list[Record]]] = {}
    for record in records.read(kind, folder):
        if record["case"] in MEASURED and record["variant"] in VARIANTS:
            hardware = record["hardware"]["gpu"] if record["device"] != "cpu" else None
            key = (record["case"], record["distribution"], hardware, record["dtype"])
            runs.setdefault(key, {}).setdefault(record["run"], []).append(record)
    groups = [max(reversed(group.values()), key=lambda run: len(in_order(run))) for group in runs.values()]
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


def work(record: Record) -> str:
    """FLOPs of a step, its rate as a share of the matrix product's, and where there is one of the data sheet's."""
    found = utilisation(record)
    return f"{record['flops'] / 1e9:,.0f}, {use(record):.0%}" + (f", MFU {found}" if found != "-" else "")


def render_step(folder: Path) -> str:
    """Step times of every case and distribution, with the ratios to LoRA (a), (b) and (c)."""
    parts = []
    for group in measured("step", folder):
        rows, by_name = [], {record["variant"]: record for record in group if "ms" in record}
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
        times = [f"times {letter}" for letter in BASES.values()]
        table = grid(["", "ms a step", "p20 to p80", "tokens/s", "GFLOP, use", *times], rows)
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


def render_headline(folder: Path) -> str:
    """The claim, our figures, the hardware, the command."""
    steps, memory = ({place(group[0]): group for group in measured(kind, folder)} for kind in ("step", "memory"))
    rows, shown = [], []
    for key in dict.fromkeys([*steps, *memory]):
        times = {record["variant"]: record for record in steps.get(key, []) if "ms" in record}
        peaks = {record["variant"]: above(record["memory"]) for record in memory.get(key, [])}
        faster = [ratio(times.get(base), times.get(name)) for name in CLAIMED for base in BASES]
        shares = [share(peaks.get(BASELINE), peaks.get(name)) for name in CLAIMED]
        if set(found := [*faster, *shares]) != {"-"}:
            rows.append([key, *found])
            shown += [group[0] for group in (steps.get(key), memory.get(key)) if group]
    suffix = [f"{name}: times {letter}" for name in CLAIMED.values() for letter in BASES.values()]
    table = grid(["", *suffix, *(f"{name}: memory, share of (a)" for name in CLAIMED.values())], rows)
    machines = dict.fromkeys(map(hardware, shown))
    remarks = dict.fromkeys(f" Steps: {remark}." for remark in map(outdated, shown) if remark)
    lines = [
        PAPER,
        "",
        f"Our training step in the suffix layout, against {LORA}:" if rows else NOT_YET,
        *(["", table] if rows else []),
        *(line for claim in quality.claims(folder) for line in ("", claim)),
        *(["", *(f"{machine}." for machine in machines), "", BELOW + "".join(remarks)] if rows else []),
        "",
        "Repeat: `python -m bench.step && python -m bench.memory && python -m bench.report`",
    ]
    return "\n".join(lines)


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
    "largest": largest.render,
    "scaling": scaling.render,
    "encoding": encoding.render,
    "quality": quality.render,
    "instruct": instruct.render,
    "transfer": transfer.render,
    "ops": kernels.render,
    "kernels": render_kernels,
}


DRAWN = (scaling, quality, transfer)
"""Modules whose section shows plots."""
PLOT = re.compile(r"\]\((bench/plots/[^)]+)\)")


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


def main(
    argv: Sequence[str] | None = None, *, page: Path = PAGE, folder: Path = records.RESULTS, images: Path = plots.FOLDER
) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="exit with 1 where the page is stale")
    arguments = options.parse_args(argv)
    text = page.read_text(encoding="utf-8")
    fresh = rendered(text, folder)
    if not arguments.check:
        for module in DRAWN:
            module.draw(folder, images)
        page.write_text(fresh, encoding="utf-8")
        return 0
    missing = [name for name in PLOT.findall(fresh) if not (images / Path(name).name).exists()]
    if fresh != text or missing:
        print(f"{page.name} is stale: run python -m bench.report", *missing, file=sys.stderr)
    return int(fresh != text or bool(missing))


if __name__ == "__main__":
    sys.exit(main())

"""`python -m bench.memory [--cases ...] [--distributions ...] [--variants ...]`

Peak memory of a training step, every configuration in a process of its own.

On a CPU: the process's resident memory (RSS), sampled in a thread while it takes a few steps, together with the
operating system's own peak where that grew meanwhile; `above` is the peak less what stands after loading (weights and
libraries), so it holds gradients, optimiser, activations and workspace, but also what the allocator keeps of what was
freed. Hence the peak of live tensors beside it, counted storage by storage in one more step. On a GPU: torch's
allocated and reserved peaks, and the device's used memory by NVML, sampled in a thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import cast

import torch
from rich.console import Console
from rich.table import Table

from bench import records
from bench.cases import BASELINE, CASES, ROOT, VARIANTS, Setting, default_cases, default_variants
from bench.lengths import Batch, Distribution, Workload, workload
from bench.scaling import step_bytes
from bench.step import describe, finding_texts, parser, prepare
from pe.measure.meters import INTERVAL, MIB, Sampler, device_used, give_back_freed, highest_resident, resident

MARK = "bench.memory: "


def measure(
    case: str, distribution: Distribution, variant: str, passes: int, setting: Setting, interval: float = INTERVAL
) -> records.Record:
    """Memory of this process over `passes` passes over the distribution's batches, in MiB.

    A step goes before them, within what is measured: only from the second on a step finds the optimiser's state.
    Meant for a fresh process: see `in_fresh_process`.
    """
    load, device = workload(distribution, CASES[case]), setting.device
    step = prepare(CASES[case], variant, load, setting)
    give_back_freed()
    on_gpu = device.type == "cuda"
    source, read = device_used(device) if on_gpu else resident()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before, highest_before = read(), highest_resident()
    with Sampler(read, interval) as sampler, finding_texts(variant, step.model):
        step(load.batches[0])
        for _ in range(passes):
            for batch, following in load.turns():
                step(batch, following)
    peak = max(sampler.highest, read())
    found: records.Record = {"interval_ms": 1000 * interval, "longest_gap_ms": round(1000 * sampler.longest_gap, 1)}
    if on_gpu:
        found["allocated_mib"] = round(torch.cuda.max_memory_allocated(device) / MIB, 1)
        found["reserved_mib"] = round(torch.cuda.max_memory_reserved(device) / MIB, 1)
    elif highest_resident() > highest_before:
        peak = max(peak, highest_resident())
    found |= {
        "source": source,
        "loaded_mib": round(before / MIB, 1),
        "peak_mib": round(peak / MIB, 1),
        "above_mib": round((peak - before) / MIB, 1),
    }
    if not on_gpu:
        del step
        found["live_mib"] = round(
            max(live_bytes(case, variant, load, batch, setting) for batch in load.batches) / MIB, 1
        )
    return {**describe(CASES[case], load, setting), "variant": variant, "passes": passes, "memory": found}


def live_bytes(case: str, variant: str, load: Workload, batch: Batch, setting: Setting) -> int:
    """Peak of live tensors above the loaded model in a step on a batch: what an allocator keeps is not in it."""
    step = prepare(CASES[case], variant, load, setting)
    with finding_texts(variant, step.model) as store:
        if store is not None:
            with torch.no_grad():
                step.model(batch.requests)
        return step_bytes(step, batch)[0]


def in_fresh_process(case: str, distribution: str, variant: str, passes: int, setting: Setting) -> records.Record:
    """`measure` in a new interpreter.

    Returns:
        its record; where it fails (out of memory, say), one whose `memory` is the reason.
    """
    command = [sys.executable, "-m", "bench.memory", "--worker", "--cases", case, "--distributions", distribution]
    command += ["--variants", variant, "--passes", str(passes), "--device", str(setting.device)]
    command += ["--dtype", str(setting.dtype).removeprefix("torch.")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    for line in run.stdout.splitlines():
        if line.startswith(MARK):
            return cast(records.Record, json.loads(line.removeprefix(MARK)))
    reason = run.stderr.strip().splitlines()[-1:] or [f"ended by signal or code {run.returncode}"]
    load = workload(cast(Distribution, distribution), CASES[case])
    common = describe(CASES[case], load, setting)
    return {**common, "variant": variant, "passes": passes, "memory": {"failed": reason[0]}}


def table(found: Sequence[records.Record]) -> Table:
    """The records of one case and distribution, with the share of padded LoRA's memory."""
    first = found[0]
    title = f"{first['case']}, {first['distribution']}: peak memory in MiB"
    grid = Table("", "above the loaded model", "x (a)", "process, above", "process", title=title, title_justify="left")
    base = {record["variant"]: above(record["memory"]) for record in found}.get(BASELINE)
    for record in found:
        name, memory = VARIANTS[record["variant"]].title, record["memory"]
        if "failed" in memory:
            grid.add_row(name, memory["failed"])
            continue
        value = above(memory) or 0.0
        share = f"{value / base:.2f}" if base else "-"
        grid.add_row(name, f"{value:.0f}", share, f"{memory['above_mib']:.0f}", f"{memory['peak_mib']:.0f}")
    return grid


def above(memory: records.Record) -> float | None:
    """The peak above the loaded model, MiB: of live tensors where they were counted; None for a failed run."""
    found: float | None = memory.get("live_mib", memory.get("above_mib"))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--passes", type=int, default=3)
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options.set_defaults(distributions=["fixed", "real"])
    arguments = options.parse_args(argv)
    setting = Setting.of(arguments.device, arguments.dtype)
    if arguments.worker:
        place = (arguments.cases[0], arguments.distributions[0], arguments.variants[0])
        print(MARK + json.dumps(measure(*place, arguments.passes, setting)))
        return
    for case in arguments.cases or default_cases(setting.device.type):
        for distribution in arguments.distributions:
            found = []
            for variant in arguments.variants or default_variants(setting.device.type):
                found.append(in_fresh_process(case, distribution, variant, arguments.passes, setting))
                if not arguments.dry:
                    records.append("memory", found[-1:])
            Console().print(table(found))


if __name__ == "__main__":
    main()

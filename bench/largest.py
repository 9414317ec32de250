"""`python -m bench.largest [--cases 1b 8b] [--distributions fixed real] [--variants ...] [--gib 24 80 141]`

The largest batch that trains on a GPU of a given size: the allocator is held to that size (less what the driver takes),
and the number of queries doubled until a step no longer fits, then bisected to within an eighth. PromptEmbedder runs
without CUDA graphs, which hold a second copy of the texts' keys and values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from rich.console import Console

from bench import records
from bench.cases import CASES, VARIANTS, Case, Embedder, Setting, default_cases, default_variants
from bench.lengths import FIXED, LEAST, Distribution, workload
from bench.markdown import NOT_YET, grid, where
from bench.step import describe, micro_batch_size, parser, prepare
from pe.step import Step

GIB = 2**30
SIZES = (24, 80, 141)
MOST = 8192


def largest(fits: Callable[[int], bool], most: int = MOST) -> int:
    """The largest number up to `most` that `fits`, to within an eighth of it; 0 where not even `LEAST` does."""
    if not fits(LEAST):
        return 0
    low, high = LEAST, 2 * LEAST
    while high <= most and fits(high):
        low, high = high, 2 * high
    if high > most:
        return low
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def batch_fits(step: Step[Embedder], case: Case, distribution: Distribution, queries: int, parts: int = 1) -> bool:
    """Whether a step of so many queries, in so many parts, runs in the memory that is left."""
    rows = queries * FIXED[distribution][1] if distribution in FIXED else queries
    load = workload(distribution, dataclasses.replace(case, queries=rows))
    step.micro_batch_size = micro_batch_size(load, parts)
    try:
        for batch, following in load.turns():
            step(batch, following)
    except torch.OutOfMemoryError:
        return False
    finally:
        step.optimizer.zero_grad(set_to_none=True)
        if step.model.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def hold_to(gib: float, device: torch.device) -> None:
    """Limit torch's allocator to a GPU of `gib` GiB, less what lies outside the allocator already."""
    free, total = torch.cuda.mem_get_info(device)
    outside = total - free - torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (gib * GIB - outside) / total), device)


def measure(
    case: Case, distribution: Distribution, variant: str, sizes: Sequence[float], setting: Setting
) -> list[records.Record]:
    """A record for each size of GPU; 0 queries where the model alone does not fit."""
    found = []
    for gib in sizes:
        hold_to(gib, setting.device)
        load = workload(distribution, case)
        try:
            step = prepare(case, variant, load, setting)
            step.close()
        except torch.OutOfMemoryError:
            queries = 0
        else:
            fits = functools.partial(batch_fits, step, case, distribution, parts=VARIANTS[variant].parts)
            queries = largest(fits)
            del fits, step
        torch.cuda.empty_cache()
        tokens = round(load.tokens * queries / len(load.batches[0].lengths[0]))
        own = {"variant": variant, "gib": gib, "queries": queries, "tokens": tokens}
        found.append({**describe(case, load, setting), **own})
    return found


def render(folder: Path) -> str:
    """Queries (and text tokens) of the largest batch, by variant and size of GPU."""
    parts = []
    for group in records.newest("largest", ("case", "distribution", "device", "dtype"), folder):
        sizes = sorted({record["gib"] for record in group})
        cells: dict[str, dict[float, str]] = {}
        for record in group:
            cells.setdefault(record["variant"], {})[record["gib"]] = f"{record['queries']:,} ({record['tokens']:,})"
        rows = [[VARIANTS[name].title, *(row.get(size, "-") for size in sizes)] for name, row in cells.items()]
        table = grid(["queries (text tokens) of a batch", *(f"{size:g} GiB" for size in sizes)], rows)
        first = group[0]
        parts.append(f"**{first['case']}, {first['distribution']}**\n\n{table}\n\n{where(first)}.")
    return "\n\n".join(parts or [f"GPU: {NOT_YET[0].lower()}{NOT_YET[1:]}"])


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--gib", type=float, nargs="+", default=list(SIZES))
    options.set_defaults(distributions=["fixed", "real"])
    arguments = options.parse_args(argv)
    setting = Setting.of(arguments.device, arguments.dtype)
    if setting.device.type != "cuda":
        raise SystemExit("bench.largest: needs a GPU, whose allocator can be held to a size; got --device cpu")
    total = torch.cuda.mem_get_info(setting.device)[1] / GIB
    sizes = [size for size in arguments.gib if size <= total + 1]
    for name in arguments.cases or default_cases(setting.device.type):
        for distribution in arguments.distributions:
            without_twins = [way for way in default_variants(setting.device.type) if VARIANTS[way].graphs]
            for variant in arguments.variants or without_twins:
                found = measure(CASES[name], cast(Distribution, distribution), variant, sizes, setting)
                if not arguments.dry:
                    records.append("largest", found)
                for record in found:
                    title = f"{name}, {distribution}, {VARIANTS[variant].title}, {record['gib']:g} GiB"
                    Console().print(f"{title}: {record['queries']} queries")


if __name__ == "__main__":
    main()

"""`python -m bench.step [--cases tiny small] [--distributions fixed long real mixed] [--variants ...] [--rounds N]`

Time of one whole training step, `pe.step.Step` as `pe.train` takes it: tokenising, the loss with its masks, backward,
checks, clipping, AdamW and its schedule. Every way to train sees the same backbone, texts, batch, type and loss. On a
CPU they take turns round by round, so that a machine that slows down slows all; a GPU may hold one of them alone.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from rich.console import Console
from rich.table import Table
from triton.errors import TritonError

from bench import records
from bench.cases import (
    BASELINE,
    CASES,
    VARIANTS,
    Case,
    Embedder,
    Setting,
    compile_parts,
    default_cases,
    default_variants,
)
from bench.device import free, synchronise
from bench.flops import step_flops
from bench.lengths import DISTRIBUTIONS, Batch, Distribution, Workload, workload
from bench.roofline import ROOFS
from pe.config import LossConfig, TrainConfig
from pe.method.text_store import TextStore
from pe.model import PromptEmbedder
from pe.step import Step

TEMPERATURE = 0.02
RATE = 1e-5
PRODUCT = {"cpu": 2048, "cuda": 8192}
"""Size of the matrix product whose rate stands for the hardware's."""
WARM_UPS = {"cpu": 1, "cuda": 3}
"""Passes over the batches before the clock: kernels are compiled, and the allocator knows the optimiser's state."""
FAILURES = (RuntimeError, TritonError, subprocess.CalledProcessError)
"""What a model, a kernel or its compiler raises on a GPU, out of memory included."""
Take = Callable[[Batch, Batch], object]
"""Takes a step on a batch, told which one follows."""


def prepare(case: Case, variant: str, load: Workload, setting: Setting) -> Step[Embedder]:
    """A variant, ready to take steps; the same seed for all."""
    torch.manual_seed(0)
    chosen = VARIANTS[variant]
    model = chosen.build(case, load.instructed, setting)
    if chosen.compiled:
        compile_parts(model.backbone.model)
    options = TrainConfig(
        lr=RATE,
        warmup=0.0,
        schedule="constant",  # there is no last step
        micro_batch_size=micro_batch_size(load, chosen.parts),
        cuda_graphs=chosen.graphs,
        read_ahead=chosen.ahead,
    )
    return Step(model, LossConfig(temperature=TEMPERATURE), options, setting.accelerator)


@contextlib.contextmanager
def finding_texts(variant: str, model: Embedder) -> Iterator[TextStore | None]:
    """Inside it a variant whose texts were read before has a store in memory, which a pass over the batches fills."""
    if not VARIANTS[variant].stored:
        yield None
        return
    assert isinstance(model, PromptEmbedder)
    with TextStore.open("memory") as store, model.reading_from(store):
        yield store


def micro_batch_size(load: Workload, parts: int) -> int | None:
    """Queries of each of so many parts of a batch; None for the whole."""
    return None if parts == 1 else -(-len(load.batches[0].queries) // parts)


def time_rounds(steps: Mapping[str, Take], load: Workload, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step for each round, the weighted mean over the batches.

    Where texts are read ahead, a step has its own small passes and the text pass of the batch after it.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            spent = []
            for batch, following in load.turns():
                started = time.perf_counter()
                steps[name](batch, following)
                spent.append(1000 * (time.perf_counter() - started))
            times[name].append(load.mean(spent))
    return times


def describe(case: Case, load: Workload, setting: Setting) -> records.Record:
    """What all records of a case and distribution have in common."""
    config = case.backbone.config()
    return {
        "case": case.name,
        "distribution": load.distribution,
        "mode": "train",
        "protocol": records.PROTOCOL,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "device": setting.device.type,
        "sizes": {
            "queries": case.queries,
            "documents": case.queries,
            "tokens": round(load.tokens),
            "padding_share": round(load.padding_share, 3),
            "instructed": load.instructed,
            "soft_tokens": case.soft_tokens,
            "rank": case.rank,
            "backbone": f"{config.model_type}, {config.num_hidden_layers} layers, width {config.hidden_size}",
        },
    }


def product_rate(setting: Setting, size: int) -> float:
    """FLOP/s of a square matrix product of this size, the best of five: what a step's rate is compared with."""
    a = torch.randn(size, size, device=setting.device, dtype=setting.dtype)
    spent = []
    for _ in range(5):
        synchronise(setting.device)
        started = time.perf_counter()
        a @ a
        synchronise(setting.device)
        spent.append(time.perf_counter() - started)
    return 2 * size**3 / min(spent)


def measure(
    case: Case, load: Workload, variants: Sequence[str], rounds: int, setting: Setting, *, in_turns: bool
) -> Iterator[list[records.Record]]:
    """Records of one case and distribution, one a variant, as they are had.

    Args:
        case, load, variants, rounds, setting: what is measured, how often, and where.
        in_turns: the variants take turns, so that a machine that slows down slows all; else they come one after
            another, as on a GPU, whose memory may hold one of them alone, and one that fails says so in its record.

    Raises:
        RuntimeError: a GPU that no longer answers after a failure; the records before it are had by then.
    """
    if in_turns:
        yield measure_together(case, load, variants, rounds, setting)
        return
    for name in variants:
        try:
            yield measure_together(case, load, [name], rounds, setting)
        except FAILURES as error:
            yield [{**describe(case, load, setting), "rounds": rounds, "variant": name, "failed": reason(error)}]
        free(setting.device)


def measure_together(
    case: Case, load: Workload, variants: Sequence[str], rounds: int, setting: Setting
) -> list[records.Record]:
    """Records of variants that take turns."""
    steps, flops = {}, {}
    with contextlib.ExitStack() as stack:
        for name in variants:
            steps[name] = prepare(case, name, load, setting)
            stack.enter_context(finding_texts(name, steps[name].model))
            for batch, following in load.turns() * WARM_UPS[setting.device.type]:
                steps[name](batch, following)
            if cut := steps[name].model.truncation.cut:
                raise RuntimeError(
                    f"{name}, {load.distribution}: expected texts that are read whole, got {cut} cut ones"
                )
            flops[name] = load.mean([step_flops(steps[name].model, batch.requests) for batch in load.batches])
        times = time_rounds(steps, load, rounds)
    common = {
        **describe(case, load, setting),
        "rounds": rounds,
        "product_flops_per_s": round(product_rate(setting, PRODUCT[setting.device.type])),
        "peak_flops_per_s": peak_rate(setting),
    }
    return [
        {**common, "variant": name, "ms": records.spread(times[name]), "flops": round(flops[name])} for name in steps
    ]


def reason(error: Exception) -> str:
    """A failure in a line."""
    line = next(iter(str(error).splitlines()), "")
    return line if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {line}"


def peak_rate(setting: Setting) -> float | None:
    """FLOP/s of the data sheet; None for a CPU, an unknown GPU and float32."""
    gpu = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else ""
    half = setting.dtype != torch.float32
    return 1e12 * ROOFS[gpu].compute if gpu in ROOFS and half else None


def use(record: records.Record) -> float:
    """A step's FLOP/s as a share of the matrix product's."""
    return rate(record) / float(record["product_flops_per_s"])


def utilisation(record: records.Record) -> str:
    """Model FLOPs utilisation: a step's FLOP/s as a share of the data sheet's; "-" where there is none."""
    peak = record.get("peak_flops_per_s")
    return f"{rate(record) / peak:.0%}" if peak else "-"


def rate(record: records.Record) -> float:
    """FLOP/s of a step."""
    return float(record["flops"]) / (record["ms"]["median"] / 1000)


def table(found: Sequence[records.Record]) -> Table:
    """The records of one case and distribution, with the ratio to padded LoRA."""
    first = found[0]
    sizes = first["sizes"]
    title = (
        f"{first['case']}, {first['distribution']}: {sizes['tokens']:,} tokens, {sizes['padding_share']:.0%} padding"
    )
    grid = Table("", "ms", "p20-p80", "tokens/s", "GFLOP", "use", "MFU", "x (a)", title=title, title_justify="left")
    base = {record["variant"]: record["ms"]["median"] for record in found if "ms" in record}.get(BASELINE)
    for record in found:
        name = VARIANTS[record["variant"]].title
        if "failed" in record:
            grid.add_row(name, record["failed"])
            continue
        ms = record["ms"]
        ratio = f"{base / ms['median']:.2f}" if base else "-"
        tokens = f"{1000 * sizes['tokens'] / ms['median']:,.0f}"
        spread = f"{ms['p20']:.0f}-{ms['p80']:.0f}"
        work = f"{record['flops'] / 1e9:,.0f}"
        grid.add_row(
            name, f"{ms['median']:.0f}", spread, tokens, work, f"{use(record):.0%}", utilisation(record), ratio
        )
    return grid


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark of steps has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", nargs="+", choices=CASES, help="default: those of the device")
    options.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS))
    options.add_argument("--variants", nargs="+", choices=VARIANTS, help="default: those of the device")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    options.add_argument("--dry", action="store_true", help="print only, add no records")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and record; 1 where a variant failed."""
    options = parser(__doc__ or "")
    options.add_argument("--rounds", type=int, default=7)
    arguments = options.parse_args(argv)
    setting, failed = Setting.of(arguments.device, arguments.dtype), False
    variants = arguments.variants or default_variants(setting.device.type)
    for name in arguments.cases or default_cases(setting.device.type):
        for distribution in arguments.distributions:
            load = workload(cast(Distribution, distribution), CASES[name])
            found = []
            in_turns = setting.device.type == "cpu"
            for group in measure(CASES[name], load, variants, arguments.rounds, setting, in_turns=in_turns):
                found += group
                if not arguments.dry:
                    records.append("step", group)
            Console().print(table(found))
            failed = failed or any("failed" in record for record in found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

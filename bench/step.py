"""`python -m bench.step [--cases tiny small] [--distributions fixed long real mixed] [--variants ...] [--rounds N]`

Time of one whole training step: a tokenised batch, loss, backward, clipping, AdamW. Every way to train sees the same
backbone, texts, batch, type and loss; they take turns round by round, so that a machine that slows down slows all.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench import records
from bench.cases import BASELINE, CASES, VARIANTS, Case, Embedder, Setting, default_cases, trainable
from bench.flops import step_flops
from bench.lengths import DISTRIBUTIONS, Batch, Distribution, Workload, workload
from pe.kernels.info_nce import info_nce
from pe.losses import cached_backward
from pe.model import Requests

TEMPERATURE = 0.02
CLIP_NORM = 1.0
RATE = 1e-5
PRODUCT = {"cpu": 2048, "cuda": 8192}
"""Size of the matrix product whose rate stands for the hardware's."""


class TrainingStep:
    """One way to train, ready to take steps; with `parts` above 1 representations are cached."""

    def __init__(self, model: Embedder, setting: Setting, parts: int = 1) -> None:
        self.model, self.setting, self.device, self.parts = model.train(), setting, setting.device, parts
        self.parameters = trainable(model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE)

    def __call__(self, batch: Batch) -> float:
        """Take one step, wait until it is done, and return its loss."""
        loss = self._backward(batch)
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronise(self.device)
        return loss.item()

    def _backward(self, batch: Batch) -> Tensor:
        def embed(requests: Requests) -> Tensor:
            return self.model(requests)[None]

        def loss_of(embeddings: Tensor) -> Tensor:
            queries, documents = embeddings[0, : batch.queries], embeddings[0, batch.queries :]
            positive = torch.arange(batch.queries, device=self.device)
            return info_nce(queries, documents, positive, temperature=TEMPERATURE)

        if self.parts > 1:
            size = -(-len(batch.requests.texts) // self.parts)
            return cached_backward(embed, batch.requests, size, loss_of, lambda: self.setting.autocast, Tensor.backward)
        with self.setting.autocast:
            loss = loss_of(embed(batch.requests))
        loss.backward()
        return loss.detach()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare(case: Case, variant: str, load: Workload, setting: Setting) -> TrainingStep:
    """A variant with its optimiser; the same seed for all."""
    torch.manual_seed(0)
    chosen = VARIANTS[variant]
    return TrainingStep(chosen.build(case, load.instructed, setting), setting, chosen.parts)


def time_rounds(steps: Mapping[str, Callable[[Batch], object]], load: Workload, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step for each round, the weighted mean over the batches."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(rounds):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            spent = []
            for batch in load.batches:
                started = time.perf_counter()
                steps[name](batch)
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
    case: Case, load: Workload, variants: Sequence[str], rounds: int, setting: Setting
) -> Iterator[list[records.Record]]:
    """Records of one case and distribution, one a variant, as they are had.

    On a CPU the variants take turns, so that a machine that slows down slows all; on a GPU, whose memory may hold one
    of them alone, they come one after another.
    """
    groups = [variants] if setting.device.type == "cpu" else [[name] for name in variants]
    for group in groups:
        yield measure_together(case, load, group, rounds, setting)
        if setting.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def measure_together(
    case: Case, load: Workload, variants: Sequence[str], rounds: int, setting: Setting
) -> list[records.Record]:
    """Records of variants that take turns; one that runs out of memory says so in its record."""
    common = {**describe(case, load, setting), "rounds": rounds}
    steps, flops, found = {}, {}, []
    for name in variants:
        try:
            steps[name] = prepare(case, name, load, setting)
            for batch in load.batches:
                steps[name](batch)
        except torch.OutOfMemoryError as error:
            steps.pop(name, None)
            found.append({**common, "variant": name, "failed": str(error).splitlines()[0]})
            torch.cuda.empty_cache()
            continue
        if cut := steps[name].model.truncation.cut:
            raise RuntimeError(f"{name}, {load.distribution}: expected texts that are read whole, got {cut} cut ones")
        flops[name] = load.mean([step_flops(steps[name].model, batch.requests) for batch in load.batches])
    times = time_rounds(steps, load, rounds)
    rate = product_rate(setting, PRODUCT[setting.device.type])
    for name in steps:
        own = {"ms": records.spread(times[name]), "flops": round(flops[name]), "product_flops_per_s": round(rate)}
        found.append({**common, "variant": name, **own})
    return found


def use(record: records.Record) -> float:
    """A step's FLOP/s as a share of the matrix product's."""
    share: float = record["flops"] / (record["ms"]["median"] / 1000) / record["product_flops_per_s"]
    return share


def table(found: Sequence[records.Record]) -> Table:
    """The records of one case and distribution, with the ratio to padded LoRA."""
    first = found[0]
    sizes = first["sizes"]
    title = (
        f"{first['case']}, {first['distribution']}: {sizes['tokens']:,} tokens, {sizes['padding_share']:.0%} padding"
    )
    grid = Table("", "ms", "p20-p80", "tokens/s", "GFLOP", "use", "x (a)", title=title, title_justify="left")
    base = {record["variant"]: record["ms"]["median"] for record in found if "ms" in record}.get(BASELINE)
    for record in found:
        name = VARIANTS[record["variant"]].title
        if "failed" in record:
            grid.add_row(name, record["failed"])
            continue
        ms = record["ms"]
        ratio = f"{base / ms['median']:.2f}" if base else "-"
        rate = f"{1000 * sizes['tokens'] / ms['median']:,.0f}"
        spread = f"{ms['p20']:.0f}-{ms['p80']:.0f}"
        grid.add_row(
            name, f"{ms['median']:.0f}", spread, rate, f"{record['flops'] / 1e9:,.0f}", f"{use(record):.0%}", ratio
        )
    return grid


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark of steps has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", nargs="+", choices=CASES, help="default: those of the device")
    options.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS))
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    options.add_argument("--dry", action="store_true", help="print only, add no records")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "")
    options.add_argument("--rounds", type=int, default=7)
    arguments = options.parse_args(argv)
    setting = Setting.of(arguments.device, arguments.dtype)
    for name in arguments.cases or default_cases(setting.device.type):
        for distribution in arguments.distributions:
            load = workload(cast(Distribution, distribution), CASES[name])
            found = []
            for group in measure(CASES[name], load, arguments.variants, arguments.rounds, setting):
                found += group
                if not arguments.dry:
                    records.append("step", group)
            Console().print(table(found))


if __name__ == "__main__":
    main()

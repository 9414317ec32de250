"""`python -m bench.step [--cases tiny small] [--distributions fixed real mixed] [--variants ...] [--rounds N]`

Time of one whole training step: a tokenised batch, loss, backward, clipping, AdamW. Every way to train sees the same
backbone, texts, batch, type and loss; they take turns round by round, so that a machine that slows down slows all.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from rich.console import Console
from rich.table import Table

from bench import records
from bench.cases import BASELINE, CASES, MEASURED, VARIANTS, Case, Embedder, Setting, trainable
from bench.lengths import DISTRIBUTIONS, Batch, Distribution, Workload, workload
from pe.kernels.info_nce import info_nce

TEMPERATURE = 0.02
CLIP_NORM = 1.0
RATE = 1e-5


class TrainingStep:
    """One way to train, ready to take steps."""

    def __init__(self, model: Embedder, setting: Setting) -> None:
        self.model, self.setting, self.device = model.train(), setting, setting.device
        self.parameters = trainable(model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE)

    def __call__(self, batch: Batch) -> float:
        """Take one step, wait until it is done, and return its loss."""
        count = batch.queries
        with self.setting.autocast:
            embeddings = self.model(batch.requests)
            positive = torch.arange(count, device=self.device)
            loss = info_nce(embeddings[:count], embeddings[count:], positive, temperature=TEMPERATURE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronise(self.device)
        return loss.item()


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def prepare(case: Case, variant: str, load: Workload, setting: Setting) -> TrainingStep:
    """A variant with its optimiser; the same seed for all."""
    torch.manual_seed(0)
    return TrainingStep(VARIANTS[variant].build(case, load.instructed, setting), setting)


def time_rounds(steps: Mapping[str, Callable[[Batch], object]], load: Workload, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step for each round, the weighted mean over the batches; one more round before warms up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in range(-1, rounds):
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            spent = []
            for batch in load.batches:
                started = time.perf_counter()
                steps[name](batch)
                spent.append(1000 * (time.perf_counter() - started))
            if number >= 0:
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


def measure(case: Case, load: Workload, variants: Sequence[str], rounds: int, setting: Setting) -> list[records.Record]:
    """Records of one case and distribution, one a variant."""
    steps = {name: prepare(case, name, load, setting) for name in variants}
    times = time_rounds(steps, load, rounds)
    common = describe(case, load, setting)
    return [{**common, "variant": name, "rounds": rounds, "ms": records.spread(times[name])} for name in variants]


def table(found: Sequence[records.Record]) -> Table:
    """The records of one case and distribution, with the ratio to padded LoRA."""
    first = found[0]
    sizes = first["sizes"]
    title = (
        f"{first['case']}, {first['distribution']}: {sizes['tokens']:,} tokens, {sizes['padding_share']:.0%} padding"
    )
    grid = Table("", "ms", "p20-p80", "tokens/s", "x (a)", title=title, title_justify="left")
    base = {record["variant"]: record["ms"]["median"] for record in found}.get(BASELINE)
    for record in found:
        ms = record["ms"]
        ratio = f"{base / ms['median']:.2f}" if base else "-"
        rate = f"{1000 * sizes['tokens'] / ms['median']:,.0f}"
        grid.add_row(
            VARIANTS[record["variant"]].title, f"{ms['median']:.0f}", f"{ms['p20']:.0f}-{ms['p80']:.0f}", rate, ratio
        )
    return grid


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark of steps has."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", nargs="+", choices=CASES, default=list(MEASURED))
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
    for name in arguments.cases:
        for distribution in arguments.distributions:
            load = workload(cast(Distribution, distribution), CASES[name])
            found = measure(CASES[name], load, arguments.variants, arguments.rounds, setting)
            if not arguments.dry:
                records.append("step", found)
            Console().print(table(found))


if __name__ == "__main__":
    main()

"""`python -m bench.scaling [--case tiny] [--axes batch ...] [--variants ...] [--points N] [--rounds N] [--budget S]`

Time and memory of one training step along one axis at a time, the others at a base point: queries of a batch, tokens of
a text, the backbone's width and depth, soft tokens, distinct instructions of a batch. All texts of a point have the
same length and LoRA reads no instruction, so nothing is padded and (a) and (c) read the same tokens as PE.

Time is the median of rounds in which the variants take turns. Memory is the peak above the loaded model of a step in
the steady state, in live tensor bytes on a CPU (what an allocator keeps or leaves out does not count), in allocated
bytes on a GPU; `saved` is the part of it that autograd keeps for the backward pass. A variant whose step is predicted
to take longer than the budget is left out at that point, and its record says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import plots, records
from bench.cases import CASES, VARIANTS, Case, Embedder, Setting
from bench.lengths import LEAST, Batch, Workload
from bench.markdown import NOT_YET, gpu_line, grid, where
from bench.plots import Panel, Series
from bench.records import Record
from bench.step import prepare, time_rounds
from pe.measure.meters import ACTIVATIONS, FROZEN, MIB, LiveTensors, Phases
from pe.step import Step

DEFAULT = "tiny"
INSTRUCTION_TOKENS = 16
COMPARED = ("lora-padded", "lora-packed", "pe-suffix", "pe-suffix-weighted", "pe-prefix")
PASSES = 2  # steps that a point takes at least: one under the meter, which warms up, and one timed


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a step is measured at: sizes of the batch, of the backbone and of the prompts."""

    queries: int
    length: int
    width: int
    depth: int
    soft_tokens: int
    instructions: int = 1

    @classmethod
    def base(cls, case: Case) -> Point:
        config = case.backbone.config()
        return cls(
            queries=min(case.queries, 8),
            length=64,
            width=config.hidden_size,
            depth=config.num_hidden_layers,
            soft_tokens=case.soft_tokens,
        )

    def case(self, case: Case) -> Case:
        """The case with this point's sizes; the backbone has random weights, and heads in proportion to its width."""
        config = case.backbone.config()
        factor = self.width / config.hidden_size
        heads = max(1, round(factor * config.num_attention_heads))
        sizes = {
            "vocab_size": config.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": round(factor * config.intermediate_size),
            "num_hidden_layers": self.depth,
            "num_attention_heads": heads,
            "num_key_value_heads": max(1, heads * config.num_key_value_heads // config.num_attention_heads),
            "head_dim": config.head_dim,
        }
        backbone = dataclasses.replace(case.backbone, kind=config.model_type, sizes=sizes, folder=None)
        return dataclasses.replace(case, backbone=backbone, queries=self.queries, soft_tokens=self.soft_tokens)

    def load(self, case: Case) -> Workload:
        """One batch: this many queries and as many positives; the queries share out the instructions among them."""
        generator = torch.Generator().manual_seed(0)

        def text(tokens: int) -> str:
            return " ".join(map(str, torch.randint(case.vocabulary, (tokens,), generator=generator).tolist()))

        *instructions, document_instruction = (text(INSTRUCTION_TOKENS) for _ in range(self.instructions + 1))
        side = [self.length] * self.queries
        queries, documents = ([text(count) for count in side] for _ in range(2))
        batch = Batch.unlabelled(
            instructions,
            queries,
            documents,
            asked=[n % self.instructions for n in range(self.queries)],
            document_instruction=document_instruction,
            weight=1.0,
            lengths=(side, side),
        )
        return Workload("scaling", [batch], instructed=False)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What varies.

    Attributes:
        title: what stands on the x axis.
        field: of Point.
        values: what it takes, rising; factors of the base point's value where `relative`.
        fixed: other fields of the base point that this axis changes.
    """

    title: str
    field: str
    values: tuple[float, ...]
    relative: bool = False
    fixed: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def points(self, base: Point) -> list[Point]:
        base = dataclasses.replace(base, **self.fixed)
        unit = getattr(base, self.field) if self.relative else 1
        return [dataclasses.replace(base, **{self.field: max(1, round(unit * value))}) for value in self.values]


AXES = {
    "batch": Axis(
        title="queries of a batch", field="queries", values=(LEAST, 4, 16, 64, 256, 512), fixed={"length": 16}
    ),
    "length": Axis(
        title="tokens of a text", field="length", values=(64, 128, 256, 512, 1024, 2048, 4096), fixed={"queries": 2}
    ),
    "width": Axis(title="width of the backbone", field="width", values=(0.5, 1, 2, 4), relative=True),
    "depth": Axis(title="layers of the backbone", field="depth", values=(0.5, 1, 2, 4), relative=True),
    "soft-tokens": Axis(title="soft tokens K", field="soft_tokens", values=(1, 2, 4, 8, 16, 32)),
    "instructions": Axis(
        title="distinct instructions of a batch",
        field="instructions",
        values=(1, 4, 16, 64),
        fixed={"queries": 64, "length": 32},
    ),
}


def step_bytes(step: Step[Embedder], batch: Batch) -> tuple[int, int]:
    """Peak bytes of a step above the loaded model, and what autograd saved for its backward pass.

    For a step that was not taken before: the optimiser's state is made first and counted, as in every later step.
    """
    device = step.model.device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if on_gpu else 0
    live = LiveTensors({FROZEN: [*step.model.parameters(), *step.model.buffers()]}, step.parameters, Phases())
    with torch.autograd.graph.saved_tensors_hooks(live.save, lambda tensor: tensor), live:
        step.start_optimizer()
        step(batch, batch)
    found = live.footprint()
    peak = torch.cuda.max_memory_allocated(device) - before if on_gpu else found.above
    return peak, max(found.bytes[ACTIVATIONS])


def key_value_bytes(case: Case, tokens: int, dtype: torch.dtype) -> int:
    """Keys and values of so many tokens in all layers of the backbone."""
    config = case.backbone.config()
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * tokens * dtype.itemsize)


def prepare_at(case: Case, variant: str, load: Workload, length: int, setting: Setting) -> Step[Embedder]:
    """A variant that reads texts of `length` tokens, and instructions, whole."""
    step = prepare(case, variant, load, setting)
    model: Any = step.model
    model.config = dataclasses.replace(model.config, max_length=max(length, INSTRUCTION_TOKENS))
    return step


def predict(history: Sequence[tuple[float, float]], value: float) -> float:
    """Milliseconds at `value` from those at smaller values: growth as between the last two, linear behind one alone."""
    if not history:
        return 0.0
    last, ms = history[-1]
    power = slope([at for at, _ in history[-2:]], [spent for _, spent in history[-2:]])
    return ms * (value / last) ** (1.0 if power is None else max(0.0, power))


def slope(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Slope of log y over log x by least squares; None where fewer than two points are above zero."""
    pairs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if b > 0]
    if len(pairs) < 2:
        return None
    logs = np.array(pairs)
    return float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])


def measure(case: Case, point: Point, variants: Sequence[str], rounds: int, setting: Setting) -> dict[str, Record]:
    """Time and memory of the variants at a point; out of memory on a GPU is a `skipped` of its own."""
    own, load = point.case(case), point.load(case)
    (batch,) = load.batches
    kv_bytes = key_value_bytes(own, batch.tokens, setting.dtype)
    steps: dict[str, Step[Embedder]] = {}
    found: dict[str, Record] = {}
    for name in variants:
        try:
            step = prepare_at(own, name, load, point.length, setting)
            peak, saved = step_bytes(step, batch)
        except torch.OutOfMemoryError:
            found[name] = {"skipped": "out of memory"}
            continue
        steps[name] = step
        sizes = {"above_mib": peak, "kv_mib": kv_bytes, "saved_mib": saved}
        found[name] = {field: round(size / MIB, 4) for field, size in sizes.items()}
    for name, times in time_rounds(steps, load, rounds).items():
        found[name] |= {"ms": records.spread(times), "rounds": rounds}
    return found


def run(
    case: Case, axis: str, variants: Sequence[str], count: int | None, rounds: int, budget: float, setting: Setting
) -> Iterator[list[Record]]:
    """Records of an axis, the list of each point as it is measured.

    Args:
        case: the base point's models and batch.
        axis: of AXES.
        variants: of VARIANTS.
        count: points from the smallest on; None: all.
        rounds: timed steps of a variant at a point, fewer where they would exceed the budget.
        budget: seconds that a variant may take at a point.
        setting: device and dtype.
    """
    history: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for point in AXES[axis].points(Point.base(case))[:count]:
        value = getattr(point, AXES[axis].field)
        expected = {name: predict(history[name], value) for name in variants}
        affordable = [name for name in variants if PASSES * expected[name] <= 1000 * budget]
        slowest = max([expected[name] for name in affordable], default=0.0)
        taken = min(rounds, int(1000 * budget / slowest) - PASSES + 1) if slowest else rounds
        found = measure(case, point, affordable, max(1, taken), setting) if affordable else {}
        gc.collect()
        common = {
            "case": case.name,
            "axis": axis,
            "value": value,
            "mode": "train",
            "protocol": records.PROTOCOL,
            "device": setting.device.type,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "sizes": {**dataclasses.asdict(point), "tokens": 2 * point.queries * point.length, "rank": case.rank},
        }
        for name in affordable:
            if "ms" in found[name]:
                history[name].append((value, found[name]["ms"]["median"]))
        for name in variants:
            if name not in affordable:
                reason = f"predicted {expected[name] / 1000:.1f} s a step, budget {budget:g} s for {PASSES} steps"
                found[name] = {"skipped": reason}
        yield [{**common, "variant": name, **found[name]} for name in variants]


# The page.


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A figure of a record along an axis: its title, and how it is read."""

    title: str
    read: Callable[[Record], float]


CURVES = (
    Curve(title="ms a step", read=lambda record: record["ms"]["median"]),
    Curve(title="peak above the loaded model, MiB", read=lambda record: record["above_mib"]),
    Curve(title="saved for backward beyond keys/values, MiB", read=lambda record: beyond_keys_values(record)),
)


def beyond_keys_values(record: Record) -> float:
    """MiB that the backward pass waits for, less the keys and values of the texts."""
    return record["saved_mib"] - record["kv_mib"]


def by_variant(group: Sequence[Record]) -> dict[str, list[Record]]:
    """The measured records of each variant along one axis, in the order of the variants."""
    found = {name: [r for r in group if r["variant"] == name and "ms" in r] for name in VARIANTS}
    return {name: rows for name, rows in found.items() if rows}


def fit(rows: Sequence[Record], curve: Curve) -> float | None:
    """The slope of a curve of one variant."""
    return slope([row["value"] for row in rows], [curve.read(row) for row in rows])


def shown(value: float | None) -> str:
    return "-" if value is None else f"{value + 0.0:.2f}".replace("-0.00", "0.00")


def slopes(groups: Sequence[Sequence[Record]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of slopes: an axis a row, a variant a column."""
    names = [name for name in VARIANTS if any(name in by_variant(group) for group in groups)]
    rows = []
    for group in groups:
        found = by_variant(group)
        cells = [" / ".join(shown(fit(found.get(name, []), curve)) for curve in CURVES) for name in names]
        rows.append([AXES[group[0]["axis"]].title, *cells])
    return ["slope of time / peak / saved", *(VARIANTS[name].title for name in names)], rows


def places(folder: Path) -> list[list[list[Record]]]:
    """The newest run of every axis, by case, device and type."""
    found: dict[tuple[str, ...], list[list[Record]]] = {}
    for group in records.newest("scaling", ("case", "device", "dtype", "axis"), folder):
        found.setdefault(tuple(group[0][name] for name in ("case", "device", "dtype")), []).append(group)
    order = list(AXES)
    return [sorted(groups, key=lambda group: order.index(group[0]["axis"])) for groups in found.values()]


def plot_name(record: Record) -> str:
    """`scaling-batch.svg`; the case and the device are in it where they are not the default's."""
    parts = [record["case"]] * (record["case"] != DEFAULT) + [record["device"]] * (record["device"] != "cpu")
    return "-".join(["scaling", *parts, record["axis"]]) + ".svg"


def draw(folder: Path, target: Path = plots.FOLDER) -> list[Path]:
    """Write the plot of every axis to the folder `target`, and say which."""
    written = []
    for group in (group for groups in places(folder) for group in groups):
        found = by_variant(group)
        panels = []
        for curve in CURVES:
            series = [
                Series(
                    label=f"{VARIANTS[name].title} (slope {shown(fit(rows, curve))})",
                    x=[row["value"] for row in rows],
                    y=[curve.read(row) for row in rows],
                )
                for name, rows in found.items()
            ]
            panels.append(Panel(x=AXES[group[0]["axis"]].title, y=curve.title, series=series, log="xy"))
        path = target / plot_name(group[0])
        plots.lines(path, *panels)
        written.append(path)
    return written


def render(folder: Path) -> str:
    """Slopes of every axis, what was left out, and the plots that `draw` writes."""
    parts = []
    for groups in places(folder):
        first = groups[0][0]
        base = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in first["sizes"].items())
        parts += [f"**{first['case']}, {first['device']}** (first point: {base})", grid(*slopes(groups))]
        left_out = [record for group in groups for record in group if "skipped" in record]
        if left_out:
            lines = [
                f"- {VARIANTS[r['variant']].title}, {AXES[r['axis']].title}, {r['value']}: {r['skipped']}"
                for r in left_out
            ]
            parts.append("Left out:\n\n" + "\n".join(lines))
        parts += [
            f"![Time and memory against {AXES[group[0]['axis']].title}](../plots/{plot_name(group[0])})"
            for group in groups
        ]
        parts.append(f"{where(first)}.")
    return "\n\n".join([*(parts or [NOT_YET]), *gpu_line("scaling", folder)])


def line(record: Record) -> str:
    title = f"{record['axis']} {record['value']}, {VARIANTS[record['variant']].title}"
    if "skipped" in record:
        return f"{title}: skipped, {record['skipped']}"
    return (
        f"{title}: {record['ms']['median']:,.0f} ms, {record['above_mib']:,.1f} MiB above the loaded model,"
        f" {beyond_keys_values(record):,.1f} MiB saved beyond keys/values ({record['kv_mib']:,.1f} MiB)"
    )


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--case", choices=CASES, default=DEFAULT)
    options.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(COMPARED))
    options.add_argument("--points", type=int, help="of each axis, from the smallest on; default: all")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--budget", type=float, default=120.0, help="seconds that a variant may take at a point")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    options.add_argument("--dry", action="store_true", help="print only, add no records")
    arguments = options.parse_args(argv)
    setting = Setting.of(arguments.device, arguments.dtype)
    case, groups = CASES[arguments.case], []
    for axis in arguments.axes:
        group: list[Record] = []
        for found in run(case, axis, arguments.variants, arguments.points, arguments.rounds, arguments.budget, setting):
            group += found
            print("\n".join(map(line, found)), flush=True)
            if not arguments.dry:
                records.append("scaling", found)
        groups.append(group)
    print(grid(*slopes(groups)))


if __name__ == "__main__":
    main()

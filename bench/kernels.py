"""`python -m bench.kernels [--quick] [--device cuda|cpu] [--toy] [--ops ...]`

Times the five ops (`bench.ops`), forward and backward, against their reference in eager mode and under torch.compile
and against whoever else computes the same. Before an implementation is timed, its output and gradients are compared
with the float32 reference by the tolerance rule of the kernel tests: one that fails has no figure, only the reason.

On a GPU: CUDA events around every pass, which is enqueued while the GPU still waits, so that its launch is not in the
figure; the L2 cache overwritten before it, the forward of a timed backward outside;
the peak is what torch allocates above the inputs, including what a backward pass finds saved. Every op runs in a
process of its own, so that a kernel that faults takes no other op with it, and records are written case by case.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.errors import TritonError

from bench import records
from bench.device import free
from bench.markdown import NOT_YET, gpu_line, grid, where
from bench.ops import CASES, OPS, PEERS, Case, Problem, Tensors, Way
from pe.kernels._checks import INTERPRETED
from tests.kernels.tolerance import assert_no_worse, forward_backward

OURS, EAGER, COMPILED = "ours", "torch, eager", "torch.compile"
MODES = ("forward", "backward", "both")
MIB = 2**20
L2_BYTES = 256 * MIB  # more than any GPU's L2 cache
LONGEST = 86_400.0  # seconds that an op may take where no limit is given
WAIT_CYCLES = 2_000_000  # about a millisecond of a GPU
FAILURES = (
    RuntimeError, ValueError, TypeError, AssertionError, AttributeError, ImportError, LookupError, OSError, TritonError,
    subprocess.CalledProcessError,
)  # fmt: skip
"""What an implementation or its compiler raises; it becomes the reason in the place of a figure."""
HEADER = (
    "", "forward, ms", "x ours", "of roof", "backward, ms", "x ours", "of roof", "both, ms", "x ours", "peak MiB"
)  # fmt: skip

Pass = tuple[Callable[[], Any], Callable[[Any], object]]
"""What comes before the clock starts, and what is timed on its result."""


class WrongResultError(RuntimeError):
    """An implementation that is further from the reference than its type allows."""


def our_impl(device: torch.device) -> str:
    """What "ours" runs on: Triton on a GPU and in the interpreter, plain torch elsewhere."""
    if device.type == "cuda":
        return "triton"
    return "interpreter" if INTERPRETED else "torch"


def ways(problem: Problem, device: torch.device) -> dict[str, Callable[[], Way]]:
    """Every implementation by name, ours first."""
    impl = "torch" if our_impl(device) == "torch" else "triton"
    return {
        OURS: lambda: Way(lambda *inputs: problem.ours(*inputs, impl=impl)),
        EAGER: lambda: Way(problem.reference),
        COMPILED: lambda: Way(torch.compile(problem.reference, dynamic=False)),
        **problem.peers,
    }


def results(way: Way, inputs: Tensors, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients with all floating-point inputs in `dtype`."""
    return forward_backward(lambda leaves, _: way.run(*way.arrange(*leaves)), inputs, "", dtype)


def expected(problem: Problem) -> list[tuple[Tensor, Tensor]]:
    """The reference's output and gradients in a wider type and in the inputs' own."""
    dtype, reference = problem.inputs[0].dtype, Way(problem.reference)
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    pairs = (results(reference, problem.inputs, kind) for kind in (wide, dtype))
    return list(zip(*pairs, strict=True))


def check(way: Way, problem: Problem, right: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Raise WrongResultError where output or a gradient breaks the tolerance rule."""
    got = results(way, problem.inputs, problem.inputs[0].dtype)
    for number, (ours, (wide, same)) in enumerate(zip(got, right, strict=True)):
        try:
            assert_no_worse(ours, wide, same, f"gradient {number - 1}" if number else "output")
        except AssertionError as error:
            raise WrongResultError(f"wrong: {error}") from error


def passes(way: Way, inputs: Tensors) -> dict[str, Pass]:
    """Forward, backward and both on leaves of the implementation's own."""
    leaves = [x.detach().requires_grad_(x.requires_grad) for x in way.arrange(*inputs)]
    asked = [x for x in leaves if x.requires_grad]
    upstream = torch.randn_like(way.run(*leaves))

    def forward(_: object = None) -> Tensor:
        return way.run(*leaves)

    def backward(out: Tensor) -> Tensors:
        return torch.autograd.grad(out, asked, upstream)

    return {
        "forward": (lambda: None, forward),
        "backward": (forward, backward),
        "both": (lambda: None, lambda _: backward(forward())),
    }


def time_on_gpu(prepare: Callable[[], Any], action: Callable[[Any], object], budget: float) -> list[float]:
    """Milliseconds of each run, as many runs as fit into `budget` milliseconds, 10 to 200."""
    cache = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")

    def once() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ready = prepare()
        cache.zero_()
        torch.cuda._sleep(WAIT_CYCLES)  # the pass is enqueued before the clock starts: kernels count, Python does not
        begin.record()
        action(ready)
        end.record()
        return begin, end

    def times(count: int) -> list[float]:
        events = [once() for _ in range(count)]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in events]

    times(3)  # warms up
    return times(max(10, min(200, int(budget / median(times(5))))))


def time_on_cpu(prepare: Callable[[], Any], action: Callable[[Any], object], rounds: int = 3) -> list[float]:
    """Milliseconds of each run, one more before them warms up."""
    spent = []
    for _ in range(rounds + 1):
        ready = prepare()
        started = time.perf_counter()
        action(ready)
        spent.append(1000 * (time.perf_counter() - started))
    return spent[1:]


def peak_mib(prepare: Callable[[], Any], action: Callable[[Any], object]) -> float:
    """Most that torch allocates on the GPU in the timed part, above what stood before `prepare`."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    ready = prepare()
    torch.cuda.reset_peak_memory_stats()
    action(ready)
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / MIB, 1)


def measure_way(way: Way, problem: Problem, device: torch.device, budget: float) -> dict[str, records.Record]:
    """Time, peak, rates and share of the roofline of every mode."""
    dtype, gpu = problem.inputs[0].dtype, gpu_name(device)
    costs = {"forward": problem.forward, "backward": problem.backward, "both": problem.forward + problem.backward}
    floors = {mode: costs[mode].floor_ms(gpu, dtype) for mode in ("forward", "backward")}
    floors["both"] = None if floors["forward"] is None else sum(floor or 0.0 for floor in floors.values())
    found = {}
    for mode, (prepare, action) in passes(way, problem.inputs).items():
        on_gpu = device.type == "cuda"
        times = time_on_gpu(prepare, action, budget) if on_gpu else time_on_cpu(prepare, action)
        middle, floor = median(times), floors[mode]
        found[mode] = {
            "ms": {name: value / 1000 for name, value in records.spread([1000 * ms for ms in times]).items()},
            "runs": len(times),
            "peak_mib": peak_mib(prepare, action) if on_gpu else None,
            "gbps": float(f"{costs[mode].gbps(middle):.4g}"),
            "tflops": float(f"{costs[mode].tflops(middle):.4g}"),
            "floor_ms": floor,
            "roofline": None if floor is None else round(floor / middle, 4),
        }
    return found


def gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def why(error: Exception) -> str:
    """A failure in a few words."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, ModuleNotFoundError):
        return "not installed"
    line = (str(error).strip().splitlines() or [""])[0]
    return (line if isinstance(error, WrongResultError) else f"{type(error).__name__}: {line}")[:160]


def measure(
    case: Case,
    sizes: Mapping[str, int],
    device: torch.device,
    *,
    only: Sequence[str] | None = None,
    red: bool = False,
    budget: float = 100.0,
) -> list[records.Record]:
    """Records of one case, one for each implementation and mode.

    Args:
        case, sizes, device: what runs where; bfloat16 on a GPU, float32 on a CPU.
        only: implementations to measure; None: all.
        red: the op's tests fail, so it has no figures of ours.
        budget: milliseconds for the runs of one mode.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    common = {
        "op": case.op,
        "case": case.name,
        "sizes": dict(sizes),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "gpu": gpu_name(device),
    }
    torch.manual_seed(0)
    problem = case.build(sizes, dtype, device)
    right, unchecked = None, ""
    try:
        right = expected(problem)
    except FAILURES as error:
        unchecked = why(error)
    found: list[records.Record] = []
    for name, make in ways(problem, device).items():
        if only is not None and name not in only:
            continue
        measured: Mapping[str, records.Record]
        try:
            if red and name == OURS:
                raise WrongResultError("no figure: its tests fail")
            if right is None:
                raise WrongResultError(f"no figure: the reference to check it by fails ({unchecked})")
            way = make()
            check(way, problem, right)
            measured = measure_way(way, problem, device, budget)
        except FAILURES as error:
            failure = {"failed": why(error)}
            measured = dict.fromkeys(MODES, failure)
        impl = {"impl": our_impl(device)} if name == OURS else {}
        found += [{**common, "implementation": name, **impl, "mode": mode, **measured[mode]} for mode in MODES]
        try:
            free(device)
        except RuntimeError:
            break
    torch.compiler.reset()
    return found


def lines(found: Sequence[records.Record]) -> Iterator[list[str]]:
    """One row an implementation of a case: times, their ratio to ours, share of the roofline, peak."""
    by_name: dict[str, dict[str, records.Record]] = {}
    for record in found:
        by_name.setdefault(record["implementation"], {})[record["mode"]] = record
    ours = by_name.get(OURS, {})
    for name, modes in by_name.items():
        title = f"{name} ({modes['both']['impl']})" if name == OURS else name
        if "failed" in modes["both"]:
            yield [title, modes["both"]["failed"], *[""] * (len(HEADER) - 2)]
            continue
        cells = [title]
        for mode in MODES:
            record = modes[mode]
            cells += [milliseconds(record["ms"]), ratio(record, ours.get(mode))]
            if mode != "both":
                cells.append("-" if record["roofline"] is None else f"{record['roofline']:.0%}")
        peak = modes["both"]["peak_mib"]
        yield [*cells, "-" if peak is None else f"{peak:,.0f}"]


def milliseconds(ms: Mapping[str, float]) -> str:
    return f"{ms['median']:.3f} ({ms['p20']:.3f} to {ms['p80']:.3f})"


def ratio(record: records.Record, ours: records.Record | None) -> str:
    """How many times as long as ours it takes."""
    return f"{record['ms']['median'] / ours['ms']['median']:.2f}" if ours and "ms" in ours else "-"


def heading(record: records.Record) -> str:
    sizes = ", ".join(f"{name} {size:,}" for name, size in record["sizes"].items())
    return f"{record['op']}, {record['case']} ({sizes}; {record['dtype']})"


def table(found: Sequence[records.Record]) -> Table:
    """The records of one case."""
    shown = Table(*HEADER, title=heading(found[0]), title_justify="left")
    for line in lines(found):
        shown.add_row(*line)
    return shown


def render(folder: Path) -> str:
    """The section of `bench/tables/kernels.md`: one table an op and device, from the newest run of every case."""
    tables: dict[tuple[str, str | None], list[list[records.Record]]] = {}
    for group in records.newest("ops", ("op", "case", "gpu", "dtype"), folder):
        tables.setdefault((group[0]["op"], group[0]["gpu"]), []).append(group)
    parts = []
    for (op, gpu), groups in sorted(tables.items(), key=lambda item: OPS.index(item[0][0])):
        rows = [
            [f"{group[0]['case']}: {line[0]}", *(cell.replace("|", "/") for cell in line[1:])]
            for group in groups
            for line in lines(group)
        ]
        header = [f"`{op}`", *HEADER[1:]]
        origins = dict.fromkeys(where(group[0]) for group in groups)
        sources = "\n\n".join(f"{origin}." for origin in origins)
        parts.append(f"**`{op}`**, {gpu or 'CPU'}\n\n{grid(header, rows)}\n\n{sources}")
    return "\n\n".join([*(parts or [NOT_YET]), *gpu_line("ops", folder)])


def run_alone(command: Sequence[str], seconds: float) -> bool:
    """Run a command, no longer than `seconds`; whether it ended well."""
    try:
        return subprocess.run(command, cwd=records.ROOT, check=False, timeout=min(seconds, LONGEST)).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"{' '.join(command)}: stopped after {seconds:.0f} s", file=sys.stderr)
        return False


def broken(found: Sequence[records.Record]) -> bool:
    """Whether ours has no figure."""
    return any("failed" in record for record in found if record["implementation"] == OURS)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and record; 1 where an op of ours has no figure."""
    given = sys.argv[1:] if argv is None else list(argv)
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="fewer sizes and runs")
    options.add_argument("--toy", action="store_true", help="tiny sizes; prints only, adds no records")
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    options.add_argument("--implementations", nargs="+", choices=(OURS, EAGER, COMPILED, *PEERS), help="default: all")
    options.add_argument("--red", nargs="*", choices=OPS, default=[], help="ops whose tests fail: no figures of ours")
    options.add_argument("--dry", action="store_true", help="print only, add no records")
    options.add_argument("--seconds", type=float, default=math.inf, help="limit on a GPU, shared out among the ops")
    arguments = options.parse_args(given)
    device = torch.device(arguments.device)
    if device.type == "cuda" and len(arguments.ops) > 1:
        command = [sys.executable, "-m", "bench.kernels", *given, "--ops"]
        deadline = time.perf_counter() + arguments.seconds
        passed = []
        for number, op in enumerate(arguments.ops):
            limit = (deadline - time.perf_counter()) / (len(arguments.ops) - number)
            passed.append(run_alone([*command, op], limit))
        return int(not all(passed))
    console, failed = Console(width=None if sys.stdout.isatty() else 200), False
    for case in CASES:
        if case.op not in arguments.ops or (arguments.quick and not case.quick):
            continue
        found = measure(
            case,
            case.toy if arguments.toy else case.sizes,
            device,
            only=arguments.implementations,
            red=case.op in arguments.red,
            budget=50.0 if arguments.quick else 200.0,
        )
        if not found:
            continue
        if not (arguments.dry or arguments.toy):
            records.append("ops", found)
        console.print(table(found))
        failed = failed or broken(found)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

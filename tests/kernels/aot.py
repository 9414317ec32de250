"""Compile every kernel as its launcher would launch it, without a GPU: `python tests/kernels/aot.py --markdown FILE`.

The launchers run on meta tensors; `wrap_triton` is replaced by a recorder, so blocks, warps and specialisations are
those of a real call. Each distinct launch is compiled ahead of time for a target and its registers, shared memory,
spills and matrix instructions are read from what the compiler wrote. Must run without TRITON_INTERPRET; prints JSON.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.library
import triton
from torch import Tensor
from torch._higher_order_ops import triton_kernel_wrap
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, MockTensor, create_function_from_signature

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
GENERATION = {"sm_80": 8, "sm_90": 9, "sm_100": 10, "gfx942": 0}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
OPS = ("vocab_mixture", "prompt_rows", "context_attention", "pool_normalize", "info_nce")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RUNNING = r"warp_group_dot_wait.*pendings = [1-9]"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One distinct kernel launch, to be compiled; `in_graph` with real numbers in float64, as torch.compile has."""

    op: str
    case: str
    kernel: str
    target: str
    dtype: str
    arguments: dict[str, Any]
    in_graph: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the compiler made of a launch.

    `spills` in bytes a thread (NVIDIA: stack and local), `shared` in bytes; `pipelined`: some loads run ahead of their
    use (NVIDIA: asynchronous copies); `written`: the pointers that torch.compile takes for written; `overwritten`:
    buffers that a copy may fill while a matrix product still reads them; `leaves_running`: a wait leaves products
    running; `in_float64`: arithmetic in float64.
    """

    op: str
    case: str
    kernel: str
    target: str
    dtype: str
    blocks: str
    num_warps: int
    registers: int
    shared: int
    spills: int
    has_dot: bool
    matrix: str
    pipelined: bool
    written: list[str]
    overwritten: list[str]
    leaves_running: bool
    in_float64: list[str]


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def vocab_mixture(module: Any, dtype: torch.dtype, m: int, v: int, d: int, d_in: int, frozen: bool = True) -> None:
    """Tied where both widths agree; `frozen` embeddings get no gradient."""
    h, e_out = empty(m, d, dtype=dtype), empty(v, d, dtype=dtype)
    e_in = e_out if d == d_in else empty(v, d_in, dtype=dtype)
    s, lse = module._vocab_mixture_fwd(h, e_out, e_in, 1.0, d == d_in)
    ds, scale = s.to(dtype), empty(1, dtype=torch.float32) if dtype == torch.float16 else None
    module._vocab_mixture_bwd(ds, h, e_out, e_in, s, lse, 1.0, d == d_in, True, not frozen, not frozen, scale)


def prompt_rows(module: Any, dtype: torch.dtype, t: int, de: int, n_soft: int, dp: int) -> None:
    ids, embedding = empty(t, dtype=torch.int64), empty(32000, de, dtype=dtype)
    soft, weight = empty(n_soft, dp, dtype=dtype), empty(dp, de, dtype=dtype)
    x = module._prompt_rows_fwd(ids, embedding, soft, weight, 1.0)
    module._prompt_rows_bwd(x, ids, soft, weight, True, True)


def context_attention(
    module: Any, dtype: torch.dtype, b: int, lq: int, lc: int, heads: tuple[int, int], d: int, n: int, extras: bool
) -> None:
    (h, hkv), t, c = heads, b * lq, n * lc
    q, k, v = (empty(t, heads_, d, dtype=dtype) for heads_ in (h, hkv, hkv))
    ck, cv = (empty(c, hkv, d, dtype=dtype) for _ in range(2))
    cu, cu_context = empty(b + 1, dtype=torch.int32), empty(n + 1, dtype=torch.int32)
    index = None if n == b else empty(b, dtype=torch.int64)
    sinks = empty(h, dtype=dtype) if extras else None
    options = (lq, lc, 0.125, 128 if extras else None, 30.0 if extras else None)
    tensors = (q, k, v, cu, ck, cv, cu_context, index, sinks)
    o, lse = module._context_attention_fwd(*tensors, *options)
    module._context_attention_bwd(o, *tensors, o, lse, *options, True, True, extras)


def pool_normalize(module: Any, dtype: torch.dtype, t: int, d: int, b: int, mode: str, norm: str) -> None:
    h, cu = empty(t, d, dtype=dtype), empty(b + 1, dtype=torch.int32)
    weight, bias = empty(d, dtype=dtype), empty(d, dtype=dtype) if norm == "layer" else None
    token_weights = empty(t, dtype=torch.float32) if mode == "weighted" else None
    y, inverse = module._pool_normalize_fwd(h, cu, weight, bias, token_weights, mode, norm, 1e-6, True)
    module._pool_normalize_bwd(y, h, cu, weight, token_weights, y, inverse, mode, norm, 1e-6, True)
    if token_weights is not None:
        module._pool_normalize_bwd_weights(y, h, cu, weight, bias, token_weights, y, inverse, norm, 1e-6, True)


def info_nce(module: Any, dtype: torch.dtype, b: int, n: int, d: int, masked: bool) -> None:
    q, docs, positive = empty(b, d, dtype=dtype), empty(n, d, dtype=dtype), empty(b, dtype=torch.int64)
    rows, columns = (empty(size, dtype=torch.int64) for size in (b, n))
    ids = (rows, rows, rows, columns, columns) if masked else (None,) * 5
    loss, lse = module._info_nce_fwd(q, docs, positive, *ids, 0.02)
    module._info_nce_bwd(loss, q, docs, positive, *ids, lse, 0.02, True, True)


# The first case of a kernel runs for every target and dtype; each further case in bf16 for the targets named.
CASES: list[tuple[str, str, tuple[str, ...], Callable[..., None], tuple[Any, ...]]] = [
    ("vocab_mixture", "default", tuple(TARGETS), vocab_mixture, (1024, 151936, 1024, 1024, False)),
    ("vocab_mixture", "few rows", tuple(TARGETS), vocab_mixture, (5, 151936, 896, 896)),
    ("vocab_mixture", "few rows, 32", tuple(TARGETS), vocab_mixture, (32, 151936, 1024, 1024)),
    ("vocab_mixture", "few rows, untied", tuple(TARGETS), vocab_mixture, (32, 32000, 1024, 896)),
    ("vocab_mixture", "few rows, narrow", ("sm_80", "gfx942"), vocab_mixture, (32, 32000, 512, 384)),
    ("vocab_mixture", "few rows, wide", tuple(TARGETS), vocab_mixture, (5, 151936, 4096, 4096)),
    ("prompt_rows", "default", tuple(TARGETS), prompt_rows, (8192, 4096, 1280, 1024)),
    ("context_attention", "default", tuple(TARGETS), context_attention, (16, 5, 512, (32, 8), 128, 16, False)),
    ("context_attention", "many queries", tuple(TARGETS), context_attention, (64, 512, 32, (32, 8), 128, 4, False)),
    ("context_attention", "every option", ("sm_80", "gfx942"), context_attention, (8, 5, 512, (16, 4), 64, 2, True)),
    ("context_attention", "width 256", ("sm_100",), context_attention, (16, 256, 64, (8, 4), 256, 16, True)),
    ("pool_normalize", "default", tuple(TARGETS), pool_normalize, (65536, 4096, 256, "mean", "rms")),
    ("pool_normalize", "one a program", ("sm_80",), pool_normalize, (1280, 1024, 1024, "last", "layer")),
    ("pool_normalize", "weighted", tuple(TARGETS), pool_normalize, (65536, 4096, 256, "weighted", "none")),
    ("pool_normalize", "weighted, layer", ("sm_100",), pool_normalize, (8192, 896, 16, "weighted", "layer")),
    ("info_nce", "default", tuple(TARGETS), info_nce, (4096, 8192, 1024, True)),
    ("info_nce", "small", ("gfx942",), info_nce, (16, 48, 384, False)),
]
FIRST = ("default", "few rows", "weighted")
TESTED = {"sm_90": ("bf16", "fp32"), "sm_100": ("bf16", "fp16")}
"""What the tests compile, where it is not every dtype: each for two generations of NVIDIA's chips and for AMD's."""


def record(target: str, candidates: bool = False, dtypes: Sequence[str] = tuple(DTYPES)) -> Iterator[Launch]:
    """Every distinct launch of the cases of `target`; or those of FIRST in bf16, with a tuning candidate each."""
    calls: list[tuple[JITFunction, dict[str, Any]]] = []

    class Recorder:
        def __init__(self, kernel: JITFunction, configs: Sequence[dict[str, int]] = (), updates: str = "") -> None:
            self.kernel, self.configs, self.updates = kernel, configs, updates

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(0 < size < 2 ** (31 if axis == 0 else 16) for axis, size in enumerate(grid)), (self.kernel, grid)
            return self.launch

        def launch(self, **arguments: Any) -> None:
            assert not self.updates or isinstance(arguments[self.updates], Tensor)
            assert all(config.keys() <= arguments.keys() for config in self.configs), (self.kernel, self.configs)
            if not candidates:
                calls.append((self.kernel, arguments))
            elif self.configs:
                calls.append((self.kernel, arguments | self.configs[0]))

    torch.library.triton_op = lambda name, fn, mutates_args: fn  # type: ignore[assignment]
    seen = set()
    for op, case, targets, call, arguments in CASES:
        module = importlib.import_module(f"pe.kernels.{op}")
        for name in ("pe.kernels._triton", f"pe.kernels.{op}"):
            owner = importlib.import_module(name)
            owner.wrap_triton = Recorder  # type: ignore[attr-defined]
            if hasattr(owner, "generation"):
                owner.generation = lambda device: GENERATION[target]  # type: ignore[attr-defined]
        is_first = case in FIRST
        if target not in targets or (candidates and not is_first):
            continue
        for dtype_name in dtypes if is_first and not candidates else ("bf16",):
            dtype = DTYPES[dtype_name]
            calls.clear()
            call(module, dtype, *arguments)
            for kernel, kwargs in calls:
                kwargs = {k: str(v.dtype) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
                # Launches that differ in plain numbers only share a binary but for divisibility: one stands for all.
                key = (kernel.__name__, dtype, *((k, v) for k, v in kwargs.items() if len(k) > 1 and k == k.upper()))
                if key not in seen:
                    seen.add(key)
                    name = f"{kernel.fn.__module__}:{kernel.__name__}"
                    what = "candidate" if candidates else case
                    yield Launch(op=op, case=what, kernel=name, target=target, dtype=dtype_name, arguments=kwargs)


def in_graphs() -> list[Launch]:
    """A launch for each way through a kernel, as torch.compile has it.

    In which types a kernel computes is not its blocks' doing, nor its target's: the one that compiles in least time.
    """
    ways: dict[tuple[Any, ...], Launch] = {}
    for launch in record("gfx942", dtypes=("bf16",)):
        names = [name for name in launch.arguments if name.isupper() and len(name) > 1 and name[:6] != "BLOCK_"]
        flags = [(name, launch.arguments[name]) for name in names]
        ways.setdefault((launch.kernel, *flags), replace(launch, case=f"{launch.case}, in a graph", in_graph=True))
    return list(ways.values())


def compile_launch(launch: Launch) -> Result:
    module_name, kernel_name = launch.kernel.split(":")
    kernel: JITFunction = getattr(importlib.import_module(module_name), kernel_name)
    target = TARGETS[launch.target]
    backend = make_backend(target)
    kwargs = {
        name: MockTensor(getattr(torch, value.removeprefix("torch."))) if name.endswith("_ptr") else value
        for name, value in launch.arguments.items()
    }
    bound, specialization, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(**kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, None)
    if launch.in_graph:
        signature = {name: "fp64" if kind == "fp32" else kind for name, kind in signature.items()}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    has_dot = "tt.dot" in compiled.asm["ttir"]
    if launch.target == "gfx942":
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s+(\d+)", text)
        spills = _number(r"\.vgpr_spill_count:\s+(\d+)", text) + _number(r"\.private_segment_fixed_size:\s+(\d+)", text)
        kinds = ("v_mfma",)
    else:
        text = compiled.asm["ptx"]
        registers, spills = _nvidia_usage(compiled.asm["cubin"])
        kinds = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")
    blocks = " ".join(f"{k[6:]}={v}" for k, v in launch.arguments.items() if k.startswith("BLOCK_"))
    return Result(
        op=launch.op, case=launch.case, kernel=kernel_name, target=launch.target, dtype=launch.dtype, blocks=blocks,
        num_warps=launch.arguments["num_warps"], registers=registers, shared=compiled.metadata.shared, spills=spills,
        has_dot=has_dot, matrix=next((kind for kind in kinds if kind in text), ""),
        pipelined="async_copy" in compiled.asm["ttgir"], written=written(kernel, launch),
        overwritten=overwritten(compiled.asm["ttgir"], launch.arguments.get("num_stages", 1)),
        leaves_running=bool(re.search(RUNNING, compiled.asm["ttgir"])),
        in_float64=re.findall(r"(?:arith|math)\.(?!truncf|extf)\w+ .*f64", compiled.asm["ttir"]),
    )  # fmt: skip


def overwritten(ttgir: str, stages: int) -> list[str]:
    """Buffers of fewer copies than stages that Hopper's products read, where a wait leaves some of them running.

    Triton 3.6 to 3.9 give a tile that both kinds of products read, mma.sync and wgmma, a copy too few.
    """
    if not re.search(RUNNING, ttgir):
        return []
    source = dict(re.findall(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", ttgir))
    copies = dict(re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", ttgir))
    found = set()
    for operands in re.findall(r"warp_group_dot (%\w+), (%\w+)", ttgir):
        for buffer in operands:
            while buffer in source:
                buffer = source[buffer]
            if int(copies.get(buffer, stages)) < stages:
                found.add(buffer)
    return sorted(found)


class Driver:
    """A Triton driver that knows its target and has no GPU."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target


def written(kernel: JITFunction, launch: Launch) -> list[str]:
    """Pointers that torch's analysis of a kernel takes for written; a compiled graph copies such an input."""
    triton.runtime.driver.set_active(Driver(TARGETS[launch.target]))
    arguments = {
        name: torch.empty(2, dtype=getattr(torch, value.removeprefix("torch."))) if name.endswith("_ptr") else value
        for name, value in launch.arguments.items()
        if name in kernel.arg_names
    }
    if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):  # torch 2.13
        found = triton_kernel_wrap.identify_accessed_tensors(kernel, arguments, {}).read_writes.writes
        names = {dependency.name for dependency in found}
    else:
        names = set(triton_kernel_wrap.identify_mutated_tensors(kernel, arguments, {}))
    return sorted(name for name in names if name.endswith("_ptr"))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, pattern
    return int(found.group(1))


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)


def markdown(results: list[Result]) -> str:
    """One row a kernel, case and dtype; a cell a target: registers / shared KiB / spilled bytes."""
    rows: dict[tuple[str, ...], dict[str, list[Result]]] = {}
    for r in results:
        rows.setdefault((r.op, r.kernel, r.case, r.dtype), {}).setdefault(r.target, []).append(r)
    lines = [f"| op | kernel | case | dtype | {' | '.join(TARGETS)} |", "|" + " --- |" * (4 + len(TARGETS))]
    for key, variants in rows.items():
        cells = [_cell(variants.get(target, [])) for target in TARGETS]
        lines.append(f"| {' | '.join(key)} | {' | '.join(cells)} |")
    head = (
        "Each cell: registers a thread / shared memory in KiB / spilled bytes, matrix instruction, blocks and warps.\n"
        "Of several specialisations of one kernel in one case, the largest figures."
    )
    return "\n".join([head, "", *lines, ""])


def _cell(variants: list[Result]) -> str:
    if not variants:
        return ""
    most = max(variants, key=lambda r: r.registers)
    shared, spills = max(r.shared for r in variants) / 1024, max(r.spills for r in variants)
    matrix = f" {most.matrix}" if most.matrix else ""
    return f"{most.registers} / {shared:.1f} / {spills}{matrix} ({most.blocks} w={most.num_warps})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path, help="also write the table to this file")
    parser.add_argument("--op", nargs="*", default=OPS, choices=OPS, help="only these ops")
    parser.add_argument("--tested", action="store_true", help="TESTED, sm_90 with a tuning candidate, and graphs")
    arguments = parser.parse_args()
    assert not triton.knobs.runtime.interpret, "unset TRITON_INTERPRET"
    dtypes = TESTED if arguments.tested else {}
    launches = [launch for target in TARGETS for launch in record(target, dtypes=dtypes.get(target, tuple(DTYPES)))]
    if arguments.tested:
        launches += [*record("sm_90", candidates=True), *in_graphs()]
    launches = [launch for launch in launches if launch.op in arguments.op]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
            results = pool.map(compile_launch, launches, chunksize=1)
    if arguments.markdown:
        arguments.markdown.write_text(markdown(results))
    json.dump([asdict(result) for result in results], sys.stdout)


if __name__ == "__main__":
    main()

"""`python -m bench.aot [--op NAME]`: what the compilers say of every kernel, without a GPU.

Compiles each launch of the shipped configurations ahead of time (`tests/kernels/aot.py`) for sm_80, sm_90, sm_100 and
gfx942 and appends registers, shared memory, spills and matrix instruction to the records.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import records
from bench.markdown import NOT_YET, gpu_line, grid
from bench.ops import OPS
from bench.records import ROOT

SCRIPT = ROOT / "tests" / "kernels" / "aot.py"


def render(folder: Path) -> str:
    """What compilers say of each kernel in bfloat16: registers, shared KiB, spilled bytes, matrix instruction.

    Of every op the newest run, which compiles all that the op launches.
    """
    latest = [record for group in records.newest("kernels", ("op",), folder) for record in group]
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


def main(argv: Sequence[str] | None = None) -> None:
    """Compile in a process of its own, where Triton's interpreter is off, and append one record a kernel and target."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--op", choices=OPS, help="default: all")
    op = options.parse_args(argv).op
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *(["--op", op] if op else [])],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    largest: dict[tuple[str, ...], dict[str, object]] = {}
    for result in json.loads(done.stdout):
        key = tuple(result[name] for name in ("op", "kernel", "case", "dtype", "target"))
        if key not in largest or result["registers"] > largest[key]["registers"]:
            largest[key] = result
    path = records.append("kernels", largest.values())
    print(f"{len(largest)} records in {path}")


if __name__ == "__main__":
    main()

"""`python -m bench.report [--check]`

Renders BENCHMARKS.md and the pages of `bench/tables/` from the newest records under `bench/results/`, and the plots in
`bench/plots/`. What stands between `<!-- begin:NAME -->` and `<!-- end:NAME -->` is a section of `SECTIONS`; the prose
around it is written by hand. `--check` changes nothing and exits with 1 where a page is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import (
    aot,
    breakdown,
    encoding,
    instruct,
    kernels,
    largest,
    layers,
    plots,
    quality,
    records,
    scaling,
    serving,
    step_tables,
    summary,
    transfer,
)
from bench.records import ROOT

PAGES = (ROOT / "BENCHMARKS.md", *sorted((ROOT / "bench" / "tables").glob("*.md")))
SECTIONS: dict[str, Callable[[Path], str]] = {
    "summary": summary.render,
    "losses": summary.render_losses,
    "step": step_tables.render_step,
    "breakdown": breakdown.render,
    "shares": step_tables.render_shares,
    "memory": step_tables.render_memory,
    "largest": largest.render,
    "scaling": scaling.render,
    "encoding": encoding.render,
    "serving": serving.render,
    "quality": quality.render,
    "instruct": instruct.render,
    "layers": layers.render,
    "transfer": transfer.render,
    "ops": kernels.render,
    "kernels": aot.render,
}
DRAWN = (summary, scaling, quality, layers, transfer)
"""Modules whose sections show plots."""
SECTION = re.compile(r"(<!-- begin:(\w+) -->\n).*?(<!-- end:\2 -->)", re.DOTALL)
PLOT = re.compile(r"\]\([^)]*plots/([^)]+)\)")


def rendered(pages: Sequence[Path], folder: Path) -> list[str]:
    """The text of every page with its sections rendered anew.

    Raises:
        ValueError: a section that does not stand on exactly one page, between its pair of markers.
    """
    texts = [page.read_text(encoding="utf-8") for page in pages]
    found = [name for text in texts for _, name, _ in SECTION.findall(text)]
    if sorted(found) != sorted(SECTIONS):
        wrong = sorted(name for name in {*found, *SECTIONS} if name not in SECTIONS or found.count(name) != 1)
        raise ValueError(f"the pages: expected each section between one pair of markers, got otherwise: {wrong}")
    return [SECTION.sub(lambda at: f"{at[1]}{SECTIONS[at[2]](folder)}\n{at[3]}", text) for text in texts]


def main(
    argv: Sequence[str] | None = None,
    *,
    pages: Sequence[Path] = PAGES,
    folder: Path = records.RESULTS,
    images: Path = plots.FOLDER,
) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="exit with 1 where a page is stale")
    arguments = options.parse_args(argv)
    fresh = dict(zip(pages, rendered(pages, folder), strict=True))
    if not arguments.check:
        for module in DRAWN:
            module.draw(folder, images)
        for page, text in fresh.items():
            page.write_text(text, encoding="utf-8")
        return 0
    stale = [page.name for page, text in fresh.items() if page.read_text(encoding="utf-8") != text]
    stale += [name for text in fresh.values() for name in PLOT.findall(text) if not (images / name).exists()]
    if stale:
        print("stale, run python -m bench.report:", *stale, file=sys.stderr)
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())

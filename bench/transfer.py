"""`python -m bench.transfer CHECKPOINT --backbone NEW [--steps N]`: `pe.transfer`, and its figures to the records."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bench import records
from pe.loading import quiet
from pe.model import read_config
from pe.transfer import Transfer, parse, transfer, transfer_recipe


def record(result: Transfer, source: str, target: str, variant: str, seed: int) -> records.Record:
    """Scores of source, start and end, and steps and seconds to each share of the source's score."""
    found = list(result.scores.values())
    return {
        "source": source,
        "target": target,
        "variant": variant,
        "seed": seed,
        "source_score": found[0].mean,
        "start_score": found[1].mean,
        "end_score": found[-1].mean,
        "curve": result.curve,
        "reached": {f"{item.share:.2f}": item.at for item in result.reached},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Transfer as `pe.transfer` does and append one record."""
    quiet()
    arguments, overrides = parse(sys.argv[1:] if argv is None else list(argv))
    recipe = transfer_recipe(arguments, overrides)
    result = transfer(Path(arguments.checkpoint), recipe, fresh=arguments.fresh)
    variant = "alignment and reader" if recipe.model.reader == "activated_lora" else "alignment alone"
    if not result.scores:
        raise SystemExit("bench.transfer: the recipe names no tasks, so there is nothing to record")
    source = Path(read_config(Path(arguments.checkpoint))["backbone"]["name"]).name
    row = record(result, source, Path(arguments.backbone).name, variant, recipe.train.seed)
    records.append("transfer", [row])
    Console().print(result)


if __name__ == "__main__":
    main()

"""`python -m bench.quality [--seeds 0 1 2] [--systems pe static lora-mean lora-last] [--section.option=value ...]`

Trains the default recipe's embedder and its peers on the same backbone, data, batches and steps, and scores each before
and after on the recipe's tasks. Overrides are those of `pe.train`; `--rates lora-mean=5e-4` gives a system a rate of
its own.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils import set_seed
from rich.console import Console

from bench import records
from bench.cases import ROOT
from pe.baselines.common import Pooling, Templates
from pe.baselines.frozen import FrozenEncoder
from pe.baselines.lora import LoraBaselineConfig, LoraEmbedder
from pe.baselines.static import StaticPromptEmbedder
from pe.config import LoraSettings, Recipe, load_recipe
from pe.evaluate import Scores, score
from pe.integrations.mteb import TextEncoder
from pe.model import Instruction, PromptEmbedder
from pe.train import Trainable, build_accelerator, build_plan, fit


class System(Trainable, TextEncoder, Protocol):
    """Something that trains and encodes."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A system: its row's title, how it is built for a recipe, and its own learning rate (None: the recipe's)."""

    title: str
    build: Callable[[Recipe, torch.device], System]
    rate: float | None = None


class Row(NamedTuple):
    """A line of the table; seconds of training, None before it."""

    title: str
    scores: Scores
    seconds: float | None = None


def build_pe(**changes: Any) -> Callable[[Recipe, torch.device], System]:
    """PromptEmbedder of the recipe, with some options changed."""

    def build(recipe: Recipe, device: torch.device) -> System:
        return PromptEmbedder.from_config(dataclasses.replace(recipe.model, **changes), device)

    return build


def build_static(recipe: Recipe, device: torch.device) -> System:
    return StaticPromptEmbedder.from_config(recipe.model, device, instructions=instructions(recipe))


def build_lora(pooling: Pooling) -> Callable[[Recipe, torch.device], System]:
    def build(recipe: Recipe, device: torch.device) -> System:
        config = LoraBaselineConfig(
            backbone=recipe.model.backbone,
            lora=LoraSettings(rank=16, alpha=64, dropout=0.1),
            form="packed",
            pooling=pooling,
            max_length=recipe.model.max_length,
        )
        return LoraEmbedder.from_config(config, device)

    return build


SYSTEMS = {
    "pe": Entry(title="PE", build=build_pe()),
    "pe-no-reader": Entry(title="PE, no reader", build=build_pe(reader="none")),
    "pe-text": Entry(title="PE, instruction and text", build=build_pe(conditioning="instruction_and_text")),
    "pe-prefix": Entry(title="PE, prefix", build=build_pe(layout="prefix", pooling="mean_text", reader="none")),
    "static": Entry(title="static prompts (control)", build=build_static),
    "lora-mean": Entry(title="LoRA, mean", build=build_lora("mean")),
    "lora-last": Entry(title="LoRA, last token", build=build_lora("last")),
}
MEASURED = ("pe", "static", "lora-mean", "lora-last")


def instructions(recipe: Recipe) -> list[Instruction]:
    """Every instruction of the training sets, both sides."""
    found: list[Instruction] = []
    for item in recipe.data:
        documents = item.instruction if item.document_instruction is None else item.document_instruction
        found += [Instruction(item.instruction, "query"), Instruction(documents, "document")]
    return list(dict.fromkeys(found))


def evaluate(encoder: TextEncoder, recipe: Recipe) -> Scores:
    options = recipe.evaluate
    return score(encoder, options.tasks, data=Path(options.data), instructions=options.instructions)


def train_one(name: str, recipe: Recipe, device: torch.device, before: bool) -> list[Row]:
    """The trained system under the recipe's seed, and before it the untrained one if asked for."""
    entry, seed = SYSTEMS[name], recipe.train.seed
    set_seed(seed)
    plan = build_plan(recipe, Console(quiet=True))
    model = entry.build(recipe, device)
    rows: list[Row] = []
    if before:
        rows.append(Row(f"{entry.title}, untrained", evaluate(model, recipe)))
    history = fit(model, plan, recipe, build_accelerator(recipe))
    rows.append(Row(f"{entry.title}, trained", evaluate(model, recipe), history.seconds))
    return rows


def frozen_rows(recipe: Recipe, device: torch.device) -> list[Row]:
    """The frozen backbone's mean pooling, of bare texts and behind the instruction."""
    bare = FrozenEncoder.from_config(recipe.model.backbone, device, max_length=recipe.model.max_length)
    instructed = FrozenEncoder(bare.backbone, templates=Templates(), max_length=recipe.model.max_length)
    titles = ("frozen backbone, mean", "frozen backbone, mean, instruction before queries")
    return [Row(title, evaluate(encoder, recipe)) for title, encoder in zip(titles, (bare, instructed), strict=True)]


def as_record(row: Row, recipe: Recipe, name: str, device: torch.device) -> records.Record:
    found = row.scores.to_dict()
    return {
        "recipe": name,
        "variant": row.title,
        "seed": recipe.train.seed,
        "device": device.type,
        "backbone": recipe.model.backbone.model,
        "steps": recipe.train.steps,
        "rate": recipe.train.lr,
        "seconds": None if row.seconds is None else round(row.seconds, 3),
        "mean": found["mean"],
        "by_type": found["by_type"],
        "by_task": {task: result["score"] for task, result in found["tasks"].items()},
    }


def with_seed(recipe: Recipe, seed: int, rate: float | None = None) -> Recipe:
    train = dataclasses.replace(recipe.train, seed=seed, lr=recipe.train.lr if rate is None else rate)
    return dataclasses.replace(recipe, train=train)


def measure(
    recipe: Recipe,
    name: str,
    systems: Sequence[str],
    seeds: Sequence[int],
    rates: dict[str, float],
    device: torch.device,
) -> None:
    """Train and score every system under every seed; a record is written and printed as each one ends."""

    def keep(row: Row, own: Recipe) -> None:
        record = as_record(row, own, name, device)
        records.append("quality", [record])
        types = ", ".join(f"{kind} {value:.1f}" for kind, value in row.scores.by_type.items())
        print(
            f"{row.title}, seed {own.train.seed}: mean {row.scores.mean:.1f} ({types}), {record['seconds']} s",
            flush=True,
        )

    first = with_seed(recipe, seeds[0])
    for row in frozen_rows(first, device):
        keep(row, first)
    for seed in seeds:
        for system in systems:
            own = with_seed(recipe, seed, rates.get(system, SYSTEMS[system].rate))
            for row in train_one(system, own, device, before=seed == seeds[0]):
                keep(row, own)


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "tiny.yaml")
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(MEASURED))
    options.add_argument("--rates", nargs="*", default=[], metavar="SYSTEM=RATE")
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments, overrides = options.parse_known_args(argv)
    rates = {name: float(value) for name, _, value in (item.partition("=") for item in arguments.rates)}
    recipe = load_recipe(arguments.recipe, overrides)
    name = f"{arguments.recipe.stem}{' ' * bool(overrides)}{' '.join(overrides)}"
    measure(recipe, name, arguments.systems, arguments.seeds, rates, torch.device(arguments.device))


if __name__ == "__main__":
    main()

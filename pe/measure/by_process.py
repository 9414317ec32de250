"""What each of the processes that train together holds in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.table import Table

from pe.measure.meters import MIB, highest_resident
from pe.method.sharded import frozen_bytes
from pe.model import PromptEmbedder

COPIES = 4
"""What AdamW trains is there as weight, gradient and two moments."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """Bytes of one process.

    Attributes:
        backbone: its frozen weights, or the part of them that the process holds.
        prompter: the prompting LLM with the gradients and moments of what trains of it.
        others: the same of all else that trains.
        texts: keys and values of the text pass that was the largest.
        peak: of a GPU all that torch held there at once; else what the process had at most.
    """

    backbone: int
    prompter: int
    others: int
    texts: int
    peak: int

    @classmethod
    def of(cls, model: PromptEmbedder, tokens: int) -> Held:
        """Of this process, whose largest step read so many tokens; all processes ask at the same time."""
        parts = {name: COPIES * sum(p.nbytes for p in group) for name, group in model.trainable_parameters().items()}
        one = model.backbone.read([[0]])
        device = model.device
        return cls(
            backbone=frozen_bytes(model.backbone.model),
            prompter=frozen_bytes(model.prompter) + parts.pop("prompter", 0),
            others=sum(parts.values()),
            texts=tokens * sum(x.nbytes for pair in one.layers for x in pair),
            peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else highest_resident(),
        )


def table(held: Sequence[Held]) -> Table:
    """A row for each process, in their order."""
    grid = Table("process", title="Memory by process, MiB", title_justify="left")
    for name in ("backbone", "prompting LLM", "other parts that train", "texts, at most", "peak"):
        grid.add_column(name, justify="right")
    for place, item in enumerate(held):
        sizes = (item.backbone, item.prompter, item.others, item.texts, item.peak)
        grid.add_row(str(place), *(f"{size / MIB:,.1f}" for size in sizes))
    return grid

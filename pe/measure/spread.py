"""Whether an embedder does what it is told: how alike its prompts are, and a text's embeddings under them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pe.method.prompted import PromptedEmbedder
from pe.method.requests import Instruction

ALIKE = 0.99
MOST_INSTRUCTIONS, MOST_TEXTS = 16, 32


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean cosines over the pairs of some instructions.

    Attributes:
        instructions: how many.
        prompts: of the soft prompts, all K rows as one vector; None where they depend on the text too.
        embeddings: of a text's embeddings, averaged over some texts.
    """

    instructions: int
    prompts: float | None
    embeddings: float

    @property
    def is_alike(self) -> bool:
        """Whether an instruction hardly changes an embedding."""
        return self.embeddings >= ALIKE

    @property
    def warning(self) -> str:
        """What that means, and what to do."""
        return (
            f"the embeddings of a text under {self.instructions} instructions are alike (mean cosine"
            f" {self.embeddings:.4f}), so this embedder does not follow its instructions; train on sets that contradict"
            " each other (`instruct`), with model.lens_rank, a lower train.lr, or a larger prompting LLM"
        )

    def __str__(self) -> str:
        prompts = "" if self.prompts is None else f"prompts {self.prompts:.4f}, "
        return f"mean cosine between {self.instructions} instructions: {prompts}embeddings {self.embeddings:.4f}"


def mean_cosine(rows: Tensor) -> float:
    """Mean over the pairs of `[I, D]`."""
    unit = F.normalize(rows.float(), dim=-1)
    pairs = list(itertools.combinations(range(len(unit)), 2))
    return sum(float(unit[i] @ unit[j]) for i, j in pairs) / len(pairs)


@torch.no_grad()
def spread(model: PromptedEmbedder, instructions: Sequence[str], texts: Sequence[str]) -> Spread | None:
    """How alike up to 16 instructions of queries are, on up to 32 texts; None of fewer than two."""
    wanted = list(dict.fromkeys(instructions))
    wanted = wanted[:: -(-len(wanted) // MOST_INSTRUCTIONS)] if wanted else []
    if len(wanted) < 2:
        return None
    embeddings = model.encode_tensor(list(texts)[:MOST_TEXTS], instructions=wanted)  # [I, B, D]
    prompts = None
    if model.config.conditioning == "instruction":
        prompts = mean_cosine(model.prompt_bank(Instruction(text) for text in wanted).flatten(1))
    of_texts = [mean_cosine(rows) for rows in embeddings.transpose(0, 1)]
    return Spread(instructions=len(wanted), prompts=prompts, embeddings=sum(of_texts) / len(of_texts))

"""Lengths of the recipe's training texts, and batches of random tokens of such lengths.

    python -m bench.lengths [RECIPE.yaml]      writes bench/lengths.json

A recipe's batches hold one data set each. So these distributions are timed: `fixed`, all texts of 128 tokens and no
instruction for LoRA to read; `long`, the same with a quarter of the texts, at 512 tokens; `real`, one batch of every
data set, the mean weighted as the recipe draws them, with the instruction before LoRA's queries; `mixed`, one batch
drawn from all data sets together.

Texts have no labels; what is masked as a false negative are texts that came out alike.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from bench.cases import ROOT, Case
from pe.data import batches
from pe.data.batches import BatchPlan
from pe.data.instruct_set import load_training_set
from pe.losses import batch_requests
from pe.method.loading import TextTokenizer, load_config, load_tokenizer
from pe.model import Requests

FILE = Path(__file__).parent / "lengths.json"
FIXED = {"fixed": (128, 1), "long": (512, 4)}
"""Tokens of every text, and what the number of queries is divided by."""
ROWS = 64
LEAST = 2
"""Queries of a batch: the positive of one is the negative of another, and without any nothing trains."""
Distribution = Literal["fixed", "long", "real", "mixed"]
DISTRIBUTIONS: tuple[Distribution, ...] = ("fixed", "long", "real", "mixed")


@dataclass(frozen=True, kw_only=True)
class SetLengths:
    """Tokens of one data set's first batch: of each query, of its positive, and of both instructions."""

    name: str
    weight: float
    instruction: int
    document_instruction: int
    queries: list[int]
    documents: list[int]


@dataclass(frozen=True, kw_only=True)
class Batch(batches.Batch):
    """Queries and as many positives, as texts that `bench.cases.IdTokenizer` reads.

    Attributes:
        weight: share of the batch in the distribution's mean.
        lengths: tokens of the queries and of the positives, instructions left out.
    """

    weight: float
    lengths: tuple[list[int], list[int]]

    @property
    def requests(self) -> Requests:
        """What a model embeds."""
        return batch_requests(self)

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.lengths))

    @property
    def padded_tokens(self) -> int:
        """Tokens when each side is padded to its longest."""
        return sum(len(side) * max(side) for side in self.lengths)


@dataclass(frozen=True)
class Workload:
    """The batches of a distribution, and whether LoRA reads the instruction before its queries."""

    distribution: str
    batches: list[Batch]
    instructed: bool

    @property
    def tokens(self) -> float:
        """Tokens of a step, in the weighted mean."""
        return self.mean([batch.tokens for batch in self.batches])

    @property
    def padding_share(self) -> float:
        return 1 - self.tokens / self.mean([batch.padded_tokens for batch in self.batches])

    def turns(self) -> list[tuple[Batch, Batch]]:
        """Each batch and the one that follows it, the first after the last."""
        return list(zip(self.batches, [*self.batches[1:], *self.batches[:1]], strict=True))

    def mean(self, values: Sequence[float]) -> float:
        """Mean of one value a batch, weighted as the batches are drawn."""
        weights = [batch.weight for batch in self.batches]
        return sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)


def measure(recipe_file: Path) -> dict[str, object]:
    """Lengths of every data set's first batch under the recipe's templates, tokenizer and limit."""
    from pe.runs.recipes import load_recipe  # needs a package that batches do not

    recipe = load_recipe(recipe_file)
    name = recipe.model.backbone.model
    vocabulary = load_config(name, None).get_text_config().vocab_size
    tokenizer = TextTokenizer(load_tokenizer(name, None), vocabulary)

    def tokens(texts: Sequence[str], limit: int | None = recipe.trained_length) -> list[int]:
        return [len(ids[:limit]) for ids in tokenizer(texts)]

    found = []
    for item in recipe.data:
        batch = BatchPlan([load_training_set(item)], [1.0], 1, ROWS, recipe.train.seed, hard_negatives=0).batch(0)
        heads = [f"Instruct: {text}\nQuery:" for text in (batch.instructions[0], batch.document_instruction)]
        instruction, document_instruction = tokens(heads, None)
        found.append(
            SetLengths(
                name=Path(item.path).name.partition(".")[0],
                weight=item.weight,
                instruction=instruction,
                document_instruction=document_instruction,
                queries=tokens(batch.queries),
                documents=tokens(batch.documents),
            )
        )
    return {"recipe": recipe_file.name, "tokenizer": Path(name).name, "sets": [asdict(item) for item in found]}


def read(file: Path = FILE) -> list[SetLengths]:
    return [SetLengths(**item) for item in json.loads(file.read_text(encoding="utf-8"))["sets"]]


def workload(distribution: Distribution, case: Case, sets: Sequence[SetLengths] | None = None) -> Workload:
    """Batches of `case.queries` queries; the same tokens for everyone who asks."""
    sets, rows, vocabulary = sets or read(), case.queries, case.vocabulary
    generator = torch.Generator().manual_seed(0)

    def text(count: int) -> str:
        return " ".join(map(str, torch.randint(vocabulary, (count,), generator=generator).tolist()))

    def batch(weight: float, heads: tuple[int, int], lengths: tuple[list[int], list[int]]) -> Batch:
        instruction, document_instruction = map(text, heads)
        queries, documents = ([text(count) for count in side] for side in lengths)
        return Batch.unlabelled(
            [instruction],
            queries,
            documents,
            document_instruction=document_instruction,
            weight=weight,
            lengths=lengths,
        )

    heads = (sets[0].instruction, sets[0].document_instruction)
    if distribution in FIXED:
        length, divisor = FIXED[distribution]
        side = [length] * max(LEAST, rows // divisor)
        return Workload(distribution, [batch(1.0, heads, (side, side))], instructed=False)
    if distribution == "real":
        of_sets = []
        for item in sets:
            sides = (cycled(item.queries, rows), cycled(item.documents, rows))
            of_sets.append(batch(item.weight, (item.instruction, item.document_instruction), sides))
        return Workload("real", of_sets, instructed=True)
    order = interleaved(sets, rows)
    drawn = ([sets[i].queries[n] for i, n in order], [sets[i].documents[n] for i, n in order])
    return Workload("mixed", [batch(1.0, heads, drawn)], instructed=True)


def cycled(lengths: Sequence[int], count: int) -> list[int]:
    """`count` lengths, from the beginning again where there are fewer."""
    return [lengths[i % len(lengths)] for i in range(count)]


def interleaved(sets: Sequence[SetLengths], count: int) -> list[tuple[int, int]]:
    """(data set, row) of `count` rows drawn in proportion to the weights, always from the set that lags most."""
    drawn = [0] * len(sets)
    order = []
    for _ in range(count):
        place = min(range(len(sets)), key=lambda i: (drawn[i] + 1) / sets[i].weight)
        order.append((place, drawn[place] % len(sets[place].queries)))
        drawn[place] += 1
    return order


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("recipe", type=Path, nargs="?", default=ROOT / "recipes" / "tiny.yaml")
    recipe = options.parse_args(argv).recipe
    FILE.write_text(json.dumps(measure(recipe), indent=None) + "\n", encoding="utf-8")
    for item in read(FILE):
        means = (sum(side) / len(side) for side in (item.queries, item.documents))
        print(f"{item.name}: queries {next(means):.0f} tokens, documents {next(means):.0f}, weight {item.weight:g}")


if __name__ == "__main__":
    main()

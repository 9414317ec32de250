"""The model card beside every trained model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCardData

from pe.config import Recipe
from pe.data.instructions import training_sets
from pe.data.tables import HUB
from pe.hub import card_data, of_folder, with_data
from pe.method.loading import commit_of

if TYPE_CHECKING:
    from pe.evaluate import Scores
    from pe.measure.spread import Spread
    from pe.model import PromptEmbedder


def shown(name: str) -> str:
    """A hub's name, or a path below the working directory; of any other path the end, which tells of no machine."""
    path = Path(name)
    return path.name if path.is_absolute() or ".." in path.parts or name.startswith("~") else name


def cell(text: str) -> str:
    """A text that keeps to its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def usage(model: PromptEmbedder) -> str:
    """How to embed by either library: without an instruction where there is a default, and with one of training."""
    of_queries = [text for name, text in model.instructions.items() if not name.endswith("document")]
    literal = json.dumps((of_queries or ["Retrieve semantically similar text"])[-1], ensure_ascii=False)
    ours = ["from pe.model import PromptEmbedder", ""]
    ours += ['model = PromptEmbedder.from_pretrained("MODEL")  # this folder, or its name on the hub']
    theirs = ["from sentence_transformers import SentenceTransformer", ""]
    theirs += ['model = SentenceTransformer("MODEL", trust_remote_code=True)  # the code is the package promptembedder']
    if model.instructions:
        ours += ['queries = model.encode(["a text"])  # under the instruction `query`']
        ours += ['documents = model.encode(["a text"], side="document")  # under the instruction `document`']
        theirs += ['queries = model.encode_query(["a text"])', 'documents = model.encode_document(["a text"])']
    ours += [f'embeddings = model.encode(["a text"], instruction={literal})']
    theirs += [f'embeddings = model.encode(["a text"], prompt={literal})']
    code = ["```python", *ours, "```", "", "By sentence-transformers:", "", "```python", *theirs, "```"]
    return "\n".join(code)


def metadata(recipe: Recipe, model: PromptEmbedder, scores: Mapping[str, Scores]) -> ModelCardData:
    """What the card says to machines: licence, models and data of the hub that it was made of, what it scores."""
    licences, bases = set[str | None](), dict[str, None]()
    parts = {model.backbone.name: model.backbone.model, model.config.prompter.model: model.prompter.model}
    for name, loaded in parts.items():
        told = of_folder(Path(name))
        licences.add(told.license)
        origin = name if commit_of(loaded) else told.base_model or ()
        bases |= dict.fromkeys([origin] if isinstance(origin, str) else origin)
    (licence,) = licences if len(licences) == 1 else (None,)
    sets = training_sets([item for item in recipe.data if item.path.startswith(HUB)])
    return card_data(
        license=recipe.license or licence,
        base_model=list(bases) or None,
        datasets=list(sets) or None,
        model_name=model.name,
        eval_results=results(list(scores.values())[-1]) if scores else None,
    )


def results(scores: Scores) -> list[EvalResult]:
    """Scores as the hub shows them; one that is not a number is left out."""
    return [
        EvalResult(
            task_type=task.type,
            dataset_type=shown(name),
            dataset_name=shown(name),
            metric_type=task.metric,
            metric_value=round(task.score, 2),
        )
        for name, task in scores.tasks.items()
        if not math.isnan(task.score)
    ]


def instructions(model: PromptEmbedder) -> str:
    """The section of what it was trained under, by name; nothing where that is not known."""
    if not model.instructions:
        return ""
    named = "\n".join(f"| `{name}` | {cell(sentence)} |" for name, sentence in model.instructions.items())
    return f"""## Instructions
What it was trained under; where none is given, queries take `query` and documents `document`. In sentence-transformers
they are prompts of these names.

| name | instruction |
| --- | --- |
{named}

"""


def alike(spread: Spread | None) -> str:
    """How alike its instructions are, and a warning where they are alike; nothing where it has but one."""
    if spread is None:
        return ""
    warning = f" **Warning: {spread.warning}.**" if spread.is_alike else ""
    return f"{str(spread).capitalize()} (1: alike).{warning}\n\n"


def model_card(
    recipe: Recipe,
    model: PromptEmbedder,
    seconds: float,
    scores: Mapping[str, Scores],
    spread: Spread | None = None,
    *,
    steps: int | None = None,
    weights: str = "",
) -> str:
    """What was trained on what, how to use it, what it scores and how alike its instructions are, as Markdown.

    Args:
        recipe: what it was made of.
        model: the embedder.
        seconds: training time.
        scores: by what was scored, the embedder itself last.
        spread: how alike instructions are; None of fewer than two.
        steps: those that were taken; None: the recipe's.
        weights: a sentence on which weights these are, where they are not the last.
    """
    config = model.config
    data = "\n".join(f"| `{shown(item.path)}` | {item.weight:g} |" for item in recipe.data)
    tables = "\n".join(
        f"| {name} | " + " | ".join(f"{value:.1f}" for value in found.by_type.values()) + f" | {found.mean:.1f} |"
        for name, found in scores.items()
    )
    types = next(iter(scores.values())).by_type if scores else {}
    head = "| | " + " | ".join(types) + " | mean |\n| --- |" + " ---: |" * (len(types) + 1)
    taken = recipe.train.total_steps if steps is None else steps
    quality = f"## Scores (x100)\n{head}\n{tables}\n" if scores else ""
    text = f"""# {model.name}

A PromptEmbedder: `{shown(config.prompter.model)}` writes {config.prompter.soft_tokens} soft tokens that turn the frozen
`{shown(config.backbone.model)}` into a text embedder of {model.dimensions} dimensions.

{usage(model)}

{instructions(model)}## Options
| option | value |
| --- | --- |
| layout | {config.layout} |
| conditioning | {config.conditioning} |
| pooling | {config.pooling} |
| reader | {config.reader} |
| skip | {config.skip} |
| alignment | {config.alignment.kind}, {config.alignment.init} |
| lens | {config.lens_rank or "none"} |
| prompting LLM | {config.prompter.trainable} |

## Training
{taken} steps of {recipe.train.batch_size} queries in {seconds:.0f} s, seed {recipe.train.seed}; the
resolved recipe is `recipe.yaml` in this folder.{f" {weights}" if weights else ""}

| data | weight |
| --- | ---: |
{data}

{alike(spread)}{quality}"""
    return with_data(metadata(recipe, model, scores), text)

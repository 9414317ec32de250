"""The model card beside every trained model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pe.config import Recipe
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
    """How to embed, in Python: without an instruction where there is a default, and with one of training."""
    of_queries = [text for name, text in model.instructions.items() if not name.endswith("document")]
    literal = json.dumps((of_queries or ["Retrieve semantically similar text"])[-1], ensure_ascii=False)
    lines = ["from pe.model import PromptEmbedder", ""]
    lines += ['model = PromptEmbedder.from_pretrained("MODEL")  # this folder, or its name on the hub']
    if model.instructions:
        lines += ['queries = model.encode(["a text"])  # under the instruction `query`']
        lines += ['documents = model.encode(["a text"], side="document")  # under the instruction `document`']
    return "\n".join([*lines, f'embeddings = model.encode(["a text"], instruction={literal})'])


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
    """How far its instructions are apart, and a warning where they are not; nothing where it has but one."""
    if spread is None:
        return ""
    warning = f" **Warning: {spread.warning}.**" if spread.is_alike else ""
    return f"M{str(spread)[1:]} (1: alike).{warning}\n\n"


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
    """What was trained on what, how to use it, what it scores and how far instructions are apart, as Markdown.

    Args:
        recipe: what it was made of.
        model: the embedder.
        seconds: training time.
        scores: by what was scored.
        spread: how far apart instructions are; None of fewer than two.
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
    return f"""---
library_name: promptembedder
pipeline_tag: sentence-similarity
---
# {model.name}

A PromptEmbedder: `{shown(config.prompter.model)}` writes {config.prompter.soft_tokens} soft tokens that turn the frozen
`{shown(config.backbone.model)}` into a text embedder of {model.dimensions} dimensions.

```python
{usage(model)}
```

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

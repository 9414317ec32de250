"""The model card beside every trained model."""

from __future__ import annotations

from collections.abc import Mapping

from pe.config import Recipe
from pe.evaluate import Scores
from pe.model import PromptEmbedder


def model_card(recipe: Recipe, model: PromptEmbedder, seconds: float, scores: Mapping[str, Scores]) -> str:
    """What was trained on what, how to use it, and what it scores, as Markdown."""
    config = model.config
    data = "\n".join(f"| `{item.path}` | {item.weight:g} | {item.instruction} |" for item in recipe.data)
    tables = "\n".join(
        f"| {name} | " + " | ".join(f"{value:.1f}" for value in found.by_type.values()) + f" | {found.mean:.1f} |"
        for name, found in scores.items()
    )
    types = next(iter(scores.values())).by_type if scores else {}
    head = "| | " + " | ".join(types) + " | mean |\n| --- |" + " ---: |" * (len(types) + 1)
    quality = f"## Scores (x100)\n{head}\n{tables}\n" if scores else ""
    return f"""---
library_name: promptembedder
pipeline_tag: sentence-similarity
---
# {model.name}

A PromptEmbedder: `{config.prompter.model}` writes {config.prompter.soft_tokens} soft tokens that turn the frozen
`{config.backbone.model}` into a text embedder of {model.dimensions} dimensions.

```python
from pe.model import PromptEmbedder

model = PromptEmbedder.from_pretrained("{recipe.output}/model")
embeddings = model.encode(["a text"], instruction="Retrieve semantically similar text.")
```

| option | value |
| --- | --- |
| layout | {config.layout} |
| conditioning | {config.conditioning} |
| pooling | {config.pooling} |
| reader | {config.reader} |
| skip | {config.skip} |
| alignment | {config.alignment.kind}, {config.alignment.init} |
| prompting LLM | {config.prompter.trainable} |

## Training
{recipe.train.steps} steps of {recipe.train.batch_size} queries in {seconds:.0f} s, seed {recipe.train.seed}; the
resolved recipe is `recipe.yaml` in this folder.

| data | weight | instruction |
| --- | ---: | --- |
{data}

{quality}"""

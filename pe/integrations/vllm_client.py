"""Texts through vLLM under an exported prompt; a copy of this file stands in the folder that `pe.export` writes.

    python client.py "a text" "another text"        # prints an embedding a line, as JSON

It needs vLLM, transformers and safetensors, and nothing of PromptEmbedder. vLLM takes rows of the model's input space
as `prompt_embeds`: those of a text's tokens and of the prompt, in one sequence, of which LAST pooling gives the
embedding. The tokens' rows are read from the model's own table, which is loaded on the processor beside vLLM.
Prompts as `prompt_embeds` reach vLLM's pooling since its pull request 34904 (February 2026).

Legend: L tokens of a text, R rows of the prompt, D the model's width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer


class Prompt(NamedTuple):
    """Rows `[R, D]` of one instruction, and what `pe.export` says of them."""

    rows: Tensor
    about: dict[str, Any]


def load_prompt(file: str | Path) -> Prompt:
    """What `pe.export` wrote."""
    with safe_open(str(file), "pt") as opened:
        return Prompt(opened.get_tensor("prompt"), json.loads(opened.metadata()["about"]))


def text_ids(tokenizer: Any, texts: Sequence[str], about: dict[str, Any]) -> list[list[int]]:
    """Token ids of each text as they were read in training: at least one, cut to `max_length`."""
    filled = [about["template"].replace("{text}", text) for text in texts]
    rows = tokenizer(filled, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []
    return [([*about["lead"], *ids] or [about["filler"]])[: about["max_length"]] for ids in rows]


@torch.no_grad()
def prompt_embeds(texts: Sequence[str], prompt: Prompt, tokenizer: Any, embedding: nn.Module) -> list[Tensor]:
    """`[L + R, D]` of each text: in the suffix layout the prompt stands behind it, in the prefix layout before it."""
    found = []
    for ids in text_ids(tokenizer, texts, prompt.about):
        text = embedding(torch.tensor(ids))
        rows = prompt.rows.to(text.dtype)
        found.append(torch.cat([text, rows] if prompt.about["layout"] == "suffix" else [rows, text]))
    return found


def embed(rows: Sequence[Tensor], about: dict[str, Any], **options: Any) -> list[list[float]]:
    """The embedding of each `[L + R, D]` by vLLM; `options` are those of its `LLM`, such as `dtype`."""
    from vllm import LLM
    from vllm.config import PoolerConfig

    llm = LLM(
        model=about["backbone"],
        revision=about["revision"],
        runner="pooling",
        enable_prompt_embeds=True,
        pooler_config=PoolerConfig(pooling_type="LAST"),
        **options,
    )
    return [output.outputs.embedding for output in llm.embed([{"prompt_embeds": found} for found in rows])]


def stock(about: dict[str, Any], dtype: str = "auto") -> tuple[Any, Any]:
    """Tokenizer and model of a prompt's backbone, as transformers loads them."""
    name, revision = about["backbone"], about["revision"]
    return (
        AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False),
        AutoModel.from_pretrained(name, revision=revision, dtype=dtype, trust_remote_code=False),
    )


def main() -> None:
    """Embed the arguments and print a line of JSON for each."""
    prompt = load_prompt(Path(__file__).parent / "prompt.safetensors")
    tokenizer, backbone = stock(prompt.about)
    rows = prompt_embeds(sys.argv[1:], prompt, tokenizer, backbone.get_input_embeddings())
    for embedding in embed(rows, prompt.about):
        print(json.dumps(embedding))


if __name__ == "__main__":
    main()

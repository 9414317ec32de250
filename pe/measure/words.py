"""What the prompting LLM writes, in words: a soft token is a mean over the vocabulary, and these weigh most in it.

Legend: N instructions, K soft tokens, P the width of the prompting LLM, V its vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from pe.method.requests import Instruction
from pe.model import PromptEmbedder

MOST_INSTRUCTIONS, MOST_WORDS = 6, 5

Words = dict[str, list[list[tuple[str, float]]]]
"""Instruction -> for each of K soft tokens its words and their weights, the heaviest first."""


@torch.no_grad()
def written_words(model: PromptEmbedder, instructions: Sequence[str]) -> Words:
    """The heaviest words of the prompts that are written for up to 6 queries' instructions.

    Nothing where the prompting LLM reads the text too: then each text has a prompt of its own. Leaves the model as in
    evaluation.
    """
    wanted = list(dict.fromkeys(instructions))
    wanted = wanted[:: -(-len(wanted) // MOST_INSTRUCTIONS)] if wanted else []
    if model.config.conditioning != "instruction" or not wanted:
        return {}
    prompter = model.train(False).prompter
    heads = [model.prompter_text(Instruction(text)) for text in wanted]
    hidden = prompter(model.prompter_ids([(head, head) for head in heads])).hidden  # [N, K, P]
    logits = hidden.float() @ prompter.output_embedding.float().T / prompter.mixture_temperature  # [N, K, V]
    weights, ids = logits.softmax(-1).topk(MOST_WORDS)
    tokenizer = prompter.text_tokenizer.tokenizer
    return {
        text: [
            [(spelled(tokenizer, number), round(weight, 4)) for number, weight in zip(*token, strict=True)]
            for token in zip(rows.tolist(), shares.tolist(), strict=True)
        ]
        for text, rows, shares in zip(wanted, ids, weights, strict=True)
    }


def spelled(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """A vocabulary entry as people read it: without its leading space; what is no text of its own by its token."""
    text = str(tokenizer.decode([number])).strip()
    return text if text and "\ufffd" not in text else str(tokenizer.convert_ids_to_tokens(number))

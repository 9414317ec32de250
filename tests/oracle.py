"""The method in its plainest form: stock models, one text at a time, whole sequences, no cache, no packing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pe.method.alignment import LinearAlignment
from pe.method.prompting import PromptingLLM
from pe.method.rms_norm import stock_norms
from pe.model import PromptEmbedder, Requests


def soft_prompt(prompter: PromptingLLM, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Soft tokens of one request and the hidden states that wrote them, `[K, P]` each, by whole stock forwards."""
    lm, tokens, hidden = prompter.model, [], []
    rows = lm.get_input_embeddings()(torch.tensor(ids))
    scale = rows[0].norm() / prompter.embedding[ids[0]].norm()
    for _ in range(prompter.config.soft_tokens):
        output = lm(inputs_embeds=rows[None], use_cache=False, output_hidden_states=True)
        probabilities = torch.softmax(output.logits[0, -1] / prompter.config.temperature, dim=-1)
        token = probabilities @ prompter.embedding * scale
        rows = torch.cat([rows, token[None]])
        tokens.append(token)
        hidden.append(output.hidden_states[-1][0, -1])
    return torch.stack(tokens), torch.stack(hidden)


def embed(model: PromptEmbedder, requests: Requests) -> Tensor:
    """Embeddings `[B, D]` by the stock backbone's forward over each concatenated sequence."""
    with stock_norms(model.backbone.model), stock_norms(model.prompter.model):
        return _embed(model, requests)


def _embed(model: PromptEmbedder, requests: Requests) -> Tensor:
    rows = [pooled(model, requests, place) for place in range(len(requests.texts))]
    embeddings = F.normalize(torch.stack(rows), dim=-1)
    if model.config.skip == "none":
        return embeddings
    assert model.skip is not None
    means = torch.stack([text_mean(model, requests, place) for place in range(len(requests.texts))])
    return F.normalize(embeddings + F.normalize(F.normalize(means, dim=-1) @ model.skip.weight, dim=-1), dim=-1)


def text_mean(model: PromptEmbedder, requests: Requests, place: int) -> Tensor:
    """Mean `[D]` of a text's standardised states, weighted as by attention of one query."""
    assert model.skip is not None
    states = text_states(model, requests, place)
    return torch.softmax(states @ model.skip.tokens.query, dim=0) @ states


@torch.no_grad()
def text_states(model: PromptEmbedder, requests: Requests, place: int) -> Tensor:
    """The stock backbone's states `[L, D]` of a text before its last layer, each divided by its RMS."""
    templates = getattr(model.config.templates, requests.instruction(place).side)
    body = templates.text.replace("{text}", requests.texts[place])
    ids, stock = model.backbone.text_tokenizer.tokenizer(body)["input_ids"], model.backbone.model
    stock.set_attn_implementation(model.backbone.stock_attention)
    states = stock(torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states[-2][0]
    return states / states.square().mean(-1, keepdim=True).sqrt()


def pooled(model: PromptEmbedder, requests: Requests, place: int) -> Tensor:
    config, instruction, text = model.config, requests.instruction(place), requests.texts[place]
    templates = getattr(config.templates, instruction.side)
    read = templates.prompter.replace("{instruction}", instruction.text)
    if config.conditioning == "instruction_and_text":
        read = read.replace("{text}", text)
    else:
        read = read[: read.index("{text}")].rstrip()
    assert isinstance(model.alignment, LinearAlignment)
    ids = model.prompter.text_tokenizer.tokenizer(read)["input_ids"]
    soft = soft_prompt(model.prompter, ids)[0] @ model.alignment.weight

    tokenizer, stock = model.backbone.text_tokenizer.tokenizer, model.backbone.model
    embedding = stock.get_input_embeddings()
    body = templates.text.replace("{text}", text)
    if config.layout == "suffix":
        before = embedding(torch.tensor(tokenizer(body)["input_ids"]))
        rows = torch.cat([before, soft])
        kept = slice(len(before), None)
    else:
        lead = templates.prefix.replace("{instruction}", instruction.text)
        before = torch.cat([embedding(torch.tensor(tokenizer(lead)["input_ids"])), soft])
        after = embedding(torch.tensor(tokenizer(body, add_special_tokens=False)["input_ids"]))
        rows = torch.cat([before, after])
        kept = slice(len(before), None)
    stock.set_attn_implementation(model.backbone.stock_attention)
    states = stock(inputs_embeds=rows[None], use_cache=False).last_hidden_state[0, kept]
    return states[-1] if config.pooling == "last" else states.mean(0)

"""Tiny random models of many architectures, made on the spot."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

VOCABULARY = 300
PLAIN: dict[str, Any] = {"reader": "none", "skip": "none"}
"""Options of an embedder of which a test says itself what else it has."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "eos_token_id": 0}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", SIZES),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", SIZES),
    "mistral_window": ("mistral", SIZES | {"sliding_window": 4}),
    "gemma2": ("gemma2", SIZES | {"sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", SIZES | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("phi3", SIZES),
    "olmo2": ("olmo2", SIZES),
    "granite": ("granite", SIZES | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "gpt_neox": ("gpt_neox", SIZES),
    "gpt2": ("gpt2", GPT2),
    "starcoder2": ("starcoder2", SIZES | {"sliding_window": 4}),
    "gpt_oss": ("gpt_oss", SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4}),
}


@cache
def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerBase:
    """Every byte a token, ids 2 to 257 behind `<|end|>` and `<s>`; a few merged words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|end|>", "<s>", *alphabet])}
    merges = []
    for left, right in (("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("Ġ", "a")):
        vocabulary[left + right] = len(vocabulary)
        merges.append((left, right))
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<s>" if bos else None, pad_token="<|end|>"
    )


def config_of(architecture: str, **changes: Any) -> Any:
    kind, sizes = ARCHITECTURES[architecture]
    return AutoConfig.for_model(kind, **(sizes | changes))


def randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights large enough that attention, norms and biases all matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 0.0 if "gemma" in model.config.model_type else 1.0  # Gemma norms multiply by 1 + weight
            is_norm = parameter.ndim == 1 and "norm" in name
            parameter.copy_(centre + 0.2 * noise if is_norm else 0.15 * noise)
    return model.eval()


def decoder(architecture: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A backbone: the decoder without its head, float32."""
    return randomise(AutoModel.from_config(config_of(architecture, **changes), dtype=torch.float32), seed)


def language_model(architecture: str, seed: int = 1, **changes: Any) -> PreTrainedModel:
    """A prompting LLM, float32."""
    return randomise(AutoModelForCausalLM.from_config(config_of(architecture, **changes), dtype=torch.float32), seed)


def save_models(folder: Path) -> None:
    """A prompting LLM and two backbones of different families, widths and tokenizers, saved with their tokenizers."""
    models = {
        "prompter": (language_model("llama", 1, hidden_size=24, head_dim=6), byte_tokenizer()),
        "one": (language_model("qwen3", 2), byte_tokenizer()),
        "two": (language_model("mistral_window", 3, hidden_size=40, head_dim=10), byte_tokenizer(bos=True)),
    }
    for name, (model, tokenizer) in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def write_rows(path: Path, *rows: object) -> Path:
    """Write a line a row, strings as they are and anything else as JSON; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


WORDS = ("river", "moon", "bread", "glass", "horse", "train", "cloud", "stone", "paper", "honey")


def write_training_data(folder: Path, rows: int = 40) -> dict[str, Path]:
    """Small learnable sets: pairs that share a word, and texts labelled by their word."""
    pairs = [
        {
            "query": f"{WORDS[n % 10]} {n}?",
            "positive": f"the {WORDS[n % 10]} number {n}",
            "negatives": [f"no {WORDS[(n + 1) % 10]} {n}"],
        }
        for n in range(rows)
    ]
    labelled = [{"text": f"{WORDS[n % 10]} item {n}", "label": WORDS[n % 10]} for n in range(rows)]
    return {
        "pairs": write_rows(folder / "pairs.jsonl", *pairs),
        "labelled": write_rows(folder / "labelled.jsonl", *labelled),
    }

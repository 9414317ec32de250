"""Models and tokenizers from a folder or a hub, by name."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pe.config import LoraSettings


class TextTokenizer:
    """Token ids with the special tokens that the tokenizer puts in front, and none behind."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        plain, special = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
        self.lead: list[int] = next(
            (special[:i] for i in range(len(special)) if special[i : i + len(plain)] == plain), []
        )
        eos = tokenizer.eos_token_id
        self.filler: int = eos if isinstance(eos, int) else 0

    def __call__(self, texts: Sequence[str], *, lead: bool = True) -> list[list[int]]:
        """Ids of each text, at least one; `lead=False` for texts that continue a sequence."""
        if not texts:
            return []
        ids = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [(self.lead + row if lead else row) or [self.filler] for row in ids]


def lora_config(settings: LoraSettings) -> LoraConfig:
    """PEFT's configuration for adapters on every linear layer."""
    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules="all-linear"
    )


def train_in_float32(model: nn.Module, adapter: str) -> None:
    """Hold the weights of a LoRA adapter in float32: steps of a small rate are lost in half precision."""
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            parameter.data = parameter.data.float()


def quiet() -> None:
    """For the command lines: transformers without bars and load reports; errors still come through."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def embedding_scale(model: PreTrainedModel) -> float:
    """The factor that a model's embedding layer applies to its rows (Gemma), in their type; 1 elsewhere."""
    layer: Any = model.get_input_embeddings()
    return rounded(getattr(layer, "scalar_embed_scale", 1.0), layer.weight.dtype)


def rounded(value: float, dtype: torch.dtype) -> float:
    """A positive number as `dtype` holds it."""
    unit = math.ldexp(torch.finfo(dtype).eps, math.frexp(value)[1] - 1)
    return round(value / unit) * unit


def load_pretrained(
    auto: type, name: str, revision: str | None, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, safetensors only, no remote code.

    Raises:
        FileNotFoundError: with the path tried and what to do.
    """
    try:
        AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name}: no model there; tried the folder {Path(name).resolve()} and the model hub ({error}). Name a"
            " folder that holds config.json, or a hub model that can be reached or is in the cache"
        ) from error
    model = auto.from_pretrained(name, revision=revision, dtype=dtype, use_safetensors=True)  # type: ignore[attr-defined]
    return model, AutoTokenizer.from_pretrained(name, revision=revision)


def fingerprint(name: str) -> str | None:
    """Content hash of a local checkpoint (config, and size and ends of each weights file); None for a hub name."""
    folder = Path(name)
    if not folder.is_dir():
        return None
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            digest.update(file.read(1 << 16))
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            digest.update(file.read())
    return digest.hexdigest()


def content_of(model: PreTrainedModel, name: str, revision: str | None) -> str | None:
    """What was loaded: a folder's fingerprint, or the hub's commit, since a branch's content may change."""
    return fingerprint(name) or getattr(model.config, "_commit_hash", None) or revision

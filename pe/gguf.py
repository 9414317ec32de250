"""GGUF files, as llama.cpp has them: read by transformers, and written as an ordinary checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_gguf_available

SUFFIX = ".gguf"
MAGIC = b"GGUF"


def is_gguf(name: str) -> bool:
    """Whether a model is named by a GGUF file."""
    return name.lower().endswith(SUFFIX)


def check_gguf(path: Path) -> None:
    """Look at a file before transformers reads it.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: the package `gguf` is missing, or the file is no GGUF, or it is cut short or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a GGUF file, found none")
    if not is_gguf_available():
        raise ValueError(f"{path}: expected the package `gguf` (pip install 'promptembedder[gguf]'), got none")
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path}: expected a GGUF file, got one that does not begin with {MAGIC.decode()}")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OverflowError, UnicodeDecodeError, KeyError) as error:
        raise ValueError(
            f"{path}: the GGUF file is cut short or damaged ({error}); copy or download it again"
        ) from error
    needed = max((int(tensor.data_offset + tensor.n_bytes) for tensor in reader.tensors), default=0)
    if path.stat().st_size < needed:
        raise ValueError(
            f"{path}: the GGUF file is cut short: expected {needed:,} bytes, got {path.stat().st_size:,}; copy or"
            " download it again"
        )


def load_gguf(auto: type, path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with its weights in `dtype`, and its tokenizer.

    The model is an ordinary one, which can be saved: its config says nothing of GGUF's quantisation.

    Raises:
        FileNotFoundError, ValueError: see `check_gguf`, or an architecture or tokenizer that transformers cannot read.
    """
    check_gguf(path)
    where: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    try:
        read = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    except (ValueError, KeyError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"{path}: transformers cannot read this GGUF file ({error}); give a checkpoint folder"
        ) from error
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = dtype
    model = auto.from_config(config, dtype=dtype)  # type: ignore[attr-defined]
    state = read.state_dict() if type(model) is type(read) else read.base_model.state_dict()
    model.load_state_dict(state)
    model.tie_weights()
    return model.eval(), tokenizer

"""GGUF files, as llama.cpp has them: read by transformers, and written as an ordinary checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_gguf_available

SUFFIX = ".gguf"
MAGIC = b"GGUF"


def is_gguf(name: str | Path) -> bool:
    """Whether a model is named by a GGUF file."""
    return str(name).lower().endswith(SUFFIX)


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
    with read_by_transformers(path) as where:
        read = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    config = without_quantisation(read.config)
    config.dtype = dtype
    model = auto.from_config(config, dtype=dtype)  # type: ignore[attr-defined]
    model.load_state_dict((read if type(model) is type(read) else read.base_model).state_dict())
    model.tie_weights()
    return model.eval(), tokenizer


def load_gguf_config(path: Path) -> PreTrainedConfig:
    """What a GGUF file says of its model; errors as of `load_gguf`."""
    with read_by_transformers(path) as where:
        return without_quantisation(AutoConfig.from_pretrained(path.parent, **where))


def load_gguf_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file; errors as of `load_gguf`."""
    with read_by_transformers(path) as where:
        return AutoTokenizer.from_pretrained(path.parent, **where)


@contextlib.contextmanager
def read_by_transformers(path: Path) -> Iterator[dict[str, Any]]:
    """The options by which transformers reads a GGUF file, which is looked at first.

    Raises:
        FileNotFoundError, ValueError: see `check_gguf`; what transformers cannot read, with the file's name.
    """
    check_gguf(path)
    try:
        yield {"gguf_file": path.name, "trust_remote_code": False}
    except (ValueError, KeyError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"{path}: transformers cannot read this GGUF file ({error}); give a checkpoint folder"
        ) from error


def without_quantisation(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config of GGUF without what keeps its model from being saved."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config

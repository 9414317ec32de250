"""Models and tokenizers from a folder or a hub, by name."""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

HALVES: dict[torch.dtype, Callable[[], bool]] = {
    torch.bfloat16: lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
"""Whether a processor has instructions for products of these types, as torch's library for them says."""


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


def has_instructions(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device multiplies matrices of this type by instructions of its own; of a GPU this is not asked."""
    if device.type != "cpu" or dtype not in HALVES:
        return True
    return torch.backends.mkldnn.is_available() and bool(HALVES[dtype]())


def warn_of_slow_products(option: str, dtype: torch.dtype, device: torch.device) -> None:
    """Warn of an option that asks a processor for products it has no instructions for."""
    if not has_instructions(dtype, device):
        name, processor = str(dtype).removeprefix("torch."), torch.backends.cpu.get_cpu_capability()
        warnings.warn(
            f"{option}: this processor ({processor}) has no instructions for {name}, whose products take many times as"
            " long as float32's; choose float32, in the recipe or when loading",
            stacklevel=3,
        )


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: torch knows no such device, or cannot use it here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: expected one that can be used here, such as cpu, got {name!r} ({reason})") from error
    return device


def load_pretrained(
    auto: type, name: str, revision: str | None, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, safetensors only, no remote code.

    Raises:
        FileNotFoundError: with the path tried and what to do.
        ValueError: a weights file or a tokenizer that is cut short or damaged, with its name.
    """
    try:
        AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name}: no model there; tried the folder {Path(name).resolve()} and the model hub ({error}). Name a"
            " folder that holds config.json, or a hub model that can be reached or is in the cache"
        ) from error
    try:
        model = auto.from_pretrained(name, revision=revision, dtype=dtype, use_safetensors=True)  # type: ignore[attr-defined]
    except SafetensorError as error:
        for file in checkpoint_files(name, revision)[1:]:
            check_weights(file)
        raise ValueError(f"{name}: the weights cannot be read ({error}); copy or download them again") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    except ValueError as error:
        files = "tokenizer.json, tokenizer_config.json"
        raise ValueError(f"{name}: damaged tokenizer: {files} ({error}); copy or download them again") from error
    config = None if Path(name).is_dir() else find_file(name, "config.json", revision)
    model.config._commit_hash = config.parent.name if config else None  # transformers 5.17 notes it no more
    return model, tokenizer


def check_weights(file: Path) -> None:
    """Read the header of a safetensors file, which says how long the file is.

    Raises:
        FileNotFoundError, ValueError: it is not there, or it is cut short or damaged.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected a weights file, found none; copy it again")
    try:
        with safe_open(file, "pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file}: the weights cannot be read ({error}); copy or download the file again") from error


def find_file(name: str, file: str, revision: str | None) -> Path | None:
    """A file of a model where transformers reads it: in the model's folder, or in the hub's cache."""
    folder = Path(name)
    found = folder / file if folder.is_dir() else try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str | Path) and Path(found).is_file() else None


def checkpoint_files(name: str, revision: str | None) -> list[Path]:
    """`config.json` and the weights that transformers loads; none if one of them is not found."""
    weights = ["model.safetensors"]
    index = find_file(name, "model.safetensors.index.json", revision)
    if index and not find_file(name, weights[0], revision):
        weights = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files = [found for file in ("config.json", *weights) if (found := find_file(name, file, revision))]
    return files if len(files) == 1 + len(weights) else []


def fingerprint(files: Iterable[Path]) -> str:
    """Content hash of a checkpoint: its config, and size and ends of each weights file."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(f"{path.name}:{path.stat().st_size}".encode())
            digest.update(file.read(1 << 16))
            file.seek(max(0, path.stat().st_size - (1 << 16)))
            digest.update(file.read())
    return digest.hexdigest()


def content_of(model: PreTrainedModel, name: str, revision: str | None) -> str | None:
    """What was loaded: the fingerprint of its files, the same on the hub and in a copy; else the hub's commit."""
    commit = commit_of(model) or revision
    files = checkpoint_files(name, commit)
    return fingerprint(files) if files else commit


def commit_of(model: PreTrainedModel) -> str | None:
    """The hub's commit that `load_pretrained` found a model at; None for a folder."""
    return getattr(model.config, "_commit_hash", None)


def has_content(model: PreTrainedModel, name: str, content: str | None, saved: Mapping[str, str | None]) -> bool:
    """Whether a model loaded from `name`, of this content, is the one whose `revision` and `commit` were saved.

    Until `commit` was saved too, `revision` was what the hub was asked for, a commit at best, and the fingerprint of a
    folder counted weights that are not loaded.
    """
    if content is None or content == saved["revision"]:
        return True
    folder, commit = Path(name), commit_of(model)
    if "commit" in saved:
        return commit is not None and commit == saved["commit"]
    if folder.is_dir():
        return fingerprint([folder / "config.json", *folder.glob("*.safetensors")]) == saved["revision"]
    return name == saved.get("name", name) or commit == saved["revision"]

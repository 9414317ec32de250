"""Models and tokenizers from a folder or a hub, by name."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.peft_utils import find_adapter_config_file

from pe.config import Dtype
from pe.method.gguf import is_gguf, load_gguf, load_gguf_config, load_gguf_tokenizer
from pe.method.merged import Adapter, adapter_in, merge
from pe.method.model_files import INDEX, WEIGHTS, check_inside, pickled, shards

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HALVES: dict[torch.dtype, Callable[[], bool]] = {
    torch.bfloat16: lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
"""Whether a processor has instructions for products of these types, as torch's library for them says."""
FIELD = re.compile(r"\{instruction\}|\{text\}")
PROBES = (
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "  two spaces,\ta tab\nand a line",
    "def f(x): return x + 10 * 2.5  # NOTE!?",
    "naïve café, Straße, Москва, 日本語, مرحبا",
    "UPPER lower 1234567890",
)
"""Texts by whose ids a tokenizer is known."""


class Filled(NamedTuple):
    """A template and what goes into its fields; what reads like a special token is one in the template alone."""

    template: str
    instruction: str = ""
    text: str = ""

    def __str__(self) -> str:
        return self.fill(self.template)

    def fill(self, part: str) -> str:
        """A part of the template with its fields filled in; braces in what goes in are plain characters."""
        if part == "{text}":  # most templates of texts are no more than that
            return self.text
        return FIELD.sub(lambda found: self.instruction if found[0] == "{instruction}" else self.text, part)


class TextTokenizer:
    """Token ids with the special tokens that the tokenizer puts in front, and none behind.

    Text is text: `<|endoftext|>` in it is read letter by letter. In the template of a `Filled` it is the token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
        """Take over a tokenizer of a model whose embedding has this many rows.

        Raises:
            ValueError: texts become nothing, all the same token, or tokens that the embedding has no row for.
        """
        self.tokenizer, self.rows = tokenizer, rows
        known = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special and token.content}
        self._special: dict[str, int] = {token.content: i for i, token in known.items()}
        longest_first = sorted(known.values(), key=lambda token: -len(token.content))
        self._cut = re.compile(f"({'|'.join(map(pattern, longest_first))})") if known else None
        self._parts: dict[str, list[str | int]] = {}
        plain, special = (self._ids(["a"], add_special_tokens=flag)[0] for flag in (False, True))
        self.lead: list[int] = next(
            (special[:i] for i in range(len(special)) if special[i : i + len(plain)] == plain), []
        )
        eos = tokenizer.eos_token_id
        self.filler: int = eos if isinstance(eos, int) and eos < rows else 0
        self._check()

    def _check(self) -> None:
        name = self.tokenizer.name_or_path or "tokenizer"
        read = {number for row in self._ids(PROBES) for number in row}
        if len(read) < 2:
            raise ValueError(
                f"{name}: the tokenizer reads every text as {'the same token' if read else 'nothing'}; its files"
                " (tokenizer.json, tokenizer_config.json) are missing or damaged: copy them from where the model is"
            )
        special = set(self._special.values()) - set(self.lead)
        beyond = {i: token for token, i in self.tokenizer.get_vocab().items() if i >= self.rows and i not in special}
        if beyond:
            raise ValueError(
                f"{name}: the tokenizer knows {len(beyond)} tokens, {beyond[min(beyond)]!r} first, that the model has"
                f" no row for (its embedding has {self.rows}); take the tokenizer that the model was trained with, or"
                " save the model after resize_token_embeddings"
            )

    def __call__(self, texts: Sequence[str | Filled], *, lead: bool = True) -> list[list[int]]:
        """Ids of each text, at least one; `lead=False` for texts that continue a sequence.

        Raises:
            ValueError: a special token of a template that the embedding has no row for.
        """
        cut = [[text] if isinstance(text, str) else self._filled(text) for text in texts]
        ids = iter(self._ids([part for parts in cut for part in parts if isinstance(part, str)]))
        before = self.lead if lead else []
        return [
            [*before, *chain.from_iterable([part] if isinstance(part, int) else next(ids) for part in parts)]
            or [self.filler]
            for parts in cut
        ]

    @property
    def behaviour(self) -> str:
        """A hash of what a few texts of many kinds become."""
        return hashlib.blake2b(repr(self(PROBES)).encode(), digest_size=8).hexdigest()

    def _ids(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        options = {"add_special_tokens": add_special_tokens, "split_special_tokens": True, "verbose": False}
        return self.tokenizer(list(texts), **options)["input_ids"] if texts else []

    def _filled(self, filled: Filled) -> list[str | int]:
        """A template's special tokens by id, and the filled text between them."""
        if filled.template not in self._parts:
            parts = self._cut.split(filled.template) if self._cut else [filled.template]
            cut: list[str | int] = [self._special.get(part.strip(), part) for part in parts if part]
            for number in cut:
                if isinstance(number, int) and number >= self.rows:
                    raise ValueError(
                        f"templates: expected tokens that the model knows, got {self.tokenizer.decode([number])!r} in"
                        f" {filled.template!r}: its embedding has {self.rows} rows; save the model after"
                        " resize_token_embeddings, or leave the token out"
                    )
            self._parts[filled.template] = cut
        return [part if isinstance(part, int) else filled.fill(part) for part in self._parts[filled.template]]


def pattern(token: AddedToken) -> str:
    """Matches a special token in a template, with the blanks around it that it swallows."""
    return r"\s*" * token.lstrip + re.escape(token.content) + r"\s*" * token.rstrip


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


def is_fast_in_bfloat16(device: torch.device) -> bool:
    """Whether products of bfloat16 are quicker on a device than those of float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def dtype_on(device: torch.device, chosen: Dtype) -> torch.dtype | None:
    """The type of frozen weights on a device, by the recipe's `backbone.dtype`; None: the checkpoint's."""
    if chosen == "auto":
        return torch.float32 if device.type == "cpu" else None
    if chosen == "fastest":
        return torch.bfloat16 if is_fast_in_bfloat16(device) else torch.float32
    return DTYPES[chosen]


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


def usable_device(name: str | None = None) -> torch.device:
    """The device of this name; without one a GPU where there is one, else the CPU.

    Raises:
        ValueError: torch knows no such device, or cannot use it here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # a build without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: expected one that can be used here, such as cpu, got {name!r} ({reason})") from error
    return device


def load_config(name: str, revision: str | None) -> PreTrainedConfig:
    """The configuration of a model that can be loaded, of an adapter's folder its base's; code of its own is not run.

    Raises:
        FileNotFoundError: with the path tried and what to do.
        ValueError: a model that needs code of its own, an adapter that is not a folder's, quantised weights, a damaged
            configuration, or a file that leads out of the folder.
    """
    if is_gguf(name):
        return load_gguf_config(Path(name))
    if adapter := adapter_in(name):
        try:
            return _whole_config(adapter.base, adapter.revision)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{name}: the base of this adapter of PEFT: {error}") from error
    return _whole_config(name, revision)


def _whole_config(name: str, revision: str | None) -> PreTrainedConfig:
    """That of a model which is no adapter."""
    if Path(name).is_dir():
        check_inside(Path(name))
    stored: dict[str, Any] = {}
    try:
        stored, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if "auto_map" in stored:
            raise own_code(name) from error
        if not isinstance(error.__cause__, LocalEntryNotFoundError) and is_adapter(name, revision):
            raise adapter_alone(name) from error
        raise FileNotFoundError(
            f"{name}: no model there; tried the folder {Path(name).resolve()} and the model hub ({one_line(error)})."
            " Name a folder that holds config.json, or a hub model that can be reached or is in the cache"
        ) from error
    except (StrictDataclassError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{name}: expected a config.json of transformers, got one that it cannot read ({one_line(error)}); copy or"
            " download it again"
        ) from error
    if Path(name).is_dir() and is_adapter(name, revision):
        raise adapter_alone(name)
    if kind := stored.get("quantization_config"):
        method = kind.get("quant_method", "unknown") if isinstance(kind, dict) else kind
        raise ValueError(
            f"{name}: expected weights in bfloat16, float16 or float32, got quantised ones (quantization_config in"
            f" config.json, method {method}); name the checkpoint that they were made of"
        )
    return config


def is_adapter(name: str, revision: str | None) -> bool:
    """Whether a folder or a repository of the hub holds an adapter of PEFT."""
    try:
        return find_adapter_config_file(name, revision=revision) is not None
    except (OSError, ValueError):  # `load_config` goes on to say what is wrong
        return False


def adapter_alone(name: str) -> ValueError:
    return ValueError(
        f"{name}: expected a whole model, or a folder with an adapter of PEFT whose base is elsewhere, got an adapter"
        " (adapter_config.json); load it with PEFT, merge it into its base by merge_and_unload(), save that with"
        " save_pretrained() and name its folder"
    )


def own_code(name: str) -> ValueError:
    return ValueError(
        f"{name}: expected an architecture that transformers has, got one that brings code of its own (auto_map in"
        " config.json), which is never run; choose another model, or a conversion of it without code"
    )


def load_pretrained(
    auto: type, name: str, revision: str | None, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model and its tokenizer, safetensors or a GGUF file only, no remote code.

    A folder with an adapter of PEFT is its base with the adapter merged.

    Raises:
        FileNotFoundError: with the path tried and what to do; no weights, or pickled ones alone.
        ValueError: see `load_config`; a weights file or a tokenizer that is cut short or damaged, with its name;
            weights that are not those of the configuration.
    """
    if is_gguf(name):
        return load_gguf(auto, Path(name), dtype if isinstance(dtype, torch.dtype) else torch.bfloat16)
    if adapter := adapter_in(name):
        return _load_merged(auto, adapter, dtype)
    config = load_config(name, revision)
    checkpoint_files(name, revision)  # which looks at the index
    options: dict[str, Any] = {"revision": revision, "use_safetensors": True, "trust_remote_code": False}
    try:
        model, report = auto.from_pretrained(  # type: ignore[attr-defined]
            name, dtype=dtype, output_loading_info=True, **options
        )
    except SafetensorError as error:
        for file in checkpoint_files(name, revision)[1:]:
            check_weights(file)
        raise ValueError(f"{name}: the weights cannot be read ({error}); copy or download them again") from error
    except OSError as error:
        raise FileNotFoundError(f"{name}: {missing_weights(name)} ({one_line(error)})") from error
    except ValueError as error:
        if getattr(config, "auto_map", None):
            raise own_code(name) from error
        raise
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        raise ValueError(
            f"{name}: expected weights of the shapes that config.json says, got others; copy or download both again"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{name}: expected weights for all of the model, got none for {missing[0]!r} ({len(missing)} are missing);"
            " copy or download them again"
        )
    if getattr(model, "peft_config", None):  # transformers has found one on the hub
        raise adapter_alone(name)
    tokenizer = load_tokenizer(name, revision)
    own = None if Path(name).is_dir() else find_file(name, "config.json", revision)
    model.config._commit_hash = own.parent.name if own else None  # transformers 5.17 notes it no more
    return model, tokenizer


def _load_merged(
    auto: type, adapter: Adapter, dtype: torch.dtype | str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An adapter's base with the adapter in it."""
    load_config(str(adapter.folder), None)
    for file in adapter.files[1:]:
        check_weights(file)
    whole, _ = load_pretrained(AutoModelForCausalLM, adapter.base, adapter.revision, dtype)
    merge(whole, adapter)
    model = whole if auto is AutoModelForCausalLM else cast(PreTrainedModel, whole.base_model)
    model.config._commit_hash = None  # its content is the folder's
    return model, load_tokenizer(str(adapter.folder), None)


def missing_weights(name: str) -> str:
    """Why a model has no weights that can be read, and what to do."""
    if pickle := pickled(Path(name)):
        return (
            f"expected weights in model.safetensors, got {pickle}, a pickle, which may run code and is never read;"
            " if you trust it, load it with transformers and write it with save_pretrained()"
        )
    return "expected weights in model.safetensors, or in the parts that its index names; copy or download them again"


def load_tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    """A model's tokenizer, of an adapter's folder without one its base's; code of its own is not run.

    Raises:
        ValueError: damaged, missing or with code of its own.
    """
    if is_gguf(name):
        return load_gguf_tokenizer(Path(name))
    if (adapter := adapter_in(name)) and not (adapter.folder / "tokenizer_config.json").is_file():
        name, revision = adapter.base, adapter.revision
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises no narrower one
        files = "tokenizer.json, tokenizer_config.json"
        raise ValueError(
            f"{name}: missing or damaged tokenizer: {files} ({one_line(error)}); copy or download them again"
        ) from error


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def check_weights(file: Path) -> None:
    """Read the header of a safetensors file, which says how long the file is.

    Raises:
        FileNotFoundError, ValueError: it is not there, or it is cut short or damaged.
    """
    if not file.is_file():
        pickle = pickled(file.parent, file.stem)
        found = f"got {pickle}, a pickle, which may run code and is never read" if pickle else "found none"
        raise FileNotFoundError(f"{file}: expected a weights file, {found}; copy it again")
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
    """`config.json` and the weights that transformers loads, or a GGUF file; none if one of them is not found.

    Of an adapter's folder its own files and those of its base.

    Raises:
        ValueError: see `shards`.
    """
    if is_gguf(name):
        return [Path(name)] if Path(name).is_file() else []
    if adapter := adapter_in(name):
        base = [] if adapter_in(adapter.base) else checkpoint_files(adapter.base, adapter.revision)
        return [*adapter.files, *base] if base and all(file.is_file() for file in adapter.files) else []
    weights = [WEIGHTS]
    index = find_file(name, INDEX, revision)
    if index and not find_file(name, WEIGHTS, revision):
        weights = shards(index)
    files = [found for file in ("config.json", *weights) if (found := find_file(name, file, revision))]
    return files if len(files) == 1 + len(weights) else []


def fingerprint(files: Iterable[Path]) -> str:
    """Content hash of a checkpoint: its config, and size and ends of each weights file."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(files, key=lambda path: path.name):
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

"""A PromptEmbedder in a folder: what it is made of, written whole or not at all, and read back.

`config.json` names the backbone and the content it was trained on: the fingerprint of its files, and the commit if they
came from a hub; and the instructions and sets of its training. `prompter/`, `reader/` and the files of alignment, skip
and lens hold what trains, `backbone/` and `prompter-base/` (under adapters) the frozen weights, where asked for.
sentence-transformers loads the same folder, by two files of its own, whose prompts are those instructions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from pe.config import Dtype, ModelConfig, RecipeError, to_dict
from pe.data.instructions import as_prompts, trained_instructions
from pe.hub import CARD
from pe.method.alignment import Alignment, AlignmentReport, LinearAlignment, VocabularyAlignment
from pe.method.backbone import Backbone
from pe.method.gguf import is_gguf
from pe.method.lens import Lens
from pe.method.loading import (
    TextTokenizer,
    check_weights,
    checkpoint_files,
    commit_of,
    fingerprint,
    has_content,
    load_pretrained,
)
from pe.method.merged import adapter_in
from pe.method.model_files import check_inside
from pe.method.prompting import PromptingLLM
from pe.method.skip import WeightedSkip, build_skip
from pe.runs.files import exchange

FORMAT = 1
NEEDED = {"model": (), "backbone": ("name", "revision", "included"), "alignment": ("shared_tokens", "residual")}
"""Keys that `config.json` must have, by section."""
SENTENCE_TRANSFORMERS: dict[str, Any] = {
    "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "pe.integrations.sentence_transformers.PromptModule"}],
    "config_sentence_transformers.json": {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"},
}
"""Files by which sentence-transformers knows how to load the folder, and their contents but for the prompts."""
MODULE = "sentence_transformers.PromptModule"
"""How the type of our module ends in the `modules.json` of sentence-transformers."""
CURE = "give the folder where it is now as {}, or save the embedder with include_backbone=True where it can be loaded"
HERE = {"backbone": "backbone=, --backbone (of pe.transfer: --source-backbone)", "prompter": "prompter=, --prompter"}
"""By what a caller, or a command, says where a model is."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
OLD_CONTENT = (
    " (it was saved when a backbone of the hub had its commit for content: load it by the hub's name and save it again,"
    " and copies will be known)"
)


class Parts(NamedTuple):
    """What a PromptEmbedder is made of."""

    config: ModelConfig
    prompter: PromptingLLM
    alignment: Alignment
    backbone: Backbone
    skip: WeightedSkip | None
    instructions: Mapping[str, str]
    lens: Lens | None = None
    training_sets: Sequence[str] = ()


class Told(NamedTuple):
    """What stands beside saved weights: a hash of them, and files about them by name, README.md first of all."""

    weights: str | None
    files: Mapping[str, str]


class Summary(NamedTuple):
    """What a folder says of its embedder before any weight is loaded: D, instructions by name, a hash of all of it."""

    dimensions: int | None
    instructions: Mapping[str, str]
    content: str


def summary(path: Path) -> Summary:
    """The summary of a saved PromptEmbedder; an old one does not say its size.

    Raises:
        FileNotFoundError, ValueError: none there, or of another format.
    """
    saved = read_config(path)
    kept = (file for file in path.rglob("*") if file.name.endswith((".safetensors", "config.json")))
    content = fingerprint(sorted(kept))  # of several files of one name the order would be the disk's
    return Summary(saved.get("dimensions"), _read_instructions(path, saved), content)


def write(parts: Parts, path: Path, told: Told, *, include_backbone: bool) -> None:
    """Write the parts to a folder, and what is told of them; see `PromptEmbedder.save_pretrained`.

    Raises:
        FileExistsError: the folder holds something other than a saved PromptEmbedder.
    """
    if os.path.lexists(path) and not _may_be_replaced(path):
        raise FileExistsError(f"{path}: not empty and not a saved PromptEmbedder; choose another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    is_empty = path.is_dir() and not any(path.iterdir())
    own = Path(tempfile.mkdtemp(prefix=f"{path.name}.saving-", dir=path if is_empty else path.parent))
    new, former = own / "new", own / "former"
    try:
        _write_parts(parts, new, path, told, include_backbone)
        _open_to_others(new)
        if is_empty:  # it stays where it is: a mount point cannot be replaced
            for entry in sorted(new.iterdir(), key=lambda entry: entry.name == "config.json"):
                entry.rename(path / entry.name)
            return
        if path.exists():
            if exchange(new, path):
                return
            path.rename(former)
        new.rename(path)
    finally:
        if os.path.lexists(former) and not path.exists():
            former.rename(path)
        shutil.rmtree(own, ignore_errors=True)


def _open_to_others(folder: Path) -> None:
    """Give every file the mode that new files have; safetensors writes for its owner alone."""
    mode = (folder / "config.json").stat().st_mode
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _write_parts(parts: Parts, folder: Path, path: Path, told: Told, include_backbone: bool) -> None:
    """Write the parts to a new folder, which will stand at `path`."""
    config, prompter, alignment, backbone, skip, instructions, lens, training_sets = parts
    folder.mkdir()
    if prompter.config.trainable != "none":
        prompter.model.save_pretrained(folder / "prompter")
    prompter.text_tokenizer.tokenizer.save_pretrained(folder / "prompter")
    small = {"alignment": alignment if isinstance(alignment, LinearAlignment) else None, "skip": skip, "lens": lens}
    for name, part in small.items():
        if part is not None:
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in part.named_parameters()}
            save_file(tensors, folder / f"{name}.safetensors")
    if backbone.has_reader:
        backbone.model.save_pretrained(folder / "reader")
    base = prompter.config
    has_base = base.trainable != "full" and (include_backbone or _is_inside(base.model, path))
    include_backbone |= _is_inside(backbone.name, path)
    if include_backbone and backbone.is_sharded:
        raise ValueError(
            f"{path}: expected a backbone whose weights are whole to write them, got one of which each process holds a"
            " part (train.shard_backbone); load the embedder in one process and save it there"
        )
    if has_base:
        _write_checkpoint(AutoModelForCausalLM, base.model, base.revision, prompter.model, folder / "prompter-base")
    if include_backbone:
        _write_checkpoint(AutoModel, backbone.name, config.backbone.revision, backbone.model, folder / "backbone")
    saved = {
        "format": FORMAT,
        "model": to_dict(config),
        "prompter": _reference(base.model, prompter, path, included=has_base),
        "backbone": _reference(backbone.name, backbone, path, included=include_backbone),
        "alignment": dataclasses.asdict(alignment.report),
        "dimensions": backbone.hidden_size,
        "instructions": dict(instructions),
        "training_sets": list(training_sets),
        "weights": told.weights,
    }
    for name, content in ({"config.json": saved} | sentence_transformers_files(instructions)).items():
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf-8")
    for name, text in told.files.items():
        (folder / name).write_text(text, encoding="utf-8")


def sentence_transformers_files(instructions: Mapping[str, str]) -> dict[str, Any]:
    """`SENTENCE_TRANSFORMERS` with the instructions as prompts, of which `query` is taken where none is given."""
    prompts, name = as_prompts(instructions), "config_sentence_transformers.json"
    chosen = {"prompts": prompts, "default_prompt_name": "query" if "query" in prompts else None}
    return SENTENCE_TRANSFORMERS | {name: SENTENCE_TRANSFORMERS[name] | chosen}


def _is_inside(name: str, path: Path) -> bool:
    """Whether a model's folder is in the folder `path`, or looks so through a link."""
    source = Path(name)
    places = (source.absolute(), path.absolute()), (source.resolve(), path.resolve())
    return source.exists() and any(inner.is_relative_to(outer) for inner, outer in places)


def _reference(name: str, part: PromptingLLM | Backbone, path: Path, *, included: bool) -> dict[str, Any]:
    """How `config.json` in `path` speaks of a checkpoint that a part was loaded from, and of what that contained."""
    source = Path(name)
    return {
        "name": name,
        "path": os.path.relpath(source.resolve(), path.resolve()) if source.exists() and not included else None,
        "revision": part.revision,
        "commit": commit_of(part.model),
        "tokenizer": part.text_tokenizer.behaviour,
        "included": included,
    }


def _write_checkpoint(auto: type, name: str, revision: str | None, loaded: PreTrainedModel, folder: Path) -> None:
    """The checkpoint itself, in its own dtype: the model in memory may be cast and carry adapters.

    An adapter is merged into its base in the type that it was merged in for training, which rounds the sum.
    """
    revision = None if Path(name).is_dir() else commit_of(loaded) or revision
    model, tokenizer = load_pretrained(auto, name, revision, loaded.dtype if adapter_in(name) else "auto")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def find(path: Path, revision: str | None, **options: Any) -> Path:
    """The folder of a saved PromptEmbedder: the one of this name, or else the hub's copy in its cache.

    `options` are those of `snapshot_download`, such as `token`.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: see `_embedder_in`.
    """
    if path.exists() or not HUB_NAME.fullmatch(path.as_posix()):
        return _embedder_in(path)
    try:
        return _embedder_in(Path(snapshot_download(path.as_posix(), revision=revision, **options)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{path}: no saved PromptEmbedder there; tried the folder {path.resolve()} and the model hub ({error})"
        ) from error


def _embedder_in(folder: Path) -> Path:
    """The folder itself, or its module's where sentence-transformers has saved it.

    Raises:
        ValueError: there are further modules, through which the embeddings go.
    """
    file = folder / "modules.json"
    if (folder / "config.json").exists() or not file.exists():
        return folder
    modules = [module for module in _read_json(file) if isinstance(module, dict)]
    types = [str(module.get("type")) for module in modules]
    ours = [module.get("path", "") for module, kind in zip(modules, types, strict=True) if kind.endswith(MODULE)]
    if ours and len(modules) > 1:
        raise ValueError(
            f"{folder}: expected an embedder alone, got the modules {', '.join(types)}; load it with"
            " SentenceTransformer, which runs them all"
        )
    return folder / ours[0] if ours else folder


def read(
    path: Path, *, backbone: str | None, prompter: str | None = None, dtype: Dtype | None, device: torch.device
) -> Parts:
    """The parts that `write` wrote; see `PromptEmbedder.from_pretrained`.

    Raises:
        FileNotFoundError: no saved PromptEmbedder there, a file of it is missing, or its backbone is not found.
        ValueError: another format, a damaged file, a backbone or a base of the prompting LLM whose content differs from
            the one trained on, or a `prompter` for a prompting LLM that is whole in the folder.
    """
    from pe.runs.recipes import model_config_from_dict  # its parser is a package that training steps do without

    check_inside(path)
    saved = read_config(path)
    config = model_config_from_dict(saved["model"], str(path / "config.json"))
    if dtype is not None:
        config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, dtype=dtype))
    prompting = _read_prompter(path, config, device, saved.get("prompter", {}), prompter)
    frozen = _read_backbone(path, config, device, saved["backbone"], backbone)
    if config.reader == "activated_lora":
        _check_adapter(path / "reader")
        frozen.load_reader(path / "reader")
    alignment: Alignment
    if config.alignment.kind == "linear":
        size = (prompting.hidden_size, frozen.hidden_size)
        weight = _read_tensors(path / "alignment.safetensors", {"weight": torch.Size(size)})["weight"].to(device)
        found = saved["alignment"]
        alignment = LinearAlignment(weight, AlignmentReport(found["shared_tokens"], found["residual"]))
    else:
        alignment = VocabularyAlignment(prompting, frozen)
    skip = build_skip(config.skip, frozen.hidden_size, device)
    if skip is not None:
        sizes = {name: tensor.shape for name, tensor in skip.state_dict().items()}
        skip.load_state_dict(_read_tensors(path / "skip.safetensors", sizes))
    lens = Lens(frozen.hidden_size, prompting.hidden_size, config.lens_rank, device) if config.lens_rank else None
    if lens is not None:
        sizes = {name: tensor.shape for name, tensor in lens.state_dict().items()}
        lens.load_state_dict(_read_tensors(path / "lens.safetensors", sizes, former="gate"))
    told = _read_instructions(path, saved), lens, saved.get("training_sets", ())
    return Parts(config, prompting, alignment, frozen, skip, *told)


def read_told(path: Path) -> Told:
    """What `write`, or a training, has put beside the weights in a folder; of one of before there is no hash."""
    found = {name: path / name for name in (CARD, "recipe.yaml")}
    files = {name: file.read_text(encoding="utf-8", errors="replace") for name, file in found.items() if file.is_file()}
    return Told(read_config(path).get("weights"), files)


def _read_instructions(path: Path, saved: dict[str, Any]) -> dict[str, str]:
    """What a saved embedder was trained under; of one saved before it said so, what the recipe beside it says.

    Raises:
        ValueError: no sentences by name.
    """
    if "instructions" not in saved:
        from pe.runs.recipes import load_recipe

        try:
            return trained_instructions(load_recipe(path / "recipe.yaml").data)
        except RecipeError:  # none there, or none that this version reads: such a folder has no default
            return {}
    found = saved["instructions"]
    if not isinstance(found, dict) or not all(isinstance(sentence, str) for sentence in found.values()):
        raise ValueError(
            f"{path / 'config.json'}: instructions: expected sentences by name, got {found!r:.80}; copy the saved"
            " embedder again"
        )
    return found


def _read_tensors(file: Path, sizes: Mapping[str, torch.Size], former: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a file that `write` wrote; a tensor called `former` is of an earlier form of the part.

    Raises:
        FileNotFoundError, ValueError: no such file, a damaged one, other names or shapes, or what is no number.
    """
    check_weights(file)
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected the tensors {list(sizes)} ({error}); copy the file again") from error
    if former in tensors:
        raise ValueError(f"{file}: expected today's {file.stem}, got an earlier form of it; train the embedder anew")
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: list(size) for name, size in sizes.items()}
    if found != expected:
        raise ValueError(f"{file}: expected tensors of shapes {expected}, got {found}; copy the file again")
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{file}: {wrong[0]}: expected finite numbers, got others; copy the file again")
    return tensors


def _check_adapter(folder: Path) -> None:
    """Raise FileNotFoundError or ValueError unless a folder holds an adapter: PEFT looks on the hub for what is not."""
    _read_json(folder / "adapter_config.json")
    check_weights(folder / "adapter_model.safetensors")


def _read_json(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError, ValueError: no such file, or a damaged one.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected a JSON file, found none; copy the saved embedder again")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: damaged ({error}); copy the saved embedder again") from error


def _read_backbone(
    path: Path, config: ModelConfig, device: torch.device, saved: dict[str, Any], given: str | None
) -> Backbone:
    """The backbone in the folder, where `given` says it is now, or where it was; its content is checked."""
    own = saved["included"] and given is None
    name = str(path / "backbone") if own else given or _locate(saved, path)
    commit = saved.get("commit", saved["revision"]) if name == saved["name"] else None
    revision = None if Path(name).is_dir() else commit or config.backbone.revision
    try:
        frozen = Backbone.from_pretrained(dataclasses.replace(config.backbone, model=name, revision=revision), device)
    except FileNotFoundError as error:
        cure = CURE.format(HERE["backbone"])
        raise FileNotFoundError(f"{path}: its backbone cannot be had: {error}; {cure}") from error
    if not (own or has_content(frozen.model, name, frozen.revision, saved)):
        raise ValueError(
            f"{path}: trained on backbone {saved['name']} with content {saved['revision']}, but {name} has content"
            f" {frozen.revision}; give the right folder as backbone=, or move the embedder with `python -m pe.transfer`"
            f"{'' if 'commit' in saved else OLD_CONTENT}"
        )
    _check_tokenizer(path, name, frozen.text_tokenizer, saved)
    return frozen


def _locate(saved: Mapping[str, Any], path: Path) -> str:
    """Where a model that was saved by its name is now: as it is called, or seen from the embedder's folder `path` or a
    folder above, if its content is the saved one there.
    """
    name, starts = saved["name"], (path.absolute(), path.resolve())
    above = [folder / name for start in starts for folder in (start, *start.parents)]
    places = [Path(name), (path.resolve() / (saved.get("path") or name)).resolve(), *above]
    here = (str(place) for place in places if any(os.access(file, os.R_OK) for file in _first_files(place)))
    return next((place for place in here if fingerprint(checkpoint_files(place, None)) == saved["revision"]), name)


def _first_files(place: Path) -> list[Path]:
    """What tells that a model is at a place: one of these."""
    return [place] if is_gguf(place) else [place / "config.json", place / ADAPTER_CONFIG_NAME]


def _check_tokenizer(path: Path, name: str, tokenizer: TextTokenizer, saved: Mapping[str, Any]) -> None:
    """Raise ValueError where a model's tokenizer reads texts otherwise than in training; old folders do not say."""
    if saved.get("tokenizer", tokenizer.behaviour) != tokenizer.behaviour:
        raise ValueError(
            f"{path}: expected the tokenizer that it was trained with, got one in {name} that reads texts otherwise;"
            " copy the former tokenizer.json and tokenizer_config.json there"
        )


def _may_be_replaced(path: Path) -> bool:
    """Whether a path is an empty folder, or one that `save_pretrained` wrote."""
    if not path.is_dir():
        return False
    if not any(path.iterdir()):
        return True
    try:
        read_config(path)
    except (OSError, ValueError):
        return False
    return True


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a saved PromptEmbedder.

    Raises:
        FileNotFoundError, ValueError: none there, of another format, or damaged.
    """
    file = path / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{path}: no saved PromptEmbedder there (no config.json)")
    saved = _read_json(file)
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        got = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{file}: expected a PromptEmbedder of format {FORMAT}, got {got!r}")
    for section, keys in NEEDED.items():
        found = saved.get(section)
        missing = [f"{section}.{key}" for key in keys if key not in found] if isinstance(found, dict) else [section]
        if missing:
            raise ValueError(f"{file}: damaged: expected {', '.join(missing)}, got none; copy the saved embedder again")
    for section in ("prompter", "backbone"):
        for key, value in saved.get(section, {}).items():
            if not isinstance(value, str | bool | None):
                raise ValueError(
                    f"{file}: damaged: {section}.{key}: expected a string, got {value!r:.80}; copy the saved embedder"
                    " again"
                )
    return saved


def _read_prompter(
    path: Path, config: ModelConfig, device: torch.device, saved: dict[str, Any], given: str | None
) -> PromptingLLM:
    """The prompting LLM of a saved embedder: whole weights, or its base model, with the saved adapter if it has one.

    Raises:
        FileNotFoundError: its base model is not found.
        ValueError: the base model's content is not the `saved` one, on which the adapter was trained; or one is `given`
            to whole weights.
    """
    folder, options, revision = path / "prompter", config.prompter, saved.get("revision")
    if options.trainable == "full":
        if given is not None:
            raise ValueError(f"prompter: expected none, since {folder} holds the whole prompting LLM, got {given!r}")
        prompter = PromptingLLM.from_pretrained(dataclasses.replace(options, model=str(folder), revision=None), device)
        prompter.config = options
        _check_tokenizer(path, str(folder), prompter.text_tokenizer, saved)
        return prompter
    if options.trainable == "lora":
        _check_adapter(folder)
    saved = {"name": options.model, "revision": None} | saved
    own = saved.get("included", False) and given is None
    name = str(path / "prompter-base") if own else given or _locate(saved, path)
    commit = saved.get("commit", revision) if name == saved["name"] else None
    pinned = None if Path(name).is_dir() else commit or options.revision
    try:
        prompter = PromptingLLM.from_pretrained(dataclasses.replace(options, model=name, revision=pinned), device)
    except FileNotFoundError as error:
        cure = CURE.format(HERE["prompter"])
        raise FileNotFoundError(f"{path}: the base of its prompting LLM cannot be had: {error}; {cure}") from error
    if not (own or revision is None or has_content(prompter.model, name, prompter.revision, saved)):
        raise ValueError(
            f"{path}: its prompting LLM is an adapter of {saved['name']} with content {revision}, but"
            f" {name} has content {prompter.revision}; give the former checkpoint's folder as prompter="
        )
    _check_tokenizer(path, name, prompter.text_tokenizer, saved)
    if options.trainable == "lora":
        prompter.load_adapter(folder)
    return prompter

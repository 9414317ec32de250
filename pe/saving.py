"""A PromptEmbedder in a folder: what it is made of, written whole or not at all, and read back.

`config.json` names the backbone and the content it was trained on; `prompter/`, `reader/`, `alignment.safetensors` and
`skip.safetensors` hold what trains, `backbone/` the frozen weights where they are asked for.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from pe.alignment import Alignment, AlignmentReport, LinearAlignment, VocabularyAlignment
from pe.backbone import Backbone
from pe.config import ModelConfig, to_dict
from pe.loading import load_pretrained
from pe.prompting import PromptingLLM
from pe.skip import LinearSkip

FORMAT = 1


class Parts(NamedTuple):
    """What a PromptEmbedder is made of."""

    config: ModelConfig
    prompter: PromptingLLM
    alignment: Alignment
    backbone: Backbone
    skip: LinearSkip | None


def write(parts: Parts, path: Path, *, include_backbone: bool, card: str) -> None:
    """Write the parts to a folder; see `PromptEmbedder.save_pretrained`.

    Raises:
        FileExistsError: the folder holds something other than a saved PromptEmbedder.
    """
    config, prompter, alignment, backbone, skip = parts
    if path.exists() and not _may_be_replaced(path):
        raise FileExistsError(f"{path}: not empty and not a saved PromptEmbedder; choose another folder")
    include_backbone |= Path(backbone.name).resolve().is_relative_to(path.resolve())
    temporary = path.with_name(path.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    prompter.model.save_pretrained(temporary / "prompter")
    prompter.text_tokenizer.tokenizer.save_pretrained(temporary / "prompter")
    matrices = {"alignment": alignment if isinstance(alignment, LinearAlignment) else None, "skip": skip}
    for name, part in matrices.items():
        if part is not None:
            save_file({"weight": part.weight.detach().cpu().contiguous()}, temporary / f"{name}.safetensors")
    if backbone.has_reader:
        backbone.model.save_pretrained(temporary / "reader")
    if include_backbone:
        _write_backbone(backbone.name, config, temporary / "backbone")
    saved = {
        "format": FORMAT,
        "model": to_dict(config),
        "prompter": {"revision": prompter.revision},
        "backbone": {"name": backbone.name, "revision": backbone.revision, "included": include_backbone},
        "alignment": dataclasses.asdict(alignment.report),
        "dimensions": backbone.hidden_size,
    }
    (temporary / "config.json").write_text(json.dumps(saved, indent=2), encoding="utf-8")
    (temporary / "README.md").write_text(card or "A PromptEmbedder.\n", encoding="utf-8")
    former = path.with_name(path.name + ".former")
    shutil.rmtree(former, ignore_errors=True)
    if path.exists():
        path.rename(former)
    try:
        temporary.rename(path)
    except OSError:
        if former.exists():
            former.rename(path)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _write_backbone(name: str, config: ModelConfig, folder: Path) -> None:
    """The checkpoint itself, in its own dtype: the model in memory may be cast and carry a reader."""
    revision = None if Path(name).is_dir() else config.backbone.revision
    model, tokenizer = load_pretrained(AutoModel, name, revision, "auto")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def read(path: Path, *, backbone: str | None, device: torch.device) -> Parts:
    """The parts that `write` wrote; see `PromptEmbedder.from_pretrained`.

    Raises:
        FileNotFoundError: no saved PromptEmbedder there, or its backbone is not found.
        ValueError: another format, or a backbone whose content differs from the one trained on.
    """
    from pe.recipes import model_config_from_dict  # its parser is a package that training steps do without

    saved = read_config(path)
    config = model_config_from_dict(saved["model"], str(path / "config.json"))
    prompter = _read_prompter(path, config, device, saved.get("prompter", {}).get("revision"))
    frozen = _read_backbone(path, config, device, saved["backbone"], backbone)
    if config.reader == "activated_lora":
        frozen.load_reader(path / "reader")
    alignment: Alignment
    if config.alignment.kind == "linear":
        weight = load_file(path / "alignment.safetensors")["weight"].to(device)
        alignment = LinearAlignment(weight, AlignmentReport(**saved["alignment"]))
    else:
        alignment = VocabularyAlignment(prompter, frozen)
    skip = None
    if config.skip == "linear":
        skip = LinearSkip(frozen.hidden_size, device)
        skip.load_state_dict(load_file(path / "skip.safetensors"))
    return Parts(config, prompter, alignment, frozen, skip)


def _read_backbone(
    path: Path, config: ModelConfig, device: torch.device, saved: dict[str, Any], given: str | None
) -> Backbone:
    """The backbone in the folder, where `given` says it is now, or where it was; its content is checked."""
    own = saved["included"] and given is None
    name = str(path / "backbone") if own else given or saved["name"]
    revision = saved["revision"] if name == saved["name"] else config.backbone.revision
    if Path(name).is_dir():
        revision = None
    frozen = Backbone.from_pretrained(dataclasses.replace(config.backbone, model=name, revision=revision), device)
    if not (own or frozen.revision is None or frozen.revision == saved["revision"]):
        raise ValueError(
            f"{path}: trained on backbone {saved['name']} with content {saved['revision']}, but {name} has content"
            f" {frozen.revision}; give the right folder as backbone=, or move the embedder with `python -m pe.transfer`"
        )
    return frozen


def _may_be_replaced(path: Path) -> bool:
    """Whether a path is an empty folder, or one that `save_pretrained` wrote."""
    if not path.is_dir():
        return False
    if not any(path.iterdir()):
        return True
    try:
        return "backbone" in read_config(path)
    except (OSError, ValueError):
        return False


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a saved PromptEmbedder.

    Raises:
        FileNotFoundError, ValueError: none there, or of another format.
    """
    file = path / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{path}: no saved PromptEmbedder there (no config.json)")
    saved = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(saved, dict) or saved.get("format") != FORMAT or "backbone" not in saved:
        got = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
        raise ValueError(f"{file}: expected a PromptEmbedder of format {FORMAT}, got {got!r}")
    return saved


def _read_prompter(path: Path, config: ModelConfig, device: torch.device, revision: str | None) -> PromptingLLM:
    """The trained prompting LLM of a saved embedder: whole weights, or its base model with the saved adapter.

    Raises:
        ValueError: the base model's content is not `revision`, on which the adapter was trained.
    """
    folder, options = path / "prompter", config.prompter
    if options.trainable == "full":
        prompter = PromptingLLM.from_pretrained(dataclasses.replace(options, model=str(folder), revision=None), device)
        prompter.config = options
        return prompter
    pinned = options.revision if Path(options.model).is_dir() else revision or options.revision
    prompter = PromptingLLM.from_pretrained(dataclasses.replace(options, revision=pinned), device)
    if revision not in (None, prompter.revision):
        raise ValueError(
            f"{path}: its prompting LLM is an adapter of {options.model} with content {revision}, but that has content"
            f" {prompter.revision} now; put the former checkpoint there"
        )
    prompter.load_adapter(folder)
    return prompter

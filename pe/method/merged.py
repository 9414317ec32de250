"""A folder with an adapter of PEFT, which stands for its base with the adapter merged into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from peft import PeftConfig, PeftModel
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

PREFIX = "base_model.model."
"""Of every name in an adapter's weights, before the name of the layer that it adapts."""


class Adapter(NamedTuple):
    """A folder's adapter, and the model that it was trained on: a folder or a name of the hub."""

    folder: Path
    base: str
    revision: str | None

    @property
    def files(self) -> list[Path]:
        return [self.folder / ADAPTER_CONFIG_NAME, self.folder / ADAPTER_SAFE_WEIGHTS_NAME]


def adapter_in(name: str) -> Adapter | None:
    """The adapter in a folder; None where there is no folder, or none in it.

    Raises:
        ValueError: its configuration is damaged, or names no base.
    """
    file = Path(name) / ADAPTER_CONFIG_NAME
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        base = found["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected what PEFT writes of an adapter ({error!r}); copy it again") from error
    if not isinstance(base, str) or not base:
        raise ValueError(f"{file}: base_model_name_or_path: expected the model it was trained on, got {base!r}")
    return Adapter(Path(name), base, found.get("revision"))


def merge(model: PreTrainedModel, adapter: Adapter) -> None:
    """Merge an adapter into its base, in place.

    Args:
        model: the base with its head; an adapter that was trained without the head goes into what is under it.
        adapter: whose weights are there.

    Raises:
        ValueError: one that cannot be merged, or does not fit.
    """
    config = PeftConfig.from_pretrained(str(adapter.folder))
    if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            f"{adapter.folder}: expected an adapter that can be merged into its base, such as LoRA, got"
            f" {config.peft_type.value}, which acts on some tokens alone; name a model without it"
        )
    with safe_open(str(adapter.files[1]), "pt") as opened:
        names = [name.removeprefix(PREFIX) for name in opened.keys()]  # noqa: SIM118  # not a mapping
    has_head = any(name.startswith(f"{model.base_model_prefix}.") for name in names)
    target: nn.Module = model if has_head else model.base_model
    adapted = PeftModel(target, config)
    try:
        left = adapted.load_adapter(str(adapter.folder), "default").unexpected_keys
    except RuntimeError as error:  # torch's, for tensors of other sizes
        raise misfit(adapter, " ".join(str(error).split())) from error
    if left:
        raise misfit(adapter, f"it has no {left[0].removeprefix(PREFIX)}")
    adapted.merge_and_unload()
    model.requires_grad_(True)


def misfit(adapter: Adapter, why: str) -> ValueError:
    return ValueError(
        f"{adapter.folder}: expected an adapter of {adapter.base}, which adapter_config.json names, got one of another"
        f" model ({why:.200}); name the model it was trained on there, or merge it by PEFT's merge_and_unload(), save"
        " that with save_pretrained() and name its folder"
    )

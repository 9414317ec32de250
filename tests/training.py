"""A recipe for tiny models, and the parts that a training of it needs."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from rich.console import Console
from torch.distributed.device_mesh import DeviceMesh

from pe.config import Recipe
from pe.data.batches import BatchPlan
from pe.model import PromptEmbedder
from pe.train import build_plan
from tests.tiny import write_training_data


def write_recipe(models: Path, folder: Path, **changes: object) -> Path:
    """Write a recipe and its data, and give its file; a change is named `section` or `section__option`."""
    paths = write_training_data(folder / "data")
    recipe = {
        "output": str(folder / "run"),
        "model": {
            "prompter": {"model": str(models / "prompter"), "soft_tokens": 3},
            "backbone": {"model": str(models / "one")},
            "reader": "activated_lora",
            "skip": "weighted",
            "reader_lora": {"rank": 2, "alpha": 8},
            "max_length": 32,
        },
        "data": [
            {"path": str(paths["pairs"]), "instruction": "Find the same thing"},
            {"path": str(paths["labelled"]), "instruction": "Find the kind", "document_instruction": "A thing"},
        ],
        "loss": {"temperature": 0.02},
        "train": {"steps": 6, "batch_size": 6, "lr": 0.003, "save_every": 3, "log_every": 2},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        recipe[section] = {**recipe[section], name: value} if name else value  # type: ignore[dict-item]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def new_model(recipe: Recipe, mesh: DeviceMesh | None = None) -> PromptEmbedder:
    torch.manual_seed(recipe.train.seed)
    model = PromptEmbedder.from_config(recipe.model, mesh=mesh)
    with torch.no_grad():
        for parameter in model.backbone.reader_parameters():  # the adapters start as the identity; let them act
            parameter += 0.05 * torch.randn(parameter.shape)
    return model


def plan_of(recipe: Recipe) -> BatchPlan:
    return build_plan(recipe, Console(quiet=True))


def accelerator() -> Accelerator:
    return Accelerator(cpu=True)

"""The folder of a training run: resolved recipe, checkpoints, logs, model.

A run's folder holds `recipe.yaml`, `checkpoints/step-000100.pt`, `logs/` (TensorBoard), `model/` and `scores.json`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from pe.config import Recipe, to_dict
from pe.recipes import load_recipe, write_yaml


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


class RunFolder:
    """Where a run writes.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted((self.path / "checkpoints").glob("step-*.pt"))

    def start(self, recipe: Recipe, *, resume: bool, fresh: bool) -> None:
        """Prepare the folder and write the resolved recipe.

        Raises:
            RunError: it holds a run and neither `resume` nor `fresh` was asked for; nothing to resume; another recipe.
        """
        recipe_file = self.path / "recipe.yaml"
        if fresh and self.path.exists():
            self._move_aside()
        if resume:
            self._check_same(recipe, recipe_file)
        elif self.path.exists() and any(self.path.iterdir()):
            raise RunError(
                f"{self.path}: holds files already; --resume continues that run, --fresh moves it aside and starts"
                " anew, --output=FOLDER writes elsewhere"
            )
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_yaml(recipe, recipe_file)

    def _move_aside(self) -> None:
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(target)

    def _check_same(self, recipe: Recipe, file: Path) -> None:
        if not file.exists() or not self.checkpoints:
            raise RunError(f"{self.path}: nothing to resume (no recipe.yaml with a checkpoint); run without --resume")
        before, now = flatten(to_dict(load_recipe(file))), flatten(to_dict(recipe))
        changed = [f"{key} (was {before.get(key)}, now {now.get(key)})" for key in now if before.get(key) != now[key]]
        if changed:
            raise RunError(f"{self.path}: --resume needs the same recipe; changed: {', '.join(changed)}")

    def save_checkpoint(self, step: int, state: dict[str, Any], keep: int) -> None:
        """Write the state after `step` steps, whole or not at all, and remove all but the newest `keep`."""
        path = self.path / "checkpoints" / f"step-{step:06d}.pt"
        temporary = path.with_suffix(".part")
        torch.save(state, temporary)
        os.replace(temporary, path)
        for old in self.checkpoints[:-keep]:
            old.unlink()

    def load_checkpoint(self, device: torch.device) -> dict[str, Any]:
        """The newest checkpoint."""
        return torch.load(self.checkpoints[-1], map_location=device, weights_only=True)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as `a.b[0].c` -> value."""
    if isinstance(values, dict):
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in values.items()]
    elif isinstance(values, list):
        items = [(f"{prefix}[{place}]", value) for place, value in enumerate(values)]
    else:
        return {prefix: values}
    return {key: value for name, item in items for key, value in flatten(item, name).items()}

"""The folder of a training run: resolved recipe, checkpoints, logs, model.

A run's folder holds `recipe.yaml`, `checkpoints/step-000100.pt`, `logs/` (TensorBoard), `history.jsonl`, `plots/`,
`model/`, `scores.json`, and `faults/` where a step was skipped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pe.config import Recipe, to_dict
from pe.data.tables import files
from pe.runs.files import WRITING, write_text
from pe.runs.history import HistoryFile
from pe.runs.recipes import load_recipe, write_yaml

EXTENDED = ("train.steps", "train.patience")
"""What may be larger when a run goes on."""
FREE = ("output", "license", "train.log_with", "train.text_store", "train.text_store_gib", "train.shard_backbone")
"""Options that may change when a run goes on: its folder may have been moved, and the others change no result."""
LEFT_OVER = {"recipe.yaml", "checkpoints", "logs", "history.jsonl", "plots", "faults", "report.html"}
"""What a run that ended before its first checkpoint leaves."""
FILE_WRITER = "inline_container"
"""In what torch's writer says of a full disk, for which it has no error of its own."""


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


class RunFolder:
    """Where a run writes.

    Attributes:
        path: the folder.
        conditions: what must be the same beside the recipe when the run is resumed, None for one that never is; every
            checkpoint keeps it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.conditions: dict[str, Any] | None = {}

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    @property
    def history(self) -> HistoryFile:
        """What was logged."""
        return HistoryFile(self.path / "history.jsonl")

    @property
    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = {path.stem.removeprefix("step-"): path for path in (self.path / "checkpoints").glob("step-*.pt")}
        return [found[step] for step in sorted(filter(str.isdecimal, found), key=int)]

    @property
    def going_on(self) -> str:
        """What becomes of a run that is interrupted now."""
        newest = self.checkpoints[-1:]
        return f"--resume goes on from {newest[0].name}" if newest else "no checkpoint was due yet"

    def began_with(self) -> int | None:
        """Processes among which the batches of the run were planned, as its newest checkpoint says; None without one.

        Damaged checkpoints, which `start` sets aside, are passed over.
        """
        for path in reversed(self.checkpoints):
            with contextlib.suppress(RunError):
                conditions = read_checkpoint(path, torch.device("cpu"), mmap=True).get("conditions") or {}
                return conditions.get("processes")
        return None

    def is_finished(self, recipe: Recipe) -> bool:
        """Whether a run of the recipe was trained, scored and saved here.

        Raises:
            RunError: a run of another recipe.
        """
        if not self.checkpoints:
            return False
        self._check_same(recipe, self.path / "recipe.yaml")
        return (self.model / "recipe.yaml").exists()

    def start(
        self,
        recipe: Recipe,
        *,
        resume: bool,
        fresh: bool,
        conditions: Mapping[str, Any] | None = None,
        resumable: bool = True,
    ) -> list[str]:
        """Prepare the folder and write the resolved recipe.

        A folder that holds no more than a run leaves that ended before its first checkpoint is started anew.

        Args:
            recipe: what the run is made of.
            resume: go on from the newest checkpoint.
            fresh: move what is there aside.
            conditions: see `conditions_of`.
            resumable: whether the run may go on from a checkpoint one day.

        Returns:
            a sentence for a run that is extended, and for each damaged checkpoint that was set aside for an older one.

        Raises:
            RunError: a file instead of a folder; a run is there and neither `resume` nor `fresh` was asked for, or both
                were; nothing to resume; another recipe or other conditions than those of the run to resume; a folder
                that cannot be moved aside.
        """
        recipe_file = self.path / "recipe.yaml"
        if resume and fresh:
            raise RunError(f"{self.path}: --resume continues the run, --fresh moves it aside; expected one of them")
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path}: expected a folder, got a file; --output=FOLDER writes elsewhere")
        self.conditions = dict(conditions or {}) if resumable else None
        if fresh and self.path.exists():
            self._move_aside(recipe)
        notes = []
        if resume:
            notes = self._check_same(recipe, recipe_file) + self._set_damaged_aside()
        elif not self._may_start():
            going_on = "--resume continues that run, " if resumable else ""
            raise RunError(
                f"{self.path}: holds files already; {going_on}--fresh moves it aside and starts anew, --output=FOLDER"
                " writes elsewhere"
            )
        else:
            self.history.path.unlink(missing_ok=True)
            if self.faults.exists():
                shutil.rmtree(self.faults)
        (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        for partial in (self.path / "checkpoints").glob("*.part"):
            partial.unlink()
        write_yaml(recipe, recipe_file)
        return notes

    def _may_start(self) -> bool:
        """Whether the folder is absent, empty, or holds what a run leaves that ended before its first checkpoint."""
        found = (path.name for path in self.path.iterdir()) if self.path.exists() else ()
        names = {name for name in found if not name.startswith(WRITING)}
        return not names or ("checkpoints" in names and names <= LEFT_OVER and not self.checkpoints)

    def _move_aside(self, recipe: Recipe) -> None:
        """Rename the folder.

        Raises:
            RunError: the working directory or a model that the recipe starts from is in it.
        """
        path, content, number = self.path.absolute(), self.path.resolve(), 1
        if Path.cwd().is_relative_to(content):
            raise RunError(f"{self.path}: --fresh would move the working directory; --output=FOLDER writes elsewhere")
        for name in (recipe.model.backbone.model, recipe.model.prompter.model):
            if Path(name).exists() and Path(name).resolve().is_relative_to(content):
                raise RunError(
                    f"{self.path}: --fresh would move {name}, which the run starts from; --output=FOLDER writes"
                    " elsewhere"
                )
        while (target := path.with_name(f"{path.name}.{number}")).exists():
            number += 1
        path.rename(target)

    def _check_same(self, recipe: Recipe, file: Path) -> list[str]:
        """A sentence where the run is extended.

        Raises:
            RunError: there is nothing to resume, or the recipe is another.
        """
        if not file.exists() or not self.checkpoints:
            raise RunError(f"{self.path}: nothing to resume (no recipe.yaml with a checkpoint); run without --resume")
        before, now = (flatten(to_dict(found)) for found in (load_recipe(file), recipe))
        free = {name: before[name] for name in FREE if name in before}
        free |= {name: before[name] for name in EXTENDED if name in before and _is_more(now.get(name), before[name])}
        if changed := differences(before, now | free):
            longer = f"only {' and '.join(EXTENDED)} may grow"
            raise RunError(f"{self.path}: --resume needs the same recipe ({longer}); changed: {', '.join(changed)}")
        old, new = before["train.steps"], now["train.steps"]
        schedule = f"from the next step on the rates are those of a run of {new} steps"
        return [f"extended from {old} to {new} steps: {schedule}"] if old != new else []

    def _set_damaged_aside(self) -> list[str]:
        """Rename checkpoints that cannot be read and are newer than the newest that can; a sentence for each.

        Raises:
            RunError: none can be read, or the newest that can was made under other conditions.
        """
        damaged: list[tuple[Path, RunError]] = []
        for path in reversed(self.checkpoints):
            try:
                state = read_checkpoint(path, torch.device("cpu"), mmap=True)
                break
            except RunError as error:
                damaged.append((path, error))
        else:
            reasons = "\n".join(str(error) for _, error in damaged)
            raise RunError(f"{reasons};\n{self.path}: no other checkpoint is left; --fresh starts anew")
        now = self.conditions or {}
        before = state.get("conditions", now)
        if before is None:
            raise RunError(f"{self.path}: the run of a move (pe.transfer), which is never resumed; start it anew")
        known = {key: value for key, value in now.items() if key in before}  # an older checkpoint kept less
        if changed := differences(before, known):
            raise RunError(f"{self.path}: --resume needs what the run had; changed: {', '.join(changed)}")
        for bad, _ in damaged:
            os.replace(bad, bad.with_suffix(".damaged"))
        return [f"{error}; going on from {path.name}" for _, error in damaged]

    def save_checkpoint(self, step: int, state: dict[str, Any], keep: int) -> None:
        """Write the state after `step` steps, whole or not at all, and remove all but the newest `keep`.

        Raises:
            RunError: the disk is full, or the file cannot be written for another reason.
        """
        self._write(self.path / "checkpoints" / f"step-{step:06d}.pt", {**state, "conditions": self.conditions})
        for old in self.checkpoints[:-keep]:
            old.unlink()

    @property
    def faults(self) -> Path:
        return self.path / "faults"

    def save_fault(self, step: int, process: int, values: Mapping[str, Any]) -> None:
        """Write down what a step was skipped on, a file for each process."""
        write_text(self.faults / f"step-{step:06d}-process-{process}.json", json.dumps(values, indent=2))

    def save_best(self, state: dict[str, Any]) -> None:
        """Write the weights with the best score, whole or not at all.

        Raises:
            RunError: see `save_checkpoint`.
        """
        self._write(self._best, state)

    def load_best(self, device: torch.device) -> dict[str, Any]:
        """What `save_best` wrote last.

        Raises:
            RunError: it cannot be read.
        """
        return read_checkpoint(self._best, device)

    @property
    def _best(self) -> Path:
        return self.path / "checkpoints" / "best.pt"

    def _write(self, path: Path, state: dict[str, Any]) -> None:
        temporary = path.with_suffix(".part")
        try:
            torch.save(state, temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, RuntimeError) and FILE_WRITER not in str(error):
                raise
            reason = str(error).partition("\n")[0]
            raise RunError(f"{path}: the checkpoint cannot be written; is the disk full? ({reason})") from error

    def load_checkpoint(self, device: torch.device) -> dict[str, Any]:
        """The newest checkpoint.

        Raises:
            RunError: it cannot be read.
        """
        return read_checkpoint(self.checkpoints[-1], device)


def read_checkpoint(path: Path, device: torch.device, *, mmap: bool = False) -> dict[str, Any]:
    """A checkpoint's state; with `mmap` its tensors are read when they are used.

    Raises:
        RunError: the file is cut off, empty or no checkpoint, or pickled, which is never read.
    """
    target = "cpu" if device.type == "cpu" else device  # several processes have a cpu:0 each, which torch.load refuses
    try:
        state = torch.load(path, map_location=target, weights_only=True, mmap=mmap)
    except (FileNotFoundError, PermissionError, torch.OutOfMemoryError):
        raise
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise RunError(f"{path}: expected a checkpoint, got a file that cannot be read ({reason})") from error
    if not isinstance(state, dict):
        raise RunError(f"{path}: expected a checkpoint, got a file of another kind ({type(state).__name__})")
    return state


def conditions_of(recipe: Recipe, processes: int, **contents: str | None) -> dict[str, Any]:
    """What must be the same beside the recipe when a run is resumed.

    Args:
        recipe: whose local data files count by their content.
        processes: how many the batches were planned for, each with `train.batch_size` queries.
        contents: what else counts, by name: the models' revisions.
    """
    found: dict[str, Any] = {"processes": processes}
    found |= {f"content of the {name}": revision for name, revision in contents.items()}
    places = [place for item in recipe.data for place in (item.path, item.instruct) if place]
    for path in dict.fromkeys(file for place in places for file in files(place)):
        with Path(path).open("rb") as file:
            found[f"content of {path}"] = hashlib.file_digest(file, "blake2b").hexdigest()[:16]
    return found


def _is_more(now: int | None, before: int | None) -> bool:
    return before is not None and (now is None or now >= before)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed between two flat mappings, keys on one side alone included."""
    return [
        f"{key} (was {before.get(key, 'absent')}, now {now.get(key, 'absent')})"
        for key in dict.fromkeys([*before, *now])
        if (key in before) != (key in now) or before.get(key) != now.get(key)
    ]


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings and lists as `a.b[0].c` -> value."""
    if isinstance(values, dict):
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in values.items()]
    elif isinstance(values, list):
        items = [(f"{prefix}[{place}]", value) for place, value in enumerate(values)]
    else:
        return {prefix: values}
    return {key: value for name, item in items for key, value in flatten(item, name).items()}

"""What a model's folder may hold: files of its own, none that leads elsewhere, and no pickle for weights."""

from __future__ import annotations

import json
from pathlib import Path

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def check_inside(folder: Path) -> None:
    """Refuse links that lead out of a model's folder; in the hub's cache they lead to the blobs of the same model.

    Raises:
        ValueError: which one, and where it leads.
    """
    root = _cached(folder.resolve())
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise ValueError(
                f"{path}: expected a file in the model's folder, got a link that leads out of it, to {path.resolve()};"
                " copy that file there"
            )


def _cached(folder: Path) -> Path:
    """The model's whole folder in the hub's cache, `models--*/snapshots/*/...`, or the folder itself elsewhere."""
    found = (path.parent.parent for path in (folder, *folder.parents) if path.parent.name == "snapshots")
    return next((path for path in found if path.name.startswith("models--")), folder)


def shards(index: Path) -> list[str]:
    """The weights files that an index names, which stand beside it.

    Raises:
        ValueError: a damaged index, or one that names anything else.
    """
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(content["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: expected a weight_map, got a damaged index; copy or download it again") from error
    if not names or "metadata" not in content:
        raise ValueError(f"{index}: expected a weight_map and metadata, got a damaged index; copy or download it again")
    for name in names:
        if Path(name).name != name or Path(name).suffix != ".safetensors":
            raise ValueError(
                f"{index}: weight_map: expected the names of .safetensors files beside it, got {name!r}; no file of a"
                " model is outside its folder: copy or download it again"
            )
    return names


def pickled(folder: Path, stem: str = "*") -> str:
    """The name of a pickle in a folder, or nothing."""
    found = sorted(path.name for path in folder.glob(f"{stem}.*") if path.suffix in PICKLES) if folder.is_dir() else []
    return found[0] if found else ""

"""Set before anything imports a kernel: caches, a fixed FP-fusion default, Triton's interpreter where no GPU is."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pe.config import Recipe

HAS_GPU = torch.cuda.is_available()
CACHE = Path(__file__).resolve().parent.parent / ".cache"  # git ignores it; the defaults lie in the temporary folder
os.environ.setdefault("TRITON_CACHE_DIR", str(CACHE / "triton"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "torchinductor"))
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(CACHE / "hypothesis"))
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.10 flips the default
torch.set_num_threads(1)  # the models are tiny: a second thread only waits
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA or ROCm device; skipped where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a GPU: bf16 dots, compilation and races do not exist in Triton's interpreter")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a random `prompter` and two random backbones, `one` and `two`, saved as on a hub."""
    from tests.tiny import save_models

    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    return folder


@pytest.fixture
def recipe(tiny_models: Path, tmp_path: Path) -> Recipe:
    """That of `write_recipe`, in a folder of the test's own."""
    from pe.runs.recipes import load_recipe
    from tests.training import write_recipe

    return load_recipe(write_recipe(tiny_models, tmp_path))


@pytest.fixture(scope="session")
def checkpoint(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was trained for a few steps on two sets of equal weight; no test may change it."""
    from pe.runs.recipes import load_recipe
    from pe.train import train
    from tests.training import write_recipe

    folder = tmp_path_factory.mktemp("trained")
    train(load_recipe(write_recipe(tiny_models, folder)))
    return folder / "run" / "model"

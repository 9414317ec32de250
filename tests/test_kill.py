"""A training that is killed goes on to the same bytes: the short form of `scripts/kill_and_resume.py`."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from tests.training import write_recipe

SCRIPT = Path(__file__).parent.parent / "scripts" / "kill_and_resume.py"
kill_and_resume = runpy.run_path(str(SCRIPT))["kill_and_resume"]


@pytest.mark.timeout(900)  # three processes, each of which imports torch
def test_a_killed_run_ends_in_the_bytes_of_one_in_peace(tiny_models: Path, tmp_path: Path) -> None:
    lora = {"rank": 2, "alpha": 8, "dropout": 0.1}
    recipe = write_recipe(tiny_models, tmp_path, train__steps=30, train__save_every=2, model__reader_lora=lora)
    begun, *kills, end = kill_and_resume(recipe, [], tmp_path, kills=1, seed=1)
    assert begun.startswith("in peace")
    (killed,) = kills
    assert "it had ended" not in killed
    assert "model.safetensors" in end

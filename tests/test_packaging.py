"""The wheel and the sdist hold the whole package, kernels included, and import from elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = ("pe.train", "pe.transfer", "pe.encode", "pe.evaluate", "pe.baselines.lora", "pe.kernels.vocab_mixture")


def test_wheel_and_sdist_build_and_import(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    kernels = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert {f"pe/kernels/{name}" for name in kernels} <= set(names)
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "bench/"))]
    with tarfile.open(sdist) as archive:
        assert {name for name in kernels if any(m.endswith(f"kernels/{name}") for m in archive.getnames())} == kernels
    imports = "; ".join(f"import {module}" for module in MODULES)
    check = f"{imports}; assert pe.kernels.vocab_mixture.__file__.startswith({str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", check], check=True, cwd=tmp_path, env=environment)

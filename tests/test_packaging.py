"""The wheel and the sdist hold the whole package, kernels included, and import from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

IMPORTED_AS = {"nvidia-ml-py": "pynvml", "flash-attn": "flash_attn", "mlflow-skinny": "mlflow"}
ROOT = Path(__file__).parent.parent
MODULES = (
    "pe.train",
    "pe.transfer",
    "pe.encode",
    "pe.evaluate",
    "pe.export",
    "pe.report",
    "pe.serve",
    "pe.baselines.lora",
    "pe.kernels.vocab_mixture",
)


def test_wheel_and_sdist_build_and_import(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    kernels = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert {f"pe/kernels/{name}" for name in kernels} <= set(names)
    assert "pe/data/benchmarks.yaml" in names
    assert "pe/report.html" in names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "bench/"))]
    with tarfile.open(sdist) as archive:
        assert {name for name in kernels if any(m.endswith(f"kernels/{name}") for m in archive.getnames())} == kernels
    imports = "; ".join(f"import {module}" for module in MODULES)
    check = f"{imports}; assert pe.kernels.vocab_mixture.__file__.startswith({str(tmp_path)!r})"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    subprocess.run([sys.executable, "-c", check], check=True, cwd=tmp_path, env=environment)


def test_every_extra_is_used() -> None:
    """What a user is asked to install is imported, or looked for, somewhere in the code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    code = "\n".join(
        path.read_text(encoding="utf-8") for part in ("pe", "bench") for path in (ROOT / part).rglob("*.py")
    )
    for extra, packages in project["optional-dependencies"].items():
        names = [re.split(r"[\[<>=]", package)[0] for package in packages if extra not in ("docs", "test")]
        for name in (name for name in names if name != project["name"]):
            module = IMPORTED_AS.get(name, name.replace("-", "_"))
            assert re.search(rf"(from|import) {module}\b|\"{module}\"", code), f"{extra}: {name} is used nowhere"

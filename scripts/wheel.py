"""Build the wheel, install it into a new environment with the extra `export` alone, and use trained folders from there.

    python scripts/wheel.py MODEL ... [--python PYTHON] [--with torch==2.13.0]

Each MODEL is encoded with, exported to every target, and run by the example of the README and by
sentence-transformers, in a folder that knows nothing of this repository. A target that cannot serve a model has to say
so. Ends with 1 where something else fails. `--with` pins what pip would else choose itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import get_args

from pe.export import Target

ROOT = Path(__file__).parent.parent
TASK = "Find the topic"
EXAMPLE = """
import sys, numpy as np, pe
from pe.model import PromptEmbedder
from sentence_transformers import SentenceTransformer

assert sys.prefix in pe.__file__, pe.__file__
texts = ["A man is playing a guitar.", "The bank closed my account."]
ours = PromptEmbedder.from_pretrained(sys.argv[1]).encode(texts, instruction=sys.argv[2])
theirs = SentenceTransformer(sys.argv[1], trust_remote_code=True).encode_query(texts, prompt=sys.argv[2])
assert np.abs(ours - theirs).max() < 1e-5, (ours, theirs)
print(ours.shape)
"""


def installed(folder: Path, pins: Sequence[str]) -> Path:
    """Python of a new environment that has the wheel, and nothing of the checkout."""
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={folder}", str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{wheel}[export]", *pins], check=True)
    return python


def uses(model: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """What is done with a model, and the arguments of Python for it."""
    (folder / "texts.txt").write_text("A man is playing a guitar.\nThe bank closed my account.\n", encoding="utf-8")
    yield "pe.encode", ["-m", "pe.encode", model, "texts.txt", "out.npy"]
    yield "encode in Python", ["-c", EXAMPLE, model, TASK]
    for target in get_args(Target):
        output = "task.safetensors" if target == "safetensors" else f"task-{target}"
        yield f"pe.export --to {target}", ["-m", "pe.export", model, output, f"--to={target}", f"--instruction={TASK}"]


def outcome(python: Path, arguments: Sequence[str], folder: Path) -> tuple[bool, str]:
    """Whether a command did what it should, and its last line; a refused target is what it should do, too."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [python, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
    is_refused = done.returncode == 2 and any(line.startswith("pe.export: --to ") for line in last)
    return done.returncode == 0 or is_refused, "".join(last)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--python", type=Path, help="its Python, where there is one already")
    parser.add_argument("--with", dest="pins", nargs="+", default=[], metavar="REQUIREMENT")
    given = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as place:
        python = given.python or installed(Path(place), given.pins)
        for number, model in enumerate(given.models):
            folder = Path(place) / str(number)
            folder.mkdir()
            for what, arguments in uses(str(model.resolve()), folder):
                is_right, said = outcome(python, arguments, folder)
                failed += not is_right
                print(f"{model}: {what}: {'works' if is_right else 'FAILS'}: {said}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

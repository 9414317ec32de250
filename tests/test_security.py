"""What is read from elsewhere runs nothing: no pickles, no code of models, no YAML that makes objects."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from pe.method.loading import load_pretrained
from pe.method.model_files import check_inside, shards

ROOT = Path(__file__).parent.parent
SOURCES = [file for room in ("pe", "bench", "scripts") for file in (ROOT / room).rglob("*.py")]
FORBIDDEN = ("pickle.load", "pickle.loads", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "os.system")
FORBIDDEN += ("torch.jit.load", "joblib.load", "marshal.loads", "eval", "exec")
OWN = {("pe/bulk/engines.py", "pickle.loads")}
"""What this package's processes hand one another, by Ray, which pickles as well; nothing of it was read."""
NEEDED = {
    "torch.load": ("weights_only", True),
    "AutoConfig.from_pretrained": ("trust_remote_code", False),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
    "AutoModel.from_pretrained": ("trust_remote_code", False),
    "AutoModelForCausalLM.from_pretrained": ("trust_remote_code", False),
    "auto.from_pretrained": ("trust_remote_code", False),
}
"""An argument without which these may run what they read; it may also stand in a mapping that is unpacked there."""


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_that_is_read_can_run() -> None:
    seen = set()
    for file in SOURCES:
        for name, call in calls(file):
            where = f"{file.relative_to(ROOT)}:{call.lineno}: {name}"
            assert name not in FORBIDDEN or (str(file.relative_to(ROOT)), name) in OWN, where
            assert not (name == "np.load" and "allow_pickle" in ast.unparse(call)), where
            assert name != "yaml.load" or ast.unparse(call.args[1]) == "_Loader", where
            if name in NEEDED:
                seen.add(name)
                argument, value = NEEDED[name]
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                is_said = argument in given and ast.literal_eval(given[argument]) is value
                assert is_said or (None in given and f'"{argument}": {value}' in file.read_text(encoding="utf-8")), (
                    where
                )
    assert {"torch.load", "auto.from_pretrained", "AutoTokenizer.from_pretrained"} <= seen


def test_a_pickle_beside_safe_weights_is_never_opened(tiny_models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (tiny_models / "one").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nsystem\n(S'touch code-has-run'\ntR.")
    model, _ = load_pretrained(AutoModel, str(folder), None, torch.float32)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_links_of_the_hubs_cache_lead_to_its_blobs(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "x").write_text("{}")
    (tmp_path / "secret").write_text("s")
    (snapshot / "config.json").symlink_to("../../blobs/x")
    (tmp_path / "named").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "named"):
        check_inside(folder)
    for target in ("../../../secret", str(tmp_path / "secret"), "../../../gone"):
        (snapshot / "tokenizer.json").symlink_to(target)
        with pytest.raises(ValueError, match=r"tokenizer\.json: expected a file in the model's folder, got a link"):
            check_inside(snapshot)
        (snapshot / "tokenizer.json").unlink()


@pytest.mark.parametrize("name", ["../w.safetensors", "/w.safetensors", "a/../../w.safetensors", "w.bin", "", ".."])
def test_an_index_names_files_beside_it_alone(name: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(f'{{"metadata": {{}}, "weight_map": {{"a": "one.safetensors", "b": "{name}"}}}}')
    with pytest.raises(ValueError, match=r"index\.json: weight_map: expected the names of \.safetensors files beside"):
        shards(index)

"""`python -m pe.encode` and `python -m pe.transfer` as a user calls them."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pe import encode, transfer
from pe.config import BackboneConfig
from pe.data.records import DataError
from pe.model import PromptEmbedder
from pe.transfer import Reached, move, reached

TEXTS = ["the river", "moon", "a much longer text about bread and honey"]
TASK = "Find the same thing"


def texts_of(path: Path) -> list[str]:
    return [row["text"] for row in encode.read_rows(str(path), "text")]


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> np.ndarray:
    return PromptEmbedder.from_pretrained(checkpoint).encode(TEXTS, instruction=TASK)


def test_every_output_format(checkpoint: Path, expected: np.ndarray, tmp_path: Path) -> None:
    source = tmp_path / "in.txt"
    source.write_text("\n".join(TEXTS), encoding="utf-8")
    for name in ("out.npy", "out.jsonl", "out.parquet"):
        encode.main([str(checkpoint), str(source), str(tmp_path / name), f"--instruction={TASK}"])
    assert np.allclose(np.load(tmp_path / "out.npy"), expected, atol=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == TEXTS
    assert np.allclose([row["embedding"] for row in rows], expected, atol=1e-6)
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["text"].to_pylist() == TEXTS
    assert np.allclose(np.array(table["embedding"].to_pylist()), expected, atol=1e-6)


def test_jsonl_input_and_several_instructions(checkpoint: Path, expected: np.ndarray, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS), encoding="utf-8")
    arguments = [str(checkpoint), str(source), str(tmp_path / "out.npy"), "--field=body"]
    encode.main([*arguments, "--instruction", json.dumps([TASK, "Another task"])])
    both = np.load(tmp_path / "out.npy")
    assert both.shape == (2, *expected.shape)
    assert np.allclose(both[0], expected, atol=1e-6)
    assert not np.allclose(both[1], expected, atol=1e-3)


def test_encode_refuses_bad_input(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, taken, folder = tmp_path / "in.txt", tmp_path / "taken.npy", tmp_path / "folder.npy"
    folder.mkdir()
    source.write_text("a", encoding="utf-8")
    taken.write_bytes(b"precious")
    model, task = str(checkpoint), f"--instruction={TASK}"
    for arguments, message in (
        ([model, str(source), str(tmp_path / "out.csv"), task], "a name ending in .npy, .jsonl, .parquet"),
        ([model, str(source), str(taken), task], "exists already"),
        ([model, str(source), str(tmp_path), task], "expected a folder outside of the input"),
        ([model, str(source), str(folder), task, "--overwrite=true"], "expected a file, got the folder"),
        ([model, str(tmp_path / "absent.txt"), str(tmp_path / "o.npy"), task], "expected a file, found none"),
        ([model, str(source), str(source / "o.npy"), task], str(source)),
        ([str(tmp_path), str(source), str(tmp_path / "o.npy"), task], "no saved PromptEmbedder there"),
    ):
        with pytest.raises(SystemExit) as stopped:
            encode.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert taken.read_bytes() == b"precious"


def test_an_output_that_cannot_be_written_is_known_before_encoding(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError("no writing here")

    monkeypatch.setattr(encode.tempfile, "TemporaryDirectory", refuse)
    monkeypatch.setattr(PromptEmbedder, "encode_many", lambda *_, **__: pytest.fail("encoded in vain"))
    (tmp_path / "in.txt").write_text("a", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        encode.main([str(checkpoint), str(tmp_path / "in.txt"), str(tmp_path / "o.npy"), f"--instruction={TASK}"])
    assert stopped.value.code == 2
    assert "no writing here" in capsys.readouterr().err


def test_only_a_line_feed_ends_a_text(tmp_path: Path) -> None:
    texts = ["one\u2028still one", "two\x85\x0c\x1c\x0b", "", "three\r four", "last"]
    source = tmp_path / "in.txt"
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode())
    assert texts_of(source) == texts
    source.write_bytes(("\n".join(texts) + "\n").encode())
    assert texts_of(source) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("in.txt", b"good\nna\xefve\n", r"in\.txt:2: expected UTF-8, got byte 0xef"),
        ("in.txt", b"", r"in\.txt: expected at least one text, got none"),
        ("in.txt", b"\xef\xbb\xbf\n", r"in\.txt: expected at least one text, got none"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "\\ud83d"}\n', r"in\.jsonl:2: text: expected Unicode text, got half a"),
        ("in.jsonl", b'{"body": "x"}', r"in\.jsonl:1: expected the key 'text', got {body}; name .* with --field$"),
        ("in.jsonl", b'{"text": "a"}\n\n{"text": null}', r"in\.jsonl:3: text: expected a string, got null$"),
        ("in.jsonl", b'{"text": ["a"]}', r"in\.jsonl:1: text: expected a string, got \['a'\]$"),
        ("in.jsonl", b" \n\n", r"in\.jsonl: expected at least one record, got an empty file"),
    ],
)
def test_a_file_without_usable_texts(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts_of(tmp_path / name)


@pytest.mark.parametrize("name", ["in.jsonl", "IN.JSONL"])
def test_blank_lines_are_no_texts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('\n{"text": "a"}\n \n{"text": ""}\n\n\t\n', encoding="utf-8")
    assert texts_of(tmp_path / name) == ["a", ""]


def test_suffixes_in_capitals(checkpoint: Path, expected: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "IN.TXT").write_text("\n".join(TEXTS), encoding="utf-8")
    for name in ("O.NPY", "O.Parquet", "O.JSONL"):
        encode.main([str(checkpoint), str(tmp_path / "IN.TXT"), str(tmp_path / name), f"--instruction={TASK}"])
    assert np.allclose(np.load(tmp_path / "O.NPY"), expected, atol=1e-6)
    assert pq.read_table(tmp_path / "O.Parquet")["text"].to_pylist() == TEXTS
    assert texts_of(tmp_path / "O.JSONL") == TEXTS


@pytest.mark.parametrize("instruction", [TASK, f"Given a query: {TASK}", "- item", "[a, b]"])
def test_one_plain_instruction(checkpoint: Path, tmp_path: Path, instruction: str) -> None:
    source, output = tmp_path / "in.txt", tmp_path / "new" / "folder" / "out.npy"
    source.write_text("\n".join(TEXTS), encoding="utf-8")
    encode.main([str(checkpoint), str(source), str(output), "--instruction", instruction])
    model = PromptEmbedder.from_pretrained(checkpoint)
    assert np.allclose(np.load(output), model.encode(TEXTS, instruction=instruction), atol=1e-6)
    assert [file.name for file in output.parent.iterdir()] == ["out.npy"]


@pytest.mark.parametrize("instruction", ["[]", '[""]', "", " ", '["a", " "]'])
def test_an_empty_instruction_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], instruction: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        encode.main(["model", "in.txt", str(tmp_path / "o.npy"), "--instruction", instruction])
    assert stopped.value.code == 2
    assert "--instruction: expected a sentence, or a JSON list of sentences, got" in capsys.readouterr().err


def test_a_file_beside_the_output_stays(checkpoint: Path, tmp_path: Path) -> None:
    source, neighbour = tmp_path / "in.txt", tmp_path / "out.npy.part"
    source.write_text("a", encoding="utf-8")
    neighbour.write_bytes(b"precious")
    encode.main([str(checkpoint), str(source), str(tmp_path / "out.npy"), f"--instruction={TASK}"])
    assert neighbour.read_bytes() == b"precious"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def without(section: str, key: str | None = None) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        saved = json.loads(file.read_text(encoding="utf-8"))
        del (saved[section] if key else saved)[key or section]
        file.write_text(json.dumps(saved), encoding="utf-8")

    return change


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("alignment.safetensors", cut, "the weights cannot be read"),
        ("skip.safetensors", cut, "the weights cannot be read"),
        ("prompter/model.safetensors", cut, "the weights cannot be read"),
        ("prompter/tokenizer.json", cut, "damaged tokenizer"),
        ("reader/adapter_model.safetensors", cut, "the weights cannot be read"),
        ("reader/adapter_config.json", cut, "damaged"),
        ("alignment.safetensors", Path.unlink, "found none"),
        ("reader", shutil.rmtree, "found none"),
        ("config.json", cut, "damaged"),
        ("config.json", without("model"), "expected model, got none"),
        ("config.json", without("backbone", "included"), "expected backbone.included, got none"),
        ("config.json", without("alignment", "residual"), "expected alignment.residual, got none"),
    ],
)
def test_a_damaged_model_is_one_message_that_names_the_file(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    model, source = Path(shutil.copytree(checkpoint, tmp_path / "model")), tmp_path / "in.txt"
    source.write_text("a", encoding="utf-8")
    damage(model / name)
    with pytest.raises(SystemExit) as stopped:
        encode.main([str(model), str(source), str(tmp_path / "o.npy"), f"--instruction={TASK}"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert str((model / name).parent) in error
    assert Path(name).name in error
    assert message in error


def moved_to(backbone: str, checkpoint: Path) -> PromptEmbedder:
    source = PromptEmbedder.from_pretrained(checkpoint)
    return move(source, dataclasses.replace(source.config, backbone=BackboneConfig(model=backbone)))


def test_transfer_trains_the_new_parts_alone(checkpoint: Path, tiny_models: Path, tmp_path: Path) -> None:
    source = PromptEmbedder.from_pretrained(checkpoint)
    before = {name: p.clone() for name, p in source.prompter.named_parameters()}
    out = tmp_path / "moved"
    new = str(tiny_models / "two")
    transfer.main([str(checkpoint), f"--backbone={new}", "--steps=4", f"--output={out}", "--evaluate.tasks=[]"])
    moved = PromptEmbedder.from_pretrained(out / "model")
    assert moved.backbone.name == new
    assert moved.encode(TEXTS, instruction=TASK).shape == (3, 40)
    after = dict(moved.prompter.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    start = moved_to(new, checkpoint)
    assert not torch.equal(start.alignment.weight, moved.alignment.weight)  # type: ignore[union-attr]
    assert set(start.trainable_parameters()) == {"alignment", "reader", "skip"}


def skip_weight(model: PromptEmbedder) -> torch.Tensor:
    assert model.skip is not None
    return model.skip.weight.detach()


def test_transfer_without_steps_is_the_least_squares_start(
    checkpoint: Path, tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, new = tmp_path / "moved", str(tiny_models / "two")
    transfer.main([str(checkpoint), f"--backbone={new}", "--steps=0", f"--output={out}", "--evaluate.tasks=[]"])
    moved, start = PromptEmbedder.from_pretrained(out / "model"), moved_to(new, checkpoint)
    assert torch.equal(start.alignment.weight, moved.alignment.weight)  # type: ignore[union-attr]
    assert not torch.equal(skip_weight(moved), skip_weight(start))
    texts = int(re.search(r"embeddings of (\d+) texts", capsys.readouterr().err)[1])  # type: ignore[index]
    assert 8 * 40 <= texts < 12 * 40  # hard negatives besides
    assert json.loads((out / "transfer.json").read_text(encoding="utf-8"))["curve"] == []


def test_transfer_without_steps_and_texts_needs_no_data(checkpoint: Path, tiny_models: Path, tmp_path: Path) -> None:
    out, new = tmp_path / "moved", str(tiny_models / "two")
    bare = [f"--output={out}", "--evaluate.tasks=[]", "--data=[]", "--texts=0"]
    transfer.main([str(checkpoint), f"--backbone={new}", "--steps=0", *bare])
    assert torch.equal(skip_weight(PromptEmbedder.from_pretrained(out / "model")), torch.eye(40))


def test_transfer_fits_the_skip_before_training_if_asked(
    checkpoint: Path, tiny_models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(checkpoint), f"--backbone={tiny_models / 'two'}", "--steps=1", "--evaluate.tasks=[]"]
    transfer.main([*command, f"--output={tmp_path / 'fresh'}"])
    assert "fitted" not in capsys.readouterr().err
    transfer.main([*command, f"--output={tmp_path / 'fitted'}", "--texts=30"])
    assert "fitted on the source's embeddings of" in capsys.readouterr().err
    fresh, fitted = (PromptEmbedder.from_pretrained(tmp_path / name / "model") for name in ("fresh", "fitted"))
    assert (skip_weight(fresh) - torch.eye(40)).abs().max() < 0.01 < (skip_weight(fitted) - torch.eye(40)).abs().max()


def test_transfer_refuses_bad_input(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([str(tmp_path), "--backbone=x"], "CHECKPOINT is the `model` folder of a run"),
        ([str(checkpoint), "--backbone=nowhere/x", f"--output={tmp_path / 'o'}"], "nowhere/x: no model there"),
    ):
        with pytest.raises(SystemExit) as stopped:
            transfer.main(arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_reached_takes_the_first_point_at_each_share() -> None:
    curve = [(0, 0.0, 50.0), (10, 1.5, 95.0), (20, 3.0, 90.0), (30, 4.5, 99.5)]
    assert reached(curve, 100.0) == [Reached(0.95, 95.0, (10, 1.5)), Reached(0.99, 99.0, (30, 4.5))]
    assert reached(curve[:1], 100.0) == [Reached(0.95, 95.0, None), Reached(0.99, 99.0, None)]

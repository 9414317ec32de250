"""GGUF files: read as an ordinary model, or refused by a sentence."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from pe.config import BackboneConfig, ModelConfig, PrompterConfig
from pe.method.backbone import Backbone
from pe.method.gguf import check_gguf, is_gguf, load_gguf
from pe.model import PromptEmbedder
from tests.gguf_files import write_gguf


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf")


def test_a_model_is_an_ordinary_one_and_can_be_saved(small: Path, tmp_path: Path) -> None:
    model, tokenizer = load_gguf(AutoModelForCausalLM, small, torch.float32)
    assert tokenizer("ab c", add_special_tokens=False)["input_ids"][0] == len(tokenizer) - 1
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(again(ids).logits, expected)


def test_a_decoder_is_the_language_model_without_its_head(small: Path) -> None:
    ids = torch.tensor([[5, 6, 7]])
    whole, _ = load_gguf(AutoModelForCausalLM, small, torch.float32)
    decoder, _ = load_gguf(AutoModel, small, torch.float32)
    assert torch.equal(decoder(ids).last_hidden_state, whole.base_model(ids).last_hidden_state)


def test_weights_come_in_the_type_that_was_asked_for(small: Path) -> None:
    model, _ = load_gguf(AutoModelForCausalLM, small, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_names() -> None:
    assert is_gguf("a/b.gguf")
    assert is_gguf("B.GGUF")
    assert not is_gguf("a/gguf")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a GGUF file, found none"):
        check_gguf(tmp_path / "none.gguf")


def test_another_file(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("hello")
    with pytest.raises(ValueError, match="does not begin with GGUF"):
        check_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize("share", [0.002, 0.1, 0.5, 0.99])
def test_a_truncated_file(small: Path, tmp_path: Path, share: float) -> None:
    content = small.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"cut\.gguf: the GGUF file is cut short"):
        check_gguf(cut)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "other.gguf", "gptj")
    with pytest.raises(ValueError, match=r"other\.gguf: transformers cannot read this GGUF file .*gptj"):
        load_gguf(AutoModelForCausalLM, path, torch.float32)


def test_an_embedder_is_made_of_gguf_files_saved_and_moved(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "models" / "small.gguf"
    file.parent.mkdir()
    shutil.copy(small, file)
    config = ModelConfig(
        prompter=PrompterConfig(model=str(file), soft_tokens=2, trainable="lora"),
        backbone=BackboneConfig(model=str(file)),
        max_length=32,
    )
    torch.manual_seed(0)
    model = PromptEmbedder.from_config(config).eval()
    expected = model.encode(["ab c", "b"], instruction="find it")
    model.save_pretrained(tmp_path / "run" / "model")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    again = PromptEmbedder.from_pretrained(tmp_path / "elsewhere" / "model")
    assert (again.encode(["ab c", "b"], instruction="find it") == expected).all()
    again.save_pretrained(tmp_path / "whole", include_backbone=True)
    file.unlink()
    alone = PromptEmbedder.from_pretrained(tmp_path / "whole", dtype="float32")
    assert abs(alone.encode(["ab c", "b"], instruction="find it") - expected).max() < 0.05  # weights are bfloat16 there


def test_another_gguf_file_in_its_place_is_noticed(small: Path, tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    shutil.copy(small, file)
    config = ModelConfig(prompter=PrompterConfig(model=str(file)), backbone=BackboneConfig(model=str(file)))
    config = dataclasses.replace(config, max_length=32)
    PromptEmbedder.from_config(config).save_pretrained(tmp_path / "model")
    content = bytearray(file.read_bytes())
    content[-40] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"content"):
        PromptEmbedder.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize("content", [b"hello", b""])
def test_a_bad_file_as_backbone_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.gguf: expected a GGUF file, got one that does not begin with GGUF"):
        Backbone.from_pretrained(BackboneConfig(model=str(tmp_path / "x.gguf")), torch.device("cpu"))


def test_a_gguf_backbone_in_the_folder_that_is_replaced_is_kept(small: Path, tmp_path: Path) -> None:
    config = ModelConfig(
        prompter=PrompterConfig(model=str(small), soft_tokens=2),
        backbone=BackboneConfig(model=str(small)),
        max_length=32,
    )
    PromptEmbedder.from_config(config).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "own.gguf"
    shutil.copy(small, file)
    config = dataclasses.replace(config, backbone=BackboneConfig(model=str(file)))
    model = PromptEmbedder.from_config(config)
    expected = model.encode(["ab"], instruction="find it")
    model.save_pretrained(tmp_path / "model")
    assert not file.exists()
    again = PromptEmbedder.from_pretrained(tmp_path / "model", dtype="float32")
    assert abs(again.encode(["ab"], instruction="find it") - expected).max() < 0.05  # its weights are bfloat16 there

"""GGUF files: read as an ordinary model, or refused by a sentence."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from pe.gguf import check_gguf, is_gguf, load_gguf
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

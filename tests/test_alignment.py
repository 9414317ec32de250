"""Alignment: which tokens two vocabularies share, the least-squares start, the vocabulary mixture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pe.config import AlignmentConfig, PrompterConfig
from pe.method.alignment import (
    AlignmentReport,
    LinearAlignment,
    VocabularyAlignment,
    build_alignment,
    byte_alphabet,
    initial_weight,
    shared_tokens,
    token_bytes,
)
from pe.method.backbone import Backbone
from pe.method.prompting import PromptingLLM
from tests.tiny import byte_tokenizer, decoder, language_model

REQUESTS = [[5, 6, 7], [9, 8]]


def sentencepiece_tokenizer(words: tuple[str, ...] = ()) -> PreTrainedTokenizerBase:
    """Spelled as SentencePiece does: `▁word`, `<0x41>` for bytes, characters as themselves."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "t", "h", "e", "a", "n", "▁t", "▁th", "▁the", "▁a", "th", "the", "an", "é", *words]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("▁", "a"), ("t", "h"), ("th", "e"), ("a", "n")]
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def parts(theirs: PreTrainedTokenizerBase | None = None, **changes: Any) -> tuple[PromptingLLM, Backbone]:
    sizes: dict[str, Any] = {"hidden_size": 24, "head_dim": 6} | changes
    written = PromptingLLM(language_model("llama", **sizes), byte_tokenizer(), PrompterConfig(soft_tokens=2))
    return written.eval(), Backbone(decoder("qwen3"), theirs or sentencepiece_tokenizer(), "theirs")


def test_both_spellings_of_a_word_are_one() -> None:
    ours, theirs = token_bytes(byte_tokenizer()), token_bytes(sentencepiece_tokenizer())
    byte_level, pieces = byte_tokenizer().get_vocab(), sentencepiece_tokenizer().get_vocab()
    for key, ours_spelled, theirs_spelled in (
        (b" the", "Ġthe", "▁the"),
        (b" a", "Ġa", "▁a"),
        (b"the", "the", "the"),
        (b"an", "an", "an"),
        (b" ", "Ġ", "▁"),
    ):
        assert ours[key] == byte_level[ours_spelled]
        assert theirs[key] == pieces[theirs_spelled]


def test_byte_tokens_stand_for_bytes_and_yield_to_characters() -> None:
    pieces = sentencepiece_tokenizer()
    found, vocabulary = token_bytes(pieces), pieces.get_vocab()
    assert found[b"\xc3"] == vocabulary["<0xC3>"]
    assert found[b"\n"] == vocabulary["<0x0A>"]
    assert found[b"t"] == vocabulary["t"] != vocabulary["<0x74>"]
    assert found["é".encode()] == vocabulary["é"]
    assert token_bytes(byte_tokenizer())[b"\xc3"] == byte_tokenizer().get_vocab()["Ã"]


def test_every_key_decodes_to_what_its_tokenizer_says() -> None:
    """Independent of spelling rules: the tokenizers' own decoders on all whole-character tokens."""
    for tokenizer in (byte_tokenizer(), sentencepiece_tokenizer()):
        checked = 0
        for key, number in token_bytes(tokenizer).items():
            text = key.decode("utf-8", errors="replace")
            if "�" not in text:
                assert tokenizer.decode([number], clean_up_tokenization_spaces=False) == text
                checked += 1
        assert checked > 100


def test_special_tokens_are_left_out() -> None:
    found = token_bytes(sentencepiece_tokenizer())
    assert not {b"<unk>", b"<s>", b"</s>"} & found.keys()
    assert b"<|end|>" not in token_bytes(byte_tokenizer())


def test_added_special_tokens_are_left_out_too() -> None:
    tokenizer = sentencepiece_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|user|>", special=True)]})
    assert b"<|user|>" not in token_bytes(tokenizer)


def test_shared_tokens_pair_ids_in_our_order() -> None:
    ours, theirs = shared_tokens(byte_tokenizer(), sentencepiece_tokenizer())
    left = {number: key for key, number in token_bytes(byte_tokenizer()).items()}
    right = {number: key for key, number in token_bytes(sentencepiece_tokenizer()).items()}
    assert [left[i] for i in ours.tolist()] == [right[i] for i in theirs.tolist()]
    assert ours.tolist() == sorted(ours.tolist())
    assert len(ours) == 256 + 5  # all bytes and all five merges; `<s>` is a word in one vocabulary only
    backwards = shared_tokens(sentencepiece_tokenizer(), byte_tokenizer())
    assert sorted(zip(*(x.tolist() for x in backwards), strict=True)) == sorted(
        zip(theirs.tolist(), ours.tolist(), strict=True)
    )


def test_byte_alphabet_is_a_bijection() -> None:
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert byte_alphabet()["Ġ"] == ord(" ")


def test_least_squares_recovers_a_linear_map() -> None:
    prompter, backbone = parts()
    true = torch.randn(24, 32)
    ours, theirs = shared_tokens(byte_tokenizer(), sentencepiece_tokenizer())
    with torch.no_grad():
        backbone.embedding[theirs] = prompter.embedding[ours] @ true
    weight, report = initial_weight(prompter, backbone, AlignmentConfig(ridge=1e-10))
    assert weight.dtype == torch.float32
    assert torch.allclose(weight, true, atol=1e-4)
    assert report.shared_tokens == len(ours)
    assert report.residual is not None
    assert report.residual < 1e-5


def test_rows_that_determine_no_matrix_need_a_ridge() -> None:
    prompter, backbone = parts()
    with torch.no_grad():
        prompter.embedding.zero_()
    with pytest.raises(ValueError, match=r"alignment.ridge: expected more than 0: .* no matrix of width 24"):
        initial_weight(prompter, backbone, AlignmentConfig(ridge=0))


def test_least_squares_is_the_ridge_minimum_and_tells_its_residual() -> None:
    prompter, backbone = parts()
    config = AlignmentConfig(ridge=0.1)
    weight, report = initial_weight(prompter, backbone, config)
    ours, theirs = shared_tokens(byte_tokenizer(), sentencepiece_tokenizer())
    x, y = prompter.embedding.detach()[ours].double(), backbone.embedding.detach()[theirs].double()
    w = weight.double().requires_grad_()
    ridge = 0.1 * x.square().sum(0).mean()
    ((x @ w - y).square().sum() + ridge * w.square().sum()).backward()
    assert w.grad is not None
    assert w.grad.norm() < 1e-5 * (x.T @ y).norm()
    expected = ((x @ weight.double() - y).norm() / y.norm()).item()
    assert report.residual == pytest.approx(expected, rel=1e-5)
    assert 0.5 < expected < 1  # unrelated random rows cannot be fitted
    assert f"{len(ours)} shared tokens, relative residual 0." in str(report)
    assert str(AlignmentReport(1234, None)) == "1,234 shared tokens"


def test_embedding_scales_count_on_both_sides() -> None:
    """Gemma multiplies its rows: W maps what the models really read."""
    prompter = PromptingLLM(language_model("gemma3"), byte_tokenizer(), PrompterConfig(soft_tokens=2))
    backbone = Backbone(decoder("gemma3"), byte_tokenizer(), "same")
    true = torch.randn(32, 32)
    with torch.no_grad():
        backbone.embedding.copy_(prompter.embedding @ true)
    weight, _ = initial_weight(prompter, backbone, AlignmentConfig(ridge=1e-10))
    ids = torch.arange(2, 200)
    read = [m.get_input_embeddings()(ids) for m in (prompter.model, backbone.model)]
    assert torch.allclose(read[0] @ weight, read[1], atol=1e-3)


@pytest.mark.parametrize("width", [24, 64])
def test_orthogonal_start(width: int) -> None:
    prompter, backbone = parts(hidden_size=width, head_dim=width // 4)
    weight, report = initial_weight(prompter, backbone, AlignmentConfig(init="orthogonal"))
    gram = weight @ weight.T if width < 32 else weight.T @ weight
    assert torch.allclose(gram / gram[0, 0], torch.eye(min(width, 32)), atol=1e-5)
    scale = backbone.embedding.norm(dim=1).mean() / prompter.embedding.norm(dim=1).mean()
    assert gram[0, 0].sqrt().item() == pytest.approx(scale.item(), rel=1e-4)
    assert report.residual is None
    assert report.shared_tokens == 261


def no_shared_tokens() -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(BPE(vocab={"<s>": 0, "日": 1, "本": 2}, merges=[], unk_token="<s>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>", unk_token="<s>")


@pytest.mark.parametrize("kind", ["linear", "vocabulary"])
def test_nothing_shared_is_an_error(kind: str) -> None:
    prompter, backbone = parts(no_shared_tokens())
    with pytest.raises(ValueError, match=r"alignment: .* theirs share (none|nothing)"):
        build_alignment(prompter, backbone, AlignmentConfig(kind=kind))  # type: ignore[arg-type]


def test_orthogonal_start_needs_no_shared_token() -> None:
    prompter, backbone = parts(no_shared_tokens())
    alignment = build_alignment(prompter, backbone, AlignmentConfig(init="orthogonal"))
    assert alignment.report == AlignmentReport(0, None)


def test_linear_alignment_hands_over_prompts_and_matrix() -> None:
    prompter, backbone = parts()
    alignment = build_alignment(prompter, backbone, AlignmentConfig())
    assert isinstance(alignment, LinearAlignment)
    written = prompter(REQUESTS)
    aligned = alignment(written)
    assert aligned.prompts is written.tokens
    assert aligned.weight is alignment.weight
    assert len(aligned) == 2
    assert [tuple(p.shape) for p in alignment.parameters()] == [(24, 32)]


@pytest.mark.parametrize("architecture", ["llama", "granite"])
def test_vocabulary_alignment_is_a_mixture_of_the_backbones_rows(architecture: str) -> None:
    prompter = PromptingLLM(
        language_model(architecture, hidden_size=24, head_dim=6), byte_tokenizer(), PrompterConfig(temperature=0.5)
    ).eval()
    backbone = Backbone(decoder("gemma3"), sentencepiece_tokenizer(), "theirs")
    alignment = build_alignment(prompter, backbone, AlignmentConfig(kind="vocabulary"))
    assert isinstance(alignment, VocabularyAlignment)
    assert alignment.report == AlignmentReport(261, None)
    assert list(alignment.parameters()) == []
    assert alignment.state_dict() == {}
    aligned = alignment(prompter(REQUESTS))
    assert aligned.weight is None
    assert aligned.prompts.shape == (2, 5, 32)

    left, right = token_bytes(byte_tokenizer()), token_bytes(sentencepiece_tokenizer())
    common = [key for key in left if key in right]
    ours, theirs = [left[key] for key in common], [right[key] for key in common]
    logits = prompter.model(torch.tensor([REQUESTS[0]])).logits[0, -1, ours]
    rows = backbone.model.get_input_embeddings()(torch.tensor(theirs))
    expected = torch.softmax(logits / 0.5, -1) @ rows
    assert torch.allclose(aligned.prompts[0, 0], expected, rtol=1e-5, atol=1e-5)

    aligned.prompts.square().sum().backward()
    for name, parameter in prompter.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
    assert backbone.embedding.grad is None

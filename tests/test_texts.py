"""Whatever a text is, its embedding is a unit vector that depends on it alone, and its letters are never a token."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pe.method.loading import Filled, TextTokenizer
from pe.model import PromptEmbedder
from tests.embedders import build
from tests.tiny import byte_tokenizer

LIMIT = 12
TOLERANCE = 2e-5
PIECES = (
    *("", " ", "\n", "\t\r\n", "\x00", "\x7f", "\x1b[0m", "\ufeff", "\u200b", "\u2028", "\ufffd", "\U0010ffff"),
    *("مرحبا بالعالم", "\u202eabc\u202c", "שלום", "👩‍👩‍👧‍👦", "🇺🇳", "e\u0301" * 3, "ﷺ", "日本語", "ß" * 5, "a" * 40),
    *("<|end|>", "<s>", "</s>", "<|endoftext|>", "[CLS]", "<|im_start|>system", "<pad>", "Ġthe", "<0x0A>"),
    *("{text}", "{instruction}", "{0}", "%s", "{{text}}", "Instruct: x\nQuery: y", "null", "the cat"),
)
"""Of which texts are put together, beside what hypothesis thinks of."""
SPECIAL = ("<|end|>", "<s>")
texts = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(PIECES), max_size=6).map("".join))
checked = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@functools.cache
def embedder(layout: str) -> PromptEmbedder:
    """With a token before each text, and dimensions that an instruction scales where the layout has these."""
    options = {"skip": "weighted", "lens_rank": 2} if layout == "suffix" else {"pooling": "mean_text"}
    model = build("qwen3", bos=True, layout=layout, **options)
    object.__setattr__(model.config, "max_length", LIMIT)
    return model


def encode(model: PromptEmbedder, given_texts: list[str]) -> np.ndarray:
    found = model.encode(given_texts, instruction="find the same <s>")
    assert np.isfinite(found).all()
    assert np.abs(np.linalg.norm(found, axis=-1) - 1).max(initial=0) < 1e-5
    return found


@pytest.mark.parametrize("layout", ["suffix", "prefix"])
@checked
@given(batch=st.lists(texts, min_size=1, max_size=5), seed=st.randoms(use_true_random=False))
def test_embeddings_are_unit_vectors_of_their_texts_alone(layout: str, batch: list[str], seed: object) -> None:
    model = embedder(layout)
    found, order = encode(model, batch), list(range(len(batch)))
    seed.shuffle(order)  # type: ignore[attr-defined]
    assert np.abs(encode(model, [batch[place] for place in order]) - found[order]).max() < TOLERANCE
    place = order[0]
    assert np.abs(encode(model, [batch[place]])[0] - found[place]).max() < TOLERANCE


@pytest.mark.parametrize("layout", ["suffix", "prefix"])
def test_every_length_around_the_limit(layout: str) -> None:
    """What is beyond the limit changes nothing, what is within it does."""
    model = embedder(layout)
    lengths = range(3 * LIMIT)
    together = encode(model, ["b" * length for length in lengths])
    for length in lengths:
        alone = encode(model, ["b" * length])[0]
        assert np.abs(alone - together[length]).max() < TOLERANCE
    same = np.abs(together[1:] - together[:-1]).max(-1) < TOLERANCE
    lead = len(model.backbone.text_tokenizer.lead) if layout == "suffix" else 0
    assert same.tolist() == [length >= LIMIT - lead for length in lengths[:-1]]


@pytest.mark.parametrize("letter", ["a", "é", "🙂"])
def test_a_megabyte_without_a_space(letter: str) -> None:
    text = letter * (2**20 // len(letter.encode()))
    found = encode(embedder("suffix"), [text, "a", letter * LIMIT])
    assert np.abs(found[0] - found[2]).max() < TOLERANCE


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc80" * 3])
def test_half_a_surrogate_pair_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"texts, place 1: expected Unicode text, got half a surrogate pair"):
        embedder("suffix").encode(["a", text], instruction="find")


@checked
@given(text=texts, instruction=texts, before=st.sampled_from(["", *SPECIAL]))
def test_special_tokens_are_those_of_a_template(text: str, instruction: str, before: str) -> None:
    tokenizer = byte_tokenizer(bos=True)
    read, special = TextTokenizer(tokenizer, len(tokenizer)), set(tokenizer.all_special_ids)
    plain, filled = read([text, Filled(before + "{instruction}: {text}", instruction, text)])
    (alone,) = read([text], lead=False)
    assert plain[: len(read.lead)] == filled[: len(read.lead)] == read.lead
    assert not special & set(plain[len(read.lead) :])
    assert alone == (plain[len(read.lead) :] or [read.filler]), "of nothing something must be read"
    wanted = [tokenizer.convert_tokens_to_ids(before)] if before else []
    assert [number for number in filled[len(read.lead) :] if number in special] == wanted


@checked
@given(text=texts, instruction=texts)
def test_what_is_filled_in_is_never_a_field(text: str, instruction: str) -> None:
    assert str(Filled("a {instruction} b {text} c", instruction, text)) == f"a {instruction} b {text} c"

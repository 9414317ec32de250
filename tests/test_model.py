"""The whole embedder: encoding, prompt bank, saving and loading, learning."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from torch import Tensor, nn

from pe import saving
from pe.baselines.frozen import FrozenEncoder
from pe.baselines.linear import LinearEmbedder
from pe.baselines.lora import LoraBaselineConfig, LoraEmbedder
from pe.config import (
    AlignmentConfig,
    BackboneConfig,
    Dtype,
    LoraSettings,
    ModelConfig,
    PrompterConfig,
    SideTemplates,
    TemplatesConfig,
)
from pe.method import loading
from pe.method.alignment import LinearAlignment
from pe.method.prompt_bank import SAMPLED, PromptBank, stamp
from pe.method.prompting import PromptingLLM
from pe.model import Instruction, PromptEmbedder, Requests
from tests import oracle
from tests.tiny import PLAIN, byte_tokenizer, decoder, language_model

TEXTS = [
    "the cat sat",
    "a",
    "an old man walks along the other bank of the river",
    "",
    "naïve 日本語 🙂",
    "the end of a day",
]
FIND, SAME = "find the answer", "same topic?"
ROUNDING = 3e-6  # float32 products over other numbers of rows; in float64 nothing is left of it (see below)
Maker = Callable[..., PromptEmbedder]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `prompter`, `backbone` and `other` (the same shape, other weights)."""
    folder = tmp_path_factory.mktemp("models")
    for name, saved in (
        ("prompter", language_model("llama", hidden_size=24, head_dim=6)),
        ("backbone", decoder("qwen3")),
        ("other", decoder("qwen3", seed=9)),
    ):
        saved.save_pretrained(folder / name)
        byte_tokenizer(bos=name != "prompter").save_pretrained(folder / name)
    return folder


@pytest.fixture
def make(models: Path) -> Maker:
    def build(
        *,
        prompter: dict[str, Any] | None = None,
        alignment: dict[str, Any] | None = None,
        backbone: Path | str | None = None,
        dtype: Dtype = "auto",
        **options: Any,
    ) -> PromptEmbedder:
        torch.manual_seed(0)
        chosen = {"model": str(models / "prompter"), "soft_tokens": 3, "temperature": 0.7} | (prompter or {})
        config = ModelConfig(
            prompter=PrompterConfig(**chosen),
            backbone=BackboneConfig(model=str(backbone or models / "backbone"), dtype=dtype),
            alignment=AlignmentConfig(**(alignment or {})),
            **PLAIN | options,
        )
        built = PromptEmbedder.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        return built

    return build


PREFIX = {"layout": "prefix", "pooling": "mean_text"}
SHAPES: dict[str, dict[str, Any]] = {
    "suffix": {},
    "suffix, text": {"conditioning": "instruction_and_text"},
    "prefix": PREFIX,
    "prefix, text": PREFIX | {"conditioning": "instruction_and_text"},
}


def requests(*texts: str) -> Requests:
    return Requests(texts, [Instruction(FIND)], [0] * len(texts))


def same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# Encoding.


@pytest.mark.parametrize("shape", SHAPES)
def test_encode_restores_order_and_equals_forward(make: Maker, shape: str) -> None:
    model = make(**SHAPES[shape])
    got = model.encode(TEXTS, instruction=FIND, batch_tokens=20)
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.float32
    assert got.shape == (6, 32)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(got, model(requests(*TEXTS)).numpy(force=True), atol=ROUNDING)
    alone = np.concatenate([model.encode([text], instruction=FIND) for text in TEXTS])
    np.testing.assert_allclose(got, alone, atol=ROUNDING)
    assert np.abs(got[0] - got[1]).max() > 1e-2


@pytest.mark.parametrize("shape", SHAPES)
def test_encode_is_the_plain_forward_of_the_stock_models(make: Maker, shape: str) -> None:
    model, texts = make(**SHAPES[shape]), [text for text in TEXTS if text]
    np.testing.assert_allclose(
        model.encode(texts, instruction=FIND), oracle.embed(model, requests(*texts)).numpy(force=True), atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_composition_and_order_change_nothing(make: Maker, shape: str, dtype: torch.dtype) -> None:
    model, atol = make(**SHAPES[shape]).to(dtype), ROUNDING if dtype == torch.float32 else 1e-12
    whole = model(requests(*TEXTS))
    assert whole.dtype == dtype
    for got, expected in (
        (model(requests(*TEXTS[::-1])), whole.flip(0)),
        (model(requests(TEXTS[2], TEXTS[4])), whole[[2, 4]]),
        (model(requests(*TEXTS, *TEXTS)), torch.cat([whole, whole])),
        (torch.cat([model(requests(text)) for text in TEXTS]), whole),
    ):
        assert torch.allclose(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", SHAPES)
def test_several_instructions_equal_one_by_one(make: Maker, shape: str) -> None:
    model = make(**SHAPES[shape])
    together = model.encode_tensor(TEXTS, instructions=[FIND, SAME], batch_tokens=30)
    assert together.shape == (2, 6, 32)
    for row, instruction in zip(together, (FIND, SAME), strict=True):
        np.testing.assert_allclose(row.numpy(), model.encode(TEXTS, instruction=instruction), atol=ROUNDING)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_several_instructions_share_the_text_pass(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make(), []
    read = model.backbone.read
    monkeypatch.setattr(model.backbone, "read", lambda texts, **how: calls.append(len(texts)) or read(texts, **how))
    model.encode_tensor(TEXTS, instructions=[FIND, SAME, "sort them"])
    assert calls == [6]


@pytest.mark.parametrize("layout", ["suffix", "prefix"])
def test_mixed_instructions_and_sides_in_one_batch(make: Maker, layout: str) -> None:
    """Sides whose prompting LLM reads the same, but whose backbone does not, must not be taken for one."""
    templates = TemplatesConfig(
        query=SideTemplates(prefix="Q {instruction}:"),
        document=SideTemplates(prefix="D {instruction}:", text="> {text}"),
    )
    model = make(templates=templates, **(PREFIX if layout == "prefix" else {}))
    mixed = Requests(TEXTS[:3] * 2, [Instruction(FIND), Instruction(FIND, "document")], [0, 1, 0, 1, 0, 1])
    np.testing.assert_allclose(model(mixed).numpy(force=True), oracle.embed(model, mixed).numpy(force=True), atol=1e-5)


def test_sides_use_their_own_templates(make: Maker) -> None:
    model = make(templates=TemplatesConfig(document=SideTemplates(text="passage: {text}")))
    documents = model.encode(["the cat"], instruction=FIND, side="document")
    np.testing.assert_allclose(documents, model.encode(["passage: the cat"], instruction=FIND), atol=ROUNDING)


def test_braces_in_texts_and_instructions_are_plain_characters(make: Maker) -> None:
    model = make(conditioning="instruction_and_text")
    instruction = Instruction("fill {text} and {instruction}")
    assert str(model.prompter_text(instruction, "see {instruction}")) == (
        "Instruct: fill {text} and {instruction}\nQuery: see {instruction}"
    )
    assert str(model.prompter_text(instruction)) == "Instruct: fill {text} and {instruction}\nQuery:"


def test_nothing_to_encode(make: Maker) -> None:
    assert make().encode([], instruction=FIND).shape == (0, 32)
    assert make(**PREFIX).encode([], instruction=FIND).shape == (0, 32)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_empty_string_has_an_embedding(make: Maker, shape: str) -> None:
    got = make(**SHAPES[shape]).encode([""], instruction=FIND)
    assert np.isfinite(got).all()
    assert np.linalg.norm(got) == pytest.approx(1, abs=1e-6)


def test_a_single_string_is_refused(make: Maker) -> None:
    model = make()
    with pytest.raises(ValueError, match="got a single string; wrap it in a list"):
        model.encode("the cat", instruction=FIND)
    with pytest.raises(ValueError, match="got a single string; wrap it in a list"):
        model.encode_tensor(["the cat"], instructions=FIND)


def test_baselines_take_the_same_sequences(models: Path) -> None:
    config = BackboneConfig(model=str(models / "backbone"))
    lora = LoraEmbedder.from_config(LoraBaselineConfig(backbone=config))
    for baseline in (FrozenEncoder.from_config(config), LinearEmbedder.from_config(config), lora):
        with pytest.raises(ValueError, match="got a single string; wrap it in a list"):
            baseline.encode("the cat", instruction=FIND)
        with pytest.raises(ValueError, match="texts: expected a sequence of strings, got dict"):
            baseline.encode({"a": "b"}, instruction=FIND)
        expected = baseline.encode(TEXTS, instruction=FIND)
        assert np.array_equal(baseline.encode(map(str, TEXTS), instruction=FIND), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": ["a", None]}, "texts: expected strings, got NoneType at place 1: None"),
        ({"texts": ["\ud800"]}, "texts, place 0: expected Unicode text, got half a surrogate pair"),
        ({"instruction": 3}, "instructions: expected strings, got int at place 0"),
        ({"instruction": None}, "instruction: expected a sentence, got none, and PromptEmbedder has no default"),
        ({"batch_tokens": 0}, "batch_tokens: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_encoded_is_refused(make: Maker, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make().encode(**{"texts": TEXTS, "instruction": FIND} | changes)


def test_texts_of_any_sequence(make: Maker) -> None:
    model = make()
    expected = model.encode(TEXTS, instruction=FIND)
    assert np.array_equal(model.encode(np.array(TEXTS), instruction=FIND), expected)  # type: ignore[arg-type]
    assert np.array_equal(model.encode(tuple(TEXTS), instruction=FIND), expected)


ONCE: dict[str, Callable[[list[str]], Any]] = {
    "generator": lambda items: (item for item in items),
    "map": lambda items: map(str, items),
    "keys": lambda items: dict.fromkeys(items).keys(),
    "array": np.array,
}


@pytest.mark.parametrize("kind", ONCE)
def test_what_can_be_read_once_is_read_once(make: Maker, kind: str) -> None:
    model, once, wanted = make(), ONCE[kind], [FIND, SAME]
    expected = model.encode_many(TEXTS, instructions=wanted)
    assert np.array_equal(model.encode(once(TEXTS), instruction=FIND), expected[0])
    assert np.array_equal(model.encode_many(once(TEXTS), instructions=once(wanted)), expected)
    tensor = model.encode_tensor(once(TEXTS), instructions=once(wanted))
    assert np.array_equal(tensor.numpy(), expected)
    bank = model.prompt_bank(Instruction(text) for text in wanted)
    assert torch.equal(bank, model.prompt_bank([Instruction(FIND), Instruction(SAME)]))


NO_SEQUENCES: list[Any] = [
    {"a": "b"},
    {"a", "b"},
    frozenset("ab"),
    None,
    7,
    np.array("a"),
    np.array([["a"]]),
]


@pytest.mark.parametrize("given", NO_SEQUENCES, ids=lambda given: type(given).__name__)
def test_what_has_no_texts_or_no_order_is_refused(make: Maker, given: Any) -> None:
    model, kind = make(), type(given).__name__
    said = (
        f"expected a sequence of strings, got {kind}; give them as a list, in the order that their results shall have"
    )
    with pytest.raises(ValueError, match=f"texts: {said}"):
        model.encode(given, instruction=FIND)
    with pytest.raises(ValueError, match=f"instructions: {said}"):
        model.encode_many(TEXTS, instructions=given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Instruction(FIND), "expected pe.model.Instruction, got str at place 0: 'find the answer'"),
        ([FIND], "expected pe.model.Instruction, got str at place 0: 'find the answer'"),
        (FIND, "expected a sequence of Instruction, got a single string; wrap it in a list"),
        ({Instruction(FIND)}, "expected a sequence of Instruction, got set"),
    ],
)
def test_a_bank_is_of_instructions(make: Maker, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"instructions: {message}"):
        make().prompt_bank(given)


def test_an_unknown_side_is_refused(make: Maker) -> None:
    with pytest.raises(ValueError, match="side: expected 'query' or 'document', got 'doc'"):
        make().encode(["a"], instruction=FIND, side="doc")  # type: ignore[arg-type]


def test_truncation_is_counted_and_cuts(make: Maker) -> None:
    model = make(max_length=6)
    long = model.encode(["the cat sat on the mat", "a b"], instruction=FIND)
    assert str(model.truncation) == "1 of 2 texts truncated"
    ids = model.backbone.text_tokenizer(["the cat sat on the mat"])[0]
    kept = model.backbone.text_tokenizer.tokenizer.decode(ids[1:6])
    assert model.backbone.text_tokenizer([kept])[0] == ids[:6]
    np.testing.assert_allclose(long[0], model.encode([kept], instruction=FIND)[0], atol=ROUNDING)
    assert (model.truncation.texts, model.truncation.cut) == (3, 1)


def test_what_the_prompting_model_cuts_is_counted(make: Maker) -> None:
    model = make(max_length=8, conditioning="instruction_and_text")
    model.prompter_ids([("the", "the"), ("the", "the end of a day")])
    assert model.truncation.prompter_cut == 1
    model.encode(["a", "an old man walks"], instruction=FIND)
    assert str(model.truncation) == "1 of 2 texts truncated, 2 readings of the prompting LLM too"


def test_an_error_leaves_the_mode_as_it_was(make: Maker) -> None:
    model = make().train()

    def fail(*_: object) -> None:
        raise OSError("no such luck")

    model.readings = fail  # type: ignore[assignment,method-assign]
    with pytest.raises(OSError, match="no such luck"):
        model.encode(TEXTS, instruction=FIND)
    assert model.training
    assert model.prompter.training


def test_inference_mode(make: Maker, tmp_path: Path) -> None:
    model = make()
    expected = model.encode(TEXTS, instruction=FIND)
    model.save_pretrained(tmp_path / "saved")
    with torch.inference_mode():
        again = PromptEmbedder.from_pretrained(tmp_path / "saved")
        np.testing.assert_array_equal(again.encode(TEXTS, instruction=FIND), expected)
        again.alignment.weight.mul_(-1)  # type: ignore[union-attr, operator]
        assert np.abs(again.encode(TEXTS, instruction=FIND) - expected).max() > 1e-3
        np.testing.assert_array_equal(model.encode(TEXTS, instruction=FIND), expected)


def test_encode_leaves_mode_and_gradients_as_they_were(make: Maker) -> None:
    model = make().train()
    model.encode(["a"], instruction=FIND)
    assert model.training
    assert model.prompter.training
    assert all(p.grad is None for p in model.parameters())


# Prompt bank.


def count_generations(model: PromptEmbedder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    generate = model.prompter.generate
    monkeypatch.setattr(model.prompter, "generate", lambda ids, count: calls.append(len(ids)) or generate(ids, count))
    return calls


def test_prompts_are_written_once_for_each_instruction(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    calls = count_generations(model, monkeypatch)
    model.encode(TEXTS, instruction=FIND, batch_tokens=10)
    model.encode(TEXTS, instruction=FIND)
    assert calls == [1]
    model.encode(TEXTS, instruction=SAME)
    assert calls == [1, 1]
    assert model.prompt_bank([Instruction(FIND), Instruction(SAME)]).shape == (2, 3, 32)
    assert calls == [1, 1]


@pytest.mark.parametrize("optimiser", [{}, {"foreach": True}, {"fused": True}])
def test_an_optimiser_step_empties_the_bank(make: Maker, optimiser: dict[str, bool]) -> None:
    model = make()
    before = model.encode(TEXTS, instruction=FIND)
    optimizer = torch.optim.AdamW(model.prompter.parameters(), lr=1e-2, **optimiser)
    model(requests(*TEXTS)).sum().backward()
    model.encode(TEXTS, instruction=FIND)  # the bank is full between the backward pass and the step
    optimizer.step()
    after = model.encode(TEXTS, instruction=FIND)
    np.testing.assert_allclose(after, model(requests(*TEXTS)).numpy(force=True), atol=ROUNDING)
    assert np.abs(after - before).max() > 1e-3


def test_loaded_weights_empty_the_bank(make: Maker) -> None:
    model = make()
    model.encode(TEXTS, instruction=FIND)
    model.load_trainable_state({name: value * 1.5 for name, value in model.trainable_state().items()})
    np.testing.assert_allclose(
        model.encode(TEXTS, instruction=FIND), model(requests(*TEXTS)).numpy(force=True), atol=ROUNDING
    )


def test_weights_written_through_data_empty_the_bank(make: Maker) -> None:
    """As averages of weights are, which raises no version."""
    model = make()
    before = model.encode(TEXTS, instruction=FIND)
    for parameter in model.prompter.parameters():
        parameter.data.mul_(1.2)
    after = model.encode(TEXTS, instruction=FIND)
    np.testing.assert_allclose(after, model(requests(*TEXTS)).numpy(force=True), atol=ROUNDING)
    assert np.abs(after - before).max() > 1e-3


@pytest.mark.parametrize("part", ["prompter", "alignment"])
@pytest.mark.parametrize("how", ["in place", "swapped"])
def test_weights_of_a_frozen_embedder_written_through_data_empty_the_bank(make: Maker, part: str, how: str) -> None:
    """What a frozen prompting LLM has written is kept apart from the bank."""
    model = make().requires_grad_(False)
    before = model.encode(TEXTS, instruction=FIND)
    for parameter in getattr(model, part).parameters():
        if how == "in place":
            parameter.data.mul_(1.2)
        else:
            parameter.data = parameter.data * 1.2
    after = model.encode(TEXTS, instruction=FIND)
    np.testing.assert_allclose(after, model(requests(*TEXTS)).numpy(force=True), atol=ROUNDING)
    assert np.abs(after - before).max() > 1e-3


def test_a_frozen_prompting_llm_written_through_data_writes_anew(make: Maker) -> None:
    """In training, too, where no bank is asked."""
    model = make().train()
    model.prompter.requires_grad_(False)
    before = model(requests(*TEXTS))
    for parameter in model.prompter.parameters():
        parameter.data.mul_(1.2)
    after = model(requests(*TEXTS))
    torch.testing.assert_close(after, model.requires_grad_(True)(requests(*TEXTS)), atol=ROUNDING, rtol=0)
    assert (after - before).abs().max() > 1e-3


def test_a_bank_keeps_so_many_and_is_of_one_precision() -> None:
    bank, weight = PromptBank[str, int](2), nn.Linear(2, 2)
    written: list[str] = []

    def get(*keys: str) -> list[int]:
        return bank.get(keys, [weight], lambda missing: [written.append(key) or len(written) for key in missing])

    assert get("a", "b", "a") == [1, 2, 1]
    assert get("c", "a") == [3, 1]  # what is kept is found before the oldest goes
    assert get("a") == [4]
    with torch.autocast("cpu", torch.bfloat16):
        assert get("a") == [5]
    with torch.inference_mode():
        assert get("a") == [6]
    bank.clear()
    assert get("a") == [7]
    assert written == ["a", "b", "c", "a", "a", "a", "a"]


def test_a_step_on_a_gpu_looks_at_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for the device; what raises a version is noticed all the same."""
    bank, layer, looks = PromptBank[str, float](2), nn.Linear(2, 2), []
    monkeypatch.setattr("pe.method.prompt_bank.sample", lambda weights: looks.append(len(list(weights))) or (1.0,))

    def get() -> float:
        return bank.get(["a"], [layer], lambda missing: [float(layer.weight.detach().sum())])[0]

    first = get()
    monkeypatch.setattr("pe.method.prompt_bank.may_wait", lambda weights: False)
    assert len(looks) == 1
    assert get() == first
    assert len(looks) == 1
    with torch.no_grad():
        layer.weight += 1
    assert get() == pytest.approx(first + 4)


def test_weights_without_data_have_a_stamp() -> None:
    with torch.device("meta"):
        weight = nn.Linear(3, 4)
    assert stamp(list(weight.parameters())).values == ()
    assert PromptBank[str, str](1).get(["a"], [weight], lambda missing: map(str.upper, missing)) == ["A"]


def test_a_weight_is_sampled_all_over(make: Maker) -> None:
    small, large = nn.Linear(3, 4), nn.Linear(64, 96, bias=False)
    taken = stamp(list(small.parameters())).values
    assert sorted(taken) == sorted(torch.cat([p.flatten() for p in small.parameters()]).tolist())
    taken = stamp(list(large.parameters())).values
    assert SAMPLED <= len(taken) < 2 * SAMPLED
    places = [(large.weight == value).nonzero()[0].tolist() for value in taken]
    rows, columns = (set(axis) for axis in zip(*places, strict=True))
    assert len(rows) > SAMPLED / 2
    assert len(columns) > SAMPLED / 2
    assert stamp([]).values == ()
    weights = list(make().prompter.parameters())
    assert len(stamp(weights).values) < 2 * SAMPLED * len(weights)


def test_a_frozen_prompting_llm_writes_once(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes is the same at every step; another precision, other weights and training write anew."""
    model = make()
    expected = model(requests(*TEXTS))
    model.prompter.requires_grad_(False)
    calls = count_generations(model, monkeypatch)
    for _ in range(3):
        embeddings = model(requests(*TEXTS))
        embeddings[:, 0].sum().backward()
        torch.testing.assert_close(embeddings, expected, atol=ROUNDING, rtol=0)
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        model(requests(*TEXTS))
    with torch.inference_mode():
        model(requests(*TEXTS))
    assert len(calls) == 3
    weight = next(p for name, p in model.prompter.named_parameters() if name.endswith("q_proj.weight"))
    with torch.no_grad():
        weight *= 2
    changed = model(requests(*TEXTS))
    assert len(calls) == 4
    assert (changed - expected).norm() > 1e-3
    model.prompter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.prompter.parameters(), lr=1e-2, fused=True)
    model(requests(*TEXTS))[:, 0].sum().backward()
    optimizer.step()
    model.prompter.requires_grad_(False)
    assert (model(requests(*TEXTS)) - changed).norm() > 1e-3
    assert len(calls) == 6


def test_a_frozen_prompting_llm_writes_each_prompt_by_itself(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of other wordings write what is new alone, and the neighbours change no bit."""
    model = make().eval()
    model.prompter.requires_grad_(False)
    calls = count_generations(model, monkeypatch)
    short, long = Instruction("Find it"), Instruction("Find a sentence that follows from this one, whatever it says")
    both = model(Requests(TEXTS[:2], [short, long], [0, 1]))
    assert len(calls) == 2
    again = model(Requests(TEXTS[:2], [Instruction("Another"), long], [0, 1]))
    assert len(calls) == 3
    assert torch.equal(both[1], again[1])


def test_instructions_of_training_are_written_side_by_side(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    """One generation writes them, equal to each by itself but for rounding; a step then writes none."""
    model = make()
    model.prompter.requires_grad_(False)
    expected = model(requests(*TEXTS))
    model = make()
    model.prompter.requires_grad_(False)
    calls = count_generations(model, monkeypatch)
    model.start([Instruction(FIND), Instruction("Another, and a longer one"), *requests(*TEXTS).instructions])
    torch.testing.assert_close(model(requests(*TEXTS)), expected, atol=ROUNDING, rtol=0)
    assert len(calls) == 1


@pytest.mark.parametrize(("conditioning", "dropout"), [("instruction_and_text", False), ("instruction", True)])
def test_prompts_that_depend_on_texts_or_dropout_are_not_kept(
    make: Maker, conditioning: str, dropout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(conditioning=conditioning).train()
    model.prompter.requires_grad_(False)
    if dropout:
        monkeypatch.setattr(PromptingLLM, "has_dropout", True)
    calls = count_generations(model, monkeypatch)
    for _ in range(2):
        model(requests(*TEXTS))
    assert len(calls) == 2


def test_a_backbone_of_another_type_empties_the_bank(make: Maker) -> None:
    model = make()
    instruction = [Instruction(FIND)]
    assert model.prompt_bank(instruction).dtype == torch.float32
    model.backbone.to(torch.bfloat16)
    assert model.prompt_bank(instruction).dtype == torch.bfloat16


def test_no_bank_where_prompts_depend_on_texts(make: Maker) -> None:
    with pytest.raises(ValueError, match="a prompt bank needs 'instruction', got 'instruction_and_text'"):
        make(conditioning="instruction_and_text").prompt_bank([Instruction(FIND)])


# Training.


TRAINED: dict[str, dict[str, Any]] = {
    **SHAPES,
    "reader": {"reader": "activated_lora", "reader_lora": LoraSettings(rank=2)},
    "skip": {"skip": "weighted"},
    "lora": {"prompter": {"trainable": "lora", "lora": LoraSettings(rank=4)}},
    "vocabulary": {"alignment": {"kind": "vocabulary"}},
}


@pytest.mark.parametrize("shape", TRAINED)
def test_ten_steps_learn_a_toy_batch(make: Maker, shape: str) -> None:
    model = make(**TRAINED[shape]).train()
    parts = model.trainable_parameters()
    more = {"reader": {"reader"}, "skip": {"skip"}}
    assert set(parts) == {"prompter"} | ({"alignment"} if shape != "vocabulary" else set()) | more.get(shape, set())
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    queries = requests("the cat", "a river", "old man", "end of day")
    documents = Requests(["cats sat", "the other bank", "he walks", "night"], [Instruction(SAME, "document")], [0] * 4)
    optimizer = torch.optim.AdamW([p for group in parts.values() for p in group], lr=3e-3)
    losses = []
    for step in range(10):
        loss = torch.nn.functional.cross_entropy(model(queries) @ model(documents).T / 0.1, torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in model.named_parameters():
                assert (parameter.grad is not None) == parameter.requires_grad, name
            for part, group in parts.items():
                assert all(p.grad.abs().sum() > 0 for p in group if p.grad is not None), part
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(frozen[name], p) for name, p in model.named_parameters() if name in frozen)


def test_foreign_state_is_refused(make: Maker) -> None:
    model = make()
    state = model.trainable_state()
    name, _ = state.popitem()
    with pytest.raises(ValueError, match="not on both sides") as caught:
        model.load_trainable_state(state)
    assert name in str(caught.value)


# Saving and loading.


SAVED: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"prompter": {"trainable": "lora", "lora": LoraSettings(rank=2, dropout=0.1)}},
    "vocabulary": {"alignment": {"kind": "vocabulary"}},
    "reader": {"reader": "activated_lora", "reader_lora": LoraSettings(rank=2, alpha=8)},
    "skip": {"skip": "weighted"},
    "prefix": PREFIX | {"templates": TemplatesConfig(query=SideTemplates(prefix="Task: {instruction} >"))},
}


def perturb(model: PromptEmbedder) -> PromptEmbedder:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01).add_(1e-3)
    return model


@pytest.mark.parametrize("kind", SAVED)
def test_save_and_load_round_trip_is_bitwise(make: Maker, tmp_path: Path, kind: str) -> None:
    model = perturb(make(**SAVED[kind]))
    model.save_pretrained(tmp_path / "saved", card="# Mine\n")
    again = PromptEmbedder.from_pretrained(tmp_path / "saved")
    assert again.config == model.config
    assert not again.training
    assert same_bits(again.trainable_state(), model.trainable_state())
    assert again.alignment.report == model.alignment.report
    np.testing.assert_array_equal(again.encode(TEXTS, instruction=FIND), model.encode(TEXTS, instruction=FIND))

    files = {str(file.relative_to(tmp_path / "saved")) for file in (tmp_path / "saved").rglob("*") if file.is_file()}
    weights = {"full": "prompter/model.safetensors", "lora": "prompter/adapter_model.safetensors"}
    expected = {weights.get(kind, weights["full"])}
    expected |= {"alignment.safetensors"} if kind != "vocabulary" else set()
    expected |= {"reader/adapter_model.safetensors"} if kind == "reader" else set()
    expected |= {"skip.safetensors"} if kind == "skip" else set()
    assert {file for file in files if file.endswith(".safetensors")} == expected
    assert not [file for file in files if file.endswith((".bin", ".pt", ".pth", ".pkl", ".py"))]
    assert (tmp_path / "saved" / "README.md").read_text() == "# Mine\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "saved"]
    again.save_pretrained(tmp_path / "second")
    assert same_bits(PromptEmbedder.from_pretrained(tmp_path / "second").trainable_state(), model.trainable_state())


def test_saving_over_an_older_one_replaces_it(make: Maker, tmp_path: Path) -> None:
    model = make(reader="activated_lora", reader_lora=LoraSettings(rank=2))
    model.save_pretrained(tmp_path / "saved")
    newer = perturb(make())
    newer.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "reader").exists()
    assert same_bits(PromptEmbedder.from_pretrained(tmp_path / "saved").trainable_state(), newer.trainable_state())


@pytest.fixture
def moving(models: Path, tmp_path: Path) -> Path:
    """A copy of the backbone that a test may move away or change."""
    return Path(shutil.copytree(models / "backbone", tmp_path / "home" / "backbone"))


@pytest.mark.parametrize("kind", ["full", "reader"])
def test_included_backbone_survives_the_originals_absence(make: Maker, moving: Path, tmp_path: Path, kind: str) -> None:
    model = make(backbone=moving, **SAVED[kind])
    model.save_pretrained(tmp_path / "saved", include_backbone=True)
    moving.rename(tmp_path / "gone")
    again = PromptEmbedder.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.encode(TEXTS, instruction=FIND), model.encode(TEXTS, instruction=FIND))
    again.save_pretrained(tmp_path / "saved")  # its backbone lives in the folder that is replaced
    third = PromptEmbedder.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(third.encode(TEXTS, instruction=FIND), model.encode(TEXTS, instruction=FIND))


def test_a_moved_backbone_is_named_or_missed(make: Maker, moving: Path, tmp_path: Path) -> None:
    model = make(backbone=moving)
    model.save_pretrained(tmp_path / "saved")
    moving.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="no model there; tried the folder"):
        PromptEmbedder.from_pretrained(tmp_path / "saved")
    again = PromptEmbedder.from_pretrained(tmp_path / "saved", backbone=str(tmp_path / "elsewhere"))
    np.testing.assert_array_equal(again.encode(["a"], instruction=FIND), model.encode(["a"], instruction=FIND))


def test_a_saved_embedder_loads_in_another_type(make: Maker, tmp_path: Path) -> None:
    """One trained in bfloat16 runs in float32 on a processor that has no instructions for it."""
    model = make(dtype="bfloat16", **SAVED["reader"])
    model.save_pretrained(tmp_path / "saved")
    again = PromptEmbedder.from_pretrained(tmp_path / "saved", dtype="float32")
    assert (model.backbone.dtype, again.backbone.dtype) == (torch.bfloat16, torch.float32)
    exact, rounded = (part.encode(TEXTS, instruction=FIND) for part in (again, model))
    assert 0 < np.abs(exact - rounded).max() < 0.05
    again.save_pretrained(tmp_path / "wide")
    assert PromptEmbedder.from_pretrained(tmp_path / "wide").backbone.dtype == torch.float32
    with pytest.raises(ValueError, match=r"backbone\.dtype: expected one of auto, fastest, float32, .*, got 'int8'"):
        PromptEmbedder.from_pretrained(tmp_path / "saved", dtype="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("included", [False, True])
def test_another_backbone_is_refused(make: Maker, models: Path, tmp_path: Path, included: bool) -> None:
    make().save_pretrained(tmp_path / "saved", include_backbone=included)
    with pytest.raises(ValueError, match=r"trained on backbone .* with content .*pe\.transfer"):
        PromptEmbedder.from_pretrained(tmp_path / "saved", backbone=str(models / "other"))


def test_a_changed_backbone_is_refused(make: Maker, models: Path, moving: Path, tmp_path: Path) -> None:
    make(backbone=moving).save_pretrained(tmp_path / "saved")
    shutil.copy(models / "other" / "model.safetensors", moving / "model.safetensors")
    with pytest.raises(ValueError, match="has content"):
        PromptEmbedder.from_pretrained(tmp_path / "saved")


def test_a_changed_base_of_an_adapter_is_refused(make: Maker, models: Path, tmp_path: Path) -> None:
    base = shutil.copytree(models / "prompter", tmp_path / "base")
    make(prompter={"model": str(base), "trainable": "lora"}).save_pretrained(tmp_path / "saved")
    PromptEmbedder.from_pretrained(tmp_path / "saved")
    language_model("llama", hidden_size=24, head_dim=6, seed=9).save_pretrained(base)
    with pytest.raises(ValueError, match=r"an adapter of .*base with content \w+, but .*base has content"):
        PromptEmbedder.from_pretrained(tmp_path / "saved")


def test_texts_longer_than_the_positions_are_refused_at_once(models: Path, tmp_path: Path) -> None:
    decoder("gpt2").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    fits = ModelConfig(
        prompter=PrompterConfig(model=str(models / "prompter"), soft_tokens=3),
        backbone=BackboneConfig(model=str(tmp_path)),
        max_length=125,
    )
    PromptEmbedder.from_config(fits)
    with pytest.raises(ValueError, match=r"take 129 tokens, .* first 128 only .*max_length"):
        PromptEmbedder.from_config(dataclasses.replace(fits, max_length=126))


def test_instructions_are_read_whole_and_texts_up_to_the_limit(make: Maker) -> None:
    model = make(max_length=6, conditioning="instruction_and_text")
    head = model.prompter_text(Instruction(FIND))
    whole = model.prompter_text(Instruction(FIND), "the cat sat on the mat")
    alone, cut = model.prompter_ids([(head, head), (head, whole)])
    assert alone == model.prompter.text_tokenizer([head])[0]
    assert cut == model.prompter.text_tokenizer([whole])[0][: len(alone) + 6]
    assert len(alone) > 6


@pytest.mark.parametrize("content", ["notes.txt", "config.json"])
def test_a_foreign_folder_is_not_overwritten(make: Maker, tmp_path: Path, content: str) -> None:
    """A `config.json` alone does not make a folder ours: every checkpoint of transformers has one."""
    (tmp_path / content).write_text('{"model_type": "llama"}')
    with pytest.raises(FileExistsError, match="not empty and not a saved PromptEmbedder"):
        make().save_pretrained(tmp_path)
    assert (tmp_path / content).read_text() == '{"model_type": "llama"}'


def test_a_file_is_not_overwritten(make: Maker, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        make().save_pretrained(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "mine"


def test_an_empty_folder_may_be_used(make: Maker, tmp_path: Path) -> None:
    """And stays where it is: it may be a mount point, or stand where nothing else may be written."""
    folder = tmp_path / "x"
    folder.mkdir()
    inode = folder.stat().st_ino
    make(reader="activated_lora").save_pretrained(folder)
    assert folder.stat().st_ino == inode
    make(reader="activated_lora").save_pretrained(tmp_path / "y")
    names = [
        sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*")) for saved in (folder, tmp_path / "y")
    ]
    assert names[0] == names[1]
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y"}


def test_saved_files_are_open_to_others(make: Maker, tmp_path: Path) -> None:
    make(reader="activated_lora", skip="weighted").save_pretrained(tmp_path / "x")
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "x").rglob("*") if path.is_file()}
    assert modes == {(tmp_path / "plain").stat().st_mode}


def test_a_backbone_that_is_no_folder_here_is_not_included(
    make: Maker, moving: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative name means nothing after the working directory has changed."""
    model = make()
    model.backbone.name = "models/backbone"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    model.save_pretrained(".")
    assert not (tmp_path / "here" / "backbone").exists()


@pytest.fixture
def by_two_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system on which two folders cannot change places at once."""
    monkeypatch.setattr(saving, "exchange", lambda *_: False)


@pytest.mark.usefixtures("by_two_moves")
@pytest.mark.parametrize("where", ["weights", "last rename"])
def test_an_interrupted_save_leaves_the_old_one(
    make: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, where: str
) -> None:
    old = make()
    old.save_pretrained(tmp_path / "saved")
    rename = Path.rename

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if where == "weights":
            patch.setattr(saving, "save_file", fail)
        else:
            patch.setattr(Path, "rename", lambda p, to: fail() if p.name == "new" else rename(p, to))
        with pytest.raises(OSError, match="disk full"):
            perturb(make()).save_pretrained(tmp_path / "saved")
    assert same_bits(PromptEmbedder.from_pretrained(tmp_path / "saved").trainable_state(), old.trainable_state())
    newer = perturb(make())
    newer.save_pretrained(tmp_path / "saved")
    assert same_bits(PromptEmbedder.from_pretrained(tmp_path / "saved").trainable_state(), newer.trainable_state())
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


@pytest.mark.usefixtures("by_two_moves")
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_save_that_is_stopped_leaves_the_old_one(
    make: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stop: type[BaseException]
) -> None:
    old, rename = make(), Path.rename
    old.save_pretrained(tmp_path / "saved")

    def stopped(path: Path, to: Path) -> Path:
        if path.name == "new":
            raise stop
        return rename(path, to)

    newer = perturb(make())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stopped)
        with pytest.raises(stop):
            newer.save_pretrained(tmp_path / "saved")
    assert same_bits(PromptEmbedder.from_pretrained(tmp_path / "saved").trainable_state(), old.trainable_state())
    assert [file.name for file in tmp_path.iterdir()] == ["saved"]


@pytest.mark.usefixtures("by_two_moves")
def test_a_former_model_that_cannot_be_put_back_is_kept(
    make: Maker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old, rename = make(), Path.rename
    old.save_pretrained(tmp_path / "saved")

    def only_away(path: Path, to: Path) -> Path:
        if to == tmp_path / "saved":
            raise OSError("read-only")
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", only_away)
        with pytest.raises(OSError, match="read-only"):
            old.save_pretrained(tmp_path / "saved")
    (kept,) = tmp_path.glob("saved.saving-*/former")
    assert same_bits(PromptEmbedder.from_pretrained(kept).trainable_state(), old.trainable_state())


def test_saving_touches_no_sibling(make: Maker, tmp_path: Path) -> None:
    for name in ("m.part", "m.former"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    for _ in range(2):
        make().save_pretrained(tmp_path / "m")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m", "m.former", "m.part"]
    assert all((tmp_path / name / "mine.txt").exists() for name in ("m.part", "m.former"))
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "m").stat().st_mode == (tmp_path / "plain").stat().st_mode


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache, offline, that holds the backbone as `owner/backbone`; returns its snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = tmp_path / "cache" / "models--owner--backbone"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(models / "backbone", cached / "snapshots" / COMMIT))


def test_an_embedder_of_the_hub(make: Maker, hub: Path, tmp_path: Path) -> None:
    model = make()
    cached = hub.parents[2] / "models--owner--embedder"
    model.save_pretrained(cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    expected = model.encode(TEXTS, instruction=FIND)
    for revision in (None, COMMIT):
        loaded = PromptEmbedder.from_pretrained("owner/embedder", revision=revision)
        assert np.allclose(loaded.encode(TEXTS, instruction=FIND), expected, atol=1e-6)
    assert loaded.name == "embedder"
    with pytest.raises(
        FileNotFoundError, match=r"owner/absent: no saved PromptEmbedder there; tried the folder .* hub"
    ):
        PromptEmbedder.from_pretrained("owner/absent")


def as_saved_before(folder: Path, **changes: str | None) -> None:
    """Take from a saved embedder what earlier versions did not write."""
    file = folder / "config.json"
    saved = json.loads(file.read_text())
    for section in ("backbone", "prompter"):
        saved[section].pop("commit", None)
    saved["backbone"] |= changes
    file.write_text(json.dumps(saved))


def test_a_backbone_of_the_hub_and_its_copy_are_the_same(make: Maker, models: Path, hub: Path, tmp_path: Path) -> None:
    make(backbone="owner/backbone").save_pretrained(tmp_path / "of-hub")
    make().save_pretrained(tmp_path / "of-folder")
    saved = json.loads((tmp_path / "of-hub" / "config.json").read_text())["backbone"]
    assert saved["commit"] == COMMIT
    (hub.parent.parent / "refs" / "main").write_text("f" * 40)  # the branch moves on; the commit stays
    PromptEmbedder.from_pretrained(tmp_path / "of-hub")
    PromptEmbedder.from_pretrained(tmp_path / "of-hub", backbone=str(models / "backbone"))
    (hub.parent.parent / "refs" / "main").write_text(COMMIT)
    PromptEmbedder.from_pretrained(tmp_path / "of-folder", backbone="owner/backbone")
    with pytest.raises(ValueError, match="has content"):
        PromptEmbedder.from_pretrained(tmp_path / "of-hub", backbone=str(models / "other"))
    shutil.copy(models / "other" / "model.safetensors", hub / "model.safetensors")
    with pytest.raises(ValueError, match="has content"):
        PromptEmbedder.from_pretrained(tmp_path / "of-folder", backbone="owner/backbone")


def test_embedders_saved_before_load(make: Maker, models: Path, hub: Path, moving: Path, tmp_path: Path) -> None:
    make(backbone="owner/backbone").save_pretrained(tmp_path / "of-hub")
    as_saved_before(tmp_path / "of-hub", revision=COMMIT)
    PromptEmbedder.from_pretrained(tmp_path / "of-hub")
    as_saved_before(tmp_path / "of-hub", revision=None)
    PromptEmbedder.from_pretrained(tmp_path / "of-hub")
    with pytest.raises(ValueError, match="load it by the hub's name and save it again"):
        PromptEmbedder.from_pretrained(tmp_path / "of-hub", backbone=str(models / "backbone"))

    shutil.copy(models / "other" / "model.safetensors", moving / "consolidated.safetensors")  # no loader reads it
    make(backbone=moving).save_pretrained(tmp_path / "of-folder")
    PromptEmbedder.from_pretrained(tmp_path / "of-folder", backbone=str(models / "backbone"))
    legacy = [moving / "config.json", *moving.glob("*.safetensors")]
    as_saved_before(tmp_path / "of-folder", revision=loading.fingerprint(legacy))
    PromptEmbedder.from_pretrained(tmp_path / "of-folder")


def test_shards_make_the_same_fingerprint_wherever_they_are(models: Path, tmp_path: Path) -> None:
    decoder("qwen3").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    files = loading.checkpoint_files(str(tmp_path / "sharded"), None)
    assert len(files) > 2
    assert {file.name for file in files} == {
        "config.json",
        *(f.name for f in (tmp_path / "sharded").glob("*.safetensors")),
    }
    files[-1].unlink()
    assert loading.checkpoint_files(str(tmp_path / "sharded"), None) == []


def test_no_embedder_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no saved PromptEmbedder there \(no config\.json\)"):
        PromptEmbedder.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [{"model_type": "llama"}, {"format": 99, "backbone": {}}, ["format"]])
def test_another_format_is_refused(tmp_path: Path, content: object) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config\.json: expected a PromptEmbedder of format 1, got"):
        PromptEmbedder.from_pretrained(tmp_path)


def test_pickled_weights_are_not_loaded(make: Maker, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "prompter" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "saved" / "prompter" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        PromptEmbedder.from_pretrained(tmp_path / "saved")


def test_revision_follows_what_trains(make: Maker) -> None:
    first, second = make(), make()
    assert first.revision == second.revision
    assert perturb(second).revision != first.revision
    assert make(max_length=99).revision != first.revision


def test_vocabulary_prompts_move_between_backbones_without_weights(make: Maker) -> None:
    model = make(alignment={"kind": "vocabulary"})
    assert not isinstance(model.alignment, LinearAlignment)
    assert "alignment" not in model.trainable_parameters()

"""The baselines compute what the stock model computes, and train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe.baselines.common import BARE, Templates
from pe.baselines.frozen import FrozenEncoder
from pe.baselines.linear import LinearEmbedder
from pe.baselines.lora import Form, LoraBaselineConfig, LoraEmbedder
from pe.baselines.static import StaticPromptEmbedder, StaticPrompts
from pe.config import BackboneConfig, LoraSettings, ModelConfig
from pe.kernels.info_nce import info_nce
from pe.model import Instruction, Requests
from tests.embedders import INSTRUCTIONS, backbone, gradients, lora, relative_error, static
from tests.tiny import byte_tokenizer

TEXTS = [
    "the cat sat",
    "a",
    "an old man walks along the bank",
    "the end of a day",
    "one more and a longer text than all",
]
REQUESTS = Requests(TEXTS, INSTRUCTIONS, [0, 1, 0, 1, 0])
FORMS: tuple[Form, ...] = ("padded", "checkpointed", "packed")


def stock_embedding(model: LoraEmbedder | FrozenEncoder, ids: list[int], start: int, pooling: str) -> Tensor:
    """One sequence through the stock forward."""
    decoder_model = model.backbone.model
    decoder_model.set_attn_implementation("eager")
    states = decoder_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return F.normalize(states[-1] if pooling == "last" else states[start:].mean(0), dim=0)


def expected_ids(place: int) -> tuple[list[int], int]:
    """Instruction and text as a query's template puts them, and where the text begins."""
    tokenizer = byte_tokenizer()
    head = "Instruct: find the answer\nQuery:" if REQUESTS.index[place] == 0 else ""
    ids = tokenizer(head)["input_ids"] if head else []
    return ids + tokenizer(TEXTS[place])["input_ids"], len(ids)


def gradient(model: nn.Module, embeddings: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in gradients(model, embeddings).values()])


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert expected.norm() > 1e-4
    assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gpt2", "mistral_window"])
def test_every_form_of_lora_is_the_stock_forward(architecture: str, pooling: str) -> None:
    oracle = lora("padded", architecture, pooling=pooling).eval()
    expected = torch.stack([stock_embedding(oracle, *expected_ids(i), pooling) for i in range(len(TEXTS))])
    wanted = gradient(oracle, expected)
    for form in FORMS:
        model = lora(form, architecture, pooling=pooling).eval()
        got = model(REQUESTS)
        assert_close(got, expected)
        assert_close(gradient(model, got), wanted)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_upper_layers_alone_train_and_the_rest_keeps_nothing(architecture: str) -> None:
    upper, every = (lora("packed", architecture, upper_layers=count) for count in (1, 2))
    adapted = {name for name, p in upper.named_parameters() if p.requires_grad}
    assert adapted == {name for name, p in every.named_parameters() if p.requires_grad and ".1." in name}
    assert 0 < len(adapted) < sum(p.requires_grad for p in every.parameters())
    oracle = lora("padded", architecture, upper_layers=1).eval()
    expected = torch.stack([stock_embedding(oracle, *expected_ids(i), "mean") for i in range(len(TEXTS))])
    got = upper.eval()(REQUESTS)
    assert_close(got, expected)
    assert_close(gradient(upper, got), gradient(oracle, expected))
    (kept, _), (kept_by_all, _) = saved_bytes(upper), saved_bytes(every)
    assert kept < 0.7 * kept_by_all


@pytest.mark.parametrize("count", [0, 3])
def test_upper_layers_are_some_of_the_layers(count: int) -> None:
    with pytest.raises(ValueError, match=f"upper_layers: expected 1 to 2, .*, got {count}"):
        lora("packed", upper_layers=count)


def test_a_weighted_mean_is_attention_of_one_query() -> None:
    """Over the stock forward's final states, whose norm, divided by its weight, gives the standardised states."""
    model = lora("packed", pooling="weighted").eval()
    assert model.token_weights is not None
    assert model.backbone.final_norm is not None
    gain = model.backbone.final_norm.options.weight
    assert gain is not None
    decoder_model = model.backbone.model
    decoder_model.set_attn_implementation("eager")
    rows = []
    for place in range(len(TEXTS)):
        ids, start = expected_ids(place)
        states = decoder_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, start:]
        rows.append(torch.softmax(states / gain @ model.token_weights.query, dim=0) @ states)
    expected = F.normalize(torch.stack(rows), dim=-1)
    wanted = gradient(model, expected)
    got = model(REQUESTS)
    assert_close(got, expected)
    assert_close(gradient(model, got), wanted)
    with pytest.raises(ValueError, match="'weighted' needs form 'packed', got 'padded'"):
        LoraBaselineConfig(pooling="weighted")


def test_tokens_weigh_the_same_at_the_start() -> None:
    settings = LoraSettings(rank=2, alpha=4)
    fresh = LoraEmbedder(LoraBaselineConfig(lora=settings, form="packed", pooling="weighted"), backbone())
    mean = LoraEmbedder(LoraBaselineConfig(lora=settings, form="packed"), backbone())
    torch.testing.assert_close(fresh.eval()(REQUESTS), mean.eval()(REQUESTS))


def saved_bytes(model: LoraEmbedder) -> tuple[int, Tensor]:
    """Bytes that a training forward keeps for backward, and its gradient."""
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embeddings = model.train()(REQUESTS)
    return kept, gradient(model, embeddings)


def test_checkpointing_keeps_less_and_changes_nothing() -> None:
    plain, plain_gradient = saved_bytes(lora("padded", dropout=0.5))
    less, same_gradient = saved_bytes(lora("checkpointed", dropout=0.5))
    assert less < plain / 3
    assert_close(same_gradient, plain_gradient)


def test_dropout_acts_in_training_alone() -> None:
    model = lora("packed", dropout=0.5)
    assert not torch.equal(model.train()(REQUESTS), model(REQUESTS))
    assert torch.equal(model.eval()(REQUESTS), model(REQUESTS))


@pytest.mark.parametrize("form", FORMS)
def test_encode_is_the_forward(form: Form) -> None:
    model = lora(form)
    for item in INSTRUCTIONS:
        got = model.encode(TEXTS, instruction=item.text, side=item.side, batch_tokens=40)
        expected = model.eval()(Requests(TEXTS, [item], [0] * len(TEXTS)))
        model.train()
        np.testing.assert_allclose(got, expected.numpy(force=True), atol=1e-6)
    assert model.training


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_frozen_is_stock_pooling(pooling: Any) -> None:
    encoder = FrozenEncoder(backbone("llama", bos=True), pooling=pooling)
    got = encoder.encode(TEXTS, instruction="not read", batch_tokens=16)
    ids = byte_tokenizer(bos=True)(TEXTS)["input_ids"]
    expected = torch.stack([stock_embedding(encoder, row, 0, pooling) for row in ids])
    assert_close(torch.from_numpy(got), expected)
    np.testing.assert_allclose(encoder(REQUESTS), got, atol=1e-6)


def test_frozen_with_instruction_pools_the_text_alone() -> None:
    encoder = FrozenEncoder(backbone(), templates=Templates())
    got = encoder.encode(TEXTS, instruction="find the answer")
    expected = torch.stack([stock_embedding(encoder, *expected_ids(i), "mean") for i in (0, 2, 4)])
    assert_close(torch.from_numpy(got)[[0, 2, 4]], expected)
    assert encoder.revision != FrozenEncoder(encoder.backbone).revision


def test_frozen_ignores_a_reader() -> None:
    frozen = backbone()
    before = FrozenEncoder(frozen).encode(TEXTS, instruction="find the answer")
    frozen.add_reader(LoraSettings(rank=2))
    with torch.no_grad():
        for parameter in frozen.reader_parameters():
            parameter.fill_(0.1)
    np.testing.assert_array_equal(FrozenEncoder(frozen).encode(TEXTS, instruction="find the answer"), before)


def test_the_text_alone_is_truncated() -> None:
    model = lora("packed", max_length=3)
    ids = model.tokenize(REQUESTS)
    head = expected_ids(0)[1]
    assert [len(row) for row in ids] == [head + 3, 1, head + 3, 3, head + 3]
    assert str(model.truncation) == "4 of 5 texts truncated"


def test_templates_end_with_the_text() -> None:
    with pytest.raises(ValueError, match=r"templates\.query: expected a template that ends with \{text\}"):
        Templates(query="{text} {instruction}")
    assert Templates(query=BARE).query == BARE


def test_static_prompt_of_an_unseen_instruction_is_the_mean() -> None:
    model = static().eval()
    bank = model.prompt_bank([*INSTRUCTIONS, Instruction("never seen")])
    assert bank.shape == (3, 3, 32)
    torch.testing.assert_close(bank[2], bank[:2].mean(0))
    got = model.encode(TEXTS, instruction="never seen")
    assert got.shape == (5, 32)
    assert not np.allclose(got, model.encode(TEXTS, instruction="find the answer"))


def test_static_prompt_starts_from_tokens() -> None:
    model = static("instruction")
    ids = byte_tokenizer()("find the answer")["input_ids"][:3]
    torch.testing.assert_close(model.static.prompts[0].data, model.backbone.embedding[ids])
    assert static().revision == static().revision != model.revision
    once = StaticPromptEmbedder.fresh(model.config, backbone(), iter(INSTRUCTIONS), start="instruction")
    assert once.revision == model.revision


def test_static_prompt_refuses_what_it_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs 'suffix' and 'instruction', got 'prefix'"):
        static(layout="prefix", pooling="mean_text")
    with pytest.raises(ValueError, match="expected at least one, got none"):
        StaticPromptEmbedder.fresh(ModelConfig(), backbone(), [])
    with pytest.raises(ValueError, match="include_backbone"):
        static().save_pretrained(tmp_path, include_backbone=True)


def trained(model: Any) -> list[float]:
    """Losses of some steps over the toy texts, each its own positive's neighbour."""
    parameters = [p for group in model.trainable_parameters().values() for p in group]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    requests = Requests([*TEXTS, *TEXTS[::-1]], INSTRUCTIONS, [0] * 5 + [1] * 5)
    losses = []
    for _ in range(8):
        embeddings = model.train()(requests)
        loss = info_nce(embeddings[:5], embeddings[5:], torch.arange(5), temperature=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


MODELS = {
    **{form: lambda form=form: lora(form) for form in FORMS},
    "static": static,
    "static with reader": lambda: static(reader="activated_lora", reader_lora=LoraSettings(rank=2)),
    "static with skip": lambda: static(skip="weighted"),
    "linear": lambda: LinearEmbedder(backbone()),
}


@pytest.mark.parametrize("kind", MODELS)
def test_trains_what_it_says_and_nothing_else(kind: str, tmp_path: Path) -> None:
    model: Any = MODELS[kind]()
    named = dict(model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    listed = {id(p) for group in model.trainable_parameters().values() for p in group}
    assert listed == {id(p) for p in named.values() if p.requires_grad}
    losses = trained(model)
    assert losses[-1] < losses[0] - 0.01
    changed = {name for name, parameter in named.items() if not torch.equal(parameter, before[name])}
    assert changed == set(model.trainable_state())

    other: Any = MODELS[kind]()
    other.load_trainable_state(model.trainable_state())
    assert other.revision == model.revision
    torch.testing.assert_close(other.eval()(REQUESTS), model.eval()(REQUESTS))
    with pytest.raises(ValueError, match="not on both sides"):
        other.load_trainable_state({})
    model.save_pretrained(tmp_path / "saved", card="card")
    assert (tmp_path / "saved" / "README.md").read_text() == "card"
    assert list((tmp_path / "saved").glob("*.safetensors"))


def test_an_unknown_instruction_takes_the_prompt_spelled_most_like_it() -> None:
    prompts = StaticPrompts(["find a contradiction", "find what follows"], [torch.zeros(2, 3), torch.ones(2, 3)])
    unseen = ["Find contradicting texts", "what would follow?"]
    assert prompts(unseen).unique().tolist() == [0.5]
    prompts.unknown = "nearest"
    assert prompts(unseen)[:, 0, 0].tolist() == [0, 1]
    assert prompts(["find what follows"]).unique().tolist() == [1]


def test_how_an_unknown_instruction_is_met_can_change(tiny_models: Path) -> None:
    config = ModelConfig(backbone=BackboneConfig(model=str(tiny_models / "one")), max_length=32)
    known = [Instruction("find a contradiction"), Instruction("find what follows")]
    model = StaticPromptEmbedder.from_config(config, instructions=known).eval()
    asked = {"instruction": "find contradictions"}
    by_mean = model.encode(["a text"], **asked)
    model.meet_unknown("nearest")
    assert (model.encode(["a text"], **asked) == model.encode(["a text"], instruction=known[0].text)).all()
    model.meet_unknown("mean")
    assert (model.encode(["a text"], **asked) == by_mean).all()

"""The way around the soft prompt against its oracle: the stock model's own hidden states of each text alone."""

from __future__ import annotations

from typing import cast

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh

from pe.baselines.linear import LinearEmbedder
from pe.method import backbone as backbone_module
from pe.method.backbone import Backbone
from pe.method.probes import UnsupportedBackbone
from pe.method.skip import with_skip
from pe.method.token_weights import standardize
from pe.model import Instruction, PromptEmbedder, Requests
from tests import oracle
from tests.embedders import REQUESTS, TEXTS, assert_equal, build, relative_error
from tests.tiny import ARCHITECTURES, byte_tokenizer, decoder


def embedder(architecture: str = "qwen3", **options: object) -> PromptEmbedder:
    """An embedder whose skip is not what it was at the start."""
    model = build(architecture, skip="weighted", **options)
    assert model.skip is not None
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.skip.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_stock_states(architecture: str) -> None:
    assert_equal(embedder(architecture))


def test_other_poolings_readings_and_tokenizers() -> None:
    assert_equal(embedder(pooling="last"))
    assert_equal(embedder(conditioning="instruction_and_text"))
    assert_equal(embedder("llama", bos=True))


def test_it_changes_the_embedding_and_starts_as_the_plain_mean() -> None:
    assert relative_error(embedder()(REQUESTS), build("qwen3")(REQUESTS)) > 0.1
    fresh = build("qwen3", skip="weighted")
    assert fresh.skip is not None
    assert torch.equal(fresh.skip.weight, torch.eye(32))
    means = torch.stack([oracle.text_states(fresh, REQUESTS, place).mean(0) for place in range(len(TEXTS))])
    expected = with_skip(build("qwen3")(REQUESTS), torch.nn.functional.normalize(means, dim=-1))
    torch.testing.assert_close(fresh(REQUESTS), expected, atol=1e-5, rtol=1e-4)


def test_encoding_under_several_instructions_adds_it_to_each() -> None:
    model = embedder()
    wanted = [item.text for item in REQUESTS.instructions]
    encoded = model.encode_many(TEXTS, instructions=wanted, side="document")
    for text, row in zip(wanted, encoded, strict=True):
        requests = Requests(TEXTS, [Instruction(text, "document")], [0] * len(TEXTS))
        np.testing.assert_allclose(row, oracle.embed(model, requests).numpy(force=True), atol=1e-5)


def test_the_text_pass_in_parts_pools_the_same_states(monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder()
    assert model.skip is not None
    ids = sorted(model.tokenize(REQUESTS), key=len)
    whole = model.backbone.read(ids, model.skip.pool)
    monkeypatch.setattr(backbone_module, "CPU_TOKENS", 4)
    parts = model.backbone.read(ids, model.skip.pool)
    assert whole.pooled is not None
    assert parts.pooled is not None
    assert whole.pooled.requires_grad
    assert parts.pooled.requires_grad
    torch.testing.assert_close(parts.pooled, whole.pooled)
    torch.testing.assert_close(whole.pooled.norm(dim=-1), torch.ones(len(ids)))
    assert not any(x.requires_grad for pair in whole.layers for x in pair)
    assert model.backbone.read(ids).pooled is None


def test_states_keep_their_type_under_autocast() -> None:
    """A GPU's autocast takes norms to float32, and the states of a batch's texts are kept for the backward pass."""
    with FakeTensorMode():
        states = torch.empty(4, 8, dtype=torch.bfloat16, device="cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        assert standardize(states).dtype == torch.bfloat16
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_weights_of_tokens_stay_finite() -> None:
    model = embedder()
    assert model.skip is not None
    with torch.no_grad():
        model.skip.tokens.query *= 1e6
    model(REQUESTS).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.skip.parameters())


def test_a_backbone_whose_states_differ_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder()
    monkeypatch.setattr(backbone_module, "stacked_layers", lambda model: model.layers[:1])
    other = Backbone(decoder("qwen3"), byte_tokenizer(), "other")
    with pytest.raises(UnsupportedBackbone, match=r"other \(qwen3\): its states before the last layer cannot be read"):
        PromptEmbedder(model.config, model.prompter, model.alignment, other)


def test_states_near_zero_are_read_too() -> None:
    model = decoder("qwen3")
    with torch.no_grad():
        model.embed_tokens.weight *= 1e-2
        for layer in model.layers:
            for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                linear.weight *= 1e-2
    Backbone(model, byte_tokenizer(), "small").check_states()


def test_only_a_skip_and_parts_need_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_module, "stacked_layers", lambda model: None)
    assert build("qwen3")(REQUESTS).shape == (len(TEXTS), 32)
    with pytest.raises(UnsupportedBackbone, match=r"cannot be read \(ValueError: no list of 2 layers\)"):
        build("qwen3", skip="weighted")
    with pytest.raises(UnsupportedBackbone, match=r"x: it cannot be sharded \(ValueError: no list of 2 layers\)"):
        Backbone(decoder("qwen3"), byte_tokenizer(), "x", mesh=cast(DeviceMesh, object()))


def test_layers_are_found_in_one_list() -> None:
    model = decoder("qwen3")
    assert backbone_module.stacked_layers(model) is model.layers
    model.config.num_hidden_layers = 3
    assert backbone_module.stacked_layers(model) is None


def test_the_control_is_the_way_around_alone_with_a_plain_mean() -> None:
    model = embedder()
    control = LinearEmbedder(model.backbone, max_length=100)
    assert model.skip is not None
    control.load_trainable_state({"weight": model.skip.weight.detach()})
    means = torch.stack([oracle.text_states(model, REQUESTS, place).mean(0) for place in range(len(TEXTS))])
    expected = torch.nn.functional.normalize(means @ model.skip.weight, dim=-1)
    torch.testing.assert_close(control(REQUESTS), expected, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(
        control.encode(TEXTS, instruction="none is read"), expected.numpy(force=True), atol=1e-5, rtol=1e-4
    )


def test_the_text_pass_is_started_before_the_prompts_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU it then hides the launches of the prompting LLM."""
    model, calls = embedder(), list[str]()
    read, write = model.backbone.read, model.prompter.forward
    monkeypatch.setattr(model.backbone, "read", lambda *a, **k: calls.append("read") or read(*a, **k))
    monkeypatch.setattr(model.prompter, "forward", lambda *a, **k: calls.append("write") or write(*a, **k))
    model(REQUESTS)
    assert calls == ["read", "write"]

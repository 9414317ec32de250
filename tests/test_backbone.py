"""The frozen decoder on packed rows: what the probe refuses, what a pass keeps, what it never runs."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModel, PreTrainedModel
from transformers.models.llama import modeling_llama

from pe.config import BackboneConfig, LoraSettings
from pe.method import attention, loading
from pe.method.attention import AttentionPlan
from pe.method.backbone import Backbone, position_limit
from pe.method.final_norm import find_final_norm
from pe.method.loading import rounded
from pe.method.packing import Segments, pack
from pe.method.probes import UnsupportedBackbone
from tests.embedders import backbone, relative_error
from tests.tiny import SIZES, VOCABULARY, byte_tokenizer, decoder, randomise

WINDOWED = SIZES | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
MLA = {name: size for name, size in SIZES.items() if name != "head_dim"} | {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
EXPERTS = SIZES | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SUPPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere2": ("cohere2", WINDOWED),
    "deepseek_v3": ("deepseek_v3", MLA),
    "exaone4": ("exaone4", WINDOWED),
    "glm4": ("glm4", SIZES),
    "opt": ("opt", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "phi": ("phi", SIZES),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "smollm3": ("smollm3", SIZES),
}
HYBRID = {
    "bamba": SIZES | {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "falcon_h1": SIZES,
    "jamba": SIZES,
    "mamba": SIZES,
    "qwen3_next": EXPERTS,
    "zamba2": SIZES | {"layer_types": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
}
BYPASSING = {
    "bloom": SIZES,
    "gptj": SIZES | {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "mpt": SIZES | {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "stablelm": SIZES,
    "lfm2": SIZES | {"layer_types": ["conv", "full_attention"]},
    "gemma4_text": SIZES | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY},
}


def build(kind: str, sizes: dict[str, Any], **changes: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **(sizes | changes))
    return randomise(AutoModel.from_config(config, dtype=torch.float32), 0)


def random_texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def soft_rows(model: Backbone, count: int, k: int) -> Tensor:
    rows = torch.randn(count, k, model.hidden_size, generator=torch.Generator().manual_seed(5))
    return rows * model.token_rows(torch.arange(50)).std()


def stock_states(model: Backbone, before: Tensor, after: Tensor) -> Tensor:
    """States of `after` in the stock forward of the two pieces joined."""
    model.model.set_attn_implementation(model.stock_attention)
    rows = torch.cat([before, after])
    return model.model(inputs_embeds=rows[None], use_cache=False).last_hidden_state[0, len(before) :]


def final_states(model: Backbone, hidden: Tensor) -> Tensor:
    """Each row behind the final norm, which `forward` leaves to pooling."""
    return model.pool(hidden, Segments((1,) * len(hidden), model.device), normalize=False)


@pytest.mark.parametrize("name", SUPPORTED)
def test_further_architectures_are_exact(name: str) -> None:
    model = Backbone(build(*SUPPORTED[name]), byte_tokenizer(), name)
    texts = random_texts(3, 11, 11, 17)
    soft = soft_rows(model, len(texts), 3).requires_grad_()
    weights = torch.randn(12, model.hidden_size)
    packed, _ = model(soft.flatten(0, 1).clone(), Segments((3,) * 4, model.device), context=model.read(texts))
    packed = final_states(model, packed)
    (ours,) = torch.autograd.grad((packed * weights).sum(), soft)
    embed = model.model.get_input_embeddings()
    stock = torch.cat([stock_states(model, embed(torch.tensor(t)), s) for t, s in zip(texts, soft, strict=True)])
    (theirs,) = torch.autograd.grad((stock * weights).sum(), soft)
    assert relative_error(packed, stock) < 1e-5
    assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("kind", HYBRID)
def test_recurrent_hybrids_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedBackbone, match=rf"{kind} \({kind}\): a recurrent or hybrid decoder"):
        Backbone(build(kind, HYBRID[kind]), byte_tokenizer(), kind)


@pytest.mark.parametrize("kind", BYPASSING)
def test_what_bypasses_the_interface_is_refused(kind: str) -> None:
    with pytest.raises(UnsupportedBackbone, match=rf"my/model \({kind}\): it does not run on rows of embeddings"):
        Backbone(build(kind, BYPASSING[kind]), byte_tokenizer(), "my/model")


def test_an_encoder_decoder_is_refused() -> None:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4}  # fmt: skip
    with pytest.raises(UnsupportedBackbone, match=r"\(bart\): an encoder-decoder"):
        Backbone(build("bart", sizes), byte_tokenizer(), "b")


def test_an_encoder_is_refused() -> None:
    with pytest.raises(UnsupportedBackbone, match=r"\(bert\): the packed pass differs from the stock forward by"):
        Backbone(build("bert", SIZES), byte_tokenizer(), "b")


def test_a_window_longer_than_the_probe_is_not_overlooked() -> None:
    """phimoe masks a window that its attention function is never told of: only long texts would show it."""
    sizes = EXPERTS | {"sliding_window": 4_000}
    with pytest.raises(UnsupportedBackbone, match=r"\(phimoe\): layer 0 masks more than its attention is told of"):
        Backbone(build("phimoe", sizes), byte_tokenizer(), "p")
    Backbone(build("phimoe", sizes, sliding_window=None), byte_tokenizer(), "p")


def test_chunked_attention_is_refused() -> None:
    with pytest.raises(UnsupportedBackbone, match=r"\(llama4_text\): layer 0 masks more"):
        Backbone(build("llama4_text", EXPERTS | {"attention_chunk_size": 8_192}), byte_tokenizer(), "l")


@pytest.mark.parametrize("window", [None, 1, 50, 4_097, 100_000])
def test_mask_rules_are_compared_at_long_distances(window: int | None) -> None:
    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query if window is None else (key <= query) & (query - key < window)

    assert attention.is_causal_window(rule, window)
    assert not attention.is_causal_window(rule, 77)
    assert window is None or not attention.is_causal_window(rule, None)


def test_a_stock_model_whose_attention_is_broken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock forward is the reference: here it attends with twice the scale, so the two must disagree."""

    def sharper(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any):
        options["scaling"] *= 2
        return modeling_llama.eager_attention_forward(module, query, key, value, mask, **options)

    AttentionInterface.register("pe_test_sharper", sharper)
    monkeypatch.setitem(attention.AttentionMaskInterface._global_mapping, "pe_test_sharper",
                        attention.AttentionMaskInterface()["eager"])  # fmt: skip
    model = decoder("llama")
    model.set_attn_implementation("pe_test_sharper")
    with pytest.raises(UnsupportedBackbone, match=r"\(llama\): the packed pass differs from the stock forward by \d"):
        Backbone(model, byte_tokenizer(), "broken")


def test_our_own_attention_broken_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.causal_attention

    def wrong(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None) -> Tensor:
        return right(q, k, v, Segments((segments.total,), segments.device), scale)  # texts see each other

    monkeypatch.setattr(attention, "causal_attention", wrong)
    with pytest.raises(UnsupportedBackbone, match="differs"):
        backbone("llama")


def test_it_is_frozen_and_stays_in_eval_mode() -> None:
    model = backbone("llama").train()
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in model.model.modules())


@pytest.mark.parametrize("architecture", ["llama", "mistral_window", "gemma3", "gpt2"])
def test_text_pass_keeps_keys_and_values_and_nothing_else(architecture: str) -> None:
    model = backbone(architecture)
    texts = random_texts(3, 8)
    kept = model.read(texts)
    assert kept.segments.lengths == (3, 8)
    assert len(kept.layers) == model.num_layers
    for k, v in kept.layers:
        assert k.shape[0] == v.shape[0] == 11
        for tensor in (k, v):
            assert not tensor.requires_grad
            assert tensor.grad_fn is None
            assert not tensor.is_inference()  # a saved context of the pass with gradient


def test_text_pass_runs_without_grad_mode_and_leaves_it_on() -> None:
    model, modes = backbone("llama"), []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    model.read(random_texts(4))
    assert modes == [False]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3"])
def test_last_layer_is_trimmed_and_nothing_changes(architecture: str) -> None:
    model, runs = backbone(architecture), [0, 0]

    def count(layer: int) -> Any:
        def hook(*_: object) -> None:
            runs[layer] += 1

        return hook

    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(count(number))
    texts = random_texts(4, 9)
    trimmed = model.read(texts)
    assert runs == [1, 0]
    ids, segments = pack(texts, model.device)
    _, whole = model(model.token_rows(ids), segments, keep=True)
    assert runs == [2, 1]
    assert whole is not None
    for ours, theirs in zip(trimmed.layers, whole.layers, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    rows = soft_rows(model, 2, 3).flatten(0, 1)
    soft = Segments((3, 3), model.device)
    assert torch.equal(model(rows, soft, context=trimmed)[0], model(rows, soft, context=whole)[0])


@pytest.mark.parametrize("architecture", ["mistral_window", "starcoder2", "gemma3"])
def test_sliding_window_shorter_than_the_text(architecture: str) -> None:
    """Changing a token behind the window's reach changes nothing, one within it does; two layers reach 2 x 3 back."""
    changes = {"layer_types": ["sliding_attention"] * 2} if architecture == "gemma3" else {}
    model = backbone(architecture, **changes)
    rows = soft_rows(model, 1, 1).flatten(0, 1)
    (text,) = random_texts(20)
    first, near = [7 if text[0] != 7 else 8, *text[1:]], [*text[:-1], 7 if text[-1] != 7 else 8]
    states = [model(rows, Segments((1,), model.device), context=model.read([t]))[0] for t in (text, first, near)]
    assert torch.equal(states[0], states[1])
    assert relative_error(states[2], states[0]) > 1e-3


def test_prefix_context_is_shared_by_index() -> None:
    model = backbone("qwen3")
    lead, texts, index = random_texts(5, 2), random_texts(4, 7, 3), [1, 0, 1]
    ids, segments = pack(lead, model.device)
    _, context = model(model.token_rows(ids), segments, keep=True)
    ids, segments = pack(texts, model.device)
    got, _ = model(model.token_rows(ids), segments, context=context, context_index=index)
    got = final_states(model, got)
    rows = [model.token_rows(torch.tensor(t)) for t in texts]
    leads = [model.token_rows(torch.tensor(lead[i])) for i in index]
    expected = torch.cat([stock_states(model, a, b) for a, b in zip(leads, rows, strict=True)])
    assert relative_error(got, expected) < 1e-5


def test_no_autograd_state_without_gradients() -> None:
    model = backbone("llama")
    out, kept = model(model.token_rows(torch.tensor([3, 4])), Segments((2,), model.device))
    assert out.grad_fn is None
    assert kept is None


def test_a_layer_that_stores_nothing_is_an_error() -> None:
    with pytest.raises(KeyError):
        attention.keep_all(AttentionPlan(Segments((1,), torch.device("cpu"))), 1)


def test_flash_attention_is_called_as_this_torch_wants_it() -> None:
    """On tensors without data: arguments, grouped heads, shapes."""
    q, k = (torch.empty(12, heads, 32, device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2))
    cu = torch.empty(4, device="meta", dtype=torch.int32)
    out = attention.flash_attention(q, k, k, cu, cu, 5, 5, scale=None)
    assert out.shape == q.shape
    dq, dk = torch.autograd.grad(out.sum(), (q, k))
    assert (dq.shape, dk.shape) == (q.shape, k.shape)


def test_learned_positions_end_with_a_clear_error() -> None:
    model = backbone("gpt2")
    assert model.position_limit == 128
    model.read(random_texts(128))
    with pytest.raises(ValueError, match=r"gpt2: text and prompt take 129 tokens, but .* first 128 only .*max_length"):
        model.read(random_texts(5, 129))
    context = model.read(random_texts(127))
    with pytest.raises(ValueError, match="take 130 tokens"):
        model(soft_rows(model, 1, 3).flatten(0, 1), Segments((3,), model.device), context=context)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_the_batch_are_limited(kind: str) -> None:
    """Beyond the original length such a rope follows the longest text of the row: a neighbour would change a text."""
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = backbone("llama", rope_parameters=rope, max_position_embeddings=64)
    assert model.position_limit == 16
    with pytest.raises(ValueError, match="take 17 tokens"):
        model.read(random_texts(3, 17))


def test_plain_rope_has_no_limit() -> None:
    assert position_limit(decoder("llama").config) is None
    assert position_limit(decoder("gemma3").config) is None


def test_gemma_rows_are_scaled_once() -> None:
    model = backbone("gemma3")
    ids = torch.tensor([5, 9])
    assert torch.allclose(model.token_rows(ids), model.model.get_input_embeddings()(ids), rtol=1e-6)


@pytest.mark.parametrize("width", [1152, 2560, 3584])
def test_an_embedding_scale_is_what_the_rows_type_holds(width: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert rounded(width**0.5, dtype) == torch.tensor(width**0.5, dtype=dtype).item()


@pytest.mark.parametrize("architecture", ["phi3", "gpt2", "qwen3"])
def test_stored_keys_and_values_keep_no_larger_buffer_alive(architecture: str) -> None:
    backbone = Backbone(decoder(architecture), byte_tokenizer(), architecture)
    for pair in backbone.read([[5, 6, 7, 8], [9, 4]]).layers:
        assert [part.untyped_storage().nbytes() for part in pair] == [4 * part.numel() for part in pair]


def test_reader_is_off_in_the_text_pass_only() -> None:
    model = backbone("llama")
    texts = random_texts(4)
    before = model.read(texts)
    model.add_reader(LoraSettings(rank=2))
    for name, parameter in model.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert model.has_reader
    after = model.read(texts)
    for ours, theirs in zip(after.layers, before.layers, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert all(p.requires_grad for p in model.reader_parameters())
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in model.reader_parameters()}


def test_a_name_that_leads_nowhere(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere: no model there; tried the folder .*nowhere and the model h"):
        Backbone.from_pretrained(BackboneConfig(model=str(tmp_path / "nowhere")), torch.device("cpu"))


@pytest.mark.parametrize("has", [False, True])
def test_a_type_without_instructions(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning where the processor is slow at it."""
    monkeypatch.setattr(loading, "HALVES", dict.fromkeys(loading.HALVES, lambda: has))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dtype in (torch.bfloat16, torch.float32):
            loading.warn_of_slow_products("backbone.dtype", dtype, torch.device("cpu"))
    slow = [str(one.message) for one in caught]
    assert len(slow) == (0 if has else 1)
    assert has or re.match(r"backbone\.dtype: .* no instructions for bfloat16, .* choose float32", slow[0])


NORMS = {
    "llama": ("rms", 0.0),
    "gemma2": ("rms", 1.0),
    "gpt2": ("layer", 0.0),
    "gpt_neox": ("layer", 0.0),
}


@pytest.mark.parametrize("architecture", NORMS)
def test_final_norm_is_recognised(architecture: str) -> None:
    """Weights away from their initial ones and zeros: a norm that starts as the identity says little."""
    model = backbone(architecture)
    assert model.final_norm
    assert (model.final_norm.kind, model.final_norm.shift) == NORMS[architecture]
    nn.init.normal_(model.final_norm.module.weight)
    stock = torch.cat([model.stock_forward(ids) for ids in ([1, 2, 3], [4, 5])])
    ids, segments = pack([[1, 2, 3], [4, 5]], model.device)
    hidden, _ = model(model.token_rows(ids), segments)
    assert relative_error(final_states(model, hidden), stock) < 1e-5
    assert model.final_norm.module is getattr(model.model, model.final_norm.name)


def test_a_norm_of_another_formula_stays_in_the_model() -> None:
    class Halved(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

        def forward(self, x: Tensor) -> Tensor:
            return x / 2

    model = backbone("llama").model
    model.norm = Halved(model.norm)
    assert find_final_norm(model) is None
    model.second = nn.LayerNorm(model.config.hidden_size)
    assert find_final_norm(model) is None


def test_a_hub_backbone_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: type, name: str, revision: str | None, dtype: Any) -> tuple[PreTrainedModel, Any]:
        model = decoder("llama")
        model.config._commit_hash = "0123abcd"
        return model, byte_tokenizer()

    monkeypatch.setattr("pe.method.backbone.load_pretrained", load)
    for branch in (None, "main"):
        config = BackboneConfig(model="owner/name", revision=branch)
        assert Backbone.from_pretrained(config, torch.device("cpu")).revision == "0123abcd"


def test_texts_read_in_parts_are_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = backbone("qwen3"), random_texts(3, 4, 4, 9)
    whole = model.read(texts)
    monkeypatch.setattr("pe.method.backbone.CPU_TOKENS", 7)
    parts = model.read(texts)
    assert parts.segments.lengths == whole.segments.lengths == (3, 4, 4, 9)
    for ours, theirs in zip(parts.layers, whole.layers, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("is_fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_fastest_type_is_the_processors(
    tiny_models: Path, is_fast: bool, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: is_fast)
    config = BackboneConfig(model=str(tiny_models / "one"), dtype="fastest")
    assert Backbone.from_pretrained(config, torch.device("cpu")).dtype == expected

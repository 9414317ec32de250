"""The prompting LLM: what it writes, what trains, and which models it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pe.config import LoraSettings, PrompterConfig
from pe.method.probes import UnsupportedPrompter
from pe.method.prompting import PromptingLLM, left_padded
from tests import oracle
from tests.embedders import relative_error
from tests.tiny import byte_tokenizer, language_model

REQUESTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 9, 9, 11], [12], [40, 41, 42]]
FAMILIES = ["llama", "qwen3", "gemma3", "granite", "gpt_neox", "gpt2", "mistral_window"]


def prompter(architecture: str = "llama", **options: object) -> PromptingLLM:
    config = PrompterConfig(**({"soft_tokens": 3, "temperature": 0.7} | options))  # type: ignore[arg-type]
    return PromptingLLM(language_model(architecture), byte_tokenizer(), config).eval()


def test_left_padding_aligns_the_last_tokens() -> None:
    ids, pads, positions = left_padded([[1, 2, 3], [9]], torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3], [0, 0, 9]]
    assert pads.tolist() == [0, 2]
    assert positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    ids, pads, positions = left_padded([[1, 2], [3]], torch.device("cpu"), 4)
    assert ids.tolist() == [[0, 0, 1, 2], [0, 0, 0, 3]]
    assert (pads.tolist(), positions.tolist()) == ([2, 3], [[0, 0, 0, 1], [0, 0, 0, 0]])


class ValuesRead(TorchDispatchMode):
    """Counts how often a tensor's value is asked for: on a GPU each waits for all work before it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_requests_of_similar_length_are_read_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pe.method.prompting.TOKENS_AT_ONCE", 12)
    model, read = prompter(), []
    generate = model._generate

    def noting(requests: list[list[int]], count: int) -> tuple[Tensor, Tensor]:
        read.append(requests)
        return generate(requests, count)

    monkeypatch.setattr(model, "_generate", noting)
    model(REQUESTS)
    assert read == [[[12], [5, 6, 7], [40, 41, 42]], [REQUESTS[1]]]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_generation_waits_for_no_value(architecture: str) -> None:
    model = prompter(architecture)
    with ValuesRead() as values:
        model(REQUESTS)
    assert values.count == 0


def test_masks_are_ready_made_within_a_window_only() -> None:
    model, pads = prompter("mistral_window"), torch.tensor([0, 1])
    longest = model.model.config.sliding_window - 3
    assert model.mask(pads, longest, 3).shape == (2, 1, longest, longest)
    assert model.mask(pads, longest + 1, 3).tolist() == [[1] * (longest + 1), [0] + [1] * longest]
    ready = prompter().mask(torch.tensor([0, 2]), 4, 3)[1, 0].int().tolist()
    assert ready == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_frozen_embeddings_are_cast_once() -> None:
    model = prompter()
    assert model._embeddings(torch.float32)[0] is model.output_embedding
    first = model._embeddings(torch.bfloat16)
    assert {weight.dtype for weight in first} == {torch.bfloat16}
    assert model._embeddings(torch.bfloat16)[0] is first[0]
    with torch.no_grad():
        model.output_embedding.mul_(2)
    assert torch.equal(model._embeddings(torch.bfloat16)[0], 2 * first[0])
    with torch.inference_mode():
        assert prompter()._embeddings(torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("architecture", FAMILIES)
def test_padded_generation_equals_each_request_alone(architecture: str) -> None:
    model = prompter(architecture)
    together = model(REQUESTS)
    assert together.tokens.shape == together.hidden.shape == (4, 3, 32)
    for place, request in enumerate(REQUESTS):
        alone = model([request])
        assert relative_error(together.tokens[place], alone.tokens[0]) < 1e-5
        assert relative_error(together.hidden[place], alone.hidden[0]) < 1e-5


@pytest.mark.parametrize("at_once", [8, 1000])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_cached_generation_equals_whole_forwards_with_gradients(
    monkeypatch: pytest.MonkeyPatch, architecture: str, at_once: int
) -> None:
    monkeypatch.setattr("pe.method.prompting.TOKENS_AT_ONCE", at_once)
    model = prompter(architecture)
    weights = torch.randn(4, 3, 32)
    cached = model(REQUESTS)
    plain = [oracle.soft_prompt(model, request) for request in REQUESTS]
    tokens, hidden = (torch.stack(parts) for parts in zip(*plain, strict=True))
    assert relative_error(cached.tokens, tokens) < 1e-5
    assert relative_error(cached.hidden, hidden) < 1e-5
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad((t * weights).sum(), parameters) for t in (cached.tokens, tokens))
    ours, theirs = (torch.cat([g.flatten() for g in gradients]) for gradients in (ours, theirs))
    assert relative_error(ours, theirs) < 1e-5


def test_the_first_soft_token_is_the_expected_embedding() -> None:
    model = prompter("llama", temperature=0.3)
    probabilities = torch.softmax(model.model(torch.tensor([REQUESTS[0]])).logits[0, -1] / 0.3, -1)
    assert relative_error(model([REQUESTS[0]]).tokens[0, 0], probabilities @ model.embedding) < 1e-5


@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("llama", True), ("gemma3", True)])
def test_gradients_reach_all_but_the_vocabulary(architecture: str, tied: bool) -> None:
    config = PrompterConfig(soft_tokens=3)
    model = PromptingLLM(language_model(architecture, tie_word_embeddings=tied), byte_tokenizer(), config)
    embeddings = {id(model.embedding), id(model.output_embedding)}
    assert len(embeddings) == (1 if tied else 2)
    model(REQUESTS).tokens.square().sum().backward()
    for name, parameter in model.named_parameters():
        if id(parameter) in embeddings:
            assert not parameter.requires_grad
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_gradients_flow_through_the_cache() -> None:
    """The last soft token depends on what the first step kept: cutting the cache off changes its gradient."""
    model = prompter()
    values = model.model.model.layers[0].self_attn.v_proj.weight
    (whole,) = torch.autograd.grad(model(REQUESTS[:1]).tokens[0, -1].sum(), values)
    written = model(REQUESTS[:1]).tokens[0].detach()
    rows = torch.cat([model.model.get_input_embeddings()(torch.tensor(REQUESTS[0])), written[:2]])
    logits = model.model(inputs_embeds=rows[None], use_cache=False).logits[0, -1]
    last = torch.softmax(logits / 0.7, -1) @ model.embedding
    assert relative_error(last, written[-1]) < 1e-5
    (cut,) = torch.autograd.grad(last.sum(), values)  # soft tokens held constant
    assert relative_error(cut, whole) > 1e-2


def test_more_soft_tokens_extend_the_prompt() -> None:
    short, long = prompter(soft_tokens=2)(REQUESTS).tokens, prompter(soft_tokens=5)(REQUESTS).tokens
    assert long.shape == (4, 5, 32)
    assert relative_error(long[:, :2], short) < 1e-6
    assert relative_error(long[:, 2:4], short) > 1e-2


def test_temperature_changes_the_mixture() -> None:
    cold, warm = (prompter(temperature=t)(REQUESTS[:1]).tokens[0, 0] for t in (1e-3, 100.0))
    model = prompter()
    best = model.model(torch.tensor([REQUESTS[0]])).logits[0, -1].argmax()
    assert relative_error(cold, model.embedding[best]) < 1e-4  # one word
    assert relative_error(warm, model.embedding.mean(0)) < 0.2  # all of them


def test_lora_trains_adapters_only_and_starts_where_the_model_is() -> None:
    model = prompter(trainable="lora", lora=LoraSettings(rank=2))
    assert relative_error(model(REQUESTS).tokens, prompter()(REQUESTS).tokens) < 1e-6
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trainable}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    model(REQUESTS).tokens.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        if "lora_B" in name:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0, name


def test_lora_adapter_round_trip(tmp_path: Path) -> None:
    options = {"trainable": "lora", "lora": LoraSettings(rank=2)}
    model = prompter(**options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.glob("*.safetensors")} == {"adapter_model.safetensors"}
    again = prompter(**options)
    assert relative_error(again(REQUESTS).tokens, model(REQUESTS).tokens) > 1e-3
    again.load_adapter(tmp_path)
    again.eval()
    assert torch.equal(again(REQUESTS).tokens, model(REQUESTS).tokens)
    trainable = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert trainable[0] == trainable[1]


def test_granite_logit_scale_is_folded_into_the_temperature() -> None:
    model = prompter("granite", temperature=1.0)  # logits = h Eᵀ / 2
    assert model.logit_scale == pytest.approx(0.5, rel=1e-5)
    assert model.mixture_temperature == pytest.approx(2.0, rel=1e-5)


def test_logit_soft_cap_is_refused() -> None:
    with pytest.raises(UnsupportedPrompter, match=r"\(gemma2\): its logits differ from a linear map .* soft cap"):
        prompter("gemma2")


def test_a_wide_logit_soft_cap_is_refused_too() -> None:
    """A cap of 30 bends these small logits by half a thousandth: enough to refuse, easy to overlook."""
    model = language_model("gemma2", final_logit_softcapping=30.0)
    with pytest.raises(UnsupportedPrompter, match="soft cap"):
        PromptingLLM(model, byte_tokenizer(), PrompterConfig())


def test_without_the_cap_the_same_architecture_works() -> None:
    model = PromptingLLM(language_model("gemma2", final_logit_softcapping=None), byte_tokenizer(), PrompterConfig())
    assert model.logit_scale == pytest.approx(1.0, rel=1e-5)


def test_a_head_with_a_bias_is_refused() -> None:
    model = language_model("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    with pytest.raises(UnsupportedPrompter, match=r"\(llama\): its logits differ .* a bias"):
        PromptingLLM(model, byte_tokenizer(), PrompterConfig())


def test_a_model_without_a_head_is_refused() -> None:
    from tests.tiny import decoder

    with pytest.raises(UnsupportedPrompter, match="no output embedding"):
        PromptingLLM(decoder("llama"), byte_tokenizer(), PrompterConfig())


def test_an_embedding_scaled_in_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows handed in without a factor that the embedding layer applies would be another input than token ids."""
    model = language_model("llama")
    model.get_input_embeddings().register_forward_hook(lambda module, args, rows: rows * 3)
    with pytest.raises(UnsupportedPrompter, match="its padded, cached generation differs from the plain forward"):
        PromptingLLM(model, byte_tokenizer(), PrompterConfig())


def test_a_recurrent_model_is_refused() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.tiny import SIZES

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **SIZES))
    with pytest.raises(UnsupportedPrompter, match=r"\(mamba\): a recurrent or encoder-decoder model"):
        PromptingLLM(model, byte_tokenizer(), PrompterConfig())


def test_check_leaves_train_mode_alone() -> None:
    model = language_model("llama").train()
    assert PromptingLLM(model, byte_tokenizer(), PrompterConfig()).model.training

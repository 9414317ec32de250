"""The reader against its oracle: stock transformers and stock PEFT, a two-step forward through their own cache."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import AutoModel, DynamicCache

from pe.baselines.lora import LoraBaselineConfig, LoraEmbedder
from pe.config import LoraSettings, ModelConfig
from pe.method.alignment import LinearAlignment
from pe.method.backbone import Backbone
from pe.method.packing import pack
from pe.model import Instruction, PromptEmbedder, Requests
from tests import oracle
from tests.embedders import build, gradients, relative_error, with_reader
from tests.tiny import byte_tokenizer, decoder

TEXTS = ["the cat sat", "an old man walks along the other bank of the river", "a"]
REQUESTS = Requests(TEXTS, [Instruction("find the answer"), Instruction("same topic?")], [0, 1, 0])
ARCHITECTURES = ["qwen3", "llama", "mistral_window", "gemma3", "phi3", "gpt_neox"]


def stock_peft(model: PromptEmbedder, folder: Path) -> PeftModel:
    """The same weights by public means alone: saved, and loaded with transformers and PEFT."""
    model.save_pretrained(folder / "saved")
    config = copy.deepcopy(model.backbone.model.config)
    stock = AutoModel.from_config(config, attn_implementation="eager", dtype=torch.float32)
    state = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.backbone.model.state_dict().items()
        if ".lora_" not in name
    }
    stock.load_state_dict(state)
    return PeftModel.from_pretrained(stock.eval(), folder / "saved" / "reader", is_trainable=True).eval()


def two_steps(peft: PeftModel, model: PromptEmbedder) -> Tensor:
    """Adapter off for the text with a cache, adapter on for the soft tokens on that cache."""
    assert isinstance(model.alignment, LinearAlignment)
    embeddings = []
    for place, text in enumerate(REQUESTS.texts):
        read = f"Instruct: {REQUESTS.instruction(place).text}\nQuery:"
        soft = oracle.soft_prompt(model.prompter, byte_tokenizer()(read)["input_ids"])[0] @ model.alignment.weight
        cache = DynamicCache(config=peft.config)
        with torch.no_grad(), peft.disable_adapter():
            ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
            peft(input_ids=ids, past_key_values=cache, use_cache=True)
        states = peft(inputs_embeds=soft[None], past_key_values=cache, use_cache=True).last_hidden_state[0]
        embeddings.append(F.normalize(states.mean(0), dim=-1))
    return torch.stack(embeddings)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_the_two_step_cached_forward(architecture: str, tmp_path: Path) -> None:
    model = with_reader(architecture)
    peft = stock_peft(model, tmp_path)
    got, expected = model(REQUESTS), two_steps(peft, model)
    assert relative_error(got, expected) < 1e-5

    ours = gradients(model, got)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    loss = (expected * weights).sum()
    adapter = {
        "backbone.model." + name.removeprefix("base_model.model.").replace(".default.", ".reader."): p
        for name, p in peft.named_parameters()
        if p.requires_grad
    }
    named = {name: p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("backbone.")}
    named |= adapter
    assert named.keys() == ours.keys()
    theirs = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    for part in ("prompter.", "alignment.", "backbone."):
        a, b = (torch.cat([g[n].flatten() for n in ours if n.startswith(part)]) for g in (ours, theirs))
        assert b.norm() > 1e-4, part
        assert relative_error(a, b) < 1e-5, part


def test_it_acts_on_soft_tokens_and_never_on_text() -> None:
    model, plain = with_reader(), build("qwen3")
    assert relative_error(model(REQUESTS), plain(REQUESTS)) > 1e-2
    ids = model.tokenize(REQUESTS)
    for ours, theirs in zip(model.backbone.read(ids).layers, plain.backbone.read(ids).layers, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_a_fresh_reader_changes_nothing() -> None:
    fresh = build("qwen3", reader="activated_lora", reader_lora=LoraSettings(rank=2))
    assert torch.equal(fresh(REQUESTS), build("qwen3")(REQUESTS))


def test_it_stands_on_every_linear_layer_and_is_all_that_trains() -> None:
    model = with_reader()
    trainable = [name for name, p in model.backbone.named_parameters() if p.requires_grad]
    layers = {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trainable}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(".lora_A.reader." in name or ".lora_B.reader." in name for name in trainable)
    assert len(trainable) == 2 * 7 * model.backbone.num_layers
    assert set(model.trainable_parameters()) == {"prompter", "alignment", "reader"}


def test_dropout_acts_in_train_mode_only() -> None:
    model = with_reader(dropout=0.5)
    assert torch.equal(model(REQUESTS), model(REQUESTS))
    assert torch.equal(model(REQUESTS), with_reader()(REQUESTS))
    model.train()
    assert relative_error(model(REQUESTS), model(REQUESTS)) > 1e-3
    ids = model.tokenize(REQUESTS)
    first, second = model.backbone.read(ids), model.backbone.read(ids)
    assert all(
        torch.equal(a, b)
        for one, two in zip(first.layers, second.layers, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    encoded = model.encode_tensor(TEXTS, instructions=["find the answer"])
    assert torch.equal(encoded, model.encode_tensor(TEXTS, instructions=["find the answer"]))
    assert relative_error(model(REQUESTS), model(REQUESTS)) > 1e-3  # training goes on with dropout
    model.eval()
    assert torch.equal(model(REQUESTS), model(REQUESTS))


def test_an_error_in_the_text_pass_switches_it_on_again() -> None:
    model = with_reader()
    before = model(REQUESTS)
    with pytest.raises(IndexError):
        model.backbone.read([[10_000]])
    assert torch.equal(model(REQUESTS), before)


def test_a_reader_that_was_off_stays_off() -> None:
    """As within `reader_off` of a caller, where a text pass has its own."""
    backbone = with_reader().backbone

    def states() -> Tensor:
        ids, segments = pack([[1, 2, 3]], backbone.device)
        return backbone(backbone.token_rows(ids), segments)[0]

    with backbone.reader_off():
        off = states()
        backbone.read([[1, 2, 3]])
        assert torch.equal(states(), off)
    assert not torch.equal(states(), off)


def test_saved_reader_is_a_stock_peft_adapter(tmp_path: Path) -> None:
    model = with_reader("llama")
    peft = stock_peft(model, tmp_path)
    assert {file.name for file in (tmp_path / "saved" / "reader").glob("*.safetensors")} == {
        "adapter_model.safetensors"
    }
    config = peft.peft_config["default"]
    assert (config.r, config.lora_alpha) == (2, 4)
    ours = {name.replace(".reader.", "."): p for name, p in model.backbone.model.named_parameters() if ".lora_" in name}
    theirs = {
        name.removeprefix("base_model.model.").replace(".default.", "."): p
        for name, p in peft.named_parameters()
        if ".lora_" in name
    }
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_needs_the_suffix_layout() -> None:
    with pytest.raises(ValueError, match="reader: expected 'none' in the prefix layout"):
        ModelConfig(layout="prefix", pooling="last", reader="activated_lora")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_train_in_float32_whatever_the_backbone_is(dtype: torch.dtype, tmp_path: Path) -> None:
    def half() -> Backbone:
        return Backbone(decoder("qwen3").to(dtype), byte_tokenizer(), "qwen3")  # type: ignore[arg-type]

    backbone = half()
    backbone.add_reader(LoraSettings())
    assert {parameter.dtype for parameter in backbone.reader_parameters()} == {torch.float32}
    assert backbone.dtype == dtype
    backbone.model.save_pretrained(tmp_path)
    again = half()
    again.load_reader(tmp_path)
    assert {parameter.dtype for parameter in again.reader_parameters()} == {torch.float32}
    peer = LoraEmbedder(LoraBaselineConfig(), half())
    assert {weight.dtype for weights in peer.trainable_parameters().values() for weight in weights} == {torch.float32}

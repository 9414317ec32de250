"""The lens: the identity at first, then what an instruction scales; the same in every path, saved and moved."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from pe.baselines.static import StaticPromptEmbedder
from pe.config import BackboneConfig, ModelConfig, PrompterConfig, RecipeError
from pe.method.lens import Lens
from pe.model import Instruction, PromptEmbedder, Requests
from pe.transfer import move

FIND, AVOID = "Find what follows", "Find what contradicts"
TEXTS = ["a cat sat", "the dog ran away today", "no"]


def configured(tiny_models: Path, **options: Any) -> ModelConfig:
    prompter = PrompterConfig(model=str(tiny_models / "prompter"), soft_tokens=3)
    backbone = BackboneConfig(model=str(tiny_models / "one"))
    return ModelConfig(prompter=prompter, backbone=backbone, max_length=32, lens_rank=5, **options)


@pytest.fixture
def model(tiny_models: Path) -> PromptEmbedder:
    torch.manual_seed(0)
    embedder = PromptEmbedder.from_config(configured(tiny_models))
    embedder.start([Instruction(FIND), Instruction(AVOID)])
    return embedder.eval()


def turned(model: PromptEmbedder) -> PromptEmbedder:
    assert model.lens is not None
    torch.nn.init.normal_(model.lens.factors, generator=torch.Generator().manual_seed(1))
    return model


def test_nothing_changes_at_the_start(model: PromptEmbedder) -> None:
    before = model.encode(TEXTS, instruction=FIND)
    model.lens = None
    torch.testing.assert_close(torch.tensor(before), torch.tensor(model.encode(TEXTS, instruction=FIND)))


def test_the_formula() -> None:
    torch.manual_seed(0)
    lens = Lens(6, 4, 3, torch.device("cpu"))
    torch.nn.init.normal_(lens.factors)
    hidden, e = torch.randn(2, 4), F.normalize(torch.randn(2, 6), dim=-1)
    lens.start_at(torch.randn(7, 4))

    def rms(x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    gates = rms(rms(hidden) - lens.origin) @ lens.reading.T @ lens.factors.T
    expected = torch.stack([e[b] + gates[b] * e[b] for b in range(2)])
    torch.testing.assert_close(lens(e, lens.gates(hidden)), F.normalize(expected, dim=-1))


def test_the_center_is_the_mean_over_instructions(model: PromptEmbedder) -> None:
    assert model.lens is not None
    heads = [model.prompter_text(Instruction(text)) for text in (FIND, AVOID)]
    hidden = model.prompter(model.prompter_ids([(head, head) for head in heads])).hidden
    expected = F.rms_norm(hidden[:, 0], hidden.shape[-1:], eps=1e-6).mean(0)
    torch.testing.assert_close(model.lens.origin.detach(), expected)


def test_an_instruction_turns_an_embedding(model: PromptEmbedder) -> None:
    plain = model.encode_many(TEXTS, instructions=[FIND, AVOID])
    now = turned(model).encode_many(TEXTS, instructions=[FIND, AVOID])
    alike, apart = ((pair[0] * pair[1]).sum(-1).mean() for pair in (plain, now))
    assert apart < alike - 0.05


def test_every_path_agrees(tiny_models: Path) -> None:
    torch.manual_seed(0)
    model = turned(PromptEmbedder.from_config(configured(tiny_models))).eval()
    many = torch.tensor(model.encode_many(TEXTS, instructions=[FIND, AVOID]))
    for place, text in enumerate((FIND, AVOID)):
        single = torch.tensor(model.encode(TEXTS, instruction=text))
        forward = model(Requests(TEXTS, [Instruction(text)], [0] * len(TEXTS)))
        torch.testing.assert_close(many[place], single)
        torch.testing.assert_close(single, forward.detach())
    both = Requests([TEXTS[0], TEXTS[0]], [Instruction(FIND), Instruction(AVOID)], [0, 1])
    torch.testing.assert_close(model(both).detach(), many[:, 0])


def test_the_prefix_layout_has_none(tiny_models: Path) -> None:
    with pytest.raises(RecipeError, match="lens_rank: expected 0 in the prefix layout, got 5"):
        configured(tiny_models, layout="prefix", pooling="mean_text", reader="none", skip="none")


def test_a_changed_lens_makes_the_bank_stale(model: PromptEmbedder) -> None:
    before = turned(model).encode(TEXTS, instruction=FIND)
    assert model.lens is not None
    model.lens.factors.data.mul_(-1)
    assert abs(before - model.encode(TEXTS, instruction=FIND)).max() > 1e-3


def test_all_of_it_trains(model: PromptEmbedder) -> None:
    requests = Requests(TEXTS, [Instruction(FIND), Instruction(AVOID)], [0, 1, 0])
    turned(model)(requests)[:, 0].sum().backward()
    gradients = [p.grad for p in model.trainable_parameters()["lens"]]
    assert len(gradients) == 3
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)


def test_it_is_saved(model: PromptEmbedder, tmp_path: Path) -> None:
    turned(model).save_pretrained(tmp_path / "m")
    again = PromptEmbedder.from_pretrained(tmp_path / "m")
    assert (again.encode(TEXTS, instruction=AVOID) == model.encode(TEXTS, instruction=AVOID)).all()
    assert again.revision == model.revision


def test_a_lens_of_the_earlier_form_is_refused(model: PromptEmbedder, tmp_path: Path) -> None:
    """It turned directions of its own, where today's scales the dimensions."""
    model.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "lens.safetensors"
    save_file({"gate" if name == "reading" else name: rows for name, rows in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="got an earlier form of it; train the embedder anew"):
        PromptEmbedder.from_pretrained(tmp_path / "m")


def test_a_move_keeps_how_an_instruction_is_read(model: PromptEmbedder) -> None:
    moved = move(turned(model), model.config)
    assert moved.lens is not None
    assert model.lens is not None
    assert torch.equal(moved.lens.reading, model.lens.reading)
    assert torch.equal(moved.lens.origin, model.lens.origin)
    assert not moved.lens.factors.any()


def test_the_control_has_one_too(tiny_models: Path) -> None:
    torch.manual_seed(0)
    config = configured(tiny_models)
    known = [Instruction(FIND), Instruction(AVOID)]
    static = StaticPromptEmbedder.from_config(config, instructions=known)
    static.start(known)
    turned(static).eval()
    embeddings = static.encode_many(TEXTS, instructions=[FIND, AVOID])
    assert abs(embeddings[0] - embeddings[1]).max() > 0.05


def test_a_frozen_prompting_llm_is_saved_by_name(tiny_models: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = configured(tiny_models)
    config = dataclasses.replace(config, prompter=dataclasses.replace(config.prompter, trainable="none"))
    model = turned(PromptEmbedder.from_config(config)).eval()
    assert "prompter" not in model.trainable_parameters()
    model.save_pretrained(tmp_path / "m")
    assert not list((tmp_path / "m" / "prompter").glob("*.safetensors"))
    again = PromptEmbedder.from_pretrained(tmp_path / "m")
    assert (again.encode(TEXTS, instruction=FIND) == model.encode(TEXTS, instruction=FIND)).all()
    model.save_pretrained(tmp_path / "whole", include_backbone=True)
    assert (tmp_path / "whole" / "prompter-base" / "model.safetensors").is_file()

"""The bound on soft tokens' states: what it leaves of a gradient, and where it acts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from pe.config import LossConfig, TrainConfig
from pe.method.norm_bound import LENGTH, TEXTS, BoundedNorm, NormBound, states_of, usual_norms
from pe.model import PromptEmbedder
from pe.step import Step
from tests.embedders import REQUESTS, backbone, build, captured, gradients, relative_error, with_reader

ARCHITECTURES = ["qwen3", "llama", "gemma3", "gpt_neox"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_lengthens_a_long_state_is_taken_from_its_gradient(dtype: torch.dtype) -> None:
    states = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    upstream = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]], dtype=dtype)
    output = BoundedNorm.apply(states, torch.tensor(2.0))
    assert torch.equal(output, states)
    (found,) = torch.autograd.grad(output, states, upstream)
    shortened = upstream[0].double() + 3 / 25 * states[0].detach().double()  # g - h (g·h) / |h|²; g·h = -3
    assert found.dtype == dtype
    torch.testing.assert_close(found[0].double(), shortened, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)
    assert torch.equal(found[1:], upstream[1:])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_usual_norms_are_those_of_the_stock_model(architecture: str) -> None:
    read = backbone(architecture)
    found = usual_norms(read)
    count, last = TEXTS * LENGTH, len(read.embedding) - 1
    ids = torch.tensor([place * last // (count - 1) for place in range(count)]).view(TEXTS, LENGTH)
    read.model.set_attn_implementation("eager")
    with torch.no_grad():
        states = read.model(ids, use_cache=False, output_hidden_states=True).hidden_states
    expected = torch.stack([layer.norm(dim=-1).median() for layer in states[1:-1]])
    assert len(found) == read.num_layers - 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def of_first_layer(model: PromptEmbedder, sign: float) -> Callable[[], dict[str, Tensor]]:
    """Gradients of how long the soft tokens' states are behind the first layer, or of how short."""
    seen: list[Tensor] = []

    def note(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            seen.append(states_of(output))

    def run() -> dict[str, Tensor]:
        seen.clear()
        handle = model.backbone.layers()[0].register_forward_hook(note)
        model(REQUESTS)
        handle.remove()
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(sign * seen[-1].norm(dim=-1).sum(), list(named.values()), allow_unused=True)
        return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}

    return run


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_parameter_is_told_to_lengthen_a_long_state(architecture: str) -> None:
    model = with_reader(architecture)
    lengthen, shorten = of_first_layer(model, -1.0), of_first_layer(model, 1.0)
    free, shorter, embeddings = lengthen(), shorten(), model(REQUESTS)
    bound = NormBound(model.backbone, 1e-6)
    assert torch.equal(model(REQUESTS), embeddings)
    bounded = lengthen()
    assert any("lora_" in name for name in free)
    assert any(name.startswith("alignment.") for name in free)
    for name, gradient in bounded.items():
        assert gradient.norm() <= 1e-5 * free[name].norm() + 1e-7, name
    assert {name: g.tolist() for name, g in shorten().items()} == {name: g.tolist() for name, g in shorter.items()}
    bound.close()
    assert {name: g.tolist() for name, g in lengthen().items()} == {name: g.tolist() for name, g in free.items()}


def test_states_within_the_bound_have_the_gradient_they_had() -> None:
    model = with_reader()
    free = gradients(model, model(REQUESTS))
    bound = NormBound(model.backbone, 1e6)
    bounded = gradients(model, model(REQUESTS))
    assert all(torch.equal(free[name], bounded[name]) for name in free)
    bound.close()
    bound = NormBound(model.backbone, 1e-6)
    assert any(not torch.equal(free[name], gradient) for name, gradient in gradients(model, model(REQUESTS)).items())


def test_recorded_passes_are_bounded_too() -> None:
    model = with_reader()
    NormBound(model.backbone, 1e-6)
    expected = gradients(model, model(REQUESTS))
    recorder = captured(model)
    found = gradients(model, model(REQUESTS))
    assert recorder.count
    assert all(relative_error(found[name], expected[name]) < 1e-5 for name in expected if expected[name].norm() > 1e-6)


@pytest.mark.parametrize(("options", "norm_bound", "is_bounded"), [
    ({}, 3.0, True), ({}, None, False), ({"layout": "prefix", "pooling": "last"}, 3.0, False),
])  # fmt: skip
def test_a_step_bounds_states_until_it_is_closed(
    options: dict[str, str], norm_bound: float | None, is_bounded: bool
) -> None:
    model = build("qwen3", **options)
    layers = model.backbone.layers()
    step = Step(model, LossConfig(), TrainConfig(norm_bound=norm_bound), Accelerator(cpu=True))
    assert [bool(layer._forward_hooks) for layer in layers] == [is_bounded] * (len(layers) - 1) + [False]
    step.close()
    assert not any(layer._forward_hooks for layer in layers)

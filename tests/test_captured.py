"""Recorded passes against the same passes launched one by one, with a recorder that runs its work anew: no GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from pe.config import LoraSettings
from pe.losses import cached_backward
from pe.method.captured import Contexts, rounded_up
from pe.method.graphs import Graphs, NotRecordedError
from tests.embedders import LONGER, REQUESTS, Recorder, build, captured, gradients, relative_error


@pytest.mark.parametrize("architecture", ["llama", "mistral_window", "gpt_oss"])
@pytest.mark.parametrize("options", [{}, {"reader": "activated_lora", "skip": "weighted"}, {"pooling": "last"}])
def test_equals_the_passes_themselves(architecture: str, options: dict[str, str]) -> None:
    model = build(architecture, **options)
    batches = [REQUESTS, LONGER, REQUESTS, REQUESTS.part([1, 0, 2, 3]), LONGER]
    torch.manual_seed(1)
    for parameter in model.backbone.reader_parameters():  # B is zero at the start
        torch.nn.init.normal_(parameter, std=0.1)
    plain = [(out := model(batch), gradients(model, out)) for batch in batches]
    recorder = captured(model)
    for batch, (expected, expected_gradients) in zip(batches, plain, strict=True):
        out = model(batch)
        assert relative_error(out, expected) < 1e-5
        for name, gradient in gradients(model, out).items():
            assert relative_error(gradient, expected_gradients[name]) < 2e-5, name
    # Two passes, forward and backward: REQUESTS and LONGER have both of their own; the buffers grew once.
    assert recorder.count == 2 * (2 + 3)


def test_follows_the_weights() -> None:
    model, other = build("llama"), build("llama")
    captured(model)
    steps = []
    for embedder in (model, other):
        optimizer = torch.optim.SGD([p for part in embedder.trainable_parameters().values() for p in part], lr=0.5)
        for _ in range(3):
            embeddings = embedder(REQUESTS)
            (embeddings[0] @ embeddings[1]).backward()
            optimizer.step()
            optimizer.zero_grad()
        steps.append(embedder(REQUESTS).detach())
    assert relative_error(steps[0], steps[1]) < 1e-4
    assert relative_error(steps[0], build("llama")(REQUESTS)) > 1e-3


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_add_up(to_none: bool) -> None:
    """The buffer that a graph writes is the parameter's `grad`: a second backward pass must not overwrite the first."""
    model, other = build("llama"), build("llama")
    captured(model)
    found = []
    for embedder in (model, other):
        parameters = [p for part in embedder.trainable_parameters().values() for p in part]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        embedder(LONGER).sum().backward()
        optimizer.zero_grad(set_to_none=to_none)
        for batch in (REQUESTS, LONGER, REQUESTS):
            embedder(batch)[:, 0].sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
    assert relative_error(found[0], found[1]) < 1e-4


def test_a_second_batch_before_the_first_one_s_backward_pass() -> None:
    model = build("llama")
    expected = [gradients(model, model(batch)) for batch in (REQUESTS, LONGER)]
    recorder = captured(model)
    first, second = model(REQUESTS), model(LONGER)
    assert recorder.count == 4
    for out, right in zip((first, second), expected, strict=True):
        for name, gradient in gradients(model, out).items():
            assert relative_error(gradient, right[name]) < 2e-5, name
    model(LONGER)
    assert recorder.count > 4  # free again


def test_without_gradient_nothing_is_recorded() -> None:
    model = build("llama")
    recorder = captured(model)
    with torch.no_grad():
        model(REQUESTS)
    model.encode(["a", "bc"], instruction="find")
    assert recorder.count == 0


def test_a_forgotten_forward_pass_frees_its_graph() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    graphs = Graphs([weight], Recorder())
    function: Callable[[Tensor], tuple[Tensor, ...]] = lambda x: (x * weight,)  # noqa: E731
    (out,) = graphs("key", function, [torch.arange(3.0)])
    assert graphs.is_busy
    del out
    assert not graphs.is_busy


def test_a_pass_that_waits_for_the_device_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refuses(device: torch.device) -> Iterator[None]:
        raise NotRecordedError("called a synchronizing CUDA operation")
        yield

    monkeypatch.setattr("pe.method.graphs.refusing_to_wait", refuses)
    model = build("llama")
    expected = model(REQUESTS)
    recorder = captured(model)
    with pytest.warns(UserWarning, match="no CUDA graphs of a pass any more"):
        embeddings = model(REQUESTS)
    assert relative_error(embeddings, expected) < 1e-5
    model(LONGER).sum().backward()
    assert recorder.count == 0
    assert model.captured is not None
    assert not model.captured.is_possible


def test_the_oldest_shape_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pe.method.graphs.MOST", 2)
    weight, recorder = torch.nn.Parameter(torch.ones(1)), Recorder()
    graphs = Graphs([weight], recorder)
    for size in (1, 2, 3, 2, 3, 1):
        (out,) = graphs("key", lambda x: (x * weight,), [torch.ones(size)])
        out.sum().backward()
    assert recorder.count == 2 * 4
    assert weight.grad is not None
    assert weight.grad.item() == 12


def similarity(rows: Tensor) -> Tensor:
    """A loss of embeddings `[B, D]` that every one of them changes."""
    return (rows[0] @ rows.T).exp().sum()


@pytest.mark.parametrize("options", [{}, {"reader": "activated_lora", "skip": "weighted"}, {"trainable": "lora"}])
def test_cached_representations(options: dict[str, str]) -> None:
    """Parts of a batch, each embedded twice: the gradient is that of launched passes."""
    model, other = build("llama", **options), build("llama", **options)
    captured(model)
    found = []
    for embedder in (model, other):
        loss = cached_backward(embedder, LONGER, 2, similarity, contextlib.nullcontext, Tensor.backward)
        parameters = [p for part in embedder.trainable_parameters().values() for p in part]
        found.append(torch.cat([loss[None], *(p.grad.flatten() for p in parameters if p.grad is not None)]))
    assert relative_error(found[0], found[1]) < 1e-4


def test_a_parameter_that_a_pass_does_not_use() -> None:
    model, other = build("llama"), build("llama")
    for embedder in (model, other):
        embedder.prompter.register_parameter("unused", torch.nn.Parameter(torch.ones(2)))
    captured(model)
    found = []
    for embedder in (model, other):
        embedder(REQUESTS)[:, 0].sum().backward()
        assert embedder.prompter.unused.grad is None
        found.append(torch.cat([p.grad.flatten() for p in embedder.parameters() if p.grad is not None]))
    assert relative_error(found[0], found[1]) < 1e-5


def test_nothing_trains_but_the_skip() -> None:
    model = build("llama", skip="weighted")
    model.prompter.requires_grad_(False)
    model.alignment.requires_grad_(False)
    recorder = captured(model)
    model(REQUESTS)[:, 0].sum().backward()
    assert recorder.count == 0
    assert model.skip is not None
    assert model.skip.weight.grad is not None


def test_a_second_backward_pass_is_refused() -> None:
    model = build("llama")
    captured(model)
    total = model(REQUESTS).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="expected one backward pass, got a second"):
        total.backward()


def test_ever_new_shapes_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pe.method.graphs.TOO_MANY", 2)
    weight, recorder = torch.nn.Parameter(torch.ones(1)), Recorder()
    graphs = Graphs([weight], recorder)
    for size in (1, 2, 1, 2):
        graphs("key", lambda x: (x * weight,), [torch.ones(size)])[0].sum().backward()
    with pytest.warns(UserWarning, match="it came in 2 shapes"):
        graphs("key", lambda x: (x * weight,), [torch.ones(3)])[0].sum().backward()
    graphs("key", lambda x: (x * weight,), [torch.ones(1)])[0].sum().backward()
    assert recorder.count == 4
    assert weight.grad is not None
    assert weight.grad.item() == 10


def test_on_a_cpu_nothing_is_recorded() -> None:
    model = build("llama")
    model.use_graphs(True)
    assert model.captured is None


def test_dropout_is_seen() -> None:
    reader = build("llama", reader="activated_lora")
    active = build("llama", reader="activated_lora", reader_lora=LoraSettings(dropout=0.1))
    fixed, prompted = build("gpt2"), build("llama", prompter="gpt2")
    found = [model.has_dropout for model in (reader, active, fixed, prompted)]
    assert found == [False, True, False, True]


def test_few_sizes() -> None:
    sizes = [rounded_up(count) for count in (1, 64, 65, 96, 97, 129, 4096, 4097)]
    assert sizes == [64, 64, 96, 96, 128, 192, 4096, 6144]


def test_contexts_stay_where_they_are() -> None:
    model, contexts = build("llama"), Contexts()
    texts = [model.backbone.read([[1] * count, [2, 3]]) for count in (50, 20, 70)]
    assert contexts.put(texts[0])
    place = contexts.texts(2, 64).layers[0][0].data_ptr()
    assert not contexts.put(texts[1])
    seen = contexts.texts(2, 64)
    assert seen.layers[0][0].data_ptr() == place
    torch.testing.assert_close(seen.layers[-1][1][:22], texts[1].layers[-1][1])
    assert seen.segments.cu_seqlens.tolist() == [0, 20, 22]
    assert contexts.put(texts[2])

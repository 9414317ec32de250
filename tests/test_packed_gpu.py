"""What only a GPU can show of the model layer: packed equals stock in bfloat16, and a real training step there."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pe.kernels.info_nce import info_nce
from pe.method.adapters import prepare_adapters
from pe.method.ahead import ReadAhead
from pe.method.backbone import READER
from pe.method.rms_norm import fuse_norms
from pe.model import PromptEmbedder, Requests
from tests import oracle
from tests.embedders import REQUESTS, build
from tests.kernels.tolerance import assert_no_worse

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
ARCHITECTURES = ("llama", "qwen3", "mistral_window", "gemma2", "gemma3", "gpt_neox", "gpt_oss")
LAYOUTS = {
    "suffix": {"layout": "suffix", "pooling": "mean_prompt"},
    "suffix, skip": {"layout": "suffix", "pooling": "mean_prompt", "skip": "weighted"},
    "prefix": {"layout": "prefix", "pooling": "mean_text"},
}
EACH_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS)


def upstream(embeddings: Tensor) -> Tensor:
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(3), device="cpu")
    return weights.to(embeddings.device, embeddings.dtype)


def results(model: PromptEmbedder, embeddings: Tensor) -> dict[str, Tensor]:
    """Embeddings, and the gradient of a fixed functional of them to each part that trains."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(embeddings, list(named.values()), upstream(embeddings))
    found = {"embeddings": embeddings.detach()}
    for part in ("prompter.", "alignment.", *(["skip."] if model.skip is not None else [])):
        pairs = zip(named, grads, strict=True)
        found[part] = torch.cat([grad.flatten() for name, grad in pairs if name.startswith(part)])
    return found


def plain(model: PromptEmbedder, requests: Requests) -> dict[str, Tensor]:
    """The same by the stock model's forward over each concatenated sequence."""
    with torch.device(DEVICE):
        return results(model, oracle.embed(model, requests))


@EACH_LAYOUT
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_equals_stock_in_bfloat16(architecture: str, layout: str) -> None:
    """No further from the stock model in float32 than the stock model in bfloat16, by the kernels' tolerance rule."""
    model = build(architecture, **LAYOUTS[layout]).to(DEVICE, torch.bfloat16)
    got = results(model, model(REQUESTS))
    wide, same = plain(copy.deepcopy(model).float(), REQUESTS), plain(model, REQUESTS)
    for name, value in got.items():
        assert wide[name].norm() > 0
        assert_no_worse(value.to(same[name].dtype), wide[name], same[name], name)


@EACH_LAYOUT
def test_training_step_in_bfloat16(layout: str) -> None:
    """Frozen backbone in bfloat16, trained weights in float32, forward under autocast."""
    model = build("qwen3", **LAYOUTS[layout]).to(DEVICE).train()
    model.backbone.to(torch.bfloat16)
    parameters = [p for part in model.trainable_parameters().values() for p in part]
    before = [p.detach().clone() for p in parameters]
    frozen = {name: p.clone() for name, p in model.backbone.named_parameters()}
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    with torch.autocast(DEVICE, torch.bfloat16):
        embeddings = model(REQUESTS)
        loss = info_nce(embeddings[:2], embeddings[2:], torch.arange(2, device=DEVICE), temperature=0.05)
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in parameters)
    changed = [not torch.equal(a, b) for a, b in zip(before, parameters, strict=True)]
    assert any(changed)
    assert all(torch.equal(p, frozen[name]) for name, p in model.backbone.named_parameters())


@pytest.mark.parametrize("options", [{}, {"reader": "activated_lora", "skip": "weighted"}], ids=["bare", "default"])
@pytest.mark.parametrize(("dtype", "steps", "allowed"), [(torch.float32, 5, 5e-3), (torch.bfloat16, 1, 0.15)])
def test_graphs_train_as_launches_do(dtype: torch.dtype, steps: int, allowed: float, options: dict[str, str]) -> None:
    """Gradients of a few steps on batches of two shapes, each repeated, by CUDA graphs (twice) and by launches.

    bfloat16 roundings part the weights after a step, so there it is the first that is compared with launches.
    """
    longer = Requests(["a river bank " * 5, "b", "an old man", "of " * 25], REQUESTS.instructions, [1, 0, 0, 1])
    runs: list[list[Tensor]] = []
    for on in (False, True, True):
        model = build("qwen3", **LAYOUTS["suffix"], **options).to(DEVICE).train()
        model.backbone.model.to(dtype)
        if model.backbone.has_reader:
            prepare_adapters(model.backbone.model, READER)
        parameters = [p for part in model.trainable_parameters().values() for p in part]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        model.use_graphs(on)
        runs.append([])
        for batch in (REQUESTS, longer, REQUESTS, longer, REQUESTS):
            with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == torch.bfloat16):
                embeddings = model(batch)
                loss = info_nce(embeddings[:2], embeddings[2:], torch.arange(2, device=DEVICE), temperature=0.5)
            loss.backward()
            runs[-1].append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).clone())
            optimizer.step()
            optimizer.zero_grad()
        assert (model.captured is not None and model.captured.is_possible) == on
    launched, replayed, again = runs
    for step in range(steps):
        error = (replayed[step] - launched[step]).norm() / launched[step].norm()
        assert error < allowed, (step, error)
    assert all(torch.equal(a, b) for a, b in zip(replayed, again, strict=True))


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "graphs"])
def test_texts_read_ahead_train_the_same(graphs: bool) -> None:
    """Bitwise the losses of steps that read their own texts, on batches long enough that both streams have work."""
    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(4):
        lengths = torch.randint(100, 1500, (16,), generator=generator).tolist()
        texts = ["".join(map(chr, torch.randint(97, 123, (n,), generator=generator).tolist())) for n in lengths]
        batches.append(Requests(texts, REQUESTS.instructions, [0] * 8 + [1] * 8))
    runs: list[list[Tensor]] = []
    for on in (False, True):
        shape = {"hidden_size": 512, "intermediate_size": 2048, "head_dim": 64, "num_hidden_layers": 6}
        model = build(
            "qwen3", shape=shape, layout="suffix", pooling="mean_prompt", reader="activated_lora", skip="weighted"
        )
        model.to(DEVICE).train()
        model.config = dataclasses.replace(model.config, max_length=1500)
        model.backbone.model.to(torch.bfloat16)
        prepare_adapters(model.backbone.model, READER)
        parameters = [p for part in model.trainable_parameters().values() for p in part]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
        model.use_graphs(graphs)
        autocast = functools.partial(torch.autocast, DEVICE, torch.bfloat16)
        ahead = ReadAhead(model, autocast)
        runs.append([])
        for step in range(24):
            batch, following = (batches[number % len(batches)] for number in (step, step + 1))
            with autocast():
                embeddings = model(ahead.take(batch) if on else batch)
                if on:
                    ahead.start(following)
                loss = info_nce(embeddings[:8], embeddings[8:], torch.arange(8, device=DEVICE), temperature=0.1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            runs[-1].append(loss.detach())
    plain, read_ahead = map(torch.stack, runs)
    assert plain.unique().numel() == len(plain)
    assert torch.equal(plain, read_ahead), (plain - read_ahead).abs().max()


@pytest.mark.parametrize("width", [128, 4096])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [True, False])
def test_fused_norms(rows_dtype: torch.dtype, weight_dtype: torch.dtype, width: int, trains: bool) -> None:
    """Of the types of the module that they stand for, under autocast, and no further from float32 than it is."""
    generator = torch.Generator().manual_seed(0)
    stock = LlamaRMSNorm(width).to(DEVICE, weight_dtype)
    with torch.no_grad():
        stock.weight.copy_(torch.rand(width, generator=generator) + 0.5)
    stock.weight.requires_grad_(trains)
    fused, wide = copy.deepcopy(stock), copy.deepcopy(stock).float()
    fuse_norms(fused)
    rows = torch.randn(7, 33, width, generator=generator).to(DEVICE, rows_dtype)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = [norm_outputs(norm, x) for norm, x in ((fused, rows), (wide, rows.float()), (stock, rows))]
        with Operations() as seen:
            fused(rows)
    for got, exact, same in zip(*found, strict=True):
        assert got.dtype == same.dtype
        error, allowed = ((x.float() - exact).norm() / exact.norm() for x in (got, same))
        assert error <= 1.1 * allowed + (1e-6 if got.dtype == torch.float32 else 2**-9)
    assert [op for op in seen.ops if op is not torch.ops.aten._to_copy.default] == [
        torch.ops.aten._fused_rms_norm.default
    ]


class Operations(TorchDispatchMode):
    """Which operations run."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[object] = []

    def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


def norm_outputs(norm: nn.Module, rows: Tensor) -> tuple[Tensor, ...]:
    """What a norm makes of rows, and the gradients of a fixed functional of it, transposed as attention takes it."""
    x, (weight,) = rows.clone().requires_grad_(), norm.parameters()
    out = norm(x)
    into = (x, weight) if weight.requires_grad else (x,)
    return out, *torch.autograd.grad(out.transpose(0, 1), into, upstream(out.transpose(0, 1)))

"""LoRA adapters on every linear layer: PEFT's, in float32, without the tensors of the output's size that it makes.

Legend: T rows, D and E a layer's input and output size, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners import lora
from safetensors import safe_open
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from pe.config import LoraSettings
from pe.method.quantized import EightBitLinear, Kind, LastRows, Rows, fits


def lora_config(settings: LoraSettings, *, exclude: Sequence[str] = ()) -> LoraConfig:
    """PEFT's configuration for adapters on every linear layer but those whose names are excluded."""
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        exclude_modules=list(exclude) or None,
    )


def load_saved(model: PreTrainedModel, folder: Path, adapter: str) -> None:
    """Give a model the adapter that it saved in a folder, as one that goes on training.

    Raises:
        ValueError: an adapter of another model, which PEFT would pass over in part, or one that is not finite.
    """
    file, cure = folder / "adapter_model.safetensors", "; copy the saved embedder again"
    try:
        model.load_adapter(str(folder), adapter_name=adapter, is_trainable=True)
    except RuntimeError as error:
        raise ValueError(f"{file}: expected an adapter of {model.name_or_path}, got another ({error}){cure}") from error
    with safe_open(file, "pt") as saved:
        shapes = {name: list(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    found = {name.removeprefix("base_model.model."): shape for name, shape in shapes.items()}
    # PEFT saves embeddings, too, where it takes a vocabulary for another
    has_embeddings = any("lora_" not in name for name in found)
    loaded = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=has_embeddings)
    expected = {name: list(tensor.shape) for name, tensor in loaded.items()}
    if other := sorted(name for name in found | expected if found.get(name) != expected.get(name)):
        raise ValueError(
            f"{file}: {other[0]}: expected the shape {expected.get(other[0])}, got {found.get(other[0])}{cure}"
        )
    if wrong := [name for name, tensor in loaded.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{file}: {wrong[0]}: expected finite numbers, got others{cure}")


def prepare_adapters(model: nn.Module, adapter: str, *, fused: bool = True) -> None:
    """Hold an adapter's weights in float32, in which small steps are not lost, and with `fused` add it in the products.

    Layers of other kinds than PEFT's plain linear one (Conv1D, quantised) stay as they are.
    """
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            parameter.data = parameter.data.float()
    for layer in model.modules() if fused else ():
        if type(layer) is lora.Linear and type(layer.base_layer) is nn.Linear:
            layer.__class__ = FusedLinear
            own = cast(FusedLinear, layer)
            own.eight_bits = own.shared_rows = None


def quantize_adapted(model: nn.Module, kind: Kind) -> None:
    """Have fused layers take the products of their frozen weights in 8 bits, forward, with gradient to their input."""
    shared = LastRows(kind)
    for layer in model.modules():
        if isinstance(layer, FusedLinear) and fits(base := cast(nn.Linear, layer.base_layer)):
            layer.eight_bits, layer.shared_rows = EightBitLinear.of(base.weight, kind), shared


class FusedLinear(lora.Linear):
    """In place of PEFT's linear layer, x Wᵀ + s (x Aᵀ) Bᵀ, which makes three tensors `[T, E]` besides its output.

    The second product is added to the first as it is taken, in the type of x and W, or autocast's. In evaluation, in
    float32, many rows take one product, x (W + s B A)ᵀ; the merged weight is made for the call, and W never changes.

    Attributes:
        eight_bits: W in 8 bits, which is then what the products are taken with; or None.
        shared_rows: what quantises their inputs, the same for all layers.
    """

    eight_bits: EightBitLinear | None
    shared_rows: LastRows | None

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """x `[..., D]` -> `[..., E]`."""
        if self.merged or self.disable_adapters or len(self.active_adapters) != 1:
            return super().forward(x, *arguments, **options)
        (adapter,), base = self.active_adapters, cast(nn.Linear, self.base_layer)
        down, up = (cast(nn.Linear, part[adapter]).weight for part in (self.lora_A, self.lora_B))
        scale: float = self.scaling[adapter]
        if self._merges(x):
            return F.linear(x, torch.addmm(base.weight, up, down, alpha=scale), base.bias)
        if not self._draws(adapter):
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
            bias = None if base.bias is None else base.bias.to(dtype)
            narrow = None
            if self.eight_bits is not None and self.shared_rows is not None:
                narrow = Narrow(self.shared_rows.of(x), self.eight_bits)
            x, weight, down, up = (each.to(dtype) for each in (x, base.weight, down, up))
            added: Tensor = LowRankSum.apply(x.flatten(0, -2), weight, bias, down, up, scale, narrow)
            return added.unflatten(0, x.shape[:-1])
        return super().forward(x, *arguments, **options)

    def _merges(self, x: Tensor) -> bool:
        """Whether merging is allowed, and pays: it takes about as long as the adapter on D rows.

        Only in float32: in a half type the sum would round the adapter away.
        """
        return (
            self.eight_bits is None
            and not (torch.is_grad_enabled() or self.training)
            and x.dtype == self.base_layer.weight.dtype == torch.float32
            and not torch.is_autocast_enabled(x.device.type)
            and x.shape[:-1].numel() >= x.shape[-1]
        )

    def _draws(self, adapter: str) -> bool:
        """Whether a dropout stands between the products."""
        dropout = self.lora_dropout[adapter]
        return drops(dropout) and dropout.training


def drops(module: nn.Module) -> bool:
    """Whether a module is a dropout that draws random numbers in training."""
    return isinstance(module, nn.Dropout) and module.p > 0


class Narrow(NamedTuple):
    """An input `[T, D]` and a weight `[E, D]` in 8 bits."""

    rows: Rows
    layer: EightBitLinear


class LowRankSum(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ `[T, E]` of x `[T, D]`, A `[r, D]`, B `[E, r]`, and frozen W `[E, D]` and b `[E]` or None.

    All of one type. With x and W in 8 bits the first product is theirs; x then gets the gradient of that W, as if x had
    not been rounded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        narrow: Narrow | None = None,
    ) -> Tensor:
        low = x @ down.T
        ctx.save_for_backward(x, low, weight, down, up)
        ctx.scale, ctx.eight_bits = scale, narrow and narrow.layer
        if narrow is None:
            product = F.linear(x, weight, bias)
        else:
            product = narrow.layer(narrow.rows).to(x.dtype)
            product = product if bias is None else product.add_(bias)
        return product.addmm_(low, up.T, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, down, up = ctx.saved_tensors
        of_low = scaled_product(upstream, up, ctx.scale)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_product = upstream @ weight if ctx.eight_bits is None else ctx.eight_bits.gradient(upstream)
            of_x = of_product.addmm_(of_low, down)
        return of_x, None, None, of_low.T @ x, scaled_product(upstream.T, low, ctx.scale), None, None


def scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """s a b, scaled as it is taken."""
    return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=scale)

"""A decoder's linear layers in 8 bits, for a pass over texts that takes no gradient.

A weight has one scale for each of its rows (an output channel), found once; an activation has one for each of its rows
(a token), found as it comes, so what a token becomes depends on no other token:

    y[t, n] = s_x[t] · s_w[n] · Σ_k q_x[t, k] · q_w[n, k],   q = x / s in 8 bits,   s = max |x| / (largest of the type)

int8 sums in int32, exactly; float8 (e4m3) in float32. Outside `EightBitLinears.acting` the decoder is as it was.

Legend: T rows, K inputs, N outputs.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pe.config import Quantize

Kind = Literal["int8", "float8"]
FLOAT8 = torch.float8_e4m3fn
LARGEST = {"int8": 127.0, "float8": torch.finfo(FLOAT8).max}
"""Of a type, the value that the largest of a row becomes."""
SMALLEST = 1e-30
"""A row of zeros is divided by this."""
CENTRE = 128
"""What a CPU's products want added to an activation, as their unsigned operand."""
CHUNK = 1 << 17
"""Numbers that a CPU quantises at once: they stay in its caches between the passes."""
FEWEST_ROWS = 32
"""Rows that torch's int8 product on a GPU is given at least; it refuses 16."""
MULTIPLE = 16
"""What a GPU's 8-bit products want K and N to be a multiple of."""


def has_eight_bits(kind: Kind, device: torch.device) -> bool:
    """Whether a device has instructions for products of a type that are faster than those of wider ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= ((8, 0) if kind == "int8" else (8, 9))
    vnni = device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()
    return kind == "int8" and vnni


def usable(wanted: Quantize, device: torch.device) -> Quantize:
    """What is wanted, or `none` and a warning where the device cannot do it."""
    if wanted == "none" or has_eight_bits(wanted, device):
        return wanted
    place = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else str(device)
    needs = {"int8": "a CPU with AVX-512 VNNI or a GPU from Ampere on", "float8": "a GPU from Ada or Hopper on"}
    warnings.warn(
        f"backbone.quantize: this device ({place}) has no instructions for {wanted}, which takes {needs[wanted]}; texts"
        " are read unquantised",
        stacklevel=3,
    )
    return "none"


class Rows(NamedTuple):
    """Activations `[T, K]` in 8 bits, and their scales `[T, 1]` float32."""

    values: Tensor
    scale: Tensor


def quantized_rows(x: Tensor, kind: Kind) -> Rows:
    """Rows `[T, K]` in 8 bits: on a CPU int8 is uint8, `CENTRE` added."""
    on_cpu = x.device.type == "cpu"
    narrow = FLOAT8 if kind == "float8" else torch.uint8 if on_cpu else torch.int8
    values = x.new_empty(x.shape, dtype=narrow)
    scale = x.new_empty(len(x), 1, dtype=torch.float32)
    step = max(1, CHUNK // x.shape[1]) if on_cpu else max(1, len(x))
    for first in range(0, len(x), step):
        part = slice(first, first + step)
        _quantize_into(values[part], scale[part], x[part].float(), LARGEST[kind])
    return Rows(values, scale)


def _quantize_into(values: Tensor, scale: Tensor, x: Tensor, largest: float) -> None:
    """Fill values `[T, K]` and scales `[T, 1]` with those of rows `[T, K]` float32."""
    sizes = x.abs()
    scale.copy_(sizes.amax(1, keepdim=True).clamp_min_(SMALLEST).div_(largest))
    scaled = torch.mul(x, scale.reciprocal(), out=sizes)
    if values.dtype == torch.uint8:
        scaled.add_(CENTRE + 0.5)  # the cast cuts off: this rounds, halves upwards
    elif values.dtype == torch.int8:
        scaled.round_()
    values.copy_(scaled)


def product(rows: Rows, values: Tensor, scale: Tensor) -> Tensor:
    """Rows `[T, K]` by 8-bit weights `[K, N]` with scales `[N]`: `[T, N]` float32, on a GPU bfloat16 from float8."""
    on_cpu = rows.values.device.type == "cpu"
    if rows.values.dtype == FLOAT8:
        wide = torch.float32 if on_cpu else torch.bfloat16  # torch's row-wise scales know no other on a GPU
        return torch._scaled_mm(rows.values, values, rows.scale, scale[None], out_dtype=wide)
    if on_cpu:
        zeros = torch.zeros_like(scale, dtype=torch.int32)
        # Scale and centre of the activations, weights with theirs, bias, scale and centre of the output, its type, and
        # no operation behind it
        operands: tuple[Any, ...] = (
            rows.values,
            1.0,
            CENTRE,
            values,
            scale,
            zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        return torch.ops.onednn.qlinear_pointwise(*operands).mul_(rows.scale)
    count = len(rows.values)
    padded = torch.nn.functional.pad(rows.values, (0, 0, 0, max(0, FEWEST_ROWS - count)))
    return torch._int_mm(padded, values)[:count].float().mul_(rows.scale).mul_(scale)


class EightBitLinear(nn.Module):
    """A frozen linear layer's weight in 8 bits.

    Attributes:
        kind: int8 or float8.
        values: `[K, N]`; of int8 on a CPU in the order that its products read, opaque to torch.
        scale: `[N]` float32.
    """

    values: Tensor
    scale: Tensor

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        """Take over values `[N, K]` int8 or float8 and scales `[N]` float32."""
        super().__init__()
        self.kind: Kind = "int8" if values.dtype == torch.int8 else "float8"
        is_packed = self.kind == "int8" and values.device.type == "cpu"
        packed = torch.ops.onednn.qlinear_prepack(values, None) if is_packed else values.t()
        self.register_buffer("values", packed, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, kind: Kind) -> EightBitLinear:
        """A weight `[N, K]` of any type, rounded to the nearest."""
        wide = weight.detach().float()
        scale = wide.abs().amax(1).clamp_min(SMALLEST) / LARGEST[kind]
        scaled = wide / scale[:, None]
        return cls(scaled.to(FLOAT8) if kind == "float8" else scaled.round_().to(torch.int8), scale)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles go by plain tensors: the packed one can be neither."""
        return type(self), (self.plain(), self.scale)

    def plain(self) -> Tensor:
        """The values as `[N, K]`."""
        return self._unpacked().t().contiguous()

    def _unpacked(self) -> Tensor:
        """The values as `[K, N]`."""
        return self.values.to_dense() if self.values.is_mkldnn else self.values

    def gradient(self, upstream: Tensor) -> Tensor:
        """Gradient `[T, K]` of the input, as if that had not been rounded, of the output's `[T, N]`; in its type."""
        scaled = (upstream.float() * self.scale).to(upstream.dtype)
        return scaled @ self._unpacked().t().to(upstream.dtype)

    def forward(self, rows: Rows) -> Tensor:
        """`[T, K]` -> `[T, N]`."""
        return product(rows, self.values, self.scale)


class EightBitLinears(nn.Module):
    """A decoder's linear layers in 8 bits, which stand in for its own while they act."""

    def __init__(self, model: nn.Module, kind: Kind) -> None:
        """Quantise the layers of `model`, which keeps its own.

        Raises:
            ValueError: it has no linear layer that 8-bit products take.
        """
        super().__init__()
        self.kind = kind
        found = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
        self.names = [name for name, module in found.items() if fits(module)]
        if not self.names:
            raise ValueError(
                f"backbone.quantize: expected a decoder with linear layers (torch.nn.Linear) to read in {kind}, got"
                f" {type(model).__name__} without any that fits; use quantize: none"
            )
        self.layers = nn.ModuleList(EightBitLinear.of(found[name].weight, kind) for name in self.names)

    @contextlib.contextmanager
    def acting(self, model: nn.Module, first: int | None = None) -> Iterator[None]:
        """Inside it `model`, the one that was quantised or a copy, runs in 8 bits without gradient.

        Args:
            model: adapters on it do not act in 8 bits; switch them off.
            first: the first so many rows of a sequence alone; None: all.
        """
        shared = LastRows(self.kind)
        linears = [_plain_linear(model.get_submodule(name)) for name in self.names]
        for linear, layer in zip(linears, self.layers, strict=True):
            run = functools.partial(_forward, linear, layer, shared)
            linear.forward = run if first is None else functools.partial(_forward_first, linear, run, first)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for linear in linears:
                del linear.forward


class LastRows:
    """The rows that were quantised last: queries, keys and values are made of the same ones, and gate and up."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self._made: tuple[Tensor, Rows] | None = None

    def of(self, x: Tensor) -> Rows:
        """Those of x `[..., K]`, without gradient."""
        if self._made is None or self._made[0] is not x:
            self._made = x, quantized_rows(x.detach().flatten(0, -2), self.kind)
        return self._made[1]


def _forward(linear: nn.Linear, layer: nn.Module, shared: LastRows, x: Tensor) -> Tensor:
    """x `[..., K]` -> `[..., N]` in the type that the layer itself would give."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    y: Tensor = layer(shared.of(x))
    if linear.bias is not None:
        y = y + linear.bias
    return y.to(dtype).unflatten(0, x.shape[:-1])


def _forward_first(linear: nn.Linear, run: Callable[[Tensor], Tensor], first: int, x: Tensor) -> Tensor:
    """x `[1, L, K]` -> `[1, L, N]`: the first rows in 8 bits, the others as the layer itself has them."""
    return torch.cat([run(x[:, :first]), nn.Linear.forward(linear, x[:, first:])], 1)


def _plain_linear(module: nn.Module) -> nn.Linear:
    """The layer itself, without the adapters that may have been put around it."""
    plain = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    assert isinstance(plain, nn.Linear)
    return plain


def fits(linear: nn.Linear) -> bool:
    """Whether the device's products take a layer of this size."""
    return linear.weight.device.type == "cpu" or not (linear.in_features % MULTIPLE or linear.out_features % MULTIPLE)

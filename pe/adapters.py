"""LoRA adapters on every linear layer: PEFT's, in float32, and merged for a pass without gradient.

Legend: T rows, D and E a layer's input and output size, r rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from pe.config import LoraSettings


def lora_config(settings: LoraSettings) -> LoraConfig:
    """PEFT's configuration for adapters on every linear layer."""
    return LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules="all-linear"
    )


def prepare_adapters(model: nn.Module, adapter: str) -> None:
    """Hold an adapter's weights in float32, in which small steps are not lost, and let its layers merge it.

    Layers of other kinds than PEFT's plain linear one (Conv1D, quantised) stay as they are.
    """
    for name, parameter in model.named_parameters():
        if f".{adapter}." in name:
            parameter.data = parameter.data.float()
    for layer in model.modules():
        if type(layer) is lora.Linear and type(layer.base_layer) is nn.Linear:
            layer.__class__ = MergingLinear


class MergingLinear(lora.Linear):
    """PEFT's linear layer; in evaluation, without gradient, many rows take one product, x (W + s B A)ᵀ.

    That spares the tensors `[T, E]` of x Wᵀ + s (x Aᵀ) Bᵀ. The merged weight is made for the call and W never changes.
    Only in float32: in a half type the sum would round the adapter away.
    """

    def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """x `[..., D]` -> `[..., E]`."""
        if not self._merges(x):
            return super().forward(x, *arguments, **options)
        (adapter,), base = self.active_adapters, cast(nn.Linear, self.base_layer)
        down, up = (cast(nn.Linear, part[adapter]).weight for part in (self.lora_A, self.lora_B))
        return F.linear(x, torch.addmm(base.weight, up, down, alpha=self.scaling[adapter]), base.bias)

    def _merges(self, x: Tensor) -> bool:
        """Whether merging is allowed, and pays: it takes about as long as the adapter on D rows."""
        return (
            not (torch.is_grad_enabled() or self.training or self.disable_adapters or self.merged)
            and x.dtype == self.base_layer.weight.dtype == torch.float32
            and not torch.is_autocast_enabled(x.device.type)
            and x.shape[:-1].numel() >= x.shape[-1]
            and len(self.active_adapters) == 1
        )

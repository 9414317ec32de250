"""A decoder's layers: where they stand, and a decoder of the first few."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def stacked_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """A decoder's layers, first to last; None where they do not stand in one list."""
    count = model.config.get_text_config().num_hidden_layers
    stacks = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return next(stacks, None)


def keep_first_layers(model: PreTrainedModel, count: int, name: str) -> None:
    """Leave a decoder its first `count` layers, and its final norm behind them; the others' memory is free.

    Its configuration says so, too: to all that comes after, it is a smaller model.

    Raises:
        ValueError: it has fewer, or they do not stand in one list; `name` is what the message calls it.
    """
    config, layers = model.config.get_text_config(), stacked_layers(model)
    if layers is None:
        raise ValueError(f"backbone.layers: expected null for {name}, whose layers do not stand in one list")
    if count > len(layers):
        raise ValueError(f"backbone.layers: expected 1 to {len(layers)}, the layers of {name}, got {count}")
    del layers[count:]
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = kinds[:count]
    config.num_hidden_layers = count

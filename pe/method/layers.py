"""A decoder's layers: where they stand, a decoder of the first few, and a way around the lowest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from pe.method.attention import AttentionPlan


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


def entering(arguments: Sequence[Any], options: Mapping[str, Any]) -> Tensor:
    """The states that enter a layer, of what it is called with."""
    states: Tensor = arguments[0] if arguments else options["hidden_states"]
    return states


def let_pass_below(model: PreTrainedModel, entry: int, name: str) -> None:
    """Have rows behind texts pass by a decoder's first `entry` layers, as `KeyValues.first` of the texts says.

    Raises:
        ValueError: it has not more layers, or they do not stand in one list; `name` is what the message calls it.
    """
    layers = stacked_layers(model)
    if layers is None:
        raise ValueError(f"backbone.entry_layer: expected 0 for {name}, whose layers do not stand in one list")
    if entry >= len(layers):
        raise ValueError(
            f"backbone.entry_layer: expected 0 to {len(layers) - 1}, below the last layer of {name}, got {entry}"
        )
    for place, layer in enumerate(layers[:entry]):
        layer.__class__ = passed_by(type(layer))
        own = cast(PassedBy, layer)
        own.place, own.gives_tuple = place, False


class PassedBy(nn.Module):
    """A layer that gives rows behind texts as they came where these enter above it.

    Attributes:
        place: its number from below.
        gives_tuple: whether what it returns stands in a tuple, as it last did.
    """

    place: int
    gives_tuple: bool

    def forward(self, *arguments: Any, **options: Any) -> Any:
        plan: AttentionPlan | None = options.get("plan")
        if plan is None or plan.context is None or plan.context.first <= self.place:
            output = super().forward(*arguments, **options)
            self.gives_tuple = isinstance(output, tuple)
            return output
        states = entering(arguments, options)
        return (states,) if self.gives_tuple else states


def passed_by(kind: type[nn.Module]) -> type[nn.Module]:
    """A kind of layer that is passed by; under its name, by which transformers knows what a layer returns."""
    return type(kind.__name__, (PassedBy, kind), {})

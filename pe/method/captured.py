"""A training step's small passes by CUDA graphs: writing instructions' prompts, and the soft tokens behind the texts.

Shapes that vary are rounded up, so that few of them are recorded: requests are padded on the left, and the texts' keys
and values are copied to where there is room for the longest so far.

Legend: B texts, T tokens of all texts, K soft tokens, D the backbone's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from pe.method.attention import AttentionPlan, KeyValues
from pe.method.backbone import Backbone
from pe.method.graphs import Graphs, Record, recorder
from pe.method.packing import DeviceSegments, Segments
from pe.method.prompting import PromptingLLM, SoftPrompts, left_padded

MULTIPLE = 16
"""Requests are padded to a multiple of so many tokens."""


def rounded_up(count: int) -> int:
    """The smallest of 64, 96, 128, 192, 256, ... that is not less than `count`."""
    size = 64
    while size < count:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return size


class Contexts:
    """Keys and values of a batch's texts, in buffers that stay where they are until they are too small."""

    def __init__(self) -> None:
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._first = 0
        self._offsets: dict[int, Tensor] = {}

    def put(self, texts: KeyValues) -> bool:
        """Copy them in; whether the buffers are new ones."""
        (keys, _), is_new = texts.layers[0], False
        total, self._first = len(keys), texts.first
        if not self._layers or len(self._layers[0][0]) < total or self._layers[0][0].dtype != keys.dtype:
            self._layers, is_new = [], True
            size = rounded_up(total)
            self._layers = [(k.new_zeros(size, *k.shape[1:]), v.new_zeros(size, *v.shape[1:])) for k, v in texts.layers]
        places = [place[:total] for pair in self._layers for place in pair]
        torch._foreach_copy_(places, [x for pair in texts.layers for x in pair])
        offsets = texts.segments.cu_seqlens
        self._offsets.setdefault(len(offsets), torch.empty_like(offsets)).copy_(offsets)
        return is_new

    def texts(self, count: int, longest: int) -> KeyValues:
        """The buffers as keys and values of `count` texts, none longer than `longest`."""
        most = count * longest
        segments = DeviceSegments(self._offsets[count + 1], longest)
        return KeyValues([(k[:most], v[:most]) for k, v in self._layers], segments, first=self._first)


class Captured:
    """The small passes of an embedder in the suffix layout."""

    def __init__(self, prompter: PromptingLLM | None, backbone: Backbone, record: Record | None = None) -> None:
        """Record nothing yet.

        Args:
            prompter: the prompting LLM, if one writes the prompts.
            backbone: the frozen decoder.
            record: by default CUDA graphs, one memory pool for each pass.
        """
        self.prompter, self.backbone, self.contexts = prompter, backbone, Contexts()
        writing = [p for p in prompter.parameters() if p.requires_grad] if prompter else []
        place = writing[0].device if writing else backbone.device
        self._prompts = Graphs(writing, record or recorder(place))
        reading = [p for p in backbone.reader_parameters() if p.requires_grad]
        self._states = Graphs(reading, record or recorder(backbone.device))

    @property
    def is_possible(self) -> bool:
        """Whether no pass had to be given up, for waiting for the device."""
        return self._prompts.is_possible and self._states.is_possible

    def prompts(self, requests: Sequence[Sequence[int]]) -> SoftPrompts:
        """As the prompting LLM writes them; by itself where it reads values of its mask."""
        prompter = self.prompter
        assert prompter is not None
        if not self._prompts.is_possible:
            return cast(SoftPrompts, prompter(requests))
        count = prompter.config.soft_tokens
        ids, pads, positions = left_padded(requests, prompter.device, MULTIPLE)
        mask = prompter.mask(pads, ids.shape[1], count)
        if mask.ndim != 4:
            return cast(SoftPrompts, prompter(requests))

        def write(ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            return prompter.write(ids, mask, positions, count)

        return SoftPrompts(*self._prompts(count, write, (ids, mask, positions)))

    def states(self, rows: Tensor, segments: Segments, texts: KeyValues) -> Tensor:
        """States `[B·K, D]` of K rows behind each of the texts."""
        is_trained = rows.requires_grad or self._states.parameters
        # A batch that waits for its backward pass needs its own texts
        if self._states.is_busy or not (self._states.is_possible and is_trained):
            return cast(Tensor, self.backbone(rows, segments, context=texts)[0])
        positions = self.backbone.positions(segments, texts.lengths)
        if self.contexts.put(texts):
            self._states.clear()
        longest = rounded_up(texts.segments.longest)
        backbone, plan = self.backbone, AttentionPlan(segments, self.contexts.texts(len(segments), longest))

        def decode(rows: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
            return (backbone.decode(rows, positions, plan),)

        return self._states((len(segments), longest), decode, (rows, positions))[0]

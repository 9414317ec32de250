"""The text pass of the next batch beside the training step of this one.

In the suffix layout that pass depends on no weight that trains, so it need not wait for the step before. On a GPU it
gets a stream of its own: it is bound by arithmetic, the step's small passes by the time that each of their kernels
takes to start and end.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

from pe.method.prompted import PromptedEmbedder
from pe.method.requests import Requests, Texts


class ReadAhead:
    """Holds the texts of one batch, read or being read."""

    def __init__(self, model: PromptedEmbedder, autocast: Callable[[], AbstractContextManager[object]]) -> None:
        """`autocast`: a new context of the step's precision."""
        self.model, self.autocast = model, autocast
        self._next: tuple[Requests, Texts] | None = None
        self._stream: torch.cuda.Stream | None = None
        if model.device.type == "cuda":
            self._stream = torch.cuda.Stream(model.device)
            self._stream.wait_stream(torch.cuda.current_stream(model.device))  # the weights are on their way

    def start(self, requests: Requests) -> None:
        """Begin to read the texts of a batch, in place of one that was not taken."""
        self._next = None
        with torch.cuda.stream(self._stream), self.autocast():
            self._next = requests, self.model.read_texts(requests)

    def take(self, requests: Requests) -> Texts:
        """The texts of this batch, read now unless they were begun; what follows on this stream finds them whole."""
        if self._next is None or self._next[0] != requests:
            self.start(requests)
        assert self._next is not None
        texts, self._next = self._next[1], None
        if self._stream is not None:
            here = torch.cuda.current_stream(self.model.device)
            here.wait_stream(self._stream)
            for tensor in texts.tensors():
                tensor.record_stream(here)
        return texts

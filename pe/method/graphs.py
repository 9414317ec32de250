"""CUDA graphs of small passes that train: what a GPU does in milliseconds, Python launches in hundreds of them.

A pass is recorded once for every shape, forward and backward, and replayed from then on. It reads its inputs from where
they were copied to, and writes the gradients of its parameters to one buffer each, which becomes their `grad`.
Gradients are those of the recorded operations, in the same order: nothing is approximated.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

Pass = Callable[..., tuple[Tensor, ...]]
Work = Callable[[], None]
Record = Callable[[Work], Work]
"""Turns work on tensors that stay where they are into what repeats it."""
SYNC = "synchroniz"
"""What torch says of an operation that waits for the device, where it is told to refuse one."""
MOST, TOO_MANY = 64, 256
"""Recorded shapes of one pass, of which the least recently used makes room, and recordings after which none pays."""
WARM_UPS = 3
FIRST = -1
"""Priority of recorded kernels: before those of texts that are read at the same time; all others have the lowest."""


def recorder(device: torch.device) -> Record:
    """Records CUDA graphs that share one memory pool: of two of them, one at a time may wait for its backward pass."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device, priority=FIRST)

    def record(work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, stream=stream):
            work()
        return graph.replay

    return record


@contextlib.contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """On a GPU run on a stream of its own, between what was launched before and what comes after."""
    if device.type != "cuda":
        yield
        return
    here, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(here)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        here.wait_stream(side)


class NotRecordedError(RuntimeError):
    """A pass that waits for the device on its way cannot be recorded; one that comes in too many shapes should not."""


@contextlib.contextmanager
def refusing_to_wait(device: torch.device) -> Iterator[None]:
    """Raise NotRecordedError where something would wait for a GPU."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if SYNC in str(error):
            raise NotRecordedError(str(error).splitlines()[0]) from error
        raise
    finally:
        torch.cuda.set_sync_debug_mode(before)


class PendingBackward:
    """A token of a forward pass whose backward pass is still to come; autograd holds it until then."""


class Graph:
    """One pass at one shape."""

    def __init__(
        self,
        function: Pass,
        inputs: Sequence[Tensor],
        parameters: Sequence[nn.Parameter],
        gradients: Sequence[Tensor],
        record: Record,
    ) -> None:
        """Record `function`, after it has run a few times, so that all kernels are compiled and chosen.

        Args:
            function: of tensors shaped like `inputs`, to tensors that require grad; no host sync, no host tensors.
            inputs: example inputs; those that require grad get one.
            parameters: what trains in it.
            gradients: a buffer for each parameter's.
            record: see `recorder`.

        Raises:
            NotRecordedError: the function waits for the device, as a mixture of experts does that counts its tokens.
        """
        self.function, self.parameters, self.gradients = function, parameters, gradients
        self.inputs = [x.detach().clone().requires_grad_(x.requires_grad) for x in inputs]
        self.outputs: tuple[Tensor, ...] = ()
        self.upstream: list[Tensor] = []
        self.input_gradients: dict[int, Tensor] = {}
        self.is_used: list[bool] = []
        self._leave_buffers()
        device = self.inputs[0].device
        with aside(device):
            for number in range(WARM_UPS):
                is_last = number == WARM_UPS - 1
                with refusing_to_wait(device) if is_last else contextlib.nullcontext():
                    self._forward()
                    self.upstream = list(map(torch.zeros_like, self.outputs))
                    self._backward()
        self.outputs, self.input_gradients = (), {}
        self.replay_forward = record(self._forward)
        self.replay_backward = record(self._backward)
        self.outputs = tuple(map(Tensor.detach, self.outputs))  # autograd's nodes have done their part

    def _leave_buffers(self) -> None:
        """Where a buffer still is its parameter's `grad`, that gradient moves out before it is overwritten."""
        for parameter, buffer in zip(self.parameters, self.gradients, strict=True):
            if parameter.grad is not None and parameter.grad.data_ptr() == buffer.data_ptr():
                parameter.grad = parameter.grad.clone()

    def _forward(self) -> None:
        torch.clear_autocast_cache()  # weights are cast inside the recording
        with torch.enable_grad():
            self.outputs = self.function(*self.inputs)
        torch.clear_autocast_cache()  # and the casts stay there

    def _backward(self) -> None:
        places = [place for place, x in enumerate(self.inputs) if x.requires_grad]
        wanted = [*(self.inputs[place] for place in places), *self.parameters]
        with torch.autocast(self.inputs[0].device.type, enabled=False):  # as where backward is called
            found = torch.autograd.grad(self.outputs, wanted, self.upstream, allow_unused=True)
        self.input_gradients = {place: x for place, x in zip(places, found, strict=False) if x is not None}
        own = found[len(places) :]
        self.is_used = [x is not None for x in own]
        pairs = [(buffer, x) for buffer, x in zip(self.gradients, own, strict=True) if x is not None]
        if pairs:
            torch._foreach_copy_([buffer for buffer, _ in pairs], [x for _, x in pairs])

    def run_forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for place, x in zip(self.inputs, inputs, strict=True):
                place.copy_(x)
        self.replay_forward()
        return tuple(x.detach().clone() for x in self.outputs)

    def run_backward(self, upstream: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the inputs, and of the parameters as their buffers: good until the next backward pass."""
        self._leave_buffers()
        for place, x in zip(self.upstream, upstream, strict=True):
            place.copy_(x)
        self.replay_backward()
        own = [self.input_gradients.get(place) for place in range(len(self.inputs))]
        parameters = (x.detach() if used else None for x, used in zip(self.gradients, self.is_used, strict=True))
        return [*(None if x is None else x.detach().clone() for x in own), *parameters]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: Graph, pending: PendingBackward, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.graph, ctx.pending = graph, pending
        return graph.run_forward(tensors[: len(graph.inputs)])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        graph: Graph = ctx.graph  # type: ignore[attr-defined]
        if ctx.pending is None:  # type: ignore[attr-defined]
            raise RuntimeError("a recorded pass: expected one backward pass, got a second; use_graphs(False) allows it")
        gradients = graph.run_backward(upstream)
        ctx.pending = None  # type: ignore[attr-defined]
        return None, None, *gradients


class Graphs:
    """The recorded shapes of one pass.

    A call while another's backward pass is still to come runs as it is, without a graph: it would overwrite what that
    one needs.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], record: Record) -> None:
        """`parameters`: what trains in the pass, in their places for as long as the graphs are used."""
        self.parameters, self.record = list(parameters), record
        self._gradients = [torch.zeros_like(p) for p in self.parameters]
        self._graphs: dict[Hashable, Graph] = {}
        self._pending: weakref.ref[PendingBackward] | None = None
        self._recordings = 0
        self.is_possible = True

    @property
    def is_busy(self) -> bool:
        return self._pending is not None and self._pending() is not None

    def clear(self) -> None:
        """Forget all recordings, where tensors that they read have moved."""
        self._graphs.clear()

    def __call__(self, key: Hashable, function: Pass, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run `function(*inputs)` by the graph of `key`, the inputs' shapes and types, and autocast's type.

        A function that waits for the device, or comes in ever new shapes, runs without graphs from then on, with a
        warning.
        """
        if self.is_busy or not self.is_possible:
            return function(*inputs)
        device = inputs[0].device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = (key, dtype, *((x.shape, x.dtype, x.requires_grad) for x in inputs))
        graph = self._graphs.pop(key, None)
        if graph is None:
            if len(self._graphs) >= MOST:
                self._graphs.pop(next(iter(self._graphs)))
            self._recordings += 1
            try:
                if self._recordings > TOO_MANY:
                    raise NotRecordedError(f"it came in {TOO_MANY} shapes")
                graph = Graph(function, inputs, self.parameters, self._gradients, self.record)
            except NotRecordedError as error:
                self.is_possible = False
                self.clear()
                warnings.warn(f"no CUDA graphs of a pass any more, it is launched instead: {error}", stacklevel=2)
                return function(*inputs)
        self._graphs[key] = graph
        pending = PendingBackward()
        self._pending = weakref.ref(pending)
        replayed: tuple[Tensor, ...] = _Replay.apply(graph, pending, *inputs, *self.parameters)
        return replayed

"""What memory is measured with: samplers of the process and of the GPU, torch's peaks, and every live tensor's bytes.

A training step tells a `Phases` what it is doing, so each meter knows which phase its figures belong to.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import resource
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from pe.runs.extras import MissingPackage, extra

INTERVAL = 0.002
MIB = 2**20
LOADED = "loaded"
FROZEN, TRAINABLE = "frozen weights", "trainable weights"
GRADIENTS, OPTIMISER = "gradients", "optimiser state"
KEY_VALUES, ACTIVATIONS, WORKSPACE = "keys and values", "saved activations", "workspace"
CATEGORIES = (FROZEN, TRAINABLE, OPTIMISER, GRADIENTS, KEY_VALUES, ACTIVATIONS, WORKSPACE)


class Phases:
    """What a training step is doing.

    Attributes:
        now: the phase.
        listeners: called with the next phase when it begins, while `now` is still the last one.
    """

    def __init__(self) -> None:
        self.now = LOADED
        self.listeners: list[Callable[[str], None]] = []

    def enter(self, name: str) -> None:
        for listener in self.listeners:
            listener(name)
        self.now = name


# Sampling.


class Reading(NamedTuple):
    """Bytes in use, and who says so: `rss`, `nvml` or `cuda`."""

    source: str
    bytes: Callable[[], int]


class Sampler(threading.Thread):
    """The highest value of `read` while it runs, asked every `interval` seconds.

    Attributes:
        highest: so far.
        peaks: the same in each phase of `phases`.
        longest_gap: seconds between two samples at most: what is shorter may have been missed.
    """

    def __init__(self, read: Callable[[], int], interval: float = INTERVAL, phases: Phases | None = None) -> None:
        super().__init__(daemon=True)
        self.read, self.interval, self.phases = read, interval, phases or Phases()
        self.peaks: dict[str, int] = {}
        self.samples, self.longest_gap = 0, 0.0
        self._ended = threading.Event()
        self._take()

    @property
    def highest(self) -> int:
        return max(self.peaks.values())

    def _take(self) -> None:
        phase, value = self.phases.now, self.read()
        self.peaks[phase] = max(self.peaks.get(phase, 0), value)
        self.samples += 1

    def run(self) -> None:
        last = time.perf_counter()
        while not self._ended.wait(self.interval):
            self._take()
            now = time.perf_counter()
            last, self.longest_gap = now, max(self.longest_gap, now - last)

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def resident() -> Reading:
    """Resident bytes of this process (RSS)."""
    process = extra("psutil", "bench").Process()
    return Reading("rss", lambda: int(process.memory_info().rss))


def highest_resident() -> int:
    """The operating system's own peak of the process, in bytes (Linux gives KiB, macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def give_back_freed() -> None:
    """Return freed pages to the system, so that what stands is what is in use."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)


def _nvml(device: torch.device) -> tuple[ModuleType, Any] | None:
    """NVML, and its handle of the GPU, found by UUID: CUDA's order of devices is not NVML's; None where it has none."""
    try:
        pynvml = extra("pynvml", "bench")
    except MissingPackage:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None


def device_used(device: torch.device) -> Reading:
    """Used bytes of the whole GPU, with what the driver holds: by NVML, or by CUDA where NVML does not run."""
    if nvml := _nvml(device):
        pynvml, handle = nvml
        return Reading("nvml", lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used))

    def used() -> int:
        free, total = torch.cuda.mem_get_info(device)
        return total - free

    return Reading("cuda", used)


def driver_reserved(device: torch.device) -> int | None:
    """Bytes that the driver keeps for itself; None where NVML does not tell them apart."""
    nvml = _nvml(device)
    if nvml is None or not hasattr(nvml[0], "nvmlMemory_v2"):
        return None
    pynvml, handle = nvml
    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).reserved)
    except pynvml.NVMLError:
        return None


def process_used(device: torch.device) -> int | None:
    """Bytes of the GPU that NVML assigns to this process; None where it does not say, as in many containers."""
    nvml = _nvml(device)
    if nvml is None:
        return None
    pynvml, handle = nvml
    used = {item.pid: item.usedGpuMemory for item in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)}
    found = used.get(os.getpid())
    return None if found is None else int(found)


class AllocatorPeaks:
    """Peaks of torch's CUDA allocator in each phase: of tensors (`allocated`), and with its cache (`reserved`)."""

    def __init__(self, device: torch.device, phases: Phases) -> None:
        self.device, self.phases = device, phases
        self.allocated: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        torch.cuda.reset_peak_memory_stats(device)
        phases.listeners.append(self.note)

    def note(self, _next: str = "") -> None:
        """Book the peaks since the last call to the phase that ends."""
        torch.cuda.synchronize(self.device)
        for peaks, read in (
            (self.allocated, torch.cuda.max_memory_allocated),
            (self.reserved, torch.cuda.max_memory_reserved),
        ):
            peaks[self.phases.now] = max(peaks.get(self.phases.now, 0), read(self.device))
        torch.cuda.reset_peak_memory_stats(self.device)


# Live tensors.


@dataclass(slots=True)
class _Piece:
    """The storage of one or more tensors: its bytes, and its life in seconds since the meter started."""

    size: int
    born: float
    died: float = float("inf")
    category: str = WORKSPACE


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of the live tensors over one training step.

    Attributes:
        times: seconds since the step began.
        bytes: of each category, at each time.
        phases: the phases and when they began.
    """

    times: list[float]
    bytes: dict[str, list[int]]
    phases: list[tuple[str, float]]

    @property
    def totals(self) -> list[int]:
        return [sum(values) for values in zip(*self.bytes.values(), strict=True)]

    @property
    def peak(self) -> int:
        return max(self.totals)

    @property
    def at_peak(self) -> dict[str, int]:
        """Bytes of each category when the sum is highest."""
        totals = self.totals
        place = totals.index(max(totals))
        return {name: values[place] for name, values in self.bytes.items()}

    @property
    def loaded(self) -> int:
        """Bytes of the model alone."""
        return self.bytes[FROZEN][0] + self.bytes[TRAINABLE][0]

    @property
    def above(self) -> int:
        """The peak above the loaded model: optimiser state, gradients and all that a step makes."""
        return self.peak - self.loaded

    def peak_in(self, phase: str) -> int:
        """The highest sum while `phase` ran."""
        ends = [begin for _, begin in self.phases[1:]] + [float("inf")]
        spans = [(begin, end) for (name, begin), end in zip(self.phases, ends, strict=True) if name == phase]
        pairs = zip(self.times, self.totals, strict=True)
        return max((total for when, total in pairs if any(a <= when < b for a, b in spans)), default=0)

    def thinned(self, points: int) -> Footprint:
        """The same with about `points` times: of each stretch the moment with the highest sum."""
        totals, count = self.totals, len(self.times)
        edges = [count * n // points for n in range(points + 1)] if count > points else list(range(count + 1))
        kept = [max(range(a, b), key=totals.__getitem__) for a, b in itertools.pairwise(edges)]
        return Footprint(
            times=[self.times[i] for i in kept],
            bytes={name: [values[i] for i in kept] for name, values in self.bytes.items()},
            phases=self.phases,
        )


class LiveTensors(TorchDispatchMode):
    """Counts the storages that torch's operations make and free while it is entered, by what they are for.

    A storage is counted once however many tensors view it, from the operation that returns it until nothing refers to
    it. What `save` sees, or is alive when a backward pass begins, is saved activations; what is a parameter's `grad`
    before the optimiser's step is gradients; all else is workspace. Buffers inside one operation are not seen.
    """

    def __init__(
        self, known: Mapping[str, Iterable[Tensor]], parameters: Sequence[nn.Parameter], phases: Phases
    ) -> None:
        """
        Args:
            known: tensors that stand before, by category.
            parameters: whose gradients count as such.
            phases: of the step that runs.
        """
        super().__init__()
        self.parameters = parameters
        self.pieces: list[_Piece] = []
        self.alive: dict[int, _Piece] = {}
        self.begun: list[tuple[str, float]] = []
        self.start = time.perf_counter()
        for category, tensors in known.items():
            self.mark(category, tensors)
        for piece in self.pieces:
            piece.born = 0.0
        phases.listeners.append(self._begin)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for item in tree_iter(output):
            if isinstance(item, Tensor):
                self._note(item)
        return output

    def mark(self, category: str, tensors: Iterable[Tensor]) -> None:
        """Say what these tensors are for, from their first moment on."""
        for tensor in tensors:
            self._note(tensor).category = category

    def save(self, tensor: Tensor) -> Tensor:
        """For `torch.autograd.graph.saved_tensors_hooks`: what autograd keeps of this step is saved activations."""
        piece = self._note(tensor)
        if piece.category == WORKSPACE:
            piece.category = ACTIVATIONS
        return tensor.detach()  # the tensor itself would keep its own graph alive

    def footprint(self) -> Footprint:
        """What was counted so far."""
        changes = [(piece.born, piece.size, piece.category) for piece in self.pieces]
        changes += [(piece.died, -piece.size, piece.category) for piece in self.pieces if piece.died < float("inf")]
        changes += [(when, 0, WORKSPACE) for _, when in self.begun]
        now, times = dict.fromkeys(CATEGORIES, 0), list[float]()
        series: dict[str, list[int]] = {name: [] for name in CATEGORIES}
        for when, size, category in sorted(changes, key=lambda change: change[0]):
            now[category] += size
            if times and times[-1] == when:
                for name in CATEGORIES:
                    series[name][-1] = now[name]
                continue
            times.append(when)
            for name in CATEGORIES:
                series[name].append(now[name])
        return Footprint(times=times, bytes=series, phases=self.begun)

    def _seconds(self) -> float:
        return time.perf_counter() - self.start

    def _note(self, tensor: Tensor) -> _Piece:
        held: Tensor | torch.UntypedStorage
        if tensor.is_mkldnn:  # packed weights, which show no storage
            held, key, size = tensor, id(tensor), tensor.numel() * tensor.element_size()
        else:
            held = tensor.untyped_storage()
            key, size = held._cdata, held.nbytes()
        if key not in self.alive:
            self.alive[key] = _Piece(size, self._seconds())
            self.pieces.append(self.alive[key])
            weakref.finalize(held, self._gone, key).atexit = False
        return self.alive[key]

    def _gone(self, key: int) -> None:
        self.alive.pop(key).died = self._seconds()

    def _begin(self, phase: str) -> None:
        if phase == "backward":
            for piece in self.alive.values():
                if piece.category == WORKSPACE:
                    piece.category = ACTIVATIONS
        if phase == "optimiser":
            self.mark(GRADIENTS, [p.grad for p in self.parameters if p.grad is not None])
        self.begun.append((phase, self._seconds()))

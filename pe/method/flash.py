"""Variable-length flash attention of half-precision CUDA rows: of the flash-attn packages where they are, else torch's.

All compute the same: causal from each text's end, fewer key/value heads than query heads. torch can put another
implementation under its own function for the whole process (`torch.nn.attention.activate_flash_attention_impl`), for
which it loads the same packages; where a program has done so, torch's function is taken, and that choice stands.

Legend: T tokens of a row, H heads, G key/value heads, D head size, B texts.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.attention
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.nn.attention import varlen

TORCH, FLASH_2, FLASH_3 = "torch", "flash-attn 2", "flash-attn 3"
PACKAGES = {FLASH_3: "flash_attn_interface", FLASH_2: "flash_attn"}
"""Each package and what it is imported as, best first."""
LARGEST_HEAD = 256
GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
)
"""How torch's variable-length attention is told of grouped heads: by an option, or (2.11) not at all."""


class Attend(Protocol):
    """Attention of q `[T, H, D]` to k, v `[T', G, D]`, causal from each text's end -> `[T, H, D]`.

    Text b has the queries `cu_q[b]` to `cu_q[b + 1]`, `longest_q` at most, and likewise keys; offsets are int32.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        longest_q: int,
        longest_k: int,
        *,
        scale: float | None,
    ) -> Tensor: ...


@dataclass(frozen=True)
class Flash:
    """An implementation and what it is called."""

    name: str
    attend: Attend


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, *, scale: float | None
) -> Tensor:
    """torch's own; see `Attend`."""
    attended = varlen.varlen_attn(
        q, k, v, cu_q, cu_k, longest_q, longest_k, scale=scale, window_size=(-1, 0), **GROUPED
    )  # fmt: skip
    return cast(Tensor, attended)


def package_attention(name: str) -> Attend:
    """A package's; see `Attend`.

    Raises:
        ModuleNotFoundError: it is not installed.
        ImportError: it cannot be loaded, as where it was built for another torch.
    """
    module = importlib.import_module(PACKAGES[name])
    if not hasattr(module, "flash_attn_varlen_func"):  # flash-attn 4 is a part of the second one's module
        raise ModuleNotFoundError(f"{module.__name__} has no flash_attn_varlen_func", name=PACKAGES[name])
    function: Callable[..., Tensor | tuple[Tensor, ...]] = module.flash_attn_varlen_func

    def attend(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        longest_q: int,
        longest_k: int,
        *,
        scale: float | None,
    ) -> Tensor:
        attended = function(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            max_seqlen_q=longest_q,
            max_seqlen_k=longest_k,
            softmax_scale=scale,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return attended[0] if isinstance(attended, tuple) else attended  # early ones give the log-sum-exp as well

    return attend


def torch_switched_to() -> str | None:
    """What the program has put under torch's own function; None: nothing, or (2.11) there is no such switch."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current() if current else None


def packages_for(device: torch.device) -> list[str]:
    """The packages that have kernels for a device, best first."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return []
    generation, _ = torch.cuda.get_device_capability(device)
    is_hopper = generation == 9 and torch.version.hip is None
    return [*([FLASH_3] if is_hopper else []), *([FLASH_2] if generation >= 8 else [])]


@functools.cache
def chosen(device: torch.device) -> Flash:
    """What runs on a device; looked for once."""
    for name in packages_for(device) if torch_switched_to() is None else ():
        try:
            return Flash(name, package_attention(name))
        except ImportError as error:
            if not isinstance(error, ModuleNotFoundError) or error.name != PACKAGES[name]:
                warnings.warn(f"{name} is installed but cannot be loaded, so it is not used: {error}", stacklevel=2)
    return Flash(TORCH, torch_attention)


def flash_name(device: torch.device) -> str:
    """What half-precision rows on a device go through: `flash-attn 3`, `flash-attn 2`, `torch` or `torch, FA3`."""
    name, switched = chosen(device).name, torch_switched_to()
    return f"{name}, {switched}" if name == TORCH and switched else name


def is_for_packages(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the packages take these rows: half precision, one head size in steps of 8, and data behind the shapes."""
    sizes, types = {x.shape[-1] for x in (q, k, v)}, {x.dtype for x in (q, k, v)}
    is_half = len(types) == 1 and types <= {torch.float16, torch.bfloat16}
    size = max(sizes)
    return is_half and len(sizes) == 1 and size % 8 == 0 and size <= LARGEST_HEAD and not is_fake(q)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest_q: int, longest_k: int, *, scale: float | None
) -> Tensor:
    """Flash attention by what `chosen` finds, by torch's own where that does not take these rows; see `Attend`."""
    attend = chosen(q.device).attend if is_for_packages(q, k, v) else torch_attention
    return attend(q, k, v, cu_q, cu_k, longest_q, longest_k, scale=scale)

"""Flash attention by packages that are not here: what they are given, when they are taken, and that it can be seen."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pe.kernels.context_attention_torch import context_attention_ref
from pe.method import flash
from pe.method.attention import causal_attention
from pe.method.flash import (
    FLASH_2,
    FLASH_3,
    PACKAGES,
    TORCH,
    chosen,
    flash_attention,
    flash_name,
    package_attention,
    packages_for,
    torch_attention,
)
from pe.method.packing import Segments
from pe.method.probes import UnsupportedBackbone
from tests.embedders import backbone

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
Q_LENGTHS, K_LENGTHS = (3, 1, 5), (4, 1, 9)


def attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float | None) -> Tensor:
    """Causal from each text's end, one text at a time, grouped heads repeated."""
    parts = []
    for text in range(len(cu_q) - 1):
        rows, keys = slice(*cu_q[text : text + 2].tolist()), slice(*cu_k[text : text + 2].tolist())
        n, m = rows.stop - rows.start, keys.stop - keys.start
        sees = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        heads = (x.transpose(0, 1) for x in (q[rows], k[keys], v[keys]))
        out = torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=sees, enable_gqa=True, scale=scale)
        parts.append(out.transpose(0, 1))
    return torch.cat(parts)


class Package(ModuleType):
    """A flash-attn package as it is called, that notes its arguments and computes on the CPU."""

    def __init__(self, name: str, *, gives_tuple: bool = False) -> None:
        super().__init__(name)
        self.calls: list[dict[str, Any]] = []
        self.gives_tuple = gives_tuple

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *in_between: object,
        softmax_scale: float | None = None,
        causal: bool = False,
        deterministic: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert not in_between, "the fifth option behind the lengths is another in each package"
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal")
        given = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
        self.calls.append(dict(zip(names, given, strict=True)) | {"deterministic": deterministic})
        out = attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
        return (out, out) if self.gives_tuple else out


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    chosen.cache_clear()
    yield
    chosen.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`machine(capability, *packages)`: a GPU of that capability and the packages installed."""

    def of(capability: tuple[int, int], *names: str) -> dict[str, Package]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        installed = {name: Package(PACKAGES[name]) for name in names}
        for name, module in PACKAGES.items():
            monkeypatch.setitem(sys.modules, module, installed.get(name))
        return installed

    return of


@pytest.fixture
def torch_calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What torch's own function is given; it computes on the CPU."""
    calls: list[dict[str, Any]] = []

    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
    ) -> Tensor:
        calls.append({"cu_q": cu_q, "cu_k": cu_k, "max_q": max_q, "max_k": max_k, **options})
        return attend(q, k, v, cu_q, cu_k, options["scale"])

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    return calls


def rows(size: int = 16, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """Four query heads over two key/value heads."""
    return (
        torch.randn(sum(Q_LENGTHS), 4, size, dtype=dtype),
        torch.randn(sum(K_LENGTHS), 2, size, dtype=dtype),
        torch.randn(sum(K_LENGTHS), 2, size, dtype=dtype),
    )


def lengths() -> tuple[Tensor, Tensor, int, int]:
    q, k = Segments(Q_LENGTHS, CPU), Segments(K_LENGTHS, CPU)
    return q.cu_seqlens, k.cu_seqlens, q.longest, k.longest


def on_cpu_as_on(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the CPU take what would be chosen on `device`."""
    choice = chosen(device)
    monkeypatch.setattr(flash, "chosen", lambda device: choice)


@pytest.mark.parametrize(
    ("capability", "installed", "name"),
    [
        ((9, 0), (FLASH_3, FLASH_2), FLASH_3),
        ((9, 0), (FLASH_2,), FLASH_2),
        ((9, 0), (), TORCH),
        ((8, 0), (FLASH_3, FLASH_2), FLASH_2),
        ((12, 0), (FLASH_3, FLASH_2), FLASH_2),
        ((8, 9), (FLASH_3,), TORCH),
        ((7, 5), (FLASH_3, FLASH_2), TORCH),
    ],
)
def test_the_best_package_for_the_gpu_is_taken_and_named(
    machine: Any, capability: tuple[int, int], installed: tuple[str, ...], name: str
) -> None:
    machine(capability, *installed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flash_name(GPU) == name
        assert flash_name(CPU) == TORCH


def test_amd_numbers_its_chips_otherwise(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((9, 4), FLASH_3, FLASH_2)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert flash_name(GPU) == FLASH_2


def test_the_choice_is_made_once(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((9, 0), FLASH_3)
    looks = []
    monkeypatch.setattr(flash, "packages_for", lambda device: looks.append(device) or [FLASH_3])
    assert chosen(GPU) is chosen(torch.device("cuda", 0))
    assert looks == [GPU]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("gives_tuple", [False, True])
@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_is_given_the_rows(
    machine: Any, name: str, gives_tuple: bool, scale: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = machine((9, 0), name)[name]
    package.gives_tuple = gives_tuple
    on_cpu_as_on(GPU, monkeypatch)
    q, k, v = rows(dtype=dtype)
    cu_q, cu_k, longest_q, longest_k = lengths()
    out = flash_attention(q, k, v, cu_q, cu_k, longest_q, longest_k, scale=scale)
    (call,) = package.calls
    assert call.pop("cu_seqlens_q") is cu_q
    assert call.pop("cu_seqlens_k") is cu_k
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert call == {
        "max_seqlen_q": 5,
        "max_seqlen_k": 9,
        "softmax_scale": scale,
        "causal": True,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    assert out.shape == q.shape
    torch.testing.assert_close(out, attend(q, k, v, cu_q, cu_k, scale))


def test_torch_is_given_the_rows(
    machine: Any, torch_calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine((9, 0))
    on_cpu_as_on(GPU, monkeypatch)
    cu_q, cu_k, longest_q, longest_k = lengths()
    q, k, v = rows()
    out = flash_attention(q, k, v, cu_q, cu_k, longest_q, longest_k, scale=0.3)
    (call,) = torch_calls
    assert call.pop("cu_q") is cu_q
    assert call.pop("cu_k") is cu_k
    assert call == {"max_q": 5, "max_k": 9, "scale": 0.3, "window_size": (-1, 0), **flash.GROUPED}
    torch.testing.assert_close(out, attend(q, k, v, cu_q, cu_k, 0.3))


@pytest.mark.parametrize(
    ("size", "dtype"), [(12, torch.bfloat16), (264, torch.bfloat16), (16, torch.float32), (16, torch.float64)]
)
def test_what_a_package_does_not_take_goes_to_torch(
    machine: Any, torch_calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, size: int, dtype: torch.dtype
) -> None:
    package = machine((9, 0), FLASH_3)[FLASH_3]
    on_cpu_as_on(GPU, monkeypatch)
    q, k, v = rows(size, dtype)
    flash_attention(q, k, v, *lengths(), scale=None)
    flash_attention(*rows()[:2], torch.randn(len(v), 2, 8, dtype=torch.bfloat16), *lengths(), scale=None)
    assert len(torch_calls) == 2
    flash_attention(*rows(256), *lengths(), scale=None)
    assert (len(torch_calls), len(package.calls)) == (2, 1)


def test_the_text_pass_goes_through_the_package(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that say they are on a GPU; the gradient comes through as well."""
    package = machine((9, 0), FLASH_3)[FLASH_3]
    on_cpu_as_on(GPU, monkeypatch)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True))
    segments = Segments(K_LENGTHS, CPU)
    q, k, v = (torch.randn(segments.total, heads, 16, dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2))
    out = causal_attention(q, k, v, segments, None)
    assert len(package.calls) == 1
    monkeypatch.undo()
    right = context_attention_ref(q.float(), k.float(), v.float(), segments.cu_seqlens, max_seqlen=segments.longest)
    torch.testing.assert_close(out.float(), right, atol=2e-2, rtol=2e-2)
    assert all(x.any() for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_a_package_for_another_torch_is_named_and_not_used(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((8, 0), FLASH_2)

    def broken(name: str) -> ModuleType:
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr("importlib.import_module", broken)
    with pytest.warns(UserWarning, match=r"flash-attn 2 is installed but cannot be loaded.*undefined symbol"):
        assert flash_name(GPU) == TORCH


def test_a_part_of_a_package_that_is_missing_is_said(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((8, 0), FLASH_2)

    def without_einops(name: str) -> ModuleType:
        raise ModuleNotFoundError("No module named 'einops'", name="einops")

    monkeypatch.setattr("importlib.import_module", without_einops)
    with pytest.warns(UserWarning, match="No module named 'einops'"):
        assert flash_name(GPU) == TORCH


def test_flash_attn_4_alone_is_not_the_second(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((10, 0))
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flash_name(GPU) == TORCH


def test_what_the_program_has_switched_torch_to_stands(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((9, 0), FLASH_3, FLASH_2)
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: "FA3", raising=False)
    assert flash_name(GPU) == "torch, FA3"


def test_a_torch_without_the_switch(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine((9, 0))
    monkeypatch.delattr(torch.nn.attention, "current_flash_attention_impl", raising=False)
    assert flash_name(GPU) == TORCH


@pytest.mark.parametrize("failure", ["wrong", "no kernel image"])
def test_the_parity_probe_refuses_a_package_by_its_name(
    machine: Any, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model has a head size that the packages take and is in bfloat16; the rows say they are on a GPU."""
    machine((9, 0), FLASH_3)

    def wrong(self: Package, q: Tensor, *_: object, **__: object) -> Tensor:
        if failure == "wrong":
            return torch.ones_like(q)
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(Package, "flash_attn_varlen_func", wrong)
    model = backbone("llama").to(torch.bfloat16)
    on_cpu_as_on(GPU, monkeypatch)
    monkeypatch.setattr(
        "pe.method.attention.causal_attention",
        lambda q, k, v, segments, scale: flash_attention(
            q, k, v, segments.cu_seqlens, segments.cu_seqlens, segments.longest, segments.longest, scale=scale
        ),
    )
    with pytest.raises(UnsupportedBackbone, match="by flash-attn 3, an optional package that may be uninstalled"):
        model.check_parity()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [TORCH, *PACKAGES])
def test_each_computes_the_same_on_a_gpu(name: str) -> None:
    if name != TORCH and (name not in packages_for(GPU) or not find_spec(PACKAGES[name])):
        pytest.skip(f"{name}: not installed, or not for this GPU")
    run = torch_attention if name == TORCH else package_attention(name)
    inputs = [x.to(GPU).requires_grad_() for x in rows(64)]
    cu_q, cu_k, longest_q, longest_k = lengths()
    out = run(*inputs, cu_q.to(GPU), cu_k.to(GPU), longest_q, longest_k, scale=None)
    wide = [x.detach().float().cpu().requires_grad_() for x in inputs]
    right = attend(*wide, cu_q, cu_k, None)
    upstream = torch.randn_like(right)
    found = [out, *torch.autograd.grad(out, inputs, upstream.to(out))]
    expected = [right, *torch.autograd.grad(right, wide, upstream)]
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.float().cpu(), wanted, atol=3e-2, rtol=3e-2)

"""Every case of `bench.kernels` at toy size: what is timed is right, and what fails leaves a reason, not a figure."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import kernels, ops, records
from bench import test_kernels as benchmarked
from bench.kernels import COMPILED, EAGER, MODES, OURS
from bench.ops import CASES, Case, Problem, Sizes, Way
from bench.roofline import ROOFS, Cost
from pe.method import flash
from tests.benchmarks import FakeBenchmark

CPU = torch.device("cpu")
GPU = {"gpu": "NVIDIA H200", "driver": "1", "cpu": "", "cores": 1, "threads": 1}
TOY = {f"{case.op}, {case.name}": case for case in CASES}
DISTINCT = {
    "mixture": "vocab_mixture, 64 rows",
    "rows a text": "prompt_rows, suffix, one prompt a text",
    "rows shared": "prompt_rows, prefix, two shared prompts",
    "suffix": "context_attention, suffix, 256 texts of 512",
    "prefix": "context_attention, prefix, 256 texts of 256",
    "pool norm": "pool_normalize, RMSNorm, 32 texts of 512",
    "pool": "pool_normalize, no norm, 3276 prompts of 5",
    "contrast": "info_nce, 4,096 pairs",
    "contrast masked": "info_nce, 4,096 pairs, duplicates masked",
}


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where records go; a pass is timed once, not thrice: the interpreter's time says nothing."""
    monkeypatch.setattr(kernels, "time_on_cpu", functools.partial(kernels.time_on_cpu, rounds=1))
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def case(name: str) -> Case:
    return TOY[DISTINCT[name]]


def by_name(found: list[records.Record]) -> dict[tuple[str, str], records.Record]:
    return {(record["implementation"], record["mode"]): record for record in found}


@pytest.mark.parametrize("name", DISTINCT)
def test_every_case_is_right_and_timed_at_toy_size(name: str) -> None:
    """Ours runs in the interpreter here, against the reference in float64."""
    chosen = case(name)
    found = by_name(kernels.measure(chosen, chosen.toy, CPU, only=[OURS, EAGER, ops.CHUNKED]))
    for implementation in (OURS, EAGER):
        for mode in MODES:
            record = found[implementation, mode]
            assert 0 < record["ms"]["p20"] <= record["ms"]["median"] <= record["ms"]["p80"]
            assert record["gbps"] > 0
            assert record["floor_ms"] is None
            assert record["sizes"] == dict(chosen.toy)
    assert found[OURS, "forward"]["impl"] == "interpreter"
    if name == "contrast":
        assert found[ops.CHUNKED, "both"]["ms"]["median"] > 0


def test_the_reference_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the graph: what Inductor makes of it for a CPU takes 20 seconds and is torch's own matter."""
    traced: list[torch.fx.GraphModule] = []

    def trace(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=trace))
    found = by_name(kernels.measure(case("pool"), case("pool").toy, CPU, only=[COMPILED]))
    assert found[COMPILED, "backward"]["ms"]["median"] > 0
    assert traced


def doubled(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    problem = case("pool").build(sizes, dtype, device)
    return dataclasses.replace(problem, ours=lambda *x, impl: 2 * problem.ours(*x, impl=impl))


def test_a_wrong_result_has_no_figure() -> None:
    wrong = dataclasses.replace(case("pool"), build=doubled)
    found = kernels.measure(wrong, wrong.toy, CPU, only=[OURS, EAGER])
    assert kernels.broken(found)
    record = by_name(found)[OURS, "forward"]
    assert record["failed"].startswith("wrong: output: error ")
    assert "ms" not in record
    assert "ms" in by_name(found)[EAGER, "forward"]
    right = kernels.measure(case("pool"), case("pool").toy, CPU, only=[OURS])
    assert not kernels.broken(right)


def half_gradient(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
    problem = case("pool").build(sizes, dtype, device)
    return dataclasses.replace(problem, ours=lambda h, impl: (y := problem.ours(h, impl=impl)).detach() / 2 + y / 2)


def test_a_wrong_gradient_has_no_figure() -> None:
    wrong = dataclasses.replace(case("pool"), build=half_gradient)
    (record, *_) = kernels.measure(wrong, wrong.toy, CPU, only=[OURS])
    assert record["failed"].startswith("wrong: gradient 0: error ")


def test_red_ops_have_no_figure_of_ours() -> None:
    found = by_name(kernels.measure(case("mixture"), case("mixture").toy, CPU, only=[OURS, EAGER], red=True))
    assert found[OURS, "both"]["failed"] == "no figure: its tests fail"
    assert found[EAGER, "both"]["ms"]


def raising(error: Exception) -> Any:
    def build(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Problem:
        def fail(*_: Tensor) -> Tensor:
            raise error

        return dataclasses.replace(case("pool").build(sizes, dtype, device), peers={ops.CUT: lambda: Way(fail)})

    return build


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("tried to allocate"), "out of memory"),
        (NotImplementedError("no such device\nlong trace"), "NotImplementedError: no such device"),
        (AssertionError(), "AssertionError: "),
    ],
)
def test_failures_are_rows(error: Exception, reason: str) -> None:
    failing = dataclasses.replace(case("pool"), build=raising(error))
    found = kernels.measure(failing, failing.toy, CPU, only=[EAGER, ops.CUT])
    assert by_name(found)[ops.CUT, "both"]["failed"] == reason
    assert [line[:2] for line in kernels.lines(found)][1] == [ops.CUT, reason]


def test_nothing_is_timed_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Problem) -> Any:
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(kernels, "expected", fail)
    found = kernels.measure(case("pool"), case("pool").toy, CPU, only=[OURS, EAGER])
    assert {record["failed"] for record in found} == {
        "no figure: the reference to check it by fails (out of memory)"
    }  # fmt: skip


def test_a_gpu_that_no_longer_answers_ends_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = dataclasses.replace(case("pool"), build=raising(RuntimeError("CUDA error: an illegal memory access")))

    def silent(_: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(kernels, "free", silent)
    found = kernels.measure(failing, failing.toy, CPU, only=[ops.CUT, ops.LIGER])
    assert [(record["implementation"], "failed" in record) for record in found] == [(ops.CUT, True)] * 3


def test_an_op_may_use_its_share_of_the_time() -> None:
    def command(code: str) -> list[str]:
        return [sys.executable, "-S", "-c", code]

    assert kernels.run_alone(command(""), math.inf)
    assert not kernels.run_alone(command("raise SystemExit(1)"), 60.0)
    assert not kernels.run_alone(command("import time; time.sleep(60)"), 0.5)


@pytest.mark.parametrize(
    ("name", "peer", "package"),
    [
        ("contrast", ops.CUT, "cut_cross_entropy"),
        ("pool norm", ops.LIGER, "liger_kernel"),
        *(("suffix", name, package) for name, package in flash.PACKAGES.items()),
    ],
)
def test_packages_that_are_not_there(name: str, peer: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    found = kernels.measure(case(name), case(name).toy, CPU, only=[peer])
    assert [record["failed"] for record in found] == ["not installed"] * 3


@pytest.mark.parametrize("peer", [ops.VARLEN, *ops.FLASH])
@pytest.mark.parametrize("name", ["suffix", "prefix"])
def test_flash_is_given_the_same_problem(name: str, peer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its concatenated input, under the masking that its documentation states, gives the op's output and gradients."""

    def causal_from_the_end(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
    ) -> Tensor:
        causal = {"window_size": (-1, 0), "scale": None, **flash.GROUPED}
        if peer != ops.VARLEN:
            causal = {"causal": True, "softmax_scale": None, "deterministic": options["deterministic"]}
        assert options == causal
        parts = []
        for text in range(len(cu_q) - 1):
            rows, keys = slice(*cu_q[text : text + 2].tolist()), slice(*cu_k[text : text + 2].tolist())
            n, m = rows.stop - rows.start, keys.stop - keys.start
            assert n == max_q
            assert m == max_k
            sees = torch.ones(n, m, dtype=torch.bool).tril(m - n)
            heads = (x.transpose(0, 1) for x in (q[rows], k[keys], v[keys]))
            parts.append(
                torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=sees, enable_gqa=True).transpose(
                    0, 1
                )
            )
        return torch.cat(parts)

    def of_a_package(
        q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, **options: Any,
    ) -> Tensor:  # fmt: skip
        return causal_from_the_end(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", causal_from_the_end)
    if peer != ops.VARLEN:
        package = SimpleNamespace(__name__=peer, flash_attn_varlen_func=of_a_package)
        monkeypatch.setitem(sys.modules, flash.PACKAGES[peer], package)
    problem = case(name).build(case(name).toy, torch.float32, CPU)
    kernels.check(problem.peers[peer](), problem, kernels.expected(problem))


@pytest.mark.parametrize("name", ["suffix", "prefix"])
def test_flex_is_given_the_same_problem(name: str) -> None:
    """Forward only: torch has no FlexAttention backward on a CPU."""
    problem = case(name).build(case(name).toy, torch.float32, CPU)
    inputs = tuple(x.detach() for x in problem.inputs)
    way = problem.peers[ops.FLEX]()
    torch.testing.assert_close(way.run(*way.arrange(*inputs)), problem.reference(*inputs))


def test_passes_are_what_they_say() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    calls = []

    def run(x: Tensor) -> Tensor:
        calls.append("forward")
        square = x * x
        square.register_hook(lambda _: calls.append("backward"))
        return square

    timed = kernels.passes(Way(run), (x,))
    calls.clear()
    order = {}
    for mode, (prepare, action) in timed.items():
        ready = prepare()
        before = list(calls)
        action(ready)
        order[mode] = (before, calls[len(before) :])
        calls.clear()
    assert order == {
        "forward": ([], ["forward"]),
        "backward": (["forward"], ["backward"]),
        "both": ([], ["forward", "backward"]),
    }
    assert x.grad is None


def test_floors() -> None:
    """What the op is designed to: a vocabulary of 151,936 x 1024 in bf16 once through 4.8 TB/s takes 65 us."""
    problem = case("mixture").build(case("mixture").sizes, torch.bfloat16, torch.device("meta"))
    assert problem.forward.floor_ms("NVIDIA H200", torch.bfloat16) == pytest.approx(0.065, rel=0.01)
    assert problem.forward.floor_ms("NVIDIA H200", torch.float32) is None
    assert problem.forward.floor_ms("a new GPU", torch.bfloat16) is None
    assert problem.forward.floor_ms(None, torch.bfloat16) is None
    bound_by_flops = case("contrast").build(case("contrast").sizes, torch.bfloat16, torch.device("meta"))
    whole = bound_by_flops.forward + bound_by_flops.backward
    assert whole.flops == 8 * 4096**2 * 4096
    assert whole.floor_ms("NVIDIA H200", torch.bfloat16) == pytest.approx(8 * 4096**3 / 989e12 * 1000)
    assert Cost(3e6, 5e9).gbps(1.0) == 3.0
    assert Cost(3e6, 5e9).tflops(1.0) == 5.0
    assert {"NVIDIA H100 80GB HBM3", "NVIDIA H200"} <= ROOFS.keys()


def test_attention_costs() -> None:
    """The suffix form reads its contexts once; frozen contexts cost no FLOPs of dK and dV."""
    meta = torch.device("meta")
    suffix = case("suffix").build(case("suffix").sizes, torch.bfloat16, meta)
    contexts = 2 * 256 * 512 * 8 * 128 * 2
    assert contexts < suffix.forward.bytes < 1.1 * contexts
    pairs = 256 * 32 * (5 * 512 + 15)
    assert suffix.forward.flops == 4 * 128 * pairs
    assert suffix.backward.flops == 128 * (6 * 256 * 32 * 5 * 512 + 10 * 256 * 32 * 15)
    prefix = case("prefix").build(case("prefix").sizes, torch.bfloat16, meta)
    assert prefix.backward.flops == 2.5 * prefix.forward.flops


@pytest.mark.parametrize("every", CASES, ids=TOY)
def test_full_sizes_fit_together(every: Case) -> None:
    problem = every.build(every.sizes, torch.bfloat16, torch.device("meta"))
    assert any(x.requires_grad for x in problem.inputs)
    assert problem.forward.bytes > 0 < problem.backward.flops
    assert every.sizes.keys() == every.toy.keys()


def test_command_records_and_prints(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toys = [dataclasses.replace(one, sizes=one.toy) for one in (case("pool"), case("contrast"))]
    monkeypatch.setattr(kernels, "INTERPRETED", False)  # ours is plain torch then
    monkeypatch.setattr(kernels, "CASES", toys)
    chosen = ["--device", "cpu", "--implementations", OURS, EAGER, ops.CUT]
    assert kernels.main(chosen) == 0
    shown = capsys.readouterr().out
    assert "ours (torch)" in shown
    assert "not installed" in shown
    found = records.read("ops", results)
    assert len(found) == 2 * 3 + 3 * 3
    assert {"hardware", "versions", "commit", "date", "run", "dtype", "gpu", "device"} <= found[0].keys()
    page = kernels.render(results)
    assert page.startswith("**`pool_normalize`**, CPU\n\n| `pool_normalize` | forward, ms |")
    assert "| no norm, 3276 prompts of 5: ours (torch) | " in page
    assert f"| 4,096 pairs: {ops.CUT} | not installed | " in page
    assert page.endswith("GPU: not yet measured.")
    assert kernels.main([*chosen, "--red", "info_nce", "--dry"]) == 1
    assert kernels.main([*chosen, "--toy", "--ops", "pool_normalize"]) == 0
    assert records.read("ops", results) == found


def test_page_shows_the_newest_run_of_every_case(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.render(results) == "Not yet measured.\n\nGPU: not yet measured."

    def row(name: str, implementation: str, ms: float) -> list[records.Record]:
        spread = {"median": ms, "p20": ms - 0.001, "p80": ms + 0.001}
        measured = {"ms": spread, "peak_mib": 1234.0, "roofline": 0.871, "impl": "triton", "dtype": "bfloat16"}
        place = {"op": "info_nce", "case": name, "gpu": "NVIDIA H200", "device": "cuda", "sizes": {"B": 4096}}
        return [{**place, "implementation": implementation, "mode": mode, **measured} for mode in MODES]

    monkeypatch.setattr(records, "hardware", lambda: GPU)
    records.append("ops", row("a", OURS, 9.0) + row("b", OURS, 0.5))
    monkeypatch.setattr(records, "run_id", lambda: "later")
    records.append("ops", row("a", OURS, 1.0) + row("a", EAGER, 3.0))
    page = kernels.render(results)
    assert page.startswith("**`info_nce`**, NVIDIA H200\n")
    ours = "1.000 (0.999 to 1.001) | 1.00"
    assert f"| a: ours (triton) | {ours} | 87% | {ours} | 87% | {ours} | 1,234 |" in page
    assert "| a: torch, eager | 3.000 (2.999 to 3.001) | 3.00 | 87% |" in page
    assert "| b: ours (triton) | 0.500 (0.499 to 0.501) |" in page
    assert "9.000" not in page
    assert "GPU: not yet measured." not in page


def test_benchmark_says_what_it_ran_on() -> None:
    benchmark = FakeBenchmark()
    benchmarked.test_kernel(benchmark, DISTINCT["pool"], OURS, "both")
    assert (benchmark.group, len(benchmark.found)) == (f"{DISTINCT['pool']}, both", 1)
    assert benchmark.extra_info["sizes"] == dict(case("pool").toy)
    assert (DISTINCT["pool"], ops.VARLEN) not in benchmarked.PAIRS
    with pytest.raises(pytest.skip.Exception, match="_flash_attention_forward"):
        benchmarked.test_kernel(benchmark, DISTINCT["suffix"], ops.VARLEN, "both")


def test_a_fault_of_ours_is_no_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("wrong result")

    monkeypatch.setattr(benchmarked, "check", broken)
    with pytest.raises(ValueError, match="wrong result"):
        benchmarked.test_kernel(FakeBenchmark(), DISTINCT["pool"], OURS, "both")

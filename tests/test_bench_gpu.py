"""The order, the limits and the outcomes of `bench.gpu`, with stages that need no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from bench import gpu, kernels
from bench.cases import GPU_CASES, VARIANTS
from bench.gpu import Outcome, Stage, Step
from bench.ops import OPS
from bench.records import ROOT

BLOCKED = ("mteb", "psutil", "pynvml", "matplotlib", "datasets", "sentence_transformers", "jsonargparse", "accelerate")


def python(name: str, code: str) -> Stage:
    return Stage(name, [sys.executable, "-S", "-c", code])


def alone(stage: Stage, share: float = 1.0) -> Step:
    return Step([stage], share)


def test_stages_run_in_order_and_a_failure_stops_none(tmp_path: Path) -> None:
    log = tmp_path / "log"
    write = f"open({str(log)!r}, 'a').write('{{}}')"

    def steps(outcomes: Sequence[Outcome]) -> Iterator[Step]:
        yield alone(python("first", write.format("a")))
        yield alone(python("second", f"{write.format('b')}; raise SystemExit(3)"))
        yield alone(python(f"after {outcomes[-1].result}", write.format("c")))

    outcomes = gpu.run(steps, None)
    assert [(outcome.name, outcome.result) for outcome in outcomes] == [
        ("first", "passed"),
        ("second", "failed (3)"),
        ("after failed (3)", "passed"),
    ]
    assert log.read_text() == "abc"
    shown = gpu.table(outcomes)
    assert shown.row_count == 3


def running(pid: int) -> bool:
    """Whether a process does anything; one that ended and that nobody waited for does not."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_stage_that_takes_too_long_is_stopped_with_its_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import subprocess, sys, time; "
        f"p = subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); "
        f"open({str(pid)!r}, 'w').write(str(p.pid)); time.sleep(60)"
    )
    started = time.perf_counter()
    (outcome,) = gpu.run(lambda _: iter([alone(python("long", code), 0.5)]), 6.0)
    assert outcome.result == "stopped after 3 s"
    assert 3 <= outcome.seconds < 5
    while running(int(pid.read_text())):  # the kill has been sent; the system needs a moment
        assert time.perf_counter() - started < 30
        time.sleep(0.05)


def test_stages_of_a_step_run_side_by_side() -> None:
    wait = "import time; time.sleep({})"
    stages = [python("long", wait.format(60)), python("short", wait.format(0.2))]
    long, short = gpu.run(lambda _: iter([Step(stages, 1.0)]), 4.0)
    assert (long.result, short.result) == ("stopped after 4 s", "passed")
    assert short.seconds < long.seconds


def test_time_that_is_left_goes_to_the_next_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[float | None] = []

    def skip(step: Step, seconds: float | None) -> list[Outcome]:
        given.append(seconds)
        return [Outcome(stage.name, 0.0, "passed") for stage in step.stages]

    monkeypatch.setattr(gpu, "run_step", skip)
    outcomes = gpu.run(gpu.plan(True), gpu.SECONDS)
    assert all(outcome.passed for outcome in outcomes)
    shares = [0.25, 0.45, 0.45, 1.0]
    assert given == pytest.approx([share * gpu.SECONDS for share in shares], rel=0.01)
    assert gpu.SECONDS < 9 * 60
    given.clear()
    gpu.run(gpu.plan(False), None)
    assert set(given) == {None}


def commands(quick: bool, failing: Sequence[str] = ()) -> dict[str, list[str]]:
    """Commands of the plan by name, where the stages in `failing` fail and all others pass."""
    outcomes: list[Outcome] = []
    found = {}
    for step in gpu.plan(quick)(outcomes):
        for stage in step.stages:
            found[stage.name] = list(stage.command)
            outcomes.append(Outcome(stage.name, 1.0, "failed (1)" if stage.name in failing else "passed"))
    return found


def test_failing_tests_make_their_op_red() -> None:
    assert commands(True)["kernels"][-4:] == ["--quick", "--seconds", "180", "--red"]
    found = commands(True, ["tests of info_nce", "tests of packed passes"])
    assert found["kernels"][-2:] == ["--red", "info_nce"]
    assert set(commands(False)) - set(found) == {gpu.SANITIZER, "largest batch", "scaling", "encoding"}
    assert list(found)[-3:] == ["step", "memory", "kernels"]


def test_tests_that_were_stopped_make_no_op_red() -> None:
    outcomes: list[Outcome] = []
    steps = gpu.plan(True)(outcomes)
    outcomes += [Outcome(stage.name, 130.0, "stopped after 130 s") for stage in next(steps).stages]
    *_, (kernels_stage,) = (step.stages for step in steps)
    assert kernels_stage.command[-1] == "--red"


def test_stages_end_with_the_command(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    stage = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys, torch; torch.cuda.is_available = lambda: True; from bench import gpu; "
        f"step = gpu.Step([gpu.Stage('long', [sys.executable, '-S', '-c', {stage!r}])], 1.0); "
        "gpu.plan = lambda _: lambda _: iter([step]); sys.exit(gpu.main(['--quick']))"
    )
    command = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    started = time.perf_counter()
    while not (pid.exists() and pid.read_text()):
        assert time.perf_counter() - started < 60
        time.sleep(0.05)
    command.terminate()
    assert command.wait(30) == 143
    assert not running(int(pid.read_text()))


def test_the_plan_asks_for_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(gpu.QUICK_VARIANTS) <= set(VARIANTS)
    assert gpu.IN_MEMORY == ("lora-padded", "pe-suffix-weighted", "lora-checkpointed", "lora-packed")
    assert gpu.FULL_CASES == GPU_CASES
    for quick in (True, False):
        command = commands(quick, [gpu.tests_of("pool_normalize")])["kernels"]
        assert command[:3] == [sys.executable, "-m", "bench.kernels"]
        measured: list[bool] = []
        monkeypatch.setattr(kernels, "measure", lambda *_, red, into=measured, **__: into.append(red) or [])
        kernels.main([*command[3:], "--device", "cpu", "--dry"])
        cases = [case for case in kernels.CASES if case.quick or not quick]
        assert measured == [case.op == "pool_normalize" for case in cases]
        assert {case.op for case in cases} == set(OPS)


def collected(*selections: Sequence[str]) -> list[set[str]]:
    """Tests that a bare pytest finds for each selection, without the plugins that this repository configures."""
    code = "import json, pytest, sys\nfor one in json.loads(sys.argv[1]):\n    pytest.main(one)\n    print('END')"
    bare = ["--collect-only", "-p", "no:timeout", "-p", "no:cov"]
    commands = json.dumps([[*gpu.PYTEST[3:], *bare, *selection] for selection in selections])
    run = subprocess.run([sys.executable, "-c", code, commands], cwd=ROOT, capture_output=True, text=True, check=True)
    parts = run.stdout.split("END\n")[:-1]
    return [{line for line in part.splitlines() if "::" in line} for part in parts]


def selection(stage: Stage) -> Sequence[str]:
    return [argument for argument in stage.command[len(gpu.PYTEST) :] if argument != "-x"]


def test_every_gpu_test_belongs_to_one_stage() -> None:
    (*full, packed, sanitizer), (*quick, _, _) = gpu.tests(False), gpu.tests(True)
    everything = ["tests/kernels/test_gpu.py"]
    chosen = [*full, sanitizer, quick[0], quick[OPS.index("prompt_rows")], packed]
    every, *parts, fewer, of_rows, of_packed = collected(everything, *map(selection, chosen))
    assert all(parts)
    assert set.union(*parts) == every
    assert sum(map(len, parts)) == len(every)
    assert fewer < parts[0]
    assert not [test for test in fewer if "compiles" in test or "fp32" in test]
    assert any("fp32" in test for test in of_rows)
    assert any("mixed" in test for test in of_rows)
    assert "-x" in quick[0].command
    assert of_packed


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--quick"]) == 2
    assert "no GPU that torch can use" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main([])


@pytest.mark.parametrize(("result", "code"), [("passed", 0), ("stopped after 3 s", 1)])
def test_exit_code(result: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "run", lambda *_: [Outcome("kernels", 12.0, result)])
    assert gpu.main(["--quick"]) == code
    assert result in capsys.readouterr().out


def test_a_bare_checkout_is_enough() -> None:
    """torch, triton, numpy and rich; what else the repository uses is blocked."""
    code = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); import bench.gpu, bench.kernels"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)

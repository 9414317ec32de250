"""Bulk encoding on a Ray of this machine: killed, gone on with, and equal to one process."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from pe import encode
from pe.bulk.engines import Workers, check_workers, on_ray

ROOT = Path(__file__).parent.parent
BULK = runpy.run_path(str(ROOT / "scripts" / "bulk.py"))
ONE = ("--engine=ray", "--workers=1")
os.environ.setdefault("RAY_worker_niceness", "0")  # else its workers wait for every other test


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray of two cores."""
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.timeout(900)  # each of Ray's processes imports torch anew
@pytest.mark.usefixtures("cluster")
def test_killed_it_goes_on_and_equals_one_process(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, whole, broken = BULK["write_rows"](tmp_path / "in", 600), tmp_path / "whole", tmp_path / "broken"
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    model, size = str(checkpoint), "--shard_rows=50"
    left = BULK["killed"](BULK["command"](model, source, broken, size, *ONE), broken, 2)
    assert 2 <= len(left) < 12
    for folder, engine in ((broken, ONE), (whole, ())):
        encode.main(BULK["command"](model, source, folder, size, *engine)[3:])
    last = BULK["finished"](broken)
    assert len(last) == 12
    assert {name: last[name] for name in left} == left
    assert pq.read_table(broken).equals(pq.read_table(whole))


def fragile(folder: Path) -> Callable[[], Callable[[int], int]]:
    """A worker that dies at its first item 3, and refuses the item 7."""

    def work(item: int) -> int:
        if item == 3 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 7:
            raise ValueError("expected any number but 7")
        return item * item

    return lambda: work


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_dies_is_replaced_and_what_it_refuses_is_a_sentence(tmp_path: Path) -> None:
    assert sorted(on_ray(fragile(tmp_path), [1, 2, 3, 4], Workers(count=2))) == [1, 4, 9, 16]
    assert (tmp_path / "died").exists()
    with pytest.raises(ValueError, match=r"^expected any number but 7$"):
        list(on_ray(fragile(tmp_path), [7], Workers(count=1)))
    assert list(on_ray(fragile(tmp_path), [], Workers())) == []


@pytest.mark.usefixtures("cluster")
def test_workers_that_the_cluster_does_not_hold_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_workers(Workers(count=2))
    source = BULK["write_rows"](tmp_path / "in", 4)
    for options, message in (
        (["--workers=3"], "--workers: expected 1 to 2, which the cluster holds with 1 cores each, got 3"),
        (["--worker_cores=3"], "--engine: expected a node with 3 cores for a worker, got none in the cluster"),
        (["--worker_gpus=1"], "--engine: expected a node with 1 cores and 1 GPUs for a worker, got none"),
        (["--worker_gpus=2"], "--worker_gpus: expected 0 to 1, since an embedder runs on one GPU, got 2"),
    ):
        with pytest.raises(SystemExit) as stopped:
            encode.main(BULK["command"](str(checkpoint), source, tmp_path / "o", "--engine=ray", *options)[3:])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "o").exists()


def test_ray_is_imported_where_it_is_asked_for_alone() -> None:
    check = "import sys, pe.encode; sys.exit('ray' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)

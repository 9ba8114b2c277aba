"""Several processes: the weights, metrics and samples of one; no example lost; kills, signals and resumption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import parting
import pytest
import several
import torch
from torch import Tensor

from score_sde.training import Checkpoints

JOBS = {
    "ddp": {},
    "fsdp": {"strategy": "fsdp", "power_emas": [0.1]},
    "accumulated": {"accumulate": 2},
    "muon": {"optimizer": "muon"},
    "poisoned": {"poisoned": 5},
    "half": {"steps": 6},
    "half_fsdp": {"steps": 6, "strategy": "fsdp"},
    "continued": {},
    "continued_fsdp": {"strategy": "fsdp"},
    "terminated": {"terminated": 4},
    "idle": {"idle": True, "weight_decay": 0.1},
    "sphere": {"sphere": True},
    "sphere_fsdp": {"sphere": True, "strategy": "fsdp"},
    "finished": {},
}


def torchrun(*arguments: str | Path, processes: int = 2) -> subprocess.Popen:
    """Worker processes of this machine, on a free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def run_jobs(folder: Path, jobs: dict) -> subprocess.Popen:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return torchrun(several.__file__, folder, folder / "jobs.json")


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """Runs of this process alone."""
    folder = tmp_path_factory.mktemp("one")
    for name in ("ddp", "muon", "poisoned", "idle", "sphere"):
        several.train(folder / name, **JOBS[name])
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory, one) -> Path:
    """Runs of two processes, which two of them take up from one process."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("continued", "continued_fsdp"):
        several.train(folder / name, steps=6)
    several.train(folder / "finished")
    process = run_jobs(folder, JOBS)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return folder


def differences(first: Path, second: Path, step: int = 12) -> float:
    """The greatest difference between the raw and averaged weights of two runs."""
    found = []
    for ema in (False, True):
        a, b = (Checkpoints(path / "checkpoints").weights(step, ema=ema) for path in (first, second))
        assert a.keys() == b.keys()
        found += [(a[name] - b[name]).abs().max().item() for name in a]
    return max(found)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "accumulated", "continued", "continued_fsdp"])
def test_two_processes_give_the_weights_of_one(one, two, name):
    assert differences(one / "ddp", two / name) < 2e-6  # weights of order 1, moved by 12 steps of 1e-3


@pytest.mark.parametrize("name", ["muon", "poisoned", "idle"])
def test_so_they_do_with_muon_where_one_meets_nan_and_where_no_loss_reaches_a_weight(one, two, name):
    assert differences(one / name, two / name) < (3e-4 if name == "muon" else 2e-6)  # Muon works in bfloat16
    assert name == "idle" or differences(one / "ddp", one / name) > 1e-4


@pytest.mark.parametrize("name", ["half", "half_fsdp"])
def test_one_process_resumes_after_two(one, two, tmp_path, name):
    shutil.copytree(two / name, tmp_path / "run")
    several.train(tmp_path / "run")
    assert differences(one / "ddp", tmp_path / "run") < 2e-6


@pytest.mark.parametrize("name", ["sphere", "sphere_fsdp"])
def test_weights_stay_on_the_sphere_however_they_are_spread(one, two, name):
    assert differences(one / "sphere", two / name) < 5e-6  # divided by its norm at each step


def test_two_processes_take_up_a_run_that_has_nothing_left_to_do(one, two):
    assert (two / "finished/interrupted-1").read_text() == "12 None"
    assert differences(one / "ddp", two / "finished") == 0


def test_shards_leave_the_same_checkpoint_as_whole_weights(two):
    whole, cut = (Checkpoints(two / name / "checkpoints").state(12)["optimizer"] for name in ("ddp", "fsdp"))
    assert whole["state"].keys() == cut["state"].keys()
    for i, moments in whole["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(cut["state"][i][name], value, atol=1e-5, rtol=1e-4)


def test_metrics_are_those_of_the_whole_batch(one, two):
    alone, together = (rows(folder / "ddp") for folder in (one, two))
    for row, other in zip(alone, together, strict=True):
        for name in ("step", "loss", "loss_q1", "loss_q4", "grad_norm", "nonfinite", "lr"):
            assert other[name] == pytest.approx(row[name], rel=1e-4), name
        assert ("loss_held_out" in row) == (row["step"] % 4 == 0)
        assert other.get("loss_held_out", 0) == pytest.approx(row.get("loss_held_out", 0), rel=1e-5)
    assert [row["nonfinite"] for row in rows(two / "poisoned")] == [0] * 5 + [1] * 7


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["ddp", "accumulated"])
def test_each_example_is_read_once_an_epoch_by_one_process_or_the_other(two, name):
    reads = [json.loads((two / name / f"read-{rank}.json").read_text()) for rank in (0, 1)]
    assert all(reads)
    seen: list[int] = []
    for step in range(12):
        seen += [label for read in reads for at, labels in read if at == step for label in labels]
    for epoch in range(3):
        assert sorted(seen[50 * epoch : 50 * (epoch + 1)]) == list(range(50))


def test_a_signal_to_one_process_stops_both_after_the_step_with_a_checkpoint(two):
    told = {(two / "terminated" / f"interrupted-{rank}").read_text() for rank in (0, 1)}
    assert told == {f"5 {signal.SIGTERM}"}
    assert Checkpoints(two / "terminated/checkpoints").latest() == 5


def test_samples_do_not_depend_on_the_number_of_processes(two):
    alone: Tensor = several.sample()
    for rank in (0, 1):
        assert torch.equal(torch.load(two / f"samples-{rank}.pt"), alone)


@pytest.mark.parametrize("resumed_by", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_of_two_processes_is_killed_and_the_run_resumed(tmp_path, resumed_by):
    job = {"killed": {"steps": 100_000, "checkpoint_every": 10, "keep_checkpoints": 2}}
    process = run_jobs(tmp_path, job)
    checkpoints, deadline = Checkpoints(tmp_path / "killed/checkpoints"), time.monotonic() + 120
    while (checkpoints.latest() or 0) < 30 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    reached = checkpoints.latest()
    assert reached is not None
    assert reached >= 30
    job["killed"]["steps"] = target = reached + 25
    if resumed_by == 1:
        several.train(tmp_path / "killed", **job["killed"])
    else:
        assert run_jobs(tmp_path, job).wait(timeout=120) == 0
    several.train(tmp_path / "whole", steps=target)
    assert differences(tmp_path / "whole", tmp_path / "killed", target) < 1e-4
    assert [row["step"] for row in rows(tmp_path / "killed")] == list(range(1, target + 1))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the threads' names from /proc")
def test_no_thread_of_the_group_outlives_it(tmp_path):
    process = torchrun(parting.__file__, tmp_path)
    assert process.wait(timeout=120) == 0
    for rank in (0, 1):
        during, after = json.loads((tmp_path / f"threads-{rank}").read_text())
        assert any("gloo" in name for name in during)
        assert not any("gloo" in name for name in after)


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("score_sde.distributed.count", lambda: 3)
    with pytest.raises(ValueError, match=r"batch_size=16 must be a multiple of 6, 3 processes times accumulate=2"):
        several.train(tmp_path, accumulate=2)

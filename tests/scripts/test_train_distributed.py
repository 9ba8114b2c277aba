"""`torchrun scripts/train.py` and `scripts/sample.py`: one run directory, the weights and samples of one process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from typed import script

ROOT = Path(__file__).resolve().parents[2]
TINY = ["trainer.steps=6", "trainer.batch_size=16", "trainer.checkpoint_every=3", "trainer.log_every=1", "num_samples=40",
        "trainer.progress=false", "trainer.sample_every=3", "trainer.evaluate_every=3", "evaluation.samplers=[ddim]",
        "evaluation.metrics=[sliced_w2]", "trainer.schedule=constant", "trainer.power_emas=[0.1]",
        "trainer.snapshot_every=3"]  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[int, Path]:
    """A run of one process and one of two, each where it chose to go."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"of_{processes}")
        out = script("train", *TINY, cwd=folder, processes=processes)
        assert out.count("result.json") == 1  # one speaks
        (found[processes],) = (folder / "outputs/toy").iterdir()  # one directory
    return found


def test_two_processes_leave_the_run_of_one(runs):
    one, two = runs[1], runs[2]
    assert {path.name for path in one.iterdir()} == {path.name for path in two.iterdir()}
    for name in ("weights", "ema", "ema-0.1"):
        first, second = (load_file(run / f"checkpoints/step-000000006/{name}.safetensors") for run in (one, two))
        assert max((first[key] - second[key]).abs().max() for key in first) < 1e-5
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, two)]
    for row, other in zip(*rows, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-3)
    assert "eval/sliced_w2" in rows[1][2]
    assert json.loads((two / "result.json").read_text())["status"] == "finished"


def test_two_processes_draw_the_samples_of_one(runs, tmp_path):
    options = [f"run={runs[1]}", "sampler=heun", "sampler.grid.steps=4", "num_samples=23", "batch_size=4"]
    for processes in (1, 2):
        script("sample", *options, f"output={tmp_path / str(processes)}", cwd=tmp_path, processes=processes)
    first, second = (np.load(tmp_path / f"{processes}/samples.npy") for processes in (1, 2))
    np.testing.assert_array_equal(first, second)


def test_a_wrong_input_is_named_by_one_process(tmp_path):
    error = script("train", *TINY, "trainer.accumulate=3", cwd=tmp_path, processes=2, code=1)
    assert error.count("error: batch_size=16 must be a multiple of 6") == 1


def test_the_benchmark_of_a_training_step_runs(tmp_path):
    out = script(
        "benchmark_training", "rounds=2", "steps=1", "images=[1,8,8]", "network.width=8", "trainer.peak_flops=1e12",
        cwd=tmp_path,
    )  # fmt: skip
    found = json.loads((tmp_path / "outputs/benchmark/benchmark_training.json").read_text())
    assert found["ratio"] > 0.5
    assert 0 < found["mfu"] < 1
    assert "examples_per_second" in out

"""scripts/likelihood.py on untrained runs of integer and of real-valued data, whose likelihoods are known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from score_sde.run import Run, build_model, instantiate

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import likelihood  # noqa: E402

DIGITS = {"_target_": "score_sde.data.files.digits", "dequantize": True}
RING = {"_target_": "score_sde.data.base.TargetStream", "target": {"_target_": "score_sde.targets.ring"}}


def untrained(path: Path, data: dict, shape: list[int]) -> Run:
    """An MLP starts at F = 0: with the parameterization Karras(1 / 2) that is the exact denoiser of N(0, I / 4)."""
    run = Run.create(path, {
        "seed": 0, "event_shape": shape, "data": data, "sde": {"_target_": "score_sde.sde.VPSDE"},
        "parameterization": {"_target_": "score_sde.parameterization.Karras", "sigma_data": 0.5},
        "network": {"_target_": "score_sde.networks.mlp.MLP", "event_shape": shape, "width": 8, "depth": 1},
    })  # fmt: skip
    weights = build_model(run.config).state_dict()
    run.checkpoints.save(0, {"weights": weights, "ema": weights}, {"step": 0})
    return run


def script(run: Run, *options: str, code: int = 0) -> str:
    command = [sys.executable, str(ROOT / "scripts/likelihood.py"), f"run={run.path}", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=run.path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.parametrize("dequantize", [True, False])
def test_integers_come_back_from_the_scale_of_the_model(dequantize: bool) -> None:
    data = instantiate({**DIGITS, "dequantize": dequantize})
    sets = likelihood.examples(data, 20, ["shuffled", "uniform"], torch.Generator().manual_seed(0))
    raw = data._reserved.x[:20].long()
    assert torch.equal(sets["held out"], raw)
    assert torch.equal(sets["shuffled"].flatten(1).sort().values, raw.flatten(1).sort().values)
    assert 0 <= sets["uniform"].min() < sets["uniform"].max() <= 16
    bins = likelihood.lattice(data)
    middle = bins["low"] + bins["bin_width"] * (raw + 0.5)
    expected = raw * (2 / 16) - 1 if not dequantize else (raw + 0.5) * (2 / 17) - 1
    torch.testing.assert_close(middle, expected)


def test_bits_of_the_digits_under_a_gaussian(tmp_path: Path) -> None:
    """Each pixel is N(0, 1 / 4) to the untrained model."""
    run = untrained(tmp_path, DIGITS, [1, 8, 8])
    out = script(run, "count=8", "method=adams", "steps=60", "draws=2")
    table = pd.read_csv(run.path / "likelihood.csv")
    assert list(table["set"].unique()) == ["held out", "shuffled", "uniform"]
    x = run.data().reference(8).x.double()
    # A Gaussian bound by uniform dequantisation, another draw of which changes little over 64 dimensions.
    expected = -torch.distributions.Normal(0.0, 0.5).log_prob(x).flatten(1).sum(1) / (64 * np.log(2)) - np.log2(2 / 17)
    found = table[table["set"] == "held out"]["bits_per_dim"].to_numpy()
    np.testing.assert_allclose(found, expected.numpy(), atol=0.08)
    assert "likelihood.csv" in out
    assert (run.path / "figures/likelihood.png").stat().st_size > 1000


def test_densities_of_points_stand_beside_the_true_ones(tmp_path: Path) -> None:
    run = untrained(tmp_path, RING, [2])
    script(run, "count=6", "ood=[uniform]", "method=dopri5")
    table = pd.read_csv(run.path / "likelihood.csv")
    x = run.data().reference(6).x.double()
    found = table[table["set"] == "held out"]
    expected = torch.distributions.Normal(0.0, 0.5).log_prob(x).sum(1)
    np.testing.assert_allclose(found["log_prob"], expected, rtol=1e-3)
    np.testing.assert_allclose(found["true_log_prob"], run.data().target.log_prob(x), atol=1e-9)
    assert (found["std_error"] == 0).all()
    error = script(run, "divergence=skilling", code=1)
    assert error == "error: divergence is one of exact, hutchinson, hutch++; got 'skilling'\n"

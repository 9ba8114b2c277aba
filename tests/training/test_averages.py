"""Power-function averages and their reconstruction, against integrals, known exponents and averages that were tracked."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import Tensor

from score_sde.run import Run
from score_sde.training import EMA, Checkpoints, HalfLife, PowerFunction, reconstruct
from score_sde.training.ema import power_exponent
from score_sde.training.posthoc import combination
from score_sde.training.state import TrainingState


@pytest.mark.parametrize(("std", "exponent"), [(0.05, 16.97219860), (0.10, 6.93720394), (0.15, 3.55786877)])
def test_exponents_are_those_of_edm2(std, exponent):
    assert power_exponent(std) == pytest.approx(exponent, abs=5e-9)


@pytest.mark.parametrize("std", [0.0, 0.3, -0.1])
def test_widths_without_a_positive_exponent_are_refused(std):
    with pytest.raises(ValueError, match=r"lies in \(0, 0.288\)"):
        PowerFunction(std)


def test_averages_of_half_precision_weights_do_not_stand_still():
    average = EMA([torch.zeros(3, dtype=torch.bfloat16)], lambda *_: 0.9999)
    for n in range(1000):
        average.update([torch.ones(3, dtype=torch.bfloat16)], 1, n)
    assert average.tensors[0].tolist() == pytest.approx([1 - 0.9999**1000] * 3, rel=1e-4)


def test_a_power_function_average_of_time_is_its_mean_and_has_its_width():
    # theta(tau) = tau and tau^2: moments of the density (gamma + 1) tau^gamma / n^(gamma + 1).
    average = EMA([torch.zeros(2, dtype=torch.float64)], PowerFunction(0.1))
    for n in range(1, 5001):
        average.update([torch.tensor([n, n**2], dtype=torch.float64)], 1, n - 1)
    mean, square = (average.tensors[0] / torch.tensor([5000, 5000**2])).tolist()
    gamma = power_exponent(0.1)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)
    assert math.sqrt(square - mean**2) == pytest.approx(0.1, rel=1e-3)


def trajectory(steps: int) -> Tensor:
    """Weights that settle while they wander, (steps, 8)."""
    noise = torch.randn(steps, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    settling = torch.exp(-torch.linspace(0, 4, steps, dtype=torch.float64))[:, None] * torch.linspace(-2, 2, 8)
    return settling + 0.02 * noise.cumsum(0) / math.sqrt(steps) * 5 + 0.1 * noise


@pytest.mark.parametrize("std", [0.05, 0.07, 0.1, 0.15, 0.2])
def test_any_width_follows_from_stored_averages_of_two(std):
    path, every = trajectory(4096), 256
    tracked = {0.05: EMA([path[0]], PowerFunction(0.05)), 0.1: EMA([path[0]], PowerFunction(0.1))}
    direct, stored = EMA([path[0]], PowerFunction(std)), []
    for n, weights in enumerate(path):
        for average in (*tracked.values(), direct):
            average.update([weights], 1, n)
        if (n + 1) % every == 0:
            stored += [(n + 1, width, average.tensors[0].clone()) for width, average in tracked.items()]
    steps, stds = (torch.tensor([row[i] for row in stored], dtype=torch.float64) for i in (0, 1))
    shares = combination(steps, stds, 4096, std)
    found = sum(share * row[2] for share, row in zip(shares, stored, strict=True))
    apart = (tracked[0.05].tensors[0] - tracked[0.1].tensors[0]).abs().max()
    assert (found - direct.tensors[0]).abs().max() < (0.02 if std <= 0.15 else 0.2) * apart
    assert shares.sum().item() == pytest.approx(1, abs=1e-9)


def test_a_run_keeps_snapshots_from_which_its_model_is_read_at_any_width(tmp_path):
    settings = tiny.trainer(60, power_emas=[0.05, 0.1, 0.15], snapshot_every=6, ema_half_life=[200, 400])
    tiny.train(tmp_path, settings)
    stored = Checkpoints(tmp_path / "checkpoints")
    weights = reconstruct(tmp_path, 0.1)
    exact = stored.weights(ema="ema-0.1")
    assert max((weights[name] - exact[name]).abs().max() for name in exact) < 1e-5
    kept = tmp_path / "kept"
    (tmp_path / "snapshots").rename(kept)
    (tmp_path / "snapshots").mkdir()
    for step in Checkpoints(kept, None).steps():  # the two outer widths alone, as in the paper
        folder = tmp_path / f"snapshots/step-{step:09d}"
        folder.mkdir()
        for std in ("0.05", "0.15"):
            (kept / folder.name / f"ema-{std}.safetensors").rename(folder / f"ema-{std}.safetensors")
    between, narrow = reconstruct(tmp_path, 0.1), stored.weights(ema="ema-0.05")
    apart = max((narrow[name] - exact[name]).abs().max() for name in exact)
    assert max((between[name] - exact[name]).abs().max() for name in exact) < 0.1 * apart
    assert {*stored.weights(ema="ema-400")} == {*exact}
    with pytest.raises(FileNotFoundError, match=r"no ema-7\.safetensors: choose one of ema, ema-0\.05"):
        stored.weights(ema="ema-7")
    with pytest.raises(FileNotFoundError, match="stored no power-function averages"):
        reconstruct(tmp_path / "nowhere", 0.1)


def test_a_resumed_run_tracks_the_same_averages_and_drops_later_snapshots(tmp_path):
    options = {"power_emas": [0.1], "snapshot_every": 5, "schedule": "constant"}
    tiny.train(tmp_path / "whole", tiny.trainer(20, **options))
    tiny.train(tmp_path / "cut", tiny.trainer(14, **options))
    (tmp_path / "cut/snapshots/step-000000019").mkdir()
    tiny.train(tmp_path / "cut", tiny.trainer(20, **options), resume=True)
    first, second = (Checkpoints(tmp_path / name / "checkpoints").weights(ema="ema-0.1") for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert Checkpoints(tmp_path / "cut/snapshots").steps() == [5, 10, 14, 15, 20]


def test_a_kill_while_a_snapshot_is_written_loses_none(tmp_path, monkeypatch):
    options = {"power_emas": [0.1], "snapshot_every": 10, "checkpoint_every": 10}
    write = TrainingState.snapshot

    def killed(state, snapshots):
        if state.step == 20:
            raise KeyboardInterrupt
        write(state, snapshots)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "snapshot", killed)
        with pytest.raises(KeyboardInterrupt):
            tiny.train(tmp_path, tiny.trainer(40, **options))
    tiny.train(tmp_path, tiny.trainer(40, **options), resume=True)
    assert Checkpoints(tmp_path / "snapshots").steps() == [10, 20, 30, 40]


def test_a_half_life_longer_than_the_run_is_cut_by_the_ramp():
    assert HalfLife(1e9, 0.05)(10, 1000) == pytest.approx(0.5 ** (10 / 50))


def test_the_model_of_a_run_at_a_width(tmp_path):
    run = Run.create(tmp_path, {
        "seed": 0, "event_shape": [2], "sde": {"_target_": "score_sde.sde.VPSDE"},
        "parameterization": {"_target_": "score_sde.parameterization.Noise"},
        "network": {"_target_": "score_sde.networks.MLP", "event_shape": [2], "width": 8, "depth": 1, "frequencies": 4},
    })  # fmt: skip
    from score_sde.build import build_model

    model = build_model(run.config)
    tiny.train(tmp_path, tiny.trainer(12, power_emas=[0.05, 0.1], snapshot_every=2), model=model)
    wide, narrow = run.model(ema=0.1), run.model(ema=0.05)
    assert any((a != b).any() for a, b in zip(wide.parameters(), narrow.parameters(), strict=True))
    tracked = run.checkpoints.weights(ema="ema-0.1")
    assert all(torch.allclose(value, tracked[name], atol=1e-5) for name, value in wide.state_dict().items())


def test_averages_that_would_have_one_name_are_refused():
    for options in ({"ema_half_life": [500, 1234567, 1234568]}, {"ema_half_life": [500, 0.1], "power_emas": [0.1]}):
        with pytest.raises(ValueError, match="two averages have the name ema-"):
            tiny.trainer(1, **options)

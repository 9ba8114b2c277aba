"""scripts/likelihood.py on untrained runs of integer and of real-valued data, whose likelihoods are known."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from score_sde.build import build, build_model
from score_sde.run import Run

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import likelihood  # noqa: E402
from typed import script  # noqa: E402

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


def test_a_solver_that_fails_ends_the_script_in_its_one_line(tmp_path: Path) -> None:
    run = untrained(tmp_path, RING, [2])
    lost = {name: torch.full_like(value, torch.nan) for name, value in run.model().state_dict().items()}
    run.checkpoints.save(1, {"weights": lost, "ema": lost}, {"step": 1})
    said = script("likelihood", f"run={run.path}", "count=8", "method=dopri5", cwd=tmp_path, code=1)
    assert "not finite" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("dequantize", [True, False])
def test_integers_come_back_from_the_scale_of_the_model(dequantize: bool) -> None:
    data = build({**DIGITS, "dequantize": dequantize})
    sets = likelihood.examples(data, 20, ["shuffled", "inverted", "uniform"], torch.Generator().manual_seed(0))
    raw = ((build({**DIGITS, "dequantize": True}).reference(20).x + 1) * 8.5).floor().long()
    assert torch.equal(sets["held out"], raw)
    assert torch.equal(sets["shuffled"].flatten(1).sort().values, raw.flatten(1).sort().values)
    assert torch.equal(sets["inverted"], 16 - raw)
    assert 0 <= sets["uniform"].min() < sets["uniform"].max() <= 16
    bins = likelihood.lattice(data)
    middle = bins["low"] + bins["bin_width"] * (raw + 0.5)
    expected = raw * (2 / 16) - 1 if not dequantize else (raw + 0.5) * (2 / 17) - 1
    torch.testing.assert_close(middle, expected)


def test_bits_of_the_digits_under_a_gaussian(tmp_path: Path) -> None:
    """Each pixel is N(0, 1 / 4) to the untrained model."""
    run = untrained(tmp_path, DIGITS, [1, 8, 8])
    out = script("likelihood", f"run={run.path}", "count=8", "steps=60", "method=adams", "draws=2",
                 "dequantization=variational", "ood=[inverted]", "bound=64", cwd=tmp_path)  # fmt: skip
    table = pd.read_csv(run.path / "likelihood/likelihood.csv")
    assert list(table["set"].unique()) == ["held out", "inverted"]
    x = run.data().reference(8).x.double()
    # A Gaussian bound by uniform dequantisation, another draw of which changes little over 64 dimensions.
    expected = -torch.distributions.Normal(0.0, 0.5).log_prob(x).flatten(1).sum(1) / (64 * np.log(2)) - np.log2(2 / 17)
    found = table[table["set"] == "held out"]["bits_per_dim"].to_numpy()
    np.testing.assert_allclose(found, expected.numpy(), atol=0.08)
    # The bound is tight for the exact denoiser; 64 draws of a term that varies, in a mean over 8 images.
    gap = table[table["set"] == "held out"]["bound_bits_per_dim"].to_numpy() - expected.numpy()
    assert abs(gap.mean()) < 4 * gap.std() / np.sqrt(8) + 0.03
    assert "likelihood.csv" in out
    assert "two laws" in out
    assert (run.path / "likelihood/likelihood.png").stat().st_size > 1000


def test_densities_of_points_stand_beside_the_true_ones(tmp_path: Path) -> None:
    run = untrained(tmp_path, RING, [2])
    out = script("likelihood", f"run={run.path}", "count=6", "ood=[uniform]", "method=dopri5", cwd=tmp_path)
    assert "two laws" not in out
    table = pd.read_csv(run.path / "likelihood/likelihood.csv")
    x = run.data().reference(6).x.double()
    found = table[table["set"] == "held out"]
    expected = torch.distributions.Normal(0.0, 0.5).log_prob(x).sum(1)
    np.testing.assert_allclose(found["log_prob"], expected, rtol=1e-3)
    np.testing.assert_allclose(found["true_log_prob"], run.data().target.log_prob(x), atol=1e-9)
    assert (found["std_error"] == 0).all()
    assert list(found["index"]) == [*range(6)]


def test_other_settings_leave_likelihoods_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = untrained(tmp_path / "run", RING, [2])
    monkeypatch.chdir(tmp_path)
    for count, name in ((3, "own"), (4, "own-2"), (3, "own")):
        monkeypatch.setattr(sys, "argv", ["likelihood.py", f"run={run.path}", f"count={count}", "ood=[]", "output=own"])
        likelihood.main()
        assert len(pd.read_csv(tmp_path / name / "likelihood.csv")) == count
        assert (tmp_path / name / "likelihood.png").exists()
    assert {folder.name for folder in tmp_path.iterdir()} == {"run", "own", "own-2"}


def test_files_of_ones_own_stand_beside_held_out_data(tmp_path: Path) -> None:
    run = untrained(tmp_path, RING, [2])
    points = np.random.default_rng(0).normal(size=(3, 2))
    np.save(tmp_path / "mine.npy", points)
    np.save(tmp_path / "one.npy", points[0])
    script("likelihood", f"run={run.path}", "count=4", "input=[mine.npy,one.npy]", cwd=tmp_path)
    table = pd.read_csv(run.path / "likelihood/likelihood.csv")
    assert table["set"].value_counts().to_dict() == {"held out": 4, "mine": 3, "one": 1}
    expected = torch.distributions.Normal(0.0, 0.5).log_prob(torch.from_numpy(points)).sum(1)
    np.testing.assert_allclose(table[table["set"] == "mine"]["log_prob"], expected, rtol=1e-3)


@pytest.mark.parametrize("test", [None, "y"])
def test_the_index_is_the_row_of_the_array(test: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the training array where a share is held out, else of the test array, for sets made of them too."""
    arrays = {name: np.random.default_rng(i).normal(size=(40, 2)) for i, name in enumerate("xy")}
    np.savez(tmp_path / "a.npz", **arrays)
    np.save(tmp_path / "mine.npy", arrays["y"][:3])
    options = {"test": test, "held_out": None if test else 0.5}
    data = {"_target_": "score_sde.data.files.load_file", "path": str(tmp_path / "a.npz"), **options}
    run = untrained(tmp_path / "run", data, [2])
    monkeypatch.chdir(tmp_path)
    options = ["count=12", "batch_size=5", "ood=[uniform]", "input=mine.npy"]
    monkeypatch.setattr(sys, "argv", ["likelihood.py", f"run={run.path}", *options])
    likelihood.main()
    table = pd.read_csv(run.path / "likelihood/likelihood.csv").set_index("set")
    held = table.loc["held out"]
    log_prob = torch.distributions.Normal(0.0, 0.5).log_prob(torch.from_numpy(arrays[test or "x"])).sum(1)
    np.testing.assert_allclose(held["log_prob"], log_prob[held["index"].to_numpy()], rtol=1e-3)
    assert held["index"].nunique() == 12
    assert list(table.loc["uniform", "index"]) == list(held["index"])
    assert list(table.loc["mine", "index"]) == [0, 1, 2]


def test_integers_of_a_file_are_the_same_scaled_or_not(tmp_path: Path) -> None:
    data = build({**DIGITS, "dequantize": True})
    codes = torch.randint(0, 17, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "codes.npy", codes.numpy().astype(np.uint8))
    np.save(tmp_path / "scaled.npy", codes.numpy() / 8 - 1)
    for name in ("codes", "scaled"):
        assert torch.equal(likelihood.own(tmp_path / f"{name}.npy", data), codes)
    np.save(tmp_path / "wide.npy", codes.numpy() * 255.0)
    with pytest.raises(ValueError, match="values from 0 to 4080: give integers from 0 to 16, or floats from -1 to 1"):
        likelihood.own(tmp_path / "wide.npy", data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["divergence=skilling"], "divergence is one of exact, hutchinson, hutch++; got 'skilling'"),
        (["method=euler"], "method is one of adams, dopri5, tsit5, bosh3, RK45, RK23, DOP853, Radau, BDF, LSODA; got 'euler'"),
        (["divergence=hutchinson", "probes=0"], "give a whole number probes >= 1, got probes=0"),
        (["probes=5"], "probes=5 with divergence='exact': the exact trace takes none, leave it out"),
        (["truncation=clip"], "truncation is one of none, tweedie; got 'clip'"),
        (["rtol=-1"], "tolerances are positive, got rtol=-1 and atol=0.0001"),
        (["method=adams", "steps=2"], "steps=2 with method='adams': "
         "steps >= 4 go with method='adams', tolerances with others"),
        (["dequantization=flow"], "dequantization is one of uniform, variational; got 'flow'"),
        (["ood=[noise]"], "ood is a list of 'shuffled', 'inverted' and 'uniform', got 'noise'"),
        (["bound=-1"], "give a whole number bound >= 0, got bound=-1"),
        (["count=1"], "give a whole number count >= 2, got count=1"),
        (["run=/nowhere"], "/nowhere does not exist, so it is no run: give the folder that scripts/train.py wrote"),
    ],
)  # fmt: skip
def test_wrong_inputs_end_in_one_line(options, message, tmp_path, monkeypatch, capsys) -> None:
    """In this process: a script's start would take longer than all it does."""
    run = untrained(tmp_path / "run", RING, [2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["likelihood.py", f"run={run.path}", *options])
    with pytest.raises(SystemExit) as exit_:
        likelihood.main()
    assert exit_.value.code == f"error: {message}"

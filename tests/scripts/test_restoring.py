"""scripts/compare.py task=...: tables against exact posteriors and on a run's images, wrong inputs in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
import pandas as pd
import pytest
from omegaconf import OmegaConf

from score_sde.run import Run, build_model
from score_sde.training import DenoisingScoreMatching, Trainer, UniformTimes

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import restoring  # noqa: E402

FEW = ["budgets=[3]", "seeds=[0]", "num_samples=50", "restoration.samplers=[ddim]", "restoration.count=3"]


def compared(folder: Path, *arguments: str) -> Path:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return restoring.run_task(hydra.compose("compare", [*FEW, f"output={folder}", *arguments]))


@pytest.mark.parametrize(
    ("arguments", "certified"),
    [(["task=linear", "restoration.prior=ring"], False), (["task=linear", "restoration.prior=gaussian"], True),
     (["task=colorize"], False)],
)  # fmt: skip
def test_against_exact_posteriors(tmp_path, arguments, certified):
    folder = compared(tmp_path, *arguments, "restoration.methods=[exact,mmps,replacement,ddrm]")
    table = pd.read_csv(folder / "posteriors.csv")
    assert list(table["method"].unique()) == ["exact", "replacement", "mmps", "ddrm"]
    assert table["ratio"].notna().all()
    assert (folder / "posteriors.png").exists()
    assert (folder / "certificate.csv").exists() == certified


def test_on_a_run(tmp_path):
    config = OmegaConf.create({
        "data": {"_target_": "score_sde.data.digits", "labels": False},
        "network": {"_target_": "score_sde.networks.MLP", "event_shape": [1, 8, 8], "width": 16, "depth": 1},
        "sde": {"_target_": "score_sde.sde.VPSDE"},
        "parameterization": {"_target_": "score_sde.parameterization.Karras"},
        "event_shape": [1, 8, 8], "seed": 0,
    })  # fmt: skip
    run = Run.create(tmp_path / "run", config)
    trainer = Trainer(steps=2, batch_size=8, device="cpu", progress=False, checkpoint_every=1, log_every=1)
    trainer.fit(build_model(config), run.data(), DenoisingScoreMatching(), UniformTimes(), run.path, seed=0)
    folder = compared(
        tmp_path / "out", f"run={run.path}", "task=superres", "restoration.methods=[diffpir,mmps,repaint]"
    )
    table = pd.read_csv(folder / "restorations.csv")
    assert list(table["method"]) == ["pseudo-inverse", "diffpir", "mmps", "repaint"]
    assert table[["psnr", "ssim", "misfit"]].notna().all(axis=None)
    assert (folder / "sheet.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=paint"], "unknown task 'paint'; known: inpaint, colorize, superres, deblur"),
        (["task=superres", "restoration.methods=[mmp]"], "unknown method 'mmp'"),
        (["task=superres", "restoration.samplers=[heun2]"], "unknown sampler 'heun2'"),
        (["task=superres", "restoration.prior=ring"], "task=linear is for ring"),
        (["task=linear", "restoration.prior=square"], "unknown prior 'square'"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(tmp_path, arguments, message):
    with pytest.raises(ValueError) as refusal:
        compared(tmp_path, *arguments)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)

"""scripts/evaluate.py: one JSON and a sample sheet from a run on images, and one line for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typed import script

from score_sde import Run

NETWORK = ["network=unet", "network.width=8", "network.multipliers=[1]", "network.blocks=1", "network.attention=[]"]
TINY = ["trainer.steps=2", "trainer.batch_size=4", "trainer.progress=false", "num_samples=8", "sampler.grid.steps=2",
        "evaluation.samplers=null", "evaluation.metrics=[sliced_w2]", "evaluation.memorization=false"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray(rng.integers(0, 256, (12, 8), dtype=np.uint8)).save(folder / f"{i}.png")
    run = tmp_path_factory.mktemp("runs") / "run"
    data = ["data=folder", f"data.path={folder}", "data.channels=1", "data.held_out=0.3", "data.flip=false"]
    script("train", f"hydra.run.dir={run}", *data, *NETWORK, *TINY, cwd=folder)
    return run


def test_one_json_and_a_sample_sheet(run: Path, tmp_path: Path) -> None:
    arguments = ["sampler=heun", "sampler.grid.steps=3", "num_samples=12", "features=[pixels]", "memorization=true"]
    out = script("evaluate", f"run={run}", *arguments, f"output={tmp_path / 'out'}", cwd=tmp_path)
    report = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert (report["num_samples"], report["seed"], report["step"]) == (12, 0, 2)
    assert report["settings"]["samplers"]["heun"]["grid"]["steps"] == 3
    heun = report["samplers"]["heun"]
    assert heun["nfe"] == 7
    assert {"sliced_w2", "FD (pixels)", "KID (pixels)", "memorised"} <= set(heun["metrics"])
    assert heun["metrics"]["FD (pixels)"]["floor"] > 0
    assert report["references"][0]["data"] == Run.open(run).data().fingerprint
    for figure in ("samples_heun", "nearest_heun"):
        assert Image.open(tmp_path / f"out/figures/{figure}.png").width > 200
    assert np.load(tmp_path / "out/samples/heun.npy").shape == (12, 1, 12, 8)
    assert "FD (pixels)" in out


def test_other_settings_leave_an_evaluation_as_it_was(run: Path, tmp_path: Path) -> None:
    for number, name in ((3, "own"), (4, "own-2"), (3, "own")):
        options = [f"sampler.grid.steps={number}", "num_samples=8", "figures=false", f"output={tmp_path / 'own'}"]
        script("evaluate", f"run={run}", "sampler=heun", *options, cwd=tmp_path)
        report = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert report["settings"]["samplers"]["heun"]["grid"]["steps"] == number
    assert {folder.name for folder in tmp_path.iterdir()} == {"own", "own-2"}


WRONG = {
    "unknown features": (["features=[fid]"], "unknown extractor 'fid'"),
    "references without features": (
        ["+references.pca=here"],
        "references name 'pca', which is not among the features []",
    ),
    "one and several samplers": (["sampler=heun", "samplers=[ddim]"], "give either sampler="),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_ends_in_one_line(case: str, run: Path, tmp_path: Path) -> None:
    arguments, message = WRONG[case]
    error = script("evaluate", f"run={run}", *arguments, f"output={tmp_path / 'out'}", cwd=tmp_path, code=1)
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

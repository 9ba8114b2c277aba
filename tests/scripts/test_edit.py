"""scripts/edit.py on a tiny digits run: its tasks, and wrong inputs in one line."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from score_sde.build import build_model
from score_sde.run import Run
from score_sde.training import DenoisingScoreMatching, Trainer, UniformTimes

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
edit = importlib.import_module("edit")
FEW = ["count=2", "draws=3", "sampler.grid.steps=4", "noise_std=0.1"]


def run_edit(run: Path, *arguments: str) -> Path:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return edit.run_task(hydra.compose("edit", [f"run={run}", *FEW, *arguments]))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of labelled digits, as training leaves it but for the training."""
    folder = tmp_path_factory.mktemp("digits")
    config = OmegaConf.create({
        "data": {"_target_": "score_sde.data.digits", "labels": True},
        "network": {"_target_": "score_sde.networks.MLP", "event_shape": [1, 8, 8], "width": 16, "depth": 1,
                    "num_classes": 10},
        "sde": {"_target_": "score_sde.sde.VPSDE"},
        "parameterization": {"_target_": "score_sde.parameterization.Karras"},
        "objective": {"label_dropout": 0.1}, "event_shape": [1, 8, 8], "seed": 0,
    })  # fmt: skip
    opened = Run.create(folder, config)
    trainer = Trainer(steps=2, batch_size=8, device="cpu", progress=False, checkpoint_every=1, log_every=1)
    parts = build_model(config), opened.data(), DenoisingScoreMatching(), UniformTimes()
    trainer.fit(*parts, folder, seed=0)
    return folder


def test_tasks_leave_arrays_and_a_sheet(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :5] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    folder = run_edit(run, "task=inpaint", f"mask={tmp_path / 'mask.png'}")
    assert folder == run / "edits/inpaint"
    assert "5 network calls a draw" in capsys.readouterr().out
    assert np.load(folder / "after.npy").shape == (2, 3, 1, 8, 8)
    assert (folder / "sheet.png").exists()
    assert np.load(run_edit(run, "task=class", "label=3") / "after.npy").shape == (2, 3, 1, 8, 8)


def test_results_of_other_settings_stand_beside_one_another(run: Path) -> None:
    names = [run_edit(run, "task=superres", f"seed={seed}").name for seed in (0, 1, 2, 1)]
    assert names == ["superres", "superres-2", "superres-3", "superres-2"]
    assert json.loads((run / "edits/superres-3/settings.json").read_text())["seed"] == 2


@pytest.mark.parametrize(
    ("task", "override"), [("interpolate", "sampler=heun"), ("interpolate", "+noise_std=1"), ("superres", "label=3"),
                           ("class", "guidance.iterations=3"), ("class", "+operator.factor=2")],
)  # fmt: skip
def test_options_of_other_tasks_are_refused(task: str, override: str) -> None:
    edit.check_options(task, [f"task={task}", "seed=1", "++count=3"])
    with pytest.raises(ValueError, match=re.escape(f"{override} does nothing in task={task}")):
        edit.check_options(task, [override])


def test_an_observation_is_taken_as_it_is(run: Path, tmp_path: Path) -> None:
    small = np.random.default_rng(0).uniform(-1, 1, (2, 1, 4, 4)).astype(np.float32)
    np.save(tmp_path / "small.npy", small)
    options = ["guidance=replacement", "degraded=true", f"input={tmp_path / 'small.npy'}", f"output={tmp_path / 'out'}"]
    run_edit(run, "task=superres", *options, "noise_std=0")
    after = np.load(tmp_path / "out/after.npy")
    pooled = after.reshape(2, 3, 1, 4, 2, 4, 2).mean((4, 6))
    np.testing.assert_allclose(pooled, np.repeat(small[:, None], 3, 1), atol=1e-5)


def test_interpolation_leaves_a_path_between_neighbours(run: Path) -> None:
    assert np.load(run_edit(run, "task=interpolate") / "after.npy").shape == (1, 3, 1, 8, 8)


def test_a_clean_image_is_no_observation(run: Path, tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    grey.save(tmp_path / "truth.png")
    grey.crop((0, 0, 5, 5)).save(tmp_path / "mask.png")
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    Image.fromarray(red).save(tmp_path / "red.png")
    np.save(tmp_path / "truth.npy", np.zeros((2, 1, 8, 8), np.float32))
    for given, message in (
        (
            ["task=superres", "degraded=true", f"input={tmp_path / 'truth.png'}"],
            "an observation of task=superres is 4x4",
        ),
        (["task=superres", "degraded=true", f"input={tmp_path / 'red.png'}"], "4x4 in colour"),
        (["task=superres", "degraded=true", f"input={tmp_path / 'truth.npy'}"], "holds an array of shape (2, 1, 8, 8)"),
        (["task=inpaint", f"mask={tmp_path / 'mask.png'}"], "a mask of shape (5, 5) does not fit x of shape (1, 8, 8)"),
        (["task=superres", "degraded=true"], "give input=<image, folder or .npy>"),
    ):
        with pytest.raises(ValueError) as refusal:
            run_edit(run, *given)
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=interpolate", "count=1"], "needs two inputs or more"),
        (["task=class"], "give label=<number>"),
        (["task=superres", "guidance=replacement"], "Replacement takes an observation without noise"),
        (["task=paint"], "task is one of inpaint, colorize, superres, deblur, class, interpolate; got 'paint'"),
        (["task=class", "label=[1,2]"], "brings inputs to one label, got label=[1, 2]"),
        (
            ["task=superres", "guidance=classifier_free"],
            "ClassifierFree restores nothing: task=superres takes guidance=mmps",
        ),
        (["task=superres", "draws=0"], "draws >= 1, got draws=0"),
        (["task=class", "label=12"], "knows the classes 0 to 9"),
        (["task=colorize"], "do not fit x of shape (1, 8, 8)"),
        (["task=superres", "+operator.size=3"], "does not fit task=superres"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(run: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        run_edit(run, *arguments)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)

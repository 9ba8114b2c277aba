"""scripts/edit.py on a tiny digits run: its tasks, and wrong inputs in one line."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from score_sde import ProbabilityFlowODE
from score_sde.build import build_model
from score_sde.guidance import Conditioned, interpolate, task_operator
from score_sde.run import Run
from score_sde.training import DenoisingScoreMatching, Trainer, UniformTimes

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
edit, figures = importlib.import_module("edit"), importlib.import_module("scripting.figures")
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
    assert "5 network calls per draw" in capsys.readouterr().out
    after = np.load(folder / "after.npy")
    assert after.shape == (2, 3, 1, 8, 8)
    assert len(list((folder / "png").iterdir())) == 6
    last = np.asarray(Image.open(folder / "png/00001-3.png"))
    np.testing.assert_array_equal(last, np.clip(np.round((after[1, 2, 0] + 1) * 127.5), 0, 255))
    assert (folder / "sheet.png").exists()
    assert np.load(run_edit(run, "task=class", "label=3") / "after.npy").shape == (2, 3, 1, 8, 8)


def test_results_of_other_settings_stand_beside_one_another(run: Path) -> None:
    names = [run_edit(run, "task=superres", f"seed={seed}").name for seed in (0, 1, 2, 1)]
    assert names == ["superres", "superres-2", "superres-3", "superres-2"]
    assert json.loads((run / "edits/superres-3/settings.json").read_text())["seed"] == 2


def test_what_is_seen_of_colours_is_shown_in_grey() -> None:
    x = torch.rand(2, 3, 4, 4)
    for task, shape in (("colorize", (2, 1, 4, 4)), ("deblur", (2, 3, 4, 4)), ("superres", (2, 3, 4, 4))):
        operator = task_operator(task, (3, 4, 4))
        seen = figures.visible(operator, operator(x))
        assert seen.shape == shape
        torch.testing.assert_close(operator(x), seen if task != "superres" else operator(seen))


@pytest.mark.parametrize(
    ("task", "override"), [("interpolate", "sampler=heun"), ("interpolate", "+noise_std=1"), ("superres", "scale=3"),
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


def test_pictures_of_draws_are_called_after_their_inputs(run: Path, tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        Image.fromarray(np.full((8, 8), 90, np.uint8)).save(tmp_path / f"{name}.png")
    folder = run_edit(run, "task=inpaint", f"input={tmp_path}", f"output={tmp_path / 'out'}")
    expected = {f"0000{i}-{name}-{draw}.png" for i, name in enumerate("ab") for draw in (1, 2, 3)}
    assert {file.name for file in (folder / "png").iterdir()} == expected
    between = run_edit(run, "task=interpolate", f"input=[{tmp_path / 'b.png'},{tmp_path / 'a.png'}]", "draws=1")
    assert [file.name for file in (between / "png").iterdir()] == ["00000-b-a-1.png"]


def untrained(folder: Path, shape: tuple[int, ...]) -> Path:
    """An MLP starts at F = 0: with Karras(1 / 2) that is the exact denoiser of N(0, I / 4)."""
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(20, *shape)) / 2)
    run = Run.create(folder / "run", {
        "data": {"_target_": "score_sde.data.load_file", "path": str(folder / "x.npy")},
        "network": {"_target_": "score_sde.networks.MLP", "event_shape": [*shape], "width": 8, "depth": 1},
        "sde": {"_target_": "score_sde.sde.VPSDE"}, "event_shape": [*shape], "seed": 0,
        "parameterization": {"_target_": "score_sde.parameterization.Karras", "sigma_data": 0.5},
    })  # fmt: skip
    weights = build_model(run.config).state_dict()
    run.checkpoints.save(0, {"weights": weights, "ema": weights}, {"step": 0})
    return run.path


@pytest.mark.parametrize("shape", [(5,), (2, 6), (1, 2, 3, 4)])
def test_missing_entries_of_any_shape_are_imputed(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Each row by what it misses, as by a mask for it alone, whatever the hidden entries hold."""
    run, x = untrained(tmp_path, shape), np.random.default_rng(1).normal(size=(3, *shape)) / 2
    mask = np.arange(shape[-1]) != 1  # for all rows but the second, which misses nothing
    hidden = np.broadcast_to(
        np.stack([~mask, 0 * mask, ~mask]).astype(bool).reshape(3, *[1] * (len(shape) - 1), -1), x.shape
    )
    np.save(tmp_path / "mask.npy", mask)
    np.save(tmp_path / "whole.npy", x)
    np.save(tmp_path / "holes.npy", np.where(hidden, np.nan, x))
    np.save(tmp_path / "spoilt.npy", np.where(~mask, np.nan, x))
    options = [f"output={tmp_path / 'out'}", "count=9", "noise_std=0.02", "sampler.grid.steps=50", "draws=40"]

    def after(name: str, *more: str) -> np.ndarray:
        return np.load(run_edit(run, f"input={tmp_path / name}.npy", *options, *more) / "after.npy")

    masked, holes = after("whole", f"mask={tmp_path / 'mask.npy'}", "degraded=true"), after("holes")
    assert holes.shape == (3, 40, *shape)
    np.testing.assert_allclose(holes[::2], masked[::2], atol=1e-5)
    np.testing.assert_array_equal(after("spoilt", f"mask={tmp_path / 'mask.npy'}"), masked)
    seen, drawn = np.broadcast_to(~hidden[:, None], holes.shape), np.broadcast_to(hidden[:, None], holes.shape)
    assert (
        abs(holes - x[:, None])[seen].max() < 6 * 0.02
    )  # below five standard deviations at worst, and the solver's error
    assert 0.35 < holes[drawn].std() < 0.65  # N(0, 1 / 4); 80 draws or more, four standard errors of 0.04


def test_inputs_beyond_the_count_are_said_to_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = untrained(tmp_path, (2,))
    np.save(tmp_path / "holes.npy", np.array([[0.1, np.nan]] * 3))
    for count, said in ((2, True), (3, False)):
        run_edit(run, f"input={tmp_path / 'holes.npy'}", f"count={count}", "draws=1", "sampler.grid.steps=2")
        assert ("the first 2 of 3 inputs: count=3 takes all\n" in capsys.readouterr().out) == said


def test_inputs_are_brought_to_a_label_in_a_context(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(20, 2)), y=np.arange(20) % 2,
             c=np.ones((20, 3)))  # fmt: skip
    config = OmegaConf.create({
        "data": {"_target_": "score_sde.data.files.load_file", "path": str(tmp_path / "data.npz"), "labels": "y",
                 "context": "c"},
        "network": {"_target_": "score_sde.networks.MLP", "event_shape": [2], "width": 8, "depth": 1, "num_classes": 2,
                    "context_width": 3},
        "sde": {"_target_": "score_sde.sde.VPSDE"},
        "parameterization": {"_target_": "score_sde.parameterization.Karras"},
        "objective": {"label_dropout": 0.1}, "event_shape": [2], "seed": 0,
    })  # fmt: skip
    opened = Run.create(folder, config)
    trainer = Trainer(steps=2, batch_size=8, device="cpu", progress=False, checkpoint_every=1, log_every=1)
    trainer.fit(build_model(config), opened.data(), DenoisingScoreMatching(), UniformTimes(), folder, seed=0)
    one, other = (
        np.load(run_edit(folder, "task=class", "label=1", f"context={context}") / "after.npy")
        for context in ("[0,1,2]", "[9,9,9]")
    )
    assert one.shape == (2, 3, 2)
    assert not np.array_equal(one, other)


def test_interpolation_leaves_a_path_between_neighbours(run: Path) -> None:
    assert np.load(run_edit(run, "task=interpolate") / "after.npy").shape == (1, 3, 1, 8, 8)


def test_a_network_that_needs_a_label_edits_under_it(run: Path, tmp_path: Path) -> None:
    """Of examples of that label, and as the bound model does; without a label it says what to give."""
    needing = shutil.copytree(run, tmp_path / "needing", ignore=shutil.ignore_patterns("edits"))
    config = OmegaConf.load(needing / "config.yaml")
    config.objective.label_dropout = 0.0
    OmegaConf.save(config, needing / "config.yaml")
    for task in ("inpaint", "interpolate"):
        with pytest.raises(ValueError, match=r"has not learnt to do without its label: give the one .* label=<value>"):
            run_edit(needing, f"task={task}")
        with pytest.raises(ValueError, match="knows the classes 0 to 9"):
            run_edit(needing, f"task={task}", "label=10")
    opened = Run.open(needing)
    x, model = opened.data().of_classes([3]).reference(2).x, Conditioned(opened.model(), label=3)
    between = interpolate(ProbabilityFlowODE(), model, x[:1], x[1:], [0.25, 0.5, 0.75]).transpose(0, 1)
    np.testing.assert_allclose(
        np.load(run_edit(needing, "task=interpolate", "label=3") / "after.npy"), between, atol=1e-5
    )
    np.save(tmp_path / "x.npy", x)
    three = run_edit(needing, "task=inpaint", "label=3")
    four = run_edit(needing, "task=inpaint", "label=4", f"input={tmp_path / 'x.npy'}")
    np.testing.assert_array_equal(np.load(three / "before.npy"), x)
    assert not np.array_equal(*(np.load(folder / "after.npy") for folder in (three, four)))


def test_a_clean_image_is_no_observation(run: Path, tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    grey.save(tmp_path / "truth.png")
    grey.crop((0, 0, 5, 5)).save(tmp_path / "mask.png")
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 200
    Image.fromarray(red).save(tmp_path / "red.png")
    np.save(tmp_path / "truth.npy", np.zeros((2, 1, 8, 8), np.float32))
    np.save(tmp_path / "holes.npy", np.full((4, 1, 4, 4), np.nan, np.float32))
    for given, message in (
        (
            ["task=superres", "degraded=true", f"input={tmp_path / 'truth.png'}"],
            "an observation of task=superres is 4x4",
        ),
        (["task=superres", "degraded=true", f"input={tmp_path / 'red.png'}"], "4x4 in colour"),
        (["task=superres", "degraded=true", f"input={tmp_path / 'truth.npy'}"], "holds an array of shape (2, 1, 8, 8)"),
        (["task=inpaint", f"mask={tmp_path / 'mask.png'}"], "a mask of shape (5, 5) does not fit x of shape (1, 8, 8)"),
        (["task=superres", "degraded=true"], "give input=<image, folder or .npy>"),
        (
            ["task=inpaint", f"mask={tmp_path / 'truth.npy'}"],
            "a mask is boolean, True where x is observed; got torch.float32",
        ),
        (["task=superres", "degraded=true", f"input={tmp_path / 'holes.npy'}"], "values that are not finite"),
    ):
        with pytest.raises(ValueError) as refusal:
            run_edit(run, *given)
        assert message in str(refusal.value)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("task", ["inpaint", "superres"])
def test_of_what_is_no_image_a_mask_says_what_is_seen(task: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"task={task} knows .* of images, not of events of shape \(4,\): take .* mask=<.npy>"
    ):
        run_edit(untrained(tmp_path, (4,)), f"task={task}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=interpolate", "count=1"], "needs two inputs or more"),
        (["task=class"], "give label=<number>"),
        (["task=superres", "guidance=replacement"], "Replacement takes an observation without noise"),
        (["task=paint"], "task is one of inpaint, colorize, superres, deblur, class, interpolate; got 'paint'"),
        (["task=class", "label=[1,2]"], "label=[1, 2]: give one, which all samples share"),
        (
            ["task=superres", "guidance=classifier_free"],
            "ClassifierFree restores no observations: task=superres takes guidance=mmps",
        ),
        (["task=superres", "draws=0"], "draws >= 1, got draws=0"),
        (["task=class", "label=12"], "knows the classes 0 to 9"),
        (["task=colorize"], "do not fit x of shape (1, 8, 8)"),
        (["task=superres", "+operator.facto=4"], "got 'facto': did you mean 'factor'?"),
        (["task=deblur", "+operator.std=wide"], "give a number std > 0, got std='wide'"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(run: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        run_edit(run, *arguments)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_draws_that_are_not_finite_are_counted_as_diverged(capsys: pytest.CaptureFixture[str]) -> None:
    after = torch.zeros(2, 3, 1, 4, 4)
    after[0, 1], after[1, 2, 0, 0, 0] = 50, torch.nan
    edit.print_quality("DPS", after, torch.zeros(2, 1, 4, 4), None)
    assert "warning: 2 of 6 draws are far beyond the data: DPS has diverged" in capsys.readouterr().out

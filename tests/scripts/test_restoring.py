"""scripts/compare.py task=...: tables against exact posteriors and on a run's images, wrong inputs in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from score_sde.build import build_model
from score_sde.run import Run
from score_sde.training import DenoisingScoreMatching, Trainer, UniformTimes

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from scripting import restoring  # noqa: E402

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
    if certified:
        runs = pd.read_csv(folder / "certificate.csv")[["method", "sampler"]]
        of_models = {(name, sampler) for name in ("exact", "mmps", "replacement") for sampler in ("ddim", "ancestral")}
        assert {*runs.itertuples(index=False, name=None)} == of_models | {("ddrm", "own")}


def test_results_of_other_settings_are_kept(tmp_path):
    home = tmp_path / "out"
    own = ["task=linear", "restoration.prior=ring", "restoration.methods=[mmps]"]
    for more, name in ([], "out"), (["budgets=[2]"], "out-2"), ([], "out"):
        assert compared(home, *own, *more) == tmp_path / name


def drawn(patch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """name -> figure of all that is saved from here on."""
    found: dict[str, Figure] = {}
    save = restoring.figures.save
    patch.setattr(
        restoring.figures, "save", lambda figure, path: (found.update({path.name: figure}), save(figure, path))
    )
    return found


def assert_readable(figure: Figure, samplers: list[str], line: str) -> None:
    """A panel for each sampler in one scale; the dashed line has a name; nothing is cut off."""
    assert [ax.get_title() for ax in figure.axes] == samplers
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    (legend,) = figure.legends
    names = {text.get_text(): handle for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)}
    assert names[line].get_linestyle() == "--"
    left, bottom, right, top = figure.bbox.padded(1).extents
    for text in (figure._suptitle, legend, *(ax.yaxis.label for ax in figure.axes)):
        box = text.get_window_extent()
        assert left <= box.x0 <= box.x1 <= right
        assert bottom <= box.y0 <= box.y1 <= top


@pytest.mark.parametrize("samplers", [["ddim"], ["ddim", "ancestral"]])
def test_curves_of_posteriors(tmp_path, monkeypatch, samplers):
    figures = drawn(monkeypatch)
    compared(tmp_path, "task=linear", "restoration.prior=ring", "restoration.methods=[exact,replacement,tds]",
             f"restoration.samplers=[{','.join(samplers)}]", "budgets=[3,6]")  # fmt: skip
    assert_readable(figures["posteriors.png"], samplers, "noise floor")


def test_on_a_run(tmp_path, monkeypatch):
    config = OmegaConf.create({
        "data": {"_target_": "score_sde.data.digits", "labels": True},
        "network": {"_target_": "score_sde.networks.MLP", "event_shape": [1, 8, 8], "width": 16, "depth": 1,
                    "num_classes": 10},
        "objective": {"label_dropout": 0.0},
        "sde": {"_target_": "score_sde.sde.VPSDE"},
        "parameterization": {"_target_": "score_sde.parameterization.Karras"},
        "event_shape": [1, 8, 8], "seed": 0,
    })  # fmt: skip
    run = Run.create(tmp_path / "run", config)
    trainer = Trainer(steps=2, batch_size=8, device="cpu", progress=False, checkpoint_every=1, log_every=1)
    trainer.fit(build_model(config), run.data(), DenoisingScoreMatching(), UniformTimes(), run.path, seed=0)
    with pytest.raises(ValueError, match="has not learnt to do without its label: give the one"):
        compared(tmp_path / "out", f"run={run.path}", "task=superres")
    figures = drawn(monkeypatch)
    folder = compared(tmp_path / "out", f"run={run.path}", "task=superres", "label=3", "restoration.samplers=[ddim,ancestral]",
                      "restoration.methods=[diffpir,mmps,repaint]")  # fmt: skip
    table = pd.read_csv(folder / "restorations.csv")
    assert list(table["method"]) == ["pseudo-inverse", "diffpir", "diffpir", "mmps", "mmps", "repaint"]
    assert table[["psnr", "ssim", "misfit"]].notna().all(axis=None)
    assert (folder / "sheet.png").exists()
    assert_readable(figures["restorations.png"], ["ddim", "ancestral"], "pseudo-inverse")
    rows = np.array(figures["sheet.png"].axes).reshape(3, 4)
    assert [row[0].get_ylabel() for row in rows] == ["ddim", "ancestral", "own"]
    assert [[ax.get_title() for ax in row if ax.images] for row in rows] == [
        ["truth", "seen", "diffpir", "mmps"], ["truth", "seen", "diffpir", "mmps"], ["truth", "seen", "repaint"],
    ]  # fmt: skip
    shown = [np.asarray(row[2].images[0].get_array()) for row in rows[:2]]
    assert not np.array_equal(*shown)


def test_on_a_run_of_contexts(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(20, 1, 8, 8)), c=np.ones((20, 2)))
    config = OmegaConf.create({
        "data": {"_target_": "score_sde.data.files.load_file", "path": str(tmp_path / "data.npz"), "context": "c"},
        "network": {"_target_": "score_sde.networks.MLP", "event_shape": [1, 8, 8], "width": 16, "depth": 1,
                    "context_width": 2},
        "sde": {"_target_": "score_sde.sde.VPSDE"},
        "parameterization": {"_target_": "score_sde.parameterization.Karras"},
        "conditions": ["context"], "event_shape": [1, 8, 8], "seed": 0,
    })  # fmt: skip
    run = Run.create(tmp_path / "run", config)
    trainer = Trainer(steps=2, batch_size=8, device="cpu", progress=False, checkpoint_every=1, log_every=1)
    trainer.fit(build_model(config), run.data(), DenoisingScoreMatching(), UniformTimes(), run.path, seed=0)
    task = [f"run={run.path}", "task=superres", "restoration.methods=[mmps]", "restoration.samplers=[ddim]"]
    with pytest.raises(ValueError, match=r"has not learnt to do without its context: give .* context=<value>"):
        compared(tmp_path / "out", *task)
    one, other = (
        pd.read_csv(compared(tmp_path / "out", *task, f"context={context}") / "restorations.csv")
        for context in ("[0,1]", "[9,9]")
    )
    assert one["psnr"].iloc[-1] != other["psnr"].iloc[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=paint"], "task is one of inpaint, colorize, superres, deblur, linear; got 'paint'"),
        (["task=superres", "restoration.methods=[mmp]"], "got 'mmp': did you mean 'mmps'?"),
        (["task=superres", "restoration.samplers=[heun2]"], "got 'heun2'"),
        (["task=superres", "restoration.methods=[]"], "nothing to compare: give some of exact, prior, replacement"),
        (
            ["task=superres", "restoration.samplers=[]"],
            "exact needs a sampler: give restoration.samplers, some of ddim",
        ),
        (["task=superres", "run=any", "restoration.methods=[tds]"], "a method is one of replacement, diffpir, dps"),
        (["task=superres", "restoration.prior=ring"], "task=linear is for ring"),
        (
            ["task=linear", "restoration.prior=square"],
            "prior is one of fields, ring, gaussian, gaussian64; got",
        ),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(tmp_path, arguments, message):
    with pytest.raises(ValueError) as refusal:
        compared(tmp_path, *arguments)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)

"""The scripts as a user types them: one run from training to report, a sweep, a resumed run, and wrong inputs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typed import ROOT, script

sys.path.insert(0, str(ROOT / "scripts"))
import report

TINY = ["trainer.steps=4", "trainer.batch_size=16", "trainer.checkpoint_every=2", "trainer.log_every=1", "num_samples=40",
        "trainer.progress=false", "trainer.sample_every=0", "evaluation.samplers=[ddim,ode]",
        "evaluation.metrics=[sliced_w2]", "figures=false", "network.width=32"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    own = "network.event_shape=${event_shape}"
    script("train", f"hydra.run.dir={folder}", *TINY, "figures=true", own, cwd=folder)
    return folder


def test_training_leaves_a_whole_run(run: Path) -> None:
    assert {"config.yaml", "checkpoints", "metrics.jsonl", "samples", "figures", "result.json"} == set(os.listdir(run))
    figures = {"densities.png", "score_field.png", "trajectories.png", "losses.png", "noise_to_data.gif"}
    assert set(os.listdir(run / "figures")) == figures
    result = json.loads((run / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["step"] == 4
    assert result["ddim/nfe"] == 51
    assert "network.event_shape=[2]" in result["overrides"]


def test_the_other_scripts_read_it(run: Path) -> None:
    for count, name in ((7, "heun"), (8, "heun-2"), (7, "heun")):
        options = ["sampler=heun", "sampler.grid.steps=3", f"num_samples={count}"]
        assert f"in {run / 'samples' / name}\n" in script("sample", f"run={run}", *options, cwd=run)
        assert np.load(run / "samples" / name / "samples.npy").shape == (count, 2)
    for noise, steps in (("brownian", 200), ("brownian", 400), ("sample", 400)):
        options = ["sampler=ancestral", f"sampler.grid.steps={steps}", f"noise={noise}", f"output={run / noise}{steps}"]
        script("sample", f"run={run}", "num_samples=20", *options, cwd=run)
    coarse, fine, other = (np.load(run / f"{each}/samples.npy") for each in ("brownian200", "brownian400", "sample400"))
    assert abs(coarse - fine).mean() < 0.1 * abs(other - fine).mean()
    out = script("evaluate", f"run={run}", "samplers=[heun]", "num_samples=20", f"output={run / 'of_heun'}", cwd=run)
    assert "samples/, figures/" in out
    figures = {
        "densities.png",
        "score_field.png",
        "trajectories.png",
        "losses.png",
        "noise_to_data.gif",
        "diagnosis.png",
        "score_error.png",
    }
    assert set(os.listdir(run / "of_heun/figures")) == figures
    script("evaluate", f"run={run}", "samplers=[heun]", "num_samples=20", "figures=false", cwd=run)
    assert set(pd.read_csv(run / "evaluation/evaluation.csv")["sampler"]) == {"heun"}
    options = ["samplers=[ddim,heun,ode]", "budgets=[6,12]", "seeds=[0,1]", "num_samples=30"]
    script("compare", f"run={run}", *options, f"output={run / 'compared'}", cwd=run)
    table = pd.read_csv(run / "compared/comparison.csv")
    assert (table[table["sampler"] != "ode"]["nfe"] <= table[table["sampler"] != "ode"]["budget"]).all()
    assert (run / "compared/sliced_w2_calls.png").exists()


def test_an_sde_of_the_user_s_own_file_is_trained_once_it_is_trusted(tmp_path: Path, monkeypatch) -> None:
    code = ["from score_sde import SDE", "class Straight(SDE):", "    t_min, t_max = 0.01, 0.99",
            "    def alpha(self, t): return 1 - t", "    def sigma(self, t): return t"]  # fmt: skip
    (tmp_path / "my_sde.py").write_text("\n".join(code))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    own = ["~sde", "+sde={_target_: my_sde.Straight}", f"hydra.run.dir={tmp_path / 'run'}"]
    assert "trust its module: trust=['my_sde']" in script("train", *own, *TINY, cwd=tmp_path, code=1)
    script("train", *own, "trust=[my_sde]", *TINY, cwd=tmp_path)
    assert (tmp_path / "run/result.json").exists()


def test_a_sampler_of_ones_own_stands_in_the_place_of_the_group(run: Path, tmp_path: Path) -> None:
    grid = "grid: {_target_: score_sde.grid.uniform, _partial_: true, steps: 3}"
    own = f"+sampler={{_target_: score_sde.Sampler, predictor: {{_target_: score_sde.Heun}}, {grid}}}"
    out = script("sample", f"run={run}", "~sampler", own, "num_samples=7", f"output={tmp_path}", cwd=run)
    assert "7 samples of Sampler: 7 network calls each" in out
    script("evaluate", f"run={run}", "~sampler", own, "num_samples=20", f"output={tmp_path}", "figures=false", cwd=run)
    again = tmp_path / "again"
    quick = ["debug=minute", "network.width=32", "figures=false"]
    out = script("train", *quick, "~sampler", own, f"hydra.run.dir={again}", cwd=tmp_path)
    assert "4 samples tell little, whatever the ratio: give num_samples=2000 or more" in out
    assert {"config.yaml", "checkpoints", "metrics.jsonl", "samples", "result.json"} == set(os.listdir(again))
    out = script("evaluate", f"run={again}", "num_samples=20", "figures=false", cwd=tmp_path)
    assert "Sampler" in out
    assert "figures" not in os.listdir(again)


def test_samples_do_not_depend_on_the_batch_size(run: Path, tmp_path: Path) -> None:
    drawn = []
    for size in (2, 5):
        output = tmp_path / str(size)
        script(
            "sample", f"run={run}", "sampler=ddim", "num_samples=5", f"batch_size={size}", f"output={output}", cwd=run
        )
        drawn.append(np.load(output / "samples.npy"))
    np.testing.assert_allclose(*drawn, atol=1e-5)


def test_members_of_a_sweep_say_where_their_samples_are(run: Path, tmp_path: Path) -> None:
    said = script(
        "sample", "-m", f"run={run}", "sampler=ddim", "num_samples=5", "seed=3,4", "output=mine", cwd=tmp_path
    )
    for seed, folder in ((3, "mine"), (4, "mine-2")):
        assert f"num_samples=5 seed={seed} output=mine: 5 samples of ddim" in said
        assert json.loads((tmp_path / folder / "settings.json").read_text())["seed"] == seed


def test_a_resumed_run_goes_on_where_it_was(run: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    script("train", f"hydra.run.dir={short}", *TINY, "trainer.schedule=constant", "trainer.steps=2", cwd=tmp_path)
    script("train", f"resume={short}", "trainer.steps=4", cwd=tmp_path)
    whole = tmp_path / "whole"
    script("train", f"hydra.run.dir={whole}", *TINY, "trainer.schedule=constant", cwd=tmp_path)
    for name in ("weights", "ema"):
        file = f"checkpoints/step-000000004/{name}.safetensors"
        assert (short / file).read_bytes() == (whole / file).read_bytes()


def test_a_sweep_of_no_job_says_so(tmp_path: Path) -> None:
    error = script("train", "-m", "target=glob(zzz*)", "seed=0,1", cwd=tmp_path, code=1)
    assert error == "error: the sweep has no job, as a pattern matches no name: see target=glob(zzz*)\n"


def test_a_sweep_with_a_failing_job_is_reported(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    options = ["sde=vp,ve", "seed=0,1", "trainer.learning_rate=1e-3,-1", f"hydra.sweep.dir={sweep}"]
    error = script("train", "-m", *options, *TINY, cwd=tmp_path, code=1)
    assert [f"{sweep}/{job} failed: " in error for job in range(8)] == [False, True] * 4
    assert f"error: jobs of this sweep failed, see above: python scripts/report.py {sweep} lists them" in error
    script("train", f"resume={sweep / '0'}", "trainer.progress=false", cwd=tmp_path)  # it is what it was
    (sweep / "2" / "result.json").unlink()  # as if it still ran
    out = script("report", str(sweep), cwd=tmp_path)
    table = pd.read_csv(sweep / "report.csv").set_index("setting")
    names = [f"sde={sde}, trainer.learning_rate={rate}" for sde in ("vp", "ve") for rate in ("0.001", "-1")]
    assert dict(table["finished"]) == dict(zip(names, (1, 0, 2, 0), strict=True))
    assert dict(table["unfinished"]) == dict(zip(names, (1, 0, 0, 0), strict=True))
    assert dict(table["failed"]) == dict(zip(names, (0, 2, 0, 2), strict=True))
    assert out.count("failed: ") == 4
    assert f"unfinished: 2 ({names[0]}, seed 1)" in out
    assert "learning_rate > 0, got learning_rate=-1" in out
    assert (sweep / "report.png").exists()


def test_a_sweep_s_job_that_ends_in_a_traceback_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Linear):\n"
        "    def forward(self, x, c_noise):\n"
        "        return super().forward(x)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    own = ["~network", "+network={_target_: my_net.Net, in_features: 3, out_features: 2}", "trust=[my_net]"]
    options = ["seed=0,1", f"hydra.sweep.dir={tmp_path / 's'}", *(one for one in TINY if "network" not in one)]
    error = script("train", "-m", *own, *options, cwd=tmp_path, code=1)
    assert "Traceback" in error
    table = report.collect(tmp_path / "s", "metric")
    assert list(table["status"]) == ["failed", "failed"]
    assert all(why.startswith("RuntimeError: mat1 and mat2 shapes") for why in table["error"])


def test_the_figure_of_a_sweep_says_how_many_seeds_a_mean_is_without() -> None:
    rows = [{"setting": "sde=vp", "failed": 0, "unfinished": 0}, {"setting": "sde=ve", "failed": 2, "unfinished": 1}]
    assert [report.with_lost(row) for row in rows] == ["sde=vp", "sde=ve (2 failed, 1 unfinished)"]


FLOOR, NATS = "energy over its noise floor", "cross-entropy in nats"


def swept(folder: Path, *results: dict) -> Path:
    for i, result in enumerate(results):
        (folder / str(i)).mkdir(parents=True)
        own = {"seed": 0, "overrides": [f"experiment={i}", "seed=0"]} | result
        (folder / str(i) / "result.json").write_text(json.dumps(own))
    return folder


def finished(meaning: str, metric: float, **more: float) -> dict:
    return {"status": "finished", "metric": metric, "metric_meaning": meaning, **more}


def test_a_report_says_what_each_of_unlike_means_is_of(tmp_path: Path) -> None:
    folder = swept(tmp_path / "sweep", finished(FLOOR, 1.1), finished(NATS, 0.9), {"status": "failed", "error": "why"})
    out = script("report", str(folder), cwd=tmp_path)
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert FLOOR in lines["0"]
    assert NATS in lines["1"]
    assert "standard" not in out  # of one seed there is none
    assert "mean over seeds, of: what the column meaning says\n" in out
    assert "report.png" in out


def test_a_report_takes_a_folder_of_configs_as_the_other_scripts_do(tmp_path: Path) -> None:
    folder = swept(tmp_path / "sweep", finished(FLOOR, 1.1))
    (tmp_path / "conf").mkdir()
    script("report", "--config-dir", "conf", str(folder), "metric=metric", cwd=tmp_path)
    assert (folder / "report.csv").exists()


def test_a_report_of_failed_runs_alone_has_no_figure(tmp_path: Path) -> None:
    folder = swept(tmp_path / "sweep", *[{"status": "failed", "error": "why"}] * 2)
    out = script("report", str(folder), cwd=tmp_path)
    assert out.count("failed: ") == 2
    assert "png" not in out
    assert not (folder / "report.png").exists()


def test_a_metric_that_some_runs_have_is_reported_of_these(tmp_path: Path) -> None:
    folder = swept(tmp_path / "sweep", finished(FLOOR, 1.1, **{"heun/w2": 3.0}), finished(NATS, 0.9))
    table = report.summarise(report.collect(folder, "heun/w2")).set_index("setting")
    assert table["mean"].to_dict() == pytest.approx({"experiment=0": 3.0, "experiment=1": np.nan}, nan_ok=True)
    assert set(table["meaning"]) == {"heun/w2"}
    for wrong, message in (("w2", "did you mean 'heun/w2'"), ("status", "unknown metric 'status'")):
        with pytest.raises(ValueError, match=message):
            report.collect(folder, wrong)


def test_a_report_has_a_column_for_each_swept_key_and_each_number(tmp_path: Path) -> None:
    kinds = [["sde=vp", "trainer.learning_rate=0.01"], ["~sde", "+sde={_target_: my.SDE}"]]
    runs = [finished(FLOOR, 1.1, seed=seed, overrides=["figures=false", f"seed={seed}", *kind], **{"heun/w2": 3.0})
            for kind in kinds for seed in (0, 1)]  # fmt: skip
    folder = swept(tmp_path / "sweep", *runs)
    out = script("report", str(folder), cwd=tmp_path)
    assert [line.split() for line in out.splitlines()[1:3]] == [
        ["sde", "trainer.learning_rate", "mean", "standard_error", "finished", "unfinished", "failed"],
        ["vp", "0.01", "1.1", "0", "2", "0", "0"],
    ]
    runs, means = (pd.read_csv(folder / name) for name in ("runs.csv", "report.csv"))
    assert list(runs["sde"]) == ["vp", "vp", "{_target_: my.SDE}", "{_target_: my.SDE}"]
    assert list(runs["seed"]) == [0, 1, 0, 1]
    assert list(runs["heun/w2"]) == [3.0] * 4
    assert means.pivot(columns="trainer.learning_rate", index="sde", values="mean").loc["vp", 0.01] == 1.1


def test_the_same_command_starts_again_what_was_killed_before_its_first_checkpoint(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(run / "config.yaml", again)  # and nothing else
    script("train", "resume=auto", f"hydra.run.dir={again}", "seed=0.0", *TINY, cwd=tmp_path)
    assert json.loads((again / "result.json").read_text())["seed"] == 0


def test_a_sweep_in_the_folder_of_another_leaves_it_as_it_was(tmp_path: Path) -> None:
    sweep, first = tmp_path / "sweep", tmp_path / "sweep/0"
    options = ["-m", "seed=0,1", f"hydra.sweep.dir={sweep}", *TINY]
    script("train", *options, "trainer.learning_rate=-1", cwd=tmp_path, code=1)
    assert json.loads((first / "result.json").read_text())["status"] == "failed"
    script("train", *options, cwd=tmp_path)  # there was no run yet
    own = (first / "result.json").read_text()
    assert json.loads(own)["status"] == "finished"
    (sweep / "1" / "result.json").unlink()  # as if it still ran
    for again in ([], ["trainer.learning_rate=-1"], ["resume=auto", "trainer.learning_rate=-1"]):
        assert "error: " in script("train", *options, *again, cwd=tmp_path, code=1)
        assert (first / "result.json").read_text() == own
    assert json.loads((sweep / "1" / "result.json").read_text())["status"] == "failed"  # of the one that was to go on


WRONG = {
    "misspelt key": ("train", ["sde.beta_mn=1"], "did you mean 'sde.beta_min'"),
    "misspelt option": ("train", ["sde=vpp"], "did you mean 'vp'"),
    "misspelt sampler part": ("train", ["sampler.predictor=hen"], "did you mean 'heun'"),
    "zero steps": ("train", ["trainer.steps=0"], "steps >= 1, got steps=0"),
    "zero grid": ("train", ["sampler.grid.steps=0"], "steps >= 1, got steps=0"),
    "negative sigma": ("train", ["sde=ve", "sde.sigma_min=-1"], "0 < sigma_min < sigma_max"),
    "order seven": ("train", ["sampler.predictor.order=7"], "orders 1 to 4, got order=7"),
    "ladder times without a ladder": ("train", ["time_sampler=ladder"], "use UniformTimes"),
    "image network for points": ("train", ["network=unet"], "use networks.MLP for vectors"),
    "no such run": ("train", ["resume=nowhere"], "nowhere does not exist"),
    "uint8 data": ("train", ["data=file", "data.path=bytes.npy"], "say dequantize=True"),
    "missing file": ("train", ["data=file", "data.path=none.npy"], "none.npy does not exist"),
    "wrong weights": ("train", ["target.weights=[1,2]"], "weights are 8 non-negative numbers"),
    "unknown metric": ("train", ["evaluation.metrics=[fid]"], "unknown metric 'fid'"),
    "no samples": ("sample", ["run={run}", "num_samples=0"], "num_samples >= 1, got num_samples=0"),
    "half a sample": ("sample", ["run={run}", "num_samples=2.5"], "num_samples >= 1, got num_samples=2.5"),
    "a null that a class does not take": (
        "train",
        ["sde.beta_max=null"],
        "VPSDE: beta_max=null is not a float: give a value",
    ),
    "a run's file": ("sample", ["run={run}/config.yaml"], "config.yaml is a file, so it is no run: give the folder"),
    "a folder that cannot be": ("train", ["hydra.run.dir=/proc/x"], "/proc/x cannot be created: No such file"),
    "a sweep's folder": (
        "train",
        ["-m", "hydra.run.dir=x"],
        "does nothing in a sweep, whose folder is hydra.sweep.dir",
    ),
    "a step by a name": ("certify", ["step=heun"], "give +sampler/predictor@step=heun, or"),
    "no such step": ("certify", ["steps=[Hen]"], "got 'Hen': did you mean 'Heun'?"),
    "steps twice": ("certify", ["steps=[Heun]", "+sampler/predictor@step=ddim"], "does nothing beside a step"),
    "no seed": ("train", ["seed=abc"], "seed='abc' is no number: give one such as 0"),
    "no path": ("train", ["data=file"], "data.path has no value yet: give data.path=<value>"),
    "no snapshots": (
        "sample",
        ["run={run}", "ema=0.1"],
        "with trainer.power_emas=[0.05,0.1] and trainer.snapshot_every",
    ),
    "unknown device": ("sample", ["run={run}", "device=gpu"], "device is one of auto, cpu, cuda; got 'gpu'"),
    "misspelt class": ("train", ["sde._target_=score_sde.VPSED"], "has nothing of that name: did you mean 'VPSDE'?"),
    "no module": ("train", ["sde._target_=mine.VP", "trust=[mine]"], "there is no module 'mine'"),
    "data that are none": (
        "train",
        ["~data", "+data={{_target_: score_sde.targets.ring}}"],
        "gives GaussianMixture: wrap arrays",
    ),
    "fewer steps": ("train", ["resume={run}", "trainer.steps=2"], "has been trained for 4: give steps >= 4"),
    "no samples on the way": ("train", ["evaluation.num_periodic=0"], "num_periodic >= 2"),
    "one sample to measure": ("train", ["num_samples=1"], "num_samples >= 2, got num_samples=1"),
    "nothing to sample with": ("train", ["sampler.predictor=null"], "a predictor, a corrector or both"),
    "untrusted code": ("train", ["sde._target_=os.system"], "is refused"),
    "no run named": ("sample", [], "give run=<directory>"),
    "a folder that is no run": ("sample", ["run=."], "has no config.yaml"),
    "label for a network without": ("sample", ["run={run}", "label=3"], "classes"),
    "a key that a class does not take": (
        "sample",
        ["run={run}", "sampler=heun", "+sampler.predictor.eta=1"],
        "Heun: unknown argument 'eta': known: none; drop what another class took by '~<...>.eta'",
    ),
    "keys of the class that was there": (
        "sample",
        ["run={run}", "sampler=heun", "sampler._target_=score_sde.ProbabilityFlowODE"],
        "drop what another class took by '~<...>.predictor' '~<...>.corrector' '~<...>.corrector_first'",
    ),
    "no such checkpoint": ("sample", ["run={run}", "step=77"], "none of step 77"),
    "nothing to compare": ("compare", [], "either run=<directory> or target=<name>"),
    "no budget": ("compare", ["run={run}", "budgets=[0]"], "a whole number budgets >= 1, got budgets=0"),
    "no sampler to compare": ("compare", ["run={run}", "samplers=[]"], "samplers=[] leaves nothing to compare"),
    "no sampler to evaluate": (
        "evaluate",
        ["run={run}", "samplers=[]"],
        "give sampler=<name>, or several as samplers=",
    ),
    "no sweep": ("report", ["nowhere"], "folder 'nowhere' does not exist"),
    "no sweep named": ("report", [], "no folder is given: give the folder of a sweep"),
    "one beta": ("train", ["trainer.betas=[0.9]"], "betas=[0.9] must be two numbers in [0, 1)"),
    "a number for betas": ("train", ["trainer.betas=0.9"], "betas=[0.9] must be two numbers in [0, 1)"),
    "a key that another group lacks": (
        "train",
        ["time_sampler=loss_aware"],
        "time_sampler.num_steps is taken from sde.num_steps, which this configuration lacks: choose another sde, or give",
    ),
    "classes of data without": (
        "train",
        ["network.num_classes=10"],
        "network.num_classes=10, and the data have no labels",
    ),
    "contexts of data without": (
        "train",
        ["network.context_width=3", "debug=minute"],
        "and the data have no contexts: leave it out",
    ),
    "labels to drop of data without": ("train", ["objective.label_dropout=0.1"], "and the data have no labels"),
    "draws of what was no integer": ("likelihood", ["run={run}", "draws=2"], "for data that were integers"),
    "no draws": ("likelihood", ["run={run}", "draws=0"], "draws >= 1, got draws=0"),
    "agreement without labels": ("sample", ["run={run}", "agreement=true"], "agreement=true compares samples with"),
    "a word for a number": ("train", ["trainer.learning_rate=fast"], "'fast' is no number: give one such as 0.002"),
    "unknown noise": ("sample", ["run={run}", "noise=brown"], "noise is one of sample, brownian; got 'brown'"),
    "a word for true": ("sample", ["run={run}", "agreement=no"], "agreement='no' is neither true nor false"),
    "a key that nothing reads": ("sample", ["run={run}", "+count=3"], "unknown key 'count'"),
    "a key that no group reads": ("train", ["+evaluation.metric=w2"], "did you mean 'evaluation.metrics'"),
    "a key without its home": (
        "train",
        ["batch_size=8"],
        "did you mean 'trainer.batch_size' or 'evaluation.batch_size'",
    ),
    "a run's folder": ("train", ["output=mine"], "did you mean 'hydra.run.dir'"),
    "a word that spells a number": ("train", ["seed='3'"], "seed='3' is no number, which ${oc.decode:...} would read"),
    "settings of a training that is done": (
        "train",
        ["resume={run}", "trainer.learning_rate=0.5"],
        "trainer.learning_rate=0.5 does nothing: all 4 steps of",
    ),
    "a sampler twice": ("evaluate", ["run={run}", "samplers=[heun,ode,heun]"], "names one twice"),
    "no folder": ("train", ["resume=true"], "resume=True is not a folder"),
    "a filled-in key": ("train", ["event_shape=[3]"], "event_shape=[3] does nothing as it is filled in here"),
    "an unknown key of a run": ("train", ["resume={run}", "+foo=6"], "unknown key 'foo'"),
    "a folder with a run": ("train", ["hydra.run.dir={run}"], "holds a run already: give resume="),
    "a target of data without": ("train", ["experiment=digits", "target=ring"], "target=ring does nothing with these"),
    "no metric": ("train", ["evaluation.metrics=[]"], "evaluation.metrics is empty: give one or more of sliced_w2"),
    "an SDE beside a run": ("compare", ["run={run}", "sde=ve"], "sde=ve does nothing with run="),
    "a task's option": ("compare", ["run={run}", "restoration.count=2"], "does nothing without a task"),
    "no number of calls": ("tune", ["run={run}", "steps=[]"], "steps is empty"),
    "no step": ("certify", ["steps=[]"], "no step to certify"),
    "a number for a metric": ("report", ["{run}", "metric=5"], "unknown metric 5: known: "),
    "a placeholder": ("sample", ["run=<dir>"], "run=<dir>: <dir> stands for a value of your own: give that"),
    "a context without a task": ("compare", ["run={run}", "context=[1]"], "does nothing without a task: samples have"),
    "no spectrum table": ("sample", ["run={run}", "sampler=spectrum"], "steps=6 spectrum=true"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_ends_in_one_line_and_leaves_nothing(case: str, run: Path, tmp_path: Path) -> None:
    name, arguments, message = WRONG[case]
    np.save(tmp_path / "bytes.npy", np.zeros((4, 2), dtype=np.uint8))
    given = any(argument.startswith(("resume=nowhere", "hydra.run.dir")) for argument in arguments)
    output = [f"hydra.run.dir={tmp_path / 'out'}"] if name == "train" and not given else []
    error = script(name, *[a.format(run=run) for a in arguments], *output, cwd=tmp_path, code=1)
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == ["bytes.npy"]

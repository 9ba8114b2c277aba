"""scripts/train.py: what a run may be resumed with, jobs that are started again by the same command, labelled data."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from typed import ROOT, script

from score_sde import VPSDE, LearnedScore
from score_sde.data import TensorData, digits
from score_sde.evaluation import Pixels, Reference
from score_sde.networks import MLP
from score_sde.parameterization import Noise
from score_sde.run import Run
from score_sde.training import Checkpoints

sys.path.insert(0, str(ROOT / "scripts"))
import train
from scripting import conditions, resuming

TINY = ["trainer.batch_size=16", "trainer.checkpoint_every=20", "trainer.log_every=10", "num_samples=40",
        "trainer.progress=false", "trainer.sample_every=0", "evaluation.samplers=[ddim]",
        "evaluation.metrics=[sliced_w2]", "trainer.schedule=constant", "figures=false"]  # fmt: skip

OWN = OmegaConf.create({
    "network": {"width": 32, "event_shape": [2]}, "sde": {"sigma_max": 7.5}, "data": {"path": "a"}, "seed": 0,
    "trainer": {"batch_size": 8, "steps": 10}, "choices": {"sde": "ve", "debug": None}, "resume": None,
    "target": {"std": 0.2}, "sampler": {"steps": 5}, "num_samples": 100,
    "overrides": ["~hidden", "trainer.steps=10", "+network={width: 32, samples: 100}", "sde=ve"],
})  # fmt: skip


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (None, "takes none: set context_width=3"),
        (4, r"tokens \(1, tokens, 4\); got \(1, 3\): .* train with another context_width"),
    ],
)
def test_contexts_that_the_network_does_not_take_are_refused_before_a_run_begins(width, message) -> None:
    data = TensorData(torch.randn(30, 2), context=torch.randn(30, 3))
    model = LearnedScore(MLP((2,), context_width=width), VPSDE(), Noise(), (2,))
    config = OmegaConf.create({"network": {"context_width": width}, "objective": {}})
    with pytest.raises(ValueError, match=message):
        train.check_conditions(config, data, model)


def test_a_run_that_has_come_to_its_end_takes_no_new_training(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.config = OmegaConf.create({"trainer": {"steps": 90, "patience": 2}})
    (tmp_path / "checkpoints/step-000000040").mkdir(parents=True)
    rows = [{"step": 10 * i, "loss": 1.0} | ({"loss_held_out": held_out} if held_out else {})
            for i, held_out in enumerate((3.0, None, 2.0, 2.5, 2.0, 1.0))]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        ValueError, match=r"learning_rate=1 does nothing: .* ended at step 40 by its trainer.patience; give"
    ):
        resuming.check_steps_left(run, ["trainer.patience=2", "trainer.learning_rate=1"])
    resuming.check_steps_left(run, ["trainer.patience=2", "trainer.steps=100", "trainer.progress=false"])
    for patience in (3, None):
        run.config.trainer.patience = patience
        resuming.check_steps_left(run, ["trainer.learning_rate=1"])


@pytest.mark.parametrize(
    "override", ["network.width=64", "+network.depth=3", "sde=vp", "sde.sigma_max=5", "data.path=b", "seed=1",
                 "trainer.batch_size=16", "debug=minute", "target.std=0.5"],
)  # fmt: skip
def test_a_run_goes_on_with_its_own_model_data_and_batches(override: str) -> None:
    name = override.lstrip("+").partition("=")[0]
    with pytest.raises(ValueError, match=rf"{name}=.* differs from the run's own {name}=.*: start a new run, or leave"):
        resuming.continued(OWN, ["trainer.steps=20", override])


def test_a_run_keeps_its_parts() -> None:
    with pytest.raises(ValueError, match="~sampler removes what the run was started with: start a new run"):
        resuming.continued(OWN, ["~sampler"])


def test_other_values_and_those_it_has_already_are_taken() -> None:
    same = ["sde=ve", "~debug", "debug=null", "network.width=32", "sde.sigma_max=auto", "seed=0", "resume=auto"]
    assert resuming.continued(OWN, same) == OWN
    changed = resuming.continued(OWN, ["trainer.steps=20", "+trainer.compile=true", "num_samples=100"])
    assert changed.trainer == {"batch_size": 8, "steps": 20, "compile": True}


def test_a_run_keeps_the_overrides_it_was_started_with_and_adds_what_is_new() -> None:
    again = [override.replace("100", "${num_samples}") for override in OWN.overrides]  # config.yaml is resolved
    assert resuming.continued(OWN, again) == OWN
    changed = resuming.continued(OWN, ["trainer.steps=20", "+trainer.compile=true", "num_samples=100", "resume=here"])
    assert changed.overrides == [OWN.overrides[0], *OWN.overrides[2:], "trainer.steps=20", "trainer.compile=true"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 400 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    script("train", f"hydra.run.dir={folder}", *TINY, "trainer.steps=400", cwd=folder)
    return folder


@pytest.mark.parametrize(
    "arguments", [["resume={run}", "trainer.batch_size=64"], ["resume={run}", "trainer.power_emas=[0.1]"],
                  ["hydra.run.dir={run}", "seed=3"], ["resume=auto", "hydra.run.dir={run}", "network.width=8"]],
)  # fmt: skip
def test_what_is_refused_leaves_the_run_as_it_was(whole: Path, arguments: list[str]) -> None:
    before = {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    error = script("train", *[a.format(run=whole) for a in arguments], cwd=whole, code=1)
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert {file: file.read_bytes() for file in whole.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_a_killed_job_started_again_by_the_same_command_ends_like_one_that_was_not(
    whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    command = ["resume=auto", f"hydra.run.dir={run}", *TINY, "trainer.steps=400"]
    saved, deadline = Checkpoints(run / "checkpoints"), time.monotonic() + 120
    job = subprocess.Popen([sys.executable, str(ROOT / "scripts/train.py"), *command], cwd=tmp_path)
    while saved.latest() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    job.send_signal(number)
    assert job.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    assert 0 < saved.latest() < 400
    script("train", *command, cwd=tmp_path)
    for name in ("weights", "ema"):
        file = f"checkpoints/step-000000400/{name}.safetensors"
        assert (run / file).read_bytes() == (whole / file).read_bytes()
    assert json.loads((run / "result.json").read_text())["step"] == 400


@pytest.mark.slow
def test_torchrun_starts_a_job_again_where_a_process_died(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1",
               str(ROOT / "scripts/train.py"), "resume=auto", f"hydra.run.dir={run}", *TINY, "trainer.steps=400"]  # fmt: skip
    job = subprocess.Popen(command, cwd=tmp_path)
    saved, deadline = Checkpoints(run / "checkpoints"), time.monotonic() + 120
    while saved.latest() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    workers = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert job.wait(200) == 0
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(10, 401, 10))


def test_automatic_resumption_asks_for_a_folder_of_a_fixed_name(tmp_path: Path) -> None:
    error = script("train", "resume=auto", *TINY, cwd=tmp_path, code=1)
    assert "resume=auto continues in the folder where it started: name it, hydra.run.dir=<folder>" in error
    assert os.listdir(tmp_path) == []


STRICT = """
from score_sde.networks import MLP
class Strict(MLP):
    def forward(self, x, c_noise, label):
        assert (label >= 0).all()
        return super().forward(x, c_noise, label)
"""


def test_a_model_that_is_trained_with_labels_alone_is_never_asked_without_one(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "strict.py").write_text(STRICT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    own = [
        "trust=[strict]",
        "network._target_=strict.Strict",
        "network.num_classes=10",
        "data=digits",
        "data.labels=true",
    ]
    looks = [
        "trainer.steps=4",
        "trainer.log_every=2",
        "trainer.evaluate_every=2",
        "trainer.sample_every=2",
        "num_previews=4",
    ]
    views = ["evaluation.features=[pixels]", "evaluation.num_periodic=12", "evaluation.batch_size=7"]
    run = tmp_path / "run"
    script("train", f"hydra.run.dir={run}", *TINY, *own, *looks, *views, "figures=true", cwd=tmp_path)
    assert (run / "figures/noise_to_data.gif").exists()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all({"eval/sliced_w2", "eval/FD (pixels)", "eval/memorised"} <= row.keys() for row in rows)
    assert np.load(run / "samples/ddim.npy").shape == (40, 1, 8, 8)
    asked = ["sampler=heun", "sampler.grid.steps=3", "label=[0,1,2,3,4,5,6,7,8,9]", "num_samples=20", "trust=[strict]"]
    script("evaluate", f"run={run}", *asked, f"output={tmp_path / 'out'}", cwd=tmp_path)
    assert set(os.listdir(tmp_path / "out/figures")) == {"samples_heun.png", "nearest_heun.png"}


def test_labels_of_samples_have_the_frequencies_of_the_data() -> None:
    data = TensorData(torch.zeros(1000, 2), (torch.arange(1000) % 4 == 0).long(), seed=1)
    labels = conditions.first_conditions(data, ["label"], 1000)["label"]
    assert labels.sum() == 250
    assert torch.equal(conditions.first_conditions(data, ["label"], 130)["label"], labels[:130])


REFUSED = {
    "an extra that is missing": (["data=digits", "evaluation.features=[inception]"], "torch_fidelity is not installed: pip"),
    "too few samples": (["data=digits", "evaluation.features=[pixels]", "evaluation.num_periodic=4"], "not 4: draw more"),
    "features of points": (["evaluation.features=[pca]"], "'pca' are for finite sets of images: set evaluation.features=[]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_end_of_a_run_needs_is_there_before_it_begins(case: str, tmp_path: Path) -> None:
    arguments, message = REFUSED[case]
    error = script("train", f"hydra.run.dir={tmp_path / 'run'}", *arguments, *TINY, cwd=tmp_path, code=1)
    assert message in error
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def test_references_are_those_of_the_features_and_the_data(tmp_path: Path) -> None:
    data, pixels = digits(), Pixels()
    Reference.of(data, pixels, 40).save(tmp_path)
    config = OmegaConf.create({"num_samples": 40, "evaluation": {"num_periodic": None}})

    def check(references: dict, **changed) -> None:
        views = {"features": {"pixels": pixels}, "references": references}
        train.check_references(OmegaConf.merge(config, changed), data, views)

    check({"pixels": str(tmp_path)})
    for references, changed, message in (
        ({"pixels": str(tmp_path)}, {"num_samples": 30}, "count=40, not 30"),
        ({"pixels": str(tmp_path)}, {"evaluation": {"num_periodic": 9}}, "num_periodic out"),
        ({"pixels": "nowhere"}, {}, "nowhere"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            check(references, **changed)


@pytest.mark.parametrize("shape", [(3,), (2, 16), (4, 8, 8)], ids=str)
def test_data_that_are_no_pictures_are_trained_on_and_evaluated(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Vectors, signals and latents: sheets of them, and no animation."""
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((200, *shape)).astype(np.float32))
    said = script("train", "data=file", f"data.path={tmp_path}/data.npy", "trainer.steps=4", f"hydra.run.dir={tmp_path}/run",
                  *TINY, "trainer.sample_every=2", "figures=true", "network.width=32", cwd=tmp_path)  # fmt: skip
    assert ("network=unet, dit_s and ncsn are made for" in said) == (len(shape) > 1)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "finished"
    script("evaluate", f"run={tmp_path}/run", "sampler=ddim", "num_samples=20", cwd=tmp_path)
    assert (tmp_path / "run" / "evaluation/evaluation.json").exists()
    script("sample", f"run={tmp_path}/run", "sampler=ddim", "num_samples=5", cwd=tmp_path)
    sheets = ["figures/samples_ddim.png", "samples/step-000000002-ema.png", "evaluation/figures/samples_ddim.png",
              "samples/ddim/samples.png"]  # fmt: skip
    assert all((tmp_path / "run" / sheet).exists() for sheet in sheets)
    assert not list((tmp_path / "run").rglob("*.gif"))


def test_a_classifier_is_trained_by_its_recipe_which_names_no_samplers(tmp_path: Path) -> None:
    short = ["trainer.steps=4", "trainer.progress=false", "num_samples=20", f"hydra.run.dir={tmp_path / 'run'}"]
    script("train", "experiment=digits_classifier", *short, cwd=tmp_path)
    assert json.loads((tmp_path / "run/result.json").read_text())["metric_meaning"].startswith("cross-entropy")


def test_configs_in_a_folder_of_ones_own_go_by_name_too(tmp_path: Path) -> None:
    folder = tmp_path / "my configs (1), ünï"
    (folder / "sampler").mkdir(parents=True)
    (folder / "sampler/mine.yaml").write_text(
        "defaults: [base/fixed_grid@_here_, predictor: unipc, grid: karras, _self_]\ngrid: {steps: 4}\n"
    )
    asked = [*TINY, "trainer.steps=20", "hydra.run.dir=run"]
    script("train", "--config-dir", str(folder), *asked, "evaluation.samplers=[mine,ddim]", cwd=tmp_path)
    assert set(os.listdir(tmp_path / "run/samples")) >= {"mine.npy", "ddim.npy"}
    script("evaluate", "--config-dir", str(folder), "run=run", "samplers=[mine]", "figures=false", cwd=tmp_path)
    error = script("evaluate", "run=run", "samplers=[mine]", cwd=tmp_path, code=1)
    assert "unknown sampler 'mine'" in error


def test_a_run_may_be_trained_alone_and_measured_later(tmp_path: Path) -> None:
    said = script("train", *TINY, "trainer.steps=20", "hydra.run.dir=run", "evaluation.samplers=[]", cwd=tmp_path)
    assert "not evaluated" in said
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["metric"] == result["loss"] > 0
    assert not (tmp_path / "run/samples").exists() or not os.listdir(tmp_path / "run/samples")
    script("evaluate", "run=run", "samplers=[ddim]", "figures=false", cwd=tmp_path)
    assert (tmp_path / "run/evaluation/evaluation.json").exists()

"""A run directory is self-contained, says what is wrong with it, and cannot execute code."""

from __future__ import annotations

import json

import pytest
import torch
from omegaconf import OmegaConf

from score_sde.build import build, build_model
from score_sde.data import TensorData
from score_sde.networks import MLP
from score_sde.run import Run
from score_sde.sde import DiscreteSDE, SubVPSDE
from score_sde.training import Checkpoints, DenoisingScoreMatching, Trainer, UniformTimes

CONFIG = {
    "seed": 3,
    "event_shape": [2],
    "sde": {"_target_": "score_sde.sde.SubVPSDE", "beta_max": 10.0},
    "parameterization": {"_target_": "score_sde.parameterization.Noise"},
    "network": {"_target_": "score_sde.networks.MLP", "event_shape": "${event_shape}", "width": 8, "depth": 1},
    "data": {
        "_target_": "score_sde.data.TargetStream",
        "target": {"_target_": "score_sde.targets.make", "name": "ring"},
        "seed": "${seed}",
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = Run.create(tmp_path_factory.mktemp("run"), OmegaConf.create(CONFIG))
    settings = Trainer(steps=6, batch_size=8, device="cpu", progress=False, checkpoint_every=3, log_every=2)
    model = build_model(run.config)
    settings.fit(model, run.data(), DenoisingScoreMatching(), UniformTimes(), run.path, seed=3)
    run.trained = model
    return run


def test_the_model_comes_back_with_its_weights(run):
    x, t = torch.randn(4, 2), torch.full((4,), 0.5)
    opened = Run.open(run.path)
    raw, averaged, early = opened.model(ema=False), opened.model(), opened.model(ema=False, step=3)
    assert torch.equal(raw(x, t).score, run.trained(x, t).score)
    assert not torch.equal(raw(x, t).score, averaged(x, t).score)
    assert not torch.equal(raw(x, t).score, early(x, t).score)
    assert isinstance(averaged.sde, SubVPSDE)
    assert averaged.sde.beta_max == 10.0
    assert not averaged.training
    assert not any(p.requires_grad for p in averaged.parameters())


def test_the_configuration_is_stored_resolved(run):
    text = (run.path / "config.yaml").read_text()
    assert "${" not in text
    assert Run.open(run.path).config.network.event_shape == [2]


def test_first_weights_follow_from_the_seed_alone():
    torch.manual_seed(1)
    first, state = build_model(CONFIG | {"network": CONFIG["network"] | {"event_shape": [2]}}), torch.get_rng_state()
    second = build_model(OmegaConf.create(CONFIG))
    third = build_model(OmegaConf.create(CONFIG | {"seed": 4}))
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, second, third)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_says_what_its_network_has_not_learnt_to_do_without(tmp_path):
    told = {"network": CONFIG["network"] | {"num_classes": 3}, "objective": {"label_dropout": 0.0}}
    for share, needed in ((0.0, {"label"}), (0.1, set())):
        run = Run.create(tmp_path / str(share), CONFIG | told | {"objective": {"label_dropout": share}})
        weights = build_model(run.config).state_dict()
        run.checkpoints.save(0, {"weights": weights, "ema": weights}, {"step": 0})
        assert run.model().needed == needed


def test_no_devices_generator_is_seeded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("CUDA's generators were seeded"))
    build_model(OmegaConf.create(CONFIG))


def test_metrics_are_a_table_that_a_line_being_written_does_not_disturb(run, tmp_path):
    assert Run.open(run.path).metrics()["step"].tolist() == [2, 4, 6]
    other = Run.create(tmp_path, {})
    assert other.metrics().empty
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert other.metrics().to_dict("records") == [{"step": 1, "loss": 2.0}]


def test_result_and_folders(run):
    run.save_result({"sliced_w2": 0.5, "steps": 6})
    run.save_result({"sliced_w2": 0.25})
    assert json.loads((run.path / "result.json").read_text()) == run.result() == {"sliced_w2": 0.25}
    assert run.samples.is_dir()
    assert run.figures == run.path / "figures"
    assert not list(run.path.glob(".partial*"))


def test_a_directory_that_is_no_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist, so it is no run: give the folder"):
        Run.open(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config.yaml, so it is no run"):
        Run.open(tmp_path)
    Checkpoints(tmp_path / "fitted" / "checkpoints").save(3, {"ema": {"weight": torch.zeros(2)}})
    with pytest.raises(FileNotFoundError, match=r"so it is no run: load_state_dict\(Checkpoints\(.*\).weights\(\)\)"):
        Run.open(tmp_path / "fitted")
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        Run.create(tmp_path, CONFIG).model()


def test_a_directory_with_checkpoints_keeps_its_configuration(run):
    before = (run.path / "config.yaml").read_text()
    with pytest.raises(ValueError, match="holds a run already: continue it, or choose a new directory"):
        Run.create(run.path, CONFIG | {"seed": 9})
    assert (run.path / "config.yaml").read_text() == before


def test_weights_of_another_network_are_refused(run, tmp_path):
    narrow = CONFIG | {"network": CONFIG["network"] | {"width": 4}}
    other = Run.create(tmp_path, narrow)
    (tmp_path / "checkpoints").symlink_to(run.path / "checkpoints")
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.model()


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch.nn.functional.relu",
        "torch.nn.modules.module.torch.hub.load",
        "score_sde.run.json.loads",
        "score_sde.run.Run",
        "score_sde.build.build",
        "score_sde.training.write_atomically",
        "score_sde.training.Checkpoints",
        "score_sde.training.trainer.Trainer.fit",
        "score_sde.data.files.np.fromfile",
        "score_sde.data.files.Path",
        "score_sde_evil.Model",
        17,
    ],
)
def test_targets_that_could_execute_code_are_refused_wherever_they_hide(target, tmp_path):
    for node in ({"_target_": target}, {"_target_": "score_sde.networks.MLP", "event_shape": [{"_target_": target}]}):
        with pytest.raises(ValueError, match="is refused: a run may only name"):
            build(node)


def test_a_refused_target_is_not_called(tmp_path):
    witness = tmp_path / "witness"
    evil = CONFIG | {"network": {"_target_": "os.mkdir", "path": str(witness)}}
    run = Run.create(tmp_path / "run", evil)
    with pytest.raises(ValueError, match="refused"):
        build_model(run.config)
    assert not witness.exists()


def test_what_models_and_data_are_made_of_is_allowed():
    assert isinstance(build({"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 2}), torch.nn.Linear)
    assert isinstance(build({"_target_": "score_sde.sde.DiscreteSDE.ddpm", "num_steps": 50}), DiscreteSDE)
    assert isinstance(build({"_target_": "score_sde.data.digits"}), TensorData)
    assert isinstance(build({"_target_": "score_sde.training.UniformTimes"}), UniformTimes)
    network = build({"_target_": "score_sde.networks.MLP", "event_shape": [3]})
    assert isinstance(network, MLP)
    assert network.event_shape == (3,)


def test_the_users_own_module_is_trusted_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_sde.py").write_text(
        "import os\nfrom score_sde.sde import VPSDE\nclass Mine(VPSDE):\n    pass\ndef other(): return os\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = OmegaConf.create(CONFIG | {"sde": {"_target_": "my_sde.Mine"}})
    with pytest.raises(ValueError, match=r"if the code is yours, trust its module: trust=\['my_sde'\]"):
        build_model(config)
    for trust in (("my_sde",), "my_sde"):
        assert type(build_model(config, trust=trust).sde).__name__ == "Mine"
    assert Run(tmp_path, "my_sde").trust == ("my_sde",)
    with pytest.raises(ValueError, match="refused"):
        build({"_target_": "my_sde.os.getcwd"}, trust=("my_sde",))

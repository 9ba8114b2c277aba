"""train.py init=: a new run starts from another's network, and says in one line where it cannot."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from typed import ROOT, script

from score_sde import LearnedScore
from score_sde.build import build_model
from score_sde.convert import SongConfig
from score_sde.export import differing, save
from score_sde.networks import UNet
from score_sde.training import Checkpoints

sys.path.insert(0, str(ROOT / "scripts"))
from scripting import initial

TINY = ["trainer.batch_size=16", "trainer.progress=false", "trainer.sample_every=0", "trainer.ema_ramp=1e-9",
        "evaluation.samplers=[]", "figures=false", "network.width=8", "network.depth=1"]  # fmt: skip


def made(seed: int, **network: object) -> tuple[DictConfig, LearnedScore]:
    config = OmegaConf.create({
        "seed": seed, "event_shape": [2], "init": None, "init_new": [],
        "sde": {"_target_": "score_sde.sde.VPSDE"},
        "parameterization": {"_target_": "score_sde.parameterization.Karras", "sigma_data": 0.5},
        "network": {"_target_": "score_sde.networks.MLP", "event_shape": [2], "width": 8, "depth": 1, "num_classes": 3,
                    **network},
    })  # fmt: skip
    return config, build_model(config)


def started(source: Path, **settings: object) -> tuple[LearnedScore, DictConfig]:
    new = settings.pop("init_new", [])
    config, model = made(1, **settings)
    config.init, config.init_new = str(source), new
    initial.start_from(config, model)
    return model, config


@pytest.fixture
def exported(tmp_path: Path) -> tuple[LearnedScore, Path]:
    config, model = made(0)
    return model, save(model, OmegaConf.to_container(config), tmp_path / "model")


def same(one: LearnedScore, other: LearnedScore) -> list[str]:
    others = other.network.state_dict()
    return [name for name, value in one.network.state_dict().items() if torch.equal(value, others[name])]


def test_a_network_starts_from_an_exported_one_or_from_a_file_of_weights(exported, tmp_path: Path) -> None:
    model, folder = exported
    every = [*model.network.state_dict()]
    save_file(model.network.state_dict(), tmp_path / "network.safetensors")
    for source in (folder, folder / "model.safetensors", tmp_path / "network.safetensors"):
        given, config = started(source)
        assert same(given, model) == every
        assert Path(config.init).is_file()


def test_a_network_within_another_starts_from_its_own_file_and_from_that_of_its_model(tmp_path: Path) -> None:
    def conservative(seed: int) -> tuple[DictConfig, LearnedScore]:
        config = made(seed)[0]
        config.network = {"_target_": "score_sde.networks.Conservative", "network": config.network}
        return config, build_model(config)

    file, model = tmp_path / "weights.safetensors", conservative(0)[1]
    for source in (model, model.network):
        save_file(source.state_dict(), file)
        config, anew = conservative(1)
        config.init = str(file)
        initial.start_from(config, anew)
        assert same(anew, model) == [*model.network.state_dict()]


def test_another_network_is_refused_in_one_line_that_names_what_to_give(exported) -> None:
    with pytest.raises(
        ValueError, match=r"\.weight is \(8, .* there, \(16, .* more differ: give network.width=8, as it was"
    ):
        started(exported[1], width=16)
    with pytest.raises(ValueError, match=r"embedding.label.weight is \(4, 8\) there, \(6, 8\) here: give network.num_classes=3"
                                         r", as it was trained, or init_new=\[embedding.label.weight\]"):  # fmt: skip
        started(exported[1], num_classes=5)
    with pytest.raises(ValueError, match=r"embedding.label.weight is \(4, 8\) there, missing here"):
        started(exported[1], num_classes=None)
    with pytest.raises(ValueError, match="nowhere does not exist: give a run's folder"):
        started(Path("nowhere"))
    with pytest.raises(ValueError, match=r"unknown weight of init_new 'embeding.label'"):
        started(exported[1], init_new=["embeding.label"])


@pytest.mark.parametrize("name", ["ddpmpp", "ncsnpp"])
def test_networks_of_the_papers_have_the_weights_of_converted_ones(name: str) -> None:
    plus = {"sde": "ve", "embedding_type": "fourier", "fir": True, "progressive_input": "residual"}
    converted = SongConfig(nf=32, num_res_blocks=1, **(plus if name == "ncsnpp" else {})).unet()
    ours = getattr(UNet, name)((3, 32, 32), width=32, blocks=1)
    assert differing(ours.state_dict(), converted.state_dict()) == []


def test_what_is_named_starts_anew(exported) -> None:
    given, _ = started(exported[1], num_classes=5, init_new=["embedding.label"])
    fresh = made(1, num_classes=5)[1]
    assert "embedding.label.weight" in same(given, fresh)
    assert {*same(given, exported[0])} >= {*exported[0].network.state_dict()} - {"embedding.label.weight"}
    started(exported[1], num_classes=None, init_new=["embedding.label"])


def test_what_else_the_weights_were_trained_with_is_said(exported, capsys) -> None:
    config, model = made(1)
    config.init, config.parameterization.sigma_data = str(exported[1]), 0.7
    initial.start_from(config, model)
    assert "it was trained with parameterization.sigma_data=0.5, this run is not" in capsys.readouterr().out


def test_a_run_that_starts_from_another_records_it_and_goes_on_without_it(tmp_path: Path) -> None:
    script("train", *TINY, "trainer.steps=3", "hydra.run.dir=first", cwd=tmp_path)
    command = [*TINY, "init=first", "seed=1", "trainer.learning_rate=1e-30", "hydra.run.dir=second", "resume=auto"]
    said = script("train", *command, "trainer.steps=1", cwd=tmp_path)
    assert "init: the network starts from" in said
    source = tmp_path / "first/checkpoints/step-000000003/ema.safetensors"
    assert OmegaConf.load(tmp_path / "second/config.yaml").init == str(source)
    first, second = (Checkpoints(tmp_path / run / "checkpoints") for run in ("first", "second"))
    assert second.latest() == 1
    for ema in (True, False):
        found = second.weights(ema=ema)
        assert all(torch.equal(value, found[name]) for name, value in first.weights().items())
    (tmp_path / "first").rename(tmp_path / "gone")
    script("train", *command, "trainer.steps=2", cwd=tmp_path)
    assert json.loads((tmp_path / "second/result.json").read_text())["step"] == 2
    error = script("train", "resume=second", "init=gone", cwd=tmp_path, code=1)
    assert "init=gone differs from the run's own init=" in error

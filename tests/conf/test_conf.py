"""Every config file composes, instantiates and does its work for two steps; found by walking conf/, without a list."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from score_sde import ExactScore, targets
from score_sde.classifier import NoisyClassifier
from score_sde.data import TargetStream
from score_sde.run import build_model, instantiate
from score_sde.tuning import untuned

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
sys.path.insert(0, str(ROOT / "scripts"))
import common  # noqa: E402
import train  # noqa: E402

AUTO = {"sigma_max": 10.0, "sigma_data": 2.0}
# Sizes at which every network that has them trains on 8x8 digits in no time.
SMALL = {
    "width": 16,
    "multipliers": "[1,2]",
    "dilations": "[1,1]",
    "blocks": 1,
    "attention": "[4]",
    "depth": 2,
    "heads": 2,
    "patch": 2,
}


def names(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def option(group: str, name: str, **known: object) -> DictConfig:
    """A group's file, with its interpolations and its `auto` scales given."""
    node = OmegaConf.create({**known, "node": common.named(group, name)}).node
    for key, value in AUTO.items():
        if node.get(key) == "auto":
            node[key] = value
    return node


def compose(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", overrides=[*overrides, "trust=[]"], return_hydra_config=True)
    OmegaConf.set_struct(config, False)
    hydra_config = config.pop("hydra")
    config.choices = {k: v for k, v in hydra_config.runtime.choices.items() if "hydra" not in k}
    return config


@pytest.mark.parametrize("name", names("sde"))
@pytest.mark.parametrize("sampler", names("sampler"))
def test_every_sampler_takes_two_steps_on_every_sde(name: str, sampler: str, tmp_path: Path) -> None:
    node = common.sampler_config(sampler)
    if "grid" in node and "steps" in node.grid:
        node.grid.steps = 2
    model = ExactScore(targets.make("ring"), instantiate(option("sde", name)))
    if OmegaConf.is_missing(node, "table"):
        node.table = str(tmp_path / "table.json")
        untuned(model.sde, 2)["velocity Adams 2 on rectified"].save(node.table)
    built = instantiate(node)
    built.check(model.sde)
    assert built.sample(model, (3, 2), seed=0).x.isfinite().all()


@pytest.mark.parametrize("part", ["predictor", "corrector", "grid"])
def test_every_part_of_a_sampler_goes_by_its_name(part: str) -> None:
    base = {"_target_": "score_sde.sampler.Sampler", "predictor": "ddim", "grid": "log_snr"}
    for name in names(f"sampler/{part}"):
        model = ExactScore(targets.make("ring"), instantiate(option("sde", "ddpm" if name == "respaced" else "vp")))
        node = common.sampler_config(OmegaConf.create({**base, part: name}))
        if "steps" in node.grid:
            node.grid.steps = 2
        assert instantiate(node).sample(model, (3, 2), seed=0).x.isfinite().all(), name


@pytest.mark.parametrize("name", names("target"))
def test_every_target_draws_and_denoises(name: str) -> None:
    target = instantiate(common.named("target", name))
    x = target.sample((5,), generator=torch.Generator().manual_seed(0))
    assert target.denoise(x, 0.5, 0.5).isfinite().all()
    assert target.marginal(1.0, 0.1).log_prob(x).isfinite().all()  # points have no density themselves


@pytest.mark.parametrize("group", ["parameterization", "network", "objective", "time_sampler", "sde"])
def test_every_option_trains_for_two_steps(group: str, tmp_path: Path) -> None:
    for name in names(group):
        overrides = [f"{group}={name}", "trainer.steps=2", "trainer.batch_size=8", "trainer.progress=false"]
        if group == "time_sampler" and name in ("ladder", "loss_aware"):
            overrides.append("sde=ddpm")
        if group == "objective" and name in ("hybrid", "vlb"):
            overrides += ["sde=ddpm", "time_sampler=ladder", "network.learned_variance=true"]
        if group == "network" and name != "mlp":
            known = OmegaConf.load(CONF / group / f"{name}.yaml")
            overrides += ["data=digits", *(f"network.{key}={value}" for key, value in SMALL.items() if key in known)]
        if name in ("encoder", "cross_entropy"):  # a classifier
            overrides = ["experiment=digits_classifier", *overrides[1:4]]
        trained_for_two_steps(compose(*overrides), tmp_path / name)


@pytest.mark.parametrize("experiment", names("experiment"))
def test_an_experiments_values_stand(experiment: str) -> None:
    """Nothing that a recipe says is overruled by what it is laid over."""
    recipe, config = OmegaConf.load(CONF / "experiment" / f"{experiment}.yaml"), compose(f"experiment={experiment}")
    recipe.pop("defaults", None)
    assert OmegaConf.merge(config, recipe) == config


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_trains_and_samples_for_two_steps(experiment: str, tmp_path: Path) -> None:
    config = compose(f"experiment={experiment}", "trainer.steps=2", "trainer.batch_size=8", "trainer.progress=false")
    if "path" in list(config.data):  # of real images, `???` too
        config.data = stand_in(config.data._target_, tmp_path)
        config.network.update(TINY)
    model = trained_for_two_steps(config, tmp_path)
    if isinstance(model, NoisyClassifier):
        return
    samplers = common.samplers_of(config)
    for sampler in samplers.values():
        sampler.check(model.sde)
    node = common.sampler_config(config.sampler)
    node.grid.steps = 2
    assert instantiate(node).sample(model, (2, *model.event_shape), seed=0).x.isfinite().all()


def test_an_evaluation_may_name_values_of_its_own_config() -> None:
    config = OmegaConf.create({"kept": False, "evaluation": {"memorization": "${kept}"}})
    assert common.views_of(config.evaluation)["memorization"] is False


@pytest.mark.parametrize("experiment", [name for name in names("experiment") if not name.endswith("classifier")])
def test_debug_lays_over_every_experiment(experiment: str) -> None:
    config = compose(f"experiment={experiment}", "debug=minute")
    assert (config.trainer.steps, config.num_samples, config.sampler.grid.steps) == (3, 4, 3)
    assert list(common.samplers_of(config)) == ["exponential_adams"]


# Networks of published sizes, made small at the sizes of their grids.
TINY = {"width": 16, "blocks": 1}


def stand_in(target: str, folder: Path) -> DictConfig:
    """A few random images of the size of a real set."""
    shape = {"cifar10": (3, 32, 32), "image_folder": (3, 64, 64)}.get(target.split(".")[-1], (1, 28, 28))
    images = np.random.default_rng(0).integers(0, 256, (24, *shape), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    known = {"path": str(folder / "images.npy"), "dequantize": False, "held_out": 0.5}
    return OmegaConf.merge(option("data", "file", seed=0), known)


def trained_for_two_steps(config: DictConfig, folder: Path):
    data = instantiate(config.data)
    train.fill_in(config, data, config.choices)
    model = build_model(config)
    parts = [instantiate(config[name]) for name in ("objective", "time_sampler")]
    result = instantiate(config.trainer).fit(model, data, *parts, folder, seed=config.seed)
    assert result.step == 2
    assert all(p.isfinite().all() for p in result.model.parameters())
    return result.model.eval()


def test_auto_scales_are_measured_from_the_data() -> None:
    config = compose("sde=ve")
    train.fill_in(config, TargetStream(targets.make("ring")), config.choices)
    assert config.parameterization.sigma_data == pytest.approx((0.2**2 + 8.0) ** 0.5, rel=0.02)
    assert config.sde.sigma_max == pytest.approx(8.0 + 6 * 0.2, abs=0.5)
    median = compose("sde=ve", "sigma_max_quantile=0.5")
    train.fill_in(median, TargetStream(targets.make("ring")), median.choices)
    assert median.sde.sigma_max == pytest.approx(8.0 * 0.5**0.5, abs=0.6)  # two of eight modes, a quarter turn apart


def test_every_config_file_names_what_it_builds() -> None:
    for file in CONF.rglob("*.yaml"):
        group = file.parent.relative_to(CONF).parts
        if group and group[0] not in ("experiment", "debug", "hydra", "evaluation"):
            assert "_target_: " in file.read_text(), file

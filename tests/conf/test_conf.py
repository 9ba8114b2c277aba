"""Every config file composes, instantiates and does its work for two steps; found by walking conf/, without a list."""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from dataclasses import replace
from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from conftest import few_steps
from omegaconf import DictConfig, OmegaConf

from score_sde import ExactScore, sde, steps, targets
from score_sde.build import build, build_model, trusted
from score_sde.classifier import NoisyClassifier
from score_sde.data import TargetStream, TensorData
from score_sde.tuning import TunedTable, untuned

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
sys.path.insert(0, str(ROOT / "scripts"))
from scripting import configs, entry, tuned_tables  # noqa: E402

pytestmark = few_steps

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


@functools.cache
def named(group: str, name: str) -> DictConfig:
    """`configs.named`, which takes 60 ms, once for all tests that only read it."""
    return configs.named(group, name)


def option(group: str, name: str, **known: object) -> DictConfig:
    """A group's file, with its interpolations and its `auto` scales given."""
    node = OmegaConf.create({**known, "node": named(group, name)}).node
    for key, value in AUTO.items():
        if node.get(key) == "auto":
            node[key] = value
    return node


def compose(*overrides: str) -> DictConfig:
    """What scripts/train.py makes of a command line."""
    return copy.deepcopy(_composed(*overrides))


@functools.cache
def _composed(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", overrides=[*overrides, "trust=[]"], return_hydra_config=True)
    OmegaConf.set_struct(config, False)
    hydra_config = config.pop("hydra")
    config.choices = {k: v for k, v in hydra_config.runtime.choices.items() if "hydra" not in k}
    return config


class Knowing(ExactScore):
    """An exact score that also says which variance to take, as some networks do."""

    def __call__(self, x, t, **condition):
        return replace(super().__call__(x, t, **condition), variance_weight=torch.full_like(x, 0.5))


@functools.cache
def with_a_table(name: str) -> tuple[Knowing, TunedTable]:
    """The ring on an SDE, and a table of two calls for it."""
    model = Knowing(targets.make("ring"), build(option("sde", name)))
    return model, untuned(model.sde, 2)["velocity Adams 2 on rectified"]


@pytest.mark.parametrize("name", names("sde"))
@pytest.mark.parametrize("sampler", names("sampler"))
def test_every_sampler_takes_two_steps_on_every_sde(name: str, sampler: str, tmp_path: Path) -> None:
    model, table = with_a_table(name)
    for kind in ("tuned", "spectrum"):
        table.save(tmp_path / f"{kind}-2.json")
    node = configs.sampler_config(named("sampler", sampler), tmp_path)
    if "grid" in node:
        node.grid.steps = 2
    built = build(node)
    built.check(model.sde)
    assert built.sample(model, (3, 2), seed=0).x.isfinite().all()


def composed(*overrides: str) -> DictConfig:
    """What scripts/sample.py makes of a command line."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("sample", overrides=list(overrides)).sampler


def gridded() -> list[str]:
    return [name for name in names("sampler") if "grid" in OmegaConf.load(CONF / f"sampler/{name}.yaml")]


@pytest.mark.parametrize("part", ["predictor", "corrector", "corrector_where", "grid"])
def test_every_part_of_a_sampler_goes_by_its_name(part: str) -> None:
    parts = {"predictor": "ddim", "corrector": "langevin", "grid": "log_snr"}
    base = {key: named(f"sampler/{key}", known) for key, known in parts.items()}
    for name in names(f"sampler/{part}"):
        model = Knowing(targets.make("ring"), build(option("sde", "ddpm" if name == "respaced" else "vp")))
        node = configs.sampler_config(OmegaConf.create({"_target_": "score_sde.sampler.Sampler", **base, part: name}))
        node.grid.steps = 2
        assert build(node).sample(model, (3, 2), seed=0).x.isfinite().all(), name


@pytest.mark.parametrize("sampler", gridded())
def test_every_sampler_runs_on_every_grid(sampler: str) -> None:
    ring = targets.make("ring")
    models = {"vp": Knowing(ring, sde.VPSDE()), "ddpm": Knowing(ring, sde.DiscreteSDE.ddpm())}
    node, own = named("sampler", sampler).copy(), OmegaConf.load(CONF / f"sampler/{sampler}.yaml").grid
    for grid in names("sampler/grid"):
        model = models["ddpm" if grid == "respaced" else "vp"]  # a sub-ladder is of a ladder
        # A sampler's own values stand, as with sampler/grid=.
        node.grid = OmegaConf.merge(named("sampler/grid", grid), own, {"steps": 2})
        built = build(node)
        if sampler == "parallel" and grid in ("ancestral", "churn", "restart"):  # works on all times at once
            with pytest.raises(ValueError, match="only decreases"):
                built.check(model.sde)
        else:
            assert built.sample(model, (3, 2), seed=0).x.isfinite().all(), grid


@pytest.mark.parametrize("sampler", [name for name in gridded() if name != "parallel"])
def test_every_sampler_takes_a_corrector_and_where_it_acts(sampler: str) -> None:
    bare = named("sampler", sampler)
    assert (bare.corrector_where, bare.cuda_graph) == (None, False)
    parts = ["sampler/corrector=metropolis_langevin", "sampler/corrector_where=every", "sampler/grid=churn"]
    built = build(composed(f"sampler={sampler}", *parts, "sampler.grid.steps=2"))
    assert isinstance(built.corrector, steps.MetropolisLangevin)
    assert built.corrector_where(sde.VPSDE(), torch.arange(5)).tolist() == [True, False, True, False, True]
    built.check(sde.VPSDE())


def test_every_predictor_is_a_sampler_of_that_name() -> None:
    assert set(names("sampler/predictor")) <= set(names("sampler"))


@pytest.mark.parametrize(
    "group", ["sampler", "sampler/predictor", "sampler/corrector", "sampler/corrector_where", "sampler/grid"]
)
def test_every_argument_of_a_sampler_s_part_is_shown(group: str) -> None:
    for name in names(group):
        node = named(group, name)
        arguments = inspect.signature(trusted(node["_target_"])).parameters
        hidden = set(arguments) - set(node) - ({"sde", "times"} if node.get("_partial_") else set())
        assert not hidden, f"{name} hides {hidden}"


def test_a_sampler_s_table_is_that_of_the_most_calls(tmp_path: Path) -> None:
    for calls in (2, 9, 10):
        (tmp_path / f"tuned-{calls}.json").write_text("{}")
    (tmp_path / "tuned-of-old.json").touch()
    assert configs.sampler_config("tuned", tmp_path).table == str(tmp_path / "tuned-10.json")
    with pytest.raises(
        tuned_tables.NoTablesError, match=r"spectrum-<calls>.json: make one with python scripts/tune.py"
    ):
        configs.sampler_config("spectrum", tmp_path)


@pytest.mark.parametrize(
    "name", [name for name in names("sde") if "sigma_max: auto" in (CONF / f"sde/{name}.yaml").read_text()]
)
def test_a_scale_that_nothing_has_measured_is_no_number(name: str) -> None:
    with pytest.raises(ValueError) as refusal:
        build(named("sde", name))
    assert "needs numbers 0 < sigma_min < sigma_max" in entry.one_line(refusal.value)
    config = OmegaConf.create({"sde": named("sde", name), "trust": []})
    assert float(configs.sde_of(config).prior_std) == pytest.approx(50.0)
    config.sde.sigma_max = "auto"
    assert configs.sde_of(config, TargetStream(targets.make("ring"))).prior_std == pytest.approx(8.0 + 6 * 0.2, abs=0.5)


@pytest.mark.parametrize("name", names("target"))
def test_every_target_draws_and_denoises(name: str) -> None:
    target = build(named("target", name))
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
            known = named("network", name)
            overrides += ["data=digits", *(f"network.{key}={value}" for key, value in SMALL.items() if key in known)]
        if name == "overlapping":  # is for more than two dimensions
            overrides.append("data=digits")
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
def test_another_sampler_or_network_keeps_nothing_that_a_recipe_gave_its_own(experiment: str) -> None:
    chosen = ("sampler=heun", "network=dit_s")
    config, plain = compose(f"experiment={experiment}", *chosen), compose(*chosen)
    assert config.sampler == plain.sampler
    assert config.network.keys() == plain.network.keys()
    what_any_can = {"augment_width", "dropout", "learned_variance", "num_classes"}
    assert {key for key in plain.network if config.network[key] != plain.network[key]} <= what_any_can


@pytest.mark.parametrize("experiment", names("experiment"))
def test_every_experiment_trains_and_samples_for_two_steps(experiment: str, tmp_path: Path) -> None:
    config = compose(f"experiment={experiment}", "trainer.steps=2", "trainer.batch_size=8", "trainer.progress=false")
    if "path" in list(config.data):  # of real images, `???` too
        config.data = stand_in(config.data._target_, tmp_path)
        config.network.update(TINY)
    model = trained_for_two_steps(config, tmp_path)
    if isinstance(model, NoisyClassifier):
        return
    samplers = configs.samplers_of(config)
    for sampler in samplers.values():
        sampler.check(model.sde)
    node = configs.sampler_config(config.sampler)
    node.grid.steps = 2
    assert build(node).sample(model, (2, *model.event_shape), seed=0).x.isfinite().all()


def test_an_evaluation_may_name_values_of_its_own_config() -> None:
    config = OmegaConf.create({"kept": False, "evaluation": {"memorization": "${kept}"}})
    assert configs.views_of(config.evaluation)["memorization"] is False


@pytest.mark.parametrize("experiment", [name for name in names("experiment") if not name.endswith("classifier")])
def test_debug_lays_over_every_experiment(experiment: str) -> None:
    config = compose(f"experiment={experiment}", "debug=minute")
    assert (config.trainer.steps, config.num_samples, config.sampler.grid.steps) == (3, 4, 3)
    assert list(configs.samplers_of(config)) == ["exponential_adams"]


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
    data = build(config.data)
    configs.fill_in(config, data, config.choices)
    model = build_model(config)
    config.trainer.update(log_every=1, test_every=2, evaluate_every=0)
    parts = [build(config[name]) for name in ("objective", "time_sampler")]
    result = build(config.trainer).fit(model, data, *parts, folder, seed=config.seed)
    assert result.step == 2
    assert ("loss_held_out" in result.metrics[1]) == data.has_test
    assert all(p.isfinite().all() for p in result.model.parameters())
    return result.model.eval()


def test_auto_scales_are_measured_from_the_data() -> None:
    config = compose("sde=ve")
    configs.fill_in(config, TargetStream(targets.make("ring")), config.choices)
    assert config.parameterization.sigma_data == pytest.approx((0.2**2 + 8.0) ** 0.5, rel=0.02)
    assert config.sde.sigma_max == pytest.approx(8.0 + 6 * 0.2, abs=0.5)
    assert config.class_names is None
    named = TensorData(torch.randn(8, 2), torch.arange(8) % 2)
    named.class_names = ["cat", "dog"]
    configs.fill_in(config, named, config.choices)
    assert config.class_names == ["cat", "dog"]
    median = compose("sde=ve", "sigma_max_quantile=0.5")
    configs.fill_in(median, TargetStream(targets.make("ring")), median.choices)
    assert median.sde.sigma_max == pytest.approx(8.0 * 0.5**0.5, abs=0.6)  # two of eight modes, a quarter turn apart


def test_every_config_file_names_what_it_builds() -> None:
    for file in CONF.rglob("*.yaml"):
        group = file.parent.relative_to(CONF).parts
        if group and group[-1] != "base" and group[0] not in ("experiment", "debug", "hydra", "evaluation"):
            text = file.read_text()
            of_another = any(f"\n  - {other.stem}\n" in text for other in file.parent.glob("*.yaml"))
            assert "_target_: " in text or "  - base/fixed_grid@_here_" in text or of_another, file

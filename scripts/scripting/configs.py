"""Reads and builds what configs name: files of conf/, samplers, the SDE, metrics, a run and its model."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from score_sde import SDE, LearnedScore, distributed
from score_sde.build import build, trusted
from score_sde.classifier import NoisyClassifier
from score_sde.data import Data, measure_sigma_data, measure_sigma_max
from score_sde.evaluation import check_target
from score_sde.run import Run
from scripting.command_line import CONF, chosen, idle, key_of, listed, unknown
from scripting.tuned_tables import take_table


def plain(node: DictConfig) -> Any:
    """A config as nested dicts and lists; missing values are "???"."""
    return OmegaConf.to_container(node, resolve=True)


def recorded(config: DictConfig) -> dict[str, Any]:
    """The settings that a script's results depend on: its config without folders and devices."""
    left_out = {"run", "output", "device", "trust", "hydra"}
    return {name: value for name, value in plain(config).items() if name not in left_out}


def named(group: str, name: str) -> DictConfig:
    """The config of file `name` in a config group, e.g. named("sampler", "heun"), of conf/ or the job's own --config-dir.

    Raises ValueError with the known names if there is none.
    """
    own = own_folders()
    known = sorted({file.stem for folder in (str(CONF), *own) for file in Path(folder, group).glob("*.yaml")})
    if name not in known:
        raise ValueError(unknown(group, name, known))
    with _separate_hydra():
        quoted = (folder.replace("\\", "\\\\").replace("'", "\\'") for folder in own)  # as Hydra reads it
        path = ",".join(f"'file://{folder}'" for folder in quoted)
        config = hydra.compose(overrides=[f"hydra.searchpath=[{path}]", f"+{group}={name}"])
    for part in group.split("/"):
        config = config[part]
    OmegaConf.set_struct(config, False)  # users may add keys
    return config


def own_folders() -> list[str]:
    """The job's config folders besides conf/, from --config-dir or hydra.searchpath."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    return [source.path for source in sources if source.schema == "file" and Path(source.path) != CONF]


@contextmanager
def _separate_hydra() -> Iterator[None]:
    """A separate Hydra to compose with; the application's own is restored afterwards."""
    instance = GlobalHydra.instance()
    own, instance.hydra = instance.hydra, None
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = own  # which may be another instance by now


def sampler_config(
    node: str | DictConfig, folder: Path | None = None, step: int | None = None, asked: Mapping[str, Any] | None = None
) -> DictConfig:
    """A sampler's config from its name or its node; its parts may be names too, and its `table` a pattern for a folder.

    Raises ValueError for an unknown name, and as `take_table` does.
    """
    node = named("sampler", node) if isinstance(node, str) else OmegaConf.create(plain(node))  # interpolations resolved
    for part in ("predictor", "corrector", "corrector_where", "grid"):
        if isinstance(node.get(part), str):
            node[part] = named(f"sampler/{part}", node[part])
    take_table(node, folder, step, asked)
    return node


def sampler_nodes(
    config: DictConfig, folder: Path | None = None, step: int | None = None, asked: Mapping[str, Any] | None = None
) -> dict[str, DictConfig]:
    """name -> config: the samplers of conf/sampler named in `evaluation.samplers`, or the run's own `sampler` for null."""
    names = config.evaluation.samplers
    if OmegaConf.is_list(names) and len({*names}) < len(names):
        raise ValueError(f"evaluation.samplers={list(names)} names one twice: name each once")
    nodes = {chosen(config, "sampler"): config.sampler} if names is None else {name: name for name in listed(names)}
    return {name: sampler_config(node, folder, step, asked) for name, node in nodes.items()}


def samplers_of(config: DictConfig, trust: Sequence[str] = ()) -> dict[str, Any]:
    """name -> sampler, built from `sampler_nodes`."""
    return {name: build(node, trust) for name, node in sampler_nodes(config).items()}


def check_own(target: Any) -> None:
    """Raises ValueError for a law of your own that contradicts itself (`evaluation.check_target`)."""
    if target is not None and not type(target).__module__.startswith("score_sde."):
        check_target(target)


def fill_auto(config: DictConfig, data: Data) -> None:
    """Replaces the scales that are `auto` in the config by those measured from the data."""
    measures = {
        ("sde", "sigma_max"): functools.partial(measure_sigma_max, quantile=config.get("sigma_max_quantile", 1.0)),
        ("parameterization", "sigma_data"): measure_sigma_data,
    }
    for (group, name), measure in measures.items():
        if config.get(group, {}).get(name) == "auto":
            config[group][name] = round(measure(data), 4)
            print(f"{group}.{name}: auto is {config[group][name]:g}, measured from the data")


def fill_in(config: DictConfig, data: Data, choices: Mapping[str, str], overrides: Sequence[str] = ()) -> None:
    """Writes into the config what the data determine (event shape, conditions, `auto` scales), the choices and overrides.

    Of several overrides of one key the last is kept. `resume` is left out, since it is no setting of the run.
    """
    config.event_shape = list(data.event_shape)
    config.conditions = sorted(data.batch(0, 1).condition.keys() - {"augment"})
    config.class_names = list(data.class_names) if data.class_names else None
    if data.target is None:
        idle(overrides, ["target"], "with these data, which are not drawn from a target")
        config.target = None
    fill_auto(config, data)
    config.choices = {group: name for group, name in choices.items() if "hydra" not in group}
    standing = {(key_of(override), override.startswith("~")): override for override in overrides}
    config.overrides = [override for (name, _), override in standing.items() if name != "resume"]


def sde_of(config: DictConfig, data: Data | None = None) -> SDE:
    """The SDE of a config; `sigma_max: auto` is replaced by the value measured from the data, as in training, or else 50."""
    if data is not None:
        fill_auto(config, data)
    elif config.sde.get("sigma_max") == "auto":
        config.sde.sigma_max = 50.0
        print("sde.sigma_max: auto is 50, as nothing is trained here")
    return build(config.sde, config.trust)


def metrics_of(given: Any, trust: Sequence[str], known: Sequence[str]) -> list[Any]:
    """The metrics of a config, for null all that are `known`; a name with a dot is a function of a module of your own."""
    names = known if given is None else listed(given)
    return [trusted(name, trust) if isinstance(name, str) and "." in name else name for name in names]


def views_of(settings: DictConfig, trust: Sequence[str] = ()) -> dict[str, Any]:
    """What an `evaluation` config adds to the metrics, as arguments of `score_sde.evaluation.evaluate`.

    Raises ValueError for references of features that are not measured.
    """
    own = plain(settings)  # resolved first: its interpolations need the whole config
    settings = OmegaConf.merge(named("evaluation", "default"), own)  # older runs have fewer keys
    labelled, features = settings.classifier_data, listed(settings.features)
    for name in settings.references:
        if name not in features:
            raise ValueError(f"references name {name!r}, which is not among the features {features}: add it there")
    return {
        "classifier_data": build(labelled, trust) if labelled else None,
        "features": {name: build(named("extractor", name), trust) for name in features},
        "references": dict(settings.references),
        "whole_reference": settings.whole_reference,
        "memorization": settings.memorization,
        "batch_size": settings.batch_size,
    }


def open_run(config: DictConfig) -> Run:
    """The run named by `run=`.

    Raises ValueError if it is not given, FileNotFoundError if it is not a run.
    """
    if not config.run:
        raise ValueError("which run? give run=<directory>, a folder that scripts/train.py wrote")
    return Run.open(config.run, trust=tuple(config.trust))


def model_of(run: Run, config: DictConfig) -> LearnedScore:
    """The run's score model with the weights of `ema` and `step`, on `device`; a null `step` becomes that of the weights.

    Raises ValueError for a run of a classifier, and as `Run.model` does.
    """
    if config.step is None:  # read once: a run that is still training may write another checkpoint meanwhile
        config.step = run.checkpoints.latest()
    model = run.model(ema=config.ema, step=config.step).to(device_of(config.device))
    if isinstance(model, NoisyClassifier):
        raise ValueError(f"{run.path} is a classifier of noisy data, which has no samples: give it as guidance.run= with "
                         "guidance=classifier, and a score model as run=")  # fmt: skip
    return model


def device_of(name: str) -> str:
    """The device; for "auto" this process's CUDA device if there is one, else "cpu"."""
    return str(distributed.device(name))

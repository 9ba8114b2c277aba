"""A run directory: what training leaves behind and all that sampling, evaluation and a notebook need.

    config.yaml  checkpoints/step-XXXXXXXXX/  metrics.jsonl  samples/  figures/  result.json

Nothing read from it executes code: weights are safetensors, and a `_target_` of config.yaml is called only where it is
a class or function of the rooms in ROOMS, a module class of torch.nn, or lies in a module that the caller trusts by
name. Only this module and the scripts know Hydra.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from score_sde import distributed
from score_sde.classifier import NoisyClassifier
from score_sde.data import Data, key
from score_sde.energy import EnergyScore
from score_sde.networks import Conservative, Encoder
from score_sde.score import LearnedScore
from score_sde.training import Checkpoints, reconstruct, write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

__all__ = ["Run", "build_model", "instantiate"]

# Where a `_target_` of a run directory may be defined: what only builds things, and touches no file but to read data.
ROOMS = (
    "score_sde.sde",
    "score_sde.parameterization",
    "score_sde.networks",
    "score_sde.targets",
    "score_sde.data",
    "score_sde.grid",
    "score_sde.steps",
    "score_sde.sampler",
    "score_sde.ode",
    "score_sde.adaptive",
    "score_sde.adaptive_sde",
    "score_sde.parallel",
    "score_sde.tuning",
    "score_sde.guidance",
    "score_sde.training.classification",
    "score_sde.evaluation.extractors",
    "score_sde.evaluation.convnet",
    "score_sde.training.objective",
    "score_sde.training.score_matching",
    "score_sde.training.times",
    "score_sde.training.trainer",
    "score_sde.training.variational",
    "score_sde.training.weighting",
)


class Run:
    """A run directory, made by `Run.create` and read by `Run.open`.

    Attributes:
        path: the directory; `samples` and `figures` are folders in it, made when first asked for.
        config: the resolved configuration.
        checkpoints: its `Checkpoints`.
    """

    def __init__(self, path: str | Path, trust: Sequence[str] = ()) -> None:
        self.path, self.trust = Path(path), tuple(trust)
        self.checkpoints = Checkpoints(self.path / "checkpoints")

    @classmethod
    def create(cls, path: str | Path, config: DictConfig | Mapping[str, Any], trust: Sequence[str] = ()) -> Run:
        """A new run with a config (see `save_config`). Raises ValueError where the directory holds a run already."""
        run = cls(path, trust)
        run.save_config(config, new=True)
        return run

    @classmethod
    def open(cls, path: str | Path, trust: Sequence[str] = ()) -> Run:
        """The run in a directory.

        `trust` names modules of the user's own whose classes config.yaml may name, e.g. ("my_sde",).
        Raises FileNotFoundError where the directory or its config.yaml does not exist.
        """
        run = cls(path, trust)
        if not (run.path / "config.yaml").is_file():
            missing = "has no config.yaml" if run.path.is_dir() else "does not exist"
            fix = "give the folder that scripts/train.py wrote"
            if run.checkpoints.latest() is not None:  # of Trainer.fit alone
                fix = (
                    f"load_state_dict(Checkpoints({str(run.checkpoints.folder)!r}).weights()) gives a model its weights"
                )
            raise FileNotFoundError(f"{run.path} {missing}, so it is no run: {fix}")
        return run

    @cached_property
    def config(self) -> DictConfig:
        from omegaconf import DictConfig, OmegaConf

        config = OmegaConf.load(self.path / "config.yaml")
        if not isinstance(config, DictConfig):
            raise ValueError(f"{self.path / 'config.yaml'} holds no mapping: restore it from the run's .hydra folder")
        return config

    def save_config(self, config: DictConfig | Mapping[str, Any], new: bool = False) -> None:
        """Writes a config, resolved, to config.yaml in one instant.

        Raises OmegaConf's error where it has holes, and ValueError for a `new` run where the directory holds one, if only
        since an instant.
        """
        from omegaconf import OmegaConf

        tree = config if OmegaConf.is_config(config) else OmegaConf.create(dict(config))
        plain = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
        if distributed.is_main():
            self.path.mkdir(parents=True, exist_ok=True)
            text = OmegaConf.to_yaml(OmegaConf.create(plain))
            try:
                if new and self.checkpoints.latest() is not None:
                    raise FileExistsError
                write_atomically(self.path / "config.yaml", text, new)
            except FileExistsError:
                raise ValueError(f"{self.path} holds a run already: continue it, or choose a new directory") from None

    def model(self, ema: bool | float = True, step: int | None = None) -> LearnedScore:
        """The trained model on the CPU, in evaluation mode: averaged weights of the latest checkpoint by default.

        `ema` is False for raw weights, below 1 the relative width of a power-function average, reconstructed from the
        run's snapshots (see `training.posthoc`), else a half-life in images that was tracked beside the first.
        Raises FileNotFoundError where there is no such checkpoint, ValueError for a `_target_` that is not trusted.
        """
        if isinstance(ema, bool):
            weights = self.checkpoints.weights(step, ema=ema)
        else:
            weights = (
                reconstruct(self.path, ema, step) if ema < 1 else self.checkpoints.weights(step, ema=f"ema-{ema:g}")
            )
        model = build_model(self.config, self.trust)
        model.load_state_dict(weights)
        return model.eval().requires_grad_(False)

    def export(self, path: str | Path, step: int | None = None) -> Path:
        """Writes the averaged model to a new folder that `score_sde.load` reads, without Hydra; see `score_sde.export`.

        Raises FileNotFoundError where there is no such checkpoint, ValueError where the folder exists.
        """
        from omegaconf import OmegaConf

        from score_sde.export import PARTS, save

        config: Any = OmegaConf.to_container(self.config, resolve=True)
        return save(self.model(step=step), {name: config[name] for name in PARTS}, path)

    def data(self) -> Data:
        """The data the run trains on."""
        return instantiate(self.config.data, self.trust)

    def metrics(self) -> pd.DataFrame:
        """metrics.jsonl as a table, one row a line; empty before the first line."""
        import pandas as pd

        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return pd.DataFrame([json.loads(line) for line in lines if line.endswith("\n")])

    def save_result(self, result: Mapping[str, Any]) -> None:
        """Writes the run's final numbers to result.json, in one instant."""
        write_atomically(self.path / "result.json", json.dumps(dict(result), indent=2) + "\n")

    @property
    def samples(self) -> Path:
        return self._folder("samples")

    @property
    def figures(self) -> Path:
        return self._folder("figures")

    def _folder(self, name: str) -> Path:
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return folder

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, step={self.checkpoints.latest()})"


def build_model(
    config: DictConfig | Mapping[str, Any], trust: Sequence[str] = (), make: Callable[..., Any] | None = None
) -> LearnedScore:
    """The untrained model of a configuration with `sde`, `parameterization`, `network`, `event_shape` and `seed`.

    `make` builds its parts, `instantiate` unless given. Its first weights follow from `seed` alone; torch's global
    generator is left as it was.
    """
    make = make or instantiate
    with torch.random.fork_rng([]):
        torch.manual_seed(key(config["seed"], "network"))
        network = make(config["network"], trust)
    sde, parameterization = make(config["sde"], trust), make(config["parameterization"], trust)
    kinds = {Conservative: EnergyScore, Encoder: NoisyClassifier}
    kind = next((kind for of, kind in kinds.items() if isinstance(network, of)), LearnedScore)
    return kind(network, sde, parameterization, config["event_shape"])


def instantiate(node: Any, trust: Sequence[str] = ()) -> Any:
    """`hydra.utils.instantiate`, once every `_target_` within the node is found to be trusted.

    Raises ValueError for a `_target_` that is neither of ROOMS, nor of torch.nn, nor of the modules in `trust`.
    """
    import hydra
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(node, resolve=True, throw_on_missing=True) if OmegaConf.is_config(node) else node
    for target in _targets(container):
        trusted(target, trust)
    return hydra.utils.instantiate(container, _convert_="all")


def _targets(node: Any) -> Iterator[str]:
    """Every `_target_` within nested mappings and lists."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield node["_target_"]
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _targets(child)


def trusted(target: Any, trust: Sequence[str] = ()) -> Callable[..., Any]:
    """What a `_target_` names, where it lies in a trusted module; what such a module merely imports is refused.

    Raises ValueError for anything else, ImportError where there is nothing of that name.
    """
    if isinstance(target, str) and _within(target, ("score_sde", "torch.nn", *trust)):
        found = _located(target)
        home = getattr(found, "__module__", None) or ""
        # A class, a function or a class method; never a method, whose `self` the file would choose.
        builds = inspect.isclass(found) or inspect.ismethod(found) or "." not in getattr(found, "__qualname__", ".")
        if builds and _within(home, (*ROOMS, *trust)):
            return found
        if inspect.isclass(found) and issubclass(found, nn.Module) and _within(home, ("torch.nn",)):
            return found
    raise ValueError(
        f"_target_ {target!r} is refused: a run may only name models and data of score_sde, and torch.nn; "
        f"if the code is yours, trust its module: {str(target).split('.')[0]!r}"
    )


def _located(target: str) -> Any:
    """The object of a dotted name: attributes of the longest prefix that is a module."""
    names, known = target.split("."), None
    for count in range(len(names), 0, -1):
        module = ".".join(names[:count])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            # The name goes on with attributes; a package that the module itself lacks is another matter.
            if error.name is None or not _within(module, (error.name,)):
                raise
            continue
        missing, known = object(), found
        for name in names[count:]:
            found = getattr(found, name, missing)
        if found is not missing:
            return found
        break
    if known is None:
        raise ImportError(
            f"_target_ {target!r}: there is no module {names[0]!r}: run from its folder, or set PYTHONPATH"
        )
    near = difflib.get_close_matches(names[-1], dir(known), n=1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    raise ImportError(f"_target_ {target!r}: {known.__name__} has nothing of that name{hint}")


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)

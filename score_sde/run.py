"""A run directory: all that training writes, and all that sampling, evaluation and a notebook need.

    config.yaml  checkpoints/step-XXXXXXXXX/  metrics.jsonl  samples/  figures/  result.json

Reading it executes none of its code: weights are safetensors, and a `_target_` of config.yaml is called only if
`score_sde.build` trusts it. This is the only module of the package that knows Hydra's configs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from score_sde import distributed
from score_sde.build import build, build_model
from score_sde.data import Data
from score_sde.score import LearnedScore
from score_sde.training import Checkpoints, reconstruct, write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

__all__ = ["TAKES", "Run", "does_without", "needed"]

TAKES = {"label": "num_classes", "context": "context_width"}
"""Condition -> the key of a network's config that is set if the network takes it."""


def does_without(config: DictConfig) -> bool:
    """Whether a run with this config trains with label dropout, so that its model can be called without conditions."""
    return bool((config.get("objective") or {}).get("label_dropout"))


def needed(config: DictConfig) -> list[str]:
    """The conditions that every call of a run's model must give: those of its examples, or none with label dropout."""
    if does_without(config):
        return []
    given = config.get("conditions")  # older runs do not have the key
    return [name for name, key in TAKES.items() if config.network.get(key) is not None] if given is None else [*given]


class Run:
    """A run directory, made by `Run.create` and read by `Run.open`.

    Attributes:
        path: the directory; `samples` and `figures` are folders in it, created on first access.
        config: the resolved configuration.
        checkpoints: its `Checkpoints`.
    """

    def __init__(self, path: str | Path, trust: Sequence[str] = ()) -> None:
        self.path, self.trust = Path(path), (trust,) if isinstance(trust, str) else tuple(trust)
        self.checkpoints = Checkpoints(self.path / "checkpoints")

    @classmethod
    def create(cls, path: str | Path, config: DictConfig | Mapping[str, Any], trust: Sequence[str] = ()) -> Run:
        """Creates a run with a config (see `save_config`). Raises ValueError if the directory already holds one."""
        run = cls(path, trust)
        run.save_config(config, new=True)
        return run

    @classmethod
    def open(cls, path: str | Path, trust: Sequence[str] = ()) -> Run:
        """The run in a directory.

        `trust` lists your own modules whose classes config.yaml may name, e.g. ("my_sde",).
        Raises FileNotFoundError if the directory or its config.yaml does not exist.
        """
        run = cls(path, trust)
        if not (run.path / "config.yaml").is_file():
            missing = (
                "has no config.yaml" if run.path.is_dir() else "is a file" if run.path.exists() else "does not exist"
            )
            fix = "give the folder that scripts/train.py wrote"
            if run.checkpoints.latest() is not None:  # written by Trainer.fit without a config
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
        """Writes a config, resolved, to config.yaml atomically.

        Raises OmegaConf's error if values are missing, and ValueError for a `new` run if the directory already holds one,
        even one that another process has only just created.
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
        """The trained model on the CPU, frozen and in evaluation mode.

        Args:
            ema: True for averaged weights, False for raw ones; below 1, the relative width of a power-function average,
                reconstructed from the run's snapshots (see `training.posthoc`); else a further half-life in images that
                was tracked.
            step: of the checkpoint; by default the latest.

        Raises:
            FileNotFoundError: there is no such checkpoint or average.
            ValueError: a `_target_` is not trusted.
        """
        if isinstance(ema, bool):
            weights = self.checkpoints.weights(step, ema=ema)
        else:
            weights = (
                reconstruct(self.path, ema, step) if ema < 1 else self.checkpoints.weights(step, ema=f"ema-{ema:g}")
            )
        model = build_model(self.config, self.trust)
        model.load_state_dict(weights)
        model.needed = model.condition_names & {*needed(self.config)}
        return model.eval().requires_grad_(False)

    def export(self, path: str | Path, step: int | None = None, ema: bool | float = True) -> Path:
        """Writes `model(ema, step)` to a new folder that `score_sde.load` reads without Hydra; see `score_sde.export`.

        Raises as `model` does, and ValueError if the folder exists.
        """
        from omegaconf import OmegaConf

        from score_sde.export import PARTS, save

        config: Any = OmegaConf.to_container(self.config, resolve=True)
        return save(self.model(ema, step), {name: config[name] for name in PARTS}, path)

    def data(self) -> Data:
        """The data that the run trains on."""
        return build(self.config.data, self.trust)

    def metrics(self) -> pd.DataFrame:
        """metrics.jsonl as a table, with a row for each complete line."""
        import pandas as pd

        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return pd.DataFrame([json.loads(line) for line in lines if line.endswith("\n")])

    def save_result(self, result: Mapping[str, Any]) -> None:
        """Writes the run's final numbers to result.json atomically."""
        write_atomically(self.path / "result.json", json.dumps(dict(result), indent=2) + "\n")

    def result(self) -> dict[str, Any]:
        """What `save_result` wrote. Raises FileNotFoundError if the run has not finished."""
        return json.loads((self.path / "result.json").read_text())

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

"""The run of scripts/train.py: a new one, or one that is resumed with its own config and the command line's changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from score_sde import distributed
from score_sde.run import Run
from score_sde.training.trainer import has_stalled
from scripting.command_line import check_known, key_of, typed

# Settings that the weights and the order of examples depend on: a resumed run keeps its own.
FIXED = ("network", "sde", "parameterization", "data", "target", "event_shape", "seed", "trainer.batch_size", "init",
         "init_new")  # fmt: skip


def opened(config: DictConfig) -> tuple[Run, bool]:
    """The run of this command with its config, and whether it is resumed from a checkpoint.

    Raises ValueError if `resume` is not a folder, if it is `auto` and no output directory is named, or if a new run would
    begin in a directory that holds one.
    """
    if config.resume is not None and (not isinstance(config.resume, str) or not config.resume):
        raise ValueError(f"resume={config.resume!r} is not a folder: give a run's directory, or auto")
    automatic, folder = config.resume == "auto", Path(HydraConfig.get().runtime.output_dir)
    if automatic:
        if folder == Path.cwd():
            raise ValueError("resume=auto continues in the folder where it started: name it, hydra.run.dir=<folder>")
        if distributed.agree(Run(folder).checkpoints.latest()) is not None:
            return resumed(folder, config), True
    elif config.resume:
        return resumed(config.resume, config), True
    elif (folder / "config.yaml").exists():
        raise ValueError(f"{folder} holds a run already: give resume={folder} to continue it, or another folder")
    run = Run(folder, tuple(config.trust))
    run.config = config
    return run, False


def resumed(folder: str | Path, config: DictConfig) -> Run:
    """The run in a folder, with its config changed by this command's overrides."""
    run = Run.open(folder, tuple(config.trust))
    before = run.config.get("overrides") or []
    run.config = continued(run.config, typed())
    check_steps_left(run, [override for override in run.config.overrides if override not in before])
    return run


def continued(own: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of a run to resume, changed by the command line's overrides, which are added to its own.

    An override that the run has already changes nothing, nor does a value of `auto`, which the run has measured. Raises
    ValueError for another choice in a config group, for ~key, and for another value of a FIXED setting.
    """
    known = list(own.get("overrides") or [])
    resolved = OmegaConf.merge(own, {"overrides": [*overrides]}).overrides
    given = values_of([override for override in resolved if override not in known], own)
    merged = OmegaConf.merge(own, OmegaConf.from_dotlist([f"{name}={value}" for name, value in given.items()]))
    for name in given:
        if name in FIXED or name.partition(".")[0] in FIXED:
            check_same(name, OmegaConf.select(own, name), OmegaConf.select(merged, name))
    changed = {name: value for name, value in given.items()
               if OmegaConf.select(own, name) != OmegaConf.select(merged, name)}  # fmt: skip
    kept = [override for override in known if key_of(override) not in changed]
    merged.overrides = kept + [f"{name}={value}" for name, value in changed.items()]
    return merged  # type: ignore[return-value]


def values_of(overrides: Sequence[str], own: DictConfig) -> dict[str, str]:
    """key -> value of the overrides, without those of config groups, which must be the run's own choices."""
    given: dict[str, str] = {}
    for override in overrides:
        name, value = key_of(override), override.partition("=")[2]
        if name in ("resume", "trust") or value == "auto":
            continue
        if override.startswith("+") and name not in own.choices:
            check_known(name, own, [OmegaConf.to_yaml(own), *overrides])
        if override.startswith("~"):
            if OmegaConf.select(own, name) is not None:
                raise ValueError(f"{override} removes what the run was started with: start a new run, or leave it out")
        elif name in own.choices:
            check_same(name, own.choices[name] or "null", value)
        else:
            given[name] = value
    return given


def check_same(name: str, own: Any, given: Any) -> None:
    """Raises ValueError for another value than the run's own."""
    if own != given:
        raise ValueError(f"{name}={given} differs from the run's own {name}={own}: start a new run, or leave it out")


def check_steps_left(run: Run, new: Sequence[str]) -> None:
    """Raises ValueError for new settings of a training that has ended, by its steps or its patience."""
    done, trainer = run.checkpoints.latest() or 0, run.config.trainer
    free = [f"trainer.{name}" for name in ("steps", "patience", "device", "progress")]
    settings = [override for override in new if key_of(override).partition(".")[0] in ("trainer", "objective", "time_sampler")
                and key_of(override) not in free]  # fmt: skip
    if settings and done >= trainer.steps:
        raise ValueError(f"{settings[0]} does nothing: all {done} steps of {run.path} are done; give trainer.steps={2 * done} "
                         "too, or leave it out")  # fmt: skip
    if settings and trainer.get("patience") and has_stalled(held_out_losses(run, done), trainer.patience):
        raise ValueError(f"{settings[0]} does nothing: {run.path} ended at step {done} by its trainer.patience; give "
                         "trainer.patience=null too, or leave it out")  # fmt: skip


def held_out_losses(run: Run, done: int) -> list[float]:
    """The held-out losses of a run's first `done` steps, in order."""
    rows = run.metrics().reindex(columns=["step", "loss_held_out"]).dropna()
    return [*rows.loc[rows["step"] <= done, "loss_held_out"]]

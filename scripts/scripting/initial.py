"""Initial weights of a new run's network, from another run, an exported model, or a file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from score_sde import LearnedScore, distributed
from score_sde.export import differing
from score_sde.training import Checkpoints
from scripting.command_line import unknown


def start_from(config: DictConfig, model: LearnedScore) -> None:
    """Loads the weights of `init` into the network, except those of `init_new`, and writes their file into the config.

    Raises ValueError if there are no such weights, or they are of another network.
    """
    file = Path(distributed.agree(str(source_of(config.init))))
    own, anew = model.network.state_dict(), tuple(config.init_new)
    given = network_weights(file, own)
    for name in anew:
        if not any(key.startswith(name) for key in (*given, *own)):
            raise ValueError(unknown("weight of init_new", name, [*own]))
    given, kept = ({name: value for name, value in weights.items() if not name.startswith(anew)}
                   for weights in (given, own))  # fmt: skip
    there = config_beside(file)
    if wrong := differing(kept, given):
        raise ValueError(refusal(file, wrong, settings_that_differ(there, config, ("network",))))
    model.network.load_state_dict(own | given)
    config.init = str(file)
    print(f"init: the network starts from {file}" + (f", but for {', '.join(anew)}" if anew else ""))
    if others := settings_that_differ(there, config, ("sde", "parameterization")):
        print(
            f"init: it was trained with {' '.join(others)}, this run is not: give the same, unless you mean to change it"
        )


def source_of(init: Any) -> Path:
    """The file that `init` names: a .safetensors file, or that of an exported model, a checkpoint or a run's latest one."""
    folder = Path(str(init))
    latest = Checkpoints(folder / "checkpoints").latest()
    places = [folder, folder / "model.safetensors", folder / "ema.safetensors"]
    places += [] if latest is None else [Checkpoints(folder / "checkpoints").path(latest) / "ema.safetensors"]
    for file in places:
        if file.suffix == ".safetensors" and file.is_file():
            return file.absolute()
    why = "has no weights" if folder.exists() else "does not exist"
    raise ValueError(f"init={init} {why}: give a run's folder, one that Run.export wrote, or a .safetensors file")


def network_weights(file: Path, known: Collection[str]) -> dict[str, Tensor]:
    """The network weights in a file: all if any has a `known` name, else those of a model's part `network`."""
    try:
        weights = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    if not weights.keys().isdisjoint(known):
        return weights
    own = {name.removeprefix("network."): value for name, value in weights.items() if name.startswith("network.")}
    return own or weights


def config_beside(file: Path) -> DictConfig:
    """The config of the run or exported model that a weights file belongs to; empty if there is none."""
    for place in (file.parent / "config.json", file.parent.parent.parent / "config.yaml"):
        if place.is_file() and isinstance(config := OmegaConf.load(place), DictConfig):
            return config
    return OmegaConf.create()


def settings_that_differ(there: DictConfig, here: DictConfig, groups: Sequence[str]) -> list[str]:
    """The settings of these groups in `there` that differ from those in `here`, as command-line overrides."""
    return [line for group in groups if group in there for line in _others(group, there, here)]


def _others(group: str, there: DictConfig, here: DictConfig) -> Iterator[str]:
    if there[group]["_target_"] != here[group].get("_target_"):
        yield f"{group}={(there.get('choices') or {}).get(group) or there[group]['_target_'].rpartition('.')[2]}"
        return
    for name, value in there[group].items():
        if name != "event_shape" and value != here[group].get(name):
            yield f"{group}.{name}={'null' if value is None else value}"


def refusal(file: Path, wrong: Sequence[str], settings: Sequence[str]) -> str:
    """The error for weights of another network."""
    more = f", and {len(wrong) - 2} more differ" if len(wrong) > 2 else ""
    names = ",".join([line.partition(" ")[0] for line in wrong][:2] + ["..."] * (len(wrong) > 2))
    same = f"give {' '.join(settings)}, as it was trained" if settings else "make the networks the same"
    return (f"init: the weights in {file} are of another network: {'; '.join(wrong[:2])}{more}: {same}, or init_new=[{names}] "
            "to start these anew")  # fmt: skip

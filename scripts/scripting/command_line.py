"""Checks of the command line against the config files: keys that exist, and values of the right kind."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from score_sde.checks import did_you_mean, initials, nearest

CONF = Path(__file__).resolve().parents[2] / "conf"
CLOSED = ("evaluation", "restoration")
"""The mappings without a `_target_` that take no keys but those of the config files."""


def listed(value: Any) -> list[Any]:
    """A config's list, or one value as a list of it."""
    return list(value) if OmegaConf.is_list(value) else [value]


def typed() -> list[str]:
    """The job's overrides as typed, not resolved: some refer to values that the data only fill in later."""
    return OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)  # type: ignore[return-value]


def chosen(config: DictConfig, group: str) -> str:
    """The name of what a run, or else this job, chose in a group; for your own, the last part of its `_target_`."""
    choices = config.get("choices") or HydraConfig.get().runtime.choices
    return choices.get(group) or config[group]._target_.rpartition(".")[2]


def key_of(override: str) -> str:
    """The dotted key, or the config group, of an override."""
    return override.lstrip("+~").partition("=")[0].partition("@")[0]


def check(config: DictConfig) -> None:
    """Raises ValueError for an added key that nothing reads, and for a value of another kind than the config files have.

    A single value for a list becomes a list, in `config` itself.
    """
    own = HydraConfig.get()
    groups = {*own.runtime.choices, *GlobalHydra.instance().config_loader().list_groups("")}
    overrides = typed()
    values = [override for override in overrides if key_of(override) not in groups and "/" not in key_of(override)]
    if not values:
        return
    choices = [override for override in overrides if override not in values]
    search = [override for override in own.overrides.hydra if key_of(override) == "hydra.searchpath"]
    check_values(values, hydra.compose(own.job.config_name, [*choices, *search]), config, own.overrides.hydra)


def check_values(
    overrides: Sequence[str], default: DictConfig, config: DictConfig, of_hydra: Sequence[str] = ()
) -> None:
    """`check` for the overrides that turned `default` into `config`, given those of Hydra's own keys, `of_hydra`."""
    for override in overrides:
        key = key_of(override)
        if override.startswith("+") and not config.get("resume"):  # a resumed run may have keys that these groups lack
            check_known(key, default, [OmegaConf.to_yaml(config), *of_hydra])
        if not override.startswith("~"):
            _check_kind(key, default, config)


def idle(overrides: Sequence[str], names: Iterable[str], why: str) -> None:
    """Raises ValueError if an override changes one of these keys, or a key below one."""
    for override in overrides:
        key = key_of(override).replace("/", ".") + "."
        if any(key.startswith(f"{name}.") for name in names):
            raise ValueError(f"{override} does nothing {why}: leave it out")


def check_globs(arguments: Sequence[str]) -> None:
    """Raises ValueError for globs of a sweep that had no job in this process, though nothing sent its jobs elsewhere."""
    globs = [argument for argument in arguments if "=glob(" in argument]
    plain = {argument for argument in arguments if argument.startswith("-")} <= {"-m", "--multirun"}
    if globs and plain and not any(key_of(argument) == "hydra/launcher" for argument in arguments):
        raise ValueError(f"the sweep has no job, as a pattern matches no name: see {' '.join(globs)}")


def unknown(kind: str, name: Any, known: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    """The error for an unknown name, with what may be meant `elsewhere`, or else the nearest known names."""
    hint = did_you_mean(elsewhere or nearest(str(name), known), after=" ")
    if not known:
        return f"{name} is new: a {kind} is added by +{name}=<value>"
    more = "; pip install 'score_sde[sweep]' brings more" if kind in ("hydra/launcher", "hydra/sweeper") else ""
    return f"unknown {kind.replace('/', ' ')} {name!r}: {hint}known: {', '.join(known)}{more}"


def misread(error: BaseException) -> str | None:
    """The error for an argument that Hydra cannot read, with what to type instead; None for other errors."""
    said = str(error)
    if isinstance(error, OverrideParseException):
        key, is_pair, value = error.override.partition("=")
        if not is_pair:
            return f"{key!r} is not <key>=<value>: a run's folder is given as run={key}, to train.py as resume={key}"
        if re.fullmatch(r"<.*>", value):
            return f"{error.override}: {value} stands for a value of your own: give that in its place"
        return None if set(value) & {*"[]{}'\""} else f"{error.override}: quote the value, '{key}=\"{value}\"'"
    if twice := re.match(r"(\S+) appears more than once in the final defaults list", said):
        return f"{twice[1]} has a choice already: give {twice[1]}=<name> in its place, without +"
    if said.startswith("Config group override must be a string"):
        given = [key_of(argument) for argument in sys.argv if argument.endswith("=null")]
        group = next((key for key in given if (CONF / key).is_dir()), "<group>")
        names = ", ".join(sorted(file.stem for file in (CONF / group).glob("*.yaml")))
        return f"{group}=null is not a choice: give {group}=<name>, or ~{group} to leave it out; known: {names}"
    return None


def _select(config: DictConfig, key: str) -> Any:
    """The value of a key; None if it has none, or none yet."""
    try:
        return OmegaConf.select(config, key)
    except OmegaConfBaseException:
        return None


def check_known(key: str, known: DictConfig, texts: Sequence[str]) -> None:
    """Raises ValueError for a key that is not among those known, unless an interpolation in the texts names it.

    Arguments of a `_target_` are left for it to check, and mappings of your own may have any key.
    """
    home, _, name = key.rpartition(".")
    top = key.partition(".")[0]
    if top not in known:
        home, name, key = "", top, top
    node = known if not home else _select(known, home) if home in CLOSED else None
    if node is None or name in node:
        return
    used = re.compile(r"\$\{[^}]*(?<![\w.])" + re.escape(key) + r"(?!\w)")
    if not any(used.search(text) for text in texts):
        raise ValueError(unknown_key(key, node))


def unknown_key(key: str, node: DictConfig) -> str:
    """The error for a key that `node`, the mapping it belongs to, lacks."""
    home, dot, name = key.rpartition(".")
    known = [str(one) for one in node]
    root = OmegaConf.to_container(node._get_root(), resolve=False)
    elsewhere = ["hydra.run.dir"] if name == "output" else _places(root, name)
    meant = dict.fromkeys([*(f"{home}{dot}{one}" for one in nearest(name, known)), *elsewhere])
    line = unknown("key", key, known, [*meant])
    takes = str(node.get("_target_", "")).rpartition(".")[2]
    return f"{line}; another argument of {takes} is given as +{key}=<value>" if takes else line


def _places(node: Any, name: str, home: str = "") -> Iterator[str]:
    """Yields the dotted keys that end in this name, or in one of these initials."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if name in (key, initials(str(key))):
            yield f"{home}{key}"
        if key != "hydra":
            yield from _places(value, name, f"{home}{key}.")


def _is_numeral(word: Any) -> bool:
    """Whether a word, e.g. from an environment variable, spells a number."""
    try:
        float(word)
    except (TypeError, ValueError):
        return False
    return isinstance(word, str)


def _check_kind(key: str, known: DictConfig, config: DictConfig) -> None:
    """Raises ValueError for another kind of value; a null number next to a `_target_` is left for that to check."""
    value, default, home = _select(config, key), _select(known, key), key.rpartition(".")[0]
    switch = isinstance(default, bool)
    number = isinstance(default, int | float) and not switch
    if value is None:
        if number and "_target_" not in (_select(known, home) if home else known):
            raise ValueError(f"{key}=null is no number: give one such as {default:g}")
        return
    if switch and not isinstance(value, bool | int | float):
        raise ValueError(f"{key}={value!r} is neither true nor false")
    if number and value != "auto":
        for one in listed(value):
            if isinstance(one, bool) or not isinstance(one, int | float):
                words = ", which ${oc.decode:...} would read as one" if _is_numeral(one) else ""
                raise ValueError(f"{key}={value!r} is no number{words}: give one such as {default:g}")
    if OmegaConf.is_list(default) and not OmegaConf.is_list(value):
        OmegaConf.update(config, key, [value])
    elif isinstance(default, DictConfig) and "_target_" not in default and not isinstance(value, DictConfig):
        raise ValueError(f"{key}={value!r} is no mapping from names to values: give +{key}.<name>=<value>")

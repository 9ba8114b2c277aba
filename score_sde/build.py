"""Builds the objects that nested mappings with `_target_`s describe, by Hydra's rules and without Hydra.

A configuration file cannot execute code of its own: a `_target_` is called only if it is a class or function of the
modules in ROOMS, a module class of torch.nn, or lies in a module that the caller trusts by name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from score_sde.checks import did_you_mean, nearest
from score_sde.classifier import NoisyClassifier
from score_sde.energy import EnergyScore
from score_sde.keyed import key, seeded
from score_sde.networks import Conservative, Encoder
from score_sde.score import LearnedScore

__all__ = ["build", "build_model", "trusted"]

# Modules in which a `_target_` of a run directory may be defined: they only build objects, and open files only to read data.
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


def build_model(config: Mapping[str, Any], trust: Sequence[str] = ()) -> LearnedScore:
    """The untrained model of a configuration with `sde`, `parameterization`, `network`, `event_shape` and `seed`.

    Its initial weights depend only on `seed`; torch's global generator keeps its state. Errors are those of `build`.
    """
    with seeded(key(config["seed"], "network")):
        network = build(config["network"], trust)
    sde, parameterization = build(config["sde"], trust), build(config["parameterization"], trust)
    kinds = {Conservative: EnergyScore, Encoder: NoisyClassifier}
    kind = next((kind for of, kind in kinds.items() if isinstance(network, of)), LearnedScore)
    return kind(network, sde, parameterization, config["event_shape"])


def build(node: Any, trust: Sequence[str] = ()) -> Any:
    """The configuration with each mapping that has a `_target_` replaced by what it builds, innermost first.

    One with `_partial_: true` becomes a `functools.partial`. Other mappings become dicts, sequences lists.

    Raises:
        ValueError: a `_target_` is not in ROOMS, in torch.nn or in the modules of `trust`.
        ImportError: there is nothing of that name.
        TypeError: the keys beside it are not its arguments.
    """
    if isinstance(node, Mapping):
        if "_target_" not in node:
            return {name: build(child, trust) for name, child in node.items()}
        make, partial = trusted(node["_target_"], trust), bool(node.get("_partial_"))
        given = {name: build(child, trust) for name, child in node.items() if name not in ("_target_", "_partial_")}
        _check_arguments(node["_target_"], make, given, partial)
        return functools.partial(make, **given) if partial else make(**given)
    if isinstance(node, Sequence) and not isinstance(node, str):
        return [build(child, trust) for child in node]
    return node


def _check_arguments(target: str, make: Callable[..., Any], given: Mapping[str, Any], partial: bool) -> None:
    """Refuses, with TypeError, unknown or missing arguments, and null for a plain number or string."""
    signature = inspect.signature(make)
    for name in [name for name, value in given.items() if value is None and name in signature.parameters]:
        kind, default = signature.parameters[name].annotation, signature.parameters[name].default
        if default is not None and kind in (int, float, bool, str, "int", "float", "bool", "str"):
            raise TypeError(f"{target}: {name}=null is not a {getattr(kind, '__name__', kind)}: give a value")
    try:
        (signature.bind_partial if partial else signature.bind)(**given)
    except TypeError as error:
        known = [*signature.parameters]
        wrong = [name for name in given if name not in known]
        if not wrong:
            raise TypeError(f"{target}: {error}; the keys beside a _target_ are its arguments") from None
        hint = did_you_mean(nearest(wrong[0], known), after=" ")
        dropped, known = " ".join(f"'~<...>.{name}'" for name in wrong), known or ["none"]
        raise TypeError(f"{target}: unknown argument {', '.join(map(repr, wrong))}: {hint}known: {', '.join(known)}; drop "
                        f"what another class took by {dropped}") from None  # fmt: skip


def trusted(target: Any, trust: Sequence[str] = ()) -> Callable[..., Any]:
    """The class or function that a `_target_` names, where a trusted module defines it (importing it is not enough).

    Raises ValueError for anything else, ImportError where there is nothing of that name.
    """
    trust = (trust,) if isinstance(trust, str) else trust
    if isinstance(target, str) and _within(target, ("score_sde", "torch.nn", *trust)):
        found = _located(target)
        home = getattr(found, "__module__", None) or ""
        # A class, a function or a class method; never an instance method, whose `self` the file would choose.
        builds = inspect.isclass(found) or inspect.ismethod(found) or "." not in getattr(found, "__qualname__", ".")
        if builds and _within(home, (*ROOMS, *trust)):
            return found
        if inspect.isclass(found) and issubclass(found, nn.Module) and _within(home, ("torch.nn",)):
            return found
    raise ValueError(
        f"_target_ {target!r} is refused: a run may only name models and data of score_sde, and torch.nn; "
        f"if the code is yours, trust its module: trust=[{str(target).split('.')[0]!r}]"
    )


def _located(target: str) -> Any:
    """The object of a dotted name: attributes of the longest prefix that is a module."""
    names, known = target.split("."), None
    for count in range(len(names), 0, -1):
        module = ".".join(names[:count])
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            # The rest of the name is attributes, unless what is missing is a package that the module itself imports.
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
    hint = did_you_mean(nearest(names[-1], dir(known)), before=": ")
    raise ImportError(f"_target_ {target!r}: {known.__name__} has nothing of that name{hint}")


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)

"""What there is to test, found by walking subclasses: a new SDE, parameterization or step is picked up without a list.

A test that takes `sde`, `parameterization`, `predictor`, `corrector` or `linear` runs once for each of them.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import score_sde.steps
from score_sde.parameterization import Parameterization
from score_sde.sde import SDE
from score_sde.steps import LinearStep, Step

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # and for processes that tests start: sums of two threads have other bits


few_steps = pytest.mark.filterwarnings("ignore:.*the sampler diverged")
"""Of tests that run any sampler on any model in a few steps, in which samples may well run off."""


@pytest.fixture(autouse=True, scope="session")
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Decoded data and reference statistics go to a folder of the session's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCORE_SDE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


for _module in pkgutil.iter_modules(score_sde.steps.__path__, "score_sde.steps."):
    importlib.import_module(_module.name)

# Settings worth a test of their own, beside the default ones and a class's own `presets`.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "ExponentialAdams": [{"order": 2, "eta": 0.7}],
    "LangevinCorrector": [{"snr": 0.3, "steps": 2}],
    "LearnedVariance": [],  # of networks that learn one
    "Tabulated": [],  # a table of another step on one grid: that step is tested, and the copy in test_tabulated
}


def concrete(base: type) -> list[type]:
    """The package's public concrete classes below `base`, and `base` itself if it is one."""
    found = [base, *(c for child in base.__subclasses__() for c in concrete(child))]
    return [
        c
        for c in dict.fromkeys(found)
        if c.__module__.startswith("score_sde.") and not inspect.isabstract(c) and not c.__name__.startswith("_")
    ]


def _needs_arguments(function: Any) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def instances(base: type) -> dict[str, Any]:
    """Objects of every class, by name: default settings, presets, variants and class methods that need no argument."""
    found: dict[str, Any] = {}

    def add(name: str, instance: Any) -> None:
        if not any(type(other) is type(instance) and vars(other) == vars(instance) != {} for other in found.values()):
            found[name] = instance

    for cls in concrete(base):
        name, known = cls.__name__, len(found)
        if not _needs_arguments(cls):
            add(name, cls())
        for label, options in getattr(cls, "presets", {}).items():
            add(f"{name}[{label}]", cls(**options))
        for options in VARIANTS.get(name, []):
            add(f"{name}[{','.join(f'{k}={v}' for k, v in options.items())}]", cls(**options))
        if issubclass(cls, SDE):
            for maker in [m for m in vars(cls) if isinstance(vars(cls)[m], classmethod)]:
                if not _needs_arguments(getattr(cls, maker)):
                    found[f"{name}.{maker}"] = getattr(cls, maker)()
        if len(found) == known and name not in VARIANTS:
            raise ValueError(f"{name} cannot be built without arguments: give it presets, or VARIANTS in conftest.py")
    return found


SDES: dict[str, SDE] = instances(SDE)
PARAMETERIZATIONS: dict[str, Parameterization] = instances(Parameterization)
STEPS: dict[str, Step] = instances(Step)
PREDICTORS = {name: step for name, step in STEPS.items() if step.role == "predictor"}
CORRECTORS = {name: step for name, step in STEPS.items() if step.role == "corrector"}
LINEAR = {  # all but the correctors whose step size is measured on the way
    name: step
    for name, step in STEPS.items()
    if isinstance(step, LinearStep)
    and getattr(step, "norm", "expected") == "expected"
    and not getattr(step, "adapt", False)
}


@pytest.fixture(params=list(SDES.values()), ids=list(SDES))
def sde(request: pytest.FixtureRequest) -> SDE:
    return request.param


@pytest.fixture(params=list(PARAMETERIZATIONS.values()), ids=list(PARAMETERIZATIONS))
def parameterization(request: pytest.FixtureRequest) -> Parameterization:
    return request.param


@pytest.fixture(params=list(PREDICTORS.values()), ids=list(PREDICTORS))
def predictor(request: pytest.FixtureRequest) -> Step:
    return request.param


@pytest.fixture(params=list(CORRECTORS.values()), ids=list(CORRECTORS))
def corrector(request: pytest.FixtureRequest) -> Step:
    return request.param


@pytest.fixture(params=list(LINEAR.values()), ids=list(LINEAR))
def linear(request: pytest.FixtureRequest) -> LinearStep:
    return request.param

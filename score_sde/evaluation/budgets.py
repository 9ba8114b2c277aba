"""Budgets: how many steps a sampler may take within a number of network calls per sample, counted without the network."""

from __future__ import annotations

import bisect
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from score_sde.grid import Grid
from score_sde.prediction import Prediction
from score_sde.sampler import Sampler
from score_sde.score import ScoreModel, WrappedScore
from score_sde.sde import Time, as_time
from score_sde.solver import SampleResult

__all__ = ["UNBUDGETED", "Contestant", "SamplerLike", "at_budget", "contest", "has_steps", "planned_calls", "reason"]

UNBUDGETED = 0
"""The budget noted for a sampler without a number of steps: its own tolerance or table determines its calls."""


class SamplerLike(Protocol):
    """What can be compared: `Sampler`, `ProbabilityFlowODE`, or anything with their `sample`."""

    def sample(self, model: ScoreModel, shape: Sequence[int], *, seed: int) -> SampleResult: ...


Contestant = SamplerLike | Mapping[int, SamplerLike] | Callable[[int], SamplerLike]
"""A sampler, a sampler for each number of calls, or a function from a budget to a sampler."""


def at_budget(sampler: Sampler, model: ScoreModel, calls: int, condition: Mapping[str, Any] | None = None) -> Sampler:
    """The sampler with as many grid steps as fit into `calls` network calls per sample, including the final denoising.

    Two-stage steps, correctors, churned grids and guidance with several calls are counted at their cost. To find that of
    guidance, the model is called once, on one sample, under the `condition`.

    Raises:
        ValueError: the grid has no `steps` (as in `partial(grid.karras, steps=18)`), or one step costs more.
    """
    if not has_steps(sampler):
        raise ValueError(f"{type(sampler).__name__}'s grid has no steps to set: bind them by name, as in "
                         "partial(grid.karras, steps=18)")  # fmt: skip
    start = model.start(torch.zeros(1, *model.event_shape, device=model.device))
    spent = model(start, model.sde.t_max, **(condition or {})).calls
    correction = spent / model.calls_at(model.sde.t_max)  # 1 where `calls_at` is right

    def cost(steps: int) -> float:
        try:
            return correction * planned_calls(_with_steps(sampler, steps), model)
        except ValueError:
            if steps == 1:
                raise
            return math.inf  # more steps than a ladder has levels

    if cost(1) > calls:
        raise ValueError(f"needs at least {cost(1):g} network calls, the budget is {calls}")
    low, high = 1, 2
    while cost(high) <= calls:
        low, high = high, 2 * high
        if high > 64 * (calls + 1):
            raise ValueError(f"cannot spend {calls} network calls, whatever its number of steps")
    return _with_steps(sampler, bisect.bisect_right(range(high), float(calls), lo=low, key=cost) - 1)


def planned_calls(sampler: Sampler, model: ScoreModel) -> int:
    """Network calls per sample of one run, counted in a run without the network."""
    plain = copy.copy(sampler)
    plain.cuda_graph = False
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*the sampler diverged")  # as it may with D = 0
        return plain.sample(_WithoutNetwork(model), (1, *model.event_shape), seed=0).nfe


class _WithoutNetwork(WrappedScore):
    """Predicts D = 0 and reports the number of network calls that the model would have made."""

    def check(self, shape: Sequence[int], condition: Mapping[str, Any]) -> None: ...

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        alpha, sigma = (float(part(as_time(t))) for part in (self.sde.alpha, self.sde.sigma))
        nothing = torch.zeros_like(x)
        return Prediction(x, nothing, alpha, sigma, calls=self.model.calls_at(float(t)), variance_weight=nothing)

    def log_prob(self, x: Tensor, t: Time, **condition: Any) -> Tensor:
        return x.new_zeros(len(x))


def has_steps(sampler: Any) -> bool:
    """Whether this is a `Sampler` whose grid, or the grid that it is built on, binds `steps` by name."""
    return isinstance(sampler, Sampler) and _bound(sampler.grid) is not None


def _bound(grid: Any) -> dict[str, Any] | None:
    """The keywords of a partial grid that hold `steps`, its own or those of its base."""
    keywords = grid.keywords if isinstance(grid, partial) else {}
    return keywords if "steps" in keywords else _bound(keywords["base"]) if "base" in keywords else None


def _with_steps(sampler: Sampler, steps: int) -> Sampler:
    other = copy.copy(sampler)
    other.grid = _regridded(sampler.grid, steps)
    return other


def _regridded(grid: Any, steps: int) -> Grid:
    new = {"steps": steps} if "steps" in grid.keywords else {"base": _regridded(grid.keywords["base"], steps)}
    return partial(grid.func, *grid.args, **{**grid.keywords, **new})


def contest(
    contestant: Any, model: ScoreModel, budgets: Sequence[int], condition: Mapping[str, Any]
) -> Iterator[tuple[int, Any]]:
    """Yields (budget, sampler) for each budget, or (budget, status) if there is no sampler; see `reason`."""
    budgeted = isinstance(contestant, Mapping) or callable(contestant) or has_steps(contestant)
    for budget in map(int, budgets) if budgeted else (UNBUDGETED,):
        try:
            solver = _of_budget(contestant, model, budget, condition) if budgeted else contestant
            getattr(solver, "check", lambda sde: None)(model.sde)
        except Exception as error:
            solver = reason(error)
        yield budget, solver


def _of_budget(contestant: Any, model: ScoreModel, budget: int, condition: Mapping[str, Any]) -> SamplerLike:
    if isinstance(contestant, Mapping):
        within = [calls for calls in contestant if calls <= budget]
        if not within:
            raise ValueError(
                f"there are tables of {', '.join(map(str, sorted(contestant)))} calls, none within {budget}"
            )
        return contestant[max(within)]
    return at_budget(contestant, model, budget, condition) if isinstance(contestant, Sampler) else contestant(budget)


def reason(error: Exception) -> str:
    """The error as a status of one line: "refused: ..." for ValueError and TypeError, else "failed: ..."."""
    line = " ".join(str(error).split()) or type(error).__name__
    return (
        f"refused: {line}" if isinstance(error, (ValueError, TypeError)) else f"failed: {type(error).__name__}: {line}"
    )

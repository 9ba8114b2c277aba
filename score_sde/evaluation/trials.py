r"""Runs of a step without a `Sampler`, in float64, on models for which the answer is known.

A step is a black box here: only its `plan` and `advance` are used.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from score_sde.prediction import Prediction
from score_sde.sde import SDE
from score_sde.steps import Step

Draws = Callable[[int, int], Tensor]
"""(move, k) -> the k-th draw of a move."""

Denoiser = Callable[[Tensor, float, float, float], Tensor]
"""(x, t, alpha, sigma) -> D."""


class Evaluator:
    """A denoiser as the `evaluate` of `Step.advance`, with its calls counted."""

    def __init__(self, sde: SDE, denoiser: Denoiser) -> None:
        self.sde, self.denoiser, self.calls = sde, denoiser, 0

    def __call__(self, x: Tensor, t: float) -> Prediction:
        self.calls += 1
        alpha, sigma = kernel(self.sde, t)
        return Prediction(x, self.denoiser(x, t, alpha, sigma), alpha, sigma)


@functools.lru_cache(maxsize=16384)
def kernel(sde: SDE, t: float) -> tuple[float, float]:
    """(alpha, sigma) at t, once for all the steps that are tried on a grid."""
    return sde.alpha(t).item(), sde.sigma(t).item()


def travel(
    step: Step, sde: SDE, times: Tensor, x: Tensor, evaluate: Any, draws: Draws, exact: Tensor | None = None
) -> Iterator[Tensor]:
    """The states of a predictor over a grid, or of a corrector at the times of a grid.

    The first len(exact) moves begin at the states `exact` instead of where the move before ended.
    """
    rows = step.plan(sde, times[:-1], times[1:] if step.role == "predictor" else times[:-1])
    history: tuple[Tensor, ...] = ()
    for i, row in enumerate(rows):
        x = exact[i] if exact is not None and i < len(exact) else x
        x, history = step.advance(row, x, history, evaluate, partial(draws, i))
        yield x


def end(states: Iterator[Tensor]) -> Tensor:
    *_, x = states
    return x


@functools.lru_cache(maxsize=32)
def uneven(sde: SDE, steps: int) -> Tensor:
    """A smooth grid whose steps are equal in none of t, lambda and sigma / alpha, over noise levels 5 to 0.35."""
    first, last = sde.half_log_snr_range
    low, high = (min(max(-math.log(level), first), last) for level in (5.0, 0.35))
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return sde.time_at(low + (high - low) * (u + 0.3 * u * (1 - u)))

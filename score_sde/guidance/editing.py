"""Editing without a likelihood: starts at intermediate times, and latent codes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from score_sde.checks import real
from score_sde.grid import below
from score_sde.guidance.base import check_alike
from score_sde.keyed import generator
from score_sde.likelihood import slerp
from score_sde.sampler import Sampler
from score_sde.score import ScoreModel, reparameterize
from score_sde.solver import SampleResult


def sdedit(
    sampler: Sampler, model: ScoreModel, x: Tensor, time: float, *, seed: int,
    condition: Mapping[str, Any] | None = None,
) -> SampleResult:  # fmt: skip
    """Adds noise to x up to `time` and samples from there: the more noise, the less of x is kept.

    Source: Meng et al. 2022, https://arxiv.org/abs/2108.01073, algorithm 1.

    Args:
        sampler: uses the part of its grid below `time`; a solver that chooses its own steps starts at `time`.
        model: of the law that x is brought to.
        x: guides, shape (batch, *event_shape).
        time: where to start, in (t_min, t_max].
        seed: of the noise.
        condition: for the model.

    Raises:
        ValueError: `time` is not above the grid's end, within (t_min, t_max].
    """
    noise = torch.randn(real("x", x).shape, generator=generator(seed, "sdedit"), dtype=x.dtype).to(x.device)
    start = model.sde.perturb(x, time, noise)
    later = copy.copy(sampler)
    if hasattr(sampler, "grid"):
        later.grid = lambda sde: below(sde, sampler.grid, time)
    else:
        model = _until(model, time)
    return later.sample(model, x.shape, seed=seed, x_init=start, condition=condition)


def _until(model: ScoreModel, time: float) -> ScoreModel:
    """The model on the part of its path from t_min to `time`."""
    short = copy.copy(model.sde)
    if not short.t_min < time <= short.t_max:
        raise ValueError(f"a start at time={time:g} must lie in ({short.t_min:g}, {short.t_max:g}]")
    short.t_max = float(time)
    return reparameterize(model, short)


class Encoder(Protocol):
    """An ODE that runs both ways: `ProbabilityFlowODE`, `AdaptiveODE`."""

    def encode(self, model: ScoreModel, x: Tensor, *, condition: Mapping[str, Any] | None = None) -> SampleResult: ...

    def sample(
        self, model: ScoreModel, shape: Sequence[int], *, x_init: Tensor | None = None,
        condition: Mapping[str, Any] | None = None,
    ) -> SampleResult: ...  # fmt: skip


def translate(
    ode: Encoder, source: ScoreModel, target: ScoreModel, x: Tensor, *,
    source_condition: Mapping[str, Any] | None = None, target_condition: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Image to image through the latent code: x (batch, *event_shape) is encoded by the source model's ODE and decoded by the
    target model's.

    The two may be one model under two conditions; two models must share their process. Source: Su et al. 2023 (DDIB),
    https://arxiv.org/abs/2203.08382, algorithm 1.

    Raises:
        ValueError: the models differ in event shape or process; `reparameterize` brings one to the other's process.
    """
    check_alike("translate", source, target)
    code = ode.encode(source, x, condition=source_condition).x
    return ode.sample(target, x.shape, x_init=code, condition=target_condition).x


def interpolate(
    ode: Encoder, model: ScoreModel, x: Tensor, y: Tensor, shares: Sequence[float], *,
    condition: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Spherical interpolation of the latent codes of x and y: shape (len(shares), batch, *event_shape), x at 0 and y at 1.

    Source: Song et al. 2021 (DDIM), https://arxiv.org/abs/2010.02502, appendix D.5.

    Raises ValueError where x and y differ in shape, or there are no shares.
    """
    if x.shape != y.shape or not len(shares):
        raise ValueError(f"interpolate goes from x to y of one shape through one share or more, got {tuple(x.shape)}, "
                         f"{tuple(y.shape)} and shares={shares}")  # fmt: skip
    a, b = (ode.encode(model, v, condition=condition).x for v in (x, y))
    codes = slerp(a, b, shares)
    return torch.stack([ode.sample(model, x.shape, x_init=code, condition=condition).x for code in codes])

r"""Editing without a likelihood: grids that jump back to noise, starts at intermediate times, and latent codes.

A grid that goes up, t -> s with s noisier, is carried out by the sampler as a draw of the exact forward transition.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from score_sde.checks import whole
from score_sde.data import generator
from score_sde.grid import Grid
from score_sde.guidance.base import check_alike
from score_sde.likelihood import slerp
from score_sde.sampler import Sampler, SampleResult
from score_sde.score import ScoreModel, reparameterize
from score_sde.sde import SDE


def jump_back(sde: SDE, base: Grid, length: int = 10, repeats: int = 10, low: float = 0.0) -> Tensor:
    """RePaint's resampling: after every `length` steps of the base grid, `repeats` - 1 times back up and down again.

    A grid of N steps becomes one of `repeats` N steps down, with a jump up before each repeat; a jump costs no call.
    Source: Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865, section 4.2 and appendix.

    Args:
        sde: the forward process.
        base: the grid to repeat, e.g. `functools.partial(grid.uniform, steps=250)`.
        length: steps of one jump, 1 or more.
        repeats: how often each stretch is gone through, 1 (no jump) or more.
        low: the noise level sigma / alpha below which no stretch is repeated. With `Impute` of noisy observations,
            noise_std / operator.least_singular_value(): below it nothing knows of y, and each repeat forgets more of it.

    Raises:
        ValueError: length or repeats is below 1.
    """
    length, repeats = whole("length", length), whole("repeats", repeats)
    times = base(sde)
    level, parts = sde.sigma(times) / sde.alpha(times), [times[:1]]
    for first in range(1, len(times), length):
        stretch = times[first : first + length]
        parts.append(stretch)
        if level[first : first + length][-1] >= low:
            parts += [times[first - 1 : first], stretch] * (repeats - 1)
    return torch.cat(parts)


def below(sde: SDE, base: Grid, time: float) -> Tensor:
    """The base grid from `time` down: `time` itself and what follows the base's last descent through it.

    Raises:
        ValueError: the time does not lie above the grid's end, within (t_min, t_max].
    """
    times = base(sde)
    if not times[-1].item() < time <= sde.t_max:
        raise ValueError(f"a start at time={time:g} must lie in ({times[-1].item():g}, {sde.t_max:g}]")
    first = int((times >= time).nonzero()[-1]) + 1 if (times >= time).any() else 0
    return torch.cat([times.new_tensor([time]), times[first:]])


def sdedit(
    sampler: Sampler, model: ScoreModel, x: Tensor, time: float, *, seed: int,
    condition: Mapping[str, Any] | None = None,
) -> SampleResult:  # fmt: skip
    """Noises x up to `time` and samples from there: the more noise, the less of x is kept.

    Source: Meng et al. 2022, https://arxiv.org/abs/2108.01073, algorithm 1.

    Args:
        sampler: its grid is taken below `time`; a solver that chooses its own steps begins there.
        model: of the law that x is brought to.
        x: guides, shape (batch, *event_shape).
        time: where to start, in (t_min, t_max].
        seed: of the noise.
        condition: for the model.
    """
    noise = torch.randn(x.shape, generator=generator(seed, "sdedit"), dtype=x.dtype).to(x.device)
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
    """Image to image through the latent code: x is encoded by the source model's ODE and decoded by the target's.

    Source and target may be one model under two conditions; two models are of one process. Source: Su et al. 2023 (DDIB),
    https://arxiv.org/abs/2203.08382, algorithm 1.

    Raises:
        ValueError: the models differ in event shape or process: `reparameterize` the one on the other's.
    """
    check_alike("translate", source, target)
    code = ode.encode(source, x, condition=source_condition).x
    return ode.sample(target, x.shape, x_init=code, condition=target_condition).x


def interpolate(
    ode: Encoder, model: ScoreModel, x: Tensor, y: Tensor, shares: Sequence[float], *,
    condition: Mapping[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Spherical interpolation of latent codes: shape (len(shares), batch, *event_shape), x at share 0 and y at 1.

    Source: Song et al. 2021 (DDIM), https://arxiv.org/abs/2010.02502, appendix D.5.
    """
    a, b = (ode.encode(model, v, condition=condition).x for v in (x, y))
    codes = slerp(a, b, shares)
    return torch.stack([ode.sample(model, x.shape, x_init=code, condition=condition).x for code in codes])

r"""The probability-flow ODE through scipy's adaptive solvers, forward and backward.

    dx/dt = f(t) x - g(t)^2 score(x, t) / 2

has the marginals p_t of the SDE (Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 13). From t_max to t_min it
turns prior noise into samples, from t_min to t_max data into latent codes.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from score_sde.checks import one_of
from score_sde.embedded import MAX_CALLS, TOO_ROUGH, SolverError
from score_sde.noise import NoiseSource
from score_sde.progress import tqdm
from score_sde.score import ScoreModel
from score_sde.solver import CountedModel, ErrorControlled, PerSample, SampleResult, Start, begin, chosen_times, ending

IMPLICIT = ("Radau", "BDF", "LSODA")
METHODS = ("RK45", "RK23", "DOP853", *IMPLICIT)


class ProbabilityFlowODE(ErrorControlled):
    """The probability-flow ODE by `scipy.integrate.solve_ivp`.

    It is integrated over t. On a `DiscreteSDE` the derivative of lambda jumps at every level, which step-size control does
    not notice: errors are tens of times the tolerance. Take `AdaptiveODE` there, which integrates over the noise level.

    Args:
        method: one of scipy's: RK45, RK23, DOP853, Radau, BDF, LSODA.
        rtol, atol: relative and absolute tolerance of the step-size control, in root mean square over the system solved.
        error_control: "joint" solves the batch as one system and controls its average error; "each" solves sample by
            sample, slower, each with its own error and step size and independent of the rest of the batch.
        final: "denoise" ends with Tweedie's formula at t_min; "none" keeps the solution, the inverse of `encode`.

    Raises:
        ValueError: an option is unknown or a tolerance not positive.
    """

    def __init__(
        self, method: str = "RK45", rtol: float = 1e-5, atol: float = 1e-5, error_control: str = "joint",
        final: str = "none",
    ) -> None:  # fmt: skip
        super().__init__(rtol, atol, final)
        self.method = one_of("method", method, METHODS)
        self.error_control = one_of("error_control", error_control, ("joint", "each"))

    @torch.no_grad()
    def sample(
        self, model: ScoreModel, shape: Sequence[int], *, seed: int | None = None, noise: NoiseSource | None = None,
        x_init: Tensor | None = None, condition: Mapping[str, Any] | None = None, trajectory: bool = False,
        progress: bool = False, dtype: torch.dtype | None = None, points: int = 101,
    ) -> SampleResult:  # fmt: skip
        """Integrates from prior noise (or `x_init`) at t_max to t_min; arguments as in `Sampler.sample`.

        With `trajectory` the solution is also kept at `points` equally spaced times. `nfe` counts calls on the whole batch;
        with error_control="each" it is the largest count of any sample.

        Raises:
            SolverError: the solver failed, with its reason (see `by_scipy`).
        """
        start = begin(model, shape, seed, noise, x_init, condition, dtype)
        return self._integrate(start, start.times, trajectory, points, progress, self.final)

    @torch.no_grad()
    def encode(
        self, model: ScoreModel, x: Tensor, *, condition: Mapping[str, Any] | None = None, trajectory: bool = False,
        progress: bool = False, points: int = 101,
    ) -> SampleResult:  # fmt: skip
        """Integrates data x, taken as x(t_min), to their latent codes x(t_max) (see `AdaptiveODE.encode`)."""
        start = begin(model, x.shape, x_init=x, condition=condition)
        return self._integrate(start, start.times.flip(0), trajectory, points, progress, "none")

    def _integrate(
        self, start: Start, ends: Tensor, trajectory: bool, points: int, progress: bool, final: str
    ) -> SampleResult:
        kept = chosen_times(trajectory, points, None, *ends.tolist())
        x, model, times = start.x, start.model, ends if kept is None else kept
        clock = time.perf_counter()
        if self.error_control == "joint":
            solves = [(model, x)]
        else:
            per_sample = PerSample(model.model, model.condition, len(x))
            solves = [(per_sample.alone(i), part) for i, part in enumerate(x.split(1))]
        bar = tqdm(solves, desc=self.method, unit="solve", disable=not progress, delay=1.0, leave=False)
        path = torch.cat([self._solve(own, part, times) for own, part in bar], dim=1)
        calls = [own.calls for own, _ in solves]
        end, last = ending(final, model, path[-1], times[-1].item())
        seconds = time.perf_counter() - clock
        return SampleResult(end, max(calls) + last, seconds, path if trajectory else None, times)

    def _solve(self, model: CountedModel, x: Tensor, times: Tensor) -> Tensor:
        sde = model.model.sde

        def velocity(t: float, state: Tensor) -> Tensor:
            return sde.drift(t).item() * state - sde.diffusion(t).item() ** 2 / 2 * model(state, t).score

        return by_scipy(velocity, x, times.tolist(), self.method, self.rtol, self.atol)


def by_scipy(
    field: Callable[[float, Tensor], Tensor], x: Tensor, times: Sequence[float], method: str, rtol: float, atol: float
) -> Tensor:
    """The states at the times of dx/dt = field(t, x) with x at the first, (len(times), *x.shape), by `solve_ivp`.

    Raises:
        SolverError: a rate is not finite, scipy gave up, or the rate has been asked for `MAX_CALLS` times, and for an
            implicit method 100 times more for each element: a Jacobian takes one call for each.
    """
    from scipy.integrate import solve_ivp  # half a second to import

    calls, most = itertools.count(), MAX_CALLS + (100 * x.numel() if method in IMPLICIT else 0)

    def flat(t: float, state: np.ndarray) -> np.ndarray:
        if next(calls) == most:
            raise SolverError(f"{method} did not come to its end in {most:,} calls: {TOO_ROUGH}")
        rate = field(t, torch.from_numpy(state).to(x).view_as(x))
        if not rate.isfinite().all():
            raise SolverError(f"{method} met a rate of change that is not finite: the model's outputs are wrong")
        return rate.double().flatten().cpu().numpy()

    initial = x.double().flatten().cpu().numpy()
    solution = solve_ivp(flat, (times[0], times[-1]), initial, method, times, rtol=rtol, atol=atol)
    if not solution.success:
        raise SolverError(f"{method} did not come to its end: {solution.message} Loosen rtol and atol, or take another "
                           "method.")  # fmt: skip
    return torch.from_numpy(np.ascontiguousarray(solution.y.T)).to(x).view(len(times), *x.shape)

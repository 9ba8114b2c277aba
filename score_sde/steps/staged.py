r"""One-step methods of several stages, as tables of scalars.

Stage j builds x_j = a_j x_t + sum_k b_jk N_k + sum_k c_jk z_k and evaluates the network there, at the stage's time; the
last stage is the step's result. The outputs N_0, N_1, ... (D, or the noise eps) are this move's own, the oldest first,
and so are the draws z_k: stages that share an increment of the noise share its draw.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from score_sde.sde import SDE
from score_sde.steps.linear import accumulate, combine
from score_sde.steps.step import Draw, Evaluate, History, Step, finite, tuples


class Stage(NamedTuple):
    """x_j = a x_t + sum_k b[k] N_k + sum_k c[k] z_k, to be evaluated at `time` unless it is the last."""

    time: Tensor
    a: Tensor
    b: Sequence[Tensor]
    c: Sequence[Tensor] = ()


class StageRow(NamedTuple):
    """One move: the time of its first evaluation, and (time, a, b, c) a stage."""

    t: float
    stages: tuple[tuple[float, float, tuple[float, ...], tuple[float, ...]], ...]


class StagedStep(Step):
    """A step given by the scalars of its stages; a subclass defines `stages`.

    Attributes:
        prediction: "denoised" or "noise", the outputs N that the stages weigh.
    """

    prediction: str = "denoised"

    @abstractmethod
    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Sequence[Stage]:
        """The stages of the moves t -> s, elementwise in float64 tensors; the last one is x_s."""

    def plan(self, sde: SDE, t: Tensor, s: Tensor) -> list[StageRow]:
        columns = []
        for stage in self.stages(sde, t, s):
            time, a, *rest = finite(self, sde, t, [stage.time, stage.a, *stage.b, *stage.c])
            cut = len(stage.b)
            columns.append(zip(time, a, tuples(rest[:cut]), tuples(rest[cut:]), strict=False))
        return [StageRow(at, stages) for at, stages in zip(t.tolist(), zip(*columns, strict=True), strict=True)]

    def advance(
        self, row: StageRow, x: Tensor, history: History, evaluate: Evaluate, draw: Draw
    ) -> tuple[Tensor, History]:
        at, time = x, row.t
        outputs: list[Tensor] = []
        draws: list[Tensor] = []
        for next_time, a, b, c in row.stages:
            outputs.append(getattr(evaluate(at, time), self.prediction))
            draws.extend(draw(k) for k in range(len(draws), len(c)))
            at, time = accumulate(combine(x, a, b, outputs), c, draws), next_time
        return at, history


class Heun(StagedStep):
    """Heun's second-order method in EDM's variables: y = x / alpha against the noise level l = sigma / alpha.

    dy/dl = (y - D) / l; an Euler step to l_s, then the mean of both slopes. Eliminating the slopes,
    y_1 = l_s/l_t y + (1 - l_s/l_t) D_0 and y_s = l_s/l_t y + (l_s - l_t)(1/(2 l_s) - 1/l_t) D_0 + (l_t - l_s)/(2 l_s)
    D_1. With `grid.karras` and final="denoise" this is EDM's deterministic sampler, call for call.
    Source: Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1.
    """

    order = 2
    calls = 2

    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Sequence[Stage]:
        alpha_s, scale = sde.alpha(s), sde.sigma(s) / sde.sigma(t)
        drop = -torch.expm1(sde.half_log_snr(t) - sde.half_log_snr(s))  # 1 - l_s / l_t
        growth = torch.expm1(sde.half_log_snr(s) - sde.half_log_snr(t))  # l_t / l_s - 1
        return [
            Stage(s, scale, [alpha_s * drop]),
            Stage(s, scale, [alpha_s * (drop - growth / 2), alpha_s * growth / 2]),
        ]


class RungeKutta(StagedStep):
    """An explicit Runge-Kutta method in EDM's variables, dy/dl = eps = (y - D) / l with y = x / alpha, l = sigma /
    alpha.

    Stage j is y_j = y + (l_s - l_t) sum_k matrix[j][k] eps_k at l_t + (l_s - l_t) sum_k matrix[j][k]; the result weighs
    all slopes by `weights`. The slopes are eliminated: each is a linear form in (y, D_0, ..., D_j), and so are the
    stages.
    Source: Karras et al. 2022, https://arxiv.org/abs/2206.00364, eq. 3 and appendix D.2; Kutta 1901 for the default.

    Args:
        matrix: the tableau, a row for each stage after the first; the classical fourth-order method if left out.
        weights: of the slopes, their sum 1.
        order: what the tableau claims.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "Kutta 3": {"matrix": ((1 / 2,), (-1.0, 2.0)), "weights": (1 / 6, 2 / 3, 1 / 6), "order": 3}
    }

    def __init__(
        self, matrix: Sequence[Sequence[float]] = ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
        weights: Sequence[float] = (1 / 6, 1 / 3, 1 / 3, 1 / 6), order: int = 4,
    ) -> None:  # fmt: skip
        self.matrix, self.weights = tuple(map(tuple, matrix)), tuple(weights)
        self.order, self.calls = int(order), len(self.weights)
        if [len(row) for row in self.matrix] != list(range(1, self.calls)) or abs(sum(self.weights) - 1) > 1e-12:
            raise ValueError("a tableau of n weights with sum 1 has a matrix of n - 1 rows of lengths 1, 2, ..., "
                             f"got {self.calls} weights and rows of {[len(row) for row in self.matrix]}")  # fmt: skip
        if not all(0 < sum(row) <= 1 for row in self.matrix):
            raise ValueError("a stage lies inside the step: each row of the matrix has a sum in (0, 1]")

    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Sequence[Stage]:
        start, end = sde.noise_level(t), sde.noise_level(s)
        unit = torch.eye(len(self.weights) + 1, dtype=t.dtype)[(...,) + (None,) * t.ndim].expand(-1, -1, *t.shape)
        slopes: list[Tensor] = []
        stages, at, level = [], unit[0], start
        for j, weights in enumerate((*self.matrix, self.weights), start=1):
            slopes.append((at - unit[j]) / level)
            node = 1.0 if j == len(self.weights) else sum(weights)
            at = unit[0] + (end - start) * sum(w * slope for w, slope in zip(weights, slopes, strict=True))
            level = start + node * (end - start)
            time = s if node == 1.0 else sde.time_at_noise_level(level)
            alpha = sde.alpha(time)
            stages.append(Stage(time, alpha / sde.alpha(t) * at[0], list(alpha * at[1 : j + 1])))
        return stages


class RungeKutta2(RungeKutta):
    """The alpha family of second-order methods: one trial at the fraction alpha of the step.

    y_1 = y + alpha h eps_0,  y_s = y + h ((1 - 1/(2 alpha)) eps_0 + 1/(2 alpha) eps_1), h = l_s - l_t. alpha = 1 is
    Heun, 1/2 the midpoint rule, 2/3 Ralston's. Source: Karras et al. 2022, appendix D.2, algorithm 3.

    Args:
        alpha: where the trial lies, in (0, 1].
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "Ralston": {"alpha": 2 / 3},
        "Heun in RK form": {"alpha": 1.0},
    }

    def __init__(self, alpha: float = 0.5) -> None:
        if not 0 < alpha <= 1:
            raise ValueError(f"RungeKutta2's alpha lies in (0, 1], got alpha={alpha}")
        self.alpha = float(alpha)
        super().__init__(((self.alpha,),), (1 - 1 / (2 * self.alpha), 1 / (2 * self.alpha)), order=2)


class DPMSolverSinglestep(StagedStep):
    """DPM-Solver(++) 2S and 3S: exponential Runge-Kutta in lambda with intermediate evaluations at lambda_t + r h.

    With h = lambda_s - lambda_t and (scale, other, k) = (sigma, alpha, -h) for D or (alpha, sigma, h) for eps, a stage
    at the fraction r is u = scale_u / scale_t x - other_u expm1(r k) N_0 (one further term at order 3), and

        2S (r = 1/2):        x_s = scale_s/scale_t x - other_s expm1(k) ((1 - 1/(2 r)) N_0 + 1/(2 r) N_1),
        3S (r = 1/3, 2/3):   x_s = scale_s/scale_t x - other_s (expm1(k) N_0 + (expm1(k)/k - 1) / r_2 (N_2 - N_0)).

    Source: Lu et al. 2022, https://arxiv.org/abs/2206.00927, algorithms 1, 2 (noise), https://arxiv.org/abs/2211.01095,
    algorithm 1 (denoised); the third-order form for D follows by the same exchange of symbols.

    Args:
        order: 2 or 3, also the calls a move.
        prediction: "denoised" (++) or "noise".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"DPM-Solver{mark} {order}S": {"order": order, "prediction": prediction}
        for mark, prediction in (("++", "denoised"), ("", "noise")) for order in (2, 3)
    }  # fmt: skip

    def __init__(self, order: int = 2, prediction: str = "denoised") -> None:
        if order not in (2, 3):
            raise ValueError(f"DPMSolverSinglestep has orders 2 and 3, got order={order}; order 1 is DDIM")
        if prediction not in ("denoised", "noise"):
            raise ValueError(f"DPMSolverSinglestep's prediction is 'denoised' or 'noise', got {prediction!r}")
        self.order = self.calls = int(order)
        self.prediction = prediction

    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Sequence[Stage]:
        start, h = sde.half_log_snr(t), sde.half_log_snr(s) - sde.half_log_snr(t)
        scale, other, k = (sde.sigma, sde.alpha, -h) if self.prediction == "denoised" else (sde.alpha, sde.sigma, h)

        def stage(time: Tensor, r: float, of_difference: Tensor | float = 0.0, outputs: int = 1) -> Stage:
            b = [torch.zeros_like(h) for _ in range(outputs)]
            b[0] = -other(time) * (torch.expm1(r * k) - of_difference)
            b[-1] = b[-1] - other(time) * of_difference if outputs > 1 else b[0]
            return Stage(time, scale(time) / scale(t), b)

        def phi(r: float) -> Tensor:  # (e^{r k} - 1) / (r k) - 1
            return torch.expm1(r * k) / (r * k) - 1

        if self.order == 2:
            return [stage(sde.time_at(start + h / 2), 0.5), stage(s, 1.0, torch.expm1(k), 2)]
        first, second = sde.time_at(start + h / 3), sde.time_at(start + 2 * h / 3)
        return [stage(first, 1 / 3), stage(second, 2 / 3, 2 * phi(2 / 3), 2), stage(s, 1.0, 1.5 * phi(1.0), 3)]


class DPMSolverSDE(StagedStep):
    """The stochastic two-stage DPM-Solver++: a trial at lambda_t + r h, then the whole step, on one noise path.

    With k = 1 + eta^2 and the exact solution for constant D of `ExponentialAdams`, u = x(lambda_t + r h) and
    x_s = sigma_s/sigma_t e^{-eta^2 h} x + alpha_s (1 - e^{-k h}) ((1 - 1/(2 r)) D_0 + 1/(2 r) D(u)) + noise. The noise
    of the trial is the first part of the step's: the increments over [t, u] and [u, s] are disjoint draws, added after
    the first has decayed. Of weak order 2, since the trial's noise has the mean covariance of the path's.
    Source: Lu et al. 2022, https://arxiv.org/abs/2211.01095, eq. 12, as two-stage method of k-diffusion's
    `sample_dpmpp_sde` (whose eta is eta^2 here and whose two noises overlap).

    Args:
        eta: noise strength, 0 (DPM-Solver++ 2S at r = 1/2) or more; 1 is the reverse SDE.
        r: where the trial lies, in (0, 1).
    """

    order = 2
    calls = 2
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"DPM-Solver++ SDE": {"eta": 1.0}}

    def __init__(self, eta: float = 1.0, r: float = 0.5) -> None:
        if not 0 <= eta < float("inf"):
            raise ValueError(f"DPMSolverSDE needs a noise strength eta >= 0, got eta={eta}")
        if not 0 < r < 1:
            raise ValueError(f"DPMSolverSDE's r lies in (0, 1), got r={r}")
        self.eta, self.r = float(eta), float(r)
        self.shares = (self.r, 1 - self.r)

    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Sequence[Stage]:
        start, h = sde.half_log_snr(t), sde.half_log_snr(s) - sde.half_log_snr(t)
        time, decay, k = sde.time_at(start + self.r * h), self.eta**2, 1 + self.eta**2

        def noise(share: float) -> Tensor:  # of the increment over that share of the step, in units of its end's sigma
            return (-torch.expm1(-2 * decay * share * h)).sqrt()

        def a(u: Tensor, share: float) -> Tensor:
            return sde.sigma(u) / sde.sigma(t) * (-decay * share * h).exp()

        total, later = -sde.alpha(s) * torch.expm1(-k * h), 1 / (2 * self.r)
        trial = Stage(time, a(time, self.r), [-sde.alpha(time) * torch.expm1(-k * self.r * h)],
                      [sde.sigma(time) * noise(self.r)])  # fmt: skip
        first = sde.sigma(s) * (-decay * (1 - self.r) * h).exp() * noise(self.r)
        second = sde.sigma(s) * noise(1 - self.r)
        return [trial, Stage(s, a(s, 1.0), [total * (1 - later), total * later], [first, second])]

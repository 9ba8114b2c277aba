r"""One-step methods of several stages, as tables of scalars.

Stage j builds x_j = a_j x_t + sum_k b_jk N_k + sum_k c_jk z_k and evaluates the network there, at the stage's time; the
last stage is the step's result. The outputs N_0, N_1, ... (D or the noise eps) and the draws z_0, z_1, ... are this move's
own, the oldest first. Stages that share an increment of the noise share its draw.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from score_sde.checks import number, one_of
from score_sde.sde import SDE
from score_sde.steps.linear import accumulate, combine
from score_sde.steps.multistep import carried, check_order, check_strength, check_weights
from score_sde.steps.step import Draw, Evaluate, History, Step, finite, of_times, tuples


class Stage(NamedTuple):
    """x_j = a x_t + sum_k b[k] N_k + sum_k c[k] z_k, to be evaluated at `time` unless it is the last."""

    time: Tensor
    a: Tensor
    b: Sequence[Tensor]
    c: Sequence[Tensor] = ()


class StageRow(NamedTuple):
    """One move: the time of its first evaluation, and (time, a, b, c) for each stage."""

    t: float
    stages: tuple[tuple[float, float, tuple[float, ...], tuple[float, ...]], ...]


class StagedStep(Step):
    """A step given by the scalars of its stages; a subclass defines `stages`.

    Attributes:
        prediction: "denoised" or "noise", the outputs N that the stages weigh.
    """

    takes_x = True
    prediction: str = "denoised"

    @abstractmethod
    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Sequence[Stage]:
        """The stages of the moves t[i] -> s[i], elementwise in float64 tensors of shape (moves,); the last one is x_s."""

    def plan(self, sde: SDE, t: Tensor, s: Tensor) -> list[StageRow]:
        columns = []
        for stage in of_times(self.stages, sde, t, s):
            time, a, *rest = finite(self, sde, t, [stage.time, stage.a, *stage.b, *stage.c])
            cut = len(stage.b)
            columns.append(zip(time, a, tuples(rest[:cut]), tuples(rest[cut:]), strict=False))
        return list(map(StageRow, t.tolist(), zip(*columns, strict=True)))

    def advance(
        self, row: StageRow, x: Tensor, history: History, evaluate: Evaluate, draw: Draw
    ) -> tuple[Tensor, History]:
        at, time, weighed = x, row.t, (1.0, 0.0) if self.prediction == "denoised" else (0.0, 1.0)
        outputs: list[Tensor] = []
        draws: list[Tensor] = []
        for next_time, a, b, c in row.stages:
            prediction = evaluate(at, time)
            x = x if outputs else prediction.x
            outputs.append(prediction.mix(*weighed))
            draws.extend(draw(k) for k in range(len(draws), len(c)))
            at, time = accumulate(combine(x, a, b, outputs), c, draws), next_time
        return at, history


class Heun(StagedStep):
    """Heun's second-order method in EDM's variables: y = x / alpha against the noise level l = sigma / alpha.

    dy/dl = (y - D) / l: an Euler step to l_s, then the mean of both slopes. Eliminating the slopes gives

        y_1 = l_s / l_t y + (1 - l_s / l_t) D_0,
        y_s = l_s / l_t y + (l_s - l_t) (1 / (2 l_s) - 1 / l_t) D_0 + (l_t - l_s) / (2 l_s) D_1.

    With `grid.karras` and final="denoise" this is EDM's deterministic sampler, call for call.
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
    """An explicit Runge-Kutta method in EDM's variables: dy/dl = eps = (y - D) / l, y = x / alpha, l = sigma / alpha.

    Stage j is y_j = y + (l_s - l_t) sum_k matrix[j][k] eps_k at l_t + (l_s - l_t) sum_k matrix[j][k]; the result weighs
    all slopes by `weights`. Slopes are linear forms in (y, D_0, ..., D_j), and so the stages are too.
    Source: Karras et al. 2022, https://arxiv.org/abs/2206.00364, eq. 3 and appendix D.2; Kutta 1901 for the default.

    Args:
        matrix: the tableau, a row for each stage after the first; by default the classical fourth-order method's.
        weights: of the slopes, with sum 1.
        order: the order of the tableau.

    Raises:
        ValueError: matrix and weights are not a tableau, or a stage lies outside the step.
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
    """The family of second-order methods with one trial at the fraction alpha of the step.

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
        if not 0 < number("alpha", alpha) <= 1:
            raise ValueError(f"RungeKutta2's alpha lies in (0, 1], got alpha={alpha}")
        self.alpha = float(alpha)
        super().__init__(((self.alpha,),), (1 - 1 / (2 * self.alpha), 1 / (2 * self.alpha)), order=2)


class DPMSolverSDE(StagedStep):
    """Exponential Runge-Kutta in lambda for the SDE family with noise strength eta: every single-step DPM-Solver.

    Trials lie at lambda_t + r h and, at order 3, at lambda_t + 2 h / 3; the last stage at lambda_s = lambda_t + h. With
    k = 1 + eta^2 and (other, g, K) = (alpha, 1, -k h) for D or (sigma, k, h) for eps, the stage at lambda_t + v h, after
    one at lambda_t + w h whose output is N_w, is

        x_v = a_v x - g other_v (expm1(v K) N_0 + p (N_w - N_0)) + noise,

    where a_v is that of `ExponentialAdams` and p = v / w (expm1(v K) / (v K) - 1), the Taylor form ("exact" weights), or at
    order 2 expm1(K) / (2 r) ("midpoint", the published default of 2S). The noise of all stages is one path: each has the
    noise of the stage before, decayed, plus a fresh draw for the increment between the two. With eta > 0 the weak order is
    2 at both orders, since a trial's noise has the path's mean covariance. At eta = 0: DPM-Solver(++) 2S and 3S, RES with
    exact weights, exponential Heun at r = 1. At eta = 1: SEEDS-2 and -3 (noise), k-diffusion's `dpmpp_sde` and ComfyUI's
    `seeds_2` and `seeds_3` (denoised); the eta of the last two is eta^2 here, that of `dpmpp_sde` agrees only at 0 and 1.
    The noise form is exact for a point mass only at eta = 0.
    Source: Lu et al. 2022, https://arxiv.org/abs/2206.00927, algorithms 1, 2 and appendix B,
    https://arxiv.org/abs/2211.01095, algorithm 1 and eq. 12; Gonzalez et al. 2023 (SEEDS),
    https://arxiv.org/abs/2305.14267; Zhang et al. 2023 (RES), https://arxiv.org/abs/2308.02157.

    Args:
        eta: noise strength, 0 (the ODE) or more; 1 is the reverse SDE.
        r: place of the first trial: in (0, 1] at order 2 (default 1/2), in (0, 2/3) at order 3 (default 1/3).
        order: 1 (which is `ExponentialAdams(1)`) to 3; also the number of calls per move.
        prediction: "denoised" (++) or "noise".
        weights: "exact", or at order 2 "midpoint", its default.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "DPM-Solver++ SDE": {"eta": 1.0},
        "DPM-Solver++ SDE 3S": {"order": 3},
        "SEEDS 2": {"prediction": "noise"},
        "SEEDS 3": {"order": 3, "prediction": "noise"},
        "exponential Heun": {"eta": 0.0, "r": 1.0, "weights": "exact"},
        "exponential Heun SDE": {"r": 1.0, "weights": "exact"},
    }

    def __init__(
        self, eta: float = 1.0, r: float | None = None, order: int = 2, prediction: str = "denoised",
        weights: str | None = None,
    ) -> None:  # fmt: skip
        name = type(self).__name__
        order = check_order(self, order, 3)
        self.eta, self.r = check_strength(self, eta), 1 / order if r is None else number("r", r)
        if not 0 < self.r <= 1 or (order == 3 and self.r >= 2 / 3):
            raise ValueError(f"{name}'s r lies in {'(0, 2/3)' if order == 3 else '(0, 1]'} at order {order}, got r={r}")
        weights = ("midpoint" if order == 2 else "exact") if weights is None else weights
        self.weights = check_weights(self, weights, order)
        self.prediction = one_of(f"{name}'s prediction", prediction, ("denoised", "noise"))
        self.nodes = ((1.0,), (self.r, 1.0), (self.r, 2 / 3, 1.0))[order - 1]
        self.shares = [after - before for before, after in pairwise((0.0, *self.nodes))]
        self.calls, self.order = order, min(order, 2) if self.eta else order
        self.point_mass = prediction == "denoised" or self.eta == 0

    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Sequence[Stage]:
        start, h, k = sde.half_log_snr(t), sde.half_log_snr(s) - sde.half_log_snr(t), 1 + self.eta**2
        other, gain, K = (sde.alpha, 1.0, -k * h) if self.prediction == "denoised" else (sde.sigma, k, h)
        stages, at, a, noises = list[Stage](), t, torch.ones_like(h), list[Tensor]()
        for before, node in pairwise((0.0, *self.nodes)):
            time = s if node == 1 else sde.time_at(start + node * h)
            decay, fresh = carried(sde, at, time, self.eta, self.prediction)
            at, a, noises = time, decay * a, [*(decay * noise for noise in noises), fresh]
            total, scale = torch.expm1(node * K), -gain * other(time)
            b = [scale * total, *[torch.zeros_like(h)] * len(stages)]
            if stages:
                midpoint = self.weights == "midpoint"
                slope = total / (2 * before) if midpoint else node / before * (total / (node * K) - 1)
                b[0], b[-1] = scale * (total - slope), scale * slope
            stages.append(Stage(time, a, b, noises if self.eta else ()))
        return stages


class DPMSolverSinglestep(DPMSolverSDE):
    """DPM-Solver(++) 2S and 3S for the probability-flow ODE: `DPMSolverSDE` at eta = 0.

    Source: Lu et al. 2022, https://arxiv.org/abs/2206.00927, algorithms 1, 2 (noise), https://arxiv.org/abs/2211.01095,
    algorithm 1 (denoised); the third-order form for D follows by the same exchange of symbols.

    Args:
        order, prediction, weights: as in `DPMSolverSDE`; exact weights at order 2 are RES's second-order method.
        last: the orders of a run's last moves, where they are to take fewer calls: with order 3, prediction "noise" and
            `grid.log_snr`, (2, 1), (1,) or (2,) is DPM-Solver-fast. A move of order p limits that of convergence to p + 1.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"DPM-Solver{mark} {order}S": {"order": order, "prediction": prediction}
        for mark, prediction in (("++", "denoised"), ("", "noise")) for order in (2, 3)
    } | {"RES 2S": {"weights": "exact"}}  # fmt: skip

    def __init__(
        self, order: int = 2, prediction: str = "denoised", weights: str | None = None, last: Sequence[int] = ()
    ) -> None:
        super().__init__(0.0, order=order, prediction=prediction, weights=weights)
        self.last = tuple(check_order(self, p, 3) for p in last)
        self.order = min([self.order, *(p + 1 for p in self.last)])

    def plan(self, sde: SDE, t: Tensor, s: Tensor) -> list[StageRow]:
        cut = max(len(t) - len(self.last), 0)
        rows = super().plan(sde, t[:cut], s[:cut])
        for i, order in zip(range(cut, len(t)), self.last[cut - len(t) :], strict=True):
            rows += DPMSolverSinglestep(order, self.prediction).plan(sde, t[i : i + 1], s[i : i + 1])
        return rows

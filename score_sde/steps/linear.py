r"""Steps that are linear in x, in recent denoiser outputs and in fresh noise.

    x_s = a x_t + sum_k b_k D_k + c z,        D_0 = D(x_t, t), D_1, D_2, ... the outputs of the moves before,

so a step is three functions of time, and its properties follow from the scalars without a network: a point mass is
carried exactly where a alpha_t + sum b = alpha_s and (a sigma_t)^2 + c^2 = sigma_s^2. Throughout, h = s - t < 0,
the score is (alpha_t D - x) / sigma_t^2, and the step's noise ratio is G^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2,
the variance of the exact forward transition from s to t.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from score_sde.sde import SDE
from score_sde.steps.step import Draw, Evaluate, History, Step

Coefficients = tuple[Tensor, Sequence[Tensor], Tensor]


class LinearRow(NamedTuple):
    """One move: evaluate at t, then x_s = a x_t + sum_k b[k] D_k + c z."""

    t: float
    a: float
    b: tuple[float, ...]
    c: float


def combine(x: Tensor, a: float, b: Sequence[float], outputs: Sequence[Tensor]) -> Tensor:
    """a x + sum_k b_k D_k, in one temporary."""
    x = x * a
    for weight, output in zip(b, outputs, strict=False):
        if weight != 0.0:
            x = x.add_(output, alpha=weight)
    return x


class LinearStep(Step):
    """A step given by its scalar coefficients; a subclass defines `coefficients`.

    Attributes:
        memory: how many denoiser outputs the step uses once enough moves lie behind it; before, it uses those there are.
        repeats: how often a move is carried out, each time with a new network call (correctors).
    """

    memory: int = 1
    repeats: int = 1

    @abstractmethod
    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        """The scalars (a, [b_0, b_1, ...], c) of x_s = a x_t + sum_k b_k D_k + c z.

        Args:
            sde: the forward process.
            times: (k, ...) float64 times of the last k <= memory evaluations, the newest first: times[0] is t.
            s: (...) float64 times to go to. Write the formula elementwise: it is called for many moves at once.
        """

    def plan(self, sde: SDE, t: Tensor, s: Tensor) -> list[LinearRow]:
        rows: list[LinearRow | None] = [None] * len(t)
        age = self._age(t, s)
        for depth in age.unique().tolist():
            moves = (age == depth).nonzero().squeeze(-1)
            times = torch.stack([t[moves - k] for k in range(depth)])
            a, b, c = self.coefficients(sde, times, s[moves])
            columns = [column.expand(len(moves)).tolist() for column in (t[moves], a, *b, c)]
            for move, (at, a_, *b_, c_) in zip(moves.tolist(), zip(*columns, strict=True), strict=True):
                rows[move] = LinearRow(at, a_, tuple(b_), c_)
        self._refuse_nan(rows, sde)
        return [row for row in rows if row is not None]

    def advance(
        self, row: LinearRow, x: Tensor, history: History, evaluate: Evaluate, draw: Draw
    ) -> tuple[Tensor, History]:
        for k in range(self.repeats):
            if row.b:
                history = (evaluate(x, row.t).denoised, *history)[: self.memory]
            x = combine(x, row.a, row.b, history)
            if row.c != 0.0:
                x = x.add_(draw(k), alpha=row.c)
        return x, history

    def _age(self, t: Tensor, s: Tensor) -> Tensor:
        """How many outputs each move may use: those since the last break in the chain t[i] = s[i - 1], memory at most."""
        index = torch.arange(len(t))
        broken = torch.cat([torch.ones(1, dtype=torch.bool), t[1:] != s[:-1]])
        start = torch.where(broken, index, 0).cummax(0).values
        return (index - start + 1).clamp(max=self.memory)

    def _refuse_nan(self, rows: Sequence[LinearRow | None], sde: SDE) -> None:
        for row in rows:
            if row is not None and not np.isfinite((row.a, *row.b, row.c)).all():
                raise ValueError(f"{type(self).__name__} has no finite coefficients at t={row.t:g} of {sde!r}: "
                                 "choose a grid that avoids this time, or another step")  # fmt: skip


def noise_ratio(sde: SDE, t: Tensor, s: Tensor) -> Tensor:
    """G^2 / sigma_t^2 = 1 - (alpha_t sigma_s / (alpha_s sigma_t))^2, without cancellation for close times."""
    return -torch.expm1(2 * (sde.half_log_snr(t) - sde.half_log_snr(s)))


def with_score(sde: SDE, t: Tensor, of_x: Tensor, of_score: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(a, [b]) of of_x x + of_score score, written in terms of x and D."""
    variance = sde.sigma(t) ** 2
    return of_x - of_score / variance, [of_score * sde.alpha(t) / variance]


class Carry(LinearStep):
    """x_s = alpha_s / alpha_t x: the scaled variable x / alpha stays where it is, at no network call."""

    calls = 0

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        return sde.alpha(s) / sde.alpha(times[0]), [], torch.zeros_like(s)


class EulerMaruyama(LinearStep):
    """x_s = x + h (f x - g^2 score) + g sqrt(-h) z: the reverse-time SDE by Euler-Maruyama.

    Source: Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 6 and appendix E.
    """

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        t = times[0]
        h, f, g = s - t, sde.drift(t), sde.diffusion(t)
        return *with_score(sde, t, 1 + h * f, -h * g**2), g * (-h).sqrt()


class ProbabilityFlowEuler(LinearStep):
    """x_s = x + h (f x - g^2 score / 2): the probability-flow ODE by Euler's method in time.

    Source: Song et al. 2021, eq. 13.
    """

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        t = times[0]
        h = s - t
        return *with_score(sde, t, 1 + h * sde.drift(t), -h * sde.diffusion(t) ** 2 / 2), torch.zeros_like(h)


class ReverseDiffusion(LinearStep):
    """x_s = (2 - r) x + G^2 score + G z, with r = alpha_t / alpha_s: the forward chain's own discretisation, reversed.

    The forward transition from s to t is exact, so that this is Song et al.'s sampler for every ladder: r = sqrt(1 - beta_i)
    and G^2 = beta_i for DDPM's, r = 1 and G^2 = sigma_i^2 - sigma_{i-1}^2 for SMLD's.
    Source: Song et al. 2021, eq. 46 and algorithms 2, 3.
    """

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        t = times[0]
        variance = sde.sigma(t) ** 2 * noise_ratio(sde, t, s)
        return *with_score(sde, t, 2 - sde.alpha(t) / sde.alpha(s), variance), variance.sqrt()


class DDIM(LinearStep):
    """x_s = alpha_s D + sqrt(sigma_s^2 - c^2) eps + c z, with c = eta G sigma_s / sigma_t: any noise from none to ancestral.

    eta = 0 is the exponential Euler step of the probability-flow ODE; eta = 1 the posterior p(x_s | x_t, x_0 = D).
    Source: Song, Meng & Ermon 2021, https://arxiv.org/abs/2010.02502, eq. 12 and 16, for every alpha and sigma.

    Args:
        eta: share of the ancestral noise, in [0, 1].
    """

    def __init__(self, eta: float = 0.0) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"DDIM's eta lies in [0, 1], got {eta}")
        self.eta = float(eta)

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        t = times[0]
        sigma_s, share = sde.sigma(s), self.eta**2 * noise_ratio(sde, t, s)
        a = sigma_s / sde.sigma(t) * (1 - share).sqrt()
        return a, [sde.alpha(s) - a * sde.alpha(t)], sigma_s * share.sqrt()


class Ancestral(LinearStep):
    """A draw of the posterior p(x_s | x_t, x_0 = D) of the forward chain: DDPM's for VP, SMLD's for VE, in one formula.

    x_s = r sigma_s^2 / sigma_t^2 x + alpha_s G^2 / sigma_t^2 D + c z, with r = alpha_t / alpha_s. The noise is
    c = G sigma_s / sigma_t for "posterior" (DDPM's fixed-small, exact for a point mass) and c = G for "forward" (its
    fixed-large, exact for standard normal data under VP).
    Source: Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 6, 7 and section 3.2; Song et al. 2021, appendix F.

    Args:
        variance: "posterior" or "forward".
    """

    def __init__(self, variance: str = "posterior") -> None:
        if variance not in ("posterior", "forward"):
            raise ValueError(f"Ancestral's variance is 'posterior' or 'forward', got {variance!r}")
        self.variance = variance

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        t = times[0]
        ratio, scale = noise_ratio(sde, t, s), sde.sigma(s) / sde.sigma(t)
        std = sde.sigma(t) * ratio.sqrt()
        c = std * scale if self.variance == "posterior" else std
        return sde.alpha(t) / sde.alpha(s) * scale**2, [sde.alpha(s) * ratio], c


class ExponentialAdams(LinearStep):
    """Exponential Adams-Bashforth in lambda on the denoised prediction, for the SDE family with noise strength eta.

    With u = lambda_s - lambda, h = lambda_s - lambda_t and k = 1 + eta^2, variation of constants gives

        x_s = sigma_s / sigma_t e^{-eta^2 h} x_t + alpha_s k int_0^h e^{-k u} D(lambda_s - u) du
              + sigma_s sqrt(1 - e^{-2 eta^2 h}) z,

    exactly; D is replaced by the polynomial through its last `order` values and the integral taken by Gauss-Legendre
    quadrature to machine precision, so that the step is exact where D is a polynomial in lambda of degree < order.
    At eta = 0: DDIM (order 1), DPM-Solver++(2M), and at order 3 what DPM-Solver++(3M) set out to be. At eta = 1:
    SDE-DPM-Solver++.
    Source: Lu et al. 2022, https://arxiv.org/abs/2211.01095, eq. 9 and 12; Xue et al. 2023 (SA-Solver),
    https://arxiv.org/abs/2305.14267, eq. 11, whose tau is eta.

    Args:
        order: number of outputs interpolated, 1 to 4; the first moves use those there are.
        eta: noise strength, 0 (the ODE) or more; 1 is the reverse SDE.
    """

    def __init__(self, order: int = 2, eta: float = 0.0) -> None:
        if order not in (1, 2, 3, 4):
            raise ValueError(f"ExponentialAdams has orders 1 to 4, got order={order}")
        if not eta >= 0:
            raise ValueError(f"ExponentialAdams needs a noise strength eta >= 0, got eta={eta}")
        self.memory, self.eta = int(order), float(eta)
        self.order = self.memory if eta == 0 else 1

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        nodes, end = sde.half_log_snr(times), sde.half_log_snr(s)
        h, k = end - nodes[0], 1 + self.eta**2
        fractions, weights = quadrature(s)
        kernel = sde.alpha(s) * k * h * weights * (-k * h * fractions).exp()
        b = [(kernel * basis).sum(0) for basis in lagrange(nodes, end - h * fractions)]
        a = sde.sigma(s) / sde.sigma(times[0]) * (-(self.eta**2) * h).exp()
        return a, b, sde.sigma(s) * (-torch.expm1(-2 * self.eta**2 * h)).sqrt()


def quadrature(like: Tensor, points: int = 32) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1], shaped (points, 1, ...) to go before `like`'s dimensions."""
    nodes, weights = np.polynomial.legendre.leggauss(points)
    shape = (points,) + (1,) * like.ndim
    return torch.from_numpy((nodes + 1) / 2).reshape(shape), torch.from_numpy(weights / 2).reshape(shape)


def lagrange(nodes: Tensor, at: Tensor) -> list[Tensor]:
    """The Lagrange basis polynomials of `nodes` (k, ...), evaluated at points (..., ...) that broadcast with nodes[0]."""
    basis = []
    for j, node in enumerate(nodes):
        others = [(at - other) / (node - other) for i, other in enumerate(nodes) if i != j]
        basis.append(torch.stack(others).prod(0) if others else torch.ones_like(at))
    return basis

r"""Multistep methods: exact in a semi-linear part, polynomial extrapolation in the rest.

Along x = alpha D + sigma eps the probability-flow ODE reads, in whichever quantity N is extrapolated,

    N = D:         d(x / sigma) = D d(alpha / sigma)          exact in x / sigma, so for a point mass,
    N = eps:       d(x / alpha) = eps d(sigma / alpha)        exact in x / alpha, so for a point mass,
    N = score:     d(x / alpha) = -sigma score d(sigma / alpha)
    N = velocity:  dx = v dt,  v = alpha' D + sigma' eps      exact in x alone: plain Adams-Bashforth in time.

N is replaced by the polynomial in a clock u(t) through its last values, which is integrated exactly.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from score_sde.checks import number, one_of
from score_sde.sde import SDE
from score_sde.steps.linear import Coefficients, LinearStep

PREDICTIONS = {"denoised": "log_snr", "noise": "level", "score": "time", "velocity": "time"}
"""What `AdamsBashforth` extrapolates, each with its default clock."""
CLOCKS = ("time", "level", "log_snr")

_gauss_legendre = functools.cache(np.polynomial.legendre.leggauss)


def quadrature(like: Tensor, points: int = 32) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre nodes and weights on [0, 1], of shape (points, 1, ..., 1) to broadcast with `like`."""
    nodes, weights = _gauss_legendre(points)
    shape = (points,) + (1,) * like.ndim
    return torch.from_numpy((nodes + 1) / 2).reshape(shape), torch.from_numpy(weights / 2).reshape(shape)


def points_for(exponent: Tensor) -> int:
    """Number of nodes that integrate e^exponent times a polynomial to machine precision, for all of these exponents."""
    longest = exponent.max()
    return 6 if longest <= 0.3 else 10 if longest <= 2 else 32


def lagrange(nodes: Tensor, at: Tensor) -> Tensor:
    """The Lagrange basis polynomials of `nodes` (k, ...) at points `at` that broadcast with nodes[0]; shape (k, *at)."""
    count = len(nodes)
    wide = nodes.reshape(count, *[1] * (at.ndim - nodes.ndim + 1), *nodes.shape[1:])
    others = torch.tensor([[j for j in range(count) if j != i] for i in range(count)], dtype=torch.long)
    return (at - wide)[others].prod(1) / (wide.unsqueeze(1) - wide[others]).prod(1)


def output_of(prediction: str, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
    """(u, w) with u D + w eps = the prediction; the velocity is dx/dt = alpha' D + sigma' eps in the SDE's own time."""
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    if prediction == "velocity":
        f, sigma = sde.drift(t), sde.sigma(t)
        return f * sde.alpha(t), f * sigma + sde.diffusion(t) ** 2 / (2 * sigma)
    return {"denoised": (one, zero), "noise": (zero, one), "score": (zero, -1 / sde.sigma(t))}[prediction]


def check_order(step: object, order: int, most: int = 4) -> int:
    """`order` itself, or a ValueError that says which orders there are."""
    if order not in range(1, most + 1):
        raise ValueError(f"{type(step).__name__} has orders 1 to {most}, got order={order}")
    return int(order)


def check_strength(step: object, eta: float) -> float:
    """eta as a float, or a ValueError where it is not a number >= 0 with a finite square."""
    value = number("eta", eta, 0)
    if not value * value < math.inf:
        raise ValueError(f"{type(step).__name__} needs a noise strength eta >= 0 with a finite square, got eta={eta}")
    return value


def check_weights(step: object, weights: str, order: int) -> str:
    """`weights` itself, or a ValueError where they are unknown, or "midpoint" above order 2."""
    if weights not in ("exact", "midpoint") or (weights == "midpoint" and order > 2):
        raise ValueError(f"{type(step).__name__}'s weights are 'exact' or, up to order 2, 'midpoint'; "
                         f"got {weights!r} at order {order}")  # fmt: skip
    return weights


class AdamsBashforth(LinearStep):
    """Adams-Bashforth of orders 1 to 4 with variable steps: x_s = scale_s (x_t / scale_t + sum_k (int L_k dm) N_k).

    `prediction` is the quantity that is extrapolated, and determines the exact part (see `score_sde.steps.multistep`);
    `clock` is the variable in which it is: "time" is the SDE's t, "level" is sigma / alpha, "log_snr" is lambda. Published
    combinations: noise in level = LMS (k-diffusion) and rho-AB-DEIS; noise in time = t-AB-DEIS; noise in log_snr =
    multistep DPM-Solver; denoised in log_snr = DPM-Solver++; velocity in time on `RectifiedFlow` = Adams for flow matching.
    Source: Zhang & Chen 2023 (DEIS), https://arxiv.org/abs/2204.13902, eq. 13 to 15; Lu et al. 2022,
    https://arxiv.org/abs/2211.01095, eq. 9.

    Args:
        order: number of outputs interpolated, 1 to 4; the first moves use those that exist.
        prediction: "velocity", "noise", "denoised" or "score". Velocity is dx/dt here, not `Prediction.velocity`,
            alpha eps - sigma x_0.
        clock: "time", "level" or "log_snr"; by default time for velocity and score, level for noise, log_snr for denoised.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{f"Adams velocity {k}": {"order": k} for k in (1, 2, 3, 4)},
        **{f"LMS {k}": {"order": k, "prediction": "noise"} for k in (1, 2, 3, 4)},
        **{f"DEIS {k}": {"order": k, "prediction": "noise", "clock": "time"} for k in (2, 3, 4)},
        **{f"Adams score {k}": {"order": k, "prediction": "score"} for k in (1, 2, 3, 4)},
        "Adams denoised 3 in time": {"order": 3, "prediction": "denoised", "clock": "time"},
    }

    def __init__(self, order: int = 3, prediction: str = "velocity", clock: str | None = None) -> None:
        self.memory = self.order = check_order(self, order)
        self.prediction = one_of("AdamsBashforth's prediction", prediction, PREDICTIONS)
        self.point_mass = prediction in ("denoised", "noise")  # the others are not constant for a point mass
        self.clock = PREDICTIONS[prediction] if clock is None else one_of("AdamsBashforth's clock", clock, CLOCKS)

    def output(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return output_of(self.prediction, sde, t)

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        t, nodes, end = times[0], self._clock_at(sde, times), self._clock_at(sde, s)
        h = sde.half_log_snr(s) - sde.half_log_snr(t)
        polynomial = (self.prediction, self.clock) in (("velocity", "time"), ("noise", "level"))  # dm = du
        fractions, weights = quadrature(s, 4 if polynomial else 12 if h.max() <= 0.5 else 32)  # to machine precision
        at = nodes[0] + fractions * (end - nodes[0])
        kernel = weights * (end - nodes[0]) * self._density(sde, self._time(sde, at), s)
        change = {"velocity": s - t, "denoised": -sde.alpha(s) * torch.expm1(-h),
                  "noise": -sde.sigma(s) * torch.expm1(h)}  # fmt: skip
        if self.prediction in change:  # scale_s (m_s - m_t): a constant N is integrated exactly
            kernel = kernel * (change[self.prediction] / kernel.sum(0))
        scale = sde.sigma if self.prediction == "denoised" else sde.alpha
        a = torch.ones_like(s) if self.prediction == "velocity" else scale(s) / scale(t)
        return a, list((kernel * lagrange(nodes, at)).sum(1)), torch.zeros_like(s)

    def _clock_at(self, sde: SDE, t: Tensor) -> Tensor:
        return t if self.clock == "time" else sde.noise_level(t) if self.clock == "level" else sde.half_log_snr(t)

    def _time(self, sde: SDE, u: Tensor) -> Tensor:
        return u if self.clock == "time" else sde.time_at_noise_level(u) if self.clock == "level" else sde.time_at(u)

    def _density(self, sde: SDE, t: Tensor, s: Tensor) -> Tensor:
        """scale_s dm/du at time t, as scale_s dm/dlambda times dlambda/du, with lambda' = -g^2 / (2 sigma^2)."""
        lmbda, rate = sde.half_log_snr(t), -((sde.diffusion(t) / sde.sigma(t)) ** 2) / 2
        per_lmbda = {
            "denoised": sde.sigma(s) * lmbda.exp(),
            "noise": -sde.alpha(s) * (-lmbda).exp(),
            "score": sde.alpha(s) * sde.sigma(t) * (-lmbda).exp(),
            "velocity": 1 / rate,
        }[self.prediction]
        return per_lmbda * {"time": rate, "level": -lmbda.exp(), "log_snr": torch.ones_like(rate)}[self.clock]


class ExponentialAdams(LinearStep):
    """Exponential Adams-Bashforth in lambda for the SDE family with noise strength eta: every multistep DPM-Solver.

    With u = lambda_s - lambda, h = lambda_s - lambda_t and k = 1 + eta^2, variation of constants gives exactly

        denoised:  x_s = sigma_s / sigma_t e^{-eta^2 h} x_t + alpha_s k int_0^h e^{-k u} D(lambda_s - u) du
                         + sigma_s sqrt(1 - e^{-2 eta^2 h}) z,
        noise:     x_s = alpha_s / alpha_t x_t - sigma_s k int_0^h e^u eps(lambda_s - u) du
                         + eta sigma_s sqrt(e^{2 h} - 1) z.

    D or eps in the integrand is replaced by the polynomial through its last `order` values ("exact" weights, the Taylor
    form of the papers, integrated by Gauss-Legendre quadrature to machine precision), or at order 2 by that polynomial's
    value in the middle ("midpoint" weights, the published default of 2M). At eta = 0: DDIM (order 1), DPM-Solver(++) 2M,
    and at order 3 the corrected 3M, whose printed curvature term lacks a factor 2. At eta = 1: SDE-DPM-Solver(++). With
    eta > 0 and order >= 2 the weak order is 2: a move neglects the covariance of its noise with the change of D, a term of
    order h^2, which the extrapolation in the next moves restores. As eta grows, x_s tends to alpha_s D + sigma_s z
    (ComfyUI's `lcm`). The eta of k-diffusion and diffusers is eta^2 here. The noise form is exact for a point mass only at
    eta = 0.
    Source: Lu et al. 2022, https://arxiv.org/abs/2211.01095, eq. 9 and 12, appendix B; Xue et al. 2023 (SA-Solver),
    https://arxiv.org/abs/2309.05019, eq. 11, whose tau is eta.

    Args:
        order: number of outputs interpolated, 1 to 4; the first moves use those that exist.
        eta: noise strength, 0 (the ODE) or more; 1 is the reverse SDE.
        prediction: "denoised" or "noise", the quantity that is extrapolated.
        weights: "exact" or, up to order 2, "midpoint".

    Raises:
        ValueError: an option is unknown or out of range.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{f"DPM-Solver++ {k}M": {"order": k} for k in (1, 2, 3, 4)},
        "DPM-Solver++ 2M midpoint": {"order": 2, "weights": "midpoint"},
        **{f"DPM-Solver {k}M": {"order": k, "prediction": "noise"} for k in (2, 3, 4)},
        "DPM-Solver 2M midpoint": {"order": 2, "prediction": "noise", "weights": "midpoint"},
        "SDE-DPM-Solver++ 1": {"order": 1, "eta": 1.0},
        "SDE-DPM-Solver++ 2M": {"order": 2, "eta": 1.0},
        "SDE-DPM-Solver++ 2M midpoint": {"order": 2, "eta": 1.0, "weights": "midpoint"},
        "SDE-DPM-Solver++ 3M": {"order": 3, "eta": 1.0},
        "SDE-DPM-Solver 2M": {"order": 2, "eta": 1.0, "prediction": "noise"},
    }

    def __init__(self, order: int = 3, eta: float = 0.0, prediction: str = "denoised", weights: str = "exact") -> None:
        self.memory = check_order(self, order)
        self.eta, self.weights = check_strength(self, eta), check_weights(self, weights, order)
        self.prediction = one_of("ExponentialAdams's prediction", prediction, ("denoised", "noise"))
        self.order = self.memory if eta == 0 else min(self.memory, 2)
        self.point_mass = prediction == "denoised" or eta == 0

    def output(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return output_of(self.prediction, sde, t)

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        a, c = carried(sde, times[0], s, self.eta, self.prediction)
        return a, weigh(sde, times, times[0], s, self.eta, self.prediction, self.weights), c


def carried(sde: SDE, t: Tensor, s: Tensor, eta: float | Tensor, prediction: str = "denoised") -> tuple[Tensor, Tensor]:
    """(a, c) of `ExponentialAdams`: the factors of x_t and of the noise; eta may differ between moves."""
    h, sigma_s = sde.half_log_snr(s) - sde.half_log_snr(t), sde.sigma(s)
    if prediction == "noise":
        return sde.alpha(s) / sde.alpha(t), eta * sigma_s * torch.expm1(2 * h).sqrt()
    decay = eta**2 * h
    return sigma_s / sde.sigma(t) * (-decay).exp(), sigma_s * (-torch.expm1(-2 * decay)).sqrt()


def weigh(
    sde: SDE, nodes: Tensor, t: Tensor, s: Tensor, eta: float | Tensor, prediction: str = "denoised",
    weights: str = "exact",
) -> list[Tensor]:  # fmt: skip
    """The weights of the outputs at times `nodes` (k, ...) in `ExponentialAdams`'s integral from t to s."""
    start, end, *inner = sde.half_log_snr(torch.stack([t, s, *nodes]))
    h, k, levels = end - start, 1 + eta**2, torch.stack(inner)
    scale, rate = (sde.alpha(s), -k) if prediction == "denoised" else (-sde.sigma(s), 1.0)
    if weights == "midpoint":
        return list(scale * (k / rate) * torch.expm1(rate * h) * lagrange(levels, end - h / 2))
    span = h.clamp(max=40 / k) if prediction == "denoised" else h  # e^{-k u} is below rounding beyond
    fractions, gauss = quadrature(s, points_for(k * span))
    kernel = (scale * k * span) * gauss * (rate * span * fractions).exp()
    return list((kernel * lagrange(levels, end - span * fractions)).sum(1))


class RectifiedAdams(LinearStep):
    """Adams-Bashforth on the rectified path, in the coordinates of any SDE.

    With y = x / (alpha + sigma) and tau = sigma / (alpha + sigma) the probability-flow ODE of every SDE is
    dy/dtau = eps - D, on the path y = (1 - tau) x_0 + tau eps, which is straight where D and eps are constant. That
    velocity is extrapolated in tau by the polynomial through its last `order` values. While there are fewer, each move
    starts again from the first time t_0, with the polynomial P_k through all k values so far:

        y_{k+1} = y_0 + int_{tau_0}^{tau_{k+1}} P_{k+1} dtau = y_k + the same - int_{tau_0}^{tau_k} P_k dtau.

    So the second move reduces the error O(h^2) of the first to O(h^3), without a call; where sampling begins at a noise
    level near the data's size, that error would keep the whole run at order 2. After the first moves, on `RectifiedFlow`,
    the step is `AdamsBashforth` in the velocity.
    Source: Liu et al. 2023 (rectified flow), https://arxiv.org/abs/2209.03003, eq. 1.

    Args:
        order: number of outputs interpolated, 1 to 4; 4 is of order 4 only where the velocity is constant at first.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{f"rectified Adams {k}": {"order": k} for k in (1, 2, 3, 4)}
    }

    def __init__(self, order: int = 3) -> None:
        self.memory = self.order = check_order(self, order)

    def output(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        nodes, end = (torch.sigmoid(-sde.half_log_snr(t)) for t in (times, s))
        scale_t, scale_s = (sde.alpha(t) + sde.sigma(t) for t in (times[0], s))
        fractions, gauss = quadrature(s, points=4)

        def integral(known: Tensor, start: Tensor, stop: Tensor) -> Tensor:  # of each basis polynomial of known nodes
            return (stop - start) * (gauss * lagrange(known, start + fractions * (stop - start))).sum(1)

        first_moves = 1 < len(times) < self.memory
        b = integral(nodes, nodes[-1] if first_moves else nodes[0], end)
        if first_moves:
            b[1:] -= integral(nodes[1:], nodes[-1], nodes[0])
        return scale_s / scale_t, list(scale_s * b), torch.zeros_like(s)


class _WeightedNoise(LinearStep):
    """A DDIM move along a weighted sum of noises: x_s = alpha_s / alpha_t x + alpha_s (l_s - l_t) sum_k w_k eps_k.

    Attributes:
        weights: the w while there are 1, 2, ... outputs.
    """

    weights: Sequence[Sequence[float]]

    def output(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        return output_of("noise", sde, t)

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        change = -sde.sigma(s) * torch.expm1(sde.half_log_snr(s) - sde.half_log_snr(times[0]))  # alpha_s (l_s - l_t)
        weights = self.weights[len(times) - 1]
        return sde.alpha(s) / sde.alpha(times[0]), [w * change for w in weights], torch.zeros_like(s)


class IPNDM(_WeightedNoise):
    """iPNDM: a DDIM move with the noise extrapolated by the Adams weights of equal steps, on any grid.

    x_s = alpha_s / alpha_t x + alpha_s (l_s - l_t) sum_k w_k eps_k, l = sigma / alpha, w = (55, -59, 37, -9) / 24 at
    order 4. The nominal order holds only on a grid uniform in l; on any other smooth grid the weights do not fit the
    spacing and the order is 2 at most. `AdamsBashforth(prediction="noise")` has the weights that fit.
    Source: Liu et al. 2022 (PNDM), https://arxiv.org/abs/2202.09778, eq. 9; Zhang & Chen 2023,
    https://arxiv.org/abs/2204.13902, appendix B.

    Args:
        order: number of outputs combined, 1 to 4; the first moves use those that exist.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {f"iPNDM {k}": {"order": k} for k in (2, 3, 4)}
    weights = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    def __init__(self, order: int = 4) -> None:
        self.memory = check_order(self, order)
        self.order = min(self.memory, 2)


class GradientEstimation(_WeightedNoise):
    """A DDIM move along gamma eps_0 + (1 - gamma) eps_1, where eps_1 is the noise of the previous move.

    x_s = alpha_s / alpha_t x + alpha_s (l_s - l_t) (gamma eps_0 + (1 - gamma) eps_1), l = sigma / alpha. If sampling is read
    as gradient descent on the distance to the data, gamma near 2 gives the least error in the direction of descent.
    gamma = 1 is DDIM, 1.5 is `IPNDM` of order 2; any other value is of order 1 on every grid.
    Source: Permenter & Yuan 2024, https://arxiv.org/abs/2306.04848, algorithm 2.

    Args:
        gamma: weight of the new output.
    """

    memory = 2

    def __init__(self, gamma: float = 2.0) -> None:
        self.gamma = number("gamma", gamma)
        if not math.isfinite(self.gamma):
            raise ValueError(f"GradientEstimation's gamma is a finite number, got {gamma}")
        self.weights, self.order = ((1.0,), (self.gamma, 1 - self.gamma)), 2 if gamma == 1.5 else 1

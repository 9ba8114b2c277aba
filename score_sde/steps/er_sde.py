r"""Exponential Adams-Bashforth for reverse-time SDEs whose noise strength depends on the noise level: ER-SDE-Solvers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from score_sde.checks import one_of
from score_sde.sde import SDE, derivative
from score_sde.steps.linear import Coefficients, LinearStep
from score_sde.steps.multistep import check_order, check_strength, lagrange, points_for, quadrature

NOISE_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "er_sde": lambda level: (level**0.3).exp() + 10,
    "reverse_sde": lambda level: level,
}
"""q(l) of `ERSDESolver` by name: the authors' choice, with much noise at high levels and little near the data; reverse SDE."""


class ERSDESolver(LinearStep):
    r"""ER-SDE-Solver of orders 1 to 4: the extended reverse-time SDE, solved exactly in its linear part.

    In y = x / alpha and the noise level l = sigma / alpha, every reverse-time SDE with the marginals of the forward one is

        dy = (1 + e(l)) (y - D) / l dl + sqrt(2 l e(l)) dw,    l decreasing, e = 0 the ODE and e = 1 the reverse SDE.

    With phi(l) = l q(l)^eta, where l phi' / phi = 1 + e, variation of constants gives

        y_s = phi_s / phi_t y_t + phi_s int_{l_s}^{l_t} D(l) phi'(l) / phi(l)^2 dl + sqrt(l_s^2 - l_t^2 (phi_s / phi_t)^2) z.

    D is replaced by the polynomial in l through its last `order` values. (The published third order takes
    D_0 + D[0, 1] (l - l_0) + D[0, 1, 2] (l - l_0)^2 instead, where Newton's form has (l - l_0) (l - l_1); without noise
    that is only of second order.) With noise the weak order is 2 at most, as in `ExponentialAdams`, which has q = l and
    extrapolates in lambda. Exact for a point mass.
    Source: Cui et al. 2023, https://arxiv.org/abs/2309.06169; q = e^{l^0.3} + 10 is its recommended noise scale.

    Args:
        order: number of outputs interpolated, 1 to 4; the first moves use those that exist.
        noise: "er_sde" (q = e^{l^0.3} + 10), "reverse_sde" (q = l), or a function q of the level, positive and nowhere
            decreasing; a constant factor in q does not matter.
        eta: power of q, 0 (the ODE) or more.

    Raises:
        ValueError: an option is unknown or out of range; while planning, q decreases or is not positive.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{f"ER-SDE-Solver {k}": {"order": k} for k in (1, 2, 3)},
        "ER-SDE-Solver 2, reverse SDE": {"order": 2, "noise": "reverse_sde"},
        **{f"ER-SDE-Solver ODE {k}": {"order": k, "eta": 0.0} for k in (3, 4)},
    }

    def __init__(self, order: int = 3, noise: str | Callable[[Tensor], Tensor] = "er_sde", eta: float = 1.0) -> None:
        self.memory = check_order(self, order)
        self.noise, self.eta = noise, check_strength(self, eta)
        self.scale = noise if callable(noise) else NOISE_SCALES[one_of("ERSDESolver's noise", noise, NOISE_SCALES)]
        self.order = self.memory if eta == 0 else min(self.memory, 2)

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        nodes, end = sde.half_log_snr(times), sde.half_log_snr(s)
        h, to_end = end - nodes[0], self._log_scale(end)
        decay = self._log_scale(nodes[0]) - to_end
        fractions, gauss = quadrature(s, points_for(h + decay))
        at = nodes[0] + fractions * h
        slope = derivative(self._log_scale, at)
        if not (decay >= 0).all() or not (slope <= 0).all():
            raise ValueError(
                f"ERSDESolver's noise scale q(l) is positive and nowhere decreasing, {self.noise!r} is not"
            )
        carried = sde.sigma(s) / sde.sigma(times[0]) * (-decay).exp()
        kernel = gauss * h * (1 - slope) * (at - end + to_end - self._log_scale(at)).exp()  # phi_s phi' / phi^2 dl
        total = -torch.expm1(-h - decay)
        kernel = sde.alpha(s) * kernel * (total / kernel.sum(0))
        b = list((kernel * lagrange((-nodes).exp(), (-at).exp())).sum(1))
        return carried, b, sde.sigma(s) * (-torch.expm1(-2 * decay)).sqrt()

    def _log_scale(self, half_log_snr: Tensor) -> Tensor:
        """eta log q at l = e^{-lambda}."""
        return self.eta * self.scale((-half_log_snr).exp()).log()

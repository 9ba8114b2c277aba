r"""What a score model predicts at a noisy x_t = alpha x_0 + sigma eps.

A model evaluates one raw quantity F; the denoiser is affine in it, D(x, t) = E[x_0 | x_t] = c_skip x + c_out F, and
every other view is affine in D:

    noise = (x - alpha D) / sigma,   score = -noise / sigma = grad log p_t(x),   velocity = alpha noise - sigma D.

Each view is computed directly from (x, F) with coefficients combined in float64: going through another view would lose
digits. Source: Song et al. 2021; Salimans & Ho 2022, https://arxiv.org/abs/2202.00512, appendix D.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from score_sde.brief import Brief
from score_sde.sde import expand

Coefficient = float | Tensor


def scaled(c: Coefficient, x: Tensor) -> Tensor:
    """c x for a float or a tensor of shape () or (batch,)."""
    return (expand(c, x) if isinstance(c, Tensor) else c) * x


def affine(p: Coefficient, x: Tensor, q: Coefficient, y: Tensor) -> Tensor:
    """p x + q y for coefficients that are floats or tensors of shape () or (batch,); may be y itself."""
    if not isinstance(p, Tensor) and p == 0.0:
        return y if isinstance(q, float) and q == 1.0 else scaled(q, y)
    if isinstance(q, Tensor) or x.requires_grad or y.requires_grad:
        return scaled(p, x) + scaled(q, y)
    return scaled(p, x).add_(y, alpha=q)


@dataclass(frozen=True, repr=False)
class Prediction(Brief):
    """One evaluation of a score model at (x, t), with all its views.

    Attributes:
        x: the noisy point, shape (batch, *event).
        raw: the model's native output F, shape (batch, *event).
        alpha, sigma: the kernel's scale and standard deviation at t, floats or tensors of shape (batch,).
        c_skip, c_out: the affine map D = c_skip x + c_out F, floats or tensors of shape (batch,).
        calls: network calls that it took, e.g. 2 under guidance that evaluates two models.
        variance_weight: w in the variance large^w small^(1 - w) of a reverse step, of x's shape, from a network that learns
            it (Nichol & Dhariwal 2021, eq. 15; see `training.variational`), else None.
    """

    x: Tensor
    raw: Tensor
    alpha: Coefficient
    sigma: Coefficient
    c_skip: Coefficient = 0.0
    c_out: Coefficient = 1.0
    calls: int = 1
    variance_weight: Tensor | None = None

    @classmethod
    def from_score(cls, x: Tensor, score: Tensor, alpha: Coefficient, sigma: Coefficient) -> Prediction:
        """The prediction whose raw output is a score: D = (x + sigma^2 score) / alpha."""
        return cls(x, score, alpha, sigma, 1 / alpha, sigma**2 / alpha)

    @classmethod
    def from_noise(cls, x: Tensor, noise: Tensor, alpha: Coefficient, sigma: Coefficient) -> Prediction:
        """The prediction whose raw output is an estimate of the noise: D = (x - sigma noise) / alpha."""
        return cls(x, noise, alpha, sigma, 1 / alpha, -sigma / alpha)

    @classmethod
    def from_velocity(cls, x: Tensor, velocity: Tensor, alpha: Coefficient, sigma: Coefficient) -> Prediction:
        """The prediction whose raw output is a `velocity`: D = (alpha x - sigma velocity) / (alpha^2 + sigma^2)."""
        total = alpha**2 + sigma**2
        return cls(x, velocity, alpha, sigma, alpha / total, -sigma / total)

    @property
    def denoised(self) -> Tensor:
        """D = E[x_0 | x_t], the posterior mean of the clean data."""
        return affine(self.c_skip, self.x, self.c_out, self.raw)

    @property
    def noise(self) -> Tensor:
        """E[eps | x_t] = (x - alpha D) / sigma."""
        return self.mix(0.0, 1.0)

    @property
    def score(self) -> Tensor:
        """grad_x log p_t(x) = -E[eps | x_t] / sigma."""
        return self.mix(0.0, -1 / self.sigma)

    @property
    def velocity(self) -> Tensor:
        """v = alpha E[eps | x_t] - sigma D (Salimans & Ho 2022)."""
        return self.mix(-self.sigma, self.alpha)

    def mix(self, of_denoised: Coefficient, of_noise: Coefficient) -> Tensor:
        """of_denoised D + of_noise E[eps | x_t], e.g. the velocity dx/dt = alpha' D + sigma' eps of the ODE."""
        p, q = self._mix_coefficients(of_denoised, of_noise)
        return affine(p, self.x, q, self.raw)

    def combine(self, a: Coefficient, b: Coefficient, of_denoised: Coefficient, of_noise: Coefficient) -> Tensor:
        """a x + b (of_denoised D + of_noise E[eps | x_t]) as a new tensor, from x and F without forming the mix."""
        p, q = self._mix_coefficients(of_denoised, of_noise)
        x = affine(a + b * p, self.x, b * q, self.raw)
        return x.clone() if x is self.raw else x

    def _mix_coefficients(self, of_denoised: Coefficient, of_noise: Coefficient) -> tuple[Coefficient, Coefficient]:
        """(p, q) with p x + q F = of_denoised D + of_noise E[eps | x_t]."""
        p = of_noise * (1 - self.alpha * self.c_skip) / self.sigma + of_denoised * self.c_skip
        return p, of_denoised * self.c_out - of_noise * self.alpha * self.c_out / self.sigma

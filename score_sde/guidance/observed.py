r"""Guidance by an observation y = A(x_0) + noise_std e: posterior samplers as score models.

The exact score of p_t(x | y) adds G = grad log p(y | x_t), p(y | x_t) = E[N(y; A x_0, n^2 I) | x_t], n = noise_std.
With the denoiser D = E[x_0 | x_t], its Jacobian J = dD/dx and the residual r = y - A D, each method approximates
p(x_0 | x_t) by

    DPS          a point, D                       G = J^T A^T r / n^2
    PiGDM        N(D, v I)                        G = J^T A^T (v A A^T + n^2 I)^{-1} r
    MMPS         N(D, C), C = sigma^2 / alpha J   G = J^T A^T (A C A^T + n^2 I)^{-1} r,  A linearised at D
    DiffPIR      N(D, w I), and takes the mode    D' = D + A^T (A A^T + n^2 / w I)^{-1} r
    Replacement  as DiffPIR, for n = 0            D' = D + A^+ r

MMPS is exact for a Gaussian prior, PiGDM for N(mu, data_std^2 I). All treat each sample independently.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from score_sde.checks import number, one_of, whole
from score_sde.guidance.base import moved, pushed, with_pull
from score_sde.guidance.operators import LinearOperator, Map, Operator
from score_sde.prediction import Coefficient, Prediction, scaled
from score_sde.score import ScoreModel, WrappedScore
from score_sde.sde import Time, expand


class Observed(WrappedScore):
    """A model guided by an observation.

    Args:
        model: of the clean data's law.
        operator: the observation A.
        y: one observation for all samples, of shape output_shape, or one per sample, of shape (batch, *output_shape). If
            left out, it is the condition `y` of every call, and follows its sample through solvers that regroup a batch.
        noise_std: standard deviation of the observation's noise, in units of y.

    Raises:
        TypeError: `operator` is not an `Operator`, or not a linear one where the method needs that.
        ValueError: operator, y and model do not fit, noise_std is out of range, or y is given twice or not at all.
    """

    operator: Operator
    linear = True
    needs_noise = False

    def __init__(self, model: ScoreModel, operator: Operator, y: Tensor | None = None, noise_std: float = 0.0) -> None:
        super().__init__(model)
        name = type(self).__name__
        if not isinstance(operator, LinearOperator if self.linear else Operator):
            wanted = "a LinearOperator (MMPS takes any Operator)" if self.linear else "an Operator"
            function = "a linear function as Linear" if self.linear else "a function as Nonlinear"
            raise TypeError(f"{name} takes {wanted}, got {type(operator).__name__}: wrap a matrix as Matrix(A), "
                            f"{function}(f, input_shape)")  # fmt: skip
        if tuple(operator.input_shape) != self.event_shape:
            raise ValueError(f"the operator takes x of shape {operator.input_shape}, the model's is {self.event_shape}")
        single = not isinstance(noise_std, str | Sequence) and getattr(noise_std, "ndim", 0) == 0
        if not single or not 0 <= noise_std < math.inf or (self.needs_noise and noise_std == 0):
            raise ValueError(f"{name}'s noise_std is one number {'> 0' if self.needs_noise else '>= 0'} for all of y, got "
                             f"{noise_std!r}: where it differs between entries, divide A and y by it")  # fmt: skip
        self.operator, self.noise_std = operator, float(noise_std)
        self.y = None if y is None else operator.observation(y)
        if y is None:
            self.condition_names = self.condition_names | {"y"}

    def check(self, shape: Sequence[int], condition: Mapping[str, Any]) -> None:
        super().check(shape, condition)
        given = self.y if self.y is not None else condition.get("y")
        if given is None:
            raise ValueError(f"{type(self).__name__} was built without an observation: give condition={{'y': ...}}")
        batch = len(self.operator.shaped(given))
        if batch not in (1, shape[0]):
            raise ValueError(f"{batch} observations for {shape[0]} samples: give one for all or one per sample; "
                             "with a solver that regroups the batch, give them as the condition y")  # fmt: skip

    def per_sample(self, name: str, value: Any, batch: int) -> bool:
        """An observation y has one row per sample if it has one dimension more than the operator's output."""
        if name != "y" or self.y is not None:
            return super().per_sample(name, value, batch)
        return value.ndim > len(self.operator.output_shape) and len(value) == batch

    def _take(self, x: Tensor, condition: dict[str, Any]) -> Tensor:
        """Checks the call, removes y from the condition, and returns it in x's dtype and on its device."""
        self.check(x.shape, condition)
        y = condition.pop("y") if self.y is None else self.y
        return self.operator.shaped(y).to(x)


class Replacement(Observed):
    """D' = D + A^+ (y - A D): the part of the denoised sample that A observes is replaced by the observation.

    That part of x_t then follows the forward process from y exactly: it starts as alpha A^+ y + sigma noise, every step
    that is exact for a point mass renoises it exactly, and the last denoising gives y.
    Assumes: linear A, y without noise. Cost: one call, no gradient. Bias: y reaches the unobserved part only through the
    noisy x_t, so this part depends too little on y; more steps do not help, `Impute` with jumps back (RePaint) does in
    part. Noise in y counts as signal. Certificate: 0.48 / 0.47, the spread 11 % and 7 % too small.
    Source: Song et al. 2021, https://arxiv.org/abs/2011.13456, appendix I.2 (imputation, colourisation); Wang et al. 2022
    (DDNM), https://arxiv.org/abs/2212.00490, eq. 13.
    """

    operator: LinearOperator

    def __init__(self, model: ScoreModel, operator: Operator, y: Tensor | None = None, noise_std: float = 0.0) -> None:
        super().__init__(model, operator, y, noise_std)
        if noise_std != 0:
            raise ValueError(f"Replacement takes an observation without noise, got noise_std={noise_std}: use DiffPIR")

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        y = self._take(x, condition)
        prediction = self.model(x, t, **condition)
        return moved(prediction, self.operator.pseudo_inverse(y - self.operator(prediction.denoised)))

    def start(self, z: Tensor) -> Tensor:
        return self.start_at(z, self.sde.t_max)

    def start_at(self, z: Tensor, t: float) -> Tensor:
        x = self.model.start_at(z, t)
        if self.y is None:
            return x
        alpha, sigma = (part(t).item() for part in (self.sde.alpha, self.sde.sigma))
        return x + self.operator.pseudo_inverse(alpha * self.y.to(z) - self.operator(x - sigma * z))

    def log_start(self, x: Tensor, t: float) -> Tensor:
        """The observed part of x has variance sigma^2, the rest that of the model's start; takes a (d, d) matrix."""
        if self.y is None:
            return super().log_start(x, t)
        size = x[0].numel()
        unit = torch.eye(size, dtype=torch.float64, device=x.device).view(size, *self.event_shape)
        one = Replacement(self.model, self.operator, self.y[:1])
        rows = (one.start_at(unit, t) - one.start_at(0 * unit, t)).flatten(1)  # a start is mean + z rows
        mean = self.start_at(torch.zeros_like(x, dtype=torch.float64), t).flatten(1)
        return torch.distributions.MultivariateNormal(mean, rows.T @ rows).log_prob(x.double().flatten(1))


class DiffPIR(Observed):
    """D' = argmin_u |y - A u|^2 / (2 noise_std^2) + lam alpha^2 / (2 sigma^2) |u - D|^2, a proximal step from D.

    At noise_std = 0 it is `Replacement`. The published sampler is this with DDIM steps of eta = zeta. Assumes: linear A.
    Cost: one call, no gradient. Bias: a proximal step is not a posterior mean; y reaches the unobserved part too late.
    Certificate: 0.06 / 0.10, by DDIM steps 0.10 / 0.16.
    Source: Zhu et al. 2023, https://arxiv.org/abs/2305.08995, eq. 12 and algorithm 1.

    Args:
        lam: weight of the prior, positive.
    """

    operator: LinearOperator

    def __init__(
        self, model: ScoreModel, operator: Operator, y: Tensor | None = None, noise_std: float = 0.0, lam: float = 1.0
    ) -> None:
        super().__init__(model, operator, y, noise_std)
        if not 0 < lam < math.inf:
            raise ValueError(f"DiffPIR's lam is positive, got {lam}")
        self.lam = float(lam)

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        y, operator = self._take(x, condition), self.operator
        prediction = self.model(x, t, **condition)
        residual = y - operator(prediction.denoised)
        if self.noise_std == 0:
            return moved(prediction, operator.pseudo_inverse(residual))
        rho = self.lam * self.noise_std**2 * (prediction.alpha / prediction.sigma) ** 2
        return moved(prediction, operator.transpose(solve(operator, residual, 1.0, rho)))


class DPS(Observed):
    """G = -zeta grad_x |y - A(D)|^2 / (2 noise_std^2), or by the published rule G = -zeta rate grad_x |y - A(D)|.

    Assumes: a differentiable A, linear or not, and noise. Cost: one call and one gradient. Bias: p(y | x_t) is too narrow
    at high noise, since D stands for x_0; so the posterior is too narrow and modes are missed. Certificate: 0.12 / 0.14, by
    DDIM 0.32 / 0.35; a smaller zeta leaves too much of the prior, 0.37 / 0.36 at zeta = 0.1. G grows as 1 / noise_std^2:
    it is stiff, and diverges in few steps.
    Source: Chung et al. 2023, https://arxiv.org/abs/2209.14687, eq. 16 and algorithm 1.

    Args:
        zeta: step size, positive.
        rule: "likelihood" is eq. 16 with rho = zeta / (2 noise_std^2). "residual" is algorithm 1, whose step zeta /
            |y - A(D)| is meant for 1,000 ancestral steps: here x moves by -zeta grad |y - A(D)| in each
            (t_max - t_min) / 1000 of time with ancestral steps, on any grid: rate = 1000 / ((t_max - t_min) g^2).
    """

    linear = False

    def __init__(
        self, model: ScoreModel, operator: Operator, y: Tensor | None = None, noise_std: float = 0.0, zeta: float = 1.0,
        rule: str = "likelihood",
    ) -> None:  # fmt: skip
        self.needs_noise = one_of("DPS's rule", rule, ("likelihood", "residual")) == "likelihood"
        super().__init__(model, operator, y, noise_std)
        if not 0 < zeta < math.inf:
            raise ValueError(f"DPS's zeta is positive, got {zeta}")
        self.zeta, self.rule = float(zeta), rule

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        y = self._take(x, condition)
        prediction, clean, pull = with_pull(self.model, x, t, condition)
        seen, _, back = self.operator.linearised(clean)
        residual = y - seen
        if self.rule == "likelihood":
            weight: Coefficient = self.zeta / self.noise_std**2
        else:
            norm = residual.flatten(1).norm(dim=1).clamp_min(torch.finfo(x.dtype).tiny ** 0.5)
            g = self.sde.diffusion(t)
            rate = 1000 / ((self.sde.t_max - self.sde.t_min) * g**2)
            weight = self.zeta * rate.to(x) / norm
        return pushed(prediction, scaled(weight, pull(back(residual))))


class PiGDM(Observed):
    """G = J^T A^T (v A A^T + noise_std^2 I)^{-1} (y - A D), v = data_std^2 sigma^2 / (alpha^2 data_std^2 + sigma^2).

    v is the variance of p(x_0 | x_t) for data N(mu, data_std^2 I), for which the method is exact. Assumes: linear A.
    Cost: one call and one gradient. Bias otherwise: the covariance of p(x_0 | x_t) counts as isotropic and the same at
    every x. Certificate: 0.01 / 0.02, by DDIM 0.005 / 0.06.
    Source: Song et al. 2023, https://openreview.net/forum?id=9_gsMA8MRKQ, eq. 7 and appendix A.3, whose data_std is 1.

    Args:
        data_std: standard deviation of the clean data about their mean; the model's `data_std` by default. For a learned
            model that is sigma_data, a root mean square: give `data.measure_data_std(data)` where the mean is not 0.
    """

    operator: LinearOperator

    def __init__(
        self, model: ScoreModel, operator: Operator, y: Tensor | None = None, noise_std: float = 0.0,
        data_std: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, operator, y, noise_std)
        data_std = model.data_std if data_std is None else number("data_std", data_std)
        if not 0 < data_std < math.inf:
            raise ValueError(f"PiGDM's data_std is a positive standard deviation, got {data_std}")
        self.assumed_std = float(data_std)

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        y, operator = self._take(x, condition), self.operator
        prediction, clean, pull = with_pull(self.model, x, t, condition)
        v = spread(prediction, self.assumed_std)
        solved = solve(operator, y - operator(clean), v, self.noise_std**2)
        return pushed(prediction, pull(operator.transpose(solved)))


class MMPS(Observed):
    """G = J^T A^T (A Cov A^T + noise_std^2 I)^{-1} (y - A D), with the model's own Cov[x_0 | x_t] = sigma^2 / alpha J.

    Exact for every Gaussian prior, up to the linear solver: conjugate residuals with a fixed number of iterations, which do
    not need a symmetric J (a learned one is not). A nonlinear A is replaced by A(D) + A'(D) (x_0 - D). Assumes: a
    differentiable A. Cost: one call and iterations + 1 gradients. Bias otherwise: p(x_0 | x_t) counts as Gaussian and A as
    linear, so that modes get wrong weights where y distinguishes them. Certificate: 0.01 / 0.01.
    Source: Rozet et al. 2024, https://arxiv.org/abs/2405.13712, eq. 13 and algorithm 3; Boys et al. 2023 (TMPD),
    https://arxiv.org/abs/2310.06721.

    Args:
        iterations: of the solver, 1 or more; exact with as many as A has rows.
    """

    linear = False

    def __init__(
        self, model: ScoreModel, operator: Operator, y: Tensor | None = None, noise_std: float = 0.0,
        iterations: int = 5,
    ) -> None:  # fmt: skip
        super().__init__(model, operator, y, noise_std)
        self.iterations = whole("iterations", iterations)

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        y = self._take(x, condition)
        prediction, clean, pull = with_pull(self.model, x, t, condition)
        seen, ahead, back = self.operator.linearised(clean)
        gain = prediction.sigma**2 / prediction.alpha

        def covariance(v: Tensor) -> Tensor:
            return ahead(scaled(gain, pull(back(v)))) + self.noise_std**2 * v

        solved = conjugate_residuals(covariance, y - seen, self.iterations)
        return pushed(prediction, pull(back(solved)))


def spread(prediction: Prediction, data_std: float) -> Coefficient:
    """v = data_std^2 sigma^2 / (alpha^2 data_std^2 + sigma^2), the variance of x_0 given x_t for Gaussian data."""
    alpha, sigma = prediction.alpha, prediction.sigma
    return data_std**2 * sigma**2 / (alpha**2 * data_std**2 + sigma**2)


def conjugate_residuals(apply: Map, b: Tensor, iterations: int) -> Tensor:
    """The u in span(b, S b, ..., S^(iterations - 1) b) with the least |b - S u|, for each sample of b (batch, ...).

    S, `apply`, need not be symmetric: the image S p of each direction p is made orthogonal to those before, and the residual
    never grows (which conjugate gradients do not guarantee). A sample that is solved no longer changes.
    Source: Eisenstat, Elman & Schultz 1983, https://doi.org/10.1137/0720023, algorithm GCR; equal to GMRES.
    """
    u, residual, rounding = torch.zeros_like(b), b, (10 * torch.finfo(b.dtype).eps) ** 2
    pairs = list[tuple[Tensor, Tensor]]()
    for _ in range(iterations):
        direction, image = residual, apply(residual)
        whole = _dot(image, image)
        for p, q in pairs:
            share = _dot(image, q)
            direction, image = direction - share * p, image - share * q
        squared = _dot(image, image)
        going = (squared > rounding * whole) & (_dot(residual, residual) > rounding * _dot(b, b))
        scale = torch.where(going, torch.where(going, squared, 1).rsqrt(), 0)
        direction, image = scale * direction, scale * image
        length = _dot(residual, image)
        u, residual = u + length * direction, residual - length * image
        pairs.append((direction, image))
    return u


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample, shape (batch, 1, ..., 1)."""
    return expand((a * b).flatten(1).sum(1), a)


def solve(operator: LinearOperator, b: Tensor, scale: Coefficient, shift: Coefficient) -> Tensor:
    """(scale A A^T + shift I)^{-1} b, for scale and shift floats or of shape (batch,); the pseudo-inverse at shift 0."""
    p, q = (expand(v, b) if isinstance(v, Tensor) else v for v in (scale, shift))
    if isinstance(shift, float) and shift == 0:
        return operator.gram(b, lambda s2: operator.invert(s2) / p)
    return operator.gram(b, lambda s2: 1 / (p * s2 + q))

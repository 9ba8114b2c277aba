r"""Steps that are linear in x, in recent denoiser outputs and in fresh noise.

    x_s = a x_t + sum_k b_k D_k + c z,        D_0 = D(x_t, t), and D_1, D_2, ... the outputs of earlier moves

(or with a mix u D + w eps in place of D, where that extrapolates better: see `LinearStep.output`). So a step is given by
three functions of time, and its properties follow from these scalars without a network: it is exact for a point mass if
a alpha_t + sum b = alpha_s and (a sigma_t)^2 + c^2 = sigma_s^2. Throughout, h = s - t < 0, the score is
(alpha_t D - x) / sigma_t^2, and G^2 = sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2 is the variance of the exact forward
transition from s to t.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from score_sde.checks import number, one_of
from score_sde.score import ScoreModel
from score_sde.sde import SDE
from score_sde.steps.step import Draw, Evaluate, History, Step, finite, of_times, tuples

Coefficients = tuple[Tensor, Sequence[Tensor], Tensor]
Scalar = float | Tensor
"""A number of a row; in a CUDA graph, which serves many rows, a 0-dimensional tensor on the device."""


class LinearRow(NamedTuple):
    """One move: evaluate N_0 = u D + w eps at t, (u, w) = output, then x_s = a x_t + sum_k b[k] N_k + c z."""

    t: float
    a: float
    b: tuple[float, ...]
    c: float
    output: tuple[float, float] = (1.0, 0.0)


def combine(x: Tensor, a: Scalar, b: Sequence[Scalar], outputs: Sequence[Tensor]) -> Tensor:
    """a x + sum_k b_k D_k, with a single temporary."""
    return accumulate(x * a, b, outputs)


def accumulate(x: Tensor, weights: Sequence[Scalar], outputs: Sequence[Tensor]) -> Tensor:
    """x + sum_k weights_k outputs_k, in place."""
    for weight, output in zip(weights, outputs, strict=False):
        if isinstance(weight, Tensor):
            x.addcmul_(output, weight)
        elif weight != 0.0:
            x.add_(output, alpha=weight)
    return x


def by_history(t: Tensor, s: Tensor, memory: int) -> dict[int, Tensor]:
    """The indices of the moves t[i] -> s[i] by the number of outputs that each may use: its own and those since the last
    break, `memory` at most.

    A break is a move that does not begin where the one before it ended, as after an upward move.
    """
    breaks = (t[1:] != s[:-1]).nonzero().flatten() + 1
    groups: dict[int, list[int]] = {known: [] for known in range(1, memory + 1)}
    for first, end in pairwise([0, *breaks.tolist(), len(t)]):
        for known in range(1, memory):
            groups[known] += range(first + known - 1, min(first + known, end))
        groups[memory] += range(first + memory - 1, end)
    return {known: torch.tensor(moves) for known, moves in groups.items() if moves}


class LinearStep(Step):
    """A step given by its scalar coefficients; a subclass defines `coefficients`.

    Attributes:
        memory: number of denoiser outputs that the step uses; the first moves of a run use those that exist.
        repeats: number of times that a move is carried out, each with a new network call (correctors).
    """

    takes_x = True
    memory: int = 1
    repeats: int = 1

    @abstractmethod
    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        """The scalars (a, [b_0, b_1, ...], c) of x_s = a x_t + sum_k b_k D_k + c z.

        Args:
            sde: the forward process.
            times: (k, ...) float64 times of the last k <= memory evaluations, the newest first: times[0] is t.
            s: (...) float64 times to go to. Write the formula elementwise: it is evaluated for many moves at once.
        """

    def output(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        """(u, w) of the output N = u D + w eps that the b of `coefficients` weigh and the history holds; D by default."""
        return torch.ones_like(t), torch.zeros_like(t)

    def plan(self, sde: SDE, t: Tensor, s: Tensor) -> list[LinearRow]:
        rows: dict[int, LinearRow] = {}
        u, w = (part.expand(len(t)) for part in of_times(self.output, sde, t))
        for depth, i in by_history(t, s, self.memory).items():
            times = t[i - torch.arange(depth).unsqueeze(1)]
            a, b, c = self._coefficients(sde, times, s[i])
            at, a_, c_, u_, w_, *b_ = finite(self, sde, times[0], [times[0], a, c, u[i], w[i], *b])
            table = map(LinearRow, at, a_, tuples(b_), c_, zip(u_, w_, strict=True))
            rows |= zip(i.tolist(), table, strict=True)
        return [rows[move] for move in range(len(t))]

    def _coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        """The coefficients, or a ValueError where a subclass's `coefficients` fails or returns something else."""
        given = of_times(self.coefficients, sde, times, s)
        if not isinstance(given, Sequence) or len(given) != 3:
            raise ValueError(f"{type(self).__name__}.coefficients gives three things, (a, [b_0, ...], c) of x_s = a x_t + "
                             f"sum_k b_k D_k + c z, got {len(given) if isinstance(given, Sequence) else given!r}")  # fmt: skip
        a, b, c = given
        if isinstance(b, Tensor) or len(b) > len(times):
            what = f"a tensor of shape {tuple(b.shape)}" if isinstance(b, Tensor) else f"{len(b)} of them"
            raise ValueError(f"{type(self).__name__}.coefficients gives b as a list [b_0, ...], one tensor for each output "
                             f"it uses, at most memory={self.memory}, here {len(times)}; got {what}")  # fmt: skip
        return a, b, c

    def advance(
        self, row: LinearRow, x: Tensor, history: History, evaluate: Evaluate, draw: Draw
    ) -> tuple[Tensor, History]:
        for k in range(self.repeats):
            if self.memory == 1 and row.b:  # the output is not kept, so it need not be formed
                x = evaluate(x, row.t).combine(row.a, row.b[0], *row.output)
            else:
                outputs = history
                if row.b:
                    prediction = evaluate(x, row.t)
                    x, outputs = prediction.x, (prediction.mix(*row.output), *history)
                x = combine(x, row.a, row.b, outputs)
                history = outputs[: self.memory - 1]  # the next move adds its own
            if isinstance(row.c, Tensor) or row.c != 0.0:
                x = accumulate(x, (row.c,), (draw(k),))
        return x, history


def noise_ratio(sde: SDE, t: Tensor, s: Tensor) -> Tensor:
    """G^2 / sigma_t^2 = 1 - (alpha_t sigma_s / (alpha_s sigma_t))^2, without cancellation for close times."""
    return -torch.expm1(2 * (sde.half_log_snr(t) - sde.half_log_snr(s)))


def with_score(sde: SDE, t: Tensor, of_x: Tensor, of_score: Tensor) -> tuple[Tensor, list[Tensor]]:
    """(a, [b]) with a x + b D = of_x x + of_score score."""
    variance = sde.sigma(t) ** 2
    return of_x - of_score / variance, [of_score * sde.alpha(t) / variance]


class Carry(LinearStep):
    """x_s = alpha_s / alpha_t x: the scaled variable x / alpha does not change; no network call."""

    calls = 0
    point_mass = False

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        return sde.alpha(s) / sde.alpha(times[0]), [], torch.zeros_like(s)


class Renoise(Carry):
    """x_s = alpha_s / alpha_t x + S_noise G z for s noisier than t: the exact forward transition where S_noise = 1."""

    def __init__(self, S_noise: float = 1.0) -> None:
        self.S_noise = S_noise
        self.point_mass = S_noise == 1

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        scale, std = sde.transition_kernel(times[0], s)
        return scale, [], self.S_noise * std


class EulerMaruyama(LinearStep):
    """x_s = x + h (f x - g^2 score) + g sqrt(-h) z: the reverse-time SDE by Euler-Maruyama.

    Source: Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 6 and appendix E.
    """

    point_mass = False

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        t = times[0]
        h, f, g = s - t, sde.drift(t), sde.diffusion(t)
        return *with_score(sde, t, 1 + h * f, -h * g**2), g * (-h).sqrt()


class ProbabilityFlowEuler(LinearStep):
    """x_s = x + h (f x - g^2 score / 2): the probability-flow ODE by Euler's method in time.

    Source: Song et al. 2021, eq. 13.
    """

    point_mass = False

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        t = times[0]
        h = s - t
        return *with_score(sde, t, 1 + h * sde.drift(t), -h * sde.diffusion(t) ** 2 / 2), torch.zeros_like(h)


class ReverseDiffusion(LinearStep):
    """x_s = (2 - r) x + G^2 score + G z, with r = alpha_t / alpha_s: the discretisation of the forward chain, reversed.

    r and G are those of the exact forward transition from s to t, so that this is Song et al.'s sampler for every ladder:
    r = sqrt(1 - beta_i) and G^2 = beta_i for DDPM's, r = 1 and G^2 = sigma_i^2 - sigma_{i-1}^2 for SMLD's.
    Source: Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 46 and algorithms 2, 3.
    """

    point_mass = False

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        t = times[0]
        variance = sde.sigma(t) ** 2 * noise_ratio(sde, t, s)
        return *with_score(sde, t, 2 - sde.alpha(t) / sde.alpha(s), variance), variance.sqrt()


class DDIM(LinearStep):
    """x_s = alpha_s D + sqrt(sigma_s^2 - c^2) eps + c z, with c = eta G sigma_s / sigma_t.

    eta = 0 is the exponential Euler step of the probability-flow ODE; eta = 1 is ancestral sampling, a draw of the
    posterior p(x_s | x_t, x_0 = D).
    Source: Song, Meng & Ermon 2021, https://arxiv.org/abs/2010.02502, eq. 12 and 16, for every alpha and sigma.

    Args:
        eta: share of the ancestral noise, in [0, 1].
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"DDIM eta 0.5": {"eta": 0.5}, "DDIM eta 1": {"eta": 1.0}}

    def __init__(self, eta: float = 0.0) -> None:
        if not 0 <= number("eta", eta) <= 1:
            raise ValueError(f"DDIM's eta lies in [0, 1], got {eta}")
        self.eta = float(eta)

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        t = times[0]
        sigma_s, share = sde.sigma(s), self.eta**2 * noise_ratio(sde, t, s)
        a = sigma_s / sde.sigma(t) * (1 - share).sqrt()
        return a, [sde.alpha(s) - a * sde.alpha(t)], sigma_s * share.sqrt()


class Ancestral(LinearStep):
    """A draw of the posterior p(x_s | x_t, x_0 = D) of the forward chain: DDPM's under VP, SMLD's under VE.

    x_s = r sigma_s^2 / sigma_t^2 x + alpha_s G^2 / sigma_t^2 D + c z, with r = alpha_t / alpha_s. The noise is
    c = G sigma_s / sigma_t for "posterior" (DDPM's fixed-small, exact for a point mass) and c = G for "forward" (DDPM's
    fixed-large, exact for standard normal data under VP).
    Source: Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 6, 7 and section 3.2; Song et al. 2021, appendix F.

    Args:
        variance: "posterior" or "forward".
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"Ancestral fixed-large": {"variance": "forward"}}

    def __init__(self, variance: str = "posterior") -> None:
        self.variance = one_of("Ancestral's variance", variance, ("posterior", "forward"))
        self.point_mass = variance == "posterior"

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        t = times[0]
        ratio, scale = noise_ratio(sde, t, s), sde.sigma(s) / sde.sigma(t)
        std = sde.sigma(t) * ratio.sqrt()
        c = std * scale if self.variance == "posterior" else std
        return sde.alpha(t) / sde.alpha(s) * scale**2, [sde.alpha(s) * ratio], c


NO_HEAD = (
    "LearnedVariance needs a network with a variance head: train one with network.learned_variance=true objective=hybrid, "
    "or take Ancestral(); on another SDE's path (reparameterize) a model has none"
)
"""The refusal of a model without `Prediction.variance_weight`."""


class LearnedVariance(Step):
    """A linear step whose variance the network has learnt, between the variances of two steps that differ only in these.

    x_s = a x + b N + c_small^(1 - w) c_large^w z, with the weight w = `Prediction.variance_weight` of x's shape.
    Source: Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 15.

    Args:
        small, large: linear predictors of memory 1, e.g. Ancestral() and Ancestral("forward"); a and b are `small`'s.

    Raises:
        ValueError: a step is not a linear predictor of memory 1, or adds no noise; in a sampler, the network has no
            variance head.
    """

    takes_x = True
    point_mass = False  # the variance is the network's

    def __init__(self, small: LinearStep, large: LinearStep) -> None:
        for step in (small, large):
            if not isinstance(step, LinearStep) or step.memory != 1 or step.role != "predictor":
                raise ValueError(f"LearnedVariance is between two linear predictors of memory 1, got {step!r}")
        self.small, self.large = small, large

    def plan(self, sde: SDE, t: Tensor, s: Tensor) -> list[tuple[LinearRow, float]]:
        """The rows of `small`, and log(c_large / c_small) of each."""
        pairs = list(zip(self.small.plan(sde, t, s), self.large.plan(sde, t, s), strict=True))
        if not all(small.c > 0 and large.c > 0 for small, large in pairs):
            raise ValueError(f"LearnedVariance is between steps that add noise, got {self.small!r} and {self.large!r}")
        return [(small, math.log(large.c / small.c)) for small, large in pairs]

    def check_model(self, model: ScoreModel) -> None:
        super().check_model(model)
        if model.learns_variance is False:
            raise ValueError(NO_HEAD)

    def advance(
        self, row: tuple[LinearRow, Scalar], x: Tensor, history: History, evaluate: Evaluate, draw: Draw
    ) -> tuple[Tensor, History]:
        small, log_ratio = row
        prediction = evaluate(x, small.t)
        if prediction.variance_weight is None:
            raise ValueError(NO_HEAD)
        noise = (prediction.variance_weight * log_ratio).exp().mul_(draw(0)).mul_(small.c)
        return prediction.combine(small.a, small.b[0], *small.output).add_(noise), history

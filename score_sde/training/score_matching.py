r"""Score matching without a denoising target: implicit, sliced, by finite differences, and explicit.

With n(x) = -sigma s(x), n* that of the true p_t, and x ~ p_t (clean data noised to level t), integration by parts gives

    E |n - n*|^2 = E [|n|^2 - 2 sigma tr(dn/dx)] + E |n*|^2,        E |n*|^2 = sigma^2 E |grad log p_t|^2 constant,

so the bracket, which needs only samples of p_t, has the same gradient in expectation as explicit score matching. The
loss is w(t) lambda(t) sigma^2 / alpha^2 / d times the bracket: that of denoising score matching up to a constant.
Source: Hyvarinen 2005, JMLR 6, theorem 1; Song et al. 2019, https://arxiv.org/abs/1905.07088.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from score_sde.checks import number, whole
from score_sde.data import Batch
from score_sde.networks.blocks import twice_differentiable
from score_sde.score import ClosedForm, LearnedScore
from score_sde.sde import expand
from score_sde.trace import ExactTrace, Hutchinson, Trace
from score_sde.training.draws import draw
from score_sde.training.objective import Losses, exact_noise, excess
from score_sde.training.times import Times
from score_sde.training.weighting import SimpleWeighting, Weighting

__all__ = [
    "ExplicitScoreMatching",
    "FiniteDifferenceScoreMatching",
    "ImplicitScoreMatching",
    "ScoreMatching",
    "SlicedScoreMatching",
]

Field = Callable[[Tensor], Tensor]


class ScoreMatching(ABC):
    """The weighted loss of each example; a subclass defines the bracket of the module's formula.

    Args:
        weighting: lambda, the weight of the denoiser's error, as for `DenoisingScoreMatching`.
        target: the closed-form law of the data, for the diagnostics of `objective.excess`.
    """

    def __init__(self, weighting: Weighting | None = None, target: ClosedForm | None = None) -> None:
        self.weighting, self.target = weighting or SimpleWeighting(), target

    def __call__(self, model: LearnedScore, batch: Batch, times: Times, generator: torch.Generator) -> Losses:
        """Losses in float32; noise and probes come from the generator, on the device of the batch."""
        sde, t, x0 = model.sde, times.t, batch.x
        noise = draw(torch.randn, x0.shape, generator, device=x0.device, dtype=x0.dtype)
        x = sde.perturb(x0, t, noise)
        weight = times.weight * self.weighting(sde, t) * sde.noise_level(t) ** 2
        bracket, predicted = self.bracket(lambda v: model(v, t, **batch.condition).noise, model, x, t, generator)
        loss = (weight * bracket / x0[0].numel()).float()
        return Losses(loss, excess(self.target, model, x, t, noise, predicted.detach()))

    @abstractmethod
    def bracket(
        self, field: Field, model: LearnedScore, x: Tensor, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """|n|^2 - 2 sigma tr(dn/dx) or an estimate of it, shape (batch,), and n(x), (batch, *event); `field` is x -> n(x)."""


class ImplicitScoreMatching(ScoreMatching):
    """|n|^2 - 2 sigma tr(dn/dx), with the trace exact or estimated by Rademacher probes.

    Args:
        probes: probes per sample (Hutchinson), or None for the exact trace, one product per dimension.

    Raises:
        ValueError: probes is not a whole number >= 1.
    """

    def __init__(
        self, weighting: Weighting | None = None, probes: int | None = None, target: ClosedForm | None = None
    ) -> None:
        super().__init__(weighting, target)
        self.probes = None if probes is None else whole("probes", probes)

    def bracket(
        self, field: Field, model: LearnedScore, x: Tensor, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        probes = None if self.probes is None else _rademacher(self.probes, x, generator)
        trace: Trace = ExactTrace(x.flatten(1)) if probes is None else Hutchinson(probes)
        with twice_differentiable():
            noise, pull = torch.func.vjp(field, x)  # type: ignore[misc]
        ids = torch.arange(len(x), device=x.device)
        divergence = trace(lambda v: pull(v.unflatten(1, x.shape[1:]))[0].flatten(1), ids).mean(1)
        return self.square(noise.flatten(1), probes) - 2 * model.sde.sigma(t) * divergence, noise

    def square(self, noise: Tensor, probes: Tensor | None) -> Tensor:
        """|n|^2 of n (batch, d)."""
        return noise.square().sum(1)


class SlicedScoreMatching(ImplicitScoreMatching):
    """Mean over probes v of (v^T n)^2 - 2 sigma v^T (dn/dx) v, unbiased as E v v^T = I.

    Its variance-reduced form, |n|^2 in place of (v^T n)^2, is `ImplicitScoreMatching` with probes.
    Source: Song et al. 2019, eq. 7 and 8.
    """

    def __init__(self, weighting: Weighting | None = None, probes: int = 1, target: ClosedForm | None = None) -> None:
        super().__init__(weighting, probes, target)

    def square(self, noise: Tensor, probes: Tensor | None) -> Tensor:
        assert probes is not None
        return (probes * noise).sum(2).square().mean(0)


class FiniteDifferenceScoreMatching(ScoreMatching):
    """|m|^2 - v^T (n(x + h v) - n(x - h v)) sigma / h, with h = step sigma and m the mean of n(x + h v) and n(x - h v).

    The bias is O(step^2); the network is evaluated twice, without derivatives in x. Source: Pang et al. 2020,
    https://arxiv.org/abs/2007.03317, eq. 18.

    Args:
        step: h in units of sigma(t).

    Raises:
        ValueError: step is not positive.
    """

    def __init__(self, weighting: Weighting | None = None, step: float = 0.1, target: ClosedForm | None = None) -> None:
        super().__init__(weighting, target)
        self.step = number("step", step, above=0)

    def bracket(
        self, field: Field, model: LearnedScore, x: Tensor, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        v = _rademacher(1, x, generator)[0].view_as(x)
        shift = expand(self.step * model.sde.sigma(t), x) * v
        right, left = field(x + shift), field(x - shift)
        mean = (right + left) / 2
        return mean.square().flatten(1).sum(1) - ((right - left) * v).flatten(1).sum(1) / self.step, mean


class ExplicitScoreMatching(ScoreMatching):
    """|n - n*|^2 against the exact score of a closed-form law of the data: the reference for the other objectives.

    Raises:
        ValueError: `target`, the law of the data, is not given.
    """

    def __init__(self, weighting: Weighting | None = None, target: ClosedForm | None = None) -> None:
        super().__init__(weighting, target)
        if target is None:
            raise ValueError("explicit score matching needs target, the closed-form law of the data: "
                             "take objective=simple or objective=implicit for data without one")  # fmt: skip

    def bracket(
        self, field: Field, model: LearnedScore, x: Tensor, t: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        assert self.target is not None
        noise = field(x)
        return (noise - exact_noise(self.target, model.sde, x, t)).square().flatten(1).sum(1), noise


def _rademacher(probes: int, x: Tensor, generator: torch.Generator) -> Tensor:
    """Signs (probes, batch, d), each +1 or -1."""
    shape = (probes, len(x), x[0].numel())
    bits = draw(partial(torch.randint, 0, 2), shape, generator, dim=1, device=x.device)
    return bits.to(x.dtype).mul_(2).sub_(1)

r"""Guidance by labels, contexts and classifiers.

    classifier-free:  D' = D(x; no label) + w (D(x; label) - D(x; no label))
    CFG++:            the same, renoised by eps(x; no label)
    autoguidance:     D' = D_bad + w (D - D_bad)
    classifier:       score' = score(x) + w grad log p(label | x_t)

Classifier and classifier-free guidance with w != 1 are said to target p(x) p(label | x)^w. They do so at each noise level,
but these densities are not noisy versions of one another: samples do not follow the tilted density at t = 0
(Bradley & Nakkiran 2024, https://arxiv.org/abs/2408.09000), from which `evaluation.tilted.tilted` draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from score_sde.checks import number
from score_sde.classifier import NoisyClassifier
from score_sde.copies import Copies
from score_sde.guidance.base import Renoised, check_alike, denoised, extrapolated, pushed
from score_sde.networks.blocks import twice_differentiable
from score_sde.prediction import Prediction
from score_sde.score import ScoreModel, WrappedScore, at_least_single, checked_condition, condition_names_of, subset
from score_sde.sde import Time, expand


def _check_scale(name: str, scale: float) -> None:
    if isinstance(scale, str) or not abs(scale) < float("inf"):
        raise ValueError(f"{name}'s scale is a finite number, got {scale!r}")


def _checked_interval(name: str, given: Sequence[float] | None) -> tuple[float, float] | None:
    if given is None:
        return None
    if isinstance(given, Sequence) and len(given) == 2 and not isinstance(given, str):
        low, high = (number("interval", end) for end in given)
        if 0 <= low < high:
            return low, high
    raise ValueError(f"{name}'s interval is (low, high) in noise levels sigma / alpha, 0 <= low < high, got {given}")


class _Extrapolated(WrappedScore):
    """D = D_away + scale (D_toward - D_away), within an interval of noise levels sigma / alpha."""

    renoises: ClassVar[bool] = False
    """Whether the noise eps remains that of the `away` prediction (CFG++)."""

    def __init__(
        self, model: ScoreModel, scale: float, interval: tuple[float, float] | None = None, rescale: float = 0.0
    ) -> None:
        super().__init__(model)
        name = type(self).__name__
        _check_scale(name, scale)
        if not 0 <= rescale <= 1:
            raise ValueError(f"{name}'s rescale lies in [0, 1], got {rescale}")
        self.scale, self.rescale = float(scale), float(rescale)
        self.interval = _checked_interval(name, interval)

    def _between(self, toward: Callable[[], Prediction], away: Callable[[], Prediction], t: Time) -> Prediction:
        inside = self._inside(t)
        if (self.scale == 1 and not self.renoises) or inside is False:
            return toward()
        if self.scale == 0 and inside is True and self.rescale == 0:
            return away()
        near, far = toward(), away()
        excess = self.scale - 1 if inside is True else expand((self.scale - 1) * inside.double(), near.x)
        guided = extrapolated(near, far, excess)
        guided = replace(self._rescaled(guided, near) if self.rescale else guided, calls=near.calls + far.calls)
        if not self.renoises:
            return guided
        return Renoised.of(far, guided, 1.0 if inside is True else expand(inside, near.x))

    def _calls(self, toward: ScoreModel, away: ScoreModel, t: float) -> int:
        """Network calls of `_between` at t."""
        if (self.scale == 1 and not self.renoises) or not self._inside(t):
            return toward.calls_at(t)
        alone = self.scale == 0 and self.rescale == 0
        return away.calls_at(t) + (0 if alone else toward.calls_at(t))

    def _inside(self, t: Time) -> bool | Tensor:
        """Whether guidance acts at t: a bool, or a tensor where each sample has its own time."""
        if self.interval is None:
            return True
        level = self.sde.noise_level(t)
        inside = (level > self.interval[0]) & (level <= self.interval[1])
        return inside if level.ndim or level.device.type != "cpu" else bool(inside)

    def _rescaled(self, guided: Prediction, near: Prediction) -> Prediction:
        clean = guided.denoised
        dims = tuple(range(1, clean.ndim))
        wanted, found = (v.std(dims, correction=0, keepdim=True) for v in (near.denoised, clean))
        ratio = torch.where(found > 0, wanted / found, 1.0)  # a constant D, or one of one element, has nothing to scale
        return denoised(guided, clean * (self.rescale * ratio + 1 - self.rescale))


class ClassifierFree(_Extrapolated):
    """D = D(x; negative) + scale (D(x; condition) - D(x; negative)).

    Scale 1 is the conditional model and 0 the unconditional one. Assumes: a model trained with conditions left out. Cost: two
    calls per prediction, one at scales 0 and 1 and outside `interval`; no gradient. Bias: above scale 1 samples lie farther
    out than the tilted density (`evaluation.tilted.compare_tilted`), with any number of steps.
    Source: Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, eq. 6, whose w is scale - 1.

    Args:
        model: takes the condition by name, and may be called without it.
        scale: the weight of the condition.
        interval: guide only where the noise level sigma / alpha lies in (low, high]; elsewhere D(x; condition) is used
            (Kynkäänniemi et al. 2024, https://arxiv.org/abs/2404.07724).
        rescale: fraction, in [0, 1], by which each sample's standard deviation of D is brought back to that of
            D(x; condition) (Lin et al. 2024, https://arxiv.org/abs/2305.08891, eq. 15 and 16).
        negative: the condition to move away from: a number or tensor of shape (1, ...) for all samples, or a tensor of shape
            (batch, ...), which solvers that regroup a batch refuse; by default none, the unconditional model.

    Raises:
        ValueError: an option is out of its range, or a call gives no condition.
        TypeError: the negative condition's name is unknown to the model.
    """

    def __init__(
        self, model: ScoreModel, scale: float, interval: tuple[float, float] | None = None, rescale: float = 0.0,
        negative: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(model, scale, interval, rescale)
        if not model.condition_names:
            raise ValueError("ClassifierFree guides a model towards a condition, and this model takes none")
        self.negative = dict(negative or {})
        model.check((0, *self.event_shape), self.negative)

    def check(self, shape: Sequence[int], condition: Mapping[str, Any]) -> None:
        super().check(shape, condition)
        if not condition:
            known = ", ".join(sorted(self.condition_names)) or "none"
            raise ValueError(f"ClassifierFree guides towards a condition, got none; this model accepts: {known}")
        for name, value in self.negative.items():
            if isinstance(value, Tensor) and value.ndim and len(value) not in (1, shape[0]):
                raise ValueError(f"the negative {name!r} has {len(value)} rows for {shape[0]} samples: give one for all, "
                                 "which solvers that regroup the batch (adaptive and parallel ones) require")  # fmt: skip

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        self.check(x.shape, condition)
        return self._between(lambda: self.model(x, t, **condition), lambda: self.model(x, t, **self._away(x)), t)

    def calls_at(self, t: float) -> int:
        return self._calls(self.model, self.model, t)

    def _away(self, x: Tensor) -> dict[str, Any]:
        return {name: _for_each(value, x) for name, value in self.negative.items()}


class ClassifierFreePlusPlus(ClassifierFree):
    """CFG++: D = D(x; negative) + scale (D(x; condition) - D(x; negative)), renoised by the noise of D(x; negative).

    A step goes on from x' = alpha D + sigma eps(x; negative), so that DDIM is x_s = alpha_s D + sigma_s eps(x; negative);
    other predictors renoise in the same way. For a one-step linear predictor x_s = a x_t + b D + c z that is exact for a
    point mass, it equals `ClassifierFree` with alpha_s / b times the scale, for DDIM l_t / (l_t - l_s) times,
    l = sigma / alpha: a factor that grows as moves shrink. So there is no limit of small moves, and no score: solvers that
    choose their own steps, likelihoods, parallel samplers, Langevin correctors and steps that keep their own x
    (`Step.takes_x`) are refused. Assumes and bias: as `ClassifierFree`; the authors match its scales 2 to 12.5 with 0.2
    to 1. Cost: two calls per prediction, one at scale 0 and outside `interval`.
    Source: Chung et al. 2024, https://arxiv.org/abs/2406.08070, algorithm 2.

    Args:
        model, interval, rescale, negative: as in `ClassifierFree`.
        scale: the weight lambda of the condition, in [0, 1] for an interpolation; 1 is the conditional D.

    Raises:
        ValueError: as `ClassifierFree`; or times differ within a batch, as in solvers that choose their own steps.
    """

    renoises = True

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        if isinstance(t, Tensor) and t.ndim:
            raise ValueError("ClassifierFreePlusPlus renoises at the times of a fixed grid, the same for the whole batch: use "
                             "Sampler")  # fmt: skip
        return super().__call__(x, t, **condition)


def _for_each(value: Any, x: Tensor) -> Tensor:
    """A negative condition with a row for each sample of x."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return torch.full((len(x),), value, device=x.device)
    return value.expand(len(x), *value.shape[1:])


class Autoguidance(_Extrapolated):
    """D' = D_bad + scale (D - D_bad), where the bad model is a smaller or less trained one under the same condition.

    Assumes: errors of the same kind in both, larger in the bad model. Cost: two calls per prediction, one of each model; one
    at scale 1 and outside `interval`; no gradient. Bias: it extrapolates, and no target law is known.
    Source: Karras et al. 2024, https://arxiv.org/abs/2406.02507, eq. 3.

    Args:
        model, bad_model: models of one SDE and event shape.
        scale: 1 is the model alone.
        interval, rescale: as in `ClassifierFree`.

    Raises:
        ValueError: the models differ in event shape or process, or an option is out of its range.
    """

    def __init__(
        self, model: ScoreModel, bad_model: ScoreModel, scale: float, interval: tuple[float, float] | None = None,
        rescale: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(model, scale, interval, rescale)
        check_alike(type(self).__name__, model, bad_model)
        self.bad_model = bad_model

    def check(self, shape: Sequence[int], condition: Mapping[str, Any]) -> None:
        super().check(shape, condition)
        self.bad_model.check(shape, self._of_bad(condition))

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        self.check(x.shape, condition)
        own = self._of_bad(condition)
        return self._between(lambda: self.model(x, t, **condition), lambda: self.bad_model(x, t, **own), t)

    def _of_bad(self, condition: Mapping[str, Any]) -> dict[str, Any]:
        return subset(condition, self.bad_model.condition_names)

    def calls_at(self, t: float) -> int:
        return self._calls(self.model, self.bad_model, t)


class Classifier(WrappedScore):
    """score' = score(x) + scale grad_x log p(label | x_t), by a classifier of noisy data.

    Assumes: a classifier of x_t, not of clean data. Cost: one network call and one gradient of the classifier per
    prediction. Bias: none at scale 1 with the exact p(label | x_t); else as `ClassifierFree`.
    Source: Song et al. 2021, https://arxiv.org/abs/2011.13456, section 5; Dhariwal & Nichol 2021,
    https://arxiv.org/abs/2105.05233, algorithm 1.

    Args:
        model: usually unconditional.
        log_prob: (x, t, **condition) -> log p(label | x_t) in nats, shape (batch,), independent for each sample; or a
            `NoisyClassifier`. Its named parameters beyond x and t are conditions of the guided model, besides the model's
            own.
        scale: the power of p(label | x_t).

    Raises:
        ValueError: the scale is not finite, model and classifier differ in event shape or process, or log_prob does not
            return one number per sample.
    """

    def __init__(
        self, model: ScoreModel, log_prob: Callable[..., Tensor] | NoisyClassifier, scale: float = 1.0
    ) -> None:
        super().__init__(model)
        _check_scale("Classifier", scale)
        if isinstance(log_prob, NoisyClassifier):
            check_alike(type(self).__name__, model, log_prob)
            log_prob = log_prob.log_prob
        self.log_prob, self.scale = log_prob, float(scale)
        self._classifier_names = condition_names_of(getattr(log_prob, "forward", log_prob))
        self.condition_names = model.condition_names | self._classifier_names

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        self.check(x.shape, condition)
        own, classifiers = (subset(condition, names) for names in (self.model.condition_names, self._classifier_names))
        with twice_differentiable():
            gradient = torch.func.grad(lambda v: self._checked(self.log_prob(v, t, **classifiers), len(x)).sum())(x)
        return pushed(self.model(x, t, **own), self.scale * gradient)

    def _checked(self, log_prob: Tensor, batch: int) -> Tensor:
        if log_prob.shape != (batch,):
            raise ValueError(f"Classifier's log_prob gives log p(label | x), one number per sample, shape ({batch},), got "
                             f"{tuple(log_prob.shape)}: of log-probabilities of all classes select the label's")  # fmt: skip
        return log_prob


class Conditioned(WrappedScore):
    """A model with one condition fixed for all samples, for code that calls models without conditions.

    Args:
        model: takes the conditions by name.
        condition: by name, one for all samples: a label, or a tensor without a batch dimension.

    Raises:
        TypeError: a condition's name is unknown to the model.
        ValueError: there is no condition, several labels are given, or a label is not a class of the model.
    """

    def __init__(self, model: ScoreModel, **condition: Any) -> None:
        super().__init__(model)
        self.condition = {name: torch.as_tensor(value) for name, value in condition.items()}
        if not condition or self.condition.get("label", torch.tensor(0)).ndim:
            raise ValueError(f"Conditioned binds one condition for all samples, e.g. label=3; got {condition}")
        rows = {name: value[None] for name, value in self.condition.items()}
        checked_condition(model, (1, *self.event_shape), rows, model.device)
        self.condition_names, self._copies = model.condition_names - rows.keys(), Copies(**self.condition)

    def check(self, shape: Sequence[int], condition: Mapping[str, Any]) -> None:
        ScoreModel.check(self, shape, condition)

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        self.check(x.shape, condition)
        own = {name: value.expand(len(x), *value.shape) for name, value in self._copies.like(x).items()}
        return self.model(x, t, **own, **condition)


class StaticThreshold(WrappedScore):
    """D clipped to [-limit, limit], as in DDPM's code and diffusers' `clip_sample`.

    Assumes: data in [-limit, limit]. Cost: no call of its own. Bias: none for an exact D, which lies within the data's bounds.
    Source: Saharia et al. 2022, https://arxiv.org/abs/2205.11487, section 2.3.

    Args:
        model: usually guided.
        limit: the data's bound.
    """

    def __init__(self, model: ScoreModel, limit: float = 1.0) -> None:
        super().__init__(model)
        self.limit = number("limit", limit, above=0)

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        prediction = self.model(x, t, **condition)
        return denoised(prediction, prediction.denoised.clamp(-self.limit, self.limit))


class DynamicThreshold(WrappedScore):
    """D clipped for each sample to [-s, s] and divided by s / limit, with s the larger of limit and a quantile of |D|.

    Assumes: data in [-limit, limit], under strong guidance. Cost: no call of its own. Bias: no target law is known; an exact
    D on data within the limit does not change. Source: Saharia et al. 2022, https://arxiv.org/abs/2205.11487,
    section 2.3.

    Args:
        model: usually guided.
        quantile: of |D| over one sample, in (0, 1]; 1 divides by the maximum.
        limit: the data's bound.
    """

    def __init__(self, model: ScoreModel, quantile: float = 0.995, limit: float = 1.0) -> None:
        super().__init__(model)
        if not (0 < quantile <= 1 and limit > 0):
            raise ValueError(f"DynamicThreshold takes a quantile in (0, 1] and a limit > 0, got {quantile=}, {limit=}")
        self.quantile, self.limit = float(quantile), float(limit)

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        prediction = self.model(x, t, **condition)
        clean = prediction.denoised
        if not len(clean):
            return prediction
        values = clean.flatten(1).abs().to(at_least_single(clean.dtype))
        size = expand(torch.quantile(values, self.quantile, dim=1).clamp_min(self.limit), clean)
        return denoised(prediction, torch.minimum(torch.maximum(clean, -size), size) * (self.limit / size))

r"""Guided models: score models that call another one and change its prediction.

Guidance by a likelihood adds its gradient G to the score, which moves the denoiser,

    score' = score + G    <=>    D' = D + (sigma^2 / alpha) G,

and every other view with it. The move is made in the model's own raw output, so that no digits are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from score_sde.networks.blocks import twice_differentiable
from score_sde.prediction import Prediction, scaled
from score_sde.score import ScoreModel
from score_sde.sde import Time

Pull = Callable[[Tensor], Tensor]
"""v -> J^T v for the denoiser's Jacobian J = dD / dx, each sample by itself."""


def check_alike(what: str, model: ScoreModel, other: ScoreModel) -> None:
    """Refuses, with ValueError, two models of different forward processes or event shapes; `what` is the caller's name."""
    t = torch.linspace(model.sde.t_min, model.sde.t_max, 65, dtype=torch.float64)
    kernels = [torch.stack([sde.alpha(t), sde.sigma(t)]) for sde in (model.sde, other.sde)]
    if tuple(other.event_shape) != tuple(model.event_shape):
        raise ValueError(f"{what} takes two models of one event shape, got {tuple(model.event_shape)} and "
                         f"{tuple(other.event_shape)}")  # fmt: skip
    if not torch.allclose(kernels[0], kernels[1]):
        raise ValueError(f"{what} takes two models of one process, got {model.sde!r} and {other.sde!r}: "
                         "reparameterize(model, sde) brings one to the other's process")  # fmt: skip


def moved(prediction: Prediction, by: Tensor) -> Prediction:
    """The prediction whose denoiser is D + by."""
    return replace(prediction, raw=prediction.raw + scaled(1 / prediction.c_out, by))


def pushed(prediction: Prediction, gradient: Tensor) -> Prediction:
    """The prediction whose score is score + gradient."""
    return moved(prediction, scaled(prediction.sigma**2 / prediction.alpha, gradient))


def extrapolated(near: Prediction, far: Prediction, by: Tensor | float) -> Prediction:
    """The prediction whose denoiser is D_near + by (D_near - D_far), for `by` a number or of shape (batch, 1, ..., 1)."""
    if near.x is far.x and isinstance(near.c_out, float) and (near.c_skip, near.c_out) == (far.c_skip, far.c_out):
        return replace(near, raw=near.raw + by * (near.raw - far.raw))
    return moved(near, by * (near.denoised - far.denoised))


@dataclass(frozen=True, repr=False)
class Renoised(Prediction):
    """A guided D with the noise eps of another prediction: it is for x' = alpha D + sigma eps, from which a step goes on.

    x moves at every call, however close in time two calls are, and no density has such a score. So only moves of a fixed
    grid can use it, which take x', D and eps together (`x`, `mix`, `combine`).

    Attributes:
        moved: x' again, to refuse a `replace` that puts another x in its place.
    """

    moved: Tensor | None = None

    @classmethod
    def of(cls, plain: Prediction, guided: Prediction, share: float | Tensor) -> Renoised:
        """The D of `guided`, with the noise of `plain` where `share` (broadcast with x) is 1 and its x where that is 0."""
        by = guided.denoised - plain.denoised
        x = plain.x + share * scaled(plain.alpha, by)
        raw = plain.raw + scaled(1 / plain.c_out, by) - share * scaled(plain.alpha * plain.c_skip / plain.c_out, by)
        return cls(x, raw, plain.alpha, plain.sigma, plain.c_skip, plain.c_out, guided.calls, guided.variance_weight, x)

    def __post_init__(self) -> None:
        if self.x is not self.moved:
            raise ValueError("guidance that renoises moves x: reparameterize, or observe, the model inside it instead")

    @property
    def score(self) -> Tensor:
        raise ValueError("guidance that renoises has no score: sample it by a predictor on a fixed grid (Sampler)")

    noise = velocity = score


def denoised(prediction: Prediction, clean: Tensor) -> Prediction:
    """The prediction whose denoiser is the given one."""
    return replace(prediction, raw=clean, c_skip=0.0, c_out=1.0)


def with_pull(model: ScoreModel, x: Tensor, t: Time, condition: Mapping[str, Any]) -> tuple[Prediction, Tensor, Pull]:
    """The prediction at x, its denoiser D and v -> J^T v, J = dD/dx; works under no_grad and in torch.func transforms."""
    seen: list[Prediction] = []

    def denoise(v: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(model(v, t, **condition))
        return seen[0].denoised, seen[0].raw

    with twice_differentiable():
        clean, pull, raw = torch.func.vjp(denoise, x, has_aux=True)  # type: ignore[misc]
    return replace(seen[0], x=x, raw=raw), clean, lambda v: pull(v)[0]

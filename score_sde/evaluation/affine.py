r"""The Gaussian certificate of guidance: the exact law of a sampler's output, without Monte Carlo.

On Gaussian data the denoiser D(x, t) is affine in x, and so are most guided ones. Each move of a sampler then is, too,

    x_s = f_i + F_i x_t + G_i z,    m <- f_i + F_i m,    C <- F_i C F_i^T + G_i G_i^T,

and its samples have the law N(m, C), which is compared with the exact posterior. f, F and G are found by running the move
on basis vectors, so the step and the method need to be affine, and nothing else.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from score_sde import grid as grids
from score_sde.evaluation.metrics import squared_w2_of_gaussians
from score_sde.sampler import Sampler
from score_sde.score import ScoreModel
from score_sde.targets import GaussianMixture

__all__ = ["Law", "bias", "sampled_law"]


class Law(NamedTuple):
    """N(mean, covariance), float64."""

    mean: Tensor
    covariance: Tensor

    def then(self, out: Tensor) -> Law:
        """The law after an affine map; the rows of `out` are its values at x = 0, at each unit x, and at each unit noise."""
        size = len(self.mean)
        offset = out[0]
        move, noise = (out[1 : size + 1] - offset).T, (out[size + 1 :] - offset).T
        return Law(offset + move @ self.mean, move @ self.covariance @ move.T + noise @ noise.T)


@torch.no_grad()
def sampled_law(sampler: Sampler, model: ScoreModel) -> Law:
    """The law of a sampler's output for a model that is affine in x.

    Args:
        sampler: its steps keep no history and draw noise at most once per move.
        model: of event shape (d,).

    Raises:
        ValueError: a step keeps a history or draws twice, or the output is not affine in x.
    """
    # A move is run on the rows x = 0 without noise, each unit x without noise, and each unit noise at x = 0. One more row, of
    # random x and noise, must come out as the combination of these: else the move is not affine.
    (size,) = model.event_shape
    unit, nothing = torch.eye(size, dtype=torch.float64), torch.zeros(1 + size, size, dtype=torch.float64)
    x, z = torch.cat([nothing[:1], unit, nothing[1:]]), torch.cat([nothing, unit])
    anywhere = torch.randn(2, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    times = grids.check(sampler.grid(model.sde), model.sde)
    law = Law(torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64))
    law = law.then(model.start_at(z, times[0].item()))
    _check_affine(model, x, times[len(times) // 2].item())

    def draw(k: int) -> Tensor:
        if k > 0:
            raise ValueError(f"the law is followed through one noise draw per move, {sampler.predictor!r} takes more")
        return torch.cat([z, anywhere[1:]])

    for move in sampler.plan(model.sde, times):
        out, history = move.step.advance(move.row, torch.cat([x, anywhere[:1]]), (), model, draw)
        out, other = out[:-1], out[-1]
        if history and getattr(move.step, "memory", 1) > 1:
            raise ValueError(f"the law is followed through steps without history, got {move.step!r}")
        if not torch.allclose(other, out[0] + anywhere.flatten() @ (out[1:] - out[0]), rtol=1e-6, atol=1e-9):
            raise ValueError(f"{move.step!r} is not affine in x and noise, so its samples are not Gaussian")
        law = law.then(out)
    return law.then(model(x, times[-1].item()).denoised) if sampler.final == "denoise" else law


def _check_affine(model: ScoreModel, x: Tensor, t: float) -> None:
    near, far = model(x, t).denoised, model(3 * x, t).denoised
    if not torch.allclose(far - far[:1], 3 * (near - near[:1]), rtol=1e-6, atol=1e-9):
        raise ValueError(f"{model!r} is not affine in x, so its samples are not Gaussian")


def bias(law: Law, posterior: GaussianMixture) -> pd.Series:
    """How far a law lies from a Gaussian posterior N(m, C), in units of sqrt(tr C).

    Returns:
        `mean`, |m' - m|; `spread`, sqrt(tr C' / tr C) - 1; `w2`, the 2-Wasserstein distance of the two Gaussians.
    """
    mean, covariance = posterior.means[0], posterior.covariances[0]
    scale = math.sqrt(covariance.trace().item())
    return pd.Series({
        "mean": (law.mean - mean).norm().item() / scale,
        "spread": math.sqrt(law.covariance.trace().item()) / scale - 1,
        "w2": math.sqrt(squared_w2_of_gaussians(*law, mean, covariance)) / scale,
    })  # fmt: skip

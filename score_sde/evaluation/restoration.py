r"""Restored images against the true ones:

    PSNR = 10 log10(width^2 / mean (x - y)^2),
    SSIM = mean over windows of (2 m_x m_y + c_1) (2 c_xy + c_2) / ((m_x^2 + m_y^2 + c_1) (v_x + v_y + c_2)),

with local means m, variances v and covariance c_xy. A draw of the posterior has a lower PSNR than the posterior's mean
(by 3 dB if the posterior is exact), so the table has both.
Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861, eq. 13 with K_1 = 0.01 and K_2 = 0.03.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from score_sde.checks import wholes
from score_sde.evaluation.budgets import SamplerLike
from score_sde.evaluation.metrics import frechet_distance
from score_sde.evaluation.posterior import KNOWING, METHODS, SAMPLERS, SOLVERS, Method, Solver
from score_sde.guidance import MMPS, LinearOperator
from score_sde.noise import SampleNoise
from score_sde.progress import tqdm
from score_sde.score import ScoreModel
from score_sde.solver import SampleResult

__all__ = ["COLUMNS", "LEARNED", "OWN", "Restoration", "compare_restorations", "psnr", "ssim"]

COLUMNS = ["method", "sampler", "budget", "seed", "nfe", "seconds", "psnr", "psnr_of_mean", "ssim", "misfit",
           "feature_distance", "error"]  # fmt: skip


LEARNED: dict[str, Method] = {name: make for name, make in METHODS.items() if name not in KNOWING} | {
    "mmps": lambda case: MMPS(case.model, case.operator, case.y, case.noise_std, 3)
}
"""The methods for learned models, with few iterations of MMPS."""

OWN: dict[str, Solver] = {name: make for name, make in SOLVERS.items() if name != "tds"}
"""The solvers for learned models: all but the particle filter, which takes a single observation."""


def psnr(x: Tensor, reference: Tensor, width: float = 2.0) -> float:
    """Peak signal-to-noise ratio in dB, averaged over images.

    Args:
        x, reference: (n, *event_shape).
        width: width of the range of values.

    Raises:
        ValueError: the shapes differ.
    """
    x, reference = _pair(x, reference)
    error = (x - reference).square().flatten(1).mean(1)
    return (10 * (width**2 / error).log10()).mean().item()


def ssim(x: Tensor, reference: Tensor, width: float = 2.0, window: int | None = None) -> float:
    """Structural similarity, in [-1, 1], averaged over images, channels and positions of the window.

    Args:
        x, reference: (n, channels, height, width).
        width: width of the range of values.
        window: odd side of the Gaussian window of standard deviation 1.5; by default 11, or the largest that fits.

    Raises:
        ValueError: the shapes differ, or are not those of images that the window fits into.
    """
    x, reference = _pair(x, reference)
    if x.ndim != 4:
        raise ValueError(f"images have shape (n, channels, height, width), got {tuple(x.shape)}")
    side = min(x.shape[2:])
    window = min(11, side - (side + 1) % 2) if window is None else window
    if not 1 <= window <= side or window % 2 == 0:
        raise ValueError(f"the window's side is odd and at most {side}, got {window}")
    places = torch.arange(window, dtype=torch.float64) - window // 2
    bell = (-(places**2) / (2 * 1.5**2)).exp()
    kernel = torch.outer(bell, bell)[None, None] / bell.sum() ** 2

    def mean(v: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(v.flatten(0, 1)[:, None], kernel.to(v))

    m_x, m_y = mean(x), mean(reference)
    v_x, v_y, c_xy = mean(x**2) - m_x**2, mean(reference**2) - m_y**2, mean(x * reference) - m_x * m_y
    c_1, c_2 = (0.01 * width) ** 2, (0.03 * width) ** 2
    map_ = (2 * m_x * m_y + c_1) * (2 * c_xy + c_2) / ((m_x**2 + m_y**2 + c_1) * (v_x + v_y + c_2))
    return map_.mean().item()


def _pair(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != reference.shape:
        raise ValueError(f"images to compare have one shape, got {tuple(x.shape)} and {tuple(reference.shape)}")
    return x.detach().cpu().double(), reference.detach().cpu().double()


@dataclass(frozen=True)
class Restoration:
    """True images and their observations.

    Attributes:
        model: a model of such images.
        truth: (n, *event_shape), the true images, hidden from the methods.
        operator: linear.
        noise_std: standard deviation of the observation's noise.
        observed: (n, *output_shape), the observations.
        draws: number of posterior draws per observation.
        data_std: spread of such images about their mean, as `data.measure_data_std` measures it; by default the model's.
    """

    model: ScoreModel
    truth: Tensor
    operator: LinearOperator
    noise_std: float
    observed: Tensor
    draws: int = 2
    data_std: float | None = None

    @property
    def y(self) -> Tensor:
        """The observation of each draw, shape (n draws, *output_shape)."""
        return self.observed.repeat_interleave(self.draws, 0).to(self.model.device)


def compare_restorations(
    case: Restoration, budgets: Sequence[int], *, methods: Mapping[str, Method] | None = None,
    samplers: Mapping[str, Callable[[int], SamplerLike]] | None = None, solvers: Mapping[str, Solver] | None = None,
    seeds: Sequence[int] = (0,), features: Callable[[Tensor], Tensor] | None = None, progress: bool = True,
    on_result: Callable[[str, str, int, Tensor], None] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Compares every method with every sampler, and every solver, at every budget, with the true images.

    Args:
        case: true images and their observations.
        budgets: numbers of steps.
        methods, samplers, solvers: by default `LEARNED`, `posterior.SAMPLERS` and `OWN`.
        seeds: of the samplers.
        features: (n, *event_shape) -> (n, F), for a Fréchet distance between restored and true images.
        progress: shows a bar if it takes long.
        on_result: called with method, sampler, budget and the draws (n, draws, *event_shape) of the first seed.

    Returns:
        A row for each run with the columns `COLUMNS`: PSNR of the draws and of their mean in dB, SSIM of the draws,
        `misfit`, the root mean square of y - A x in units of noise_std (1 for the truth), and `error`, the reason why a run
        was refused or diverged. The first row is the pseudo-inverse A^+ y, which is not a draw and costs no network call.
    """
    budgets, seeds = wholes("budgets", budgets), wholes("seeds", seeds, 0)
    chosen = SAMPLERS if samplers is None else samplers
    runs: list[tuple[str, str, Callable[[int], SamplerLike], Callable[[], ScoreModel]]] = [
        (name, label, make, partial(method, case))
        for name, method in (LEARNED if methods is None else methods).items() for label, make in chosen.items()
    ]  # fmt: skip
    for name, solver in (OWN if solvers is None else solvers).items():
        runs.append((name, "own", partial(solver, case), lambda: case.model))
    plain = case.operator.pseudo_inverse(case.observed).unsqueeze(1)
    rows = [{"method": "pseudo-inverse", "sampler": "none", "budget": 0, "seed": 0, "nfe": 0, "seconds": 0.0}
            | _figures(case, plain, features)]  # fmt: skip
    cells = [(run, budget, seed) for run in runs for budget in budgets for seed in seeds]
    for (name, label, make, guide), budget, seed in tqdm(cells, desc="restoring", delay=2, disable=not progress):
        row = {"method": name, "sampler": label, "budget": budget, "seed": seed}
        try:
            result = _drawn(case, make(budget), guide(), seed)
        except Exception as failure:  # a method that fails must not lose the rows of the others
            rows.append(row | {"error": f"{type(failure).__name__}: {failure}"})
            continue
        x = result.x.unflatten(0, (len(case.truth), case.draws)).cpu()
        rows.append(row | {"nfe": result.nfe, "seconds": result.seconds} | _figures(case, x, features))
        if on_result is not None and seed == seeds[0]:
            on_result(name, label, budget, x)
    return pd.DataFrame(rows, columns=COLUMNS)


def _drawn(case: Restoration, sampler: Any, model: ScoreModel, seed: int) -> SampleResult:
    count = len(case.truth) * case.draws
    return sampler.sample(model, (count, *case.model.event_shape), noise=SampleNoise.of_run(seed, range(count)))


def _figures(case: Restoration, x: Tensor, features: Callable[[Tensor], Tensor] | None) -> dict[str, Any]:
    """The figures of draws (n, draws, *event_shape)."""
    flat, truth = x.flatten(0, 1), case.truth.repeat_interleave(x.shape[1], 0)
    if not flat.isfinite().all():
        return {"error": "diverged: values that are not finite"}
    misfit = (case.operator(flat) - case.observed.repeat_interleave(x.shape[1], 0)).double().square().mean().sqrt()
    found = {"psnr": psnr(flat, truth), "psnr_of_mean": psnr(x.mean(1), case.truth), "error": ""}
    found["ssim"] = ssim(flat, truth) if truth.ndim == 4 else math.nan
    found["misfit"] = misfit.item() / case.noise_std if case.noise_std else math.nan
    found["feature_distance"] = math.nan if features is None else frechet_distance(features(flat), features(case.truth))
    return found

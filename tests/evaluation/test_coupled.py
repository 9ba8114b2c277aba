"""Distances to the converged solution from the same starting points, against closed forms."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from score_sde import VPSDE, ExactScore, targets
from score_sde.evaluation.coupled import (
    Course,
    best_of_each,
    coupled_energy,
    course_table,
    endpoint_error,
    endpoint_median,
)
from score_sde.evaluation.metrics import mode_spread
from score_sde.tuning import untuned


def normal(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_endpoint_errors_are_in_standard_deviations_of_the_converged_samples() -> None:
    y = 3 * normal(4001, 0)
    y = 3 * (y - y.mean()) / y.std(correction=0)
    x = y.clone()
    x[:1000] += 6.0
    assert endpoint_error(x, y) == pytest.approx(2 * math.sqrt(1000 / 4001))
    assert endpoint_median(x, y) == 0
    assert endpoint_median(y + 1.5, y) == pytest.approx(0.5)


@pytest.mark.parametrize("shift", [0.2, 1.0])
def test_coupled_energy_is_that_of_the_laws_though_the_samples_are_paired(shift: float) -> None:
    """E|N(m, 2)| = 2 / sqrt(pi) e^{-m^2/4} + m erf(m / 2). Coupled by a shift, it has a hundredth of the noise of
    independent draws; pairs i = i, which are not independent, would bring the estimate down."""
    y = normal(3000, 1)
    expected = 2 * (2 / math.sqrt(math.pi) * (math.exp(-(shift**2) / 4) - 1) + shift * math.erf(shift / 2))
    assert coupled_energy(y + shift, y) ** 2 == pytest.approx(expected, rel=0.03)
    assert coupled_energy(y, y) < 1e-6


def test_a_course_measures_every_solver_beside_the_converged_one() -> None:
    model = ExactScore(targets.make("ring", components=3, radius=2.0), VPSDE())
    course = Course(model, model.target, num_samples=200, seeds=(0, 1), progress=False)
    coarse = untuned(model.sde, 3)["velocity Adams 2 on rectified"]
    table = course_table(course, {("tuned", 3): coarse}, progress=False)
    best = best_of_each(table).set_index(["kind", "calls"])
    assert best.loc[("converged", 0), "endpoint"] == 0
    assert best.loc[("untuned", 6), "endpoint"] < best.loc[("untuned", 3), "endpoint"]
    assert best.loc[("untuned", 3), "endpoint"] <= best.loc[("tuned", 3), "endpoint"] + 1e-12
    assert set(table["seed"]) == {0, 1}
    everything = mode_spread(torch.cat([*course.ends.values()]), model.target).max().item()
    assert best.loc[("converged", 0), "spread_max"] == pytest.approx(everything)  # not the mean of two seeds' largest
    assert isinstance(table, pd.DataFrame)


def test_what_is_no_course_is_refused() -> None:
    model = ExactScore(targets.ring(), VPSDE())
    with pytest.raises(ValueError, match="num_samples >= 2"):
        Course(model, num_samples=1)


def test_the_targets_in_many_dimensions() -> None:
    mixture = targets.anisotropic(components=3, dimension=6, stds=(0.1, 0.4), seed=1)
    stds = torch.linalg.eigvalsh(mixture.covariances).sqrt()
    assert mixture.event_shape == (6,)
    assert 0.1 < stds.min() < stds.max() < 0.4
    digits = targets.digits()
    assert digits.data.shape == (1797, 1, 8, 8)
    assert (digits.data.min(), digits.data.max()) == (-1, 1)

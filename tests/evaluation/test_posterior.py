"""The comparison of posterior samplers: exact methods reach the floor, biased ones show it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from score_sde import grid
from score_sde.evaluation.posterior import (
    METHODS,
    SAMPLERS,
    compare_posteriors,
    field_mixture,
    gaussian_problem,
    image_problem,
    ring_problem,
)
from score_sde.guidance import TwistedParticles
from score_sde.sde import VPSDE

SDE = VPSDE()


def ratios(problem, methods, steps=100, sampler="adams2", solvers=None, seeds=(0, 1)):
    table = compare_posteriors(
        problem, [steps], methods={name: METHODS[name] for name in methods}, samplers={sampler: SAMPLERS[sampler]},
        solvers=solvers or {}, num_samples=1000, seeds=seeds, progress=False,
    )  # fmt: skip
    assert (table["error"] == "").all()
    return table.groupby("method")["ratio"].mean()


@pytest.mark.parametrize("dimensions", [2, 64])
def test_pigdm_and_mmps_are_exact_on_a_single_gaussian(dimensions):
    methods = ["exact", "pigdm", "mmps", "replacement", "prior"]
    ratio = ratios(gaussian_problem(SDE, dimensions), methods, 40, seeds=(0,))
    assert ratio[["exact", "pigdm", "mmps"]].max() < 2
    assert ratio["pigdm"] == pytest.approx(ratio["exact"], rel=0.02)
    assert ratio["mmps"] == pytest.approx(ratio["exact"], rel=0.02)
    assert ratio["prior"] > 5
    if dimensions == 64:
        assert ratio["replacement"] > 3


def test_on_a_ring_guidance_is_biased_and_particles_are_not():
    def particles(problem, steps):
        p = problem
        times = partial(grid.log_snr, steps=steps)
        cloud = {"data_std": p.prior.std, "particles": 10_000}
        return TwistedParticles(times, p.operator, p.y, p.noise_std, **cloud)

    ratio = ratios(ring_problem(SDE), ["exact", "pigdm", "dps", "replacement", "prior"], 60, solvers={"tds": particles})
    assert ratio["exact"] < 1.5
    assert ratio["tds"] < 1.5
    assert ratio[["dps", "replacement"]].min() > 1.6
    assert ratio["prior"] > 3


@pytest.mark.parametrize("task", ["inpaint", "superres", "deblur"])
def test_image_problems_are_observed_where_they_say(task):
    problem = image_problem(SDE, task)
    assert problem.prior.event_shape == (64,)
    draws = problem.posterior.sample((500,), generator=torch.Generator().manual_seed(0)).double()
    residual = (problem.operator(draws) - problem.y).square().mean().sqrt()
    assert residual < 2 * problem.noise_std
    assert problem.posterior.std < 0.8 * problem.prior.std


def test_fields_have_the_stated_spread():
    mixture = field_mixture((3, 4, 4))
    assert mixture.covariances[0].diagonal().mean() == pytest.approx(0.17)
    assert mixture.covariances[0][0, 16] == pytest.approx(0.08)
    assert image_problem(SDE, "colorize", (3, 4, 4)).operator.output_shape == (16,)

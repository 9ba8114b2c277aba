"""Heun against EDM's algorithm box."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from closed_forms import F64, mixture

from score_sde import grid
from score_sde.sampler import Sampler
from score_sde.score import ExactScore
from score_sde.sde import VPSDE, KarrasSDE
from score_sde.steps import DPMSolverSDE, Heun
from score_sde.targets import make


def edm(denoise, x, sigmas):
    """Karras et al. 2022, algorithm 1, with sigma(t) = t, s(t) = 1; the last step is to zero."""
    calls = 0
    for here, there in itertools.pairwise(sigmas):
        d = (x - denoise(x, here)) / here
        calls += 1
        step = x + (there - here) * d
        if there > 0:
            d_next = (step - denoise(step, there)) / there
            calls += 1
            step = x + (there - here) * (d + d_next) / 2
        x = step
    return x, calls


def test_heun_on_the_karras_grid_is_edms_sampler_call_for_call():
    target, sde, levels = make("ring"), KarrasSDE(), 18
    x = 80 * torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(Heun(), functools.partial(grid.karras, steps=levels - 1))
    run = sampler.sample(ExactScore(target, sde), (6, 2), x_init=x)
    sigmas = [*grid.karras(sde, levels - 1).tolist(), 0.0]
    expected, calls = edm(lambda v, sigma: target.denoise(v, 1.0, sigma), x, sigmas)
    torch.testing.assert_close(run.x, expected, rtol=1e-9, atol=1e-9)
    assert run.nfe == calls == 2 * levels - 1


def test_heun_does_the_same_in_every_sdes_own_variable():
    """On VP at the same noise levels, x / alpha takes the same path."""
    target, vp, edm_sde = mixture(), VPSDE(), KarrasSDE()
    levels = torch.tensor([100.0, 30.0, 8.0, 2.0, 0.6, 0.1], dtype=F64).clamp(max=80.0)
    y = 80 * torch.linspace(-2, 2, 7, dtype=F64)[:, None]
    times = vp.time_at(-levels.log())
    runs = [
        Sampler(Heun(), lambda _, times=t: times, final="none").sample(
            ExactScore(target, sde), (7, 1), x_init=y * sde.alpha(t[0])
        )
        for sde, t in ((edm_sde, levels), (vp, times))
    ]
    torch.testing.assert_close(runs[1].x / vp.alpha(times[-1]), runs[0].x, rtol=1e-9, atol=1e-9)


def test_stages_without_finite_coefficients_are_refused_with_the_first_such_time():
    t, s = torch.tensor([0.9, 0.5, 0.3], dtype=F64), torch.tensor([0.8, 0.6, 0.4], dtype=F64)
    with pytest.raises(ValueError, match=r"DPMSolverSDE has no finite coefficients at t=0\.5 of VPSDE"):
        DPMSolverSDE().plan(VPSDE(), t, s)

"""The Gaussian certificate of guidance against simulation and closed forms."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from score_sde import grid
from score_sde.evaluation.affine import Law, bias, sampled_law
from score_sde.evaluation.posterior import METHODS, SAMPLERS, SOLVERS, certify_guidance, gaussian_problem, ring_problem
from score_sde.sampler import Sampler
from score_sde.score import ExactScore
from score_sde.sde import VPSDE
from score_sde.steps import Ancestral, ExponentialAdams, LangevinCorrector, UnadjustedLangevin
from score_sde.targets import GaussianMixture

PROBLEM = gaussian_problem(VPSDE(), 3, correlated=True)


@pytest.mark.parametrize("name", ["dps", "replacement", "ddrm", "repaint"])
def test_the_law_is_that_of_many_samples(name):
    own = name in SOLVERS
    sampler = SOLVERS[name](PROBLEM, 20) if own else Sampler(Ancestral(), partial(grid.log_snr, steps=20))
    model = PROBLEM.model if own else METHODS[name](PROBLEM)
    law = sampled_law(sampler, model)
    x = sampler.sample(model, (20_000, 3), seed=0).x.double()
    spread = law.covariance.diagonal().sqrt()
    assert ((x.mean(0) - law.mean).abs() < 4.5 * spread / 20_000**0.5 + 1e-5).all()  # false alarm 1e-5
    # An entry of a sample covariance has variance (C_ij^2 + C_ii C_jj) / n.
    error = (law.covariance**2 + torch.outer(spread**2, spread**2)).sqrt() / 20_000**0.5
    assert ((torch.cov(x.T) - law.covariance).abs() < 4.5 * error + 1e-5).all()


def test_mmps_and_the_posterior_s_own_score_are_exact_in_the_limit_and_the_others_are_not():
    fine = certify_guidance(PROBLEM, 400).set_index(["method", "sampler"])["w2"]
    coarse = certify_guidance(PROBLEM, 100, {name: METHODS[name] for name in ("exact", "mmps")})["w2"]
    assert fine["exact", "ddim"] == pytest.approx(coarse[0] / 4, rel=0.1)  # DDIM is of first order
    for sampler in ("ddim", "ancestral"):
        # What they differ by is the start, which knows nothing of y.
        assert fine["mmps", sampler] == pytest.approx(fine["exact", sampler], rel=0.3)
        assert fine["exact", sampler] < 0.015
        for biased in ("replacement", "diffpir", "dps", "dps zeta=0.1"):
            assert fine[biased, sampler] > 2 * fine["exact", sampler], biased
    assert fine["pigdm", "ddim"] > 2 * fine["exact", "ddim"]
    assert fine[["ddrm", "repaint"]].min() > 0.05
    isotropic = certify_guidance(gaussian_problem(VPSDE(), 3), 400, {"pigdm": METHODS["pigdm"]})["w2"]
    assert isotropic.max() < 0.015


def test_bias_by_hand():
    posterior = GaussianMixture([1.0], [[1.0, 0.0]], torch.diag(torch.tensor([4.0, 1.0]))[None])
    law = Law(torch.tensor([1.0, 2.0], dtype=torch.float64), torch.diag(torch.tensor([1.0, 1.0], dtype=torch.float64)))
    found = bias(law, posterior)
    assert found["mean"] == pytest.approx(2 / 5**0.5)
    assert found["spread"] == pytest.approx((2 / 5) ** 0.5 - 1)
    assert found["w2"] == pytest.approx((4 + 1) ** 0.5 / 5**0.5)  # standard deviations 2 and 1 differ by one


def test_refusals():
    ring = ring_problem(VPSDE())
    with pytest.raises(ValueError, match="is not affine in x"):
        sampled_law(SAMPLERS["ddim"](5), ring.model)
    gaussian = ExactScore(PROBLEM.prior, VPSDE())
    for corrector in (LangevinCorrector(norm="sample"), UnadjustedLangevin(adapt=True)):
        sampler = Sampler(Ancestral(), partial(grid.log_snr, steps=5), corrector=corrector)
        with pytest.raises(ValueError, match="is not affine in x and noise"):
            sampled_law(sampler, gaussian)
    sampled_law(Sampler(Ancestral(), partial(grid.log_snr, steps=5), LangevinCorrector(norm="expected")), gaussian)
    with pytest.raises(ValueError, match="steps without history"):
        sampled_law(Sampler(ExponentialAdams(2), partial(grid.log_snr, steps=5)), gaussian)

"""Tilted densities and labelled mixtures against their closed forms; what guidance by labels misses."""

from __future__ import annotations

import math

import pytest
import torch

from score_sde.evaluation.posterior import SAMPLERS
from score_sde.evaluation.tilted import LabelledMixture, compare_tilted, component, tilted
from score_sde.sde import VPSDE
from score_sde.targets import GaussianMixture, ring

SDE = VPSDE()


def test_tilted_draws_have_the_moments_of_the_closed_form():
    # N(0, 1) and N(1, 1/2): p^(1 - w) q^w has precision 1 - w + 2 w and mean 2 w / precision.
    eye = torch.eye(2)[None]
    whole, part = GaussianMixture([1.0], [[0.0, 0.0]], eye), GaussianMixture([1.0], [[1.0, 0.0]], eye / 2)
    for scale in (0.0, 1.0, 3.0):
        x = tilted(whole, part, scale, 40_000, generator=torch.Generator().manual_seed(0))
        precision = 1 + scale
        assert x[:, 0].mean().item() == pytest.approx(2 * scale / precision, abs=4.5 / math.sqrt(40_000 * precision))
        assert x.var(0).mul(precision).sub(1).abs().max() < 4.5 * math.sqrt(2 / 40_000)


def test_tilted_draws_lie_where_the_laws_do_or_are_refused():
    far = GaussianMixture([0.5, 0.5], [[15.0, 0.0], [-15.0, 0.0]], torch.eye(2).expand(2, 2, 2) / 4)
    x = tilted(far, component(far, 0), 1.0, 20_000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.mean(0), torch.tensor([15.0, 0.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(x.std(0), torch.tensor([0.5, 0.5]), atol=0.02, rtol=0)
    table = compare_tilted(far, 0, [1.0], SAMPLERS["adams2"](60), SDE, num_samples=2000)
    assert table["ratio"].item() < 2
    thin = GaussianMixture([0.5, 0.5], [[1.0, 0.0], [-1.0, 0.0]], torch.eye(2).expand(2, 2, 2) / 1e4)
    with pytest.raises(ValueError, match=r"and at most 0.5 is allowed: give side=\d+") as refusal:
        tilted(thin, component(thin, 0), 1.0, 10, generator=torch.Generator().manual_seed(0), side=201)
    side = int(str(refusal.value).rpartition("=")[2])
    x = tilted(thin, component(thin, 0), 1.0, 20_000, generator=torch.Generator().manual_seed(0), side=side)
    torch.testing.assert_close(x.std(0), torch.tensor([0.01, 0.01]), atol=4e-4, rtol=0)
    apart = GaussianMixture([1.0], [[0.5, 0.0]], torch.eye(2)[None])
    with pytest.raises(ValueError, match="reaches beyond the region of its two laws"):
        tilted(apart, GaussianMixture([1.0], [[1.5, 0.0]], torch.eye(2)[None]), 30.0, 10, generator=torch.Generator())


def test_guidance_misses_the_tilted_density_except_at_scales_zero_and_one():
    target = ring(3, 2.0, 0.8)
    table = compare_tilted(target, 0, [0.0, 1.0, 3.0], SAMPLERS["adams2"](60), SDE, num_samples=3000).set_index("scale")
    assert table.loc[[0.0, 1.0], "ratio"].max() < 2
    assert table.loc[3.0, "ratio"] > 2.5


def test_labelled_mixture_is_its_parts():
    target = ring(3, 2.0, 0.6)
    model, x = LabelledMixture(target, SDE), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    got = model(x, 0.3, label=torch.tensor([2, 0, 1])).denoised
    alpha, sigma = float(SDE.alpha(0.3)), float(SDE.sigma(0.3))
    for row, k in enumerate((2, 0, 1)):
        torch.testing.assert_close(got[row : row + 1], component(target, k).denoise(x[row : row + 1], alpha, sigma))
    with pytest.raises(ValueError, match="label is an integer from 0 to 2"):
        model(x, 0.3, label=torch.tensor([0, 1, 3]))

"""`GaussianMixture.condition` against Bayes' rule on a grid, conjugate formulas and rejection sampling."""

from __future__ import annotations

import pytest
import torch

from score_sde.guidance.operators import Mask, Matrix
from score_sde.targets import GaussianMixture, make


def mixture(dimensions=3, components=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(components, dimensions, generator=g)
    roots = torch.randn(components, dimensions, dimensions, generator=g, dtype=torch.float64) / 2
    return GaussianMixture(torch.rand(components, generator=g) + 0.1, means, roots @ roots.mT)


def test_bayes_rule_holds_pointwise():
    prior, operator, std = mixture(), Matrix(torch.randn(2, 3, generator=torch.Generator().manual_seed(1))), 0.3
    y = torch.tensor([0.5, -1.0], dtype=torch.float64)
    posterior = prior.condition(operator, y, std)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    log_likelihood = -((operator(x) - y) ** 2).sum(1) / (2 * std**2)
    evidence = prior.log_prob(x) + log_likelihood - posterior.log_prob(x)  # the same at every x
    torch.testing.assert_close(evidence, evidence[:1].expand(50), rtol=0, atol=1e-9)


def test_without_noise_the_observation_is_met_and_the_rest_is_the_conditional_law():
    prior, y = mixture(2), torch.tensor([0.4], dtype=torch.float64)
    posterior = prior.condition(Mask((2,), torch.tensor([True, False])), y)
    draws = posterior.sample((1000,), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws[:, 0], torch.full((1000,), 0.4), rtol=0, atol=1e-6)
    line = torch.linspace(-12, 12, 20001, dtype=torch.float64)
    density = prior.log_prob(torch.stack([torch.full_like(line, 0.4), line], 1)).softmax(0)
    torch.testing.assert_close(posterior.mean[1], (density * line).sum(), rtol=1e-9, atol=1e-9)
    spread = (density * (line - posterior.mean[1]) ** 2).sum()
    torch.testing.assert_close(torch.tensor(posterior.std**2 * 2, dtype=torch.float64), spread, rtol=1e-6, atol=1e-9)


def test_no_noise_is_the_limit_of_little_noise_even_where_rows_repeat():
    prior = mixture()
    operator = Matrix([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    y = torch.tensor([0.5, 0.5, -1.0], dtype=torch.float64)
    limit, near = prior.condition(operator, y), prior.condition(operator, y, 1e-5)
    for name in ("weights", "means", "covariances"):
        torch.testing.assert_close(getattr(limit, name), getattr(near, name), rtol=1e-6, atol=1e-6)


def test_a_component_of_no_width_is_found_by_its_place():
    flat = torch.diag(torch.tensor([0.0, 1.0]))
    prior = GaussianMixture([0.9, 0.1], [[-1.0, 0.0], [1.0, 5.0]], torch.stack([flat, flat]))
    posterior = prior.condition(Mask((2,), torch.tensor([True, False])), [1.0])
    assert posterior.weights[1] == pytest.approx(1)
    torch.testing.assert_close(posterior.mean, torch.tensor([1.0, 5.0], dtype=torch.float64))


def test_much_noise_changes_nothing_and_observing_twice_is_observing_both():
    prior, seen = mixture(), Matrix(torch.eye(3))
    y = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    vague = prior.condition(seen, y, 1e4)
    torch.testing.assert_close(vague.means, prior.means, rtol=0, atol=1e-6)
    torch.testing.assert_close(vague.weights, prior.weights, rtol=0, atol=1e-6)
    first, rest = Matrix([[1.0, 0.0, 0.0]]), Matrix([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    twice = prior.condition(first, y[:1], 0.5).condition(rest, y[1:], 0.5)
    both = prior.condition(seen, y, 0.5)
    torch.testing.assert_close(twice.mean, both.mean)
    torch.testing.assert_close(twice.covariances, both.covariances)


@pytest.mark.parametrize(
    ("operator", "y", "noise_std", "message"),
    [
        (Matrix(torch.eye(3)), [0.0, 0.0, 0.0], 0.1, "events have shape (2,)"),
        (Matrix(torch.ones(1, 2)), [0.0, 0.0], 0.1, "one observation y has shape (1,), got (2,)"),
        (Matrix(torch.ones(1, 2)), [0.0], -1.0, "noise_std is a standard deviation >= 0, got -1.0"),
    ],
)
def test_refusals(operator, y, noise_std, message):
    with pytest.raises(ValueError) as refusal:
        make("ring").condition(operator, y, noise_std)
    assert message in str(refusal.value)

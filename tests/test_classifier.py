"""A classifier of noisy data against mixtures, on which p(label | x_t) is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from score_sde.classifier import NoisyClassifier
from score_sde.data import Batch
from score_sde.evaluation.classification import accuracy_by_noise
from score_sde.guidance import Classifier
from score_sde.networks import Encoder
from score_sde.parameterization import Karras
from score_sde.sampler import Sampler
from score_sde.score import ExactScore
from score_sde.sde import VESDE, VPSDE
from score_sde.steps import DDIM
from score_sde.targets import GaussianMixture
from score_sde.training import NoisyCrossEntropy, UniformTimes

MIXTURE = GaussianMixture([0.2, 0.5, 0.3], [[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0]],
                          torch.diag_embed(torch.tensor([[0.3, 0.5], [0.4, 0.2], [0.5, 0.5]])))  # fmt: skip
SDE = VESDE(sigma_max=10.0)


class ExactLogits(nn.Module):
    """log w_k N(x; mu_k, Sigma_k + sigma^2 I), told of sigma and x as a network is: by c_noise and c_in x."""

    num_classes = 3

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x, c_noise):
        sigma = (4 * c_noise.double()).exp()
        x = x * (1 + sigma**2).sqrt()[:, None]  # c_in = 1 / sqrt(sigma_data^2 + sigma^2)
        return MIXTURE._log_joint(x, 1.0, sigma)[0] + self.bias


def classifier():
    return NoisyClassifier(ExactLogits(), SDE, Karras(1.0), (2,))


def test_guidance_by_the_exact_classifier_is_the_exact_conditional_score():
    x, label = 2 * torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double(), torch.arange(6) % 3
    for t in (0.2, 0.7):
        got = Classifier(ExactScore(MIXTURE, SDE), classifier())(x, t, label=label).score
        for k in range(3):
            part = GaussianMixture([1.0], MIXTURE.means[k : k + 1], MIXTURE.covariances[k : k + 1])
            torch.testing.assert_close(got[label == k], ExactScore(part, SDE)(x[label == k], t).score)


def test_cross_entropy_is_least_at_the_posterior():
    model, g = classifier(), torch.Generator().manual_seed(0)
    label = torch.multinomial(MIXTURE.weights, 50_000, replacement=True, generator=g)
    noise = torch.randn(50_000, 2, generator=g, dtype=torch.float64)
    x = MIXTURE.means[label] + noise * MIXTURE.covariances.diagonal(dim1=1, dim2=2)[label].sqrt()
    losses = NoisyCrossEntropy()(model, Batch(x, {"label": label}), UniformTimes()(SDE, 50_000, g), g).loss
    assert losses.shape == (50_000,)
    (gradient,) = torch.autograd.grad(losses.mean(), model.network.bias)
    assert gradient.abs().max() < 4.5 * 0.5 / 50_000**0.5  # softmax minus one-hot has a standard deviation below 1/2
    assert 0 < losses.mean().item() < torch.distributions.Categorical(MIXTURE.weights).entropy().item()


def test_accuracy_falls_and_cross_entropy_rises_to_that_of_the_labels_with_noise():
    g = torch.Generator().manual_seed(0)
    label = torch.multinomial(MIXTURE.weights, 4000, replacement=True, generator=g)
    x = MIXTURE.means[label] + 0.3 * torch.randn(4000, 2, generator=g, dtype=torch.float64)
    table = accuracy_by_noise(classifier(), x, label, generator=g, levels=(0.05, 1.0, 9.0, 100.0))
    assert table["level"].tolist() == [0.05, 1.0, 9.0]  # sigma_max is 10
    assert table["accuracy"].is_monotonic_decreasing
    assert table["cross_entropy"].is_monotonic_increasing
    entropy = torch.distributions.Categorical(MIXTURE.weights).entropy().item()
    assert table["cross_entropy"].iloc[-1] == pytest.approx(entropy, abs=0.03)


def test_encoder_starts_undecided_and_learns_two_shapes():
    torch.manual_seed(0)
    model = NoisyClassifier(Encoder((1, 4, 4), 2, width=8), VPSDE(), Karras(1.0), (1, 4, 4))
    x = torch.ones(64, 1, 4, 4)
    x[::2, :, :2] = -1
    label = torch.arange(64) % 2
    torch.testing.assert_close(model.log_probs(x, 0.1).exp(), torch.full((64, 2), 0.5))
    optimizer, g = torch.optim.Adam(model.parameters(), 1e-2), torch.Generator().manual_seed(0)
    for _ in range(30):
        optimizer.zero_grad()
        batch = Batch(x, {"label": label})
        NoisyCrossEntropy()(model, batch, UniformTimes()(model.sde, 64, g), g).loss.mean().backward()
        optimizer.step()
    assert (model.log_prob(x, 0.05, label) > -0.3).all()


def test_refusals():
    model = classifier()
    with pytest.raises(TypeError, match="guide a score model with it"):
        Sampler(DDIM(), lambda sde: torch.tensor([1.0, 0.5], dtype=torch.float64)).sample(model, (2, 2), seed=0)
    with pytest.raises(ValueError, match="one a sample; got"):
        model.log_prob(torch.zeros(2, 2), 0.5, torch.zeros(2))
    g = torch.Generator().manual_seed(0)
    times = UniformTimes()(SDE, 2, g)
    with pytest.raises(ValueError, match=r"data\.labels=true"):
        NoisyCrossEntropy()(model, Batch(torch.zeros(2, 2)), times, g)
    with pytest.raises(ValueError, match="one process, got"):
        Classifier(ExactScore(MIXTURE, VPSDE()), model)

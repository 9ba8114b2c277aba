"""The digit classifier recognises real digits, doubts what is none, and its Fréchet distance tells them apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from score_sde.evaluation import DigitClassifier, digit_report

Split = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(scope="module")
def split() -> Split:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, held_out = order[360:], order[:360]
    return images[train], labels[train], images[held_out], labels[held_out]


@pytest.fixture(scope="module")
def classifier(split: Split) -> DigitClassifier:
    return DigitClassifier(split[0], split[1])


def test_held_out_digits_are_recognised(classifier: DigitClassifier, split: Split) -> None:
    assert classifier.accuracy(split[2], split[3]) >= 0.97
    probabilities = classifier.probabilities(split[2])
    assert probabilities.shape == (360, 10)
    assert torch.allclose(probabilities.sum(1), torch.ones(360, dtype=torch.float64))
    assert (probabilities.max(1).values > 0.9).double().mean() > 0.9


def test_the_features_are_what_the_probabilities_are_made_of(classifier: DigitClassifier, split: Split) -> None:
    features = classifier.features(split[2])
    output = features @ torch.tensor(classifier._network.coefs_[1]) + torch.tensor(classifier._network.intercepts_[1])
    assert torch.allclose(output.softmax(1), classifier.probabilities(split[2]))


def test_the_report_tells_digits_from_imitations(classifier: DigitClassifier, split: Split) -> None:
    train, _, held_out, _ = split
    pixels = train.flatten(1).double().numpy()
    gaussian = np.random.default_rng(0).multivariate_normal(pixels.mean(0), np.cov(pixels.T), 500)
    imitation = torch.tensor(gaussian).clamp(-1, 1).view(-1, 1, 8, 8)
    report = digit_report(classifier, imitation, held_out, train).set_index("metric")
    assert report.index.tolist() == ["confident", "classes", "FD (hidden layer of a digit MLP, 128-d)"]
    assert report["value"]["confident"] < 0.5 < 0.9 < report["floor"]["confident"]
    assert report["floor"]["classes"] == 10
    assert report["value"].iloc[2] > 2 * report["floor"].iloc[2]
    ones = held_out[split[3] == 1]
    assert digit_report(classifier, ones, held_out, train)["value"][1] <= 2


def test_the_same_seed_gives_the_same_classifier(split: Split) -> None:
    images, labels = split[0][:200], split[1][:200]
    first, again, other = (DigitClassifier(images, labels, seed=seed).probabilities(split[2]) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_refusals(classifier: DigitClassifier, split: Split) -> None:
    with pytest.raises(ValueError, match=r"values in \[-1, 1\], got .* in \[0, 16\]"):
        DigitClassifier(8 * (split[0] + 1), split[1])
    with pytest.raises(ValueError, match="each image needs one label"):
        DigitClassifier(split[0], split[1][:5])
    with pytest.raises(ValueError, match=r"takes images of shape \(n, 1, 8, 8\), got \(3, 64\)"):
        classifier.features(torch.zeros(3, 64))

"""Nearest-neighbour figures against their definitions written out, and against their exact expectations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from score_sde.data import Augment, TensorData
from score_sde.evaluation import density_coverage, kid, nearest, neighbours, precision_recall
from score_sde.evaluation.extractors import stored_images
from score_sde.evaluation.neighbours import neighbour_metrics
from score_sde.evaluation.views import Memorization


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def radii(x: np.ndarray, k: int) -> np.ndarray:
    return np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), axis=1)[:, k]


def test_precision_recall_density_and_coverage_by_their_definitions():
    samples, real = normal(40, 3, seed=0) * 0.8 + 0.3, normal(50, 3, seed=1)
    y, x = samples.double().numpy(), real.double().numpy()
    distance = np.linalg.norm(y[:, None] - x[None], axis=2)
    precision = (distance <= radii(x, 3)[None]).any(1).mean()
    recall = (distance <= radii(y, 3)[:, None]).any(0).mean()
    assert precision_recall(samples, real) == pytest.approx((precision, recall))
    inside = distance < radii(x, 5)[None]
    assert density_coverage(samples, real) == pytest.approx((inside.sum() / (5 * 40), inside.any(0).mean()))
    four = dict(zip(("precision", "recall", "density", "coverage"),
                    (*precision_recall(samples, real), *density_coverage(samples, real)), strict=True))  # fmt: skip
    assert neighbour_metrics(samples, real) == four
    assert neighbour_metrics(samples, real, reach=neighbours.radii(real, 3, 5)) == four
    assert 0 < recall < precision < 1


def test_each_distance_is_computed_once(monkeypatch):
    """Within the real set, within the samples and between; density and coverage need no neighbours of the samples."""
    passes, blocks = [], neighbours._blocks
    monkeypatch.setattr(neighbours, "_blocks", lambda x, y: passes.append((len(x), len(y))) or blocks(x, y))
    samples, real = normal(40, 3, seed=0), normal(50, 3, seed=1)
    for measure, expected in (
        (precision_recall, [(50, 50), (40, 40), (40, 50)]),
        (density_coverage, [(50, 50), (40, 50)]),
        (neighbour_metrics, [(50, 50), (40, 40), (40, 50)]),
    ):
        measure(samples, real)
        assert passes == expected
        passes.clear()
    density_coverage(samples[:1], real)


def test_features_far_from_the_origin_keep_their_distances():
    samples, real = normal(100, 8, seed=0).double(), normal(100, 8, seed=1).double()
    far = [(1e-3 * x + 5).float() for x in (samples, real)]
    near = [x.double() - 5 for x in far]
    assert precision_recall(*far) == precision_recall(*near)
    assert density_coverage(*far) == density_coverage(*near)


def test_of_one_law_density_and_coverage_have_their_exact_means():
    n, k, repeats = 300, 5, 12
    found = [density_coverage(normal(n, 4, seed=2 * i), normal(n, 4, seed=2 * i + 1), k) for i in range(repeats)]
    density, coverage = np.mean(found, axis=0)
    # Naeem et al., eq. 6 and 7. Five standard errors, of deviations 0.08 and 0.012 a draw.
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert abs(density - 1) < 5 * 0.08 / repeats**0.5
    assert abs(coverage - expected) < 5 * 0.012 / repeats**0.5


def test_a_lost_mode_costs_recall_and_noise_costs_precision():
    real = torch.cat([normal(200, 2, seed=0), normal(200, 2, seed=1) + 20])
    precision, recall = precision_recall(normal(200, 2, seed=2), real)
    assert precision > 0.8
    assert recall < 0.55
    precision, recall = precision_recall(real + 40 * normal(400, 2, seed=3), real)
    assert precision < 0.1
    with pytest.raises(ValueError, match="3 points have no 3-th nearest"):
        precision_recall(real, real[:3])


def test_kid_is_its_formula_and_unbiased():
    x, y = normal(7, 3, seed=0).double(), normal(9, 3, seed=1).double() + 0.5
    kernel = lambda a, b: (float(a @ b) / 3 + 1) ** 3  # noqa: E731
    xx = sum(kernel(x[i], x[j]) for i in range(7) for j in range(7) if i != j) / 42
    yy = sum(kernel(y[i], y[j]) for i in range(9) for j in range(9) if i != j) / 72
    xy = sum(kernel(a, b) for a in x for b in y) / 63
    assert kid(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-9)
    values = torch.tensor([kid(normal(20, 4, seed=2 * i), normal(30, 4, seed=2 * i + 1)) for i in range(300)])
    assert abs(values.mean()) < 4 * values.std() / 300**0.5
    with pytest.raises(ValueError, match="2 samples"):
        kid(x[:1], y)


def test_nearest_training_examples_by_brute_force_across_blocks(monkeypatch):
    data = TensorData(normal(5000, 2, 3, seed=0))
    samples = normal(20, 2, 3, seed=1)
    found = nearest(samples, data)
    train = data.plain("train").x
    distance = (samples[:, None].double() - train[None].double()).square().mean(dim=(2, 3)).sqrt()
    expected, index = distance.sort(dim=1)
    torch.testing.assert_close(found.distance, expected[:, :2])
    assert torch.equal(found.index, index[:, :2])
    assert not found.memorised.any()


def test_copies_of_training_examples_are_found_out():
    data = TensorData(normal(100, 1, 6, 6, seed=0), held_out=0.2)
    train = data.plain("train").x
    copies = nearest(train[:10] + 0.02 * normal(10, 1, 6, 6, seed=1), data)
    assert copies.memorised.all()
    assert torch.equal(copies.index[:, 0], torch.arange(10))
    assert (nearest(train[:10], data).distance[:, 0] == 0).all()  # exact, where |x|^2 + |y|^2 - 2 xy is not
    assert not nearest(data.plain("test").x, data).memorised.any()


def test_copies_of_an_example_that_is_there_twice_are_found_out():
    x = normal(50, 1, 6, 6, seed=0)
    data = TensorData(torch.cat([x, x[:1], x[:1]]))
    found = nearest(x[:2], data)
    assert found.memorised.all()
    assert (found.distance[:, 1] > 0.3).all()
    mirrored = TensorData(torch.cat([x, x[:1].flip(-1)]), flip=True)
    assert nearest(x[:2], mirrored).memorised.all()
    assert nearest(x[:2], TensorData(x[:3])).memorised.all()


@pytest.mark.parametrize("training", [{"flip": True}, {"augment": Augment()}])
def test_a_mirrored_copy_is_a_copy_where_training_mirrors(training):
    x = normal(50, 1, 6, 6, seed=0)
    x[0] = x[0] + x[0].flip(-1)  # the same both ways round, which is one example and not two
    data = TensorData(x, **training)
    train = data.plain("train").x
    found = nearest(train.flip(-1), data)
    assert found.memorised.all()
    assert torch.equal(found.index[:, 0], torch.arange(50))
    assert (found.distance[:, 0] == 0).all()
    assert nearest(train, data).memorised.all()
    assert nearest(train.flip(-1), TensorData(x)).memorised.sum() == 1


def test_copies_of_latents_are_found_out_whatever_their_scale():
    data = TensorData(10 * torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)), held_out=0.25)
    table = Memorization(data, torch.device("cpu"))(data.examples().x[:20])[0].set_index("metric")
    assert table.loc["memorised", "value"] == 1
    assert table.loc["nearest training image", "value"] == 0
    with pytest.raises(ValueError, match=r"images in \[-1, 1\]"):
        stored_images(data, "test", slice(5))


@pytest.mark.parametrize("measure", [precision_recall, density_coverage])
def test_what_cannot_be_compared_is_refused(measure):
    x = normal(20, 2, seed=0)
    with pytest.raises(ValueError, match="1 of 20 samples are not finite"):
        measure(x.index_fill(0, torch.tensor([3]), math.nan), x)
    with pytest.raises(ValueError, match="one event shape"):
        measure(x, normal(20, 3, seed=1))
    with pytest.raises(ValueError, match="k >= 1, got k=0"):
        measure(x, x, k=0)
    images = x.view(20, 1, 1, 2)
    assert measure(images, images + 0.1) == measure(x, x + 0.1)

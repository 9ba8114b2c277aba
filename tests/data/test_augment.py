"""Augmentation does what its labels say, row by row, and nothing where they are zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from score_sde.data import Augment, TensorData
from score_sde.keyed import Draws, generator


def draws(count: int, rows: slice = slice(None), seed: int = 0) -> Draws:
    return Draws(generator(seed, "augment"), count, rows)


def ramps(count: int, height: int, width: int, slope: tuple[float, float]) -> torch.Tensor:
    v, u = np.mgrid[:height, :width].astype(np.float32)
    ramp = slope[0] * (u - (width - 1) / 2) + slope[1] * (v - (height - 1) / 2)
    return torch.from_numpy(ramp).expand(count, 1, height, width)


def matrix(label: np.ndarray, height: int, width: int) -> np.ndarray:
    """The 3x3 map from new to old places about the centre, multiplied out as in appendix F.2, from a row's labels."""
    _, _, scale, cos1, sin, wx, wy, right, down = label.astype(float)

    def rotation(angle: float) -> np.ndarray:
        return np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])

    stretch = math.hypot(wx, wy)  # taken as positive
    axis = math.atan2(wy, wx)
    turn = math.atan2(sin, cos1 + 1)
    s, shift = 2 ** (0.2 * stretch), np.array([[1, 0, -right * width / 8], [0, 1, -down * height / 8], [0, 0, 1]])
    isotropic = np.diag([2 ** (-0.2 * scale)] * 2 + [1])
    return isotropic @ rotation(turn) @ rotation(-axis) @ np.diag([1 / s, s, 1]) @ rotation(axis) @ shift


@pytest.mark.parametrize("slope", [(0.02, 0.0), (-0.01, 0.03)])
def test_linear_images_are_moved_as_the_labels_say(slope):
    # torch's bicubic kernel (a = -3/4) gives a linear function to 0.05 of its slope a pixel. A stretch by -w along r is a
    # stretch by w along r + pi/2, which labels (w cos r, w sin r) do not tell from +w along r + pi: rows with w < 0 are
    # those where the map from the labels is wrong, and are told by the generator's own numbers.
    count, height, width = 200, 24, 40
    augment = Augment(1.0)
    x, label = augment(ramps(count, height, width, slope), draws(count))
    stretch = augment._parameters(draws(count))[4]
    v, u = np.mgrid[:height, :width]
    places = np.stack([u - (width - 1) / 2, v - (height - 1) / 2, np.ones_like(u)]).reshape(3, -1)
    checked = 0
    for i in (stretch > 0).nonzero()[:, 0].tolist():
        old = matrix(label[i].numpy(), height, width) @ places
        inside = (abs(old[0]) < width / 2 - 3) & (abs(old[1]) < height / 2 - 3)
        signs = 1 - 2 * label[i, :2].double().numpy()
        expected = slope[0] * signs[0] * old[0] + slope[1] * signs[1] * old[1]
        np.testing.assert_allclose(
            x[i, 0].flatten().numpy()[inside], expected[inside], atol=0.05 * max(map(abs, slope)) * 2
        )
        checked += inside.sum()
    assert checked > 10_000


def test_without_the_rest_images_are_mirrored_or_left_bit_for_bit():
    x = torch.rand(64, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    new, label = Augment(0.0)(x, draws(64))
    assert (label[:, 1:] == 0).all()
    flipped = label[:, 0] == 1
    assert 16 < flipped.sum() < 48
    assert torch.equal(new[~flipped], x[~flipped])
    assert torch.equal(new[flipped], x[flipped].flip(-1))


def test_each_part_acts_on_its_share_of_the_rows():
    count, p = 20_000, 0.12
    label = Augment(p)(torch.zeros(count, 1, 2, 2), draws(count))[1].double()
    # y flips, scale, turn, stretch, shift: five standard errors of a share p (p/2 for the flips) of 20,000 are 0.012.
    shares = [label[:, 1], *(label[:, column].abs() for column in (2, 4, 5, 7))]
    for share, expected in zip(shares, (p / 2, p, p, p, p), strict=True):
        assert abs((share > 0).double().mean() - expected) < 0.012
    assert ((label[:, 7] != 0) == (label[:, 8] != 0)).all()
    moved = label[:, 2] != 0
    assert abs(label[moved, 2].std() - 1) < 0.08


@pytest.mark.parametrize("make", [lambda x: TensorData(x, augment=Augment(0.8)), lambda x: TensorData(x, flip=True)])
def test_processes_augment_their_rows_alike(make):
    data = make(torch.rand(30, 3, 12, 9, generator=torch.Generator().manual_seed(0)))
    whole = data.prepare(data.batch(2, 8), draws(8))
    for rows in (slice(0, 3), slice(3, 8), slice(1, 8, 2)):
        part = data.prepare(data.batch(2, 8, rows), draws(8, rows))
        assert torch.equal(part.x, whole.x[rows])
        assert all(torch.equal(part.condition[name], whole.condition[name][rows]) for name in whole.condition)


def test_references_and_examples_are_not_augmented():
    x = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    plain, mirrored = (TensorData(x, held_out=0.2, **options) for options in ({}, {"flip": True}))
    assert torch.equal(plain.reference(4).x, mirrored.reference(4).x)
    assert torch.equal(plain.examples().x, mirrored.examples().x)
    batch = mirrored.batch(0, 16)
    flipped = (mirrored.prepare(batch, draws(16)).x != batch.x).flatten(1).any(1)
    assert 2 < flipped.sum() < 14


def test_augmentation_of_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match="for images"):
        TensorData(torch.zeros(4, 2), flip=True)
    with pytest.raises(ValueError, match="leave out flip"):
        TensorData(torch.zeros(4, 1, 2, 2), flip=True, augment=Augment())
    with pytest.raises(ValueError, match=r"probability=1\.2"):
        Augment(1.2)

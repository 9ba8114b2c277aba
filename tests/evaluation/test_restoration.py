"""Image metrics against hand computations and torchmetrics, and the table of restorations."""

from __future__ import annotations

import math

import pytest
import torch

from score_sde.evaluation.posterior import METHODS, SAMPLERS, field_mixture
from score_sde.evaluation.restoration import Restoration, compare_restorations, psnr, ssim
from score_sde.guidance import Downsample
from score_sde.score import ExactScore
from score_sde.sde import VPSDE
from score_sde.targets import GaussianMixture


def images(seed=0, count=3, shape=(2, 16, 20)):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_by_hand():
    x = torch.zeros(2, 1, 4, 4)
    y = torch.stack([torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), 2.0)])
    assert psnr(x, y) == pytest.approx((20 + 0) / 2, abs=1e-5)
    with pytest.raises(ValueError, match="have one shape"):
        psnr(x, y[:1])


def test_ssim_is_one_for_equal_images_and_by_hand_for_constant_ones():
    x = images()
    assert ssim(x, x) == pytest.approx(1)
    a, b, c_1 = 0.3, -0.5, 0.02**2
    flat = [torch.full((1, 1, 8, 8), v) for v in (a, b)]
    assert ssim(*flat) == pytest.approx((2 * a * b + c_1) / (a * a + b * b + c_1), rel=1e-5)
    assert ssim(2 + x, 2 - x) < 0  # the same means, the opposite structure
    with pytest.raises(ValueError, match="odd and at most 8, got 9"):
        ssim(*flat, window=9)


def test_ssim_agrees_with_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.image", reason="pip install torchmetrics")
    x, y = images(0).double(), (images(0) + 0.3 * images(1)).double()
    _, wanted = functional.structural_similarity_index_measure(x, y, data_range=2.0, sigma=1.5, return_full_image=True)
    assert ssim(x, y) == pytest.approx(wanted[..., 5:-5, 5:-5].mean().item())  # theirs pads at the edges


class Fields(ExactScore):
    """The score of a mixture of random fields, on images."""

    def __init__(self, target: GaussianMixture) -> None:
        super().__init__(target, VPSDE())
        self.event_shape = (1, 8, 8)

    def __call__(self, x, t, **condition):
        from dataclasses import replace

        said = ExactScore(self.target, self.sde)(x.flatten(1), t)
        return replace(said, x=x, raw=said.raw.view_as(x))

    def start(self, z):
        return super().start(z.flatten(1)).view_as(z)


def test_table_of_restorations():
    target = field_mixture((1, 8, 8))
    g = torch.Generator().manual_seed(0)
    truth, operator = target.sample((6,), generator=g).view(6, 1, 8, 8), Downsample((1, 8, 8), 2)
    case = Restoration(Fields(target), truth, operator, 0.1, operator.observe(truth, 0.1, generator=g), draws=8)
    shown = {}
    table = compare_restorations(
        case, [30], methods={"mmps": METHODS["mmps"], "broken": lambda case: 1 / 0}, solvers=None,
        samplers={"adams2": SAMPLERS["adams2"]}, features=lambda x: x.flatten(1), progress=False,
        on_result=lambda *result: shown.setdefault(result[0], result[3].shape),
    ).set_index("method")  # fmt: skip
    assert list(table.index) == ["pseudo-inverse", "mmps", "broken", "ddrm", "repaint"]
    assert table.loc["broken", "error"] == "ZeroDivisionError: division by zero"
    assert table.loc["mmps", "nfe"] == 31
    assert table.loc["mmps", "misfit"] == pytest.approx(1, abs=0.3)
    gain = table.loc["mmps", "psnr_of_mean"] - table.loc["mmps", "psnr"]
    assert gain == pytest.approx(10 * math.log10(2 / (1 + 1 / 8)), abs=0.6)  # of 8 exact draws
    assert table.loc["mmps", "psnr_of_mean"] > table.loc["pseudo-inverse", "psnr"] + 1
    assert shown == dict.fromkeys(("mmps", "ddrm", "repaint"), (6, 8, 1, 8, 8))

"""Sheets of samples: the histograms are densities, each panel has the coordinates it names, and every event shape has one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from score_sde import plotting, targets

COORDINATES = torch.tensor([1.0, 10.0, 100.0])


def vectors(n: int, shift: float = 0.0) -> torch.Tensor:
    return (torch.rand(n, 3, generator=torch.Generator().manual_seed(n)) + shift) * COORDINATES


def test_each_panel_of_a_pair_plot_is_the_density_of_its_coordinates() -> None:
    data, samples = vectors(4000), vectors(3000, shift=0.5)
    figure = plotting.pair_plot(samples, data, bins=10)
    axes = np.array(figure.axes).reshape(3, 3)
    for i in range(3):
        for j in range(3):
            assert axes[i, j].get_xlim() == pytest.approx(axes[-1, j].get_xlim()), "a column shares its coordinate"
            size = axes[i, j].get_xlim()[1] - axes[i, j].get_xlim()[0]
            assert size == pytest.approx(float(COORDINATES[j]), rel=0.2)
            if i != j:
                low, high = axes[i, j].get_ylim()
                assert high - low == pytest.approx(float(COORDINATES[i]), rel=0.2)
                mesh = np.asarray(axes[i, j].collections[0].get_array())
                seen = mesh.sum() * size * (high - low) / mesh.size
                assert seen == pytest.approx(0.25 if i > j else 1.0, abs=0.12), (
                    "half of the samples lie beyond the data"
                )
                mirrored = axes[j, i].collections[0]
                assert axes[i, j].collections[0].norm.vmax == mirrored.norm.vmax
    below = np.asarray(axes[1, 0].collections[0].get_array())
    assert below[:4, :].sum() == 0 < below[6:, 6:].sum(), "samples are shifted up and right"


def test_the_mirror_image_exchanges_the_axes() -> None:
    x = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0].square()
    axes = np.array(plotting.pair_plot(x, x).axes).reshape(3, 3)
    below, above = (np.asarray(ax.collections[0].get_array()) for ax in (axes[1, 0], axes[0, 1]))
    assert np.array_equal(below, above.T)
    assert below[:8].sum() > 2 * below[-8:].sum()  # small squares are the many, and stand below


def test_marginals_are_densities_of_all_samples() -> None:
    data, samples = vectors(4000), vectors(3000, shift=0.5)
    figure = plotting.pair_plot(samples, data, coordinates=[2], bins=10)
    (ax,) = figure.axes
    known, own = (patch.get_data() for patch in ax.patches)
    masses = [float((step.values * np.diff(step.edges)).sum()) for step in (known, own)]
    assert masses == pytest.approx([1.0, 0.55], abs=0.05)
    assert ax.get_xlabel() == "$x_{3}$"


def test_names_stand_over_the_columns_of_images() -> None:
    x = torch.full((3, 1, 4, 5), -1.0)
    x[1] = 1
    (ax,) = plotting.sheet(x, columns=8, names=range(7, 15)).axes
    pixels = ax.images[0].get_array()
    assert [text.get_text() for text in ax.get_xticklabels()] == ["7", "8", "9"]
    assert [pixels[2, round(place), 0] for place in ax.get_xticks()] == [0, 1, 0]
    assert not len(plotting.sheet(x).axes[0].get_xticks())


def test_signals_are_the_lines_of_their_channels() -> None:
    x = torch.arange(2 * 3 * 5.0).reshape(2, 3, 5)
    figure = plotting.signals(x, -x)
    axes = np.array(figure.axes).reshape(2, 2)
    assert [ax.get_title() for ax in axes[0]] == ["data", "samples"]
    for row in range(2):
        for ax, values in zip(axes[row], (-x, x), strict=True):
            assert [line.get_ydata().tolist() for line in ax.lines] == values[row].tolist()
    assert len({ax.get_ylim() for ax in figure.axes}) == 1


def test_frames_are_in_their_order_and_in_one_scale() -> None:
    x = torch.arange(2 * 3.0).reshape(2, 1, 3, 1, 1).expand(2, 1, 3, 4, 4)  # frame k of video i is grey 3 i + k
    figure = plotting.frames(x.repeat(2, 1, 1, 1, 1), x)  # as many rows of each
    for ax in figure.axes:
        mosaic = np.asarray(ax.images[0].get_array())
        greys = mosaic[::5, ::5, 0]
        assert greys == pytest.approx(x[:, 0, :, 0, 0].numpy() / 5, abs=1e-6)


def test_channels_beyond_colour_are_frames_of_their_own() -> None:
    x = torch.linspace(-1, 1, 2 * 4).reshape(2, 4, 1, 1).expand(2, 4, 3, 3)
    (ax,) = plotting.frames(x).axes
    assert np.asarray(ax.images[0].get_array())[::4, ::4, 0] == pytest.approx((x[:, :, 0, 0].numpy() + 1) / 2, abs=1e-6)


EVENTS = [
    (1,),
    (2,),
    (5,),
    (40,),
    (1, 9),
    (9, 4),
    (1, 4, 4),
    (3, 4, 4),
    (4, 4, 4),
    (1, 3, 4, 4),
    (5, 3, 4, 4),
    (3, 2, 2, 4, 4),
]


@pytest.mark.parametrize("event", EVENTS, ids=str)
@pytest.mark.parametrize("known", [True, False])
def test_every_event_shape_has_a_sheet(event: tuple[int, ...], known: bool) -> None:
    x = torch.randn(20, *event, generator=torch.Generator().manual_seed(0))
    x[0] = torch.nan
    figure = plotting.sheet(x, x if known else None)
    figure.canvas.draw()
    assert all(ax.has_data() for ax in figure.axes if ax.axison)


def test_fields_beyond_one_are_scaled_to_the_data() -> None:
    x = torch.linspace(-4, 4, 4).reshape(4, 1, 1, 1).expand(4, 1, 3, 3)
    (ax,) = plotting.sheet(x, x).axes
    assert np.asarray(ax.images[0].get_array())[0, ::4, 0] == pytest.approx([0, 1 / 3, 2 / 3, 1], abs=1e-6)


def test_a_law_stands_for_its_draws() -> None:
    law = targets.make("ring")
    assert [ax.get_title() for ax in plotting.sheet(law.sample((9,)), law, name="mine").axes] == [
        "data\nexact density", "mine\n9 samples",
    ]  # fmt: skip
    line = targets.GaussianMixture([1.0], [[0.0]], [[[1.0]]])
    (ax,) = plotting.sheet(torch.randn(50, 1), line, name="mine").axes
    assert [patch.get_label() for patch in ax.patches] == ["data", "mine"]


def test_dots_say_which_coordinate_is_which() -> None:
    (ax,) = plotting.sheet(torch.randn(9, 2)).axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("$x_1$", "$x_2$")


def test_samples_that_are_lost_are_refused() -> None:
    with pytest.raises(ValueError, match="none of the samples is finite"):
        plotting.sheet(torch.full((3, 5), torch.nan))

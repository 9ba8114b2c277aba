"""Pictures carry the numbers they claim to carry."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from PIL import Image
from torch import Tensor

from score_sde import plotting
from score_sde.evaluation import certify_all, diagnose, variational_bound
from score_sde.grid import log_snr
from score_sde.plotting.images import _image_frames, _point_frames
from score_sde.score import ExactScore
from score_sde.sde import VESDE, VPSDE
from score_sde.steps import DDIM, EulerMaruyama, LangevinCorrector
from score_sde.targets import GaussianMixture

SQUARE = (-3.0, 3.0, -3.0, 3.0)
GAUSSIAN = GaussianMixture([1.0], [[0.5, -0.5]], [[[0.49, 0.0], [0.0, 0.25]]])
MODEL = ExactScore(GAUSSIAN, VPSDE())


@pytest.fixture
def ax() -> Axes:
    return plotting.panels(1)[1][0, 0]


def draws(n: int) -> Tensor:
    return GAUSSIAN.sample((n,), generator=torch.Generator().manual_seed(0))


def test_limits_are_a_square_that_an_outlier_does_not_stretch() -> None:
    x = torch.rand(2000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([4.0, 2.0]) + 1
    x[:3] = torch.tensor([[1e6, 0.0], [math.nan, 0.0], [0.0, -1e6]])
    left, right, bottom, top = plotting.limits_of(x, margin=0.5)
    assert right - left == pytest.approx(top - bottom) == pytest.approx(1.5 * 4, rel=0.01)
    assert [(left + right) / 2, (bottom + top) / 2] == pytest.approx([3, 2], abs=0.02)


def test_density_of_a_target_is_its_density_at_every_pixel(ax: Axes) -> None:
    image = plotting.density(ax, GAUSSIAN, limits=SQUARE, resolution=60)
    values = np.asarray(image.get_array())
    assert values.sum() * 0.1**2 == pytest.approx(1, rel=0.01)
    assert image.get_extent() == list(SQUARE)
    assert image.origin == "lower"
    row, column = 20, 40  # y = -0.95, x = 1.05
    expected = math.exp(-(0.55**2) / 0.98 - 0.45**2 / 0.5) / (2 * math.pi * 0.7 * 0.5)
    assert values[row, column] == pytest.approx(expected, rel=1e-4)
    assert image.get_clim() == pytest.approx((0, values.max()))


def test_histogram_is_a_density_over_all_samples_in_the_same_orientation(ax: Axes) -> None:
    x = draws(50_000)
    x[:25_000] += 1000
    histogram = plotting.density(ax, x, limits=SQUARE, resolution=60, peak=0.7)
    values = np.asarray(histogram.get_array())
    exact = np.asarray(plotting.density(ax, GAUSSIAN, limits=SQUARE, resolution=30).get_array())
    assert values.sum() * 0.2**2 == pytest.approx(0.5, abs=0.01)
    assert np.abs(values - exact / 2).max() < 0.03  # peak 0.23, five standard errors
    assert histogram.get_clim() == (0, 0.7)


def test_samples_are_where_they_are(ax: Axes) -> None:
    x = draws(50)
    x[7] = math.inf
    dots = plotting.samples(ax, x, limits=SQUARE)
    assert np.allclose(dots.get_offsets(), x[torch.arange(50) != 7])
    assert (*ax.get_xlim(), *ax.get_ylim()) == SQUARE
    assert ax.get_aspect() == 1


def test_arrows_point_along_the_score_and_saturate(ax: Axes) -> None:
    t = 0.3
    image, quiver = plotting.score_field(ax, MODEL, t, limits=SQUARE, arrows=6, unit=2.0)
    points = torch.tensor(np.asarray(quiver.XY), dtype=torch.float32)
    assert points[:7, 0].tolist() == pytest.approx([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, -2.5])
    score = MODEL(points, t).score
    assert torch.allclose(
        score, GAUSSIAN.marginal(float(MODEL.sde.alpha(t)), float(MODEL.sde.sigma(t))).score(points), rtol=1e-4
    )
    expected = score / (score.norm(dim=1, keepdim=True) + 2.0)  # cells are of size 1
    assert np.allclose(np.stack([quiver.U, quiver.V], 1), expected, atol=1e-5)
    assert quiver.angles == quiver.scale_units == "xy"
    assert quiver.scale == 1
    assert image is not None


def test_arrows_lie_over_the_log_density_of_the_marginal(ax: Axes) -> None:
    sde = VESDE(sigma_max=10.0)
    image, _ = plotting.score_field(ax, ExactScore(GAUSSIAN, sde), 1.0)
    assert image is not None
    values = np.asarray(image.get_array())
    variances = np.array([0.49, 0.25]) + 100
    assert values.max() == pytest.approx(-math.log(2 * math.pi * math.sqrt(variances.prod())), abs=1e-3)
    assert image.get_clim() == pytest.approx((values.max() - 12, values.max()))


def test_a_model_without_a_target_needs_limits(ax: Axes) -> None:
    class Blind:
        sde, event_shape = VPSDE(), (2,)

        def __call__(self, x: Tensor, t: float) -> object:
            return MODEL(x, t)

    with pytest.raises(ValueError, match="needs limits or a target"):
        plotting.score_field(ax, Blind(), 0.5)  # type: ignore[arg-type]
    image, _ = plotting.score_field(ax, Blind(), 0.5, limits=SQUARE)  # type: ignore[arg-type]
    assert image is None


def test_trajectories_join_the_states_of_each_sample_in_order(ax: Axes) -> None:
    trajectory = torch.randn(5, 8, 2, generator=torch.Generator().manual_seed(0))
    lines, starts, ends = plotting.trajectories(ax, trajectory, count=3)
    segments = np.asarray(lines.get_segments()).reshape(4, 3, 2, 2)
    for step in range(4):
        for sample in range(3):
            assert np.allclose(segments[step, sample], trajectory[step : step + 2, sample])
    assert np.asarray(lines.get_array()).reshape(4, 3)[:, 0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert np.allclose(starts.get_offsets(), trajectory[0, :3])
    assert np.allclose(ends.get_offsets(), trajectory[-1, :3])


def test_no_trajectories_are_refused() -> None:
    with pytest.raises(ValueError, match="no trajectories: give one or more by name"):
        plotting.trajectory_comparison({})


def test_wide_trajectories_are_shrunk_to_the_spread_of_the_samples() -> None:
    last = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    figure = plotting.trajectory_comparison({"SDE": torch.stack([50 * last, 0.5 * last, last])}, count=300)
    lines, starts, _ = figure.axes[0].collections
    assert np.allclose(starts.get_offsets(), last, atol=1e-4)
    assert np.allclose(np.asarray(lines.get_segments())[300:, 0], 0.5 * last)


def test_contours_stand_one_and_three_nats_below_the_maximum(ax: Axes) -> None:
    lines = plotting.contours(ax, GAUSSIAN, limits=SQUARE, resolution=120)
    for path, nats in zip(lines.get_paths(), (3, 1), strict=True):
        distance = ((path.vertices - [0.5, -0.5]) ** 2 / [0.49, 0.25]).sum(axis=1) / 2
        assert distance == pytest.approx(np.full(len(distance), nats), abs=0.05)
    assert all(pattern is None for _, pattern in lines.get_linestyle())  # solid, though log-densities are negative


def test_image_grid_lays_images_row_by_row(ax: Axes) -> None:
    images = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 2, 3)
    mosaic = np.asarray(plotting.image_grid(ax, images, columns=3).get_array())
    assert mosaic.shape == (2 * 3 - 1, 3 * 4 - 1, 4)
    for i in range(5):
        tile = mosaic[3 * (i // 3) : 3 * (i // 3) + 2, 4 * (i % 3) : 4 * (i % 3) + 3]
        assert np.allclose(tile[..., :3], i / 4)
        assert (tile[..., 3] == 1).all()
    assert (mosaic[2, :, 3] == 0).all()
    assert (mosaic[:, 3, 3] == 0).all()
    assert (mosaic[3:, 8:, 3] == 0).all()
    colour = torch.tensor([2.0, 0.0, -1.0])[None, :, None, None].expand(1, 3, 2, 2)
    assert np.allclose(np.asarray(plotting.image_grid(ax, colour).get_array())[0, 0], [1, 0.5, 0, 1])
    with pytest.raises(ValueError, match=r"got \(1, 2, 4, 4\)"):
        plotting.image_grid(ax, torch.zeros(1, 2, 4, 4))


def test_loss_curves_draw_every_loss(ax: Axes) -> None:
    metrics = pd.DataFrame(
        {"step": [1, 2, 3, 4], "lr": 0.1, "loss": [1.0, 2.0, 4.0, 4.0], "loss_q1": [3.0, np.nan, 3.0, 3.0]}
    )
    loss, quartile = plotting.loss_curves(ax, metrics)
    assert [loss.get_label(), quartile.get_label()] == ["loss", "q1"]
    w = 0.5 ** np.arange(4)  # half-life of one row
    assert np.asarray(loss.get_ydata())[-1] == pytest.approx((w @ [4, 4, 2, 1]) / w.sum())
    assert np.asarray(quartile.get_xdata()).tolist() == [1, 3, 4]
    assert np.asarray(ax.lines[0].get_ydata()).tolist() == [1, 2, 4, 4]
    assert ax.get_yscale() == "log"
    legend = ax.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["loss", "q1", "not smoothed"]


def test_what_is_no_quartile_is_told_apart_by_dashes(ax: Axes) -> None:
    metrics = pd.DataFrame({"step": [1, 2], "fisher": 1.0, "fisher_q1": 2.0, "irreducible": 3.0})
    excess, _, irreducible = plotting.loss_curves(ax, metrics, columns=["fisher", "fisher_q1", "irreducible"])
    assert [line.get_linestyle() for line in (excess, irreducible)] == ["-", "--"]
    assert {line.get_color() for line in (excess, irreducible)} == {plotting.INK}


def test_the_line_of_all_noise_levels_is_dark_and_those_of_quartiles_have_colours(ax: Axes) -> None:
    metrics = pd.DataFrame({"step": [1, 2], "loss": 1.0, "loss_q1": 2.0, "loss_q2": 3.0})
    for names in (["loss", "loss_q1", "loss_q2"], ["loss_q1", "loss_q2"]):
        colours = {line.get_label(): line.get_color() for line in plotting.loss_curves(ax, metrics, columns=names)}
        assert colours.pop("loss", plotting.INK) == plotting.INK
        assert [tuple(colour) for colour in colours.values()] == [plotting.TIME(0.0), plotting.TIME(1.0)]


def test_a_quartile_has_one_colour_whatever_the_loss(ax: Axes) -> None:
    table = pd.DataFrame(
        {"step": [1, 2]} | {f"{kind}{q}": [1.0, 0.5] for kind in ("loss", "fisher") for q in ("", "_q1", "_q2")}
    )
    of = [[line.get_color() for line in plotting.loss_curves(ax, table, columns=[f"{kind}{q}" for q in ("", "_q1", "_q2")])]
          for kind in ("loss", "fisher")]  # fmt: skip
    assert np.array_equal(*(colours[1:] for colours in of))
    assert of[0][0] == of[1][0] == plotting.INK


def test_quartiles_are_explained_beside_the_losses_and_steps_are_whole(ax: Axes) -> None:
    metrics = pd.DataFrame({"step": [1, 2, 3], "loss": [1.0, 2.0, 4.0], "loss_q1": [3.0, 2.0, 1.0]})
    plotting.loss_curves(ax, metrics)
    ax.get_figure().canvas.draw()
    legend = ax.get_legend()
    assert "quartiles of noise levels" in legend.get_title().get_text()
    assert legend.get_window_extent().x0 >= ax.bbox.x1
    assert all(tick == round(tick) for tick in ax.get_xticks())


def test_losses_below_zero_stand_on_a_linear_axis(ax: Axes) -> None:
    plotting.loss_curves(ax, pd.DataFrame({"step": [1, 2, 3], "loss": [1.0, 0.5, -2.0]}))
    assert ax.get_yscale() == "linear"


@pytest.mark.parametrize("span", [1.3, 3, 30, 1e5])
def test_a_logarithmic_axis_has_numbers_whatever_it_spans(ax: Axes, span: float) -> None:
    plotting.loss_curves(ax, pd.DataFrame({"step": [0, 1], "loss": [0.33, 0.33 * span]}), halflife=1e-9)
    low, high = ax.get_ylim()
    assert 2 <= sum(low <= tick <= high for tick in ax.get_yticks()) <= 10
    ax.invert_yaxis()
    plotting.curves(ax, "", "")
    assert 2 <= sum(low <= tick <= high for tick in ax.get_yticks()) <= 10


@pytest.mark.parametrize(
    ("low", "high", "written"),
    [
        (3e-6, 2e-3, ["$10^{-5}$", "$10^{-4}$", "$10^{-3}$"]),
        (0.01, 3.0, ["$10^{-2}$", "$10^{-1}$", "$10^{0}$"]),
        (4, 250, ["5", "10", "20", "50", "100", "200"]),
        (2.5e-6, 4e-5, ["$3\\times10^{-6}$", "$10^{-5}$", "$3\\times10^{-5}$"]),  # five would run into one another
        (3.5e-4, 1.2e-3, ["$5\\times10^{-4}$", "$10^{-3}$"]),
        (1.5, 3.3, ["1.5", "2", "2.5", "3"]),
        (7.1, 35, ["10", "20", "30"]),  # two alone look like a linear axis
        (0.87, 1.13, ["0.9", "1", "1.1"]),
    ],
)
def test_numbers_of_a_logarithmic_axis(ax: Axes, low: float, high: float, written: list[str]) -> None:
    ax.set(yscale="log")
    plotting.curves(ax, "", "")
    ax.set_ylim(low, high)  # ticks follow what is shown
    figure = ax.get_figure()
    figure.canvas.draw()
    labels = [text for text in ax.get_yticklabels() if low <= text.get_position()[1] <= high]
    assert [text.get_text() for text in labels] == written


def comparison() -> pd.DataFrame:
    run = {"status": "ok", "sliced_w2_floor": 0.1, "sliced_w2_floor_std": 0.02, "endpoint_error": np.nan}
    heun = [{"sampler": "Heun", "budget": b, "nfe": b - 1, "seed": s, "sliced_w2": 10 / b + s, "seconds": b} | run
            | {"endpoint_error": 1 / b} for b in (40, 10) for s in (0, 1)]  # fmt: skip
    failed = run | {
        "sampler": "EM",
        "budget": 7,
        "nfe": np.nan,
        "seed": 0,
        "sliced_w2": np.nan,
        "status": "diverged: x",
    }
    other = run | {"sampler": "EM", "budget": 20, "nfe": 20, "seed": 0, "sliced_w2": 5.0, "seconds": 3.0}
    refused = failed | {"sampler": "Langevin", "budget": 7, "status": "refused: too few"}
    return pd.DataFrame([*heun, failed, other, refused])


def test_quality_against_nfe_draws_means_floor_and_failures(ax: Axes) -> None:
    heun, em = plotting.quality_against_nfe(ax, comparison())  # Langevin was refused
    assert [line.get_label() for line in (heun, em)] == ["Heun", "EM"]
    assert np.asarray(heun.get_xydata()).tolist() == [[9, 1.5], [39, 0.75]]
    assert np.asarray(em.get_xydata()).tolist() == [[20, 5]]
    floor = next(line for line in ax.lines if line.get_label() == "noise floor")
    assert np.asarray(floor.get_ydata()) == pytest.approx([0.1, 0.1])
    assert ax.patches[0].get_extents().transformed(ax.transData.inverted()).intervaly == pytest.approx([0.08, 0.12])
    crosses = [line for line in ax.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [np.asarray(line.get_xdata()).tolist() for line in crosses] == [[7]]
    band = ax.collections[0].get_paths()[0].vertices
    assert {tuple(v) for v in band} >= {(9, 1), (9, 2), (39, 0.25), (39, 1.25)}
    assert ax.get_ylabel() == "sliced $W_2$"


def test_a_figure_of_samplers_is_of_one_model_and_of_a_metric_that_it_has(ax: Axes) -> None:
    lines = plotting.quality_against_nfe(ax, comparison(), metric="endpoint_error")
    assert [line.get_label() for line in lines] == ["Heun"]  # EM ran, and has no such error
    two = pd.concat([comparison().assign(model=name) for name in ("one", "other")])
    for draw in (lambda **options: plotting.quality_against_nfe(ax, **options), plotting.comparison_multiples):
        with pytest.raises(ValueError, match="a figure shows one model"):
            draw(table=two)
        with pytest.raises(ValueError, match=r"metric is one of .*sliced_w2.*; got 'nope'"):
            draw(table=comparison(), metric="nope")


def test_multiples_have_a_panel_for_each_sampler_with_the_others_behind() -> None:
    figure = plotting.comparison_multiples(comparison(), metric="sliced_w2")
    heun, em = figure.axes
    assert [ax.get_title() for ax in (heun, em)] == ["Heun", "EM"]
    own = heun.containers[0]
    assert np.asarray(own.lines[0].get_xydata()).tolist() == [[9, 1.5], [39, 0.75]]
    (bars,) = own.lines[2]
    lengths = [np.diff(segment[:, 1])[0] / 2 for segment in bars.get_segments()]
    assert lengths == pytest.approx([0.5**0.5] * 2)  # the standard deviation of two values one apart
    assert own.lines[0].get_color() == plotting.LINES[0]
    assert em.containers[0].lines[0].get_color() == plotting.LINES[1]
    assert any(np.asarray(line.get_xydata()).tolist() == [[20, 5]] for line in heun.lines)
    assert heun.get_xlim() == em.get_xlim()
    assert heun.get_ylim() == em.get_ylim()
    assert heun.get_ylim()[1] > 5
    assert any(line.get_marker() == "x" for line in em.lines)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "other samplers", "noise floor", "noise floor ± std", "deterministic", "diverged or failed", "stochastic",
    ]  # fmt: skip
    assert [ax.get_xlabel() for ax in (heun, em)] == ["network calls (NFE)"] * 2
    paired = plotting.comparison_multiples(comparison(), metric="endpoint_error", against="seconds")
    assert [ax.get_title() for ax in paired.axes] == ["Heun"]
    assert np.asarray(paired.axes[0].containers[0].lines[0].get_xydata()).tolist() == [[10, 0.1], [40, 0.025]]


@pytest.mark.parametrize("seeds", [1, 2])
def test_multiples_name_spreads_of_several_seeds_alone_and_their_axis_beside_the_panels(seeds: int) -> None:
    table = comparison()
    figure = plotting.comparison_multiples(table[table["seed"] < seeds].assign(mode_spread=1.0), metric="mode_spread")
    (legend,) = figure.legends
    assert ("± std" in legend.get_title().get_text()) == (seeds > 1)
    assert figure.axes[0].containers[0].has_yerr == (seeds > 1)
    figure.canvas.draw()
    label, panels = figure.get_supylabel(), [ax.get_tightbbox() for ax in figure.axes]
    (text,) = [found for found in figure.texts if found.get_text() == label]
    box = text.get_window_extent()
    assert min(panel.y0 for panel in panels) < box.y0
    assert box.y1 < max(panel.y1 for panel in panels)


def test_the_table_says_which_samplers_are_deterministic() -> None:
    table = comparison().assign(
        endpoint_error=np.nan, deterministic=lambda rows: (rows["sampler"] == "EM").astype(float)
    )
    heun, em = plotting.comparison_multiples(table, metric="sliced_w2").axes
    assert [ax.containers[0].lines[0].get_color() for ax in (heun, em)] == [plotting.LINES[1], plotting.LINES[0]]


def test_one_budget_has_an_axis_around_it_and_the_lowest_panels_have_its_name() -> None:
    table = pd.concat([comparison().query("sampler == 'EM' and budget == 20").assign(sampler=name) for name in "abc"])
    figure = plotting.comparison_multiples(table, metric="sliced_w2", columns=2)
    assert [ax.get_xlabel() for ax in figure.axes] == ["", "network calls (NFE)", "network calls (NFE)", ""]
    figure.canvas.draw()
    low, high = figure.axes[0].get_xlim()
    assert high / low == pytest.approx(5)
    assert low < 20 < high
    assert [text.get_text() for text in figure.axes[2].get_xticklabels() if low < text.get_position()[0] < high] == [
        "10", "20", "30", "40",
    ]  # fmt: skip


def test_multiples_of_values_that_are_zero_are_drawn() -> None:
    for metric in ("sliced_w2", "endpoint_error"):
        table = comparison()
        table.loc[table["sampler"] == "Heun", metric] = 0.0
        figure = plotting.comparison_multiples(table, metric=metric)
        figure.canvas.draw()
        table[metric] = 0.0
        plotting.comparison_multiples(table, metric=metric).canvas.draw()


def test_ratio_table_writes_every_ratio_and_reason(ax: Axes) -> None:
    rows = [("ddim", 5, 1.234, "ok", 5), ("ddim", 10, 57.3, "ok", 10), ("ode", 0, 1.0, "ok", 86),
            ("adams", 5, 2041.3, "ok", 5), ("adams", 10, 3.1e9, "ok", 10),
            ("heun", 5, math.nan, "diverged: x", 5), ("heun", 10, math.nan, "refused: y", 10)]  # fmt: skip
    summary = pd.DataFrame(rows, columns=["sampler", "budget", "w2_ratio", "status", "nfe"])
    image = plotting.ratio_table(ax, summary, metric="w2")
    assert {text.get_position(): text.get_text() for text in ax.texts} == {
        (0, 0): "1.23", (1, 0): "57", (2, 1): "1.00 (86)", (0, 2): "2,041", (1, 2): "$10^{9}$",
        (0, 3): "×", (1, 3): "–",
    }  # fmt: skip
    assert [label.get_text() for label in ax.get_xticklabels()] == ["5 calls", "10 calls", "own steps"]
    assert np.ma.getmaskarray(image.get_array()).tolist() == [
        [False, False, True], [True, True, False], [False, False, True], [True] * 3,
    ]  # fmt: skip


def test_sample_panels_lay_samplers_under_budgets() -> None:
    x = draws(500)
    figure = plotting.sample_panels({("ddim", 5): x, ("ddim", 10): x, ("ode", 0): x}, GAUSSIAN)
    axes = np.array(figure.axes).reshape(3, 3)
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["data", "ddim", "ode"]
    assert [ax.get_title() for ax in axes[1]] == ["5 calls", "10 calls", "own steps"]
    assert [bool(ax.images) for ax in axes.flat] == [True, False, False, True, True, False, False, False, True]
    assert len({(*ax.get_xlim(), *ax.images[0].get_clim()) for ax in axes.flat if ax.images}) == 1
    images = torch.linspace(-1, 1, 12)[:, None, None, None].expand(12, 1, 4, 4)
    sheet = plotting.sample_panels({("ddim", 5): images}, images.flip(0))
    data, made = sheet.axes
    assert np.asarray(data.images[0].get_array())[0, 0, 0] == 1
    assert np.asarray(made.images[0].get_array()).shape == (14, 14, 4)


def test_sample_panels_say_what_is_missing_and_what_is_outside() -> None:
    x = draws(400)
    x[:100] += 1000
    figure = plotting.sample_panels({("ddim", 5): x}, GAUSSIAN, {("ddim", 10): "refused", ("heun", 5): "diverged"})
    texts = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert texts == [[], [], ["25 % outside"], ["refused"], ["diverged"], [""]]


def test_density_comparison_shares_limits_and_colours() -> None:
    x = draws(2000)
    figure = plotting.density_comparison(GAUSSIAN, {"a": x, "b": 3 * x})
    data, first, second = figure.axes
    assert [ax.get_title() for ax in figure.axes] == ["data\nexact density", "a\n2,000 samples", "b\n2,000 samples"]
    assert [ax.get_xlabel() for ax in figure.axes] == ["$x_1$"] * 3
    assert data.get_ylabel() == "$x_2$"
    assert data.get_xlim() == first.get_xlim() == second.get_xlim()
    assert data.images[0].get_clim() == first.images[0].get_clim() == second.images[0].get_clim()
    assert np.asarray(second.images[0].get_array()).max() < np.asarray(first.images[0].get_array()).max()


def test_the_rows_of_a_legend_are_of_nearly_equal_length() -> None:
    figure, axes = plotting.panels(2)
    for i in range(7):
        axes[0, 0].plot([0, 1], label=f"sampler {i}")
    plotting.legend_below(figure)
    assert figure.legends[0]._ncols == 4  # five would fit side by side, with two left for a second row


def test_many_samplers_stand_in_rows_with_labels_along_the_edges() -> None:
    x = draws(200)
    figure = plotting.density_comparison(GAUSSIAN, {str(i): x for i in range(7)})
    assert len(figure.axes) == 8
    assert [bool(ax.get_ylabel()) for ax in figure.axes] == [True, False, False, False] * 2
    assert [bool(ax.get_xlabel()) for ax in figure.axes] == [False] * 4 + [True] * 4
    figure = plotting.trajectory_comparison({str(i): torch.stack([x, x / 2]) for i in range(7)})
    assert [bool(ax.get_xlabel()) for ax in figure.axes[:7]] == [False] * 3 + [True] * 4
    assert [ax.xaxis.get_tick_params()["labelbottom"] for ax in figure.axes[:7]] == [False] * 3 + [True] * 4


def test_score_field_comparison_shares_arrows_and_states_the_error() -> None:
    class Scaled(ExactScore):
        def __call__(self, x: Tensor, t: float) -> object:  # type: ignore[override]
            exact = super().__call__(x, t)
            return type("Prediction", (), {"score": 1.25 * exact.score})

    figure = plotting.score_field_comparison(Scaled(GAUSSIAN, MODEL.sde), MODEL, [0.1, 0.9], arrows=5)
    assert len(figure.axes) == 4
    assert figure.axes[0].get_title() == "$t$ = 0.1,  $\\sigma$ = 0.32\nrelative error 25 %"
    assert [figure.axes[i].get_ylabel().splitlines()[0] for i in (0, 2)] == ["learned score", "exact score"]
    assert "$|s| / (|s| + u)$ of its cell" in figure.get_supxlabel()
    figure.canvas.draw()
    (note,) = [found for found in figure.texts if found.get_text() == figure.get_supxlabel()]
    box = note.get_window_extent()
    assert 0 < box.x0 < box.x1 < figure.bbox.x1
    assert 0 < box.y0 < box.y1 < min(ax.get_tightbbox().y0 for ax in figure.axes)
    for above, below in zip(figure.axes[:2], figure.axes[2:], strict=True):
        assert above.get_xlim() == below.get_xlim()
        assert above.images[0].get_clim() == below.images[0].get_clim()
        learned, exact = (next(c for c in ax.collections if hasattr(c, "U")) for ax in (above, below))
        cell = (above.get_xlim()[1] - above.get_xlim()[0]) / 5
        lengths = [np.hypot(field.U, field.V) / cell for field in (learned, exact)]
        r_learned, r_exact = (length / (1 - length) for length in lengths)  # |s| / unit
        assert r_learned == pytest.approx(1.25 * r_exact, rel=1e-3)


def test_behind_a_learned_score_is_no_exact_density() -> None:
    class Learned:
        sde, event_shape = VPSDE(), (2,)

        def __call__(self, x: Tensor, t: float) -> object:
            return MODEL(x, t)

    learned, exact = plotting.score_field_comparison(Learned(), MODEL, [0.5], arrows=5).axes  # type: ignore[arg-type]
    assert [len(ax.images) for ax in (learned, exact)] == [0, 1]


def test_score_error_field_shows_the_error_at_every_pixel_in_one_scale() -> None:
    doubled = ExactScore(GaussianMixture([1.0], [[0.5, -0.5]], [[[1.96, 0.0], [0.0, 1.0]]]), VPSDE())
    figure = plotting.score_error_field(doubled, MODEL, [0.3, 0.1], resolution=20)
    panels = [ax for ax in figure.axes if ax.get_title()]
    (bar,) = [ax for ax in figure.axes if ax not in panels]
    assert bar._colorbar.extend == "both"  # type: ignore[attr-defined]
    assert bar.get_ylabel() == "error of the noise"
    for ax, t in zip(panels, (0.3, 0.1), strict=True):
        image = ax.get_images()[0]
        left, right, bottom, top = image.get_extent()
        x = torch.tensor([[left + (right - left) * 5.5 / 20, bottom + (top - bottom) * 14.5 / 20]])
        expected = (doubled(x, t).noise - MODEL(x, t).noise).square().mean().sqrt()
        assert np.asarray(image.get_array())[14, 5] == pytest.approx(float(expected), rel=1e-4)
        assert image.get_clim() == (1e-3, 1)


def test_diagnosis_draws_every_number_by_noise_level() -> None:
    found = diagnose(MODEL, GAUSSIAN, levels=4, count=80)
    loss, slope, _, law = plotting.diagnosis(found).axes
    noise = found.table["noise"].to_numpy()
    assert {line.get_label() for line in loss.lines} == {"loss", "irreducible part", "excess: Fisher divergence"}
    np.testing.assert_allclose(loss.lines[1].get_xydata(), np.stack([noise, found.table["irreducible"]], 1))
    known = found.table[found.table["slope_error"] < 0.2]
    assert 0 < len(known) < 4
    np.testing.assert_allclose(slope.lines[0].get_xydata(), known[["noise", "slope"]])
    band = slope.collections[0].get_paths()[0].vertices[:, 1]
    assert slope.get_ylim()[0] < band.min() < band.max() < slope.get_ylim()[1]
    assert law.get_yscale() == "log"
    loud = replace(found, calibration=replace(found.calibration, slope=found.calibration.slope / 2))
    assert slope.get_xlim() == loss.get_xlim()
    low, high = plotting.diagnosis(loud).axes[1].get_ylim()
    assert low < loud.table["slope"][loud.table["slope_error"] < 0.2].min() < 0.6
    assert high > 1


def test_bound_terms_are_drawn_at_their_noisier_level(ax: Axes) -> None:
    times = log_snr(VPSDE(), steps=6).flip(0)
    bound = variational_bound(MODEL, draws(50).double(), times=times)
    plotting.bound_terms(ax, {"large": bound})
    np.testing.assert_allclose(ax.lines[0].get_xdata(), times[1:])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), bound.steps.mean(1))
    assert f"{bound.mean:.4g}" in str(ax.lines[0].get_label())


def test_long_settings_are_whole_and_so_is_the_label() -> None:
    long = ", ".join(f"group_{i}.option_{i}=[first,second]" for i in range(8))
    table = pd.DataFrame({"setting": [long], "mean": [1.0], "standard_error": [math.nan]})
    figure = plotting.means_with_errors({"sliced_w2 over its noise floor": table})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()
    (ax,) = figure.axes
    (name,) = ax.get_yticklabels()
    assert name.get_text().replace("\n", " ") == long
    for text in (name, ax.xaxis.label):
        box = text.get_window_extent()
        assert box.x0 > 0
        assert box.y0 > 0


def test_ratios_are_held_against_one() -> None:
    table = pd.DataFrame({"setting": ["a", "b"], "mean": [0.98, 1.03], "standard_error": [0.01, 0.01]})
    figure = plotting.means_with_errors({"energy over its noise floor": table}, {"energy over its noise floor": 1.0})
    (ax,) = figure.axes
    assert figure.get_supxlabel() == "points: means over seeds ± standard error; dashed: noise floor"
    assert ax.lines[-1].get_linestyle() == "--"
    assert np.asarray(ax.lines[-1].get_xdata()).tolist() == [1, 1]
    assert ax.get_xlim()[0] <= 0.75
    assert ax.get_xlim()[1] >= 1.25
    assert ax.get_ylim() == (1.5, -0.5)


def test_unlike_means_have_axes_of_their_own_and_far_ones_a_logarithmic_axis() -> None:
    ratios = pd.DataFrame({"setting": ["a", "b", "c"], "mean": [0.98, 30.0, math.nan], "standard_error": math.nan})
    losses = pd.DataFrame({"setting": ["d"], "mean": [0.7], "standard_error": [0.1]})
    above, below = plotting.means_with_errors({"ratio": ratios, "loss": losses}, {"ratio": 1.0}).axes
    assert [ax.get_xlabel() for ax in (above, below)] == ["ratio", "loss"]
    assert [ax.get_xscale() for ax in (above, below)] == ["log", "linear"]
    assert [label.get_text() for label in below.get_yticklabels()] == ["d"]
    assert above.get_xlim()[0] < 0.75
    assert not [line for line in below.lines if line.get_linestyle() == "--"]


def test_certificates_stand_in_rows() -> None:
    found = certify_all(VPSDE(), {"DDIM": DDIM(), "Langevin": LangevinCorrector(), "Euler": EulerMaruyama()}, (5, 20))
    figure = plotting.certificates(found)
    order, bias = figure.axes
    assert [label.get_text() for label in order.get_yticklabels()] == ["DDIM", "Euler (noise)"]
    assert [name.removesuffix(" (noise)") for name in (label.get_text() for label in order.get_yticklabels())] == [
        name for name in found.table["step"] if name != "Langevin"
    ]
    assert order.yaxis_inverted()
    ddim, _, euler = found.certificates
    assert np.asarray(order.collections[0].get_offsets()).tolist() == [[ddim.measured, 0], [euler.measured, 1]]
    assert [line.get_xdata()[1] for line in bias.lines] == pytest.approx(euler.bias["std"].abs().tolist())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "declared", "measured", "measured, not as declared", "5 steps", "20 steps",
    ]  # fmt: skip


def test_the_first_picture_has_its_titles_whole(tmp_path: Path) -> None:
    figure, axes = plotting.panels(3)
    for ax in axes[0]:
        plotting.density(ax, GAUSSIAN, limits=SQUARE)
        ax.set_title("a title")
    figure.savefig(tmp_path / "panels.png")
    pixels = np.asarray(Image.open(tmp_path / "panels.png").convert("L"))
    assert (pixels[:3] == 255).all()


def test_panels_have_one_look_whatever_is_drawn(ax: Axes) -> None:
    ax.set(title="title", xlabel="x", ylabel="y")
    assert {text.get_fontsize() for text in (ax.title, ax.xaxis.label, ax.yaxis.label)} == {10}
    assert {text.get_color() for text in (ax.title, ax.xaxis.label, *ax.get_xticklabels())} == {plotting.INK}
    assert ax.plot([0, 1])[0].get_color() == plotting.LINES[0]
    assert ax.spines["left"].get_edgecolor() == to_rgba(plotting.RULE)


def test_likelihood_histograms_are_densities_in_common_bins(ax: Axes) -> None:
    values = {"in": torch.linspace(0, 1, 500), "out": torch.cat([torch.linspace(2, 3, 499), torch.tensor([1e9])])}
    plotting.likelihood_histogram(ax, values, "bits per dim")
    inside, outside = (patch.get_data() for patch in ax.patches)
    for steps in (inside, outside):
        assert steps.values @ np.diff(steps.edges) == pytest.approx(1)
    np.testing.assert_array_equal(inside.edges, outside.edges)
    assert inside.edges[-1] < 3.1  # one outlier does not set the scale
    legend = ax.get_legend()
    assert legend.get_title().get_text() == "means (dashed)"
    assert [text.get_text() for text in legend.get_texts()] == ["in: 0.5", "out: 2e+06"]
    assert ax.lines[0].get_xdata()[0] == pytest.approx(0.5)


def test_animation_plays_evenly_chosen_states_and_holds_the_last(tmp_path: Path) -> None:
    trajectory = torch.linspace(30, 1, 41)[:, None, None] * torch.randn(
        50, 2, generator=torch.Generator().manual_seed(0)
    )
    path = plotting.animation(trajectory, tmp_path / "points.gif", frames=5, fps=10, hold=0.2)
    gif = Image.open(path)
    durations = []
    for frame in range(gif.n_frames):
        gif.seek(frame)
        durations.append(gif.info["duration"])
    assert durations == [100, 100, 100, 100, 300]


def test_animation_of_points_zooms_in_and_never_out() -> None:
    ax = plotting.panels(1)[1][0, 0]
    unit = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    draw = _point_frames(ax, torch.stack([10 * unit, 2 * unit, 4 * unit, 0.1 * unit, unit]))
    widths = []
    for i in range(5):
        dots = draw(i)
        widths.append(np.diff(ax.get_xlim())[0])
    assert np.array(widths) / widths[-1] == pytest.approx([10, 2, 2, 1, 1], rel=1e-3)
    assert np.allclose(dots.get_offsets(), unit)


def test_animation_of_images_ends_in_their_own_contrast_and_shows_noise_with_it() -> None:
    ax = plotting.panels(1)[1][0, 0]
    unit = torch.randn(6, 1, 30, 30, generator=torch.Generator().manual_seed(0))
    images = unit.sign() * 0.6
    images[0, 0, 0, 0] = 3  # a pixel far away makes no other darker
    draw = _image_frames(ax, torch.stack([50 * unit, 2 * images, 1.01 * images, 0.5 * images, images]))
    noise, twice, nearly, half, last = ((2 * draw(i).get_array()[:30, :30, 0] - 1).std() for i in range(5))
    assert last == pytest.approx(0.6, rel=0.01)
    assert half == pytest.approx(0.3, rel=0.02)
    assert [twice, nearly] == pytest.approx([last, last], rel=0.02)
    assert noise == pytest.approx(last, rel=0.15)


def test_animation_of_images(tmp_path: Path) -> None:
    images = torch.linspace(3, -1, 4)[:, None, None, None, None].expand(4, 9, 1, 4, 4)
    gif = Image.open(plotting.animation(images, tmp_path / "images.gif", hold=0, levels=["a", "b", "c", "d"]))
    centres = []
    for frame in range(gif.n_frames):
        gif.seek(frame)
        grey = np.asarray(gif.convert("L"))
        centres.append(
            int(np.median(grey[grey.shape[0] // 3 : grey.shape[0] // 2, grey.shape[1] // 4 : grey.shape[1] // 2]))
        )
    assert centres[0] > 250
    assert centres[-1] < 5


def test_pyplot_is_never_loaded() -> None:
    code = "import sys, score_sde.plotting; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_refusals(ax: Axes) -> None:
    with pytest.raises(ValueError, match=r"points of shape \(..., 2\), got \(4, 3\)"):
        plotting.samples(ax, torch.zeros(4, 3))
    with pytest.raises(ValueError, match="none of the points is finite"):
        plotting.density(ax, torch.full((4, 2), math.nan))
    with pytest.raises(ValueError, match=r"a trajectory has shape .* got \(1, 4, 2\)"):
        plotting.trajectories(ax, torch.zeros(1, 4, 2))
    with pytest.raises(TypeError, match=r"`result\.trajectory` of sample\(\.\.\., trajectory=True\), got NoneType"):
        plotting.trajectories(ax, None)
    with pytest.raises(TypeError, match=r"x is a tensor, got ndarray: torch\.as_tensor makes one"):
        plotting.density(ax, np.zeros((4, 2)))

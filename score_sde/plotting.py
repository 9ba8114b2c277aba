"""Pictures of densities, score fields, trajectories, images and comparisons.

A function that draws takes matplotlib axes and returns the artists it made; a function that composes returns a Figure.
Figures are objects, never pyplot's current one, so that drawing works without a display and in any thread. Panels
that are to be compared share their limits and their colour scale, and limits leave out the farthest samples rather
than let one outlier set the scale.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colorbar import Colorbar
from matplotlib.colors import ListedColormap, LogNorm, PowerNorm
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.quiver import Quiver
from matplotlib.text import Text
from matplotlib.ticker import Formatter, Locator, LogLocator, MaxNLocator, NullLocator
from PIL import Image
from torch import Tensor

from score_sde.checks import one_of
from score_sde.evaluation.bounds import Bound
from score_sde.evaluation.certify import Certificates
from score_sde.evaluation.diagnostics import Diagnosis, field_error
from score_sde.score import ExactScore, ScoreModel
from score_sde.sde import SDE
from score_sde.targets import Target

Limits = tuple[float, float, float, float]
"""Left, right, bottom and top of a panel."""

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's line colours, told apart by the colour-blind."""

MARKERS = "os^Dv<P"
DASHES = ("-", "--", "-.", ":")
INK, RULE = "#2b2f36", "#8a929c"
DENSITY = colormaps["magma"]
LOG_DENSITY = ListedColormap(DENSITY(np.linspace(0.0, 0.72, 256)))  # dark enough for white arrows everywhere
TIME = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.92, 256)))  # dark enough for a white page
NATS = 12.0
"""Depth of a log-density's colour scale below its maximum."""

ARROWS: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1, "pivot": "middle", "width": 0.005,
                          "headwidth": 3.5, "headlength": 4, "headaxislength": 3.5}  # fmt: skip
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8, "title_fontsize": 8, "alignment": "left"}
NOISE_LEVEL = "noise level  $\\sigma / \\alpha$"
QUARTILE = re.compile("_q[1-4]$")
QUARTILES = "q1 to q4: quartiles of noise levels,\nfrom the least to the most noise"
METRIC_NAMES = {
    "sliced_w2": "sliced $W_2$",
    "w2": "$W_2$",
    "energy": "energy distance",
    "mmd": "MMD",
    "mode_weights": "mode weights, total variation",
    "mode_spread": "mode spread, relative error",
    "endpoint_error": "endpoint error (data std)",
}
AGAINST = {
    "nfe": "network calls (NFE)",
    "seconds": "seconds for all samples of a run",
    "seconds_per_sample": "seconds per sample",
}
RATIOS = ListedColormap(colormaps["cividis"](np.linspace(1.0, 0.12, 256))).with_extremes(bad="#eceef1")
"""From the noise floor (light) to ten times it (dark); grey where there is no value."""


# --- canvas -----------------------------------------------------------------------------------------------------------


class Panel(Axes):
    """Axes with titles of the labels' size; matplotlib's go back to a size of its own whenever they are set."""

    def set_title(self, label: str, *args: Any, **options: Any) -> Text:
        return super().set_title(label, *args, **{"fontsize": 10, "color": INK, **options})


def panels(
    columns: int, rows: int = 1, *, width: float = 3.0, height: float = 3.0, sharey: bool = False
) -> tuple[Figure, np.ndarray]:
    """A figure of rows x columns panels, each of the given size in inches, and its axes as an array (rows, columns)."""
    figure = Figure(figsize=(columns * width, rows * height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey, subplot_kw={"axes_class": Panel})
    for ax in axes.flat:
        ax.set_prop_cycle(color=LINES)
        _frame(ax)
    return figure, axes


def look(i: int) -> dict[str, Any]:
    """Colour and marker of line i: no two of the first 49 are alike."""
    return {"color": LINES[i % len(LINES)], "marker": MARKERS[(i + i // len(LINES)) % len(MARKERS)]}


def curves(ax: Axes, x: str, y: str, *, legend: Literal["inside", "beside"] | None = "inside", title: str = "") -> None:
    """The manners of a panel of curves: labels, a light grid, `LogTicks` along logarithmic axes, and a legend.

    Args:
        ax: where curves were drawn.
        x, y: labels of the axes.
        legend: of what is labelled: inside, where it covers least; beside the panel; or none.
        title: of the legend.
    """
    ax.set(xlabel=x, ylabel=y)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color="#e3e6ea", linewidth=0.6)
    ax.set_axisbelow(True)
    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_scale() == "log":
            _log_ticks(axis)
    entries = _entries(ax)
    if legend and entries:
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if legend == "beside" else {}
        ax.legend(list(entries.values()), list(entries), title=title or None, **LEGEND, **place)
    _frame(ax)


def legend_below(figure: Figure, title: str = "") -> None:
    """One legend beneath all panels, of whatever any of them labels, by which the figure grows."""
    entries = _entries(*figure.axes)
    inches = 0.6 + 0.065 * max(map(len, entries), default=0)
    columns = max(1, int(figure.get_figwidth() / inches))
    lines = math.ceil(len(entries) / columns) + (title.count("\n") + 1 if title else 0)
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.17 * lines)
    figure.legend(list(entries.values()), list(entries), title=title or None, loc="outside lower center", ncols=columns,
                  **LEGEND)  # fmt: skip


def _entries(*axes: Axes) -> dict[str, Any]:
    """label -> artist, of all that the axes label."""
    pairs = (zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes)
    return {label: artist for pair in pairs for artist, label in pair}


def note(figure: Figure, text: str) -> None:
    """What a figure's signs mean, in small print beneath all panels."""
    figure.supxlabel(text, fontsize=8, color=INK)


def crosses(ax: Axes, x: Any, colour: Any, label: str = "") -> None:
    """A cross on the upper edge at each x, for what was lost or lies beyond the axis."""
    if len(x):
        ax.plot(x, np.full(len(x), 0.97), "x", color=colour, markersize=6, zorder=4, label=label, clip_on=False,
                in_layout=False, transform=ax.get_xaxis_transform())  # fmt: skip


def colour_scale(
    image: AxesImage | LineCollection, axes: Axes | np.ndarray, label: str, *, extend: str = "both", **options: Any
) -> Colorbar:
    """The scale of an image beside the axes that share it, by default open at both ends: colours say "or beyond"."""
    bar = image.figure.colorbar(image, ax=axes, label=label, extend=extend, format="{x:g}", **options)
    bar.minorticks_off()
    bar.outline.set_visible(False)
    _frame(bar.ax)
    return bar


def limits_of(x: Target | Tensor, *, coverage: float = 0.995, margin: float = 0.15) -> Limits:
    """A square that holds the share `coverage` of the points along each axis, with a margin around it.

    Args:
        x: points (..., 2), or a target from which points are drawn.
        coverage: share of the points between the quantiles of each axis.
        margin: blank border, in units of half the square's side.
    """
    points = _points(x)
    tail = torch.tensor([(1 - coverage) / 2, (1 + coverage) / 2], dtype=points.dtype)
    low, high = torch.quantile(points[:: max(1, len(points) // 100_000)], tail, dim=0)
    centre, half = (low + high) / 2, max(float((high - low).max()) / 2, 1e-6) * (1 + margin)
    return tuple((centre[i] + sign * half).item() for i in (0, 1) for sign in (-1, 1))


# --- planes -----------------------------------------------------------------------------------------------------------


def density(
    ax: Axes, x: Target | Tensor, *, limits: Limits | None = None, resolution: int = 200, peak: float | None = None
) -> AxesImage:
    """The density of a two-dimensional target, or the histogram of samples as a density, as an image.

    Colour follows the square root of the density, so that light modes, and samples between the modes, are seen. The
    share of samples outside the limits is written where it is a per cent or more.

    Args:
        ax: where to draw.
        x: a target, or samples (n, 2). Samples outside the limits count in the normalisation.
        limits: the part of the plane shown; by default nearly all of it.
        resolution: pixels a side for a target; samples get half as many bins.
        peak: the density that has the brightest colour; the maximum by default.
    """
    limits = limits or limits_of(x)
    if isinstance(x, Tensor):
        points = _points(x)
        values = _histogram(points, limits, resolution // 2)
        _write_outside(ax, points, limits)
    else:
        values = _log_density(x, limits, resolution).exp().numpy()
    peak = peak or float(values.max()) or 1.0
    _plane(ax, limits)
    norm = PowerNorm(0.5, vmin=0, vmax=peak, clip=True)
    return ax.imshow(values, extent=limits, origin="lower", cmap=DENSITY, norm=norm, interpolation="nearest")


def samples(
    ax: Axes, x: Tensor, *, limits: Limits | None = None, color: Any = LINES[0], size: float | None = None
) -> PathCollection:
    """Samples (n, 2) as dots, smaller and fainter the more there are."""
    points = _points(x)
    size = size or min(20.0, max(0.5, 8000 / len(points)))
    alpha = min(0.8, max(0.15, 20 / len(points) ** 0.5))
    _plane(ax, limits or limits_of(x))
    return ax.scatter(points[:, 0], points[:, 1], s=size, color=color, alpha=alpha, linewidths=0, rasterized=True)


def contours(ax: Axes, target: Target, *, limits: Limits | None = None, resolution: int = 200) -> QuadContourSet:
    """Contours of a target's density one and three nats below its maximum."""
    limits = limits or limits_of(target)
    log_density = _log_density(target, limits, resolution)
    levels = [float(log_density.max()) - 3, float(log_density.max()) - 1]
    _plane(ax, limits)
    x, y = (axis.numpy() for axis in _cell_centres(limits, resolution))
    values = log_density.clamp_min(levels[0] - NATS).numpy()
    return ax.contour(x, y, values, levels, colors="#9aa3ad", linewidths=0.6, linestyles="solid")


def score_field(
    ax: Axes,
    model: ScoreModel,
    t: float,
    *,
    target: Target | None = None,
    limits: Limits | None = None,
    arrows: int = 19,
    unit: float | None = None,
) -> tuple[AxesImage | None, Quiver]:
    """The score at time t as arrows, over the log-density of the marginal where the law of the data is known.

    An arrow is |s| / (|s| + unit) of its cell long: both the gentle slopes inside the modes and the steep ones outside
    them can be seen. Colours span twelve nats below the maximum.

    Args:
        ax: where to draw.
        model: of two-dimensional data.
        t: a time of the model's SDE.
        target: the law of clean data; that of an `ExactScore` is known.
        limits: the part of the plane shown; needed when the target is not known.
        arrows: arrows a side.
        unit: |score| of an arrow half its cell long; by default that which a quarter of the plane stays below.

    Raises:
        ValueError: neither a target nor limits are known.
    """
    law = _marginal(model, t, target)
    if law is None and limits is None:
        raise ValueError("score_field needs limits or a target: the model does not know the law of its data")
    limits = limits or limits_of(law)
    image = None
    if law is not None:
        values = _log_density(law, limits, 200)
        peak = float(values.max())
        image = ax.imshow(values.numpy(), extent=limits, origin="lower", cmap=LOG_DENSITY, vmin=peak - NATS, vmax=peak,
                          interpolation="bilinear")  # fmt: skip
    points = _lattice(*_cell_centres(limits, arrows))
    score = _score(model, points, t)
    unit = unit or _unit(score)
    cell = (limits[1] - limits[0]) / arrows
    arrow = cell * score / (score.norm(dim=1, keepdim=True) + unit)
    _plane(ax, limits)
    quiver = ax.quiver(*points.T.numpy(), *arrow.T.numpy(), color="white" if image else INK, **ARROWS)
    return image, quiver


def trajectories(
    ax: Axes, trajectory: Tensor, *, limits: Limits | None = None, count: int = 40
) -> tuple[LineCollection, PathCollection, PathCollection]:
    """Paths of samples through the plane, coloured from the start of sampling to its end, with start and end points.

    Args:
        ax: where to draw.
        trajectory: states (steps, batch, 2) in the order of sampling.
        limits: the part of the plane shown; by default that of all states.
        count: how many of the batch are drawn, the first ones.

    Returns:
        The paths, the start points (hollow) and the end points (filled).
    """
    paths = _trajectory(trajectory)[:, :count]
    segments = torch.stack([paths[:-1], paths[1:]], dim=2)
    progress = torch.linspace(0, 1, len(segments)).repeat_interleave(paths.shape[1])
    _plane(ax, limits or limits_of(paths))
    lines = LineCollection(list(segments.flatten(0, 1).numpy()), array=progress.numpy(), cmap=TIME, linewidths=0.7,
                           alpha=0.7, capstyle="round")  # fmt: skip
    ax.add_collection(lines, autolim=False)
    starts = ax.scatter(
        paths[0, :, 0], paths[0, :, 1], s=9, facecolors="white", edgecolors=[TIME(0.0)], linewidths=0.7, zorder=3
    )
    ends = ax.scatter(paths[-1, :, 0], paths[-1, :, 1], s=9, color=LINES[1], linewidths=0, zorder=4)
    return lines, starts, ends


# --- images and curves ------------------------------------------------------------------------------------------------


def image_grid(ax: Axes, images: Tensor, *, columns: int | None = None) -> AxesImage:
    """Images (n, 1 or 3, height, width) in [-1, 1] as one mosaic, row by row; values beyond are clipped.

    Raises:
        ValueError: the shape is another.
    """
    mosaic = _mosaic(images, columns)
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set_visible(False)
    return ax.imshow(mosaic, interpolation="nearest")


def loss_curves(
    ax: Axes,
    metrics: pd.DataFrame | Sequence[Mapping[str, Any]],
    *,
    columns: Sequence[str] | None = None,
    halflife: float = 0.01,
    legend: Literal["inside", "beside"] | None = "beside",
) -> list[Line2D]:
    """Losses against training steps: each smoothed, over its raw values; on a logarithmic axis where all are positive.

    Names that end in _q1 to _q4 are means over quartiles of the noise levels drawn, from the least to the most noise, and
    have colours; the others are dark, told apart by their dashes.

    Args:
        ax: where to draw.
        metrics: a `step` column and those to be drawn, as in a run's `metrics.jsonl`, or such rows
            (`TrainingResult.metrics`); empty cells are left out.
        columns: which to draw; by default all whose name starts with "loss".
        halflife: of the exponential smoothing, as a fraction of the whole curve.
        legend: see `curves`.

    Returns:
        The smoothed lines, one a column.
    """
    metrics = pd.DataFrame(metrics)
    names = list(columns) if columns else [name for name in metrics if str(name).startswith("loss")]
    quartiles = [name for name in names if QUARTILE.search(str(name))]
    whole = [name for name in names if name not in quartiles]
    looks: dict[str, dict[str, Any]] = {
        name: {"color": INK, "linestyle": DASHES[i % len(DASHES)]} for i, name in enumerate(whole)
    }
    colours = TIME(np.linspace(0, 1, len(quartiles)))
    looks |= {name: {"color": colour} for name, colour in zip(quartiles, colours, strict=True)}
    lines = []
    for name in names:
        curve = metrics[["step", name]].dropna()
        smooth = curve[name].ewm(halflife=max(1.0, halflife * len(curve))).mean()
        label = str(name)[-2:] if name in quartiles else str(name).replace("_", " ")
        ax.plot(curve["step"], curve[name], color=looks[name]["color"], alpha=0.25, linewidth=0.6)
        lines += ax.plot(curve["step"], smooth, linewidth=1.6, label=label, **looks[name])
    ax.plot([], [], color=INK, alpha=0.4, linewidth=0.6, label="not smoothed")
    values = metrics[names].to_numpy(dtype=float)
    if (values > 0).any() and not (values <= 0).any():
        ax.set_yscale("log")
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    curves(
        ax,
        "training step",
        "loss" if all(str(name).startswith("loss") for name in names) else "",
        legend=legend,
        title=QUARTILES if quartiles else "",
    )
    return lines


def quality_against_nfe(
    ax: Axes, table: pd.DataFrame, *, metric: str | None = None, against: str = "nfe"
) -> list[Line2D]:  # fmt: skip
    """A metric against network calls, a line for each sampler, and the noise floor as a band.

    Lines are means over seeds and their bands ranges; a cross on the upper edge marks a run that failed.

    Args:
        ax: where to draw.
        table: as `score_sde.evaluation.compare` returns it, of one model.
        metric: a column of the table; its first metric by default. Samplers that it does not apply to are left
            out.
        against: "nfe", "seconds" or "seconds_per_sample".

    Raises:
        ValueError: the table is of several models, or has no such metric.

    Returns:
        One line a sampler, in the table's order.
    """
    metric = _metric_of(table, metric)
    lines = []
    measured = table.groupby("sampler", sort=False).filter(
        lambda runs: runs[metric].notna().any() or not runs["status"].eq("ok").any()
    )
    for i, (name, runs) in enumerate(measured.groupby("sampler", sort=False)):
        style = look(i)
        seeds = _over_seeds(runs, metric, against)
        ax.fill_between(seeds[against], seeds["min"], seeds["max"], color=style["color"], alpha=0.15, linewidth=0)
        lines += ax.plot(seeds[against], seeds["mean"], markersize=4, linewidth=1.5, label=str(name), **style)
        _crosses(ax, runs, against, style["color"])
    _floor(ax, table, metric)
    ax.set(xscale="log", yscale="log")
    curves(ax, AGAINST[against], METRIC_NAMES.get(metric, metric), legend="inside" if len(lines) <= 6 else "beside")
    return lines


def solvers_against_calls(ax: Axes, table: pd.DataFrame, column: str, label: str) -> list[Line2D]:
    """A figure of tuned and untuned solvers against their number of calls; the converged solution's as a dashed line.

    Args:
        ax: where to draw.
        table: as `score_sde.evaluation.coupled.best_of_each` returns it.
        column: which figure.
        label: what it is called.
    """
    lines, names = [], {"untuned": "best untuned", "late": "best untuned, begun late"}
    for i, (kind, part) in enumerate(table[table["calls"] > 0].groupby("kind", sort=False)):
        lines += ax.plot(part["calls"], part[column], markersize=4.5, linewidth=1.5,
                         label=names.get(str(kind), str(kind)), **look(i))  # fmt: skip
    floor = table.loc[table["calls"] == 0, column].mean()
    if floor > 1e-6 * table[column].max():  # a distance to the converged solution is 0 for itself, but for rounding
        ax.axhline(floor, color=INK, linestyle="--", linewidth=1, label="converged solution")
    ax.set_xticks(sorted({*table["calls"]} - {0}))
    ax.set_yscale("log")
    curves(ax, "network calls (NFE)", label)
    return lines


# --- composed figures -------------------------------------------------------------------------------------------------


def means_with_errors(table: pd.DataFrame, *, label: str = "", reference: float | None = None) -> Figure:
    """A point with its standard error for each setting, from the top down; settings without a value stay empty.

    Args:
        table: the columns setting, mean and standard_error; long settings are broken into lines.
        label: what the means are of.
        reference: a value to hold them against, as 1 for ratios: a dashed line, and a quarter of it on either side.
    """
    names = [textwrap.fill(str(setting), 50, break_on_hyphens=False) for setting in table["setting"]]
    lines = 1 + max(name.count("\n") for name in names)
    figure, axes = panels(1, width=8, height=0.8 + len(names) * (0.2 + 0.15 * lines))
    ax = axes[0, 0]
    ax.errorbar(table["mean"], range(len(names)), xerr=table["standard_error"], fmt="o", capsize=3)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    if reference is not None:
        ax.axvline(reference, color=INK, linestyle="--", linewidth=0.9)
        ax.update_datalim([(0.75 * reference, 0), (1.25 * reference, 0)], updatey=False)
        ax.autoscale_view(scaley=False)
    curves(ax, label, "")
    return figure


def comparison_multiples(
    table: pd.DataFrame, *, metric: str | None = None, against: str = "nfe", columns: int = 4
) -> Figure:  # fmt: skip
    """A metric against calls or seconds, a panel for each sampler with the others in grey behind it.

    Points are means over seeds with their standard deviations; the band is the noise floor and its standard deviation;
    a cross on the upper edge marks runs that diverged or failed. Blue are deterministic samplers, orange the others.

    Args:
        table: as `score_sde.evaluation.compare` returns it, of one model. Deterministic are samplers that its column
            `deterministic` says so of; in a table without one, those with a paired endpoint error.
        metric: a column of the table; its first metric by default. Samplers without a value are left out.
        against: "nfe", "seconds" or "seconds_per_sample".
        columns: panels in a row.
    """
    metric = _metric_of(table, metric)
    names = [name for name, runs in table.groupby("sampler", sort=False) if runs[metric].notna().any()]
    curves = {name: _over_seeds(table[table["sampler"] == name], metric, against) for name in names}
    fixed = table.get("deterministic", table["endpoint_error"].notna()).eq(True).groupby(table["sampler"]).any()
    columns = max(1, min(columns, len(names)))
    figure, axes = panels(columns, max(1, math.ceil(len(names) / columns)), width=2.3, height=1.9)
    for ax, name in zip(axes.flat, names, strict=False):
        runs = table[table["sampler"] == name]
        for other, curve in curves.items():
            if other != name:
                ax.plot(curve[against], curve["mean"], color="#d3d7dc", linewidth=0.8, zorder=1, label="other samplers")
        colour, kind = (LINES[0], "deterministic") if fixed[name] else (LINES[1], "stochastic")
        own = curves[name]
        ax.errorbar(own[against], own["mean"], yerr=own["std"], color=colour, marker="o", markersize=3.5, linewidth=1.6,
                    capsize=2, elinewidth=1, zorder=3, label=kind)  # fmt: skip
        _crosses(ax, runs, against, colour)
        _floor(ax, table, metric)
        ax.set_title(str(name).replace("_", " "))
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    _share_curves(figure, axes, len(names), AGAINST[against], METRIC_NAMES.get(metric, metric))
    legend_below(figure, "points: means over seeds ± std")
    return figure


def ratio_table(ax: Axes, summary: pd.DataFrame, *, metric: str) -> AxesImage:
    """A metric over its noise floor, a row for each sampler and a column for each budget, in colour and in numbers.

    Colour runs from 1 (light) to 10 floors on a logarithmic scale. Grey cells have no value: "x" diverged or failed, a
    dash was refused. Samplers without budgets stand in a column of their own, with their calls.

    Args:
        ax: where to draw.
        summary: as `score_sde.evaluation.summarise` returns it, of one model; rows keep its order.
        metric: one of its metrics.
    """
    samplers, budgets = list(dict.fromkeys(summary["sampler"])), sorted(set(summary["budget"]) - {0})
    columns = [*budgets, 0] if (summary["budget"] == 0).any() else budgets
    ratio = summary.pivot_table(index="sampler", columns="budget", values=f"{metric}_ratio", dropna=False)
    values = ratio.reindex(index=samplers, columns=columns).to_numpy(dtype=float)
    image = ax.imshow(np.ma.masked_invalid(values), cmap=RATIOS, norm=LogNorm(1, 10, clip=True), aspect="auto")
    for row in summary.to_dict("records"):
        i, j = samplers.index(row["sampler"]), columns.index(row["budget"])
        ax.text(j, i, _ratio_text(row, metric), ha="center", va="center", fontsize=8 if row["budget"] else 6.5,
                color="white" if values[i, j] > 3 else INK)  # fmt: skip
    ax.set_xticks(range(len(columns)), [f"{b} calls" if b else "own steps" for b in columns])
    ax.set_yticks(range(len(samplers)), [str(name).replace("_", " ") for name in samplers])
    _frame(ax)
    ax.tick_params(length=0)
    ax.xaxis.tick_top()
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(len(samplers) - 1) + 0.5, minor=True)
    ax.grid(True, which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="minor", length=0)
    return image


def _ratio_text(row: Mapping[Any, Any], metric: str) -> str:
    ratio = row[f"{metric}_ratio"]
    if math.isnan(ratio):
        return "–" if str(row["status"]).startswith("refused") else "×"
    number = ".2f" if ratio < 9.995 else ",.0f"
    text = f"{ratio:{number}}" if ratio < 99_999.5 else f"$10^{{{math.log10(ratio):.0f}}}$"
    return text if row["budget"] else f"{text} ({row['nfe']:.0f})"


def sample_panels(
    samples: Mapping[tuple[str, int], Tensor],
    reference: Target | Tensor | None = None,
    absent: Mapping[tuple[str, int], str] | None = None,
) -> Figure:
    """What every sampler makes within every budget: densities of points in the plane, or sheets of images.

    Args:
        samples: (sampler, budget) -> samples (n, 2) or images (n, 1 or 3, height, width).
        reference: the law of the data, or examples of it, shown in the first row.
        absent: (sampler, budget) -> why there are none, in a word.
    """
    said = dict(absent or {})
    names = list(dict.fromkeys(name for name, _ in (*samples, *said)))
    budgets = sorted({budget for _, budget in (*samples, *said)}, key=lambda budget: (budget == 0, budget))
    first = next(iter(samples.values()))
    law = reference if reference is not None else first
    figure, axes = panels(len(budgets), 1 + len(names), width=1.15, height=1.15)
    draw = _plane_drawer(law) if first.ndim == 2 else _sheet_drawer
    draw(axes[0, 0], law)
    axes[0, 0].set_ylabel("data", fontsize=7, color=INK)
    for ax in axes[0, 1:]:
        ax.set_axis_off()
    for row, name in zip(axes[1:], names, strict=True):
        for ax, budget in zip(row, budgets, strict=True):
            if (name, budget) in samples:
                draw(ax, samples[name, budget])
            else:
                ax.set(xticks=[], yticks=[], aspect="equal")
                ax.spines[:].set_visible(False)
                ax.text(0.5, 0.5, said.get((name, budget), ""), ha="center", va="center", fontsize=7, color=RULE)
        row[0].set_ylabel(name.replace("_", "\n"), fontsize=7, color=INK)
    for ax, budget in zip(axes[1], budgets, strict=True):
        ax.set_title(f"{budget} calls" if budget else "own steps", fontsize=8)
    return figure


def _plane_drawer(law: Target | Tensor) -> Callable[[Axes, Target | Tensor], None]:
    """Draws densities with the limits and the colours of the data's."""
    limits = limits_of(law)
    scratch = density(panels(1)[1][0, 0], law, limits=limits)
    peak = float(scratch.get_clim()[1])

    def draw(ax: Axes, x: Target | Tensor) -> None:
        density(ax, x, limits=limits, resolution=120, peak=peak)
        ax.set(xticks=[], yticks=[])

    return draw


def _sheet_drawer(ax: Axes, x: Target | Tensor) -> None:
    images = x if isinstance(x, Tensor) else x.sample((9,), generator=torch.Generator().manual_seed(0))
    image_grid(ax, images[:9], columns=3)


def density_comparison(
    target: Target | Tensor, samplers: Mapping[str, Tensor], *, limits: Limits | None = None
) -> Figure:
    """The density of the data beside the samples of several samplers, with their numbers, in one scale.

    Args:
        target: the law of the data, or data (n, 2).
        samplers: name -> samples (n, 2).
        limits: the part of the plane shown; by default the data's.
    """
    limits = limits or limits_of(target)
    figure, axes = panels(1 + len(samplers), height=3.6)
    peak = float(density(axes[0, 0], target, limits=limits).get_clim()[1])
    axes[0, 0].set_title(f"data\n{_number_of(target)}")
    for ax, (name, x) in zip(axes[0, 1:], samplers.items(), strict=True):
        density(ax, x, limits=limits, peak=peak)
        ax.set_title(f"{name.replace('_', ' ')}\n{_number_of(x)}")
    _share_planes(axes)
    return figure


def score_field_comparison(
    learned: ScoreModel, exact: ExactScore, times: Sequence[float], *, arrows: int = 19
) -> Figure:
    """The learned score over the exact one, a column for each time, in one scale of arrows.

    The log-density lies behind a score whose law is known, the exact one; over the learned one are its contours.
    Over each column stands the relative error sqrt(E|s - s*|^2 / E|s*|^2) over the exact marginal at that time.
    """
    figure, axes = panels(len(times), 2)
    for (above, below), t in zip(axes.T, times, strict=True):
        law = _marginal(exact, t, None)
        limits = limits_of(law)
        unit = _unit(_score(exact, _lattice(*_cell_centres(limits, arrows)), t))
        for ax, model in ((above, learned), (below, exact)):
            score_field(ax, model, t, limits=limits, arrows=arrows, unit=unit)
        contours(above, law, limits=limits)
        points = _points(law)
        s, s_exact = _score(learned, points, t), _score(exact, points, t)
        error = ((s - s_exact).square().sum() / s_exact.square().sum()).sqrt().item()
        above.tick_params(labelbottom=False)
        above.set_title(f"{_level(exact.sde, t)}\nrelative error {100 * error:.2g} %")
        below.set_xlabel("$x_1$")
    axes[0, 0].set_ylabel("learned score\n$x_2$")
    axes[1, 0].set_ylabel("exact score\n$x_2$")
    note(figure, "An arrow is $|s| / (|s| + u)$ of its cell long, $u$ the same for both rows of a column. Grey contours: the "
         f"exact $\\log p_t$, 1 and 3 nats below its maximum; colours: the same, down to {NATS:g} nats below.")  # fmt: skip
    return figure


def score_error_field(model: ScoreModel, exact: ExactScore, times: Sequence[float], *, resolution: int = 80) -> Figure:
    """Where a score is wrong: |n - n*| / sqrt(d) over the plane, a panel for each time, in one logarithmic scale.

    n = -sigma score is the predicted noise, so 1 is the size of the noise itself. Contours are the exact marginal's, one
    and three nats below its maximum; far outside them no training example ever lay.
    """
    target: Any = exact.target
    figure, axes = panels(len(times))
    for ax, t in zip(axes[0], times, strict=True):
        law = _marginal(exact, t, None)
        limits = limits_of(law)
        points = _lattice(*_cell_centres(limits, resolution))
        error = field_error(model, target, points.to(model.device), t).float().cpu()
        _plane(ax, limits)
        image = ax.imshow(error.reshape(resolution, resolution).numpy(), extent=limits, origin="lower", cmap=DENSITY,
                          norm=LogNorm(1e-3, 1, clip=True), interpolation="nearest")  # fmt: skip
        contours(ax, law, limits=limits)
        ax.set(title=_level(model.sde, t), xlabel="$x_1$")
    axes[0, 0].set_ylabel("$x_2$")
    colour_scale(image, axes, "error of the noise", shrink=0.8)
    return figure


def diagnosis(found: Diagnosis) -> Figure:
    """Loss against its irreducible part, calibration and consistency of a score model, by noise level."""
    figure, grid = panels(2, 2, width=4.6, height=3.6)
    (loss, slope), (spread, law) = grid
    table = found.table
    _by_noise(loss, table, {"loss": "loss", "irreducible": "irreducible part", "fisher": "excess: Fisher divergence"})
    loss.set(title="Is the score right?", ylabel="squared error of the noise")
    known = table[table["slope_error"] < 0.2]
    low, high = (known["slope"] + 2 * sign * known["slope_error"] for sign in (-1, 1))
    slope.fill_between(known["noise"], low, high, color=LINES[0], alpha=0.2, linewidth=0, label="two standard errors")
    slope.plot(known["noise"], known["slope"], color=LINES[0], marker="o", markersize=3,
               label="slope of $x_0$ on the denoiser $D$")  # fmt: skip
    slope.axhline(1, color=INK, linewidth=1, linestyle="--", label="posterior mean")
    slope.set_xscale("log")
    slope.set_xlim(loss.get_xlim())
    curves(slope, NOISE_LEVEL, "slope")
    slope.set(ylim=(min(0.8, low.min() - 0.05), max(1.2, high.max() + 0.05)),
              title="Is the denoiser calibrated?\n(left out: standard errors above 0.2)")  # fmt: skip
    _by_noise(spread, table, {"mse": "squared error of the denoiser $D$", "predicted_mse": "what its Jacobian says"})
    spread.set(title="Does it know its own error?", ylabel="posterior variance")
    _by_noise(law, table, {"residual": "Fokker-Planck residual", "asymmetry": "asymmetry of the Jacobian of $D$"})
    law.set(title="Is it the score of any law?\n(both are 0 for every true score)", ylabel="relative size")
    return figure


def _by_noise(ax: Axes, table: pd.DataFrame, names: Mapping[str, str]) -> None:
    for (name, label), colour, style in zip(names.items(), LINES, ("-", "--", "-."), strict=False):
        values = table[name].where(table[name] >= 0).clip(lower=1e-12)
        ax.plot(table["noise"], values, style, color=colour, label=label, marker="o", markersize=3)
    ax.set(xscale="log", yscale="log")
    curves(ax, NOISE_LEVEL, "")


def certificates(found: Certificates) -> Figure:
    """Measured beside declared order, and the exact bias of the standard deviation at each number of steps.

    Rows stand in the order of `Certificates.table`.
    """
    table = found.table
    by_name = {c.name: c for c in found.certificates}
    predictors = [by_name[name] for name in table.loc[table["role"] == "predictor", "step"]]
    rows = np.arange(len(predictors))
    figure, axes = panels(2, width=6, height=1.5 + 0.24 * len(rows), sharey=True)
    order, bias = axes[0]
    wrong = np.array([any("order" in fault for fault in c.faults) for c in predictors], dtype=bool)
    measured = np.array([c.measured for c in predictors])
    order.plot([c.declared for c in predictors], rows, "|", markersize=11, color=INK, label="declared")
    order.scatter(measured[~wrong], rows[~wrong], s=22, color=LINES[0], label="measured")
    order.scatter(measured[wrong], rows[wrong], s=22, color=LINES[1], label="measured, not as declared")
    steps = predictors[0].bias["steps"] if predictors else []
    for i, colour in enumerate(TIME(np.linspace(1, 0, len(steps)))):
        errors = [abs(c.bias["std"].iloc[i]) for c in predictors]
        bias.plot(errors, rows, "o", markersize=5, color=colour, label=f"{steps[i]} steps")
    order.set_yticks(rows, [c.name + (" (noise)" if c.stochastic else "") for c in predictors])
    order.set_ylim(len(rows), -1)
    bias.set_xscale("log")
    curves(order, "order of convergence: global (ODE), weak (noise)", "", legend=None)
    curves(bias, "|relative error of the standard deviation|, exact,\non data of mean 1 and standard deviation 0.5", "",
           legend=None)  # fmt: skip
    legend_below(figure)
    return figure


def bound_terms(ax: Axes, bounds: Mapping[str, Bound]) -> None:
    """Each posterior KL of a variational bound in nats, mean over the data, at the noisier level of its step.

    In the legend, the bound's mean with its standard error, and of it the decoder's and the prior's terms.
    """
    for (name, bound), colour in zip(bounds.items(), LINES, strict=False):
        ends = f"decoder {bound.decoder.mean():.2g}, prior {bound.prior.mean():.1g}"
        label = f"{name}: {bound.mean:.4g} ± {bound.std_error:.1g} nats ({ends})"
        ax.plot(bound.times[1:], bound.steps.mean(1).clamp_min(1e-12).cpu(), color=colour, linewidth=1.4, label=label)
    ax.set_yscale("log")
    curves(ax, "time $t$", "nats of the step")


def likelihood_histogram(ax: Axes, values: Mapping[str, Tensor], label: str) -> None:
    """Outlines of histograms of per-sample likelihoods by set, in common bins, each mean as a dashed line and in the legend.

    Bins span all but the outermost half per cent; a value beyond falls into the last bin on its side.
    """
    everything = torch.cat([v.double() for v in values.values()]).cpu()
    low, high = everything.quantile(torch.tensor([0.005, 0.995], dtype=torch.float64)).tolist()
    bins = np.linspace(low, high + 1e-9, 41).tolist()
    for (name, v), colour in zip(values.items(), LINES, strict=False):
        mean, inside = v.double().mean().item(), v.double().cpu().clamp(low, high).numpy()
        heights, _ = np.histogram(inside, bins, density=True)
        ax.stairs(heights, bins, color=colour, linewidth=1.5, label=f"{name}: {mean:.4g}")
        ax.axvline(mean, color=colour, linestyle="--", linewidth=1.2)
    curves(ax, label, "density", legend="beside", title="means (dashed)")


def trajectory_comparison(
    samplers: Mapping[str, Tensor], *, target: Target | None = None, limits: Limits | None = None, count: int = 40
) -> Figure:
    """Trajectories (steps, batch, 2) of several samplers side by side, over the contours of the data's density.

    Given the same starting points, they show what the noise of an SDE adds to the flow of the ODE. States spread wider
    than the final samples, as those of variance-exploding processes are, are shrunk to the spread of these.
    """
    samplers = {name: _shrunk(_trajectory(paths)) for name, paths in samplers.items()}
    limits = limits or limits_of(torch.cat([paths[:, :count].flatten(0, 1) for paths in samplers.values()]))
    figure, axes = panels(len(samplers), width=4, height=4)
    for ax, (name, paths) in zip(axes[0], samplers.items(), strict=True):
        if target is not None:
            contours(ax, target, limits=limits)
        lines, starts, ends = trajectories(ax, paths, limits=limits, count=count)
        ax.set_title(name)
    axes[0, 0].legend([starts, ends], ["noise", "sample"], loc="upper left", handletextpad=0.1, **LEGEND)
    _share_planes(axes)
    colour_scale(lines, axes, "share of the steps taken", extend="neither", ticks=[0, 0.5, 1], shrink=0.8)
    return figure


def animation(
    trajectory: Tensor,
    path: str | Path,
    *,
    levels: Sequence[str] | None = None,
    frames: int = 50,
    fps: int = 20,
    hold: float = 1.0,
) -> Path:
    """Noise becoming data, as a GIF.

    Args:
        trajectory: states (steps, batch, 2), or images (steps, batch, channels, height, width) in [-1, 1] at the end.
        path: of the file to write.
        levels: a caption for each state.
        frames: at most so many states are shown, evenly chosen; the last always is.
        fps: frames a second.
        hold: seconds for which the last state stays.
    """
    chosen = torch.linspace(0, len(trajectory) - 1, min(frames, len(trajectory))).round().long().tolist()
    states = trajectory[chosen].detach().float().cpu()
    figure, axes = panels(1, width=3.6, height=3.8)
    figure.set_layout_engine("none")  # which would move the axes whenever a tick label grows
    ax = axes[0, 0]
    ax.set_position((0.13, 0.07, 0.84, 0.84))
    draw = _image_frames(ax, states) if states.ndim == 5 else _point_frames(ax, states)
    caption = ax.set_title(" ", fontsize=10, color=INK)
    figure.set_dpi(110)
    canvas, pages = FigureCanvasAgg(figure), []
    for index, step in enumerate(chosen):
        caption.set_text(levels[step] if levels else f"step {step} of {len(trajectory) - 1}")
        draw(index)
        canvas.draw()
        pages.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    milliseconds = [1000 / fps] * (len(pages) - 1) + [1000 / fps + 1000 * hold]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=milliseconds, loop=0)
    return Path(path)


def _point_frames(ax: Axes, states: Tensor) -> Any:
    """Draws state i into the axes; a view wider than the last state's shrinks with the cloud, without going back."""
    dots = samples(ax, states[-1])
    frame = torch.tensor(limits_of(states[-1]))
    centre = frame.unflatten(0, (2, 2)).mean(dim=1, keepdim=True)
    size = torch.tensor([right - left for left, right, _, _ in map(limits_of, states)])
    zoom = (size / size[-1]).cummin(dim=0).values.clamp_min(1)

    def draw(index: int) -> PathCollection:
        dots.set_offsets(states[index].numpy())
        view = centre + zoom[index] * (frame.unflatten(0, (2, 2)) - centre)
        _plane(ax, tuple(view.flatten().tolist()))
        return dots

    return draw


def _image_frames(ax: Axes, states: Tensor) -> Any:
    image = image_grid(ax, states[-1])

    def draw(index: int) -> AxesImage:
        state = states[index]
        image.set_data(_mosaic(state / state.abs().amax().clamp_min(1), None))
        return image

    return draw


# --- parts ------------------------------------------------------------------------------------------------------------


def _metric_of(table: pd.DataFrame, metric: str | None) -> str:
    """The metric, or the first one, of a table that is of one model."""
    if "model" in table and table["model"].nunique() > 1:
        models = ", ".join(map(repr, table["model"].unique()))
        raise ValueError(f"one figure is of one model, the table of {models}: give table[table['model'] == ...]")
    return _metrics(table)[0] if metric is None else one_of("metric", metric, map(str, table))


def _metrics(table: pd.DataFrame) -> list[str]:
    return [str(c).removesuffix("_floor") for c in table if str(c).endswith("_floor")]


def _over_seeds(runs: pd.DataFrame, metric: str, against: str) -> pd.DataFrame:
    """Columns `against` (mean) and the metric's mean, min, max and std over the seeds that have a value, by budget."""
    good = runs[runs["status"].eq("ok") & runs[metric].notna()]
    groups = good.groupby("budget")
    statistics = groups[metric].agg(["mean", "min", "max", "std"]).fillna({"std": 0.0})
    return statistics.assign(**{against: groups[against].mean()}).sort_values(against)


def _crosses(ax: Axes, runs: pd.DataFrame, against: str, colour: str) -> None:
    """A cross for each budget at which a run diverged or failed, where it was that far on the axis."""
    lost = runs[runs["status"].str.startswith(("diverged", "failed"))]
    place = lost[against].fillna(lost["budget"]) if against == "nfe" else lost[against]
    crosses(ax, place.groupby(lost["budget"]).mean().dropna(), colour, "diverged or failed")


def _floor(ax: Axes, table: pd.DataFrame, metric: str) -> None:
    """The noise floor as a dashed line in the band of its standard deviation; nothing for what has none."""
    if f"{metric}_floor" in table:
        floor, spread = table[f"{metric}_floor"].mean(), table[f"{metric}_floor_std"].mean()
        ax.axhline(floor, color=INK, linestyle="--", linewidth=0.9, label="noise floor", zorder=2)
        ax.axhspan(max(floor - spread, 0.2 * floor), floor + spread, color=RULE, alpha=0.18, linewidth=0, zorder=0,
                   label="noise floor ± std")  # fmt: skip


def _share_curves(figure: Figure, axes: np.ndarray, count: int, x: str, y: str) -> None:
    """One pair of logarithmic axes of a factor 5 or more for the first `count` panels, with labels along the edges."""
    used = list(axes.flat[:count])
    for i, name in enumerate("xy"):
        spans = np.array([(ax.dataLim.minpos[i], getattr(ax.dataLim, f"interval{name}")[1]) for ax in used])
        spans = spans[(spans > 0).all(axis=1) & np.isfinite(spans).all(axis=1)]
        if not len(spans):  # zeros alone
            continue
        span = spans.max() / spans.min()
        margin = max(span**0.06 * 1.08, (5 / span) ** 0.5)
        for ax in used:
            ax.set(**{f"{name}lim": (spans.min() / margin, spans.max() * margin)})
            ax.set(**{f"{name}scale": "log"})
            _log_ticks(getattr(ax, f"{name}axis"))
    columns = axes.shape[1]
    for i, ax in enumerate(used):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, which="major", color="#eceef1", linewidth=0.5)
        ax.set_axisbelow(True)
        lowest = i + columns >= count
        ax.set_xlabel(x if lowest else "")
        _frame(ax)
        ax.title.set_fontsize(9)
        ax.xaxis.label.set_fontsize(8)
        ax.tick_params(labelsize=7, labelleft=i % columns == 0, labelbottom=lowest)
    figure.supylabel(y, fontsize=9, color=INK)


def _points(x: Target | Tensor) -> Tensor:
    """Finite points (n, 2) on the CPU: those given, or 4,096 draws of a target."""
    if not isinstance(x, Tensor):
        x = x.sample((4096,), generator=torch.Generator().manual_seed(0))
    if x.shape[-1] != 2 or x.ndim < 2:
        raise ValueError(f"plane plots take points of shape (..., 2), got {tuple(x.shape)}")
    x = x.detach().float().cpu().reshape(-1, 2)
    x = x[x.isfinite().all(dim=1)]
    if len(x) == 0:
        raise ValueError("none of the points is finite")
    return x


def _write_outside(ax: Axes, points: Tensor, limits: Limits) -> None:
    """The share of points outside the limits, where it is a per cent or more."""
    low, high = torch.tensor(limits).unflatten(0, (2, 2)).T
    share = round(100 * ((points < low) | (points > high)).any(dim=1).float().mean().item())
    if share:
        ax.text(0.03, 0.03, f"{share} % outside", color="white", fontsize=6.5, transform=ax.transAxes)


def _number_of(x: Target | Tensor) -> str:
    return f"{len(x):,} samples" if isinstance(x, Tensor) else "exact density"


def _trajectory(trajectory: Tensor) -> Tensor:
    if trajectory.ndim != 3 or trajectory.shape[-1] != 2 or len(trajectory) < 2:
        raise ValueError(f"a trajectory has shape (steps >= 2, batch, 2), got {tuple(trajectory.shape)}")
    return trajectory.detach().float().cpu()


def _shrunk(paths: Tensor) -> Tensor:
    """Each state scaled about the origin so that its root mean square does not exceed that of the last."""
    size = paths.square().mean(dim=(1, 2), keepdim=True).sqrt()
    return paths * (size[-1] / size).clamp_max(1)


def _cell_centres(limits: Limits, cells: int) -> tuple[Tensor, Tensor]:
    """Centres along x and y of a square lattice of cells that fills the limits."""
    middle = (torch.arange(cells) + 0.5) / cells
    left, right, bottom, top = limits
    return left + (right - left) * middle, bottom + (top - bottom) * middle


def _lattice(x: Tensor, y: Tensor) -> Tensor:
    """All points (x_j, y_i), row after row of an image: (len(y) len(x), 2)."""
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)


def _log_density(target: Target, limits: Limits, resolution: int) -> Tensor:
    points = _lattice(*_cell_centres(limits, resolution))
    return target.log_prob(points).reshape(resolution, resolution)


def _histogram(points: Tensor, limits: Limits, bins: int) -> np.ndarray:
    left, right, bottom, top = limits
    x, y = points.double().T.numpy()
    counts, _, _ = np.histogram2d(x, y, bins=bins, range=[[left, right], [bottom, top]])
    area = (right - left) * (top - bottom) / bins**2
    return counts.T / (len(points) * area)


def _marginal(model: ScoreModel, t: float, target: Target | None) -> Any:
    """The law of x_t where that of x_0 is known, else None."""
    target = target or getattr(model, "target", None)
    return None if target is None else target.marginal(float(model.sde.alpha(t)), float(model.sde.sigma(t)))


@torch.no_grad()
def _score(model: ScoreModel, points: Tensor, t: float) -> Tensor:
    weight = next(model.parameters(), points) if isinstance(model, torch.nn.Module) else points
    return model(points.to(weight), t).score.float().cpu()


def _unit(score: Tensor) -> float:
    return score.norm(dim=1).quantile(0.25).clamp_min(1e-12).item()


def _level(sde: SDE, t: float) -> str:
    return f"$t$ = {t:.3g},  $\\sigma$ = {float(sde.sigma(t)):.2g}"


def _mosaic(images: Tensor, columns: int | None) -> np.ndarray:
    """RGBA mosaic with transparent gaps of a pixel."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images have shape (n, 1 or 3, height, width), got {tuple(images.shape)}")
    count, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    colour = ((images.detach().float().cpu() + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)
    tiles = torch.zeros(rows * columns, 4, height + 1, width + 1)
    tiles[:count, :3, :-1, :-1], tiles[:count, 3, :-1, :-1] = colour, 1
    mosaic = tiles.reshape(rows, columns, 4, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    return mosaic.reshape(rows * (height + 1), columns * (width + 1), 4)[:-1, :-1].numpy()


def _plane(ax: Axes, limits: Limits) -> None:
    left, right, bottom, top = limits
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    _frame(ax)


def _share_planes(axes: np.ndarray) -> None:
    for ax in axes.flat:
        ax.set(xlabel="$x_1$", ylabel="$x_2$")
        ax.label_outer()


class LogTicks(Locator):
    """Ticks of a logarithmic axis: powers of ten, also 2 and 5 below two decades, and evenly spaced ones below a factor 5."""

    axis: Any

    def __call__(self) -> Any:
        return self.tick_values(*sorted(self.axis.get_view_interval()))  # an inverted axis has the other order

    def tick_values(self, vmin: float, vmax: float) -> Any:
        span = vmax / vmin
        powers = LogLocator(subs=(1.0,) if span >= 100 else (1.0, 2.0, 5.0))
        locator: Any = powers if span >= 5 else MaxNLocator(4, steps=[1, 2, 5, 10])
        locator.set_axis(self.axis)
        ticks = np.asarray(locator.tick_values(vmin, vmax))
        return ticks[(vmin <= ticks) & (ticks <= vmax)]  # the others may be 0


class LogNumbers(Formatter):
    """Numbers of `LogTicks`, all in one manner: plain below two decades where they are short, else powers of ten."""

    axis: Any

    def __call__(self, x: float, pos: int | None = None) -> str:
        low, high = sorted(self.axis.get_view_interval())
        if high < 100 * low and low >= 1e-3 and high < 1e5:
            return f"{x:g}"
        exponent = math.floor(math.log10(x) + 1e-9)
        factor = f"{x / 10.0**exponent:g}"
        return f"$10^{{{exponent}}}$" if factor == "1" else f"${factor}\\times10^{{{exponent}}}$"


def _log_ticks(axis: Axis) -> None:
    axis.set_major_locator(LogTicks())
    axis.set_major_formatter(LogNumbers())
    axis.set_minor_locator(NullLocator())


def _frame(ax: Axes) -> None:
    ax.tick_params(labelsize=8, color=RULE, labelcolor=INK, width=0.6, length=3)
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
        text.set(fontsize=10, color=INK)
    for spine in ax.spines.values():
        spine.set(linewidth=0.6, color=RULE)

"""Two-dimensional data: densities, samples, score fields and trajectories."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import ListedColormap, LogNorm, PowerNorm
from matplotlib.contour import QuadContourSet
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.quiver import Quiver
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from score_sde.checks import tensor
from score_sde.evaluation.diagnostics import field_error
from score_sde.plotting.canvas import INK, LEGEND, LINES, TIME, Limits, colour_scale, frame, note, panels
from score_sde.score import ExactScore, ScoreModel
from score_sde.sde import SDE
from score_sde.targets import Target

DENSITY = colormaps["magma"]
LOG_DENSITY = ListedColormap(DENSITY(np.linspace(0.0, 0.72, 256)))  # dark enough for white arrows
NATS = 12.0
"""Range of a log-density's colour scale, in nats below its maximum."""

ACROSS = 5
"""The largest number of samplers beside one another, in one row of a comparison."""

ARROWS: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1, "pivot": "middle", "width": 0.005,
                          "headwidth": 3.5, "headlength": 4, "headaxislength": 3.5}  # fmt: skip


def limits_of(x: Target | Tensor, *, coverage: float = 0.995, margin: float = 0.15) -> Limits:
    """A square that holds the fraction `coverage` of the points along each axis, with a margin around it.

    Args:
        x: points (..., 2), or a target to draw points from.
        coverage: the central fraction of the points along each axis.
        margin: blank border, in units of half the square's side.
    """
    points = _points(x)
    tail = torch.tensor([(1 - coverage) / 2, (1 + coverage) / 2], dtype=points.dtype)
    low, high = torch.quantile(points[:: max(1, len(points) // 100_000)], tail, dim=0)
    centre, half = (low + high) / 2, max(float((high - low).max()) / 2, 1e-6) * (1 + margin)
    return tuple((centre[i] + sign * half).item() for i in (0, 1) for sign in (-1, 1))


def density(
    ax: Axes, x: Target | Tensor, *, limits: Limits | None = None, resolution: int = 200, peak: float | None = None
) -> AxesImage:
    """The density of a two-dimensional target, or the histogram of samples as a density, as an image.

    Colours follow the square root of the density, so that small modes, and samples between modes, are visible. The share
    of samples outside the limits is written into the image if it is a per cent or more.

    Args:
        ax: where to draw.
        x: a target, or samples (n, 2). Samples outside the limits count in the normalisation.
        limits: the part of the plane shown; by default nearly all of it.
        resolution: pixels per side for a target; samples have half as many bins.
        peak: the density with the brightest colour; by default the maximum.
    """
    limits = limits or limits_of(x)
    if isinstance(x, Tensor):
        points = _points(x)
        values = _histogram(points, limits, resolution // 2)
        _write_outside(ax, points, limits)
    else:
        values = _log_density(x, limits, resolution).exp().numpy()
    peak = peak or float(values.max()) or 1.0
    plane(ax, limits)
    norm = PowerNorm(0.5, vmin=0, vmax=peak, clip=True)
    return ax.imshow(values, extent=limits, origin="lower", cmap=DENSITY, norm=norm, interpolation="nearest")


def samples(
    ax: Axes, x: Tensor, *, limits: Limits | None = None, color: Any = LINES[0], size: float | None = None
) -> PathCollection:
    """Samples (n, 2) as dots, smaller and fainter the more there are."""
    points = _points(x)
    size = size or min(20.0, max(0.5, 8000 / len(points)))
    alpha = min(0.8, max(0.15, 20 / len(points) ** 0.5))
    plane(ax, limits or limits_of(x))
    return ax.scatter(points[:, 0], points[:, 1], s=size, color=color, alpha=alpha, linewidths=0, rasterized=True)


def contours(ax: Axes, target: Target, *, limits: Limits | None = None, resolution: int = 200) -> QuadContourSet:
    """Contours of a target's density one and three nats below its maximum."""
    limits = limits or limits_of(target)
    log_density = _log_density(target, limits, resolution)
    levels = [float(log_density.max()) - 3, float(log_density.max()) - 1]
    plane(ax, limits)
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
    """The score at time t as arrows, over the log-density of the marginal if the law of the data is known.

    The length of an arrow is |s| / (|s| + unit) of its cell, so that both the gentle slopes inside modes and the steep
    ones outside are visible. Colours span twelve nats below the maximum.

    Args:
        ax: where to draw.
        model: of two-dimensional data.
        t: a time of the model's SDE.
        target: the law of clean data; an `ExactScore` has it.
        limits: the part of the plane shown; needed if the target is not known.
        arrows: number of arrows per side.
        unit: |score| of an arrow of half its cell's length; by default the lower quartile of |score| over the arrows.

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
    plane(ax, limits)
    quiver = ax.quiver(*points.T.numpy(), *arrow.T.numpy(), color="white" if image else INK, **ARROWS)
    return image, quiver


def trajectories(
    ax: Axes, trajectory: Tensor, *, limits: Limits | None = None, count: int = 40
) -> tuple[LineCollection, PathCollection, PathCollection]:
    """Paths of samples in the plane, coloured from the start of sampling to its end, with start and end points.

    Args:
        ax: where to draw.
        trajectory: states (steps, batch, 2) in the order of sampling.
        limits: the part of the plane shown; by default that of all states.
        count: the number of samples drawn, the first of the batch.

    Returns:
        The paths, the start points (hollow) and the end points (filled).
    """
    paths = _trajectory(trajectory)[:, :count]
    segments = torch.stack([paths[:-1], paths[1:]], dim=2)
    progress = torch.linspace(0, 1, len(segments)).repeat_interleave(paths.shape[1])
    plane(ax, limits or limits_of(paths))
    lines = LineCollection(list(segments.flatten(0, 1).numpy()), array=progress.numpy(), cmap=TIME, linewidths=0.7,
                           alpha=0.7, capstyle="round")  # fmt: skip
    ax.add_collection(lines, autolim=False)
    starts = ax.scatter(
        paths[0, :, 0], paths[0, :, 1], s=9, facecolors="white", edgecolors=[TIME(0.0)], linewidths=0.7, zorder=3
    )
    ends = ax.scatter(paths[-1, :, 0], paths[-1, :, 1], s=9, color=LINES[1], linewidths=0, zorder=4)
    return lines, starts, ends


def density_comparison(
    target: Target | Tensor, samplers: Mapping[str, Tensor], *, limits: Limits | None = None
) -> Figure:
    """The density of the data beside the samples of several samplers, with their numbers, on one colour scale.

    Args:
        target: the law of the data, or data (n, 2).
        samplers: name -> samples (n, 2).
        limits: the part of the plane shown; by default the data's.
    """
    limits = limits or limits_of(target)
    figure, (first, *others) = _planes(1 + len(samplers), height=3.6)
    peak = float(density(first, target, limits=limits).get_clim()[1])
    first.set_title(f"data\n{_number_of(target)}")
    for ax, (name, x) in zip(others, samplers.items(), strict=True):
        density(ax, x, limits=limits, peak=peak)
        ax.set_title(f"{name.replace('_', ' ')}\n{_number_of(x)}")
    return figure


def score_field_comparison(
    learned: ScoreModel, exact: ExactScore, times: Sequence[float], *, arrows: int = 19
) -> Figure:
    """The learned score (first row) and the exact one (second), a column for each time, with arrows on one scale.

    The exact log-density is shown as colours behind the exact score, and as contours over the learned one. The title of a
    column has the relative error sqrt(E|s - s*|^2 / E|s*|^2) over the exact marginal at that time.
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
    """Where a score is wrong: |n - n*| / sqrt(d) over the plane, a panel for each time, on one logarithmic scale.

    n = -sigma score is the predicted noise, so 1 is the size of the noise itself. Contours of the exact marginal are one
    and three nats below its maximum; far outside of them the network saw no training examples.
    """
    target: Any = exact.target
    figure, axes = panels(len(times))
    for ax, t in zip(axes[0], times, strict=True):
        law = _marginal(exact, t, None)
        limits = limits_of(law)
        points = _lattice(*_cell_centres(limits, resolution))
        error = field_error(model, target, points.to(model.device), t).float().cpu()
        plane(ax, limits)
        image = ax.imshow(error.reshape(resolution, resolution).numpy(), extent=limits, origin="lower", cmap=DENSITY,
                          norm=LogNorm(1e-3, 1, clip=True), interpolation="nearest")  # fmt: skip
        contours(ax, law, limits=limits)
        ax.set(title=_level(model.sde, t), xlabel="$x_1$")
    axes[0, 0].set_ylabel("$x_2$")
    colour_scale(image, axes, "error of the noise", shrink=0.8)
    return figure


def trajectory_comparison(
    samplers: Mapping[str, Tensor], *, target: Target | None = None, limits: Limits | None = None, count: int = 40
) -> Figure:
    """Trajectories (steps, batch, 2) of several samplers side by side, over the contours of the data's density.

    From the same starting points, they show what the noise of an SDE adds to the flow of the ODE. States that spread wider
    than the final samples, such as those of variance-exploding processes, are scaled to the spread of these.
    """
    if not samplers:
        raise ValueError("there are no trajectories: give one or more by name")
    samplers = {name: _shrunk(_trajectory(paths)) for name, paths in samplers.items()}
    limits = limits or limits_of(torch.cat([paths[:, :count].flatten(0, 1) for paths in samplers.values()]))
    figure, axes = _planes(len(samplers), width=4, height=4)
    for ax, (name, paths) in zip(axes, samplers.items(), strict=True):
        if target is not None:
            contours(ax, target, limits=limits)
        lines, starts, ends = trajectories(ax, paths, limits=limits, count=count)
        ax.set_title(name)
    axes[0].legend([starts, ends], ["noise", "sample"], loc="upper left", handletextpad=0.1, **LEGEND)
    colour_scale(lines, axes, "share of the steps taken", extend="neither", ticks=[0, 0.5, 1], shrink=0.8)
    return figure


def _points(x: Target | Tensor) -> Tensor:
    """The finite ones of points (n, 2), or 4,096 draws of a target, as float32 on the CPU."""
    if hasattr(x, "sample"):
        x = x.sample((4096,), generator=torch.Generator().manual_seed(0))
    if tensor("x", x).ndim < 2 or x.shape[-1] != 2:
        raise ValueError(f"plane plots take points of shape (..., 2), got {tuple(x.shape)}")
    x = x.detach().float().cpu().reshape(-1, 2)
    x = x[x.isfinite().all(dim=1)]
    if len(x) == 0:
        raise ValueError("none of the points is finite")
    return x


def _write_outside(ax: Axes, points: Tensor, limits: Limits) -> None:
    """Writes the share of points outside the limits, if it is a per cent or more."""
    low, high = torch.tensor(limits).unflatten(0, (2, 2)).T
    share = round(100 * ((points < low) | (points > high)).any(dim=1).float().mean().item())
    if share:
        ax.text(0.03, 0.03, f"{share} % outside", color="white", fontsize=6.5, transform=ax.transAxes)


def _number_of(x: Target | Tensor) -> str:
    return f"{len(x):,} samples" if isinstance(x, Tensor) else "exact density"


def _trajectory(trajectory: Tensor) -> Tensor:
    if not isinstance(trajectory, Tensor):
        raise TypeError("a trajectory is the tensor `result.trajectory` of sample(..., trajectory=True), got "
                        f"{type(trajectory).__name__}")  # fmt: skip
    if trajectory.ndim != 3 or trajectory.shape[-1] != 2 or len(trajectory) < 2:
        raise ValueError(f"a trajectory has shape (steps >= 2, batch, 2), got {tuple(trajectory.shape)}")
    return trajectory.detach().float().cpu()


def _shrunk(paths: Tensor) -> Tensor:
    """States scaled down, where necessary, to the root mean square of the last."""
    size = paths.square().mean(dim=(1, 2), keepdim=True).sqrt()
    return paths * (size[-1] / size).clamp_max(1)


def _cell_centres(limits: Limits, cells: int) -> tuple[Tensor, Tensor]:
    """The coordinates of the centres of cells x cells cells that fill the limits, along x and y."""
    middle = (torch.arange(cells) + 0.5) / cells
    left, right, bottom, top = limits
    return left + (right - left) * middle, bottom + (top - bottom) * middle


def _lattice(x: Tensor, y: Tensor) -> Tensor:
    """All points (x_j, y_i), (len(y) len(x), 2), in the order of an image's rows."""
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
    """The law of x_t if that of x_0 is known, else None."""
    target = target or getattr(model, "target", None)
    return None if target is None else target.marginal(float(model.sde.alpha(t)), float(model.sde.sigma(t)))


@torch.no_grad()
def _score(model: ScoreModel, points: Tensor, t: float) -> Tensor:
    weight = next(model.parameters(), points) if isinstance(model, torch.nn.Module) else points
    return model(points.to(weight), t).score.float().cpu()


def _unit(score: Tensor) -> float:
    """The lower quartile of |score|, the default `unit` of `score_field`."""
    return score.norm(dim=1).quantile(0.25).clamp_min(1e-12).item()


def _level(sde: SDE, t: float) -> str:
    return f"$t$ = {t:.3g},  $\\sigma$ = {float(sde.sigma(t)):.2g}"


def plane(ax: Axes, limits: Limits) -> None:
    """Sets the limits of axes of equal aspect, with few ticks."""
    left, right, bottom, top = limits
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    frame(ax)


def _planes(count: int, *, width: float = 3.0, height: float) -> tuple[Figure, np.ndarray]:
    """A figure of `count` panels, at most `ACROSS` in a row, with labels along its edges, and its axes as a flat array."""
    rows = math.ceil(count / ACROSS)
    columns = math.ceil(count / rows)
    figure, axes = panels(columns, rows, width=width, height=height)
    for i, ax in enumerate(axes.flat):
        leftmost, lowest = i % columns == 0, i + columns >= count
        ax.set(xlabel="$x_1$" if lowest else "", ylabel="$x_2$" if leftmost else "")
        ax.tick_params(labelleft=leftmost, labelbottom=lowest)
        if i >= count:
            ax.remove()
    return figure, axes.flat[:count]

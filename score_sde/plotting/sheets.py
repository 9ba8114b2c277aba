"""Pictures of samples of any shape: pairs of coordinates, signals, images, and frames of videos and volumes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from torch import Tensor

from score_sde.plotting.canvas import INK, LINES, Layout, curves, frame, legend_below, panels
from score_sde.plotting.images import image_grid
from score_sde.plotting.planes import DENSITY, density_comparison
from score_sde.plotting.planes import samples as dots
from score_sde.targets import Target


def sheet(
    samples: Tensor, data: Target | Tensor | None = None, *, name: str = "samples", count: int = 64, columns: int = 8,
    names: Sequence[object] = (),
) -> Figure:  # fmt: skip
    """A picture of samples of any event shape, beside examples of the data (except for images).

        (2,)                                densities; without data, dots
        (d,)                                `pair_plot`
        (channels, length)                  `signals`
        (1 or 3, height, width)             a mosaic, from -1 to 1, or as far as the data reach beyond
        (..., height, width) otherwise      `frames`: videos, volumes, fields of other channels

    Args:
        samples: (n, *event).
        data: examples (m, *event), or their law.
        name: of the samples.
        count: the number of images shown, rounded up to whole rows.
        columns: images per row.
        names: written over the columns of images.

    Raises:
        ValueError: there is no sample, or none is finite.
    """
    event = tuple(samples.shape[1:])
    if event == (2,):
        if data is not None:
            return density_comparison(data, {name: samples})
        figure, axes = panels(1, width=5, height=5)
        dots(axes[0, 0], samples)
        axes[0, 0].set(xlabel="$x_1$", ylabel="$x_2$")
        return figure
    examples = data.sample((5000,), generator=torch.Generator().manual_seed(0)) if isinstance(data, Target) else data
    if len(event) == 1:
        return pair_plot(samples, examples, name=name)
    if len(event) == 2:
        return signals(samples, examples, name=name)
    if len(event) > 3 or event[0] not in (1, 3):
        return frames(samples, examples, name=name)
    size = 1.0 if examples is None else max(1.0, float(examples.abs().max()))  # fields may reach beyond [-1, 1]
    shown = samples[: -(-count // columns) * columns] / size
    columns = min(columns, len(shown))
    figure, axes = panels(1, width=5, height=5 * -(-len(shown) // columns) / columns)
    image_grid(axes[0, 0], shown, columns=columns, names=names[:columns])
    return figure


def pair_plot(
    samples: Tensor, data: Tensor | None = None, *, name: str = "samples", coordinates: Sequence[int] | None = None,
    bins: int | None = None,
) -> Figure:  # fmt: skip
    """Every pair of coordinates of vectors: samples below the diagonal, data above, and the marginals of both on it.

    Mirror images across the diagonal have the same limits and colours, which follow the square root of the density.
    Limits hold 99.5 % of the data along each axis; samples beyond them count in the normalisation.

    Args:
        samples: (n, d).
        data: (m, d).
        name: of the samples.
        coordinates: which to show; by default the first six.
        bins: of the histograms along each axis; by default from 12 to 48, more where there are more samples.
    """
    chosen = list(range(min(6, samples.shape[1]))) if coordinates is None else list(coordinates)
    x = _finite(samples)[:, chosen].numpy()
    known = x if data is None else _finite(data)[:, chosen].numpy()
    bins = bins or int(min(48, max(12, 2 * min(len(x), len(known)) ** 0.4)))
    edges = [np.linspace(*_span(column), bins + 1) for column in known.T]
    size = len(chosen)
    side = 3.2 if size == 1 else max(1.3, 2.2 - 0.2 * size)
    figure, axes = panels(size, size, width=side, height=side)
    for i, coordinate in enumerate(chosen):
        if data is not None:
            axes[i, i].stairs(_density(known, edges, i), edges[i], color=INK, alpha=0.3, fill=True, label="data")
        axes[i, i].stairs(_density(x, edges, i), edges[i], color=LINES[1], label=name)
        axes[i, i].set(xlim=edges[i][[0, -1]], yticks=[])
        for j in range(i):
            above, below = _density(known, edges, i, j), _density(x, edges, i, j)
            norm = PowerNorm(0.5, vmin=0, vmax=float(above.max()) or 1.0, clip=True)
            axes[i, j].pcolormesh(edges[j], edges[i], below, cmap=DENSITY, norm=norm, rasterized=True)
            if data is None:
                axes[j, i].set_axis_off()
            else:
                axes[j, i].pcolormesh(edges[i], edges[j], above.T, cmap=DENSITY, norm=norm, rasterized=True)
        axes[i, 0].set_ylabel(f"$x_{{{coordinate + 1}}}$" if size > 1 else "density")
        axes[-1, i].set_xlabel(f"$x_{{{coordinate + 1}}}$")
    for place, ax in np.ndenumerate(axes):
        ax.locator_params(nbins=3)
        ax.tick_params(labelbottom=place[0] == size - 1, labelleft=place[1] == 0 and place[0] > 0)
        frame(ax)
    if data is not None:
        legend_below(figure, f"{name} below the diagonal ({len(x):,}), data above ({len(known):,})" if size > 1 else "")
    return figure


def signals(samples: Tensor, data: Tensor | None = None, *, name: str = "samples", rows: int = 6) -> Figure:
    """Signals (n, channels, length): a panel for each, a line for each of at most seven channels; data are on the left."""
    columns = _columns(samples, data, name, rows)
    span = _span(torch.cat([x[:, : len(LINES)].flatten() for x in columns.values()]).numpy(), coverage=1.0)
    figure, axes = panels(len(columns), max(map(len, columns.values())), width=4.2, height=1.0)
    for column, (title, x) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title)
        for ax, signal in zip(column, x, strict=False):
            _lines(ax, signal)
        for ax in column[len(x) :]:
            ax.set_axis_off()
    for ax in axes.flat:
        ax.set(ylim=span)
        ax.label_outer()
        frame(ax)
    channels = samples.shape[1]
    if channels > 1:
        legend_below(figure, f"the first {len(LINES)} of {channels} channels" if channels > len(LINES) else "channel")
    return figure


def frames(samples: Tensor, data: Tensor | None = None, *, name: str = "samples", rows: int = 8) -> Figure:
    """Videos, volumes and fields (n, ..., height, width): a row for each, with its frames from left to right.

    Events (1 or 3, ..., height, width) give frames in grey or colour; of other events, each channel is a grey frame of its
    own. Brightness runs from the least to the greatest value of the data shown, or without data of the samples shown.
    """
    columns = _columns(samples, data, name, min([rows, *(len(x) for x in (samples, data) if x is not None)]))
    first = next(iter(columns.values()))
    low, high = float(first.min()), float(first.max())
    strips = {title: _strip(2 * (x - low) / max(high - low, 1e-30) - 1) for title, x in columns.items()}
    length = next(iter(strips.values())).shape[1]
    figure, axes = panels(len(strips), width=max(2.0, min(5.0, 0.6 * length)), height=0.3 + 0.6 * len(first))
    for ax, (title, strip) in zip(axes[0], strips.items(), strict=True):
        image_grid(ax, strip.flatten(0, 1), columns=length)
        ax.set_title(title)
    figure.set_layout_engine(Layout(wspace=0.06))
    return figure


def _columns(samples: Tensor, data: Tensor | None, name: str, rows: int) -> dict[str, Tensor]:
    """The first `rows` finite examples of the data, if given, and of the samples, by title."""
    return {title: _finite(x)[:rows] for title, x in (("data", data), (name, samples)) if x is not None}


def _strip(x: Tensor) -> Tensor:
    """Events (n, ..., height, width) as frames (n, frames, 1 or 3, height, width)."""
    if x.ndim > 4 and x.shape[1] in (1, 3):
        return x.flatten(2, -3).movedim(2, 1)
    return x.flatten(1, -3).unsqueeze(2)


def _lines(ax: Axes, signal: Tensor) -> None:
    for i, channel in enumerate(signal[: len(LINES)]):
        ax.plot(channel.numpy(), color=LINES[i], linewidth=0.9, label=str(i + 1))
    curves(ax, "", "", legend=None)


def _finite(x: Tensor) -> Tensor:
    """The rows without NaN or infinity, as float32 on the CPU. Raises ValueError if there are none."""
    x = x.detach().float().cpu()
    x = x[x.flatten(1).isfinite().all(1)]
    if not len(x):
        raise ValueError("none of the samples is finite: there is nothing to show")
    return x


def _span(values: np.ndarray, coverage: float = 0.995, margin: float = 0.08) -> tuple[float, float]:
    """An interval that holds the central fraction `coverage` of the values, with a margin on both sides."""
    low, high = np.quantile(values, [(1 - coverage) / 2, (1 + coverage) / 2])
    pad = margin * max(high - low, 1e-6)
    return float(low - pad), float(high + pad)


def _density(x: np.ndarray, edges: Sequence[np.ndarray], *coordinates: int) -> np.ndarray:
    """The histogram of some coordinates of x in the cells of `edges`, as a density normalised over all of x."""
    cells = [edges[i] for i in coordinates]
    counts, _ = np.histogramdd(x[:, coordinates], cells)
    return counts / (len(x) * math.prod(edge[1] - edge[0] for edge in cells))

"""The house style of every figure: panels, colours, axes of curves, legends and ticks."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colorbar import Colorbar
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import Formatter, Locator, LogLocator, MaxNLocator, NullLocator

Limits = tuple[float, float, float, float]
"""Left, right, bottom and top of a panel."""

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's line colours, which the colour-blind can distinguish."""

MARKERS = "os^Dv<P"
DASHES = ("-", "--", "-.", ":")
INK, RULE = "#2b2f36", "#8a929c"
TIME = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.92, 256)))  # dark enough on white
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8, "title_fontsize": 8, "alignment": "left"}
NOISE_LEVEL = "noise level  $\\sigma / \\alpha$"


class Panel(Axes):
    """Axes whose titles have the size and colour of labels, each time they are set; matplotlib would reset both."""

    def set_title(self, label: str, *args: Any, **options: Any) -> Text:
        return super().set_title(label, *args, **{"fontsize": 10, "color": INK, **options})


class Layout(ConstrainedLayoutEngine):
    """Constrained layout in two passes: one alone leaves no room for titles of panels with a fixed aspect."""

    def execute(self, fig: Figure) -> None:
        for _ in range(2):
            super().execute(fig)


def panels(
    columns: int, rows: int = 1, *, width: float = 3.0, height: float = 3.0, sharey: bool = False,
    height_ratios: Sequence[float] | None = None,
) -> tuple[Figure, np.ndarray]:  # fmt: skip
    """A figure of rows x columns panels, each of the given size in inches, and its axes as an array (rows, columns).

    With `height_ratios`, rows have these relative heights, and `height` is their mean.
    """
    figure = Figure(figsize=(columns * width, rows * height), dpi=150, layout=Layout())
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        rows, columns, squeeze=False, sharey=sharey, height_ratios=height_ratios, subplot_kw={"axes_class": Panel}
    )
    for ax in axes.flat:
        ax.set_prop_cycle(color=LINES)
        frame(ax)
    return figure, axes


def look(i: int) -> dict[str, Any]:
    """Colour and marker of line i; no two of the first 49 lines are alike."""
    return {"color": LINES[i % len(LINES)], "marker": MARKERS[(i + i // len(LINES)) % len(MARKERS)]}


def curves(ax: Axes, x: str, y: str, *, legend: Literal["inside", "beside"] | None = "inside", title: str = "") -> None:
    """The common style of a panel of curves: labels, a light grid, `LogTicks` on logarithmic axes, and a legend.

    Args:
        ax: the axes, with the curves already drawn.
        x, y: labels of the axes.
        legend: of all labelled artists: "inside", where it covers least; "beside" the panel; or None.
        title: of the legend.
    """
    ax.set(xlabel=x, ylabel=y)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, which="major", color="#e3e6ea", linewidth=0.6)
    ax.set_axisbelow(True)
    for axis in (ax.xaxis, ax.yaxis):
        if axis.get_scale() == "log":
            log_ticks(axis)
    entries = _entries(ax)
    if legend and entries:
        place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if legend == "beside" else {}
        ax.legend(list(entries.values()), list(entries), title=title or None, **LEGEND, **place)
    frame(ax)


def legend_below(figure: Figure, title: str = "") -> None:
    """One legend for all panels, beneath them; the figure grows by its height."""
    entries = _entries(*figure.axes)
    count, inches = max(1, len(entries)), 0.6 + 0.065 * max(map(len, entries), default=0)
    rows = math.ceil(count / max(1, int(figure.get_figwidth() / inches)))
    lines = rows + (title.count("\n") + 1 if title else 0)
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.17 * lines)
    figure.legend(list(entries.values()), list(entries), title=title or None, loc="outside lower center",
                  ncols=math.ceil(count / rows), **LEGEND)  # fmt: skip


def _entries(*axes: Axes) -> dict[str, Any]:
    """label -> artist, of all labelled artists of the axes."""
    pairs = (zip(*ax.get_legend_handles_labels(), strict=True) for ax in axes)
    return {label: artist for pair in pairs for artist, label in pair}


def note(figure: Figure, text: str) -> None:
    """Explains a figure's signs in small print beneath all panels, wrapped to the figure's width."""
    whole = re.sub(r"\$.*?\$", lambda formula: formula[0].replace(" ", "\0"), text)
    lines = textwrap.fill(whole, int(figure.get_figwidth() / 0.065), break_on_hyphens=False)
    figure.supxlabel(lines.replace("\0", " "), fontsize=8, color=INK)


def crosses(ax: Axes, x: Any, colour: Any, label: str = "") -> None:
    """A cross on the upper edge at each x, for values that were lost or lie beyond the axis."""
    if len(x):
        ax.plot(x, np.full(len(x), 0.97), "x", color=colour, markersize=6, zorder=4, label=label, clip_on=False,
                in_layout=False, transform=ax.get_xaxis_transform())  # fmt: skip


def colour_scale(
    image: AxesImage | LineCollection, axes: Axes | np.ndarray, label: str, *, extend: str = "both", **options: Any
) -> Colorbar:
    """The colour bar of an image beside the axes that share it; by default, both ends are marked "or beyond"."""
    bar = image.figure.colorbar(image, ax=axes, label=label, extend=extend, format="{x:g}", **options)
    bar.minorticks_off()
    bar.outline.set_visible(False)
    frame(bar.ax)
    return bar


class LogTicks(Locator):
    """Ticks of a logarithmic axis, by the ratio of its ends.

    From 100 on, powers of ten; below, also 2 and 5 times these, or 3 times where labels are long. Below 5, or below 10 if
    there would be fewer than three ticks, evenly spaced values as on a linear axis.
    """

    axis: Any

    def __call__(self) -> Any:
        return self.tick_values(*sorted(self.axis.get_view_interval()))  # an inverted axis has them in decreasing order

    def tick_values(self, vmin: float, vmax: float) -> Any:
        span = vmax / vmin
        powers = LogLocator(subs=(1.0,) if span >= 100 else (1.0, 2.0, 5.0) if _short(vmin, vmax) else (1.0, 3.0))
        ticks = self._shown(powers, vmin, vmax)
        if span < 5 or (span < 10 and len(ticks) < 3):
            return self._shown(MaxNLocator(4, steps=[1, 2, 5, 10]), vmin, vmax)
        return ticks

    def _shown(self, locator: Any, vmin: float, vmax: float) -> Any:
        locator.set_axis(self.axis)
        ticks = np.asarray(locator.tick_values(vmin, vmax))
        return ticks[(vmin <= ticks) & (ticks <= vmax)]  # the others may be 0


class LogNumbers(Formatter):
    """Labels of `LogTicks`, all in one format: plain numbers if short and within two decades, else powers of ten."""

    axis: Any

    def __call__(self, x: float, pos: int | None = None) -> str:
        low, high = sorted(self.axis.get_view_interval())
        if high < 100 * low and _short(low, high):
            return f"{x:g}"
        exponent = math.floor(math.log10(x) + 1e-9)
        factor = f"{x / 10.0**exponent:g}"
        return f"$10^{{{exponent}}}$" if factor == "1" else f"${factor}\\times10^{{{exponent}}}$"


def _short(low: float, high: float) -> bool:
    """Whether numbers between these are short when written out."""
    return low >= 1e-3 and high < 1e5


def log_ticks(axis: Axis) -> None:
    """Gives a logarithmic axis `LogTicks` labelled by `LogNumbers`, without minor ticks."""
    axis.set_major_locator(LogTicks())
    axis.set_major_formatter(LogNumbers())
    axis.set_minor_locator(NullLocator())


def frame(ax: Axes) -> None:
    """The common style of ticks, labels and spines."""
    ax.tick_params(labelsize=8, color=RULE, labelcolor=INK, width=0.6, length=3)
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
        text.set(fontsize=10, color=INK)
    for spine in ax.spines.values():
        spine.set(linewidth=0.6, color=RULE)

"""Curves of a training run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from score_sde.plotting.canvas import DASHES, INK, TIME, curves

QUARTILE = re.compile("_q[1-4]$")
QUARTILES = "q1 to q4: quartiles of noise levels,\nfrom the least to the most noise"


def loss_curves(
    ax: Axes,
    metrics: pd.DataFrame | Sequence[Mapping[str, Any]],
    *,
    columns: Sequence[str] | None = None,
    halflife: float = 0.01,
    legend: Literal["inside", "beside"] | None = "beside",
) -> list[Line2D]:
    """Losses against training steps: each smoothed, over its raw values; on a logarithmic axis if all are positive.

    Names that end in _q1 to _q4 are means over quartiles of the noise levels drawn, from the least to the most noise;
    these have colours. The others are dark and have different dashes.

    Args:
        ax: where to draw.
        metrics: a table with the column `step` and those to draw (`Run.metrics()`), or such rows (`TrainingResult.metrics`);
            empty cells are skipped.
        columns: which to draw; by default all whose name starts with "loss".
        halflife: of the exponential smoothing, as a fraction of the curve's length; at least one row.
        legend: see `curves`.

    Returns:
        The smoothed lines, one per column.
    """
    metrics = pd.DataFrame(metrics)
    names = list(columns) if columns else [name for name in metrics if str(name).startswith("loss")]
    quartiles = [name for name in names if QUARTILE.search(str(name))]
    whole = [name for name in names if name not in quartiles]
    names = names if columns else whole + quartiles
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

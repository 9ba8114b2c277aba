"""Samplers side by side: quality against calls and seconds, tables of ratios, sheets of samples."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from torch import Tensor

from score_sde.checks import one_of
from score_sde.evaluation.verdicts import metrics_of
from score_sde.plotting.canvas import (
    INK,
    LINES,
    RULE,
    crosses,
    curves,
    frame,
    legend_below,
    log_ticks,
    look,
    note,
    panels,
)
from score_sde.plotting.images import image_grid
from score_sde.plotting.planes import density, limits_of
from score_sde.targets import Target

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
"""From 1 noise floor (light) to 10 (dark); grey for missing values."""


def quality_against_nfe(
    ax: Axes, table: pd.DataFrame, *, metric: str | None = None, against: str = "nfe"
) -> list[Line2D]:  # fmt: skip
    """A metric against network calls, a line for each sampler, and the noise floor as a band.

    Lines are means over seeds, with a band from the least to the greatest; crosses on the upper edge mark runs that
    diverged or failed.

    Args:
        ax: where to draw.
        table: as `score_sde.evaluation.compare` returns it, of one model.
        metric: a column of the table; by default its first metric. Samplers without a value are left out, unless all their
            runs were lost.
        against: "nfe", "seconds" or "seconds_per_sample".

    Raises:
        ValueError: the table is of several models, or has no such metric.

    Returns:
        One line per sampler, in the table's order.
    """
    metric = _metric_of(table, metric)
    lines = []
    for i, (name, runs) in enumerate(_shown(table, metric).items()):
        style = look(i)
        seeds = _over_seeds(runs, metric, against)
        ax.fill_between(seeds[against], seeds["min"], seeds["max"], color=style["color"], alpha=0.15, linewidth=0)
        lines += ax.plot(seeds[against], seeds["mean"], markersize=4, linewidth=1.5,
                        label=str(name).replace("_", " "), **style)  # fmt: skip
        _crosses(ax, runs, against, style["color"])
    _floor(ax, table, metric)
    ax.set(xscale="log", yscale="log")
    curves(ax, AGAINST[against], METRIC_NAMES.get(metric, metric), legend="inside" if len(lines) <= 6 else "beside")
    return lines


def solvers_against_calls(ax: Axes, table: pd.DataFrame, column: str, label: str) -> list[Line2D]:
    """An error of tuned and untuned solvers against their network calls; that of the converged solution is dashed.

    Args:
        ax: where to draw.
        table: as `score_sde.evaluation.coupled.best_of_each` returns it.
        column: the table's column to draw.
        label: of the y axis.
    """
    lines, names = [], {"untuned": "best untuned", "late": "best untuned, begun late"}
    for i, (kind, part) in enumerate(table[table["calls"] > 0].groupby("kind", sort=False)):
        lines += ax.plot(part["calls"], part[column], markersize=4.5, linewidth=1.5,
                         label=names.get(str(kind), str(kind)), **look(i))  # fmt: skip
    floor = table.loc[table["calls"] == 0, column].mean()
    if floor > 1e-6 * table[column].max():  # the converged solution's distance to itself is only rounding
        ax.axhline(floor, color=INK, linestyle="--", linewidth=1, label="converged solution")
    ax.set_xticks(sorted({*table["calls"]} - {0}))
    ax.set_yscale("log")
    curves(ax, "network calls (NFE)", label)
    return lines


def means_with_errors(tables: Mapping[str, pd.DataFrame], references: Mapping[str, float] | None = None) -> Figure:
    """A panel for each quantity, with a point and its standard error for each setting, from the top down.

    Means that span more than a factor 20 are on a logarithmic axis; settings without a value stay empty.

    Args:
        tables: label of the quantity -> table with columns setting, mean and standard_error.
        references: label -> the value of exact samples, 1 for ratios to the noise floor: a dashed line. The axis shows at
            least a quarter of it to either side.
    """
    names = {what: [textwrap.fill(str(setting), 50, break_on_hyphens=False) for setting in table["setting"]]
             for what, table in tables.items()}  # fmt: skip
    lines = 1 + max(name.count("\n") for own in names.values() for name in own)
    heights = [0.8 + len(own) * (0.2 + 0.15 * lines) for own in names.values()]
    figure, axes = panels(1, len(tables), width=8, height=sum(heights) / len(tables), height_ratios=heights)
    for ax, (what, table) in zip(axes.flat, tables.items(), strict=True):
        reference = (references or {}).get(what)
        _means(ax, table, names[what], reference)
        curves(ax, what, "")
    errors = " ± standard error" if any(table["standard_error"].notna().any() for table in tables.values()) else ""
    note(figure, f"points: means over seeds{errors}" + ("; dashed: noise floor" if references else ""))
    return figure


def _means(ax: Axes, table: pd.DataFrame, names: list[str], reference: float | None) -> None:
    ax.errorbar(table["mean"], range(len(names)), xerr=table["standard_error"], fmt="o", capsize=3)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    values = table["mean"][np.isfinite(table["mean"])]
    if reference is not None:
        ax.axvline(reference, color=INK, linestyle="--", linewidth=0.9)
        ax.update_datalim([(0.75 * reference, 0), (1.25 * reference, 0)], updatey=False)
        ax.autoscale_view(scaley=False)
    if 0 < 20 * values.min() < values.max():
        ax.set_xscale("log")


def comparison_multiples(
    table: pd.DataFrame, *, metric: str | None = None, against: str = "nfe", columns: int = 4
) -> Figure:  # fmt: skip
    """A metric against calls or seconds, a panel for each sampler with the others in grey behind it.

    Points are means over seeds, with standard deviations if there are several. Deterministic samplers are blue, others
    orange. The band is the noise floor and its standard deviation; crosses on the upper edge mark runs that diverged or
    failed.

    Args:
        table: as `score_sde.evaluation.compare` returns it, of one model. Its column `deterministic` names deterministic
            samplers; without that column, they are those with a paired endpoint error.
        metric: a column of the table; by default its first metric. Samplers without a value are left out, unless all their
            runs were lost.
        against: "nfe", "seconds" or "seconds_per_sample".
        columns: panels in a row.
    """
    metric = _metric_of(table, metric)
    shown = _shown(table, metric)
    means = {name: _over_seeds(runs, metric, against) for name, runs in shown.items()}
    fixed = table.get("deterministic", table["endpoint_error"].notna()).eq(True).groupby(table["sampler"]).any()
    several = table["seed"].nunique() > 1
    columns = max(1, min(columns, len(shown)))
    figure, axes = panels(columns, max(1, math.ceil(len(shown) / columns)), width=2.3, height=1.9)
    for ax, (name, runs) in zip(axes.flat, shown.items(), strict=False):
        for other, curve in means.items():
            if other != name:
                ax.plot(curve[against], curve["mean"], color="#d3d7dc", linewidth=0.8, zorder=1, label="other samplers")
        colour, kind = (LINES[0], "deterministic") if fixed[name] else (LINES[1], "stochastic")
        own = means[name]
        spread = own["std"] if several else None
        ax.errorbar(own[against], own["mean"], yerr=spread, color=colour, marker="o", markersize=3.5, linewidth=1.6,
                    capsize=2, elinewidth=1, zorder=3, label=kind)  # fmt: skip
        _crosses(ax, runs, against, colour)
        _floor(ax, table, metric)
        ax.set_title(str(name).replace("_", " "))
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    _share_curves(axes, len(shown), AGAINST[against])
    name = textwrap.fill(METRIC_NAMES.get(metric, metric), 18 * len(axes))
    label, height = figure.supylabel(name, fontsize=9, color=INK), figure.get_figheight()
    legend_below(figure, "points: means over seeds ± std" if several else "")
    label.set_y(1 - height / figure.get_figheight() / 2)  # the middle of the panels, above the legend
    return figure


def ratio_table(ax: Axes, summary: pd.DataFrame, *, metric: str) -> AxesImage:
    """A metric over its noise floor, a row for each sampler and a column for each budget, in colours and numbers.

    Colours run from 1 (light) to 10 (dark) floors on a logarithmic scale. Grey cells have no value: a cross for a run that
    diverged or failed, a dash for one that was refused. Samplers that choose their own steps have a column of their own,
    with their calls.

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
    frame(ax)
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
    """Samples of every sampler (rows) within every budget (columns): densities in the plane, or sheets of images.

    Args:
        samples: (sampler, budget) -> samples (n, 2) or images (n, 1 or 3, height, width).
        reference: the law of the data, or examples of it, shown in the first row.
        absent: (sampler, budget) -> a word to show in place of missing samples.
    """
    words = dict(absent or {})
    names = list(dict.fromkeys(name for name, _ in (*samples, *words)))
    budgets = sorted({budget for _, budget in (*samples, *words)}, key=lambda budget: (budget == 0, budget))
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
                ax.text(0.5, 0.5, words.get((name, budget), ""), ha="center", va="center", fontsize=7, color=RULE)
        row[0].set_ylabel(name.replace("_", "\n"), fontsize=7, color=INK)
    for ax, budget in zip(axes[1], budgets, strict=True):
        ax.set_title(f"{budget} calls" if budget else "own steps", fontsize=8)
    return figure


def _plane_drawer(law: Target | Tensor) -> Callable[[Axes, Target | Tensor], None]:
    """A function that draws densities with the limits and colours of that of `law`."""
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


def _metric_of(table: pd.DataFrame, metric: str | None) -> str:
    """The metric, by default the table's first. Raises ValueError if the table is of several models or lacks it."""
    if "model" in table and table["model"].nunique() > 1:
        models = ", ".join(map(repr, table["model"].unique()))
        raise ValueError(f"a figure shows one model, but the table has {models}: give table[table['model'] == ...]")
    return metrics_of(table)[0] if metric is None else one_of("metric", metric, map(str, table))


def _shown(table: pd.DataFrame, metric: str) -> dict[str, pd.DataFrame]:
    """The runs of each sampler that has a value of the metric, or of which all runs were lost."""
    groups = table.groupby("sampler", sort=False)
    return {str(name): runs for name, runs in groups if runs[metric].notna().any() or _lost(runs).all()}


def _lost(runs: pd.DataFrame) -> pd.Series:
    """Which runs diverged or failed."""
    return runs["status"].str.startswith(("diverged", "failed"))


def _over_seeds(runs: pd.DataFrame, metric: str, against: str) -> pd.DataFrame:
    """By budget: mean, min, max and std of the metric over the seeds with a value, and the mean of `against`."""
    good = runs[runs["status"].eq("ok") & runs[metric].notna()]
    groups = good.groupby("budget")
    statistics = groups[metric].agg(["mean", "min", "max", "std"]).fillna({"std": 0.0})
    return statistics.assign(**{against: groups[against].mean()}).sort_values(against)


def _crosses(ax: Axes, runs: pd.DataFrame, against: str, colour: str) -> None:
    """A cross at each budget with a run that diverged or failed, at its mean x (the budget itself if calls are unknown)."""
    lost = runs[_lost(runs)]
    place = lost[against].fillna(lost["budget"]) if against == "nfe" else lost[against]
    crosses(ax, place.groupby(lost["budget"]).mean().dropna(), colour, "diverged or failed")


def _floor(ax: Axes, table: pd.DataFrame, metric: str) -> None:
    """The noise floor as a dashed line in the band of its standard deviation; nothing if the metric has none."""
    if f"{metric}_floor" in table:
        floor, spread = table[f"{metric}_floor"].mean(), table[f"{metric}_floor_std"].mean()
        ax.axhline(floor, color=INK, linestyle="--", linewidth=0.9, label="noise floor", zorder=2)
        ax.axhspan(max(floor - spread, 0.2 * floor), floor + spread, color=RULE, alpha=0.18, linewidth=0, zorder=0,
                   label="noise floor ± std")  # fmt: skip


def _share_curves(axes: np.ndarray, count: int, x: str) -> None:
    """Gives the first `count` panels the same logarithmic axes, with labels only along the edges of the figure."""
    used = list(axes.flat[:count])
    _share_log_axis(used, 0)
    _share_log_axis(used, 1)
    columns = axes.shape[1]
    for i, ax in enumerate(used):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, which="major", color="#eceef1", linewidth=0.5)
        ax.set_axisbelow(True)
        lowest = i + columns >= count
        ax.set_xlabel(x if lowest else "")
        frame(ax)
        ax.title.set_fontsize(9)
        ax.xaxis.label.set_fontsize(8)
        ax.tick_params(labelsize=7, labelleft=i % columns == 0, labelbottom=lowest)


def _share_log_axis(used: Sequence[Any], axis: int) -> None:
    """Gives the x (0) or y (1) axes of panels the same logarithmic limits around all data, at least a factor 5 apart."""
    name = "xy"[axis]
    spans = np.array([(ax.dataLim.minpos[axis], getattr(ax.dataLim, f"interval{name}")[1]) for ax in used])
    spans = spans[(spans > 0).all(axis=1) & np.isfinite(spans).all(axis=1)]
    if not len(spans):  # no positive values
        return
    span = spans.max() / spans.min()
    margin = max(span**0.06 * 1.08, (5 / span) ** 0.5)
    for ax in used:
        ax.set(**{f"{name}lim": (spans.min() / margin, spans.max() * margin)})
        ax.set(**{f"{name}scale": "log"})
        log_ticks(getattr(ax, f"{name}axis"))

"""The report of scripts/compare.py: advice in words, figures, and the page that has all of it."""

from __future__ import annotations

import math
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from score_sde import plotting
from score_sde.evaluation import judge, load_samples, ranking, winners
from score_sde.evaluation.verdicts import metrics_of
from score_sde.progress import tqdm
from score_sde.training import write_atomically
from scripting import configs, figures, html_page

HEADS = {
    "nfe": "calls", "budget": "calls allowed", "calls": "calls to the goal", "at": "at calls", "excess": "times the goal",
    "worst": "worst metric", "floors": "times the floor", "equals": "as good", "seconds_per_sample": "s per sample",
}  # fmt: skip
"""Heads of the shown columns, where they differ from the names in the tables."""

RULE = (
    "A sampler is at the goal when each metric is within 1.25 times its noise floor, or two standard errors of it, or within "
    "1.25 times the best of any sampler on this model."
)


class Picture(NamedTuple):
    """A figure of the page: the stem of its file's name, the heading of its section, its caption, and the figure."""

    stem: str
    title: str
    caption: str
    figure: Figure


def write(config: DictConfig, table: pd.DataFrame, reference: Any, folder: Path, absent: list[str]) -> None:
    """Writes comparison.csv, summary.csv, the figures and report.html into a folder; samples are read from `output`."""
    summary, metrics = judge(table), metrics_of(table)
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "comparison.csv", table.to_csv(index=False))
    write_atomically(folder / "summary.csv", summary.to_csv(index=False))
    report = html_page.Page(*heading(config, table))
    several = table["model"].nunique() > 1
    best, every = (rows if several else rows.drop(columns="model") for rows in (winners(table), ranking(table)))
    report.add("What to take", html_page.bullets([*advice(table), *absent]), html_page.table(best, HEADS, RULE),
               html_page.folded("Every sampler", html_page.table(every, HEADS)))  # fmt: skip
    drawn = [*pictures(table, summary, metrics), *sample_sheets(load_samples(config.output, table), reference, table)]
    sections: dict[str, list[str]] = {}
    for name, shown in tqdm(drawn, desc="figures", delay=2):
        file = figures.save(shown.figure, folder / (f"{name}_{shown.stem}.png" if several else f"{shown.stem}.png"))
        title = f"{shown.title}, {name} score" if several else shown.title
        sections.setdefault(title, []).append(html_page.picture(file, shown.caption))
    for title, parts in sections.items():
        report.add(title, *parts)
    report.add("All numbers", html_page.text("Means over seeds. Click on a column's head to sort."),
               html_page.table(columns_shown(summary, metrics), HEADS))  # fmt: skip
    if len(lost := faults(table)):
        report.add("Refused, diverged, failed", html_page.table(lost))
    report.add("Settings", *settings(config))
    write_atomically(folder / "report.html", report.html())


def heading(config: DictConfig, table: pd.DataFrame) -> tuple[str, str]:
    """The page's title and subtitle: what was compared, and how much of it."""
    what = f"run {config.run}" if config.run else f"{config.target._target_.rpartition('.')[2]}, exact score"
    seeds = f"{len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}"
    count, good = len(table), int(table["status"].eq("ok").sum())
    return (f"Samplers compared: {what}",
            f"{table['sampler'].nunique()} samplers, budgets of {', '.join(map(str, config.budgets))} network calls, "
            f"{seeds}, {config.num_samples} samples each: {count} runs, {good} without fault.")  # fmt: skip


def pictures(table: pd.DataFrame, summary: pd.DataFrame, metrics: list[str]) -> Iterator[tuple[str, Picture]]:
    """Yields (model, figure of its numbers)."""
    for name, runs in table.groupby("model"):
        means = summary[summary["model"] == name]
        order = dict.fromkeys([*ranking(runs)["sampler"], *runs["sampler"]])  # last those without a good run
        yield str(name), ratio_picture(means, list(order), metrics)
        for shown in curves(runs, metrics):
            yield str(name), shown


def curves(runs: pd.DataFrame, metrics: list[str]) -> Iterator[Picture]:
    """One model's metrics against calls and seconds, and the paired endpoint error of its deterministic samplers."""
    points = " Points: means over seeds with their standard deviations." if runs["seed"].nunique() > 1 else ""
    blue = f"Blue: deterministic samplers; orange: the others.{points}"
    for metric in metrics:
        name = plotting.METRIC_NAMES.get(metric, metric).replace("$", "").replace("_2", "2")
        title = f"{name[0].upper()}{name[1:]}"
        yield Picture(
            f"{metric}_calls", title,
            f"{title} against network calls, lower is better. {blue} Band: the noise floor, between exact draws. Crosses: "
            "diverged or failed.",
            plotting.comparison_multiples(runs, metric=metric),
        )  # fmt: skip
        yield Picture(
            f"{metric}_seconds", title, "The same against time, on one thread; other work on the machine slows runs.",
            plotting.comparison_multiples(runs, metric=metric, against="seconds_per_sample"),
        )  # fmt: skip
    if runs["endpoint_error"].notna().any():
        yield Picture(
            "endpoint_error", "Paired endpoint error",
            "Deterministic samplers: the root mean square distance to the endpoints of the converged probability-flow ODE "
            "from the same starting noise, in standard deviations of the data: the solver's error alone, without Monte Carlo "
            "noise.",
            plotting.comparison_multiples(runs, metric="endpoint_error"),
        )  # fmt: skip


def ratio_picture(summary: pd.DataFrame, order: list[str], metrics: list[str]) -> Picture:
    """One model's metrics over their noise floors as coloured tables, with the samplers in this order."""
    return Picture(
        "ratios", "Over the noise floor",
        "Each metric divided by its value between exact draws; 1 is as good as exact samples. Fewest calls first. ×: diverged "
        "or failed, –: refused. In brackets: calls of a solver that chooses its own steps.",
        ratios(summary, order, metrics),
    )  # fmt: skip


def ratios(summary: pd.DataFrame, order: list[str], metrics: list[str]) -> Figure:
    """A coloured table for each metric, with the samplers in this order."""
    ordered = summary[summary["sampler"].isin(order)].sort_values(
        "sampler", key=lambda names: names.map(order.index), kind="stable"
    )
    figure, axes = plotting.panels(
        min(2, len(metrics)), -(-len(metrics) // 2), width=5.6, height=0.6 + 0.26 * len(order)
    )
    for ax, metric in zip(axes.flat, metrics, strict=False):
        image = plotting.ratio_table(ax, ordered, metric=metric)
        ax.set_title(plotting.METRIC_NAMES.get(metric, metric))
    for ax in axes.flat[len(metrics) :]:
        ax.set_axis_off()
    plotting.colour_scale(image, axes, "noise floors", ticks=[1, 2, 5, 10])
    return figure


def sample_sheets(
    samples: Mapping[tuple[str, str, int], torch.Tensor], reference: Any, table: pd.DataFrame
) -> Iterator[tuple[str, Picture]]:
    """Yields a sheet of panels for each model whose samples can be shown: points in the plane, or images."""
    for name in dict.fromkeys(model for model, _, _ in samples):
        own = {(sampler, budget): x for (model, sampler, budget), x in samples.items() if model == name}
        shape = tuple(next(iter(own.values())).shape[1:])
        if shape == (2,) or (len(shape) == 3 and shape[0] in (1, 3)):
            lost = table[(table["model"] == name) & (table["status"] != "ok")]
            absent = {(r.sampler, r.budget): r.status.partition(":")[0] for r in lost.itertuples()}
            yield name, Picture(
                "samples", "Samples",
                "The first seed's samples: a row for each sampler, from the same starting noise, below the data.",
                plotting.sample_panels(own, reference, absent),
            )  # fmt: skip


def advice(table: pd.DataFrame) -> list[str]:
    """Which samplers to take, in words, for each model."""
    lines = []
    for name, runs in table.groupby("model", sort=False):
        mark = f"{name} score: " if table["model"].nunique() > 1 else ""
        lines += [f"{mark}{line}" for line in (*_reached(runs), *_converged(runs))]
    return lines


def _reached(runs: pd.DataFrame) -> Iterator[str]:
    """Which samplers reach the goal, with the fewest calls and in the shortest time, and which do not."""
    order, verdicts = ranking(runs), judge(runs)
    near = verdicts["near"].any()
    goal = "at the goal" if near else "within 1.25 times the best of them"
    if not near and (verdicts["floors"] < math.inf).any():
        yield f"no sampler is near the noise floor: {nearest(verdicts)}."
    reached = order.dropna(subset="calls")
    if len(reached) and (near or len(order) > 1):
        best = ", ".join(f"{r.sampler} ({r.calls:.0f})" for r in reached.head(5).itertuples())
        yield f"{goal} with the fewest calls: {best}."
        quick = reached.nsmallest(3, "seconds_per_sample")
        listed = ", ".join(f"{r.sampler} ({duration(r.seconds_per_sample)} per sample)" for r in quick.itertuples())
        yield f"{goal} in the shortest time: {listed}."
    never = order[order["calls"].isna()]
    if len(never):
        yield f"not {goal} within any budget, the nearest first: {', '.join(never['sampler'])}."


def _converged(runs: pd.DataFrame) -> Iterator[str]:
    """Which sampler ends nearest to the converged ODE within 10 and 20 calls, or else within the two smallest budgets."""
    paired = judge(runs).dropna(subset="endpoint_error")
    paired = paired[paired["excess"] < math.inf]
    budgets = sorted(set(runs["budget"]) - {0})
    for budget in [b for b in (10, 20) if b in budgets] or budgets[:2]:
        within = paired[paired["nfe"] <= budget]
        if len(within):
            best = within.loc[within["endpoint_error"].idxmin()]
            yield (f"nearest to the converged ODE within {budget} calls: {best['sampler']}, "
                   f"{best['endpoint_error']:.2g} data standard deviations with {best['nfe']:.0f} calls.")  # fmt: skip


def nearest(verdicts: pd.DataFrame) -> str:
    """Which run comes nearest to the noise floor by its worst metric, and how near."""
    best = verdicts.loc[verdicts["floors"].idxmin()]
    worst = max(metrics_of(verdicts), key=lambda metric: best[f"{metric}_ratio"])
    return f"the nearest, {best['sampler']} with {best['nfe']:.0f} calls, is at {best['floors']:.3g} floors by {worst}"


def duration(seconds: float) -> str:
    """A time to three digits, in s, ms or µs."""
    unit, size = next(((u, z) for u, z in (("s", 1.0), ("ms", 1e-3)) if seconds >= z), ("µs", 1e-6))
    return f"{seconds / size:.3g} {unit}"


def faults(table: pd.DataFrame) -> pd.DataFrame:
    """The runs that are not ok: model, sampler, budget, the number of seeds, and what the first of them says."""
    bad = table[table["status"] != "ok"]
    kind = bad["status"].str.split(":").str[0].rename("kind")
    groups = bad.groupby(["model", "sampler", "budget", kind], sort=False)
    return groups.agg(seeds=("seed", "size"), status=("status", "first")).reset_index().drop(columns="kind")


def columns_shown(summary: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """The columns of the summary for the page."""
    model = ["model"] if summary["model"].nunique() > 1 else []
    figures = ["nfe", "seconds_per_sample", "endpoint_error", *metrics, *(f"{m}_ratio" for m in metrics), "excess"]
    return summary.loc[summary["seeds"] > 0, [*model, "sampler", "budget", *figures]]


def settings(config: DictConfig) -> list[str]:
    """The command, the versions and the machine, and the whole config, as HTML."""
    versions = {name: version(name) for name in ("score_sde", "torch", "numpy", "scipy")}
    machine = f"Python {platform.python_version()}, {platform.platform(terse=True)}, {platform.processor() or 'CPU'}"
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    command = " ".join(["python", "scripts/compare.py", *map(shlex.quote, sys.argv[1:])])
    own = dict(config) | ({"sde": configs.open_run(config).config.sde} if config.run else {})
    return [html_page.code(command), html_page.text(f"{listed}; {machine}."),
            html_page.folded("All options", html_page.code(OmegaConf.to_yaml(own)))]  # fmt: skip

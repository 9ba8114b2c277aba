"""Verdicts from a table of `compare`: means over seeds, which sampler is good enough, and with how many calls."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from score_sde.evaluation.budgets import UNBUDGETED

__all__ = ["by_metric", "judge", "metrics_of", "ranking", "summarise", "winners"]

KEYS = ["model", "sampler", "budget"]


def metrics_of(table: pd.DataFrame) -> list[str]:
    """The names of the metrics in a table of `compare`."""
    return [str(c).removesuffix("_floor") for c in table if str(c).endswith("_floor")]


def by_metric(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `compare` with one row per run and metric: metric, value, floor and ratio = value / floor."""
    names = metrics_of(table)
    rest = table.drop(columns=[f"{m}{end}" for m in names for end in ("", "_floor", "_floor_std")])
    parts = [rest.assign(metric=m, value=table[m], floor=table[f"{m}_floor"]) for m in names]
    long = pd.concat(parts, ignore_index=True)
    return long.assign(ratio=long["value"] / long["floor"])


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, a row for each model, sampler and budget.

    Columns: model, sampler, budget, seeds (number of runs that are ok), status (the first that is not ok, else "ok"), nfe,
    seconds, seconds_per_sample, endpoint_error, deterministic, and for each metric m: m, m_error (standard error over the
    seeds), m_floor, m_floor_std and m_ratio = m / m_floor.
    """
    names = metrics_of(table)
    groups = table.groupby(KEYS, sort=False)
    means = groups[[c for c in table if table[c].dtype == float]].mean()
    for m in names:
        means.insert(means.columns.get_loc(m) + 1, f"{m}_error", groups[m].sem())
        means.insert(means.columns.get_loc(f"{m}_floor_std") + 1, f"{m}_ratio", means[m] / means[f"{m}_floor"])
    good = table["status"].eq("ok").groupby([table[k] for k in KEYS], sort=False).sum()
    status = groups["status"].agg(lambda column: next((s for s in column if s != "ok"), "ok"))
    means.insert(0, "seeds", good)
    means.insert(1, "status", status)
    return means.reset_index()


def judge(table: pd.DataFrame, within: float = 1.25) -> pd.DataFrame:
    """`summarise` with a verdict: a sampler reaches its goal if `excess` is at most 1.

    The goal of a metric is the largest of

    - `within` times its noise floor,
    - the noise floor plus two standard errors, up to which samples cannot be told from exact ones,
    - `within` times the best mean of any sampler on the same model, since there the network sets the limit.

    Returns:
        The columns of `summarise` and: `excess`, the largest mean / goal over the metrics, and `worst`, that metric;
        `floors`, the largest mean / noise floor; and `near`, whether every mean is within the first two goals alone.
        `excess` is NaN for runs without figures, and infinite if any seed diverged or failed.
    """
    summary, names = summarise(table), metrics_of(table)
    best = summary.groupby("model")[names].transform("min")
    seeds = summary["seeds"].clip(lower=1) ** 0.5
    shares, near = {}, pd.Series(True, summary.index)
    for m in names:
        floor, noise = summary[f"{m}_floor"], 2 * summary[f"{m}_floor_std"] / seeds
        own = np.maximum(within * floor, floor + noise)
        shares[m] = summary[m] / np.maximum(own, within * best[m])
        near &= ~(summary[m] > own)
    share = pd.DataFrame(shares)
    known = share.notna().any(axis=1)
    summary["near"] = near & known
    summary["floors"] = summary[[f"{m}_ratio" for m in names]].max(axis=1)
    summary["excess"] = share.max(axis=1)
    summary["worst"] = share[known].idxmax(axis=1).reindex(summary.index)
    lost = known & summary["status"].str.startswith(("diverged", "failed"))
    summary.loc[lost, ["near", "floors", "excess", "worst"]] = [False, math.inf, math.inf, "a lost run"]
    return summary


def ranking(table: pd.DataFrame, within: float = 1.25) -> pd.DataFrame:
    """Which sampler reaches its goal (see `judge`) with the fewest calls.

    Returns:
        A row for each model and sampler, the fewest calls first: `calls`, the fewest with which it reaches the goal (NaN if
        it never does), and, at that budget or else the one with the smallest excess: `at`, its calls,
        `seconds_per_sample`, `endpoint_error`, `excess`, `worst` and `floors`.
    """
    summary = judge(table, within).dropna(subset="excess")
    figures, rows = ["seconds_per_sample", "endpoint_error", "excess", "worst", "floors"], []
    for place, (model, runs) in enumerate(summary.groupby("model", sort=False)):
        for sampler, own in runs.groupby("sampler", sort=False):
            reached = own[own["excess"] <= 1].nsmallest(1, "nfe")
            shown = reached.iloc[0] if len(reached) else own.loc[own["excess"].idxmin()]
            calls = shown["nfe"] if len(reached) else math.nan
            rows.append([place, model, sampler, calls, shown["nfe"], *shown[figures]])
    found = pd.DataFrame(rows, columns=["place", "model", "sampler", "calls", "at", *figures])
    return found.sort_values(["place", "calls", "excess"], ignore_index=True).drop(columns="place")


def winners(table: pd.DataFrame, within: float = 1.25) -> pd.DataFrame:
    """The best sampler at each budget, of those that spend no more.

    Returns:
        A row for each model and budget: `sampler`, the one with the smallest `excess` (see `judge`), its `excess`, `worst`
        and `floors`, and `equals`, the others that reach their goals too or have an excess at most a tenth larger.
    """
    summary = judge(table, within).dropna(subset="excess")
    held = summary[(summary["budget"] != UNBUDGETED) & (summary["nfe"] <= summary["budget"])]
    rows = []
    for (model, budget), runs in held.groupby(["model", "budget"], sort=False):
        runs = runs.sort_values("excess")
        best, others = runs.iloc[0], runs.iloc[1:]
        equal = others[others["excess"] <= max(1.0, 1.1 * best["excess"])]["sampler"]
        rows.append([model, budget, best["sampler"], *best[["excess", "worst", "floors"]], ", ".join(equal)])
    return pd.DataFrame(rows, columns=["model", "budget", "sampler", "excess", "worst", "floors", "equals"])

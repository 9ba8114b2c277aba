r"""Solvers compared with the converged ODE from the same starting points: their error, with little Monte Carlo noise.

x_i is a solver's endpoint from starting point i, and y_i that of the converged probability-flow ODE. With d elements per
sample and s the standard deviation of y,

    endpoint error    sqrt(mean_i |x_i - y_i|^2 / d) / s
    energy distance   E^2 = mean over i != j of 2 |x_i - y_j| - |x_i - x_j| - |y_i - y_j|

E^2 is unbiased for the distance between the two laws, since x_i and y_j are independent, and exactly 0 if x = y.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import pandas as pd
import torch
from torch import Tensor

from score_sde.checks import whole, wholes
from score_sde.evaluation.metrics import Yardstick, frechet_distance, mode_spread, sliced_w2
from score_sde.keyed import generator
from score_sde.progress import tqdm
from score_sde.score import ScoreModel
from score_sde.targets import GaussianMixture, Target
from score_sde.tuning import CONVERGED, Teacher, TunedSampler, TunedTable, begun_late, untuned


def endpoint_error(x: Tensor, y: Tensor) -> float:
    """Root mean square of x - y over all elements, in standard deviations of y."""
    return ((x - y).square().mean().sqrt() / _std(y)).item()


def endpoint_median(x: Tensor, y: Tensor) -> float:
    """Median over samples of |x_i - y_i| / sqrt(d), in standard deviations of y."""
    miss = (x - y).flatten(1)
    return (miss.norm(dim=1).median() / math.sqrt(miss.shape[1]) / _std(y)).item()


def coupled_energy(x: Tensor, y: Tensor) -> float:
    """Energy distance between the laws of x and y, from independent pairs (x_i, y_i); 0 if E^2 < 0."""
    x, y = x[:PAIRED].double().flatten(1), y[:PAIRED].double().flatten(1)
    n = len(x)
    own = (x - y).norm(dim=1).sum().item()
    squared = 2 * (_sum(x, y) - own) - _sum(x, x) - _sum(y, y)
    return math.sqrt(max(0.0, squared / (n * (n - 1))))


def _sum(x: Tensor, y: Tensor) -> float:
    """Sum of all distances, in blocks that fit the processor's cache."""
    blocks = x.split(max(1, 2**19 // len(y)))
    return sum(torch.cdist(block, y, compute_mode="donot_use_mm_for_euclid_dist").sum().item() for block in blocks)


def _std(y: Tensor) -> Tensor:
    return (y - y.mean(0)).square().mean().sqrt()


RANKED = 512
"""Number of starting points on which the untuned solvers are ranked."""

PAIRED = 3000
"""The energy distance uses at most this many samples."""


class Course:
    """Starting points, their converged endpoints and, if the law of the data is known, exact draws.

    Args:
        model: exact or learned.
        law: of the data, for the sliced W2 over its floor and the spread within the modes of a mixture; may be None.
        num_samples: starting points per seed.
        seeds: of the starting points.
        teacher: the solver for the converged endpoints; by default `tuning.CONVERGED`.
    """

    def __init__(
        self, model: ScoreModel, law: Target | None = None, *, num_samples: int = 5000, seeds: Sequence[int] = (0, 1, 2),
        teacher: Teacher | None = None, progress: bool = True,
    ) -> None:  # fmt: skip
        num_samples, seeds = whole("num_samples", num_samples, 2), wholes("seeds", seeds, 0)
        self.model, self.law = model, law
        teacher = teacher or CONVERGED
        self.starts, self.ends = {}, {}
        for seed in tqdm(seeds, desc="converged solution", disable=not progress, delay=2):
            noise = torch.randn(num_samples, *model.event_shape, generator=generator(seed, "course"))
            self.starts[seed] = model.start(noise.to(model.device))
            ends = [teacher.sample(model, x.shape, x_init=x).x for x in self.starts[seed].split(1024)]
            self.ends[seed] = torch.cat(ends)
        metrics = {"sliced_w2": partial(sliced_w2, directions=64)}
        self.yardstick = None if law is None else Yardstick(
            law, num_samples, generator=generator(0, "course", "draws"), metrics=metrics)  # fmt: skip

    def endpoints(self, table: TunedTable) -> dict[int, Tensor]:
        """A table's endpoints by seed."""
        sampler = TunedSampler(table)
        return {
            seed: torch.cat([sampler.sample(self.model, x.shape, x_init=x).x for x in start.split(1024)])
            for seed, start in self.starts.items()
        }

    def ranked(self, tables: Mapping[str, TunedTable], keep: int = 3) -> dict[str, TunedTable]:
        """The `keep` tables with the least median endpoint error on the first seed's first `RANKED` starting points."""
        seed, errors = next(iter(self.starts)), {}
        x, y = self.starts[seed][:RANKED], self.ends[seed][:RANKED]
        for name, table in tables.items():
            errors[name] = endpoint_median(TunedSampler(table).sample(self.model, x.shape, x_init=x).x, y)
        return {name: tables[name] for name in sorted(tables, key=errors.__getitem__)[:keep]}

    def measure(self, endpoints: Mapping[int, Tensor]) -> list[dict[str, float]]:
        """All figures of each seed's endpoints; the spread within the modes is that of all seeds' endpoints together.

        The least and the largest of many modes' spreads are biased by the noise of the lightest mode, which a mean over
        seeds would not reduce.
        """
        spread = {}
        if isinstance(self.law, GaussianMixture):
            modes = mode_spread(torch.cat([*endpoints.values()]), self.law)
            spread = {"spread_min": modes.min().item(), "spread_max": modes.max().item()}
        return [{"seed": seed} | self._figures(x, seed) | spread for seed, x in endpoints.items()]

    def _figures(self, x: Tensor, seed: int) -> dict[str, float]:
        y = self.ends[seed]
        row = {"endpoint": endpoint_error(x, y), "median": endpoint_median(x, y), "energy": coupled_energy(x, y)}
        if x[0].numel() > 2:
            row["frechet"] = frechet_distance(x.flatten(1), y.flatten(1))
        if self.yardstick is not None:
            row["sliced_w2"] = self.yardstick(x)["ratio"].item()
        return row


def course_table(course: Course, tables: Mapping[tuple[str, int], TunedTable], progress: bool = True) -> pd.DataFrame:
    """Every table on every seed, next to the best untuned solvers with as many calls, and with twice the most.

    Args:
        course: see `Course`.
        tables: by kind ("tuned", "spectrum", ...) and number of calls.
        progress: show a bar.

    Returns:
        A row for each solver and seed: kind, solver, calls, seed and the figures. Besides those of `tables`, kind is
        "untuned" for the three untuned solvers with the least median endpoint error, "late" for the best three of those
        that begin late (`tuning.begun_late`), and "converged" for the converged solution itself.
    """
    budgets = sorted({calls for _, calls in tables})
    budgets.append(2 * budgets[-1])
    solvers = [(kind, table.record.get("chosen", kind), calls, table) for (kind, calls), table in tables.items()]
    ranking = tqdm(budgets, desc="ranking", disable=not progress, delay=2, leave=False)
    solvers += [(kind, name, calls, table) for calls in ranking
                for kind, known in (("untuned", untuned), ("late", begun_late))
                for name, table in course.ranked(known(course.model.sde, calls)).items()]  # fmt: skip
    rows = [{"kind": "converged", "solver": "converged", "calls": 0} | row for row in course.measure(course.ends)]
    for kind, name, calls, table in tqdm(solvers, desc="measuring", disable=not progress, delay=2):
        found = course.measure(course.endpoints(table))
        rows += [{"kind": kind, "solver": name, "calls": calls} | row for row in found]
    return pd.DataFrame(rows)


def best_of_each(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds by kind and number of calls; where a kind has several solvers, the best for each figure separately.

    The best spread is the one nearest to 1, the best of the other figures the least.
    """
    means = table.drop(columns="seed").groupby(["kind", "solver", "calls"], sort=False).mean().reset_index()
    figures = means.columns.drop(["kind", "solver", "calls"])
    rows = [{"kind": kind, "calls": calls} | {name: _nearest(part[name], float("spread" in name)) for name in figures}
            for (kind, calls), part in means.groupby(["kind", "calls"], sort=False)]  # fmt: skip
    return pd.DataFrame(rows).sort_values(["calls", "kind"], ignore_index=True)


def _nearest(values: pd.Series, goal: float) -> float:
    return float(values.iloc[(values - goal).abs().to_numpy().argmin()])

r"""Fits tables to a model: all of their numbers by Levenberg-Marquardt, or only the levels by Nelder-Mead.

A table has a few dozen numbers, which are fitted to the endpoints of thousands of samples, so that the normal equations hold
nearly all of the curvature: a fit takes some twenty iterations, and different starts often end in the same table.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize

from score_sde.checks import number, one_of, whole
from score_sde.progress import tqdm
from score_sde.score import ScoreModel
from score_sde.tuning.pairs import Pairs, Teacher, converged_pairs
from score_sde.tuning.span import Span
from score_sde.tuning.table import TunedSampler, TunedTable
from score_sde.tuning.untuned import RULES, begun_late, untuned

METHODS = ("coefficients", "grid")
EARLIER = "the earlier table"


def tune(
    model: ScoreModel, steps: int, *, method: str = "coefficients", samples: int | None = None, iterations: int = 50,
    starts: int = 6, seed: int = 0, teacher: Teacher | None = None, robust: float = 0.07,
    batch_size: int | None = None, minutes: float | None = None, pairs: tuple[Pairs, Pairs] | None = None,
    earlier: TunedTable | None = None, progress: bool = True,
) -> TunedTable:  # fmt: skip
    """The best table found for this model and this number of network calls.

    Starting points are drawn from the prior: `samples` to fit on, and half as many to validate on. The most promising
    untuned solvers, begun late (`begun_late`), and as many on random levels are fitted for a few iterations, two of them for
    longer and the better of these in full. The table with the least validation loss is returned, which may be untuned.

    Args:
        model: exact or learned; its derivatives are not needed.
        steps: network calls per sample.
        method: "coefficients" fits all numbers of the table (Levenberg-Marquardt, with derivatives by differences);
            "grid" fits the levels alone (Nelder-Mead), with the weights of the best untuned solver's rule.
        samples: number of starting points to fit on; by default 2^16 / d for data of d dimensions, but 1024 to 16384.
        iterations: largest number of the full fit, which stops where it gains less than a thousandth.
        starts: number of candidates that are fitted.
        seed: of the starting points and the random levels.
        teacher: the solver whose endpoints are fitted; by default `CONVERGED`.
        robust: the loss is quadratic in errors below this many data standard deviations per dimension, and grows as their
            square root above.
        batch_size: points at a time; by default 2^14 / d, but 64 to 2048.
        minutes: time limit, for large networks: no iteration begins that would end later, judged by the one before. The
            time includes ranking the untuned solvers but not computing the converged solution. The result then depends
            on the machine's speed; None gives the same table everywhere.
        pairs: the result of `converged_pairs`, which serves every number of calls, in place of samples, teacher, robust,
            batch_size and the seed of the starting points.
        earlier: a table with as many calls that competes with the others, and is returned if it validates best.
        progress: show bars.

    Raises:
        ValueError: an option is unknown or not positive, the SDE cannot be used, or the earlier table does not fit.
    """
    check(steps, method=method, iterations=iterations, starts=starts, minutes=minutes)
    known, late = untuned(model.sde, steps), begun_late(model.sde, steps)
    fit, validation = pairs or converged_pairs(
        model, samples=samples, seed=seed, teacher=teacher, robust=robust, batch_size=batch_size, progress=progress
    )
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    losses = ranked(known, validation, progress) | ranked(late, validation, progress, starts)
    best, *_ = promising = sorted(late.keys() & losses, key=losses.__getitem__)
    if method == "grid":
        with searching(iterations, progress) as bar:
            search = Search(bar, iterations, end)
            tuned = {f"tuned from {best}": search_levels(fit, late[best], RULES[rule_of(best)], search)}
    else:
        known_good = {name: late[name] for name in promising[: (starts + 1) // 2]}
        tables = known_good | _random(Span.of(model.sde), int(steps), starts // 2, seed)
        tuned = _fitted(fit, validation, tables, iterations, end, progress)
    if earlier is not None:
        if len(earlier.weights) != steps:
            raise ValueError(
                f"the earlier table has {len(earlier.weights)} calls, and a table of {steps} is to be fitted"
            )
        TunedSampler(earlier).check(model.sde)
        tuned[EARLIER] = earlier
    return chosen(known, late | tuned, losses | losses_of(tuned, validation), method)


def check(
    steps: int, *, method: str = "coefficients", iterations: int = 1, starts: int = 1, minutes: float | None = None
) -> None:
    """Raises ValueError for options of `tune` that are out of range, before anything is computed."""
    one_of("method", method, METHODS)
    for name, value in (("steps", steps), ("iterations", iterations), ("starts", starts)):
        whole(name, value)
    if minutes is not None:
        number("minutes", minutes, above=0)


FIRST, KEPT = 256, 12
"""Number of points on which all untuned solvers are measured first, and how many of the best are then measured on all."""


def ranked(tables: Mapping[str, TunedTable], pairs: Pairs, progress: bool, kept: int = KEPT) -> dict[str, float]:
    """Losses on all points, of the best tables on the first `FIRST` points (`KEPT` or more), or of all if points are few."""
    losses = losses_of(tables, pairs.first(FIRST), progress)
    if len(pairs.x) <= FIRST:
        return losses
    best = sorted(losses, key=losses.__getitem__)[: max(kept, KEPT)]
    return losses_of({name: tables[name] for name in best}, pairs, progress)


def losses_of(tables: Mapping[str, TunedTable], pairs: Pairs, progress: bool = False) -> dict[str, float]:
    """Each table's loss on the pairs, by name."""
    bar = tqdm(tables.items(), desc="untuned solvers", disable=not progress, delay=2)
    return {name: pairs.loss(table) for name, table in bar}


def chosen(
    known: dict[str, TunedTable], others: dict[str, TunedTable], losses: dict[str, float], method: str
) -> TunedTable:
    """The table with the least loss; its record has all losses, and names the best untuned solver."""
    least, best = (min(names, key=losses.__getitem__) for names in (losses, losses.keys() & known))
    return replace((known | others)[least], record={
        "method": method, "chosen": least, "best untuned": best, "validation": losses})  # fmt: skip


def rule_of(name: str) -> str:
    """The rule in a name "<rule> on <grid>"."""
    return name.partition(" on ")[0]


# --- what is fitted ---------------------------------------------------------------------------------------------------

GLANCE = (6, 512)
"""Iterations, and largest number of points, of a candidate's first fit."""

PATHS = {"": (), ", from wide": (1.0, 0.3)}
"""Values of `robust` with which a candidate is fitted before the given one: once directly, and once from wide to narrow. A
wide loss first pulls in the starts that end in another mode, a narrow one then gives them up; which of the two paths leads
to the better table depends on the target."""

FINALISTS = 2
"""Candidates that are fitted to the end, on a quarter of the points; the best of them then on all."""


def _fitted(
    fit: Pairs, validation: Pairs, tables: dict[str, TunedTable], iterations: int, end: float, progress: bool
) -> dict[str, TunedTable]:
    """The best table by three rounds of fits, which may take a third of the time left each.

    First every candidate on few points along each of PATHS; then the FINALISTS that validate best, on a quarter of the
    points; last the better of these, on all points.
    """
    few, points = min(GLANCE[0], iterations), min(GLANCE[1], max(64, 2**14 // fit.x[0].numel()))
    now = time.monotonic()
    ends = [now + (end - now) * part / 3 for part in (1, 2, 3)]
    total = len(tables) * few * sum(1 + len(path) for path in PATHS.values()) + (FINALISTS + 1) * iterations
    part, candidates = fit.first(points), dict[str, TunedTable]()
    with searching(total, progress) as bar:
        glance, longer, last = (
            Search(bar, count, end) for count, end in zip((few, iterations, iterations), ends, strict=True)
        )
        for path, wide in PATHS.items():
            for name, table in tables.items():
                for robust in (*(c for c in wide if c > part.robust), part.robust):
                    table = fit_all(replace(part, robust=robust), table, glance)
                candidates[f"tuned from {name}{path}"] = table
        for pairs, search, keep in ((fit.first(math.ceil(len(fit.x) / 4)), longer, FINALISTS), (fit, last, 1)):
            found = losses_of(candidates, validation)
            best = sorted(found, key=found.__getitem__)[:keep]
            candidates = {name: fit_all(pairs, candidates[name], search) for name in best}
        return candidates


def _random(span: Span, calls: int, count: int, seed: int) -> dict[str, TunedTable]:
    """Second-order rules on random levels in the range where most of the change happens."""
    generator, tables = torch.Generator().manual_seed(seed), {}
    low, high = max(span.first, -2.0), min(span.last, 3.0)
    for k in range(count):
        levels = low + (high - low) * torch.rand(calls, generator=generator, dtype=torch.float64)
        rule = ("velocity Adams 2", "exponential Adams 2")[k % 2]
        table = RULES[rule](span.inside(levels.sort().values))
        tables[f"{rule} on random levels {k + 1}"] = replace(table, start=span.first)
    return tables


# --- how it is fitted -------------------------------------------------------------------------------------------------


@contextmanager
def searching(iterations: int, progress: bool) -> Iterator[tqdm]:
    """A bar over at most this many iterations, full at the end even if the fits converge earlier."""
    with tqdm(total=iterations, desc="tuning", disable=not progress, delay=2) as bar:
        yield bar
        bar.total = bar.n


@dataclass(frozen=True)
class Search:
    """How long a search may go on, and the bar that shows it."""

    bar: tqdm
    iterations: int
    end: float = math.inf

    def over(self, began: float = math.inf) -> bool:
        """Whether the time is over, or would be after another iteration as long as the one since `began`."""
        now = time.monotonic()
        return now + max(0.0, now - began) > self.end

    def count(self, loss: float) -> None:
        """Shows an iteration that is done."""
        self.bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
        self.bar.update()


def fit_all(pairs: Pairs, start: TunedTable, search: Search, enough: float = 1e-3) -> TunedTable:
    """Levenberg-Marquardt in all numbers of the table, until two successive iterations gain less than a share `enough`.

    A step solves (J^T W J + mu diag(J^T W J)) dz = -J^T W m. The damping mu grows until a step lowers the loss, and falls
    after each that does. No number moves by more than 2 in a step: all but the weights are logits or logarithms.
    Source: Marquardt 1963; the weights W of the robust loss are those of iteratively reweighted least squares.
    """
    span, calls = Span.of(pairs.model.sde), len(start.weights)
    z, damping, idle = span.vector(start), 1e-2, 0
    loss, began = pairs.loss(span.table(z, calls)), math.inf
    for _ in range(search.iterations):
        if search.over(began) or idle == 2:
            break
        began = time.monotonic()
        matrix, slope = pairs.normal_equations(span, z, calls)
        diagonal = matrix.diagonal() + 1e-10 * matrix.diagonal().mean() + 1e-300
        for _ in range(8):
            step = torch.linalg.solve(matrix + damping * diagonal.diag(), -slope)
            tried = z + step / (step.abs().max() / 2).clamp_min(1.0)
            found = pairs.loss(span.table(tried, calls))
            if found < loss:
                break
            damping *= 4
        else:
            break
        idle = idle + 1 if found > (1 - enough) * loss else 0
        z, loss, damping = tried, found, max(damping / 5, 1e-7)
        search.count(loss)
    return span.table(z, calls)


def search_levels(
    pairs: Pairs, start: TunedTable, rule: Callable[[torch.Tensor], TunedTable], search: Search
) -> TunedTable:
    """Nelder-Mead over the levels, until they move by less than 0.01 in logits and the loss by less than a thousandth.

    It works on the logarithm of the loss, so that this tolerance is relative.
    """
    span, points = Span.of(pairs.model.sde), replace(pairs, batch_size=1024)

    def table(z: np.ndarray) -> TunedTable:
        return replace(rule(span.inside(span.levels(torch.from_numpy(z)))), start=span.first)

    def callback(intermediate_result: Any) -> None:
        search.count(math.exp(intermediate_result.fun))
        if search.over():
            raise StopIteration

    logits = span.vector(start)[: len(start.weights)].numpy()
    simplex = logits + 0.5 * np.eye(len(logits) + 1, len(logits), -1)
    options = {"maxiter": search.iterations, "initial_simplex": simplex, "xatol": 1e-2, "fatol": 1e-3}
    result = minimize(lambda z: math.log(points.loss(table(z)) + 1e-300), logits, method="Nelder-Mead", callback=callback,
                      options=options)  # fmt: skip
    return table(result.x)

r"""Samplers x budgets x seeds on one model or several, held against exact draws: a tidy table, resumable.

A budget is a number of network calls. Beside each metric stands its noise floor, and for deterministic samplers the
paired endpoint error: from the same starting noise, the distance to where the converged probability-flow ODE ends,

    endpoint_error = sqrt(mean |x - x*|^2 / d) / std of the data,

the solver's error alone, without Monte Carlo noise. x* is x(t_min) or D(x(t_min), t_min), whichever is nearer: samplers
are meant to end at either.
"""

from __future__ import annotations

import bisect
import copy
import inspect
import math
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from score_sde.adaptive import AdaptiveODE
from score_sde.checks import whole, wholes
from score_sde.evaluation.cells import Journal, fingerprint
from score_sde.evaluation.metrics import Metric, Yardstick
from score_sde.grid import Grid
from score_sde.keyed import generator, key
from score_sde.noise import BatchNoise, NoiseSource, Stream
from score_sde.prediction import Prediction
from score_sde.progress import tqdm
from score_sde.sampler import Sampler, SampleResult
from score_sde.score import ScoreModel, WrappedScore
from score_sde.sde import Time, as_time
from score_sde.targets import Target

COLUMNS = ["model", "sampler", "budget", "seed", "status", "nfe", "seconds", "seconds_per_sample", "endpoint_error",
           "deterministic"]  # fmt: skip
KEYS = ["model", "sampler", "budget"]

UNBUDGETED = 0
"""The budget of a sampler that has no number of steps: its own tolerance or table decides."""

ABSURD = 100.0
"""Samples whose root mean square is beyond this many data standard deviations have diverged."""

CONVERGED = AdaptiveODE("dopri5", rtol=1e-6, atol=1e-6)
"""What the paired endpoint error is measured from."""


class Samples(Protocol):
    """What is compared: `Sampler`, `ProbabilityFlowODE`, or anything with their `sample`."""

    def sample(self, model: ScoreModel, shape: Sequence[int], *, seed: int) -> SampleResult: ...


Contestant = Samples | Mapping[int, Samples] | Callable[[int], Samples]
"""A sampler, a sampler for each number of calls, or a function from a budget to a sampler."""

Reference = Target | Tensor
"""The law of the data, or exact samples of it."""


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(
    models: ScoreModel | Mapping[str, ScoreModel], samplers: Mapping[str, Contestant], *, budgets: Sequence[int],
    reference: Reference | Mapping[str, Reference], seeds: Sequence[int] = (0,), num_samples: int = 5000,
    metrics: Sequence[str] | Mapping[str, Metric] | None = ("sliced_w2",), repeats: int = 8, seed: int = 0,
    pairs: int = 2000, batch_size: int = 10_000, processes: int = 1, directory: str | Path | None = None,
    progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Samples with every model, sampler, budget and seed, and measures all against the same exact draws.

    Each cell runs on one thread of torch, whatever `processes` is: figures do not depend on it, and times compare.

    Args:
        models: exact, learned or guided; a mapping gives them names.
        samplers: by name. A `Sampler` whose grid has `steps` gets as many as each budget allows (`at_budget`); a mapping
            {calls: sampler}, such as tuned tables, is asked for its largest number of calls within the budget; a
            function is called with the budget, and not held to it. Any other sampler runs once, as budget 0: its tolerance
            decides.
        budgets: numbers of network calls, the last denoising included.
        reference: what samples are held against, for all models or by model: a target, or at least 2 `num_samples` exact
            samples.
        seeds: of the samplers' noise; one seed gives all samplers the same starting noise.
        num_samples: drawn each time.
        metrics, repeats: see `Yardstick`.
        seed: of the exact draws.
        pairs: how many starts the paired endpoint error follows; 0 leaves it out.
        batch_size: samples at a time.
        processes: how many to spread over.
        directory: keeps every finished cell at once (`cells.jsonl`, keyed by all that determines it: a restart computes
            what is missing, a changed setting what it changes) and the first seed's samples (`load_samples`).
        progress: shows a bar when the comparison takes longer than two seconds.

    Returns:
        A row for each model, sampler, budget and seed: `COLUMNS`, then for each metric m the columns m, m_floor (its mean
        between pairs of exact draws) and m_floor_std (its standard deviation over these), and `cell`, the cell's key.
        `nfe` is counted, `seconds` measured; `deterministic` is 1 where no noise was drawn after the start. `status` is
        "ok", "diverged: ...", "refused: ..." (the sampler's own reason, in one line) or "failed: ..." (any other
        exception); all but the first leave the figures NaN.

    Raises:
        ValueError: a number is out of range, a reference is missing or of another shape, a metric is unknown.
    """
    named = dict(models) if isinstance(models, Mapping) else {"model": models}
    laws: dict[str, Any] = dict(reference) if isinstance(reference, Mapping) else dict.fromkeys(named, reference)
    budgets, seeds = wholes("budgets", budgets), wholes("seeds", seeds, 0)
    for name, count, least in (("num_samples", num_samples, 2), ("pairs", pairs, 0), ("batch_size", batch_size, 1),
                               ("processes", processes, 1), ("repeats", repeats, 1)):  # fmt: skip
        whole(name, count, least)
    _check(named, samplers, laws)
    settings = (num_samples, batch_size, pairs, torch.__version__, CONVERGED, _measure)
    rules = (metrics, repeats, seed, num_samples, Yardstick)
    floors = {name: fingerprint("floor", law, rules) for name, law in laws.items()}
    who = {name: fingerprint(model, model.device, settings) for name, model in named.items()}
    cells = [Cell(name, label, budget, s, solver, fingerprint(who[name], floors[name], s, solver), s == seeds[0])
             for name, model in named.items() for label, contestant in samplers.items()
             for budget, solver in _contest(contestant, model, budgets) for s in seeds]  # fmt: skip
    refused = all(isinstance(cell.solver, str) for cell in cells)
    home = None if directory is None or refused else Path(directory)
    journal = Journal(None if home is None else home / "cells.jsonl")
    missing = {cell.key: cell for cell in cells if not isinstance(cell.solver, str) and not _is_done(journal, cell.key)}
    if missing or not all(floor in journal for floor in floors.values()):
        make = partial(Yardstick, n=num_samples, metrics=metrics, repeats=repeats)
        sticks = {floors[name]: make(law, generator=generator(seed, "compare")) for name, law in laws.items()}
        if home is not None:  # all is known to be in order by now
            (home / "samples").mkdir(parents=True, exist_ok=True)
        for floor, stick in sticks.items():
            if floor not in journal:
                journal.add(floor, {m: [value, stick.spreads[m]] for m, value in stick.floors.items()})
        with _folder(home) as folder:
            yardsticks = {name: sticks[floor] for name, floor in floors.items()}
            bench = Bench(named, yardsticks, who, num_samples, batch_size, pairs, folder)
            _run(bench, list(missing.values()), journal, processes, progress)
    return _table(cells, journal, floors)


def _is_done(journal: Journal, key: str) -> bool:
    """Whether a cell need not be computed; what failed may have failed for what is no longer so."""
    return key in journal and not str(journal[key].get("status")).startswith("failed")


def _check(models: Mapping[str, ScoreModel], samplers: Mapping[str, Any], laws: Mapping[str, Any]) -> None:
    for name, group in (("models", models), ("samplers", samplers)):
        if not isinstance(group, Mapping) or not group:
            raise ValueError(f"{name} are a mapping from names to them, of one or more, got {group!r}")
    for name, model in models.items():
        if name not in laws:
            raise ValueError(f"model {name!r} has no reference; there are: {', '.join(laws) or 'none'}")
        law, expected = laws[name], tuple(model.event_shape)
        if not isinstance(law, Target | Tensor):
            raise ValueError(f"the reference of {name!r} is a target or a tensor of exact samples, got {law!r}")
        shape = tuple(law.shape[1:]) if isinstance(law, Tensor) else tuple(law.event_shape)
        if shape != expected:
            raise ValueError(f"model {name!r} makes samples of shape {expected}, its reference has shape {shape}")


@contextmanager
def _folder(home: Path | None) -> Iterator[Path]:
    """The comparison's folder, or one that lasts as long as the comparison."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = home or Path(temporary)
        (folder / "limits").mkdir(exist_ok=True)
        yield folder


# --- budgets ----------------------------------------------------------------------------------------------------------


def at_budget(sampler: Sampler, model: ScoreModel, calls: int) -> Sampler:
    """The sampler with as many grid steps as `calls` network calls a sample allow, the last denoising included.

    Two-stage steps, correctors, churned grids and guidance that asks twice are counted as what they cost.

    Raises:
        ValueError: the grid has no `steps` (as in `partial(grid.karras, steps=18)`), or one step costs more.
    """
    if not has_steps(sampler):
        raise ValueError(f"{type(sampler).__name__}'s grid has no steps to set: bind them by name, as in "
                         "partial(grid.karras, steps=18)")  # fmt: skip
    start = model.start(torch.zeros(1, *model.event_shape, device=model.device))
    unknown = model(start, model.sde.t_max).calls / model.calls_at(model.sde.t_max)  # 1 where `calls_at` knows them

    def cost(steps: int) -> float:
        try:
            return unknown * planned_calls(_with_steps(sampler, steps), model)
        except ValueError:
            if steps == 1:
                raise
            return math.inf  # a ladder that has no more levels

    if cost(1) > calls:
        raise ValueError(f"needs at least {cost(1):g} network calls, the budget is {calls}")
    low, high = 1, 2
    while cost(high) <= calls:
        low, high = high, 2 * high
        if high > 64 * (calls + 1):
            raise ValueError(f"spends no {calls} network calls, whatever its number of steps")
    return _with_steps(sampler, bisect.bisect_right(range(high), float(calls), lo=low, key=cost) - 1)


def planned_calls(sampler: Sampler, model: ScoreModel) -> int:
    """Network calls a sample of one run, counted in a run without the network."""
    plain = copy.copy(sampler)
    plain.cuda_graph = False
    return plain.sample(_Silent(model), (1, *model.event_shape), seed=0).nfe


class _Silent(WrappedScore):
    """Answers D = 0 at once, and says how many calls the model's answer would take."""

    def check(self, shape: Sequence[int], condition: Mapping[str, Any]) -> None: ...

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        alpha, sigma = (float(part(as_time(t))) for part in (self.sde.alpha, self.sde.sigma))
        nothing = torch.zeros_like(x)
        return Prediction(x, nothing, alpha, sigma, calls=self.model.calls_at(float(t)), variance_weight=nothing)

    def log_prob(self, x: Tensor, t: Time, **condition: Any) -> Tensor:
        return x.new_zeros(len(x))


def has_steps(sampler: Any) -> bool:
    """Whether this is a `Sampler` whose grid, or the grid that it is built on, binds `steps` by name."""
    return isinstance(sampler, Sampler) and _bound(sampler.grid) is not None


def _bound(grid: Any) -> dict[str, Any] | None:
    """The keywords of a partial grid that hold `steps`, its own or those of its base."""
    keywords = grid.keywords if isinstance(grid, partial) else {}
    return keywords if "steps" in keywords else _bound(keywords["base"]) if "base" in keywords else None


def _with_steps(sampler: Sampler, steps: int) -> Sampler:
    other = copy.copy(sampler)
    other.grid = _regridded(sampler.grid, steps)
    return other


def _regridded(grid: Any, steps: int) -> Grid:
    new = {"steps": steps} if "steps" in grid.keywords else {"base": _regridded(grid.keywords["base"], steps)}
    return partial(grid.func, *grid.args, **{**grid.keywords, **new})


def _contest(contestant: Any, model: ScoreModel, budgets: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """(budget, sampler) for each budget, or (budget, "refused: ...") where there is none."""
    budgeted = isinstance(contestant, Mapping) or callable(contestant) or has_steps(contestant)
    for budget in map(int, budgets) if budgeted else (UNBUDGETED,):
        try:
            solver = _of_budget(contestant, model, budget) if budgeted else contestant
            getattr(solver, "check", lambda sde: None)(model.sde)
        except Exception as error:
            solver = _reason(error)
        yield budget, solver


def _of_budget(contestant: Any, model: ScoreModel, budget: int) -> Samples:
    if isinstance(contestant, Mapping):
        within = [calls for calls in contestant if calls <= budget]
        if not within:
            raise ValueError(
                f"there are tables of {', '.join(map(str, sorted(contestant)))} calls, none within {budget}"
            )
        return contestant[max(within)]
    return at_budget(contestant, model, budget) if isinstance(contestant, Sampler) else contestant(budget)


def _reason(error: Exception) -> str:
    """A status: the error in one line, ValueError and TypeError being refusals."""
    line = " ".join(str(error).split()) or type(error).__name__
    return (
        f"refused: {line}" if isinstance(error, (ValueError, TypeError)) else f"failed: {type(error).__name__}: {line}"
    )


# --- cells ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One run: `solver` is a sampler, or the status that says why there is none."""

    model: str
    sampler: str
    budget: int
    seed: int
    solver: Any
    key: str
    keep: bool


@dataclass(frozen=True)
class Limit:
    """The converged endpoints of one model and seed."""

    model: str
    seed: int


@dataclass(frozen=True)
class Bench:
    """What all cells share; a worker reads it once."""

    models: Mapping[str, ScoreModel]
    yardsticks: Mapping[str, Yardstick]
    who: Mapping[str, str]
    num_samples: int
    batch_size: int
    pairs: int
    folder: Path

    def limit_path(self, model: str, seed: int) -> Path:
        return self.folder / "limits" / f"{fingerprint(self.who[model], seed)}.npy"

    def parts(self) -> list[int]:
        """Sizes of the batches."""
        whole, rest = divmod(self.num_samples, self.batch_size)
        return [self.batch_size] * whole + [rest] * (rest > 0)


class Witness(NoiseSource):
    """A noise source that remembers whether anything but the start was drawn from it."""

    def __init__(self, source: NoiseSource) -> None:
        self.source, self.drawn = source, False

    def open(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Stream:
        stream = self.source.open(shape, dtype, device)

        def watched(step: int, draw: int) -> Tensor:
            self.drawn |= (step, draw) != (0, 0)
            return stream(step, draw)

        return watched


def _seed_of(seed: int, part: int) -> int:
    return seed if part == 0 else key(seed, "part", part)


def _run(bench: Bench, cells: Sequence[Cell], journal: Journal, processes: int, progress: bool) -> None:
    """Computes the cells, after the limits that they need, each kept as soon as it is done."""
    wanted = {(cell.model, cell.seed) for cell in cells} if bench.pairs else set()
    limits = [Limit(*pair) for pair in sorted(wanted) if not bench.limit_path(*pair).exists()]
    with tqdm(total=len(limits) + len(cells), desc="comparing", delay=2, disable=not progress) as bar:
        for tasks in (limits, cells):
            for found, row in _spread(bench, tasks, processes):
                if found:
                    journal.add(found, row)
                bar.update()


def _spread(bench: Bench, tasks: Sequence[Any], processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, row) of each task as it is done; in workers, that read the bench once from a file."""
    if processes == 1 or len(tasks) < 2:
        with _one_thread():
            _warm(bench)
            yield from (_do(bench, task) for task in tasks)
        return
    import cloudpickle
    from joblib import Parallel, delayed

    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary, "bench.pickle")
        path.write_bytes(cloudpickle.dumps(bench))
        pool = Parallel(n_jobs=processes, return_as="generator_unordered", batch_size=1)
        yield from pool(delayed(_do_from)(str(path), task) for task in tasks)


def _do_from(path: str, task: Any) -> tuple[str, dict[str, Any]]:
    torch.set_num_threads(1)
    _end_with_parent()
    return _do(_read(path), task)


@lru_cache(maxsize=1)
def _end_with_parent() -> None:
    """Lets this worker end when the process that started it was killed: nobody would take its results."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@lru_cache(maxsize=1)
def _read(path: str) -> Bench:
    import cloudpickle

    bench: Bench = cloudpickle.loads(Path(path).read_bytes())  # written a moment ago by our parent
    _warm(bench)
    return bench


def _warm(bench: Bench) -> None:
    """Calls each model once: the first call of a process is slow, and no sampler's fault."""
    for model in bench.models.values():
        with suppress(Exception):  # a model that cannot be called gets its status in its cells
            model(model.start(torch.zeros(2, *model.event_shape, device=model.device)), model.sde.t_max)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _do(bench: Bench, task: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(task, Limit):
        _converge(bench, task)
        return "", {}
    return task.key, _measure(bench, task)


def _converge(bench: Bench, limit: Limit) -> None:
    """Stores x(t_min) and D(x(t_min), t_min) of the first `pairs` starts; nothing where the ODE cannot be solved."""
    model, size = bench.models[limit.model], bench.parts()[0]
    try:
        with torch.no_grad():
            z = BatchNoise(limit.seed).open((size, *model.event_shape), model.dtype, model.device)(0, 0)
            start = model.start(z)[: bench.pairs]
            end = CONVERGED.sample(model, tuple(start.shape), x_init=start).x
            both = torch.stack([end, model(end, model.sde.t_min).denoised])
    except Exception:
        return
    _save(bench.limit_path(limit.model, limit.seed), both)


def _measure(bench: Bench, cell: Cell) -> dict[str, Any]:
    """The row of a cell; whatever goes wrong is its status."""
    row: dict[str, Any] = {"status": "ok"}
    model, stick = bench.models[cell.model], bench.yardsticks[cell.model]
    try:
        witness, x, cost = _sample(bench, model, cell)
        row |= cost | {"deterministic": witness is not None and not witness.drawn}
        broken = _broken(x, stick)
        if broken:
            return row | {"status": f"diverged: {broken}"}
        row |= dict(stick(x)[["metric", "value"]].itertuples(index=False))
        if witness is not None and not witness.drawn:
            row |= _endpoint_error(bench.limit_path(cell.model, cell.seed), x, stick)
    except Exception as error:
        return row | {"status": _reason(error)}
    if cell.keep:
        shown = x if x.ndim == 2 else x[:16]
        _save(bench.folder / "samples" / f"{cell.key}.npy", shown)
    return row


def _sample(bench: Bench, model: ScoreModel, cell: Cell) -> tuple[Witness | None, Tensor, dict[str, Any]]:
    """All parts, what they cost, and a witness of their noise where the sampler takes a noise source."""
    watched = "noise" in inspect.signature(cell.solver.sample).parameters
    results, witness = [], None
    for part, size in enumerate(bench.parts()):
        noise = BatchNoise(_seed_of(cell.seed, part))
        witness = Witness(noise) if watched else None
        source: dict[str, Any] = {"noise": witness} if watched else {"seed": noise.seed}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"\d+ of \d+ samples are not finite")  # which the status will say
            results.append(cell.solver.sample(model, (size, *model.event_shape), **source))
    seconds = sum(result.seconds for result in results)
    cost = {"nfe": max(result.nfe for result in results), "seconds": seconds,
            "seconds_per_sample": seconds / bench.num_samples}  # fmt: skip
    return witness, torch.cat([result.x.detach().cpu() for result in results]), cost


def _broken(x: Tensor, stick: Yardstick) -> str:
    """Why samples count as diverged, or nothing."""
    lost = int((~x.flatten(1).isfinite().all(dim=1)).sum())
    if lost:
        return f"{lost} of {len(x)} samples are not finite"
    centre, std = _spread_of(stick)
    size = (x.double() - centre).square().mean().sqrt().item() / std
    return f"samples are {size:.3g} data standard deviations wide" if size > ABSURD else ""


def _spread_of(stick: Yardstick) -> tuple[Tensor, float]:
    """Mean, and pooled standard deviation over all elements, of the exact draws."""
    draws = stick.draws[0].detach().cpu().double()
    centre = draws.mean(0)
    return centre, (draws - centre).square().mean().sqrt().item() or 1.0


def _endpoint_error(path: Path, x: Tensor, stick: Yardstick) -> dict[str, float]:
    if not path.exists():
        return {}
    limits = torch.from_numpy(np.load(path)).double()
    miss = x[: limits.shape[1]].double() - limits
    error = miss.square().flatten(1).mean(1).sqrt().min().item()
    return {"endpoint_error": error / _spread_of(stick)[1]}


def _save(path: Path, x: Tensor) -> None:
    """Writes a tensor as .npy in one instant."""
    partly = path.with_name(f".{path.name}.{time.monotonic_ns()}.npy")
    path.parent.mkdir(exist_ok=True)
    np.save(partly, x.detach().cpu().numpy())
    partly.replace(path)


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(cells: Sequence[Cell], journal: Journal, floors: Mapping[str, str]) -> pd.DataFrame:
    names = list(dict.fromkeys(m for floor in floors.values() for m in journal[floor]))
    rows = []
    for cell in cells:
        row = {"status": cell.solver} if isinstance(cell.solver, str) else journal[cell.key]
        known = {
            "model": cell.model,
            "sampler": cell.sampler,
            "budget": cell.budget,
            "seed": cell.seed,
            "cell": cell.key,
        }
        floor = {f"{m}_floor{end}": value for m, pair in journal[floors[cell.model]].items()
                 for end, value in zip(("", "_std"), pair, strict=True)}  # fmt: skip
        rows.append(known | row | floor)
    columns = [*COLUMNS, *(f"{m}{end}" for m in names for end in ("", "_floor", "_floor_std")), "cell"]
    table = pd.DataFrame(rows, columns=columns)
    figures = [c for c in columns if c not in ("model", "sampler", "budget", "seed", "status", "cell")]
    return table.astype(dict.fromkeys(figures, float))


def metrics_of(table: pd.DataFrame) -> list[str]:
    """The names of the metrics in a table of `compare`."""
    return [str(c).removesuffix("_floor") for c in table if str(c).endswith("_floor")]


def by_metric(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `compare` with one row a run and metric: metric, value, floor and ratio = value / floor."""
    names = metrics_of(table)
    rest = table.drop(columns=[f"{m}{end}" for m in names for end in ("", "_floor", "_floor_std")])
    parts = [rest.assign(metric=m, value=table[m], floor=table[f"{m}_floor"]) for m in names]
    long = pd.concat(parts, ignore_index=True)
    return long.assign(ratio=long["value"] / long["floor"])


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, a row for each model, sampler and budget.

    Columns: model, sampler, budget, seeds (how many runs were ok), status (the first that is not ok, else "ok"), nfe,
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
    """`summarise`, with a verdict: `excess`, the largest over the metrics of mean / goal, and `worst`, that metric.

    Beside it `floors`, the largest over the metrics of mean / noise floor, and `near`, whether the floor alone would do as
    the goal of every metric.

    The goal of a metric is the largest of `within` times its noise floor; two standard errors of the floor above it,
    which no set of samples is told apart from; and `within` times the best mean of any sampler on that model, where the
    network and not the sampler sets the limit. A sampler is there when `excess` is at most 1. Empty runs have NaN; where
    a seed diverged or failed it is infinite, whatever the others say.
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
    """Which sampler gets there (see `judge`) with the fewest calls.

    Returns:
        A row for each model and sampler, the fewest calls first: `calls`, the fewest with which it is there (NaN where it
        never is), and at that budget, or where the excess is smallest, `at` so many calls: `seconds_per_sample`,
        `endpoint_error`, `excess`, the metric `worst` and `floors`.
    """
    summary = judge(table, within).dropna(subset="excess")
    rows = []
    for (model, sampler), own in summary.groupby(["model", "sampler"], sort=False):
        there = own[own["excess"] <= 1].nsmallest(1, "nfe")
        shown = there.iloc[0] if len(there) else own.loc[own["excess"].idxmin()]
        calls = shown["nfe"] if len(there) else math.nan
        figures = ["nfe", "seconds_per_sample", "endpoint_error", "excess", "worst", "floors"]
        rows.append([model, sampler, calls, *shown[figures]])
    columns = ["model", "sampler", "calls", "at", "seconds_per_sample", "endpoint_error", "excess", "worst", "floors"]
    found = pd.DataFrame(rows, columns=columns)
    place = found["model"].map({name: i for i, name in enumerate(dict.fromkeys(found["model"]))})
    return (
        found.assign(place=place).sort_values(["place", "calls", "excess"]).drop(columns="place").reset_index(drop=True)
    )


def winners(table: pd.DataFrame, within: float = 1.25) -> pd.DataFrame:
    """Which sampler to take within each budget, of those that spend no more.

    Returns:
        A row for each model and budget: `sampler`, the one of the smallest `excess` (see `judge`), its `excess`, the
        metric `worst`, its `floors`, and `equals`, the others that are there too, or within a tenth of it where it is not
        there.
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


def load_samples(directory: str | Path, table: pd.DataFrame) -> dict[tuple[str, str, int], Tensor]:
    """(model, sampler, budget) -> the samples that `compare` kept in its directory: of the first seed, images at most 16."""
    found = {}
    for row in table.itertuples():
        path = Path(directory, "samples", f"{row.cell}.npy")
        if row.status == "ok" and path.exists():
            found[str(row.model), str(row.sampler), int(row.budget)] = torch.from_numpy(np.load(path))
    return found

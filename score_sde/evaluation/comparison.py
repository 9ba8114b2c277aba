r"""Samplers x budgets x seeds on one model or several, compared with exact draws: a tidy table, resumable.

A budget is a number of network calls. Each metric comes with its noise floor. Deterministic samplers also have a paired
endpoint error, the distance to the endpoint x* of the converged probability-flow ODE from the same starting noise,

    endpoint_error = sqrt(mean |x - x*|^2 / d) / std of the data,

which is the solver's error alone, without Monte Carlo noise. x* is x(t_min) or D(x(t_min), t_min), whichever is nearer:
samplers may end at either.
"""

from __future__ import annotations

import inspect
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from score_sde.adaptive import AdaptiveODE
from score_sde.checks import whole, wholes
from score_sde.evaluation.budgets import Contestant, contest, reason
from score_sde.evaluation.cells import Journal, fingerprint
from score_sde.evaluation.metrics import Metrics, Yardstick
from score_sde.keyed import generator, key
from score_sde.noise import BatchNoise, NoiseSource, Stream
from score_sde.progress import tqdm
from score_sde.score import ScoreModel, in_rows
from score_sde.targets import Target
from score_sde.training import write_array

COLUMNS = ["model", "sampler", "budget", "seed", "status", "nfe", "seconds", "seconds_per_sample", "endpoint_error",
           "deterministic"]  # fmt: skip

ABSURD = 100.0
"""Samples whose root mean square exceeds this many data standard deviations count as diverged."""

CONVERGED = AdaptiveODE("dopri5", rtol=1e-6, atol=1e-6)
"""The solver whose endpoints the paired endpoint error is measured from."""

Reference = Target | Tensor
"""The law of the data, or exact samples of it."""


# --- the comparison ---------------------------------------------------------------------------------------------------


def compare(
    models: ScoreModel | Mapping[str, ScoreModel], samplers: Mapping[str, Contestant], *, budgets: Sequence[int],
    reference: Reference | Mapping[str, Reference], seeds: Sequence[int] = (0,), num_samples: int = 5000,
    metrics: Metrics | None = ("sliced_w2",), repeats: int = 8, seed: int = 0,
    condition: Mapping[str, Tensor] | None = None, pairs: int = 2000, batch_size: int = 10_000, processes: int = 1,
    directory: str | Path | None = None, progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Samples with every model, sampler, budget and seed, and compares all with the same exact draws.

    Each run uses one torch thread, whatever `processes` is, so that results do not depend on it and times can be compared.

    Args:
        models: exact, learned or guided; a mapping gives them names.
        samplers: by name. A `Sampler` whose grid has `steps` gets as many as each budget allows (`at_budget`). Of a mapping
            {calls: sampler}, such as tuned tables, the sampler with the most calls within the budget is used. A function
            is called with the budget, which its sampler need not keep to. Any other sampler runs once, as budget 0, with
            its own tolerance.
        budgets: numbers of network calls, including the final denoising.
        reference: what samples are compared with, for all models or by model: a target, or at least 2 `num_samples` exact
            samples.
        seeds: of the samplers' noise; the same seed gives all samplers the same starting noise.
        num_samples: samples per run.
        metrics, repeats: see `Yardstick`.
        seed: of the exact draws.
        condition: tensors (num_samples, ...) by name, for the models that know the name; one label serves all samples.
        pairs: number of starts for the paired endpoint error; 0 leaves it out.
        batch_size: samples drawn at a time.
        processes: number of processes that share the runs.
        directory: stores every run as soon as it has finished (`cells.jsonl`, keyed by all that determines it, so that a
            restart computes only what is missing or changed) and the first seed's samples (`load_samples`).
        progress: shows a bar when the comparison takes longer than two seconds.

    Returns:
        A row for each model, sampler, budget and seed: `COLUMNS`, then for each metric m the columns m, m_floor (its mean
        between pairs of exact draws) and m_floor_std (its standard deviation over these), and `cell`, the run's key.
        `nfe` is counted, `seconds` measured; `deterministic` is 1 if no noise was drawn after the start. `status` is
        "ok", "diverged: ...", "refused: ..." (the sampler's own reason, in one line) or "failed: ..." (any other
        exception); unless it is "ok", the metrics are NaN.

    Raises:
        ValueError: a number is out of range, a reference is missing or of another shape, a metric or a condition is
            unknown.
    """
    named = dict(models) if isinstance(models, Mapping) else {"model": models}
    laws: dict[str, Any] = dict(reference) if isinstance(reference, Mapping) else dict.fromkeys(named, reference)
    budgets, seeds = wholes("budgets", budgets), wholes("seeds", seeds, 0)
    for name, count, least in (("num_samples", num_samples, 2), ("pairs", pairs, 0), ("batch_size", batch_size, 1),
                               ("processes", processes, 1), ("repeats", repeats, 1)):  # fmt: skip
        whole(name, count, least)
    _check(named, samplers, laws)
    given = _condition_rows(named, condition or {}, num_samples)
    settings = (num_samples, batch_size, pairs, torch.__version__, CONVERGED, _measure)
    rules = (metrics, repeats, seed, num_samples, Yardstick)
    entrants = {
        name: Entrant(model, given[name], identity=fingerprint(model, model.device, given[name], settings),
                      floor=fingerprint("floor", laws[name], rules)) for name, model in named.items()
    }  # fmt: skip
    cells = [*_cells(entrants, samplers, budgets, seeds)]
    home = None if directory is None or all(cell.refused for cell in cells) else Path(directory)
    journal = Journal(None if home is None else home / "cells.jsonl")
    missing = {cell.key: cell for cell in cells if not cell.refused and not _is_done(journal, cell.key)}
    needed = {entrant.floor: laws[name] for name, entrant in entrants.items()}
    if missing or not needed.keys() <= journal.rows.keys():
        make = partial(Yardstick, n=num_samples, metrics=metrics, repeats=repeats)
        yardsticks = {floor: make(law, generator=generator(seed, "compare")) for floor, law in needed.items()}
        with _folder(home) as folder:  # nothing is written before all arguments are known to be valid
            for floor, yardstick in yardsticks.items():
                if floor not in journal:
                    journal.add(floor, {m: [value, yardstick.spreads[m]] for m, value in yardstick.floors.items()})
            bench = Bench(entrants, yardsticks, num_samples, batch_size, pairs, folder)
            _run(bench, list(missing.values()), journal, processes, progress)
    return _table(cells, journal, entrants)


def _is_done(journal: Journal, key: str) -> bool:
    """Whether a cell need not be computed; one that failed is tried again, since the cause may be gone."""
    return key in journal and not str(journal[key].get("status")).startswith("failed")


def _check(models: Mapping[str, ScoreModel], samplers: Mapping[str, Any], laws: Mapping[str, Any]) -> None:
    for name, group in (("models", models), ("samplers", samplers)):
        if not isinstance(group, Mapping) or not group:
            raise ValueError(f"{name} are a mapping from names to them, of one or more, got {group!r}")
    for name, contestant in samplers.items():
        if isinstance(contestant, Mapping) and not contestant:
            raise ValueError(f"sampler {name!r} is an empty mapping: give {{calls: sampler}} for one or more")
        for one in contestant.values() if isinstance(contestant, Mapping) else [contestant]:
            if not (hasattr(one, "sample") or callable(one)):
                raise ValueError(f"sampler {name!r} has no `sample`: give one such as Sampler(DDIM(), partial(grid.karras, "
                                 f"steps=20)), or a function from a budget to one; got {one!r}")  # fmt: skip
    for name, model in models.items():
        if name not in laws:
            raise ValueError(f"model {name!r} has no reference; there are: {', '.join(laws) or 'none'}")
        law, expected = laws[name], tuple(model.event_shape)
        if not isinstance(law, Target | Tensor):
            raise ValueError(
                f"the reference of {name!r} is a target or a tensor of exact samples, got {type(law).__name__}"
            )
        shape = tuple(law.shape[1:]) if isinstance(law, Tensor) else tuple(law.event_shape)
        if shape != expected:
            raise ValueError(f"model {name!r} makes samples of shape {expected}, its reference has shape {shape}")


def _condition_rows(
    models: Mapping[str, ScoreModel], condition: Mapping[str, Tensor], num_samples: int
) -> dict[str, dict[str, Tensor]]:
    """For each model the conditions that it knows, with a row per sample."""
    for name in condition:
        if not any(name in model.condition_names for model in models.values()):
            raise ValueError(f"condition {name!r} is known to none of the models {', '.join(models)}")
    known = {
        name: {key: condition[key] for key in sorted(model.condition_names & condition.keys())}
        for name, model in models.items()
    }
    return {name: in_rows(model, num_samples, known[name]) for name, model in models.items()}


@contextmanager
def _folder(home: Path | None) -> Iterator[Path]:
    """The comparison's folder, by default a temporary one."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = home or Path(temporary)
        for name in ("limits", "samples"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        yield folder


# --- cells ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entrant:
    """A model in a comparison.

    Attributes:
        rows: the conditions that the model knows, by name, with a row per sample.
        identity: a hash of the model, of `rows` and of all settings that its samples depend on.
        floor: a hash of what its samples are compared with, under which the journal keeps the noise floor.
    """

    model: ScoreModel
    rows: Mapping[str, Tensor]
    identity: str
    floor: str

    def condition(self, first: int, size: int) -> dict[str, Tensor]:
        """The condition of samples `first` to `first + size`."""
        return {name: value[first : first + size] for name, value in self.rows.items()}


@dataclass(frozen=True)
class Cell:
    """One run. `solver` is a sampler, or a status if there is none; `keep` is whether its samples are stored."""

    model: str
    sampler: str
    budget: int
    seed: int
    solver: Any
    key: str
    keep: bool

    @property
    def refused(self) -> bool:
        return isinstance(self.solver, str)


def _cells(
    entrants: Mapping[str, Entrant], samplers: Mapping[str, Contestant], budgets: Sequence[int], seeds: Sequence[int]
) -> Iterator[Cell]:
    """Every run, in the order of the table."""
    for name, entrant in entrants.items():
        for label, contestant in samplers.items():
            for budget, solver in contest(contestant, entrant.model, budgets, entrant.condition(0, 1)):
                for seed in seeds:
                    key = fingerprint(entrant.identity, entrant.floor, seed, solver)
                    yield Cell(name, label, budget, seed, solver, key, keep=seed == seeds[0])


@dataclass(frozen=True)
class Limit:
    """The task of computing the converged endpoints for one model and seed."""

    model: str
    seed: int


@dataclass(frozen=True)
class Bench:
    """What all cells share; a worker reads it once."""

    entrants: Mapping[str, Entrant]
    yardsticks: Mapping[str, Yardstick]
    num_samples: int
    batch_size: int
    pairs: int
    folder: Path

    def limit_path(self, model: str, seed: int) -> Path:
        return self.folder / "limits" / f"{fingerprint(self.entrants[model].identity, seed)}.npy"

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
    """Computes the limits that the cells need, then the cells, and stores each as soon as it is done."""
    wanted = {(cell.model, cell.seed) for cell in cells} if bench.pairs else set()
    limits = [Limit(*pair) for pair in sorted(wanted) if not bench.limit_path(*pair).exists()]
    with tqdm(total=len(limits) + len(cells), desc="comparing", delay=2, disable=not progress) as bar:
        for tasks in (limits, cells):
            for found, row in _as_done(bench, tasks, processes):
                if found:
                    journal.add(found, row)
                bar.update()


def _as_done(bench: Bench, tasks: Sequence[Any], processes: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (key, row) of each task when it is done; worker processes read the bench from a file, once each."""
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
    """Ends this worker when the process that started it is gone, since nobody would take its results."""
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
    """Calls each model once, so that the slow first call of a process is not in a sampler's time."""
    for entrant in bench.entrants.values():
        with suppress(Exception):  # a model that cannot be called gets its status in its cells
            model = entrant.model
            z = torch.zeros(2, *model.event_shape, device=model.device)
            model(model.start(z), model.sde.t_max, **entrant.condition(0, 2))


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
    """Stores x(t_min) and D(x(t_min), t_min) of the first `pairs` starts; nothing if the ODE cannot be solved."""
    entrant, size = bench.entrants[limit.model], bench.parts()[0]
    model = entrant.model
    try:
        with torch.no_grad():
            z = BatchNoise(limit.seed).open((size, *model.event_shape), model.dtype, model.device)(0, 0)
            start = model.start(z)[: bench.pairs]
            condition = entrant.condition(0, len(start))
            end = CONVERGED.sample(model, tuple(start.shape), x_init=start, condition=condition).x
            both = torch.stack([end, model(end, model.sde.t_min, **condition).denoised])
    except Exception:
        return
    write_array(bench.limit_path(limit.model, limit.seed), both.cpu().numpy())


def _measure(bench: Bench, cell: Cell) -> dict[str, Any]:
    """The row of a cell; any error becomes its status."""
    row: dict[str, Any] = {"status": "ok"}
    entrant = bench.entrants[cell.model]
    yardstick = bench.yardsticks[entrant.floor]
    try:
        witness, x, cost = _sample(bench, entrant, cell)
        row |= cost | {"deterministic": witness is not None and not witness.drawn}
        broken = _broken(x, yardstick)
        if broken:
            return row | {"status": f"diverged: {broken}"}
        row |= dict(yardstick(x)[["metric", "value"]].itertuples(index=False))
        if witness is not None and not witness.drawn:
            row |= _endpoint_error(bench.limit_path(cell.model, cell.seed), x, yardstick)
    except Exception as error:
        return row | {"status": reason(error)}
    if cell.keep:
        shown = x if x.ndim == 2 else x[:16]
        write_array(bench.folder / "samples" / f"{cell.key}.npy", shown.numpy())
    return row


def _sample(bench: Bench, entrant: Entrant, cell: Cell) -> tuple[Witness | None, Tensor, dict[str, Any]]:
    """Draws all batches: the witness of their noise if the sampler takes a noise source, the samples, and their cost."""
    watched = "noise" in inspect.signature(cell.solver.sample).parameters
    results, witness = [], None
    for part, size in enumerate(bench.parts()):
        noise = BatchNoise(_seed_of(cell.seed, part))
        witness = Witness(noise) if watched else None
        given: dict[str, Any] = {"noise": witness} if watched else {"seed": noise.seed}
        if condition := entrant.condition(part * bench.batch_size, size):
            given["condition"] = condition
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*the sampler diverged")  # the status says so
            results.append(cell.solver.sample(entrant.model, (size, *entrant.model.event_shape), **given))
    seconds = sum(result.seconds for result in results)
    cost = {"nfe": max(result.nfe for result in results), "seconds": seconds,
            "seconds_per_sample": seconds / bench.num_samples}  # fmt: skip
    return witness, torch.cat([result.x.detach().cpu() for result in results]), cost


def _broken(x: Tensor, yardstick: Yardstick) -> str:
    """Why samples count as diverged; empty if they do not."""
    lost = int((~x.flatten(1).isfinite().all(dim=1)).sum())
    if lost:
        return f"{lost} of {len(x)} samples are not finite"
    centre, std = _spread_of(yardstick)
    size = (x.double() - centre).square().mean().sqrt().item() / std
    return f"samples are {size:.3g} data standard deviations wide" if size > ABSURD else ""


def _spread_of(yardstick: Yardstick) -> tuple[Tensor, float]:
    """Mean, and pooled standard deviation over all elements, of the exact draws."""
    draws = yardstick.draws[0].detach().cpu().double()
    centre = draws.mean(0)
    return centre, (draws - centre).square().mean().sqrt().item() or 1.0


def _endpoint_error(path: Path, x: Tensor, yardstick: Yardstick) -> dict[str, float]:
    if not path.exists():
        return {}
    limits = torch.from_numpy(np.load(path)).double()
    miss = x[: limits.shape[1]].double() - limits
    error = miss.square().flatten(1).mean(1).sqrt().min().item()
    return {"endpoint_error": error / _spread_of(yardstick)[1]}


# --- tables -----------------------------------------------------------------------------------------------------------


def _table(cells: Sequence[Cell], journal: Journal, entrants: Mapping[str, Entrant]) -> pd.DataFrame:
    floors = {name: journal[entrant.floor] for name, entrant in entrants.items()}
    names = list(dict.fromkeys(m for floor in floors.values() for m in floor))
    rows = []
    for cell in cells:
        row = {"status": cell.solver} if cell.refused else journal[cell.key]
        known = {name: getattr(cell, name) for name in ("model", "sampler", "budget", "seed")} | {"cell": cell.key}
        floor = {f"{m}_floor{end}": value for m, pair in floors[cell.model].items()
                 for end, value in zip(("", "_std"), pair, strict=True)}  # fmt: skip
        rows.append(known | row | floor)
    columns = [*COLUMNS, *(f"{m}{end}" for m in names for end in ("", "_floor", "_floor_std")), "cell"]
    table = pd.DataFrame(rows, columns=columns)
    figures = [c for c in columns if c not in ("model", "sampler", "budget", "seed", "status", "cell")]
    return table.astype(dict.fromkeys(figures, float))


def load_samples(directory: str | Path, table: pd.DataFrame) -> dict[tuple[str, str, int], Tensor]:
    """(model, sampler, budget) -> the first seed's samples that `compare` stored in its directory, at most 16 if images."""
    found = {}
    for row in table.itertuples():
        path = Path(directory, "samples", f"{row.cell}.npy")
        if row.status == "ok" and path.exists():
            found[str(row.model), str(row.sampler), int(row.budget)] = torch.from_numpy(np.load(path))
    return found

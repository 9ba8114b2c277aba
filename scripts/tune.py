"""Fits solvers of few network calls to a model and measures them: python scripts/tune.py run=<dir> | target=<name> steps=6"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig
from scripting import configs, entry, figures, output, subjects, tuned_tables
from scripting.command_line import idle, listed, typed

from score_sde import SDE, ScoreModel, plotting
from score_sde.checks import whole, wholes
from score_sde.evaluation.coupled import RANKED, Course, best_of_each, course_table
from score_sde.keyed import generator
from score_sde.targets import Target
from score_sde.training import write_atomically
from score_sde.tuning import (
    EARLIER,
    GRIDS,
    RULES,
    Pairs,
    TunedSampler,
    TunedTable,
    check,
    converged_pairs,
    tune,
    tune_spectrum,
)

TEACHING = ("samples", "seed", "robust", "batch_size")
FITTING = ("method", "iterations", "starts", "seed", "minutes")
LABELS = {"endpoint": "endpoint error / data std", "median": "median endpoint error / data std",
          "energy": "energy distance to converged", "frechet": "Fréchet distance to converged",
          "sliced_w2": "sliced W2 / noise floor"}  # fmt: skip


@entry.main("tune")
def main(config: DictConfig) -> None:
    check_options(config, typed())
    steps = wholes("steps", listed(config.steps))
    subject = subjects.of_run_conditioned(config) if config.run else subjects.of_target(config)
    fits = Fits(config, subject, Path(config.output or tuned_tables.tuned_folder(config)))
    tuned_tables.check_conditions(fits.folder, fits.conditions)
    fits.folder.mkdir(parents=True, exist_ok=True)
    tables = {(kind, calls): table for calls in steps for kind, table in fits.of(calls).items()}
    if config.report:
        report(measured(config, subject, tables), fits.folder)


def check_options(config: DictConfig, overrides: Sequence[str]) -> None:
    """Raises ValueError for options out of range, and for those that do nothing with the others given."""
    subjects.check_one(config, "tune for what")
    for calls in wholes("steps", listed(config.steps)):
        check(calls, **{name: config[name] for name in FITTING if name != "seed"})
    wholes("seeds", listed(config.seeds), 0)
    whole("num_samples", config.num_samples, 2)
    if config.run:
        idle(overrides, ["sde"], f"with run={config.run}, which has its own")
    else:
        idle(overrides, ["ema", "step", *tuned_tables.CONDITIONS], "with a target, whose score is exact")
    if config.spectrum:
        fitted = ["samples", "method", "iterations", "starts", "robust", "batch_size", "minutes"]
        idle(overrides, fitted, "with spectrum=true")


@dataclass(frozen=True)
class Fits:
    """Fits tables to a subject and writes them into a folder; the converged solution for all fits is computed once."""

    config: DictConfig
    subject: subjects.Subject
    folder: Path

    @property
    def conditions(self) -> dict[str, Any]:
        """The label and context, if given, that all samples share."""
        given = configs.plain(self.config)
        return {name: given[name] for name in tuned_tables.CONDITIONS if given[name] is not None}

    def settings(self, kind: str) -> dict[str, Any]:
        """All settings that a fit depends on, for its table's record."""
        given, law = configs.plain(self.config), () if self.config.run else ("target", "sde")
        names = ("seed", "num_samples")  # of the draws whose covariance is taken
        if kind == "tuned":
            names = (*TEACHING, *FITTING, "step", *(("ema",) if self.config.run else ()))
        return {name: given[name] for name in (*names, *law)} | self.conditions

    @cached_property
    def pairs(self) -> tuple[Pairs, Pairs]:
        return converged_pairs(self.subject.model, **{name: self.config[name] for name in TEACHING})

    @cached_property
    def spectrum(self) -> torch.Tensor:
        return spectrum_of(self.subject.reference, self.config)

    def of(self, calls: int) -> dict[str, TunedTable]:
        """Fits the tables with this number of calls, "tuned" and "spectrum" or the latter alone; writes and prints each."""
        tables = {}
        for kind in ("spectrum",) if self.config.spectrum else ("tuned", "spectrum"):
            path = self.folder / f"{kind}-{calls}.json"
            tables[kind] = self.table(kind, calls, path)
            write_atomically(path, tables[kind].text())
            print_validation(tables[kind])
            print(f"{path}: use it with sampler={kind} sampler.table={path}")
        return tables

    def table(self, kind: str, calls: int, path: Path) -> TunedTable:
        """A table; the one at `path` is used if it has these settings, and a tuned one else kept unless the fit is better."""
        model, settings = self.subject.model, self.settings(kind)
        earlier = earlier_table(path, model.sde)
        if earlier is not None and earlier.record.get("settings") == settings:
            print(f"{path}: fitted with these settings already; for a new fit give another seed, or remove the file")
            return earlier
        if kind == "spectrum":
            table = tune_spectrum(self.spectrum, calls, sde=model.sde)
        else:
            options = {name: self.config[name] for name in FITTING}
            table = tune(model, calls, pairs=self.pairs, earlier=earlier, **options)
            table.record["step"] = self.config.step
        if table.record["chosen"] == EARLIER:
            print(f"{path}: the table that was there is kept, since the new fit is no better")
        table.record["settings"] = settings
        return table


def earlier_table(path: Path, sde: SDE) -> TunedTable | None:
    """The table in a file; None if there is none, or it does not fit this SDE."""
    with suppress(ValueError, FileNotFoundError):
        TunedSampler(path).check(sde)
        return TunedTable.load(path)
    return None


Tables = Mapping[tuple[str, int], TunedTable]
"""(kind, calls) -> table."""


def measured(config: DictConfig, subject: subjects.Subject, tables: Tables) -> pd.DataFrame:
    """Every table, and the best untuned solvers, on starting points that no fit has seen: a row for each solver and seed."""
    seeds = wholes("seeds", listed(config.seeds), 0)
    law = subject.reference if isinstance(subject.reference, Target) and not config.run else None
    print_estimate(subject.model, tables, config.num_samples, len(seeds))
    course = Course(subject.model, law, num_samples=config.num_samples, seeds=seeds)
    return course_table(course, tables).assign(step=config.step or 0, num_samples=config.num_samples)


def print_estimate(model: ScoreModel, tables: Tables, num_samples: int, seeds: int) -> None:
    """Prints how long the report will take if it is minutes: it measures more than a fit does, and has no time limit."""
    (_, calls), table = next(iter(tables.items()))
    budgets, count = {calls for _, calls in tables}, min(num_samples, 1024)
    began = time.monotonic()
    TunedSampler(table).sample(model, (count, *model.event_shape), seed=0)
    a_call = (time.monotonic() - began) / (count * calls)
    every = sum(budgets) + 2 * max(budgets)  # calls of one solver at each budget that is measured
    ranking = 2 * len(RULES) * len(GRIDS) * RANKED * every  # of the untuned solvers, and of those begun late
    # Then about eight solvers of each budget are measured, and the converged solution, which takes about a hundred calls.
    minutes = a_call * (num_samples * seeds * (8 * every + 100) + ranking) / 60
    if minutes > 2:
        print(f"the report will take about {minutes:.0f} minutes, less with fewer num_samples={num_samples} or seeds={seeds}, "
              "none with report=false; the tables are written", flush=True)  # fmt: skip


def spectrum_of(reference: Any, config: DictConfig) -> torch.Tensor:
    """Eigenvalues of the covariance of the law's draws or of examples, at least a millionth of their mean each."""
    x = reference if isinstance(reference, torch.Tensor) else reference.sample(
        (2 * config.num_samples,), generator=generator(config.seed, "spectrum"))  # fmt: skip
    values = torch.linalg.eigvalsh(torch.cov(x.double().flatten(1).T).reshape(x[0].numel(), -1))
    return values.clamp_min(1e-6 * values.mean())


def print_validation(table: TunedTable) -> None:
    """Prints the chosen table and its best rivals, with their loss on starting points that the fit did not see."""
    losses = table.record["validation"]
    spectrum = table.record["method"].startswith("spectrum")
    what = "W2 on Gaussian data of this covariance" if spectrum else "loss on starting points that no fit has seen"
    print(f"{what}, in data standard deviations:")
    for name in sorted(losses, key=losses.__getitem__)[:4]:
        print(f"{losses[name]:10.4g}  {name}{'  <- chosen' if name == table.record['chosen'] else ''}")


def merged(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The table, after those rows of the file whose kind and calls it does not have.

    A file made with other weights, seeds or numbers of samples is dropped, since its rows are not comparable.
    """
    if not path.exists():
        return table
    old, keys, made_with = pd.read_csv(path), ["kind", "calls"], ["seed", "step", "num_samples"]
    if {*old.columns} != {*table.columns} or not _combinations(old, made_with).equals(_combinations(table, made_with)):
        print(f"{path}: written anew, since its rows are for other weights, seeds or num_samples")
        return table
    kept = ~pd.MultiIndex.from_frame(old[keys]).isin(pd.MultiIndex.from_frame(table[keys]))
    return pd.concat([old[kept], table], ignore_index=True)


def _combinations(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    return table[columns].drop_duplicates().sort_values(columns, ignore_index=True)


def report(table: pd.DataFrame, folder: Path) -> None:
    """Writes tuning.csv, which keeps the rows of earlier runs, and tuning.png; prints the best solver of each kind."""
    table = merged(folder / "tuning.csv", table)
    write_atomically(folder / "tuning.csv", table.to_csv(index=False))
    best = best_of_each(table.drop(columns=["step", "num_samples"]))
    output.show(best)
    names = [name for name in LABELS if name in best and name != "median"]
    figure, axes = plotting.panels(len(names), width=4.2, height=3.8)
    for ax, name in zip(axes[0], names, strict=True):
        plotting.solvers_against_calls(ax, best, name, LABELS[name])
        if name == "sliced_w2":
            ax.axhline(1.25, color="0.6", linestyle=":", linewidth=1, label="1.25 times the floor")
            ax.legend(frameon=False, fontsize=8)
    figures.save(figure, folder / "tuning.png")
    print(f"\n{folder}: tuning.csv, tuning.png; untuned: the best of {table[table.kind == 'untuned'].solver.nunique()} "
          "solvers, for each column separately; late: the same without the first call, which sees only noise")  # fmt: skip


if __name__ == "__main__":
    main()

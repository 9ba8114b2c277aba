"""Fits solvers of few network calls to a model and measures them: python scripts/tune.py run=<dir> | target=<name> steps=6"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from compare import model_and_reference
from omegaconf import DictConfig
from scripting import configs, entry, figures, guiding, output, tuned_tables
from scripting.command_line import idle, listed, typed

from score_sde import SDE, ScoreModel, plotting
from score_sde.checks import whole, wholes
from score_sde.evaluation.coupled import RANKED, Course, best_of_each, course_table
from score_sde.keyed import generator
from score_sde.targets import Target
from score_sde.training import write_atomically
from score_sde.tuning import EARLIER, Pairs, TunedSampler, TunedTable, check, converged_pairs, tune, tune_spectrum

TEACHING = ("samples", "seed", "robust", "batch_size")
FITTING = ("method", "iterations", "starts", "seed", "minutes")
CONDITIONS = ("label", "context")
LABELS = {"endpoint": "endpoint error / data std", "median": "median endpoint error / data std",
          "energy": "energy distance to converged", "frechet": "Fréchet distance to converged",
          "sliced_w2": "sliced W2 / noise floor"}  # fmt: skip


@entry.main("tune")
def main(config: DictConfig) -> None:
    if bool(config.run) == bool(config.get("target")):
        raise ValueError("tune for what? give either run=<directory> or target=<name>, e.g. target=ring")
    if config.run:
        idle(typed(), ["sde"], f"with run={config.run}, which has its own")
    else:
        idle(typed(), ["ema", "step", *CONDITIONS], "with a target, whose score is exact")
    if config.spectrum:
        idle(
            typed(),
            ["samples", "method", "iterations", "starts", "robust", "batch_size", "minutes"],
            "with spectrum=true",
        )
    steps, seeds = wholes("steps", listed(config.steps)), wholes("seeds", listed(config.seeds), 0)
    whole("num_samples", config.num_samples, 2)
    for calls in steps:
        check(calls, **{name: config[name] for name in FITTING if name != "seed"})
    model, reference = of_run(config) if config.run else model_and_reference(config)[:2]
    folder = Path(config.output or tuned_tables.tuned_folder(config))
    folder.mkdir(parents=True, exist_ok=True)
    settings = settings_of(config)

    @cache
    def pairs() -> tuple[Pairs, Pairs]:
        return converged_pairs(model, **{name: config[name] for name in TEACHING})

    tables = {}
    for calls in steps:
        spectrum = tune_spectrum(spectrum_of(reference, config), calls, sde=model.sde)
        found = {} if config.spectrum else {"tuned": tuned(model, calls, pairs, config, settings, folder)}
        for kind, table in (found | {"spectrum": spectrum}).items():
            path = folder / f"{kind}-{calls}.json"
            write_atomically(path, table.text())
            tables[kind, calls] = table
            validation(table)
            print(f"{path}: use it with sampler={kind} sampler.table={path}")
    if config.report:
        law = reference if isinstance(reference, Target) and not config.run else None
        foretell(model, tables, config.num_samples, len(seeds))
        course = Course(model, law, num_samples=config.num_samples, seeds=seeds)
        report(course_table(course, tables).assign(step=config.step or 0, num_samples=config.num_samples), folder)


def of_run(config: DictConfig) -> tuple[ScoreModel, Any]:
    """The run's model under the conditions that all samples are to have, and its law or real examples of that label."""
    run = configs.open_run(config)
    model, data = configs.model_of(run, config), run.data()
    if labels := guiding.labels_of(config.label, run):
        data = data.of_classes(labels)
    reference = data.target if data.target is not None else data.reference(2 * config.num_samples).x
    return guiding.told_alike(model, run, config), reference


def settings_of(config: DictConfig) -> dict[str, Any]:
    """All that a fit depends on, for its table's record."""
    given, law = configs.plain(config), ("ema",) if config.run else ("target", "sde")
    law += tuple(name for name in CONDITIONS if given[name] is not None)
    return {name: given[name] for name in (*TEACHING, *FITTING, "step", *law)}


def tuned(
    model: ScoreModel, calls: int, pairs: Callable[[], tuple[Pairs, Pairs]], config: DictConfig, settings: dict[str, Any],
    folder: Path,
) -> TunedTable:  # fmt: skip
    """The tuned table; one in the folder that these settings gave is taken as it is, another has to be beaten."""
    path = folder / f"tuned-{calls}.json"
    earlier = earlier_table(path, model.sde)
    if earlier is not None and earlier.record.get("settings") == settings:
        print(f"{path}: fitted with these settings already; another seed, or without the file, fits anew")
        return earlier
    options = {name: config[name] for name in FITTING}
    table = tune(model, calls, pairs=pairs(), earlier=earlier, **options)
    if table.record["chosen"] == EARLIER:
        print(f"{path}: the table that was there is kept, the new fit is no better")
    table.record.update(settings=settings, step=settings["step"])
    return table


def earlier_table(path: Path, sde: SDE) -> TunedTable | None:
    """The table in a file, where there is one that serves this SDE."""
    with suppress(ValueError, FileNotFoundError):
        TunedSampler(path).check(sde)
        return TunedTable.load(path)
    return None


def foretell(model: ScoreModel, tables: Mapping[tuple[str, int], TunedTable], num_samples: int, seeds: int) -> None:
    """Prints how long the report will take, where that is minutes: it measures more than a fit does, and no limit ends it."""
    (_, calls), table = next(iter(tables.items()))
    budgets, count = {calls for _, calls in tables}, min(num_samples, 1024)
    began = time.monotonic()
    TunedSampler(table).sample(model, (count, *model.event_shape), seed=0)
    a_call = (time.monotonic() - began) / (count * calls)
    # Of about eight solvers of every budget, and of twice the last; of the converged one, of a hundred calls; of the ranking.
    every = sum(budgets) + 2 * max(budgets)
    minutes = a_call * (num_samples * seeds * (8 * every + 100) + 132 * RANKED * every) / 60
    if minutes > 2:
        print(f"the report will take about {minutes:.0f} minutes: fewer num_samples={num_samples} or seeds={seeds} take less, "
              "report=false none; the tables are written", flush=True)  # fmt: skip


def spectrum_of(reference: Any, config: DictConfig) -> torch.Tensor:
    """Eigenvalues of the data's covariance, of draws of the law or examples; none below a millionth of the mean."""
    x = reference if isinstance(reference, torch.Tensor) else reference.sample(
        (2 * config.num_samples,), generator=generator(config.seed, "spectrum"))  # fmt: skip
    values = torch.linalg.eigvalsh(torch.cov(x.double().flatten(1).T).reshape(x[0].numel(), -1))
    return values.clamp_min(1e-6 * values.mean())


def validation(table: TunedTable) -> None:
    """The chosen table beside the best untuned solvers, by their loss on starting points that the fit did not see."""
    losses = table.record["validation"]
    spectrum = table.record["method"].startswith("spectrum")
    what = "W2 on Gaussian data of this covariance" if spectrum else "loss on starting points that no fit has seen"
    print(f"{what}, in data standard deviations:")
    for name in sorted(losses, key=losses.__getitem__)[:4]:
        print(f"{losses[name]:10.4g}  {name}{'  <- chosen' if name == table.record['chosen'] else ''}")


def merged(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    """The table, after the rows of an earlier one for kinds and calls that it has not itself.

    Rows of other weights, seeds or numbers of samples are not to be compared with: there it is the table alone.
    """
    if not path.exists():
        return table
    old, keys, made_with = pd.read_csv(path), ["kind", "calls"], ["seed", "step", "num_samples"]
    if {*old.columns} != {*table.columns} or not _combinations(old, made_with).equals(_combinations(table, made_with)):
        print(f"{path}: written anew, what it held is of other weights, seeds or num_samples")
        return table
    kept = ~pd.MultiIndex.from_frame(old[keys]).isin(pd.MultiIndex.from_frame(table[keys]))
    return pd.concat([old[kept], table], ignore_index=True)


def _combinations(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    return table[columns].drop_duplicates().sort_values(columns, ignore_index=True)


def report(table: pd.DataFrame, folder: Path) -> None:
    """tuning.csv with every solver and seed, those of earlier calls too, tuning.png, and the best of each kind shown."""
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
          "solvers, for each figure by itself; late: likewise, without the call at noise alone")  # fmt: skip


if __name__ == "__main__":
    main()

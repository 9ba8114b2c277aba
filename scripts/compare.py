"""Compares samplers over budgets of network calls: python scripts/compare.py run=<dir> | target=<name> sde=<name>

Writes comparison.csv (every run), summary.csv (means over seeds), figures, samples and report.html, one page with all of it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf
from scripting import comparison_report, configs, entry, output, restoring, subjects, tuned_tables
from scripting.command_line import idle, typed

from score_sde import ExactScore, ScoreModel
from score_sde.build import build
from score_sde.evaluation import compare, known_metrics, ranking

DEFAULT_METRICS = ("energy", "sliced_w2", "mode_weights", "mode_spread")


@entry.main("compare")
def main(config: DictConfig) -> None:
    check_options(config, typed())
    if config.task:
        restoring.run_task(config)
        return
    subjects.check_one(config, "compare what")
    subject = subjects.of_run(config) if config.run else subjects.of_target(config)
    fit_to(config, subject.reference)
    samplers, absent = contestants(config)
    for line in absent:
        print(line)
    table, folder = compared(config, subject, samplers), Path(config.output)
    home = home_of(table, folder)
    comparison_report.write(config, table, subject.reference, home, absent)
    print_results(table, home, folder)


def compared(config: DictConfig, subject: subjects.Subject, samplers: Mapping[str, Any]) -> pd.DataFrame:
    """The table of `score_sde.evaluation.compare`. Raises ValueError if no sampler could run."""
    known = [m for m in DEFAULT_METRICS if m in known_metrics(subject.reference)]
    try:
        table = compare(
            models_of(subject, config.exact), samplers, budgets=list(config.budgets), reference=subject.reference,
            seeds=list(config.seeds), num_samples=config.num_samples,
            metrics=configs.metrics_of(config.metrics, config.trust, known), seed=config.seed,
            condition=subject.conditions(config.num_samples), pairs=config.pairs, batch_size=config.batch_size,
            processes=config.processes, directory=config.output,
        )  # fmt: skip
    except KeyboardInterrupt:
        again = f"; finished runs are kept: continue with the same command and output={config.output}"
        sys.exit(entry.interrupted(again))
    if table["status"].str.startswith(("refused", "failed")).all():
        raise ValueError(f"no sampler could run: {table['sampler'][0]}: {table['status'][0].partition(': ')[2]}")
    return table


def print_results(table: pd.DataFrame, home: Path, folder: Path) -> None:
    """Prints the ranking, advice, the runs that failed, and where the report (`home`) and the samples (`folder`) are."""
    output.show(ranking(table).rename(columns=comparison_report.HEADS), comparison_report.RULE)
    for line in comparison_report.advice(table):
        print(line)
    for row in comparison_report.faults(table).to_dict("records"):
        mark = f"{row['model']} score, " if table["model"].nunique() > 1 else ""
        print(f"{mark}{row['sampler']} within {row['budget']} calls, {row['seeds']} seeds: {row['status']}")
    pictures = ", ".join(sorted(file.name for file in home.glob("*.png")))
    there = "samples/, " if home == folder else ""
    print(f"\n{home}: report.html, comparison.csv (every run), summary.csv (means), {there}{pictures}")
    if home != folder:
        print(f"{folder}: samples/, and the report of other runs, which is kept")


def home_of(table: pd.DataFrame, folder: Path) -> Path:
    """The folder for a table's report: `folder`, or folder-2, ... if that has a report of runs that the table lacks."""
    columns = ["model", "sampler", "budget", "seed", "cell"]
    own = {*table[columns].itertuples(index=False, name=None)}
    homes = itertools.chain([folder], (folder.with_name(f"{folder.name}-{i}") for i in itertools.count(2)))

    def reported(home: Path) -> set[tuple[Any, ...]]:
        file = home / "comparison.csv"
        if not file.exists():
            return set()
        return {*pd.read_csv(file).reindex(columns=columns).itertuples(index=False, name=None)}

    return next(home for home in homes if reported(home) <= own)


def check_options(config: DictConfig, overrides: Sequence[str]) -> None:
    """Raises ValueError for options that do nothing with the others given."""
    if not config.task:
        idle(overrides, ["restoration"], "without a task")
        idle(overrides, ["context"], "without a task: samples have the contexts of training examples")
    else:
        others = ["samplers", "own", "tables", "target", "exact", "pairs", "metrics", "processes", "batch_size"]
        idle(overrides, others, f"in task={config.task}, which has the options of restoration")
        if config.run:
            idle(overrides, ["num_samples", "restoration.prior"], f"with run={config.run}, whose images are restored")
        else:
            with_run = ["restoration.operator", "restoration.count", "restoration.draws"]
            idle(overrides, with_run, f"in task={config.task} without a run, against an exact posterior")
    if config.run:
        idle(overrides, ["sde"], f"with run={config.run}, which has its own")
    else:
        idle(overrides, ["exact", "ema", "step", "label", "context"], "with a target, whose score is exact")


def fit_to(config: DictConfig, reference: Any) -> None:
    """Lowers `num_samples` to half the real examples: the noise floor needs two disjoint sets of them."""
    most = len(reference) // 2 if isinstance(reference, torch.Tensor) else config.num_samples
    if most < 2:
        raise ValueError(f"{config.run} has {len(reference)} held-out examples, and a comparison needs 4 or more: "
                         "train with a greater data.held_out")  # fmt: skip
    if config.num_samples > most:
        print(f"num_samples={most}, not {config.num_samples}: {config.run} has {len(reference)} held-out examples")
        config.num_samples = most


def models_of(subject: subjects.Subject, exact: bool) -> dict[str, ScoreModel]:
    """The subject's model by name, and the exact score if it is asked for."""
    model, reference = subject.model, subject.reference
    if isinstance(model, ExactScore):
        return {"exact": model}
    if exact and isinstance(reference, torch.Tensor):
        raise ValueError("exact=true needs a run on a target of closed form: these data have no exact score")
    return {"learned": model} | ({"exact": ExactScore(reference, model.sde)} if exact else {})


def contestants(config: DictConfig) -> tuple[dict[str, Any], list[str]]:
    """The samplers by name, of conf/sampler and your own, and a line for each that is left out for want of its tables.

    Raises ValueError if none is left, and for `tables` that no sampler uses.
    """
    found, absent = dict[str, Any](), list[str]()
    names = {name: name for name in config.samplers} | dict(config.own.items())
    nodes = {
        name: configs.named("sampler", given) if isinstance(given, str) else given for name, given in names.items()
    }
    if config.tables is not None and not any(tuned_tables.is_pattern(node.get("table")) for node in nodes.values()):
        raise ValueError(f"tables={config.tables} does nothing without tuned or spectrum: add them to samplers")
    for name, node in nodes.items():
        try:
            found[name] = contestant(node, config)
        except tuned_tables.NoTablesError as error:
            absent.append(f"{name} is left out: {error}")
    if not found:
        raise ValueError(absent[0] if absent else "samplers=[] leaves nothing to compare: give names of conf/sampler")
    return found, absent


def contestant(node: DictConfig, config: DictConfig) -> Any:
    """The sampler of a config or, if its `table` is a pattern, {calls: sampler} for all tables that match.

    The tables are those of `tables`, or of the run's or target's folder.
    """
    if not tuned_tables.is_pattern(node.get("table")):
        return build(configs.sampler_config(node), config.trust)
    files = config.tables
    if not isinstance(files, DictConfig):
        files = tuned_tables.tables_of(Path(files or tuned_tables.tuned_folder(config)), node.table)
    if not files:
        raise ValueError("tables={} has no table: give {calls: file}, a folder, or leave it out")
    folder = Path(config.run) if config.run else None
    made = {int(calls): configs.sampler_config(OmegaConf.merge(node, {"table": str(file)}), folder, config.step)
            for calls, file in files.items()}  # fmt: skip
    return {calls: build(made[calls], config.trust) for calls in sorted(made)}


if __name__ == "__main__":
    main()

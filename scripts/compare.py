"""Compares samplers over budgets of network calls: python scripts/compare.py run=<dir> | target=<name> sde=<name>

Leaves comparison.csv (every run), summary.csv (means over seeds), figures, samples and report.html, all of it on a page.
"""

from __future__ import annotations

import itertools
import math
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import configs
import entry
import figures
import guiding
import output
import page
import pandas as pd
import restoring
import torch
import tuned_tables
from command_line import idle, listed, typed
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from score_sde import ExactScore, ScoreModel, plotting
from score_sde.build import build
from score_sde.data import TargetStream
from score_sde.evaluation import compare, judge, known_metrics, load_samples, ranking, winners
from score_sde.evaluation.verdicts import metrics_of
from score_sde.progress import tqdm
from score_sde.training import write_atomically

DEFAULT_METRICS = ("energy", "sliced_w2", "mode_weights", "mode_spread")
SHOWN = {"nfe": "calls", "seconds_per_sample": "s per sample", "endpoint_error": "endpoint error"}


@entry.main("compare")
def main(config: DictConfig) -> None:
    check_options(config, typed())
    if config.task:
        restoring.run_task(config)
        return
    models, reference = models_and_reference(config)
    fit_to(config, reference)
    known = [m for m in DEFAULT_METRICS if m in known_metrics(reference)]
    metrics = known if config.metrics is None else listed(config.metrics)
    folder = Path(config.output)
    samplers, absent = contestants(config)
    for line in absent:
        print(line)
    try:
        table = compare(
            models, samplers, budgets=list(config.budgets), reference=reference, seeds=list(config.seeds),
            num_samples=config.num_samples, metrics=metrics, seed=config.seed, pairs=config.pairs,
            batch_size=config.batch_size, processes=config.processes, directory=folder,
        )  # fmt: skip
    except KeyboardInterrupt:
        sys.exit(entry.interrupted(f"; what was computed is kept: go on with the same command and output={folder}"))
    if table["status"].str.startswith(("refused", "failed")).all():
        raise ValueError(f"no sampler could run: {table['sampler'][0]}: {table['status'][0].partition(': ')[2]}")
    summary, home = judge(table), home_of(table, folder)
    home.mkdir(exist_ok=True)
    write_atomically(home / "comparison.csv", table.to_csv(index=False))
    write_atomically(home / "summary.csv", summary.to_csv(index=False))
    report = page.Page(*heading(config, table))
    write(report, config, table, summary, reference, home, absent)
    write_atomically(home / "report.html", report.html())
    output.show(ranking(table))
    print(RULE)
    for line in advice(table):
        print(line)
    for row in faults(table).to_dict("records"):
        mark = f"{row['model']} score, " if table["model"].nunique() > 1 else ""
        print(f"{mark}{row['sampler']} within {row['budget']} calls, {row['seeds']} seeds: {row['status']}")
    pictures = ", ".join(sorted(file.name for file in home.glob("*.png")))
    there = "samples/, " if home == folder else ""
    print(f"\n{home}: report.html, comparison.csv (every run), summary.csv (means), {there}{pictures}")
    if home != folder:
        print(f"{folder}: samples/, and the report of other runs, which stays as it is")


def home_of(table: pd.DataFrame, folder: Path) -> Path:
    """Where a table's report goes: `folder`, or folder-2, ... where that has the report of runs that the table lacks."""
    columns = ["model", "sampler", "budget", "seed", "cell"]
    own = {*table[columns].itertuples(index=False, name=None)}
    homes = itertools.chain([folder], (folder.with_name(f"{folder.name}-{i}") for i in itertools.count(2)))

    def told(home: Path) -> set[tuple[Any, ...]]:
        file = home / "comparison.csv"
        if not file.exists():
            return set()
        return {*pd.read_csv(file).reindex(columns=columns).itertuples(index=False, name=None)}

    return next(home for home in homes if told(home) <= own)


def check_options(config: DictConfig, overrides: Sequence[str]) -> None:
    """Refuses, with ValueError, options that do nothing in what the others ask for."""
    if not config.task:
        idle(overrides, ["restoration"], "without a task")
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
        idle(overrides, ["exact", "ema", "step"], "with a target, whose score is exact")


def model_and_reference(config: DictConfig) -> tuple[ScoreModel, Any]:
    """The model to sample from and the law or the real examples to compare with.

    Raises ValueError unless one of run= and target= is given.
    """
    target = config.get("target")
    if bool(config.run) == bool(target):
        raise ValueError("compare what? give either run=<directory> or target=<name>, e.g. target=ring")
    if target:
        target = build(target, config.trust)
        return ExactScore(target, configs.sde_of(config, TargetStream(target))), target
    run = configs.open_run(config)
    data, model = run.data(), configs.model_of(run, config)
    guiding.check_free(run, data)
    reference = data.target if data.target is not None else data.reference(2 * config.num_samples).x
    if getattr(model.network, "num_classes", None) is not None:
        print(f"{run.path} knows {model.network.num_classes} labels: sampled without, against data of all of them")
    return model, reference


def fit_to(config: DictConfig, reference: Any) -> None:
    """Cuts `num_samples` to the two disjoint sets of real examples that samples and the noise floor need."""
    most = len(reference) // 2 if isinstance(reference, torch.Tensor) else config.num_samples
    if most < 2:
        raise ValueError(f"{config.run} has {len(reference)} held-out examples, and samples are held against 4 or more: "
                         "train with a greater data.held_out")  # fmt: skip
    if config.num_samples > most:
        print(f"num_samples={most}, not {config.num_samples}: {config.run} has {len(reference)} held-out examples")
        config.num_samples = most


def models_and_reference(config: DictConfig) -> tuple[dict[str, ScoreModel], Any]:
    """The model by name, beside it the exact one where it is asked for, and what samples are held against."""
    model, reference = model_and_reference(config)
    if not config.exact or isinstance(model, ExactScore):
        return {"exact" if isinstance(model, ExactScore) else "learned": model}, reference
    if isinstance(reference, torch.Tensor):
        raise ValueError("exact=true needs a run on a target of closed form: these data have no exact score")
    return {"learned": model, "exact": ExactScore(reference, model.sde)}, reference


def contestants(config: DictConfig) -> tuple[dict[str, Any], list[str]]:
    """name -> sampler, those of conf/sampler and the user's own, and a line for each left out for want of its tables.

    Raises ValueError where none is left.
    """
    found: dict[str, Any] = {}
    absent: list[str] = []
    for name, given in [*((name, name) for name in config.samplers), *config.own.items()]:
        node = configs.named("sampler", given) if isinstance(given, str) else given
        try:
            found[name] = contestant(node, config)
        except tuned_tables.NoTablesError as error:
            absent.append(f"{name} is left out: {error}")
    if absent and not found:
        raise ValueError(absent[0])
    return found, absent


def contestant(node: DictConfig, config: DictConfig) -> Any:
    """A config's sampler; {calls: sampler} where its `table` is a pattern, of `tables` or of the run's or target's folder."""
    if not tuned_tables.is_pattern(node.get("table")):
        return build(configs.sampler_config(node), config.trust)
    files = config.tables
    if not isinstance(files, DictConfig):
        files = tuned_tables.tables_of(Path(files or tuned_tables.tuned_folder(config)), node.table)
    folder = Path(config.run) if config.run else None
    made = {int(calls): configs.sampler_config(OmegaConf.merge(node, {"table": str(file)}), folder)
            for calls, file in files.items()}  # fmt: skip
    return {calls: build(made[calls], config.trust) for calls in sorted(made)}


# --- the page ---------------------------------------------------------------------------------------------------------


RULE = (
    "A sampler is there when each metric is within 1.25 times its noise floor, within two standard errors of it, or within "
    "1.25 times the best of any sampler on this model; excess: its worst metric over that goal; floors: its worst metric over "
    "the noise floor; at: with so many calls; equals: others that are there too, or within a tenth of the best."
)


def heading(config: DictConfig, table: pd.DataFrame) -> tuple[str, str]:
    what = f"run {config.run}" if config.run else f"{config.target._target_.rpartition('.')[2]}, exact score"
    seeds = f"{len(config.seeds)} seed{'s' * (len(config.seeds) > 1)}"
    count, good = len(table), int(table["status"].eq("ok").sum())
    return (f"Samplers compared: {what}",
            f"{table['sampler'].nunique()} samplers, budgets of {', '.join(map(str, config.budgets))} network calls, "
            f"{seeds}, {config.num_samples} samples each: {count} runs, {good} without fault.")  # fmt: skip


def write(
    report: page.Page, config: DictConfig, table: pd.DataFrame, summary: pd.DataFrame, reference: Any, folder: Path,
    absent: list[str],
) -> None:  # fmt: skip
    """All sections; every figure is also saved in the folder; samples are those of `output`."""
    metrics = metrics_of(table)
    report.add("What to take", page.bullets([*advice(table), *absent]),
               page.table(winners(table), {"budget": "calls allowed"}, RULE),
               page.folded("Every sampler: its fewest calls", page.table(ranking(table))))  # fmt: skip
    drawn = [(name, *picture) for name, runs in table.groupby("model")
             for picture in draw(runs, summary[summary["model"] == name], metrics)]  # fmt: skip
    drawn += [(name, "samples", "Samples", "The first seed's samples: a row for each sampler, from the same starting noise, "
               "below the data.", sheet)
              for name, sheet in sheets(load_samples(config.output, table), reference, table)]  # fmt: skip
    several = table["model"].nunique() > 1
    for name, stem, title, caption, figure in tqdm(drawn, desc="figures", delay=2):
        file = figures.save(figure, folder / (f"{name}_{stem}.png" if several else f"{stem}.png"))
        report.add(f"{title}, {name} score" if several else title, page.picture(file, caption))
    report.add("All numbers", page.text("Means over seeds. Click on a column's head to sort."),
               page.table(shown(summary, metrics), SHOWN))  # fmt: skip
    if len(faults(table)):
        report.add("Refused, diverged, failed", page.table(faults(table)))
    report.add("Settings", *settings(config))


def draw(runs: pd.DataFrame, summary: pd.DataFrame, metrics: list[str]) -> Iterator[tuple[str, str, str, Figure]]:
    """(file, title, caption, figure) for one model."""
    points = " Points: means over seeds with their standard deviations." if runs["seed"].nunique() > 1 else ""
    blue = f"Blue: deterministic samplers; orange: the others.{points}"
    order = list(ranking(runs)["sampler"])
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
    yield ("ratios", "Over the noise floor", "Each metric divided by its value between exact draws; 1 is as good as exact "
           "samples. Fewest calls first. ×: diverged or failed, –: refused. In brackets: calls of a solver that chooses "
           "its own steps.", figure)  # fmt: skip
    for metric in metrics:
        name = plotting.METRIC_NAMES.get(metric, metric).replace("$", "").replace("_2", "2")
        caption = f"{name}, lower is better. {blue} Band: the noise floor, between exact draws. Crosses: diverged."
        yield (f"{metric}_calls", f"{name[0].upper()}{name[1:]} against calls", caption,
               plotting.comparison_multiples(runs, metric=metric))  # fmt: skip
        yield (f"{metric}_seconds", f"{name[0].upper()}{name[1:]} against seconds",
               f"{blue} One thread; other work on the machine shows.",
               plotting.comparison_multiples(runs, metric=metric, against="seconds_per_sample"))  # fmt: skip
    if runs["endpoint_error"].notna().any():
        yield ("endpoint_error", "Paired endpoint error", "Deterministic samplers: from the same starting noise, the root "
               "mean square distance to where the converged probability-flow ODE ends, in standard deviations of the data. "
               "The solver's error alone, without Monte Carlo noise.",
               plotting.comparison_multiples(runs, metric="endpoint_error"))  # fmt: skip


def sheets(
    samples: Mapping[tuple[str, str, int], torch.Tensor], reference: Any, table: pd.DataFrame
) -> Iterator[tuple[str, Figure]]:
    """A sheet of panels for each model whose samples can be looked at: points in the plane, or images."""
    for name in dict.fromkeys(model for model, _, _ in samples):
        own = {(sampler, budget): x for (model, sampler, budget), x in samples.items() if model == name}
        shape = tuple(next(iter(own.values())).shape[1:])
        if shape == (2,) or (len(shape) == 3 and shape[0] in (1, 3)):
            lost = table[(table["model"] == name) & (table["status"] != "ok")]
            absent = {(r.sampler, r.budget): r.status.partition(":")[0] for r in lost.itertuples()}
            yield name, plotting.sample_panels(own, reference, absent)


def advice(table: pd.DataFrame) -> list[str]:
    """What the table says to take, in words, for each model."""
    lines = []
    for name, runs in table.groupby("model", sort=False):
        mark = f"{name} score: " if table["model"].nunique() > 1 else ""
        order, verdicts = ranking(runs), judge(runs)
        goal = "there" if verdicts["near"].any() else "within 1.25 times the best of them"
        if goal != "there" and (verdicts["floors"] < math.inf).any():
            lines.append(f"{mark}no sampler is near the noise floor: {nearest(verdicts)}.")
        there = order.dropna(subset="calls")
        if len(there) and (goal == "there" or len(order) > 1):
            best = ", ".join(f"{r.sampler} ({r.calls:.0f})" for r in there.head(5).itertuples())
            lines.append(f"{mark}{goal} with the fewest calls: {best}.")
            quick = there.nsmallest(3, "seconds_per_sample")
            listed = ", ".join(f"{r.sampler} ({duration(r.seconds_per_sample)} a sample)" for r in quick.itertuples())
            lines.append(f"{mark}{goal} in the shortest time: {listed}.")
        never = order[order["calls"].isna()]
        if len(never):
            listed = ", ".join(f"{r.sampler} (excess {r.excess:.3f}, by {r.worst})" for r in never.itertuples())
            lines.append(f"{mark}not {goal} within any budget: {listed}.")
        paired = verdicts.dropna(subset="endpoint_error")
        paired = paired[paired["excess"] < math.inf]
        budgets = sorted(set(runs["budget"]) - {0})
        for budget in [b for b in (10, 20) if b in budgets] or budgets[:2]:
            within = paired[paired["nfe"] <= budget]
            if len(within):
                best = within.loc[within["endpoint_error"].idxmin()]
                lines.append(f"{mark}nearest to the converged ODE within {budget} calls: {best['sampler']}, "
                             f"{best['endpoint_error']:.2g} data standard deviations with {best['nfe']:.0f}.")  # fmt: skip
    return lines


def nearest(verdicts: pd.DataFrame) -> str:
    """Which of the runs comes nearest to the noise floor by its worst metric, and how near."""
    best = verdicts.loc[verdicts["floors"].idxmin()]
    worst = max(metrics_of(verdicts), key=lambda metric: best[f"{metric}_ratio"])
    return f"the nearest, {best['sampler']} with {best['nfe']:.0f} calls, is at {best['floors']:.3g} floors by {worst}"


def duration(seconds: float) -> str:
    """Three digits in s, ms or µs."""
    unit, size = next(((u, z) for u, z in (("s", 1.0), ("ms", 1e-3)) if seconds >= z), ("µs", 1e-6))
    return f"{seconds / size:.3g} {unit}"


def faults(table: pd.DataFrame) -> pd.DataFrame:
    """What did not run, with its reason: model, sampler, budget, seeds and status."""
    bad = table[table["status"] != "ok"]
    return bad.groupby(["model", "sampler", "budget", "status"], sort=False)["seed"].size().reset_index(name="seeds")


def shown(summary: pd.DataFrame, metrics: list[str]) -> pd.DataFrame:
    """The columns of the summary that a reader of the page wants."""
    columns = ["sampler", "budget", "nfe", "seconds_per_sample", "endpoint_error", *metrics]
    columns = [
        *(["model"] if summary["model"].nunique() > 1 else []),
        *columns,
        *(f"{m}_ratio" for m in metrics),
        "excess",
    ]
    return summary.loc[summary["seeds"] > 0, columns]


def settings(config: DictConfig) -> list[str]:
    versions = {name: version(name) for name in ("score_sde", "torch", "numpy", "scipy")}
    machine = f"Python {platform.python_version()}, {platform.platform(terse=True)}, {platform.processor() or 'CPU'}"
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    command = " ".join(["python", "scripts/compare.py", *map(shlex.quote, sys.argv[1:])])
    own = dict(config) | ({"sde": configs.open_run(config).config.sde} if config.run else {})
    return [page.code(command), page.text(f"{listed}; {machine}."), page.code(OmegaConf.to_yaml(own))]


if __name__ == "__main__":
    main()

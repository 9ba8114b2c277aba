"""scripts/compare.py task=...: posterior samplers compared with exact posteriors, or on a run's images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor

from score_sde import SDE, Run, plotting
from score_sde.checks import one_of
from score_sde.data import measure_data_std
from score_sde.evaluation import DigitClassifier
from score_sde.evaluation.posterior import (
    METHODS,
    SAMPLERS,
    SOLVERS,
    Problem,
    certify_guidance,
    compare_posteriors,
    gaussian_problem,
    image_problem,
    ring_problem,
)
from score_sde.evaluation.restoration import LEARNED, OWN, Restoration, compare_restorations
from score_sde.guidance import TASKS, task_operator
from score_sde.keyed import generator
from scripting import conditions, configs, figures, guiding, output
from scripting.command_line import listed

PRIORS = ("fields", "ring", "gaussian", "gaussian64")


def run_task(config: DictConfig) -> Path:
    """Compares the methods on a task, on a run's images or with an exact posterior; returns the folder of the results."""
    one_of("task", config.task, (*TASKS, "linear"))
    methods, solvers = (LEARNED, OWN) if config.run else (METHODS, SOLVERS)
    options = {**contestants(config.restoration, methods, solvers), "seeds": list(config.seeds)}
    folder = Path(config.output)
    if config.run:
        return on_images(config, options, folder)
    problem = problem_of(config.task, config.restoration, configs.sde_of(config))
    return on_posterior(config, problem, options, folder)


def contestants(
    node: DictConfig, methods: Mapping[str, Any], solvers: Mapping[str, Any]
) -> dict[str, Mapping[str, Any]]:
    """The chosen ones of `methods`, which are score models, the `samplers` they run with, and those of `solvers`, methods
    that are samplers themselves.

    Raises ValueError for an unknown name, and if nothing is left to compare.
    """
    known = [*methods, *solvers]
    names = known if node.methods is None else [one_of("a method", name, known) for name in listed(node.methods)]
    chosen = {
        "methods": {name: make for name, make in methods.items() if name in names},
        "samplers": {one_of("a sampler", name, SAMPLERS): SAMPLERS[name] for name in listed(node.samplers)},
        "solvers": {name: make for name, make in solvers.items() if name in names},
    }
    if not names:
        raise ValueError(f"restoration.methods=[] leaves nothing to compare: give some of {', '.join(known)}")
    if chosen["methods"] and not chosen["samplers"]:
        raise ValueError(f"{next(iter(chosen['methods']))} needs a sampler: give restoration.samplers, some of "
                         f"{', '.join(SAMPLERS)}")  # fmt: skip
    return chosen


def problem_of(task: str, node: DictConfig, sde: SDE) -> Problem:
    """The problem of a task without a run, whose posterior is known exactly."""
    one_of("restoration.prior", node.prior, PRIORS)
    if (task == "linear") == (node.prior == "fields"):
        raise ValueError(f"task={task} does not go with restoration.prior={node.prior}: images are fields, "
                         "task=linear is for ring, gaussian and gaussian64")  # fmt: skip
    if node.prior == "ring":
        return ring_problem(sde, node.noise_std)
    if node.prior != "fields":
        return gaussian_problem(sde, 64 if node.prior == "gaussian64" else 2, node.noise_std)
    return image_problem(sde, task, (3, 4, 4) if task == "colorize" else (1, 8, 8), node.noise_std)


def on_posterior(config: DictConfig, problem: Problem, options: Mapping[str, Any], folder: Path) -> Path:
    """The comparison with an exact posterior; for a Gaussian prior also each method's certificate."""
    table = compare_posteriors(
        problem, list(config.budgets), num_samples=config.num_samples, seed=config.seed, **options
    )
    folder = output.folder_of(settings_of(config), folder)
    table.to_csv(folder / "posteriors.csv", index=False)
    title = (
        f"task {config.task}, prior {config.restoration.prior}: {problem.y.numel()} numbers seen of "
        f"{problem.prior.event_shape.numel()}, with noise {problem.noise_std:g}"
    )
    axis = Axis("ratio", "sliced $W_2$ to the exact posterior,\nover its noise floor", "noise floor", 1.0)
    figures.save(curves(table, axis, title), folder / "posteriors.png")
    one_gaussian = len(problem.prior.weights) == 1
    if one_gaussian:
        certificate = certify_guidance(problem, max(config.budgets), options["methods"], options["solvers"])
        certificate.to_csv(folder / "certificate.csv", index=False)
        output.show(certificate)
    output.show(wide(table, "ratio"))
    for row in table[table["error"] != ""].to_dict("records"):
        print(f"{row['method']} with {row['sampler']}, {row['budget']} steps, seed {row['seed']}: {row['error']}")
    print(f"\nsliced W2 over its noise floor, means of {len(config.seeds)} seeds")
    print(f"{folder}: {'certificate.csv, ' if one_gaussian else ''}posteriors.csv, posteriors.png")
    return folder


def on_images(config: DictConfig, options: Mapping[str, Any], folder: Path) -> Path:
    """The comparison on held-out images of a run's data, and a sheet of the first ones as each method restores them."""
    if config.task == "linear":
        raise ValueError(f"task=linear takes no run; tasks for images are {', '.join(TASKS)}")
    run = configs.open_run(config)
    case = case_of(config, run)
    known = {"truth": case.truth[:8], "seen": figures.visible(case.operator, case.observed)[:8]}
    shown: dict[str, dict[str, Tensor]] = {}

    def keep(name: str, label: str, budget: int, x: Tensor) -> None:
        if budget == max(config.budgets):
            shown.setdefault(label, dict(known))[name] = x[:8, 0]

    table = compare_restorations(case, list(config.budgets), features=features_of(run), on_result=keep, **options)
    folder = output.folder_of(settings_of(config), folder)
    table.to_csv(folder / "restorations.csv", index=False)
    axis = Axis("psnr", "PSNR of a draw in dB", "pseudo-inverse", table["psnr"].iloc[0])
    picture = curves(table[table["sampler"] != "none"], axis, f"{config.task}, {run.path}")
    figures.save(picture, folder / "restorations.png")
    figures.save(figures.mosaics(shown or {"": known}, 2), folder / "sheet.png")
    keys = ["method", "sampler", "budget"]
    output.show(table.groupby(keys, sort=False).mean(numeric_only=True).drop(columns="seed").reset_index())
    for row in table[table["error"] != ""].to_dict("records"):
        print(f"failed: {row['method']} with {row['sampler']}, {row['budget']} steps: {row['error']}")
    print(f"\n{folder}: restorations.csv, restorations.png, sheet.png")
    return folder


def case_of(config: DictConfig, run: Run) -> Restoration:
    """Held-out images of a run's data (of one class if a label is given), observed by the task's operator."""
    node, data = config.restoration, run.data()
    model = conditions.conditioned(configs.model_of(run, config), run, config)
    if labels := conditions.labels_of(config.label, run):
        data = data.of_classes(labels)
    operator = task_operator(config.task, model.event_shape, **node.operator)
    truth = data.reference(node.count).x
    observed = operator.observe(truth, node.noise_std, generator=generator(config.seed, "observed"))
    return Restoration(model, truth, operator, node.noise_std, observed, node.draws, measure_data_std(data))


def settings_of(config: DictConfig) -> dict[str, Any]:
    """The settings that a task's results depend on."""
    whole = configs.plain(config)
    names = ("task", "restoration", "run", "label", "context", "ema", "step", "sde", "budgets", "seeds", "num_samples",
             "seed")  # fmt: skip
    return {name: whole[name] for name in names}


def features_of(run: Run) -> Any:
    """Features of a classifier trained on labelled data of the run; None if it has none."""
    data = guiding.labelled(run)
    if data is None:
        return None
    train = data.examples()
    return DigitClassifier(train.x, train.condition["label"]).features


def wide(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """Means over seeds: a row per method and sampler, a column per number of steps."""
    mean = table.groupby(["method", "sampler", "budget"], sort=False)[value].mean().unstack("budget")
    return mean.reset_index()


@dataclass(frozen=True)
class Axis:
    """A column of a table as an axis: the column (`value`), the axis label, and a dashed line's label and height."""

    value: str
    label: str
    line: str
    height: float


def curves(table: pd.DataFrame, axis: Axis, title: str) -> Figure:
    """A panel for each sampler, on a common scale, and a line for each method: the mean over seeds, and their range.

    Methods that are samplers themselves are the same in every panel.
    """
    value = axis.value
    shared = [name for name in table["sampler"].unique() if name != "own"] or ["own"]
    figure, axes = plotting.panels(len(shared), width=4.6, height=4.2, sharey=True)
    looks = {name: plotting.look(i) for i, name in enumerate([*METHODS, *SOLVERS])}  # whichever of them are drawn
    top = 30.0 if value == "ratio" else math.inf  # larger values are crosses, and do not change the scale
    looks |= {"exact": {"color": plotting.INK, "marker": "*"}, "prior": {"color": plotting.RULE, "marker": "*"}}
    for ax, sampler in zip(axes[0], shared, strict=True):
        for name, runs in table[table["sampler"].isin([sampler, "own"])].groupby("method", sort=False):
            style = ":" if (runs["sampler"] == "own").all() else "-"
            at = runs.groupby("budget")[value].agg(["mean", "min", "max"])
            ax.fill_between(at.index, at["min"], at["max"], color=looks[name]["color"], alpha=0.15, linewidth=0)
            ax.plot(at.index, at["mean"], linestyle=style, markersize=4, label=name, **looks[name])
            plotting.crosses(ax, at.index[~(at["mean"] <= top)], looks[name]["color"], "diverged, or beyond the axis")
        ax.axhline(axis.height, color=plotting.INK, linestyle="--", linewidth=1, label=axis.line)
        ax.set(xscale="log", title=sampler)
    if value == "ratio":
        axes[0, 0].set(yscale="log", ylim=(None, min(top, axes[0, 0].get_ylim()[1])))
    for ax in axes[0]:
        plotting.curves(ax, "steps", axis.label if ax is axes[0, 0] else "", legend=None)
        ax.set_xticks(sorted(table["budget"].unique()), sorted(table["budget"].unique()))
    plotting.legend_below(figure, "dotted: with samplers of their own" if "own" in set(table["sampler"]) else "")
    figure.suptitle(title, fontsize=10, color=plotting.INK, wrap=True)
    return figure

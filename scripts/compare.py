"""Compares samplers over budgets of network calls: python scripts/compare.py run=<dir> | target=<name> sde=<name>"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import figures
import pandas as pd
import restoring
from omegaconf import DictConfig

from score_sde import ExactScore, ProbabilityFlowODE, ScoreModel, plotting
from score_sde.data import TargetStream, generator, measure_sigma_max
from score_sde.evaluation import compare
from score_sde.run import instantiate


@common.main("compare")
def main(config: DictConfig) -> None:
    if config.task:
        restoring.run_task(config)
        return
    if not config.budgets or min(config.budgets) < 1 or config.num_samples < 1:
        raise ValueError(f"budgets are numbers of network calls >= 1 and num_samples is >= 1, got "
                         f"{list(config.budgets)} and {config.num_samples}")  # fmt: skip
    model, reference = model_and_reference(config)
    nodes = {name: common.sampler_config(name) for name in config.samplers}
    fixed = {name: at_budget(node) for name, node in nodes.items() if "grid" in node}
    adaptive = {name: _always(instantiate(node)) for name, node in nodes.items() if "grid" not in node}
    for name, build in fixed.items():
        for budget in config.budgets:
            _named(name, lambda build=build, budget=budget: build(budget).check(model.sde))
    options = {"reference": reference, "num_samples": config.num_samples, "seeds": list(config.seeds)}
    tables = [
        compare(
            group, budgets, model, generator=generator(config.seed, "compare"), metrics=list(config.metrics), **options
        )
        for group, budgets in ((fixed, list(config.budgets)), (adaptive, [0]))
        if group
    ]
    table = pd.concat(tables, ignore_index=True)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / "comparison.csv", index=False)
    for metric in config.metrics:
        figure, axes = plotting.panels(1, width=6, height=4)
        plotting.quality_against_nfe(axes[0, 0], table, metric=metric)
        figures.save(figure, folder / f"{metric}.png")
    keys = ["metric", "sampler", "nfe"]
    common.show(table.groupby(keys, sort=False)[["value", "floor", "ratio", "seconds"]].mean().reset_index())
    for row in table[table["error"] != ""].to_dict("records"):
        print(f"failed: {row['sampler']} at {row['budget']} calls, seed {row['seed']}: {row['error']}")
    print(f"\n{folder}: comparison.csv, {', '.join(f'{metric}.png' for metric in config.metrics)}")


def model_and_reference(config: DictConfig) -> tuple[ScoreModel, Any]:
    """The model to sample from and the law or the real examples to compare with.

    Raises ValueError unless one of run= and target= is given.
    """
    target = config.get("target")
    if bool(config.run) == bool(target):
        raise ValueError("compare what? give either run=<directory> or target=<name>, e.g. target=ring")
    if target:
        target = instantiate(target)
        if config.sde.get("sigma_max") == "auto":
            config.sde.sigma_max = round(measure_sigma_max(TargetStream(target)), 4)
        return ExactScore(target, instantiate(config.sde)), target
    run = common.open_run(config)
    data = run.data()
    reference = data.target if data.target is not None else data.reference(2 * config.num_samples).x
    return run.model().to(common.device_of(config.device)), reference


def at_budget(node: DictConfig) -> Callable[[int], Any]:
    """From a number of network calls to the sampler whose grid spends at most that many (one step at the least)."""

    def build(calls: int) -> Any:
        node.grid.steps = 1
        probe = instantiate(node)
        each = sum(step.calls for step in (probe.predictor, probe.corrector) if step is not None)
        if each == 0:
            raise ValueError("the sampler makes no network calls")
        node.grid.steps = max(1, (calls - (probe.final == "denoise")) // each)
        return instantiate(node)

    return build


def _always(sampler: ProbabilityFlowODE) -> Callable[[int], ProbabilityFlowODE]:
    return lambda budget: sampler


def _named(name: str, check: Callable[[], None]) -> None:
    try:
        check()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


if __name__ == "__main__":
    main()

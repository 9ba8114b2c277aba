"""Measures a trained model's samples: every metric and its noise floor.

python scripts/evaluate.py run=<dir> sampler=heun num_samples=10000      writes evaluation.json and sheets of samples
python scripts/evaluate.py run=<dir> samplers=[heun,ode] features=[pca,efficientnet_lite0]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from scripting import conditions, configs, entry, figures, guiding, output
from scripting.command_line import chosen
from torch import Tensor

from score_sde import Run, distributed
from score_sde.build import build
from score_sde.data import Data
from score_sde.evaluation import diagnose, evaluate, known_metrics
from score_sde.training import write_atomically

RECORDED = ("metrics", "features", "references", "whole_reference", "memorization")
"""The settings that the results depend on."""

OWN = ("samplers", *RECORDED, "batch_size")


@entry.main("evaluate")
def main(config: DictConfig) -> None:
    run = configs.open_run(config)
    given = {name: config[name] for name in OWN if config[name] is not None}
    settings = run.config.evaluation = OmegaConf.merge(
        configs.named("evaluation", "default"), run.config.evaluation, given
    )
    nodes = _sampler_nodes(config, run)
    samplers = {name: build(node, run.trust) for name, node in nodes.items()}
    model = configs.model_of(run, config)
    for sampler in samplers.values():
        sampler.check(model.sde)
    config.num_samples = config.num_samples or run.config.num_samples
    data = run.data()
    condition = conditions_of(config, run, data)
    evaluation = evaluate(
        guiding.guided(config, run, model), data, samplers, num_samples=config.num_samples, seed=config.seed,
        metrics=configs.metrics_of(settings.metrics, run.trust, known_metrics(data.target)),
        condition=condition, **configs.views_of(settings, run.trust),
    )  # fmt: skip
    if not distributed.is_main():
        return
    recorded = settings_of(config, run, nodes)
    folder = output.folder_of(recorded, Path(config.output or run.path / "evaluation"))
    (folder / "samples").mkdir(exist_ok=True)
    output.save_samples(folder / "samples", condition | evaluation.samples)
    shown = conditions.of_examples(model, conditions.example_conditions(run.config, data))
    write(folder, recorded, figures.Subject(run, shown, data, evaluation, next(iter(samplers.values())), config.seed),
          config.figures)  # fmt: skip


def conditions_of(config: DictConfig, run: Run, data: Data) -> dict[str, Tensor]:
    """The samples' conditions: the given labels, in the proportions of the data, and what else the network needs."""
    labels = conditions.labels_of(config.label, run)
    if labels and (data.num_classes is None or data.target is not None):
        print(f"samples of label={config.label} are compared with data of all labels, which cannot be told apart here")
    condition = {"label": conditions.natural(labels, data, config.num_samples)} if labels else {}
    return condition | conditions.of_samples({}, run, config.num_samples)


def settings_of(config: DictConfig, run: Run, nodes: Mapping[str, DictConfig]) -> dict[str, Any]:
    """All settings that the results depend on, for the record."""
    settings = configs.plain(run.config.evaluation)
    return {
        "step": config.step, "ema": config.ema, "seed": config.seed, "label": conditions.labels_of(config.label, run),
        "num_samples": config.num_samples,
        "settings": {"samplers": {name: configs.plain(node) for name, node in nodes.items()},
                     "tables": {name: output.content_of(node.get("table")) for name, node in nodes.items()},
                     "guidance": configs.plain(config.guidance), "threshold": config.threshold,
                     **{name: settings[name] for name in RECORDED}},
    }  # fmt: skip


def write(folder: Path, recorded: Mapping[str, Any], shown: figures.Subject, drawn: bool) -> None:
    """Writes evaluation.json with the `recorded` settings, the table, diagnostics if the data have a target, and figures."""
    data, found = shown.data, shown.found
    report = {"run": str(shown.run.path), **recorded, **found.report()}
    write_atomically(folder / "evaluation.json", json.dumps(report, indent=2) + "\n")
    write_atomically(folder / "evaluation.csv", found.table.to_csv(index=False))
    output.show(found.table, output.RATIOS)
    diagnosis = diagnose(shown.model, data.target, seed=shown.seed) if data.target is not None else None
    if diagnosis:
        write_atomically(folder / "diagnostics.csv", diagnosis.table.to_csv(index=False))
        output.show(diagnosis.table[::3])
    if drawn:  # last, so that a figure that fails costs no results
        figures.write(figures.evaluation_sheets(data, found) or figures.all_of(shown), folder / "figures")
        if diagnosis:
            figures.write(figures.of_diagnosis(shown.model, data, diagnosis), folder / "figures")
    written = ["evaluation.json", "evaluation.csv"] + ["diagnostics.csv"] * bool(diagnosis) + ["samples/"]
    print(f"\n{output.member()}{folder}: {', '.join(written + ['figures/'] * bool(drawn))}")


def _sampler_nodes(config: DictConfig, run: Run) -> dict[str, DictConfig]:
    """The configs of the one `sampler` given, or of those named in the settings."""
    asked = conditions.asked_for(config, run)
    if "sampler" not in config:
        if run.config.evaluation.samplers == []:
            raise ValueError("there is no sampler to evaluate: give sampler=<name>, or several as samplers=[heun,ode]")
        return configs.sampler_nodes(run.config, run.path, config.step, asked)
    if config.samplers is not None:
        raise ValueError("give either sampler=<one> with its settings, or samplers=[<names>]")
    name = chosen(config, "sampler")
    return {name: configs.sampler_config(config.sampler, run.path, config.step, asked)}


if __name__ == "__main__":
    main()

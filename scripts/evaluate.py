"""Measures a trained model's samples, each metric beside its floor.

python scripts/evaluate.py run=<dir> sampler=heun num_samples=10000      writes evaluation.json and a sample sheet
python scripts/evaluate.py run=<dir> samplers=[heun,ode] features=[pca,efficientnet_lite0]
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from scripting import configs, entry, figures, guiding, output
from scripting.command_line import chosen

from score_sde import Run, distributed
from score_sde.build import build
from score_sde.data import Data
from score_sde.evaluation import Evaluation, diagnose, evaluate, known_metrics
from score_sde.training import write_atomically

OWN = ("samplers", "metrics", "features", "references", "whole_reference", "memorization", "batch_size")


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
    count = config.num_samples or run.config.num_samples
    labels, data = guiding.labels_of(config.label, run), run.data()
    if labels and (data.num_classes is None or data.target is not None):
        print(f"samples of label={config.label} are held against data of all labels, which are not told apart here")
    condition = {"label": guiding.natural(labels, data, count)} if labels else {}
    condition |= guiding.told({}, run, count)
    evaluation = evaluate(
        guiding.guided(config, run, model), data, samplers, num_samples=count, seed=config.seed,
        metrics=configs.metrics_of(settings.metrics, run.trust, known_metrics(data.target)),
        condition=condition, **configs.views_of(settings, run.trust),
    )  # fmt: skip
    if distributed.is_main():
        own = {
            name: configs.plain(settings)[name]
            for name in ("metrics", "features", "references", "whole_reference", "memorization")
        }
        asked = {"step": config.step, "ema": config.ema, "seed": config.seed, "label": labels, "num_samples": count,
                 "settings": {"samplers": {name: configs.plain(node) for name, node in nodes.items()},
                              "tables": {name: output.content_of(node.get("table")) for name, node in nodes.items()},
                              "guidance": configs.plain(config.guidance), "threshold": config.threshold,
                              **own}}  # fmt: skip
        folder = output.folder_of(asked, Path(config.output or run.path / "evaluation"))
        told = guiding.of_examples(model, guiding.example_conditions(run.config, data))
        (folder / "samples").mkdir(exist_ok=True)
        output.save_samples(folder / "samples", condition | evaluation.samples)
        write(run, config, data, told, samplers, asked, evaluation, folder)


def write(
    run: Run, config: DictConfig, data: Data, model: Any, samplers: dict[str, Any], asked: dict[str, Any],
    evaluation: Evaluation, folder: Path,
) -> None:  # fmt: skip
    """evaluation.json with all that was `asked` for, the same as a table, and the figures."""
    report = {"run": str(run.path), **asked, **evaluation.report()}
    write_atomically(folder / "evaluation.json", json.dumps(report, indent=2) + "\n")
    write_atomically(folder / "evaluation.csv", evaluation.table.to_csv(index=False))
    output.show(evaluation.table, output.RATIOS)
    found = diagnose(model, data.target, seed=config.seed) if data.target is not None else None
    if found:
        write_atomically(folder / "diagnostics.csv", found.table.to_csv(index=False))
        output.show(found.table[::3])
    if config.figures:  # last: no fault of a figure costs the numbers
        if sheets := figures.evaluation_sheets(data, evaluation):
            figures.write(sheets, folder / "figures")
        else:
            figures.draw(run, model, data, evaluation, samplers, config.seed, folder / "figures")
        if found:
            figures.draw_diagnosis(model, data, found, folder / "figures")
    written = ["evaluation.json", "evaluation.csv"] + ["diagnostics.csv"] * bool(found) + ["samples/"]
    print(f"\n{output.member()}{folder}: {', '.join(written + ['figures/'] * bool(config.figures))}")


def _sampler_nodes(config: DictConfig, run: Run) -> dict[str, DictConfig]:
    """Of the one `sampler` that is given, or of those that the settings name."""
    if "sampler" not in config:
        if run.config.evaluation.samplers == []:
            raise ValueError("there is no sampler to evaluate: give sampler=<name>, or several as samplers=[heun,ode]")
        return configs.sampler_nodes(run.config, run.path, config.step)
    if config.samplers is not None:
        raise ValueError("give either sampler=<one> with its settings, or samplers=[<names>]")
    name = chosen(config, "sampler")
    return {name: configs.sampler_config(config.sampler, run.path, config.step)}


if __name__ == "__main__":
    main()

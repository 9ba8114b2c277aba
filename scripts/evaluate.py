"""Measures a trained model's samples, each metric beside its noise floor: python scripts/evaluate.py run=<dir>"""

from __future__ import annotations

import common
import figures
from omegaconf import DictConfig

from score_sde.evaluation import evaluate
from score_sde.run import instantiate
from score_sde.training import write_atomically


@common.main("evaluate")
def main(config: DictConfig) -> None:
    run = common.open_run(config)
    own = run.config.evaluation
    if config.samplers is not None:
        own.samplers = config.samplers
    samplers = common.samplers_of(run.config, run.trust)
    model = run.model(step=config.step).to(common.device_of(config.device))
    for sampler in samplers.values():
        sampler.check(model.sde)
    data = run.data()
    evaluation = evaluate(
        model, data, samplers, num_samples=config.num_samples or run.config.num_samples, seed=config.seed,
        metrics=config.metrics or own.metrics,
        classifier_data=instantiate(own.classifier_data, run.trust) if own.classifier_data else None,
    )  # fmt: skip
    common.save_samples(run.samples, evaluation.samples)
    figures.draw(run, model, data, evaluation, config.seed)
    write_atomically(run.path / "evaluation.csv", evaluation.table.to_csv(index=False))
    common.show(evaluation.table)
    if data.target is not None:
        table = figures.diagnose(run, model, data, config.seed).table
        write_atomically(run.path / "diagnostics.csv", table.to_csv(index=False))
        common.show(table[::3])
    print(f"\n{run.path}: evaluation.csv, {'diagnostics.csv, ' if data.target is not None else ''}figures/")


if __name__ == "__main__":
    main()

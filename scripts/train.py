"""Trains a score model, then samples from it, measures the samples and draws them.

python scripts/train.py [experiment=digits] [sde=ve] [trainer.steps=2000] ...    see conf/train.yaml
python scripts/train.py resume=outputs/toy/2026-01-01_12-00-00                   continues a run
torchrun --nproc-per-node 8 scripts/train.py ...                                 eight GPUs, to the weights of one
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import common
import figures
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from score_sde import LearnedScore, Sampler, distributed
from score_sde.classifier import NoisyClassifier
from score_sde.data import Data, generator, measure_sigma_data, measure_sigma_max
from score_sde.evaluation import Evaluation, evaluate, known_metrics, score_error
from score_sde.evaluation.classification import accuracy_by_noise
from score_sde.run import Run, build_model, instantiate


@common.main("train")
def main(config: DictConfig) -> float:
    run, resume = _continued(config) if config.resume else (None, False)
    config = run.config if run else config
    trust = tuple(config.trust)
    data: Data = instantiate(config.data, trust)
    if run is None:
        fill_in(config, data, HydraConfig.get().runtime.choices)
    model = build_model(config, trust)
    parts = {name: instantiate(config[name], trust) for name in ("objective", "time_sampler", "trainer")}
    samplers = common.samplers_of(config, trust)
    preview: Sampler = instantiate(common.sampler_config(config.sampler), trust)
    parts["trainer"].check(model, data, parts["time_sampler"])
    for sampler in (preview, *samplers.values()):
        sampler.check(model.sde)
    check_metrics(config, data)
    run = run or Run.create(HydraConfig.get().runtime.output_dir, config, trust)

    def on_sample(step: int, raw: LearnedScore, averaged: LearnedScore) -> None:
        for name, shown in (("raw", raw), ("ema", averaged)):
            samples, *_ = distributed.sample(preview, shown, config.num_previews, seed=config.seed, batch_size=250)
            if not distributed.is_main():
                continue
            if tuple(data.event_shape) == (2,):
                law = data.target if data.target is not None else data.reference(10_000).x
                picture = figures.plotting.density_comparison(law, {f"{name}, step {step}": samples})
            else:
                picture = figures.sheet(samples)
            figures.save(picture, run.samples / f"step-{step:09d}-{name}.png")

    def on_evaluate(step: int, raw: LearnedScore, averaged: LearnedScore) -> dict[str, float]:
        table = evaluate(
            averaged, data, {"preview": preview}, num_samples=config.num_samples, seed=config.seed,
            metrics=config.evaluation.metrics, progress=False,
        ).table  # fmt: skip
        return {f"eval/{metric}": value for metric, value in zip(table["metric"], table["value"], strict=True)}

    trained = parts["trainer"].fit(
        model, data, parts["objective"], parts["time_sampler"], run.path, seed=config.seed, resume=resume,
        on_sample=on_sample, on_evaluate=on_evaluate,
    )  # fmt: skip
    if trained.interrupted:
        print(f"interrupted at step {trained.step}; continue with: python scripts/train.py resume={run.path}")
        sys.exit(128 + trained.interrupted)
    averaged = trained.model.eval().requires_grad_(False)
    return finish(run, averaged, data, samplers, config)


def finish(run: Run, model: LearnedScore, data: Data, samplers: dict[str, Any], config: DictConfig) -> float:
    """Samples, metrics, figures and result.json; returns the number that a sweep minimises."""
    if isinstance(model, NoisyClassifier):
        return finish_classifier(run, model, data, config)
    evaluation: Evaluation = evaluate(
        model, data, samplers, num_samples=config.num_samples, seed=config.seed, metrics=config.evaluation.metrics,
        progress=config.trainer.progress, **common.views_of(config.evaluation, run.trust),
    )  # fmt: skip
    score = evaluation.mean_ratio(config.evaluation.objective)
    if not distributed.is_main():
        return score
    common.save_samples(run.samples, evaluation.samples)
    figures.draw(run, model, data, evaluation, samplers, config.seed)
    last = run.metrics().iloc[-1]
    meaning = f"{config.evaluation.objective} over its noise floor"
    result = {
        "status": "finished",
        "metric": score,
        "metric_meaning": meaning,
        "step": int(last["step"]),
        "loss": float(last["loss"]),
    }
    if data.target is not None:
        result["fisher"] = score_error(model, data.target, seed=config.seed).mean
    run.save_result(
        result | {"overrides": list(HydraConfig.get().overrides.task), "seed": config.seed} | evaluation.flat()
    )
    common.show(evaluation.table)
    print(f"\n{run.path}: figures/, samples/, metrics.jsonl, result.json")
    return score


def finish_classifier(run: Run, model: NoisyClassifier, data: Data, config: DictConfig) -> float:
    """Accuracy on held-out examples at each noise level, its figure and result.json; returns the mean cross-entropy."""
    held_out = data.reference(config.num_samples)
    table = accuracy_by_noise(
        model, held_out.x, held_out.condition["label"], generator=generator(config.seed, "report")
    )
    score = float(table["cross_entropy"].mean())
    if not distributed.is_main():
        return score
    figures.save(figures.accuracy(table), run.figures / "accuracy.png")
    figures.save(figures.losses(run), run.figures / "losses.png")
    meaning = "cross-entropy of held-out labels in nats, mean over noise levels"
    overrides = list(HydraConfig.get().overrides.task)
    result = {"status": "finished", "metric": score, "metric_meaning": meaning, "overrides": overrides,
              "seed": config.seed, "accuracy_by_noise": table.to_dict("records")}  # fmt: skip
    run.save_result(result)
    common.show(table)
    print(f"\n{run.path}: figures/, metrics.jsonl, result.json")
    return score


def fill_in(config: DictConfig, data: Data, choices: Mapping[str, str]) -> None:
    """Writes into the config what the data decide, its event shape and `auto` scales, and the groups chosen."""
    config.event_shape = list(data.event_shape)
    if data.target is None:
        config.target = None
    measures = {
        ("sde", "sigma_max"): partial(measure_sigma_max, quantile=config.sigma_max_quantile),
        ("parameterization", "sigma_data"): measure_sigma_data,
    }
    for (group, name), measure in measures.items():
        if config[group].get(name) == "auto":
            config[group][name] = round(measure(data), 4)
            print(f"{group}.{name}: auto is {config[group][name]:g}, measured from the data")
    config.choices = {group: name for group, name in choices.items() if "hydra" not in group}


def check_metrics(config: DictConfig, data: Data) -> None:
    """Refuses, with ValueError, metrics that these data do not have and a number of samples that measures nothing."""
    known = known_metrics(data.target)
    chosen = config.evaluation.metrics or known
    for name in (*chosen, config.evaluation.objective):
        if name not in known:
            raise ValueError(f"unknown metric {name!r}; for these data: {', '.join(known)}")
    if config.evaluation.objective not in chosen:
        raise ValueError(f"evaluation.objective={config.evaluation.objective} is not among evaluation.metrics: add it")
    for name in ("num_samples", "num_previews"):
        if config[name] < 1:
            raise ValueError(f"{name}={config[name]} must be at least 1")


def _continued(config: DictConfig) -> tuple[Run, bool]:
    """The run to resume, with the values given on the command line over its own.

    Raises ValueError for a config group other than the run's own: another model cannot take up its weights.
    """
    run = Run.open(config.resume, tuple(config.trust))
    dotlist = []
    for override in HydraConfig.get().overrides.task:
        name, _, value = override.partition("=")
        if name in run.config.choices:
            if str(run.config.choices[name]) != value:
                raise ValueError(f"{override} differs from the run's own {name}={run.config.choices[name]}: "
                                 "start a new run, or leave it out")  # fmt: skip
        elif name not in ("resume", "trust"):
            dotlist.append(override.lstrip("+"))
    merged = OmegaConf.merge(run.config, OmegaConf.from_dotlist(dotlist))
    return Run.create(run.path, merged, run.trust), True  # type: ignore[arg-type]


if __name__ == "__main__":
    main()

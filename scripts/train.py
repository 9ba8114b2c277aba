"""Trains a score model, draws samples from it, measures them and plots the results.

python scripts/train.py [experiment=digits] [sde=ve] [trainer.steps=2000] ...    see conf/train.yaml
python scripts/train.py resume=outputs/toy/2026-01-01_12-00-00                   continues a run
python scripts/train.py resume=auto hydra.run.dir=runs/mine ...                  starts a run, or continues it
python scripts/train.py init=runs/mine data.path=others ...                      a new run from another's weights
torchrun --nproc-per-node 8 scripts/train.py ...                                 eight GPUs, with the weights of one

On SIGTERM, Ctrl-C, SIGUSR1 or SIGUSR2 a run finishes the current step, writes a checkpoint and ends.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from scripting import conditions, configs, entry, figures, initial, output, resuming
from scripting.command_line import idle, typed
from torch import Tensor

from score_sde import LearnedScore, Sampler, distributed, plotting
from score_sde.build import build, build_model
from score_sde.checks import number, whole
from score_sde.classifier import NoisyClassifier
from score_sde.data import Data, TensorData
from score_sde.evaluation import Evaluation, Reference, check_counts, evaluate, known_metrics, score_error
from score_sde.evaluation.classification import accuracy_by_noise
from score_sde.keyed import generator
from score_sde.networks import MLP
from score_sde.networks.embedding import context_of
from score_sde.run import TAKES, Run
from score_sde.training import Objective, TimeSampler, Trainer, TrainingResult
from score_sde.training.interrupt import hand_on


@dataclass(frozen=True)
class Job:
    """A run and all that its config names, built: the parts of training, samplers, and what measures the samples.

    Attributes:
        resumes: whether it continues from a checkpoint.
        samplers: the samplers of the final evaluation, by name.
        preview: the sampler for samples and measurements during training.
        views: arguments of `evaluate` besides the metrics.
    """

    run: Run
    resumes: bool
    data: Data
    trainer: Trainer
    model: LearnedScore
    objective: Objective
    time_sampler: TimeSampler
    samplers: dict[str, Any]
    preview: Sampler
    views: dict[str, Any]
    metrics: Sequence[Any]

    @property
    def config(self) -> DictConfig:
        return self.run.config

    @cached_property
    def conditions(self) -> Callable[[int], dict[str, Tensor]]:
        """count -> the conditions of this many samples."""
        return conditions.example_conditions(self.config, self.data)

    @property
    def periodic(self) -> int:
        """Number of samples of each evaluation during training."""
        return int(self.config.evaluation.get("num_periodic") or self.config.num_samples)

    def measure(self, model: LearnedScore, samplers: Mapping[str, Any], count: int, progress: bool) -> Evaluation:
        """`evaluate` of a model of this job."""
        return evaluate(
            model, self.data, samplers, num_samples=count, seed=self.config.seed, metrics=self.metrics,
            condition=self.conditions(count), progress=progress, **self.views,
        )  # fmt: skip


@entry.main("train")
def main(config: DictConfig) -> float:
    idle(typed(), ["event_shape", "conditions", "class_names", "choices", "overrides"], "as it is filled in here")
    if not 0 < number("sigma_max_quantile", config.sigma_max_quantile) <= 1:
        raise ValueError(f"sigma_max_quantile is a share in (0, 1], got {config.sigma_max_quantile}")
    job = built(*resuming.opened(config))
    check(job)
    trained = fit(job)
    if trained.interrupted:
        print(f"interrupted at step {trained.step}; continue with: python scripts/train.py resume={job.run.path}")
        hand_on(trained.interrupted)
        sys.exit(128 + trained.interrupted)
    if trained.step < job.trainer.steps:
        print(f"ended at step {trained.step}: none of the last {job.trainer.patience} held-out losses is below the least "
              "before")  # fmt: skip
    averaged = trained.model.eval().requires_grad_(False)
    if isinstance(averaged, NoisyClassifier):
        return finish_classifier(job, averaged)
    return finish(job, averaged) if job.samplers else finish_unmeasured(job)


def built(run: Run, resumes: bool) -> Job:
    """The parts that a run's config names; in a new run's config, what the data determine is filled in."""
    config, trust = run.config, run.trust
    data: Data = build(config.data, trust)
    if not isinstance(data, Data):
        raise TypeError(f"data must be a score_sde.data.Data, {config.data._target_} gives {type(data).__name__}: "
                        "wrap arrays, e.g. return TensorData(x)")  # fmt: skip
    configs.check_own(data.target)
    trainer = build(config.trainer, trust)
    if not resumes:
        configs.fill_in(config, data, HydraConfig.get().runtime.choices, typed())
    return Job(
        run, resumes, data, trainer,
        model=started(run, resumes),
        objective=build(config.objective, trust),
        time_sampler=build(config.time_sampler, trust),
        samplers=configs.samplers_of(config, trust),
        preview=build(configs.sampler_config(config.sampler), trust),
        views=configs.views_of(config.evaluation, trust),
        metrics=metrics_of(config, data),
    )  # fmt: skip


def started(run: Run, resumes: bool) -> LearnedScore:
    """The run's model, with the weights that `init` names if the run has no checkpoint yet."""
    config = run.config
    model = build_model(config, run.trust)
    if not config.get("init"):
        idle(typed(), ["init_new"], "without init=<run>")
    elif run.checkpoints.latest() is None:
        initial.start_from(config, model)
    if isinstance(model.network, MLP) and 2 <= len(config.event_shape) <= 4 and not resumes:
        print(f"network=mlp flattens events of shape {tuple(config.event_shape)}; network=unet, dit_s and ncsn are made for "
              "signals (channels, length), images and volumes")  # fmt: skip
    return model


def check(job: Job) -> None:
    """Raises ValueError or TypeError, before a run begins, for what training or the final evaluation would fail at."""
    config, data, views = job.config, job.data, job.views
    job.trainer.check(job.model, data, job.time_sampler)
    for sampler in (job.preview, *job.samplers.values()):
        sampler.check(job.model.sde)
    check_conditions(config, data, job.model)
    check_references(config, data, views)
    if job.samplers or job.trainer.evaluate_every:
        check_counts(data, min(job.periodic, config.num_samples), views["features"], views["classifier_data"])


def fit(job: Job) -> TrainingResult:
    """Trains, with samples and evaluations during training if they are asked for."""

    def on_evaluate(step: int, raw: LearnedScore, averaged: LearnedScore) -> dict[str, float]:
        table = job.measure(averaged, {"preview": job.preview}, job.periodic, False).table
        return {f"eval/{metric}": value for metric, value in zip(table["metric"], table["value"], strict=True)}

    def on_start() -> None:
        new = not job.resumes and job.config.resume != "auto"  # "auto" may restart a run without a checkpoint
        job.run.save_config(job.config, new=new)

    warnings.filterwarnings("ignore", "training was interrupted")  # main prints it
    return job.trainer.fit(
        job.model, job.data, job.objective, job.time_sampler, job.run.path, seed=job.config.seed, resume=job.resumes,
        on_start=on_start,
        on_sample=previews(job) if job.trainer.sample_every else None,
        on_evaluate=on_evaluate if job.trainer.evaluate_every else None,
    )  # fmt: skip


def previews(job: Job) -> Callable[[int, LearnedScore, LearnedScore], dict[str, Path]]:
    """A function that draws samples with a step's raw and averaged weights into run.samples, and returns the files."""
    law, count = figures.law_of(job.data), job.config.num_previews

    def draw(step: int, raw: LearnedScore, averaged: LearnedScore) -> dict[str, Path]:
        files = {}
        for name, model in (("raw", raw), ("ema", averaged)):
            samples, *_ = distributed.sample(
                job.preview, model, count, seed=job.config.seed, batch_size=250, condition=job.conditions(count)
            )
            if distributed.is_main():
                picture = plotting.sheet(samples, law, name=f"{name}, step {step}")
                files[f"samples/{name}"] = figures.save(picture, job.run.samples / f"step-{step:09d}-{name}.png")
        return files

    return draw


def finish(job: Job, model: LearnedScore) -> float:
    """Samples, figures and result.json; returns the number that a sweep minimises."""
    run, config, data = job.run, job.config, job.data
    evaluation = job.measure(model, job.samplers, config.num_samples, config.trainer.progress)
    shown_model = conditions.of_examples(model, job.conditions)
    score = evaluation.mean_ratio(config.evaluation.objective)
    if not distributed.is_main():
        return score
    output.save_samples(run.samples, {**job.conditions(config.num_samples), **evaluation.samples})
    more = {} if data.target is None else {"fisher": score_error(shown_model, data.target, seed=config.seed).mean}
    meaning = f"{config.evaluation.objective} over its noise floor, mean over samplers"
    record(run, config, score, meaning, **more, **evaluation.flat())
    output.show(evaluation.table, output.RATIOS)
    shown = figures.Subject(run, shown_model, data, evaluation, next(iter(job.samplers.values())), config.seed)
    drawn = draw(run, config, lambda: figures.all_of(shown))  # last, so that a figure that fails costs no results
    print(f"\n{run.path}: {drawn}samples/, checkpoints/, metrics.jsonl, result.json")
    return score


def finish_unmeasured(job: Job) -> float:
    """result.json and the loss figure of a run with evaluation.samplers=[]; returns the last loss."""
    run, config = job.run, job.config
    loss = float(run.metrics()["loss"].iloc[-1])
    if not distributed.is_main():
        return loss
    record(run, config, loss, "training loss")
    drawn = draw(run, config, lambda: figures.of_losses(run))
    print(f"\n{run.path}: {drawn}checkpoints/, metrics.jsonl, result.json; not evaluated")
    return loss


def finish_classifier(job: Job, model: NoisyClassifier) -> float:
    """Accuracy on held-out examples at each noise level, its figure and result.json; returns the mean cross-entropy."""
    run, config, data = job.run, job.config, job.data
    held_out = data.reference(config.num_samples)
    labels = held_out.condition["label"]
    table = accuracy_by_noise(model, held_out.x, labels, generator=generator(config.seed, "report"))
    score = float(table["cross_entropy"].mean())
    if not distributed.is_main():
        return score
    which = "held-out" if data.has_test else "training"
    meaning = f"cross-entropy of {which} labels in nats, mean over noise levels"
    record(run, config, score, meaning, accuracy_by_noise=table.to_dict("records"))
    output.show(table)
    drawn = draw(run, config, lambda: figures.of_accuracy(table, labels) | figures.of_losses(run))
    print(f"\n{run.path}: {drawn}metrics.jsonl, result.json")
    return score


def draw(run: Run, config: DictConfig, drawings: Callable[[], Mapping[str, figures.Drawing]]) -> str:
    """Draws the run's figures unless figures=false; returns their name for the list of results."""
    if not config.get("figures", True):
        return ""
    figures.write(drawings(), run.figures, config.trainer.progress)
    return "figures/, "


def record(run: Run, config: DictConfig, metric: float, meaning: str, **more: Any) -> None:
    """Writes result.json: the number that a sweep minimises, what it means, the last step and loss, and more."""
    last = run.metrics().iloc[-1]
    run.save_result({"status": "finished", "metric": metric, "metric_meaning": meaning, "step": int(last["step"]),
                     "loss": float(last["loss"]), "overrides": list(config.overrides or []), "seed": config.seed,
                     **more})  # fmt: skip


def metrics_of(config: DictConfig, data: Data) -> Sequence[Any]:
    """The metrics of the config; a null `evaluation.objective` is set to one of them.

    Raises ValueError for metrics that these data do not have, and for counts that are too small.
    """
    metrics = configs.metrics_of(config.evaluation.metrics, config.trust, known_metrics(data.target))
    chosen = [getattr(metric, "__name__", metric) for metric in metrics]
    known = [*known_metrics(data.target), *(metric.__name__ for metric in metrics if callable(metric))]
    if not chosen:
        raise ValueError(f"evaluation.metrics is empty: give one or more of {', '.join(known)}, or null for all")
    if config.evaluation.objective is None:
        config.evaluation.objective = "energy" if "energy" in chosen else chosen[0]
    for name in (*chosen, config.evaluation.objective):
        if name not in known:
            raise ValueError(f"unknown metric {name!r}; for these data: {', '.join(known)}")
    if config.evaluation.objective not in chosen:
        raise ValueError(f"evaluation.objective={config.evaluation.objective} is not among evaluation.metrics: add it")
    for name, least in (("num_samples", 2), ("num_previews", 1), ("evaluation.num_periodic", 2)):
        count = OmegaConf.select(config, name)
        if count is not None:
            OmegaConf.update(config, name, whole(name, count, least))
    return metrics


def check_conditions(config: DictConfig, data: Data, model: LearnedScore) -> None:
    """Raises ValueError for options about labels and contexts if the data have none, and for contexts of another width."""
    given, network = data.batch(0, 1).condition, cast(Any, model.network)
    if "context" in given and hasattr(network, "null_context"):
        context_of(given["context"], network.null_context, 1)
    for name, key in TAKES.items():
        if name not in given and (known := config.network.get(key)):
            raise ValueError(f"network.{key}={known}, and the data have no {name}s: leave it out, or give {name}s")
    if not given.keys() - {"augment"} and (share := config.objective.get("label_dropout")):
        raise ValueError(f"objective.label_dropout={share}, and the data have no labels: leave it out, or give labels")


def check_references(config: DictConfig, data: Data, views: Mapping[str, Any]) -> None:
    """Raises ValueError or FileNotFoundError for features and references that do not fit the data or each other."""
    features, references = views["features"], views["references"]
    for name in features:
        if not isinstance(data, TensorData) or len(data.event_shape) != 3:
            raise ValueError(f"the features {name!r} are for finite sets of images: set evaluation.features=[]")
    if references and config.evaluation.get("num_periodic"):
        raise ValueError("evaluation.references are for num_samples images: leave them or evaluation.num_periodic out")
    for name, path in references.items():
        Reference.of(data, features[name], config.num_samples, whole=views.get("whole_reference", False), path=path)


if __name__ == "__main__":
    main()

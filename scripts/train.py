"""Trains a score model, then samples from it, measures the samples and draws them.

python scripts/train.py [experiment=digits] [sde=ve] [trainer.steps=2000] ...    see conf/train.yaml
python scripts/train.py resume=outputs/toy/2026-01-01_12-00-00                   continues a run
python scripts/train.py resume=auto hydra.run.dir=runs/mine ...                  starts it, or continues it where it was
python scripts/train.py init=runs/mine data.path=others ...                      a new run from another's weights
torchrun --nproc-per-node 8 scripts/train.py ...                                 eight GPUs, to the weights of one

SIGTERM, Ctrl-C, SIGUSR1 and SIGUSR2 end a run after the step at hand, with a checkpoint.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from scripting import configs, entry, figures, guiding, initial, output
from scripting.command_line import check_known, idle, key_of, typed
from torch import Tensor

from score_sde import LearnedScore, Sampler, ScoreModel, distributed, plotting
from score_sde.build import build, build_model
from score_sde.checks import number, whole
from score_sde.classifier import NoisyClassifier
from score_sde.data import Data, TensorData
from score_sde.evaluation import Evaluation, Reference, check_counts, evaluate, known_metrics, score_error
from score_sde.evaluation.classification import accuracy_by_noise
from score_sde.keyed import generator
from score_sde.networks import MLP
from score_sde.run import Run
from score_sde.training.interrupt import hand_on

# On which the weights and the order of examples depend: a resumed run keeps its own.
FIXED = ("network", "sde", "parameterization", "data", "target", "event_shape", "seed", "trainer.batch_size", "init",
         "init_new")  # fmt: skip


@entry.main("train")
def main(config: DictConfig) -> float:
    idle(typed(), ["event_shape", "conditions", "class_names", "choices", "overrides"], "as it is filled in here")
    if not 0 < number("sigma_max_quantile", config.sigma_max_quantile) <= 1:
        raise ValueError(f"sigma_max_quantile is a share in (0, 1], got {config.sigma_max_quantile}")
    run, resumes = opened(config)
    config, trust = run.config, run.trust
    data: Data = build(config.data, trust)
    if not isinstance(data, Data):
        raise TypeError(f"data are a score_sde.data.Data, {config.data._target_} gives {type(data).__name__}: "
                        "wrap arrays, e.g. return TensorData(x)")  # fmt: skip
    configs.check_own(data.target)
    trainer = build(config.trainer, trust)
    if not resumes:
        fill_in(config, data, HydraConfig.get().runtime.choices, typed())
    model = build_model(config, trust)
    if not config.get("init"):
        idle(typed(), ["init_new"], "without init=<run>")
    elif run.checkpoints.latest() is None:
        initial.start_from(config, model)
    if isinstance(model.network, MLP) and 2 <= len(data.event_shape) <= 4 and not resumes:
        print(f"network=mlp takes events {tuple(data.event_shape)} for vectors; network=unet, dit_s and ncsn know what is "
              "near: they are made for signals (channels, length), images and volumes")  # fmt: skip
    objective, time_sampler = (build(config[name], trust) for name in ("objective", "time_sampler"))
    samplers = configs.samplers_of(config, trust)
    preview: Sampler = build(configs.sampler_config(config.sampler), trust)
    trainer.check(model, data, time_sampler)
    for sampler in (preview, *samplers.values()):
        sampler.check(model.sde)
    views = configs.views_of(config.evaluation, trust)
    metrics = check_metrics(config, data)
    check_labels(config, data)
    check_references(config, data, views)
    periodic = config.evaluation.get("num_periodic") or config.num_samples
    if samplers or trainer.evaluate_every:
        check_counts(data, min(periodic, config.num_samples), views["features"], views["classifier_data"])

    conditions = guiding.example_conditions(config, data)

    def measure(model: LearnedScore, samplers: Mapping[str, Any], count: int, progress: bool) -> Evaluation:
        return evaluate(
            model, data, samplers, num_samples=count, seed=config.seed, metrics=metrics,
            condition=conditions(count), progress=progress, **views,
        )  # fmt: skip

    def on_evaluate(step: int, raw: LearnedScore, averaged: LearnedScore) -> dict[str, float]:
        table = measure(averaged, {"preview": preview}, periodic, False).table
        return {f"eval/{metric}": value for metric, value in zip(table["metric"], table["value"], strict=True)}

    def on_start() -> None:
        run.save_config(config, new=not resumes and config.resume != "auto")  # which starts what was killed too early

    warnings.filterwarnings("ignore", "training was interrupted")  # it is said here
    trained = trainer.fit(
        model, data, objective, time_sampler, run.path, seed=config.seed, resume=resumes, on_start=on_start,
        on_sample=previews(run, data, preview, conditions, config) if trainer.sample_every else None,
        on_evaluate=on_evaluate if trainer.evaluate_every else None,
    )  # fmt: skip
    if trained.interrupted:
        print(f"interrupted at step {trained.step}; continue with: python scripts/train.py resume={run.path}")
        hand_on(trained.interrupted)
        sys.exit(128 + trained.interrupted)
    averaged = trained.model.eval().requires_grad_(False)
    if isinstance(averaged, NoisyClassifier):
        return finish_classifier(run, averaged, data, config)
    if not samplers:
        return finish_unmeasured(run, config)
    evaluation = measure(averaged, samplers, config.num_samples, config.trainer.progress)
    told = guiding.of_examples(averaged, conditions)
    return finish(run, told, data, evaluation, samplers, config, conditions(config.num_samples))


def previews(
    run: Run, data: Data, sampler: Sampler, conditions: Callable[[int], dict[str, Tensor]], config: DictConfig
) -> Callable[[int, LearnedScore, LearnedScore], dict[str, Path]]:
    """What draws samples of the raw and of the averaged weights of a step into run.samples, and returns the files."""
    law = figures.law_of(data)

    def draw(step: int, raw: LearnedScore, averaged: LearnedScore) -> dict[str, Path]:
        count, files = config.num_previews, {}
        for name, model in (("raw", raw), ("ema", averaged)):
            samples, *_ = distributed.sample(
                sampler, model, count, seed=config.seed, batch_size=250, condition=conditions(count)
            )
            if distributed.is_main():
                picture = plotting.sheet(samples, law, name=f"{name}, step {step}")
                files[f"samples/{name}"] = figures.save(picture, run.samples / f"step-{step:09d}-{name}.png")
        return files

    return draw


def finish(
    run: Run, model: ScoreModel, data: Data, evaluation: Evaluation, samplers: dict[str, Any], config: DictConfig,
    conditions: Mapping[str, Tensor],
) -> float:  # fmt: skip
    """Samples, figures and result.json; returns the number that a sweep minimises."""
    score = evaluation.mean_ratio(config.evaluation.objective)
    if not distributed.is_main():
        return score
    output.save_samples(run.samples, {**conditions, **evaluation.samples})
    more = {} if data.target is None else {"fisher": score_error(model, data.target, seed=config.seed).mean}
    meaning = f"{config.evaluation.objective} over its noise floor, mean over samplers"
    record(run, config, score, meaning, **more, **evaluation.flat())
    output.show(evaluation.table, output.RATIOS)
    drawn = drawing(config)
    if drawn:  # last: no fault of a figure costs the numbers
        figures.draw(run, model, data, evaluation, samplers, config.seed, run.figures, config.trainer.progress)
    print(f"\n{run.path}: {'figures/, ' if drawn else ''}samples/, metrics.jsonl, result.json")
    return score


def finish_unmeasured(run: Run, config: DictConfig) -> float:
    """result.json and the losses' figure of a run with evaluation.samplers=[]; returns the last loss."""
    loss = float(run.metrics()["loss"].iloc[-1])
    if not distributed.is_main():
        return loss
    record(run, config, loss, "training loss")
    drawn = drawing(config)
    if drawn:
        figures.save(figures.losses(run), run.figures / "losses.png")
    print(f"\n{run.path}: {'figures/, ' if drawn else ''}checkpoints/, metrics.jsonl, result.json; not evaluated")
    return loss


def record(run: Run, config: DictConfig, metric: float, meaning: str, **more: Any) -> None:
    """Writes result.json: the number that a sweep minimises, what it means, the last step and loss, and more."""
    last = run.metrics().iloc[-1]
    run.save_result({"status": "finished", "metric": metric, "metric_meaning": meaning, "step": int(last["step"]),
                     "loss": float(last["loss"]), "overrides": list(config.overrides or []), "seed": config.seed,
                     **more})  # fmt: skip


def drawing(config: DictConfig) -> bool:
    """Whether the run's figures are wanted; runs of before there was a choice have them."""
    return bool(config.get("figures", True))


def finish_classifier(run: Run, model: NoisyClassifier, data: Data, config: DictConfig) -> float:
    """Accuracy on held-out examples at each noise level, its figure and result.json; returns the mean cross-entropy."""
    held_out = data.reference(config.num_samples)
    table = accuracy_by_noise(
        model, held_out.x, held_out.condition["label"], generator=generator(config.seed, "report")
    )
    score = float(table["cross_entropy"].mean())
    if not distributed.is_main():
        return score
    which = "held-out" if getattr(data, "has_test", True) else "training"
    meaning = f"cross-entropy of {which} labels in nats, mean over noise levels"
    record(run, config, score, meaning, accuracy_by_noise=table.to_dict("records"))
    output.show(table)
    drawn = drawing(config)
    if drawn:
        figures.save(figures.accuracy(table, held_out.condition["label"]), run.figures / "accuracy.png")
        figures.save(figures.losses(run), run.figures / "losses.png")
    print(f"\n{run.path}: {'figures/, ' if drawn else ''}metrics.jsonl, result.json")
    return score


def fill_in(config: DictConfig, data: Data, choices: Mapping[str, str], overrides: Sequence[str] = ()) -> None:
    """Writes into the config what the data decide, event shape, conditions and `auto` scales, and the groups and overrides.

    Of overrides of one name the last stands, and `resume` is left out, which says nothing of the run.
    """
    config.event_shape = list(data.event_shape)
    config.conditions = sorted(data.batch(0, 1).condition.keys() - {"augment"})
    config.class_names = list(data.class_names) if data.class_names else None
    if data.target is None:
        idle(overrides, ["target"], "with these data, which are drawn from no target")
        config.target = None
    configs.fill_auto(config, data)
    config.choices = {group: name for group, name in choices.items() if "hydra" not in group}
    standing = {(key_of(override), override.startswith("~")): override for override in overrides}
    config.overrides = [override for (name, _), override in standing.items() if name != "resume"]


def check_metrics(config: DictConfig, data: Data) -> Sequence[Any]:
    """The metrics; refuses, with ValueError, those that these data do not have and counts that show nothing.

    Chooses the objective.
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


def check_labels(config: DictConfig, data: Data) -> None:
    """Refuses, with ValueError, options about labels where the data have none."""
    given = data.batch(0, 1).condition
    if "label" not in given and (known := config.network.get("num_classes")):
        raise ValueError(f"network.num_classes={known}, and the data have no labels: leave it out, or give labels")
    if not given.keys() - {"augment"} and (share := config.objective.get("label_dropout")):
        raise ValueError(f"objective.label_dropout={share}, and the data have no labels: leave it out, or give labels")


def check_references(config: DictConfig, data: Data, views: Mapping[str, Any]) -> None:
    """Refuses, with ValueError or FileNotFoundError, features and references that do not fit the data or one another."""
    features, references = views["features"], views["references"]
    for name in features.keys() | references.keys():
        if name not in features:
            raise ValueError(f"evaluation.references names {name!r}: add it to evaluation.features={[*features]}")
        if not isinstance(data, TensorData) or len(data.event_shape) != 3:
            raise ValueError(f"the features {name!r} are for finite sets of images: set evaluation.features=[]")
    if references and config.evaluation.get("num_periodic"):
        raise ValueError("evaluation.references hold num_samples images: leave them or evaluation.num_periodic out")
    for name, path in references.items():
        Reference.of(data, features[name], config.num_samples, whole=views.get("whole_reference", False), path=path)


def opened(config: DictConfig) -> tuple[Run, bool]:
    """The run of this command with its config, and whether it goes on from checkpoints.

    Raises ValueError where `resume` is `auto` and the output directory has no name of its own, and where it is not
    and the directory holds a run.
    """
    if config.resume is not None and (not isinstance(config.resume, str) or not config.resume):
        raise ValueError(f"resume={config.resume!r} is no folder: give a run's directory, or auto")
    automatic, trust, folder = config.resume == "auto", tuple(config.trust), Path(HydraConfig.get().runtime.output_dir)
    if automatic and folder == Path.cwd():
        raise ValueError("resume=auto goes on in the folder that it started in: name it, hydra.run.dir=<folder>")
    known = distributed.agree(Run(folder).checkpoints.latest()) if automatic else config.resume
    if known is None:
        if not automatic and (folder / "config.yaml").exists():
            raise ValueError(f"{folder} holds a run already: give resume={folder} to continue it, or another folder")
        run = Run(folder, trust)
        run.config = config
    else:
        run = Run.open(folder if automatic else config.resume, trust)
        own, run.config = run.config, continued(run.config, typed())
        check_steps_left(
            run, [override for override in run.config.overrides if override not in (own.get("overrides") or [])]
        )
    return run, known is not None


def continued(own: DictConfig, overrides: Sequence[str]) -> DictConfig:
    """The config of a run to resume, with the values given on the command line over its own, and in its `overrides`.

    What is among its own overrides already says nothing new, whatever it is. Raises ValueError for another config group,
    a group or key that is to go, or another value of what is FIXED. What was `auto` has been measured.
    """
    known, overrides = list(own.get("overrides") or []), OmegaConf.merge(own, {"overrides": [*overrides]}).overrides
    given: dict[str, str] = {}
    for override in overrides:
        name, value = key_of(override), override.partition("=")[2]
        if override in known or name in ("resume", "trust") or value == "auto":
            continue
        if override.startswith("+") and name not in own.choices:
            check_known(name, own, [OmegaConf.to_yaml(own), *overrides])
        if override.startswith("~"):
            if OmegaConf.select(own, name) is not None:
                raise ValueError(
                    f"{override} takes from the run what it was started with: start a new run, or leave it out"
                )
        elif name in own.choices:
            _same(name, own.choices[name] or "null", value)
        else:
            given[name] = value
    merged = OmegaConf.merge(own, OmegaConf.from_dotlist([f"{name}={value}" for name, value in given.items()]))
    for name in given:
        if name in FIXED or name.partition(".")[0] in FIXED:
            _same(name, *(OmegaConf.select(config, name) for config in (own, merged)))
    new = [f"{name}={value}" for name, value in given.items()
           if OmegaConf.select(own, name) != OmegaConf.select(merged, name)]  # fmt: skip
    replaced = {key_of(override) for override in new}
    merged.overrides = [override for override in known if key_of(override) not in replaced] + new
    return merged  # type: ignore[return-value]


def check_steps_left(run: Run, new: Sequence[str]) -> None:
    """Refuses, with ValueError, new settings of the training where it has come to its end."""
    done = run.checkpoints.latest() or 0
    settings = [override for override in new if key_of(override).partition(".")[0] in ("trainer", "objective", "time_sampler")
                and key_of(override) not in ("trainer.steps", "trainer.device", "trainer.progress")]  # fmt: skip
    if settings and done >= run.config.trainer.steps:
        raise ValueError(f"{settings[0]} does nothing: all {done} steps of {run.path} are done; give trainer.steps={2 * done} "
                         "too, or leave it out")  # fmt: skip


def _same(name: str, own: Any, given: Any) -> None:
    if own != given:
        raise ValueError(f"{name}={given} differs from the run's own {name}={own}: start a new run, or leave it out")


if __name__ == "__main__":
    main()

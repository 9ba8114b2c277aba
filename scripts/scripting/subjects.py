"""The subject of scripts/compare.py and tune.py: a model, and what its samples are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from score_sde import ExactScore, ScoreModel
from score_sde.build import build
from score_sde.data import Data, TargetStream
from scripting import conditions, configs


@dataclass(frozen=True)
class Subject:
    """A model to sample from.

    Attributes:
        reference: the law that its samples should have, or real examples.
        conditions: count -> the conditions of this many samples, by name.
    """

    model: ScoreModel
    reference: Any
    conditions: Callable[[int], dict[str, Tensor]] = lambda count: {}


def check_one(config: DictConfig, what: str) -> None:
    """Raises ValueError unless exactly one of run= and target= is given."""
    if bool(config.run) == bool(config.get("target")):
        raise ValueError(f"{what}? give either run=<directory> or target=<name>, e.g. target=ring")


def of_target(config: DictConfig) -> Subject:
    """The exact score of a law, and the law."""
    target = build(config.target, config.trust)
    configs.check_own(target)
    return Subject(ExactScore(target, configs.sde_of(config, TargetStream(target))), target)


def of_run(config: DictConfig) -> Subject:
    """A run's model; its samples have the conditions of training examples, of those with the `label` if it is given."""
    run = configs.open_run(config)
    data, model = run.data(), configs.model_of(run, config)
    labels, names = conditions.labels_of(config.get("label"), run), {*model.needed}
    if labels:
        conditions.check_labels(labels, model)
        data, names = data.of_classes(labels), names | {"label"}
    if names:
        whose = f", of label {' or '.join(map(str, labels))}" if labels else ""
        print(f"samples have the {' and '.join(sorted(names))} of the first training examples{whose}")
    elif model.num_classes is not None:
        print(f"{run.path} knows {model.num_classes} labels: sampled without, and compared with data of all labels")
    given = partial(conditions.first_conditions, data, sorted(names))
    return Subject(model, reference_of(data, config.num_samples), given)


def of_run_conditioned(config: DictConfig) -> Subject:
    """A run's model under the label and context that all samples share; the reference is the law, or examples of that label.

    A label given by name becomes its number, in `config` itself.
    """
    run = configs.open_run(config)
    data, model = run.data(), conditions.conditioned(configs.model_of(run, config), run, config)
    if labels := conditions.labels_of(config.label, run):
        data, config.label = data.of_classes(labels), labels[0]
    return Subject(model, reference_of(data, config.num_samples))


def reference_of(data: Data, num_samples: int) -> Any:
    """The law of the data, or twice `num_samples` examples: half for the samples, half for the noise floor."""
    return data.target if data.target is not None else data.reference(2 * num_samples).x

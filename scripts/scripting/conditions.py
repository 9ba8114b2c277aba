"""Conditions of samples: labels by number or name, contexts and others, as given or from training examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from score_sde import LearnedScore, ScoreModel
from score_sde.data import Data
from score_sde.guidance import Conditioned
from score_sde.prediction import Prediction
from score_sde.run import Run, needed
from score_sde.score import WrappedScore
from scripting.command_line import listed, unknown


def labels_of(label: Any, run: Run) -> list[int]:
    """The numbers of one or several labels, given by number or by the names of the run's classes; none for null.

    Raises ValueError for anything else, and for a number that is also the name of another class.
    """
    if label is None:
        return []
    chosen = listed(label)
    if not chosen:
        raise ValueError("label=[] names no class: give one or more, or leave it out")
    names = list(run.config.get("class_names") or [])
    return [_number(value, names) for value in chosen]


def _number(label: Any, names: list[str]) -> int:
    if isinstance(label, str) and names:
        if label not in names:
            raise ValueError(unknown("label", label, names))
        return names.index(label)
    if isinstance(label, bool) or not isinstance(label, int):
        raise ValueError(f"label={label!r} is not a class: give a whole number, or several as label=[0,1,2]")
    if str(label) in names and names.index(str(label)) != label:
        raise ValueError(f"label={label} is the name of class {names.index(str(label))} here, not a number: quote names that "
                         f"are numerals, label='[\"{label}\"]'")  # fmt: skip
    return label


def asked_for(config: DictConfig, run: Run) -> dict[str, Any]:
    """The label, by number, and the context that samples shall have, if any: what tables may be fitted under."""
    labels, context = labels_of(config.label, run), config.get("context")
    if context is None and "context" in needed(run.config):
        context = "<of each training example>"  # see `of_samples`
    asked = {"label": labels[0] if len(labels) == 1 else labels or None,
             "context": listed(context) if OmegaConf.is_list(context) else context}  # fmt: skip
    return {name: value for name, value in asked.items() if value is not None}


def turns(labels: list[int], count: int) -> Tensor:
    """`count` labels, cycling through the given ones."""
    return torch.tensor(labels)[torch.arange(count) % len(labels)]


def first_conditions(data: Data, names: Sequence[str], count: int) -> dict[str, Tensor]:
    """The conditions of the first training examples, in the order of the data's seed, and so in the data's proportions."""
    if not names:
        return {}
    batches = [data.batch(step, 100).condition for step in range(-(-count // 100))]
    return {name: torch.cat([batch[name] for batch in batches])[:count] for name in names}


def of_samples(given: Mapping[str, Any], run: Run, count: int) -> dict[str, Tensor]:
    """Conditions (count, ...) of samples, except labels: each one number or vector, or the rows of a .npy file in turn.

    Conditions that the network needs and that are not `given` are those of the first training examples.
    """
    missing = [name for name in needed(run.config) if name != "label" and name not in given]
    conditions = first_conditions(run.data(), missing, count) if missing else {}
    for name in missing:
        key = name if name == "context" else f"+condition.{name}"
        print(f"samples have the {name}s of the first training examples: give {key}=<vector or .npy> for others")
    for name, value in given.items():
        rows = rows_of(name, value)
        conditions[name] = rows[torch.arange(count) % len(rows)]
    return conditions


def rows_of(name: str, given: Any) -> Tensor:
    """The rows of a .npy file, or the given number or vector as one row; a context is always a vector of floats."""
    rows = (
        np.load(given) if isinstance(given, str) else np.asarray([listed(given) if OmegaConf.is_list(given) else given])
    )
    if rows.dtype.kind not in "fi" or rows.ndim not in (1, 2, 3):
        raise ValueError(f"{name}={given} is neither a number or vector of numbers nor a .npy file of such rows")
    if name == "context" and rows.ndim == 1:
        rows = rows[None]
    whole = rows.dtype.kind == "i" and name != "context"
    return torch.as_tensor(rows, dtype=torch.int64 if whole else torch.float32)


class OfExamples(WrappedScore):
    """A model that needs conditions, made callable without, for figures: row i of a batch has row i of `conditions(batch)`."""

    def __init__(self, model: ScoreModel, conditions: Callable[[int], dict[str, Tensor]]) -> None:
        super().__init__(model)
        self.conditions = conditions

    def __call__(self, x: Tensor, t: Any, **condition: Any) -> Prediction:
        own = {name: value.to(x.device) for name, value in self.conditions(len(x)).items()}
        return self.model(x, t, **{**own, **condition})


def example_conditions(config: DictConfig, data: Data) -> Callable[[int], dict[str, Tensor]]:
    """count -> the conditions that a run's network needs for this many samples, from the first training examples."""
    return cache(partial(first_conditions, data, needed(config)))


def of_examples(model: ScoreModel, conditions: Callable[[int], dict[str, Tensor]]) -> ScoreModel:
    """The model under the conditions of examples; the model itself if there are none."""
    return OfExamples(model, conditions) if conditions(1) else model


def natural(labels: list[int], data: Data, count: int) -> Tensor:
    """`count` of the labels in the proportions of the data, for comparison with these; in turn if the data have no labels."""
    if data.num_classes is None:
        return turns(labels, count)
    return first_conditions(data.of_classes(labels), ["label"], count)["label"]


def conditioned(model: LearnedScore, run: Run, config: DictConfig) -> ScoreModel:
    """The model under the conditions that all samples share (see `shared`); the model itself if there are none."""
    own = shared(model, run, config)
    return Conditioned(model, **own) if own else model


def shared(model: LearnedScore, run: Run, config: DictConfig) -> dict[str, Tensor]:
    """The `label` and the `context`, if given, that all samples share.

    Raises ValueError for several values, and if the network needs a condition that is not given.
    """
    labels, context = labels_of(config.label, run), config.get("context")
    check_labels(labels, model)
    own = {"label": torch.tensor(labels)} if labels else {}
    own |= {} if context is None else {"context": rows_of("context", context)}
    for name, rows in own.items():
        if len(rows) != 1:
            raise ValueError(f"{name}={config[name]}: give one, which all samples share")
    if missing := [name for name in needed(run.config) if name not in own]:
        raise ValueError(f"{run.path} has not learnt to do without its {' and '.join(missing)}: give the one that all samples "
                         f"share, {' '.join(f'{name}=<value>' for name in missing)}")  # fmt: skip
    return {name: rows[0] for name, rows in own.items()}


def check_labels(labels: list[int], model: LearnedScore) -> None:
    """Raises ValueError for labels that the network of a model, or a classifier, does not know."""
    known = getattr(model.network, "num_classes", None)
    for label in labels:
        if known is None and "label" not in getattr(model, "condition_names", ()):
            raise ValueError(f"label={label}, but the run's network knows no classes: train it with labels, "
                             "e.g. experiment=digits_conditional, or give guidance=classifier")  # fmt: skip
        if label < 0 or (known is not None and label >= known):
            raise ValueError(f"label={label}, but the run's network knows the classes 0 to {(known or math.inf) - 1:g}")

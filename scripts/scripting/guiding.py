"""Guidance towards labels, as scripts configure it."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf

from score_sde import LearnedScore, ScoreModel
from score_sde.build import build
from score_sde.classifier import NoisyClassifier
from score_sde.data import TensorData
from score_sde.evaluation.extractors import in_range
from score_sde.guidance import Classifier, ClassifierFree, DynamicThreshold, Observed
from score_sde.run import Run, does_without
from scripting.conditions import check_labels, labels_of


def check_unconditional(run: Run, scale: float, negative: Any = None, renoises: bool = False) -> None:
    """Raises ValueError for guidance that needs the network's prediction without a label if it was never trained so."""
    if (scale != 1 or renoises) and negative is None and not does_without(run.config):
        raise ValueError("this guidance needs predictions without a label, and the network has not learnt to do without "
                         "(objective.label_dropout=0 in its run): take classifier_free with scale=1, or train with "
                         "objective.label_dropout=0.1")  # fmt: skip


def labelled(run: Run) -> TensorData | None:
    """The run's own data if they have labels, else the classifier data of its evaluation, else None."""
    named = run.config.get("evaluation", {}).get("classifier_data")
    for data in (run.data(), build(named, run.trust) if named else None):
        if isinstance(data, TensorData) and data.num_classes is not None:
            return data
    return None


def guided(config: DictConfig, run: Run, model: LearnedScore) -> ScoreModel:
    """The model under `guidance` towards `label`, with the `threshold`; the model itself if neither is given.

    Raises ValueError for an unknown label, for guidance without its label or run, and for one that restores observations.
    """
    labels = labels_of(config.label, run)
    if not labels and "label" in model.condition_names and not does_without(run.config):
        raise ValueError("this network needs labels (objective.label_dropout=0 in its run): "
                         "give label=<number>, or several as label=[0,1,2]")  # fmt: skip
    result = _by_method(config.guidance, labels, run, model)
    if config.threshold is None:
        return result
    if not in_range(run.data().reference(1000).x):
        raise ValueError(
            f"threshold={config.threshold} is for data in [-1, 1], those of {run.path} reach beyond: leave it out"
        )
    return DynamicThreshold(result, config.threshold)


def _by_method(guidance: DictConfig, labels: list[int], run: Run, model: LearnedScore) -> ScoreModel:
    """The model under a method of guidance; the model itself if the method needs a label and no option of it is given."""
    node: dict[str, Any] = OmegaConf.to_container(guidance, resolve=False)  # type: ignore[assignment]
    others = [_other(node, run, model)] if "run" in node else []
    if isinstance(node.get("negative"), int | str):
        node["negative"] = {"label": labels_of(node["negative"], run)[0]}
    method = build(node, run.trust)
    kind = method.func if isinstance(method.func, type) else object  # a function guides too
    name = method.func.__name__
    if issubclass(kind, Observed):
        raise ValueError(f"{name} restores observations: use scripts/edit.py for it; labels take "
                         "guidance=classifier_free, classifier or autoguidance")  # fmt: skip
    if issubclass(kind, Classifier | ClassifierFree) and not labels:
        without_effect = {"scale": 1, "interval": None, "rescale": 0, "negative": None}
        if others or any(node.get(option, value) != value for option, value in without_effect.items()):
            raise ValueError(f"{name} guides towards a label: give label=<number>")
        return model
    by_classifier = issubclass(kind, Classifier)
    if others and isinstance(others[0], NoisyClassifier) != by_classifier:
        wanted = "a classifier, a run of experiment=*_classifier" if by_classifier else "a score model"
        raise ValueError(f"{name} takes {wanted}: {guidance.run} is not one")
    check_labels(labels, others[0] if by_classifier else model)
    if issubclass(kind, ClassifierFree):
        check_unconditional(run, float(node.get("scale", 1)), node.get("negative"), kind.renoises)
    check_labels(list((node.get("negative") or {}).values()), model)
    return method(model, *others)


def _other(node: dict[str, Any], run: Run, model: LearnedScore) -> LearnedScore:
    """The second model that a guidance takes, of the run that it names."""
    path, step = node.pop("run"), node.pop("step", None)
    if path == "???":
        raise ValueError("this guidance needs a second model: give guidance.run=<directory>")
    return Run.open(path, run.trust).model(step=step).to(model.device)

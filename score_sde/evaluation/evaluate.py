"""A model's samples by several samplers, and every metric of them next to its noise floor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import pandas as pd
import torch
from torch import Tensor

from score_sde import distributed
from score_sde.data import Data, TensorData
from score_sde.evaluation.extractors import Extractor
from score_sde.evaluation.metrics import Metrics, Yardstick
from score_sde.evaluation.reference import FeatureView, Reference, check_count
from score_sde.evaluation.views import Memorization, View, check_classifier_data, classifier_view, on_plain
from score_sde.keyed import generator
from score_sde.progress import tqdm
from score_sde.score import ScoreModel, in_rows

COLUMNS = ["sampler", "nfe", "seconds", "metric", "value", "floor", "ratio", "count"]


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        samples: by sampler.
        table: a row for each sampler and metric with `COLUMNS`: network calls per sample (nfe), seconds for all samples,
            the metric's value, its value for exact samples (floor), value / floor (ratio) and the number of samples that
            were measured (count). If samples are not all finite, value is NaN and ratio infinite.
        nearest: by sampler, the samples nearest to a training image and those images, (2, n, C, H, W).
        references: `made_of` of each `Reference`.
    """

    samples: dict[str, Tensor]
    table: pd.DataFrame
    nearest: dict[str, Tensor] = field(default_factory=dict)
    references: list[dict[str, Any]] = field(default_factory=list)

    def mean_ratio(self, metric: str) -> float:
        """The metric's ratio to its floor, averaged over samplers: the one number that a sweep compares."""
        named = self.table["metric"].str.split(" @ ").str[0] == metric  # see `Reference.compare`
        return float(self.table.loc[named, "ratio"].mean())

    def flat(self) -> dict[str, float | None]:
        """{"<sampler>/<metric>": value, "<sampler>/<metric>/floor": ..., "<sampler>/nfe": ...} for a result.json."""
        flat: dict[str, float | None] = {}
        for row in self.table.to_dict("records"):
            name = f"{row['sampler']}/{row['metric']}"
            floor = {f"{name}/floor": row["floor"]} if math.isfinite(row["floor"]) else {}
            flat |= {name: _finite_or_none(row["value"]), **floor, f"{row['sampler']}/nfe": row["nfe"]}
        return flat

    def report(self) -> dict[str, Any]:
        """Everything but the images, ready for JSON: the cost and metrics of each sampler, and the references."""
        report: dict[str, Any] = {}
        for row in self.table.to_dict("records"):
            entry = report.setdefault(
                row["sampler"], {"nfe": int(row["nfe"]), "seconds": row["seconds"], "metrics": {}}
            )
            figures = {name: _finite_or_none(row[name]) for name in ("value", "floor", "ratio")}
            entry["metrics"][row["metric"]] = {**figures, "count": int(row["count"])}
        return {"samplers": report, "references": self.references}


def evaluate(
    model: ScoreModel, data: Data, samplers: Mapping[str, Any], *, num_samples: int = 4000, seed: int = 0,
    metrics: Metrics | None = None, classifier_data: TensorData | None = None,
    features: Mapping[str, Extractor] | None = None, references: Mapping[str, str] | None = None,
    whole_reference: bool = False, memorization: bool = True, condition: Mapping[str, Tensor] | None = None,
    batch_size: int = 1000, progress: bool = True,
) -> Evaluation:  # fmt: skip
    """Draws `num_samples` with each sampler and measures them against exact draws or real examples.

    The processes of a distributed launch share the sampling and the extraction of features; each gets the whole result.

    Args:
        model: the model to sample.
        data: samples are compared with its closed-form target or, if it has none, with real examples; for labelled ones,
            with those of the classes in the condition `label`.
        samplers: name -> sampler.
        num_samples: drawn with each sampler; sample i depends on (seed, i), not on the batches.
        seed: of samplers and exact draws.
        metrics: names or functions (see `Yardstick`); by default all that apply.
        classifier_data: labelled images, to add a classifier's view of the samples.
        features: name -> feature space in which images are compared; see `Reference`.
        references: name -> folder of a saved reference, used instead of the cached one.
        whole_reference: compare features with those of all training images, not just of `num_samples`.
        memorization: for a finite set of images, also measure how near samples are to training images.
        condition: tensors (num_samples, ...) by name, for a conditional model; one label serves all samples.
        batch_size: how many samples are drawn at once.
        progress: shows bars.

    Raises:
        ValueError: there is no sampler, a metric is unknown, the data have another event shape, a condition has another
            number of rows, there are too few samples or examples to compare, or `Reference.of` raises.
    """
    if not isinstance(samplers, Mapping) or not samplers:
        raise ValueError(f"samplers are a mapping from names to one sampler or more, got {samplers!r}")
    if tuple(data.event_shape) != tuple(model.event_shape):
        raise ValueError(f"the data have event shape {tuple(data.event_shape)}, the model {tuple(model.event_shape)}")
    condition = in_rows(model, num_samples, condition)
    labels = condition.get("label")
    data, classifier_data = (_of_labels(part, labels) for part in (data, classifier_data))
    check_counts(data, num_samples, features, classifier_data)
    yardstick = _yardstick(data, num_samples, metrics, seed)
    views: list[View] = [lambda x: yardstick(x[: yardstick.n]).assign(count=list(yardstick.counts.values()))]
    if classifier_data is not None:
        views.append(classifier_view(classifier_data, num_samples, model.device))
    held = [Reference.of(_finite(data, name), extractor, num_samples, whole=whole_reference,
                         path=(references or {}).get(name), device=model.device, progress=progress)
            for name, extractor in (features or {}).items()]  # fmt: skip
    views += [on_plain(data, FeatureView(reference)) for reference in held]
    memorized = Memorization(data, model.device) if memorization and _is_set_of_images(data) else None
    samples, tables, near = {}, [], {}
    for name, sampler in tqdm(samplers.items(), desc="evaluating", disable=not progress, delay=2, leave=False):
        x, nfe, seconds = distributed.sample(
            sampler, model, num_samples, seed=seed, batch_size=batch_size, condition=condition,
            progress=name if progress else None,
        )  # fmt: skip
        finite = bool(x.isfinite().all())
        rows = [view(x) for view in views] if finite else [_unmeasured(yardstick)]
        if memorized and finite:
            table, near[name] = memorized(x)
            rows.append(table)
        samples[name] = x
        tables.append(pd.concat(rows, ignore_index=True).assign(sampler=name, nfe=nfe, seconds=seconds))
    table = pd.concat(tables, ignore_index=True)[COLUMNS]
    return Evaluation(samples, table, near, [dict(reference.made_of) for reference in held])


def check_counts(
    data: Data, num_samples: int, features: Mapping[str, Extractor] | None = None,
    classifier_data: TensorData | None = None,
) -> None:  # fmt: skip
    """Raises ValueError if samples or held-out examples are too few for `evaluate`, before anything is trained or drawn."""
    if num_samples < 2:
        raise ValueError(f"metrics compare two samples or more: give num_samples >= 2, not {num_samples}")
    if data.target is None and (held := len(data.reference(4).x)) < 4:
        raise ValueError(f"metrics need 4 held-out examples or more, and there are {held}: raise held_out")
    for name in features or {}:
        check_count(_finite(data, name), num_samples)
    if classifier_data is not None:
        check_classifier_data(classifier_data, num_samples)


def _yardstick(data: Data, num_samples: int, metrics: Metrics | None, seed: int) -> Yardstick:
    reference = data.target if data.target is not None else data.reference(2 * num_samples).x
    count = num_samples if data.target is not None else min(num_samples, len(reference) // 2)
    return Yardstick(reference, count, generator=generator(seed, "yardstick"), metrics=metrics)


def _of_labels(data: Any, labels: Tensor | None) -> Any:
    """The data of these labels alone; unchanged if they are unlabelled or have a target, or a sample has no label (-1)."""
    labelled = data is not None and data.num_classes is not None and data.target is None
    if not labelled or labels is None or int(labels.min()) < 0:
        return data
    chosen = labels.unique().tolist()
    return data if len(chosen) == data.num_classes else data.of_classes(chosen)


def _is_set_of_images(data: Data) -> TypeGuard[TensorData]:
    return isinstance(data, TensorData) and len(data.event_shape) == 3


def _finite(data: Data, name: str) -> TensorData:
    if not isinstance(data, TensorData):
        raise ValueError(f"the features {name!r} are for finite sets of images: leave out evaluation.features")
    return data


def _unmeasured(yardstick: Yardstick) -> pd.DataFrame:
    """The rows of samples that are not all finite."""
    table = pd.DataFrame({"metric": list(yardstick.floors), "floor": yardstick.floors.values()})
    return table.assign(value=math.nan, ratio=math.inf, count=list(yardstick.counts.values()))


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def starts(model: ScoreModel, count: int, seed: int) -> Tensor:
    """`count` draws of the model's prior, for samplers to be compared path by path."""
    return model.start(torch.randn(count, *model.event_shape, generator=generator(seed, "starts")))

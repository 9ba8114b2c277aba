"""A model under several samplers: their samples, and every metric beside its noise floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from score_sde import distributed
from score_sde.data import Data, TensorData
from score_sde.evaluation.convnet import ConvClassifier
from score_sde.evaluation.extractors import Extractor, in_range
from score_sde.evaluation.features import DigitClassifier, digit_report
from score_sde.evaluation.metrics import Metrics, Yardstick
from score_sde.evaluation.neighbours import Nearest, nearest
from score_sde.evaluation.reference import FeatureView, Reference, check_count
from score_sde.keyed import generator
from score_sde.progress import tqdm
from score_sde.score import ScoreModel, in_rows

View = Callable[[Tensor], pd.DataFrame]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        samples: by sampler.
        table: the columns sampler, nfe, seconds, metric, value, floor, ratio and count, the number of samples measured; of
            samples that are not all finite the value is NaN and the ratio infinite.
        nearest: by sampler, the samples nearest to a training image and those images, (2, n, C, H, W).
        references: what made each reference of features.
    """

    samples: dict[str, Tensor]
    table: pd.DataFrame
    nearest: dict[str, Tensor] = field(default_factory=dict)
    references: list[dict[str, Any]] = field(default_factory=list)

    def mean_ratio(self, metric: str) -> float:
        """The metric's ratio to its floor, averaged over samplers: the one number that a sweep compares."""
        named = self.table["metric"].str.split(" @ ").str[0] == metric  # at the floor's count, see `Reference.compare`
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
        """Everything but the images, as JSON writes it: by sampler its cost and each metric's figures."""
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

    The processes of a launch draw and extract features together; every one of them gets the whole result.

    Args:
        model: what samples are drawn from.
        data: gives the closed-form target where there is one, else the real examples to compare with; of labelled ones
            those of the classes that the condition `label` names.
        samplers: name -> sampler.
        num_samples: a sampler; sample i depends on (seed, i), not on the batches.
        seed: of samplers and exact draws.
        metrics: names or functions (see `Yardstick`); all that apply when left out.
        classifier_data: labelled images, to add a classifier's view of the samples.
        features: name -> feature space in which images are compared; see `Reference`.
        references: name -> folder of its reference, in place of the cache's.
        whole_reference: hold features against those of all training images, not of as many as samples.
        memorization: for a finite set of images, also how near samples are to training images.
        condition: tensors (num_samples, ...) by name, for a conditional model; one label is for all samples.
        batch_size: how many samples are drawn at once.
        progress: shows bars.

    Raises:
        ValueError: no sampler, no such metric, data of another event shape, a condition of another number of rows, too
            few samples or examples to compare, or what `Reference.of` refuses.
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
        views.append(_classifier_view(classifier_data, num_samples, model.device))
    made = [Reference.of(_finite(data, name), extractor, num_samples, whole=whole_reference,
                         path=(references or {}).get(name), device=model.device, progress=progress)
            for name, extractor in (features or {}).items()]  # fmt: skip
    views += [_on_plain(data, FeatureView(reference)) for reference in made]
    neighbours = _MemorizationView(data, model.device) if memorization and _is_set_of_images(data) else None
    views += [neighbours] if neighbours else []
    samples, tables, near = {}, [], {}
    for name, sampler in tqdm(samplers.items(), desc="evaluating", disable=not progress, delay=2, leave=False):
        samples[name], nfe, seconds = distributed.sample(
            sampler, model, num_samples, seed=seed, batch_size=batch_size, condition=condition,
            progress=name if progress else None,
        )  # fmt: skip
        broken = int((~samples[name].flatten(1).isfinite().all(1)).sum())
        parts = [_unmeasured(yardstick)] if broken else [view(samples[name]) for view in views]
        table = pd.concat(parts, ignore_index=True)
        tables.append(table.assign(sampler=name, nfe=nfe, seconds=seconds))
        if neighbours and not broken:
            near[name] = neighbours.pictures
    order = ["sampler", "nfe", "seconds", "metric", "value", "floor", "ratio", "count"]
    table = pd.concat(tables, ignore_index=True)[order]
    return Evaluation(samples, table, near, [dict(reference.made_of) for reference in made])


def check_counts(
    data: Data, num_samples: int, features: Mapping[str, Extractor] | None = None,
    classifier_data: TensorData | None = None,
) -> None:  # fmt: skip
    """Refuses, with ValueError, too few samples or held-out examples for `evaluate`, before anything is trained or drawn."""
    if num_samples < 2:
        raise ValueError(f"metrics compare two samples or more: give num_samples >= 2, not {num_samples}")
    if data.target is None and (held := len(data.reference(4).x)) < 4:
        raise ValueError(f"metrics need 4 held-out examples or more, of these data there are {held}: raise held_out")
    for name in features or {}:
        check_count(_finite(data, name), num_samples)
    if classifier_data is not None and not _is_small(classifier_data):
        check_count(classifier_data, num_samples)


def _yardstick(data: Data, num_samples: int, metrics: Metrics | None, seed: int) -> Yardstick:
    reference = data.target if data.target is not None else data.reference(2 * num_samples).x
    count = num_samples if data.target is not None else min(num_samples, len(reference) // 2)
    return Yardstick(reference, count, generator=generator(seed, "yardstick"), metrics=metrics)


def _of_labels(data: Any, labels: Tensor | None) -> Any:
    """The examples of these labels alone, where there are labels and no law; all where a sample is without one (-1)."""
    labelled = data is not None and data.num_classes is not None and data.target is None
    if not labelled or labels is None or int(labels.min()) < 0:
        return data
    chosen = labels.unique().tolist()
    return data if len(chosen) == data.num_classes else data.of_classes(chosen)


def _is_set_of_images(data: Data) -> bool:
    return isinstance(data, TensorData) and len(data.event_shape) == 3


def _finite(data: Data, name: str) -> TensorData:
    if not isinstance(data, TensorData):
        raise ValueError(f"the features {name!r} are for finite sets of images: leave out evaluation.features")
    return data


def _classifier_view(data: TensorData, count: int, device: torch.device) -> View:
    """A convolutional network's, or, for images of a few pixels, a multilayer perceptron's."""
    if _is_small(data):
        return _digit_view(data)
    return _on_plain(data, FeatureView(Reference.of(data, ConvClassifier(), count, device=device)))


def _is_small(data: TensorData) -> bool:
    return max(data.event_shape) <= 12


def _unmeasured(yardstick: Yardstick) -> pd.DataFrame:
    """The rows of samples that are not all finite."""
    table = pd.DataFrame({"metric": list(yardstick.floors), "floor": yardstick.floors.values()})
    return table.assign(value=math.nan, ratio=math.inf, count=list(yardstick.counts.values()))


def _on_plain(data: Data, view: View) -> View:
    """A view of samples on the scale of images as they are read."""
    return lambda x: view(data.as_plain(x) if isinstance(data, TensorData) else x)


def _finite_or_none(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


class _MemorizationView:
    """How near samples are to training images of any class, beside held-out images; the last pictures of both."""

    shown = 8

    def __init__(self, data: Data, device: torch.device) -> None:
        assert isinstance(data, TensorData)
        self.data, self.device = data.whole, device
        self.pictures = torch.empty(0)

    @cached_property
    def pictures_in_range(self) -> bool:
        """Whether the data are images in [-1, 1], to which samples are clipped; latents are not."""
        return in_range(self.data.plain("train", slice(2000)).x)

    @cached_property
    def held_out(self) -> Nearest | None:
        if not self.data.has_test:
            return None
        return nearest(self.data.plain("test", slice(2000)).x, self.data, device=self.device)

    def __call__(self, samples: Tensor) -> pd.DataFrame:
        """Rows for at most 2,000 samples: the share memorised, and the median distance to the nearest training image."""
        samples = self.data.as_plain(samples[:2000])
        inside = samples.clamp(-1, 1) if self.pictures_in_range else samples
        found = nearest(inside, self.data, device=self.device)
        closest = found.distance[:, 0].argsort()[: self.shown]
        twins = self.data.plain("train", found.index[closest, 0]).x
        self.pictures = torch.stack([samples[closest], twins])
        value, floor = ([near.memorised.double().mean().item(), near.distance[:, 0].median().item()]
                        if near else [math.nan] * 2 for near in (found, self.held_out))  # fmt: skip
        table = pd.DataFrame({"metric": ["memorised", "nearest training image"], "value": value, "floor": floor})
        ratio = (table["value"] / table["floor"]).where(table["floor"] > 0)
        return table.assign(ratio=ratio, count=len(found.distance))


class _DigitView:
    """A classifier trained on all classes of labelled digits, and what it says of samples beside held-out digits."""

    def __init__(self, data: TensorData) -> None:
        self.train, self.held_out, known = data.examples(), data.reference(10**6), data.whole.examples()
        self.tested = data.has_test
        self.classifier = DigitClassifier(known.x, known.condition["label"])

    def __call__(self, samples: Tensor) -> pd.DataFrame:
        table = digit_report(self.classifier, samples.clamp(-1, 1), self.held_out.x, self.train.x)
        accuracy = (
            self.classifier.accuracy(self.held_out.x, self.held_out.condition["label"]) if self.tested else math.nan
        )
        row = pd.DataFrame({"metric": "classifier accuracy on held-out", "value": accuracy, "floor": accuracy,
                            "count": [len(self.held_out.x)]})  # fmt: skip
        table = pd.concat([table, row], ignore_index=True)
        return table.assign(ratio=table["value"] / table["floor"])


_digit_view = lru_cache(2)(_DigitView)  # which trains a classifier


def starts(model: ScoreModel, count: int, seed: int) -> Tensor:
    """`count` draws of the model's prior, the same for every sampler that is to be compared path by path."""
    return model.start(torch.randn(count, *model.event_shape, generator=generator(seed, "starts")))

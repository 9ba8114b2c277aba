"""Views of samples besides the metrics: by a classifier, in feature spaces, and by the nearest training images."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, lru_cache

import pandas as pd
import torch
from torch import Tensor

from score_sde.data import Data, TensorData
from score_sde.evaluation.convnet import ConvClassifier
from score_sde.evaluation.digits import DigitClassifier, digit_report
from score_sde.evaluation.extractors import in_range
from score_sde.evaluation.neighbours import Nearest, nearest
from score_sde.evaluation.reference import FeatureView, Reference, check_count

View = Callable[[Tensor], pd.DataFrame]
"""Samples -> rows with the columns metric, value, floor, ratio and count."""

MEMORIZATION_COUNT = 2000
"""Largest number of samples, and of held-out images, whose nearest training images are looked up."""

SHOWN = 8
"""Number of samples, those nearest to a training image, that are kept as pictures."""


def on_plain(data: Data, view: View) -> View:
    """A view of samples in the model's scale, from a view of images in the scale in which they are read."""
    return lambda x: view(data.as_plain(x) if isinstance(data, TensorData) else x)


def classifier_view(data: TensorData, count: int, device: torch.device) -> View:
    """The view of samples that a classifier trained on labelled images has, next to its view of `count` held-out images.

    The classifier is a multilayer perceptron (`DigitClassifier`) for images of at most 12 pixels a side, else a
    convolutional network (`ConvClassifier`).
    """
    if _is_small(data):
        return _digit_view(data)
    return on_plain(data, FeatureView(Reference.of(data, ConvClassifier(), count, device=device)))


def check_classifier_data(data: TensorData, count: int) -> None:
    """Raises ValueError if there are fewer images than the classifier's figures need."""
    if not _is_small(data):
        check_count(data, count)


def _is_small(data: TensorData) -> bool:
    return max(data.event_shape) <= 12


class _DigitView:
    """A classifier trained on digits of all classes, and its view of samples next to held-out digits of `data`."""

    def __init__(self, data: TensorData) -> None:
        self.train, self.held_out, known = data.examples(), data.reference(10**6), data.whole.examples()
        self.classifier = DigitClassifier(known.x, known.condition["label"])
        labels = self.held_out.condition["label"]
        self.accuracy = self.classifier.accuracy(self.held_out.x, labels) if data.has_test else math.nan

    def __call__(self, samples: Tensor) -> pd.DataFrame:
        table = digit_report(self.classifier, samples.clamp(-1, 1), self.held_out.x, self.train.x)
        row = pd.DataFrame({"metric": "classifier accuracy on held-out", "value": self.accuracy, "floor": self.accuracy,
                            "count": [len(self.held_out.x)]})  # fmt: skip
        table = pd.concat([table, row], ignore_index=True)
        return table.assign(ratio=table["value"] / table["floor"])


_digit_view = lru_cache(2)(_DigitView)  # since it trains a classifier


class Memorization:
    """How near samples are to training images of any class, next to how near held-out images are.

    Called with samples in the model's scale, it returns the rows of its figures, and the samples nearest to a training image
    stacked with those images, (2, n, *event_shape).
    """

    def __init__(self, data: TensorData, device: torch.device) -> None:
        self.data, self.device = data.whole, device

    @cached_property
    def is_clipped(self) -> bool:
        """Whether samples are clipped to [-1, 1], as they are if the data lie in this range (latents do not)."""
        return in_range(self.data.plain("train", slice(MEMORIZATION_COUNT)).x)

    @cached_property
    def held_out(self) -> Nearest | None:
        if not self.data.has_test:
            return None
        return nearest(self.data.plain("test", slice(MEMORIZATION_COUNT)).x, self.data, device=self.device)

    def __call__(self, samples: Tensor) -> tuple[pd.DataFrame, Tensor]:
        samples = self.data.as_plain(samples[:MEMORIZATION_COUNT])
        found = nearest(samples.clamp(-1, 1) if self.is_clipped else samples, self.data, device=self.device)
        closest = found.distance[:, 0].argsort()[:SHOWN]
        twins = self.data.plain("train", found.index[closest, 0]).x
        value, floor = ([near.memorised.double().mean().item(), near.distance[:, 0].median().item()]
                        if near else [math.nan] * 2 for near in (found, self.held_out))  # fmt: skip
        table = pd.DataFrame({"metric": ["memorised", "nearest training image"], "value": value, "floor": floor})
        ratio = (table["value"] / table["floor"]).where(table["floor"] > 0)
        return table.assign(ratio=ratio, count=len(samples)), torch.stack([samples[closest], twins])

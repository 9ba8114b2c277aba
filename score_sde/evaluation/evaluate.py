"""A model under several samplers: their samples, and every metric beside its noise floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from score_sde.data import Data, TensorData, generator
from score_sde.evaluation.comparison import Samples
from score_sde.evaluation.features import DigitClassifier, digit_report
from score_sde.evaluation.metrics import Yardstick
from score_sde.score import ScoreModel


@dataclass(frozen=True)
class Evaluation:
    """Samples by sampler, and a table with the columns sampler, nfe, seconds, metric, value, floor and ratio."""

    samples: dict[str, Tensor]
    table: pd.DataFrame

    def mean_ratio(self, metric: str) -> float:
        """The metric's ratio to its floor, averaged over samplers: the one number that a sweep compares."""
        return float(self.table.loc[self.table["metric"] == metric, "ratio"].mean())

    def flat(self) -> dict[str, float]:
        """{"<sampler>/<metric>": value, "<sampler>/<metric>/floor": ..., "<sampler>/nfe": ...} for a result.json."""
        flat: dict[str, float] = {}
        for row in self.table.to_dict("records"):
            name = f"{row['sampler']}/{row['metric']}"
            flat |= {name: row["value"], f"{name}/floor": row["floor"], f"{row['sampler']}/nfe": row["nfe"]}
        return flat


def evaluate(
    model: ScoreModel, data: Data, samplers: Mapping[str, Samples], *, num_samples: int = 4000, seed: int = 0,
    metrics: Sequence[str] | None = None, classifier_data: TensorData | None = None, progress: bool = True,
) -> Evaluation:  # fmt: skip
    """Draws `num_samples` with each sampler and measures them against exact draws or held-out examples.

    Args:
        model: what samples are drawn from.
        data: gives the closed-form target where there is one, else the real examples to compare with.
        samplers: name -> sampler.
        num_samples: a sampler.
        seed: of samplers and exact draws.
        metrics: names (see `Yardstick`); all that apply when left out.
        classifier_data: labelled digits, to add a classifier's view of the samples.
        progress: shows a bar.
    """
    reference = data.target if data.target is not None else data.reference(2 * num_samples).x
    count = num_samples if data.target is not None else min(num_samples, len(reference) // 2)
    yardstick = Yardstick(reference, count, generator=generator(seed, "yardstick"), metrics=metrics)
    view = _DigitView(classifier_data) if classifier_data is not None else None
    samples, tables = {}, []
    for name, sampler in tqdm(samplers.items(), desc="evaluating", disable=not progress, delay=2, leave=False):
        result = sampler.sample(model, (num_samples, *model.event_shape), seed=seed)
        samples[name] = result.x.cpu()
        parts = [yardstick(samples[name][:count])] + ([view(samples[name])] if view else [])
        table = pd.concat(parts, ignore_index=True)
        tables.append(table.assign(sampler=name, nfe=result.nfe, seconds=result.seconds))
    order = ["sampler", "nfe", "seconds", "metric", "value", "floor", "ratio"]
    return Evaluation(samples, pd.concat(tables, ignore_index=True)[order])


class _DigitView:
    """A classifier trained on labelled digits, and what it says of samples beside held-out digits."""

    def __init__(self, data: TensorData) -> None:
        self.train, self.held_out = data.examples(), data.reference(10**6)
        self.classifier = DigitClassifier(self.train.x, self.train.condition["label"])

    def __call__(self, samples: Tensor) -> pd.DataFrame:
        table = digit_report(self.classifier, samples.clamp(-1, 1), self.held_out.x, self.train.x)
        accuracy = self.classifier.accuracy(self.held_out.x, self.held_out.condition["label"])
        row = pd.DataFrame({"metric": ["classifier accuracy on held-out"], "value": [accuracy], "floor": [accuracy]})
        table = pd.concat([table, row], ignore_index=True)
        return table.assign(ratio=table["value"] / table["floor"])


def starts(model: ScoreModel, count: int, seed: int) -> Tensor:
    """`count` draws of the model's prior, the same for every sampler that is to be compared path by path."""
    return model.start(torch.randn(count, *model.event_shape, generator=generator(seed, "starts")))

"""Features of real images, computed once: samples are compared with them, and they give the floor of every metric.

value = d(samples, train) with n of each, n as requested (papers take 50,000), and floor = d(test, train) with m <= n of each,
as many as are held out. Most distances depend on the count: every row states its own, and if m < n the value is also given at
m, next to the floor. Without a test set, two disjoint parts of the training set give the floor. With a `whole` reference, n
samples and m test images are compared with all training images, as in published FIDs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from score_sde import distributed
from score_sde.data import TensorData
from score_sde.data.cache import cached
from score_sde.evaluation.extractors import Extractor, extract, quantized, stored_images
from score_sde.evaluation.metrics import Moments, frechet_distance, kernel_within, kid
from score_sde.evaluation.neighbours import neighbour_metrics, radii

__all__ = ["FeatureView", "Reference", "feature_metrics"]


@dataclass(frozen=True)
class Reference:
    """Features of training (n, F) and test images (m, F), the extractor that gave them, and what made them.

    `made_of` names the data (by hash), their shape, the extractor and its settings, both counts, and whether the test
    images are held out or a part of the training set.
    """

    extractor: Extractor
    train: Tensor
    test: Tensor
    made_of: Mapping[str, Any]

    @classmethod
    def of(
        cls, data: TensorData, extractor: Extractor, count: int, *, whole: bool = False, path: str | Path | None = None,
        device: torch.device | str = "cpu", progress: bool = True,
    ) -> Reference:  # fmt: skip
        """The reference of these data: from `path`, from the cache, or computed and then cached.

        Args:
            data: source of the training and test images.
            extractor: fitted, if it has to be, to the training images of `data.whole`.
            count: of training and of test images; fewer if the data have fewer.
            whole: use all training images; without a test set, all but those used for the floor.
            path: a folder written by `save`.
            device: where features are computed.

        Raises:
            ValueError: the data are not images, or the reference in `path` was made of other data, with another
                extractor or count.
        """
        made_of = _made_of(data, extractor, count, whole)
        if path is None:
            title = f"{extractor.title}: real images" if progress else None
            path = cached(
                "references", made_of, lambda folder: _compute(data, extractor, made_of, folder, device, title)
            )
        _check(made_of, json.loads((Path(path) / "made_of.json").read_text()), Path(path))
        if (Path(path) / "extractor.safetensors").is_file():
            extractor.load_state_dict(load_file(Path(path) / "extractor.safetensors"))
        train, test = (torch.from_numpy(np.load(Path(path) / f"{part}.npy")) for part in ("train", "test"))
        return cls(extractor.to(device), train, test, made_of)

    def save(self, path: str | Path) -> None:
        """Writes the reference into a folder, for the `path` of `of`."""
        Path(path).mkdir(parents=True, exist_ok=True)
        _write(Path(path), self.extractor, self.train, self.test)
        (Path(path) / "made_of.json").write_text(json.dumps(self.made_of, indent=2, sort_keys=True) + "\n")

    @cached_property
    def _floors(self) -> dict[int, dict[str, float]]:
        return {}

    @cached_property
    def _known(self) -> dict[int, Known]:
        return {}

    def compare(self, features: Tensor) -> pd.DataFrame:
        """Every metric of samples with these features: the columns metric, value, floor, ratio (value / floor) and count.

        n samples are compared with n training images or, for a whole reference, with all. If there are only m < n test
        images, the rows of count n have no floor, and the rows "<metric> @ m" have the value and the floor at count m. KID,
        whose mean is 0 for exact samples, has no ratio.
        """
        n = len(features) if self._whole else min(len(features), len(self.train))
        m = min(n, len(self.test))
        if m not in self._floors:
            self._floors[m] = self._metrics(self.test[:m])
        if m == n:
            return self._rows(features[:n], self._floors[n])
        beside = self._rows(features[:m], self._floors[m])
        beside["metric"] += f" @ {m}"
        return pd.concat([self._rows(features[:n], {}), beside], ignore_index=True)

    @property
    def _whole(self) -> bool:
        return bool(self.made_of.get("whole"))

    def _metrics(self, features: Tensor) -> dict[str, float]:
        """`feature_metrics` against as many training images, or against all."""
        real = self.train if self._whole else self.train[: len(features)]
        if len(real) not in self._known:
            self._known[len(real)] = Known.of(real)
        return feature_metrics(features, real, self.extractor, self._known[len(real)])

    def _rows(self, features: Tensor, floors: Mapping[str, float]) -> pd.DataFrame:
        values = pd.Series(self._metrics(features))
        table = pd.DataFrame({"value": values, "floor": pd.Series(floors, values.index, dtype=float)})
        table["ratio"] = (table["value"] / table["floor"]).where(~table.index.str.startswith("KID"))
        return table.assign(count=len(features)).rename_axis("metric").reset_index()


class Known(NamedTuple):
    """What the metrics need of real features alone, computed once for all sets of samples."""

    moments: Moments
    within: float
    reach: Sequence[Tensor]

    @classmethod
    def of(cls, real: Tensor) -> Known:
        return cls(Moments.of(real), kernel_within(real), radii(real, 3, 5))


def feature_metrics(
    samples: Tensor, real: Tensor, extractor: Extractor, known: Known | None = None
) -> dict[str, float]:
    """Fréchet distance, KID, precision, recall, density and coverage of samples (n, F), and the extractor's verdicts.

    `known` is `Known.of(real)`, where it has been computed.
    """
    known = known or Known.of(real)
    values = {extractor.distance: frechet_distance(samples, real, moments=known.moments),
              "KID": kid(samples, real, within=known.within),
              **neighbour_metrics(samples, real, reach=known.reach)}  # fmt: skip
    return {f"{name} ({extractor.title})": value for name, value in values.items()} | extractor.verdicts(samples)


class FeatureView:
    """The metrics of samples against a reference, in features that all processes extract together."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def __call__(self, samples: Tensor) -> pd.DataFrame:
        """The rows of `Reference.compare` for samples (n, C, H, W) in [-1, 1].

        Raises ValueError if the samples have another shape than the reference's images.
        """
        shape = list(self.reference.made_of["event_shape"])
        if list(samples.shape[1:]) != shape:
            raise ValueError(f"samples of shape {tuple(samples.shape)} for a reference of images {tuple(shape)}")
        images = quantized(samples)[distributed.share(len(samples))]
        features = extract(self.reference.extractor, images, title=f"{self.reference.extractor.title}: samples")
        return self.reference.compare(distributed.gather(features))


def check_count(data: TensorData, count: int) -> int:
    """The number of real images that give the floor of a reference of this count.

    Raises ValueError if there are fewer than the six that the metrics need.
    """
    found = min(count, data.count("test") if data.has_test else data.count("train") // 2)
    if found < 6:
        fix = "draw more samples" if count < 6 else "raise held_out, or leave the features out"
        raise ValueError(
            f"feature metrics need 6 samples, 6 training and 6 held-out images or more, not {found}: {fix}"
        )
    return found


def _made_of(data: TensorData, extractor: Extractor, count: int, whole: bool) -> dict[str, Any]:
    train, test = data.count("train"), check_count(data, count)
    every = train if data.has_test else train - test
    part = {"count": every, "whole": True} if whole else {"count": min(count, train)}
    return {"data": data.fingerprint, "event_shape": list(data.event_shape), **extractor.settings(), "floor_count": test,
            **part,
            "floor": "held-out images" if data.has_test else "another part of the training set", "version": 2}  # fmt: skip


def _check(expected: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise ValueError(f"the reference {path} was made with {name}={found.get(name)}, not "
                             f"{expected.get(name)}: leave out its path to make another")  # fmt: skip


def _compute(
    data: TensorData, extractor: Extractor, made_of: Mapping[str, Any], folder: Path, device: torch.device | str,
    title: str | None,
) -> None:  # fmt: skip
    extractor.to(device).fit(data.whole)
    train, test = (extract(extractor, stored_images(data, *rows), title=title) for rows in _rows_of(data, made_of))
    _write(folder, extractor, train, test)


def _rows_of(data: TensorData, made_of: Mapping[str, Any]) -> tuple[tuple[str, slice], tuple[str, slice]]:
    """The set and rows of the images that samples are compared with, and of those that give the floor."""
    n, m = made_of["count"], made_of["floor_count"]
    if data.has_test:
        return ("train", slice(n)), ("test", slice(m))
    if made_of.get("whole"):
        return ("train", slice(m, None)), ("train", slice(m))
    return ("train", slice(n)), ("train", slice(m, 2 * m))  # disjoint from the first m, with which they are compared


def _write(folder: Path, extractor: Extractor, train: Tensor, test: Tensor) -> None:
    np.save(folder / "train.npy", train.numpy())
    np.save(folder / "test.npy", test.numpy())
    if learned := extractor.learned():
        save_file(learned, folder / "extractor.safetensors")

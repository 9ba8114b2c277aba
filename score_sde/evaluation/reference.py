"""Features of real images, computed once: what samples are held against, and the floor of every figure.

For n samples, n training and n test images: value = d(samples, train), floor = d(test, train), at the same n, since most
distances depend on it. Where no test set is held out, two disjoint parts of the training set take the two places.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from score_sde import distributed
from score_sde.data import TensorData
from score_sde.data.cache import cached
from score_sde.evaluation.extractors import Extractor, extract, quantized, stored_images
from score_sde.evaluation.metrics import frechet_distance, kid
from score_sde.evaluation.neighbours import density_coverage, precision_recall

__all__ = ["FeatureView", "Reference", "feature_metrics"]


@dataclass(frozen=True)
class Reference:
    """Features (n, F) of training and test images, the extractor that gave them, and what made them.

    `made_of` names the data (by hash), their shape, the extractor and its settings, the count, and whether the test
    images are held out or a part of the training set.
    """

    extractor: Extractor
    train: Tensor
    test: Tensor
    made_of: Mapping[str, Any]

    @classmethod
    def of(
        cls, data: TensorData, extractor: Extractor, count: int, *, path: str | Path | None = None,
        device: torch.device | str = "cpu", progress: bool = True,
    ) -> Reference:  # fmt: skip
        """The reference of these data: from `path`, from the cache, or computed, which the cache then keeps.

        Args:
            data: what training and test images come from.
            extractor: fitted to the training images where it has to be.
            count: of each, at most; fewer where the data have fewer.
            path: a folder that `save` wrote.
            device: where features are computed.

        Raises:
            ValueError: the data are no images, or the reference in `path` was made of other data, with another
                extractor or count.
        """
        made_of = _made_of(data, extractor, count)
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
        """Writes the reference into a folder, to be kept or handed on."""
        Path(path).mkdir(parents=True, exist_ok=True)
        _write(Path(path), self.extractor, self.train, self.test)
        (Path(path) / "made_of.json").write_text(json.dumps(self.made_of, indent=2, sort_keys=True) + "\n")

    @property
    def count(self) -> int:
        """How many real images of each kind it holds."""
        return int(self.made_of["count"])

    @cached_property
    def _floors(self) -> dict[int, dict[str, float]]:
        return {}

    def compare(self, features: Tensor) -> pd.DataFrame:
        """Every metric of features (n, F) of samples: the columns metric, value, floor and ratio (value / floor).

        n' = min(n, `count`) of each are compared. KID, which is 0 in the mean for exact samples, has no ratio.
        """
        n = min(len(features), self.count)
        if n not in self._floors:
            self._floors[n] = feature_metrics(self.test[:n], self.train[:n], self.extractor)
        values = feature_metrics(features[:n], self.train[:n], self.extractor)
        table = pd.DataFrame({"metric": list(values), "value": values.values(), "floor": self._floors[n].values()})
        signed = table["metric"].str.startswith("KID")
        return table.assign(ratio=(table["value"] / table["floor"]).where(~signed))


def feature_metrics(samples: Tensor, real: Tensor, extractor: Extractor) -> dict[str, float]:
    """Fréchet distance, KID, precision, recall, density and coverage of samples (n, F), and the extractor's verdicts."""
    precision, recall = precision_recall(samples, real)
    density, coverage = density_coverage(samples, real)
    values = {extractor.distance: frechet_distance(samples, real), "KID": kid(samples, real), "precision": precision,
              "recall": recall, "density": density, "coverage": coverage}  # fmt: skip
    return {f"{name} ({extractor.title})": value for name, value in values.items()} | extractor.verdicts(samples)


class FeatureView:
    """What a reference says of samples, in features that all processes extract together."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    def __call__(self, samples: Tensor) -> pd.DataFrame:
        """The columns of `Reference.compare` for samples (n, C, H, W) in [-1, 1].

        Raises ValueError for samples of another shape than the reference's images.
        """
        shape = list(self.reference.made_of["event_shape"])
        if list(samples.shape[1:]) != shape:
            raise ValueError(f"samples of shape {tuple(samples.shape)} and a reference of images {tuple(shape)}")
        images = quantized(samples)[distributed.share(len(samples))]
        features = extract(self.reference.extractor, images, title=f"{self.reference.extractor.title}: samples")
        return self.reference.compare(distributed.gather(features))


def _made_of(data: TensorData, extractor: Extractor, count: int) -> dict[str, Any]:
    whole = data.count("train") if data.has_test else data.count("train") // 2
    n = min(count, whole, data.count("test") if data.has_test else whole)
    if n < 6:
        raise ValueError(
            f"a reference needs 6 real images of each kind at least, not {n}: raise count, or hold out more"
        )
    return {"data": data.fingerprint, "event_shape": list(data.event_shape), **extractor.settings(), "count": n,
            "floor": "held-out images" if data.has_test else "another part of the training set", "version": 1}  # fmt: skip


def _check(expected: Mapping[str, Any], found: Mapping[str, Any], path: Path) -> None:
    for name in {**expected, **found}:
        if expected.get(name) != found.get(name):
            raise ValueError(f"the reference {path} was made with {name}={found.get(name)}, not "
                             f"{expected.get(name)}: leave out its path to make another")  # fmt: skip


def _compute(
    data: TensorData, extractor: Extractor, made_of: Mapping[str, Any], folder: Path, device: torch.device | str,
    title: str | None,
) -> None:  # fmt: skip
    extractor.to(device).fit(data)
    n = made_of["count"]
    other = ("test", slice(n)) if data.has_test else ("train", slice(n, 2 * n))
    train, test = (extract(extractor, stored_images(data, *rows), title=title) for rows in (("train", slice(n)), other))
    _write(folder, extractor, train, test)


def _write(folder: Path, extractor: Extractor, train: Tensor, test: Tensor) -> None:
    np.save(folder / "train.npy", train.numpy())
    np.save(folder / "test.npy", test.numpy())
    if learned := extractor.learned():
        save_file(learned, folder / "extractor.safetensors")

"""A finite set of examples in memory, or mapped from a file.

Epoch e visits the N examples in the order of a permutation keyed by (seed, e). Step n takes positions n B .. (n + 1) B - 1
of the endless sequence of epochs, so each example comes exactly once per epoch, even if a batch spans two. Integers
0..L-1 become [-1, 1] by 2 k / (L - 1) - 1, or with uniform dequantisation by 2 (k + u) / L - 1, u ~ U[0, 1), which has a
density (Theis et al. 2016, https://arxiv.org/abs/1511.01844, section 3.1).
Integers are copied to the model's device as they are, and scaled, mirrored and augmented there.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from score_sde.checks import finite
from score_sde.data.augment import Augment, mirrored
from score_sde.data.base import Batch, Data
from score_sde.data.cache import digest, hash_of
from score_sde.keyed import ALL, Draws, generator

__all__ = ["Examples", "TensorData"]


class Examples(NamedTuple):
    """Examples (N, *event), integer labels (N,), the hash of x if known, and contexts (N, width) or (N, tokens, width)."""

    x: Tensor
    labels: Tensor | None = None
    fingerprint: str | None = None
    context: Tensor | None = None

    @property
    def conditions(self) -> dict[str, Tensor]:
        """Labels and contexts by the names of the networks' arguments."""
        given = {"label": self.labels, "context": self.context}
        return {name: value for name, value in given.items() if value is not None}


class Rows(NamedTuple):
    """The examples as they were given, and the indices of those that belong to a part, in order."""

    given: Examples
    order: Tensor

    def read(self, places: Tensor | slice) -> Batch:
        index = self.order[places]
        # Five times faster than x[index], as each row is copied in one piece.
        x = self.given.x.index_select(0, index)
        return Batch(x, {name: value.index_select(0, index) for name, value in self.given.conditions.items()})


class TensorData(Data):
    """Examples x (N, *event) with optional integer labels (N,).

    Floats are taken as they are, in the scale that the model works in; integers need `dequantize`. `reference` reads the
    examples of `test`, or the fraction `held_out`, chosen by a permutation that depends on N alone, or, if there is
    neither, the training examples.

    Args:
        x, labels: the examples, as tensors or array-likes (also a pandas DataFrame of numbers). They may be mapped from a
            file: batches read only their own rows. A torch Dataset of examples x or (x,), or of pairs (x, label), is read
            once as a whole.
        context: a further condition of each example, for a network with this `context_width`: a vector (N, width), or
            tokens (N, tokens, width) to attend to; NaN for an example without.
        test: held-out examples of the same kind, x or (x, labels), or `Examples`.
        seed: of the order of examples, and of the noise that dequantises those of `reference` and `examples`.
        dequantize: whether integers get uniform noise.
        levels: integers are 0..levels-1.
        held_out: the fraction set aside; None: a tenth, unless there is `test`.
        flip: mirror half of the training images left to right, at random.
        augment: augmentation of training images; batches then have the condition `augment`, (batch, 9).
        fingerprint: the hash of x if known (see `cache.hash_of`), which saves reading x for it.

    Raises:
        ValueError: no examples, values that are not finite or not in 0..levels-1, integers without `dequantize`, labels
            or a context that do not match, `held_out` outside [0, 1) or beside `test`, a test set of another event shape,
            `flip` or `augment` for events other than images (channels, height, width), or both of them.
    """

    def __init__(
        self,
        x: Any,
        labels: Any = None,
        *,
        context: Any = None,
        test: Any = None,
        seed: int = 0,
        dequantize: bool | None = None,
        levels: int = 256,
        held_out: float | None = 0.0,
        flip: bool = False,
        augment: Augment | None = None,
        fingerprint: str | None = None,
    ) -> None:
        train = _checked(Examples(x, labels, fingerprint, context), dequantize, levels)
        self.dequantize = None if train.x.is_floating_point() else dequantize
        self.levels, self.seed, self.event_shape = levels, seed, tuple(train.x.shape[1:])
        self.flip, self.augment = flip, augment
        _check_mirroring(flip, augment, self.event_shape)
        held_out = _held_out_share(held_out, test)
        reserved, used = _order(len(train.x)).tensor_split([int(held_out * len(train.x))])
        if held_out and not len(reserved):
            warnings.warn(f"held_out={held_out} of {len(train.x)} examples rounds down to none: samples will be compared "
                          "with training examples", stacklevel=2)  # fmt: skip
        self.size: int = len(used)
        self.num_classes = None if train.labels is None else int(train.labels.max()) + 1
        self._parts = {"train": Rows(train, used), "test": Rows(train, reserved if len(reserved) else used)}
        if test is not None:
            self._parts["test"] = self._test_rows(
                _checked(Examples(*test) if isinstance(test, tuple) else Examples(test), dequantize, levels)
            )
        self.has_test = test is not None or len(reserved) > 0
        self._orders: dict[int, Tensor] = {}
        self._classes: list[int] = []
        self._whole: TensorData | None = None

    @property
    def whole(self) -> TensorData:
        """The set that `of_classes` took these examples from, or this set itself."""
        return self._whole or self

    def of_classes(self, classes: Collection[int]) -> TensorData:
        """The training and held-out examples of these classes; the result's `whole` is the set they were taken from.

        Raises ValueError if examples have no labels, or none has one of these.
        """
        if self.num_classes is None:
            raise ValueError("these data have no labels: give TensorData(x, labels)")
        part = copy.copy(self)
        part._parts, part._orders, part._whole = {}, {}, self.whole
        part._classes = sorted({int(label) for label in classes})
        for name, (given, order) in self._parts.items():
            assert given.labels is not None
            labels = given.labels[order]
            if absent := set(part._classes) - set(labels.unique().tolist()):
                raise ValueError(f"no {name} example has label {min(absent)}")
            part._parts[name] = Rows(given, order[torch.isin(labels, torch.tensor(part._classes))])
        part.size = part.count("train")
        part.__dict__.pop("fingerprint", None)  # the whole set's, if cached
        return part

    def _test_rows(self, test: Examples) -> Rows:
        if tuple(test.x.shape[1:]) != self.event_shape:
            raise ValueError(f"the test set has events {tuple(test.x.shape[1:])}, the training set {self.event_shape}")
        if test.conditions.keys() != self._parts["train"].given.conditions.keys():
            raise ValueError("training and test set must both have labels, or neither; and so with context")
        if test.labels is not None and int(test.labels.max()) >= (self.num_classes or 0):
            raise ValueError(f"the test set has class {int(test.labels.max())}, the training set classes 0 to "
                             f"{(self.num_classes or 0) - 1}")  # fmt: skip
        return Rows(test, _order(len(test.x)))

    def batch(self, step: int, batch_size: int, rows: slice = ALL) -> Batch:
        first, last = step * batch_size, (step + 1) * batch_size
        epochs = range(first // self.size, (last - 1) // self.size + 1)
        places = [self._order(e)[max(0, first - e * self.size) : last - e * self.size] for e in epochs]
        return self._parts["train"].read(torch.cat(places)[rows])

    def prepare(self, batch: Batch, draws: Draws) -> Batch:
        x, condition = self._scaled(batch.x, draws), dict(batch.condition)
        if self.flip:
            x = mirrored(x, draws.uniform() < 0.5, -1)
        if self.augment is not None:
            x, condition["augment"] = self.augment(x, draws)
        return Batch(x, condition)

    @property
    def mirrors(self) -> bool:
        """Whether training mirrors images left to right."""
        return self.flip or self.augment is not None

    def examples(self) -> Batch:
        """Every training example once, scaled and dequantised as in training, not augmented."""
        return self._read("train", ALL, generator(self.seed, "examples"))

    def reference(self, count: int) -> Batch:
        """`count` held-out examples, or all if there are fewer, in the order of `places`, scaled and dequantised."""
        return self._read("test", slice(count), generator(self.seed, "reference"))

    def count(self, part: str) -> int:
        """Number of examples of a part, "train" or "test"."""
        return len(self._parts[part].order)

    def places(self, part: str) -> Tensor:
        """Indices of the examples of "train" or "test" in the array they were given in, in the order of `plain`.

        The order is a random permutation, so the first n are a random draw; `reference` reads the first of "test".
        """
        return self._parts[part].order

    def plain(self, part: str, rows: slice | Tensor = ALL) -> Batch:
        """Examples of "train" or "test" in the order of `places`; integers are scaled to [-1, 1] but not dequantised."""
        batch = self._parts[part].read(rows)
        scaled = batch.x if self.dequantize is None else _spread(batch.x, self.levels)
        return Batch(scaled, batch.condition)

    def as_plain(self, x: Tensor) -> Tensor:
        """A model's samples (n, *event_shape) on the scale of `plain`: for dequantised data, rounded to the levels."""
        if not self.dequantize:
            return x
        codes = ((x.float() + 1) * (self.levels / 2)).floor()
        return _spread(codes.clamp(0, self.levels - 1), self.levels)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the training and test examples, their labels, the split between them and the classes chosen."""
        sets = {id(rows.given): rows.given for rows in self._parts.values()}.values()
        known = [[given.fingerprint or hash_of(given.x), *map(hash_of, given.conditions.values())] for given in sets]
        chosen = [self._classes] if self._classes else []
        return digest([known, self.size, self.dequantize is None, self.levels, *chosen])

    def _read(self, part: str, rows: slice, source: torch.Generator) -> Batch:
        batch = self._parts[part].read(rows)
        return Batch(self._scaled(batch.x, Draws(source, len(batch.x))), batch.condition)

    def _scaled(self, x: Tensor, draws: Draws) -> Tensor:
        if self.dequantize:
            return (x + draws.uniform(*self.event_shape)) * (2 / self.levels) - 1
        return x if self.dequantize is None else _spread(x, self.levels)

    def _order(self, epoch: int) -> Tensor:
        order = self._orders.get(epoch)
        if order is None:
            order = torch.randperm(self.size, generator=generator(self.seed, "epoch", epoch))
            # At most two epochs are needed at once. Dropping others is safe, as the order is a function of the key.
            self._orders = {known: kept for known, kept in self._orders.items() if known == epoch - 1} | {epoch: order}
        return order


def _held_out_share(held_out: float | None, test: Any) -> float:
    """The fraction of the examples to set aside; None: a tenth, unless there is a test set."""
    if held_out is None:
        return 0.1 if test is None else 0.0
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out={held_out} is the fraction of the examples set aside: 0 <= held_out < 1")
    if held_out and test is not None:
        raise ValueError(f"held_out={held_out} beside a test set: give one of them")
    return held_out


def _check_mirroring(flip: bool, augment: Augment | None, event_shape: tuple[int, ...]) -> None:
    if augment is not None and not callable(augment):
        raise TypeError(f"augment is an augmentation, e.g. Augment(0.12), got {augment!r}")
    if (flip or augment) and len(event_shape) != 3:
        raise ValueError(f"flip and augment are for images (channels, height, width), not {event_shape}")
    if flip and augment:
        raise ValueError("augment mirrors half of the images too, with a condition that says so: leave out flip")


def _order(count: int) -> Tensor:
    """The order in which a set is split and read for reference: its first n are a random draw."""
    return torch.randperm(count, generator=generator(0, "held out"))


def _spread(x: Tensor, levels: int) -> Tensor:
    """0..levels-1 -> [-1, 1], float32."""
    return x.float().mul_(2 / (levels - 1)).sub_(1)


def _tensor(name: str, values: Any) -> Any:
    """Array-likes as tensors, and tensors without their graph. Raises ValueError for values that are not numbers."""
    if values is None:
        return None
    if isinstance(values, Tensor):
        return values.detach()  # an encoder's latents may carry its graph
    array = np.asarray(values)
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # "not writable": nothing writes to it
            return torch.as_tensor(array)
    except TypeError as error:
        fix = "np.unique(labels, return_inverse=True)[1]" if name == "labels" else "df.select_dtypes('number')"
        raise ValueError(f"{name} is an array of dtype {array.dtype}, as a column of text makes it: give only numbers, "
                         f"e.g. {fix}") from error  # fmt: skip


def _read_through(given: Examples, dataset: Dataset[Any]) -> Examples:
    """The examples of a torch Dataset, and its labels unless others are given."""
    if not hasattr(dataset, "__len__"):
        raise ValueError(f"{type(dataset).__name__} has no length: write a score_sde.data.Data for an endless stream")
    items = [dataset[i] for i in range(len(dataset))]
    parts = [*zip(*items, strict=True)] if items and isinstance(items[0], (tuple, list)) else [items]
    if not 1 <= len(parts) <= 2:
        raise ValueError(f"{type(dataset).__name__} has items of {len(parts)} parts: x, or (x, label), is read")
    x, *labels = (_tensor(name, [*map(np.asarray, part)]) for name, part in zip(("x", "labels"), parts, strict=False))
    return given._replace(x=x, labels=labels[0] if labels and given.labels is None else given.labels)


def _checked(given: Examples, dequantize: bool | None, levels: int) -> Examples:
    """The examples as tensors, float32 or integers. Raises ValueError if scale, labels or context do not fit."""
    if isinstance(given.x, Dataset):
        given = _read_through(given, given.x)
    given = given._replace(**{name: _tensor(name, getattr(given, name)) for name in ("x", "labels", "context")})
    _check_scale(given.x, dequantize, levels)
    labels = None if given.labels is None else _checked_labels(given.labels, len(given.x))
    context = given.context
    if context is not None and (
        context.ndim not in (2, 3) or len(context) != len(given.x) or not context.is_floating_point()
    ):
        raise ValueError(f"context must be floats ({len(given.x)}, width) or ({len(given.x)}, tokens, width); got "
                         f"{context.dtype} of shape {tuple(context.shape)}")  # fmt: skip
    x = given.x.float() if given.x.is_floating_point() else given.x
    return Examples(x, labels, given.fingerprint, None if context is None else context.float())


def _check_scale(x: Tensor, dequantize: bool | None, levels: int) -> None:
    """Raises ValueError for examples that no model can be trained on, and a `dequantize` that does not fit them."""
    if x.ndim < 2 or x.numel() == 0:
        raise ValueError(
            f"x of shape {tuple(x.shape)}: give (N, *event) with at least one example; of numbers, x[:, None]"
        )
    if x.is_complex():
        raise ValueError(
            f"x is {x.dtype}: give real numbers, e.g. torch.view_as_real(x), parts in a dimension of their own"
        )
    if x.is_floating_point():
        if dequantize is not None:
            raise ValueError(f"dequantize={dequantize} is for integers, x is {x.dtype}: leave it out, or give integers")
        finite("x", x.float())
        return
    if dequantize is None:
        raise ValueError(
            f"x is {x.dtype}, which has no density: say dequantize=True (adds uniform noise, scales to [-1, 1]) or "
            "dequantize=False (only scales), or give floats in the scale of the model"
        )
    if x.dtype == torch.uint8 and levels >= 256:
        return  # any value fits, and they may be a large file
    array = x.numpy()  # torch has no least value of uint16
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= levels:
        raise ValueError(f"x holds integers {low}..{high}, levels={levels} allows 0..{levels - 1}: set levels")


def _checked_labels(labels: Tensor, count: int) -> Tensor:
    whole = not (labels.is_floating_point() or labels.is_complex())
    if labels.shape != (count,) or not whole or labels.min() < 0:
        least = f", the least {int(labels.min())}" if whole and labels.numel() else ""
        given = f"{labels.dtype} of shape {tuple(labels.shape)}{least}"
        raise ValueError(f"labels must be {count} integers from 0, one an example; got {given}")
    return labels.long()

"""Checks of arguments, the same everywhere: each returns the value, or raises an error that says what is allowed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any, SupportsFloat

from torch import Tensor

__all__ = ["did_you_mean", "finite", "initials", "nearest", "number", "one_of", "real", "tensor", "whole", "wholes"]


def one_of(name: str, value: str, known: Iterable[str]) -> str:
    """The value itself, if it is one of the known ones; ValueError otherwise."""
    known = list(known)
    if value not in known:
        hint = did_you_mean(nearest(str(value), known), before=": ")
        raise ValueError(f"{name} is one of {', '.join(known)}; got {value!r}{hint}")
    return value


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """The known name spelt most like a wrong one, or else those of which it is a part or the initials; at most three."""
    longer = [one for one in known if name == initials(one) or (len(name) > 2 and name in one)]
    return difflib.get_close_matches(name, known, n=1) or longer[:3]


def did_you_mean(near: Sequence[str], before: str = "", after: str = "") -> str:
    """The question which of these names is meant, between two texts; nothing where there is none."""
    return f"{before}did you mean {' or '.join(map(repr, near))}?{after}" if near else ""


def initials(name: str) -> str:
    """The first letters of a name's words, e.g. lr of learning_rate; the empty string for a single word."""
    return "".join(word[:1] for word in name.split("_")) if "_" in name else ""


def whole(name: str, value: Any, least: float = 1) -> int:
    """The value as an int, if it is a whole number (of any type) of at least `least`; ValueError otherwise."""
    if not _is_number(value) or not math.isfinite(value) or int(value) != value or value < least:
        bound = "" if least == -math.inf else f" >= {least}"
        raise ValueError(f"give a whole number {name}{bound}, got {name}={value!r}")
    return int(value)


def wholes(name: str, values: Any, least: float = 1) -> list[int]:
    """One value or a non-empty sequence as a list of ints, each checked by `whole`; ValueError otherwise."""
    given = values if isinstance(values, Sequence) and not isinstance(values, str) else [values]
    if not len(given):
        raise ValueError(f"{name} is empty: give one or more")
    return [whole(name, value, least) for value in given]


def number(name: str, value: Any, least: float = -math.inf, above: float = -math.inf) -> float:
    """The value as a float, if it is a number (of any type) >= `least` and > `above`; ValueError otherwise."""
    within = _is_number(value) and (value >= least or least == -math.inf) and (value > above or above == -math.inf)
    if not within:
        bound = f" > {above:g}" if above > -math.inf else f" >= {least:g}" if least > -math.inf else ""
        raise ValueError(f"give a number {name}{bound}, got {name}={value!r}")
    return float(value)


def tensor(name: str, value: Any) -> Tensor:
    """The value itself, if it is a tensor; TypeError otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a tensor, got {type(value).__name__}: torch.as_tensor makes one")
    return value


def real(name: str, value: Any) -> Tensor:
    """The value itself, if it is a tensor of floats; TypeError otherwise."""
    if not tensor(name, value).is_floating_point():
        raise TypeError(f"{name} is {value.dtype}: give floats in the units of the model, as a data set's `reference`, "
                        "`examples` and `plain` return them")  # fmt: skip
    return value


def finite(name: str, x: Tensor) -> None:
    """Raises ValueError for rows of x (N, ...) with a NaN or an infinity, and says which."""
    good = x.isfinite()
    if not good.all():
        bad = (~good.flatten(1).all(1)).nonzero()[:, 0]
        raise ValueError(f"{name} has values that are not finite in {str(x.dtype).removeprefix('torch.')}, in {len(bad)} "
                         f"of {len(x)} rows, the first is row {int(bad[0])}: remove or replace them")  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | SupportsFloat) and not isinstance(value, bool)

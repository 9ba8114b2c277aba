"""Arguments that are checked alike everywhere: each function returns the value, or raises ValueError with what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, SupportsFloat

__all__ = ["one_of", "whole"]


def one_of(name: str, value: str, known: Iterable[str]) -> str:
    """The value, where it is known."""
    known = list(known)
    if value not in known:
        raise ValueError(f"{name} is one of {', '.join(known)}; got {value!r}")
    return value


def whole(name: str, value: Any, least: float = 1) -> int:
    """The value as an int, where it is a whole number of any type and at least `least`."""
    number = isinstance(value, SupportsFloat) and not isinstance(value, bool) and math.isfinite(value)
    if not number or int(value) != value or value < least:
        bound = "" if least == -math.inf else f" >= {least}"
        raise ValueError(f"give a whole number {name}{bound}, got {name}={value!r}")
    return int(value)

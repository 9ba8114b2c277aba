"""tqdm's bars, redrawn every half minute where nobody watches: in the log of a job a line a tenth of a second is a flood."""

from __future__ import annotations

import sys
from typing import Any

import tqdm as original

__all__ = ["tqdm"]


class tqdm(original.tqdm):  # noqa: N801
    """`tqdm.tqdm` with intervals of 30 s where stderr is neither a terminal nor a notebook's."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        watched = getattr(sys.stderr, "isatty", bool)() or "ipykernel" in sys.modules
        seldom = {} if watched else {"mininterval": 30.0, "maxinterval": 30.0}
        super().__init__(*arguments, **{**seldom, **options})

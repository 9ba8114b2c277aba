"""tqdm's progress bars, redrawn every 30 s if not on a terminal: a job's log would otherwise get ten lines per second."""

from __future__ import annotations

import sys
from typing import Any

import tqdm as original

__all__ = ["tqdm"]


class tqdm(original.tqdm):  # noqa: N801
    """`tqdm.tqdm`, with intervals of 30 s unless stderr is a terminal or a notebook."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        watched = getattr(sys.stderr, "isatty", bool)() or "ipykernel" in sys.modules
        seldom = {} if watched else {"mininterval": 30.0, "maxinterval": 30.0}
        super().__init__(*arguments, **{**seldom, **options})

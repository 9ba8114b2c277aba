r"""A step whose scalars come from a file.

In the scaled variable y = x / alpha a linear step depends only on noise levels l = sigma / alpha,

    y_s = a y_t + sum_k b_k N_k + c z,      N = u D + w eps,

where D and eps are those of x. So one table of (l, a, b, c, (u, w)) serves every SDE whose noise levels include the
table's. If the last level is 0, the last move ends at clean data, y = x. A row without weights b takes no network call
(and is refused by `ParallelSampler`). The files of scripts/tune.py are such tables: with s = kappa l the noise in a state
and chi its signal, a = s_{i+1} / s_i and b = (chi_{i+1} - a chi_i) w; a start that was scaled by r has chi = r.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from score_sde.sde import SDE
from score_sde.steps.linear import Coefficients, LinearRow, LinearStep

Table = Mapping[str, Any]


class Tabulated(LinearStep):
    """A linear step read from a table of scalars, for the table's own grid.

    Args:
        table: a .json or .npz file, or a mapping, with `levels` (N + 1 decreasing noise levels sigma / alpha), `a` (N),
            `b` (N lists of weights, the newest output's first, at most as many as there were calls; in a .npz rows are
            padded with NaN), and optionally `c` (N, by default 0) and `output` (N pairs (u, w), by default (1, 0)); or a
            file of scripts/tune.py.

    Raises:
        ValueError: the table's lengths do not fit, its levels do not decrease, or a number is not finite.
    """

    point_mass = False  # a file's numbers need not be exact

    def __init__(self, table: str | Path | Table) -> None:
        source = _read(Path(table)) if isinstance(table, str | Path) else table
        source = _tuned(**source) if "half_log_snr" in source else source
        unknown, missing = source.keys() - {"levels", "a", "b", "c", "output"}, {"levels", "a", "b"} - source.keys()
        if unknown or missing:
            raise ValueError("a table has levels, a, b and may have c and output; "
                             f"got {', '.join(sorted(source))}")  # fmt: skip
        self.levels = torch.as_tensor(np.asarray(source["levels"], dtype=np.float64))
        moves = len(self.levels) - 1
        self.a = _column(source["a"], moves, "a")
        self.c = _column(source.get("c", [0.0] * moves), moves, "c")
        self.b = [_column(row, None, "b") for row in source["b"]]
        self.outputs = [tuple(_column(pair, 2, "output")) for pair in source.get("output", [(1.0, 0.0)] * moves)]
        if len(self.b) != moves or len(self.outputs) != moves:
            raise ValueError(f"a table of {moves + 1} levels has {moves} rows, "
                             f"got {len(self.b)} of b and {len(self.outputs)} of output")  # fmt: skip
        if any(len(row) > calls for row, calls in zip(self.b, accumulate(map(bool, self.b)), strict=True)):
            raise ValueError("a table's row of b weighs at most as many outputs as there were calls up to it")
        if moves < 1 or not (self.levels >= 0).all() or not (self.levels.diff() < 0).all():
            raise ValueError("a table's levels are positive and decrease, from noise to data; the last may be 0")
        self.memory = max(map(len, self.b))

    @classmethod
    def of(cls, step: LinearStep, sde: SDE, times: Tensor) -> Tabulated:
        """The table of a linear step on a decreasing grid."""
        rows, alpha = step.plan(sde, times[:-1], times[1:]), sde.alpha(times).tolist()
        scaled = list(zip(rows, alpha[:-1], alpha[1:], strict=True))
        return cls({
            "levels": sde.noise_level(times).tolist(),
            "a": [row.a * t / s for row, t, s in scaled],
            "b": [[weight / s for weight in row.b] for row, _, s in scaled],
            "c": [row.c / s for row, _, s in scaled],
            "output": [row.output for row in rows],
        })  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Writes the table as .json or .npz, by the path's suffix; ValueError for another suffix."""
        path, table = Path(path), {"levels": self.levels.tolist(), "a": self.a, "c": self.c, "output": self.outputs}
        if path.suffix == ".json":
            path.write_text(json.dumps(table | {"b": self.b}, indent=1) + "\n")
        elif path.suffix == ".npz":
            padded = [row + [np.nan] * (self.memory - len(row)) for row in self.b]
            np.savez(path, b=padded, **{name: np.asarray(column) for name, column in table.items()})  # type: ignore[arg-type]
        else:
            raise ValueError(f"a table is a .json or .npz file, got {path.name!r}")

    def grid(self, sde: SDE) -> Tensor:
        """The times at which the SDE has the table's levels (t_min for level 0), for `Sampler(step, step.grid)`."""
        times = sde.time_at_noise_level(self._levels(sde))
        self._refuse_other(sde, times[:-1], times[1:])
        return times

    def plan(self, sde: SDE, t: Tensor, s: Tensor) -> list[LinearRow]:
        self._refuse_other(sde, t, s)
        reached = torch.where(self.levels[1:] > 0, sde.alpha(s), 1.0)
        ends = zip(sde.alpha(t).tolist(), reached.tolist(), strict=True)
        rows = zip(t.tolist(), self.a, self.b, self.c, self.outputs, ends, strict=True)
        return [LinearRow(time, a * end / start, tuple(w * end for w in b), c * end, (output[0], output[1]))
                for time, a, b, c, output, (start, end) in rows]  # fmt: skip

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        raise NotImplementedError("a table's rows are numbers, not functions of time: see `plan`")

    def _levels(self, sde: SDE) -> Tensor:
        """The levels with 0 replaced by that of the SDE at t_min, where its time ends."""
        return torch.where(self.levels > 0, self.levels, sde.noise_level(sde.t_min))

    def _refuse_other(self, sde: SDE, t: Tensor, s: Tensor) -> None:
        stops = self._levels(sde)
        own, levels = torch.cat([stops[:-1], stops[1:]]), sde.noise_level(torch.cat([t, s]))
        if len(t) != len(self.a) or not torch.allclose(levels, own, rtol=1e-6):
            first, last = self.levels[0].item(), self.levels[-1].item()
            raise ValueError(f"this table is for its own {len(self.a)} moves, from level {first:.6g} to {last:.6g}: "
                             "use its grid (grid=step.grid) and an SDE that has these levels")  # fmt: skip


def _read(path: Path) -> Table:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            return {
                name: archive[name] if name != "b" else list(map(_unpadded, archive[name])) for name in archive.files
            }
    if path.suffix == ".json":
        return dict(json.loads(path.read_text()))
    raise ValueError(f"a table is a .json or .npz file, got {path.name!r}")


def _tuned(
    half_log_snr: Sequence[float], noise: Sequence[float], weights: Sequence[Sequence[float]], record: Any,
    start: float | None = None, signal: Sequence[float] | None = None,
) -> Table:  # fmt: skip
    """A `score_sde.tuning.TunedTable` as a table of this module; where its first call is not at the start, a row that only
    scales, without a call, precedes it."""
    start = half_log_snr[0] if start is None else start
    levels = np.append(np.exp(-np.asarray([start, *half_log_snr])), 0.0)
    left = np.asarray([1.0, *noise, 0.0]) * levels
    a = left[1:] / left[:-1]
    of_state = np.asarray([a[0], *(signal or np.ones(len(weights)))[1:], 1.0])  # the signal of each call, over alpha
    b = [(later - r * now) * np.asarray(row[::-1]) for r, now, later, row in
         zip(a[1:], of_state[:-1], of_state[1:], weights, strict=True)]  # fmt: skip
    first = int(start == half_log_snr[0])
    return {"levels": levels[first:], "a": a[first:], "b": [[], *b][first:]}


def _unpadded(row: np.ndarray) -> np.ndarray:
    """A row without the NaN at its end."""
    given = np.flatnonzero(~np.isnan(row))
    return row[: given[-1] + 1] if len(given) else row[:0]


def _column(values: Sequence[float], length: int | None, name: str) -> list[float]:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1 or not np.isfinite(column).all() or (length is not None and len(column) != length):
        expected = "" if length is None else f"{length} "
        raise ValueError(f"a table's {name} are {expected}finite numbers, got shape {column.shape}")
    return column.tolist()

"""The published deterministic solvers as tables, which tuned ones start from and are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from score_sde import grid as grids
from score_sde.checks import whole
from score_sde.sde import SDE, RectifiedFlow
from score_sde.steps import IPNDM, AdamsBashforth, ExponentialAdams, RectifiedAdams, UniPC
from score_sde.steps.linear import LinearStep
from score_sde.tuning.span import Span, closed
from score_sde.tuning.table import TunedTable


def as_table(step: LinearStep, half_log_snr: Tensor, to_zero: bool = False) -> TunedTable:
    """The table of a deterministic step that is exact for a point mass, with its calls at these levels.

    Every state of such a run is a linear form x_i = c_i x_0 + sum_j P_ij D_j, and so is every output N_j = u D_j + w eps_j,
    eps_j = (x_j - alpha_j D_j) / sigma_j. Hence kappa_i = c_i sigma_0 / sigma_i and, with `table`'s r_i,
    (alpha_{i+1} - r_i alpha_i) w_i = P_{i+1} - r_i P_i. The coefficients are taken on the rectified path, alpha = 1 - t
    and sigma = t. The last move ends at the last D or, with `to_zero`, is the step itself to t = 0.
    """
    calls, sde = len(half_log_snr), RectifiedFlow()
    t = torch.cat([torch.sigmoid(-half_log_snr), half_log_snr.new_zeros(1)])
    unit, x, outputs = np.eye(calls + 1), [], list[np.ndarray]()  # the forms: x_0, D_0, D_1, ...
    x.append(unit[0])
    for i, row in enumerate(step.plan(sde, t[:-1], t[1:]) if to_zero else step.plan(sde, t[:-2], t[1:-1])):
        (u, w), D = row.output, unit[i + 1]
        outputs.insert(0, u * D + w * (x[i] - (1 - row.t) * D) / row.t)
        x.append(row.a * x[i] + sum(b * N for b, N in zip(row.b, outputs, strict=False)))
    if not to_zero:
        x.append(unit[calls])
    forms = torch.from_numpy(np.stack(x))
    c, P = forms[:, 0], forms[:, 1:]
    r = (c[1:] / c[:-1]).unsqueeze(1)
    alpha = (1 - t).unsqueeze(1)
    noise = torch.cat([c.new_ones(1), c[1:-1] * t[0] / t[1:-1]])
    return TunedTable(half_log_snr, closed((P[1:] - r * P[:-1]) / (alpha[1:] - r * alpha[:-1])), noise)


def _rectified(sde: SDE, steps: int) -> Tensor:
    """Half log SNRs of `steps` calls at equal distances in sigma / (alpha + sigma), on the way to 0."""
    first, last = (s / (1 + s) for s in sde.noise_level_range)
    return -torch.logit(torch.linspace(first, max(first / steps, last), steps, dtype=torch.float64))


def _of_time(grid: Callable[..., Tensor], sde: SDE, steps: int) -> Tensor:
    """Half log SNRs of `steps` calls on a grid of times, which ends at t_min."""
    times = grid(sde, steps=steps - 1) if steps > 1 else torch.tensor([sde.t_max], dtype=torch.float64)
    return sde.half_log_snr(times)


RULES: dict[str, Callable[[Tensor], TunedTable]] = {
    **{f"exponential Adams {k}": partial(as_table, ExponentialAdams(k)) for k in (1, 2, 3)},
    **{f"velocity Adams {k}": partial(as_table, AdamsBashforth(k), to_zero=True) for k in (2, 3)},
    "rectified Adams 3": partial(as_table, RectifiedAdams(3), to_zero=True),
    **{f"noise Adams {k}": partial(as_table, AdamsBashforth(k, "noise")) for k in (2, 3)},
    **{f"UniPC {k}": partial(as_table, UniPC(k)) for k in (2, 3)},
    "iPNDM 4": partial(as_table, IPNDM(4)),
}
"""Functions from the levels of the calls to a table: DDIM (exponential Adams 1), multistep DPM-Solver++, LMS and others."""

GRIDS: dict[str, Callable[[SDE, int], Tensor]] = {
    "rectified": _rectified,
    **{
        f.__name__: partial(_of_time, f)
        for f in (grids.log_snr, grids.hyperbolic, grids.karras, grids.uniform, grids.quadratic)
    },
}


def untuned(sde: SDE, steps: int) -> dict[str, TunedTable]:
    """Every untuned solver with `steps` network calls, by the name "<rule> on <grid>" (`RULES`, `GRIDS`)."""
    steps = whole("steps", steps)
    return _by_name({name: Span.of(sde).inside(grid(sde, steps)) for name, grid in GRIDS.items()})


def begun_late(sde: SDE, steps: int) -> dict[str, TunedTable]:
    """The untuned solvers on grids of one call more, without the first, which sees only noise: "<rule> on <grid>, late"."""
    span, steps = Span.of(sde), whole("steps", steps)
    tables = _by_name({name: span.inside(grid(sde, steps + 1))[1:] for name, grid in GRIDS.items()})
    return {f"{name}, late": replace(table, start=span.first) for name, table in tables.items()}


def _by_name(levels: dict[str, Tensor]) -> dict[str, TunedTable]:
    return {f"{rule} on {grid}": RULES[rule](at) for rule in RULES for grid, at in levels.items()}

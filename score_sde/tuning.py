r"""Tuned solvers: a sampler is a table of scalars, so fit it.

Every deterministic solver that is linear in x and in the denoiser outputs and carries a point mass exactly is

    x_{i+1} = r_i x_i + (alpha_{i+1} - r_i alpha_i) sum_{k <= i} w_ik D_k,  r_i = s_{i+1} / s_i, sum_k w_ik = 1:

a move straight towards an affine combination of all clean estimates so far, which it reaches at s_N = 0. Free are the
levels (alpha_i, sigma_i) of the calls, the noise s_i = kappa_i sigma_i left in their states and the weights w; with
kappa = 1 DDIM, DPM-Solver++ and Adams in the velocity are such tables. The first call need not be at t_max, where a
network sees little but noise: the start is scaled to the noise s_0, which leaves it s_0 alpha(t_max) / sigma(t_max)
of signal in the place of alpha_0, and what is called first already tells where to go. `tune` fits the best table, by
gradients through the sampler, to the converged probability-flow ODE; `tune_spectrum` needs no model, only a spectrum.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from score_sde import grid as grids
from score_sde.adaptive import AdaptiveODE
from score_sde.checks import number, one_of, whole
from score_sde.keyed import generator
from score_sde.prediction import Prediction
from score_sde.progress import tqdm
from score_sde.sampler import Sampler, SampleResult
from score_sde.score import ScoreModel
from score_sde.sde import SDE, VPSDE, RectifiedFlow, Time, as_time, derivative
from score_sde.steps import IPNDM, AdamsBashforth, ExponentialAdams, RectifiedAdams, Tabulated, UniPC
from score_sde.steps.linear import LinearStep

METHODS = ("coefficients", "grid")
EARLIER = "the earlier table"

CONVERGED = AdaptiveODE("dopri5", rtol=1e-5, atol=1e-5, final="denoise")
"""What a table is fitted to, and held against: the probability-flow ODE, with the error of each sample controlled."""


# --- the table and its sampler ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TunedTable:
    """A solver as numbers; it serves every SDE whose noise levels reach its own.

    Attributes:
        half_log_snr: lambda = log(alpha / sigma) of each call, increasing, shape (N,).
        weights: w, lower triangular with rows that sum to 1, shape (N, N); row i weighs D_0 ... D_i.
        noise: kappa, the noise in the state of each call over the sigma of its level, positive, shape (N,); 1 where
            left out.
        start: lambda of the noise that sampling starts from; that of the first call by default, and never greater. A first
            call at the start itself has kappa = 1.
        record: how it came about: the method, and the validation loss of every candidate.

    Raises:
        ValueError: shapes do not fit, levels do not increase or begin before the start, noise is not positive, or a row
            does not sum to 1.
    """

    half_log_snr: Tensor
    weights: Tensor
    noise: Tensor = None  # type: ignore[assignment]
    start: float = None  # type: ignore[assignment]
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        calls = len(self.half_log_snr)
        if self.noise is None:
            object.__setattr__(self, "noise", torch.ones(calls, dtype=torch.float64))
        if self.half_log_snr.ndim != 1 or calls < 1 or self.weights.shape != (calls, calls):
            raise ValueError("a table has levels of shape (N,) and weights of shape (N, N), N >= 1; "
                             f"got {tuple(self.half_log_snr.shape)} and {tuple(self.weights.shape)}")  # fmt: skip
        if not (self.half_log_snr.diff() > 0).all():
            raise ValueError("a table's half log SNRs increase, from noise to data")
        if self.start is None:
            object.__setattr__(self, "start", self.half_log_snr[0].item())
        if not -math.inf < self.start <= self.half_log_snr[0]:
            raise ValueError(f"a table starts at the half log SNR of its first call or below, got {self.start:g}")
        scaled = self.start == self.half_log_snr[0] and self.noise[0] != 1
        if self.noise.shape != (calls,) or not (self.noise > 0).all() or scaled:
            raise ValueError("a table's noise is positive, of shape (N,), and 1 for a call at its start; "
                             f"got {self.noise.tolist()}")  # fmt: skip
        excess = (self.weights.sum(1) - 1).abs() / self.weights.abs().sum(1)
        if self.weights.triu(1).any() or not (excess < 1e-12).all():
            raise ValueError("a table's weights are lower triangular with rows that sum to 1: else a point mass moves")

    @property
    def numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        """half_log_snr, weights and noise."""
        return self.half_log_snr, self.weights, self.noise

    def contents(self) -> dict[str, Any]:
        """What a file of the table holds."""
        rows = [row[: i + 1] for i, row in enumerate(self.weights.tolist())]
        return {"start": self.start, "half_log_snr": self.half_log_snr.tolist(), "noise": self.noise.tolist(),
                "weights": rows, "record": self.record}  # fmt: skip

    def text(self) -> str:
        """The table as JSON, its numbers to the last bit."""
        return json.dumps(self.contents(), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes `text` into a file."""
        Path(path).write_text(self.text())

    @classmethod
    def load(cls, path: str | Path) -> TunedTable:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is not such a table.
        """
        table = json.loads(Path(path).read_text())
        parts = {"start", "half_log_snr", "noise", "weights", "record"}
        if not isinstance(table, dict) or table.keys() | {"start"} != parts:  # tables once began at their first call
            raise ValueError(f"{path} is no table of scripts/tune.py, which has {', '.join(sorted(parts))}")
        table.setdefault("start")
        calls = len(table["half_log_snr"])
        rows = [row + [0.0] * (calls - len(row)) for row in table["weights"]]
        number = partial(torch.tensor, dtype=torch.float64)
        levels, noise, weights = (number(part) for part in (table["half_log_snr"], table["noise"], rows))
        return cls(levels, weights, noise, table["start"], table["record"])


def _straight(sde: SDE, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """r_i = s_{i+1} / s_i and alpha_{i+1} - r_i alpha_i of the N + 1 moves: to the first call, and from each of them.

    (alpha, s) = (1, 0) after the last. The start is scaled, alpha_0 = r alpha(t_max), so that the first difference is 0.
    """
    alpha, sigma = (torch.atleast_1d(part(as_time(sde.t_max))) for part in (sde.alpha, sde.sigma))
    sigma = torch.cat([sigma, noise * sde.sigma(t), t.new_zeros(1)])
    a = sigma[1:] / sigma[:-1]
    alpha = torch.cat([alpha, a[:1] * alpha, sde.alpha(t[1:]), t.new_ones(1)])
    return a, alpha[1:] - a * alpha[:-1]


class TunedSampler(Sampler):
    """A `Sampler` that runs a table: N network calls, from t_max to clean data.

    Args:
        table: a `TunedTable`, or the JSON file of one.

    Raises:
        ValueError: the file is no table.
    """

    def __init__(self, table: TunedTable | str | Path) -> None:
        self.table = table if isinstance(table, TunedTable) else TunedTable.load(table)
        self.step = Tabulated(self.table.contents())
        super().__init__(self.step, self._times, final="none")

    def _times(self, sde: SDE) -> Tensor:
        """The times of the start, if the first call is not there, and of the calls, and t_min in the place of the end.

        Raises:
            ValueError: the table starts at another noise level than the SDE, or goes below its t_min.
        """
        first, last = sde.half_log_snr_range
        start, end = self.table.start, self.table.half_log_snr[-1].item()
        if abs(start - first) > 1e-3 or end >= last:
            raise ValueError(f"this table goes from half log SNR {start:.4g} to a last call at {end:.4g}, "
                             f"{sde!r} is sampled from {first:.4g} to {last:.4g}: tune one for it")  # fmt: skip
        return self.step.grid(sde)


# --- untuned solvers as tables ----------------------------------------------------------------------------------------


def as_table(step: LinearStep, half_log_snr: Tensor, to_zero: bool = False) -> TunedTable:
    """The table of a deterministic step that carries a point mass exactly, with its calls at these levels.

    Every state of such a run is a linear form x_i = c_i x_0 + sum_j P_ij D_j, and so is every output N_j = u D_j + w eps_j,
    eps_j = (x_j - alpha_j D_j) / sigma_j. Hence kappa_i = c_i sigma_0 / sigma_i and, with the module's r_i,
    (alpha_{i+1} - r_i alpha_i) w_i = P_{i+1} - r_i P_i. The coefficients are taken on the rectified path, alpha = 1 - t
    and sigma = t. The last move ends at the last D, or `to_zero` carries the step itself on to t = 0.
    """
    calls, sde = len(half_log_snr), RectifiedFlow()
    t = torch.cat([torch.sigmoid(-half_log_snr), half_log_snr.new_zeros(1)])
    unit, x, outputs = torch.eye(calls + 1, dtype=torch.float64), [], list[Tensor]()  # the forms: x_0, D_0, D_1, ...
    x.append(unit[0])
    for i, row in enumerate(step.plan(sde, t[:-1], t[1:]) if to_zero else step.plan(sde, t[:-2], t[1:-1])):
        (u, w), D = row.output, unit[i + 1]
        outputs.insert(0, u * D + w * (x[i] - (1 - t[i]) * D) / t[i])
        x.append(row.a * x[i] + sum(b * N for b, N in zip(row.b, outputs, strict=False)))
    if not to_zero:
        x.append(unit[calls])
    c, P = torch.stack(x)[:, 0], torch.stack(x)[:, 1:]
    r = (c[1:] / c[:-1]).unsqueeze(1)
    alpha = (1 - t).unsqueeze(1)
    noise = torch.cat([c.new_ones(1), c[1:-1] * t[0] / t[1:-1]])
    return TunedTable(half_log_snr, _closed((P[1:] - r * P[:-1]) / (alpha[1:] - r * alpha[:-1])), noise)


def _closed(weights: Tensor) -> Tensor:
    """The strictly lower triangle of `weights`, and on the diagonal what makes each row sum to 1."""
    past = weights.tril(-1)
    return past + torch.diag(1 - past.sum(1))


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
    **{f"velocity Adams {k}": partial(as_table, RectifiedAdams(k), to_zero=True) for k in (2, 3)},
    **{f"noise Adams {k}": partial(as_table, AdamsBashforth(k, "noise")) for k in (2, 3)},
    **{f"UniPC {k}": partial(as_table, UniPC(k)) for k in (2, 3)},
    "iPNDM 4": partial(as_table, IPNDM(4)),
}
"""From the levels of the calls to the table: DDIM (exponential Adams 1), multistep DPM-Solver++, LMS and others."""

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
    """The untuned solvers on their grids of one call more without the first call, at noise alone: "<rule> on <grid>, late"."""
    span, steps = Span.of(sde), whole("steps", steps)
    tables = _by_name({name: span.inside(grid(sde, steps + 1))[1:] for name, grid in GRIDS.items()})
    return {f"{name}, late": replace(table, start=span.first) for name, table in tables.items()}


def _by_name(levels: dict[str, Tensor]) -> dict[str, TunedTable]:
    return {f"{rule} on {grid}": RULES[rule](at) for rule in RULES for grid, at in levels.items()}


# --- fitting ----------------------------------------------------------------------------------------------------------


CLOSEST = 1e-6
"""The share of the way that a gap between levels keeps in a fit."""


@dataclass(frozen=True)
class Span:
    """The half log SNRs at t_max and t_min, and tables between them as unconstrained vectors.

    z = (log gaps between the start, the calls and the end, up to a constant; the strictly lower triangle of the
    weights; log kappa).
    """

    first: float
    last: float

    @classmethod
    def of(cls, sde: SDE) -> Span:
        sde.check()
        return cls(*sde.half_log_snr_range)

    def inside(self, half_log_snr: Tensor) -> Tensor:
        """Levels that start no earlier than `first` and, about a thousandth of a unit apart or more, end before `last`."""
        gaps = self._gaps(half_log_snr).clamp_min(half_log_snr.new_tensor([0.0] + [1e-3] * len(half_log_snr)))
        return self._placed(gaps / gaps.sum())

    def levels(self, log_gaps: Tensor) -> Tensor:
        return self._placed((log_gaps.softmax(0) + CLOSEST) / (1 + CLOSEST * len(log_gaps)))

    def _placed(self, shares: Tensor) -> Tensor:
        return self.first + (self.last - self.first) * shares[:-1].cumsum(0)

    def _gaps(self, half_log_snr: Tensor) -> Tensor:
        ends = half_log_snr.new_tensor([[self.first], [self.last]])
        return torch.cat([ends[0], half_log_snr, ends[1]]).diff()

    def vector(self, table: TunedTable) -> Tensor:
        """Gaps are at least a fiftieth of the mean here: the softmax would hardly open a closed one again."""
        gaps = self._gaps(table.half_log_snr)
        past = table.weights[_below(len(table.half_log_snr))]
        return torch.cat([gaps.clamp_min(gaps.mean() / 50).log(), past, table.noise.log()])

    def table(self, z: Tensor, calls: int) -> TunedTable:
        """The table of z."""
        return TunedTable(*self.split(z, calls), start=self.first)

    def split(self, z: Tensor, calls: int) -> tuple[Tensor, Tensor, Tensor]:
        """Levels, weights and noise of z, differentiable."""
        gaps, past, noise = z.split([calls + 1, calls * (calls - 1) // 2, calls])
        weights = z.new_zeros(calls, calls).index_put(_below(calls), past)
        return self.levels(gaps), _closed(weights), noise.exp()


def _below(calls: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(calls, calls, -1)
    return rows, columns


def endpoints(model: ScoreModel, x: Tensor, half_log_snr: Tensor, weights: Tensor, noise: Tensor) -> Tensor:
    """What the table makes of starting points x, differentiable in all of its numbers."""
    t = _time_at(model.sde, half_log_snr)
    a, b = (part.to(x) for part in _straight(model.sde, t, noise))
    weights, outputs = weights.to(x), []
    x = a[0] * x
    for i in range(len(t)):
        outputs.append(model(x, t[i] if t.requires_grad else t[i].item()).denoised)
        clean = torch.einsum("k,k...->...", weights[i, : i + 1], torch.stack(outputs))
        x = a[i + 1] * x + b[i + 1] * clean if i + 1 < len(t) else clean
    return x


def _time_at(sde: SDE, half_log_snr: Tensor) -> Tensor:
    """`sde.time_at` with the derivative of the inverse function, dt / dlambda = 1 / (dlambda / dt)."""
    fixed = half_log_snr.detach()
    t = sde.time_at(fixed)
    return t if not half_log_snr.requires_grad else t + (half_log_snr - fixed) / derivative(sde.half_log_snr, t)


@dataclass(frozen=True)
class Pairs:
    """Starting points, where the converged ODE takes them, and the robust distance of a table's endpoints from there.

    loss = mean (|x - y|^2 / d + c^2)^(1/4) - c^(1/2) in `unit`s, the data's standard deviation: quadratic in misses below
    c = `robust`, and their square root above. Starts close to a boundary between modes end in the wrong mode with few calls,
    whatever the table. A squared loss would draw all endpoints near the boundary towards the middle to make these few misses
    smaller, where the data have nothing; the root does not.
    """

    model: ScoreModel
    x: Tensor
    y: Tensor
    unit: float
    robust: float
    batch_size: int

    def error(self, half_log_snr: Tensor, weights: Tensor, noise: Tensor) -> Tensor:
        x = endpoints(self.model, self.x, half_log_snr, weights, noise)
        miss = (x - self.y).flatten(1) / self.unit
        return (miss.square().mean(1) + self.robust**2).pow(0.25).mean() - self.robust**0.5

    def batches(self) -> Iterator[tuple[float, Pairs]]:
        for x, y in zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True):
            yield len(x) / len(self.x), replace(self, x=x, y=y)

    def draw(self, generator: torch.Generator) -> Pairs:
        """A batch of the pairs, drawn with replacement."""
        index = torch.randint(len(self.x), (self.batch_size,), generator=generator).to(self.x.device)
        return replace(self, x=self.x[index], y=self.y[index])

    @torch.no_grad()
    def loss(self, table: TunedTable) -> float:
        value = sum(share * part.error(*table.numbers).item() for share, part in self.batches())
        return value if math.isfinite(value) else math.inf

    def loss_and_gradient(self, z: np.ndarray, span: Span, calls: int) -> tuple[float, np.ndarray]:
        value, gradient, point = 0.0, np.zeros_like(z), torch.tensor(z, requires_grad=True)
        with torch.enable_grad():
            for share, part in self.batches():
                term = share * part.error(*span.split(point, calls))
                value += term.item()
                gradient += torch.autograd.grad(term, point)[0].numpy()
        return (value, gradient) if np.isfinite([value, *gradient]).all() else (1e9, np.zeros_like(z))


class Samples(Protocol):
    """What a teacher does: `ProbabilityFlowODE`, or a `Sampler` of many steps."""

    def sample(self, model: ScoreModel, shape: Sequence[int], *, x_init: Tensor) -> SampleResult: ...


def tune(
    model: ScoreModel, steps: int, *, method: str = "coefficients", samples: int | None = None, iterations: int = 800,
    starts: int = 12, seed: int = 0, teacher: Samples | None = None, robust: float = 0.07,
    batch_size: int | None = None, minutes: float | None = None, pairs: tuple[Pairs, Pairs] | None = None,
    earlier: TunedTable | None = None, progress: bool = True,
) -> TunedTable:  # fmt: skip
    """The best table found for this model and this number of network calls.

    Starting points are drawn from the prior, `samples` to fit on and half as many, which the fit does not see, to
    validate. The most promising untuned solvers, begun late (`begun_late`), and as many random levels are fitted a
    little, the best three of them longer and the best one in full; what then validates best is returned, never a worse
    solver than the best of those that were not fitted.

    Args:
        model: exact or learned; its gradient with respect to x is needed for "coefficients".
        steps: network calls of a sample.
        method: "coefficients" fits all numbers of the table (Adam on fresh batches, gradients through the sampler);
            "grid" the levels alone, without derivatives (Nelder-Mead), the weights following the rule of the best
            untuned solver.
        samples: starting points to fit on; by default 2^16 numbers' worth, 1024 to 16384.
        iterations: of the full fit; the candidates' take as many again. At most so many of Nelder-Mead's.
        starts: candidates that are fitted.
        seed: of the starting points.
        teacher: what the samples shall come close to; `CONVERGED` unless given.
        robust: below this many data standard deviations per dimension the loss is quadratic in the error, above it
            grows as the root.
        batch_size: points at a time; by default 2^12 numbers' worth, 64 to 512.
        minutes: cut the iterations so that fitting takes about so long, for large networks; the converged solution comes
            before. The machine's speed then decides how many there are; None gives the same table everywhere.
        pairs: what `converged_pairs` returned, which serves every number of calls; samples, seed, teacher, robust and
            batch_size are its own then.
        earlier: a table of as many calls to be held against the others, and returned where it validates best.
        progress: show bars.

    Raises:
        ValueError: an option is unknown or not positive, the SDE cannot be used, or the earlier table does not fit.
    """
    check(steps, method=method, iterations=iterations, starts=starts, minutes=minutes)
    known, late = untuned(model.sde, steps), begun_late(model.sde, steps)
    fit, validation = pairs or converged_pairs(
        model, samples=samples, seed=seed, teacher=teacher, robust=robust, batch_size=batch_size, progress=progress
    )
    losses = _losses(known | late, validation, progress)
    best, *_ = promising = sorted(late, key=losses.__getitem__)
    if method == "grid":
        with tqdm(total=iterations, desc="tuning", disable=not progress) as bar:
            tuned = {f"tuned from {best}": _fit_grid(
                fit, late[best], RULES[_rule(best)], iterations, bar, minutes)}  # fmt: skip
    else:
        if minutes is not None:
            iterations = min(iterations, _affordable(fit, late[best], minutes, starts))
        ranked = {name: late[name] for name in promising[: (starts + 1) // 2]}
        tables = ranked | _random(Span.of(model.sde), int(steps), starts // 2, seed)
        tuned = _halving(fit, validation, tables, iterations, seed, progress)
    if earlier is not None:
        if len(earlier.weights) != steps:
            raise ValueError(
                f"the earlier table is of {len(earlier.weights)} calls, and a table of {steps} is asked for"
            )
        TunedSampler(earlier).check(model.sde)
        tuned[EARLIER] = earlier
    return _chosen(known, late | tuned, losses | _losses(tuned, validation), method)


def check(
    steps: int, *, method: str = "coefficients", iterations: int = 1, starts: int = 1, minutes: float | None = None
) -> None:
    """Refuses, with ValueError, options of `tune` that do not lead to a table, before anything is computed."""
    one_of("method", method, METHODS)
    for name, value in (("steps", steps), ("iterations", iterations), ("starts", starts)):
        whole(name, value)
    if minutes is not None:  # for as long as it takes
        number("minutes", minutes, above=0)


def converged_pairs(
    model: ScoreModel, *, samples: int | None = None, seed: int = 0, teacher: Samples | None = None,
    robust: float = 0.07, batch_size: int | None = None, progress: bool = True,
) -> tuple[Pairs, Pairs]:  # fmt: skip
    """Starting points and the teacher's endpoints, to fit on and to validate; arguments as `tune` has them.

    Raises:
        ValueError: an option is not positive.
    """
    dimension = math.prod(model.event_shape)
    samples = min(max(2**16 // dimension, 1024), 2**14) if samples is None else samples
    batch_size = min(max(2**12 // dimension, 64), 512) if batch_size is None else batch_size
    samples, batch_size = whole("samples", samples), whole("batch_size", batch_size)
    robust = number("robust", robust, above=0)
    source = generator(seed, "tune")
    noise = torch.randn(samples + (samples + 1) // 2, *model.event_shape, generator=source)
    x = model.start(noise.to(model.device))
    teacher, parts = teacher or CONVERGED, x.split(1024)
    bar = tqdm(parts, desc="converged solution", disable=not progress, delay=2)
    y = torch.cat([teacher.sample(model, part.shape, x_init=part).x for part in bar])
    unit = (y - y.mean(0)).square().mean().sqrt().item() or 1.0
    fit, validation = (Pairs(model, x[part], y[part], unit, robust, batch_size)
                       for part in (slice(samples), slice(samples, None)))  # fmt: skip
    return fit, validation


def _losses(tables: dict[str, TunedTable], pairs: Pairs, progress: bool = False) -> dict[str, float]:
    bar = tqdm(tables.items(), desc="untuned solvers", disable=not progress, delay=2)
    return {name: pairs.loss(table) for name, table in bar}


def _chosen(
    known: dict[str, TunedTable], others: dict[str, TunedTable], losses: dict[str, float], method: str
) -> TunedTable:
    """The table with the least loss, all losses in its record, and the best of the untuned solvers named."""
    chosen, best = (min(names, key=losses.__getitem__) for names in (losses, losses.keys() & known))
    return replace((known | others)[chosen], record={
        "method": method, "chosen": chosen, "best untuned": best, "validation": losses})  # fmt: skip


def _rule(name: str) -> str:
    return name.partition(" on ")[0]


def _affordable(fit: Pairs, table: TunedTable, minutes: float, starts: int) -> int:
    """Iterations of the full fit for which it and the candidates' take this long; 50 at the least."""
    z, part = Span.of(fit.model.sde).vector(table).numpy(), fit.draw(torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(3):
        clock = time.perf_counter()
        part.loss_and_gradient(z, Span.of(fit.model.sde), len(table.weights))
        seconds.append(time.perf_counter() - clock)
    # `_halving` spends starts / 20 + 9 / 20 of a full fit on its short ones, on half batches.
    return max(50, int(60 * minutes / min(seconds) / (1 + (starts + 9) / 20)))


def _halving(
    fit: Pairs, validation: Pairs, tables: dict[str, TunedTable], iterations: int, seed: int, progress: bool
) -> dict[str, TunedTable]:
    """Many short fits on half batches, longer ones from the best three, the full one from the best."""
    small = replace(fit, batch_size=max(1, fit.batch_size // 2))
    quick, few = max(1, iterations // 10), replace(validation, x=validation.x[:2048], y=validation.y[:2048])
    with tqdm(total=len(tables) * quick + 3 * (3 * quick) + iterations, desc="tuning", disable=not progress) as bar:
        for keep, pairs, length, rate in ((3, small, quick, 0.05), (1, small, 3 * quick, 0.03)):
            tables = {name: _fit(pairs, table, length, rate, seed, bar) for name, table in tables.items()}
            found = _losses(tables, few)
            tables = {name: tables[name] for name in sorted(found, key=found.__getitem__)[:keep]}
        return {f"tuned from {name}": _fit(fit, table, iterations, 0.03, seed, bar) for name, table in tables.items()}


def _random(span: Span, calls: int, count: int, seed: int) -> dict[str, TunedTable]:
    """Levels at random where most of the change happens, with second-order rules."""
    generator, tables = torch.Generator().manual_seed(seed), {}
    low, high = max(span.first, -2.0), min(span.last, 3.0)
    for k in range(count):
        levels = low + (high - low) * torch.rand(calls, generator=generator, dtype=torch.float64)
        rule = ("velocity Adams 2", "exponential Adams 2")[k % 2]
        table = RULES[rule](span.inside(levels.sort().values))
        tables[f"{rule} on random levels {k + 1}"] = replace(table, start=span.first)
    return tables


def _fit(pairs: Pairs, start: TunedTable, iterations: int, rate: float, seed: int, bar: tqdm) -> TunedTable:
    """Adam with a cosine schedule on fresh batches; returned is the mean over the last third of the way."""
    span, calls = Span.of(pairs.model.sde), len(start.weights)
    generator = torch.Generator().manual_seed(seed + 1)
    z = span.vector(start).requires_grad_()
    optimizer, total, count = torch.optim.Adam([z], lr=rate, betas=(0.9, 0.99)), torch.zeros_like(z), 0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _warm_cosine(i, iterations))
    for i in range(iterations):
        with torch.enable_grad():
            gradient = torch.autograd.grad(pairs.draw(generator).error(*span.split(z, calls)), z)[0]
        # A batch that diverged says nothing; a large gradient, little more than its direction.
        finite = gradient.isfinite().all()
        z.grad = torch.where(finite, gradient / gradient.norm().clamp_min(1.0), 0.0)
        optimizer.step()
        schedule.step()
        if 3 * i >= 2 * (iterations - 1):
            total, count = total + z.detach(), count + 1
        bar.update()
    return span.table(total / count, calls)


def _warm_cosine(i: int, iterations: int) -> float:
    return min(1.0, (i + 1) / 20) * (1 + math.cos(math.pi * i / iterations)) / 2


def tune_spectrum(
    eigenvalues: Tensor | Sequence[float], steps: int, *, sde: SDE | None = None, method: str = "grid",
    iterations: int = 400, progress: bool = True,
) -> TunedTable:  # fmt: skip
    """A table that is good for Gaussian data with this covariance spectrum: no network, no samples, seconds.

    Along an eigenvector of variance v the denoiser is D = alpha v / (alpha^2 v + sigma^2) x, so a table multiplies a
    start of variance alpha^2 v + sigma^2 by a number. The sum of (std - sqrt v)^2 over the spectrum is minimised, the
    squared Wasserstein distance between the law of the samples and that of the data.

    Args:
        eigenvalues: of the data's covariance, positive, shape (D,).
        steps: network calls of a sample.
        sde: `VPSDE()` if left out.
        method: "grid" fits the levels under Adams on the rectified path, which carries over to data that are not
            Gaussian (on Gaussian data an untuned solver of another rule may be nearer); "coefficients" all numbers, far
            better on Gaussian data and often far worse on others.
        iterations: at most so many of the optimiser.
        progress: show a bar.

    Raises:
        ValueError: an eigenvalue is not positive and finite, the method is unknown, or the SDE cannot be used.
    """
    variances = torch.as_tensor(eigenvalues, dtype=torch.float64).flatten()
    if len(variances) == 0 or not ((variances > 0) & (variances < math.inf)).all():
        raise ValueError("eigenvalues of a covariance are positive and finite; drop those that are 0")
    check(steps, method=method, iterations=iterations)
    model = _GaussianScore(variances, sde or VPSDE())
    x, y = model.start(torch.ones_like(variances)).unsqueeze(0), variances.sqrt().unsqueeze(0)
    pairs = _Spectrum(model, x, y, unit=y.square().mean().sqrt().item(), robust=1e-6, batch_size=1)
    known, late = untuned(model.sde, steps), begun_late(model.sde, steps)
    losses = _losses(known | late, pairs)
    # Adams on the rectified path is not always the best, but its neighbourhood has the best tables more often than not.
    starts = {name: tables[name] for tables in (late, known) for rule in RULES if rule.startswith("velocity")
              for name in [min((n for n in tables if _rule(n) == rule), key=losses.__getitem__)]}  # fmt: skip
    with tqdm(total=iterations * len(starts), desc="tuning", disable=not progress, delay=2) as bar:
        tuned = {f"tuned from {name}": _fit_grid(pairs, table, RULES[_rule(name)], iterations, bar)
                 if method == "grid" else _fit_exactly(pairs, table, iterations, bar)
                 for name, table in starts.items()}  # fmt: skip
    rivals = losses if method == "coefficients" else {name: losses[name] for name in starts}
    distances = {name: math.exp(loss) for name, loss in (rivals | _losses(tuned, pairs)).items()}
    return _chosen(known, late | tuned, distances, f"spectrum, {method}")


class _Spectrum(Pairs):
    """log W2 in the data's standard deviations, which is as steep at a small distance as at a large one."""

    def error(self, half_log_snr: Tensor, weights: Tensor, noise: Tensor) -> Tensor:
        miss = (endpoints(self.model, self.x, half_log_snr, weights, noise) - self.y) / self.unit
        return (miss.square().mean() + self.robust**2).log() / 2


class _GaussianScore(ScoreModel):
    """The exact model of N(0, diag v); states are standard deviations in the eigenbasis."""

    def __init__(self, variances: Tensor, sde: SDE) -> None:
        self.variances, self.sde, self.event_shape = variances, sde, tuple(variances.shape)

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        alpha, sigma = self.sde.alpha(as_time(t)), self.sde.sigma(as_time(t))
        return Prediction(x, alpha * self.variances / (alpha**2 * self.variances + sigma**2) * x, alpha, sigma)

    def start(self, z: Tensor) -> Tensor:
        alpha, sigma = self.sde.alpha(self.sde.t_max), self.sde.sigma(self.sde.t_max)
        return (alpha**2 * self.variances + sigma**2).sqrt() * z


def _fit_exactly(pairs: Pairs, start: TunedTable, iterations: int, bar: tqdm) -> TunedTable:
    """BFGS: some dozens of unknowns, a deterministic loss."""
    span, calls = Span.of(pairs.model.sde), len(start.weights)
    objective = partial(pairs.loss_and_gradient, span=span, calls=calls)
    result = minimize(objective, span.vector(start).numpy(), jac=True, method="BFGS", callback=_show(bar),
                      options={"maxiter": iterations, "gtol": 1e-7})  # fmt: skip
    return span.table(torch.from_numpy(result.x), calls)


def _fit_grid(
    pairs: Pairs, start: TunedTable, rule: Callable[[Tensor], TunedTable], iterations: int, bar: tqdm,
    minutes: float | None = None,
) -> TunedTable:  # fmt: skip
    """Nelder-Mead over the levels, from its first simplex on for so many minutes at most."""
    span, whole = Span.of(pairs.model.sde), replace(pairs, batch_size=1024)

    def table(z: np.ndarray) -> TunedTable:
        return replace(rule(span.inside(span.levels(torch.from_numpy(z)))), start=span.first)

    gaps = span.vector(start)[: len(start.weights) + 1].numpy()
    simplex = gaps + 0.5 * np.eye(len(gaps) + 1, len(gaps), -1)
    result = minimize(lambda z: whole.loss(table(z)), gaps, method="Nelder-Mead", callback=_show(bar, minutes),
                      options={"maxiter": iterations, "initial_simplex": simplex})  # fmt: skip
    return table(result.x)


def _show(bar: tqdm, minutes: float | None = None) -> Callable[[Any], None]:
    """What scipy calls after each iteration; it ends the search when its time is over."""
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def callback(intermediate_result: Any) -> None:
        bar.set_postfix(loss=f"{intermediate_result.fun:.4g}", refresh=False)
        bar.update()
        if time.monotonic() > end:
            raise StopIteration

    return callback

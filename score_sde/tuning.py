r"""Tuned solvers: a sampler is a table of scalars, so fit it.

Every deterministic solver that is linear in x and in the denoiser outputs and carries a point mass exactly is

    x_{i+1} = r_i x_i + (alpha_{i+1} - r_i alpha_i) sum_{k <= i} w_ik D_k,  r_i = sigma_{i+1} / sigma_i, sum_k w_ik = 1:

a move straight towards an affine combination of all clean estimates so far, which it reaches at sigma_N = 0. Free are
the noise levels of the calls and the weights w; DDIM, DPM-Solver++ and Adams in the velocity are such tables. `tune`
fits the best of them, by gradients through the sampler, to the converged probability-flow ODE from the same starting
points; `tune_spectrum` needs no model, only a covariance spectrum.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from tqdm import tqdm

from score_sde import grid as grids
from score_sde.ode import ProbabilityFlowODE
from score_sde.prediction import Prediction
from score_sde.sampler import Sampler, SampleResult
from score_sde.score import ScoreModel
from score_sde.sde import SDE, VPSDE, Time, as_time, derivative
from score_sde.steps.linear import Coefficients, LinearRow, LinearStep
from score_sde.steps.multistep import lagrange, quadrature

METHODS = ("coefficients", "grid")


# --- the table and its sampler ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TunedTable:
    """A solver as numbers; it serves every SDE whose noise levels reach its own.

    Attributes:
        half_log_snr: lambda = log(alpha / sigma) of each call, increasing, shape (N,); sampling starts at the first.
        weights: w, lower triangular with rows that sum to 1, shape (N, N); row i weighs D_0 ... D_i.
        record: how it came about: the method, and the validation loss of every candidate.

    Raises:
        ValueError: shapes do not fit, levels do not increase, or a row does not sum to 1.
    """

    half_log_snr: Tensor
    weights: Tensor
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        calls = len(self.half_log_snr)
        if self.half_log_snr.ndim != 1 or calls < 1 or self.weights.shape != (calls, calls):
            raise ValueError("a table has levels of shape (N,) and weights of shape (N, N), N >= 1; "
                             f"got {tuple(self.half_log_snr.shape)} and {tuple(self.weights.shape)}")  # fmt: skip
        if not (self.half_log_snr.diff() > 0).all():
            raise ValueError("a table's half log SNRs increase, from noise to data")
        excess = (self.weights.sum(1) - 1).abs() / self.weights.abs().sum(1)
        if self.weights.triu(1).any() or not (excess < 1e-12).all():
            raise ValueError("a table's weights are lower triangular with rows that sum to 1: else a point mass moves")

    def save(self, path: str | Path) -> None:
        """Writes the table as JSON, its numbers to the last bit."""
        rows = [row[: i + 1] for i, row in enumerate(self.weights.tolist())]
        table = {"half_log_snr": self.half_log_snr.tolist(), "weights": rows, "record": self.record}
        Path(path).write_text(json.dumps(table, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> TunedTable:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is not such a table.
        """
        table = json.loads(Path(path).read_text())
        if not isinstance(table, dict) or table.keys() != {"half_log_snr", "weights", "record"}:
            raise ValueError(f"{path} is not a table of scripts/tune.py: that has half_log_snr, weights and record")
        calls = len(table["half_log_snr"])
        rows = [row + [0.0] * (calls - len(row)) for row in table["weights"]]
        return cls(torch.tensor(table["half_log_snr"], dtype=torch.float64),
                   torch.tensor(rows, dtype=torch.float64), table["record"])  # fmt: skip


class _Straight(LinearStep):
    """The rows of a table; the last, on the way to t_min, ends at the clean estimate itself."""

    def __init__(self, table: TunedTable) -> None:
        self.table, self.memory = table, len(table.weights)

    def plan(self, sde: SDE, t: Tensor, s: Tensor) -> list[LinearRow]:
        a, b = _straight(sde, t)
        rows = (b.unsqueeze(1) * self.table.weights).tolist()
        return [LinearRow(time, scale, tuple(row[i::-1]), 0.0)
                for i, (time, scale, row) in enumerate(zip(t.tolist(), a.tolist(), rows, strict=True))]  # fmt: skip

    def coefficients(self, sde: SDE, times: Tensor, s: Tensor) -> Coefficients:
        raise NotImplementedError("a table's rows are numbers, not functions of time: see `plan`")


def _straight(sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
    """r_i = sigma_{i+1} / sigma_i and alpha_{i+1} - r_i alpha_i at calls t; (alpha, sigma) = (1, 0) after the last."""
    alpha = torch.cat([sde.alpha(t), t.new_ones(1)])
    sigma = torch.cat([sde.sigma(t), t.new_zeros(1)])
    a = sigma[1:] / sigma[:-1]
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
        super().__init__(_Straight(self.table), self._times, final="none")

    def _times(self, sde: SDE) -> Tensor:
        """The times of the calls, and t_min in the place of the end.

        Raises:
            ValueError: the table starts at another noise level than the SDE, or goes below its t_min.
        """
        first, last = (float(sde.half_log_snr(t)) for t in (sde.t_max, sde.t_min))
        own = self.table.half_log_snr
        if abs(own[0].item() - first) > 1e-3 or own[-1].item() >= last:
            raise ValueError(f"this table's calls lie at half log SNR {own[0].item():.4g} to {own[-1].item():.4g}, "
                             f"{sde!r} is sampled from {first:.4g} to {last:.4g}: tune one for it")  # fmt: skip
        return torch.cat([own.new_tensor([sde.t_max]), sde.time_at(own[1:]), own.new_tensor([sde.t_min])])


# --- untuned solvers as tables ----------------------------------------------------------------------------------------


def exponential_weights(half_log_snr: Tensor, order: int) -> Tensor:
    """Exponential Adams (DDIM, multistep DPM-Solver++): D extrapolated in lambda; at the end, D itself."""
    weights = torch.zeros(len(half_log_snr), len(half_log_snr), dtype=torch.float64)
    for i, h in enumerate(half_log_snr.diff()):
        nodes = half_log_snr[: i + 1].flip(0)[:order]
        fractions, gauss = quadrature(h)
        kernel = gauss * (-h * fractions).exp()
        for k, basis in enumerate(lagrange(nodes, half_log_snr[i + 1] - h * fractions)):
            weights[i, i - k] = (kernel * basis).sum() / kernel.sum()
    return _closed(weights)


def velocity_weights(half_log_snr: Tensor, order: int) -> Tensor:
    """Adams-Bashforth on the rectified path, x = (1 - t) x_0 + t eps: the velocity extrapolated in t, down to t = 0.

    With x_k = t_k / t_0 x_0 + sum_j P_kj D_j and v_k = (x_k - D_k) / t_k the rows P follow the solver, and
    (1 - r_i) w_i = P_{i+1} - r_i P_i, r_i = t_{i+1} / t_i.
    """
    t = torch.cat([torch.sigmoid(-half_log_snr), half_log_snr.new_zeros(1)])
    unit, P = torch.eye(len(half_log_snr), dtype=torch.float64), [torch.zeros_like(half_log_snr)]
    for i, h in enumerate(t.diff()):
        nodes = t[: i + 1].flip(0)[:order]
        fractions, gauss = quadrature(h)
        shares = [h * (gauss * basis).sum() for basis in lagrange(nodes, t[i] + h * fractions)]
        P.append(P[i] + sum(share * (P[i - k] - unit[i - k]) / t[i - k] for k, share in enumerate(shares)))
    r = (t[1:] / t[:-1]).unsqueeze(1)
    return _closed((torch.stack(P[1:]) - r * torch.stack(P[:-1])) / (1 - r))


def _closed(weights: Tensor) -> Tensor:
    """The strictly lower triangle of `weights`, and on the diagonal what makes each row sum to 1."""
    past = weights.tril(-1)
    return past + torch.diag(1 - past.sum(1))


def _rectified(sde: SDE, steps: int) -> Tensor:
    """Half log SNRs of `steps` calls at equal distances in sigma / (alpha + sigma), on the way to 0."""
    first, last = (torch.sigmoid(-sde.half_log_snr(as_time(t))).item() for t in (sde.t_max, sde.t_min))
    return -torch.logit(torch.linspace(first, max(first / steps, last), steps, dtype=torch.float64))


def _of_time(grid: Callable[..., Tensor], sde: SDE, steps: int) -> Tensor:
    """Half log SNRs of `steps` calls on a grid of times, which ends at t_min."""
    times = grid(sde, steps=steps - 1) if steps > 1 else torch.tensor([sde.t_max], dtype=torch.float64)
    return sde.half_log_snr(times)


RULES: dict[str, Callable[[Tensor], Tensor]] = {
    **{f"exponential Adams {k}": partial(exponential_weights, order=k) for k in (1, 2, 3)},
    **{f"velocity Adams {k}": partial(velocity_weights, order=k) for k in (2, 3)},
}
GRIDS: dict[str, Callable[[SDE, int], Tensor]] = {
    "rectified": _rectified,
    **{f.__name__: partial(_of_time, f) for f in (grids.log_snr, grids.karras, grids.uniform, grids.quadratic)},
}
STRAIGHT = {f"{rule} on rectified" for rule in RULES if rule.startswith("velocity")}


def untuned(sde: SDE, steps: int) -> dict[str, TunedTable]:
    """Every untuned solver with `steps` network calls, by the name "<rule> on <grid>" (`RULES`, `GRIDS`)."""
    if isinstance(steps, bool) or int(steps) != steps or steps < 1:
        raise ValueError(f"a solver makes a whole number steps >= 1 of network calls, got steps={steps}")
    span = Span.of(sde)
    levels = {name: span.inside(grid(sde, int(steps))) for name, grid in GRIDS.items()}
    return {f"{rule} on {grid}": TunedTable(at, RULES[rule](at)) for rule in RULES for grid, at in levels.items()}


# --- fitting ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """The half log SNRs at t_max and t_min, and tables between them as unconstrained vectors.

    z = (log gaps, one more than calls after the first, up to a constant; the strictly lower triangle of the weights).
    """

    first: float
    last: float

    @classmethod
    def of(cls, sde: SDE) -> Span:
        sde.check()
        return cls(float(sde.half_log_snr(sde.t_max)), float(sde.half_log_snr(sde.t_min)))

    def inside(self, half_log_snr: Tensor) -> Tensor:
        """Levels that start at `first` and, at least a thousandth of a unit apart, end before `last`."""
        gaps = torch.cat([half_log_snr, half_log_snr.new_tensor([self.last])]).diff()
        return self.levels(gaps.clamp_min(1e-3).log())

    def levels(self, log_gaps: Tensor) -> Tensor:
        gaps = (self.last - self.first) * log_gaps.softmax(0)
        return torch.cat([gaps.new_tensor([self.first]), self.first + gaps[:-1].cumsum(0)])

    def vector(self, table: TunedTable) -> Tensor:
        """Gaps are at least a fiftieth of the mean here: the softmax would hardly open a closed one again."""
        gaps = torch.cat([table.half_log_snr, torch.tensor([self.last], dtype=torch.float64)]).diff()
        return torch.cat([gaps.clamp_min(gaps.mean() / 50).log(), table.weights[_below(len(gaps))]])

    def split(self, z: Tensor, calls: int) -> tuple[Tensor, Tensor]:
        past = z.new_zeros(calls, calls).index_put(_below(calls), z[calls:])
        return self.levels(z[:calls]), _closed(past)


def _below(calls: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(calls, calls, -1)
    return rows, columns


def endpoints(model: ScoreModel, x: Tensor, half_log_snr: Tensor, weights: Tensor) -> Tensor:
    """What the table makes of starting points x, differentiable in its levels and weights."""
    t = _time_at(model.sde, half_log_snr)
    a, b = (part.to(x) for part in _straight(model.sde, t))
    weights, outputs = weights.to(x), []
    for i in range(len(t)):
        outputs.append(model(x, t[i] if t.requires_grad else t[i].item()).denoised)
        clean = torch.einsum("k,k...->...", weights[i, : i + 1], torch.stack(outputs))
        x = a[i] * x + b[i] * clean if i + 1 < len(t) else clean
    return x


def _time_at(sde: SDE, half_log_snr: Tensor) -> Tensor:
    """`sde.time_at` with the derivative of the inverse function, dt / dlambda = 1 / (dlambda / dt)."""
    fixed = half_log_snr.detach()
    t = sde.time_at(fixed)
    return t if not half_log_snr.requires_grad else t + (half_log_snr - fixed) / derivative(sde.half_log_snr, t)


@dataclass(frozen=True)
class Pairs:
    """Starting points, where the converged ODE takes them, and the robust distance of a table's endpoints from there.

    loss = mean sqrt(|x - y|^2 / d + c^2) - c in `unit`s, the data's standard deviation: quadratic below c = `robust`,
    linear above, because some starts lie so close to a boundary between modes that few calls cannot tell their side.
    """

    model: ScoreModel
    x: Tensor
    y: Tensor
    unit: float
    robust: float
    batch_size: int

    def error(self, half_log_snr: Tensor, weights: Tensor) -> Tensor:
        miss = (endpoints(self.model, self.x, half_log_snr, weights) - self.y).flatten(1) / self.unit
        return ((miss.square().mean(1) + self.robust**2).sqrt() - self.robust).mean()

    def batches(self) -> Iterator[tuple[float, Pairs]]:
        for x, y in zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True):
            yield len(x) / len(self.x), replace(self, x=x, y=y)

    @torch.no_grad()
    def loss(self, table: TunedTable) -> float:
        value = sum(share * part.error(table.half_log_snr, table.weights).item() for share, part in self.batches())
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
    model: ScoreModel, steps: int, *, method: str = "coefficients", samples: int = 4096, iterations: int = 400,
    seed: int = 0, teacher: Samples | None = None, robust: float = 0.1, batch_size: int = 1024, progress: bool = True,
) -> TunedTable:  # fmt: skip
    """The best table found for this model and this number of network calls.

    Starting points are drawn from the prior, `samples` to fit on and as many, which the fit does not see, to validate.
    The untuned solvers that validate best are fitted, and what then validates best is returned: never a worse solver
    than the best untuned one.

    Args:
        model: exact or learned; its gradient with respect to x is needed for "coefficients".
        steps: network calls of a sample.
        method: "coefficients" fits levels and weights (BFGS, gradients through the sampler); "grid" the levels alone,
            without derivatives (Nelder-Mead), the weights following the rule of the best untuned solver.
        samples: starting points to fit on, and as many to validate.
        iterations: at most so many of the optimiser.
        seed: of the starting points.
        teacher: what the samples shall come close to; by default the probability-flow ODE at tolerance 1e-5, denoised.
        robust: errors per dimension beyond this many data standard deviations count linearly, not squared.
        batch_size: points at a time.
        progress: show a bar.

    Raises:
        ValueError: an option is unknown or not positive, or the SDE cannot be used.
    """
    if method not in METHODS:
        raise ValueError(f"method is one of {', '.join(METHODS)}; got {method!r}")
    if min(samples, iterations, batch_size) < 1 or not robust > 0:
        raise ValueError("samples, iterations, batch_size and robust are positive, "
                         f"got {samples=}, {iterations=}, {batch_size=}, {robust=}")  # fmt: skip
    candidates = untuned(model.sde, steps)
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(2 * samples, *model.event_shape, generator=generator).to(model.device)
    x = model.start(z)
    y = (teacher or ProbabilityFlowODE(final="denoise")).sample(model, x.shape, x_init=x).x
    unit = (y - y.mean(0)).square().mean().sqrt().item()
    fit, validation = (Pairs(model, x[part], y[part], unit, robust, batch_size)
                       for part in (slice(samples), slice(samples, None)))  # fmt: skip
    return _best(candidates, fit, validation, method, iterations, progress)


def tune_spectrum(
    eigenvalues: Tensor | Sequence[float], steps: int, *, sde: SDE | None = None, iterations: int = 400,
    progress: bool = True,
) -> TunedTable:  # fmt: skip
    """The table that is best for Gaussian data with this covariance spectrum: no network, no samples, seconds.

    Along an eigenvector of variance v the denoiser is D = alpha v / (alpha^2 v + sigma^2) x, so a table multiplies a
    start of variance alpha^2 v + sigma^2 by a number. The sum of (std - sqrt v)^2 over the spectrum is minimised, the
    squared Wasserstein distance between the law of the samples and that of the data.

    Args:
        eigenvalues: of the data's covariance, positive, shape (D,).
        steps: network calls of a sample.
        sde: `VPSDE()` if left out.
        iterations: at most so many of the optimiser.
        progress: show a bar.

    Raises:
        ValueError: an eigenvalue is not positive and finite, or the SDE cannot be used.
    """
    variances = torch.as_tensor(eigenvalues, dtype=torch.float64).flatten()
    if len(variances) == 0 or not ((variances > 0) & (variances < math.inf)).all():
        raise ValueError("eigenvalues of a covariance are positive and finite; drop those that are 0")
    model = _GaussianScore(variances, sde or VPSDE())
    x, y = model.start(torch.ones_like(variances)).unsqueeze(0), variances.sqrt().unsqueeze(0)
    pairs = Pairs(model, x, y, unit=y.square().mean().sqrt().item(), robust=1.0, batch_size=1)
    return _best(untuned(model.sde, steps), pairs, pairs, "coefficients", iterations, progress)


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


def _best(
    candidates: dict[str, TunedTable], fit: Pairs, validation: Pairs, method: str, iterations: int, progress: bool
) -> TunedTable:
    """Fits the most promising candidates; of these and all untuned, the one that validates best, losses recorded."""
    losses = {name: validation.loss(table) for name, table in candidates.items()}
    best = min(losses, key=losses.__getitem__)
    # Adams on the rectified path is not always the best, but its neighbourhood has the best tables more often than not.
    straight = min((name for name in candidates if name in STRAIGHT), key=losses.__getitem__)
    starts = [best] if method == "grid" else list(dict.fromkeys([best, straight]))
    with tqdm(total=iterations * len(starts), desc="tuning", disable=not progress) as bar:
        for name in starts:
            rule = RULES[name.partition(" on ")[0]]
            tuned = _fit_grid(fit, candidates[name], rule, iterations, bar) if method == "grid" else (
                _fit(fit, candidates[name], iterations, bar))  # fmt: skip
            candidates = candidates | {f"tuned from {name}": tuned}
            losses[f"tuned from {name}"] = validation.loss(tuned)
            bar.update((starts.index(name) + 1) * iterations - bar.n)
    chosen = min(losses, key=losses.__getitem__)
    record = {"method": method, "chosen": chosen, "best untuned": best, "validation": losses}
    return replace(candidates[chosen], record=record)


def _fit(pairs: Pairs, start: TunedTable, iterations: int, bar: tqdm) -> TunedTable:
    """BFGS over levels and weights: some dozens of unknowns, a deterministic loss."""
    span, calls = Span.of(pairs.model.sde), len(start.weights)
    objective = partial(pairs.loss_and_gradient, span=span, calls=calls)
    result = minimize(objective, span.vector(start).numpy(), jac=True, method="BFGS", callback=_show(bar),
                      options={"maxiter": iterations, "gtol": 1e-7})  # fmt: skip
    return TunedTable(*span.split(torch.from_numpy(result.x), calls))


def _fit_grid(
    pairs: Pairs, start: TunedTable, rule: Callable[[Tensor], Tensor], iterations: int, bar: tqdm
) -> TunedTable:
    """Nelder-Mead over the levels."""
    span = Span.of(pairs.model.sde)

    def table(z: np.ndarray) -> TunedTable:
        levels = span.inside(span.levels(torch.from_numpy(z)))
        return TunedTable(levels, rule(levels))

    gaps = span.vector(start)[: len(start.weights)].numpy()
    simplex = gaps + 0.5 * np.eye(len(gaps) + 1, len(gaps), -1)
    result = minimize(lambda z: pairs.loss(table(z)), gaps, method="Nelder-Mead", callback=_show(bar),
                      options={"maxiter": iterations, "initial_simplex": simplex})  # fmt: skip
    return table(result.x)


def _show(bar: tqdm) -> Callable[[Any], None]:
    def callback(intermediate_result: Any) -> None:
        bar.set_postfix(loss=f"{intermediate_result.fun:.4g}", refresh=False)
        bar.update()

    return callback

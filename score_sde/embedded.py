"""Embedded pairs, and the integration of ODEs in which each sample has its own time, step size and error control.

A sample that arrives is replaced by a waiting one, so that samples do not affect each other and calls stay full.
Source: Hairer, Norsett & Wanner 1993, sections II.4 and II.5, for the pairs and the step-size rule.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from score_sde.copies import Copies
from score_sde.progress import tqdm
from score_sde.sde import expand

Level = tuple[Tensor, ...]
"""What a field needs to know about its times: tensors of shape (samples, ...)."""


class Field(Protocol):
    """The right-hand side of dy/du = field(y, u), with each sample at its own u."""

    def levels(self, u: Tensor) -> Level:
        """What depends only on time, for float64 times of shape (samples,); called once for all stages of a step."""

    def __call__(self, y: Tensor, level: Level, ids: Tensor) -> Tensor:
        """dy/du for y of shape (samples, *event); ids (samples,) are their places in the batch."""


@dataclass(frozen=True)
class Attempt:
    """A step from y to `end` that is not yet accepted.

    Attributes:
        end: the state at the step's end.
        slope: the field there, which is the next step's first stage.
        error: the estimate of the local error.
        stages: the field's values, the first at the step's start.
    """

    end: Tensor
    slope: Tensor
    error: Tensor
    stages: Sequence[Tensor]


class Pair(ABC):
    """An embedded pair of one-step methods whose last stage is the next step's first.

    Attributes:
        order: of the solution that is kept; the error estimate falls as h^order.
        calls: field evaluations per step.
        longest: upper bound of a step, whatever its error estimate.
    """

    order: int
    calls: int
    longest: float = math.inf

    @abstractmethod
    def attempt(self, field: Field, y: Tensor, slope: Tensor, u: Tensor, v: Tensor, ids: Tensor) -> Attempt:
        """A step from y (samples, *event) at u to v, both float64 of shape (samples,); slope is the field at (y, u)."""

    @abstractmethod
    def interpolate(self, y: Tensor, stages: Sequence[Tensor], h: Tensor, theta: Tensor) -> Tensor:
        """The solution at u + theta h from the stages of an accepted step, all of shape (samples, ...)."""


class RungeKutta(Pair):
    """An explicit pair: k_i = f(y + h sum_j a_ij k_j, u + c_i h), y_1 = y + h sum_j b_j k_j with b the last row of a.

    Args:
        a: the tableau's rows below the diagonal, from the second stage to the last (which is at the step's end); the last
            number of a row is not 0.
        error: b minus the weights of the lower-order solution; the last is not 0.
        dense: (stages, degree), b_i(theta) = sum_j dense[i][j] theta^(j + 1), for y(theta) = y + h sum b_i(theta) k_i.
        order: of y_1.
    """

    def __init__(
        self, a: Sequence[Sequence[float]], error: Sequence[float], dense: Sequence[Sequence[float]], order: int
    ) -> None:
        self.a, self.error, self.dense, self.order, self.calls = a, error, dense, order, len(a)
        c = [round(sum(row), 15) for row in a]
        nodes = sorted(set(c))  # those stages that are at the step's end share the last
        self.level = [nodes.index(node) for node in c]
        self.nodes = Copies(c=torch.tensor(nodes, dtype=torch.float64).unsqueeze(-1))

    def attempt(self, field: Field, y: Tensor, slope: Tensor, u: Tensor, v: Tensor, ids: Tensor) -> Attempt:
        h = v - u
        nodes = torch.addcmul(u, self.nodes.like(u)["c"], h).flatten()
        levels = list(zip(*(part.split(len(u)) for part in field.levels(nodes)), strict=True))
        step, stages, end = expand(h, y), [slope], y
        for row, level in zip(self.a, self.level, strict=True):
            end = torch.addcmul(y, _combined(row, stages), step, value=row[-1])
            stages.append(field(end, levels[level], ids))
        return Attempt(end, stages[-1], step * self.error[-1] * _combined(self.error, stages), stages)

    def interpolate(self, y: Tensor, stages: Sequence[Tensor], h: Tensor, theta: Tensor) -> Tensor:
        for row, stage in zip(self.dense, stages, strict=True):
            weight = torch.zeros_like(theta)
            for coefficient in reversed(row):
                weight = (weight + coefficient) * theta
            y = y + expand(weight * h, y) * stage
        return y


def _combined(weights: Sequence[float], stages: Sequence[Tensor]) -> Tensor:
    """sum_j weights[j] stages[j] / weights[-1], which leaves the last stage without a factor of its own."""
    total = stages[-1]
    for weight, stage in zip(weights[:-1], stages[:-1], strict=True):
        if weight:
            total = torch.add(total, stage, alpha=weight / weights[-1])
    return total


class Exponential(Pair):
    """The exponential pair of orders 4 and 3 for dz/dlambda = D - z, exact where D is a quadratic in lambda.

    z = x / alpha, h = lambda_s - lambda_t, phi_k = phi_k(-h). Five stages at 0, 1/2, 1/2, 1, 1/2. The error estimate is
    the change made by replacing the fourth stage with D at the step's end, which is also the next step's first stage. In
    a long step all stages but the last lie in strong noise, where D is flat and the estimate is small whatever follows:
    so no step is longer than 1 in lambda.
    Source: Hochbruck & Ostermann 2005, https://doi.org/10.1137/040611434, eq. 5.19 (stiff order 4).
    """

    order, calls, longest = 4, 5, 1.0

    def attempt(self, field: Field, y: Tensor, slope: Tensor, u: Tensor, v: Tensor, ids: Tensor) -> Attempt:
        h, half = v - u, (v - u) / 2
        p0, p1, p2, p3 = (expand(p, y) for p in _phi(h))
        q0, q1, q2, q3 = (expand(q, y) for q in _phi(half))
        step = expand(h, y)
        middle, end = zip(*(part.split(len(u)) for part in field.levels(torch.cat([u + half, v]))), strict=True)
        d0, zh, z1 = slope, q0 * y, p0 * y
        d1 = field(zh + step * (q1 / 2 * d0), middle, ids)
        d2 = field(zh + step * ((q1 / 2 - q2) * d0 + q2 * d1), middle, ids)
        d3 = field(z1 + step * ((p1 - 2 * p2) * d0 + p2 * (d1 + d2)), end, ids)
        inner = q2 / 2 - p3 + p2 / 4 - q3 / 2
        last = q2 / 4 - inner
        d4 = field(zh + step * ((q1 / 2 - 2 * inner - last) * d0 + inner * (d1 + d2) + last * d3), middle, ids)
        weight = 4 * p3 - p2
        z = z1 + step * ((p1 - 3 * p2 + 4 * p3) * d0 + (4 * p2 - 8 * p3) * d4 + weight * d3)
        d5 = field(z, end, ids)
        return Attempt(z, d5, step * weight * (d5 - d3), (d0, d4, d3))

    def interpolate(self, y: Tensor, stages: Sequence[Tensor], h: Tensor, theta: Tensor) -> Tensor:
        d0, d1, d2 = stages
        p0, p1, p2, p3 = (expand(p, y) for p in _phi(theta * h))
        theta, step = expand(theta, y), expand(theta * h, y)
        bend = theta * p2 * (4 * d1 - 3 * d0 - d2) + 2 * theta**2 * p3 * (2 * d0 - 4 * d1 + 2 * d2)
        return p0 * y + step * (p1 * d0 + bend)


def _phi(h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """phi_0 to phi_3 at -h: phi_0(z) = e^z, phi_{k+1}(z) = (phi_k(z) - 1 / k!) / z.

    The recursion runs upwards for |h| > 1, and downwards from the Taylor series of phi_3 otherwise: neither cancels.
    """
    small = (-h).clamp(-1, 1)
    series = torch.zeros_like(h)
    for k in range(17, -1, -1):
        series = series * small + 1 / math.factorial(k + 3)
    low2 = small * series + 0.5
    low1 = small * low2 + 1
    large = torch.where(h.abs() > 1, -h, 1.0)
    high1 = torch.expm1(large) / large
    high2 = (high1 - 1) / large
    high3 = (high2 - 0.5) / large
    far = h.abs() > 1
    parts = ((high1, low1), (high2, low2), (high3, series))
    return (-h).exp(), *(torch.where(far, high, low) for high, low in parts)  # type: ignore[return-value]


def _tsit5() -> RungeKutta:
    a = [
        [0.161],
        [-0.008480655492356989, 0.335480655492357],
        [2.8971530571054935, -6.359448489975075, 4.3622954328695815],
        [5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525],
        [5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383],
        [0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774],
    ]
    error = [-0.00178001105222577714, -0.0008164344596567469, 0.007880878010261995, -0.1447110071732629,
             0.5823571654525552, -0.45808210592918697, 1 / 66]  # fmt: skip
    # b_i(theta) = scale (theta - r)(theta - s) theta^2, or for the first stage with two more factors in place of theta.
    scaled = [(0.1017, 2.1966568338249754, 1.2949852507374631),
              (2.490627285651252793, 2.38535645472061657, 1.57803468208092486),
              *((m, v + w, v * w) for m, v, w in (
                  (-16.54810288924490272, 1.21712927295533244, 0.61620406037800089),
                  (47.37952196281928122, 1.203071208372362603, 0.658047292653547382),
                  (-34.87065786149660974, 1.2, 2 / 3), (2.5, 1.0, 0.6)))]  # fmt: skip
    r, p, q, scale = 1.3299890189751412, 1.4364028541716351, 0.7139816917074209, -1.0530884977290216
    first = [-scale * r * q, scale * (q + r * p), -scale * (p + r), scale]
    return RungeKutta(a, error, [first, *([0.0, m * prod, -m * total, m] for m, total, prod in scaled)], order=5)


PAIRS: dict[str, Callable[[], Pair]] = {
    # Bogacki & Shampine 1989, https://doi.org/10.1016/0893-9659(89)90079-7; dense output: the cubic Hermite polynomial.
    "bosh3": lambda: RungeKutta(
        [[1 / 2], [0.0, 3 / 4], [2 / 9, 1 / 3, 4 / 9]], [2 / 9 - 7 / 24, 1 / 12, 1 / 9, -1 / 8],
        [[1, -4 / 3, 5 / 9], [0, 1, -2 / 3], [0, 4 / 3, -8 / 9], [0, -1, 1]], order=3,
    ),
    # Dormand & Prince 1980, https://doi.org/10.1016/0771-050X(80)90013-3; dense output: Shampine 1986, fourth order.
    "dopri5": lambda: RungeKutta(
        [[1 / 5], [3 / 40, 9 / 40], [44 / 45, -56 / 15, 32 / 9],
         [19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729],
         [9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656],
         [35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84]],
        [71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40],
        [[1, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432], [0, 0, 0, 0],
         [0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799],
         [0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072],
         [0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632],
         [0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844],
         [0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423]], order=5,
    ),
    # Tsitouras 2011, https://doi.org/10.1016/j.camwa.2011.06.002, with its fourth-order dense output.
    "tsit5": _tsit5,
    "exponential": Exponential,
}  # fmt: skip

Norm = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(error, y, end, v) -> the error of a step from y to end at v, in units of its tolerance, (samples,); 1 is accepted."""


def power(size: Tensor, exponent: float) -> Tensor:
    """size^exponent by logarithm and exponential, in place: unlike `pow`, bitwise independent of an element's place."""
    return size.log_().mul_(exponent).exp_()


def rms(y: Tensor) -> Tensor:
    """Root mean square over the event dimensions, shape (samples,)."""
    flat = y.flatten(1)
    return torch.linalg.vector_norm(flat, dim=1) / math.sqrt(flat.shape[1])


def mixed_tolerance(rtol: float, atol: float) -> Norm:
    """rms(error) / (atol + rtol max(rms(y), rms(end)))."""

    def norm(error: Tensor, y: Tensor, end: Tensor, v: Tensor) -> Tensor:
        event = tuple(range(1, y.ndim))
        wrong, before, after = (torch.linalg.vector_norm(part, dim=event) for part in (error, y, end))
        return wrong.div_(torch.maximum(before, after).mul_(rtol).add_(atol * math.sqrt(math.prod(y.shape[1:]))))

    return norm


@dataclass(frozen=True)
class Solution:
    """What `integrate` returns.

    Attributes:
        y: the states at u_end, shape (batch, *event).
        calls: field evaluations of each sample, or what `spent` counts, int64 of shape (batch,).
        rejected: rejected steps of each sample, int64 of shape (batch,).
        dense: states at `times`, shape (len(times), batch, *event), if requested.
    """

    y: Tensor
    calls: Tensor
    rejected: Tensor
    dense: Tensor | None


# Steps are about as long as the structure of p_t, so many are rejected: a safety factor of 0.6, shorter steps than with the
# usual 0.9, costs less than the rejections that it saves.
SAFETY, SHRINK, GROW = 0.6, 0.2, 5.0
MAX_CALLS = 30_000
"""Calls for a sample after which an adaptive solver gives up; by default dopri5 takes 130 on the ring of eight Gaussians."""

TOO_ROUGH = "the model's score is too rough or too steep; loosen rtol and atol, or take a solver of fixed steps"


class SolverError(RuntimeError):
    """A solver that chooses its own steps did not come to the end; the message says why."""


def default_block(y: Tensor) -> int:
    """The number of samples to integrate at once: all on a GPU; on a CPU as many as keep the stages in its cache."""
    elements = max(1, math.prod(y.shape[1:]))
    return len(y) if y.device.type != "cpu" else max(64, 2**17 // elements)


def first_step(pair: Pair, u_start: float, u_end: float, tolerance: float) -> float:
    """The length of a first step: the fraction tolerance^(1 / order) of the interval, at most a fifth of it."""
    return abs(u_end - u_start) * min(0.2, tolerance ** (1 / pair.order))


def integrate(
    field: Field, pair: Pair, y: Tensor, u_start: float, u_end: float, norm: Norm, first: float, *,
    times: Tensor | None = None, block: int | None = None, progress: bool = False,
    spent: Callable[[], int] | None = None,
) -> Solution:  # fmt: skip
    """Integrates dy/du = field from u_start to u_end, every sample with its own step sizes.

    After a step h with error `size`, in units of the tolerance, the next is 0.6 h size^(-1 / order), between 0.2 and 5
    times h, shorter after a rejection, and at most `pair.longest`.

    Args:
        field, pair: the right-hand side and the method.
        y: states at u_start, shape (batch, *event).
        norm: the error of a step in units of its tolerance, per sample.
        first: length of the first step, positive.
        times: float64 times between u_start and u_end, in the direction of integration, at which to keep the solution.
        block: number of samples to integrate at once; see `default_block`.
        progress: show a bar.
        spent: returns the cost of all field evaluations so far, where that is not 1 for each.

    Raises:
        SolverError: a step size vanished (the field is not finite or has a jump), or a sample takes over `MAX_CALLS`
            calls.
    """
    run = _Run(field, pair, y, u_start, u_end, norm, first, times, block or default_block(y), spent)
    with tqdm(total=len(y), desc="samples", disable=not progress, delay=1.0, leave=False) as bar:
        while run.waiting or len(run.ids):
            bar.update(run.round())
    return Solution(run.result, run.total_calls, run.total_rejected, run.dense)


class _Run:
    """The state of `integrate`: the samples being integrated, those waiting and those that have arrived."""

    def __init__(
        self, field: Field, pair: Pair, y: Tensor, u_start: float, u_end: float, norm: Norm, first: float,
        times: Tensor | None, block: int, spent: Callable[[], int] | None,
    ) -> None:  # fmt: skip
        self.field, self.pair, self.norm, self.rounds = field, pair, norm, 0
        self.spent = spent or (lambda: pair.calls * self.rounds)
        self.start, self.end, self.sign = u_start, u_end, math.copysign(1.0, u_end - u_start)
        self.reached, self.nearly = torch.ge if u_end > u_start else torch.le, u_end - 1e-9 * (u_end - u_start)
        self.first = self.sign * min(first, abs(u_end - u_start), pair.longest)
        self.result = y.clone()
        self.every = torch.arange(len(y), device=y.device)
        parts, before = self.every.split(block), self.spent()
        self.slopes = torch.cat([self._slope(y[part], part) for part in parts]) if len(y) else y
        self.at_start = (self.spent() - before) // len(parts) if spent else 1
        self.total_calls = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        self.total_rejected = torch.zeros_like(self.total_calls)
        span = (min(u_start, u_end), max(u_start, u_end))
        self.times = None if times is None else self.sign * times.to(y.device, torch.float64).clamp(*span)
        self.dense = None if times is None else y.new_empty((len(times), *y.shape))
        if self.dense is not None and self.times is not None:
            self.dense[self.times <= self.sign * u_start] = y
        self.next = min(block, len(y))
        self.ids = self.every[: self.next]
        self.y, self.slope = y[: self.next], self.slopes[: self.next]
        self.u = torch.full((self.next,), u_start, dtype=torch.float64, device=y.device)
        self.h = torch.full_like(self.u, self.first)
        self.shortest = 1e-13 * max(abs(u_start), abs(u_end))
        self.total_calls[: self.next] = self.at_start - self.spent()  # the rest is added on arrival
        self.rejected = torch.zeros_like(self.ids)

    @property
    def waiting(self) -> int:
        return len(self.every) - self.next

    def _slope(self, y: Tensor, ids: Tensor) -> Tensor:
        u = torch.full((len(ids),), self.start, dtype=torch.float64, device=y.device)
        return self.field(y, self.field.levels(u), ids)

    def round(self) -> int:
        """One attempted step of every sample being integrated; returns how many arrived."""
        v = self.u + self.h
        last = self.reached(v, self.nearly)
        v.masked_fill_(last, self.end)
        attempt = self.pair.attempt(self.field, self.y, self.slope, self.u, v, self.ids)
        size = self.norm(attempt.error, self.y, attempt.end, v)
        good = size <= 1  # False for NaN
        if self.dense is not None:
            self._read(attempt, v, good)
        growth = power(size, -1 / self.pair.order).mul_(SAFETY)  # below SAFETY where rejected
        self.h = (v - self.u).mul_(growth.nan_to_num_(SHRINK).clamp_(SHRINK, GROW))
        if self.pair.longest < math.inf:
            self.h.clamp_(-self.pair.longest, self.pair.longest)
        keep = good.view(-1, *[1] * (self.y.ndim - 1))
        self.y = torch.where(keep, attempt.end, self.y)
        self.slope = torch.where(keep, attempt.slope, self.slope)
        self.u = torch.where(good, v, self.u)
        self.rejected = self.rejected.add(~good)
        self.rounds += 1
        done = last.logical_and_(good)
        arrived = int(done.sum())  # the only wait for the device in a round
        if arrived:
            self._replace(done, arrived)
        if self.rounds % 16 == 0:
            self._refuse_stuck()
        return arrived

    def _replace(self, done: Tensor, arrived: int) -> None:
        """Stores the arrived samples, puts waiting ones in their places and closes the remaining gaps."""
        places = done.nonzero().squeeze(-1)
        ids = self.ids[places]
        self.result[ids] = self.y.index_select(0, places)
        self.total_calls[ids] += self.spent()
        self.total_rejected[ids] = self.rejected[places]
        fresh = min(arrived, self.waiting)
        if fresh:
            begin, self.next = self.next, self.next + fresh
            spot = places[:fresh]
            # Out of place: self.y may be a view of the caller's tensor.
            self.y = self.y.index_copy(0, spot, self.result[begin : self.next])
            self.slope = self.slope.index_copy(0, spot, self.slopes[begin : self.next])
            self.ids = self.ids.index_copy(0, spot, self.every[begin : self.next])
            for column, value in ((self.u, self.start), (self.h, self.first), (self.rejected, 0)):
                column[spot] = value
            self.total_calls[begin : self.next] = self.at_start - self.spent()
        if fresh < arrived:
            done = done.index_fill(0, places[:fresh], False)
            stay = (~done).nonzero().squeeze(-1)
            for name in ("ids", "y", "slope", "u", "h", "rejected"):
                setattr(self, name, getattr(self, name).index_select(0, stay))

    def _read(self, attempt: Attempt, v: Tensor, good: Tensor) -> None:
        """Interpolates the accepted steps at the chosen times that lie in (u, v]."""
        assert self.times is not None
        assert self.dense is not None
        low = torch.searchsorted(self.times, self.sign * self.u, right=True)
        high = torch.searchsorted(self.times, self.sign * v, right=True)
        count = torch.where(good, high - low, 0)
        row = torch.repeat_interleave(torch.arange(len(v), device=v.device), count)
        rank = torch.arange(len(row), device=v.device) - (count.cumsum(0) - count)[row]
        column, h = low[row] + rank, (v - self.u)[row]
        theta = (self.sign * self.times[column] - self.u[row]) / h
        y = self.pair.interpolate(self.y[row], [stage[row] for stage in attempt.stages], h, theta)
        self.dense[column, self.ids[row]] = y

    def _refuse_stuck(self) -> None:
        if len(self.ids) and self.spent() + int(self.total_calls[self.ids].amax()) > MAX_CALLS:
            raise SolverError(f"a sample has not come to its end in {MAX_CALLS:,} calls: {TOO_ROUGH}")
        stuck = self.h.abs() < self.shortest
        if stuck.any():
            place = int(stuck.nonzero()[0])
            way = f"vanished at {self.u[place]:g} on the way from {self.start:g} to {self.end:g}"
            raise SolverError(
                f"the step size of sample {int(self.ids[place])} {way}: the model's output there is not finite or has a jump"
            )

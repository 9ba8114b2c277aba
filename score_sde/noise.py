r"""Sources of standard normal noise, keyed by (step, draw); none touches torch's global generator.

`BatchNoise(seed)` draws a whole batch from one generator: fastest, but sample i depends on the batch it is drawn in.
`SampleNoise(seeds)` gives each sample its own seed and computes its noise as a function of (seed, step, draw, element)
by a counter-based generator (SplitMix64 and Box-Muller): sample i is bitwise the same in any batch.
`BrownianNoise(seeds)` gives each sample its own Brownian path, independent of the grid: more steps refine the same sample.
Sources: Steele, Lea & Flood 2014, https://doi.org/10.1145/2660193.2660195; Salmon et al. 2011 for counter-based use.
"""

from __future__ import annotations

import itertools
import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from score_sde.checks import whole
from score_sde.score import at_least_single

Stream = Callable[[int, int], Tensor]
"""(step, draw) -> standard normal noise of the shape, dtype and device with which the stream was opened."""


class NoiseSource(ABC):
    """Where a sampler's noise comes from: an immutable value, from which every run opens its own stream."""

    def along(self, half_log_snr: Tensor, shares: Sequence[float]) -> NoiseSource:
        """The source of a run on a grid with these half log SNRs (float64, shape (N + 1,)), for a predictor with these
        `Step.shares`; most sources ignore both."""
        return self

    @abstractmethod
    def open(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Stream:
        """The stream of one run, (step, draw) -> noise of the given shape (batch, *event)."""


class BatchNoise(NoiseSource):
    """One generator for the whole batch, read in the order of the calls.

    Args:
        seed: an integer, or None to take one from the operating system; the attribute `seed` holds it.

    Raises:
        ValueError: the seed is not a whole number, or needs more than 64 bits.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = secrets.randbits(63) if seed is None else whole("seed", seed, -math.inf)
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} is beyond the 64 bits of torch's generators: give a smaller seed")

    def open(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Stream:
        generator = torch.Generator(device).manual_seed(self.seed)
        return lambda step, draw: torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device)

    def __repr__(self) -> str:
        return f"BatchNoise({self.seed})"


class SampleNoise(NoiseSource):
    """A seed for each sample; row i of a stream depends only on seeds[i].

    Args:
        seeds: one integer per sample, e.g. `range(64)`.

    Raises:
        TypeError: `seeds` is a single integer.
        ValueError: the seeds are not integers; when opened, their number is not the batch size.
    """

    def __init__(self, seeds: Iterable[int] | Tensor) -> None:
        if isinstance(seeds, int):
            raise TypeError(
                f"SampleNoise takes a seed for each sample, got {seeds}: give range({seeds}), or seed= for one"
            )
        seeds = torch.as_tensor(seeds if isinstance(seeds, Tensor) else list(seeds))
        if seeds.ndim != 1 or (seeds.is_floating_point() and len(seeds)):
            raise ValueError(f"seeds are one integer per sample, got {seeds.dtype} of shape {tuple(seeds.shape)}")
        self.seeds = seeds.to(torch.int64)

    @classmethod
    def of_run(cls, seed: int, samples: Iterable[int] | Tensor) -> SampleNoise:
        """The noise of the samples numbered `samples` in the run `seed` (taken modulo 2^32), in any batch."""
        samples = torch.as_tensor(samples if isinstance(samples, Tensor) else list(samples), dtype=torch.int64)
        seed = whole("seed", seed, -math.inf)
        return cls(samples + (((seed + 2**31) % 2**32 - 2**31) << 32))

    def open(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Stream:
        if len(self.seeds) != shape[0]:
            raise ValueError(f"SampleNoise has {len(self.seeds)} seeds for a batch of {shape[0]}: give one per sample")
        keys, counters = self._words(shape, device)
        real = at_least_single(dtype)

        def stream(step: int, draw: int) -> Tensor:
            radius, angle = _polar(keys + ((step << 20) + draw + 1), counters, real)
            return _joined([radius * angle.cos(), radius.mul_(angle.sin_())], shape).to(dtype)

        return stream

    def _words(self, shape: Sequence[int], device: torch.device | str) -> tuple[Tensor, Tensor]:
        """A word for each sample, (batch, 1), and one for every two elements, (pairs,)."""
        pairs = (math.prod(shape[1:]) + 1) // 2
        words = _mix(self.seeds.to(device)[:, None] * _GOLDEN + _SALT)
        return words, torch.arange(1, pairs + 1, device=device) * _GOLDEN

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.seeds)} seeds)"


class BrownianNoise(SampleNoise):
    r"""A Brownian path W(alpha^2 / sigma^2) for each sample, whose increments are the predictor's noise.

    If D is constant over a move, the reverse SDE ends at

        x_s = (sigma_s / sigma_t) e^{-h} x_t + alpha_s (1 - e^{-2 h}) D + (sigma_s^2 / alpha_s) (W(snr_s) - W(snr_t)),

    h = lambda_s - lambda_t, snr = e^{2 lambda}: its noise is a plain Brownian increment in the clock snr. So a sample of
    many steps refines the sample of few, and differences between grids or steps are pathwise (strong) errors instead of
    differences between two draws. Row i depends only on seeds[i] and the levels. The start and a corrector's noise are
    those of `SampleNoise`; where a grid goes up and down again (churn), each way down has its own path.

    W is found by halving [-32, 32] in lambda, each midpoint drawn given the ends (a Brownian bridge), and at last the level
    itself in an interval that holds no other level of the way: 0.002 wide, or less where levels are closer. Two grids with
    steps above 0.002 therefore see one path; a level that a closer one forces into a narrower interval moves by some 3 % of
    its W. Levels nearer than 6e-5 are one level, with fresh noise in between.
    Source: the virtual Brownian tree of Li et al. 2020, https://arxiv.org/abs/2001.01328, section 4.

    Args:
        seeds: one integer per sample, e.g. `range(64)`.

    Raises:
        ValueError: a solver other than a `Sampler` on a grid asks for more noise than that of its start.
    """

    _levels: Tensor | None = None
    _shares: Sequence[float] = (1.0,)

    def along(self, half_log_snr: Tensor, shares: Sequence[float]) -> BrownianNoise:
        bound = type(self)(self.seeds)
        bound._levels, bound._shares = half_log_snr, shares
        return bound

    def open(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Stream:
        fresh, (ways, spans) = super().open(shape, dtype, device), self._ways()
        words, real = self._words(shape, device), at_least_single(dtype)
        under_way = dict[int, _BrownianPath]()  # one at a time: grids leave a way for good

        def stream(step: int, draw: int) -> Tensor:
            if step and self._levels is None:
                raise ValueError("BrownianNoise is for a Sampler on a grid, which knows where its moves end: give this "
                                 "solver SampleNoise(seeds)")  # fmt: skip
            way, low, high = spans.get((step, draw), (0, 0, 0))
            if low == high:
                return fresh(step, draw)
            if way not in under_way:
                under_way.clear()
                under_way[way] = _BrownianPath(words, real, way, ways[way])
            return _joined(under_way[way].increment(low, high), shape).to(dtype)

        return stream

    def _ways(self) -> tuple[list[list[float]], dict[tuple[int, int], tuple[int, int, int]]]:
        """The levels of each way down, and (step, draw) -> (way, low, high), places in its list, for each draw there."""
        levels = [] if self._levels is None else self._levels.clamp(-_REACH, _REACH).tolist()
        ways, spans = [list[float]()], dict[tuple[int, int], tuple[int, int, int]]()
        for i, (level, following) in enumerate(itertools.pairwise(levels)):
            if following < level:
                ways.append([])
                continue
            low = _place(ways[-1], level)
            for k, share in enumerate(itertools.accumulate(self._shares)):
                high = _place(ways[-1], level + share * (following - level))
                spans[2 * i + 1, k], low = (len(ways) - 1, low, high), high
        return ways, spans


_REACH, _WIDEST, _FINEST = 32.0, 2.0**-9, 2.0**-14


def _place(way: list[float], level: float) -> int:
    """Where the level stands in the rising list, put there if it is no nearer to the last one than can be told apart."""
    if not way or level - way[-1] >= _FINEST:
        way.append(level)
    return len(way) - 1


def _passed(low: float, high: float) -> float:
    """e^{2 high} - e^{2 low}, the clock's time between two levels."""
    return math.exp(2 * low) * math.expm1(2 * (high - low))


class _Interval:
    """A node of the binary tree, counted by rows from 1, and W at its ends."""

    def __init__(self, node: int, low: float, high: float, start: Tensor, end: Tensor) -> None:
        self.node, self.low, self.high, self.start, self.end = node, low, high, start, end
        self.centre: Tensor | None = None


class _BrownianPath:
    """W at the levels of one way down. The intervals that hold several of them are kept until they lie behind.

    All tensors have the shape (2, batch, pairs) of cosines and sines (see `_joined`).

    Args:
        words: a word for each sample, (batch, 1), and one for each pair, (pairs,).
        real: float32 or float64.
        way: number of the path.
        levels: rising.
    """

    def __init__(self, words: tuple[Tensor, Tensor], real: torch.dtype, way: int, levels: Sequence[float]) -> None:
        self.samples, self.pairs = words
        self.real, self.first, self.levels = real, -(1 + way) << 21, levels  # keys below those of a SampleNoise
        zero = self.pairs.new_zeros((2, len(self.samples), len(self.pairs)), dtype=real)
        end = self._drawn(zero.clone(), [0], [math.sqrt(_passed(-_REACH, _REACH))])
        self.inside = [_Interval(1, -_REACH, _REACH, zero, end)]
        self.at: tuple[int, Tensor] = (-1, zero)

    def increment(self, low: int, high: int) -> Tensor:
        """(W(high) - W(low)) / sqrt(the clock's time between), standard normal."""
        start = self.at[1] if self.at[0] == low else self._value(low)
        self.at = (high, self._value(high))
        return (self.at[1] - start).div_(math.sqrt(_passed(self.levels[low], self.levels[high])))

    def _value(self, place: int) -> Tensor:
        level = self.levels[place]
        before, after = (self.levels[k] if 0 <= k < len(self.levels) else math.inf for k in (place - 1, place + 1))
        while not self.inside[-1].low <= level <= self.inside[-1].high:
            self.inside.pop()
        while True:
            top = self.inside[-1]
            if level in (top.low, top.high):
                return top.start if level == top.low else top.end
            middle = (top.low + top.high) / 2
            if top.centre is None:
                share, std = _bridge(top.low, middle, top.high)
                top.centre = self._drawn(torch.lerp(top.start, top.end, share), [top.node], [std])
            left = level <= middle
            half = (_Interval(2 * top.node, top.low, middle, top.start, top.centre) if left else
                    _Interval(2 * top.node + 1, middle, top.high, top.centre, top.end))  # fmt: skip
            if not (half.low <= before <= half.high or half.low <= after <= half.high):
                return self._within(half, level, min(_WIDEST, abs(level - before), abs(after - level)))
            self.inside.append(half)

    def _within(self, top: _Interval, level: float, width: float) -> Tensor:
        """W at a level, from the ends of an interval that holds no other: all its normals in one sum.

        Halving goes on to intervals of that width, in which the level itself is drawn.
        """
        node, low, high = top.node, top.low, top.high
        start, end = [0.0], [1.0]  # of (W(high) - W(low)) there and of the normals so far
        nodes = list[int]()
        while level not in (low, high):
            middle = level if high - low <= width else (low + high) / 2
            share, std = _bridge(low, middle, high)
            centre = [(1 - share) * s + share * e for s, e in zip(start, end, strict=True)] + [std]
            nodes.append(node)
            left = level <= middle
            low, high = (low, middle) if left else (middle, high)
            start, end = ([*start, 0.0], centre) if left else (centre, [*end, 0.0])
            node = 2 * node + (not left)
        share, *stds = start if level == low else end
        return self._drawn(torch.lerp(top.start, top.end, share), nodes, stds)

    def _drawn(self, total: Tensor, nodes: Sequence[int], stds: Sequence[float]) -> Tensor:
        """total + sum_k stds_k z_k, z_k the standard normal draw of a node, 0 that of the whole; in place."""
        most = max(1, 2**15 // max(1, total[0].numel()))  # small states take several nodes at once
        for k in range(0, len(nodes), most):
            samples = torch.stack([self.samples + (self.first + node) for node in nodes[k : k + most]])
            radius, angle = _polar(samples, self.pairs, self.real)
            for std, r, cos, sin in zip(stds[k : k + most], radius, angle.cos(), angle.sin_(), strict=True):
                total[0].addcmul_(r, cos, value=std)
                total[1].addcmul_(r, sin, value=std)
        return total


def _bridge(low: float, middle: float, high: float) -> tuple[float, float]:
    """(share, std): W(middle) is W(low) + share (W(high) - W(low)) + std z."""
    first, second = _passed(low, middle), _passed(middle, high)
    share = first / (first + second)
    return share, math.sqrt(share * second)


# SplitMix64's constants as signed 64-bit integers; torch's int64 arithmetic wraps around, which the algorithm needs.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_SALT = 0x2545F4914F6CDD1D
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_LOW = 0xFFFFFFFF


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit words; the masks turn arithmetic shifts into logical ones."""
    z = (z >> 30).bitwise_and_(2**34 - 1).bitwise_xor_(z).mul_(_FIRST)
    z = (z >> 27).bitwise_and_(2**37 - 1).bitwise_xor_(z).mul_(_SECOND)
    return (z >> 31).bitwise_and_(2**33 - 1).bitwise_xor_(z)


def _polar(samples: Tensor, pairs: Tensor, real: torch.dtype) -> tuple[Tensor, Tensor]:
    """Radius and angle of a pair of independent standard normals for each word of a sample with each of a pair."""
    bits = _mix(_mix(samples) + pairs)
    radius = (bits >> 32).bitwise_and_(_LOW).to(real).add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    return radius, bits.bitwise_and_(_LOW).to(real).mul_(math.tau * 2.0**-32)


def _joined(halves: Iterable[Tensor], shape: Sequence[int]) -> Tensor:
    """Of the cosines' and the sines' normals, each (batch, pairs), those of a batch of the given shape."""
    return torch.cat([*halves], 1)[:, : math.prod(shape[1:])].reshape(tuple(shape))

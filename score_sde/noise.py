r"""Sources of standard normal noise, keyed by (step, draw); none touches torch's global generator.

`BatchNoise(seed)` draws a whole batch from one generator: fastest, but sample i depends on the batch it is drawn in.
`SampleNoise(seeds)` gives each sample a seed of its own and computes its noise as a function of (seed, step, draw,
element) by a counter-based generator (SplitMix64 and Box-Muller): sample i is bitwise the same in any batch.
`BrownianNoise(seeds)` gives each sample a Brownian path of its own, whatever the grid: more steps refine the same sample.
Sources: Steele, Lea & Flood 2014, https://doi.org/10.1145/2660193.2660195; Salmon et al. 2011 for counter-based use.
"""

from __future__ import annotations

import itertools
import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from score_sde.checks import whole

Stream = Callable[[int, int], Tensor]
"""(step, draw) -> standard normal noise of the shape, dtype and device with which the stream was opened."""


class NoiseSource(ABC):
    """Where a sampler's noise comes from: a value, opened anew by every run."""

    def along(self, half_log_snr: Tensor, shares: Sequence[float]) -> NoiseSource:
        """The source of a run over grid times with these half log SNRs (float64, shape (N + 1,)), for a predictor whose
        draws have these `Step.shares`; most sources do not look at them."""
        return self

    @abstractmethod
    def open(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Stream:
        """The stream of one run, for noise of the given shape (batch, *event)."""


class BatchNoise(NoiseSource):
    """One generator for the whole batch, read in the order of the calls.

    Args:
        seed: an integer, or None for one from the operating system (kept in `seed`).
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = secrets.randbits(63) if seed is None else whole("seed", seed, -math.inf)
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} is beyond the 64 bits of torch's generators: give a smaller one")

    def open(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Stream:
        generator = torch.Generator(device).manual_seed(self.seed)
        return lambda step, draw: torch.randn(tuple(shape), generator=generator, dtype=dtype, device=device)

    def __repr__(self) -> str:
        return f"BatchNoise({self.seed})"


class SampleNoise(NoiseSource):
    """A seed for each sample; row i of a stream depends on seeds[i] alone.

    Args:
        seeds: one integer a sample, e.g. `range(64)`.
    """

    def __init__(self, seeds: Iterable[int] | Tensor) -> None:
        if isinstance(seeds, int):
            raise TypeError(
                f"SampleNoise takes a seed for each sample, got {seeds}: give range({seeds}), or seed= for one"
            )
        seeds = torch.as_tensor(seeds if isinstance(seeds, Tensor) else list(seeds))
        if seeds.ndim != 1 or (seeds.is_floating_point() and len(seeds)):
            raise ValueError(f"seeds are one integer a sample, got {seeds.dtype} of shape {tuple(seeds.shape)}")
        self.seeds = seeds.to(torch.int64)

    @classmethod
    def of_run(cls, seed: int, samples: Iterable[int] | Tensor) -> SampleNoise:
        """The noise of samples 0, 1, 2, ... of the run `seed` (which counts modulo 2^32), in whatever batch they are."""
        samples = torch.as_tensor(samples if isinstance(samples, Tensor) else list(samples), dtype=torch.int64)
        seed = whole("seed", seed, -math.inf)
        return cls(samples + (((seed + 2**31) % 2**32 - 2**31) << 32))

    def open(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Stream:
        if len(self.seeds) != shape[0]:
            raise ValueError(f"SampleNoise has {len(self.seeds)} seeds for a batch of {shape[0]}: give one a sample")
        elements = math.prod(shape[1:])
        keys = _mix(self.seeds.to(device)[:, None] * _GOLDEN + _SALT)
        counters = torch.arange(1, elements // 2 + elements % 2 + 1, device=device) * _GOLDEN
        real = torch.float64 if dtype == torch.float64 else torch.float32

        def stream(step: int, draw: int) -> Tensor:
            bits = _mix(_mix(keys + ((step << 20) + draw + 1)) + counters)
            radius = ((bits >> 32) & _LOW).to(real).add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
            angle = (bits & _LOW).to(real).mul_(math.tau * 2.0**-32)
            normal = torch.cat([radius * angle.cos(), radius.mul_(angle.sin_())], 1)
            return normal[:, :elements].reshape(tuple(shape)).to(dtype)

        return stream

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.seeds)} seeds)"


class BrownianNoise(SampleNoise):
    r"""A Brownian path W(alpha^2 / sigma^2) for each sample, whose increments are the predictor's noise.

    With D constant over a move the reverse SDE ends at

        x_s = (sigma_s / sigma_t) e^{-h} x_t + alpha_s (1 - e^{-2 h}) D + (sigma_s^2 / alpha_s) (W(snr_s) - W(snr_t)),

    h = lambda_s - lambda_t, snr = e^{2 lambda}: the signal-to-noise ratio is the clock in which its noise is a plain
    increment. So a sample of many steps is the refinement of that of few, and differences between grids and steps are
    pathwise (strong) errors, not two draws. Row i depends on seeds[i] and the levels alone. The start and a corrector's noise
    are those of `SampleNoise`; where a grid goes up and down again (churn), each way down has a path of its own.

    W is found by halving [-32, 32] in lambda twenty times, each midpoint drawn given the ends (a Brownian bridge), and
    levels are rounded to that lattice, 6e-5 apart: at most twenty draws a move, fewer on fine grids.
    Source: the virtual Brownian tree of Li et al. 2020, https://arxiv.org/abs/2001.01328, section 4.

    Args:
        seeds: one integer a sample, e.g. `range(64)`.

    Raises:
        ValueError: a solver that is no `Sampler` on a grid asks for more noise than its start's.
    """

    _levels: Tensor | None = None
    _shares: Sequence[float] = (1.0,)

    def along(self, half_log_snr: Tensor, shares: Sequence[float]) -> BrownianNoise:
        bound = type(self)(self.seeds)
        bound._levels, bound._shares = half_log_snr, shares
        return bound

    def open(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Stream:
        fresh, spans = super().open(shape, dtype, device), self._spans()
        real = torch.float64 if dtype == torch.float64 else torch.float32
        draw_of, paths = super().open(shape, real, device), dict[int, _BrownianPath]()

        def stream(step: int, draw: int) -> Tensor:
            if step and self._levels is None:
                raise ValueError("BrownianNoise is for a Sampler on a grid, whose moves have ends: give this solver "
                                 "SampleNoise(seeds)")  # fmt: skip
            path, low, high = spans.get((step, draw), (0, 0, 0))
            if low == high:
                return fresh(step, draw)
            if path not in paths:
                paths[path] = _BrownianPath(partial(draw_of, -1 - path))
            return paths[path].increment(low, high).to(dtype)

        return stream

    def _spans(self) -> dict[tuple[int, int], tuple[int, int, int]]:
        """(step, draw) -> (path, low, high), places on the lattice, for each draw of the moves that go down."""
        if self._levels is None:
            return {}
        path, spans = 0, dict[tuple[int, int], tuple[int, int, int]]()
        for i, (level, move) in enumerate(zip(self._levels.tolist(), self._levels.diff().tolist(), strict=False)):
            path += move < 0
            ends = [_place(level + share * move) for share in (0.0, *itertools.accumulate(self._shares))]
            if move > 0:
                spans |= {(2 * i + 1, k): (path, *between) for k, between in enumerate(itertools.pairwise(ends))}
        return spans


_HALVINGS, _REACH = 20, 32.0


def _place(half_log_snr: float) -> int:
    """The nearest place on the lattice, 0 to 2^20."""
    share = (min(max(half_log_snr, -_REACH), _REACH) + _REACH) / (2 * _REACH)
    return round(share * 2**_HALVINGS)


def _passed(low: int, high: int) -> float:
    """e^{2 lambda_high} - e^{2 lambda_low}, the clock's time between two places."""
    width = 2 * _REACH / 2**_HALVINGS
    return math.exp(2 * (low * width - _REACH)) * math.expm1(2 * (high - low) * width)


class _BrownianPath:
    """W at places on the lattice. The intervals that hold the last one are kept: ways down share most of their halvings.

    Args:
        draw: k -> the k-th standard normal draw of this path; 0 is the end's, k from 1 on the midpoint's of the k-th interval
            of the binary tree, counted by rows.
    """

    def __init__(self, draw: Callable[[int], Tensor]) -> None:
        end = draw(0).mul_(math.sqrt(_passed(0, 2**_HALVINGS)))
        self.draw, self.inside = draw, [(1, 0, 2**_HALVINGS, torch.zeros_like(end), end)]

    def increment(self, low: int, high: int) -> Tensor:
        """(W(high) - W(low)) / sqrt(the clock's time between), standard normal."""
        return (self._at(high) - self._at(low)).div_(math.sqrt(_passed(low, high)))

    def _at(self, place: int) -> Tensor:
        while not self.inside[-1][1] <= place <= self.inside[-1][2]:
            self.inside.pop()
        while True:
            node, low, high, start, end = self.inside[-1]
            if place in (low, high):
                return start if place == low else end
            middle = (low + high) // 2
            first, second = _passed(low, middle), _passed(middle, high)
            share = first / (first + second)
            centre = torch.lerp(start, end, share).add_(self.draw(node), alpha=math.sqrt(share * second))
            if place <= middle:
                self.inside.append((2 * node, low, middle, start, centre))
            else:
                self.inside.append((2 * node + 1, middle, high, centre, end))


# SplitMix64's constants, as signed 64-bit integers: torch's int64 arithmetic wraps around, as the algorithm needs.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_SALT = 0x2545F4914F6CDD1D
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
_LOW = 0xFFFFFFFF


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit words; shifts are made logical by masking."""
    z = (z ^ ((z >> 30) & (2**34 - 1))).mul_(_FIRST)
    z = (z ^ ((z >> 27) & (2**37 - 1))).mul_(_SECOND)
    return z ^ ((z >> 31) & (2**33 - 1))

r"""Sources of standard normal noise, keyed by (step, draw); none touches torch's global generator.

`BatchNoise(seed)` draws a whole batch from one generator: fastest, but sample i depends on the batch it is drawn in.
`SampleNoise(seeds)` gives each sample a seed of its own and computes its noise as a function of (seed, step, draw,
element) by a counter-based generator (SplitMix64 and Box-Muller): sample i is bitwise the same in any batch.
Sources: Steele, Lea & Flood 2014, https://doi.org/10.1145/2660193.2660195; Salmon et al. 2011 for counter-based use.
"""

from __future__ import annotations

import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from score_sde.checks import whole

Stream = Callable[[int, int], Tensor]
"""(step, draw) -> standard normal noise of the shape, dtype and device with which the stream was opened."""


class NoiseSource(ABC):
    """Where a sampler's noise comes from: a value, opened anew by every run."""

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
        return f"SampleNoise({len(self.seeds)} seeds)"


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

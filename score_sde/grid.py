r"""Time grids: functions of an SDE that return N + 1 times, from t_max to t_min, as a float64 tensor.

A grid lists the times at which the network is called; to a sampler it is data. Noise levels are those of the scaled
variable x / alpha, s(t) = sigma(t) / alpha(t) = exp(-lambda(t)). Bind the number of steps with
`functools.partial(grid.karras, steps=17)`. Every grid raises ValueError where an option is out of range.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from score_sde.checks import number, one_of, whole
from score_sde.sde import SDE

Grid = Callable[[SDE], Tensor]


def check(times: Tensor, sde: SDE) -> Tensor:
    """The grid itself, as float64 on the CPU, or a ValueError that says what is wrong with it.

    Times beyond t_max or t_min by no more than single-precision rounding are set to t_max or t_min.
    """
    times = torch.as_tensor(times).detach().to("cpu", torch.float64)
    if times.ndim != 1 or len(times) < 2:
        raise ValueError(f"a grid is a list of at least two times, got shape {tuple(times.shape)}")
    if not torch.isfinite(sde.half_log_snr(times)).all():
        raise ValueError(f"a grid's times must have a finite noise level in {sde!r}; got times from "
                         f"{times.max().item():g} to {times.min().item():g}")  # fmt: skip
    within = times.clamp(sde.t_min, sde.t_max)
    times = within if (within - times).abs().max() <= 1e-6 * (sde.t_max - sde.t_min) else times
    listed = times.tolist()
    if listed[-1] >= listed[0]:
        raise ValueError(f"a grid runs from noise to data, its times decrease; got {listed[0]:g} first and "
                         f"{listed[-1]:g} last: reverse it")  # fmt: skip
    if any(t == s for t, s in itertools.pairwise(listed)):
        raise ValueError("a grid has two equal times in a row: remove one")
    high, low = max(listed), min(listed)
    if high > sde.t_max or low < sde.t_min:
        raise ValueError(f"a grid lies in [t_min, t_max] = [{sde.t_min:g}, {sde.t_max:g}], "
                         f"got times from {high:g} to {low:g}")  # fmt: skip
    return times


def check_callable(grid: Grid) -> None:
    """Refuses, with ValueError, what cannot be called with an SDE alone."""
    if not callable(grid):
        raise ValueError("grid is a function SDE -> times, e.g. partial(grid.uniform, steps=100), or lambda sde: times; got "
                         f"{grid!r}")  # fmt: skip
    try:
        if isinstance(grid, partial):  # an unknown keyword that is bound is the better error
            inspect.signature(grid.func).bind_partial(*grid.args, **grid.keywords)
        inspect.signature(grid).bind(None)
    except TypeError as error:
        name = getattr(grid.func if isinstance(grid, partial) else grid, "__name__", repr(grid))
        raise ValueError(f"grid is a function of the SDE alone, {name} is not ({error}): bind its other arguments, "
                         "e.g. partial(grid.uniform, steps=100)") from None  # fmt: skip


def _fractions(steps: int) -> Tensor:
    """0, 1 / steps, ..., 1."""
    return torch.linspace(0, 1, whole("steps", steps) + 1, dtype=torch.float64)


def _check_positive(grid: str, **options: float) -> None:
    """Refuses, with ValueError, options of a grid that are not finite numbers > 0."""
    for name, value in options.items():
        if not 0 < number(name, value) < math.inf:
            raise ValueError(f"the {grid} grid needs a finite {name} > 0, got {name}={value}")


def _between(sde: SDE, times: Tensor) -> Tensor:
    """The times with the two ends set exactly to t_max and t_min."""
    return torch.cat([times.new_tensor([sde.t_max]), times[1:-1], times.new_tensor([sde.t_min])])


def uniform(sde: SDE, steps: int) -> Tensor:
    """Equal steps in time; with steps = num_steps - 1 of a `DiscreteSDE`, exactly its levels."""
    return _between(sde, sde.t_max + _fractions(steps) * (sde.t_min - sde.t_max))


def quadratic(sde: SDE, steps: int) -> Tensor:
    """Equal steps in sqrt(t), finer near the data (Song et al. 2021, DDIM, https://arxiv.org/abs/2010.02502, D.2)."""
    return _between(sde, (sde.t_max**0.5 + _fractions(steps) * (sde.t_min**0.5 - sde.t_max**0.5)) ** 2)


def log_snr(sde: SDE, steps: int) -> Tensor:
    """Equal steps in lambda = log(alpha / sigma) (Lu et al. 2022, https://arxiv.org/abs/2206.00927, section 4.3)."""
    first, last = sde.half_log_snr_range
    return _between(sde, sde.time_at(first + _fractions(steps) * (last - first)))


def karras(sde: SDE, steps: int, rho: float = 7.0) -> Tensor:
    """Equal steps in s^(1 / rho), s = sigma / alpha (Karras et al. 2022, https://arxiv.org/abs/2206.00364, eq. 5).

    EDM's "N steps" are its N noise levels: steps = N - 1 here, and the last step to zero is the sampler's
    `final="denoise"`.
    """
    _check_positive("Karras", rho=rho)
    return _between(sde, sde.time_at_noise_level(_karras_levels(*sde.noise_level_range, steps, rho)))


def _karras_levels(high: float, low: float, steps: int, rho: float = 7.0) -> Tensor:
    """steps + 1 noise levels from high to low, in equal steps of level^(1 / rho)."""
    first, last = high ** (1 / rho), low ** (1 / rho)
    return (first + _fractions(steps) * (last - first)) ** rho


exponential = log_snr  # equal ratios of the noise level, under k-diffusion's name


def poly_exponential(sde: SDE, steps: int, rho: float = 1.0) -> Tensor:
    """lambda = lambda_first + (lambda_last - lambda_first) (1 - (1 - u)^rho), u = 0, 1 / steps, ..., 1.

    rho = 1 is `log_snr`; a larger rho spends more steps near the data. Source: k-diffusion's
    `get_sigmas_polyexponential`.
    """
    _check_positive("poly-exponential", rho=rho)
    first, last = sde.half_log_snr_range
    return _between(sde, sde.time_at(last + (first - last) * (1 - _fractions(steps)) ** rho))


def hyperbolic(sde: SDE, steps: int, width: float = 1.0) -> Tensor:
    """Equal steps in arcsinh(lambda / width), lambda = log(alpha / sigma): dense where noise and data balance.

    Within about `width` of lambda = 0 steps are equal in lambda; farther out they grow in proportion to |lambda|. A width
    far above |lambda| gives `log_snr`. Source: this package. With `RectifiedAdams(3)` it is the best untuned solver at 10
    calls on every SDE here, for data with a standard deviation of about 0.5 to 3 (docs/choosing_a_sampler.md).
    """
    _check_positive("hyperbolic", width=width)
    first, last = (math.asinh(end / width) for end in sde.half_log_snr_range)
    return _between(sde, sde.time_at(width * torch.sinh(first + _fractions(steps) * (last - first))))


def cosine(sde: SDE, steps: int) -> Tensor:
    """Equal steps in the angle arctan(sigma / alpha), in which the cosine schedule runs uniformly.

    Source: Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 17; Salimans & Ho 2022, appendix D.
    """
    first, last = map(math.atan, sde.noise_level_range)
    return _between(sde, sde.time_at_noise_level((first + _fractions(steps) * (last - first)).tan()))


def beta(sde: SDE, steps: int, a: float = 0.6, b: float = 0.6) -> Tensor:
    """Times at equal quantiles of a Beta(a, b) law on [t_min, t_max]; a, b < 1 crowd both ends.

    Source: Lee et al. 2024 (Beta Sampling is All You Need), https://arxiv.org/abs/2407.12173, section 3.
    """
    from scipy.special import betaincinv

    _check_positive("beta", a=a, b=b)
    quantiles = torch.from_numpy(betaincinv(a, b, 1 - _fractions(steps).numpy()))
    return _between(sde, sde.t_min + quantiles * (sde.t_max - sde.t_min))


def iddpm(sde: SDE, steps: int, C_1: float = 0.001, C_2: float = 0.008, M: int = 1000) -> Tensor:
    """Equal steps in the index of iDDPM's levels u_{j-1}^2 + 1 = (u_j^2 + 1) / max(abar_{j-1} / abar_j, C_1), u_M = 0.

    abar_j = sin^2(pi / 2 j / (M (C_2 + 1))). Between two levels log u is linear in j; the ends are the SDE's own levels,
    even where these lie beyond the table's, 0.0064 to 20,291. Source: Karras et al. 2022,
    https://arxiv.org/abs/2206.00364, table 1.
    """
    abar = np.sin(np.pi / 2 * np.arange(M + 1) / (M * (C_2 + 1))) ** 2
    ratio = np.maximum(abar[:-1] / abar[1:], C_1)  # index j - 1
    levels = np.sqrt(np.cumprod(1 / ratio[::-1])[::-1] - 1)  # u_0 ... u_{M-1}: (u_{j-1}^2 + 1) = (u_j^2 + 1) / ratio
    noise, order = np.log(levels[::-1]), np.arange(M)[::-1].astype(float)  # increasing in noise
    start, stop = np.interp(np.log(sde.noise_level_range), noise, order)
    index = start + _fractions(steps).numpy() * (stop - start)
    return _between(sde, sde.time_at(-torch.from_numpy(np.interp(index, order[::-1], noise[::-1]))))


ALIGN_YOUR_STEPS = {
    "stable_diffusion_1.5": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "stable_diffusion_xl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "stable_video_diffusion": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}
"""Noise levels optimised for 10 steps (Sabour et al. 2024, Align Your Steps, https://arxiv.org/abs/2404.14507)."""


def tabulated(sde: SDE, steps: int, levels: str | Sequence[float], stretch: bool = True) -> Tensor:
    """A list of noise levels sigma / alpha, interpolated to `steps` steps, log-linearly in the list's index.

    Args:
        sde: the forward process.
        steps: number of steps.
        levels: decreasing and positive, or a name in `ALIGN_YOUR_STEPS`.
        stretch: map log(level) affinely so that the ends are the SDE's own, where sampling starts and stops; False
            keeps the levels, which must then lie in the SDE's range.

    Raises:
        ValueError: the levels do not decrease or are not positive, the name is unknown, or with stretch=False the levels
            go beyond the SDE's.
    """
    if isinstance(levels, str):
        levels = ALIGN_YOUR_STEPS[one_of("levels", levels, ALIGN_YOUR_STEPS)]
    table = torch.as_tensor(list(levels), dtype=torch.float64)
    if len(table) < 2 or not (table > 0).all() or not (table.diff() < 0).all():
        raise ValueError(f"levels are at least two positive numbers that decrease, got {table.tolist()[:8]}")
    place = _fractions(steps) * (len(table) - 1)
    noise = torch.from_numpy(np.interp(place, np.arange(len(table)), table.log()))
    first, last = map(math.log, sde.noise_level_range)
    if stretch:
        return _between(sde, sde.time_at(-(last + (noise - noise[-1]) / (noise[0] - noise[-1]) * (first - last))))
    if noise[0] > first + 1e-9 or noise[-1] < last - 1e-9:
        raise ValueError(f"levels {table[0].item():g} to {table[-1].item():g} reach beyond those of {sde!r}, "
                         f"{math.exp(first):g} to {math.exp(last):g}: use stretch=True")  # fmt: skip
    return sde.time_at(-noise)


def respaced(sde: SDE, steps: int, spacing: str = "trailing") -> Tensor:
    """n = steps + 1 of the N levels of a `DiscreteSDE`, at indices that are real numbers, not rounded.

    "leading": (N / n) i, without the noisiest level; "trailing": N - 1 - (N / n) i, without the cleanest; "linspace": both
    ends. With a final Tweedie step every level takes one call. "leading" begins below t_max; the published samplers start
    it from noise too strong for that level, which is x_init = model.start(z) here.
    Source: Lin et al. 2024, https://arxiv.org/abs/2305.08891, table 2 and section 3.3.

    Raises:
        ValueError: the SDE is not a `DiscreteSDE`, has too few levels, or the spacing is unknown.
    """
    levels = getattr(sde, "num_steps", None)
    if levels is None:
        raise ValueError(f"respaced takes a DiscreteSDE's ladder, got {sde!r}: use grid.uniform on a continuous SDE")
    if one_of("spacing", spacing, ("leading", "trailing", "linspace")) == "linspace":
        return uniform(sde, steps)
    count = len(_fractions(steps))
    if count > levels:
        raise ValueError(f"a ladder of {levels} levels has at most steps={levels - 1}, got steps={steps}")
    index = torch.arange(count, dtype=torch.float64) * (levels / count)
    return index.flip(0) if spacing == "leading" else levels - 1 - index


# --- grids that go up as well as down: noise is added on the way ------------------------------------------------------


def _based(base: Callable[..., Tensor], sde: SDE, steps: int | None) -> Tensor:
    """The times of the base grid, checked, with its number of steps replaced by `steps` unless that is None."""
    bound = base if steps is None else partial(base, steps=steps)
    check_callable(bound)
    return check(bound(sde), sde)


def churn(
    sde: SDE, base: Callable[..., Tensor], S_churn: float = 40.0, S_min: float = 0.05, S_max: float = 50.0,
    steps: int | None = None,
) -> Tensor:  # fmt: skip
    """EDM's stochastic sampler as a grid: each move from a level s in [S_min, S_max] first goes up to (1 + gamma) s.

    gamma = min(S_churn / N, sqrt(2) - 1), N the number of levels of the base grid. Upward moves are the exact forward
    transition, with the noise times `Sampler`'s S_noise, and no level exceeds the SDE's noisiest. Use a one-step
    predictor: an upward move clears the history of a multistep one. `steps`, where given, replaces the base grid's own.
    Source: Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 2; the defaults are table 5's for
    ImageNet-64.
    """
    if not (number("S_churn", S_churn) >= 0 and 0 <= number("S_min", S_min) <= number("S_max", S_max)):
        raise ValueError(f"churn needs S_churn >= 0 and 0 <= S_min <= S_max, got {S_churn=}, {S_min=}, {S_max=}")
    times = _based(base, sde, steps)
    level = sde.noise_level(times)
    gamma = min(S_churn / len(times), math.sqrt(2) - 1)
    inside = (level >= S_min) & (level <= S_max)
    inside[-1] = False
    raised = sde.time_at_noise_level(torch.where(inside, (1 + gamma) * level, level)).clamp(max=sde.t_max)
    grown = inside & (raised > times)
    return torch.stack([times, raised], 1)[torch.stack([torch.ones_like(grown), grown], 1)]


def ancestral(sde: SDE, base: Callable[..., Tensor], eta: float = 1.0, steps: int | None = None) -> Tensor:
    """k-diffusion's "ancestral" sampling as a grid: each move but the last overshoots its end, then adds noise to return.

    A move from level l to m descends to m_down, m_down^2 = m^2 (1 - eta^2 (1 - m^2 / l^2)), and the exact forward
    transition leads back up to m. With DDIM that is DDIM(eta); with one-step methods of higher order it is k-diffusion's
    samplers whose names end in _ancestral. No descent goes below the grid's end. Upward moves clear the history of a
    multistep predictor, as in `churn`.
    Source: Song, Meng & Ermon 2021, https://arxiv.org/abs/2010.02502, eq. 16; the split is Crowson's in k-diffusion.

    Args:
        sde: the forward process.
        base: a grid without upward moves.
        eta: share of the ancestral noise, in [0, 1]; 0 is the base grid.
        steps: replaces the base grid's own number of steps, where given.

    Raises:
        ValueError: eta is out of range, or the base grid goes up.
    """
    if not 0 <= number("eta", eta) <= 1:
        raise ValueError(f"ancestral's eta lies in [0, 1], got {eta}")
    times = _based(base, sde, steps)
    if not (times.diff() < 0).all():
        raise ValueError("ancestral adds noise of its own: give it a base grid that only goes down")
    level = sde.noise_level(times)
    share = eta**2 * -torch.expm1(2 * level.log().diff())
    down = sde.time_at_noise_level(level[1:] * (1 - share).sqrt()).clamp(min=times[-1].item())
    lower = (down < times[1:]) & (times[1:] > times[-1])
    moves = torch.stack([down, times[1:]], 1)[torch.stack([lower, torch.ones_like(lower)], 1)]
    return torch.cat([times[:1], moves])


def restart(
    sde: SDE, base: Callable[..., Tensor], intervals: Sequence[tuple[float, float, int, int]] = ((0.06, 0.3, 3, 2),),
    steps: int | None = None,
) -> Tensor:  # fmt: skip
    """Restart sampling as a grid, for each interval (low, high, down, repeats): at the level nearest `low`, go up to `high`
    by the exact forward transition and down again in `down` Karras steps, `repeats` times.

    `steps`, where given, replaces the base grid's own. Source: Xu et al. 2023, https://arxiv.org/abs/2306.14878,
    algorithm 1.
    """
    times = _based(base, sde, steps)
    levels, parts = sde.noise_level(times), [[time] for time in times.tolist()]
    for interval in intervals:
        if not isinstance(interval, Sequence) or len(interval) != 4:
            raise ValueError("intervals is a list of (low, high, down, repeats), e.g. [(0.06, 0.3, 3, 2)]; got "
                             f"{intervals!r}")  # fmt: skip
        low, high, down = interval[:3]
        repeats = whole("repeats", interval[3])
        place = int((levels - low).abs().argmin())
        bottom = levels[place].item()
        if not bottom < high <= levels.max().item():
            raise ValueError("a restart interval is (low, high, down, repeats), low < high within the grid's levels; "
                             f"got {tuple(interval)}")  # fmt: skip
        inner = sde.time_at_noise_level(_karras_levels(high, bottom, down)[:-1])
        parts[place] += [*inner.tolist(), parts[place][0]] * repeats
    return times.new_tensor([time for part in parts for time in part])


def jump_back(sde: SDE, base: Grid, length: int = 10, repeats: int = 10, low: float = 0.0) -> Tensor:
    """RePaint's resampling: every stretch of `length` steps of the base grid is gone through `repeats` times.

    N steps down become `repeats` N steps down, with a jump up before each repeat; a jump costs no call.
    Source: Lugmayr et al. 2022, https://arxiv.org/abs/2201.09865, section 4.2 and appendix.

    Args:
        sde: the forward process.
        base: the grid to repeat, e.g. `functools.partial(grid.uniform, steps=250)`.
        length: steps of one jump, 1 or more.
        repeats: times that each stretch is gone through, 1 (no jump) or more.
        low: the noise level sigma / alpha below which no stretch is repeated. With `Impute` and noisy observations take
            noise_std / operator.least_singular_value(): below it y no longer enters, and each repeat forgets more of it.

    Raises:
        ValueError: length or repeats is below 1.
    """
    length, repeats = whole("length", length), whole("repeats", repeats)
    times = _based(base, sde, None)
    level, parts = sde.noise_level(times), [times[:1]]
    for first in range(1, len(times), length):
        stretch = times[first : first + length]
        parts.append(stretch)
        if level[first : first + length][-1] >= low:
            parts += [times[first - 1 : first], stretch] * (repeats - 1)
    return torch.cat(parts)


# --- a part of a grid ------------------------------------------------------------------------------------------------


def below(sde: SDE, base: Grid, time: float) -> Tensor:
    """The base grid from `time` down: `time` itself, then the base grid's times after its last descent through it.

    Raises:
        ValueError: `time` is not in (end of the base grid, t_max].
    """
    times = _based(base, sde, None)
    if not times[-1].item() < time <= sde.t_max:
        raise ValueError(f"a start at time={time:g} must lie in ({times[-1].item():g}, {sde.t_max:g}]")
    first = int((times >= time).nonzero()[-1]) + 1 if (times >= time).any() else 0
    return torch.cat([times.new_tensor([time]), times[first:]])


# --- where on a grid a corrector acts ---------------------------------------------------------------------------------


def within(sde: SDE, times: Tensor, low: float = 0.0, high: float = math.inf) -> Tensor:
    """The grid times whose noise level sigma / alpha lies in [low, high], as a mask (see `Sampler`)."""
    level = sde.noise_level(times)
    return (level >= number("low", low)) & (level <= number("high", high))


def every(sde: SDE, times: Tensor, period: int = 2) -> Tensor:
    """Every `period`-th grid time, the first included, as a mask (see `Sampler`)."""
    return torch.arange(len(times)) % whole("period", period) == 0

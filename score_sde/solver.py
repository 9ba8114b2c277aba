"""What all solvers share: the check of a request for samples, the model that it is answered with, and the result."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from score_sde import grid as grids
from score_sde.brief import Brief
from score_sde.checks import number, one_of, tensor, whole
from score_sde.grid import Grid
from score_sde.memory import keep_freed_memory
from score_sde.noise import BatchNoise, NoiseSource, Stream
from score_sde.prediction import Prediction
from score_sde.score import ScoreModel, at_least_single, checked_condition
from score_sde.sde import SDE, Time, as_time
from score_sde.steps.step import Step


@dataclass(frozen=True, repr=False)
class SampleResult(Brief):
    """What a sampler returns.

    Attributes:
        x: the samples, shape (batch, *event).
        nfe: network calls per sample, counted during the run.
        seconds: wall-clock time, including the device's work.
        trajectory: the states at `times`, shape (len(times), batch, *event), if requested.
        times: the grid, float64, shape (N + 1,).
    """

    x: Tensor
    nfe: int
    seconds: float
    trajectory: Tensor | None
    times: Tensor


FINALS = ("denoise", "none")


def mean_calls(calls: Tensor) -> int:
    """The mean of the samples' network calls, rounded up: `nfe` where each sample takes its own steps."""
    return math.ceil(calls.double().mean().item()) if len(calls) else 0


def ending(final: str, model: Callable[[Tensor, float], Prediction], x: Tensor, t: float) -> tuple[Tensor, int]:
    """The samples of a run that has come to x at t, by Tweedie's formula if final="denoise", and the calls that it takes."""
    if final == "none":
        return x, 0
    last = model(x, t)
    return last.denoised, last.calls


class AsWritten:
    """A base for samplers, which are shown as one writes them in Python: with the arguments that are not the default."""

    def __repr__(self) -> str:
        usual = inspect.signature(type(self)).parameters
        parts = {name: value for name, value in vars(self).items() if name in usual and value != usual[name].default}
        return f"{type(self).__name__}({', '.join(f'{name}={_shown(value)}' for name, value in parts.items())})"


def _shown(part: Any) -> str:
    """A part of a sampler as it is written in Python."""
    if isinstance(part, partial):
        bound = ", ".join(
            [*map(_shown, part.args), *(f"{name}={_shown(value)}" for name, value in part.keywords.items())]
        )
        return f"partial({_shown(part.func)}, {bound})"
    return getattr(part, "__name__", None) or repr(part)


class ErrorControlled(AsWritten):
    """The options that solvers which choose their own steps share.

    Args:
        rtol, atol: relative and absolute tolerance.
        final: "denoise" ends with Tweedie's formula at t_min; "none" keeps the solution.

    Raises:
        ValueError: a tolerance is not positive (or rtol not below 1), or `final` is unknown.
    """

    def __init__(self, rtol: float, atol: float, final: str) -> None:
        if not (0 < number("rtol", rtol) < 1 and 0 < number("atol", atol) < math.inf):
            raise ValueError(f"tolerances are positive (and rtol below 1), got {rtol=} and {atol=}")
        self.rtol, self.atol, self.final = float(rtol), float(atol), one_of("final", final, FINALS)

    def check(self, sde: SDE) -> None:
        """Refuses, with ValueError, an SDE whose schedule cannot be integrated."""
        sde.check()


class CountedModel:
    """A score model under a fixed condition that counts its calls.

    Attributes:
        keeps: whether the last prediction is kept, as `last`.
    """

    last: Prediction | None

    def __init__(self, model: ScoreModel, condition: Mapping[str, Any]) -> None:
        self.model, self.condition, self.calls = model, condition, 0
        self.keeps, self.last = False, None

    def __call__(self, x: Tensor, t: float | Tensor, condition: Mapping[str, Any] | None = None) -> Prediction:
        """The prediction under this condition, by default the fixed one; the first is checked against the SDE."""
        prediction = self.model(x, t, **(self.condition if condition is None else condition))
        if not isinstance(prediction, Prediction):
            raise TypeError(f"{type(self.model).__name__} returns a Prediction, got {type(prediction).__name__}: "
                            "Prediction(x, D, alpha, sigma) says that D is the denoised x")  # fmt: skip
        if not self.calls:
            self._check_kernel(prediction, t)
        self.calls += prediction.calls
        if self.keeps:
            self.last = prediction
        return prediction

    def _check_kernel(self, prediction: Prediction, t: float | Tensor) -> None:
        """Refuses, with ValueError, a prediction whose alpha and sigma are not the SDE's for the first sample, if known
        without a device wait."""
        given, sde = (t, prediction.alpha, prediction.sigma), self.model.sde
        if any(isinstance(part, Tensor) and (part.device.type != "cpu" or not part.numel()) for part in given):
            return
        t, a, b = (part.flatten()[0].item() if isinstance(part, Tensor) else part for part in given)
        alpha, sigma = (float(part(as_time(t))) for part in (sde.alpha, sde.sigma))
        if not (math.isclose(a, alpha, rel_tol=1e-3) and math.isclose(b, sigma, rel_tol=1e-3, abs_tol=1e-6)):
            raise ValueError(f"{type(self.model).__name__} predicts with alpha={a:.4g} and sigma={b:.4g} at t={t:.4g}, "
                             f"where its sde has {alpha:.4g} and {sigma:.4g}")  # fmt: skip

    def log_prob(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Log-density of p_t at x, shape (batch,), for steps with `needs_density`; the model must have one."""
        return self.model.log_prob(x, t, **self.condition)  # type: ignore[attr-defined]


class PerSample(CountedModel):
    """A counted model that is called with any subset of the batch, each sample at its own time.

    Conditions with one row per sample (`ScoreModel.per_sample`) are indexed with the subset; others are shared.
    """

    def __init__(self, model: ScoreModel, condition: Mapping[str, Any], batch: int) -> None:
        super().__init__(model, condition)
        self.batch = batch
        own = {name for name, value in condition.items() if model.per_sample(name, value, batch)}
        self.shared = {name: value for name, value in condition.items() if name not in own}
        self.own = {name: condition[name] for name in own}

    def check_apart(self) -> None:
        """Refuses, with ValueError, a model that holds one row per sample outside its conditions.

        Such rows would not follow a subset of the batch; the model then does not accept a single sample.
        """
        self.model.check((min(self.batch, 1), *self.model.event_shape), self.alone(0).condition)

    def alone(self, i: int) -> CountedModel:
        """The model under the conditions of sample i alone."""
        return CountedModel(self.model, self.shared | {name: value[i : i + 1] for name, value in self.own.items()})

    def predict(self, x: Tensor, t: Time, ids: Tensor) -> Prediction:
        """The prediction at t, () or (samples,); ids are the samples' places in the batch."""
        return self(x, t, self.shared | {name: value[ids] for name, value in self.own.items()})

    def denoised(self, x: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        """D(x, t) at the same arguments."""
        return self.predict(x, t, ids).denoised.to(x.dtype)


@dataclass(frozen=True)
class Start:
    """A checked request for samples: where they start, the stream of their noise, their model, and their grid's times, or
    t_max and t_min."""

    x: Tensor
    noise: Stream
    model: CountedModel
    times: Tensor


def check_model(model: ScoreModel) -> None:
    """Refuses, with TypeError, what is not a score model, and warns of active dropout."""
    if isinstance(getattr(model, "_orig_mod", None), ScoreModel):
        raise TypeError("samples are drawn from a ScoreModel, got one inside torch.compile: compile only its network, by "
                        "model.compile() or model.network.compile()")  # fmt: skip
    if not isinstance(model, ScoreModel):
        raise TypeError(f"samples are drawn from a ScoreModel, got {type(model).__name__}: wrap a network, "
                        "LearnedScore(network, sde, parameterization, event_shape), or a function, FunctionScore(function, "
                        "sde, event_shape)")  # fmt: skip
    for name in ("sde", "event_shape"):
        if not hasattr(model, name):
            raise TypeError(f"{type(model).__name__} has no {name}: a ScoreModel sets self.sde and self.event_shape")
    parts = [*model.modules()] if isinstance(model, nn.Module) and model.training else []
    if any(isinstance(part, nn.Dropout | nn.Dropout1d | nn.Dropout2d) and part.training and part.p for part in parts):
        warnings.warn(
            "the model is in training mode, so its dropout changes every call: model.eval() first", stacklevel=5
        )


def begin(
    model: ScoreModel, shape: Sequence[int], seed: int | None = None, noise: NoiseSource | None = None,
    x_init: Tensor | None = None, condition: Mapping[str, Any] | None = None, dtype: torch.dtype | None = None,
    grid: Grid | None = None, predictor: Step | None = None,
) -> Start:  # fmt: skip
    """Checks a request for samples and draws the model's start at the grid's first time (t_max without one), unless
    `x_init` gives it.

    A noise source that depends on the grid (`NoiseSource.along`) is bound to it where a predictor goes over all times.

    Raises:
        ValueError: the shape is not (batch, *event_shape), x_init has another shape, both seed and noise are given, or the
            grid is not one (`grid.check`).
        TypeError: `model` is not a score model, a condition's name is unknown to it, or `noise` is not a noise source.
    """
    keep_freed_memory()
    check_model(model)
    shape = _checked_request(model, shape, seed, noise, x_init, dtype)
    device = model.device if x_init is None else x_init.device
    condition = checked_condition(model, shape, condition, device)
    dtype = dtype or (model.dtype if x_init is None else x_init.dtype)
    if dtype != at_least_single(dtype):
        warnings.warn(f"a state in {dtype} is rounded at every step; over a thousand steps its spread can grow by 20 %: "
                      "give dtype=torch.float32, whatever the dtype of the weights, and round the samples",
                      stacklevel=4)  # fmt: skip
    source, sde = noise or BatchNoise(seed), model.sde
    ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64)
    times = ends if grid is None else grids.check(grid(sde), sde)
    if predictor is not None:
        source = source.along(sde.half_log_snr(times), predictor.shares)
    stream, t = source.open(shape, dtype, device), times[0].item()
    x = model.start_at(stream(0, 0), t) if x_init is None else x_init.to(dtype, copy=True)  # a step may write into it
    return Start(x, stream, CountedModel(model, condition), times)


def _checked_request(
    model: ScoreModel, shape: Sequence[int], seed: int | None, noise: NoiseSource | None, x_init: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[int, ...]:  # fmt: skip
    """The shape as a tuple of ints, if the request is consistent in itself; the errors are those of `begin`."""
    if not isinstance(shape, Sequence):
        raise ValueError(f"shape is (batch, {', '.join(map(str, model.event_shape))}) for this model, got {shape!r}")
    shape = tuple(whole("size in shape", size, 0) for size in shape)
    if seed is not None and noise is not None:
        raise ValueError("give either seed= (one generator for the batch) or noise= (a noise source), not both")
    if noise is not None and not isinstance(noise, NoiseSource):
        raise TypeError(
            f"noise is a noise source such as SampleNoise(range(batch)), got {noise!r}; for an integer use seed="
        )
    if x_init is not None and tuple(tensor("x_init", x_init).shape) != shape:
        raise ValueError(f"x_init has shape {tuple(x_init.shape)}, but the samples' shape is {shape}")
    if x_init is not None and not x_init.is_floating_point():
        raise TypeError(f"x_init is a floating-point tensor, got {x_init.dtype}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype is one of torch's floating-point types, such as torch.float64, got {dtype!r}")
    return shape


def warn_of_lost(x: Tensor, model: ScoreModel, t: float) -> None:
    """Warns where samples at t are not finite, or over a hundred times as large as x_t is for the model's data."""
    norm = torch.linalg.vector_norm(x, dtype=at_least_single(x.dtype)).item()
    (mean, std), at = model.clean_moments(), as_time(t)
    clean = math.hypot(float(torch.as_tensor(mean).square().mean().sqrt()), std)
    usual = math.hypot(float(model.sde.alpha(at)) * clean, float(model.sde.sigma(at)))
    size = norm / math.sqrt(max(x.numel(), 1))
    if math.isfinite(size) and not size > 100 * usual:
        return
    lost = 0 if math.isfinite(size) else int((~x.reshape(len(x), -1).isfinite().all(1)).sum())
    what = (f"{lost} of {len(x)} samples are not finite" if lost else
            f"samples have a root mean square of {size:.2g}, where {usual:.2g} is expected of the model's data")  # fmt: skip
    warnings.warn(f"{what}: the model's outputs are wrong, or the sampler diverged; take more steps, or weaker guidance",
                  stacklevel=4)  # fmt: skip


def chosen_times(
    trajectory: bool, points: int, times: Tensor | None, t_start: float, t_end: float
) -> Tensor | None:  # fmt: skip
    """The times at which a solution is kept, shape (T,) in float64: those given, or `points` equally spaced ones for a
    trajectory; else None.

    Raises:
        ValueError: times leave the interval, are not ordered in the direction of integration, or there are none.
    """
    if times is None:
        if not trajectory:
            return None
        if points < 2:
            raise ValueError(f"a trajectory has points >= 2, got points={points}")
        return torch.linspace(t_start, t_end, points, dtype=torch.float64)
    times = torch.as_tensor(times).detach().to("cpu", torch.float64)
    sign = math.copysign(1.0, t_end - t_start)
    if times.ndim != 1 or not len(times) or not (sign * times.diff() > 0).all():
        direction = "increasing" if sign > 0 else "decreasing"
        raise ValueError(f"times are a list of {direction} times from {t_start:g} to {t_end:g}, "
                         f"got shape {tuple(times.shape)}: {times.flatten()[:6].tolist()}")  # fmt: skip
    if not (sign * (times - t_start) >= 0).all() or not (sign * (t_end - times) >= 0).all():
        raise ValueError(f"times lie between {t_start:g} and {t_end:g}, got {times[0]:g} to {times[-1]:g}")
    return times

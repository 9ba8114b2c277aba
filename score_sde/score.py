r"""Score models: callables (x, t, **condition) -> Prediction that know their SDE.

A learned model wraps a network, D(x, t) = c_skip x + c_out F(c_in x, c_noise); an exact one takes the posterior mean
D(x, t) = E[x_0 | alpha x_0 + sigma eps = x] from a closed-form target. A sampler treats both alike.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from score_sde.checks import number, one_of, real
from score_sde.parameterization import PREDICTIONS, Parameterization, Row, Score
from score_sde.prediction import Coefficient, Prediction, scaled
from score_sde.sde import SDE, Time, as_time, expand


class ClosedForm(Protocol):
    """A law of clean data whose denoiser is known at every noise level (see `score_sde.targets`)."""

    mean: Tensor
    std: float

    @property
    def event_shape(self) -> torch.Size: ...

    def denoise(self, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor: ...

    def marginal(self, alpha: float, sigma: float) -> Any: ...


class ScoreModel(ABC):
    """A callable (x, t, **condition) -> Prediction.

    Attributes:
        sde: the forward process whose marginals p_t the model describes.
        event_shape: shape of one sample.
        condition_names: the keywords that a call accepts besides x and t.
        data_std: standard deviation of the clean data as far as the model knows it, a scale for solvers.
        num_classes: the number of classes that the condition `label` may name, None where unknown.
        needed: conditions that every training example had, so that the network has not learnt to predict without them.
        learns_variance: whether its predictions have a `variance_weight`, None where unknown.
        predicts: False for a classifier of noisy data, which only shares the interface.
    """

    sde: SDE
    event_shape: tuple[int, ...]
    data_std: float = 1.0
    num_classes: int | None = None
    condition_names: frozenset[str] = frozenset()
    needed: frozenset[str] = frozenset()
    learns_variance: bool | None = None
    predicts: bool = True

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters, and of samples by default."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of samples by default: torch's default, or that of a network's weights (float32 at least)."""
        return torch.get_default_dtype()

    @abstractmethod
    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        """The prediction at x of shape (batch, *event_shape), for t a float or a tensor of shape () or (batch,).

        Adaptive solvers and likelihoods pass t of shape (batch,) in float64; `sde.expand(t, x)` shapes it to multiply x.
        """

    def check(self, shape: Sequence[int], condition: Mapping[str, Any]) -> None:
        """Refuses a batch shape or a condition that does not fit the model.

        Raises:
            ValueError: shape[1:] is not the model's event shape.
            TypeError: a condition's name is unknown.
        """
        if tuple(shape[1:]) != tuple(self.event_shape) or len(shape) == 0:
            raise ValueError(f"this model takes x of shape (batch, {', '.join(map(str, self.event_shape))}), "
                             f"got {tuple(shape)}")  # fmt: skip
        unknown = condition.keys() - self.condition_names
        if unknown:
            known = ", ".join(sorted(self.condition_names)) or "none"
            raise TypeError(f"unknown condition {', '.join(sorted(unknown))!r}; this model accepts: {known}")

    def per_sample(self, name: str, value: Any, batch: int) -> bool:
        """Whether a condition's value has one row for each sample: a tensor whose first dimension is the batch."""
        return isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch

    def calls_at(self, t: float) -> int:
        """Network calls that a prediction at time t will take, e.g. 2 under guidance; the later `Prediction.calls`."""
        return 1

    def start(self, z: Tensor) -> Tensor:
        """The draw of the prior at t_max that standard normal noise z makes: prior_std z."""
        return z * self.sde.prior_std

    def start_at(self, z: Tensor, t: float) -> Tensor:
        """The start of a grid that begins at t: alpha E[x_0] + sqrt(alpha^2 Var x_0 + sigma^2) z; at t_max, `start(z)`."""
        if self._is_t_max(t):
            return self.start(z)
        alpha, sigma = _kernel(self.sde, t)
        mean, std = self.clean_moments()
        return (alpha * torch.as_tensor(mean, device=z.device) + math.hypot(alpha * std, sigma) * z.double()).to(z)

    def _is_t_max(self, t: float) -> bool:
        return t >= self.sde.t_max - 1e-9 * (self.sde.t_max - self.sde.t_min)

    def clean_moments(self) -> tuple[Tensor | float, float]:
        """E[x_0], and the standard deviation of x_0 about it, pooled over elements: 0 and `data_std` unless overridden."""
        return 0.0, self.data_std

    def log_start(self, x: Tensor, t: float) -> Tensor:
        """Log-density in nats at x, shape (batch,) in float64, of the Gaussian that `start_at` draws from at t.

        `start_at` must be affine in z, element by element: two of its values then give mean and standard deviation.
        """
        zero = torch.zeros((1, *x.shape[1:]), dtype=torch.float64, device=x.device)
        mean = self.start_at(zero, t)
        law = torch.distributions.Normal(mean, self.start_at(zero + 1, t) - mean)
        return law.log_prob(x.double()).flatten(1).sum(1)

    def log_terminal(self, x: Tensor, t: float | None = None) -> Tensor:
        """Log-density of x_t at x, shape (batch,), t_max if t is left out: `log_start` unless p_t itself is known."""
        return self.log_start(x, self.sde.t_max if t is None else t)

    def prepare(self, times: Iterable[float]) -> None:  # noqa: B027
        """Tabulates what depends only on time; a sampler calls it with its whole grid before the first step."""


def checked_condition(
    model: ScoreModel, shape: Sequence[int], condition: Mapping[str, Any] | None, device: torch.device
) -> dict[str, Any]:
    """The condition for a batch of this shape; a single label or context is repeated for all samples.

    Raises:
        ValueError, TypeError: see `ScoreModel.check`; or a label is not a class of the model.
    """
    given = _repeated(model, shape[0] if len(shape) else 0, condition, device)
    model.check(shape, given)
    if missing := sorted(model.needed - given.keys()):
        warnings.warn(f"this network was trained with each example's {' and '.join(missing)} and has not learnt to do "
                      f"without: give condition={{{missing[0]!r}: ...}}", stacklevel=4)  # fmt: skip
    return given


def in_rows(model: ScoreModel, count: int, condition: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """The condition with one row for each of `count` samples that are drawn in parts, on the model's device.

    Raises:
        ValueError: it has another number of rows, or a label is not a class of the model.
    """
    given = {name: torch.as_tensor(value) for name, value in _repeated(model, count, condition, model.device).items()}
    for name, value in given.items():
        if value.ndim == 0 or len(value) != count:
            rows = "one value" if value.ndim == 0 else f"{len(value)} rows"
            raise ValueError(f"condition {name!r} has {rows}, for num_samples={count}")
    return {name: value.to(model.device) for name, value in given.items()}


def _repeated(
    model: ScoreModel, count: int, condition: Mapping[str, Any] | None, device: torch.device
) -> dict[str, Any]:
    """The condition with a single label or context, bare or as the only row, repeated for each of `count` samples."""
    if not isinstance(condition, Mapping | None):
        raise TypeError(f"condition is a mapping from names to values, e.g. {{'label': 3}}, got {condition!r}")
    given = dict(condition or {})
    label = given.get("label")
    if isinstance(label, str) or (isinstance(label, Sequence) and any(isinstance(each, str) for each in label)):
        raise TypeError(
            f"a label is the number of a class, got {label!r}: give list(run.config.class_names).index(name)"
        )
    for name, single in (("label", 0), ("context", 1)):
        if given.get(name) is not None:
            value = torch.as_tensor(given[name], device=device)
            if value.ndim == single and (single == 0 or len(value) != count):
                value = value.unsqueeze(0)
            shared = value.ndim > 0 and len(value) == 1 != count
            given[name] = value.expand(count, *value.shape[1:]).contiguous() if shared else value
    label = given.get("label")
    if isinstance(label, Tensor) and len(label) != count:
        raise ValueError(f"label has {len(label)} rows for {count} samples: give one for all, or one for each")
    if isinstance(label, Tensor) and model.num_classes:
        unknown = (label < -1) | (label >= model.num_classes)
        if unknown.any():
            raise ValueError(f"label={int(label[unknown][0])}, but this model knows the classes 0 to "
                             f"{model.num_classes - 1} (and -1 for none)")  # fmt: skip
    return given


def condition_names_of(function: Callable[..., Any]) -> frozenset[str]:
    """The named parameters of a function (x, t, ...) beyond its first two."""
    parameters = list(inspect.signature(function).parameters.values())
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(p.name for p in parameters[2:] if p.kind in kinds)


def subset(condition: Mapping[str, Any], names: frozenset[str]) -> dict[str, Any]:
    """The conditions with these names."""
    return {name: value for name, value in condition.items() if name in names}


def _check_sde(sde: SDE) -> None:
    """Refuses what is not an SDE (TypeError) and a schedule that cannot be used (ValueError)."""
    if not isinstance(sde, SDE):
        raise TypeError(f"an SDE is an object, e.g. VPSDE(); got {sde!r}")
    sde.check()


def _learns(sde: SDE) -> bool:
    """Whether an optimiser may change the schedule at every step."""
    return isinstance(sde, nn.Module) and any(parameter.requires_grad for parameter in sde.parameters())


def _kernel(sde: SDE, t: float) -> tuple[float, float]:
    """alpha and sigma at t."""
    return sde.alpha(t).item(), sde.sigma(t).item()


def _level(sde: SDE, t: Time) -> tuple[Coefficient, Coefficient]:
    """alpha and sigma at t: floats, or float64 tensors of shape (batch,) where each sample has its own time.

    Raises ValueError for a float at which there is no noise or the SDE is not defined.
    """
    if is_batched(t):
        times = as_time(t).double()
        return sde.alpha(times), sde.sigma(times)
    t = float(t)
    alpha, sigma = _kernel(sde, t)
    if not (alpha > 0 and sigma > 0) or _outside(sde, t):
        _refuse_times(sde, as_time(t).reshape(1))
    return alpha, sigma


def _outside(sde: SDE, t: Any) -> Any:
    """Whether times, a float or a tensor, are above t_max or below both 0 and t_min, by more than rounding."""
    slack = 1e-6 * (sde.t_max - sde.t_min)
    return (t > sde.t_max + slack) | (t < min(0.0, sde.t_min) - slack)


def _refuse_times(sde: SDE, t: Tensor) -> None:
    """Refuses, with ValueError, times at which there is no noise, and so no score, or where the SDE is not defined."""
    if (bare := ~(sde.sigma(t) > 0)).any():
        raise ValueError(
            f"at t={t[bare][0]:g} {sde!r} has no noise, so there is no score: its least time is t_min={sde.t_min:g}"
        )
    if (lost := _outside(sde, t) | sde.half_log_snr(t).isnan()).any():
        raise ValueError(f"{sde!r} is not defined at t={t[lost][0]:g}: its times are {sde.t_min:g} to {sde.t_max:g}")


def _event_shape(given: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(given, Sequence):
        raise TypeError(f"event_shape is a tuple such as (2,), got {given!r}")
    if not len(given):
        raise ValueError("an event has at least one dimension: numbers are vectors of length 1, event_shape=(1,)")
    return tuple(given)


def is_batched(t: Time) -> bool:
    """Whether t needs tensor arithmetic: one time per sample, a time on an accelerator, or one that requires gradients."""
    return isinstance(t, Tensor) and (t.ndim > 0 or t.device.type != "cpu" or t.requires_grad)


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The dtype itself, or float32 for half precision, which is too coarse for a time or the sum of a thousand steps."""
    return torch.promote_types(dtype, torch.float32)


def _forward(network: nn.Module) -> Callable[..., Any]:
    """The `forward` of a network, also of one that torch.compile has wrapped."""
    return getattr(network, "_orig_mod", network).forward


def _device_of(module: nn.Module) -> torch.device:
    """The device of a module's weights; the CPU if it has none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


KEPT = 10_000
"""Number of times whose coefficients a model keeps: more than any grid has, and a bound on what adaptive solvers leave."""


class _Tabulated(ScoreModel):
    """A score model that keeps what depends only on time, as floats, for each time that it has met."""

    _levels: dict[float, tuple[float, ...]]

    @abstractmethod
    def _columns(self, t: Tensor) -> tuple[Tensor, ...]:
        """What depends only on time, alpha and sigma first, at float64 times t; each of t's shape."""

    def _refuse(self, t: Tensor) -> None:
        """Raises ValueError for times at which there is no prediction."""
        _refuse_times(self.sde, t)

    def _is_learnt(self) -> bool:
        """Whether the columns may change at every step of an optimiser, so that they must not be kept."""
        return _learns(self.sde)

    def prepare(self, times: Iterable[float]) -> None:
        t = torch.as_tensor(list(times), dtype=torch.float64)
        self._refuse(t)
        rows = zip(*(column.tolist() for column in self._columns(t)), strict=True)
        if len(self._levels) + len(t) > KEPT:
            self._levels.clear()
        self._levels.update(zip(t.tolist(), rows, strict=True))

    def _row(self, t: Time) -> tuple[Coefficient, ...]:
        """The columns at t: floats, or of shape (batch,) where each sample has its own time."""
        if is_batched(t):
            return self._columns(as_time(t).double())
        t = float(t)
        if t not in self._levels or self._is_learnt():
            self.prepare([t])
        return self._levels[t]


class LearnedScore(nn.Module, _Tabulated):
    """A network F seen through a parameterization.

    Args:
        network: module (x, c_noise, **condition) -> F, with x and F of shape (batch, *event_shape) and c_noise of
            shape (batch,). x arrives in the dtype of the network's weights, whatever the state's dtype; c_noise at least in
            float32 (bfloat16 would round step 999 to 1000). The further named parameters of its `forward` are the
            conditions it accepts, except `label` where the network has an attribute `num_classes` that is None.
            A network whose attribute `learned_variance` is true returns twice as many channels: F, and then v of the
            variance weight w = (v + 1) / 2 (Nichol & Dhariwal 2021, https://arxiv.org/abs/2102.09672, eq. 15).
        sde: the forward process it is trained on.
        parameterization: what F means.
        event_shape: shape of one sample.

    Raises:
        TypeError: an argument is of another type, or `network.forward` does not take (x, c_noise).
        ValueError: the SDE's schedule cannot be used (see `SDE.check`); when called, x or F has another shape.
    """

    sde: SDE
    parameterization: Parameterization
    data_std: float
    _weight: nn.Parameter | None  # one of the network's, for its dtype

    def __init__(
        self, network: nn.Module, sde: SDE, parameterization: Parameterization, event_shape: Sequence[int]
    ) -> None:
        super().__init__()
        _check_sde(sde)
        if not isinstance(network, nn.Module) or not isinstance(event_shape, Sequence):
            raise TypeError("LearnedScore(network, sde, parameterization, event_shape) takes a torch.nn.Module and a tuple "
                            f"such as (2,), got {type(network).__name__} and {event_shape!r}")  # fmt: skip
        if not isinstance(parameterization, Parameterization):
            raise TypeError(f"a parameterization is an object, e.g. Karras(sigma_data=0.5); got {parameterization!r}")
        self.network, self.sde, self.parameterization = network, sde, parameterization
        self.event_shape = _event_shape(event_shape)
        forward = _forward(network)
        try:
            inspect.signature(forward).bind_partial(None, None)
        except TypeError as error:
            raise TypeError(f"{type(network).__name__}.forward takes {inspect.signature(forward)}: a score network takes (x, "
                            "c_noise, **conditions), c_noise of shape (batch,)") from error  # fmt: skip
        self.condition_names = condition_names_of(forward)
        if getattr(network, "num_classes", 0) is None:
            self.condition_names -= {"label"}
        self.num_classes = getattr(network, "num_classes", None)
        self.learns_variance = bool(getattr(network, "learned_variance", False))

    @property
    def device(self) -> torch.device:
        return _device_of(self)

    @property
    def dtype(self) -> torch.dtype:
        return torch.get_default_dtype() if self._weight is None else at_least_single(self._weight.dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("sde", "parameterization"):  # the kept coefficients depend on both
            vars(self)["_levels"] = {}
        if name == "parameterization":
            vars(self)["data_std"] = value.sigma_data
        if name == "network":
            vars(self)["_weight"] = next((p for p in value.parameters() if p.is_floating_point()), None)
        super().__setattr__(name, value)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        self._levels.clear()  # a learnt schedule is part of the state
        return super().load_state_dict(*args, **options)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compiles the network in place; the code around it only looks coefficients up and gains nothing."""
        self.network.compile(*args, **options)

    def forward(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        self.check(real("x", x).shape, condition)
        alpha, sigma, row = self._level(t)
        raw, weight = self._network(x, row, condition)
        return Prediction(x, raw, alpha, sigma, row.c_skip, row.c_out, variance_weight=weight)

    def raw(self, x: Tensor, t: Time, **condition: Any) -> Tensor:
        """The network's output F(c_in x, c_noise), which the training objective compares with its target."""
        self.check(real("x", x).shape, condition)
        return self._network(x, self._level(t)[2], condition)[0]

    def _columns(self, t: Tensor) -> tuple[Tensor, ...]:
        return self.sde.alpha(t), self.sde.sigma(t), *self.parameterization.row(self.sde, t)

    def _level(self, t: Time) -> tuple[Coefficient, Coefficient, Any]:
        """alpha, sigma and the parameterization's row at t."""
        alpha, sigma, *row = self._row(t)
        return alpha, sigma, Row(*row)  # type: ignore[arg-type]

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape that the network must return for x."""
        batch, *event = x.shape
        return (batch, 2 * event[0], *event[1:]) if self.learns_variance else (batch, *event)

    def _inputs(self, x: Tensor, row: Any, condition: Mapping[str, Any]) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """The network's arguments: c_in x, c_noise of shape (batch,) and the conditions, in the dtype of its weights."""
        dtype = x.dtype if self._weight is None else self._weight.dtype
        real, batch, inputs = at_least_single(dtype), x.shape[0], scaled(row.c_in, x)
        if isinstance(row.c_noise, Tensor):
            c_noise = row.c_noise.to(x.device, real).expand(batch)
        else:
            c_noise = x.new_full((batch,), row.c_noise, dtype=real)
        given = {
            name: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for name, v in condition.items()
        }
        return inputs.to(dtype), c_noise, given

    def _network(self, x: Tensor, row: Any, condition: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """F, and the weight w of a learnt variance."""
        inputs, c_noise, conditions = self._inputs(x, row, condition)
        output = self.network(inputs, c_noise, **conditions)
        if not isinstance(output, Tensor) or output.shape != self._output_shape(x):
            given = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            fix = ", as its .sample is: let forward return that" if hasattr(output, "sample") else ""
            raise ValueError(f"{type(self.network).__name__} gives {given} for x of shape "
                             f"{tuple(x.shape)}: it must be {self._output_shape(x)}{fix}")  # fmt: skip
        if inputs.dtype != x.dtype:
            output = output.to(x.dtype)
        if not self.learns_variance:
            return output, None
        output, v = output.chunk(2, dim=1)
        return output, (v + 1) / 2


class ExactScore(ScoreModel):
    """The exact score of the marginals of a closed-form target under an SDE.

    Sampling starts from a Gaussian with the mean and the pooled variance of p(x_{t_max}) itself, so that the remaining
    error is the solver's.

    Args:
        target: a law with `denoise(x, alpha, sigma)` (see `score_sde.targets`).
        sde: the forward process.

    Raises:
        TypeError: the target has no denoiser, or `sde` is not an SDE.
        ValueError: the SDE's schedule cannot be used (see `SDE.check`).
    """

    def __init__(self, target: ClosedForm, sde: SDE) -> None:
        if not hasattr(target, "denoise") or isinstance(target, type):
            raise TypeError(
                f"ExactScore(target, sde) takes a law with a denoiser, e.g. targets.make('ring'); got {target!r}"
            )
        _check_sde(sde)
        self.target, self.sde, self.event_shape = target, sde, tuple(target.event_shape)
        self.data_std = float(target.std) or 1.0

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        self.check(real("x", x).shape, condition)
        if is_batched(t):
            expand(as_time(t), x)  # refuses t of any shape but () and (batch,)
        alpha, sigma = _level(self.sde, t)
        clean = self.target.denoise(x.to(at_least_single(x.dtype)), alpha, sigma)
        return Prediction(x, clean.to(x.dtype), alpha, sigma)

    def log_prob(self, x: Tensor, t: Time, **condition: Any) -> Tensor:
        """log p_t(x) in nats, shape (batch,), at one time for the whole batch; in single precision at least."""
        return self.target.marginal(*_kernel(self.sde, float(t))).log_prob(x.to(at_least_single(x.dtype)))

    def start(self, z: Tensor) -> Tensor:
        """alpha E[x_0] + sqrt(alpha^2 Var x_0 + sigma^2) z at t_max."""
        alpha, sigma = _kernel(self.sde, self.sde.t_max)
        return alpha * self.target.mean.to(z) + math.hypot(alpha * self.target.std, sigma) * z

    def clean_moments(self) -> tuple[Tensor | float, float]:
        return self.target.mean.double(), float(self.target.std)

    def log_terminal(self, x: Tensor, t: float | None = None) -> Tensor:
        """log p_t(x) of the target itself; `log_start` is the Gaussian with its first two moments."""
        return self.log_prob(x.double(), self.sde.t_max if t is None else t)

    def __repr__(self) -> str:
        return f"ExactScore({self.target!r}, {self.sde!r})"


MEANINGS: Mapping[str, Parameterization] = {"score": Score(), **PREDICTIONS}
"""What the function of a `FunctionScore` may return, by name."""


class FunctionScore(_Tabulated):
    """A score model from a plain function: a score, a denoiser, or a prediction of the noise or of a velocity.

    Args:
        function: (x, t, **condition) -> tensor of x's shape (batch, *event_shape), or a module with such a `forward`. t is
            in x's dtype, on x's device, and multiplies x: a scalar tensor, or of shape (batch, 1, ..., 1) where each sample
            has its own time; `t.reshape(-1).expand(len(x))` has shape (batch,) in both cases. Its further named parameters
            are the conditions it accepts.
        sde: the forward process whose marginals p_t the function describes.
        event_shape: shape of one sample.
        gives: "score" (grad log p_t), "denoised" (E[x_0 | x_t]), "noise" (E[eps | x_t]), "velocity" (alpha eps - sigma D)
            or "flow", the field of flow matching (alpha' D + sigma' eps, which is eps - D on `RectifiedFlow`).
        data_std: standard deviation of the clean data, a scale for solvers.
        device: where samples are drawn by default; if left out, where a module's weights are, else the CPU.

    Raises:
        TypeError: `function` cannot be called, or `sde` is not an SDE.
        ValueError: `gives` is unknown, or the SDE's schedule cannot be used; when called, x or the function's value has
            another shape.
    """

    def __init__(
        self, function: Callable[..., Tensor], sde: SDE, event_shape: Sequence[int], gives: str = "score",
        data_std: float = 1.0, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        if not callable(function):
            raise TypeError(f"FunctionScore(function, sde, event_shape) takes a function (x, t), got {function!r}")
        _check_sde(sde)
        self.function, self.sde, self.event_shape = function, sde, _event_shape(event_shape)
        self.gives = one_of("gives", gives, MEANINGS)
        self.data_std = number("data_std", data_std, above=0)
        self.condition_names = condition_names_of(_forward(function) if isinstance(function, nn.Module) else function)
        self._device = None if device is None else torch.device(device)

    def __setattr__(self, name: str, value: Any) -> None:
        vars(self)["_levels"] = {}  # the kept coefficients depend on `sde` and `gives`
        super().__setattr__(name, value)

    @property
    def device(self) -> torch.device:
        if self._device is None and isinstance(self.function, nn.Module):
            return _device_of(self.function)
        return self._device or torch.device("cpu")

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        self.check(real("x", x).shape, condition)
        at = expand(as_time(t), x) if is_batched(t) else x.new_full((), float(t))
        alpha, sigma, c_skip, c_out = self._row(t)
        value = self.function(x, at, **condition)
        if not isinstance(value, Tensor) or value.shape != x.shape:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"the function gives {given} for x of shape {tuple(x.shape)} and t of shape {tuple(at.shape)}: "
                             "it must return a tensor of x's shape")  # fmt: skip
        return Prediction(x, value.to(x.dtype), alpha, sigma, c_skip, c_out)

    def _columns(self, t: Tensor) -> tuple[Tensor, ...]:
        return self.sde.alpha(t), self.sde.sigma(t), *MEANINGS[self.gives].output(self.sde, t)

    def __repr__(self) -> str:
        name = getattr(self.function, "__name__", None) or repr(self.function)
        return f"FunctionScore({name}, {self.sde!r}, {self.event_shape}, {self.gives!r})"


class WrappedScore(ScoreModel):
    """A score model around another, whose SDE, event shape, conditions, device and start it keeps unless it overrides them."""

    def __init__(self, model: ScoreModel) -> None:
        if not isinstance(model, ScoreModel):
            raise TypeError(f"{type(self).__name__} wraps a ScoreModel, got {type(model).__name__}")
        self.model, self.sde, self.event_shape = model, model.sde, tuple(model.event_shape)
        self.condition_names, self.data_std, self.num_classes = model.condition_names, model.data_std, model.num_classes
        self.learns_variance = model.learns_variance

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def per_sample(self, name: str, value: Any, batch: int) -> bool:
        return self.model.per_sample(name, value, batch)

    def calls_at(self, t: float) -> int:
        return self.model.calls_at(t)

    def start(self, z: Tensor) -> Tensor:
        return self.model.start(z)

    def start_at(self, z: Tensor, t: float) -> Tensor:
        return self.start(z) if self._is_t_max(t) else self.model.start_at(z, t)

    def log_start(self, x: Tensor, t: float) -> Tensor:
        return self.model.log_start(x, t)

    def clean_moments(self) -> tuple[Tensor | float, float]:
        return self.model.clean_moments()

    def prepare(self, times: Iterable[float]) -> None:
        self.model.prepare(times)

    def check(self, shape: Sequence[int], condition: Mapping[str, Any]) -> None:
        super().check(shape, condition)
        self.model.check(shape, subset(condition, self.model.condition_names))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model!r})"


OUTSIDE = ("restrict", "refuse")


class ReparameterizedScore(_Tabulated, WrappedScore):
    """A model of one SDE seen in another's coordinates; see `reparameterize`."""

    def __init__(self, model: ScoreModel, sde: SDE, outside: str) -> None:
        super().__init__(model)
        self.learns_variance = False
        _check_sde(sde)
        self.sde = _common_range(model.sde, sde, one_of("outside", outside, OUTSIDE))
        slack = 1e-6 * (self.sde.t_max - self.sde.t_min)  # times may come in single precision
        self._range = (self.sde.t_min - slack, self.sde.t_max + slack)
        self._levels = {}

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        alpha, sigma, inner, ratio = self._row(t)
        inside = self.model(scaled(ratio, x), inner, **condition)
        return replace(inside, x=x, alpha=alpha, sigma=sigma, c_skip=inside.c_skip * ratio, variance_weight=None)

    def prepare(self, times: Iterable[float]) -> None:
        times = [float(t) for t in times]
        super().prepare(times)
        self.model.prepare([self._levels[t][2] for t in times])

    def _refuse(self, t: Tensor) -> None:
        if (outside := ~self._inside(t)).any():
            raise ValueError(f"t={t[outside][0]:g} lies outside [{self.sde.t_min:g}, {self.sde.t_max:g}], the times of "
                             f"{self.sde!r} at whose noise levels the model is defined")  # fmt: skip

    def _inside(self, t: Tensor) -> Tensor:
        """Whether times are in the common range, up to rounding."""
        return (t >= self._range[0]) & (t <= self._range[1])

    def _is_learnt(self) -> bool:
        return super()._is_learnt() or _learns(self.model.sde)

    def calls_at(self, t: float) -> int:
        return self.model.calls_at(float(self._row(float(t))[2]))

    def start(self, z: Tensor) -> Tensor:
        """The model's own start at the noise level of this t_max, scaled to this path."""
        return self.start_at(z, self.sde.t_max)

    def start_at(self, z: Tensor, t: float) -> Tensor:
        _, _, inner, ratio = self._row(float(t))
        return (self.model.start_at(z.double(), float(inner)) / ratio).to(z)

    def log_start(self, x: Tensor, t: float) -> Tensor:
        return self._rescaled(self.model.log_start, x, t)

    def log_terminal(self, x: Tensor, t: float | None = None) -> Tensor:
        return self._rescaled(self.model.log_terminal, x, self.sde.t_max if t is None else t)

    def _rescaled(self, log_density: Callable[[Tensor, float], Tensor], x: Tensor, t: float) -> Tensor:
        """The model's log-density at the same noise level, on this path: log p(r x) + d log r, r = alpha / alpha'."""
        _, _, inner, ratio = self._row(float(t))
        return log_density(ratio * x.double(), float(inner)) + x[0].numel() * math.log(ratio)

    def _columns(self, t: Tensor) -> tuple[Tensor, ...]:
        """alpha and sigma at t here, the model's time of the same noise level, and the model's alpha there over this one."""
        t = torch.where(self._inside(t), t.clamp(self.sde.t_min, self.sde.t_max), torch.nan)
        known, alpha = self.model.sde, self.sde.alpha(t)
        inner = known.time_at(self.sde.half_log_snr(t)).clamp(known.t_min, known.t_max)
        inner = torch.where(t.isnan(), t, inner)  # an SDE's time_at need not pass a NaN on
        return alpha, self.sde.sigma(t), inner, known.alpha(inner) / alpha

    def __repr__(self) -> str:
        return f"reparameterize({self.model!r}, {self.sde!r})"


class ReparameterizedDensity(ReparameterizedScore):
    """A `ReparameterizedScore` of a model with a density."""

    def log_prob(self, x: Tensor, t: Time, **condition: Any) -> Tensor:
        """log p_t(x) = log p(r x) + d log r at the model's time, r = alpha / alpha'; shape (batch,), one t for the batch."""
        _, _, inner, ratio = self._row(float(t))
        size = math.prod(self.event_shape)
        return self.model.log_prob(ratio * x, inner, **condition) + size * math.log(ratio)  # type: ignore[attr-defined]


def reparameterize(model: ScoreModel, sde: SDE, outside: str = "restrict") -> ScoreModel:
    """A model of one SDE seen in another's coordinates: again a score model, for every sampler and solver.

    At equal lambda = log(alpha / sigma) the paths of two SDEs carry the same mixture of data and noise up to scale:

        D'(x, t') = D(alpha(t) / alpha'(t') x, t),    lambda(t) = lambda'(t'),

    and the probability-flow trajectories are the same up to scale and time. A learnt variance is dropped: it lies between
    two variances of the model's own process, which differ on another path. Source: Karras et al. 2022,
    https://arxiv.org/abs/2206.00364, appendix B; Kingma et al. 2021, https://arxiv.org/abs/2107.00630, section 5.1.

    Args:
        model: a model on its own path, `model.sde`.
        sde: the path to use it on.
        outside: what to do with noise levels of `sde` beyond the model's. "restrict" takes a copy of `sde` whose t_min and
            t_max bound the common range, so that samplers stay inside; "refuse" raises.

    Returns:
        The model on the new path, with a `log_prob` if the model has one. A float t outside the common range raises
        ValueError; in a tensor t, samples outside it become NaN.

    Raises:
        TypeError: `model` is not a score model, or `sde` not an SDE.
        ValueError: the two ranges of noise levels do not overlap, or outside="refuse" and `sde` goes beyond the model's.
    """
    if not isinstance(model, ScoreModel) or not model.predicts:
        raise TypeError(f"reparameterize(model, sde) takes a score model, got {model!r}")
    kind = ReparameterizedDensity if hasattr(type(model), "log_prob") else ReparameterizedScore
    return kind(model, sde, outside)


def _common_range(known: SDE, sde: SDE, outside: str) -> SDE:
    """`sde`, or a copy of it whose t_min and t_max lie within the noise levels of `known`."""
    (first, last), (lowest, highest) = sde.half_log_snr_range, known.half_log_snr_range
    low, high = max(first, lowest), min(last, highest)
    if low >= high:
        raise ValueError(f"{sde!r} and the model's {known!r} have no noise levels in common")
    wide = 1e-9 * (high - low)
    noisier, cleaner = first < low - wide, last > high + wide
    if not (noisier or cleaner):
        return sde
    if outside == "refuse":
        raise ValueError(f"{sde!r} has noise levels that the model's {known!r} does not know: the common range of "
                         f"log(alpha / sigma) is [{low:.6g}, {high:.6g}]; change t_min or t_max, or give "
                         "outside='restrict'")  # fmt: skip
    t_min = float(sde.time_at(high)) if cleaner else sde.t_min
    t_max = float(sde.time_at(low)) if noisier else sde.t_max
    narrow = copy.copy(sde)
    narrow.t_min, narrow.t_max = t_min, t_max
    return narrow

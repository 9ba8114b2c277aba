r"""Score models: callables (x, t, **condition) -> Prediction that know their SDE.

A learned model wraps a network, D(x, t) = c_skip x + c_out F(c_in x, c_noise); an exact one asks a closed-form
target for its posterior mean, D(x, t) = E[x_0 | alpha x_0 + sigma eps = x]. To a sampler they are the same thing.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from score_sde.parameterization import Parameterization, Row
from score_sde.prediction import Coefficient, Prediction
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
        condition_names: the keywords that a call accepts beside x and t.
        data_std: standard deviation of the clean data as far as the model knows it, a scale for solvers.
    """

    sde: SDE
    event_shape: tuple[int, ...]
    data_std: float = 1.0
    condition_names: frozenset[str] = frozenset()

    @property
    def device(self) -> torch.device:
        """Where the model's parameters lie, and samples start unless told otherwise."""
        return torch.device("cpu")

    @abstractmethod
    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        """The prediction at x of shape (batch, *event_shape), t a float or a tensor of shape () or (batch,)."""

    def check(self, shape: Sequence[int], condition: Mapping[str, Any]) -> None:
        """Refuses a batch shape or a condition that the model does not know.

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

    def start(self, z: Tensor) -> Tensor:
        """Standard normal noise turned into a draw of the prior at t_max: prior_std z."""
        return z * self.sde.prior_std

    def prepare(self, times: Iterable[float]) -> None:  # noqa: B027
        """Tabulates what depends on time alone; called by a sampler with its whole grid before the first step."""


def is_batched(t: Time) -> bool:
    """Whether t needs tensor arithmetic: a time per sample, one on a device, or one that gradients flow through."""
    return isinstance(t, Tensor) and (t.ndim > 0 or t.device.type != "cpu" or t.requires_grad)


class LearnedScore(nn.Module, ScoreModel):
    """A network F seen through a parameterization.

    Args:
        network: module (x, c_noise, **condition) -> F, with x and F of shape (batch, *event_shape) and c_noise of
            shape (batch,). The named parameters of its `forward` beyond these two are the conditions it accepts.
        sde: the forward process it is trained on.
        parameterization: what F means.
        event_shape: shape of one sample.

    Raises:
        ValueError: the SDE's schedule cannot be used (see `SDE.check`).
    """

    def __init__(
        self, network: nn.Module, sde: SDE, parameterization: Parameterization, event_shape: Sequence[int]
    ) -> None:
        super().__init__()
        sde.check()
        self.network, self.sde, self.parameterization = network, sde, parameterization
        self.event_shape, self.data_std = tuple(event_shape), parameterization.sigma_data
        parameters = list(inspect.signature(getattr(network, "_orig_mod", network).forward).parameters.values())
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self.condition_names = frozenset(p.name for p in parameters[2:] if p.kind in named)
        self._levels: dict[float, tuple[float, ...]] = {}

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def forward(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        self.check(x.shape, condition)
        alpha, sigma, row = self._level(t)
        return Prediction(x, self._network(x, row, condition), alpha, sigma, row.c_skip, row.c_out)

    def raw(self, x: Tensor, t: Time, **condition: Any) -> Tensor:
        """The network's output F(c_in x, c_noise), what the training objective compares with its target."""
        self.check(x.shape, condition)
        return self._network(x, self._level(t)[2], condition)

    def prepare(self, times: Iterable[float]) -> None:
        t = torch.as_tensor(list(times), dtype=torch.float64)
        columns = (self.sde.alpha(t), self.sde.sigma(t), *self.parameterization.row(self.sde, t))
        self._levels |= dict(zip(t.tolist(), zip(*(column.tolist() for column in columns), strict=True), strict=True))

    def _level(self, t: Time) -> tuple[Coefficient, Coefficient, Any]:
        if is_batched(t):
            t = as_time(t).double()
            return self.sde.alpha(t), self.sde.sigma(t), self.parameterization.row(self.sde, t)
        t = float(t)
        if t not in self._levels:
            self.prepare([t])
        alpha, sigma, *row = self._levels[t]
        return alpha, sigma, Row(*row)  # type: ignore[arg-type]

    def _network(self, x: Tensor, row: Any, condition: Mapping[str, Any]) -> Tensor:
        if isinstance(row.c_in, Tensor):
            c_noise = row.c_noise.to(x).expand(x.shape[0])
            return self.network(expand(row.c_in, x) * x, c_noise, **condition)
        return self.network(row.c_in * x, x.new_full((x.shape[0],), row.c_noise), **condition)


class ExactScore(ScoreModel):
    """The exact score of the marginals of a closed-form target under an SDE.

    Sampling starts at a Gaussian with the mean and the pooled variance of p(x_{t_max}) itself, so that what is left of an
    error is the solver's.

    Args:
        target: a law with `denoise(x, alpha, sigma)` (see `score_sde.targets`).
        sde: the forward process.

    Raises:
        ValueError: the SDE's schedule cannot be used (see `SDE.check`).
    """

    def __init__(self, target: ClosedForm, sde: SDE) -> None:
        sde.check()
        self.target, self.sde, self.event_shape = target, sde, tuple(target.event_shape)
        self.data_std = float(target.std) or 1.0

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        self.check(x.shape, condition)
        alpha: Coefficient
        sigma: Coefficient
        if is_batched(t):
            alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        else:
            alpha, sigma = self.sde.alpha(float(t)).item(), self.sde.sigma(float(t)).item()
        return Prediction(x, self.target.denoise(x, alpha, sigma), alpha, sigma)

    def log_prob(self, x: Tensor, t: Time, **condition: Any) -> Tensor:
        """log p_t(x) in nats, shape (batch,), for a time shared by the batch."""
        alpha, sigma = (float(part(float(t))) for part in (self.sde.alpha, self.sde.sigma))
        return self.target.marginal(alpha, sigma).log_prob(x)

    def start(self, z: Tensor) -> Tensor:
        """alpha E[x_0] + sqrt(alpha^2 Var x_0 + sigma^2) z at t_max."""
        alpha, sigma = (part(self.sde.t_max).item() for part in (self.sde.alpha, self.sde.sigma))
        return alpha * self.target.mean.to(z) + math.hypot(alpha * self.target.std, sigma) * z

    def __repr__(self) -> str:
        return f"ExactScore({self.target!r}, {self.sde!r})"

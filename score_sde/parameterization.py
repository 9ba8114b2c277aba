r"""What a network's raw output means.

A parameterization is one row of a table of functions of time (Karras et al. 2022, table 1):

    D(x, t) = c_skip x + c_out F(c_in x, c_noise).

The regression target follows by solving D = x_0 for F at x_t = alpha x_0 + sigma eps:

    F* = (x_0 - c_skip x_t) / c_out = ((1 - alpha c_skip) x_0 - sigma c_skip eps) / c_out.

All but `Published` share c_in = 1 / sqrt(alpha^2 sigma_data^2 + sigma^2), which gives the network inputs of unit variance,
and c_noise = -lambda / 4 = log(sigma / alpha) / 4, which means the same noise level under every SDE.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from score_sde.checks import number, one_of
from score_sde.sde import SDE, Time, as_time, expand


class Row(NamedTuple):
    """The coefficients of D(x, t) = c_skip x + c_out F(c_in x, c_noise), float64 tensors of t's shape."""

    c_in: Tensor
    c_skip: Tensor
    c_out: Tensor
    c_noise: Tensor


class Parameterization(ABC):
    """The meaning of a network's output; a subclass defines `output(sde, t)`.

    Args:
        sigma_data: standard deviation of the clean data, in its units (positive).
    """

    def __init__(self, sigma_data: float = 1.0) -> None:
        if not number("sigma_data", sigma_data) > 0:
            raise ValueError(f"sigma_data is a positive standard deviation, got {sigma_data}")
        self.sigma_data = float(sigma_data)

    @abstractmethod
    def output(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) at float64 times t."""

    def row(self, sde: SDE, t: Time) -> Row:
        """The table row at time t, in float64."""
        t = as_time(t).double()
        c_in = (sde.alpha(t) ** 2 * self.sigma_data**2 + sde.sigma(t) ** 2).rsqrt()
        return Row(c_in, *self.output(sde, t), -sde.half_log_snr(t) / 4)

    def target(self, sde: SDE, t: Time, x0: Tensor, noise: Tensor) -> Tensor:
        """The regression target F*, for x0 and noise of shape (batch, *event)."""
        t = as_time(t).double()
        c_skip, c_out = self.output(sde, t)
        of_data, of_noise = (1 - sde.alpha(t) * c_skip) / c_out, -sde.sigma(t) * c_skip / c_out
        return expand(of_data, x0) * x0 + expand(of_noise, x0) * noise

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sigma_data={self.sigma_data})"


class Denoised(Parameterization):
    """F is the clean data: D = F."""

    def output(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = sde.alpha(t)
        return torch.zeros_like(alpha), torch.ones_like(alpha)


class Noise(Parameterization):
    """F is the noise: D = (x - sigma F) / alpha (Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 11)."""

    def output(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = sde.alpha(t)
        return 1 / alpha, -sde.sigma(t) / alpha


class Score(Parameterization):
    """F is the score: D = (x + sigma^2 F) / alpha, Tweedie's formula (Song & Ermon 2019; Efron 2011)."""

    def output(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha = sde.alpha(t)
        return 1 / alpha, sde.sigma(t) ** 2 / alpha


class Velocity(Parameterization):
    """F is v = alpha eps - sigma x_0: D = (alpha x - sigma F) / (alpha^2 + sigma^2).

    Source: Salimans & Ho 2022, https://arxiv.org/abs/2202.00512, appendix D, where alpha^2 + sigma^2 = 1.
    """

    def output(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        norm = alpha**2 + sigma**2
        return alpha / norm, -sigma / norm


class Flow(Parameterization):
    """F is the path's time derivative dx_t / dt = alpha' x_0 + sigma' eps, the target of conditional flow matching.

    On `RectifiedFlow` F = eps - x_0. With alpha' = f alpha and sigma' = sigma (f - lambda'),
    D = (F - (f - lambda') x) / (alpha lambda'), where lambda' = -g^2 / (2 sigma^2).
    Source: Lipman et al. 2023, https://arxiv.org/abs/2210.02747, theorem 3.
    """

    def output(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        rate = -(sde.diffusion(t) ** 2) / (2 * sde.sigma(t) ** 2)
        c_out = 1 / (sde.alpha(t) * rate)
        return (rate - sde.drift(t)) * c_out, c_out


class Karras(Parameterization):
    """The preconditioning of EDM, in the scaled variable x / alpha with noise level s = sigma / alpha:

    c_skip = sigma_data^2 / (s^2 + sigma_data^2) / alpha,  c_out = s sigma_data / sqrt(s^2 + sigma_data^2).

    Source: Karras et al. 2022, https://arxiv.org/abs/2206.00364, table 1.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__(sigma_data)

    def output(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, s = sde.alpha(t), sde.noise_level(t)
        total = s**2 + self.sigma_data**2
        return self.sigma_data**2 / (total * alpha), s * self.sigma_data * total.rsqrt()


LEVELS = ("time", "log_sigma")
PREDICTIONS: dict[str, Parameterization] = {
    "noise": Noise(), "velocity": Velocity(), "denoised": Denoised(), "flow": Flow()
}  # fmt: skip
"""What the output of a `Published` network may be, by name, up to its sign."""


class Published(Parameterization):
    """F is sign times the noise (or another prediction) of a published network, which takes x unscaled, c_in = 1, and

    c_noise = scale u + shift,    u = t ("time") or ln sigma ("log_sigma").

    DDPM and score_sde's VP networks take 999 t (sign 1); score_sde's VE networks, whose output over sigma is the score,
    take ln sigma (sign -1). Source: Karras et al. 2022, https://arxiv.org/abs/2206.00364, table 1, columns VP and VE.

    Args:
        level: "time" or "log_sigma", the u above.
        scale, shift: of the noise-level input, as above.
        sign: 1 or -1.
        prediction: F up to its sign: "noise", "velocity", "denoised" or "flow", as the classes above define them.

    Raises:
        ValueError: an option is unknown.
    """

    def __init__(
        self, level: str = "time", scale: float = 999.0, shift: float = 0.0, sign: float = 1.0, sigma_data: float = 1.0,
        prediction: str = "noise",
    ) -> None:  # fmt: skip
        super().__init__(sigma_data)
        if level not in LEVELS or sign not in (1, -1):
            raise ValueError(f"level is 'time' or 'log_sigma' and sign 1 or -1, got {level=}, {sign=}")
        self.level, self.scale, self.shift, self.sign = level, float(scale), float(shift), float(sign)
        self.prediction = one_of("prediction", prediction, PREDICTIONS)

    def output(self, sde: SDE, t: Tensor) -> tuple[Tensor, Tensor]:
        c_skip, c_out = PREDICTIONS[self.prediction].output(sde, t)
        return c_skip, self.sign * c_out

    def row(self, sde: SDE, t: Time) -> Row:
        t = as_time(t).double()
        level = t if self.level == "time" else sde.sigma(t).log()
        c_skip, c_out = self.output(sde, t)
        return Row(torch.ones_like(c_skip), c_skip, c_out, self.scale * level + self.shift)

    def __repr__(self) -> str:
        level = f"level={self.level!r}, scale={self.scale:g}, shift={self.shift:g}, sign={self.sign:g}"
        return f"Published({level}, sigma_data={self.sigma_data}, prediction={self.prediction!r})"


PublishedNoise = Published
"""The former name of `Published`, which configs and saved runs use."""

"""How much each noise level counts in denoising score matching.

A weighting is lambda(t), the weight of the denoiser's error |D - x_0|^2. The errors of the views of one prediction
are proportional:

    noise error = (alpha / sigma) D error,    score error = (alpha / sigma^2) D error,    F error = D error / c_out.

So lambda c_out^2 weighs |F - F*|^2, the noise error is (alpha c_out / sigma) times the F error, and the loss does not
depend on what the network is asked to output.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from score_sde.checks import number
from score_sde.sde import SDE

__all__ = [
    "KarrasWeighting",
    "LikelihoodWeighting",
    "MinSNRWeighting",
    "SigmaWeighting",
    "SimpleWeighting",
    "Weighting",
]


class Weighting(ABC):
    """The weight lambda(t) of |D - x_0|^2, for times of shape (batch,); shape (batch,)."""

    @abstractmethod
    def __call__(self, sde: SDE, t: Tensor) -> Tensor: ...


class SimpleWeighting(Weighting):
    """|noise error|^2, the same at every level: lambda = alpha^2 / sigma^2 (Ho et al. 2020, eq. 14, "L_simple")."""

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return sde.snr(t)


class SigmaWeighting(Weighting):
    """sigma^power |score error|^2: lambda = sigma^power alpha^2 / sigma^4 (Song & Ermon 2019, eq. 6, "anneal power").

    With power 2, the published choice, this equals `SimpleWeighting`; the papers differ only in convention (NCSN: one
    half of the sum over dimensions, DDPM: the mean, as here). Power 0 is the unweighted score error.
    """

    def __init__(self, power: float = 2.0) -> None:
        self.power = power

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return sde.snr(t) * sde.sigma(t) ** (self.power - 2)


class LikelihoodWeighting(Weighting):
    """g^2 |score error|^2: lambda = g^2 alpha^2 / sigma^4 (Song et al. 2021, https://arxiv.org/abs/2101.09258, eq. 7).

    Half the integral of this over t bounds the negative log-likelihood per dimension, up to a constant. Under
    uniform times its variance is large: use `ImportanceTimes`.
    """

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return sde.snr(t) * (sde.diffusion(t) / sde.sigma(t)) ** 2


class KarrasWeighting(Weighting):
    """lambda = (s^2 + sigma_data^2) / (s sigma_data)^2: with the Karras parameterization lambda c_out^2 = 1.

    sigma_data is the root mean square of the data. Karras et al. 2022, https://arxiv.org/abs/2206.00364, section 5.
    Raises ValueError if it is not positive.
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        self.sigma_data = number("sigma_data", sigma_data, above=0)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return sde.snr(t) + self.sigma_data**-2


class MinSNRWeighting(Weighting):
    """lambda = min(alpha^2 / sigma^2, gamma) (Hang et al. 2023, https://arxiv.org/abs/2303.09556, section 3.4).

    Raises ValueError if gamma is not positive.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        self.gamma = number("gamma", gamma, above=0)

    def __call__(self, sde: SDE, t: Tensor) -> Tensor:
        return sde.snr(t).clamp(max=self.gamma)

r"""A score model that is the gradient of a log-density, known up to a constant at each noise level.

With F(c_in x) = grad U the score (alpha D - x) / sigma^2, D = c_skip x + c_out F, integrates to

    log p_t(x) = ((alpha c_skip - 1) |x|^2 / 2 + alpha c_out / c_in U(c_in x)) / sigma^2 + const(t).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from score_sde.networks.energy import Conservative
from score_sde.parameterization import Parameterization
from score_sde.prediction import affine
from score_sde.score import LearnedScore
from score_sde.sde import SDE, Time

__all__ = ["EnergyScore"]


class EnergyScore(LearnedScore):
    """A `LearnedScore` of a `Conservative` network, with `log_prob`; for all objectives and samplers, also Metropolis steps.

    Raises:
        TypeError: the network is not a `Conservative`.
    """

    def __init__(
        self, network: Conservative, sde: SDE, parameterization: Parameterization, event_shape: Sequence[int]
    ) -> None:
        if not isinstance(network, Conservative):
            raise TypeError(f"EnergyScore takes a Conservative network, got {type(network).__name__}: wrap it, "
                            "Conservative(network)")  # fmt: skip
        super().__init__(network, sde, parameterization, event_shape)

    def log_prob(self, x: Tensor, t: Time, **condition: Any) -> Tensor:
        """log p_t(x) up to a constant that depends on t alone (and on the condition), shape (batch,)."""
        self.check(x.shape, condition)
        assert isinstance(self.network, Conservative)
        alpha, sigma, row = self._level(t)
        scaled, c_noise, told = self._inputs(x, row, condition)
        potential = self.network.potential(scaled, c_noise, **told).to(x.dtype)
        square = x.square().flatten(1).sum(1) / 2
        return affine((alpha * row.c_skip - 1) / sigma**2, square, alpha * row.c_out / (row.c_in * sigma**2), potential)

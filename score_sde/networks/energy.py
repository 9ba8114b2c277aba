"""A conservative network: the gradient of a scalar potential made from any network f.

    U(x, c) = sum_d x_d f_d(x, c),    F(x, c) = grad_x U.    F = 0 at f = 0, where all networks here start.

Source: Salimans & Ho 2021, https://openreview.net/forum?id=9AS-TF2jRNb ("Should EBMs model the energy or the score?").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from score_sde.networks.blocks import twice_differentiable

__all__ = ["Conservative"]


class Conservative(nn.Module):
    """F = grad U, whose Jacobian is symmetric at every noise level; `EnergyScore` makes a density of U.

    Args:
        network: f, a module (x, c_noise, label) -> (the shape of x).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.num_classes = getattr(network, "num_classes", None)

    def potential(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        """U, shape (batch,)."""
        named: dict[str, Any] = {} if label is None else {"label": label}
        return (x * self.network(x, c_noise, **named)).flatten(1).sum(1)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        # A functional transform works under no_grad, and F can be differentiated in turn.
        with twice_differentiable():
            return torch.func.grad(lambda v: self.potential(v, c_noise, label).sum())(x)

r"""The trace of each sample's Jacobian from vector-Jacobian products.

    tr J = sum_i e_i^T J e_i = E v^T J v for E v v^T = I  (Hutchinson 1990).

All take flat vectors: a pull (batch, d) -> (batch, d), v -> J^T v, which `torch.func.vjp` gives from one forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ExactTrace", "HutchPlusPlus", "Hutchinson", "Trace"]

Pull = Callable[[Tensor], Tensor]


class Trace(ABC):
    """(pull, ids) -> `count` columns whose mean estimates the trace, for the samples at the places ids of the batch."""

    count: int = 1

    @abstractmethod
    def __call__(self, pull: Pull, ids: Tensor) -> Tensor:
        """Float64 of shape (len(ids), count)."""


AT_ONCE = 256
"""Number of vectors per backward pass of the network: more only take more memory."""


class ExactTrace(Trace):
    """sum_i e_i^T J e_i, with AT_ONCE products per pass; `like` (batch, d) gives size, dtype and device."""

    def __init__(self, like: Tensor) -> None:
        self.like = like

    def __call__(self, pull: Pull, ids: Tensor) -> Tensor:
        diagonal = []
        for index in torch.arange(self.like.shape[1], device=ids.device).split(max(1, AT_ONCE // max(1, len(ids)))):
            basis = self.like.new_zeros((len(index), len(ids), self.like.shape[1]))
            basis[torch.arange(len(index), device=ids.device), :, index] = 1
            diagonal.append((basis * torch.func.vmap(pull)(basis)).sum(2))
        return torch.cat(diagonal).sum(0, dtype=torch.float64)[:, None]


class Hutchinson(Trace):
    """v^T J v for the signs v of standard normal probes (probes, batch, d): unbiased, without variance on diagonal J."""

    def __init__(self, probes: Tensor) -> None:
        self.probes, self.count = probes.sign(), len(probes)

    def __call__(self, pull: Pull, ids: Tensor) -> Tensor:
        v = self.probes[:, ids]
        return (v * torch.func.vmap(pull)(v)).sum(2, dtype=torch.float64).T


class HutchPlusPlus(Trace):
    """tr(Q^T J Q) + (d - k) g^T P J P g / |P g|^2, P = I - Q Q^T of rank d - k, for J near a multiple of I.

    The Jacobian J = I - alpha dD/dx of sigma n is near I in strong noise, except in a few directions, and 0 without noise.
    Q is an orthonormal basis of (I - J^T) S, S the first half of the standard normal probes (2 count, batch, d). g are the
    other probes: P g / |P g| is uniform on its sphere, which makes the estimate unbiased, and exact where J is a multiple
    of I on the range of P. Random signs would not be uniform there, and in few dimensions two of them may coincide, so that
    Q would contain a direction of round-off.
    Source: Meyer et al. 2021, https://arxiv.org/abs/2010.09649, algorithm 1; the norm: Epperly et al. 2024,
    https://arxiv.org/abs/2301.07825.
    """

    def __init__(self, probes: Tensor) -> None:
        self.count = len(probes) // 2
        self.sketch, self.g = probes[: min(self.count, probes.shape[2])], probes[self.count :]

    def __call__(self, pull: Pull, ids: Tensor) -> Tensor:
        jacobian = torch.func.vmap(pull)
        sketch, g = self.sketch[:, ids], self.g[:, ids]
        q = torch.linalg.qr((sketch - jacobian(sketch)).movedim(0, 2))[0].movedim(2, 0)
        rest = g - torch.einsum("qbd,qbe,pbe->pbd", q, q, g)
        squares = rest.square().sum(2, dtype=torch.float64).clamp_min(torch.finfo(rest.dtype).tiny)
        both = torch.cat([q, rest])
        inside, outside = (both * jacobian(both)).sum(2, dtype=torch.float64).split([len(q), len(rest)])
        return (inside.sum(0) + (g.shape[2] - len(q)) / squares * outside).T

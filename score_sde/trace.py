r"""Traces of a batch's Jacobians from vector-Jacobian products, sample by sample.

    tr J = sum_i e_i^T J e_i = E v^T J v for E v v^T = I  (Hutchinson 1990).

All take flat vectors: a pull (batch, d) -> (batch, d), v -> J^T v, as `torch.func.vjp` gives it from one forward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["ExactTrace", "HutchPlusPlus", "Hutchinson", "Trace"]

Pull = Callable[[Tensor], Tensor]


class Trace(ABC):
    """(pull, ids) -> `count` columns for the samples of those places in the batch, whose mean estimates the trace."""

    count: int = 1

    @abstractmethod
    def __call__(self, pull: Pull, ids: Tensor) -> Tensor:
        """Float64 of shape (len(ids), count)."""


AT_ONCE = 256
"""How many vectors go through a network's backward pass together: more only need memory for their activations."""


class ExactTrace(Trace):
    """Basis vector by basis vector, AT_ONCE of all samples together; `like` (batch, d) gives size, dtype and device."""

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
    """tr(Q^T J Q) + (d - k) g^T P J P g / |P g|^2, P = 1 - Q Q^T of rank d - k, for J near a multiple of 1.

    The Jacobian of sigma n is 1 but for a few directions under strong noise, and 0 without noise. Q spans 1 - J^T, of the
    denoiser, times the first half of the standard normal probes (2 count, batch, d); g are the others. P g / |P g| is
    uniform on its sphere: unbiased, and without variance where J is a multiple of 1 on it. Signs would not be uniform, and
    in few dimensions two of them may coincide, of which Q would hold a direction of round-off.
    Source: Meyer et al. 2021, arXiv:2010.09649, algorithm 1; the norm: Epperly et al. 2024, arXiv:2301.07825.
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

"""NCSN, the RefineNet of Song & Ermon 2019, https://arxiv.org/abs/1907.05600, appendix A: NCSNv2's with conditional norms."""

from __future__ import annotations

from collections.abc import Sequence

from score_sde.networks.refinenet import NCSNv2

__all__ = ["NCSN"]


class NCSN(NCSNv2):
    """A small NCSNv2(conditional=True): x (batch, channels, *sides), c_noise (batch,), label -> the shape of x.

    The published network has separate (gamma, alpha, beta) for each noise level; here they are functions of c_noise, so
    that one network serves any ladder and any continuous SDE. Raises ValueError as NCSNv2 does.
    """

    def __init__(
        self, event_shape: Sequence[int], width: int = 32, frequencies: int = 32, num_classes: int | None = None,
        checkpointing: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(event_shape, width, conditional=True, frequencies=frequencies, num_classes=num_classes,
                         checkpointing=checkpointing)  # fmt: skip

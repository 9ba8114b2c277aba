"""Tables between an SDE's t_max and t_min, as unconstrained vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from score_sde.sde import SDE
from score_sde.tuning.table import TunedTable

CLOSEST = 1e-6
"""Levels are mixed with this share of evenly spaced ones, so that they stay apart whatever z is."""


@dataclass(frozen=True)
class Span:
    """The half log SNRs at t_max (`first`) and t_min (`last`), and tables between them as unconstrained vectors z.

    z = (for each level, the logit of the share that it covers of the way left to `last`; the strictly lower triangle of the
    weights; log kappa; log chi of all calls but the first).
    """

    first: float
    last: float

    @classmethod
    def of(cls, sde: SDE) -> Span:
        sde.check()
        return cls(*sde.half_log_snr_range)

    def inside(self, half_log_snr: Tensor) -> Tensor:
        """Levels adjusted to begin no earlier than `first`, and to keep gaps of about 1e-3 between them and before `last`."""
        ends = half_log_snr.new_tensor([[self.first], [self.last]])
        gaps = torch.cat([ends[0], half_log_snr, ends[1]]).diff()
        gaps = gaps.clamp_min(half_log_snr.new_tensor([0.0] + [1e-3] * len(half_log_snr)))
        return self.first + (self.last - self.first) * (gaps / gaps.sum())[:-1].cumsum(0)

    def levels(self, logits: Tensor) -> Tensor:
        gone = 1 - (1 - logits.sigmoid()).cumprod(0)
        return self.first + (self.last - self.first) * (gone + CLOSEST * (_evenly(logits) - gone))

    def vector(self, table: TunedTable) -> Tensor:
        """The vector z of a table; shares are kept away from 0 and 1, since a closed gap would hardly open again."""
        levels, least = table.half_log_snr, 0.02 / (len(table.half_log_snr) + 1)
        gone = ((levels - self.first) / (self.last - self.first) - CLOSEST * _evenly(levels)) / (1 - CLOSEST)
        left = 1 - torch.cat([gone.new_zeros(1), gone])
        share = (1 - left[1:] / left[:-1]).clamp(least, 1 - least)
        past = table.weights[_below(len(levels))]
        return torch.cat([share.logit(), past, table.noise.log(), table.signal[1:].log()])

    def table(self, z: Tensor, calls: int) -> TunedTable:
        """The table of z."""
        logits, past, noise, signal = z.split([calls, calls * (calls - 1) // 2, calls, calls - 1])
        weights = z.new_zeros(calls, calls).index_put(_below(calls), past)
        signal = torch.cat([z.new_ones(1), signal.exp()])
        return TunedTable(self.levels(logits), closed(weights), noise.exp(), self.first, signal)

    @staticmethod
    def first_moves(calls: int) -> list[int]:
        """For each number of z, the first move of a table's run that it changes; move 0 scales the start.

        Level, noise and signal of call i describe the state in which move i ends; row i of the weights is used in move i + 1.
        """
        rows, each = _below(calls)[0] + 1, list(range(calls))
        return [*each, *rows.tolist(), *each, *each[1:]]


def closed(weights: Tensor) -> Tensor:
    """The strictly lower triangle of `weights`, and on the diagonal what makes each row sum to 1."""
    past = weights.tril(-1)
    return past + torch.diag(1 - past.sum(1))


def _evenly(levels: Tensor) -> Tensor:
    """The shares of the way that as many equally spaced levels have covered."""
    return torch.arange(1, len(levels) + 1, dtype=levels.dtype) / (len(levels) + 1)


def _below(calls: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.tril_indices(calls, calls, -1)
    return rows, columns

r"""A solver as a table of scalars.

Every deterministic solver that is linear in x and in the denoiser outputs, and exact for data at a single point, is

    x_{i+1} = r_i x_i + (a_{i+1} - r_i a_i) sum_{k <= i} w_ik D_k,   r_i = s_{i+1} / s_i,   sum_k w_ik = 1:

a move straight towards an affine combination of all denoiser outputs so far, which it reaches at (a_N, s_N) = (1, 0). Free
are the levels (alpha_i, sigma_i) of the calls, the noise s_i = kappa_i sigma_i and the signal a_i = chi_i alpha_i in their
states, and the weights w. With kappa = chi = 1, DDIM, DPM-Solver++ and Adams in the velocity are such tables. The first call
need not be at t_max, where a network sees little but noise: the start is scaled to the noise s_0, which leaves it the signal
a_0 = s_0 alpha(t_max) / sigma(t_max), and the first call is made at a level where the output already says where to go.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from score_sde.sampler import Sampler
from score_sde.sde import SDE
from score_sde.steps import Tabulated


@dataclass(frozen=True, eq=False)
class TunedTable:
    """A solver as numbers, for every SDE that starts at its noise level and reaches below that of its last call.

    Attributes:
        half_log_snr: lambda = log(alpha / sigma) of each call, increasing, shape (N,).
        weights: w, lower triangular with rows that sum to 1, shape (N, N); row i weighs D_0 ... D_i.
        noise: kappa, the noise in the state of each call over the sigma of its level, positive, shape (N,); by default 1.
        start: lambda of the noise that sampling starts from; by default that of the first call, and never greater. A first
            call at the start itself has kappa = 1.
        signal: chi, the signal in the state of each call over the alpha of its level, positive, shape (N,); by default 1,
            and always 1 for the first call.
        record: how it was made: the method, and the validation losses of the candidates.

    Raises:
        ValueError: shapes do not fit, levels do not increase or begin before the start, noise or signal is not positive, or
            a row does not sum to 1.
    """

    half_log_snr: Tensor
    weights: Tensor
    noise: Tensor = None  # type: ignore[assignment]
    start: float = None  # type: ignore[assignment]
    signal: Tensor = None  # type: ignore[assignment]
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        calls = len(self.half_log_snr)
        for name in ("noise", "signal"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, torch.ones(calls, dtype=torch.float64))
        if self.half_log_snr.ndim != 1 or calls < 1 or self.weights.shape != (calls, calls):
            raise ValueError("a table has levels of shape (N,) and weights of shape (N, N), N >= 1; "
                             f"got {tuple(self.half_log_snr.shape)} and {tuple(self.weights.shape)}")  # fmt: skip
        if not (self.half_log_snr.diff() > 0).all():
            raise ValueError("a table's half log SNRs increase, from noise to data")
        if self.start is None:
            object.__setattr__(self, "start", self.half_log_snr[0].item())
        if not -math.inf < self.start <= self.half_log_snr[0]:
            raise ValueError(f"a table starts at the half log SNR of its first call or below, got {self.start:g}")
        scaled = self.start == self.half_log_snr[0] and self.noise[0] != 1
        if self.noise.shape != (calls,) or not (self.noise > 0).all() or scaled:
            raise ValueError("a table's noise is positive, of shape (N,), and 1 for a call at its start; "
                             f"got {self.noise.tolist()}")  # fmt: skip
        if self.signal.shape != (calls,) or not (self.signal > 0).all() or self.signal[0] != 1:
            raise ValueError("a table's signal is positive, of shape (N,), and 1 for the first call; "
                             f"got {self.signal.tolist()}")  # fmt: skip
        excess = (self.weights.sum(1) - 1).abs() / self.weights.abs().sum(1)
        if self.weights.triu(1).any() or not (excess < 1e-12).all():
            raise ValueError("a table's weights are lower triangular with rows that sum to 1: else a point mass moves")

    def contents(self) -> dict[str, Any]:
        """The contents of the table's file."""
        rows = [row[: i + 1] for i, row in enumerate(self.weights.tolist())]
        return {"start": self.start, "half_log_snr": self.half_log_snr.tolist(), "noise": self.noise.tolist(),
                "signal": self.signal.tolist(), "weights": rows, "record": self.record}  # fmt: skip

    def text(self) -> str:
        """The table as JSON, with its numbers to the last bit."""
        return json.dumps(self.contents(), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes `text` into a file."""
        Path(path).write_text(self.text())

    @classmethod
    def load(cls, path: str | Path) -> TunedTable:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is not a table.
        """
        read, parts = json.loads(Path(path).read_text()), {part.name for part in fields(cls)}
        older = parts - {"start", "signal"}  # all that older files have
        if not isinstance(read, dict) or not older <= read.keys() <= parts:
            raise ValueError(f"{path} is no table of scripts/tune.py, which has {', '.join(sorted(parts))}")
        calls = len(read["half_log_snr"])
        read["weights"] = [row + [0.0] * (calls - len(row)) for row in read["weights"]]
        options: dict[str, Any] = {name: torch.tensor(part, dtype=torch.float64) if isinstance(part, list) else part
                                   for name, part in read.items()}  # fmt: skip
        return cls(**options)


class TunedSampler(Sampler):
    """A `Sampler` that runs a table: N network calls, from t_max to clean data.

    Args:
        table: a `TunedTable`, or the JSON file of one.

    Raises:
        ValueError: the file is not a table.
    """

    def __init__(self, table: TunedTable | str | Path) -> None:
        self.table = table if isinstance(table, TunedTable) else TunedTable.load(table)
        self.step = Tabulated(self.table.contents())
        super().__init__(self.step, self._times, final="none")

    def _times(self, sde: SDE) -> Tensor:
        """The times of the start, if the first call is not there, of the calls, and t_min to stand for the end.

        Raises:
            ValueError: the table starts at another noise level than the SDE, or goes below its t_min.
        """
        first, last = sde.half_log_snr_range
        start, end = self.table.start, self.table.half_log_snr[-1].item()
        if abs(start - first) > 1e-3 or end >= last:
            raise ValueError(f"this table goes from half log SNR {start:.4g} to a last call at {end:.4g}, "
                             f"{sde!r} is sampled from {first:.4g} to {last:.4g}: tune one for it")  # fmt: skip
        return self.step.grid(sde)

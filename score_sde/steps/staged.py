r"""One-step methods of several stages, as tables of scalars.

Stage j builds x_j = a_j x_t + sum_{k <= j} b_jk D_k and evaluates the network there, at the stage's time; the last stage
is the step's result. The outputs D_0 = D(x_t, t), D_1, ... are this move's own, the oldest first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from score_sde.sde import SDE
from score_sde.steps.linear import combine
from score_sde.steps.step import Draw, Evaluate, History, Step


class Stage(NamedTuple):
    """x_j = a x_t + sum_k b[k] D_k, to be evaluated at `time` unless it is the last."""

    time: Tensor
    a: Tensor
    b: Sequence[Tensor]


class StageRow(NamedTuple):
    """One move: the time of its first evaluation, and (time, a, b) a stage."""

    t: float
    stages: tuple[tuple[float, float, tuple[float, ...]], ...]


class StagedStep(Step):
    """A step given by the scalars of its stages; a subclass defines `stages`."""

    @abstractmethod
    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Sequence[Stage]:
        """The stages of the moves t -> s, elementwise in float64 tensors; the last one is x_s."""

    def plan(self, sde: SDE, t: Tensor, s: Tensor) -> list[StageRow]:
        columns = []
        for stage in self.stages(sde, t, s):
            time, a, *b = (column.expand(len(t)).tolist() for column in (stage.time, stage.a, *stage.b))
            columns.append(list(zip(time, a, zip(*b, strict=True), strict=True)))
        return [StageRow(at, stages) for at, stages in zip(t.tolist(), zip(*columns, strict=True), strict=True)]

    def advance(
        self, row: StageRow, x: Tensor, history: History, evaluate: Evaluate, draw: Draw
    ) -> tuple[Tensor, History]:
        at, time = x, row.t
        outputs: list[Tensor] = []
        for next_time, a, b in row.stages:
            outputs.append(evaluate(at, time).denoised)
            at, time = combine(x, a, b, outputs), next_time
        return at, history


class Heun(StagedStep):
    """Heun's second-order method in EDM's variables: y = x / alpha against the noise level l = sigma / alpha.

    dy/dl = (y - D) / l; an Euler step to l_s, then the mean of both slopes. Eliminating the slopes,
    y_1 = l_s/l_t y + (1 - l_s/l_t) D_0 and y_s = l_s/l_t y + (l_s - l_t)(1/(2 l_s) - 1/l_t) D_0 + (l_t - l_s)/(2 l_s) D_1.
    With `grid.karras` and final="denoise" this is EDM's deterministic sampler, call for call.
    Source: Karras et al. 2022, https://arxiv.org/abs/2206.00364, algorithm 1.
    """

    order = 2
    calls = 2

    def stages(self, sde: SDE, t: Tensor, s: Tensor) -> Sequence[Stage]:
        alpha_s, scale = sde.alpha(s), sde.sigma(s) / sde.sigma(t)
        drop = -torch.expm1(sde.half_log_snr(t) - sde.half_log_snr(s))  # 1 - l_s / l_t
        growth = torch.expm1(sde.half_log_snr(s) - sde.half_log_snr(t))  # l_t / l_s - 1
        return [Stage(s, scale, [alpha_s * drop]), Stage(s, scale, [alpha_s * (drop - growth / 2), alpha_s * growth / 2])]

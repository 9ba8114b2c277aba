r"""The one sampling loop: a start at t_0, then at each grid time a predictor, a corrector or both, then Tweedie's formula.

    x <- the model's start at t_0;  x <- corrector(x, t_i);  x <- predictor(x, t_i, t_{i+1});  ...;  x <- D(x, t_N).

All coefficients are computed in float64 on the CPU before the first network call; the loop never waits for the device.
Where a grid goes up (towards noise) the move is a draw of the exact forward transition.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from score_sde import grid as grids
from score_sde.brief import Brief
from score_sde.checks import number, one_of
from score_sde.cuda_graph import GraphedMoves
from score_sde.grid import Grid
from score_sde.noise import NoiseSource
from score_sde.prediction import Prediction
from score_sde.progress import tqdm
from score_sde.score import ScoreModel
from score_sde.sde import SDE
from score_sde.solver import FINALS, AsWritten, CountedModel, SampleResult, Start, begin, ending, warn_of_lost
from score_sde.steps.linear import Carry, Renoise
from score_sde.steps.step import Draw, History, Step
from score_sde.steps.tabulated import Table, Tabulated

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, repr=False)
class State(Brief):
    """A run on its way.

    Attributes:
        time: the grid time.
        x: the state there, shape (batch, *event).
        nfe: network calls per sample so far.
        prediction: that of the last call since the grid time before, e.g. for its `denoised`; None if there was none, or if
            a CUDA graph was replayed.
    """

    time: float
    x: Tensor
    nfe: int
    prediction: Prediction | None


class Move(NamedTuple):
    """One row of a run.

    Attributes:
        step, row: the step and its coefficients.
        key: of its draws of noise.
        arrives: whether it is the last move at its grid time, so that the trajectory keeps the state after it.
    """

    step: Step
    row: Any
    key: int
    arrives: bool


def _grad_if_asked(sample: F) -> F:
    """Decorates `sample`: autograd is on where its argument `gradient` is true, and off otherwise."""

    @functools.wraps(sample)
    def switched(*arguments: Any, **options: Any) -> Any:
        with torch.set_grad_enabled(bool(options.get("gradient"))):
            return sample(*arguments, **options)

    return switched  # type: ignore[return-value]


class Sampler(AsWritten):
    """A predictor, a corrector or both on a time grid.

    Args:
        predictor: the step from one grid time to the next; None carries x / alpha unchanged (annealed Langevin).
        grid: function SDE -> times, e.g. `functools.partial(grid.uniform, steps=100)`.
        corrector: a step at fixed time.
        final: "denoise" ends with Tweedie's formula at the last grid time (one more call), "none" keeps the sample.
        corrector_first: True corrects at t_i and then predicts t_{i+1}, as the published code of Song et al. does (the
            start is corrected, the end is not); False predicts and then corrects, as their algorithm 1 does.
        corrector_where: function (SDE, times) -> boolean mask of the grid times at which the corrector acts, e.g.
            `functools.partial(grid.within, low=0.1, high=10.0)`; everywhere if left out.
        cuda_graph: replay the moves as CUDA graphs (see `score_sde.cuda_graph`), which saves the host's time where the
            network is small. The model must not read values back to the host.
        S_noise: factor on the noise of moves that go up, slightly above 1 to make up for detail that a network smooths away
            (Karras et al. 2022, https://arxiv.org/abs/2206.00364, section 4); 1 is the exact forward transition.

    Raises:
        ValueError: neither predictor nor corrector, a step in the other's place, an unknown `final`, or a CUDA graph
            without a CUDA device or for a step that compares densities.
    """

    def __init__(
        self, predictor: Step | None, grid: Grid, corrector: Step | None = None, final: str = "denoise",
        corrector_first: bool = True, corrector_where: Callable[[SDE, Tensor], Tensor] | None = None,
        cuda_graph: bool = False, S_noise: float = 1.0,
    ) -> None:  # fmt: skip
        if predictor is None and corrector is None:
            raise ValueError("a sampler needs a predictor, a corrector or both; got neither")
        for step, role in ((predictor, "predictor"), (corrector, "corrector")):
            if step is not None and not isinstance(step, Step):
                raise ValueError(f"{role} is a Step, got {step!r}: construct it, e.g. EulerMaruyama()")
            if step is not None and step.role != role:
                raise ValueError(f"{type(step).__name__} is a {step.role}, it cannot be the {role}")
        if corrector_where is not None and corrector is None:
            raise ValueError("corrector_where is given without a corrector: give one, or leave corrector_where out")
        if corrector_where is not None and not callable(corrector_where):
            raise ValueError("corrector_where is a function (SDE, times) -> boolean mask of the grid times at which the "
                             f"corrector acts, got {corrector_where!r}")  # fmt: skip
        grids.check_callable(grid)
        if cuda_graph and not torch.cuda.is_available():
            raise ValueError("cuda_graph=True needs a CUDA device, and torch sees none: leave it out")
        if cuda_graph and any(step is not None and step.needs_density for step in (predictor, corrector)):
            raise ValueError("cuda_graph=True takes no step that compares densities: leave it out")
        self.predictor, self.grid, self.corrector, self.cuda_graph = predictor, grid, corrector, cuda_graph
        self.final, self.S_noise = one_of("final", final, FINALS), number("S_noise", S_noise, above=0)
        self.corrector_first, self.corrector_where = corrector_first, corrector_where

    @classmethod
    def tabulated(cls, table: str | Path | Table) -> Sampler:
        """The sampler of a table of scalars on its own grid (see `Tabulated`), with Tweedie's formula unless it ends at 0."""
        step = Tabulated(table)
        return cls(step, step.grid, final="denoise" if step.levels[-1] > 0 else "none")

    @_grad_if_asked
    def sample(
        self, model: ScoreModel, shape: Sequence[int], *, seed: int | None = None, noise: NoiseSource | None = None,
        x_init: Tensor | None = None, condition: Mapping[str, Any] | None = None, trajectory: bool = False,
        progress: bool = False, dtype: torch.dtype | None = None, gradient: bool = False,
    ) -> SampleResult:  # fmt: skip
        """Draws samples.

        Args:
            model: the score model.
            shape: (batch, *event_shape).
            seed: of one generator for the whole batch (`BatchNoise`); None takes a seed from the operating system.
            noise: another noise source, e.g. `SampleNoise(range(batch))`, or `BrownianNoise(range(batch))`, with which more
                steps refine the same samples.
            x_init: start from this tensor, in its dtype and on its device. By default a run starts from the model's prior
                at t_max (`ScoreModel.start`), or from a Gaussian where the grid begins below (`ScoreModel.start_at`).
            condition: named conditions for the model.
            trajectory: keep the state at every grid time.
            progress: show a bar.
            dtype: of the state; by default x_init's, or else the model's.
            gradient: let gradients flow through the run to x_init, conditions and weights; autograd then keeps every state.

        Raises:
            ValueError, TypeError: see `begin` and `grid.check`; raised before any network call.
        """
        if gradient and self.cuda_graph:
            raise ValueError("gradient=True cannot go through CUDA graphs: build the sampler with cuda_graph=False")
        start = begin(model, shape, seed, noise, x_init, condition, dtype, self.grid, self.predictor or Carry())
        moves = self._moves(model, start.times)
        clock, path = time.perf_counter(), list[Tensor]()
        for state in self._states(start, moves, progress):
            x = state.x
            if trajectory:
                path.append(x)
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        seconds, times = time.perf_counter() - clock, start.times
        warn_of_lost(x, model, times[-1].item())
        kept = torch.stack(path[: len(times)]) if trajectory else None
        return SampleResult(x, start.model.calls, seconds, kept, times)

    @torch.no_grad()
    def states(
        self, model: ScoreModel, shape: Sequence[int], *, seed: int | None = None, noise: NoiseSource | None = None,
        x_init: Tensor | None = None, condition: Mapping[str, Any] | None = None, progress: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Iterator[State]:  # fmt: skip
        """The states of a run as they come: the start, that at each later grid time and, with final="denoise", the samples.

        They are those of `sample`, whose arguments and errors these are. The run ends where a loop over them is left, and
        goes on from what is written into a state's `x` in place.
        """
        start = begin(model, shape, seed, noise, x_init, condition, dtype, self.grid, self.predictor or Carry())
        start.model.keeps = True
        return torch.no_grad()(self._states)(start, self._moves(model, start.times), progress)

    def _moves(self, model: ScoreModel, times: Tensor) -> list[Move]:
        """`plan` for this model, which is prepared for it, or refused by a step."""
        for step in (self.predictor, self.corrector):
            if step is not None:
                step.check_model(model)
        moves = self.plan(model.sde, times)
        model.prepare(times.tolist())
        return moves

    def check(self, sde: SDE) -> None:
        """Refuses, with ValueError, an SDE on which the grid or a step does not work, by computing the whole table."""
        self.plan(sde, grids.check(self.grid(sde), sde))

    def plan(self, sde: SDE, times: Tensor) -> list[Move]:
        """The rows of a run over a checked grid, in the order in which they are carried out."""
        t, s = times[:-1], times[1:]
        down = s < t
        travel = _rows(self.predictor or Carry(), sde, t, s, down) | _rows(Renoise(self.S_noise), sde, t, s, ~down)
        if self.corrector is None:
            return [Move(*travel[i], key=2 * i + 1, arrives=True) for i in range(len(t))]
        acts = torch.ones_like(times, dtype=torch.bool) if self.corrector_where is None else self._mask(sde, times)
        correct = _rows(self.corrector, sde, times, times, acts)
        # Of the grid times a corrector without predictor visits all; before a predictor not the last, after one not the first.
        start = 0 if self.predictor is None or self.corrector_first else 1
        stop = len(t) if self.predictor is not None and self.corrector_first else len(times)
        moves: list[Move] = []
        for i in range(len(times)):
            corrected = start <= i < stop and i in correct
            if i > 0:
                moves.append(Move(*travel[i - 1], key=2 * i - 1, arrives=not corrected))
            if corrected:
                moves.append(Move(*correct[i], key=2 * i + 2, arrives=i > 0))
        return moves

    def _mask(self, sde: SDE, times: Tensor) -> Tensor:
        """The grid times at which the corrector acts, as a checked mask."""
        mask = torch.as_tensor(self.corrector_where(sde, times))  # type: ignore[misc]
        if mask.shape != times.shape or mask.dtype != torch.bool:
            raise ValueError(f"corrector_where gives a boolean for each of the {len(times)} grid times, got "
                             f"{mask.dtype} of shape {tuple(mask.shape)}")  # fmt: skip
        return mask

    def _states(self, start: Start, moves: Sequence[Move], progress: bool) -> Iterator[State]:
        """See `states`."""
        x, model, times = start.x, start.model, iter(start.times.tolist())
        history: History = ()
        t = next(times)
        yield State(t, x, 0, None)
        advance = GraphedMoves(((m.step, m.row) for m in moves), x).advance if self.cuda_graph else _advance
        for move in tqdm(moves, desc="sampling", disable=not progress, delay=1.0, leave=False):
            predicting = move.step is self.predictor
            past = history if predicting else ()
            x, past = advance(move.step, move.row, x, past, model, partial(start.noise, move.key))
            if predicting:
                history = past
            if move.arrives:
                t = next(times)
                yield State(t, x, model.calls, model.last)
                model.last = None
        if self.final == "denoise":
            x, _ = ending(self.final, model, x, t)
            yield State(t, x, model.calls, model.last)


def _advance(
    step: Step, row: Any, x: Tensor, history: History, model: CountedModel, draw: Draw
) -> tuple[Tensor, History]:
    moved = step.advance(row, x, history, model, draw)
    if not isinstance(moved, tuple) or len(moved) != 2:
        raise TypeError(f"{type(step).__name__}.advance returns (x, history), got {type(moved).__name__}")
    return moved


def _rows(step: Step, sde: SDE, t: Tensor, s: Tensor, mask: Tensor) -> dict[int, tuple[Step, Any]]:
    """The step and its row for each move t[i] -> s[i] where mask[i] holds, by i."""
    chosen = mask.nonzero().squeeze(-1).tolist()
    rows = step.plan(sde, t[mask], s[mask]) if chosen else []
    if len(rows) != len(chosen):
        raise ValueError(f"{type(step).__name__}.plan gives a row for each of {len(chosen)} moves, got {len(rows)}")
    return {i: (step, row) for i, row in zip(chosen, rows, strict=True)}

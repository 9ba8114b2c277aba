r"""The moves of a run as CUDA graphs: the host launches one graph per move instead of its hundreds of kernels.

Moves of one kind (one step, rows of the same shape with the same zeros) differ only in their numbers. The first of a kind
runs as usual, as a warm-up. The second is captured: the step's own `advance` on static buffers for

    x, the history, the draws z_k, and the row's numbers, as scalars on the device from a table that was copied at the start.

From then on a move fills the buffers and replays the graph. Noise is drawn outside the graph, in the order of a usual run,
so that samples are the same to rounding. Graphs live as long as the run: nothing is kept that a later batch could read.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from score_sde.steps.step import Draw, Evaluate, History, Step


def capture(body: Callable[[], None]) -> Callable[[], None]:
    """Captures the body in a CUDA graph, after one run of it on a side stream; returns the function that replays it.

    Raises:
        ValueError: the body waits for the device, or does something else that a graph cannot hold.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            body()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"this model or step cannot be captured ({reason}): use cuda_graph=False") from error
    return graph.replay


def require_cuda(x: Tensor) -> None:
    """Refuses, with ValueError, a state that is not on a CUDA device."""
    if not x.is_cuda:
        raise ValueError(f"cuda_graph=True, but the state lies on {x.device}: move the model to CUDA, or leave it out")


def numbers(row: Any) -> Iterator[float]:
    """The numbers of nested tuples, from left to right."""
    for part in row if isinstance(row, tuple) else (row,):
        if isinstance(part, tuple):
            yield from numbers(part)
        else:
            yield part


def rebuilt(row: Any, values: Iterator[Any]) -> Any:
    """The same nested tuples with other values."""
    if not isinstance(row, tuple):
        return next(values)
    parts = [rebuilt(part, values) for part in row]
    return type(row)(*parts) if hasattr(row, "_fields") else tuple(parts)


def kind_of(step: Step, row: Any) -> tuple[int, Any]:
    """What two moves must share to be served by one graph: the step, the row's shape, and where it is 0."""
    return id(step), rebuilt(row, (value == 0.0 for value in numbers(row)))


class GraphedKind:
    """The moves of one kind: eager at first, then a graph.

    Args:
        step: the step of these moves.
        rows: their rows, in order.
        like: a tensor with the state's shape, dtype and device.
    """

    def __init__(self, step: Step, rows: list[Any], like: Tensor) -> None:
        self.step, self.like, self.template = step, like, rows[0]
        table = torch.tensor([list(numbers(row)) for row in rows], dtype=torch.float64)
        self.varies = (table != table[0]).any(0).tolist()  # other columns stay plain numbers, whose zeros are skipped
        self.table = table.to(like.device)
        self.line = self.table[0].clone()
        self.x, self.draws = torch.empty_like(like), dict[int, Tensor]()
        self.history: History = ()
        self.replay: Callable[[], None] | None = None
        self.warm, self.calls, self.place = -1, 0, 0

    def advance(self, row: Any, x: Tensor, history: History, model: Any, draw: Draw) -> tuple[Tensor, History]:
        """One move, with the next line of the table."""
        self.line.copy_(self.table[self.place])
        self.place += 1
        if self.replay is None and self.warm != len(history):
            self.warm = len(history)
            return self.step.advance(row, x, history, model, draw)
        if self.replay is None:
            self.replay = self._captured(x, history, model)
        self._fill(x, history, draw)
        self.replay()
        model.calls += self.calls
        return self.x.clone(), self.history

    def _captured(self, x: Tensor, history: History, model: Any) -> Callable[[], None]:
        self.history = tuple(torch.empty_like(output) for output in history)
        self.x.copy_(x)
        _copy(self.history, history)
        inner = copy.copy(model)  # counts the calls of one move, since replays count none

        def body() -> None:
            inner.calls = 0
            self._move(inner)

        replay = capture(body)
        self.calls = inner.calls
        return replay

    def _move(self, evaluate: Evaluate) -> None:
        """The step's own advance, from the buffers into the buffers."""
        lifted = [self.line[i] if varies else value
                  for i, (value, varies) in enumerate(zip(numbers(self.template), self.varies, strict=True))]  # fmt: skip
        row = rebuilt(self.template, iter(lifted))
        x, history = self.step.advance(row, self.x, self.history, evaluate, self._static_draw)
        _copy(self.history, history[: len(self.history)])  # a corrector's history is not kept
        self.x.copy_(x)

    def _static_draw(self, k: int) -> Tensor:
        if k not in self.draws:
            self.draws[k] = torch.zeros_like(self.like)
        return self.draws[k]

    def _fill(self, x: Tensor, history: History, draw: Draw) -> None:
        self.x.copy_(x)
        _copy(self.history, history)
        for k, buffer in self.draws.items():
            buffer.copy_(draw(k))


def _copy(buffers: History, history: History) -> None:
    """Copies the oldest output first: a history is the one before moved on by one, and may consist of the buffers."""
    for buffer, output in reversed(list(zip(buffers, history, strict=True))):
        if buffer is not output:
            buffer.copy_(output)


class GraphedMoves:
    """All moves of a run; `advance` is called once for each, in order.

    Args:
        moves: the (step, row) of each move.
        like: a tensor with the state's shape, dtype and device.
    """

    def __init__(self, moves: Iterable[tuple[Step, Any]], like: Tensor) -> None:
        require_cuda(like)
        found: dict[tuple[int, Any], tuple[Step, list[Any]]] = {}
        for step, row in moves:
            found.setdefault(kind_of(step, row), (step, []))[1].append(row)
        self.kinds = {kind: GraphedKind(step, rows, like) for kind, (step, rows) in found.items()}

    def advance(
        self, step: Step, row: Any, x: Tensor, history: History, model: Any, draw: Draw
    ) -> tuple[Tensor, History]:
        """The next move, by `step.advance` or by a graph of it."""
        return self.kinds[kind_of(step, row)].advance(row, x, history, model, draw)

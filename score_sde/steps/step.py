r"""The interface of a sampler's steps.

A predictor takes x from grid time t to the less noisy s; a corrector moves it at s = t. Before the first network call
the sampler asks each step for its `plan`: one row per move, plain floats computed in vectorised float64. `advance` then
carries out one row. A step holds no state: past outputs are passed in and returned. Constructors raise ValueError where
an option is unknown or out of range.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from score_sde.prediction import Prediction
from score_sde.score import ScoreModel
from score_sde.sde import SDE

R = TypeVar("R")

Evaluate = Callable[[Tensor, float], Prediction]
"""(x, t) -> Prediction; the call is counted. A move goes on from the prediction's x, which guidance may have moved."""

Draw = Callable[[int], Tensor]
"""k -> the k-th standard normal draw of this move, of x's shape."""

History = tuple[Tensor, ...]
"""The network outputs of earlier moves that a step keeps, the newest first."""


class Step(ABC):
    """How to get from grid time t to s.

    Attributes:
        role: "predictor" (s less noisy than t) or "corrector" (s = t).
        order: for an ODE step the global order of convergence, for an SDE step the weak order.
        point_mass: whether a predictor is exact for data at one point, taking N(alpha_t x_0, sigma_t^2 I) to
            N(alpha_s x_0, sigma_s^2 I) in every move of a run; a step that is not sets it to False.
        calls: network calls per move.
        shares: the fractions of a move in half log SNR that its successive draws of noise cover; their sum is 1.
        takes_x: whether `advance` goes on from the prediction's x, which guidance may have moved (`Prediction.x` or
            `Prediction.combine`). A class with its own `advance` has to set it; the default is False.
        needs_density: whether `advance` also calls `evaluate.log_prob(x, t)`, which only a model with a density has.
        batch_independent: whether a sample is independent of the rest of its batch.
        presets: constructor arguments by the names of published methods; each is certified.
    """

    role: ClassVar[Literal["predictor", "corrector"]] = "predictor"
    order: int = 1
    point_mass: bool = True
    calls: int = 1
    shares: Sequence[float] = (1.0,)
    takes_x: bool = False
    needs_density: bool = False
    batch_independent: bool = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @abstractmethod
    def plan(self, sde: SDE, t: Tensor, s: Tensor) -> Sequence[Any]:
        """One row for each move t[i] -> s[i], for float64 times of shape (moves,).

        Raises:
            ValueError: a coefficient is not finite.
        """

    def check_model(self, model: ScoreModel) -> None:
        """Refuses, with ValueError, a model that is known to lack what the step needs."""
        if self.needs_density and not hasattr(type(model), "log_prob"):
            raise ValueError(f"{type(self).__name__} needs a model with a density log_prob(x, t), which "
                             f"{type(model).__name__} lacks: use ExactScore or EnergyScore (network=conservative), "
                             "or UnadjustedLangevin")  # fmt: skip
        if not self.calls or not _renoises(model):
            return
        if self.role == "corrector":
            raise ValueError(f"{type(self).__name__} needs a score, which guidance that renoises does not have: use a "
                             "predictor alone, or ClassifierFree")  # fmt: skip
        if not self.takes_x:
            raise ValueError(f"{type(self).__name__} does not go on from the prediction's x, which guidance that renoises "
                             "moves (takes_x = True declares that it does): use another step, or ClassifierFree")  # fmt: skip

    @abstractmethod
    def advance(self, row: Any, x: Tensor, history: History, evaluate: Evaluate, draw: Draw) -> tuple[Tensor, History]:
        """Carries out one row on x of shape (batch, *event); returns the new x, of the same shape, and the new history."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "advance" in vars(cls):
            cls.takes_x = vars(cls).get("takes_x", False)
        if "__init__" in vars(cls):
            cls.__init__ = _keeping_arguments(cls.__init__)  # type: ignore[method-assign]

    def __repr__(self) -> str:
        written = ", ".join(f"{name}={value!r}" for name, value in vars(self).get("_written", {}).items())
        return f"{type(self).__name__}({written})"


def _renoises(model: object) -> bool:
    """Whether the model, or one inside it, moves x (see `guidance.ClassifierFreePlusPlus`)."""
    return getattr(model, "renoises", False) or (hasattr(model, "model") and _renoises(model.model))


def _keeping_arguments(init: Callable[..., None]) -> Callable[..., None]:
    """The constructor, which also stores its arguments, defaults included, for `repr`."""
    signature = inspect.signature(init)

    @functools.wraps(init)
    def kept(self: Step, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        given = signature.bind(self, *arguments, **options)
        given.apply_defaults()
        _, *written = given.arguments.items()
        object.__setattr__(self, "_written", dict(written))  # the outermost constructor's are stored last

    return kept


def of_times(function: Callable[..., R], sde: SDE, *times: Tensor) -> R:
    """The values of a step's method (sde, times, ...).

    Raises:
        ValueError: it fails for tensors, as math.exp(t) does, or for few times; a ValueError of its own passes unchanged.
    """
    try:
        return function(sde, *times)
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        said, fix = str(error), "write it with torch's functions, e.g. torch.exp(t) for math.exp(t)"
        if isinstance(error, IndexError) or "to unpack" in said:
            fix = "times holds those of the last calls, memory at most and in the first moves of a run fewer"
        elif isinstance(error, ValueError) and "one element tensors" not in said:  # not torch's, of math.exp(t)
            raise
        name = f"{type(function.__self__).__name__}.{function.__name__}"  # type: ignore[attr-defined]
        raise ValueError(f"{name} fails for a tensor of times ({said}): {fix}") from error


def finite(step: Step, sde: SDE, t: Tensor, columns: Sequence[Tensor]) -> list[list[float]]:
    """The columns of a table as lists of len(t) floats, for t of shape (moves,).

    Raises:
        ValueError: a column is neither a number nor of t's shape, or an entry is not finite; says at which t, the first.
    """
    columns = [torch.as_tensor(column, dtype=torch.float64) for column in columns]
    for column in columns:
        if column.shape not in ((), (1,), t.shape):
            raise ValueError(f"{type(step).__name__} gives a coefficient of shape {tuple(column.shape)} for {len(t)} moves: "
                             "write it elementwise in the times t and s, of shape (moves,)")  # fmt: skip
    table = torch.stack(torch.broadcast_tensors(t, *columns)[1:])
    good = table.isfinite()
    if not good.all():
        bad = t[~good.all(0)]
        where, fix = f"t={bad[0]:g}", "choose a grid that avoids this time, or another step"
        if len(bad) == len(t) > 1:
            where, fix = f"{where} and every later time", "choose another step"
        raise ValueError(f"{type(step).__name__} has no finite coefficients at {where} of {sde!r}: {fix}")
    return table.tolist()


def tuples(columns: Sequence[Sequence[float]]) -> Iterable[tuple[float, ...]]:
    """The rows of these columns; without columns, empty rows without end."""
    return zip(*columns, strict=True) if columns else itertools.repeat(())

r"""Certificates: what a step does, computed rather than claimed.

A step is a black box here: its `plan` and `advance` are run, in float64 except for the last check, on models for which the
answer is known (`trials`). This gives its order and the polynomials that it integrates exactly (`orders`), the exact law of
its output on Gaussian data and on a point mass (`exact_laws`), its network calls, and whether the samples of a batch are
independent.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from score_sde import grid as grids
from score_sde.checks import wholes
from score_sde.evaluation import orders
from score_sde.evaluation.exact_laws import BUDGETS, Gaussian, bias, point_mass_residual, stationary_variance
from score_sde.evaluation.orders import measured_order, ode_error, polynomial_exactness, weak_error
from score_sde.evaluation.trials import end, kernel, travel
from score_sde.noise import SampleNoise
from score_sde.prediction import Prediction
from score_sde.progress import tqdm
from score_sde.sampler import Sampler
from score_sde.score import ScoreModel
from score_sde.sde import SDE, VPSDE, Time
from score_sde.steps import Step
from score_sde.steps.linear import Carry, Renoise

EXACT = 1e-9  # errors below count as exact: rounding over a hundred moves stays below
STATIONARY = 1.25  # a corrector's stationary variance may differ from the law's by this factor


@dataclass(frozen=True)
class Certificate:
    """The certified properties of one step.

    Attributes:
        name: its name in tables.
        role: "predictor" or "corrector".
        stochastic: whether it draws noise.
        declared, measured: order of convergence, global (ODE) or weak (SDE); nan for correctors and where no order
            can be measured.
        calls, counted: network calls per move, declared and counted.
        claims_point_mass: whether it declares to be exact for data at a single point (`Step.point_mass`).
        point_mass: largest relative error of mean or standard deviation over a run on such data; nan for a step that is
            not affine in x.
        exact: the polynomials that are integrated exactly, as (prediction, clock, degree), or None.
        bias: DataFrame with the columns steps, calls, mean, std: signed errors at the end on data N(1, 0.5^2), both in
            units of the exact std; nan for a step that is not affine in x.
        claims_independence: whether it declares that samples do not depend on the rest of their batch.
        batch_independent: whether a sample is bitwise the same in any batch.
        stationary: for a corrector, its stationary variance relative to the exact one, for data N(0, I) at sigma = alpha;
            exact where it is affine, else simulated in 64 dimensions (standard error about 0.004).
    """

    name: str
    role: str
    stochastic: bool
    declared: float
    measured: float
    calls: int
    counted: float
    claims_point_mass: bool
    point_mass: float
    exact: tuple[str, str, int] | None
    bias: pd.DataFrame = field(repr=False)
    claims_independence: bool
    batch_independent: bool
    stationary: float

    @property
    def faults(self) -> list[str]:
        """The measurements that contradict the class's declarations."""
        faults = []
        excess = self.measured - self.declared
        # A weak order may come out too high: with little noise, the leading error may be too small to show on these grids.
        if not math.isnan(self.declared) and not -0.3 <= excess <= (math.inf if self.stochastic else 0.3):
            faults.append(f"order {self.measured:.2f}, declared {self.declared:g}")
        if self.claims_point_mass and self.point_mass > EXACT:
            faults.append(f"a point mass is missed by {self.point_mass:.2g}, declared exact (point_mass)")
        if self.counted != self.calls:
            faults.append(f"{self.counted:g} calls per move, declared {self.calls}")
        if self.claims_independence and not self.batch_independent:
            faults.append("samples of a batch are coupled, declared independent (batch_independent)")
        if self.role == "corrector" and not 1 / STATIONARY < self.stationary < STATIONARY:
            faults.append(f"its stationary variance is {self.stationary:.3g} times the law's")
        return faults

    def row(self) -> dict[str, Any]:
        """One line of the table."""
        prediction, clock, degree = self.exact or ("", "", -1)
        row = {
            "step": self.name, "role": self.role, "noise": self.stochastic, "order": self.declared,
            "measured order": self.measured, "calls": self.calls, "point mass": self.point_mass,
            "exact degree": degree, "exact in": f"{prediction}({clock})" if self.exact else "",
            "batch independent": self.batch_independent, "stationary variance": self.stationary,
        }  # fmt: skip
        for entry in self.bias.to_dict("records"):
            row |= {f"{part} bias {entry['steps']}": entry[part] for part in ("mean", "std")}
        return row | {"faults": "; ".join(self.faults)}


class _Elementwise(ScoreModel):
    """D = 2 y / (1 + y^2), y = x / alpha, elementwise: bounded, and bitwise the same in any batch."""

    def __init__(self, sde: SDE, event_shape: tuple[int, ...]) -> None:
        self.sde, self.event_shape = sde, event_shape

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        alpha, sigma = kernel(self.sde, float(t))
        y = x / alpha
        return Prediction(x, 2 * y / (1 + y * y), alpha, sigma)

    def log_prob(self, x: Tensor, t: Time) -> Tensor:
        return -x.square().flatten(1).sum(1) / 2


def is_batch_independent(step: Step, sde: SDE, steps: int = 8) -> bool:
    """Whether samples 0 to 6 of a batch are bitwise those drawn one by one and in pairs, in float32."""
    model, grid = _Elementwise(sde, (16,)), partial(grids.log_snr, steps=steps)
    roles = {"predictor": None, "corrector": None} | {step.role: step}
    sampler = Sampler(roles["predictor"], grid, roles["corrector"])

    def draw(seeds: range) -> Tensor:
        return sampler.sample(model, (len(seeds), 16), noise=SampleNoise(seeds), dtype=torch.float32).x

    whole = draw(range(7))
    parts = [draw(range(i, i + n)) for i, n in ((0, 1), (1, 2), (3, 1), (4, 2), (6, 1))]
    return bool(torch.equal(whole, torch.cat(parts)))


def counted_calls(step: Step, sde: SDE, moves: int = 4) -> tuple[float, bool]:
    """Network calls per move, and whether noise was drawn."""
    evaluate, drawn = Gaussian(sde), []
    x = torch.full((2, 3), 0.5, dtype=torch.float64)

    def draw(move: int, k: int) -> Tensor:
        drawn.append(k)
        return torch.full_like(x, 0.3)

    end(travel(step, sde, grids.log_snr(sde, steps=moves), x, evaluate, draw))
    return evaluate.calls / moves, bool(drawn)


def certify(
    step: Step, sde: SDE | None = None, name: str | None = None, budgets: Sequence[int] = BUDGETS
) -> Certificate:
    """Runs every check on one step, the package's or your own.

    Args:
        step: a predictor or a corrector.
        sde: the forward process; by default `VPSDE()`.
        name: its name in tables; by default that of the class.
        budgets: the numbers of steps for the bias.

    Raises:
        ValueError: the step refuses the SDE or the grids.
    """
    orders.forget()
    return _certified(step, sde or VPSDE(), name, wholes("budgets", budgets))


@torch.no_grad()
def _certified(step: Step, sde: SDE, name: str | None, budgets: Sequence[int]) -> Certificate:
    if not isinstance(step, Step):
        raise ValueError(f"step must be a Step, e.g. Heun(), got {step!r}")
    counted, stochastic = counted_calls(step, sde)
    declared = measured = residual = stationary = math.nan
    exact, table = None, pd.DataFrame(columns=["steps", "calls", "mean", "std"])
    if step.role == "predictor":
        declared = float(step.order)
        error, finest = (weak_error, 512) if stochastic else (ode_error, 256)
        measured = measured_order(partial(error, step, sde), finest)
        residual, table = point_mass_residual(step, sde), bias(step, sde, budgets)
        exact = None if stochastic else polynomial_exactness(step, sde)
    else:
        stationary = stationary_variance(step, sde)
    return Certificate(
        name or type(step).__name__, step.role, stochastic, declared, measured, step.calls, counted, step.point_mass,
        residual, exact, table, step.batch_independent, is_batch_independent(step, sde), stationary,
    )  # fmt: skip


MACHINERY = (Carry, Renoise)
"""Steps that only the sampler itself uses."""


def discover(base: type[Step] = Step) -> dict[str, Step]:
    """Every step of the package and of modules imported by the user: default settings, then each class's presets.

    Classes that cannot be built without arguments and have no presets (a table from a file) are left out.
    """
    found: dict[str, Step] = {}
    for cls in base.__subclasses__():
        if not inspect.isabstract(cls) and not cls.__name__.startswith("_") and cls not in MACHINERY:
            required = [p for p in inspect.signature(cls).parameters.values() if p.default is p.empty]
            settings: dict[str, Mapping[str, Any]] = {} if required else {cls.__name__: {}}
            settings |= vars(cls).get("presets", {})
            found |= {name: cls(**options) for name, options in settings.items()}
        found |= discover(cls)
    return found


@dataclass(frozen=True)
class Certificates:
    """Certificates of several steps: their `table`, and the `faults` among them."""

    certificates: list[Certificate]

    @property
    def table(self) -> pd.DataFrame:
        """One row per step: predictors first, ODE steps before SDE steps, by declared order."""
        rows = pd.DataFrame([certificate.row() for certificate in self.certificates])
        return rows.sort_values(
            ["role", "noise", "order", "step"], ascending=[False, True, True, True], ignore_index=True
        )

    @property
    def faults(self) -> dict[str, list[str]]:
        """The faults of each step that has any."""
        return {c.name: c.faults for c in self.certificates if c.faults}


def certify_all(
    sde: SDE | None = None, steps: Mapping[str, Step] | None = None, budgets: Sequence[int] = BUDGETS,
    progress: bool = False,
) -> Certificates:  # fmt: skip
    """Certificates of every known step (see `discover`), or of the steps given by name."""
    found = discover() if steps is None else steps
    if not found:
        raise ValueError("no step to certify: give one or more")
    orders.forget()
    sde, budgets = sde or VPSDE(), wholes("budgets", budgets)
    bar = tqdm(found.items(), desc="certifying", disable=not progress, leave=False)
    return Certificates([_certified(step, sde, name, budgets) for name, step in bar])

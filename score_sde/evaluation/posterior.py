r"""Posterior samplers against exact posteriors.

If the prior is a Gaussian mixture and the observation linear, y = A x + noise_std e, p(x | y) is a mixture too. A method's
error is then the distance between its samples and exact draws, given with that between two sets of exact draws. The row
`exact` samples with the posterior's own score: its error is the solver's, and what the others have beyond it the method's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor

from score_sde import grid
from score_sde.evaluation import affine
from score_sde.evaluation.budgets import SamplerLike
from score_sde.evaluation.comparison import compare
from score_sde.evaluation.verdicts import by_metric
from score_sde.guidance import (
    DDRM,
    DPS,
    MMPS,
    DiffPIR,
    Impute,
    LinearOperator,
    Matrix,
    PiGDM,
    Replacement,
    TwistedParticles,
    task_operator,
)
from score_sde.sampler import Sampler
from score_sde.score import ExactScore, ScoreModel
from score_sde.sde import SDE
from score_sde.steps import DDIM, Ancestral, ExponentialAdams
from score_sde.targets import GaussianMixture, Target, ring


@dataclass(frozen=True)
class Problem:
    """A prior, an observation of one draw of it, and the forward process.

    Attributes:
        prior: the law of clean x.
        operator: linear, on the prior's vectors.
        y: one observation.
        noise_std: standard deviation of the observation's noise, positive.
        sde: the forward process.
    """

    prior: GaussianMixture
    operator: LinearOperator
    y: Tensor
    noise_std: float
    sde: SDE

    @property
    def model(self) -> ExactScore:
        """The prior's exact score."""
        return ExactScore(self.prior, self.sde)

    @property
    def data_std(self) -> float:
        """The prior's pooled standard deviation."""
        return self.model.data_std

    @property
    def posterior(self) -> GaussianMixture:
        """p(x | y)."""
        return self.prior.condition(self.operator, self.y, self.noise_std)


class Case(Protocol):
    """What a method is given: a `Problem`, or an observation of real images."""

    @property
    def model(self) -> ScoreModel: ...

    @property
    def operator(self) -> LinearOperator: ...

    @property
    def y(self) -> Tensor: ...

    @property
    def noise_std(self) -> float: ...

    @property
    def data_std(self) -> float | None: ...


Method = Callable[[Any], ScoreModel]
"""A function from a `Case` to a guided model; those in `KNOWING` need a `Problem`."""
Solver = Callable[[Any, int], SamplerLike]

KNOWING = ("exact", "prior")
"""Yardsticks rather than methods: the posterior's own score, and the prior's, which ignores y."""

METHODS: dict[str, Method] = {
    "exact": lambda p: ExactScore(p.posterior, p.sde),
    "prior": lambda p: p.model,
    "replacement": lambda p: Replacement(p.model, p.operator, p.y),
    "diffpir": lambda p: DiffPIR(p.model, p.operator, p.y, p.noise_std),
    "dps": lambda p: DPS(p.model, p.operator, p.y, p.noise_std),
    "dps zeta=0.1": lambda p: DPS(p.model, p.operator, p.y, p.noise_std, zeta=0.1),
    "pigdm": lambda p: PiGDM(p.model, p.operator, p.y, p.noise_std, p.data_std),
    "mmps": lambda p: MMPS(p.model, p.operator, p.y, p.noise_std, min(8, p.operator.output_shape[0])),
}
"""Methods that are score models, for any sampler."""


def _log_snr(steps: int) -> grid.Grid:
    return partial(grid.log_snr, steps=steps)


def _repaint(problem: Case, steps: int) -> Sampler:
    """RePaint in at most `steps` moves: five passes over the levels above the observation's noise, one over the rest."""
    low, sde = problem.noise_std / problem.operator.least_singular_value(), problem.model.sde
    first, last = sde.half_log_snr_range
    share = min(1.0, max(0.0, (-math.log(low) - first) / (last - first))) if low else 1.0
    base = _log_snr(max(1, int(steps / (1 + 4 * share))))
    again = partial(grid.jump_back, base=base, length=max(1, steps // 50), repeats=5, low=low)
    return Sampler(Ancestral(), again, corrector=Impute(problem.operator, problem.y, problem.noise_std))


def _particles(problem: Case, steps: int) -> TwistedParticles:
    p = problem
    return TwistedParticles(_log_snr(steps), p.operator, p.y, p.noise_std, data_std=p.data_std, particles=2000)


SOLVERS: dict[str, Solver] = {
    "ddrm": lambda p, steps: Sampler(DDRM(p.operator, p.y, p.noise_std), _log_snr(steps)),
    "repaint": _repaint,
    "tds": _particles,
}
"""Methods that are samplers themselves, by number of steps."""

SAMPLERS: dict[str, Callable[[int], SamplerLike]] = {
    "ddim": lambda steps: Sampler(DDIM(), _log_snr(steps)),
    "adams2": lambda steps: Sampler(ExponentialAdams(2), _log_snr(steps)),
    "ancestral": lambda steps: Sampler(Ancestral(), _log_snr(steps)),
}
"""The samplers for `METHODS`: ODE solvers of first and second order, and the reverse SDE."""


def compare_posteriors(
    problem: Problem, budgets: Sequence[int], *, methods: Mapping[str, Method] | None = None,
    samplers: Mapping[str, Callable[[int], SamplerLike]] | None = None, solvers: Mapping[str, Solver] | None = None,
    num_samples: int = 2000, seeds: Sequence[int] = (0,), metrics: Sequence[str] = ("sliced_w2",), seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Compares every method with every sampler, and every solver, at every budget, with the exact posterior.

    Args:
        problem: prior and observation.
        budgets: numbers of steps.
        methods, samplers, solvers: by default `METHODS`, `SAMPLERS` and `SOLVERS`.
        num_samples: samples per run.
        seeds: of the samplers.
        metrics: see `Yardstick`.
        seed: of the exact draws, the same for all methods.
        progress: shows a bar if it takes long.

    Returns:
        A table with the columns `method` and those of `by_metric`; `error` has the reason why a run diverged or was refused.
    """
    guided = {name: make(problem) for name, make in (METHODS if methods is None else methods).items()}
    own = {name: partial(make, problem) for name, make in (SOLVERS if solvers is None else solvers).items()}
    against_it = partial(
        compare, budgets=budgets, reference=problem.posterior, seed=seed, num_samples=num_samples, seeds=seeds,
        metrics=metrics, pairs=0, progress=progress,
    )  # fmt: skip
    tables = [against_it(guided, SAMPLERS if samplers is None else samplers)] if guided else []
    if own:
        tables.append(against_it(problem.model, own).assign(model=lambda t: t["sampler"], sampler="own"))
    table = pd.concat(tables, ignore_index=True).rename(columns={"model": "method"})
    table["error"] = table.pop("status").where(lambda status: status != "ok", "")
    return by_metric(table)


def ring_problem(sde: SDE, noise_std: float = 0.5) -> Problem:
    """A ring of eight Gaussians in the plane, observed along one oblique direction: several modes remain possible."""
    return Problem(ring(8, 2.0, 0.4), Matrix([[1.0, 0.3]]), torch.tensor([0.5]), noise_std, sde)


def gaussian_problem(
    sde: SDE, dimensions: int = 2, noise_std: float = 0.3, seed: int = 0, correlated: bool = False
) -> Problem:
    """N(mu, 0.8^2 I), observed through a random matrix of half as many rows: PiGDM and MMPS are exact.

    With `correlated`, the covariance is 0.64 exp(-|i - j| / 2), and MMPS alone is exact.
    """
    g = torch.Generator().manual_seed(seed)
    places = torch.arange(dimensions, dtype=torch.float64)
    apart = (places - places[:, None]).abs()
    covariance = 0.64 * ((-apart / 2).exp() if correlated else torch.eye(dimensions))
    prior = GaussianMixture([1.0], torch.randn(1, dimensions, generator=g), covariance[None])
    operator = Matrix(torch.randn(max(1, dimensions // 2), dimensions, generator=g) / math.sqrt(dimensions))
    return Problem(prior, operator, _observed(prior, operator, noise_std, seed), noise_std, sde)


def image_problem(
    sde: SDE, task: str = "superres", event_shape: Sequence[int] = (1, 8, 8), noise_std: float = 0.2, seed: int = 0
) -> Problem:
    """A mixture of four smooth random fields, flattened, seen through a task's operator (see `task_operator`)."""
    prior = field_mixture(event_shape, seed=seed)
    operator = Matrix(task_operator(task, event_shape).matrix())
    return Problem(prior, operator, _observed(prior, operator, noise_std, seed), noise_std, sde)


def field_mixture(event_shape: Sequence[int], components: int = 4, seed: int = 0) -> GaussianMixture:
    """A mixture of Gaussian fields with correlation exp(-d^2 / 8) in space and 1/2 between channels, as their means have.

    The means have standard deviation 0.25, the fields about them 0.4 and a white part 0.1, so that an observation of half
    the pixels leaves several components possible.
    """
    channels, *places = event_shape
    where = torch.cartesian_prod(*(torch.arange(side, dtype=torch.float64) for side in places)).view(-1, len(places))
    space = (-torch.cdist(where, where).square() / 8).exp()
    smooth = torch.kron((torch.eye(channels, dtype=torch.float64) + 1) / 2, space)
    white = torch.eye(len(smooth), dtype=torch.float64)
    root = torch.linalg.cholesky(smooth + 1e-6 * white)
    g = torch.Generator().manual_seed(seed)
    means = 0.25 * torch.randn(components, len(smooth), generator=g, dtype=torch.float64) @ root.T
    covariance = 0.16 * smooth + 0.01 * white
    return GaussianMixture(torch.ones(components), means, covariance.expand(components, -1, -1))


def certify_guidance(
    problem: Problem, steps: int = 1000, methods: Mapping[str, Method] | None = None,
    solvers: Mapping[str, Solver] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """The Gaussian certificate: each method's exact bias on a Gaussian problem, by DDIM and by ancestral sampling.

    Args:
        problem: its prior must be a single Gaussian.
        steps: of a log-SNR grid; many, so that the remaining bias is the method's.
        methods, solvers: by default `METHODS` and `SOLVERS`; if one of them is given, only those.

    Returns:
        A row for each method and sampler whose output is Gaussian: method, sampler, and the entries of `affine.bias`.
    """
    if methods is None and solvers is None:
        methods, solvers = METHODS, SOLVERS
    runs = [(name, label, SAMPLERS[label](steps), make(problem)) for name, make in (methods or {}).items()
            for label in ("ddim", "ancestral")]  # fmt: skip
    runs += [(name, "own", make(problem, steps), problem.model) for name, make in (solvers or {}).items()]
    rows = []
    for name, label, sampler, model in runs:
        with suppress(ValueError):  # a solver that stops early is not affine
            if isinstance(sampler, Sampler):  # particles are not
                found = affine.bias(affine.sampled_law(sampler, model), problem.posterior)
                rows.append({"method": name, "sampler": label} | found.to_dict())
    return pd.DataFrame(rows, columns=["method", "sampler", "mean", "spread", "w2"])


def _observed(prior: Target, operator: LinearOperator, noise_std: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return operator.observe(prior.sample((1,), generator=generator).double(), noise_std, generator=generator)[0]

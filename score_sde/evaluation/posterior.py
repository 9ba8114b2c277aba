r"""Posterior samplers against exact posteriors, and guidance by labels against the density it is said to target.

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
from score_sde.evaluation.metrics import Yardstick
from score_sde.evaluation.verdicts import by_metric
from score_sde.guidance import (
    DDRM,
    DPS,
    MMPS,
    ClassifierFree,
    DiffPIR,
    Impute,
    LinearOperator,
    Matrix,
    PiGDM,
    Replacement,
    TwistedParticles,
    task_operator,
)
from score_sde.prediction import Prediction
from score_sde.sampler import Sampler
from score_sde.score import ExactScore, ScoreModel
from score_sde.sde import SDE, Time
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
    problem: Problem, steps: int = 1000, methods: Mapping[str, Method] | None = None
) -> pd.DataFrame:  # fmt: skip
    """The Gaussian certificate: each method's exact bias on a Gaussian problem, by DDIM and by ancestral sampling.

    Args:
        problem: its prior must be a single Gaussian.
        steps: of a log-SNR grid; many, so that the remaining bias is the method's.
        methods: by default `METHODS`, and DDRM and RePaint of `SOLVERS`.

    Returns:
        A row for each method and sampler whose output is Gaussian: method, sampler, and the entries of `affine.bias`.
    """
    chosen = METHODS if methods is None else methods
    runs = [(name, label, SAMPLERS[label](steps), make(problem)) for name, make in chosen.items()
            for label in ("ddim", "ancestral")]  # fmt: skip
    if methods is None:
        runs += [(name, "own", SOLVERS[name](problem, steps), problem.model) for name in ("ddrm", "repaint")]
    rows = []
    for name, label, sampler, model in runs:
        assert isinstance(sampler, Sampler)
        with suppress(ValueError):  # a solver that stops early is not affine
            found = affine.bias(affine.sampled_law(sampler, model), problem.posterior)
            rows.append({"method": name, "sampler": label} | found.to_dict())
    return pd.DataFrame(rows)


def _observed(prior: Target, operator: LinearOperator, noise_std: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return operator.observe(prior.sample((1,), generator=generator).double(), noise_std, generator=generator)[0]


class LabelledMixture(ScoreModel):
    """The exact score of a mixture or, under the condition `label` of shape (batch,), of the component of that index."""

    condition_names = frozenset({"label"})

    def __init__(self, target: GaussianMixture, sde: SDE) -> None:
        self.target, self.sde, self.event_shape = target, sde, tuple(target.event_shape)
        self.parts = [ExactScore(component(target, k), sde) for k in range(len(target.weights))]
        self.whole, self.data_std = ExactScore(target, sde), target.std

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        self.check(x.shape, condition)
        if "label" not in condition:
            return self.whole(x, t)
        label = condition["label"].to(x.device)
        known = ((label >= 0) & (label < len(self.parts))).all()
        if label.shape != (len(x),) or label.is_floating_point() or not known:
            raise ValueError(f"label is an integer from 0 to {len(self.parts) - 1} per sample, of shape ({len(x)},)")
        predictions = [part(x, t) for part in self.parts]
        raw = torch.stack([p.raw for p in predictions])[label, torch.arange(len(x), device=x.device)]
        return Prediction(x, raw, predictions[0].alpha, predictions[0].sigma)


def component(mixture: GaussianMixture, k: int) -> GaussianMixture:
    """Component k alone."""
    return GaussianMixture([1.0], mixture.means[k : k + 1], mixture.covariances[k : k + 1])


def tilted(
    whole: Target, part: Target, scale: float, count: int, *, generator: torch.Generator, side: int = 801
) -> Tensor:
    """Draws in the plane of the normalised whole(x)^(1 - scale) part(x)^scale, which guidance is said to target.

    The density is taken as uniform in each cell of a grid of side x side over three times the extent of both laws' draws.

    Raises:
        ValueError: the cells are too wide for the density, or the density reaches beyond the grid.
    """
    seen = torch.cat([law.sample((4096,), generator=generator) for law in (whole, part)]).double()
    low, high = seen.amin(0), seen.amax(0)
    low, high = 2 * low - high, 2 * high - low
    axes = [torch.linspace(a, b, side, dtype=torch.float64) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
    x = torch.cartesian_prod(*axes)
    log_prob = ((1 - scale) * whole.log_prob(x) + scale * part.log_prob(x)).double()
    weights = log_prob.softmax(0)
    _check_cells(log_prob.view(side, side), weights.view(side, side))
    cell = torch.multinomial(weights, count, replacement=True, generator=generator)
    jitter = torch.rand(count, 2, generator=generator, dtype=torch.float64) - 0.5
    return (x[cell] + jitter * (high - low) / (side - 1)).float()


def _check_cells(log_prob: Tensor, weights: Tensor) -> None:
    """Raises ValueError if a grid cuts the density off, or its cells are wider than half a standard deviation.

    Along an axis the second difference of a Gaussian's log-density is (cell / std)^2.
    """
    inner = weights[1:-1, 1:-1]
    if 1 - inner.sum().item() > 1e-6:
        raise ValueError("this tilted density reaches beyond the region of its two laws: take a smaller scale")
    bends = [log_prob.diff(2, 0)[:, 1:-1].abs(), log_prob.diff(2, 1)[1:-1].abs()]
    width = max((bend * inner).sum().item() for bend in bends) ** 0.5
    if not width < 0.5:
        raise ValueError(f"the cells of {len(weights)} x {len(weights)} are {width:.2g} standard deviations wide, and at most "
                         f"0.5 is allowed: give side={math.ceil(len(weights) * width / 0.4)}")  # fmt: skip


def compare_tilted(
    mixture: GaussianMixture, label: int, scales: Sequence[float], sampler: SamplerLike, sde: SDE, *,
    num_samples: int = 4000, seed: int = 0, side: int = 801,
) -> pd.DataFrame:  # fmt: skip
    """Classifier-free guidance towards one component of a plane mixture, against the tilted density of the same scale.

    Returns:
        A row per scale: sliced W2 to the tilted density (`value`), its floor and their ratio, and how much farther the
        samples' mean is from the mixture's mean than the tilted density's (`overshoot`), in units of the data.
    """
    model, rows = LabelledMixture(mixture, sde), []
    labels = torch.full((num_samples,), label)
    out = mixture.means[label] - mixture.mean
    out = out / out.norm()
    for scale in scales:
        generator = torch.Generator().manual_seed(seed)
        law = tilted(mixture, component(mixture, label), scale, 4 * num_samples, generator=generator, side=side)
        guided = ClassifierFree(model, scale)
        x = sampler.sample(guided, (num_samples, 2), seed=seed, condition={"label": labels}).x  # type: ignore[call-arg]
        yardstick = Yardstick(law, num_samples, generator=generator, metrics=("sliced_w2",))
        figures = yardstick(x).to_dict("records")[0]
        beyond = ((x.double().mean(0) - law.double().mean(0)) @ out).item()
        rows.append({"scale": scale} | figures | {"overshoot": beyond})
    return pd.DataFrame(rows)

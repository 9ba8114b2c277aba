"""Every wrapper with every step, adaptive solver and the likelihood: found by walking subclasses, without a list."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Mapping
from functools import partial
from typing import Any

import conftest
import pytest
import torch

import score_sde.guidance
from score_sde import grid
from score_sde.adaptive import AdaptiveODE
from score_sde.adaptive_sde import AdaptiveSDE
from score_sde.guidance import Conditioned, Downsample
from score_sde.likelihood import log_likelihood
from score_sde.networks import DiT
from score_sde.noise import SampleNoise
from score_sde.ode import ProbabilityFlowODE
from score_sde.parameterization import Karras
from score_sde.prediction import Prediction
from score_sde.sampler import Sampler
from score_sde.score import LearnedScore, ScoreModel, WrappedScore
from score_sde.sde import VPSDE, expand
from score_sde.steps import Ancestral, Step

for _module in pkgutil.iter_modules(score_sde.guidance.__path__, "score_sde.guidance."):
    importlib.import_module(_module.name)

pytestmark = conftest.few_steps

SDE, SHAPE, BATCH = VPSDE(), (1, 2, 4), 3
OPERATOR = Downsample(SHAPE, 2)
Y = torch.linspace(-0.5, 0.5, BATCH * 2).view(BATCH, 1, 1, 2)
LABEL = torch.arange(BATCH)
SHORT = partial(grid.log_snr, steps=3)


class Elementwise(ScoreModel):
    """A smooth D, elementwise, that listens to a label: bitwise the same in any batch."""

    condition_names = frozenset({"label"})

    def __init__(self, gain: float = 1.0) -> None:
        self.sde, self.event_shape, self.gain = SDE, SHAPE, gain

    def __call__(self, x, t, **condition):
        self.check(x.shape, condition)
        t = torch.as_tensor(t, dtype=torch.float64)
        alpha, sigma = SDE.alpha(t), SDE.sigma(t)
        bias = 0.2 * condition["label"].to(x).view(-1, 1, 1, 1) if "label" in condition else 0.0
        return Prediction(x, torch.tanh(self.gain * expand(alpha / (alpha**2 + sigma**2), x) * x + bias), alpha, sigma)


def log_prob(x, t, label):
    return -((x - label.to(x).view(-1, 1, 1, 1)) ** 2).flatten(1).sum(1) / 4


WRAPPERS = {cls.__name__: cls for cls in conftest.concrete(WrappedScore) if ".guidance." in cls.__module__}
SCORES = [name for name, cls in WRAPPERS.items() if not getattr(cls, "renoises", False)]
OBSERVED_STEPS = {
    cls.__name__: cls for cls in conftest.concrete(Step) if cls.__module__.startswith("score_sde.guidance.")
}


def build(cls: type, rows: slice, others: Mapping[str, Any] | None = None) -> Any:
    """An instance for the samples in `rows`, its arguments chosen by their names."""
    known = {"model": Elementwise(), "bad_model": Elementwise(0.5), "operator": OPERATOR, "y": Y[rows], "scale": 2.0,
             "log_prob": log_prob, "noise_std": 0.3, **(others or {})}  # fmt: skip
    wanted = [p for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_KEYWORD]
    if cls is Conditioned:
        return cls(known["model"], label=2)
    missing = [p.name for p in wanted if p.default is p.empty and p.name not in known]
    assert not missing, f"{cls.__name__} needs {missing}: say in `known` what to build it with"
    arguments = {p.name: known[p.name] for p in wanted if p.name in known}
    try:
        return cls(**arguments)
    except ValueError:  # a method for observations without noise
        return cls(**arguments | {"noise_std": 0.0})


def drawn(sampler: Any, model: ScoreModel, rows: slice) -> torch.Tensor:
    places = list(range(BATCH))[rows]
    condition = {"label": LABEL[rows]} if "label" in model.condition_names else {}
    return sampler.sample(model, (len(places), *SHAPE), noise=SampleNoise(places), condition=condition).x


def is_independent(make_sampler: Any, make_model: Any) -> bool:
    """Whether a sample is finite and bitwise the same in a batch, and in its parts."""
    first, rest, whole = slice(0, 1), slice(1, BATCH), slice(0, BATCH)
    together = drawn(make_sampler(whole), make_model(whole), whole)
    assert together.isfinite().all()
    return torch.equal(torch.cat([drawn(make_sampler(r), make_model(r), r) for r in (first, rest)]), together)


def sampler_with(step: Step) -> Sampler | None:
    """A short sampler with the step, or None where it refuses the process, the grid or models without a density."""
    pair = {"predictor": step} if step.role == "predictor" else {"predictor": Ancestral(), "corrector": step}
    sampler = Sampler(grid=SHORT, **pair)
    try:
        sampler.check(SDE)
    except ValueError:
        return None
    return None if step.needs_density else sampler


@pytest.mark.parametrize(
    ("role", "name"), [("predictor", name) for name in WRAPPERS] + [("corrector", name) for name in SCORES]
)
def test_every_wrapper_with_every_step_is_independent_of_the_batch(name, role):
    tried, coupled = 0, []
    for label, step in conftest.STEPS.items():
        sampler = sampler_with(step) if step.role == role else None
        if sampler is not None:
            tried += 1
            fine = is_independent(lambda rows, sampler=sampler: sampler, lambda rows: build(WRAPPERS[name], rows))
            coupled += [] if fine or getattr(step, "norm", None) == "batch" else [label]
    assert coupled == []
    assert tried >= (0.8 * len(conftest.PREDICTORS) if role == "predictor" else 6)


@pytest.mark.parametrize("name", OBSERVED_STEPS)
def test_every_step_that_knows_an_observation_is_independent_of_the_batch(name):
    def sampler(rows):
        return sampler_with(build(OBSERVED_STEPS[name], rows))

    assert is_independent(sampler, lambda rows: Elementwise())


@pytest.mark.parametrize("name", SCORES)
def test_every_wrapper_with_every_adaptive_solver(name):
    def model(rows):
        return build(WRAPPERS[name], rows)

    whole = slice(0, BATCH)
    assert drawn(ProbabilityFlowODE(rtol=1e-2, atol=1e-2), model(whole), whole).isfinite().all()
    if "y" not in inspect.signature(WRAPPERS[name]).parameters:
        for solver in (AdaptiveODE("bosh3", rtol=1e-2, atol=1e-2), AdaptiveSDE(rtol=0.1, atol=0.1)):
            assert is_independent(lambda rows, solver=solver: solver, model), solver
        return

    def regrouped(rows):  # adaptive solvers regroup a batch: the observation goes with its sample, as a condition
        guided = build(WRAPPERS[name], rows)
        free = type(guided)(Elementwise(), OPERATOR, noise_std=guided.noise_std)
        places = list(range(BATCH))[rows]
        return free, {"shape": (len(places), *SHAPE), "noise": SampleNoise(places), "condition": {"y": Y[rows]}}

    solver = AdaptiveODE("bosh3", rtol=1e-2, atol=1e-2)
    parts = []
    for rows in (slice(0, 1), slice(1, BATCH), whole):
        free, options = regrouped(rows)
        parts.append(solver.sample(free, **options).x)
    assert torch.equal(torch.cat(parts[:2]), parts[2])


@pytest.mark.parametrize("name", SCORES)
def test_every_wrapper_has_a_likelihood(name):
    model = build(WRAPPERS[name], slice(0, BATCH))
    condition = {"label": LABEL} if "label" in model.condition_names else {}
    result = log_likelihood(model, torch.zeros(BATCH, *SHAPE), method="adams", steps=12, condition=condition,
                            truncation="none")  # fmt: skip
    assert result.log_prob.isfinite().all()


@pytest.mark.parametrize("name", WRAPPERS)
def test_derivatives_flow_through_every_wrapper_around_attention(name):
    """gradient=True through guidance that is itself a gradient, against finite differences."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = DiT(SHAPE, width=8, depth=1, heads=2, frequencies=4, num_classes=3).double()
        for part in network.parameters():
            torch.nn.init.normal_(part, std=0.3)
    learned = LearnedScore(network, SDE, Karras(1.0), SHAPE).requires_grad_(False)
    sampler = Sampler(Ancestral(), partial(grid.log_snr, steps=2))
    model = build(
        WRAPPERS[name], slice(0, BATCH), {"model": learned, "log_prob": lambda x, t, label: attended(x, label)}
    )
    condition = {"label": LABEL} if "label" in model.condition_names else {}

    def attended(x, label):
        return -(learned(x, 0.5, label=label).denoised ** 2).flatten(1).sum(1)

    def run(x, **options):
        return sampler.sample(model, x.shape, x_init=x, seed=0, condition=condition, **options).x.sin().sum()

    x = torch.randn(BATCH, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    (found,) = torch.autograd.grad(run(x, gradient=True), x)
    step = 1e-5 * found.sign()
    slope = (run(x.detach() + step) - run(x.detach() - step)) / 2e-5
    torch.testing.assert_close(found.abs().sum(), slope, rtol=1e-5, atol=1e-7)

"""Score-based generative modelling through stochastic differential equations."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from score_sde.adaptive import AdaptiveODE
from score_sde.adaptive_sde import AdaptiveSDE
from score_sde.energy import EnergyScore
from score_sde.likelihood import log_likelihood
from score_sde.noise import BatchNoise, BrownianNoise, SampleNoise
from score_sde.ode import ProbabilityFlowODE
from score_sde.parallel import ParallelSampler
from score_sde.parameterization import Denoised, Flow, Karras, Noise, Published, PublishedNoise, Score, Velocity
from score_sde.prediction import Prediction
from score_sde.sampler import Sampler
from score_sde.score import ExactScore, FunctionScore, LearnedScore, ScoreModel, reparameterize
from score_sde.sde import SDE, VESDE, VPSDE, CosineSDE, DiscreteSDE, KarrasSDE, RectifiedFlow, SubVPSDE
from score_sde.solver import SampleResult
from score_sde.steps import (
    DDIM,
    AdamsBashforth,
    Ancestral,
    AnnealedLangevin,
    ERSDESolver,
    EulerMaruyama,
    ExponentialAdams,
    Heun,
    LangevinCorrector,
    LinearStep,
    ProbabilityFlowEuler,
    RectifiedAdams,
    ReverseDiffusion,
    RungeKutta,
    SASolver,
    StagedStep,
    Step,
    Tabulated,
    UniPC,
)
from score_sde.targets import Empirical, GaussianMixture

if TYPE_CHECKING:
    from score_sde.export import load
    from score_sde.run import Run

__all__ = [
    "DDIM",
    "SDE",
    "VESDE",
    "VPSDE",
    "AdamsBashforth",
    "AdaptiveODE",
    "AdaptiveSDE",
    "Ancestral",
    "AnnealedLangevin",
    "BatchNoise",
    "BrownianNoise",
    "CosineSDE",
    "Denoised",
    "DiscreteSDE",
    "ERSDESolver",
    "Empirical",
    "EnergyScore",
    "EulerMaruyama",
    "ExactScore",
    "ExponentialAdams",
    "Flow",
    "FunctionScore",
    "GaussianMixture",
    "Heun",
    "Karras",
    "KarrasSDE",
    "LangevinCorrector",
    "LearnedScore",
    "LinearStep",
    "Noise",
    "ParallelSampler",
    "Prediction",
    "ProbabilityFlowEuler",
    "ProbabilityFlowODE",
    "Published",
    "PublishedNoise",
    "RectifiedAdams",
    "RectifiedFlow",
    "ReverseDiffusion",
    "Run",
    "RungeKutta",
    "SASolver",
    "SampleNoise",
    "SampleResult",
    "Sampler",
    "Score",
    "ScoreModel",
    "StagedStep",
    "Step",
    "SubVPSDE",
    "Tabulated",
    "UniPC",
    "Velocity",
    "load",
    "log_likelihood",
    "reparameterize",
]


_LATER = {"Run": "score_sde.run", "load": "score_sde.export"}
_ROOMS = ("convert", "data", "evaluation", "guidance", "networks", "plotting", "training", "tuning")


def __getattr__(name: str) -> Any:
    """What brings much with it is imported when it is first asked for: `Run`, `load`, and the rooms as `score_sde.<room>`."""
    if name == "__version__":
        return importlib.metadata.version("score_sde")
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"score_sde.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS, "__version__"])

"""Score-based generative modelling through stochastic differential equations."""

from score_sde.noise import BatchNoise, SampleNoise
from score_sde.ode import ProbabilityFlowODE
from score_sde.parameterization import Denoised, Flow, Karras, Noise, Score, Velocity
from score_sde.prediction import Prediction
from score_sde.sampler import Sampler, SampleResult
from score_sde.score import ExactScore, LearnedScore, ScoreModel
from score_sde.sde import SDE, CosineSDE, DiscreteSDE, KarrasSDE, RectifiedFlow, SubVPSDE, VESDE, VPSDE
from score_sde.steps import (
    DDIM,
    Ancestral,
    AnnealedLangevin,
    EulerMaruyama,
    ExponentialAdams,
    Heun,
    LangevinCorrector,
    LinearStep,
    ProbabilityFlowEuler,
    ReverseDiffusion,
    StagedStep,
    Step,
)
from score_sde.targets import Empirical, GaussianMixture

__all__ = [
    "DDIM",
    "SDE",
    "VESDE",
    "VPSDE",
    "Ancestral",
    "AnnealedLangevin",
    "BatchNoise",
    "CosineSDE",
    "Denoised",
    "DiscreteSDE",
    "Empirical",
    "EulerMaruyama",
    "ExactScore",
    "ExponentialAdams",
    "Flow",
    "GaussianMixture",
    "Heun",
    "Karras",
    "KarrasSDE",
    "LangevinCorrector",
    "LearnedScore",
    "LinearStep",
    "Noise",
    "Prediction",
    "ProbabilityFlowEuler",
    "ProbabilityFlowODE",
    "RectifiedFlow",
    "ReverseDiffusion",
    "SampleNoise",
    "SampleResult",
    "Sampler",
    "Score",
    "ScoreModel",
    "StagedStep",
    "Step",
    "SubVPSDE",
    "Velocity",
]

"""Steps: how to get from grid time t to s. Correctors are steps with s = t."""

from score_sde.steps.langevin import AnnealedLangevin, LangevinCorrector
from score_sde.steps.linear import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    ExponentialAdams,
    LinearStep,
    ProbabilityFlowEuler,
    ReverseDiffusion,
)
from score_sde.steps.staged import Heun, Stage, StagedStep
from score_sde.steps.step import Step

__all__ = [
    "DDIM",
    "Ancestral",
    "AnnealedLangevin",
    "EulerMaruyama",
    "ExponentialAdams",
    "Heun",
    "LangevinCorrector",
    "LinearStep",
    "ProbabilityFlowEuler",
    "ReverseDiffusion",
    "Stage",
    "StagedStep",
    "Step",
]

"""Steps: how to get from grid time t to s. Correctors are steps with s = t."""

from score_sde.steps.langevin import AnnealedLangevin, LangevinCorrector
from score_sde.steps.linear import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    LinearStep,
    ProbabilityFlowEuler,
    ReverseDiffusion,
)
from score_sde.steps.multistep import IPNDM, AdamsBashforth, ExponentialAdams
from score_sde.steps.staged import Heun, Stage, StagedStep
from score_sde.steps.step import Step

__all__ = [
    "DDIM",
    "IPNDM",
    "AdamsBashforth",
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

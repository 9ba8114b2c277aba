"""Steps: how to get from grid time t to s. Predictors go to less noise; correctors are steps with s = t."""

from score_sde.steps.corrected import CorrectedStep, SASolver, UniPC
from score_sde.steps.er_sde import ERSDESolver
from score_sde.steps.langevin import AnnealedLangevin, LangevinCorrector, UnadjustedLangevin
from score_sde.steps.linear import (
    DDIM,
    Ancestral,
    EulerMaruyama,
    LearnedVariance,
    LinearStep,
    ProbabilityFlowEuler,
    ReverseDiffusion,
)
from score_sde.steps.mcmc import KineticLangevin, MetropolisLangevin
from score_sde.steps.multistep import IPNDM, AdamsBashforth, ExponentialAdams, GradientEstimation, RectifiedAdams
from score_sde.steps.staged import (
    DPMSolverSDE,
    DPMSolverSinglestep,
    Heun,
    RungeKutta,
    RungeKutta2,
    Stage,
    StagedStep,
)
from score_sde.steps.step import Step
from score_sde.steps.tabulated import Tabulated

__all__ = [
    "DDIM",
    "IPNDM",
    "AdamsBashforth",
    "Ancestral",
    "AnnealedLangevin",
    "CorrectedStep",
    "DPMSolverSDE",
    "DPMSolverSinglestep",
    "ERSDESolver",
    "EulerMaruyama",
    "ExponentialAdams",
    "GradientEstimation",
    "Heun",
    "KineticLangevin",
    "LangevinCorrector",
    "LearnedVariance",
    "LinearStep",
    "MetropolisLangevin",
    "ProbabilityFlowEuler",
    "RectifiedAdams",
    "ReverseDiffusion",
    "RungeKutta",
    "RungeKutta2",
    "SASolver",
    "Stage",
    "StagedStep",
    "Step",
    "Tabulated",
    "UnadjustedLangevin",
    "UniPC",
]

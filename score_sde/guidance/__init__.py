"""Wrappers ScoreModel -> ScoreModel, the operators they observe through, and editing.

Each method says what it assumes, its cost beside the sampler's own (one network call a prediction), and its bias. The
figure called certificate is exact (`evaluation.affine`): the 2-Wasserstein distance of what is sampled to the exact
posterior over the posterior's spread, on isotropic / correlated Gaussian data in 8 dimensions, half of them seen with
noise, after 500 ancestral steps. The posterior's own score has 0.01 / 0.01 there, the solver's; the prior 0.98 / 0.69.
"""

from score_sde.guidance.conditional import (
    Autoguidance,
    Classifier,
    ClassifierFree,
    ClassifierFreePlusPlus,
    Conditioned,
    DynamicThreshold,
    StaticThreshold,
)
from score_sde.guidance.editing import interpolate, sdedit, translate
from score_sde.guidance.observed import DPS, MMPS, DiffPIR, Observed, PiGDM, Replacement
from score_sde.guidance.operators import (
    TASKS,
    Blur,
    Downsample,
    FourierSubsample,
    Grey,
    Linear,
    LinearOperator,
    Mask,
    Matrix,
    Nonlinear,
    Operator,
    task_operator,
)
from score_sde.guidance.particles import TwistedParticles
from score_sde.guidance.steps import DDRM, Impute

__all__ = [
    "DDRM",
    "DPS",
    "MMPS",
    "TASKS",
    "Autoguidance",
    "Blur",
    "Classifier",
    "ClassifierFree",
    "ClassifierFreePlusPlus",
    "Conditioned",
    "DiffPIR",
    "Downsample",
    "DynamicThreshold",
    "FourierSubsample",
    "Grey",
    "Impute",
    "Linear",
    "LinearOperator",
    "Mask",
    "Matrix",
    "Nonlinear",
    "Observed",
    "Operator",
    "PiGDM",
    "Replacement",
    "StaticThreshold",
    "TwistedParticles",
    "interpolate",
    "sdedit",
    "task_operator",
    "translate",
]

"""Wrappers ScoreModel -> ScoreModel, the operators they observe through, and editing.

Each method states what it assumes, its cost besides the sampler's own (one network call per prediction), and its bias. A
certificate is an exact figure (`evaluation.affine`): the 2-Wasserstein distance of the samples' law to the exact
posterior, divided by the posterior's spread, for isotropic / correlated Gaussian data in 8 dimensions, half of them
observed with noise, after 500 ancestral steps. For comparison, the posterior's own score has 0.01 / 0.01 (the solver's
error), the prior 0.98 / 0.69.
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

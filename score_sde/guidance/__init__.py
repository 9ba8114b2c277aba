"""Wrappers ScoreModel -> ScoreModel, the operators they observe through, and editing."""

from score_sde.guidance.base import Guided
from score_sde.guidance.conditional import Autoguidance, Classifier, ClassifierFree, DynamicThreshold
from score_sde.guidance.editing import below, interpolate, jump_back, sdedit, slerp, translate
from score_sde.guidance.observed import DPS, MMPS, DiffPIR, Observed, PiGDM, Replacement
from score_sde.guidance.operators import (
    TASKS,
    Blur,
    Downsample,
    FourierSubsample,
    Grey,
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
    "DiffPIR",
    "Downsample",
    "DynamicThreshold",
    "FourierSubsample",
    "Grey",
    "Guided",
    "Impute",
    "LinearOperator",
    "Mask",
    "Matrix",
    "Nonlinear",
    "Observed",
    "Operator",
    "PiGDM",
    "Replacement",
    "TwistedParticles",
    "below",
    "interpolate",
    "jump_back",
    "sdedit",
    "slerp",
    "task_operator",
    "translate",
]

"""Metrics with their noise floors, a classifier's view of digits, and the comparison of samplers."""

from score_sde.evaluation.bounds import Bound, continuous_bound, variational_bound
from score_sde.evaluation.certify import Certificate, Certificates, certify, certify_all
from score_sde.evaluation.comparison import compare
from score_sde.evaluation.diagnostics import (
    Calibration,
    ScoreError,
    asymmetry,
    calibration,
    field_error,
    fokker_planck_residual,
    score_error,
)
from score_sde.evaluation.evaluate import Evaluation, evaluate, starts
from score_sde.evaluation.features import DigitClassifier, digit_report
from score_sde.evaluation.metrics import (
    METRICS,
    MODE_METRICS,
    Yardstick,
    energy_distance,
    frechet_distance,
    known_metrics,
    mmd,
    mode_spread,
    mode_spread_error,
    mode_weight_error,
    mode_weights,
    noise_floor,
    score,
    sliced_w2,
    w2,
)

__all__ = [
    "METRICS",
    "MODE_METRICS",
    "Bound",
    "Calibration",
    "Certificate",
    "Certificates",
    "DigitClassifier",
    "Evaluation",
    "ScoreError",
    "Yardstick",
    "asymmetry",
    "calibration",
    "certify",
    "certify_all",
    "compare",
    "continuous_bound",
    "digit_report",
    "energy_distance",
    "evaluate",
    "field_error",
    "fokker_planck_residual",
    "frechet_distance",
    "known_metrics",
    "mmd",
    "mode_spread",
    "mode_spread_error",
    "mode_weight_error",
    "mode_weights",
    "noise_floor",
    "score",
    "score_error",
    "sliced_w2",
    "starts",
    "variational_bound",
    "w2",
]

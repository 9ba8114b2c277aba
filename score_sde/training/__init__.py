"""From a network and data to a trained score model: objective, time sampling, averaging, checkpoints, the trainer."""

from score_sde.training.checkpoint import Checkpoints, write_atomically
from score_sde.training.ema import EMA, ema_decay
from score_sde.training.objective import DenoisingScoreMatching
from score_sde.training.times import ImportanceTimes, LadderTimes, LogNormalTimes, Times, TimeSampler, UniformTimes
from score_sde.training.trainer import DivergenceError, Trainer, TrainingResult
from score_sde.training.weighting import (
    KarrasWeighting,
    LikelihoodWeighting,
    MinSNRWeighting,
    SigmaWeighting,
    SimpleWeighting,
    Weighting,
)

__all__ = [
    "EMA",
    "Checkpoints",
    "DenoisingScoreMatching",
    "DivergenceError",
    "ImportanceTimes",
    "KarrasWeighting",
    "LadderTimes",
    "LikelihoodWeighting",
    "LogNormalTimes",
    "MinSNRWeighting",
    "SigmaWeighting",
    "SimpleWeighting",
    "TimeSampler",
    "Times",
    "Trainer",
    "TrainingResult",
    "UniformTimes",
    "Weighting",
    "ema_decay",
    "write_atomically",
]

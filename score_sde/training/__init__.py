"""From a network and data to a trained score model: objective, time sampling, averaging, checkpoints, the trainer."""

from score_sde.training.checkpoint import Checkpoints, write_array, write_atomically
from score_sde.training.classification import NoisyCrossEntropy
from score_sde.training.draws import draw
from score_sde.training.ema import EMA, HalfLife, PowerFunction, ema_decay
from score_sde.training.objective import DenoisingScoreMatching, Losses, Objective
from score_sde.training.posthoc import reconstruct
from score_sde.training.score_matching import (
    ExplicitScoreMatching,
    FiniteDifferenceScoreMatching,
    ImplicitScoreMatching,
    SlicedScoreMatching,
)
from score_sde.training.times import (
    ImportanceTimes,
    LadderTimes,
    LogNormalTimes,
    OneLevelTimes,
    Times,
    TimeSampler,
    UniformTimes,
)
from score_sde.training.trainer import DivergenceError, Trainer, TrainingResult
from score_sde.training.variational import (
    ContinuousDecoder,
    DiscretisedDecoder,
    Ladder,
    LossAwareTimes,
    StepVariance,
    VariationalObjective,
)
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
    "ContinuousDecoder",
    "DenoisingScoreMatching",
    "DiscretisedDecoder",
    "DivergenceError",
    "ExplicitScoreMatching",
    "FiniteDifferenceScoreMatching",
    "HalfLife",
    "ImplicitScoreMatching",
    "ImportanceTimes",
    "KarrasWeighting",
    "Ladder",
    "LadderTimes",
    "LikelihoodWeighting",
    "LogNormalTimes",
    "LossAwareTimes",
    "Losses",
    "MinSNRWeighting",
    "NoisyCrossEntropy",
    "Objective",
    "OneLevelTimes",
    "PowerFunction",
    "SigmaWeighting",
    "SimpleWeighting",
    "SlicedScoreMatching",
    "StepVariance",
    "TimeSampler",
    "Times",
    "Trainer",
    "TrainingResult",
    "UniformTimes",
    "VariationalObjective",
    "Weighting",
    "draw",
    "ema_decay",
    "reconstruct",
    "write_array",
    "write_atomically",
]

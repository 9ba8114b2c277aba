"""A tiny training run for the tests; by `tiny.py <directory> <steps>` one in a process that can be killed."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from score_sde.data import TensorData
from score_sde.networks import MLP
from score_sde.parameterization import Noise
from score_sde.score import LearnedScore
from score_sde.sde import VPSDE
from score_sde.training import DenoisingScoreMatching, Trainer, TrainingResult, UniformTimes


def model(seed: int = 0) -> LearnedScore:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = MLP((2,), width=16, depth=2, frequencies=4)
    network.blocks[0].branch.insert(1, torch.nn.Dropout(0.2))
    return LearnedScore(network, VPSDE(), Noise(), (2,))


def data() -> TensorData:
    return TensorData(torch.randn(50, 2, generator=torch.Generator().manual_seed(0)))


def trainer(steps: int = 40, **options) -> Trainer:
    defaults = {
        "batch_size": 16,
        "device": "cpu",
        "progress": False,
        "checkpoint_every": 7,
        "log_every": 5,
        "warmup": 5,
    }
    return Trainer(steps=steps, **(defaults | options))


def train(directory: Path, settings: Trainer | None = None, **options) -> TrainingResult:
    pieces = {"model": model(), "data": data(), "objective": DenoisingScoreMatching(), "time_sampler": UniformTimes()}
    return (settings or trainer()).fit(**(pieces | options), directory=directory)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), trainer(int(sys.argv[2]), checkpoint_every=3), resume=True)

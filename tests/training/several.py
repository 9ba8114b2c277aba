"""A training run on the processes that `torchrun` starts: `several.py <directory> <steps> [option=value ...]`."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import tiny
import torch

from score_sde import distributed
from score_sde.data import Batch, TensorData
from score_sde.networks import MLP
from score_sde.parameterization import Noise
from score_sde.score import LearnedScore
from score_sde.sde import VPSDE
from score_sde.training import DenoisingScoreMatching, TrainingResult, UniformTimes


class Watched(TensorData):
    """Labelled bytes that are dequantised; notes which examples this process read at which step."""

    def __init__(self) -> None:
        source = torch.Generator().manual_seed(0)
        x = torch.randint(0, 256, (50, 2), generator=source, dtype=torch.uint8)
        super().__init__(x, torch.arange(50), dequantize=True)
        self.read: list[tuple[int, list[int]]] = []

    def batch(self, step: int, batch_size: int, rows: slice = slice(None)) -> Batch:
        batch = super().batch(step, batch_size, rows)
        self.read.append((step, batch.condition["label"].tolist()))
        return batch


def model() -> LearnedScore:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = MLP((2,), width=16, depth=2, frequencies=4, num_classes=50)
    return LearnedScore(network, VPSDE(), Noise(), (2,))


def train(directory: Path, steps: int, resume: bool = True, **options) -> TrainingResult:
    data = Watched()
    settings = tiny.trainer(steps, **({"log_every": 1, "schedule": "constant"} | options))
    try:
        return settings.fit(
            model(), data, DenoisingScoreMatching(label_dropout=0.3), UniformTimes(), directory, resume=resume
        )
    finally:
        (directory / f"read-{distributed.count()}-{distributed.rank()}.json").write_text(json.dumps(data.read))


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = dict(option.split("=") for option in sys.argv[3:])
    train(Path(sys.argv[1]), int(sys.argv[2]), **{name: ast.literal_eval(value) for name, value in given.items()})

"""Training runs on the processes that `torchrun` starts: `several.py <folder> <jobs.json>`, one run a job.

A job is a name and options of `train`; its run directory is <folder>/<name>.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path

import tiny
import torch

from score_sde import Sampler, distributed, grid
from score_sde.data import Batch, TensorData
from score_sde.data.tensor import Examples
from score_sde.networks import MLP, Dropout
from score_sde.networks.magnitude import MPConv
from score_sde.parameterization import Noise
from score_sde.score import LearnedScore
from score_sde.sde import VPSDE
from score_sde.steps import EulerMaruyama
from score_sde.training import DenoisingScoreMatching, TrainingResult, UniformTimes


class Watched(TensorData):
    """Labelled bytes, dequantised, that note which examples a process read; with accidents on request.

    `poisoned` is a step whose example 13 of the batch is NaN; at step `terminated` process 1 gets a SIGTERM.
    """

    def __init__(self, poisoned: int = -1, terminated: int = -1) -> None:
        source = torch.Generator().manual_seed(0)
        x = torch.randint(0, 256, (50, 2), generator=source, dtype=torch.uint8)
        super().__init__(x, torch.arange(50), test=Examples(x[:23] // 2, torch.arange(23)), dequantize=True)
        self.poisoned, self.terminated = poisoned, terminated
        self.read: list[tuple[int, list[int]]] = []

    def batch(self, step: int, batch_size: int, rows: slice = slice(None)) -> Batch:
        batch = super().batch(step, batch_size, rows)
        self.read.append((step, batch.condition["label"].tolist()))
        if step == self.terminated and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if step != self.poisoned:
            return batch
        bad = torch.arange(batch_size)[rows] == 13
        return Batch(torch.where(bad[:, None], math.nan, batch.x.float()), batch.condition)


def model() -> LearnedScore:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = MLP((2,), width=16, depth=2, frequencies=4, num_classes=50)
        network.blocks[0].branch.insert(1, Dropout(0.2))
    return LearnedScore(network, VPSDE(), Noise(), (2,))


def train(
    directory: Path, steps: int = 12, poisoned: int = -1, terminated: int = -1, idle: bool = False, sphere: bool = False,
    **options,
) -> TrainingResult:  # fmt: skip
    """`idle` gives the network a parameter that no loss reaches, `sphere` filters of unit norm, one of them alone."""
    data = Watched(poisoned, terminated)
    settings = {
        "log_every": 1,
        "test_every": 4,
        "checkpoint_every": 3,
        "keep_checkpoints": 20,
        "schedule": "constant",
        **options,
    }
    objective = DenoisingScoreMatching(label_dropout=0.3)
    trained = model()
    if idle:
        trained.network.idle = torch.nn.Linear(3, 5)
        torch.nn.init.ones_(trained.network.idle.weight)
        torch.nn.init.ones_(trained.network.idle.bias)
    if sphere:
        torch.manual_seed(0)
        trained.network.blocks[0].branch = torch.nn.Sequential(
            MPConv(0, 16, 16), MPConv(0, 16, 1), torch.nn.Linear(1, 16)
        )
    result = tiny.trainer(steps, **settings).fit(trained, data, objective, UniformTimes(), directory, resume=True)
    assert all(p.requires_grad for p in trained.parameters())
    (directory / f"read-{distributed.rank()}.json").write_text(json.dumps(data.read))
    return result


def sample() -> torch.Tensor:
    sampler = Sampler(EulerMaruyama(), partial(grid.uniform, steps=5))
    labels = torch.arange(25) % 7
    return distributed.sample(sampler, model(), 25, seed=3, batch_size=4, condition={"label": labels})[0]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    distributed.start()
    (folder / f"pid-{distributed.rank()}").write_text(str(os.getpid()))
    for name, options in json.loads(Path(sys.argv[2]).read_text()).items():
        found = train(folder / name, **options)
        (folder / name / f"interrupted-{distributed.rank()}").write_text(f"{found.step} {found.interrupted}")
    torch.save(sample(), folder / f"samples-{distributed.rank()}.pt")

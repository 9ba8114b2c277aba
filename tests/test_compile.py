"""torch.compile: network and update are traced whole, without a graph break, and one trace serves every row."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from score_sde import grid
from score_sde.cuda_graph import numbers, rebuilt
from score_sde.networks import UNet
from score_sde.parameterization import Noise
from score_sde.sampler import Sampler
from score_sde.score import LearnedScore
from score_sde.sde import VPSDE
from score_sde.steps import ExponentialAdams, Heun, Step

pytestmark = pytest.mark.slow  # the compiler alone takes ten seconds to import
SHAPE = (4, 3, 8, 8)
TIMES = grid.log_snr(VPSDE(), 6)


def network() -> nn.Module:
    torch.manual_seed(0)
    net = UNet(SHAPE[1:], width=8, multipliers=(1, 2), blocks=1).eval()
    nn.init.normal_(net.last[-1].weight, std=0.1)
    return net


def test_a_compiled_network_is_one_graph_and_gives_the_same_samples() -> None:
    plain, sampler = network(), Sampler(ExponentialAdams(3, 1.0), partial(grid.log_snr, steps=5))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(plain, fullgraph=True, backend="eager")
    expected, found = (
        sampler.sample(LearnedScore(net, VPSDE(), Noise(), SHAPE[1:]), SHAPE, seed=0).x for net in (plain, compiled)
    )
    torch.testing.assert_close(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("step", [ExponentialAdams(2, 1.0), Heun()], ids=["SDE Adams 2", "Heun"])
@torch.no_grad()
def test_network_and_update_are_one_graph_for_all_rows(step: Step) -> None:
    """With a row's numbers as tensors, as a CUDA graph has them; the time is one for each sample."""
    model, x = LearnedScore(network(), VPSDE(), Noise(), SHAPE[1:]), torch.ones(SHAPE)
    rows, z = step.plan(VPSDE(), TIMES[:-1], TIMES[1:])[1:], torch.randn(SHAPE)
    history = (torch.zeros(SHAPE),) * (2 if isinstance(step, ExponentialAdams) else 0)

    def update(row: Any, x: Tensor, history: tuple[Tensor, ...]) -> Tensor:
        return step.advance(row, x, history, lambda at, t: model(at, t.expand(len(at))), lambda k: z)[0]

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(update, fullgraph=True, backend="eager")
    for row in rows:
        tensors = rebuilt(row, iter(torch.tensor(list(numbers(row)), dtype=torch.float64).unbind()))
        torch.testing.assert_close(compiled(tensors, x, history), update(tensors, x, history))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

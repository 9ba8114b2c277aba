"""CUDA graphs: the buffers' bookkeeping on any machine, with Python in the graph's place, and the graphs on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from score_sde import cuda_graph, grid, targets
from score_sde.noise import SampleNoise
from score_sde.parameterization import Noise
from score_sde.sampler import Sampler
from score_sde.score import ExactScore, LearnedScore
from score_sde.sde import VPSDE
from score_sde.steps import (
    DDIM,
    AdamsBashforth,
    Ancestral,
    DPMSolverSDE,
    EulerMaruyama,
    ExponentialAdams,
    Heun,
    KineticLangevin,
    LangevinCorrector,
    MetropolisLangevin,
    RungeKutta,
    SASolver,
    UniPC,
)

F64 = torch.float64
GRID = partial(grid.log_snr, steps=12)
CHURN = partial(grid.churn, base=partial(grid.karras, steps=9), S_churn=3.0)
RESTART = partial(grid.restart, base=partial(grid.karras, steps=9), intervals=((0.06, 0.3, 5, 2),))
SAMPLERS = {
    "DDIM": Sampler(DDIM(), GRID),
    "ancestral DDIM": Sampler(DDIM(1.0), GRID),
    "Adams 3": Sampler(ExponentialAdams(3), GRID),
    "velocity Adams 4": Sampler(AdamsBashforth(4), GRID),
    "SDE Adams 2": Sampler(ExponentialAdams(2, 1.0), GRID),
    "Euler-Maruyama": Sampler(EulerMaruyama(), GRID, final="none"),
    "UniPC": Sampler(UniPC(3), GRID),
    "Heun": Sampler(Heun(), GRID),
    "RK4": Sampler(RungeKutta(), GRID),
    "DPM-Solver++ SDE": Sampler(DPMSolverSDE(), GRID),
    "Langevin": Sampler(Ancestral(), GRID, LangevinCorrector(steps=2)),
    "Langevin by norms": Sampler(ExponentialAdams(2), GRID, LangevinCorrector(norm="sample"), corrector_first=False),
    "kinetic": Sampler(Ancestral(), GRID, KineticLangevin()),
    "churn": Sampler(Heun(), CHURN),
    "restarted SA-Solver": Sampler(SASolver(3, 3), RESTART),
}


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graphs that are Python functions: what a body leaves in its buffers is all that comes back from it."""
    count: list[int] = []

    def capture(body: Callable[[], None]) -> Callable[[], None]:
        body()
        body()

        def replay() -> None:
            count.append(1)
            body()

        return replay

    monkeypatch.setattr(cuda_graph, "capture", capture)
    monkeypatch.setattr(cuda_graph, "require_cuda", lambda x: None)
    return count


def both(sampler: Sampler, model: ExactScore | LearnedScore, **options: object) -> list:
    """The run as usual and with graphs."""
    runs = []
    for flag in (False, True):
        sampler.cuda_graph = flag
        runs.append(sampler.sample(model, (5, *model.event_shape), trajectory=True, **options))
    sampler.cuda_graph = False
    return runs


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_replayed_run_is_the_usual_one(name: str, replays: list[int]) -> None:
    model = ExactScore(targets.make("ring"), VPSDE())
    for noise in ({"seed": 3}, {"noise": SampleNoise(range(5))}):
        usual, graphed = both(SAMPLERS[name], model, dtype=F64, **noise)
        torch.testing.assert_close(graphed.trajectory, usual.trajectory, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(graphed.x, usual.x, rtol=1e-9, atol=1e-9)
        assert graphed.nfe == usual.nfe
    assert len(replays) >= 8  # most of the moves of two runs


def test_the_state_keeps_its_dtype(replays: list[int]) -> None:
    usual, graphed = both(SAMPLERS["SDE Adams 2"], ExactScore(targets.make("ring"), VPSDE()), seed=0)
    assert graphed.x.dtype == torch.float32
    torch.testing.assert_close(graphed.x, usual.x, rtol=1e-4, atol=1e-4)


def test_rows_are_taken_apart_and_put_together() -> None:
    step, times = DPMSolverSDE(), GRID(VPSDE())
    for row in step.plan(VPSDE(), times[:-1], times[1:]):
        flat = list(cuda_graph.numbers(row))
        assert cuda_graph.rebuilt(row, iter(flat)) == row
        assert type(cuda_graph.rebuilt(row, iter(flat))) is type(row)
    assert cuda_graph.kind_of(step, row) == cuda_graph.kind_of(step, row._replace(t=0.5))
    assert cuda_graph.kind_of(step, row) != cuda_graph.kind_of(step, row._replace(t=0.0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_cuda_it_is_refused() -> None:
    with pytest.raises(ValueError, match="torch sees none: leave it out"):
        Sampler(DDIM(), GRID, cuda_graph=True)


def test_a_state_on_the_host_and_densities_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="compares densities"):
        Sampler(DDIM(), GRID, MetropolisLangevin(), cuda_graph=True)
    with pytest.raises(ValueError, match="the state lies on cpu"):
        Sampler(DDIM(), GRID, cuda_graph=True).sample(ExactScore(targets.make("ring"), VPSDE()), (2, 2), seed=0)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        return self.layers(x) * (1 + c_noise[:, None, None, None])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_graph_on_a_gpu_gives_the_same_samples(name: str) -> None:
    model = LearnedScore(Small().cuda(), VPSDE(), Noise(), (3, 8, 8)).eval()
    usual, graphed = both(SAMPLERS[name], model, seed=0)
    torch.testing.assert_close(graphed.trajectory, usual.trajectory, rtol=1e-3, atol=1e-3)
    assert graphed.nfe == usual.nfe


@pytest.mark.gpu
@needs_gpu
def test_nothing_in_the_loop_waits_for_the_device() -> None:
    """The moves of a run, planned and with their noise source open, under torch's own alarm for synchronisation."""
    model = LearnedScore(Small().cuda(), VPSDE(), Noise(), (3, 8, 8)).eval()
    sampler = SAMPLERS["SDE Adams 2"]
    sampler.sample(model, (4, 3, 8, 8), seed=0)  # warms up
    from score_sde.solver import begin

    start = begin(model, (4, 3, 8, 8), 0, None, None, None, None)
    moves = sampler.plan(model.sde, sampler.grid(model.sde))
    model.prepare(sampler.grid(model.sde).tolist())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for _ in sampler._run(moves, start, progress=False):
                pass
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@needs_gpu
def test_a_model_that_looks_at_values_is_refused() -> None:
    class Looks(Small):
        def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
            return super().forward(x, c_noise) * float(c_noise[0] > -9)

    model = LearnedScore(Looks().cuda(), VPSDE(), Noise(), (3, 8, 8)).eval()
    with pytest.raises(ValueError, match="cannot be captured"):
        Sampler(DDIM(), GRID, cuda_graph=True).sample(model, (4, 3, 8, 8), seed=0)

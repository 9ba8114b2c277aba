"""BrownianNoise: one path a sample, whatever the grid; its increments are standard normal and add up."""

from __future__ import annotations

import gc
import math
from functools import partial

import pytest
import torch
from scipy import stats

from score_sde import (
    VESDE,
    VPSDE,
    AdaptiveSDE,
    Ancestral,
    BrownianNoise,
    ExactScore,
    ExponentialAdams,
    FunctionScore,
    LangevinCorrector,
    SampleNoise,
    Sampler,
    grid,
    reparameterize,
    targets,
)
from score_sde.evaluation.certify import counted_calls, discover
from score_sde.guidance import Matrix, TwistedParticles

F64 = torch.float64
LEVELS = torch.tensor([-4.01, -2.53, -2.0, 0.2512, 3.07], dtype=F64)
RING = ExactScore(targets.make("ring"), VPSDE())


def increments(levels=LEVELS, seeds=range(2000), shape=(6,), shares=(1.0,), dtype=F64):
    """(moves, draws, seeds, *shape)."""
    stream = BrownianNoise(seeds).along(levels, shares).open((len(list(seeds)), *shape), dtype, "cpu")
    return torch.stack(
        [torch.stack([stream(2 * i + 1, k) for k in range(len(shares))]) for i in range(len(levels) - 1)]
    )


def clock(levels):
    return (2 * levels).exp().diff().view(-1, 1, 1, 1)


# A level alone in an interval of the tree, two or three of them at all distances, on the tree's own, at its ends and beyond.
CLOSE = torch.tensor([0.001, 0.0012, 0.0013, 0.0042, 0.0079, 0.25, 0.2501, 0.2519, 0.2524], dtype=F64)
FAR = torch.tensor([-40.0, -33.0, -32.0, -31.0, 0.0, 31.5, 36.0, 40.0], dtype=F64)


@pytest.mark.parametrize("levels", [LEVELS, CLOSE, FAR], ids=["coarse", "close", "far"])
def test_increments_are_independent_standard_normals(levels):
    """Kolmogorov-Smirnov on 12,000 numbers a move, and correlations of all pairs of moves: false alarm below 1e-3."""
    z = increments(levels)[:, 0].flatten(1)
    for each in z:
        assert stats.kstest(each.numpy(), "norm").pvalue > 1e-5
    assert (torch.corrcoef(z) - torch.eye(len(z), dtype=F64)).abs().max() < 4.5 / math.sqrt(z.shape[1])


def test_the_increments_of_a_coarse_grid_are_sums_of_a_fine_ones():
    """To rounding; also by the shares of a step with two draws."""
    fine, coarse = increments() * clock(LEVELS).sqrt(), increments(LEVELS[[0, 2, 4]]) * clock(LEVELS[[0, 2, 4]]).sqrt()
    torch.testing.assert_close(coarse[:, 0], fine[:, 0].unflatten(0, (2, 2)).sum(1), rtol=0, atol=1e-11)
    levels = torch.tensor([-2.0, -1.0, 1.0], dtype=F64)
    parts, middle = increments(levels, shares=(0.25, 0.75)), torch.tensor([-2.0, -1.75, -1.0, -0.5, 1.0], dtype=F64)
    torch.testing.assert_close(parts.flatten(0, 1), increments(middle)[:, 0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_a_samples_path_is_bitwise_the_same_in_any_batch_and_order_of_draws(dtype):
    whole = increments(seeds=range(9), dtype=dtype)
    assert whole.dtype == dtype
    assert torch.equal(increments(seeds=[7], dtype=dtype)[..., 0, :], whole[..., 7, :])
    stream = BrownianNoise(range(9)).along(LEVELS, (1.0,)).open((9, 6), dtype, "cpu")
    assert all(torch.equal(stream(2 * i + 1, 0), whole[i, 0]) for i in (3, 0, 2, 1, 3))


def test_of_a_point_mass_any_number_of_steps_gives_the_same_sample():
    """With the reverse SDE's own noise a step is exact there, path and all, to rounding."""
    model = ExactScore(targets.Empirical(torch.tensor([[0.5, -1.0]], dtype=F64)), VPSDE())

    def sample(steps):
        levels = torch.linspace(-4.03, 3.98, steps + 1, dtype=F64)
        sampler = Sampler(Ancestral(), lambda sde: sde.time_at(levels), final="none")
        return sampler.sample(model, (5, 2), noise=BrownianNoise(range(5)), dtype=F64).x

    torch.testing.assert_close(sample(4), sample(64), rtol=0, atol=1e-9)


STOCHASTIC = {name: step for name, step in discover().items()
              if step.role == "predictor" and counted_calls(step, VPSDE())[1]}  # fmt: skip


@pytest.mark.parametrize("name", STOCHASTIC)
def test_every_step_with_noise_converges_path_by_path_with_order_one(name):
    """The noise is additive, so that Euler-Maruyama already has strong order 1; fresh noise does not converge at all."""
    ends = []
    for steps in (32, 128, 384):
        sampler = Sampler(STOCHASTIC[name], partial(grid.log_snr, steps=steps), final="none")
        ends.append(sampler.sample(RING, (64, 2), noise=BrownianNoise(range(64)), dtype=F64).x)
    coarse, fine = ((end - ends[-1]).norm(dim=1).median().item() for end in ends[:2])
    assert fine < 0.05
    assert 0.6 < math.log2(coarse / fine) / 2 < 2


def test_a_path_does_not_depend_on_the_sdes_coordinates():
    """Steps of the same levels on VP and VE coordinates of one model are the same path."""
    moved, levels = reparameterize(RING, VESDE()), torch.linspace(-3, 3, 13, dtype=F64)
    ends = []
    for model in (RING, moved):
        sampler = Sampler(ExponentialAdams(2, eta=1.0), lambda sde: sde.time_at(levels), final="denoise")
        start = torch.randn(8, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
        t = model.sde.time_at(levels[0])
        ends.append(sampler.sample(model, (8, 2), noise=BrownianNoise(range(8)), x_init=start * model.sde.sigma(t)).x)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_a_second_way_down_has_a_path_of_its_own():
    z = increments(torch.tensor([-1.0, 0.0, -1.0, 0.0], dtype=F64))[:, 0].flatten(1)
    assert torch.corrcoef(z[[0, 2]])[0, 1].abs() < 4.5 / math.sqrt(z.shape[1])


def test_a_way_down_that_lies_behind_takes_no_memory():
    """In churn every move has a way of its own, with some twenty states (2, batch, pairs)."""
    stream = BrownianNoise(range(3)).along(torch.tensor([-1.0, 0.3] * 20, dtype=F64), (1.0,)).open((3, 977), F64, "cpu")
    for i in range(0, 39, 2):
        stream(2 * i + 1, 0)
    states = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.shape in ((3, 977), (2, 3, 489))]
    assert 0 < len(states) < 30


def test_levels_too_near_to_tell_apart_get_fresh_noise():
    z = increments(torch.tensor([0.0, 1e-6, 2e-6], dtype=F64))[:, 0].flatten(1)
    assert (z.std(1) - 1).abs().max() < 0.05
    assert torch.corrcoef(z)[0, 1].abs() < 4.5 / math.sqrt(z.shape[1])


def test_a_correctors_noise_is_fresh():
    sampler = Sampler(Ancestral(), partial(grid.log_snr, steps=4), corrector=LangevinCorrector(snr=0.1))
    with_path, without = (sampler.sample(RING, (4, 2), noise=noise(range(4)), trajectory=True).trajectory
                          for noise in (BrownianNoise, SampleNoise))  # fmt: skip
    torch.testing.assert_close(with_path[0], without[0])
    assert not torch.allclose(with_path[1], without[1])


def test_a_solver_without_a_grid_of_moves_is_refused_before_the_first_call():
    def never(x, t):
        raise AssertionError("the network was called")

    particles = TwistedParticles(partial(grid.log_snr, steps=4), Matrix([[1.0, 0.0]]), torch.zeros(1), 0.3)
    for solver in (AdaptiveSDE(), particles):
        with pytest.raises(ValueError, match=r"BrownianNoise is for a Sampler on a grid.*SampleNoise"):
            solver.sample(FunctionScore(never, VPSDE(), (2,)), (4, 2), noise=BrownianNoise(range(4)))

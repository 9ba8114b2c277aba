"""Time grids against the published numbers, and what is no grid."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from score_sde import grid
from score_sde.sde import VPSDE, DiscreteSDE, KarrasSDE, RectifiedFlow

F64 = torch.float64
LADDERS_ONLY = {"respaced"}  # picks rungs of a `DiscreteSDE`: see test_grid_family


def is_grid(name: str, thing: object) -> bool:
    """A public function (sde, steps) of the module, whatever options it has beside."""
    if (
        not inspect.isfunction(thing)
        or thing.__module__ != grid.__name__
        or name.startswith("_")
        or name in LADDERS_ONLY
    ):
        return False
    first, *others = inspect.signature(thing).parameters.values()
    return first.name == "sde" and [p.name for p in others if p.default is p.empty] == ["steps"]


GRIDS = [thing for name, thing in vars(grid).items() if is_grid(name, thing)]


@pytest.mark.parametrize("make", GRIDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("steps", [1, 2, 17])
def test_every_grid_runs_from_t_max_to_t_min(sde, make, steps):
    times = make(sde, steps)
    assert times.shape == (steps + 1,)
    assert times.dtype == F64
    assert float(times[0]) == sde.t_max
    assert float(times[-1]) == sde.t_min
    assert (times.diff() < 0).all()
    assert torch.equal(grid.check(times, sde), times)


KARRAS_18 = [
    80, 57.58598, 40.78557, 28.37458, 19.35245, 12.91008, 8.400935, 5.315195, 3.256822, 1.923340, 1.088171, 0.5853481,
    0.2964423, 0.1395165, 0.05994731, 0.02293452, 0.00752802, 0.002,
]  # fmt: skip


def test_the_karras_grid_is_edms():
    assert grid.karras(KarrasSDE(), 17).tolist() == pytest.approx(KARRAS_18, rel=1e-6)
    assert grid.karras(KarrasSDE(), 4).tolist() == pytest.approx([80, 17.527832, 2.515219, 0.16975276, 0.002], rel=1e-6)


def test_the_karras_grid_means_the_level_of_x_over_alpha():
    sde = VPSDE()
    level = (-sde.half_log_snr(grid.karras(sde, 9, rho=3.0))).exp()
    root = level ** (1 / 3)
    torch.testing.assert_close(root, torch.linspace(float(root[0]), float(root[-1]), 10, dtype=F64))


def test_uniform_quadratic_and_log_snr_have_equal_steps_in_their_variable():
    sde = VPSDE()
    for make, read in (
        (grid.uniform, lambda t: t),
        (grid.quadratic, lambda t: t**0.5),
        (grid.log_snr, sde.half_log_snr),
    ):
        values = read(make(sde, 13))
        torch.testing.assert_close(values, torch.linspace(float(values[0]), float(values[-1]), 14, dtype=F64))


def test_a_ladder_is_its_own_uniform_grid():
    sde = DiscreteSDE.ddpm(100)
    times = grid.uniform(sde, sde.num_steps - 1)
    torch.testing.assert_close(times, torch.arange(99, -1, -1, dtype=F64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", GRIDS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("steps", [0, -3, 2.5, True, None, "ten", math.nan, math.inf])
def test_impossible_step_counts_are_refused(make, steps):
    with pytest.raises(ValueError, match=f"whole number steps >= 1, got steps={steps!r}"):
        make(VPSDE(), steps)


@pytest.mark.parametrize("rho", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_rho_is_refused(rho):
    with pytest.raises(ValueError, match="rho"):
        grid.karras(VPSDE(), 4, rho=rho)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.1, 0.5, 1.0], "reverse it"),
        ([0.5, 0.5], "reverse it"),
        ([1.0, 0.5, 0.5, 0.1], "two equal times"),
        ([1.1, 0.5], r"lies in \[t_min, t_max\] = \[0.001, 1\]"),
        ([1.0, 1e-4], r"got times from 1 to 0.0001"),
        ([1.0, 0.0], "finite noise level"),
        ([1.0, math.nan, 0.1], "finite noise level"),
        ([math.inf, 0.1], "finite noise level"),
        ([1.0], "at least two times"),
        ([], "at least two times"),
        ([[1.0, 0.5]], r"got shape \(1, 2\)"),
    ],
)
def test_what_is_no_grid_is_refused(times, message):
    with pytest.raises(ValueError, match=message) as refusal:
        grid.check(torch.tensor(times), VPSDE())
    assert "\n" not in str(refusal.value)


def test_a_grid_may_go_back_up_and_may_be_given_as_anything():
    sde = VPSDE()
    for times in ([1.0, 0.5, 0.7, 0.2], torch.tensor([1.0, 0.5, 0.7, 0.2]), torch.tensor([1.0, 0.2]).bfloat16()):
        assert grid.check(times, sde).dtype == F64
    flow = RectifiedFlow()
    single = torch.linspace(flow.t_max, flow.t_min, 4)
    assert single[0].item() > flow.t_max
    assert grid.check(single, flow)[0].item() == flow.t_max
    assert grid.check(torch.tensor([99, 50, 0]), DiscreteSDE.ddpm(100)).tolist() == [99.0, 50.0, 0.0]

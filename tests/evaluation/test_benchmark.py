"""The benchmark's own instruments: what it times, in which order, and what it counts."""

from __future__ import annotations

import time

import pytest
import torch

from score_sde.evaluation import benchmark as room
from score_sde.evaluation.benchmark import Sizes, benchmark, elapsed, entries, hand_loop, race
from score_sde.sde import VPSDE

CPU = torch.device("cpu")


def test_contenders_take_turns() -> None:
    order: list[str] = []
    frame = race({name: lambda name=name: order.append(name) for name in "abcde"}, 2, CPU)
    rounds = [order[i : i + 5] for i in (0, 5, 10)]  # one to warm up
    assert [sorted(turn) for turn in rounds] == [list("abcde")] * 3
    assert len({tuple(turn) for turn in rounds}) > 1
    assert list(frame) == list("abcde")
    assert frame.shape == (2, 5)


def test_time_is_in_seconds() -> None:
    assert 0.02 <= elapsed(lambda: time.sleep(0.02), CPU) < 0.2


def test_the_hand_written_loop_is_the_recursion() -> None:
    """x <- 0.9 x + 0.1 D_0 + 0.05 D_1 with D = x / 2: by hand, 1 -> 0.95 -> 0.9275."""
    seen: list[float] = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(float(x))
        return 0.5 * x

    hand_loop(model, torch.ones(1), 3, outputs=2)
    assert seen == pytest.approx([1.0, 0.95, 0.95 * 0.95 + 0.05 * 0.5])


def test_each_family_makes_the_moves_that_are_counted() -> None:
    """Two calls a Heun move, two and two draws with a Langevin corrector, up-moves of churn without a call."""
    table = room.against_a_loop(Sizes.quick(), CPU).set_index("sampler")
    assert table.loc["Heun", "calls"] == 10
    assert tuple(table.loc["Ancestral + Langevin", ["calls", "draws"]]) == (10, 10)
    assert table.loc["Heun, churned", "calls"] == 10
    assert 1 <= table.loc["Heun, churned", "draws"] <= 5
    assert (table["low"] <= table["ratio"]).all()
    assert (table["ratio"] <= table["high"]).all()
    assert set(table.index) == set(entries(5))


def test_time_inside_is_part_of_the_whole() -> None:
    table = benchmark(["network"], sizes=Sizes.quick())["network"]
    assert (table["inside"] > 1).all()
    model = room.targets.make("ring")
    timed = room.Timed(room.ExactScore(model, VPSDE()))
    found = room._attempt(room.ode_solvers()["scipy RK45"], timed, torch.randn(3, 2), torch.zeros(3, 2))
    assert found["ratio"] > 1
    assert found["calls"] * 3 == timed.samples


def test_what_is_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="part is one of loop, network"):
        benchmark(["loops"])

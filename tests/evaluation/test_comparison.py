"""A comparison is a tidy table in which a sampler that fails is a row and not the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from score_sde.evaluation import compare, sliced_w2
from score_sde.evaluation.comparison import COLUMNS
from score_sde.sampler import SampleResult
from score_sde.score import ExactScore, ScoreModel
from score_sde.sde import VPSDE
from score_sde.targets import make

RING = make("ring")
MODEL = ExactScore(RING, VPSDE())


class Shifted:
    """Exact samples of the ring, off by 1 / budget, at one call a unit of budget."""

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def sample(self, model: ScoreModel, shape: Sequence[int], *, seed: int) -> SampleResult:
        x = RING.sample(shape[:1], generator=torch.Generator().manual_seed(seed)) + 1 / self.budget
        return SampleResult(x, self.budget, 0.5, None, torch.tensor([1.0, 0.0]))


class Diverging(Shifted):
    def sample(self, *args: Any, **options: Any) -> SampleResult:
        result = super().sample(*args, **options)
        result.x[:7] = torch.nan
        return result


def refusing(budget: int) -> Shifted:
    if budget < 10:
        raise ValueError("at least 10 steps")
    return Shifted(budget)


def test_a_row_for_every_run_and_metric() -> None:
    table = compare({"shifted": Shifted, "other": Shifted}, [1, 100], MODEL, RING, num_samples=400, seeds=[0, 1, 2],
                    generator=torch.Generator().manual_seed(5), metrics=["sliced_w2", "mode_spread"])  # fmt: skip
    assert list(table) == COLUMNS
    assert len(table) == 2 * 2 * 3 * 2
    assert (table["nfe"] == table["budget"]).all()
    assert (table["seconds"] == 0.5).all()
    assert (table["error"] == "").all()
    assert table.groupby("metric")["floor"].nunique().eq(1).all()
    w2 = table[table["metric"] == "sliced_w2"]
    mean = w2.groupby("budget")["value"].mean()
    assert mean[1] == pytest.approx(1.0, abs=w2["floor"].mean())  # |(1, 1)| / sqrt 2
    assert w2[w2["budget"] == 100]["ratio"].mean() < 1.5
    assert (w2["ratio"] == w2["value"] / w2["floor"]).all()


def test_the_figures_are_those_of_the_samples_and_the_seeds() -> None:
    table = compare({"s": Shifted}, [5], MODEL, RING, num_samples=200, seeds=[3], repeats=1,
                    generator=torch.Generator().manual_seed(5))  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    draw = RING.sample((200,), generator=generator)
    x = RING.sample((200,), generator=torch.Generator().manual_seed(3)) + 0.2
    assert table["value"][0] == pytest.approx(sliced_w2(x, draw))
    assert table["floor"][0] == pytest.approx(sliced_w2(RING.sample((200,), generator=generator), draw))


def test_failures_are_rows() -> None:
    samplers = {"diverging": Diverging, "refusing": refusing}
    table = compare(samplers, [5, 20], MODEL, RING, num_samples=50, generator=torch.Generator().manual_seed(0))
    table = table.set_index(["sampler", "budget"])
    assert table["error"].to_dict() == {
        ("diverging", 5): "ValueError: 7 of 50 samples are not finite",
        ("diverging", 20): "ValueError: 7 of 50 samples are not finite",
        ("refusing", 5): "ValueError: at least 10 steps",
        ("refusing", 20): "",
    }
    assert table["value"].isna().tolist() == [True, True, True, False]
    assert table["nfe"]["diverging", 5] == 5  # it ran, at this cost
    assert table["nfe"].isna()["refusing", 5]
    assert (table["floor"] > 0).all()

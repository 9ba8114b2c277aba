"""Several samplers at several budgets on one model, held against one reference: a tidy table.

With the exact score of a target the error above the floor is the solver's; with a learned score of the same target the
difference between the two tables is the network's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from score_sde.evaluation.metrics import Metric, Yardstick
from score_sde.sampler import SampleResult
from score_sde.score import ScoreModel
from score_sde.targets import Target

COLUMNS = ["sampler", "budget", "seed", "nfe", "seconds", "metric", "value", "floor", "ratio", "error"]


class Samples(Protocol):
    """What is compared: `Sampler`, `ProbabilityFlowODE`, or anything with their `sample`."""

    def sample(self, model: ScoreModel, shape: Sequence[int], *, seed: int) -> SampleResult: ...


def compare(
    samplers: Mapping[str, Callable[[int], Samples]],
    budgets: Sequence[int],
    model: ScoreModel,
    reference: Target | Tensor,
    *,
    generator: torch.Generator,
    num_samples: int = 10_000,
    seeds: Sequence[int] = (0,),
    metrics: Sequence[str] | Mapping[str, Metric] | None = ("sliced_w2",),
    repeats: int = 8,
    progress: bool = True,
) -> pd.DataFrame:
    """Samples with every sampler, budget and seed, and measures all of them against the same exact draws.

    Args:
        samplers: name -> function from a budget to a sampler, for example `lambda steps: Sampler(Heun(), partial(
            grid.karras, steps=steps // 2))`.
        budgets: what the functions take, usually a number of network calls.
        model: exact or learned.
        reference: a target, or a tensor of at least 2 `num_samples` exact samples.
        generator: source of the exact draws.
        num_samples: how many samples are drawn each time.
        seeds: seeds of the samplers.
        metrics, repeats: see `Yardstick`.
        progress: shows a bar when the comparison takes longer than two seconds.

    Returns:
        One row per sampler, budget, seed and metric, with the columns of `COLUMNS`: `nfe` is counted, `seconds`
        measured, `floor` the metric between exact draws, `ratio` = value / floor. A sampler that raises or diverges
        leaves rows with value NaN and the reason in `error`, which is empty elsewhere.
    """
    yardstick = Yardstick(reference, num_samples, generator=generator, metrics=metrics, repeats=repeats)
    rows = []
    runs = list(itertools.product(samplers, budgets, seeds))
    for name, budget, seed in tqdm(runs, desc="comparing", delay=2, disable=not progress):
        run = {"sampler": name, "budget": budget, "seed": seed, "error": ""}
        figures = _measure(samplers[name], budget, seed, model, yardstick)
        rows += [run | figure for figure in figures]
    return pd.DataFrame(rows, columns=COLUMNS)


def _measure(
    make: Callable[[int], Samples], budget: int, seed: int, model: ScoreModel, yardstick: Yardstick
) -> list[dict[str, Any]]:
    """The figures of one run, a dictionary per metric; whatever goes wrong is the figure's `error`."""
    cost: dict[str, Any] = {"nfe": math.nan, "seconds": math.nan}
    try:
        result = make(budget).sample(model, (yardstick.n, *model.event_shape), seed=seed)
        cost = {"nfe": result.nfe, "seconds": result.seconds}
        table = yardstick(result.x)
    except Exception as failure:
        reason = {"value": math.nan, "ratio": math.nan, "error": f"{type(failure).__name__}: {failure}"}
        return [cost | reason | {"metric": name, "floor": floor} for name, floor in yardstick.floors.items()]
    return [cost | row for row in table.to_dict("records")]

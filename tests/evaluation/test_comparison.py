"""A comparison is a tidy table in which a sampler that fails is a row and not the end, and which a kill cannot spoil."""

from __future__ import annotations

import math
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from score_sde import DDIM, AdaptiveODE, Ancestral, ExponentialAdams, Heun, LangevinCorrector, Sampler, grid
from score_sde.evaluation import (
    at_budget,
    by_metric,
    cells,
    compare,
    comparison,
    judge,
    load_samples,
    ranking,
    sliced_w2,
    summarise,
    winners,
)
from score_sde.evaluation.budgets import planned_calls
from score_sde.evaluation.cells import Journal, fingerprint
from score_sde.evaluation.comparison import COLUMNS
from score_sde.guidance import MMPS, Autoguidance, Matrix
from score_sde.keyed import generator
from score_sde.noise import NoiseSource
from score_sde.score import ExactScore, FunctionScore, ScoreModel
from score_sde.sde import VPSDE
from score_sde.solver import SampleResult
from score_sde.steps import AnnealedLangevin, Step, UniPC, multistep
from score_sde.targets import GaussianMixture, make

RING = make("ring")
MODEL = ExactScore(RING, VPSDE())
LINE = ExactScore(GaussianMixture([1.0], [[0.7]], [[[0.25]]]), VPSDE())


class Shifted:
    """Exact samples of the ring, off by 1 / budget, at one call a unit of budget; keeps count of all runs."""

    runs: list[tuple[int, int]] = []  # noqa: RUF012

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def sample(self, model: ScoreModel, shape: Sequence[int], *, seed: int) -> SampleResult:
        self.runs.append((self.budget, seed))
        x = RING.sample(shape[:1], generator=torch.Generator().manual_seed(seed)) + 1 / self.budget
        return SampleResult(x, self.budget, 0.5, None, torch.tensor([1.0, 0.0]))


class Changed(Shifted):
    """`Shifted`, with some of the samples changed."""

    def __init__(self, budget: int, value: float, count: int) -> None:
        super().__init__(budget)
        self.value, self.count = value, count

    def sample(self, *args: Any, **options: Any) -> SampleResult:
        result = super().sample(*args, **options)
        result.x[: self.count] = self.value
        return result


class Raising(Shifted):
    def sample(self, *args: Any, **options: Any) -> SampleResult:
        raise RuntimeError("the step size\nvanished")


def refusing(budget: int) -> Shifted:
    if budget < 10:
        raise ValueError("at least 10 steps")
    return Shifted(budget)


def on(step: Any, **options: Any) -> Sampler:
    return Sampler(step, partial(grid.log_snr, steps=10), **options)


@pytest.fixture(autouse=True)
def _count_anew() -> None:
    Shifted.runs.clear()


def test_models_of_one_law_are_held_against_one_yardstick(monkeypatch):
    made = []

    class Counted(comparison.Yardstick):
        def __init__(self, *given: Any, **options: Any) -> None:
            made.append(given)
            super().__init__(*given, **options)

    monkeypatch.setattr(comparison, "Yardstick", Counted)
    table = compare({"one": MODEL, "two": ExactScore(RING, VPSDE(0.2))}, {"off": Shifted}, budgets=[4], reference=RING,
                    num_samples=20, pairs=0)  # fmt: skip
    assert len(made) == 1
    assert table["sliced_w2_floor"].nunique() == 1


# --- budgets ----------------------------------------------------------------------------------------------------------


def assert_fits(sampler: Sampler, model: ScoreModel, budget: int) -> None:
    """Counted calls are what was planned, within the budget, and one grid step more would be beyond it."""
    fitted = at_budget(sampler, model, budget)
    nfe = fitted.sample(model, (2, *model.event_shape), seed=0).nfe
    assert nfe == planned_calls(fitted, model) <= budget
    more = Sampler(fitted.predictor, partial(fitted.grid.func, steps=fitted.grid.keywords["steps"] + 1), fitted.corrector,
                   fitted.final, fitted.corrector_first)  # fmt: skip
    assert planned_calls(more, model) > budget


@pytest.mark.parametrize("final", ["denoise", "none"])
def test_every_predictor_spends_its_budget(predictor: Step, final: str) -> None:
    if predictor.calls == 0:  # carrying x along costs nothing, however far
        with pytest.raises(ValueError):
            at_budget(on(predictor, final=final), LINE, 9)
        return
    for budget in (9, 23):
        assert_fits(on(predictor, final=final), LINE, budget)


@pytest.mark.parametrize("first", [True, False])
def test_every_corrector_spends_its_budget(corrector: Step, first: bool) -> None:
    assert_fits(on(Heun(), corrector=corrector, corrector_first=first), LINE, 60)


def test_guidance_that_asks_twice_gets_half_the_steps() -> None:
    twice = Autoguidance(LINE, LINE, 2.0)
    assert_fits(on(DDIM()), twice, 21)
    assert at_budget(on(DDIM()), twice, 21).grid.keywords["steps"] == 9


def test_a_model_of_ones_own_that_asks_twice_gets_half_the_steps_too() -> None:
    class Twice(ExactScore):
        def __call__(self, x: Any, t: Any, **condition: Any) -> Any:
            return replace(super().__call__(x, t), calls=2)

    twice = Twice(LINE.target, LINE.sde)
    for budget in (20, 21):
        fitted = at_budget(on(DDIM()), twice, budget)
        assert fitted.sample(twice, (2, 1), seed=0).nfe == 20


@pytest.mark.parametrize("interval", [(0.1, 5.0), (5.0, 1e9), (1e-9, 1e-8)])
@pytest.mark.parametrize("step", [DDIM(), Heun()], ids=repr)
def test_guidance_within_an_interval_counts_as_what_it_costs_there(step: Step, interval: tuple[float, float]) -> None:
    for budget in (20, 41):
        fitted = at_budget(on(step), Autoguidance(LINE, LINE, 2.0, interval), budget)
        spent = fitted.sample(Autoguidance(LINE, LINE, 2.0, interval), (2, 1), seed=0).nfe
        assert budget - 2 * step.calls < spent <= budget


def test_steps_within_a_base_grid_are_set_too() -> None:
    churned = Sampler(Heun(), partial(grid.churn, base=partial(grid.karras, steps=5), S_churn=10.0))
    fitted = at_budget(churned, LINE, 40)
    assert fitted.grid.keywords["base"].keywords["steps"] == 19
    assert fitted.sample(LINE, (2, 1), seed=0).nfe == 39


def test_budgets_too_small_and_grids_without_steps_are_refused() -> None:
    langevin = Sampler(None, partial(grid.log_snr, steps=3), corrector=AnnealedLangevin(steps=20))
    with pytest.raises(ValueError, match="needs at least 41 network calls, the budget is 40"):
        at_budget(langevin, LINE, 40)
    with pytest.raises(ValueError, match="grid has no steps to set"):
        at_budget(Sampler(DDIM(), lambda sde: grid.uniform(sde, 3)), LINE, 40)


# --- the table --------------------------------------------------------------------------------------------------------


def test_a_row_for_every_run() -> None:
    table = compare(MODEL, {"shifted": Shifted, "other": Shifted}, budgets=[1, 100], reference=RING, num_samples=400,
                    seeds=[0, 1, 2], metrics=["sliced_w2", "mode_spread"])  # fmt: skip
    assert list(table)[: len(COLUMNS)] == COLUMNS
    assert len(table) == 2 * 2 * 3
    assert (table["nfe"] == table["budget"]).all()
    assert (table["seconds"] == 0.5).all()
    assert (table["seconds_per_sample"] == 0.5 / 400).all()
    assert (table["status"] == "ok").all()
    assert table["endpoint_error"].isna().all()  # these samplers take no noise source
    assert table["sliced_w2_floor"].nunique() == 1
    mean = table.groupby("budget")["sliced_w2"].mean()
    assert mean[1] == pytest.approx(1.0, abs=table["sliced_w2_floor"][0])  # |(1, 1)| / sqrt 2
    long = by_metric(table)
    assert len(long) == 24
    assert (long["ratio"] == long["value"] / long["floor"]).all()
    assert long[(long["metric"] == "sliced_w2") & (long["budget"] == 100)]["ratio"].mean() < 1.5


def test_the_figures_are_those_of_the_samples_and_the_seeds() -> None:
    table = compare(MODEL, {"s": Shifted}, budgets=[5], reference=RING, num_samples=200, seeds=[3], repeats=2, seed=5)
    source = generator(5, "compare")
    draws = [RING.sample((200,), generator=source) for _ in range(4)]
    x = RING.sample((200,), generator=torch.Generator().manual_seed(3)) + 0.2
    assert table["sliced_w2"][0] == pytest.approx((sliced_w2(x, draws[0]) + sliced_w2(x, draws[2])) / 2)
    floors = np.array([sliced_w2(draws[1], draws[0]), sliced_w2(draws[3], draws[2])])
    assert table["sliced_w2_floor"][0] == pytest.approx(floors.mean())
    assert table["sliced_w2_floor_std"][0] == pytest.approx(floors.std(ddof=1))


def test_failures_are_rows() -> None:
    samplers = {
        "lost": lambda b: Changed(b, math.nan, 7), "huge": lambda b: Changed(b, 1e4, 50), "wide": lambda b: Changed(b, 9.0, 1),
        "raising": Raising, "refusing": refusing,
    }  # fmt: skip
    table = compare(MODEL, samplers, budgets=[5, 20], reference=RING, num_samples=50)
    status = table.set_index(["sampler", "budget"])["status"]
    assert status["lost", 5] == status["lost", 20] == "diverged: 7 of 50 samples are not finite"
    assert status["huge", 5].startswith("diverged: samples are 3.5")  # 10^4 / 2.84
    assert status["wide", 5] == "ok"
    assert status["raising", 5] == "failed: RuntimeError: the step size vanished"
    assert status["refusing", 5] == "refused: at least 10 steps"
    assert status["refusing", 20] == "ok"
    assert (table["sliced_w2"].isna() == (table["status"] != "ok")).all()
    figures = table.set_index(["sampler", "budget"])
    assert figures["nfe"]["lost", 5] == 5  # it ran, at this cost
    assert math.isnan(figures["nfe"]["refusing", 5])
    assert (table["sliced_w2_floor"] > 0).all()
    assert summarise(table).set_index(["sampler", "budget"])["seeds"].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1]


def test_samplers_by_budget_by_table_and_without() -> None:
    tables = {4: on(DDIM()), 12: on(Heun())}
    samplers = {"fixed": AdaptiveODE(rtol=1e-3, atol=1e-3), "tables": tables, "steps": on(DDIM())}
    table = compare(LINE, samplers, budgets=[3, 9, 30], reference=LINE.target, num_samples=20, pairs=0)
    assert table["budget"].tolist() == [0, 3, 9, 30, 3, 9, 30]
    assert table["nfe"].tolist()[2:] == [11, 21, 3, 9, 30]  # a table is run as it is
    assert table["status"][1] == "refused: there are tables of 4, 12 calls, none within 3"
    unfit = compare(LINE, {"cannot": on(Ancestral(), final="none"), "density": on(None, corrector=AnnealedLangevin())},
                    budgets=[1], reference=LINE.target, num_samples=20, pairs=0)  # fmt: skip
    assert unfit["status"][1] == "refused: needs at least 41 network calls, the budget is 1"


def test_models_and_references_by_name() -> None:
    off = ExactScore(GaussianMixture([1.0], [[9.0]], [[[0.25]]]), VPSDE())
    sampler = {"adams": on(ExponentialAdams(3))}
    laws = {"here": LINE.target, "there": off.target}
    table = compare({"here": LINE, "there": off}, sampler, budgets=[40], reference=laws, num_samples=500)
    assert (table["sliced_w2"] < 2 * table["sliced_w2_floor"]).all()
    crossed = compare({"there": off}, sampler, budgets=[40], reference=LINE.target, num_samples=500)
    assert crossed["sliced_w2"][0] == pytest.approx(8.3, abs=0.2)


# --- the paired endpoint error ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("final", ["denoise", "none"])
def test_the_endpoint_error_of_a_gaussian_is_its_closed_form(final: str) -> None:
    """x(t) = m mu + sqrt(v(t) / v(T)) (x(T) - m(T) mu), v = m^2 s^2 + sigma^2, and D = (x s^2 m + mu sigma^2) / v."""
    sde, mu, s = LINE.sde, 0.7, 0.5
    sampler = Sampler(DDIM(), partial(grid.log_snr, steps=10), final=final)
    table = compare(LINE, {"ddim": sampler}, budgets=[8], seeds=[4], reference=LINE.target, num_samples=300, pairs=100)
    start = LINE.start(torch.randn(300, 1, generator=torch.Generator().manual_seed(4)))
    (m, sigma), (m_T, sigma_T) = ((float(sde.alpha(t)), float(sde.sigma(t))) for t in (sde.t_min, sde.t_max))
    v, v_T = m**2 * s**2 + sigma**2, m_T**2 * s**2 + sigma_T**2
    end = m * mu + math.sqrt(v / v_T) * (start - m_T * mu)
    end = (end * s**2 * m + mu * sigma**2) / v if final == "denoise" else end
    x = at_budget(sampler, LINE, 8).sample(LINE, (300, 1), x_init=start, seed=0).x
    drawn = LINE.target.sample((300,), generator=generator(0, "compare"))
    expected = (x - end)[:100].square().mean().sqrt().item() / drawn.std(correction=0).item()
    assert table["endpoint_error"][0] == pytest.approx(expected, rel=2e-3)
    assert expected > 0.01


def test_the_converged_end_is_the_one_that_a_sampler_is_meant_for() -> None:
    """x(t_min) and D(x(t_min)) are 4e-4 standard deviations apart here."""
    samplers = {final: AdaptiveODE(final=final) for final in ("none", "denoise")}
    table = compare(LINE, samplers, budgets=[5], reference=LINE.target, num_samples=200)
    assert (table["endpoint_error"] < 4e-5).all()


def test_only_deterministic_samplers_are_paired() -> None:
    samplers = {"ancestral": on(Ancestral()), "corrected": on(DDIM(), corrector=LangevinCorrector()), "eta": on(DDIM(1.0)),
                "ddim": on(DDIM()), "ode": AdaptiveODE()}  # fmt: skip
    table = compare(LINE, samplers, budgets=[9], reference=LINE.target, num_samples=50, batch_size=20)
    assert table["endpoint_error"].notna().tolist() == [False, False, False, True, True]
    assert table["endpoint_error"].iloc[-1] < 1e-4
    assert (
        compare(LINE, samplers, budgets=[9], reference=LINE.target, num_samples=50, pairs=0)["endpoint_error"]
        .isna()
        .all()
    )


# --- resuming and spreading -------------------------------------------------------------------------------------------


def rerun(folder: Path, **changes: Any) -> tuple[pd.DataFrame, list[tuple[int, int]]]:
    """The table, and the (budget, seed) that were computed for it."""
    Shifted.runs.clear()
    options: dict[str, Any] = {"budgets": [2, 5], "seeds": [0, 1], "reference": RING, "num_samples": 50} | changes
    table = compare(MODEL, {"shifted": Shifted}, directory=folder, **options)
    return table, list(Shifted.runs)


def test_a_restart_computes_what_is_missing(tmp_path: Path) -> None:
    whole, runs = rerun(tmp_path)
    assert runs == [(2, 0), (2, 1), (5, 0), (5, 1)]
    again, runs = rerun(tmp_path)
    assert runs == []
    pd.testing.assert_frame_equal(whole, again)
    cells = tmp_path / "cells.jsonl"
    cells.write_bytes(cells.read_bytes()[:-30])  # killed within the last line
    again, runs = rerun(tmp_path)
    assert runs == [(5, 1)]
    pd.testing.assert_frame_equal(whole, again)
    assert rerun(tmp_path)[1] == []  # the line after the broken one was read


def test_a_changed_setting_computes_what_it_changes(tmp_path: Path) -> None:
    rerun(tmp_path)
    assert rerun(tmp_path, budgets=[2, 5, 7])[1] == [(7, 0), (7, 1)]
    assert rerun(tmp_path, seeds=[1, 2])[1] == [(2, 2), (5, 2)]
    for change in ({"num_samples": 60}, {"seed": 1}, {"metrics": ["energy"]}, {"reference": make("ring", std=0.3)}):
        assert len(rerun(tmp_path, **change)[1]) == 4, change


def test_the_first_seed_s_samples_are_kept(tmp_path: Path) -> None:
    table, _ = rerun(tmp_path, seeds=[3, 1])
    samples = load_samples(tmp_path, table)
    assert sorted(samples) == [("model", "shifted", 2), ("model", "shifted", 5)]
    expected = RING.sample((50,), generator=torch.Generator().manual_seed(3)) + 1 / 5
    assert torch.equal(samples["model", "shifted", 5], expected)


def test_processes_change_nothing(tmp_path: Path) -> None:
    samplers = {"adams": on(ExponentialAdams(3)), "pc": on(Ancestral(), corrector=LangevinCorrector(norm="sample")),
                "ode": AdaptiveODE(rtol=1e-3, atol=1e-3), "never": on(None, corrector=AnnealedLangevin())}  # fmt: skip
    options: dict[str, Any] = {"budgets": [5, 9], "seeds": [0, 1], "reference": RING, "num_samples": 300,
                               "metrics": ["sliced_w2", "mode_weights"]}  # fmt: skip
    alone = compare(MODEL, samplers, **options)
    spread = compare(MODEL, samplers, processes=2, directory=tmp_path, **options)
    timeless = [c for c in alone if not c.startswith("seconds")]
    pd.testing.assert_frame_equal(alone[timeless], spread[timeless], check_exact=True)
    resumed = compare(MODEL, samplers, directory=tmp_path, **options)
    pd.testing.assert_frame_equal(resumed, spread, check_exact=True)


# --- hashes and journals ----------------------------------------------------------------------------------------------


def sided(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """E[x_0 | x_t] of N(-3, 0.1^2) for label 0, of N(3, 0.1^2) for label 1."""
    alpha, sigma, mean = VPSDE().alpha(t), VPSDE().sigma(t), (6.0 * label - 3)[:, None]
    return mean + 0.01 * alpha / (0.01 * alpha**2 + sigma**2) * (x - alpha * mean)


@pytest.mark.parametrize("processes", [1, 2])
def test_every_sample_has_its_own_condition_with_every_solver(tmp_path: Path, processes: int) -> None:
    """Also with those whose calls leave out samples that have arrived; labels that wander would end between the sides."""
    law = GaussianMixture([0.5, 0.5], [[-3.0], [3.0]], [[[0.01]]] * 2)
    models = {"learned": FunctionScore(sided, VPSDE(), (1,), gives="denoised"), "exact": ExactScore(law, VPSDE())}
    samplers = {"ddim": on(DDIM()), "ode": AdaptiveODE()}
    label = torch.arange(50) // 7 % 2
    options = {"budgets": [20], "reference": law, "num_samples": 50, "pairs": 20, "batch_size": 20}
    options |= {"directory": tmp_path, "processes": processes, "progress": False}
    table = compare(models, samplers, condition={"label": label}, **options).set_index(["model", "sampler"])
    assert (table["status"] == "ok").all()
    assert (table.loc["learned", "endpoint_error"] < 0.01).all()
    for x in (x for (model, *_), x in load_samples(tmp_path, table.reset_index()).items() if model == "learned"):
        assert torch.equal(x[:, 0] > 0, label == 1)
        assert (x.abs() - 3).abs().max() < 0.5
    other = compare(models, samplers, condition={"label": 1 - label}, **options).set_index(["model", "sampler"])
    assert (other["cell"] == table["cell"]).groupby("model").all().to_dict() == {"learned": False, "exact": True}
    ones = compare(models, samplers, condition={"label": torch.ones(50, dtype=torch.int64)}, **options)
    assert ones["cell"].tolist() == compare(models, samplers, condition={"label": 1}, **options)["cell"].tolist()
    for condition, message in (({"side": label}, "known to none of the models"), ({"label": label[:9]}, "has 9 rows")):
        with pytest.raises(ValueError, match=message):
            compare(models, samplers, condition=condition, **options)


class Named(list):
    def __init__(self, name: str) -> None:
        super().__init__([1])
        self.name = name


class Slotted:
    """A tensor that repr elides, in a slot."""

    __slots__ = ("held",)

    def __init__(self, middle: float = 0.0) -> None:
        self.held = torch.zeros(4001)
        self.held[2000] = middle


def test_hashes_are_of_values() -> None:
    def scaled(factor: float) -> Any:
        return lambda x: factor * x

    def hooked(factor: float) -> torch.nn.Module:
        module = torch.nn.Linear(2, 2)
        torch.nn.init.ones_(module.weight)
        torch.nn.init.ones_(module.bias)
        module.register_forward_hook(lambda _, __, output: factor * output)
        return module

    equal = [
        (hooked(2.0), hooked(2.0)), (np.random.default_rng(0), np.random.default_rng(0)), (Slotted(), Slotted()),
        (on(Heun()), on(Heun())), (make("ring"), make("ring")), ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (scaled(2.0), scaled(2.0)),
        (torch.nn.Linear(2, 2).requires_grad_(False).double(), None), (np.arange(3), np.arange(3)),
    ]  # fmt: skip
    for one, other in equal:
        assert fingerprint(one) == fingerprint(one if other is None else other)
    different = [
        on(Heun()), on(DDIM()), on(DDIM(0.5)), on(DDIM(), final="none"), Sampler(DDIM(), partial(grid.log_snr, steps=11)),
        make("ring"), make("ring", std=0.21), VPSDE(), VPSDE(beta_max=19.0), scaled(2.0), scaled(3.0),
        1, 1.0, "1", [1], (1,), None,
        torch.zeros(2), torch.zeros(2).double(), torch.zeros(2, 1), torch.tensor(0.0), [[1], 2], [1, [2]], Shifted, Changed,
        hooked(2.0), hooked(3.0), hooked(2.0).eval(), np.random.default_rng(0), np.random.default_rng(1),
        Slotted(), Slotted(1.0), Named("a"), Named("b"), torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.cfloat).conj(),
    ]  # fmt: skip
    assert len({fingerprint(thing) for thing in different}) == len(different)


NOTEBOOK = """
import torch
K, SCALE = {k}, {{"a": 1}}
def helper(x): return {helper}
def metric(x, y): return [helper(v) * K for v in (1.0, 2.0)][0] + SCALE["a"] * torch.zeros(()).item()
class Base:
    t_max = {t_max}
    @property
    def twice(self): return {twice} * self.t_max
class Mine(Base):
    calls = []
    def __init__(self): self.k = 1
    def step(self, x): return {step} * helper(x)
"""


@pytest.mark.parametrize("name", [None, "k", "helper", "t_max", "twice", "step"])
def test_code_without_a_file_is_hashed_by_what_it_does(name: str | None, monkeypatch) -> None:
    """As in a notebook, where an edited cell leaves neither a file nor a new name behind."""

    def cell(**changed: str) -> dict[str, Any]:
        parts = {"k": "1", "helper": "x + 1", "t_max": "1.0", "twice": "2", "step": "0.5"} | changed
        notebook = types.ModuleType("notebook")
        monkeypatch.setitem(sys.modules, "notebook", notebook)
        exec(NOTEBOOK.format(**parts), vars(notebook))
        return vars(notebook)

    def hashes(made: dict[str, Any]) -> set[str]:
        return {fingerprint(made["Mine"]()), fingerprint(made["metric"])}

    before, used = hashes(cell()), cell()
    used["Mine"].calls.append(1)
    assert hashes(used) == before
    if name is None:
        used["Mine"].t_max = 0.6  # which any program may do
        assert hashes(used) != before
    else:
        assert hashes(cell(**{name: "7"})) != before


def test_using_a_model_does_not_change_its_hash_and_another_process_finds_the_same() -> None:
    model = ExactScore(make("ring"), VPSDE())
    before = fingerprint(model)
    model(torch.zeros(3, 2), 0.5)
    assert fingerprint(model) == before
    guided = MMPS(model, Matrix([[1.0, 0.5]]), torch.tensor([0.3]), 0.2)
    unused = fingerprint(guided)
    guided(torch.zeros(3, 2), 0.5)
    assert fingerprint(guided) == unused
    network = torch.nn.Linear(2, 2)
    network._k = 1  # a setting of one's own, whatever its name
    one = fingerprint(network)
    network._k = 5
    assert fingerprint(network) != one
    code = ("from score_sde import *; from score_sde.targets import make; from score_sde.evaluation.cells import fingerprint;"
            "print(fingerprint(ExactScore(make('ring'), VPSDE())))")  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == before


def test_a_journal_outlives_garbage(tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    Journal(path).add("a", {"value": 1.5})
    path.write_text(path.read_text() + '[3]\n\x00\n{"key": "b", "val')
    Journal(path).add("c", {"value": 2})
    journal = Journal(path)
    assert journal.rows == {"a": {"value": 1.5}, "c": {"value": 2}}
    assert "b" not in journal


# --- verdicts ---------------------------------------------------------------------------------------------------------


def verdicts() -> pd.DataFrame:
    """Floors of 1 with a small spread: `fast` is there at 5, `slow` at 20, `blind` is good in one metric alone."""
    ratios = {"fast": {5: (1.1, 1.2), 10: (1.0, 1.0), 20: (1.0, 1.0)}, "slow": {5: (9, 9), 10: (3, 1.1), 20: (1.2, 1.0)},
              "blind": {5: (1.0, 7), 10: (1.0, 6), 20: (1.0, 5)}, "lost": {5: (np.nan, np.nan)}}  # fmt: skip
    rows = [
        {"model": "m", "sampler": name, "budget": budget, "seed": seed, "status": "ok" if name != "lost" else "diverged: x",
         "nfe": float(budget), "seconds": budget / 10, "seconds_per_sample": budget / 1e3, "endpoint_error": 1 / budget,
         "a": a, "a_floor": 1.0, "a_floor_std": 0.01, "b": b, "b_floor": 1.0, "b_floor_std": 0.01}
        for name, budgets in ratios.items() for budget, (a, b) in budgets.items() for seed in (0, 1)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_a_sampler_is_there_when_every_metric_is() -> None:
    judged = judge(verdicts()).set_index(["sampler", "budget"])
    assert judged["excess"]["slow", 10] == pytest.approx(3 / 1.25)
    assert judged["worst"]["slow", 10] == "a"
    assert judged["worst"]["blind", 5] == "b"
    found = ranking(verdicts())
    assert found["sampler"].tolist() == ["fast", "slow", "blind"]
    assert found["calls"].tolist()[:2] == [5, 20]
    assert math.isnan(found["calls"][2])
    best = winners(verdicts())
    assert best["sampler"].tolist() == ["fast"] * 3
    assert best["equals"].tolist() == ["", "", "slow"]


def test_a_seed_that_diverged_counts_against_its_sampler() -> None:
    table = verdicts()
    table.loc[(table["sampler"] == "fast") & (table["seed"] == 1), "status"] = "diverged: x"
    judged = judge(table).set_index(["sampler", "budget"])
    assert judged["excess"]["fast", 5] == math.inf
    assert judged["worst"]["fast", 5] == "a lost run"
    assert not judged["near"]["fast", 5]
    assert ranking(table)["sampler"][0] == "slow"
    assert "fast" not in set(winners(table)["sampler"])


def test_a_change_anywhere_in_the_package_changes_every_hash(monkeypatch) -> None:
    before = fingerprint(UniPC(3))
    read = Path.read_bytes
    changed = Path(multistep.__file__)
    cells._package.cache_clear()
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b" " if path == changed else b""))
    after = fingerprint(UniPC(3))
    cells._package.cache_clear()
    assert before != after


def test_where_the_network_sets_the_limit_the_best_is_the_goal() -> None:
    table = verdicts()
    table[["a", "b"]] *= 4.0
    judged = judge(table).set_index(["sampler", "budget"])
    assert judged["excess"]["fast", 5] == pytest.approx(1.2 / 1.25)
    assert judged["floors"]["fast", 5] == pytest.approx(4.8)
    assert not judged["near"].any()
    assert judge(verdicts()).set_index(["sampler", "budget"])["near"]["fast"].all()


def test_noise_of_the_floor_is_forgiven() -> None:
    table = verdicts().assign(b_floor_std=2.5)  # two standard errors over two seeds: 3.5 above the floor
    judged = judge(table).set_index(["sampler", "budget"])
    assert judged["excess"]["blind", 5] == pytest.approx(7 / (1 + 5 / 2**0.5))
    assert not judged["near"]["blind", 5]
    assert judge(table.assign(b_floor_std=5.0)).set_index(["sampler", "budget"])["near"]["blind", 5]


# --- wrong inputs -----------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no budget": ({"budgets": [0]}, "a whole number budgets >= 1, got budgets=0"),
    "half a call": ({"budgets": [2.5]}, "budgets >= 1, got budgets=2.5"),
    "no seed": ({"seeds": []}, "seeds is empty"),
    "no samples": ({"num_samples": 0}, "num_samples >= 2, got num_samples=0"),
    "no processes": ({"processes": 0}, "processes >= 1, got processes=0"),
    "unknown metric": ({"metrics": ["fid"]}, "unknown metric 'fid'"),
    "too few examples": ({"reference": torch.zeros(30, 2)}, "need a reference of at least 40 samples"),
    "another shape": (
        {"reference": LINE.target},
        "model 'model' makes samples of shape (2,), its reference has shape (1,)",
    ),
    "a name for a sampler": (
        {"samplers": {"mine": "heun"}},
        "sampler 'mine' has no `sample`: give one such as Sampler(",
    ),
    "a step for a sampler": ({"samplers": {"mine": {5: DDIM()}}}, "got DDIM(eta=0.0)"),
    "an array for a reference": ({"reference": np.zeros((50, 2))}, "a tensor of exact samples, got ndarray"),
    "no table": ({"samplers": {"tables": {}}}, "sampler 'tables' is an empty mapping"),
    "no reference": ({"reference": {"other": RING}}, "model 'model' has no reference; there are: other"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_refused_before_any_work(case: str, tmp_path: Path) -> None:
    change, message = WRONG[case]
    options: dict[str, Any] = {"budgets": [5], "reference": RING, "num_samples": 20} | change
    samplers = options.pop("samplers", {"s": Shifted})
    with pytest.raises(ValueError) as refusal:
        compare(MODEL, samplers, directory=tmp_path / "new", **options)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "new").exists()
    assert Shifted.runs == []


def test_a_noise_source_is_watched_not_changed() -> None:
    from score_sde import BatchNoise
    from score_sde.evaluation.comparison import Witness

    witness = Witness(BatchNoise(7))
    assert isinstance(witness, NoiseSource)
    sampler = on(Ancestral())
    expected = sampler.sample(LINE, (5, 1), seed=7).x
    assert torch.equal(sampler.sample(LINE, (5, 1), noise=witness).x, expected)
    assert witness.drawn


LONG = """
from functools import partial
from score_sde import DDIM, ExactScore, Sampler, VPSDE, grid, targets
from score_sde.evaluation import compare
ring = targets.make("ring")
sampler = {"ddim": Sampler(DDIM(), partial(grid.log_snr, steps=10))}
options = {"budgets": range(5, 200), "reference": ring, "processes": 2, "directory": "out", "progress": False}
compare(ExactScore(ring, VPSDE()), sampler, **options)
"""


def children(parent: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


@pytest.mark.slow
def test_a_killed_comparison_leaves_its_cells_and_no_workers(tmp_path: Path) -> None:
    run = subprocess.Popen([sys.executable, "-c", LONG], cwd=tmp_path)
    cells = tmp_path / "out/cells.jsonl"
    while not cells.exists() or len(cells.read_text().splitlines()) < 4:
        time.sleep(0.2)
        assert run.poll() is None
    workers = children(run.pid)
    assert len(workers) >= 2
    run.kill()
    run.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.5)
    assert len(Journal(cells).rows) >= 4


def test_what_failed_is_tried_again_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    class Failing(Shifted):
        def sample(self, model: ScoreModel, shape: Sequence[int], *, seed: int) -> SampleResult:
            if (tmp_path / "broken").exists():
                raise RuntimeError("CUDA out of memory")
            return super().sample(model, shape, seed=seed)

    (tmp_path / "broken").touch()

    def statuses() -> list[str]:
        Shifted.runs.clear()
        samplers = {"good": lambda budget: Shifted(budget), "bad": lambda budget: Failing(budget)}
        table = compare(MODEL, samplers, budgets=[3], reference=RING, num_samples=50, pairs=0, directory=tmp_path / "c",
                        progress=False)  # fmt: skip
        return list(table["status"])

    assert statuses() == ["ok", "failed: RuntimeError: CUDA out of memory"]
    (tmp_path / "broken").unlink()
    assert statuses() == ["ok", "ok"]
    assert Shifted.runs == [(3, 0)]


def test_a_function_that_overspends_wins_no_budget() -> None:
    samplers = {
        "honest": lambda budget: Sampler(DDIM(), partial(grid.log_snr, steps=budget - 1)),
        "over": lambda budget: Sampler(Heun(), partial(grid.log_snr, steps=3 * budget)),
    }
    table = compare(MODEL, samplers, budgets=[5], reference=RING, num_samples=300, pairs=0, progress=False)
    assert dict(zip(table["sampler"], table["nfe"], strict=True)) == {"honest": 5, "over": 31}
    assert list(winners(table)["sampler"]) == ["honest"]

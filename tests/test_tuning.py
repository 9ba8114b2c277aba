"""Tuned solvers: the tables are the solvers they name, exact for a point mass, and a fit never returns a worse one."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.polynomial import polynomial
from torch import Tensor

from score_sde import (
    VESDE,
    VPSDE,
    ExactScore,
    ExponentialAdams,
    GaussianMixture,
    Sampler,
    grid,
    targets,
)
from score_sde.prediction import Prediction
from score_sde.sde import SDE, RectifiedFlow
from score_sde.steps import RectifiedAdams
from score_sde.tuning import (
    GRIDS,
    METHODS,
    RULES,
    Pairs,
    Span,
    TunedSampler,
    TunedTable,
    begun_late,
    converged_pairs,
    tune,
    tune_spectrum,
    untuned,
)
from score_sde.tuning.fitting import KEPT, Search, fit_all, losses_of, searching
from score_sde.tuning.pairs import STEEP

CALLS = 5


@pytest.fixture(scope="module")
def model() -> ExactScore:
    return ExactScore(targets.make("ring", components=3, radius=2.0), VPSDE())


@pytest.fixture(scope="module")
def tuned(model: ExactScore) -> TunedTable:
    return tune(model, 3, samples=128, iterations=20, starts=2, progress=False)


def random_table(sde: SDE, calls: int = CALLS) -> TunedTable:
    """A valid table without any merit."""
    span, generator = Span.of(sde), torch.Generator().manual_seed(0)
    z = torch.randn(len(span.first_moves(calls)), generator=generator, dtype=torch.float64)
    return span.table(z, calls)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), RectifiedFlow()], ids=repr)
def test_any_table_carries_a_point_mass_exactly(sde: SDE) -> None:
    """With D = m constant, x_i = chi_i alpha_i m + (x - alpha m) kappa_i sigma_i / sigma at every call but the first,
    which sees the scaled start x kappa_0 sigma_0 / sigma; m at the end."""
    point = torch.tensor([[1.5, -0.7]], dtype=torch.float64)
    model = ExactScore(GaussianMixture([1.0], point, torch.zeros(1, 2, 2)), sde)
    x = model.start(torch.randn(7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    table = random_table(sde)
    result = TunedSampler(table).sample(model, x.shape, x_init=x, trajectory=True)
    assert (result.x - point).abs().max() < 1e-12
    assert result.nfe == CALLS
    alpha, sigma = sde.alpha(result.times[:-1])[:, None, None], sde.sigma(result.times[:-1])[:, None, None]
    share = table.noise[:, None, None] * sigma[1:] / sigma[0]
    exact = table.signal[:, None, None] * alpha[1:] * point + (x - alpha[0] * point) * share
    exact[0] = x * share[0]
    assert torch.equal(result.trajectory[0], x)
    assert ((result.trajectory[1:-1] - exact) / sigma[0]).abs().max() < 1e-12


@pytest.mark.parametrize("rule", [name for name in RULES if not RULES[name].keywords])
def test_the_table_of_a_step_is_the_sampler_of_that_step(model: ExactScore, rule: str) -> None:
    """On another SDE than the one in whose coordinates the table was written."""
    times = grid.uniform(model.sde, steps=CALLS - 1)[:-1]
    levels = model.sde.half_log_snr(torch.cat([times, times.new_tensor([1.2e-3])]))
    sampler = Sampler(RULES[rule].args[0], lambda sde: sde.time_at(levels).clamp(max=1.0))
    x = model.start(torch.randn(20, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    ours, theirs = (s.sample(model, x.shape, x_init=x) for s in (TunedSampler(RULES[rule](levels)), sampler))
    assert ours.nfe == theirs.nfe == CALLS
    assert (ours.x - theirs.x).abs().max() < 1e-9


def test_one_teaching_serves_every_number_of_calls(model: ExactScore) -> None:
    pairs = converged_pairs(model, samples=16, seed=3, progress=False)
    for calls in (1, 2):
        options = {"samples": 16, "seed": 3, "iterations": 3, "starts": 2, "progress": False}
        alone, taught = (tune(model, calls, pairs=given, **options) for given in (None, pairs))
        assert torch.equal(alone.weights, taught.weights)


@pytest.mark.parametrize("grid_name", GRIDS)
def test_a_late_beginning_leaves_out_the_call_at_noise_alone(grid_name: str) -> None:
    """Where the denoiser of pure noise is 0, DDIM's first move only scales: N calls do what N + 1 did."""
    centred = ExactScore(GaussianMixture([1.0], torch.zeros(1, 2), 0.04 * torch.eye(2).unsqueeze(0)), VPSDE())
    x = centred.start(torch.randn(50, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    name = f"exponential Adams 1 on {grid_name}"
    tables = begun_late(centred.sde, CALLS)[f"{name}, late"], untuned(centred.sde, CALLS + 1)[name]
    late, whole = (TunedSampler(table).sample(centred, x.shape, x_init=x) for table in tables)
    assert (late.nfe, whole.nfe) == (CALLS, CALLS + 1)
    assert (late.x - whole.x).abs().max() < 0.01 * whole.x.std()


@pytest.mark.parametrize("order", [2, 3])
def test_velocity_tables_are_adams_on_the_rectified_path(model: ExactScore, order: int) -> None:
    """By the textbook's equal-step weights, carried out on the velocities themselves."""
    adams = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12)}
    table, sde = untuned(model.sde, CALLS)[f"velocity Adams {order} on rectified"], model.sde
    t0 = torch.sigmoid(-sde.half_log_snr(torch.tensor(sde.t_max, dtype=torch.float64))).item()
    x = model.start(torch.randn(20, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    y, velocities = x / (sde.alpha(sde.t_max) + sde.sigma(sde.t_max)), []
    for i in range(CALLS):
        t = t0 * (1 - i / CALLS)
        velocities.insert(0, (y - model.target.denoise(y, 1 - t, t)) / t)
        y = y - t0 / CALLS * sum(w * v for w, v in zip(adams[min(order, i + 1)], velocities, strict=False))
    assert (TunedSampler(table).sample(model, x.shape, x_init=x).x - y).abs().max() < 1e-9


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_rectified_adams_is_adams_on_the_rectified_path(model: ExactScore, order: int) -> None:
    """By fitted polynomials on the velocities themselves; each move begins at the start while there are too few of them."""
    sde, times = model.sde, grid.hyperbolic(model.sde, steps=7)
    x = model.start(torch.randn(20, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    path, velocities = torch.sigmoid(-sde.half_log_snr(times)).numpy(), list[np.ndarray]()
    first = y = x / (sde.alpha(times[0]) + sde.sigma(times[0]))
    for i, (t, s) in enumerate(pairwise(path)):
        velocities.append(((y - model.target.denoise(y, 1 - t, t)) / t).flatten().numpy())
        known = slice(max(0, i + 1 - order), i + 1)
        fitted = polynomial.polyfit(path[known], np.stack(velocities[known]), len(velocities[known]) - 1)
        whole = polynomial.polyint(fitted)
        begin, there = (path[0], first) if i + 1 < order else (t, y)
        y = there + torch.from_numpy(polynomial.polyval(s, whole) - polynomial.polyval(begin, whole)).view_as(y)
    ours = Sampler(RectifiedAdams(order), lambda sde: times, final="none").sample(model, x.shape, x_init=x).x
    assert (ours / (sde.alpha(times[-1]) + sde.sigma(times[-1])) - y).abs().max() < 1e-6


@pytest.mark.parametrize(
    "sde",
    [VPSDE(), VPSDE(beta_max=4.0), VESDE(), VESDE(sigma_max=1e6), RectifiedFlow(), RectifiedFlow(t_max=0.9)],
    ids=repr,
)
@pytest.mark.parametrize("calls", [1, 2, CALLS])
def test_what_is_fitted_is_what_runs(model: ExactScore, sde: SDE, calls: int) -> None:
    """The squares that the loss weighs are those of the sampler's own endpoints."""
    exact = ExactScore(model.target, sde)
    x = exact.start(torch.randn(9, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    for table in (random_table(sde, calls), untuned(sde, calls)["velocity Adams 2 on rectified"]):
        run = TunedSampler(table).sample(exact, x.shape, x_init=x).x
        pairs = Pairs(exact, x, torch.ones_like(x), unit=2.0, robust=0.3, batch_size=4)
        loss = (((run - 1) / 2).square().mean(1) + 0.09).pow(0.25).mean().item() - math.sqrt(0.3)
        assert pairs.loss(table) == pytest.approx(loss, rel=1e-9)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE(), RectifiedFlow(t_max=0.9)], ids=repr)
def test_a_vector_is_a_table_and_back(sde: SDE) -> None:
    span, table = Span.of(sde), random_table(sde)
    again = span.table(span.vector(table), CALLS)
    for name in ("half_log_snr", "weights", "noise", "signal"):
        torch.testing.assert_close(getattr(again, name), getattr(table, name), rtol=1e-6, atol=1e-6)


def test_a_fit_keeps_its_levels_apart(model: ExactScore) -> None:
    """Whatever an optimiser does to the gaps: a first call at the very start could not be scaled."""
    for sde in (model.sde, RectifiedFlow(t_max=0.9)):
        for closed in itertools.product((-60.0, 0.0, 60.0), repeat=3):
            z = torch.tensor([*closed, 0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
            TunedSampler(Span.of(sde).table(z, 3)).check(sde)


@pytest.mark.parametrize("calls", [1, 3])
def test_a_point_mass_leaves_nothing_to_fit(calls: int) -> None:
    """Every table is exact and no number has a derivative."""
    point = ExactScore(GaussianMixture([1.0], torch.ones(1, 2), torch.zeros(1, 2, 2)), VPSDE())
    table = tune(point, calls, samples=16, iterations=3, starts=2, progress=False)
    assert table.record["validation"][table.record["chosen"]] < 1e-3


def test_a_file_of_before_begins_at_its_first_call(model: ExactScore, tmp_path: Path) -> None:
    table = untuned(model.sde, 3)["velocity Adams 2 on rectified"]
    (tmp_path / "old.json").write_text(
        json.dumps({k: v for k, v in table.contents().items() if k not in ("start", "signal")})
    )
    drawn = [TunedSampler(t).sample(model, (9, 2), seed=0).x for t in (table, tmp_path / "old.json")]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("sde", [VPSDE(), VESDE()], ids=repr)
def test_the_normal_equations_are_those_of_the_misses(model: ExactScore, sde: SDE) -> None:
    """Against central differences of whole runs, all numbers alike; the slope against those of the loss itself."""
    exact, span, calls = ExactScore(model.target, sde), Span.of(sde), 3
    z = torch.randn(11, generator=torch.Generator().manual_seed(3), dtype=torch.float64) / 3
    x = exact.start(torch.randn(10, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    pairs = Pairs(exact, x, torch.zeros_like(x), unit=2.0, robust=0.5, batch_size=4)
    matrix, slope = pairs.normal_equations(span, z, calls)

    def miss(at: Tensor) -> Tensor:
        return TunedSampler(span.table(at, calls)).sample(exact, x.shape, x_init=x).x / 2

    around = [(z + 1e-5 * unit, z - 1e-5 * unit) for unit in torch.eye(11, dtype=torch.float64)]
    J = torch.stack([(miss(up) - miss(down)) / 2e-5 for up, down in around], 2)
    weight = (miss(z).square().mean(1) + 0.25).pow(-0.75) / 4 / 10
    known = torch.einsum("nip,niq,n->pq", J, J, weight)
    assert J.square().mean(1).sum(1).sqrt().max() < STEEP  # all count in full
    torch.testing.assert_close(matrix, known, rtol=1e-3, atol=1e-4 * known.abs().max().item())
    gradient = torch.tensor([(pairs.loss(span.table(up, calls)) - pairs.loss(span.table(down, calls))) / 2e-5
                             for up, down in around], dtype=torch.float64)  # fmt: skip
    torch.testing.assert_close(slope, gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.parametrize(
    ("first", "most"),
    [(lambda x: 3 * (1e6 * x).sin(), 20.0), (lambda x: x * math.nan, 1e-9)],
    ids=["jumps", "diverges"],
)
def test_a_sample_without_a_derivative_hardly_counts(
    model: ExactScore, first: Callable[[Tensor], Tensor], most: float
) -> None:
    """Differences of 1 over 1e-6 would otherwise be 1e10 times as much as the rest."""

    class Odd(ExactScore):
        def __call__(self, x: Tensor, t: float, **condition: object) -> Prediction:
            said = super().__call__(x, t)
            return Prediction(x, torch.cat([first(x[:1]), said.denoised[1:]]), said.alpha, said.sigma)

    span = Span.of(model.sde)
    z = span.vector(begun_late(model.sde, 2)["velocity Adams 2 on rectified, late"])
    x = model.start(torch.randn(33, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    found = Pairs(Odd(model.target, model.sde), x, 0 * x, 1.0, 0.1, 64).normal_equations(span, z, 2)[0]
    rest = Pairs(model, x[1:], 0 * x[1:], 1.0, 0.1, 64).normal_equations(span, z, 2)[0] * 32 / 33
    assert (found - rest).norm() < most * rest.norm()


def test_tuning_improves_and_its_record_says_by_how_much(model: ExactScore, tuned: TunedTable) -> None:
    losses = tuned.record["validation"]
    assert losses[tuned.record["chosen"]] < 0.5 * losses[tuned.record["best untuned"]]
    assert losses[tuned.record["best untuned"]] == min(losses[name] for name in untuned(model.sde, 3))
    assert losses.keys() >= begun_late(model.sde, 3).keys()


def test_of_many_points_the_untuned_solvers_are_ranked_on_few_and_only_the_best_measured_on_all(model) -> None:
    teacher = Sampler(ExponentialAdams(2), partial(grid.log_snr, steps=10))
    fit, validation = converged_pairs(model, samples=1200, teacher=teacher, progress=False)
    table = tune(model, 3, pairs=(fit.first(64), validation), iterations=1, starts=2, progress=False)
    every, found = losses_of(untuned(model.sde, 3), validation), table.record["validation"]
    assert len(found.keys() & every.keys()) == KEPT < len(every)
    assert found[table.record["best untuned"]] == min(every.values())


@pytest.mark.parametrize("method", ["coefficients", "grid"])
@pytest.mark.parametrize("iterations", [1, 20])
def test_never_worse_than_the_best_untuned(model: ExactScore, method: str, iterations: int) -> None:
    """Also where there is nothing to gain: 16 points to fit on."""
    table = tune(model, 3, method=method, samples=16, iterations=iterations, starts=2, progress=False)
    assert table.record["validation"][table.record["chosen"]] == min(table.record["validation"].values())
    assert len(table.half_log_snr) == 3


def test_validation_starts_are_none_of_the_fit_s(model: ExactScore) -> None:
    teacher = Sampler(ExponentialAdams(2), partial(grid.log_snr, steps=10))
    fit, validation = converged_pairs(model, samples=60, teacher=teacher, progress=False)
    assert (len(fit.x), len(validation.x)) == (60, 30)
    assert (torch.cdist(fit.x, validation.x) > 0).all()


def test_a_fit_that_fails_leaves_the_best_untuned_solver(model: ExactScore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that has learnt its own 4 points by heart, or diverged, is not chosen over what validates better."""
    spoilt = random_table(model.sde, 3)
    monkeypatch.setattr("score_sde.tuning.fitting.fit_all", lambda *_: spoilt)
    table = tune(model, 3, samples=64, iterations=1, starts=2, progress=False)
    known = untuned(model.sde, 3.0) | begun_late(model.sde, 3)
    assert torch.equal(table.weights, known[table.record["chosen"]].weights)


@pytest.mark.parametrize("method", METHODS)
def test_a_search_ends_with_its_time(model: ExactScore, method: str) -> None:
    began = time.monotonic()
    table = tune(model, 4, method=method, samples=64, iterations=10**6, minutes=1e-4, progress=False)
    assert time.monotonic() - began < 20
    assert table.record["validation"][table.record["chosen"]] == min(table.record["validation"].values())


def test_no_iteration_begins_that_would_end_too_late(model: ExactScore, monkeypatch) -> None:
    """On a clock that only losses and iterations move: the ranking of 132 solvers has its share of the minute."""
    clock, spent = [0.0], []
    loss, equations = Pairs.loss, Pairs.normal_equations

    def timed(work, seconds):
        def told(*arguments):
            clock[0] += seconds
            spent.append(seconds)
            return work(*arguments)

        return told

    monkeypatch.setattr("score_sde.tuning.fitting.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(Pairs, "loss", timed(loss, 0.2))
    monkeypatch.setattr(Pairs, "normal_equations", timed(equations, 7.0))
    tune(model, 3, samples=64, iterations=10**6, starts=1, minutes=1, progress=False)
    assert spent.count(7.0) > 3
    assert 55 < clock[0] < 60 + 7 + 3


def test_a_fit_ends_where_the_loss_is_least_whatever_its_start(model: ExactScore) -> None:
    (fit, _), span, losses = converged_pairs(model, samples=512, progress=False), Span.of(model.sde), []
    for rule in ("velocity Adams 2", "UniPC 2"):
        with searching(100, False) as bar:
            table = fit_all(fit, begun_late(model.sde, 2)[f"{rule} on rectified, late"], Search(bar, 100), enough=1e-6)
        z = span.vector(table)
        around = [z + 0.01 * sign * unit for unit in torch.eye(len(z), dtype=torch.float64) for sign in (1, -1)]
        losses.append(fit.loss(table))
        assert losses[-1] < 1.001 * min(fit.loss(span.table(other, 2)) for other in around)
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_the_same_seed_gives_the_same_table(model: ExactScore, tuned: TunedTable) -> None:
    again = tune(model, 3, samples=128, iterations=20, starts=2, progress=False)
    assert torch.equal(again.weights, tuned.weights)
    assert torch.equal(again.half_log_snr, tuned.half_log_snr)


def test_a_table_survives_its_file(model: ExactScore, tuned: TunedTable, tmp_path: Path) -> None:
    tuned.save(tmp_path / "table.json")
    loaded = TunedTable.load(tmp_path / "table.json")
    assert torch.equal(loaded.weights, tuned.weights)
    assert torch.equal(loaded.half_log_snr, tuned.half_log_snr)
    assert loaded.record == tuned.record
    assert torch.equal(loaded.signal, tuned.signal)
    drawn = [TunedSampler(t).sample(model, (9, 2), seed=0).x for t in (tuned, tmp_path / "table.json")]
    assert torch.equal(*drawn)


def test_spectrum_tuning_minimises_the_exact_wasserstein_distance() -> None:
    """The variance recursion is redone here with scalars; the result is far below every untuned solver's."""
    variances, sde = torch.logspace(-2, 0.5, 12, dtype=torch.float64), VPSDE()

    def distance(table: TunedTable) -> float:
        t = sde.time_at(table.half_log_snr).tolist()
        alpha, sigma = [sde.alpha(s).item() for s in t] + [1.0], [sde.sigma(s).item() for s in t]
        left = [kappa * s for kappa, s in zip(table.noise.tolist(), sigma, strict=True)] + [0.0]
        first, total = left[0] / sde.sigma(sde.t_max).item(), 0.0
        chi = [*table.signal.tolist()[1:], 1.0]
        signal = [first * sde.alpha(sde.t_max).item(), *(c * a for c, a in zip(chi, alpha[1:], strict=True))]
        for v in variances.tolist():
            x, outputs = first * math.sqrt(sde.alpha(sde.t_max) ** 2 * v + sde.sigma(sde.t_max) ** 2), []
            for i in range(len(t)):
                outputs.append(alpha[i] * v / (alpha[i] ** 2 * v + sigma[i] ** 2) * x)
                clean = sum(w * d for w, d in zip(table.weights[i].tolist(), outputs, strict=False))
                x = signal[i + 1] * clean + left[i + 1] / left[i] * (x - signal[i] * clean)
            total += (x - math.sqrt(v)) ** 2
        return math.sqrt(total)

    levels = tune_spectrum(variances, 4, sde=sde, progress=False)
    assert distance(levels) < 0.5 * min(distance(t) for name, t in untuned(sde, 4).items() if "velocity" in name)
    table = tune_spectrum(variances, 4, sde=sde, method="coefficients", progress=False)
    assert distance(table) < 0.05 * min(distance(other) for other in untuned(sde, 4).values())
    assert table.record["validation"][table.record["chosen"]] > 0


@pytest.mark.parametrize(
    "break_it", ["row sum", "order", "upper", "noise", "signal", "first signal", "shape", "empty", "start", "scale"]
)
def test_a_broken_table_is_refused(tuned: TunedTable, tmp_path: Path, break_it: str) -> None:
    tuned.save(tmp_path / "table.json")
    table = json.loads((tmp_path / "table.json").read_text())
    if break_it == "row sum":
        table["weights"][1][0] += 1e-6
    elif break_it == "order":
        table["half_log_snr"].reverse()
    elif break_it == "empty":
        table |= {"half_log_snr": [], "noise": [], "signal": [], "weights": []}
    elif break_it == "start":
        table["start"] = table["half_log_snr"][0] + 0.1
    elif break_it == "scale":
        table["start"] = table["half_log_snr"][0]
    elif break_it in ("noise", "signal"):
        table[break_it][1] = 0.0
    elif break_it == "first signal":
        table["signal"][0] = 2.0
    elif break_it == "upper":
        table["weights"][0] = [0.5, 0.5]
    else:
        table["half_log_snr"].append(9.0)
    (tmp_path / "table.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="table"):
        TunedSampler(tmp_path / "table.json")


def test_what_cannot_be_done_is_refused(model: ExactScore, tuned: TunedTable, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tune one for it"):
        TunedSampler(tuned).check(RectifiedFlow())
    for refuses in (partial(tune, model), partial(begun_late, model.sde)):
        with pytest.raises(ValueError, match="steps >= 1"):
            refuses(0)
    with pytest.raises(ValueError, match="coefficients, grid"):
        tune(model, 3, method="coefficient")
    with pytest.raises(ValueError, match="samples >= 1"):
        tune(model, 3, samples=0)
    with pytest.raises(ValueError, match="positive"):
        tune_spectrum([1.0, 0.0], 3)
    with pytest.raises(ValueError, match="coefficients, grid"):
        tune_spectrum([1.0], 3, method="levels")
    (tmp_path / "other.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"scripts/tune\.py"):
        TunedSampler(tmp_path / "other.json")


def test_other_teachers_and_one_call(model: ExactScore) -> None:
    """With one call every table is D of the scaled start at its own level; a teacher may be any sampler."""
    teacher = Sampler(ExponentialAdams(2), partial(grid.log_snr, steps=30))
    table = tune(model, 1, samples=8, iterations=5, starts=2, teacher=teacher, progress=False)
    x = model.start(torch.randn(5, 2))
    for one in (table, untuned(model.sde, 1)["exponential Adams 1 on rectified"]):
        t = model.sde.time_at(one.half_log_snr)[0]
        scaled = x * (one.noise[0] * model.sde.sigma(t) / model.sde.sigma(model.sde.t_max)).float()
        found = TunedSampler(one).sample(model, x.shape, x_init=x).x
        assert torch.allclose(found, model(scaled, t.item()).denoised, rtol=1e-4, atol=1e-5)

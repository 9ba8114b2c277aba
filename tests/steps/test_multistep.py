"""Multistep steps against the formulas of their papers, written out independently."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from closed_forms import plane
from scipy.integrate import quad

from score_sde import VESDE, VPSDE, DiscreteSDE, ExactScore, GaussianMixture, LearnedScore, RectifiedFlow, Sampler, grid
from score_sde.evaluation import certify
from score_sde.noise import BatchNoise
from score_sde.parameterization import Flow
from score_sde.prediction import Prediction
from score_sde.steps import (
    DDIM,
    IPNDM,
    AdamsBashforth,
    ExponentialAdams,
    LangevinCorrector,
    RectifiedAdams,
    SASolver,
    Step,
    Tabulated,
    UniPC,
)
from score_sde.tuning import TunedSampler, TunedTable

SDE = VPSDE()
TIMES = torch.tensor([0.55, 0.6, 0.68, 0.8], dtype=torch.float64)  # newest first
S = torch.tensor(0.47, dtype=torch.float64)
MIXTURE = plane()


def read(t: torch.Tensor) -> tuple[float, float, float]:
    return SDE.alpha(t).item(), SDE.sigma(t).item(), SDE.half_log_snr(t).item()


ALPHA_T, SIGMA_T, LAMBDA_T = read(TIMES[0])
ALPHA_S, SIGMA_S, LAMBDA_S = read(S)
H = LAMBDA_S - LAMBDA_T


def scalars(step, order):
    a, b, c = step.coefficients(SDE, TIMES[:order], S)
    return float(a), [float(w) for w in b], float(c)


# --- published closed forms -------------------------------------------------------------------------------------------


def test_second_order_multistep_dpm_solver_plus_plus():
    # Lu et al. 2022b, algorithm 2: D = (1 + 1/(2r)) D_0 - 1/(2r) D_1, x_s = sigma_s/sigma_t x - alpha_s (e^-h - 1) D.
    r = (LAMBDA_T - SDE.half_log_snr(TIMES[1]).item()) / H
    total = ALPHA_S * -np.expm1(-H)
    a, b, c = scalars(ExponentialAdams(2, weights="midpoint"), 2)
    assert (a, c) == (pytest.approx(SIGMA_S / SIGMA_T, rel=1e-13), 0.0)
    assert b == pytest.approx([total * (1 + 1 / (2 * r)), -total / (2 * r)], rel=1e-12)


@pytest.mark.parametrize("prediction", ["denoised", "noise"])
def test_third_order_weights_have_the_whole_curvature(prediction):
    # N(lambda_t + u) = N_0 + u N' + u^2 / 2 N'': the phi functions of the two exponents, curvature with its factor.
    u1, u2 = (SDE.half_log_snr(t).item() - LAMBDA_T for t in TIMES[1:3])

    def divided(values):  # first and second derivative at u = 0 of the parabola through (0, v0), (u1, v1), (u2, v2)
        v0, v1, v2 = values
        first, second = (v1 - v0) / u1, (v2 - v0) / u2
        curvature = 2 * (second - first) / (u2 - u1)
        return v0, first - curvature / 2 * u1, curvature

    if prediction == "denoised":
        e = np.exp(-H)
        phi = ALPHA_S * np.array([1 - e, H - 1 + e, H**2 / 2 - H + 1 - e])
    else:
        e = np.exp(H)
        phi = -SIGMA_S * np.array([e - 1, e - 1 - H, e - 1 - H - H**2 / 2])
    expected = [sum(p * d for p, d in zip(phi, divided(unit), strict=True)) for unit in np.eye(3)]
    assert scalars(ExponentialAdams(3, prediction=prediction), 3)[1] == pytest.approx(expected, rel=1e-9)


def test_stochastic_dpm_solver_of_first_order_in_both_predictions():
    # Lu et al. 2022b, eq. 18 and 19 (reverse SDE): the noise form, then the denoised one.
    a, b, c = scalars(ExponentialAdams(1, eta=1.0, prediction="noise"), 1)
    assert (a, b[0]) == pytest.approx((ALPHA_S / ALPHA_T, -2 * SIGMA_S * np.expm1(H)), rel=1e-12)
    assert c == pytest.approx(SIGMA_S * np.sqrt(np.expm1(2 * H)), rel=1e-12)
    a, b, c = scalars(ExponentialAdams(1, eta=1.0), 1)
    assert (a, b[0]) == pytest.approx((SIGMA_S / SIGMA_T * np.exp(-H), -ALPHA_S * np.expm1(-2 * H)), rel=1e-12)
    assert c == pytest.approx(SIGMA_S * np.sqrt(-np.expm1(-2 * H)), rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_on_a_uniform_rectified_flow_grid_has_the_classical_weights(order):
    weights = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    times = torch.tensor([0.5, 0.6, 0.7, 0.8], dtype=torch.float64)[:order]
    a, b, _ = AdamsBashforth(order).coefficients(RectifiedFlow(), times, torch.tensor(0.4, dtype=torch.float64))
    assert float(a) == 1.0
    assert [float(w) for w in b] == pytest.approx([-0.1 * w for w in weights[order]], rel=1e-11)


def test_adams_velocity_on_the_rectified_path_weighs_the_network_output_itself():
    class Constant(torch.nn.Module):
        def forward(self, x, c_noise):
            return torch.full_like(x, 0.3) + 0 * c_noise[:, None]

    model = LearnedScore(Constant(), RectifiedFlow(), Flow(), (2,))
    x = torch.ones(3, 2)
    result = Sampler(AdamsBashforth(3), partial(grid.uniform, steps=5), final="none").sample(model, (3, 2), x_init=x)
    scale = (0.999 - 0.001) * 0.3  # dx/dt = F = eps - x_0, so x moves by -F (t_max - t_min)
    torch.testing.assert_close(result.x, x - scale, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", [3, 4])
def test_the_first_moves_of_rectified_adams_leave_order_three(order):
    """Where noise begins near the data's size; a first move of order 1 that is left as it is leaves order 2."""
    sde, target = VESDE(sigma_min=0.01, sigma_max=8.0), GaussianMixture([0.4, 0.6], [[-1.0], [1.5]], [[[0.2]], [[0.1]]])
    x = torch.linspace(-8, 8, 9, dtype=torch.float64)[:, None]
    runs = [
        Sampler(RectifiedAdams(order), partial(grid.hyperbolic, steps=n), final="none")
        .sample(ExactScore(target, sde), x.shape, x_init=x)
        .x
        for n in (80, 160, 320, 640)
    ]
    first, second, third = ((b - a).abs().max().item() for a, b in pairwise(runs))
    assert math.log2(second / third) > 2.7
    assert third < second < first


@pytest.mark.parametrize(
    ("prediction", "clock"),
    [("noise", "time"), ("noise", "level"), ("denoised", "time"), ("denoised", "level"), ("score", "time"),
     ("score", "log_snr"), ("velocity", "log_snr"), ("velocity", "time")],
)  # fmt: skip
def test_adams_weights_are_the_integrals_of_the_lagrange_polynomials(prediction, clock):
    # d(x/alpha) = eps dl = -sigma score dl, d(x/sigma) = D d(alpha/sigma), dx = v dt, each by adaptive quadrature in t.
    def level(t):
        alpha, sigma, _ = read(torch.tensor(t, dtype=torch.float64))
        return sigma / alpha

    def derivative(f, t, e=1e-5):
        return (f(t - 2 * e) - 8 * f(t - e) + 8 * f(t + e) - f(t + 2 * e)) / (12 * e)

    def sigma(t):
        return SDE.sigma(t).item()

    density = {
        "noise": lambda t: ALPHA_S * derivative(level, t),
        "score": lambda t: -ALPHA_S * sigma(t) * derivative(level, t),
        "denoised": lambda t: SIGMA_S * derivative(lambda u: 1 / level(u), t),
        "velocity": lambda t: 1.0,
    }[prediction]
    u = {"time": lambda t: t, "level": level, "log_snr": lambda t: -np.log(level(t))}[clock]
    nodes = [u(t) for t in TIMES[:3].tolist()]

    def basis(k, t):
        return np.prod([(u(t) - nodes[j]) / (nodes[k] - nodes[j]) for j in range(3) if j != k])

    expected = [
        quad(lambda t, k=k: basis(k, t) * density(t), TIMES[0].item(), S.item(), epsrel=1e-11)[0] for k in range(3)
    ]
    assert scalars(AdamsBashforth(3, prediction, clock), 3)[1] == pytest.approx(expected, rel=1e-7)


def test_ipndm_ignores_the_spacing():
    a, b, _ = scalars(IPNDM(3), 3)
    move = ALPHA_S * (SIGMA_S / ALPHA_S - SIGMA_T / ALPHA_T)
    assert a == pytest.approx(ALPHA_S / ALPHA_T)
    assert b == pytest.approx([23 / 12 * move, -16 / 12 * move, 5 / 12 * move], rel=1e-12)


# --- predictor-correctors against their algorithm boxes ---------------------------------------------------------------


def published_unipc(model, sde, times, x, order, variant):
    """UniPC as in the authors' code (data prediction): systems R, b solved, prediction and correction as two states."""
    lam = [sde.half_log_snr(t).item() for t in times]
    outputs, nodes = [model(x, times[0].item()).denoised], [lam[0]]
    for i in range(1, len(times)):
        p, h = min(order, len(outputs)), lam[i] - lam[i - 1]
        alpha, carry = sde.alpha(times[i]).item(), (sde.sigma(times[i]) / sde.sigma(times[i - 1])).item()
        hh, D0 = -h, outputs[-1]
        ratios = [(nodes[-1 - k] - nodes[-1]) / h for k in range(1, p)] + [1.0]
        differences = [(outputs[-1 - k] - D0) / r for k, r in zip(range(1, p), ratios, strict=False)]
        B = hh if variant == "B1" else np.expm1(hh)
        R, b, phi, factorial = [], [], np.expm1(hh) / hh - 1, 1
        for k in range(1, p + 1):
            R.append(np.array(ratios) ** (k - 1))
            b.append(phi * factorial / B)
            factorial *= k + 1
            phi = phi / hh - 1 / factorial
        R = np.array(R)
        rhos = [] if p == 1 else [0.5] if p == 2 else np.linalg.solve(R[:-1, :-1], b[:-1])
        base = carry * x - alpha * np.expm1(hh) * D0
        predicted = base - alpha * B * sum((r * d for r, d in zip(rhos, differences, strict=True)), torch.zeros_like(x))
        if i == len(times) - 1:
            return predicted
        new = model(predicted, times[i].item()).denoised
        rhos = [0.5] if p == 1 else np.linalg.solve(R, b)
        x = base - alpha * B * sum(r * d for r, d in zip(rhos, [*differences, new - D0], strict=True))
        outputs, nodes = [*outputs, new], [*nodes, lam[i]]
    return x


@pytest.mark.parametrize("variant", ["B1", "B2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_the_published_algorithm(order, variant):
    model, steps = ExactScore(MIXTURE, SDE), 7
    x = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    schedule = partial(grid.log_snr, steps=steps)
    result = Sampler(UniPC(order, variant), schedule, final="none").sample(model, (5, 2), x_init=x)
    expected = published_unipc(model, SDE, schedule(SDE), x, order, variant)
    torch.testing.assert_close(result.x, expected, rtol=1e-10, atol=1e-10)
    assert result.nfe == steps


def integral(values, nodes, start, end, alpha, k):
    """alpha k int e^{-k (end - u)} P(u) du over [start, end], for the constant or the line P through the nodes."""

    def basis(u, j):
        return 1.0 if len(nodes) == 1 else (u - nodes[1 - j]) / (nodes[j] - nodes[1 - j])

    def weight(j):
        kernel = lambda u: alpha * k * np.exp(-k * (end - u)) * basis(u, j)  # noqa: E731
        return quad(kernel, start, end, epsabs=1e-13, epsrel=1e-12)[0]

    return sum(weight(j) * value for j, value in enumerate(values))


def test_sa_solver_predicts_and_corrects_with_one_draw():
    model, times = ExactScore(MIXTURE, SDE), grid.log_snr(SDE, steps=5)
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(SASolver(2, 1, eta=0.8), lambda sde: times, final="none")
    result = sampler.sample(model, (4, 2), x_init=x, noise=BatchNoise(3))
    noise = BatchNoise(3).open((4, 2), torch.float64, "cpu")
    k, lam = 1 + 0.8**2, [SDE.half_log_snr(t).item() for t in times]
    outputs = [model(x, times[0].item()).denoised]
    for i in range(1, len(times)):
        h = lam[i] - lam[i - 1]
        alpha, sigma, before = SDE.alpha(times[i]).item(), SDE.sigma(times[i]).item(), SDE.sigma(times[i - 1]).item()
        z = noise(2 * i - 1, 0)
        base = sigma / before * np.exp(-(0.8**2) * h) * x + sigma * np.sqrt(-np.expm1(-2 * 0.8**2 * h)) * z

        past, nodes = outputs[-2:], lam[max(0, i - 2) : i]
        predicted = base + integral(past, nodes, lam[i - 1], lam[i], alpha, k)
        if i == len(times) - 1:
            break
        outputs.append(model(predicted, times[i].item()).denoised)
        x = base + integral(outputs[-2:], lam[i - 1 : i + 1], lam[i - 1], lam[i], alpha, k)
    torch.testing.assert_close(result.x, predicted, rtol=1e-9, atol=1e-9)


def test_a_correction_does_not_undo_what_a_corrector_did_in_between():
    # The correction is an increment: a shift of x between two moves stays, scaled by the carried factor.
    step, times = UniPC(2), grid.log_snr(SDE, steps=3)
    rows = step.plan(SDE, times[:-1], times[1:])

    def output(x, t):
        return Prediction(x, torch.full_like(x, t), 0.5, 0.5)

    x = torch.ones(1, 1, dtype=torch.float64)
    y, history = step.advance(rows[0], x, (), output, None)
    plain, _ = step.advance(rows[1], y, history, output, None)
    shifted, _ = step.advance(rows[1], y + 1, history, output, None)
    assert (shifted - plain).item() == pytest.approx(rows[1].a)


# --- history ----------------------------------------------------------------------------------------------------------


def test_an_upward_move_ends_the_history():
    times = grid.churn(SDE, partial(grid.log_snr, steps=8), S_churn=2.0, S_min=0.1, S_max=1.0)
    moves = Sampler(ExponentialAdams(3), lambda sde: times).plan(SDE, times)
    lengths = [len(move.row.b) for move in moves]
    assert 0 in lengths  # the upward moves use no output
    for before, after in pairwise(lengths):
        assert after == (1 if before == 0 else min(before + 1, 3)) or after == 0


def test_noise_prediction_history_is_kept_in_the_models_own_view():
    # A float32 model that predicts the noise: at sigma / alpha = 1e-4 a detour through D would lose four digits.
    from score_sde.parameterization import Noise

    class Zero(torch.nn.Module):
        def forward(self, x, c_noise):
            return torch.full_like(x, 0.123456789)

    sde = VESDE(sigma_min=1e-4, sigma_max=1.0)
    model = LearnedScore(Zero(), sde, Noise(), (1,))
    x = torch.full((1, 1), 1000.0)
    kept = model(x, 1e-5).mix(0.0, 1.0)
    assert kept.item() == torch.tensor(0.123456789).item()


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "npz"])
@pytest.mark.parametrize("step", [UniPC(3), AdamsBashforth(3, "noise"), ExponentialAdams(2, eta=1.0)], ids=repr)
def test_a_table_repeats_its_step_from_a_file(step, suffix, tmp_path):
    times, path = grid.log_snr(SDE, steps=6), tmp_path / f"table.{suffix}"
    Tabulated.of(step, SDE, times).save(path)
    table = Tabulated(path)
    model = ExactScore(MIXTURE, SDE)
    run = {"seed": 5, "dtype": torch.float64}
    expected = Sampler(step, lambda sde: times).sample(model, (6, 2), **run).x
    torch.testing.assert_close(
        Sampler(table, table.grid).sample(model, (6, 2), **run).x, expected, rtol=1e-9, atol=1e-9
    )


def test_a_table_serves_every_path_with_its_levels():
    # The same trajectory in scaled variables: VP's table on the VE path from the scaled start.
    table = Tabulated.of(ExponentialAdams(3), SDE, grid.log_snr(SDE, steps=6))
    other = VESDE(sigma_min=1e-3, sigma_max=200.0)
    start = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    level = table.levels[0].item()
    x = {}
    for sde in (SDE, other):
        scale = sde.alpha(table.grid(sde)[0]).item()
        x[sde] = Sampler(table, table.grid).sample(ExactScore(MIXTURE, sde), (6, 2), x_init=scale * level * start).x
    torch.testing.assert_close(x[SDE], x[other], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("first", [None, -3.0])
def test_a_tuned_table_is_a_table(tmp_path, first):
    """One that ends at clean data, with another noise in its states than its levels have, called at the start or not."""
    start = SDE.half_log_snr(1.0).item()
    levels = torch.tensor([start if first is None else first, -2.0, 0.5, 2.0], dtype=torch.float64)
    noise = torch.tensor([1.0 if first is None else 1.2, 1.1, 0.9, 0.7], dtype=torch.float64)
    weights = torch.tensor([[1, 0, 0, 0], [-0.5, 1.5, 0, 0], [0.25, -0.75, 1.5, 0], [0, 0.25, -0.5, 1.25]]).double()
    tuned = TunedTable(levels, weights, noise, start)
    tuned.save(tmp_path / "tuned-4.json")
    sampler = Sampler.tabulated(tmp_path / "tuned-4.json")
    for name in ("table.json", "table.npz"):  # saved again, in this step's own terms
        sampler.predictor.save(tmp_path / name)
        again = Sampler.tabulated(tmp_path / name)
        rows, own = ([move.row for move in s.plan(SDE, s.grid(SDE))] for s in (again, sampler))
        assert rows == own
    for sde in (SDE, DiscreteSDE.ddpm(), VESDE(sigma_min=1e-3, sigma_max=200.0)):
        model = ExactScore(MIXTURE, sde)
        found = sampler.sample(model, (6, 2), seed=1, dtype=torch.float64)
        if sde is SDE:
            expected = TunedSampler(tuned).sample(model, (6, 2), seed=1, dtype=torch.float64)
            torch.testing.assert_close(found.x, expected.x, rtol=1e-9, atol=1e-9)
        assert found.nfe == 4
        assert found.x.isfinite().all()


def test_a_row_without_weights_makes_no_call_and_keeps_the_outputs_before():
    """Three rows with a call-less one between give what two give whose levels it does not split."""
    sde, model = VESDE(sigma_min=1e-3, sigma_max=200.0), ExactScore(MIXTURE, VESDE(sigma_min=1e-3, sigma_max=200.0))
    x = model.start(torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    split = Tabulated({"levels": [200.0, 3.0, 2.0, 0.0], "a": [0.5, 0.5, 0.0], "b": [[0.4], [], [1.2, -0.2]]})
    D = model(x, sde.t_max).denoised
    y = 0.5 * (0.5 * x + 0.4 * D)
    found = Sampler(split, split.grid, final="none").sample(model, x.shape, x_init=x)
    time = sde.time_at(-torch.tensor(2.0, dtype=torch.float64).log()).item()
    torch.testing.assert_close(found.x, 1.2 * model(y, time).denoised - 0.2 * D)
    assert found.nfe == 2


def test_a_number_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="finite"):
        Tabulated({"levels": [2.0, 1.0], "a": [0.5], "b": [[float("nan")]]})


def test_a_sampler_from_a_table_ends_with_tweedie(tmp_path):
    times = grid.log_snr(SDE, steps=6)
    Tabulated.of(UniPC(3), SDE, times).save(tmp_path / "table.npz")
    run = {"seed": 5, "dtype": torch.float64}
    model = ExactScore(MIXTURE, SDE)
    found = Sampler.tabulated(tmp_path / "table.npz").sample(model, (6, 2), **run)
    expected = Sampler(UniPC(3), lambda sde: times).sample(model, (6, 2), **run)
    torch.testing.assert_close(found.x, expected.x, rtol=1e-9, atol=1e-9)
    assert found.nfe == expected.nfe == 7


@pytest.mark.parametrize("step", [DDIM(0.5), AdamsBashforth(3, "noise"), ExponentialAdams(2, eta=1.0)], ids=repr)
def test_a_table_of_a_step_has_its_certificate(step):
    class Table(Step):
        """The step, by way of a table for each grid."""

        order, point_mass, prediction = step.order, step.point_mass, getattr(step, "prediction", "denoised")

        def plan(self, sde, t, s):
            return Tabulated.of(step, sde, torch.cat([t, s[-1:]])).plan(sde, t, s)

        def advance(self, row, x, history, evaluate, draw):
            return step.advance(row, x, history, evaluate, draw)

    own, by_table = (certify(which, SDE, "a step", budgets=(5,)) for which in (step, Table()))
    assert by_table.faults == own.faults == []
    assert by_table.measured == pytest.approx(own.measured, abs=1e-3)
    assert (by_table.exact, by_table.batch_independent) == (own.exact, own.batch_independent)
    np.testing.assert_allclose(by_table.bias["std"], own.bias["std"], rtol=1e-8)
    assert max(by_table.point_mass, own.point_mass) < 1e-12


def test_a_table_refuses_what_is_not_its_own(tmp_path):
    table = Tabulated.of(ExponentialAdams(2), SDE, grid.log_snr(SDE, steps=4))
    with pytest.raises(ValueError, match="use its grid"):
        Sampler(table, partial(grid.log_snr, steps=5)).check(SDE)
    with pytest.raises(ValueError, match="a grid lies in"):
        Sampler(table, table.grid).check(VPSDE(t_min=0.1))
    rows = {"levels": [3.0, 1.0, 0.1], "a": [0.5, 0.5], "b": [[0.5], [0.6, -0.1]]}
    assert Tabulated(rows).memory == 2
    wrongs = [({"a": [1.0]}, "2 finite"), ({"levels": [1.0, 3.0, 0.1]}, "decrease"), ({"b": [[0.5]]}, "2 rows"),
              ({"b": [[0.5, 0.1], [0.6]]}, "as many outputs as there were calls"),
              ({"b": [[], [0.6, 0.1]]}, "as many outputs as there were calls"),
              ({"a": [0.5, float("nan")]}, "finite"), ({"scale": 1}, "levels, a, b")]  # fmt: skip
    for wrong, message in wrongs:
        with pytest.raises(ValueError, match=message):
            Tabulated(rows | wrong)
    (tmp_path / "t.json").write_text(json.dumps(rows))
    assert Tabulated(tmp_path / "t.json").a == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"\.json or \.npz"):
        Tabulated("table.pt")


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamsBashforth(5), "orders 1 to 4"),
        (lambda: AdamsBashforth(2, "flow"), "prediction is one of"),
        (lambda: AdamsBashforth(2, clock="sigma"), "clock is one of"),
        (lambda: ExponentialAdams(3, weights="midpoint"), "up to order 2"),
        (lambda: ExponentialAdams(2, prediction="score"), "prediction is one of"),
        (lambda: ExponentialAdams(2, eta=-1), "eta >= 0"),
        (lambda: IPNDM(0), "orders 1 to 4"),
        (lambda: UniPC(4), "orders 1 to 3"),
        (lambda: UniPC(2, "bh2"), "variant is one of B1, B2"),
        (lambda: SASolver(corrector=0), "corrector is 1 to 4"),
        (lambda: Sampler(LangevinCorrector(), partial(grid.uniform, steps=2)), "cannot be the predictor"),
    ],
)
def test_unknown_options_are_refused_when_the_step_is_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sa_solver_draws_noise_at_the_chosen_levels_alone():
    """Rows are those of the solver with noise inside, of the one without far outside, and exact for a point mass."""
    sde, levels = VPSDE(), (0.05, 1.0)
    times = grid.log_snr(sde, 20)
    t, s = times[:-1], times[1:]
    noisy, still, mixed, everywhere = (
        SASolver(2, 2, **options).plan(sde, t, s)
        for options in ({"eta": 1.0}, {"eta": 0.0}, {"levels": levels}, {"levels": (0.0, 1e9)})
    )
    assert everywhere == noisy
    inside = [levels[0] <= float((-sde.half_log_snr(row.t)).exp()) <= levels[1] for row in mixed]
    assert [row.c > 0 for row in mixed] == inside
    for i, (row, at, end) in enumerate(zip(mixed, t.tolist(), s.tolist(), strict=True)):
        assert row.a == (noisy if inside[i] else still)[i].a
        if i > 0 and inside[i] == inside[i - 1]:  # the correction belongs to the move before
            assert row.b == pytest.approx((noisy if inside[i] else still)[i].b, rel=1e-12)
        alpha_t, sigma_t, alpha_s, sigma_s = (float(part(u)) for u in (at, end) for part in (sde.alpha, sde.sigma))
        assert row.a * alpha_t + sum(row.b) == pytest.approx(alpha_s, rel=1e-12)
        assert math.hypot(row.a * sigma_t, row.c) == pytest.approx(sigma_s, rel=1e-12)


def test_sa_solvers_levels_are_an_interval():
    with pytest.raises(ValueError, match="0 <= low < high"):
        SASolver(levels=(1.0, 0.05))

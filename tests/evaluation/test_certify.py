"""Certificates: every step keeps what it declares, planted wrong solvers are exposed, and the instruments are right."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch

from score_sde import DDIM, VPSDE, EulerMaruyama, ExponentialAdams, Heun, KarrasSDE, LinearStep, RectifiedFlow, grid
from score_sde.evaluation import Certificate, Certificates, certify, certify_all
from score_sde.evaluation.certify import discover
from score_sde.evaluation.exact_laws import bias, moments
from score_sde.evaluation.orders import _mixture_paths, measured_order, ode_error, polynomial_exactness
from score_sde.evaluation.trials import uneven
from score_sde.steps import AdamsBashforth, LangevinCorrector
from score_sde.steps.linear import Coefficients, noise_ratio
from score_sde.steps.multistep import lagrange, quadrature

SDE = VPSDE()
STEPS = discover()
ONE = torch.tensor([0.5], dtype=torch.float64)


@pytest.fixture(scope="module")
def known() -> dict[str, Certificate]:
    """Every step's certificate, made once."""
    return {c.name: c for c in certify_all(SDE, STEPS, budgets=(5, 20)).certificates}


# --- the package's own steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
def test_a_step_keeps_what_its_class_declares(name, known):
    # Order within 0.3, the point mass, calls a move, no coupling of samples: the published batch norm alone couples, and
    # says so. The little noise of ER-SDE-Solvers leaves its third order, as an ODE solver, in sight.
    assert known[name].faults == []
    better = known[name].measured > known[name].declared + 0.3
    assert better == (name in ("ERSDESolver", "ER-SDE-Solver 3"))
    assert known[name].batch_independent == (name != "Langevin norms per batch")


def test_a_point_mass_is_exact_to_the_last_digits_but_where_a_method_cannot(known):
    inexact = {name for name, c in known.items() if c.role == "predictor" and not c.point_mass < 1e-12}
    plain = {name for name in STEPS if name.startswith(("Adams velocity", "Adams score"))}
    euler = {"EulerMaruyama", "ProbabilityFlowEuler", "ReverseDiffusion", "Ancestral fixed-large", "AdamsBashforth"}
    assert inexact == plain | euler | {"SDE-DPM-Solver 2M", "SEEDS 2", "SEEDS 3"}
    assert inexact == {name for name, c in known.items() if c.role == "predictor" and not c.claims_point_mass}


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("DDIM", ("denoised", "time", 0)),
        ("DPM-Solver++ 2M", ("denoised", "log_snr", 1)),
        ("DPM-Solver++ 4M", ("denoised", "log_snr", 3)),
        ("DPM-Solver 3M", ("noise", "log_snr", 2)),
        ("LMS 4", ("noise", "level", 3)),
        ("DEIS 3", ("noise", "time", 2)),
        ("Adams velocity 4", ("velocity", "time", 3)),
        ("Adams score 2", ("score", "time", 1)),
        ("Heun", ("noise", "level", 1)),
        ("Ralston", ("noise", "level", 2)),
        ("RungeKutta", ("noise", "level", 3)),
    ],
)
def test_each_family_is_exact_for_the_polynomials_it_interpolates(name, exact, known):
    assert known[name].exact == exact


def test_orders_hold_on_other_paths_too():
    for sde in (KarrasSDE(), RectifiedFlow()):
        for step in (ExponentialAdams(3), AdamsBashforth(3, "noise"), AdamsBashforth(2, "velocity"), Heun()):
            error = partial(ode_error, step, sde)
            assert abs(measured_order(error) - step.order) < 0.3, (sde, step)


# --- planted errors ---------------------------------------------------------------------------------------------------


class Published3M(LinearStep):
    """DPM-Solver++(3M) as printed: alpha_s phi_3 D2 with the divided difference D2, which is half the curvature."""

    memory = 3
    order = 3
    factor = 1.0

    def coefficients(self, sde, times, s) -> Coefficients:
        lam, end = sde.half_log_snr(times), sde.half_log_snr(s)
        h, alpha = end - lam[0], sde.alpha(s)
        phi_1 = torch.expm1(-h)
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        a, b = sde.sigma(s) / sde.sigma(times[0]), [-alpha * phi_1, 0 * h, 0 * h]
        if len(times) > 1:
            r0 = (lam[0] - lam[1]) / h
            first = [1 / r0, -1 / r0, 0 * h]
            second = [0 * h] * 3
            if len(times) == 3:
                r1 = (lam[1] - lam[2]) / h
                older = [0 * h, 1 / r1, -1 / r1]
                second = [(p - q) / (r0 + r1) for p, q in zip(first, older, strict=True)]
                first = [p + r0 * q for p, q in zip(first, second, strict=True)]
            b = [w + alpha * (phi_2 * p - self.factor * phi_3 * q) for w, p, q in zip(b, first, second, strict=True)]
        return a, b[: len(times)], 0 * h


class Repaired3M(Published3M):
    factor = 2.0


class WrongNodes(LinearStep):
    """Second-order Adams on the noise, its polynomial through sigma_s where sigma_t belongs."""

    memory = 2
    order = 2

    def output(self, sde, t):
        return torch.zeros_like(t), torch.ones_like(t)

    def coefficients(self, sde, times, s) -> Coefficients:
        level, end = sde.sigma(times) / sde.alpha(times), sde.sigma(s) / sde.alpha(s)
        fractions, weights = quadrature(s)
        at = level[0] + fractions * (end - level[0])
        wrong = torch.stack([end, *level[1:]])
        kernel = sde.alpha(s) * weights * (end - level[0])
        return sde.alpha(s) / sde.alpha(times[0]), [(kernel * basis).sum(0) for basis in lagrange(wrong, at)], 0 * s


class WrongNoise(DDIM):
    """DDIM(eta) whose noise has sigma_t where sigma_s belongs: c = eta G."""

    def coefficients(self, sde, times, s) -> Coefficients:
        a, b, c = super().coefficients(sde, times, s)
        return a, b, c * sde.sigma(times[0]) / sde.sigma(s)


class MyAncestral(LinearStep):
    """A user's own ancestral step with the same slip, which declares nothing."""

    def coefficients(self, sde, times, s) -> Coefficients:
        t = times[0]
        ratio, scale = noise_ratio(sde, t, s), sde.sigma(s) / sde.sigma(t)
        return sde.alpha(t) / sde.alpha(s) * scale**2, [sde.alpha(s) * ratio], sde.sigma(t) * ratio.sqrt()


class MyApproximateAncestral(MyAncestral):
    point_mass = False


class WeakLangevin(LangevinCorrector):
    """Noise sqrt(eps) for sqrt(2 eps)."""

    def coefficients(self, sde, times, s) -> Coefficients:
        a, b, c = super().coefficients(sde, times, s)
        return a, b, c / 2**0.5


class FallingLangevin(LangevinCorrector):
    """Down the score: x <- x - eps score + noise."""

    def coefficients(self, sde, times, s) -> Coefficients:
        a, (b,), c = super().coefficients(sde, times, s)
        return 2 - a, [-b], c


class Counter(DDIM):
    """Draws by a number that it keeps."""

    count = 0

    def advance(self, row, x, history, evaluate, draw):
        self.count += 1
        return super().advance(row, x, history, evaluate, lambda k: draw(self.count))


def test_wrong_correctors_are_exposed():
    (weak,), (falling,) = (certify(make(), SDE, budgets=(5,)).faults for make in (WeakLangevin, FallingLangevin))
    assert weak == "its stationary variance is 0.506 times the law's"
    assert falling == "its stationary variance is inf times the law's"


def test_a_step_that_remembers_its_runs_is_refused_in_one_line():
    with pytest.raises(ValueError, match="draws other noise when it is run again: it must not keep state on self"):
        certify(Counter(eta=1.0), SDE, budgets=(5,))


def test_the_published_third_order_multistep_solver_is_of_second_order():
    published, repaired = certify(Published3M(), SDE, budgets=(5,)), certify(Repaired3M(), SDE, budgets=(5,))
    assert abs(published.measured - 2) < 0.2
    assert published.faults == [f"order {published.measured:.2f}, declared 3"]
    assert published.exact == ("denoised", "log_snr", 1)
    assert (repaired.faults, repaired.exact) == ([], ("denoised", "log_snr", 2))


def test_a_sigma_t_in_the_place_of_sigma_s_is_exposed():
    nodes = certify(WrongNodes(), SDE, budgets=(5,))
    assert abs(nodes.measured - 1) < 0.1
    assert nodes.faults == [f"order {nodes.measured:.2f}, declared 2"]
    assert nodes.point_mass < 1e-12  # a point mass alone would not have shown it
    right = certify(DDIM(1.0), SDE, budgets=(5,))
    assert (right.faults, right.point_mass < 1e-12) == ([], True)
    for step in (WrongNoise(1.0), MyAncestral()):
        noise = certify(step, SDE, budgets=(5,))
        assert noise.point_mass > 0.05
        assert abs(noise.measured - noise.declared) < 0.3  # the order alone would not have shown this one
        assert noise.faults == [f"a point mass is missed by {noise.point_mass:.2g}, declared exact (point_mass)"]
    assert certify(MyApproximateAncestral(), SDE, budgets=(5,)).faults == []  # "Ancestral fixed-large", and says so


def test_a_wrong_number_of_calls_and_a_coupled_batch_are_exposed():
    class Miscounted(Heun):
        calls = 1

    coupled = LangevinCorrector(norm="batch")
    coupled.batch_independent = True
    assert certify(Miscounted(), SDE, budgets=(5,)).faults == ["2 calls per move, declared 1"]
    (fault,) = certify(coupled, SDE).faults
    assert "samples of a batch are coupled" in fault


# --- the instruments --------------------------------------------------------------------------------------------------


def test_moments_of_a_stochastic_step_follow_the_linear_gaussian_recursion():
    times = grid.log_snr(SDE, steps=15)
    mean, std = moments(EulerMaruyama(), SDE, times, 1.0, ONE)
    m, v = SDE.alpha(times[0]).item(), (SDE.alpha(times[0]) ** 2 / 4 + SDE.sigma(times[0]) ** 2).item()
    for t, s in zip(times.tolist(), times.tolist()[1:], strict=False):
        alpha, sigma, f, g = (part(t).item() for part in (SDE.alpha, SDE.sigma, SDE.drift, SDE.diffusion))
        total, h = alpha**2 / 4 + sigma**2, s - t
        m, v = m + h * (f * m + g**2 * (m - alpha) / total), v * (1 + h * (f + g**2 / total)) ** 2 + g**2 * -h
    assert mean[-1, 0].item() == pytest.approx(m, rel=1e-11)
    assert std[-1, 0].item() == pytest.approx(math.sqrt(v), rel=1e-11)


def test_moments_of_a_step_with_memory_follow_the_joint_covariance():
    # State (1, x, D_1): one linear map and one noise a move, from `coefficients` itself.
    step, times = ExponentialAdams(2, eta=1.0), grid.log_snr(SDE, steps=9)
    mean, std = moments(step, SDE, times, 1.0, ONE)
    alpha, sigma = SDE.alpha(times).numpy(), SDE.sigma(times).numpy()
    state = np.array([1.0, alpha[0], 0.0])
    second = np.outer(state, state)
    second[1, 1] += alpha[0] ** 2 / 4 + sigma[0] ** 2
    for i in range(9):
        gain = alpha[i] / 4 / (alpha[i] ** 2 / 4 + sigma[i] ** 2)
        D = np.array([1 - gain * alpha[i], gain, 0.0])
        nodes = times[[i, i - 1]] if i else times[:1]
        a, b, c = step.coefficients(SDE, nodes, times[i + 1])
        row = float(a) * np.eye(3)[1] + float(b[0]) * D + (float(b[1]) * np.eye(3)[2] if i else 0)
        T = np.stack([np.eye(3)[0], row, D])
        second = T @ second @ T.T + float(c) ** 2 * np.outer(np.eye(3)[1], np.eye(3)[1])
    assert mean[-1, 0].item() == pytest.approx(second[0, 1], rel=1e-11)
    assert std[-1, 0].item() == pytest.approx(math.sqrt(second[1, 1] - second[0, 1] ** 2), rel=1e-10)


def test_an_exact_step_has_no_bias():
    class Exact(LinearStep):
        """The flow of N(1, 1/4): x_s = alpha_s + sqrt(v_s / v_t) (x - alpha_t), written in D."""

        def coefficients(self, sde, times, s) -> Coefficients:
            t = times[0]

            def v(u):
                return sde.alpha(u) ** 2 / 4 + sde.sigma(u) ** 2

            stretch, gain = (v(s) / v(t)).sqrt(), sde.alpha(t) / 4 / v(t)
            # With b D = b (1 - gain alpha_t) + b gain x, the constant fixes b.
            b = (sde.alpha(s) - stretch * sde.alpha(t)) / (1 - gain * sde.alpha(t))
            return stretch - b * gain, [b], 0 * s

    table = bias(Exact(), SDE, budgets=(5, 50))
    assert table[["mean", "std"]].abs().to_numpy().max() < 1e-11
    assert table["calls"].tolist() == [5, 50]


def test_the_bias_is_that_of_facts():
    # DDIM's relative error of the std falls by half with twice the steps; Heun's by four.
    for step, factor in ((DDIM(), 2), (Heun(), 4)):
        coarse, fine = bias(step, SDE, budgets=(400, 800))["std"].abs()
        assert coarse / fine == pytest.approx(factor, rel=0.05)


def test_a_step_that_gives_no_number_integrates_nothing_exactly():
    class Lost(DDIM):
        def advance(self, *given):
            x, history = super().advance(*given)
            return x * math.nan, history

    assert polynomial_exactness(Lost(), SDE) is None


def test_a_step_that_is_not_affine_has_no_moments():
    class Clipped(DDIM):
        def advance(self, row, x, history, evaluate, draw):
            x, history = super().advance(row, x, history, evaluate, draw)
            return x.clamp(-1, 1), history

    assert moments(Clipped(), SDE, grid.log_snr(SDE, steps=5), 1.0, ONE) is None
    assert math.isnan(certify(Clipped(), SDE, budgets=(5,)).point_mass)


def test_the_reference_trajectories_solve_the_ode():
    # One Gaussian in place of the mixture has a closed form; here the two resolutions must agree where they meet.
    _, times, states = _mixture_paths(SDE, 64)
    _, finer, others = _mixture_paths(SDE, 128)
    torch.testing.assert_close(times, finer[::2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(states, others[::2], rtol=1e-10, atol=1e-10)


def test_the_trial_grid_is_equal_in_no_clock():
    times = uneven(SDE, 32)
    for clock in (times, SDE.half_log_snr(times), (-SDE.half_log_snr(times)).exp()):
        steps = clock.diff().abs()
        assert steps.max() / steps.min() > 1.4


# --- the product ------------------------------------------------------------------------------------------------------


def test_one_table(known):
    found = Certificates(list(known.values()))
    assert len(found.table) == len(STEPS)
    assert {"step", "order", "measured order", "calls", "point mass", "std bias 20", "faults"} <= set(
        found.table.columns
    )
    assert found.faults == {}


def test_a_users_own_step_is_found():
    class Mine(DDIM):
        presets = {"mine, noisy": {"eta": 0.7}}  # noqa: RUF012

    assert {"Mine", "mine, noisy"} <= set(discover())
    assert "Tabulated" not in discover()
    assert "DDIM eta 1" in discover()


def test_an_sde_that_changed_is_certified_as_it_is():
    sde, step = VPSDE(beta_max=20.0), DDIM()
    certify(step, sde, budgets=[5])
    sde.beta_max = 8.0
    changed, fresh = (certify(step, one, budgets=[5]).row() for one in (sde, VPSDE(beta_max=8.0)))
    assert changed == pytest.approx(fresh, nan_ok=True)

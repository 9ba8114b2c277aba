"""ER-SDE-Solvers against integrals of their noise scale, done by scipy."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.integrate import quad

from score_sde import VESDE, VPSDE
from score_sde.evaluation import certify
from score_sde.steps import DDIM, ERSDESolver, ExponentialAdams

SDES = [VPSDE(), VESDE(0.01, 20.0)]
NODES, END = (1.1, 1.5, 2.3), 0.8  # noise levels, the newest first


def scalars(sde, step, order: int):
    """a, b, c of y = x / alpha."""
    *times, s = sde.time_at_noise_level(torch.tensor([*NODES[:order], END], dtype=torch.float64))
    a, b, c = step.coefficients(sde, torch.stack(times), s)
    alpha_t, alpha_s = sde.alpha(times[0]), sde.alpha(s)
    return float(a * alpha_t / alpha_s), [float(w / alpha_s) for w in b], float(c / alpha_s)


def phi(level: float, eta: float) -> float:
    return level * (math.exp(level**0.3) + 10) ** eta


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_second_order_is_the_published_one(sde, eta):
    # x_s = r x + (1 - r) D + (l_s - l_t + phi_s int 1 / phi dl) D', D' the difference quotient in the level.
    start, before, _ = NODES
    r = phi(END, eta) / phi(start, eta)
    inverse, _ = quad(lambda level: 1 / phi(level, eta), END, start, epsabs=0, epsrel=1e-12)
    slope = (END - start + phi(END, eta) * inverse) / (start - before)
    a, b, c = scalars(sde, ERSDESolver(2, eta=eta), 2)
    assert a == pytest.approx(r, rel=1e-10)
    assert b == pytest.approx([1 - r + slope, -slope], rel=1e-8)
    assert c == pytest.approx(math.sqrt(END**2 - (r * start) ** 2), rel=1e-7, abs=1e-9)


@pytest.mark.parametrize("sde", SDES, ids=repr)
def test_third_order_integrates_every_parabola(sde):
    # D(l) = l^2 against phi_s int l^2 phi' / phi^2 dl = r_s-weighted ends + 2 phi_s int l / phi dl, by parts.
    _, b, _ = scalars(sde, ERSDESolver(3), 3)
    inner, _ = quad(lambda level: 2 * level / phi(level, 1.0), END, NODES[0], epsabs=0, epsrel=1e-12)
    exact = END**2 - phi(END, 1.0) / phi(NODES[0], 1.0) * NODES[0] ** 2 + phi(END, 1.0) * inner
    assert sum(w * node**2 for w, node in zip(b, NODES, strict=True)) == pytest.approx(exact, rel=1e-9)


@pytest.mark.parametrize("sde", SDES, ids=repr)
@pytest.mark.parametrize("strength", [0.0, 0.6, 1.0])
def test_first_order_with_the_noise_of_the_sde_family_is_its_exponential_euler_step(sde, strength):
    own = scalars(sde, ERSDESolver(1, noise="reverse_sde", eta=strength**2), 1)
    a, b, c = scalars(sde, ExponentialAdams(1, eta=strength), 1)
    assert own[0] == pytest.approx(a, rel=1e-12)
    assert own[1] == pytest.approx(b, rel=1e-12)
    assert own[2] == pytest.approx(c, rel=1e-12, abs=1e-12)


def test_without_noise_it_is_the_probability_flow():
    assert scalars(VPSDE(), ERSDESolver(1, eta=0.0), 1)[1] == pytest.approx(scalars(VPSDE(), DDIM(), 1)[1], rel=1e-12)
    assert scalars(VPSDE(), ERSDESolver(3, eta=0.0), 3)[2] == 0


class Published(ERSDESolver):
    """The third order as it was printed: (l - l_0)^2 in the place of (l - l_0) (l - l_1)."""

    def coefficients(self, sde, times, s):
        a, b, c = super().coefficients(sde, times, s)
        if len(times) == 3:
            one, two, three = sde.noise_level(times)
            first = sum(w * (node - one) for w, node in zip(b, (one, two, three), strict=True))
            curvature = (two - one) * first  # int (l - l_0)^2 less int (l - l_0) (l - l_1)
            for k, (node, p, q) in enumerate(((one, two, three), (two, one, three), (three, one, two))):
                b[k] = b[k] + curvature / ((node - p) * (node - q))
        return a, b, c


def test_the_published_third_order_is_of_second_order():
    ours, theirs = certify(ERSDESolver(3, eta=0.0)), certify(Published(3, eta=0.0))
    assert not ours.faults
    assert ours.measured == pytest.approx(3, abs=0.3)
    assert theirs.measured == pytest.approx(2, abs=0.3)
    assert theirs.faults


def test_a_noise_scale_of_ones_own():
    own = ERSDESolver(2, noise=lambda level: 7 * level)  # its scale is free
    assert scalars(VPSDE(), own, 2)[1] == pytest.approx(
        scalars(VPSDE(), ERSDESolver(2, "reverse_sde"), 2)[1], rel=1e-12
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ERSDESolver(5), "orders 1 to 4"),
        (lambda: ERSDESolver(2, noise="er"), "noise"),
        (lambda: ERSDESolver(2, eta=-0.5), "eta >= 0"),
        (lambda: scalars(VPSDE(), ERSDESolver(1, noise=lambda level: 1 / level), 1), "nowhere decreasing"),
        (lambda: scalars(VPSDE(), ERSDESolver(1, noise=lambda level: -level), 1), "positive"),
    ],
)
def test_what_makes_no_solver_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_much_noise_shows_the_second_order_that_little_noise_hides():
    hidden, shown = certify(ERSDESolver(3)), certify(ERSDESolver(3, "reverse_sde"))
    assert (hidden.declared, shown.declared) == (2, 2)
    assert hidden.measured > 2.7
    assert shown.measured == pytest.approx(2, abs=0.3)

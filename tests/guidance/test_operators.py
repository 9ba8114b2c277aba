"""Operators against their own dense matrices, and against independent computations of what they observe."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from score_sde.copies import Copies
from score_sde.guidance.operators import (
    Blur,
    Downsample,
    FourierSubsample,
    Grey,
    Linear,
    LinearOperator,
    Mask,
    Matrix,
    Nonlinear,
)

IMAGE = (3, 6, 8)


class Differences(LinearOperator):
    """A user's operator without a spectral form."""

    input_shape, output_shape = (5,), (4,)

    def _apply(self, x):
        return x[:, 1:] - x[:, :-1]

    def _transpose(self, y):
        return torch.nn.functional.pad(y, (1, 0)) - torch.nn.functional.pad(y, (0, 1))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


OPERATORS = {
    "box": Mask.box(IMAGE, (1, 2, 4, 7), (0, 0, 1, 1)),
    "half": Mask.half(IMAGE, "bottom"),
    "random": Mask.random(IMAGE, 0.4),
    "vector": Mask((5,), torch.tensor([True, False, True, False, False])),
    "grey": Grey(IMAGE),
    "pool": Downsample(IMAGE, 2),
    "pool-1d": Downsample((2, 9), 3),
    "gaussian": Blur.gaussian(IMAGE, 0.7),
    "motion": Blur.motion(IMAGE, 4, 30.0),
    "lopsided": Blur((2, 7), torch.tensor([0.1, 0.2, 0.7])),
    "fourier": FourierSubsample.lines(IMAGE, 0.3, 0.3),
    "fourier-odd": FourierSubsample((1, 5, 7), torch.rand(5, 7, generator=generator()) < 0.3),
    "matrix": Matrix(torch.randn(3, 5, generator=generator(), dtype=torch.float64)),
    "deficient": Matrix(torch.tensor([[1.0, 2.0, 0.0, 1.0], [2.0, 4.0, 0.0, 2.0], [0.0, 1.0, 1.0, 0.0]]), (2, 2)),
    "function": Linear(lambda x: x.cumsum(2)[:, :, 1::2].clone(), (2, 5)),
    "user's": Differences(),
}


@pytest.fixture(params=list(OPERATORS))
def operator(request):
    return OPERATORS[request.param]


def draw(shape, batch=4, seed=0):
    return torch.randn(batch, *shape, generator=generator(seed), dtype=torch.float64)


def test_transpose_is_the_adjoint(operator):
    x, y = draw(operator.input_shape), draw(operator.output_shape, seed=1)
    assert operator(x).shape == y.shape
    assert operator.transpose(y).shape == x.shape
    left, right = (operator(x) * y).flatten(1).sum(1), (x * operator.transpose(y)).flatten(1).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_pseudo_inverse_is_the_matrix_one(operator):
    y = draw(operator.output_shape)
    exact = y.flatten(1) @ torch.linalg.pinv(operator.matrix(), rtol=1e-5).T
    torch.testing.assert_close(operator.pseudo_inverse(y).flatten(1), exact, rtol=1e-9, atol=1e-9)


def test_gram_is_a_function_of_the_matrix(operator):
    y, r = draw(operator.output_shape), torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    a = operator.matrix()
    shape = (-1,) + (1,) * len(operator.output_shape)
    got = operator.gram(y, lambda s2: 1 / (r.view(shape) * s2 + 0.3))
    system = r[:, None, None] * (a @ a.T) + 0.3 * torch.eye(len(a), dtype=torch.float64)
    torch.testing.assert_close(got.flatten(1), torch.linalg.solve(system, y.flatten(1)), rtol=1e-9, atol=1e-9)


def test_the_least_singular_value_is_that_of_the_matrix(operator):
    values = torch.linalg.svdvals(operator.matrix())
    expected = values[values > 1e-5 * values[0]][-1].item()
    assert operator.least_singular_value() == pytest.approx(expected, rel=1e-5)


def test_projector_keeps_what_is_seen(operator):
    x = draw(operator.input_shape)
    seen = operator.project(x)
    torch.testing.assert_close(operator(seen), operator(x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(operator.project(seen), seen, rtol=1e-8, atol=1e-8)


def test_samples_of_a_batch_do_not_meet(operator):
    x, y = draw(operator.input_shape, 7).float(), draw(operator.output_shape, 7).float()
    pairs = [(operator, x), (operator.transpose, y), (operator.pseudo_inverse, y)]
    exact = not isinstance(operator, Matrix | Linear | Differences)  # these multiply by BLAS
    for function, v in pairs:
        alone = torch.cat([function(part) for part in v.split([1, 0, 4, 2])])
        torch.testing.assert_close(alone, function(v), rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)


def test_half_precision_is_the_single_one_rounded(operator):
    """Guidance of a model in bfloat16, in which there is no Fourier transform."""
    x, y = draw(operator.input_shape).bfloat16(), draw(operator.output_shape).bfloat16()
    for function, v in ((operator, x), (operator.transpose, y)):
        torch.testing.assert_close(function(v), function(v.float()).bfloat16(), rtol=0.03, atol=0.1)
    shrunk = operator.gram(y, lambda s2: 1 / (s2 + 1))
    torch.testing.assert_close(
        shrunk, operator.gram(y.float(), lambda s2: 1 / (s2 + 1)).bfloat16(), rtol=0.03, atol=0.1
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_what_an_operator_keeps_outlives_the_transform_that_it_was_first_used_in(name):
    operator, fresh = (copy.deepcopy(OPERATORS[name]) for _ in range(2))
    x = torch.randn(2, *operator.input_shape, generator=generator())
    torch.func.grad(lambda v: operator.pseudo_inverse(operator(v)).square().sum())(x)
    found, expected = (
        torch.func.grad(lambda v, a=a: a.pseudo_inverse(a(v)).square().sum())(x) for a in (operator, fresh)
    )
    torch.testing.assert_close(found, expected)
    kept = [constants for constants in vars(operator).values() if isinstance(constants, Copies)]
    for tensor in [
        tensor for copies in kept for part in (copies._constants, copies.like(x)) for tensor in part.values()
    ]:
        assert not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_go_through_an_operator_first_used_for_inference(name):
    operator = copy.deepcopy(OPERATORS[name])
    with torch.inference_mode():
        x = torch.randn(2, *operator.input_shape, generator=generator())
        operator.pseudo_inverse(operator(x))
    x = torch.randn(2, *operator.input_shape, generator=generator()).requires_grad_()
    operator.pseudo_inverse(operator(x)).square().sum().backward()
    assert x.grad.isfinite().all()


def test_mask_shows_only_what_it_says():
    x = draw(IMAGE, 2)
    assert torch.equal(OPERATORS["half"](x), x[:, :, 3:].flatten(1))
    hidden = OPERATORS["box"].observed.logical_not()
    assert hidden.sum() == 3 * (3 * 5 + 1)
    assert torch.equal(OPERATORS["random"].observed[0], OPERATORS["random"].observed[2])
    image_mask = torch.arange(48).view(6, 8) % 5 == 0
    assert torch.equal(Mask(IMAGE, image_mask)(x), x.flatten(2)[:, :, ::5].flatten(1))


def test_pooling_and_grey_by_hand():
    x = draw(IMAGE, 2)
    torch.testing.assert_close(OPERATORS["pool"](x), torch.nn.functional.avg_pool2d(x, 2))
    torch.testing.assert_close(OPERATORS["grey"](x)[:, 0], 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])


def test_blur_is_a_wrapped_convolution():
    from scipy.ndimage import convolve

    x = draw((2, 7), 1)
    by_hand = np.stack([convolve(c.numpy(), [0.1, 0.2, 0.7], mode="wrap") for c in x[0]])
    torch.testing.assert_close(OPERATORS["lopsided"](x)[0], torch.from_numpy(by_hand))
    flat = torch.ones(1, *IMAGE, dtype=torch.float64)
    for name in ("gaussian", "motion"):
        torch.testing.assert_close(OPERATORS[name](flat), flat)
    spread = Blur.gaussian((1, 41), 2.0)(torch.eye(41, dtype=torch.float64)[20].view(1, 1, 41))[0, 0]
    place = torch.arange(41) - 20
    assert math.isclose((spread * place**2).sum().item(), 4.0, rel_tol=2e-3)


def test_motion_blur_follows_its_angle():
    point = torch.zeros(1, 1, 15, 15, dtype=torch.float64)
    point[..., 7, 7] = 1
    flat, upright, rising = (Blur.motion((1, 15, 15), 7, angle)(point)[0, 0] for angle in (0.0, 90.0, 45.0))
    assert flat[7].sum() == pytest.approx(1)
    assert upright[:, 7].sum() == pytest.approx(1)
    assert rising[5, 9] > 0.05  # up and to the right
    assert abs(rising[9, 9]) < 1e-12


def test_fourier_observation_determines_the_seen_coefficients():
    operator = OPERATORS["fourier-odd"]
    x = draw((1, 5, 7), 2)
    back = torch.fft.fftn(operator.pseudo_inverse(operator(x)), dim=(2, 3))
    full = torch.fft.fftn(x, dim=(2, 3))
    torch.testing.assert_close(back, torch.where(operator.observed, full, 0), rtol=1e-10, atol=1e-10)


def test_nonlinear_takes_its_shape_from_the_function():
    operator = Nonlinear(lambda x: x.square().sum(-1), (4, 3))
    assert operator.output_shape == (4,)
    assert torch.equal(operator(torch.ones(2, 4, 3)), torch.full((2, 4), 3.0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mask((1, 8, 8), torch.ones(4, 4) > 0), "mask of shape (4, 4) does not fit x of shape (1, 8, 8)"),
        (lambda: Mask((1, 8, 8), torch.ones(8, 8)), "boolean"),
        (lambda: Mask((3,), torch.zeros(3) > 0), "shows nothing"),
        (lambda: Mask.box((1, 8, 8), (0, 0, 9, 4)), "lies within (8, 8)"),
        (lambda: Mask.half((8,), "top"), "no top half"),
        (lambda: Downsample((1, 7, 8), 2), "multiples"),
        (lambda: Downsample((1, 5, 5), 2.5), "factor=2.5"),
        (lambda: Grey((1, 8, 8)), "do not fit x of shape (1, 8, 8)"),
        (lambda: Blur((1, 8, 8), torch.ones(2, 2)), "odd sides"),
        (lambda: Matrix(torch.ones(2, 3), (4,)), "3 columns"),
        (lambda: Linear(lambda x: 2 * x + 1, (4,)), "not linear: subtract f"),
        (lambda: Linear(torch.square, (4,)), "not linear"),
        (lambda: FourierSubsample((1, 4, 4), torch.ones(4, 4)), "boolean mask of shape (4, 4)"),
        (lambda: OPERATORS["half"](torch.zeros(2, 1, 6, 8)), "(batch, 3, 6, 8), got (2, 1, 6, 8)"),
        (lambda: OPERATORS["half"].transpose(torch.zeros(2, 3)), "takes y of shape (batch, 72)"),
        (lambda: OPERATORS["half"].observation(torch.zeros(IMAGE)), "not x itself"),
        (lambda: OPERATORS["half"].observation(torch.full((72,), math.nan)), "72 values that are not finite"),
    ],
)
def test_refusals_are_one_clear_line(make, message):
    with pytest.raises(ValueError) as refusal:
        make()
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)

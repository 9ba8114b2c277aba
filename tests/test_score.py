"""Score models: the learned one is its network seen through a table row, the exact one is the closed form."""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace

import pytest
import torch
from conftest import few_steps
from torch import nn

from score_sde import grid
from score_sde.networks import MLP
from score_sde.parameterization import Karras, Noise, PublishedNoise
from score_sde.sampler import Sampler
from score_sde.score import KEPT, ExactScore, FunctionScore, LearnedScore, reparameterize
from score_sde.sde import SDE, VPSDE, DiscreteSDE, KarrasSDE, RectifiedFlow, expand
from score_sde.steps import DDIM, Ancestral
from score_sde.targets import Empirical, GaussianMixture, make

F64 = torch.float64


class Affine(nn.Module):
    """F = 2 x + 3 c_noise + label: records what it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x, c_noise, label=None):
        assert c_noise.shape == (len(x),)
        self.seen = (x, c_noise)
        shape = (-1, *[1] * (x.ndim - 1))
        out = self.weight * (2 * x + 3 * c_noise.view(shape))
        return out if label is None else out + label.view(shape)


def learned(sde, parameterization=None, event_shape=(2,)) -> LearnedScore:
    return LearnedScore(Affine().double(), sde, parameterization or Karras(0.5), event_shape)


def x_of(batch: int = 3, *event: int) -> torch.Tensor:
    return torch.randn(batch, *(event or (2,)), dtype=F64, generator=torch.Generator().manual_seed(0))


def test_the_network_sees_scaled_inputs_and_its_output_is_mapped(sde, parameterization):
    model, x = learned(sde, parameterization), x_of()
    t = float(sde.time_at(0.7))
    row = parameterization.row(sde, t)
    F = 2 * row.c_in * x + 3 * row.c_noise
    torch.testing.assert_close(model.raw(x, t), F)
    torch.testing.assert_close(model(x, t).denoised, row.c_skip * x + row.c_out * F, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.network.seen[1], row.c_noise.expand(3))
    assert model(x, t).alpha == pytest.approx(float(sde.alpha(t)))
    assert model(x, t).sigma == pytest.approx(float(sde.sigma(t)))


@torch.no_grad()
def test_batched_times_equal_scalar_times(sde, parameterization):
    model, x = learned(sde, parameterization, (2, 2)), x_of(3, 2, 2)
    t = sde.time_at(torch.tensor([0.7, -1.0, 2.0], dtype=F64))
    together = model(x, t)
    for i in range(3):
        for given in (float(t[i]), t[i], t[i : i + 1]):
            one = model(x[i : i + 1], given)
            torch.testing.assert_close(together.raw[i : i + 1], one.raw, rtol=1e-12, atol=1e-12)
            for view in ("denoised", "noise", "score", "velocity"):
                a, b = getattr(together, view)[i : i + 1], getattr(one, view)
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10 * (1 + float(b.abs().max())))


def test_prepared_levels_change_nothing():
    sde, x = VPSDE(), x_of()
    ready, fresh = learned(sde), learned(sde)
    ready.prepare([0.25, 0.5])
    for t in (0.25, 0.5, 0.75):
        assert torch.equal(ready(x, t).score, fresh(x, t).score)


def test_another_process_or_parameterization_takes_effect():
    model, x = learned(VPSDE(), Karras(0.5)), x_of()
    model(x, 0.5)
    model.parameterization = Noise(2.0)
    torch.testing.assert_close(model(x, 0.5).denoised, learned(VPSDE(), Noise(2.0))(x, 0.5).denoised)
    assert model.data_std == 2.0
    model.sde = KarrasSDE()
    assert model(x, 0.5).alpha == 1.0


def test_a_network_in_half_precision_is_told_exact_times():
    sde = DiscreteSDE.ddpm()
    model = LearnedScore(Affine().bfloat16(), sde, PublishedNoise("time", scale=1), (2,))
    x = x_of().bfloat16()
    for t in (999.0, torch.full((3,), 999.0)):
        model(x, t)
        seen, c_noise = model.network.seen
        assert (seen.dtype, c_noise.dtype) == (torch.bfloat16, torch.float32)
        assert (c_noise == 999).all()


@few_steps
def test_samples_are_made_in_the_dtype_of_the_weights_but_never_in_half_precision():
    for weights, dtype in ((F64, F64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        model = learned(VPSDE()).to(weights)
        for wrapped in (model, reparameterize(model, KarrasSDE())):
            result = Sampler(DDIM(), functools.partial(grid.log_snr, steps=2)).sample(wrapped, (3, 2), seed=0)
            assert result.x.dtype == dtype


def test_a_thousand_steps_of_a_network_in_half_precision_have_the_right_spread():
    """With F = 0 Karras's parameterization of sigma_data 1 is the exact score of N(0, 1); a bfloat16 state gives 1.2."""
    network = MLP((2,), width=8, depth=1).bfloat16()
    model = LearnedScore(network, VPSDE(), Karras(1.0), (2,)).eval()
    x = Sampler(Ancestral(), functools.partial(grid.uniform, steps=1000)).sample(model, (1000, 2), seed=0).x
    assert x.std().item() == pytest.approx(0.994, abs=0.05)  # three standard errors
    with pytest.warns(
        UserWarning, match=r"a state in torch\.bfloat16 is rounded at every step.*give dtype=torch\.float32"
    ):
        Sampler(DDIM(), functools.partial(grid.uniform, steps=2)).sample(model, (1, 2), seed=0, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_scores_of_states_in_half_precision_are_computed_in_single(dtype):
    for name in ("ring", "two_moons", "checkerboard"):  # a mixture, points, boxes
        model, x = ExactScore(make(name), VPSDE()), x_of().to(dtype)
        said = model(x, 0.1)
        assert said.denoised.dtype == dtype
        assert torch.equal(said.denoised, model(x.float(), 0.1).denoised.to(dtype))
        assert torch.equal(model.log_prob(x, 0.1), model.log_prob(x.float(), 0.1))


def test_a_network_takes_states_of_another_dtype():
    model, x = learned(VPSDE()), x_of()
    assert model(x, 0.4).score.dtype == F64
    torch.testing.assert_close(model(x, 0.4).score.float(), model(x.float(), 0.4).score)


def test_the_coefficients_of_times_that_do_not_return_are_forgotten():
    model = learned(VPSDE())
    reference = model(x_of(), 0.4).denoised
    for times in torch.linspace(0.1, 0.9, 3 * KEPT, dtype=F64).split(KEPT // 2):
        model.prepare(times.tolist())
    assert len(model._levels) <= KEPT
    assert torch.equal(model(x_of(), 0.4).denoised, reference)


def test_conditions_go_by_name():
    model, x = learned(VPSDE()), x_of()
    label = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    plain, labelled = model.raw(x, 0.5), model.raw(x, 0.5, label=label)
    torch.testing.assert_close(labelled, plain + label[:, None])
    with pytest.raises(TypeError, match="unknown condition 'lable'; this model accepts: label"):
        model(x, 0.5, lable=label)
    with pytest.raises(TypeError, match="accepts: none"):
        ExactScore(make("ring"), VPSDE())(x.float(), 0.5, label=1)


def test_shapes_are_checked():
    for model in (learned(VPSDE()), ExactScore(make("ring"), VPSDE())):
        with pytest.raises(ValueError, match=r"\(batch, 2\), got \(3, 4\)"):
            model(torch.zeros(3, 4), 0.5)
        with pytest.raises(ValueError, match=r"\(batch, 2\), got \(2,\)"):
            model(torch.zeros(2), 0.5)


def test_an_unusable_schedule_is_refused_when_the_model_is_built():
    with pytest.raises(ValueError, match="VPSDE"):
        learned(VPSDE(t_min=0.0))
    with pytest.raises(ValueError, match="VPSDE"):
        ExactScore(make("ring"), VPSDE(t_min=0.0))


def test_the_exact_score_is_the_gradient_of_the_marginal(sde):
    target = make("ring", components=5, weights=[1, 2, 3, 4, 5])
    model, t = ExactScore(target, sde), float(sde.time_at(0.3))
    alpha, sigma = float(sde.alpha(t)), float(sde.sigma(t))
    law = target.marginal(alpha, sigma)
    x = law.sample((6,), generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(model(x, t).score, law.score(x), rtol=1e-8, atol=1e-8)
    batched = model(x, torch.full((6,), t, dtype=F64))
    torch.testing.assert_close(batched.score, model(x, t).score, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(x, torch.tensor(t, dtype=F64)).score, model(x, t).score)


def test_the_exact_model_starts_with_the_moments_of_its_marginal(sde):
    target = GaussianMixture([0.25, 0.75], [[2.0, 0.0], [-1.0, 4.0]], torch.eye(2).expand(2, 2, 2) * 0.5)
    model = ExactScore(target, sde)
    alpha, sigma = float(sde.alpha(sde.t_max)), float(sde.sigma(sde.t_max))
    zero, one = torch.zeros(1, 2, dtype=F64), torch.ones(1, 2, dtype=F64)
    torch.testing.assert_close(model.start(zero), alpha * torch.tensor([[-0.25, 3.0]], dtype=F64))
    # Var x: 0.5 + 27/16 and 0.5 + 3, pooled.
    spread = ((0.5 + 27 / 16 + 0.5 + 3.0) / 2 * alpha**2 + sigma**2) ** 0.5
    torch.testing.assert_close(model.start(one) - model.start(zero), torch.full_like(one, spread))


def test_a_learned_model_starts_at_the_prior(sde):
    z = x_of()
    torch.testing.assert_close(learned(sde).start(z), z * sde.prior_std)


def test_images_and_videos_keep_their_shape():
    target = Empirical(torch.randn(5, 1, 2, 3, 2, generator=torch.Generator().manual_seed(0)))
    for t in (0.5, torch.tensor([0.5, 0.1])):
        assert ExactScore(target, VPSDE())(torch.zeros(2, 1, 2, 3, 2), t).score.shape == (2, 1, 2, 3, 2)


def test_the_state_keeps_its_dtype():
    model = ExactScore(make("ring"), DiscreteSDE.ddpm())
    for dtype in (torch.float32, F64):
        for t in (500.0, torch.tensor([500.0, 3.0]), torch.tensor([500, 3])):
            assert model(torch.zeros(2, 2, dtype=dtype), t).score.dtype == dtype


def test_a_users_sde_of_tensor_functions_is_a_model_and_samples():
    class Angle(SDE):
        t_min, t_max = 0.01, 1.5

        def alpha(self, t):
            return torch.cos(t)

        def sigma(self, t):
            return torch.sin(t)

    model = ExactScore(make("ring"), Angle())
    result = Sampler(DDIM(), functools.partial(grid.log_snr, steps=4)).sample(model, (8, 2), seed=0)
    assert result.x.isfinite().all()
    assert float(model(torch.ones(1, 2), 0.3).alpha) == pytest.approx(torch.cos(torch.tensor(0.3)).item())


def test_gradients_reach_the_network_and_the_input():
    model, x = learned(KarrasSDE(), Noise()), x_of().requires_grad_()
    model(x, torch.tensor([0.1, 1.0, 10.0], dtype=F64)).score.sum().backward()
    assert model.network.weight.grad is not None
    assert x.grad is not None


def test_condition_names_are_the_networks_own():
    names = list(inspect.signature(Affine().forward).parameters)[2:]
    assert learned(VPSDE()).condition_names == frozenset(names) == {"label"}


def test_a_network_gives_the_shape_of_x():
    class Squeezing(nn.Module):
        def forward(self, x, c_noise):
            return x.squeeze(-1)

    class OfDiffusers(nn.Module):
        def forward(self, x, c_noise):
            return SimpleNamespace(sample=x)

    for network, says in (
        (Squeezing(), r"Squeezing gives shape \(4,\) for x of shape \(4, 1\): it must be \(4, 1\)$"),
        (OfDiffusers(), r"gives a SimpleNamespace .* it must be \(4, 1\), as its \.sample is: let forward return that"),
    ):
        with pytest.raises(ValueError, match=says):
            LearnedScore(network, VPSDE(), Noise(), (1,))(torch.zeros(4, 1), 0.5)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExactScore(VPSDE(), make("ring")), "takes a law with a denoiser"),
        (lambda: ExactScore("ring", VPSDE()), "got 'ring'"),
        (lambda: ExactScore(make("ring"), VPSDE), r"an SDE is an object, e\.g\. VPSDE\(\)"),
        (lambda: LearnedScore(nn.Identity(), VPSDE(), Noise, (2,)), "a parameterization is an object"),
        (
            lambda: LearnedScore(nn.Identity(), VPSDE(), Noise(), (2,)),
            r"Identity\.forward takes .*: a score network takes",
        ),
        (lambda: FunctionScore(3, VPSDE(), (2,)), "takes a function"),
        (lambda: FunctionScore(torch.sin, VPSDE(), 2), r"event_shape is a tuple such as \(2,\), got 2"),
        (lambda: reparameterize(VPSDE(), ExactScore(make("ring"), VPSDE())), "takes a score model"),
        (
            lambda: Sampler(DDIM(), functools.partial(grid.log_snr, steps=3)).sample(nn.Linear(2, 2), (1, 2)),
            "got Linear",
        ),
    ],
)
def test_what_is_no_model_is_named(build, message):
    with pytest.raises(TypeError, match=message) as refusal:
        build()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("model", [learned(VPSDE()), ExactScore(make("ring"), VPSDE())], ids=["learned", "exact"])
def test_a_time_without_noise_is_refused_with_the_least_one(model):
    with pytest.raises(
        ValueError, match=r"at t=0 .* has no noise, so there is no score: its least time is t_min=0.001"
    ):
        model(torch.zeros(2, 2), 0.0)


@pytest.mark.parametrize("make_model", [learned, lambda sde: ExactScore(make("ring"), sde)], ids=["learned", "exact"])
def test_a_time_beyond_the_process_is_refused(make_model):
    with pytest.raises(ValueError, match=r"is not defined at t=2: its times are 0\.001 to 0\.999"):
        make_model(RectifiedFlow())(torch.zeros(2, 2), 2.0)
    for t in (1.001, -0.5, 1000):
        with pytest.raises(ValueError, match=rf"is not defined at t={t}: its times are 0.001 to 1"):
            make_model(VPSDE())(torch.zeros(2, 2), t)
    for t in (1 + 1e-12, 1e-8):
        make_model(VPSDE())(torch.zeros(2, 2), t)


@pytest.mark.parametrize("model", [learned(VPSDE()), ExactScore(make("ring"), VPSDE())], ids=["learned", "exact"])
def test_times_of_another_batch_are_refused(model):
    for t in (torch.rand(4), torch.rand(3, 1)):
        with pytest.raises(ValueError, match=r"per-sample value has shape \(\) or \(3,\) here, not"):
            model(torch.zeros(3, 2), t)


def test_a_number_is_a_vector_of_length_one():
    """An event without dimensions would sample by some samplers and fail within others."""
    for make_model in (
        lambda: FunctionScore(torch.sin, VPSDE(), ()),
        lambda: LearnedScore(Affine(), VPSDE(), Noise(), ()),
    ):
        with pytest.raises(ValueError, match=r"vectors of length 1, event_shape=\(1,\)"):
            make_model()


@pytest.mark.parametrize("gives", ["score", "denoised", "noise", "velocity", "flow"])
def test_a_function_is_a_model_of_what_it_gives_with_one_time_or_one_for_each_sample(sde, gives):
    exact, x = (
        ExactScore(make("ring"), sde),
        x_of(2),
    )  # as many samples as dimensions: a time a sample must not broadcast
    asked = []

    def function(v, t):
        asked.append(tuple(t.shape))
        t = t.flatten() if t.ndim else t
        if gives == "flow":  # the slope of the path alpha D + sigma eps
            said = exact(v, t)
            _, alpha = torch.func.jvp(sde.alpha, (t.double(),), (torch.ones_like(t, dtype=F64),))
            _, sigma = torch.func.jvp(sde.sigma, (t.double(),), (torch.ones_like(t, dtype=F64),))
            return expand(alpha, v) * said.denoised + expand(sigma, v) * said.noise
        return getattr(exact(v, t), gives)

    model = FunctionScore(function, sde, (2,), gives)
    t = sde.time_at(torch.tensor([0.7, -0.4], dtype=F64))
    for times in (float(t[0]), t):
        said, expected = model(x, times), exact(x, times)
        for view in ("score", "denoised", "noise", "velocity"):
            torch.testing.assert_close(getattr(said, view), getattr(expected, view), rtol=1e-9, atol=1e-9)
    assert asked == [(), (2, 1)]
    single = model(x.float(), t)
    assert single.raw.dtype == torch.float32


def test_a_function_has_conditions_by_name_and_gives_the_shape_of_x():
    model = FunctionScore(
        lambda x, t, label=None: x if label is None else x + label[:, None], VPSDE(), (2,), "denoised"
    )
    assert model.condition_names == {"label"}
    sampler = Sampler(DDIM(), functools.partial(grid.log_snr, steps=3))
    assert sampler.sample(model, (4, 2), seed=0, condition={"label": 5}).x.isfinite().all()
    with pytest.raises(TypeError, match="unknown condition 'class'"):
        model(x_of(), 0.5, **{"class": 1})
    with pytest.raises(ValueError, match=r"the function gives \(3,\) for x of shape \(3, 2\) and t of shape \(\)"):
        FunctionScore(lambda x, t: x.sum(1), VPSDE(), (2,))(x_of(), 0.5)
    with pytest.raises(ValueError, match="gives is one of"):
        FunctionScore(torch.sin, VPSDE(), (2,), "epsilon")


def test_a_module_as_a_function_has_the_conditions_of_its_forward_and_the_device_of_its_weights():
    class Denoiser(torch.nn.Linear):
        def forward(self, x, sigma, class_labels=None):
            return super().forward(x)

    module = Denoiser(2, 2, device="meta")
    model = FunctionScore(module, KarrasSDE(), (2,), "denoised")
    assert model.condition_names == {"class_labels"}
    assert model.device == torch.device("meta")
    assert FunctionScore(lambda x, t: module(x, t), KarrasSDE(), (2,), device="meta").device == torch.device("meta")
    assert FunctionScore(lambda x, t: x, KarrasSDE(), (2,)).device == torch.device("cpu")


def test_a_function_is_given_a_time_on_the_device_of_x():
    asked = []
    model = FunctionScore(lambda x, t: asked.append((t.device.type, t.dtype)) or x, VPSDE(), (2,))
    x = torch.empty(3, 2, device="meta")
    for t in (0.5, torch.full((3,), 0.5)):
        model(x, t)
    assert asked == [("meta", torch.float32)] * 2


def test_a_function_s_coefficients_are_tabulated_before_the_first_call_and_follow_its_sde():
    class Counted(VPSDE):
        asked = 0

        def alpha(self, t):
            type(self).asked += 1
            return super().alpha(t)

    model = FunctionScore(lambda x, t: x, Counted(), (2,), "noise")
    times = [0.7, 0.2]
    model.prepare(times)
    before = Counted.asked
    kept = [model(x_of(), t).denoised for t in times]
    assert Counted.asked == before
    fresh = FunctionScore(lambda x, t: x, VPSDE(), (2,), "noise")
    torch.testing.assert_close(kept, [fresh(x_of(), t).denoised for t in times], rtol=1e-12, atol=1e-12)
    model.sde = KarrasSDE()
    assert model(x_of(), 0.7).alpha == 1


def test_labels_are_classes_or_none():
    model = LearnedScore(MLP((2,), num_classes=3), VPSDE(), Karras(0.5), (2,))
    sampler = Sampler(DDIM(), functools.partial(grid.log_snr, steps=2))
    sampler.sample(model, (2, 2), seed=0, condition={"label": torch.tensor([-1, 2])})
    for label in (-2, 3):
        with pytest.raises(ValueError, match=f"label={label}, but this model knows the classes 0 to 2"):
            sampler.sample(model, (2, 2), seed=0, condition={"label": torch.tensor([0, label])})


@pytest.mark.parametrize(("name", "one"), [("label", torch.tensor([2])), ("context", torch.ones(1, 3, 5))])
def test_a_condition_of_one_row_is_every_samples(name, one):
    class Asked(torch.nn.Module):
        def forward(self, x, c, label=None, context=None):
            said = label if context is None else context
            assert len(said) == len(x)
            return x + said.to(x).reshape(len(x), -1).sum(1, keepdim=True)

    model = LearnedScore(Asked(), VPSDE(), Noise(), (2,))
    sampler = Sampler(DDIM(), functools.partial(grid.log_snr, steps=3))
    first, each = (sampler.sample(model, (4, 2), seed=0, condition={name: condition}).x
                   for condition in (one, one.expand(4, *one.shape[1:])))  # fmt: skip
    assert torch.equal(first, each)


def test_labels_of_another_number_of_samples_and_what_is_no_mapping_are_refused():
    """Whatever the network: one of the user's own would add three rows to five."""
    for condition, error, says in (
        ({"label": [0, 1, 2]}, ValueError, "label has 3 rows for 5 samples: give one for all, or one for each"),
        (3, TypeError, r"condition is a mapping .* \{'label': 3\}, got 3"),
    ):
        with pytest.raises(error, match=says):
            Sampler(DDIM(), functools.partial(grid.log_snr, steps=2)).sample(
                learned(VPSDE()), (5, 2), condition=condition
            )


def test_a_label_by_name_is_refused_with_the_fix():
    model = FunctionScore(lambda x, t, label=None: -x, VPSDE(), (2,))
    for label in ("cat", ["cat", "dog"]):
        with pytest.raises(TypeError, match=r"the number of a class, got .*cat.*class_names"):
            Sampler(DDIM(), functools.partial(grid.log_snr, steps=3)).sample(model, (2, 2), condition={"label": label})

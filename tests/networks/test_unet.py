"""The U-Net's options: published sizes, resampling against its definition, conditions, magnitudes, compiled and eager."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from references import awake, compiled_equals_eager, upfirdn
from torch import Tensor, nn

from score_sde import LearnedScore, Noise
from score_sde.data import Batch
from score_sde.networks import Conservative, UNet
from score_sde.networks.blocks import CrossAttention, Resample, Style
from score_sde.networks.magnitude import MPAttention, MPBlock, MPConcatenate, MPConv, mp_silu, mp_sum, unit
from score_sde.networks.resample import BlurredConv, Double, Halve
from score_sde.networks.unet import EDM2_WIDTHS
from score_sde.sde import DiscreteSDE
from score_sde.training.objective import DenoisingScoreMatching
from score_sde.training.times import Times
from score_sde.training.variational import VariationalObjective

SMALL = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,)}
EVENTS = {"signal": (2, 8), "image": (2, 8, 12), "video": (2, 4, 8, 4)}
PRESETS = (UNet, UNet.ddpm, UNet.ddpmpp, UNet.ncsnpp, UNet.adm, UNet.edm2)
OPTIONS = {
    "plain": {},
    "shift": {"modulation": "shift"},
    "strided": {"resample": "strided"},
    "residual": {"resample": "residual"},
    "residual projected": {"resample": "residual", "project_skip": True, "rescale": True},
    "FIR": {"filter": (1, 3, 3, 1)},
    "FIR residual": {"filter": (1, 3, 3, 1), "resample": "residual"},
    "longer FIR": {"filter": (-1, 3, 10, 10, 3, -1)},
    "input skip": {"progressive_input": "skip"},
    "input residual": {"progressive_input": "residual", "filter": (1, 3, 3, 1)},
    "output skip": {"progressive_output": "skip"},
    "output residual": {"progressive_output": "residual", "rescale": True},
    "positional": {"embedding": "positional"},
    "fourier": {"embedding": "fourier"},
    "one head": {"head_channels": None},
    "small heads": {"head_channels": 4},
    "attend once": {"attend_once": True},
    "middle attention": {"middle_attention": True, "attention": ()},
    "groups": {"norm_groups": 32, "epsilon": 1e-6},
    "glorot": {"glorot": True},
    "magnitude preserving": {"magnitude_preserving": True, "resample": "residual"},
    "learned variance": {"learned_variance": True},
    "checkpointing": {"checkpointing": True, "dropout": 0.3},
}


def batch(event: tuple[int, ...], size: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(size, *event, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return x, torch.linspace(-2, 1, size, dtype=dtype)


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_runs_forward_and_backward_in_one_two_and_three_dimensions(event, options) -> None:
    torch.manual_seed(0)
    network = UNet(event, **{**SMALL, **options}, num_classes=3, context_width=5, augment_width=9)
    x, c_noise = batch(event)
    conditions = {
        "label": torch.tensor([0, 2, -1]),
        "context": torch.randn(3, 4, 5),
        "augment": torch.randn(3, 9),
    }
    silent = network(x, c_noise, **conditions)
    assert silent.shape == (3, 4 if options.get("learned_variance") else 2, *event[1:])
    assert (silent == 0).all()
    # The null token would lie idle: one sample goes without a context.
    conditions["context"][1] = math.nan
    awake(network)(x, c_noise, **conditions).square().sum().backward()
    idle = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    without_attention = not ({**SMALL, **options}["attention"] or options.get("middle_attention"))
    assert not idle or without_attention, idle


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_presets_run_forward_and_backward_in_every_dimension(preset) -> None:
    for event in EVENTS.values():
        network = preset(event, **SMALL)
        awake(network)(*batch(event)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def parameters(make) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


CIFAR = (3, 32, 32)
PUBLISHED = {
    # Ho et al. 2020, section B: 35.7 million. Exactly: 35,746,307, the weights of google/ddpm-cifar10-32.
    "DDPM": (lambda: UNet.ddpm(CIFAR), 35.746307e6, 0),
    # Song et al. 2021; Karras et al. 2022, table 7, for the networks as they were and as EDM changed them.
    "DDPM++": (lambda: UNet.ddpmpp(CIFAR), 61.8e6, 1e-3),
    "NCSN++": (lambda: UNet.ncsnpp(CIFAR), 62.8e6, 1e-3),
    "DDPM++ deep": (lambda: UNet.ddpmpp(CIFAR, blocks=8), 107e6, 5e-3),
    "NCSN++ deep": (lambda: UNet.ncsnpp(CIFAR, blocks=8), 107e6, 6e-3),
    "EDM DDPM++": (lambda: UNet.ddpmpp(CIFAR, multipliers=(2, 2, 2)), 55.7e6, 1e-3),
    # 0.6 M of pyramid and 0.07 M of embedding more than DDPM++; 56.5 M is also quoted, from where we could not tell.
    "EDM NCSN++": (lambda: UNet.ncsnpp(CIFAR, multipliers=(2, 2, 2)), 56.4e6, 1e-3),
    # Dhariwal & Nichol 2021, table 12: 296 M.
    "ADM": (lambda: UNet.adm((3, 64, 64), num_classes=1000), 296e6, 1e-3),
    # Karras et al. 2024, table 2, for latents of 64x64: millions of parameters.
    **{
        f"EDM2-{size}": (lambda size=size: UNet.edm2((4, 64, 64), size, num_classes=1000), count * 1e6, 4e-3)
        for size, count in zip(EDM2_WIDTHS, (125, 280, 498, 777, 1119, 1523), strict=True)
    },
}


@pytest.mark.parametrize(("make", "published", "tolerance"), PUBLISHED.values(), ids=PUBLISHED)
def test_presets_have_the_published_number_of_parameters(make, published, tolerance) -> None:
    assert parameters(make) == pytest.approx(published, rel=tolerance, abs=0)


def test_ddpm_counted_layer_by_layer() -> None:
    # Appendix B of Ho et al.: 3x3 convolutions, two a block, a linear layer from the embedding of 512 to each block, a
    # group norm before each convolution, 1x1 convolutions where widths change; attention at 16x16 and in the middle.
    def block(i: int, o: int) -> int:
        return 2 * i + (9 * i * o + o) + (512 * o + o) + 2 * o + (9 * o * o + o) + (0 if i == o else i * o + o)

    def attention(c: int) -> int:
        return 2 * c + 4 * (c * c + c)

    embedding = 128 * 512 + 512 + 512 * 512 + 512
    ends = 27 * 128 + 128 + 2 * 128 + 9 * 128 * 3 + 3
    resampling = [9 * c * c + c for c in (128, 256, 256)] + [9 * 256 * 256 + 256] * 3
    down = [(128, 128)] * 2 + [(128, 256), (256, 256)] + [(256, 256)] * 4
    up = [(512, 256)] * 6 + [(512, 256), (512, 256), (384, 256)] + [(384, 128), (256, 128), (256, 128)]
    blocks = sum(itertools.starmap(block, [*down, (256, 256), (256, 256), *up]))
    total = embedding + ends + sum(resampling) + blocks + (2 + 1 + 3) * attention(256)
    assert total == parameters(lambda: UNet.ddpm(CIFAR)) == 35_746_307


@pytest.mark.parametrize("filter", [(1, 1), (1, 3, 3, 1), (-1, 3, 10, 10, 3, -1)])
@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_resampling_against_upfirdn(event, filter) -> None:
    x, _ = batch(event, dtype=torch.float64)
    dims, total, length = len(event) - 1, sum(filter), len(filter)
    taps = [tap / total for tap in filter]
    # The paddings of StyleGAN2's downsample_2d and upsample_2d, which NCSN++ uses.
    p = length - 2
    halved = upfirdn(x, taps, 1, 2, (p + 1) // 2, p // 2)
    doubled = upfirdn(x, [2 * tap for tap in taps], 2, 1, (p + 1) // 2 + 1, p // 2)
    torch.testing.assert_close(Halve(dims, filter).double()(x), halved, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(Double(dims, filter).double()(x), doubled, rtol=1e-6, atol=1e-7)
    layer = BlurredConv(dims, event[0], 5, filter).double()
    p = (length - 2) + (3 - 1)
    blurred = upfirdn(x, taps, 1, 1, (p + 1) // 2, p // 2)
    torch.testing.assert_close(layer(x), layer.conv(blurred), rtol=1e-6, atol=1e-7)
    assert layer(x).shape[2:] == halved.shape[2:]


def test_strided_halving_pads_at_the_far_ends() -> None:
    style = Style(dims=1, embedding=4, resample="strided")
    layer, x = Resample(1, style, 0.5), torch.arange(1.0, 7.0)[None, None]
    with torch.no_grad():
        layer.conv.weight.copy_(torch.tensor([[[1.0, 10.0, 100.0]]]))
        layer.conv.bias.zero_()
    assert layer(x, x).flatten().tolist() == [321, 543, 65]


def test_cross_attention_against_explicit_softmax() -> None:
    torch.manual_seed(0)
    layer = CrossAttention(64, Style(dims=2, embedding=8, context_width=5)).double()
    nn.init.normal_(layer.project.weight)
    x, context = torch.randn(2, 64, 3, 4).double(), torch.randn(2, 7, 5).double()
    q = layer.query(layer.norm(x)).flatten(2).transpose(1, 2)
    k, v = layer.keys_values(context).chunk(2, dim=-1)
    heads = []
    for head in (slice(0, 32), slice(32, 64)):
        scores = q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(32)
        heads.append(scores.softmax(-1) @ v[..., head])
    expected = x + layer.project(torch.cat(heads, -1).transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(layer(x, context), expected)


@pytest.mark.parametrize("preset", [UNet, UNet.edm2], ids=["plain", "magnitude preserving"])
def test_no_context_is_the_null_context_and_tokens_are_a_set(preset) -> None:
    network = awake(preset((1, 8, 8), **SMALL, context_width=5)).eval()
    x, c_noise = batch((1, 8, 8))
    context = torch.randn(3, 4, 5)
    given = network(x, c_noise, context=context)
    torch.testing.assert_close(network(x, c_noise, context=context[:, [2, 0, 3, 1]]), given)
    context[1] = math.nan
    mixed = network(x, c_noise, context=context)
    torch.testing.assert_close(mixed[[0, 2]], given[[0, 2]])
    torch.testing.assert_close(mixed[1], network(x, c_noise)[1])
    assert (mixed[1] - given[1]).abs().max() > 1e-4


def test_the_objective_drops_a_context_with_its_label() -> None:
    given: list[dict[str, Tensor]] = []

    class Listener(UNet):
        def forward(self, x, c_noise, label=None, context=None, augment=None) -> Tensor:
            given.append({"label": label, "context": context})
            return super().forward(x, c_noise, label, context, augment)

    network = Listener((1, 8, 8), **SMALL, num_classes=3, context_width=5)
    model = LearnedScore(network, DiscreteSDE.ddpm(100), Noise(), (1, 8, 8))
    conditions = {"label": torch.arange(64) % 3, "context": torch.randn(64, 2, 5)}
    times = Times(torch.full((64,), 9.0).double(), torch.full((64,), 0.5), torch.ones(64).double())
    objective = DenoisingScoreMatching(label_dropout=0.5)
    losses = objective(model, Batch(torch.randn(64, 1, 8, 8), conditions), times, torch.Generator().manual_seed(0))
    (seen,) = given
    gone = seen["label"] < 0
    assert 16 < gone.sum() < 48  # 64 tosses: 4 standard deviations
    assert torch.equal(seen["context"].isnan().all(2).all(1), gone)
    assert torch.equal(seen["context"][~gone], conditions["context"][~gone])
    assert losses.loss.isfinite().all()


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"context": torch.zeros(3, 2, 5)}, "set context_width=5"),
        ({"augment": torch.zeros(3, 9)}, "set augment_width"),
    ],
)
def test_conditions_that_a_network_does_not_have_are_refused(condition, message) -> None:
    for preset in (UNet, UNet.edm2):
        with pytest.raises(ValueError, match=message):
            preset((1, 8, 8), **SMALL)(*batch((1, 8, 8)), **condition)


def test_a_context_of_another_width_is_refused() -> None:
    network = UNet((1, 8, 8), **SMALL, context_width=5)
    with pytest.raises(ValueError, match=r"tokens \(3, tokens, 5\); got \(3, 2, 4\)"):
        network(*batch((1, 8, 8)), context=torch.zeros(3, 2, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modulation": "scale"}, "modulation is one of scale_shift, shift; got 'scale'"),
        ({"resample": "fir"}, "resample is one of conv, strided, residual; got 'fir'"),
        ({"embedding": "sinus"}, "embedding is one of waves, positional, fourier; got 'sinus'"),
        ({"filter": (1, 2, 1)}, "must be symmetric, of even length"),
        ({"filter": (1, 3, 3, 1), "resample": "strided"}, "has no filter"),
        ({"progressive_input": "sum"}, "must be null, 'skip' or 'residual'"),
        ({"magnitude_preserving": True}, "set resample='residual'"),
        ({"magnitude_preserving": True, "resample": "residual", "rescale": True}, "rescale=True does nothing with"),
        ({"magnitude_preserving": True, "resample": "residual", "embedding": "typo"}, "embedding='typo' does nothing"),
        ({"magnitude_preserving": True, "resample": "residual", "progressive_input": "skip"}, "set it to null"),
        ({"dropout": 1.0}, "a probability below 1"),
        ({"head_channels": -1}, "head_channels=-1 must be a positive integer"),
    ],
)
def test_impossible_options_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        UNet((1, 8, 8), **SMALL, **options)


def test_an_unknown_size_of_edm2_and_a_misspelt_option_are_refused() -> None:
    with pytest.raises(ValueError, match="size is one of xs, s, m, l, xl, xxl"):
        UNet.edm2((1, 8, 8), "tiny")
    with pytest.raises(TypeError, match="widht"):
        UNet.ddpm((1, 8, 8), widht=8)


def test_learned_variance_reaches_the_prediction_and_its_gradient_comes_from_the_bound() -> None:
    torch.manual_seed(0)
    network = awake(UNet((2, 8), **SMALL, learned_variance=True))
    sde = DiscreteSDE.ddpm(num_steps=100)
    model = LearnedScore(network, sde, Noise(), (2, 8))
    x = torch.randn(4, 2, 8)
    said, row = model(x, 3.0), model.parameterization.row(sde, 3.0)
    both = network(float(row.c_in) * x, torch.full((4,), float(row.c_noise)))
    torch.testing.assert_close(said.raw, both[:, :2])
    torch.testing.assert_close(said.variance_weight, (both[:, 2:] + 1) / 2)
    torch.testing.assert_close(model.raw(x, 3.0), said.raw)
    times = Times(torch.tensor([1.0, 3.0, 5.0, 7.0]).double(), torch.full((4,), 0.5), torch.ones(4).double())
    head = network.last[-1].weight

    def gradient(vlb: float) -> Tensor:
        objective = VariationalObjective(simple=1.0, vlb=vlb)
        losses = objective(model, Batch(x), times, torch.Generator().manual_seed(0)).loss
        return torch.autograd.grad(losses.sum(), head)[0]

    with_bound, without = gradient(0.001), gradient(0.0)
    # L_hybrid: the bound trains the variance alone, the simple loss the noise alone.
    torch.testing.assert_close(with_bound[:2], without[:2])
    assert with_bound[2:].abs().max() > 0
    assert without[2:].abs().max() == 0


def test_a_default_network_has_the_names_that_older_runs_stored() -> None:
    # Run directories written before the other families existed hold these; a renamed layer would orphan them.
    names = set(UNet((1, 8, 8), width=8, multipliers=(1,), blocks=1, attention=(8,), num_classes=2).state_dict())
    ends = {"first", "last.0", "last.2", "embedding.noise.0", "embedding.noise.2"}
    inner = {"begin.0", "begin.2", "modulation", "end.2", "attention.norm", "attention.qkv", "attention.project"}
    blocks = {f"{block}.{part}" for block in ("down.0", "middle.0", "middle.1", "up.0", "up.1") for part in inner}
    skips = {"up.0.skip", "up.1.skip"}
    stored = {f"{layer}.{kind}" for layer in ends | blocks | skips for kind in ("weight", "bias")}
    assert names == stored | {"embedding.label.weight"}
    assert "down.1.conv.weight" in UNet((1, 8, 8), width=8, multipliers=(1, 2), blocks=1).state_dict()


def test_checkpointing_changes_no_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = awake(UNet((1, 8, 8), **SMALL, checkpointing=checkpointing, dropout=0.5))
        torch.manual_seed(1)
        network(*batch((1, 8, 8))).square().sum().backward()
        grads.append([p.grad for p in network.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_checkpointing_keeps_less_for_the_backward_pass() -> None:
    def kept(checkpointing: bool) -> int:
        network, saved = awake(UNet((1, 8, 8), **SMALL, checkpointing=checkpointing)), []
        known = {p.data_ptr() for p in network.parameters()}

        def pack(t: Tensor) -> Tensor:
            if t.data_ptr() not in known:
                saved.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            network(*batch((1, 8, 8)))
        return sum(saved)

    assert kept(True) < 0.5 * kept(False)


# Magnitudes. Root mean squares over 10^4 and more numbers: their error is below 2 %, the bounds are five times that.


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def test_magnitude_preserving_parts_keep_unit_variance() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(2, 64, 64, 16, 16).unbind()
    assert rms(MPConv(2, 64, 128)(x)[..., 1:-1, 1:-1]) == pytest.approx(1, rel=0.05)
    assert rms(mp_silu(x)) == pytest.approx(1, rel=0.02)
    for t in (0.3, 0.5):
        assert rms(mp_sum(x, y, t)) == pytest.approx(1, rel=0.02)
    joined = MPConcatenate()(x, y[:, :16])
    assert rms(joined) == pytest.approx(1, rel=0.02)
    # Both parts have the same share of the sum of squares, whatever their widths.
    assert joined[:, :64].square().sum().item() == pytest.approx(joined[:, 64:].square().sum().item(), rel=0.03)
    torch.testing.assert_close(unit(3 * x, 1).square().mean(1), torch.ones(64, 16, 16), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("decoder", [False, True])
def test_a_magnitude_preserving_block_keeps_unit_variance_where_a_plain_sum_grows(decoder) -> None:
    torch.manual_seed(0)
    style, x = Style(dims=2, embedding=32, head_channels=16), torch.randn(16, 32, 16, 16)
    block = MPBlock(32, 64, style, attends=True, decoder=decoder)
    # Attention of random queries averages its values away, so that the sum is somewhat below 1, as in the paper.
    assert 0.75 < rms(block(x, torch.randn(16, 32))) < 1.1
    block.attention = None
    assert rms(block(x, torch.randn(16, 32))[..., 2:-2, 2:-2]) == pytest.approx(1, rel=0.06)


def test_the_whole_magnitude_preserving_network_keeps_its_activations_near_one() -> None:
    torch.manual_seed(0)
    network = UNet.edm2((3, 16, 16), **{**SMALL, "width": 32, "blocks": 2, "attention": ()}, middle_attention=False)
    seen: list[float] = []
    for module in network.modules():
        if isinstance(module, MPBlock):
            module.register_forward_hook(lambda _, __, h: seen.append(rms(h)))
    network(torch.randn(16, 3, 16, 16), torch.linspace(-1, 1, 16))
    assert len(seen) == 14
    # The two resampling blocks average and repeat neighbours, and borders see zeros: not exactly one.
    assert all(0.6 < size < 1.15 for size in seen), seen


def test_weights_stay_on_the_sphere_in_training_and_the_output_ignores_their_length() -> None:
    torch.manual_seed(0)
    layer, x = MPConv(1, 4, 6), torch.randn(2, 4, 8)
    layer(x)
    torch.testing.assert_close(layer.weight.square().mean((1, 2)), torch.ones(6), rtol=1e-3, atol=1e-3)
    before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(7)
    layer.eval()
    torch.testing.assert_close(layer(x), before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.weight.square().mean((1, 2)), torch.full((6,), 49.0), rtol=1e-2, atol=1e-2)
    # The gradient is orthogonal to each filter: its length can only grow, and is set back.
    layer.train()(x).square().sum().backward()
    torch.testing.assert_close((layer.weight.grad * layer.weight).sum((1, 2)), torch.zeros(6), rtol=0, atol=1e-2)


def test_two_forward_passes_before_a_backward_pass_are_allowed() -> None:
    network = awake(UNet.edm2((1, 8, 8), **SMALL))
    x, c_noise = batch((1, 8, 8))
    (network(x, c_noise).square().sum() + network(2 * x, c_noise).square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_weights_are_brought_back_to_the_sphere_under_a_derivative_too() -> None:
    # Implicit score matching and `Conservative` differentiate the network itself, in training.
    layer, plain = MPConv(1, 4, 6), MPConv(1, 4, 6)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 4, 8)
    torch.func.grad(lambda v: layer(v).square().sum())(x)
    plain(x)
    assert torch.equal(layer.weight, plain.weight)
    network = Conservative(awake(UNet.edm2((1, 8, 8), **SMALL)))
    network(*batch((1, 8, 8))).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_cosine_attention_ignores_the_length_of_queries() -> None:
    torch.manual_seed(0)
    layer = MPAttention(32, Style(dims=1, embedding=8, head_channels=16)).eval()
    x = torch.randn(2, 32, 8)
    away = layer(x) * math.hypot(0.7, 0.3) - 0.7 * x
    scaled = layer(5 * x) * math.hypot(0.7, 0.3) - 3.5 * x
    torch.testing.assert_close(away, scaled, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_compiles_to_the_eager_outputs_and_gradients(event, options) -> None:
    torch.manual_seed(0)
    network = awake(UNet(event, **{**SMALL, **options}, num_classes=3, context_width=5, augment_width=9))
    conditions = {"label": torch.tensor([0, 2, -1]), "context": torch.randn(3, 4, 5), "augment": torch.randn(3, 9)}
    compiled_equals_eager(network, *batch(event), **conditions)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_every_preset_compiles_to_the_eager_outputs_and_gradients(preset) -> None:
    compiled_equals_eager(awake(preset((3, 8, 8), **SMALL)), *batch((3, 8, 8)))


@pytest.mark.slow
@pytest.mark.parametrize("preset", [UNet.ncsnpp, UNet.edm2], ids=lambda preset: preset.__name__)
def test_compiled_equals_eager(preset) -> None:
    network = awake(preset((1, 8, 8), **SMALL, num_classes=3)).eval()
    x, c_noise = batch((1, 8, 8))
    label = torch.tensor([0, 1, -1])
    torch.testing.assert_close(
        torch.compile(network)(x, c_noise, label), network(x, c_noise, label), rtol=1e-4, atol=1e-5
    )

"""Every network: shapes, silence at the start, batch independence, labels, sensitivity to the noise level, refusals."""

from __future__ import annotations

import inspect
import math
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from score_sde.build import build
from score_sde.networks import MLP, NCSN, DiT, Encoder, NCSNv2, UNet
from score_sde.networks.blocks import Attention, Style
from score_sde.networks.embedding import Embedding
from score_sde.networks.refinenet import InstanceNormPlus
from score_sde.networks.transformer import SIZES
from score_sde.networks.unet import EDM2_WIDTHS

SMALL = {"width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "dropout": 0.0}
REFINE = {"width": 4, "multipliers": (1, 2, 2), "dilations": (1, 1, 2), "conditional": True}
PYRAMIDS = {"progressive_input": "skip", "progressive_output": "residual"}
NETWORKS = {
    "mlp": lambda **options: MLP((3,), width=16, depth=2, **options),
    "mlp image": lambda **options: MLP((1, 4, 4), width=16, depth=2, **options),
    "unet": lambda **options: UNet((1, 8, 8), width=8, blocks=1, attention=(4, 8), **options),
    "unet oblong": lambda **options: UNet((3, 12, 8), width=8, multipliers=(1, 2, 2), blocks=1, **options),
    "unet signal": lambda **options: UNet((2, 16), width=8, blocks=1, attention=(8,), **options),
    "unet video": lambda **options: UNet((1, 2, 4, 6), width=8, blocks=1, attention=(2,), **options),
    "ddpm": lambda **options: UNet.ddpm((1, 8, 8), **SMALL, **options),
    "ddpm++": lambda **options: UNet.ddpmpp((1, 8, 8), **SMALL, **options),
    "ncsn++": lambda **options: UNet.ncsnpp((1, 8, 8), **SMALL, **options),
    "ncsn++ output": lambda **options: UNet.ncsnpp((1, 8, 8), progressive_output="skip", **SMALL, **options),
    "ncsn++ pyramids": lambda **options: UNet.ncsnpp((1, 8, 8), **SMALL, **PYRAMIDS, **options),
    "adm": lambda **options: UNet.adm((1, 8, 8), **SMALL, **options),
    "edm2": lambda **options: UNet.edm2((1, 8, 8), **SMALL, **options),
    "edm2 signal": lambda **options: UNet.edm2((1, 8), **SMALL, **options),
    "edm2 video": lambda **options: UNet.edm2((1, 2, 8, 4), **SMALL, **options),
    "ncsn++ signal": lambda **options: UNet.ncsnpp((1, 8), **SMALL, **options),
    "ncsn++ video": lambda **options: UNet.ncsnpp((1, 2, 8, 4), **SMALL, **options),
    "dit": lambda **options: DiT((1, 8, 8), width=24, depth=2, heads=2, **options),
    "dit oblong": lambda **options: DiT((3, 12, 8), patch=4, width=16, depth=1, heads=4, **options),
    "dit signal": lambda **options: DiT((2, 16), patch=4, width=16, depth=2, heads=2, **options),
    "dit video": lambda **options: DiT((1, 3, 4, 6), patch=(1, 2, 2), width=16, depth=1, heads=2, **options),
    "ncsn": lambda **options: NCSN((1, 8, 8), width=8, **options),
    "conditional ncsnv2 signal": lambda **options: NCSNv2((2, 8), **REFINE, **options),
    "conditional ncsnv2 video": lambda **options: NCSNv2((1, 2, 4, 4), **REFINE, **options),
    "ncsn colour": lambda **options: NCSN((3, 16, 12), width=8, **options),
}


@pytest.fixture(params=NETWORKS)
def make(request):
    def build(**options):
        torch.manual_seed(0)
        return NETWORKS[request.param](**options)

    return build


def randomised(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            # Gains of magnitude-preserving layers are scalars, which a small draw would leave nearly silent.
            scale = 0.2 if parameter.ndim else 1.0
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network.double().eval()


def inputs(network: nn.Module, batch: int = 4):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, *network.event_shape, generator=generator, dtype=torch.float64)
    return x, torch.linspace(-2.5, 1.5, batch, dtype=torch.float64)


def test_output_has_the_shape_of_x_and_starts_at_zero(make):
    network = make().double()
    x, c_noise = inputs(network)
    output = network(x, c_noise)
    assert output.shape == x.shape
    assert (output == 0).all()


def test_every_parameter_receives_a_gradient_once_awake(make):
    network = randomised(make(num_classes=3))
    network(*inputs(network), torch.tensor([0, 1, 2, -1])).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_samples_do_not_see_their_companions(make):
    network = randomised(make())
    x, c_noise = inputs(network)
    alone = torch.cat([network(x[i : i + 1], c_noise[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(network(x, c_noise), alone, rtol=1e-10, atol=1e-10)


def test_output_depends_on_noise_level_and_label(make):
    network = randomised(make(num_classes=3))
    x, c_noise = inputs(network)
    label = torch.tensor([0, 1, 2, 1])
    base = network(x, c_noise, label)
    for changed in (network(x, c_noise + 0.05, label), network(x, c_noise, (label + 1) % 3), network(x, c_noise)):
        assert ((base - changed).abs().flatten(1).amax(1) > 1e-6).all()


def test_no_label_is_the_null_label(make):
    network = randomised(make(num_classes=3))
    x, c_noise = inputs(network)
    assert torch.equal(network(x, c_noise), network(x, c_noise, torch.full((4,), -1)))


@pytest.mark.parametrize(
    "label", [torch.zeros(4), torch.zeros(3, dtype=torch.long), torch.zeros(4, 1, dtype=torch.long)]
)
def test_labels_of_a_wrong_kind_are_refused(make, label):
    network = make(num_classes=3)
    with pytest.raises(ValueError, match="label must be integers of shape \\(4,\\)"):
        network.double()(*inputs(network), label)


def test_a_label_without_classes_is_refused(make):
    network = make().double()
    with pytest.raises(ValueError, match="set num_classes"):
        network(*inputs(network), torch.zeros(4, dtype=torch.long))


def test_x_of_another_shape_is_refused(make):
    network = make()
    with pytest.raises(ValueError, match="event shape"):
        network(torch.zeros(2, *network.event_shape, 1), torch.zeros(2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: UNet((2,)), "use networks.MLP for vectors"),
        (lambda: UNet((1, 10, 8), multipliers=(1, 2, 2)), "multiples of 4"),
        (lambda: UNet((1, 8, 8), attention=(16,)), r"attention=\[16\] .*, \[8, 4\]: give attention=\[8\], or"),
        (lambda: UNet((1, 8, 8), context_width=3), r"context_width=3 does nothing .* give attention=\[4\]"),
        (lambda: UNet((1, 28), attention=(32, 16)), r"give attention=\[28, 14\], or"),
        (lambda: Encoder((1, 8, 8), 10, attention=(5,)), r"give attention=\[4\], or"),
        (lambda: NCSN((1, 7, 8)), "multiples of 2"),
        (lambda: MLP((2,), width=0), "width=0 must be a positive integer"),
        (lambda: MLP((2,), num_classes=0), "num_classes=0"),
    ],
)
def test_impossible_networks_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


CONF = Path(__file__).resolve().parents[2] / "conf"
TARGETS = {"unet": UNet, "dit_b": DiT, "ncsn": NCSN, "ncsnv2": NCSNv2, "mlp": MLP}


@pytest.mark.parametrize("name", TARGETS)
def test_its_config_names_every_option_with_its_default(name):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        given = OmegaConf.to_container(hydra.compose(f"network/{name}").network)
    known = dict(list(inspect.signature(TARGETS[name].__init__).parameters.items())[1:])
    assert given.keys() - {"_target_", "size"} == known.keys()
    if name == "unet":
        tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        assert all(tuples[key] == parameter.default for key, parameter in known.items() if key != "event_shape")


@pytest.mark.parametrize("name", ["dit_s", "dit_b", "dit_l", "dit_xl", *(f"edm2_{size}" for size in EDM2_WIDTHS)])
def test_a_size_gives_what_its_config_leaves_open(name):
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        node = hydra.compose(f"network/{name}").network
    node.event_shape = [3, 64, 64]
    fewer = {"width": 96, **({"heads": 3} if "heads" in node else {})}
    with torch.device("meta"):
        usual, changed = (build({**node, **changes}).first.weight.shape[0] for changes in ({}, fewer))
    kind, size = name.split("_")
    assert usual == (SIZES[size]["width"] if kind == "dit" else EDM2_WIDTHS[size])
    assert changed == 96


def test_embedding_tells_close_and_distant_noise_levels_apart():
    # Waves of period 2 pi / w: neighbours 0.02 apart (8 % in sigma) and the ends of the range differ by much more than
    # float32 noise in the raw features, so the features are injective on the range of c_noise.
    frequencies = Embedding(8).frequencies.double()
    c = torch.linspace(-2.5, 1.5, 201, dtype=torch.float64)
    features = torch.cat([(c[:, None] * frequencies).cos(), (c[:, None] * frequencies).sin()], 1)
    distances = torch.cdist(features, features) + 10 * torch.eye(201)
    assert distances.min() > 1.0
    assert 2 * math.pi / frequencies.min() > 4.0


def test_instance_norm_plus_against_the_formula():
    h = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2 + 1
    norm = InstanceNormPlus(3, 6).double()
    gamma, alpha, beta = 1.5, 0.3, -0.7
    with torch.no_grad():
        norm.modulation.bias.copy_(torch.tensor([gamma - 1, alpha - 1, beta]).repeat_interleave(3))
    mean, std = h.mean((2, 3)), h.std((2, 3), correction=0)
    shifted = (mean - mean.mean(1, keepdim=True)) / mean.std(1, correction=0, keepdim=True)
    expected = gamma * ((h - mean[:, :, None, None]) / std[:, :, None, None] + alpha * shifted[:, :, None, None]) + beta
    torch.testing.assert_close(norm(h, torch.zeros(2, 6, dtype=torch.float64)), expected, rtol=0, atol=1e-3)


def test_attention_against_multihead_attention():
    torch.manual_seed(0)
    attention = Attention(64, Style(dims=2, embedding=8)).double()
    nn.init.normal_(attention.project.weight)
    x = torch.randn(2, 64, 3, 5, dtype=torch.float64)
    q, k, v = (part.flatten(2).transpose(1, 2) for part in attention.qkv(attention.norm(x)).chunk(3, dim=1))
    out = torch.zeros_like(q)
    for head in (slice(0, 32), slice(32, 64)):
        scores = q[..., head] @ k[..., head].transpose(1, 2) / math.sqrt(32)
        out[..., head] = scores.softmax(-1) @ v[..., head]
    expected = x + attention.project(out.transpose(1, 2).reshape(x.shape))
    torch.testing.assert_close(attention(x), expected)


def test_an_mlp_learns_what_is_finer_than_the_data():
    """A fiftieth of the variance is left after 300 steps; with A x alone for a first layer two thirds are."""
    torch.manual_seed(0)
    network = MLP((2,), width=64, depth=2)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(300):
        x = torch.randn(256, 2)
        found, truth = network(x, torch.zeros(256)), (5 * x).sin().prod(1, keepdim=True)
        loss = (found - truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.15 * truth.square().mean()

"""NCSNv2: its published size, its blocks against their formulas, and what an unconditional network cannot know."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from references import awake, compiled_equals_eager
from torch.nn.functional import avg_pool1d, elu, interpolate, max_pool1d

from score_sde import DiscreteSDE, LearnedScore, PublishedNoise
from score_sde.networks import NCSNv2
from score_sde.networks.refinenet import CRP, RCU, Fuse, ResidualBlock

SMALL = {"width": 4, "multipliers": (1, 2, 2), "dilations": (1, 1, 2)}


def test_ncsnv2_counted_layer_by_layer() -> None:
    # Song & Ermon 2020, appendix B: 29.7 M for CIFAR-10 at 128 filters. 3x3 convolutions; three numbers a channel a norm.
    def c(i: int, o: int, bias: int = 1) -> int:
        return 9 * i * o + bias * o

    a, b = 128, 256
    same = [3 * w + c(w, w) + 3 * w + c(w, w) for w in (a, a, b, b, b)]
    halving = 3 * a + c(a, a) + 3 * a + c(a, b) + (a * b + b)
    dilating = 3 * b + c(b, b) + 3 * b + c(b, b) + c(b, b)
    encoder = sum(same) + halving + 2 * dilating

    def rcu(w: int) -> int:
        return 2 * c(w, w, 0)

    def refine(inward: list[int], o: int, units: int = 1) -> int:
        fuse = sum(c(w, o) for w in inward) if len(inward) > 1 else 0
        return sum(2 * rcu(w) for w in inward) + fuse + 2 * c(o, o, 0) + units * rcu(o)

    decoder = refine([b], b) + refine([b, b], b) + refine([b, b], a) + refine([a, a], a, units=3)
    total = c(3, a) + encoder + decoder + 3 * a + c(a, 3)
    with torch.device("meta"):
        assert sum(p.numel() for p in NCSNv2((3, 32, 32)).parameters()) == total
    assert total / 1e6 == pytest.approx(29.7, abs=0.05)


@pytest.mark.parametrize("event", [(2, 8), (2, 8, 12), (1, 4, 4, 8)], ids=["signal", "image", "video"])
@pytest.mark.parametrize("stages", [((1, 2, 2), (1, 1, 2)), ((1, 2), (1, 1)), ((1, 2, 3), (1, 1, 1)), ((1,), (1,))])
def test_it_runs_forward_and_backward_in_every_dimension(event, stages) -> None:
    network, x = NCSNv2(event, 4, *stages), torch.randn(3, *event)
    assert torch.equal(network(x, torch.zeros(3)), torch.zeros_like(x))
    awake(network)(x, torch.zeros(3)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_the_unconditional_network_reads_the_noise_level_from_x_alone() -> None:
    network, x = awake(NCSNv2((1, 8, 8), **SMALL)), torch.randn(3, 1, 8, 8)
    assert torch.equal(network(x, torch.zeros(3)), network(x, torch.ones(3)))
    alone = torch.cat([network(x[i : i + 1], torch.zeros(1)) for i in range(3)])
    torch.testing.assert_close(network(x, torch.zeros(3)), alone, rtol=1e-4, atol=1e-4)
    # Technique 3: the score is the output over sigma, and x is seen unscaled.
    model = LearnedScore(network, DiscreteSDE.geometric(0.01, 10, 20), PublishedNoise("log_sigma", 1, 0, -1), (1, 8, 8))
    for t in (0.0, 7.0, 19.0):
        sigma = float(model.sde.sigma(torch.tensor(t, dtype=torch.float64)))
        torch.testing.assert_close(model(x, t).score, network(x, torch.zeros(3)) / sigma)


def test_blocks_against_their_formulas() -> None:
    torch.manual_seed(0)
    h = torch.randn(2, 3, 8)
    unit = RCU(1, 3, None)
    torch.testing.assert_close(unit(h, None), h + unit.convs[1](elu(unit.convs[0](elu(h)))))
    fuse, coarse = Fuse(1, [3, 3], 5, None), torch.randn(2, 3, 4)
    # Linear interpolation with aligned corners: 4 points at 0, 7/3, 14/3, 7.
    c = fuse.convs[1](coarse)
    where = torch.arange(8) * 3 / 7
    low = where.floor().clamp(max=2).long()
    up = c[..., low] * (1 - where + low) + c[..., low + 1] * (where - low)
    torch.testing.assert_close(fuse([h, coarse], None), fuse.convs[0](h) + up, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(up, interpolate(c, 8, mode="linear", align_corners=True), rtol=1e-4, atol=1e-5)
    for told, pool in ((None, max_pool1d), (4, avg_pool1d)):
        crp, e = CRP(1, 3, told), torch.randn(2, 4)
        first = elu(h)
        path = first
        total = first
        for i in range(2):
            path = crp.norms[i](path, e) if told else path
            path = crp.convs[i](pool(path, 5, stride=1, padding=2))
            total = total + path
        torch.testing.assert_close(crp(h, e), total)


def test_a_stage_halves_the_grid_or_dilates() -> None:
    torch.manual_seed(0)
    h = torch.randn(2, 3, 8)
    halving, dilating = ResidualBlock(1, 3, 4, None, changes=True), ResidualBlock(1, 3, 4, None, 2, changes=True)
    assert halving(h, None).shape == (2, 4, 4)
    assert dilating(h, None).shape == (2, 4, 8)
    full = halving.skip(h)
    for norm, conv in zip(halving.norms, halving.convs, strict=True):
        h_ = conv(elu(norm(h if conv is halving.convs[0] else h_, None)))  # noqa: F821
    torch.testing.assert_close(halving(h, None), (full + h_).unflatten(2, (4, 2)).mean(3))


@pytest.mark.parametrize("network", [NCSNv2, partial(NCSNv2, conditional=True)])
def test_checkpointing_changes_no_gradient_and_keeps_less(network) -> None:
    grads, kept = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        built, sizes = awake(network((1, 8, 8), **SMALL, checkpointing=checkpointing)).train(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):  # noqa: B023
            loss = built(torch.ones(2, 1, 8, 8), torch.zeros(2)).square().sum()
        loss.backward()
        grads.append([parameter.grad for parameter in built.parameters()])
        kept.append(sum(sizes))
    torch.testing.assert_close(*grads)
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dilations": (1, 2)}, "must be equally long"),
        ({"dilations": (2, 1, 1)}, "the first dilation 1"),
        ({"num_classes": 3}, "labels need conditional=True"),
        ({"width": 0}, "width=0"),
    ],
)
def test_impossible_networks_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        NCSNv2((1, 8, 8), **{**SMALL, **options})
    with pytest.raises(ValueError, match="multiples of 4"):
        NCSNv2((1, 6, 8), 4, (1, 2, 2), (1, 1, 1))
    with pytest.raises(ValueError, match="without classes"):
        NCSNv2((1, 8, 8), **SMALL)(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"conditional": True}, {"conditional": True, "checkpointing": True}])
@pytest.mark.parametrize("event", [(2, 8), (2, 8, 12), (1, 4, 4, 8)], ids=["signal", "image", "video"])
def test_every_option_compiles_to_the_eager_outputs_and_gradients(event, options) -> None:
    torch.manual_seed(0)
    compiled_equals_eager(awake(NCSNv2(event, **SMALL, **options)), torch.randn(3, *event), torch.linspace(-2, 1, 3))

"""DiT: published sizes, patches and their inverse, positions, adaLN-Zero, conditions, checkpointing, compiled and eager."""

from __future__ import annotations

import math

import pytest
import torch
from references import awake, compiled_equals_eager

from score_sde.networks import DiT
from score_sde.networks.transformer import SIZES, DiTBlock, patches, positions, unpatched

EVENTS = {"signal": ((2, 12), 3), "image": ((2, 4, 6), 2), "video": ((2, 3, 4, 6), (1, 2, 3))}
TINY = {"width": 12, "depth": 2, "heads": 2}


def test_presets_have_the_published_number_of_parameters() -> None:
    # Peebles & Xie 2023, table 4, for latents of 4x32x32, 1,000 classes and a learned variance: 33, 130, 458 and 675
    # millions at patch 2; the patch size hardly matters.
    for size, published in zip(SIZES, (33, 130, 458, 675), strict=True):
        with torch.device("meta"):
            network = DiT.preset((4, 32, 32), size, num_classes=1000, learned_variance=True)
        assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(published, abs=0.6), size


def test_dit_b_counted_layer_by_layer() -> None:
    w, patch = 768, 4 * 2 * 2
    block = (w * 6 * w + 6 * w) + (3 * w * w + 3 * w) + (w * w + w) + (4 * w * w + 4 * w) + (4 * w * w + w)
    ends = (patch * w + w) + (2 * w * w + 2 * w) + (2 * patch * w + 2 * patch)
    embedding = (256 * w + w) + (w * w + w) + 1001 * w
    with torch.device("meta"):
        network = DiT.preset((4, 32, 32), "b", num_classes=1000, learned_variance=True)
    assert sum(p.numel() for p in network.parameters()) == 12 * block + ends + embedding


@pytest.mark.parametrize(("event", "patch"), EVENTS.values(), ids=EVENTS)
def test_patches_are_undone(event, patch) -> None:
    x = torch.randn(3, *event)
    sides = (patch,) * (len(event) - 1) if isinstance(patch, int) else patch
    tokens = patches(x, sides)
    counts = [side // p for side, p in zip(event[1:], sides, strict=True)]
    assert tokens.shape == (3, math.prod(counts), event[0] * math.prod(sides))
    assert torch.equal(unpatched(tokens, sides, event[1:]), x)
    # The first token is the first corner, all channels; the second its neighbour along the last axis.
    corner = x[(slice(None), slice(None), *(slice(0, p) for p in sides))]
    assert torch.equal(tokens[:, 0], corner.flatten(1))
    beside = x[(slice(None), slice(None), *(slice(0, p) for p in sides[:-1]), slice(sides[-1], 2 * sides[-1]))]
    assert torch.equal(tokens[:, 1], beside.flatten(1))


def test_positions_tell_every_token_apart_and_shift_by_rotation() -> None:
    where = positions((4, 6), 32)
    assert where.shape == (24, 32)
    assert (torch.cdist(where, where) + 10 * torch.eye(24)).min() > 0.3
    # A product of two positions depends on their difference alone.
    products = (where @ where.T).reshape(4, 6, 4, 6)
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 3, 3, 5])
    assert positions((5,), 7).shape == (5, 7)


@pytest.mark.parametrize(("event", "patch"), EVENTS.values(), ids=EVENTS)
@pytest.mark.parametrize("options", [{}, {"learned_variance": True}, {"checkpointing": True, "dropout": 0.2}], ids=str)
def test_every_option_runs_forward_and_backward_in_every_dimension(event, patch, options) -> None:
    network = DiT(event, patch, **TINY, **options, num_classes=3, context_width=5, augment_width=9)
    x, c_noise = torch.randn(3, *event), torch.linspace(-2, 1, 3)
    conditions = {
        "label": torch.tensor([0, 2, -1]), "context": torch.randn(3, 4, 5), "augment": torch.randn(3, 9)
    }  # fmt: skip
    silent = network(x, c_noise, **conditions)
    assert silent.shape == (3, 4 if options.get("learned_variance") else 2, *event[1:])
    assert (silent == 0).all()
    conditions["context"][1] = math.nan
    awake(network)(x, c_noise, **conditions).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_every_block_starts_as_the_identity() -> None:
    block, h = DiTBlock(12, 2, 0.0, context_width=5), torch.randn(2, 6, 12)
    assert torch.equal(block(h, torch.randn(2, 12), torch.randn(2, 3, 5)), h)


def test_a_block_against_its_formula() -> None:
    torch.manual_seed(0)
    block, h, e = awake(DiTBlock(12, 2, 0.0, context_width=None)), torch.randn(2, 6, 12), torch.randn(2, 12)
    s1, b1, g1, s2, b2, g2 = block.modulation(e)[:, None].chunk(6, dim=-1)

    def normed(x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()

    q, k, v = block.qkv(normed(h) * (1 + s1) + b1).chunk(3, -1)
    heads = [
        (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(6)).softmax(-1) @ v[..., part]
        for part in (slice(0, 6), slice(6, 12))
    ]
    expected = h + g1 * block.project(torch.cat(heads, -1))
    expected = expected + g2 * block.mlp(normed(expected) * (1 + s2) + b2)
    torch.testing.assert_close(block(h, e), expected)


def test_tokens_of_a_context_are_a_set_and_nan_is_none() -> None:
    network = awake(DiT((1, 4, 4), **TINY, context_width=5))
    x, c_noise, context = torch.randn(3, 1, 4, 4), torch.zeros(3), torch.randn(3, 4, 5)
    given = network(x, c_noise, context=context)
    torch.testing.assert_close(network(x, c_noise, context=context.flip(1)), given, rtol=1e-4, atol=1e-4)
    context[1] = math.nan
    mixed = network(x, c_noise, context=context)
    torch.testing.assert_close(mixed[1], network(x, c_noise)[1], rtol=1e-4, atol=1e-4)
    assert (mixed[1] - given[1]).abs().max() > 1e-3


def test_checkpointing_changes_no_gradient() -> None:
    x, grads = torch.randn(2, 1, 4, 4), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = awake(DiT((1, 4, 4), **TINY, checkpointing=checkpointing, dropout=0.5))
        torch.manual_seed(1)
        network(x, torch.zeros(2)).square().sum().backward()
        grads.append([p.grad for p in network.parameters()])
    for plain, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiT((2,)), "use networks.MLP for vectors"),
        (lambda: DiT((1, 6, 8), patch=4), "multiples of 4"),
        (lambda: DiT((1, 8, 8), patch=(2, 2, 2)), "one side for each axis"),
        (lambda: DiT((1, 8, 8), width=10, heads=4), "width=10 must be a multiple of heads=4"),
        (lambda: DiT((1, 8, 8), patch=0), r"patch\[0\]=0 must be a positive integer"),
        (lambda: DiT.preset((1, 8, 8), "h"), "size is one of s, b, l, xl; got 'h'"),
    ],
)
def test_impossible_transformers_are_refused(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.slow
def test_compiled_equals_eager() -> None:
    network = awake(DiT((1, 4, 4), **TINY, num_classes=3)).eval()
    x, c_noise, label = torch.randn(3, 1, 4, 4), torch.linspace(-2, 1, 3), torch.tensor([0, 2, -1])
    torch.testing.assert_close(
        torch.compile(network)(x, c_noise, label), network(x, c_noise, label), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"learned_variance": True}, {"dropout": 0.3, "checkpointing": True}])
@pytest.mark.parametrize(("event", "patch"), EVENTS.values(), ids=EVENTS)
def test_every_option_compiles_to_the_eager_outputs_and_gradients(event, patch, options) -> None:
    torch.manual_seed(0)
    network = awake(DiT(event, patch=patch, **TINY, num_classes=3, context_width=5, **options))
    conditions = {"label": torch.tensor([0, 2, -1]), "context": torch.randn(3, 4, 5)}
    compiled_equals_eager(network, torch.randn(3, *event), torch.linspace(-2, 1, 3), **conditions)

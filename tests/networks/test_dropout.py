"""Masks that belong to the example: their law, their independence of company, and what happens without keys."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from score_sde.networks.dropout import Dropout, kept, keyed


def keys(batch: int, seed: int = 0) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31 - 1, (batch,), generator=source, dtype=torch.int32)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_dropped_at_the_rate_and_independently(p):
    # Means, correlations of rows and of neighbours within 4.5 standard errors of 64 x 4096 fair draws.
    mask = kept(keys(64), (16, 256), p).flatten(1).double()
    centred = (mask - (1 - p)) / (p * (1 - p)) ** 0.5
    rows, n = centred.shape
    assert abs(centred.mean()) < 4.5 / (rows * n) ** 0.5
    assert (centred.mean(1).abs() < 4.5 / n**0.5).all()
    assert (centred.mean(0).abs() < 5.5 / rows**0.5).all()
    assert ((centred @ centred.T / n - torch.diag(centred.square().mean(1))).abs() < 5.5 / n**0.5).all()
    for lag in (1, 2, 16, 256):
        assert abs((centred[:, lag:] * centred[:, :-lag]).mean()) < 4.5 / (rows * n) ** 0.5


def test_a_mask_depends_on_the_key_alone_and_scales_what_is_kept():
    layer, x, own = Dropout(0.3).train(), 1 + torch.rand(6, 3, 5, 5), keys(6)
    with keyed([layer], own[None]):
        whole = layer(x)
    with keyed([layer], own[None, 2:4]):
        part = layer(x[2:4])
    assert torch.equal(whole[2:4], part)
    assert torch.equal(whole[whole != 0], (x / 0.7)[whole != 0])
    assert not torch.equal(whole[0] == 0, whole[1] == 0)


def test_a_checkpointed_block_computes_the_same_mask_again():
    layer, x = Dropout(0.5).train(), torch.randn(4, 8, requires_grad=True)
    with keyed([layer], keys(4)[None]):
        direct = torch.autograd.grad((layer(x) ** 3).sum(), x)[0]
        again = torch.autograd.grad((checkpoint(layer, x, use_reentrant=False) ** 3).sum(), x)[0]
    assert torch.equal(direct, again)


def test_without_keys_and_in_evaluation_it_is_torch_s():
    layer, x = Dropout(0.5), torch.randn(4, 8)
    with keyed([layer], keys(4)[None]):
        assert torch.equal(layer.eval()(x), x)
    assert layer.keys is None
    torch.manual_seed(1)
    ours = layer.train()(x)
    torch.manual_seed(1)
    assert torch.equal(ours, torch.nn.functional.dropout(x, 0.5))


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_all_or_nothing_needs_no_mask(p):
    layer, x = Dropout(p).train(), torch.ones(2, 3)
    with keyed([layer], keys(2)[None]):
        assert torch.equal(layer(x), (1 - p) * x)

"""A law that depends on a vector: trained with it, with its null, and sampled under it."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from score_sde import VPSDE, ExponentialAdams, Karras, LearnedScore, Sampler, grid
from score_sde.data import TensorData
from score_sde.guidance import ClassifierFree
from score_sde.networks import MLP
from score_sde.training import DenoisingScoreMatching, ImportanceTimes, Trainer


def test_a_vector_that_the_law_depends_on_is_learned_with_and_without() -> None:
    # x given theta is N(2 theta, 0.2^2), theta is +1 or -1: without it x has mean 0 and standard deviation 2.01.
    generator = torch.Generator().manual_seed(0)
    theta = torch.randint(2, (2000, 1), generator=generator).float() * 2 - 1
    data = TensorData(2 * theta + 0.2 * torch.randn(2000, 1, generator=generator), context=theta)
    torch.manual_seed(0)
    model = LearnedScore(MLP((1,), width=32, depth=2, context_width=1), VPSDE(), Karras(2.0), (1,))
    trainer = Trainer(steps=400, batch_size=256, learning_rate=3e-3, device="cpu", progress=False)
    trained = trainer.fit(model, data, DenoisingScoreMatching(label_dropout=0.2), ImportanceTimes()).model
    sampler = Sampler(ExponentialAdams(2), partial(grid.log_snr, steps=12))
    for value in (-1.0, 1.0):
        for asked in (trained, ClassifierFree(trained, 1.0)):
            x = sampler.sample(asked, (500, 1), seed=1, condition={"context": torch.full((500, 1), value)}).x
            assert x.mean().item() == pytest.approx(2 * value, abs=0.2)
            assert x.std().item() < 0.5
    x = sampler.sample(trained, (1000, 1), seed=1).x
    assert abs(x.mean().item()) < 0.5
    assert x.std().item() == pytest.approx(2.0, abs=0.3)
    with pytest.raises(ValueError, match=r"context must be of shape \(5, 1\) or tokens \(5, tokens, 1\); got \(5, 2\)"):
        trained(torch.zeros(5, 1), 0.5, context=torch.zeros(5, 2))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_who_forgets_the_context_of_a_network_that_needs_it_is_told(
    dropout: float, recwarn: pytest.WarningsRecorder
) -> None:
    data = TensorData(torch.randn(64, 2), context=torch.randn(64, 3))
    model = LearnedScore(MLP((2,), context_width=3), VPSDE(), Karras(), (2,))
    objective = DenoisingScoreMatching(label_dropout=dropout)
    trained = Trainer(steps=1, batch_size=8, progress=False).fit(model, data, objective, ImportanceTimes()).model
    sampler = Sampler(ExponentialAdams(1), partial(grid.log_snr, steps=2))
    sampler.sample(trained, (2, 2), seed=0, condition={"context": torch.zeros(3)})
    assert not len(recwarn)
    sampler.sample(trained, (2, 2), seed=0)
    said = [str(one.message) for one in recwarn]
    assert (
        said == []
        if dropout
        else ["has not learnt to do without: give condition={'context': ...}" in said[0]] == [True]
    )

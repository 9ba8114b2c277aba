r"""A classifier of noisy data, p(label | x_t) = softmax(F(c_in x_t, c_noise)), for classifier guidance.

It is trained on x_t = alpha x_0 + sigma eps with the label of x_0 (`training.NoisyCrossEntropy`), whose optimum is the
posterior E[p(label | x_0) | x_t]. At the optimum, score(x) + grad log p(label | x_t) is the exact score given the label.
Song et al. 2021, https://arxiv.org/abs/2011.13456, section 5; Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from score_sde.networks.embedding import check_labels
from score_sde.parameterization import Parameterization
from score_sde.score import LearnedScore
from score_sde.sde import SDE, Time

__all__ = ["NoisyClassifier"]


class NoisyClassifier(LearnedScore):
    """A network of logits on noisy data. It is trained, saved and opened as score models are, but has no score.

    Args:
        network: module (x, c_noise) -> logits (batch, num_classes), with an attribute `num_classes`.
        sde: the forward process, the same as that of the score model it guides.
        parameterization: only its c_in and c_noise are used.
        event_shape: shape of one sample.

    Raises:
        TypeError: it is called for a prediction, as a sampler would.
    """

    num_classes: int
    predicts = False

    def __init__(
        self, network: nn.Module, sde: SDE, parameterization: Parameterization, event_shape: Sequence[int]
    ) -> None:
        super().__init__(network, sde, parameterization, event_shape)
        self.num_classes = int(network.num_classes)  # type: ignore[arg-type]
        self.condition_names = frozenset({"label"})

    def _output_shape(self, x: Tensor) -> tuple[int, ...]:
        return len(x), self.num_classes

    def forward(self, x: Tensor, t: Time, **condition: Any) -> NoReturn:
        raise TypeError("this is a classifier p(label | x_t), which has no score: guide a score model with it, e.g. "
                        "scripts/sample.py run=<dir> label=0 guidance=classifier guidance.run=<this run>")  # fmt: skip

    def log_probs(self, x: Tensor, t: Time) -> Tensor:
        """log p(k | x_t) of every class k in nats, shape (batch, num_classes)."""
        return self.raw(x, t).log_softmax(1)

    def log_prob(self, x: Tensor, t: Time, label: Tensor) -> Tensor:
        """log p(label | x_t) in nats, shape (batch,), for labels (batch,) of 0 to num_classes - 1.

        Raises:
            ValueError: the labels are not integers of shape (batch,).
        """
        check_labels(label, x.shape[:1])
        return torch.take_along_dim(self.log_probs(x, t), label[:, None], 1)[:, 0]

"""A residual multilayer perceptron F(x, c_noise, label, context) for vectors; it flattens events of any other shape.

    h_0 = A x + C ((1 + g(e)) sin(W x + w)),    h_{i+1} = h_i + V_i SiLU(U_i ((1 + s_i(e)) LayerNorm(h_i) + b_i(e))),
    F = B h_depth

e = e(c_noise, label, context) is the embedding; g, s_i and b_i are linear in it; B, g and every V_i start at zero. The sine
features of x let the network learn edges and narrow modes early (Tancik et al. 2020, https://arxiv.org/abs/2006.10739). W is
learnt too, and g can fade the features at noise levels that hide such detail. The output is linear in h rather than in
LayerNorm(h), which would keep little but the direction of x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from score_sde.networks.embedding import Embedding, check_shape, context_of, positive, zeroed

__all__ = ["MLP"]


class MLP(nn.Module):
    """Residual MLP: x (batch, *event_shape), c_noise (batch,), label (batch,) or None -> (batch, *event_shape).

    Args:
        event_shape: shape of one sample.
        width, depth: features of a hidden layer, and number of residual blocks.
        frequencies: of the noise level's embedding.
        num_classes: of labels, None for none.
        learned_variance: the output has twice the channels (the first event dimension); the second half is the variance of
            a reverse step (see `LearnedScore`).
        context_width: takes a context (batch, context_width), e.g. parameters or observations on which the law of x
            depends, NaN for a sample without; of several tokens (batch, tokens, context_width) the embeddings are averaged.

    Raises:
        ValueError: a size is not positive; in a call, x or the context has another shape.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        width: int = 128,
        depth: int = 4,
        frequencies: int = 32,
        num_classes: int | None = None,
        learned_variance: bool = False,
        context_width: int | None = None,
    ) -> None:
        super().__init__()
        self.event_shape, self.num_classes, self.learned_variance = tuple(event_shape), num_classes, learned_variance
        features = math.prod(self.event_shape)
        positive(width=width, depth=depth, features=features)
        self.embedding = Embedding(width, frequencies, num_classes)
        self.null_context = None if context_width is None else nn.Parameter(torch.zeros(1, context_width))
        self.context = None if context_width is None else nn.Sequential(
            nn.Linear(context_width, width), nn.SiLU(), nn.Linear(width, width))  # fmt: skip
        self.first = Waves(features, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        out = 2 * features if learned_variance else features
        self.last = zeroed(nn.Linear(width, out))

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        check_shape(x, self.event_shape)
        embedded, tokens = self.embedding(c_noise, label), context_of(context, self.null_context, len(x))
        if self.context is not None and tokens is not None:
            embedded = embedded + self.context(tokens).mean(1)
        h = self.first(x.flatten(1), embedded)
        for block in self.blocks:
            h = block(h, embedded)
        return self.last(h).unflatten(1, (-1, *self.event_shape[1:]))


class Waves(nn.Module):
    """A x + C ((1 + g(e)) sin(W x + w)) for x (batch, features) and e (batch, width); shape (batch, width).

    The rows of W start in random directions, with 1/10 to 1 periods per standard deviation of x.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, width)
        self.wave = nn.Linear(features, width)
        self.gain = zeroed(nn.Linear(width, width))
        self.out = nn.Linear(width, width, bias=False)
        waves = torch.logspace(-1, 0, width) * (2 * math.pi / math.sqrt(features))
        nn.init.normal_(self.wave.weight).data.mul_(waves[:, None])
        nn.init.uniform_(self.wave.bias, -math.pi, math.pi)

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        return self.linear(x) + self.out((1 + self.gain(embedded)) * self.wave(x).sin())


class ResidualBlock(nn.Module):
    """h + V SiLU(U ((1 + s(e)) LayerNorm(h) + b(e))), of constant width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(width, 2 * width)
        self.branch = nn.Sequential(nn.Linear(width, width), nn.SiLU(), zeroed(nn.Linear(width, width)))

    def forward(self, h: Tensor, embedded: Tensor) -> Tensor:
        scale, shift = self.modulation(embedded).chunk(2, dim=1)
        return h + self.branch(torch.addcmul(shift, 1 + scale, self.norm(h)))

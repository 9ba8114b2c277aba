"""A diffusion transformer F(x, c_noise, label, context, augment) over patches of signals, images and video.

    h_0 = A patches(x) + positions,    h <- h + g_1 Attention(n_1(h)),    h <- h + g_2 MLP(n_2(h)),
    n_i(h) = (1 + s_i) LayerNorm(h) + b_i,    F = unpatch(B n(h)),    (s, b, g) linear in the embedding e, 0 at first

"adaLN-Zero": every block starts as the identity, and F at 0. Positions are fixed sines and cosines of each coordinate.
Peebles & Xie 2023, https://arxiv.org/abs/2212.09748; tokens of a context join by cross-attention, as in Chen et al. 2024
(PixArt-alpha, https://arxiv.org/abs/2310.00426).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from score_sde.checks import one_of
from score_sde.networks.blocks import attend, caller, glorot
from score_sde.networks.dropout import Dropout
from score_sde.networks.embedding import Embedding, check_shape, context_of, grid_shape, positive, zeroed

__all__ = ["SIZES", "DiT", "patches", "positions", "unpatched"]

# Peebles & Xie, table 1.
SIZES: dict[str, dict[str, Any]] = {
    "s": {"depth": 12, "width": 384, "heads": 6},
    "b": {"depth": 12, "width": 768, "heads": 12},
    "l": {"depth": 24, "width": 1024, "heads": 16},
    "xl": {"depth": 28, "width": 1152, "heads": 16},
}


class DiT(nn.Module):
    """DiT: x (batch, channels, *sides), c_noise (batch,) and conditions by name -> the shape of x.

    Conditions: label (batch,), -1 for none; context (batch, tokens, context_width), NaN for none; augment (batch,
    augment_width), 0 for none.

    Args:
        event_shape: (channels, length), (channels, height, width) or (channels, frames, height, width).
        patch: side of a patch, or one for each axis.
        width, depth, heads: channels of a token, blocks, attention heads.
        frequencies: of the noise level's embedding.
        num_classes: of labels.
        dropout: on the outputs of attention and MLP.
        context_width: of tokens that every block also attends to.
        augment_width: of augmentation labels, 9 for Karras et al.'s.
        learned_variance: the output has twice the channels (see `LearnedScore`).
        checkpointing: in training, keep only each block's input and compute the block again in the backward pass.

    Raises:
        ValueError: a side is not a multiple of its patch, or the width not a multiple of the heads.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        patch: int | Sequence[int] = 2,
        width: int = 384,
        depth: int = 12,
        heads: int = 6,
        frequencies: int = 128,
        num_classes: int | None = None,
        dropout: float = 0.0,
        *,
        context_width: int | None = None,
        augment_width: int | None = None,
        learned_variance: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        positive(width=width, depth=depth, heads=heads)
        self.event_shape, self.num_classes = tuple(event_shape), num_classes
        self.learned_variance, self.checkpointing = learned_variance, checkpointing
        sides = len(self.event_shape) - 1
        self.patch = (patch,) * max(sides, 1) if isinstance(patch, int) else tuple(patch)
        positive(**{f"patch[{i}]": side for i, side in enumerate(self.patch)})
        if len(self.patch) != sides and sides > 0:
            raise ValueError(f"patch={list(self.patch)} must have one side for each axis of {list(event_shape)[1:]}")
        channels, *grid = grid_shape(self.event_shape, multiple=self.patch)
        if width % heads:
            raise ValueError(f"width={width} must be a multiple of heads={heads}: change one of them")
        volume, outward = math.prod(self.patch), 2 * channels if learned_variance else channels
        self.embedding = Embedding(width, frequencies, num_classes, augment_width=augment_width)
        self.first = nn.Linear(channels * volume, width)
        where = positions([side // p for side, p in zip(grid, self.patch, strict=True)], width)
        self.register_buffer("positions", where, persistent=False)
        self.blocks = nn.ModuleList(DiTBlock(width, heads, dropout, context_width) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = zeroed(nn.Linear(width, 2 * width))
        self.last = zeroed(nn.Linear(width, outward * volume))
        self.null_context = None if context_width is None else nn.Parameter(torch.randn(1, context_width))
        glorot(self)

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        label: Tensor | None = None,
        context: Tensor | None = None,
        augment: Tensor | None = None,
    ) -> Tensor:
        check_shape(x, self.event_shape)
        embedded = self.embedding(c_noise, label, augment)
        context = context_of(context, self.null_context, len(x))
        h = self.first(patches(x, self.patch)) + self.positions
        run = caller(self)
        for block in self.blocks:
            h = run(block, h, embedded, context)
        scale, shift = self.modulation(embedded)[:, None].chunk(2, dim=-1)
        return unpatched(self.last(self.norm(h) * (1 + scale) + shift), self.patch, self.event_shape[1:])

    @classmethod
    def preset(cls, event_shape: Sequence[int], size: str = "b", patch: int | Sequence[int] = 2, **changes: Any) -> DiT:
        """DiT-S, B, L or XL of a patch size: 33 M, 130 M, 458 M or 675 M parameters (Peebles & Xie 2023, table 4).

        `changes` are other arguments of `DiT`; one that is None keeps the value of the size.
        """
        given = {name: value for name, value in changes.items() if value is not None}
        return cls(event_shape, patch, **{**SIZES[one_of("size", size, SIZES)], **given})


class DiTBlock(nn.Module):
    """Self-attention, cross-attention if there is a context, and an MLP of four times the width."""

    def __init__(self, width: int, heads: int, dropout: float, context_width: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = zeroed(nn.Linear(width, 6 * width))
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Sequential(nn.Linear(width, width), Dropout(dropout))
        self.query = self.keys_values = self.cross = None
        if context_width is not None:
            self.query, self.keys_values = nn.Linear(width, width), nn.Linear(context_width, 2 * width)
            self.cross = zeroed(nn.Linear(width, width))
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width), Dropout(dropout)
        )

    def forward(self, h: Tensor, embedded: Tensor, context: Tensor | None = None) -> Tensor:
        scale, shift, gate, mlp_scale, mlp_shift, mlp_gate = self.modulation(embedded)[:, None].chunk(6, dim=-1)
        attended = self._attend(*self.qkv(self.norm(h) * (1 + scale) + shift).chunk(3, dim=-1))
        h = h + gate * self.project(attended)
        if self.query is not None and self.keys_values is not None and self.cross is not None and context is not None:
            h = h + self.cross(self._attend(self.query(self.norm(h)), *self.keys_values(context).chunk(2, dim=-1)))
        return h + mlp_gate * self.mlp(self.norm(h) * (1 + mlp_scale) + mlp_shift)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.heads).transpose(1, 2)


def patches(x: Tensor, patch: Sequence[int]) -> Tensor:
    """(batch, channels, *sides) -> (batch, tokens, channels * volume), the patches in row-major order."""
    dims = len(patch)
    for axis, side in enumerate(patch):
        x = x.unflatten(2 + 2 * axis, (-1, side))  # (batch, channels, n_1, p_1, n_2, p_2, ...)
    order = [0, *(2 + 2 * i for i in range(dims)), 1, *(3 + 2 * i for i in range(dims))]
    return x.permute(order).flatten(1, dims).flatten(2)


def unpatched(tokens: Tensor, patch: Sequence[int], sides: Sequence[int]) -> Tensor:
    """The inverse of `patches`: (batch, tokens, channels * volume) -> (batch, channels, *sides)."""
    dims = len(patch)
    counts = [side // p for side, p in zip(sides, patch, strict=True)]
    x = tokens.unflatten(2, (-1, *patch)).unflatten(1, counts)  # (batch, n_1, ..., channels, p_1, ...)
    order = [0, 1 + dims, *(i for axis in range(dims) for i in (1 + axis, 2 + dims + axis))]
    return x.permute(order).reshape(len(tokens), -1, *sides)


def positions(counts: Sequence[int], width: int) -> Tensor:
    """(tokens, width): sin and cos of each coordinate times 10000^(-k / n), k < n = width // (2 axes), padded with zeros."""
    n = width // (2 * len(counts))
    frequencies = 10_000 ** (-torch.arange(n) / max(n, 1))
    coordinates = torch.cartesian_prod(*(torch.arange(count) for count in counts)).reshape(-1, len(counts))
    phase = (coordinates[:, :, None] * frequencies).flatten(1)
    waves = torch.cat([phase.sin(), phase.cos()], dim=1)
    return nn.functional.pad(waves, (0, width - waves.shape[1]))

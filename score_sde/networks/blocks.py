"""The parts of U-Nets of the DDPM family, for grids of one, two or three dimensions.

    block:      (V dropout(SiLU(norm(U SiLU(norm(x)), e))) + P x) r,    r = 1, or 1/sqrt 2 with `rescale`
    norm(h, e): (1 + s(e)) GroupNorm(h) + b(e)  ("scale_shift"),    GroupNorm(h + b(e))  ("shift")
    attention:  (x + W softmax(Q K^T / sqrt d) V) r over the points of the grid, or over the tokens of a context

U, V and W are convolutions, P is the identity or a 1-wide convolution, e the embedding of noise level and conditions. A
block that halves or doubles the grid does so before U, and before P. V and W start at zero.
Ho et al. 2020, arXiv:2006.11239; Song et al. 2021, arXiv:2011.13456; Dhariwal & Nichol 2021, arXiv:2105.05233.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from score_sde.checks import one_of
from score_sde.networks.dropout import Dropout
from score_sde.networks.embedding import zeroed
from score_sde.networks.resample import BlurredConv, Double, Halve, conv

__all__ = ["Attention", "Block", "CrossAttention", "Head", "PyramidIn", "PyramidOut", "Resample", "Style", "attend"]


@dataclass(frozen=True)
class Style:
    """Options that all parts of one network share; `UNet` explains them.

    Raises ValueError for an option outside its range.
    """

    dims: int
    embedding: int
    dropout: float = 0.0
    modulation: str = "scale_shift"
    resample: str = "conv"
    filter: Sequence[int] = (1, 1)
    project_skip: bool = False
    rescale: bool = False
    head_channels: int | None = 32
    norm_groups: int | None = None
    epsilon: float = 1e-5
    context_width: int | None = None

    def __post_init__(self) -> None:
        one_of("modulation", self.modulation, ("scale_shift", "shift"))
        one_of("resample", self.resample, ("conv", "strided", "residual"))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be a probability below 1")
        if tuple(self.filter) != (1, 1) and self.resample == "strided":
            raise ValueError("resample='strided' has no filter: give filter=[1, 1], or resample='residual'")

    @property
    def gain(self) -> float:
        """The factor r of the sum of a residual branch and its skip connection."""
        return math.sqrt(0.5) if self.rescale else 1.0

    def norm(self, channels: int, affine: bool = True) -> nn.GroupNorm:
        """GroupNorm with about 8 channels per group, or with `norm_groups` groups of at least 4 channels."""
        most = channels // 8 if self.norm_groups is None else min(self.norm_groups, channels // 4)
        count = divisor(channels, most)
        return nn.GroupNorm(count, channels, eps=self.epsilon, affine=affine)

    def heads(self, channels: int) -> int:
        """The number of attention heads, of about `head_channels` each."""
        return 1 if self.head_channels is None else divisor(channels, channels // self.head_channels)

    def conv(self, inward: int, outward: int, size: int = 3) -> nn.Module:
        return conv(self.dims, inward, outward, size)

    def scaling(self, scale: float | None) -> list[nn.Module]:
        """The module that halves (0.5) or doubles (2) the grid, in a list; an empty list for None."""
        return [] if scale is None else [(Halve if scale < 1 else Double)(self.dims, self.filter)]


class Block(nn.Module):
    """A residual block, followed by attention if `attends`; with `scale` 0.5 or 2 it halves or doubles the grid."""

    def __init__(
        self, inward: int, outward: int, style: Style, attends: bool = False, scale: float | None = None
    ) -> None:
        super().__init__()
        self.style, self.scale = style, scale
        self.scaling = nn.Sequential(*style.scaling(scale))
        self.begin = nn.Sequential(style.norm(inward), nn.SiLU(), *self.scaling, style.conv(inward, outward))
        adaptive = style.modulation == "scale_shift"
        self.norm = style.norm(outward, affine=not adaptive)
        self.modulation = nn.Linear(style.embedding, 2 * outward if adaptive else outward)
        self.end = nn.Sequential(nn.SiLU(), Dropout(style.dropout), zeroed(style.conv(outward, outward)))
        same = inward == outward and not (style.project_skip and scale is not None)
        self.skip = nn.Identity() if same else style.conv(inward, outward, size=1)
        self.attention = Attention(outward, style) if attends else None
        self.cross = CrossAttention(outward, style) if attends and style.context_width else None

    def forward(self, x: Tensor, embedded: Tensor, context: Tensor | None = None) -> Tensor:
        modulation = self.modulation(embedded)[(..., *[None] * self.style.dims)]
        h = self.begin(x)
        if self.style.modulation == "scale_shift":
            scale, shift = modulation.chunk(2, dim=1)
            h = self.norm(h) * (1 + scale) + shift
        else:
            h = self.norm(h + modulation)
        h = rescaled(self.skip(self.scaling(x)) + self.end(h), self.style)
        if self.attention is not None:
            h = self.attention(h)
        return h if self.cross is None or context is None else self.cross(h, context)


class Attention(nn.Module):
    """(x + W softmax(Q K^T / sqrt d) V) r over the points of the grid, with d channels per head."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        self.style, self.heads = style, style.heads(channels)
        self.norm = style.norm(channels)
        self.qkv = style.conv(channels, 3 * channels, size=1)
        self.project = zeroed(style.conv(channels, channels, size=1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        return rescaled(x + self.project(attend(q, k, v, self.heads).reshape(x.shape)), self.style)


class CrossAttention(nn.Module):
    """Attention to the tokens of a context, (batch, tokens, context_width): its keys and values are linear in them."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        assert style.context_width is not None
        self.style, self.heads = style, style.heads(channels)
        self.norm = style.norm(channels)
        self.query = style.conv(channels, channels, size=1)
        self.keys_values = nn.Linear(style.context_width, 2 * channels)
        self.project = zeroed(style.conv(channels, channels, size=1))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.query(self.norm(x)).flatten(2)
        k, v = self.keys_values(context).transpose(1, 2).chunk(2, dim=1)
        return rescaled(x + self.project(attend(q, k, v, self.heads).reshape(x.shape)), self.style)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(Q K^T / sqrt d) V in `heads` heads: q (batch, heads d, n), k and v (batch, heads d, m) -> like q."""
    q, k, v = (part.unflatten(1, (heads, -1)).transpose(-1, -2) for part in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)


def twice_differentiable() -> AbstractContextManager[None]:
    """Context for a derivative: if autograd is on, attention uses the one kernel that can be differentiated twice."""
    return sdpa_kernel(SDPBackend.MATH) if torch.is_grad_enabled() else nullcontext()


class Resample(nn.Module):
    """Halves or doubles the grid, then a 3-wide convolution; "strided" halves by the convolution's stride."""

    def __init__(self, channels: int, style: Style, scale: float) -> None:
        super().__init__()
        self.scale, self.style = scale, style
        self.strided = style.resample == "strided" and scale < 1
        self.scaling = nn.Sequential(*style.scaling(scale))
        options = {"stride": 2, "padding": 0} if self.strided else {}
        self.conv = conv(style.dims, channels, channels, **options)

    def forward(self, x: Tensor, embedded: Tensor, context: Tensor | None = None) -> Tensor:
        # As DDPM does (TensorFlow's "same"), pads only the far end of each side.
        return self.conv(pad(x, (0, 1) * self.style.dims) if self.strided else self.scaling(x))


class PyramidIn(nn.Module):
    """Progressive input: adds the halved input x to h. "skip": h + conv(x), x is kept; "residual": (x + h) r becomes both."""

    def __init__(self, kind: str, inward: int, channels: int, style: Style) -> None:
        super().__init__()
        self.kind, self.style = kind, style
        self.shrink: nn.Module
        if kind == "skip":
            self.shrink, self.conv = nn.Sequential(*style.scaling(0.5)), style.conv(inward, channels, size=1)
        else:
            self.shrink = BlurredConv(style.dims, inward, channels, style.filter)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        x = self.shrink(x)
        if self.kind == "skip":
            return x, self.conv(x) + h
        h = rescaled(x + h, self.style)
        return h, h


class PyramidOut(nn.Module):
    """Progressive output: y = up(y) + head(h) ("skip"), or h = y = (conv(up(y)) + h) r ("residual"); first y = head(h)."""

    def __init__(self, kind: str, channels: int, outward: int, previous: int | None, style: Style) -> None:
        super().__init__()
        self.kind, self.style, self.first = kind, style, previous is None
        self.grow = nn.Sequential(*style.scaling(None if previous is None else 2.0))
        self.head: nn.Module = Head(channels, outward if kind == "skip" else channels, style, zero=kind == "skip")
        if kind == "residual" and previous is not None:
            self.head = style.conv(previous, channels)

    def forward(self, y: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
        if y is None:
            return self.head(h), h
        if self.kind == "skip":
            return self.grow(y) + self.head(h), h
        h = rescaled(self.head(self.grow(y)) + h, self.style)
        return h, h


class Head(nn.Sequential):
    """conv(SiLU(GroupNorm(h))), the output layer; the convolution starts at zero if `zero`."""

    def __init__(self, channels: int, outward: int, style: Style, zero: bool = True) -> None:
        last = style.conv(channels, outward)
        super().__init__(style.norm(channels), nn.SiLU(), zeroed(last) if zero else last)


def rescaled(x: Tensor, style: Style) -> Tensor:
    """x times the factor r of `style`."""
    return x * style.gain if style.rescale else x


def divisor(number: int, most: int) -> int:
    """The greatest divisor of `number` that is at most `most` (1 for `most` below 1)."""
    return next(count for count in range(max(most, 1), 0, -1) if number % count == 0)


def caller(network: nn.Module) -> Callable[..., Tensor]:
    """(layer, *inputs) -> layer(*inputs); in training with `checkpointing`, it recomputes the layer in the backward pass."""
    if network.checkpointing and network.training and torch.is_grad_enabled():
        return partial(checkpoint, use_reentrant=False)
    return lambda layer, *inputs: layer(*inputs)


def glorot(network: nn.Module) -> None:
    """Initialises as DDPM does, by Glorot's uniform weights and zero biases, all layers that do not start at zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) and bool(_nonzero(module.weight)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _nonzero(weight: Tensor) -> bool:
    """Whether a weight is not all zero; False on the meta device, whose weights have no values."""
    return not weight.is_meta and bool(torch.count_nonzero(weight))

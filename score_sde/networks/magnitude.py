"""The parts of EDM2's magnitude-preserving U-Net: activations keep unit variance by construction.

    conv:    x * w / |w|,                     with the filter of every output channel at unit norm
    silu:    SiLU(x) / 0.596,                 sum_t(a, b) = ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2)
    block:   sum_0.3(x, V SiLU((1 + g s(e)) U SiLU(x))),       attention: sum_0.3(x, W softmax(Q K^T / sqrt d) V)

On the way down, a block first scales each point's vector of channels to unit root mean square. Weights stay on the
sphere: in training, each use writes them back normalised, so that the learning rate alone sets how fast they turn.
Karras et al. 2024, https://arxiv.org/abs/2312.02696, sections 2.2 to 2.5 and appendix B.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, conv2d, conv3d, linear, silu

from score_sde.copies import outside_transforms
from score_sde.networks.blocks import Style, attend
from score_sde.networks.dropout import Dropout
from score_sde.networks.embedding import check_augment, rows

__all__ = [
    "MPBlock",
    "MPConcatenate",
    "MPConv",
    "MPEmbedding",
    "MPInput",
    "MPOutput",
    "mp_silu",
    "mp_sum",
    "on_sphere",
    "unit",
]

# The largest magnitude of an activation, as in EDM2: only outliers in half precision come near it.
CLIP = 256.0


def unit(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """x over its root mean square along `dim`."""
    norm = torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return x / (1e-4 + norm * math.sqrt(norm.numel() / x.numel())).to(x.dtype)


def on_sphere(weight: Tensor) -> Tensor:
    """A weight (outward, ...) with filters of unit root mean square."""
    return unit(weight, tuple(range(1, weight.ndim)))


def mp_silu(x: Tensor) -> Tensor:
    """SiLU(x) / 0.596, the root mean square of SiLU(x) for x ~ N(0, 1)."""
    return silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float = 0.5) -> Tensor:
    """((1 - t) a + t b) / sqrt((1 - t)^2 + t^2), of unit variance for independent a and b of unit variance."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


class MPConv(nn.Module):
    """A convolution over `dims` dimensions, a linear layer for dims = 0, with filters of unit norm and no bias."""

    def __init__(self, dims: int, inward: int, outward: int, size: int = 3) -> None:
        super().__init__()
        self.dims, self.padding = dims, size // 2
        self.weight = nn.Parameter(torch.randn(outward, inward, *[size] * dims))

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        w = self.normalised() * (gain / math.sqrt(self.weight[0].numel()))
        if self.dims == 0:
            return linear(x, w.to(x.dtype))
        return (conv1d, conv2d, conv3d)[self.dims - 1](x, w.to(x.dtype), padding=self.padding)

    def normalised(self) -> Tensor:
        """The weight with filters of unit root mean square; in training, also written back to the parameter."""
        if self.training and torch.is_grad_enabled():
            # Writing through `.data` does not invalidate a graph that still waits for its backward pass (the weight is equal
            # up to rounding), and inside torch.func's transforms nothing captured can be written. The compiler knows neither.
            plain = torch.compiler.is_compiling()
            with torch.no_grad(), nullcontext() if plain else outside_transforms():
                weight = self.weight if plain else self.weight.data
                weight.copy_(on_sphere(weight))
        return on_sphere(self.weight)


class MPEmbedding(nn.Module):
    """SiLU(sum_1/2(N f, E_y)) with features f_k = sqrt 2 cos(w_k c_noise + phase_k), w_k = 2 pi N(0, 1), drawn once.

    The null class has E_y = 0; augmentation labels are added with a gain that starts at zero.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self, width: int, frequencies: int, num_classes: int | None, augment_width: int | None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(frequencies))
        self.register_buffer("phases", 2 * math.pi * torch.rand(frequencies))
        self.noise = MPConv(0, frequencies, width)
        self.label = None if num_classes is None else MPConv(0, num_classes, width)
        self.augment = None if augment_width is None else MPConv(0, augment_width, width)
        self.gain = None if augment_width is None else nn.Parameter(torch.zeros(()))

    def forward(self, c_noise: Tensor, label: Tensor | None = None, augment: Tensor | None = None) -> Tensor:
        dtype = self.frequencies.dtype
        phase = c_noise.to(torch.promote_types(dtype, torch.float32))[:, None] * self.frequencies + self.phases
        embedded = self.noise(math.sqrt(2) * phase.cos().to(dtype))
        row = rows(label, c_noise, self.num_classes)
        if self.label is not None and row is not None:
            # The column of the null class is cut off: it becomes a vector of zeros.
            which = nn.functional.one_hot(row, self.num_classes + 1)[:, :-1].to(embedded)  # type: ignore[operator]
            embedded = mp_sum(embedded, self.label(which * math.sqrt(which.shape[1])))
        if augment is not None:
            embedded = embedded + check_augment(self.augment, augment)(augment, gain=self.gain)
        return mp_silu(embedded)


class MPInput(MPConv):
    """The first convolution, with a channel of ones as further input in place of a bias."""

    def __init__(self, dims: int, inward: int, outward: int) -> None:
        super().__init__(dims, inward + 1, outward)

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        return super().forward(torch.cat([x, torch.ones_like(x[:, :1])], dim=1), gain)


class MPOutput(MPConv):
    """The last convolution, times a gain that starts at zero."""

    def __init__(self, dims: int, inward: int, outward: int) -> None:
        super().__init__(dims, inward, outward)
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, gain: float | Tensor = 1.0) -> Tensor:
        return super().forward(x, self.gain)


class MPConcatenate(nn.Module):
    """[a, b] with weights that give both the same share of the variance, whatever their widths (eq. 103)."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        of_a, of_b = a.shape[1], b.shape[1]
        total = math.sqrt((of_a + of_b) / 2)
        return torch.cat([total / math.sqrt(of_a) * a, total / math.sqrt(of_b) * b], dim=1)


class MPBlock(nn.Module):
    """A residual block; with `decoder`, points are not scaled, and x is projected for the skip connection only."""

    def __init__(
        self, inward: int, outward: int, style: Style, attends: bool = False, scale: float | None = None,
        decoder: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.style, self.scale, self.decoder = style, scale, decoder
        self.scaling = nn.Sequential(*style.scaling(scale))
        self.skip = nn.Identity() if inward == outward else MPConv(style.dims, inward, outward, size=1)
        self.begin = MPConv(style.dims, inward if decoder else outward, outward)
        self.modulation, self.gain = MPConv(0, style.embedding, outward), nn.Parameter(torch.zeros(()))
        self.dropout, self.end = Dropout(style.dropout), MPConv(style.dims, outward, outward)
        self.attention = MPAttention(outward, style) if attends else None
        self.cross = MPCrossAttention(outward, style) if attends and style.context_width else None

    def forward(self, x: Tensor, embedded: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.scaling(x)
        if not self.decoder:
            x = unit(self.skip(x), dim=1)
        modulation = 1 + self.modulation(embedded, gain=self.gain)[(..., *[None] * self.style.dims)]
        h = self.end(self.dropout(mp_silu(self.begin(mp_silu(x)) * modulation.to(x.dtype))))
        x = mp_sum(self.skip(x) if self.decoder else x, h, t=0.3)
        if self.attention is not None:
            x = self.attention(x)
        if self.cross is not None and context is not None:
            x = self.cross(x, context)
        return x.clamp(-CLIP, CLIP)


class MPAttention(nn.Module):
    """sum_0.3(x, W softmax(Q K^T / sqrt d) V) with every vector q, k, v of unit root mean square: cosine attention."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        self.heads = style.heads(channels)
        self.qkv = MPConv(style.dims, channels, 3 * channels, size=1)
        self.project = MPConv(style.dims, channels, channels, size=1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).chunk(3, dim=1)
        return mp_sum(x, self.project(_cosine(q, k, v, self.heads).reshape(x.shape)), t=0.3)


class MPCrossAttention(nn.Module):
    """Cosine attention to the tokens of a context, x + g W softmax(Q K^T / sqrt d) V; the gain g starts at zero."""

    def __init__(self, channels: int, style: Style) -> None:
        super().__init__()
        assert style.context_width is not None
        self.heads = style.heads(channels)
        self.query = MPConv(style.dims, channels, channels, size=1)
        self.keys_values = MPConv(0, style.context_width, 2 * channels)
        self.project, self.gain = MPConv(style.dims, channels, channels, size=1), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        k, v = self.keys_values(context).transpose(1, 2).chunk(2, dim=1)
        attended = _cosine(self.query(x).flatten(2), k, v, self.heads).reshape(x.shape)
        return x + self.project(attended, gain=self.gain)


def _cosine(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """`attend` with every head's vectors q, k, v scaled to unit root mean square."""
    q, k, v = (unit(part.unflatten(1, (heads, -1)), dim=2).flatten(1, 2) for part in (q, k, v))
    return attend(q, k, v, heads)

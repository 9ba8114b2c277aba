"""One U-Net F(x, c_noise, label, context, augment) for signals, images and video, with the published ones as presets.

Level i works at size / 2^i with width * multipliers[i] channels. It has `blocks` residual blocks on the way down and one
more on the way up, each of which also reads the output of its counterpart on the way down; two blocks stand between.
`networks.blocks` has the formulas of the parts, `networks.magnitude` those of the magnitude-preserving ones. The output
starts at 0.

Presets: `ddpm` (Ho et al. 2020, arXiv:2006.11239), `ddpmpp` and `ncsnpp` (Song et al. 2021, arXiv:2011.13456),
`adm` (Dhariwal & Nichol 2021, arXiv:2105.05233), `edm2` (Karras et al. 2024, arXiv:2312.02696).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from score_sde.checks import one_of
from score_sde.networks.blocks import Block, Head, PyramidIn, PyramidOut, Resample, Style, caller
from score_sde.networks.blocks import glorot as glorot_weights
from score_sde.networks.embedding import Embedding, check_attention, check_shape, context_of, grid_shape, positive
from score_sde.networks.magnitude import MPBlock, MPConcatenate, MPEmbedding, MPInput, MPOutput

__all__ = ["EDM2_WIDTHS", "UNet"]

EDM2_WIDTHS = {"xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}
PYRAMIDS = (None, "skip", "residual")


class UNet(nn.Module):
    """U-Net: x (batch, channels, *sides), c_noise (batch,) and conditions by name -> the shape of x.

    Conditions: label (batch,), -1 for none; context (batch, tokens, context_width), NaN for none; augment (batch,
    augment_width), 0 for none.

    Args:
        event_shape: (channels, length), (channels, height, width) or (channels, frames, height, width).
        width, multipliers, blocks: channels of the first level, factors of the levels, blocks per level.
        attention: heights of the grid (lengths of a signal) at which blocks have attention.
        dropout: within each block.
        frequencies: of the noise level's embedding.
        num_classes: of labels.
        embedding: the frequencies' kind, "waves", "positional" (DDPM) or "fourier" (NCSN++); see `networks.embedding`.
        modulation: how the embedding enters a block, "scale_shift" (ADM) or "shift" (DDPM); see `networks.blocks`.
        resample: "conv", "strided" (DDPM: halving by a convolution's stride) or "residual" (within a block: NCSN++).
        filter: the filter of resampling, [1, 1] or NCSN++'s [1, 3, 3, 1].
        project_skip: whether blocks that resample have a 1-wide convolution on the skip connection (NCSN++).
        rescale: divide sums of a residual branch and its skip connection by sqrt 2 (NCSN++).
        progressive_input, progressive_output: pyramids of input and output, None, "skip" or "residual" (NCSN++).
        head_channels: channels of an attention head, None for one head.
        attend_once: on the way up, a level has attention only after its last block (NCSN++), not after each.
        middle_attention: attention between the two middle blocks; if False, after each if `attention` has their height.
        norm_groups: groups of a normalisation, None for about 8 channels per group.
        epsilon: of a normalisation.
        glorot: initialise as DDPM does, instead of by torch's defaults.
        magnitude_preserving: use the parts of EDM2, which take no embedding, modulation, project_skip, rescale, norm_groups,
            epsilon, glorot or pyramids.
        context_width: of tokens that the blocks with attention also attend to.
        augment_width: of augmentation labels, 9 for Karras et al.'s.
        learned_variance: the output has twice the channels; the second half becomes the variance of a reverse step,
            w = (v + 1) / 2 (Nichol & Dhariwal 2021, eq. 15).
        checkpointing: in training, keep only each block's input and compute the block again in the backward pass.

    Raises:
        ValueError: the grid cannot be halved often enough, never has a height of `attention`, no block attends to the
            context, or options exclude each other.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        width: int = 32,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 2,
        attention: Sequence[int] = (),
        dropout: float = 0.0,
        frequencies: int = 32,
        num_classes: int | None = None,
        *,
        embedding: str = "waves",
        modulation: str = "scale_shift",
        resample: str = "conv",
        filter: Sequence[int] = (1, 1),
        project_skip: bool = False,
        rescale: bool = False,
        progressive_input: str | None = None,
        progressive_output: str | None = None,
        head_channels: int | None = 32,
        attend_once: bool = False,
        middle_attention: bool = False,
        norm_groups: int | None = None,
        epsilon: float = 1e-5,
        glorot: bool = False,
        magnitude_preserving: bool = False,
        context_width: int | None = None,
        augment_width: int | None = None,
        learned_variance: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        positive(width=width, blocks=blocks, levels=len(multipliers), head_channels=head_channels or 1,
                 norm_groups=norm_groups or 1, context_width=context_width or 1)  # fmt: skip
        channels, *sides = grid_shape(tuple(event_shape), multiple=2 ** (len(multipliers) - 1))
        side = sides[0] if len(sides) == 1 else sides[-2]
        sizes = [side >> level for level in range(len(multipliers))]
        check_attention(attention, sizes)
        if context_width is not None and not (attention or middle_attention):
            raise ValueError(f"context_width={context_width} does nothing where no block attends: give attention="
                             f"[{sizes[-1]}], of the heights {sizes}")  # fmt: skip
        _check_pyramids(progressive_input, progressive_output, magnitude_preserving, resample)
        if magnitude_preserving:
            _check_magnitude_preserving(embedding=embedding, modulation=modulation, project_skip=project_skip, rescale=rescale,
                                        norm_groups=norm_groups, epsilon=epsilon, glorot=glorot)  # fmt: skip
        self.event_shape, self.num_classes = tuple(event_shape), num_classes
        self.learned_variance, self.checkpointing = learned_variance, checkpointing
        outward = 2 * channels if learned_variance else channels
        style = Style(
            len(sides), 4 * width, dropout, modulation, resample, tuple(filter), project_skip, rescale, head_channels,
            norm_groups, epsilon, context_width,
        )  # fmt: skip
        parts = (_MagnitudePreservingParts if magnitude_preserving else _Parts)(style)
        levels = [(width * m, size in attention) for m, size in zip(multipliers, sizes, strict=True)]
        self.embedding = parts.embedding(frequencies, num_classes, embedding, augment_width)
        self.first, self.join = parts.first(channels, width), parts.join()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        # Pyramids, by the index of the layer of `down` or `up` that they follow.
        self.inward, self.outward = nn.ModuleDict(), nn.ModuleDict()
        skips = self._make_down(parts, levels, blocks, width, channels, progressive_input)
        h, attends = levels[-1]
        pair = (True, False) if middle_attention else (attends, attends)
        self.middle = nn.ModuleList(parts.block(h, h, attends, up=True) for attends in pair)
        self._make_up(parts, levels, blocks, skips, outward, progressive_output, attend_once)
        self.last = None if progressive_output == "skip" else parts.last(levels[0][0], outward)
        self.null_context = None if context_width is None else nn.Parameter(torch.randn(1, context_width))
        if glorot:
            glorot_weights(self)

    def _make_down(
        self, parts: _Parts, levels: Sequence[tuple[int, bool]], blocks: int, width: int, channels: int, pyramid: str | None
    ) -> list[int]:  # fmt: skip
        """Fills `down` and `inward`; returns the channels of the outputs that the way up reads."""
        h, source, skips = width, channels, [width]
        for level, (there, attends) in enumerate(levels):
            if level > 0:
                self.down.append(parts.resampling(h, 0.5))
                skips.append(h)
                if pyramid:
                    self.inward[str(len(self.down) - 1)] = PyramidIn(pyramid, source, h, parts.style)
                    source = h if pyramid == "residual" else channels
            for _ in range(blocks):
                self.down.append(parts.block(h, there, attends))
                h = there
                skips.append(h)
        return skips

    def _make_up(
        self, parts: _Parts, levels: Sequence[tuple[int, bool]], blocks: int, skips: list[int], channels: int,
        pyramid: str | None, attend_once: bool,
    ) -> None:  # fmt: skip
        """Fills `up` and `outward`."""
        h, before = levels[-1][0], None
        for level, (there, attends) in reversed(list(enumerate(levels))):
            for i in range(blocks + 1):
                self.up.append(
                    parts.block(h + skips.pop(), there, attends and (i == blocks or not attend_once), up=True)
                )
                h = there
            if pyramid:
                self.outward[str(len(self.up) - 1)] = PyramidOut(pyramid, h, channels, before, parts.style)
                before = h if pyramid == "residual" else channels
            if level > 0:
                self.up.append(parts.resampling(h, 2.0))

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
        run = caller(self)
        h, pyramid = self.first(x), x
        skips = [h]
        for i, layer in enumerate(self.down):
            h = run(layer, h, embedded, context)
            if str(i) in self.inward:
                pyramid, h = self.inward[str(i)](pyramid, h)
            skips.append(h)
        for layer in self.middle:
            h = run(layer, h, embedded, context)
        output: Tensor | None = None
        for i, layer in enumerate(self.up):
            h = run(layer, h if layer.scale else self.join(h, skips.pop()), embedded, context)
            if str(i) in self.outward:
                output, h = self.outward[str(i)](output, h)
        return output if self.last is None else self.last(h)  # type: ignore[return-value]

    @classmethod
    def ddpm(cls, event_shape: Sequence[int], **changes: Any) -> UNet:
        """DDPM's network for CIFAR-10, 35.7 M parameters (Ho et al. 2020, appendix B)."""
        return _preset(cls, event_shape, _DDPM | {"resample": "strided"}, changes)

    @classmethod
    def ddpmpp(cls, event_shape: Sequence[int], **changes: Any) -> UNet:
        """DDPM++ for CIFAR-10, 61.8 M parameters; blocks=8 is "deep" (Song et al. 2021, appendix H.2).

        EDM's variant, 55.7 M, has multipliers=(2, 2, 2) (Karras et al. 2022, table 7).
        """
        return _preset(cls, event_shape, _DDPM | _PLUS, changes)

    @classmethod
    def ncsnpp(cls, event_shape: Sequence[int], **changes: Any) -> UNet:
        """NCSN++ for CIFAR-10, 62.8 M parameters; blocks=8 is "deep" (Song et al. 2021, appendix H.2).

        EDM's variant, 56.4 M, has multipliers=(2, 2, 2) (Karras et al. 2022, table 7).
        """
        fourier = {"embedding": "fourier", "filter": (1, 3, 3, 1), "progressive_input": "residual"}
        return _preset(cls, event_shape, _DDPM | _PLUS | fourier, changes, features=1.0)

    @classmethod
    def adm(cls, event_shape: Sequence[int], **changes: Any) -> UNet:
        """ADM for ImageNet 64x64, 296 M parameters with its 1,000 classes (Dhariwal & Nichol 2021, table 12)."""
        return _preset(cls, event_shape, _ADM, changes)

    @classmethod
    def edm2(cls, event_shape: Sequence[int], size: str = "s", width: int | None = None, **changes: Any) -> UNet:
        """EDM2 of size xs to xxl, 125 M to 1.5 G parameters with 1,000 classes (Karras et al. 2024, table 2).

        `width` overrides that of the size.
        """
        one_of("size", size, EDM2_WIDTHS)
        usual = _EDM2 | {"width": EDM2_WIDTHS[size] if width is None else width}
        return _preset(cls, event_shape, usual, changes, features=1.0)


_DDPM: dict[str, Any] = {
    "width": 128, "multipliers": (1, 2, 2, 2), "blocks": 2, "attention": (16,), "dropout": 0.1,
    "embedding": "positional", "modulation": "shift", "head_channels": None, "middle_attention": True,
    "norm_groups": 32, "epsilon": 1e-6, "glorot": True,
}  # fmt: skip
_PLUS: dict[str, Any] = {
    "blocks": 4, "resample": "residual", "project_skip": True, "rescale": True, "attend_once": True
}  # fmt: skip
_ADM: dict[str, Any] = {
    "width": 192, "multipliers": (1, 2, 3, 4), "blocks": 3, "attention": (32, 16, 8), "dropout": 0.1,
    "embedding": "positional", "resample": "residual", "head_channels": 64, "middle_attention": True,
    "norm_groups": 32,
}  # fmt: skip
_EDM2: dict[str, Any] = {
    "multipliers": (1, 2, 3, 4), "blocks": 3, "attention": (16, 8), "resample": "residual", "head_channels": 64,
    "middle_attention": True, "magnitude_preserving": True,
}  # fmt: skip


def _preset(
    cls: type[UNet], event_shape: Sequence[int], preset: dict[str, Any], changes: dict[str, Any], features: float = 0.5
) -> UNet:
    """The preset with changes; the embedding has `features` frequencies per channel of the first level."""
    options = preset | changes
    options.setdefault("frequencies", max(int(features * options["width"]), 1))
    return cls(event_shape, **options)


@dataclass(frozen=True)
class _Parts:
    """Makes the parts of a network."""

    style: Style

    def embedding(self, frequencies: int, num_classes: int | None, kind: str, augment_width: int | None) -> nn.Module:
        return Embedding(self.style.embedding, frequencies, num_classes, kind, augment_width)

    def first(self, inward: int, outward: int) -> nn.Module:
        return self.style.conv(inward, outward)

    def block(
        self, here: int, there: int, attends: bool = False, scale: float | None = None, up: bool = False
    ) -> nn.Module:
        return Block(here, there, self.style, attends, scale)

    def resampling(self, channels: int, scale: float) -> nn.Module:
        if self.style.resample == "residual":
            return self.block(channels, channels, scale=scale, up=scale > 1)
        return Resample(channels, self.style, scale)

    def join(self) -> nn.Module:
        """Joins the way up with the outputs of the way down."""
        return Concatenate()

    def last(self, inward: int, outward: int) -> nn.Module:
        return Head(inward, outward, self.style)


class _MagnitudePreservingParts(_Parts):
    """Makes EDM2's parts."""

    def embedding(self, frequencies: int, num_classes: int | None, kind: str, augment_width: int | None) -> nn.Module:
        return MPEmbedding(self.style.embedding, frequencies, num_classes, augment_width)

    def first(self, inward: int, outward: int) -> nn.Module:
        return MPInput(self.style.dims, inward, outward)

    def block(
        self, here: int, there: int, attends: bool = False, scale: float | None = None, up: bool = False
    ) -> nn.Module:
        return MPBlock(here, there, self.style, attends, scale, decoder=up)

    def join(self) -> nn.Module:
        return MPConcatenate()

    def last(self, inward: int, outward: int) -> nn.Module:
        return MPOutput(self.style.dims, inward, outward)


class Concatenate(nn.Module):
    """[a, b] along the channels."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], dim=1)


def _check_pyramids(inward: str | None, outward: str | None, magnitude_preserving: bool, resample: str) -> None:
    for name, kind in (("progressive_input", inward), ("progressive_output", outward)):
        if kind not in PYRAMIDS:
            raise ValueError(f"{name}={kind!r} must be null, 'skip' or 'residual'")
        if kind and magnitude_preserving:
            raise ValueError(f"{name}={kind!r} does not preserve magnitudes: set it to null")
    if magnitude_preserving and resample != "residual":
        raise ValueError(f"resample={resample!r} does not preserve magnitudes: set resample='residual'")


def _check_magnitude_preserving(**options: Any) -> None:
    usual = inspect.signature(UNet.__init__).parameters
    idle = [name for name, value in options.items() if value != usual[name].default]
    if idle:
        raise ValueError(f"{idle[0]}={options[idle[0]]!r} does nothing with magnitude_preserving: leave it out")

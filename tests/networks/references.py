"""Weights that leave nothing silent, resampling by zeros and taps, and the forward pass of score_sde_pytorch, restated."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, group_norm, linear, pad, silu

from score_sde.networks.dropout import Dropout, keyed


def awake(network: nn.Module, seed: int = 1) -> nn.Module:
    """Noise added to every parameter, so that nothing is silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network


def upfirdn(x: Tensor, taps: Sequence[float], up: int, down: int, before: int, after: int) -> Tensor:
    """Zeros between the samples, zeros at the ends, convolution with the taps, every down-th sample: along each axis."""
    for axis in range(2, x.ndim):
        x = x.movedim(axis, -1)
        spread = torch.zeros(*x.shape[:-1], x.shape[-1] * up, dtype=x.dtype)
        spread[..., ::up] = x
        padded = torch.cat([x.new_zeros(*x.shape[:-1], before), spread, x.new_zeros(*x.shape[:-1], after)], -1)
        length = padded.shape[-1] - len(taps) + 1
        filtered = sum(tap * padded[..., len(taps) - 1 - j :][..., :length] for j, tap in enumerate(taps))
        x = filtered[..., ::down].movedim(-1, axis)
    return x


class Song:
    """score_sde_pytorch's network as a function of its layout.

    A name that is asked for the first time gets random weights: running it once writes a state dict in the layout's order.
    """

    def __init__(self, config, seed: int = 0) -> None:
        self.config, self.state = config, {}
        self.generator = torch.Generator().manual_seed(seed)

    def get(self, name: str, *shape: int) -> Tensor:
        key = f"module.all_modules.{self.n}.{name}"
        if key not in self.state:
            fan = math.prod(shape[1:]) if len(shape) > 1 else 4
            draw = torch.randn(shape, generator=self.generator, dtype=torch.float64) / math.sqrt(fan)
            self.state[key] = draw + 1 if "GroupNorm" in name and name.endswith("weight") else draw
        return self.state[key]

    def conv(self, x: Tensor, outward: int, name: str = "", size: int = 3, **options: int) -> Tensor:
        weight = self.get(f"{name}weight", outward, x.shape[1], size, size)
        return conv2d(x, weight, self.get(f"{name}bias", outward), **{"padding": size // 2, **options})

    def norm(self, x: Tensor, name: str = "") -> Tensor:
        channels = x.shape[1]
        weight, bias = self.get(f"{name}weight", channels), self.get(f"{name}bias", channels)
        return group_norm(x, min(channels // 4, 32), weight, bias, eps=1e-6)

    def nin(self, x: Tensor, outward: int, name: str) -> Tensor:
        W, b = self.get(f"{name}.W", x.shape[1], outward), self.get(f"{name}.b", outward)
        return torch.einsum("bihw,io->bohw", x, W) + b[:, None, None]

    def dense(self, x: Tensor, outward: int, name: str = "") -> Tensor:
        return linear(x, self.get(f"{name}weight", outward, x.shape[1]), self.get(f"{name}bias", outward))

    def resampled(self, x: Tensor, direction: str | None) -> Tensor:
        taps = self.config.fir_kernel if self.config.fir else (1, 1)
        taps = [tap / sum(taps) for tap in taps]
        p = len(taps) - 2
        if direction == "down":
            return upfirdn(x, taps, 1, 2, (p + 1) // 2, p // 2)
        if direction == "up":
            return upfirdn(x, [2 * tap for tap in taps], 2, 1, (p + 1) // 2 + 1, p // 2)
        return x

    def summed(self, x: Tensor, h: Tensor) -> Tensor:
        rescale = self.config.network == "ncsnpp" and self.config.skip_rescale
        return (x + h) / math.sqrt(2) if rescale else x + h

    def block(self, x: Tensor, temb: Tensor, outward: int | None = None, direction: str | None = None) -> Tensor:
        outward = outward or x.shape[1]
        h = self.resampled(silu(self.norm(x, "GroupNorm_0.")), direction)
        x = self.resampled(x, direction)
        h = self.conv(h, outward, "Conv_0.") + self.dense(silu(temb), outward, "Dense_0.")[:, :, None, None]
        h = self.conv(silu(self.norm(h, "GroupNorm_1.")), outward, "Conv_1.")
        if self.config.network == "ddpm":
            x = self.nin(x, outward, "NIN_0") if x.shape[1] != outward else x
        elif x.shape[1] != outward or direction:
            x = self.conv(x, outward, "Conv_2.", size=1)
        self.n += 1
        return self.summed(x, h)

    def attention(self, x: Tensor) -> Tensor:
        channels, h = x.shape[1], self.norm(x, "GroupNorm_0.")
        q, k, v = (self.nin(h, channels, f"NIN_{i}").flatten(2) for i in range(3))
        weights = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(channels)).softmax(-1)
        h = self.nin(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape), channels, "NIN_3")
        self.n += 1
        return self.summed(x, h)

    def layer(self, result: Tensor) -> Tensor:
        self.n += 1
        return result

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """The network's output before any division by sigma, for x in [-1, 1] and what the original is told."""
        c, self.n, plus = self.config, 0, self.config.network == "ncsnpp"
        if c.embedding_type == "fourier":
            key = "module.all_modules.0.W"
            if key not in self.state:
                self.state[key] = 16 * torch.randn(c.nf, generator=self.generator, dtype=torch.float64)
            phase = self.layer(labels.log()[:, None] * self.state[key] * 2 * math.pi)
        else:
            half = c.nf // 2
            phase = labels[:, None] * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1))).double()
        temb = self.layer(self.dense(torch.cat([phase.sin(), phase.cos()], 1), 4 * c.nf))
        temb = self.layer(self.dense(silu(temb), 4 * c.nf))
        pyramid, h = x, self.layer(self.conv(x, c.nf))
        skips, levels = [h], len(c.ch_mult)
        for level, mult in enumerate(c.ch_mult):
            for _ in range(c.num_res_blocks):
                h = self.block(h, temb, c.nf * mult)
                h = self.attention(h) if h.shape[-1] in c.attn_resolutions else h
                skips.append(h)
            if level < levels - 1:
                if plus:
                    h = self.block(h, temb, direction="down")
                else:
                    h = self.layer(self.conv(pad(h, (0, 1, 0, 1)), h.shape[1], "Conv_0.", stride=2, padding=0))
                if c.progressive_input == "input_skip":
                    pyramid = self.layer(self.resampled(pyramid, "down"))
                    h = self.layer(self.conv(pyramid, h.shape[1], "Conv.", size=1) + h)
                elif c.progressive_input == "residual":
                    taps = [tap / sum(c.fir_kernel) for tap in c.fir_kernel]
                    p = len(taps) - 2 + 2
                    blurred = upfirdn(pyramid, taps, 1, 1, (p + 1) // 2, p // 2)
                    pyramid = self.layer(self.conv(blurred, h.shape[1], "Conv2d_0.", stride=2, padding=0))
                    pyramid = h = self.summed(pyramid, h)
                skips.append(h)
        h = self.block(h, temb)
        h = self.block(self.attention(h), temb)
        output = None
        for level in reversed(range(levels)):
            for _ in range(c.num_res_blocks + 1):
                h = self.block(torch.cat([h, skips.pop()], 1), temb, c.nf * c.ch_mult[level])
            h = self.attention(h) if h.shape[-1] in c.attn_resolutions else h
            if c.progressive == "output_skip":
                if output is not None:
                    output = self.layer(self.resampled(output, "up"))
                head = self.layer(silu(self.norm(h)))
                head = self.layer(self.conv(head, x.shape[1]))
                output = head if output is None else output + head
            if level:
                if plus:
                    h = self.block(h, temb, direction="up")
                else:
                    h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
                    h = self.layer(self.conv(h, h.shape[1], "Conv_0."))
        if output is not None:
            return output
        h = self.layer(silu(self.norm(h)))
        return self.layer(self.conv(h, x.shape[1]))


def compiled_equals_eager(network: nn.Module, x: Tensor, c_noise: Tensor, **conditions: Tensor) -> None:
    """In one graph, without a break: outputs and gradients, the masks of dropout included; traced, not generated."""
    torch._dynamo.reset()
    layers = [module for module in network.modules() if isinstance(module, Dropout)]
    keys = torch.arange(len(layers) * len(x), dtype=torch.int32).view(len(layers), len(x))
    found = []
    for run in (network, torch.compile(network, backend="aot_eager", fullgraph=True)):
        network.zero_grad()
        with keyed(layers, keys):
            output = run(x, c_noise, **conditions)
            output.square().mean().backward()
        gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
        found.append((output.detach(), torch.cat(gradients)))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4 * eager.abs().max().item())

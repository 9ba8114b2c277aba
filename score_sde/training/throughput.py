"""How well a device is used: the floating-point operations of a training step over what the device could do in that time.

Model-FLOPs utilisation = examples per second * FLOPs of forward and backward for one example / peak FLOPs of all devices
(Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B), counting matrix products, convolutions and attention.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from score_sde.data import Batch
from score_sde.score import LearnedScore

__all__ = ["PEAKS", "flops_per_example", "peak_flops"]

# Peak TFLOP/s by NVIDIA's data sheets, without sparsity: 16-bit tensor cores, TF32 tensor cores, float32.
PEAKS = {
    "B200": (2250, 1125, 75),
    "H200": (989, 495, 67),
    "GH200": (989, 495, 67),
    "H100 PCIe": (756, 378, 51),
    "H100 NVL": (835, 418, 60),
    "H100": (989, 495, 67),
    "A100": (312, 156, 19.5),
    "L40S": (362, 183, 91.6),
    "L40": (181, 90.5, 90.5),
    "L4": (121, 60, 30.3),
    "A10": (125, 62.5, 31.2),
    "RTX 4090": (165, 82.6, 82.6),
    "V100": (125, 15.7, 15.7),
    "T4": (65, 8.1, 8.1),
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a device at a trainer's precision; None if `PEAKS` does not have it.

    "32-true" means TF32 if torch may use it, as it does for convolutions by default (`torch.backends.cudnn.allow_tf32`).
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = next((peaks for part, peaks in PEAKS.items() if re.search(rf"\b{part}\b", name)), None)
    if known is None:
        return None
    tf32 = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return 1e12 * (known[0] if precision != "32-true" else known[1] if tf32 else known[2])


def flops_per_example(model: LearnedScore, batch: Batch) -> int:
    """FLOPs of the network's forward and backward pass on the first example of a prepared batch.

    What gradient checkpointing recomputes does not count. The parameters' `grad` stays as it is.
    """
    condition = {name: value[:1] for name, value in batch.condition.items() if name in model.condition_names}
    x, counter = batch.x[:1], FlopCounterMode(display=False)
    with (
        torch.random.fork_rng([x.device] if x.is_cuda else []),
        torch.enable_grad(),
        _without_checkpointing(model),
        counter,
    ):
        output = model.network(x, x.new_zeros(1), **condition)
        torch.autograd.grad(output.float().sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return counter.get_total_flops()


@contextmanager
def _without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Turns off gradient checkpointing, which networks declare by an attribute `checkpointing`."""
    chosen = [module for module in model.modules() if getattr(module, "checkpointing", False)]
    for module in chosen:
        module.__dict__["checkpointing"] = False
    try:
        yield
    finally:
        for module in chosen:
            module.__dict__["checkpointing"] = True

"""AdamW for every weight, or Muon for the hidden matrices and AdamW for the rest.

Muon steps along the orthogonal factor of a matrix's momentum, scaled to a root mean square of 0.2 times the learning
rate, about that of AdamW's steps, so that both share one rate. A convolution weight (out, in, *kernel) is treated as the
matrix (out, in * kernel). Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, https://arxiv.org/abs/2502.16982.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["OPTIMIZERS", "Optimizer", "hidden_matrices"]

OPTIMIZERS = ("adamw", "muon")


def hidden_matrices(network: nn.Module, channels: int) -> list[bool]:
    """For each parameter, whether Muon trains it: all of two or more dimensions but embeddings, first and last layers.

    A weight belongs to a first or last layer if it has at most `channels` inputs or outputs, or is part of a layer that a
    network names `first` or `last` (which may take whole patches or events).
    """
    others: list[nn.Module] = [module for module in network.modules() if isinstance(module, nn.Embedding)]
    for part in (network, *network.children()):
        others += [layer for name, layer in part.named_children() if name in ("first", "last")]
    left = {id(p) for module in others for p in module.parameters()}
    return [p.ndim > 1 and min(p.shape[:2]) > channels and id(p) not in left for p in network.parameters()]


class Optimizer:
    """AdamW, or Muon with AdamW for the rest, on the gradients of `weights`.

    Args:
        name: "adamw" or "muon".
        weights: what is trained.
        hidden: for each weight, whether Muon trains it (see `hidden_matrices`).
        betas, weight_decay: AdamW's; Muon has the same weight decay.

    Raises:
        ValueError: Muon, if no weight is a hidden matrix or torch is older than 2.9.
    """

    def __init__(
        self, name: str, weights: Sequence[nn.Parameter], hidden: Sequence[bool],
        betas: tuple[float, float], weight_decay: float,
    ) -> None:  # fmt: skip
        muon = [weight for weight, matrix in zip(weights, hidden, strict=True) if matrix and name == "muon"]
        if name == "muon" and not muon:
            raise ValueError("optimizer='muon' is for networks with hidden matrices, this one has none: use 'adamw'")
        chosen = {id(weight) for weight in muon}
        rest = [weight for weight in weights if id(weight) not in chosen]
        self.adamw = torch.optim.AdamW(rest, betas=betas, weight_decay=weight_decay, fused=True)
        self.matrices = [(weight, nn.Parameter(_matrix(weight.detach()))) for weight in muon]
        self.muon = _muon([matrix for _, matrix in self.matrices], weight_decay) if muon else None

    @property
    def parts(self) -> dict[str, torch.optim.Optimizer]:
        """The optimisers, by their names in a checkpoint."""
        return {"optimizer": self.adamw} | ({} if self.muon is None else {"muon": self.muon})

    def step(self, rate: float, good: Tensor) -> None:
        """Takes a step at learning rate `rate`, or none if the scalar `good` is False."""
        for part in self.parts.values():
            for group in part.param_groups:
                group["lr"] = rate
        # The fused step skips itself if `found_inf` is 1, so that nothing has to wait for the device.
        self.adamw.found_inf = (~good).float()  # type: ignore[attr-defined]
        self.adamw.step()
        if self.muon is not None:
            self._step_or_undo(self.muon, good)

    @torch.no_grad()
    def _step_or_undo(self, muon: torch.optim.Optimizer, good: Tensor) -> None:
        """Steps, then undoes a step that was not good: Muon cannot skip one, and reading `good` would wait for the device."""
        changed = [part for _, matrix in self.matrices for part in (matrix, muon.state[matrix]["momentum_buffer"])]
        before = [part.clone() for part in changed]
        for weight, matrix in self.matrices:
            matrix.grad = None if weight.grad is None else _matrix(weight.grad)
        muon.step()
        for part, old in zip(changed, before, strict=True):
            part.copy_(torch.where(good, part, old))


def _muon(matrices: Sequence[nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"optimizer='muon' needs torch 2.9 or newer, this is {torch.__version__}: use 'adamw'")
    options: dict[str, Any] = {"weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    muon = torch.optim.Muon(matrices, **options)
    for matrix in matrices:  # made here, as Muon itself makes it only at its first step
        muon.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
    return muon


def _matrix(weight: Tensor) -> Tensor:
    """(out, everything else), a view in either memory format: Muon's step does not depend on the order of columns."""
    return (weight if weight.is_contiguous() else weight.movedim(1, -1)).flatten(1)

"""Constants kept once in float64, with a copy for each device and dtype in which they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

__all__ = ["Copies", "outside_transforms"]


@contextmanager
def outside_transforms() -> Iterator[None]:
    """A context for making tensors that outlive a call: made in inference mode they could not take part in gradients, made
    in a torch.func transform they would be valid only inside it."""
    with torch.inference_mode(False), temporarily_clear_interpreter_stack():
        yield


class Copies:
    """Named constants; real ones are kept in float64 and copied to the requested dtype, integers keep theirs."""

    def __init__(self, **constants: Tensor) -> None:
        self._constants = {
            name: value.detach().to("cpu", torch.float64 if value.is_floating_point() else None)
            for name, value in constants.items()
        }
        self._copies: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def like(self, x: Tensor) -> dict[str, Tensor]:
        """The constants on x's device and in its dtype; they are shared, so do not write into them."""
        key = (x.device, x.dtype)
        if key not in self._copies:
            with outside_transforms():
                self._copies[key] = {
                    name: value.to(x.device, x.dtype if value.is_floating_point() else None, copy=True)
                    for name, value in self._constants.items()
                }
        return self._copies[key]

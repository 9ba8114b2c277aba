"""How weights are placed on processes: whole on a single one, whole on each (DDP), or in shards (FSDP).

Of parameter i, a process holds `held[i]`: all of it, or its shard. Optimisers and averages work element by element on
held tensors alone. `full` and `part` convert between held and whole tensors, so that checkpoints hold whole tensors and
can be resumed by any number of processes. All processes must call the converting methods together.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from score_sde import distributed
from score_sde.networks.magnitude import MPConv, on_sphere
from score_sde.score import LearnedScore

__all__ = ["STRATEGIES", "Replicated", "Sharded", "Single", "strategy", "with_network"]

STRATEGIES = ("ddp", "fsdp")


class Single:
    """One process.

    Attributes:
        parameters: the parameters to which backward passes add gradients.
        held: the part of each that this process keeps and updates.
    """

    def __init__(self, model: LearnedScore, device: torch.device) -> None:
        self.device, self.model, self.network = device, model, model.to(device).network
        self.parameters = list(model.parameters())
        self.held = self.parameters

    def connect(self, loss: Callable[[], Tensor]) -> nn.Module:
        """Called before the first step, with a loss like those to come; returns the network that objectives are to call."""
        return self.network

    def disconnect(self) -> None:
        """Called after the last step."""

    def gradients(self) -> list[Tensor]:
        """Returns the gradients of the held tensors, after setting those of tensors that are not parameters themselves."""
        return [weight.grad for weight in self.held if weight.grad is not None]

    def clip(self, limit: float) -> Tensor:
        """Scales the whole gradient to a norm of at most `limit`; returns its norm before, the same on every process."""
        return nn.utils.clip_grad_norm_(self.held, limit)

    def collecting(self, last: bool) -> AbstractContextManager[None]:
        """Context of a micro-batch's loss and backward pass: gradients are averaged over processes only at the last one."""
        return contextlib.nullcontext()

    def full(self, i: int, part: Tensor) -> Tensor:
        """The whole tensor, shaped like parameter i, of which this process holds `part`."""
        return part

    def part(self, i: int, full: Tensor) -> Tensor:
        """The part that this process holds of a whole tensor shaped like parameter i."""
        return full

    def fill(self, model: LearnedScore, held: Sequence[Tensor]) -> None:
        """Sets the parameters of a copy of the model to the whole tensors of `held`."""
        for i, (weight, tensor) in enumerate(zip(model.parameters(), held, strict=True)):
            if weight is not tensor:
                weight.data = self.full(i, tensor.detach()).to(self.device, weight.dtype)

    def state_dict(self, held: Sequence[Tensor]) -> dict[str, Tensor]:
        """The model's state dict in whole tensors, with `held` in place of its parameters."""
        known = {id(parameter): i for i, parameter in enumerate(self.model.parameters())}
        state = self.model.state_dict(keep_vars=True)
        whole = [self._whole_on_main(i, tensor) for i, tensor in enumerate(held)]
        return {name: whole[known[id(value)]] if id(value) in known else value for name, value in state.items()}

    @torch.no_grad()
    def load_state_dict(self, held: Sequence[Tensor], weights: dict[str, Tensor]) -> None:
        """Loads a `state_dict` into `held` and the model. Raises ValueError if it is another network's."""
        try:
            self.model.load_state_dict(weights)  # checks names and shapes, and fills buffers
        except RuntimeError as error:
            first = str(error).partition("\n\t")[2].partition("\n")[0]
            raise ValueError(f"the checkpoint is of another network than this model's: {first}") from error
        for i, (tensor, (name, parameter)) in enumerate(zip(held, self.model.named_parameters(), strict=True)):
            if tensor is not parameter:  # from the file, as the model may have a lower precision
                tensor.copy_(self.part(i, weights[name]))

    def whole_moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimiser's state dict with whole tensors."""
        return _converted(state, self._whole_on_main)

    def own_moments(self, state: dict[str, Any]) -> dict[str, Any]:
        """The part that this process holds of an optimiser's state dict with whole tensors."""
        return _converted(state, self.part)

    def _whole_on_main(self, i: int, part: Tensor) -> Tensor:
        """`full` on the main process, which alone writes it; an empty tensor on the others."""
        whole = self.full(i, part.detach())
        return whole if distributed.is_main() else whole.new_empty(0)


def _converted(state: dict[str, Any], convert: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """An optimiser's state dict with every tensor but the scalars converted."""

    def converted(i: int, value: Any) -> Any:
        return convert(i, value) if isinstance(value, Tensor) and value.ndim else value

    moments = {i: {name: converted(i, value) for name, value in held.items()} for i, held in state["state"].items()}
    return state | {"state": moments}


class Replicated(Single):
    """Whole weights on each process (DDP); gradients are averaged while they are computed."""

    unreached: Sequence[nn.Parameter] = ()

    def connect(self, loss: Callable[[], Tensor]) -> nn.Module:
        # DDP waits for the gradient of every trainable parameter, so those that the loss does not reach are frozen.
        trained = [p for p in self.parameters if p.requires_grad]
        reached = torch.autograd.grad(loss(), trained, allow_unused=True)
        self.unreached = [p for p, gradient in zip(trained, reached, strict=True) if gradient is None]
        for parameter in self.unreached:
            parameter.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # on `broadcast_buffers`, as torch 2.4 has no other
            self.network = _Transparent(
                self.network, [self.device] if self.device.type == "cuda" else None,
                broadcast_buffers=False, gradient_as_bucket_view=True,
            )  # fmt: skip
        return self.network

    def disconnect(self) -> None:
        for parameter in self.unreached:
            parameter.requires_grad_(True)

    def collecting(self, last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if last else self.network.no_sync()  # type: ignore[operator]


class _Transparent(DistributedDataParallel):
    """DDP that has the attributes of the wrapped network."""

    def __getattr__(self, name: str) -> object:  # type: ignore[override]
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class Sharded(Single):
    """Weights, gradients, moments and averages in shards (FSDP2); each entry of a ModuleList is gathered to compute.

    Objectives that differentiate the network's derivative (implicit or sliced score matching) need `ddp` instead.
    """

    def __init__(self, model: LearnedScore, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard  # takes a second to import

        # That warning is about writing into a network's output, which nothing here does.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = init_device_mesh(device.type, (distributed.count(),))
        self.device, self.model, self.network = device, model, copy.deepcopy(model.network).to(device)
        blocks = [block for parent in self.network.modules() if isinstance(parent, nn.ModuleList) for block in parent]
        for block in (*reversed(blocks), self.network):
            if any(True for _ in block.parameters()):
                fully_shard(block, mesh=mesh)
        self.parameters = list(self.network.parameters())
        self.held = [nn.Parameter(p.detach().to_local(), p.requires_grad) for p in self.parameters]  # type: ignore[attr-defined]
        filters = {id(module.weight) for module in self.network.modules() if isinstance(module, MPConv)}
        self.filters = [w for w, p in zip(self.held, self.parameters, strict=True) if id(p) in filters and len(w)]

    @torch.no_grad()
    def gradients(self) -> list[Tensor]:
        for weight in self.filters:  # `MPConv` normalised only a gathered copy; shards hold whole filters
            weight.copy_(on_sphere(weight))
        for weight, parameter in zip(self.held, self.parameters, strict=True):
            weight.grad = None if parameter.grad is None else parameter.grad.to_local()  # type: ignore[attr-defined]
        return super().gradients()

    def clip(self, limit: float) -> Tensor:
        square = nn.utils.clip_grad_norm_(self.held, math.inf).square()
        dist.all_reduce(square)
        norm = square.sqrt()
        torch._foreach_mul_(super().gradients(), (limit / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def collecting(self, last: bool) -> AbstractContextManager[None]:
        self.network.set_requires_gradient_sync(last)  # type: ignore[operator]
        return contextlib.nullcontext()

    def full(self, i: int, part: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        like = self.parameters[i]
        mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
        return DTensor.from_local(
            part.detach(), mesh, placements, shape=like.shape, stride=like.stride()
        ).full_tensor().cpu()  # fmt: skip

    def part(self, i: int, full: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        like = self.parameters[i]
        mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
        return distribute_tensor(full.to(self.device), mesh, placements).to_local()


def strategy(name: str, model: LearnedScore, device: torch.device) -> Single:
    """The strategy called `name` for several processes; `Single` for one."""
    kind = {"ddp": Replicated, "fsdp": Sharded}[name] if distributed.count() > 1 else Single
    return kind(model, device)


def with_network(model: LearnedScore, network: nn.Module) -> LearnedScore:
    """A shallow copy of `model` that calls another module as its network, for objectives; `model` itself stays as it is."""
    view = copy.copy(model)
    view.__dict__["_modules"] = {**model._modules, "network": network}
    return view

"""An accelerator without hardware: tensors that say they lie on `meta` and keep their values beside them.

As on CUDA, work on tensors of two devices is refused (single numbers and indices of the host apart), and reading a value
on the host is a wait, which is counted. So a machine without a GPU shows that code never mixes devices, and where it waits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from score_sde.training import draws

aten = torch.ops.aten
DEVICE = torch.device("meta")
MIXED = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default}
SIZED_BY_VALUES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_dim.default}


class OnDevice(Tensor):
    """A tensor of the accelerator; `inner` has its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        tensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        tensor.inner = inner
        return tensor

    def __repr__(self, **options: Any) -> str:
        return f"OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of the emulation")

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError("a tensor of the device has no numpy array: copy it to the host first")

    __array__ = numpy


class Emulation(TorchDispatchMode):
    """Carries out what is asked of the device on the host, and counts the `waits` by their kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
        there = len(tensors) > len(here)
        if there and func not in MIXED and any(tensor.ndim for tensor in here):
            raise RuntimeError(f"{func} mixes tensors of the device and of the host")
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else DEVICE if there else None
        if "device" in kwargs and target == DEVICE:
            kwargs["device"] = torch.device("cpu")
        inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
        self._count(func, args, target if target == DEVICE else None, there)
        result = func(*inner_args, **inner_kwargs)
        if func is aten.copy_.default:
            return args[0]
        if target != DEVICE or func is aten._local_scalar_dense.default:
            return result
        wrapped = tree_map(lambda leaf: OnDevice(leaf) if isinstance(leaf, Tensor) else leaf, result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if there else wrapped

    def _count(self, func: Any, args: Any, stays: torch.device | None, there: bool) -> None:
        masks = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        home = func is aten._to_copy.default and stays is None
        home |= func is aten.copy_.default and not isinstance(args[0], OnDevice)
        if there and (func is aten._local_scalar_dense.default or func in SIZED_BY_VALUES or masks or home):
            self.waits.append(str(func))


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, OnDevice) else leaf


def _host_values(data: Any) -> Any:
    """Nested lists of numbers, those of the device read."""
    if isinstance(data, list | tuple):
        return [_host_values(part) for part in data]
    return data.tolist() if isinstance(data, OnDevice) else data


class Generator(torch.Generator):
    """A generator that says it is the device's."""

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        generator = super().__new__(cls, "cpu")
        generator.place = torch.device(device)  # type: ignore[attr-defined]
        return generator

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place  # type: ignore[attr-defined, no-any-return]


class RowsGenerator(Generator):
    """Likewise, for `draws.RowsGenerator`."""


@contextmanager
def accelerator() -> Iterator[Emulation]:
    """Within it the device DEVICE works."""
    with pytest.MonkeyPatch.context() as patch, Emulation() as emulation:
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, _made_on_the_host(getattr(torch, name)))
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(draws, "RowsGenerator", RowsGenerator)
        patch.setattr(torch, "autocast", lambda *given, **options: nullcontext())  # these two know no `meta`
        patch.setattr(sys.modules[torch.optim.Adam.__module__], "_device_dtype_check_for_fused", lambda *given: None)
        yield emulation


def _made_on_the_host(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.tensor and torch.as_tensor, which pass by the dispatcher when they make a tensor of the device."""

    def made(data: Any, *, device: torch.device | str | None = None, **options: Any) -> Tensor:
        if isinstance(data, OnDevice):
            return data.to(device or data.device, **options)
        tensor = make(_host_values(data), **options)
        return tensor if device is None else tensor.to(device)

    return made


def host(value: Any) -> Any:
    """The values of device tensors, in lists and tuples too."""
    return tree_map(_inner, value)

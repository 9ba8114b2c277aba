"""Results on one line: tensors by their shapes, lists by their lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

__all__ = ["Brief"]


class Brief:
    """A base for dataclasses with large fields, which are to be declared with repr=False: a repr on one line."""

    def __repr__(self) -> str:
        parts = (f"{part.name}={_brief(getattr(self, part.name))}" for part in fields(self))  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(parts)})"


def _brief(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() != 1:
        return f"<{'x'.join(map(str, value.shape))} {str(value.dtype).removeprefix('torch.')}>"
    if isinstance(value, Tensor | float):
        return f"{float(value):.4g}"
    if isinstance(value, nn.Module):
        return f"<{type(value).__name__}>"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"<{len(value)} items>"
    return repr(value)

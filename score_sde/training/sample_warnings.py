"""Warnings, before training, of settings that will spoil a run's samples."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from score_sde.data import Data, TensorData
from score_sde.score import LearnedScore

__all__ = ["warn_of_samples"]


def warn_of_samples(model: LearnedScore, data: Data, count: int) -> None:
    """Warns of what will spoil samples; reads `count` training examples. Warnings point to the caller's caller."""
    _warn_of_cancellation(model)
    _warn_of_start(model)
    _warn_of_end(model)
    # Finite sets of floats alone: integers are scaled to [-1, 1].
    if isinstance(data, TensorData) and data.dequantize is None:
        x = data.plain("train", slice(max(count, 10_000 // math.prod(data.event_shape)))).x.double()
        _warn_of_size(model, float(x.square().mean().sqrt()))
        _warn_of_scales(x)


def _warn_of_cancellation(model: LearnedScore) -> None:
    """Warns if at t_max, where sampling starts, D = c_skip x + c_out F is a small difference of large numbers."""
    t_max = torch.tensor(model.sde.t_max, dtype=torch.float64)
    size = abs(model.parameterization.row(model.sde, t_max).c_skip.item()) * model.sde.prior_std / model.data_std
    if size > 1000:
        kind, alpha = type(model.parameterization).__name__, model.sde.alpha(t_max).item()
        warnings.warn(f"where samples start (alpha={alpha:.2g} at t_max) an error of the {kind} prediction is {size:,.0f} "
                      "times as large in x_0, and some samples will end far from the data: use parameterization=velocity "
                      "or karras", stacklevel=4)  # fmt: skip


def _warn_of_start(model: LearnedScore) -> None:
    """Warns if noisy data at t_max have a standard deviation over 1.05 times the prior's."""
    sde = model.sde
    spread = math.hypot(sde.alpha(sde.t_max).item() * model.data_std, sde.sigma(sde.t_max).item())
    if spread > 1.05 * sde.prior_std:
        warnings.warn(f"sampling starts with a spread of {sde.prior_std:.3g} at t_max, where data of standard deviation "
                      f"{model.data_std:.3g} (the model's data_std) have {spread:.3g}: samples will be too narrow; "
                      "standardise the data, or raise the greatest noise level", stacklevel=4)  # fmt: skip


def _warn_of_end(model: LearnedScore) -> None:
    """Warns if Tweedie's formula at t_min, which takes a std sqrt(v) to v / sqrt(v + s^2), narrows it more than 1.05 times."""
    share = math.hypot(1, (least := model.sde.noise_level_range[1]) / model.data_std)
    if share > 1.05:
        warnings.warn(f"the least noise level is {least:.3g}, where data have a standard deviation of {model.data_std:.3g}: "
                      f"samples will be {share:.3g} times too narrow, or too wide if that noise is kept; standardise the "
                      "data, or lower the least noise level", stacklevel=4)  # fmt: skip


def _warn_of_size(model: LearnedScore, size: float) -> None:
    """Warns of data whose root mean square is over 20 times the model's data_std, or under a twentieth of it."""
    if size > 20 * model.data_std or 0 < size < model.data_std / 20:
        kind = type(model.parameterization).__name__
        warnings.warn(f"the data have a root mean square of {size:.3g}, the model a data_std of {model.data_std:.3g}, to "
                      "which it scales the network's inputs, and they will be learnt badly: scale the data, e.g. pixels "
                      f"0..255 to [-1, 1], or give {kind}(sigma_data=measure_sigma_data(data))", stacklevel=4)  # fmt: skip


def _warn_of_scales(x: Tensor) -> None:
    """Warns if coordinates of vectors, or channels of other events, vary less than a twentieth of the widest.

    Constant ones are ignored.
    """
    others = (0, *range(2, x.ndim))
    std = x.std(others, correction=0) * (x.amax(others) > x.amin(others))
    if narrow := ((std > 0) & (std < std.max() / 20)).nonzero().flatten().tolist():
        which = f"{narrow[:8]}" + f" and {len(narrow) - 8} more" * (len(narrow) > 8)
        parts, over = ("coordinates", "0") if x.ndim == 2 else ("channels", f"{others}, keepdims=True")
        warnings.warn(f"the data's {parts} {which} vary less than a twentieth of the widest (standard deviation "
                      f"{float(std[narrow].min()):.2g} beside {float(std.max()):.2g}) and will be learnt badly: standardise, "
                      f"x = (x - x.mean({over})) / x.std({over})", stacklevel=4)  # fmt: skip

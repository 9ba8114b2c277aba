r"""Observations of a clean x: y = A(x) + noise_std e, e ~ N(0, I).

A linear operator provides A, its transpose, and functions of A A^T = U diag(s^2) U^T,

    gram(y, f) = U f(s^2) U^T y,

which structured operators compute in closed form or by FFT, without a matrix. All that guidance needs follows: the
pseudo-inverse A^+ = A^T gram(., 1 / s^2), the projector A^+ A, (r A A^T + n^2 I)^{-1} = gram(., 1 / (r s^2 + n^2)),
and, with V the right singular vectors, V f(s^2) V^T = A^T gram(A ., f(s^2) / s^2) on the row space.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from score_sde.checks import number, one_of, tensor, whole
from score_sde.copies import Copies, outside_transforms
from score_sde.score import at_least_single

Spectral = Callable[[Tensor], Tensor]
"""A function of the eigenvalues s^2 of A A^T, elementwise up to broadcasting against (batch, 1, ..., 1)."""

Map = Callable[[Tensor], Tensor]
"""A linear map of each sample of a batch."""


class Operator(ABC):
    """A differentiable observation A of clean data.

    Attributes:
        input_shape: shape of one clean x.
        output_shape: shape of one observation A(x).
    """

    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        """A(x) for x of shape (batch, *input_shape); shape (batch, *output_shape).

        Raises:
            ValueError: x has another shape.
        """
        return self._apply(self._checked(x, self.input_shape, "x"))

    def linearised(self, x: Tensor) -> tuple[Tensor, Map, Map]:
        """A(x), v -> A'(x) v and w -> A'(x)^T w."""
        seen, pull = torch.func.vjp(self, x)  # type: ignore[misc]
        return seen, lambda v: torch.func.jvp(self, (x,), (v,))[1], lambda w: pull(w)[0]

    def observe(self, x: Tensor, noise_std: float = 0.0, *, generator: torch.Generator | None = None) -> Tensor:
        """A draw of y = A(x) + noise_std e, shape (batch, *output_shape), with e from the generator.

        Raises:
            ValueError: noise_std is not 0 and there is no generator, or x has another shape.
        """
        y = self(x)
        if not noise_std:
            return y
        if generator is None:
            raise ValueError("observe needs a generator for its noise: generator=torch.Generator().manual_seed(0)")
        noise = torch.randn(y.shape, generator=generator, dtype=y.dtype, device=generator.device)
        return y + noise_std * noise.to(y.device)

    def observation(self, y: Tensor) -> Tensor:
        """y as `shaped` gives it; values that are not finite are a ValueError too."""
        y = self.shaped(y)
        if not torch.isfinite(y).all():
            raise ValueError(f"an observation y has {int((~torch.isfinite(y)).sum())} values that are not finite")
        return y

    def shaped(self, y: Tensor) -> Tensor:
        """y as (batch, *output_shape), where batch is 1 for a single observation without a batch dimension.

        Raises:
            ValueError: y has another shape, such as that of the clean x, or is not floating-point.
        """
        if tuple(tensor("y", y).shape) == self.output_shape:
            y = y.unsqueeze(0)
        if tuple(y.shape[1:]) != self.output_shape or len(y) == 0:
            hint = ": pass the observation operator(x), not x itself" if tuple(y.shape[-len(self.input_shape) :]) == (
                self.input_shape) else ""  # fmt: skip
            raise ValueError(f"{type(self).__name__} gives observations y of shape ([batch,] "
                             f"{', '.join(map(str, self.output_shape))}), got {tuple(y.shape)}{hint}")  # fmt: skip
        if not y.is_floating_point():
            raise ValueError(f"an observation y is real, got {y.dtype}: give y.float()")
        return y

    @abstractmethod
    def _apply(self, x: Tensor) -> Tensor: ...

    def _checked(self, x: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
        if tuple(x.shape[1:]) != shape or x.ndim != len(shape) + 1:
            raise ValueError(f"{type(self).__name__} takes {name} of shape (batch, {', '.join(map(str, shape))}), "
                             f"got {tuple(x.shape)}")  # fmt: skip
        return x

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.input_shape} -> {self.output_shape})"


class Nonlinear(Operator):
    """Any differentiable function of a batch that treats each sample independently.

    Args:
        function: (batch, *input_shape) -> (batch, *output_shape).
        input_shape: shape of one clean x.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], input_shape: Sequence[int]) -> None:
        self.function, self.input_shape = function, tuple(input_shape)
        self.output_shape = tuple(function(torch.zeros(1, *self.input_shape)).shape[1:])

    def _apply(self, x: Tensor) -> Tensor:
        return self.function(x)


class LinearOperator(Operator):
    """A linear A. A subclass defines `_apply`, `_transpose` and `_gram`; without `_gram` a dense A A^T is diagonalised.

    Attributes:
        rcond: singular values below rcond times the largest count as zero in `invert` and `pseudo_inverse`.
    """

    rcond: float = 1e-5

    def linearised(self, x: Tensor) -> tuple[Tensor, Map, Map]:
        return self(x), self, self.transpose

    def transpose(self, y: Tensor) -> Tensor:
        """A^T y for y of shape (batch, *output_shape); shape (batch, *input_shape)."""
        return self._transpose(self._checked(y, self.output_shape, "y"))

    def gram(self, y: Tensor, function: Spectral) -> Tensor:
        """U function(s^2) U^T y, with A A^T = U diag(s^2) U^T, for y of shape (batch, *output_shape)."""
        return self._gram(self._checked(y, self.output_shape, "y"), function)

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """A^+ y, the x of least norm with A x nearest to y; shape (batch, *input_shape)."""
        return self.transpose(self.gram(y, self.invert))

    def project(self, x: Tensor) -> Tensor:
        """A^+ A x, the part of x that A observes, in x's shape."""
        return self.pseudo_inverse(self(x))

    def invert(self, s2: Tensor) -> Tensor:
        """1 / s^2 where the singular value s counts as non-zero, else 0."""
        kept = s2 > self.rcond**2 * s2.max()
        return torch.where(kept, 1 / torch.where(kept, s2, 1), 0)

    def least_singular_value(self) -> float:
        """The least singular value s that counts as non-zero. An observation with noise n adds nothing at noise levels
        below n / s."""
        least: list[Tensor] = []

        def record(s2: Tensor) -> Tensor:
            least.append(s2[self.invert(s2) > 0].min())
            return s2

        self.gram(torch.zeros(1, *self.output_shape, dtype=torch.float64), record)
        return least[0].sqrt().item()

    def matrix(self) -> Tensor:
        """A as a dense float64 matrix, shape (prod(output_shape), prod(input_shape))."""
        size = math.prod(self.input_shape)
        return self(torch.eye(size, dtype=torch.float64).view(size, *self.input_shape)).flatten(1).T.contiguous()

    @abstractmethod
    def _transpose(self, y: Tensor) -> Tensor: ...

    def _gram(self, y: Tensor, function: Spectral) -> Tensor:
        s2, basis = self._eigen.like(y).values()
        return ((y.flatten(1) @ basis) * _rows(function(s2)) @ basis.T).view_as(y)

    @cached_property
    def _eigen(self) -> Copies:
        with outside_transforms():
            s2, basis = torch.linalg.eigh(self.matrix() @ self.matrix().T)
            return Copies(s2=s2.clamp_min(0), basis=basis)


def _rows(v: Tensor) -> Tensor:
    """Values of shape (m,) or (batch, 1, ..., m) as (m,) or (batch, m)."""
    return v.reshape(-1, v.shape[-1]) if v.ndim > 1 else v


class Matrix(LinearOperator):
    """A given matrix on flattened events. It multiplies by BLAS, whose rounding may depend on the batch size.

    Args:
        matrix: (m, prod(input_shape)), finite.
        input_shape: shape of one clean x; by default a vector.

    Raises:
        ValueError: the matrix is empty, not finite or does not fit input_shape.
    """

    def __init__(self, matrix: Tensor | Sequence[Sequence[float]], input_shape: Sequence[int] | None = None) -> None:
        values = torch.as_tensor(matrix, dtype=torch.float64)
        if values.ndim != 2 or values.numel() == 0 or not torch.isfinite(values).all():
            raise ValueError(f"a finite matrix of shape (m, D) is needed, got shape {tuple(values.shape)}")
        self.input_shape = tuple(input_shape) if input_shape is not None else (values.shape[1],)
        self.output_shape, self._values, self._copies = (values.shape[0],), values, Copies(matrix=values)
        if math.prod(self.input_shape) != values.shape[1]:
            raise ValueError(f"a matrix with {values.shape[1]} columns does not act on x of shape {self.input_shape}")

    def matrix(self) -> Tensor:
        return self._values

    def _apply(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self._copies.like(x)["matrix"].T

    def _transpose(self, y: Tensor) -> Tensor:
        return (y @ self._copies.like(y)["matrix"]).view(-1, *self.input_shape)


class Linear(LinearOperator):
    """A linear function of a batch that treats each sample independently; A^T by autograd, A A^T as a dense matrix.

    Args:
        function: (batch, *input_shape) -> (batch, *output_shape), with function(0) = 0.
        input_shape: shape of one clean x.

    Raises:
        ValueError: the function is not linear.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], input_shape: Sequence[int]) -> None:
        self.function, self.input_shape = function, tuple(input_shape)
        x, z = torch.randn(2, 1, *self.input_shape, generator=torch.Generator().manual_seed(0)).unbind()
        both, parts = function(x - 2 * z), function(x) - 2 * function(z)
        self.output_shape = tuple(both.shape[1:])
        if not (both - parts).abs().max() <= 1e-3 * parts.abs().max():
            raise ValueError(
                "this function is not linear: subtract f(0) from it and from y, or give Nonlinear(f, input_shape)"
            )

    def _apply(self, x: Tensor) -> Tensor:
        return self.function(x)

    def _transpose(self, y: Tensor) -> Tensor:
        _, pull = torch.func.vjp(self.function, y.new_zeros(len(y), *self.input_shape))  # type: ignore[misc]
        return pull(y)[0]


class _Isometric(LinearOperator):
    """A A^T = scale I."""

    scale: float = 1.0

    def _gram(self, y: Tensor, function: Spectral) -> Tensor:
        return y * function(y.new_full((1,) * y.ndim, self.scale))


class Mask(_Isometric):
    """The observed entries of x, as a vector (m,); the others are not in y at all, so that no truth can leak.

    Args:
        event_shape: shape of one clean x.
        observed: boolean, True where x is observed; broadcast to event_shape (an image's mask may be (height, width)).

    Raises:
        ValueError: the mask is not boolean, does not fit event_shape, or is False everywhere.
    """

    def __init__(self, event_shape: Sequence[int], observed: Tensor) -> None:
        self.input_shape = tuple(event_shape)
        observed = torch.as_tensor(observed)
        if observed.dtype != torch.bool:
            raise ValueError(f"a mask is boolean, True where x is observed; got {observed.dtype}: write mask > 0.5")
        try:
            self.observed = observed.cpu().expand(self.input_shape)
        except RuntimeError as mismatch:
            raise ValueError(f"a mask of shape {tuple(observed.shape)} does not fit x of shape {self.input_shape}: "
                             "crop or resize it") from mismatch  # fmt: skip
        index = self.observed.flatten().nonzero().squeeze(-1)
        self.output_shape, self._copies = (len(index),), Copies(index=index)
        if len(index) == 0:
            raise ValueError("this mask shows nothing: set it to True where x is observed")

    @classmethod
    def box(cls, event_shape: Sequence[int], *corners: Sequence[int]) -> Mask:
        """Hides boxes, each given over the last dimensions as (start, ..., stop, ...): for images (top, left, bottom, right).

        Raises:
            ValueError: a box is empty or extends beyond the event.
        """
        observed = torch.ones(tuple(event_shape), dtype=torch.bool)
        for corner in corners:
            axes = len(corner) // 2
            start, stop = corner[:axes], corner[axes:]
            sizes = tuple(event_shape)[-axes:]
            if (
                len(corner) % 2
                or axes == 0
                or not all(0 <= a < b <= n for a, b, n in zip(start, stop, sizes, strict=True))
            ):
                raise ValueError(f"a box (start..., stop...) lies within {sizes}, start < stop; got {tuple(corner)}")
            hidden: list[Any] = [slice(a, b) for a, b in zip(start, stop, strict=True)]
            observed[(..., *hidden)] = False
        return cls(event_shape, observed)

    @classmethod
    def half(cls, event_shape: Sequence[int], observed: str = "top") -> Mask:
        """Shows one half: "top" or "bottom" of the second-to-last dimension, "left" or "right" of the last."""
        one_of("the observed half", observed, ("top", "bottom", "left", "right"))
        shape = tuple(event_shape)
        axis = -1 if observed in ("left", "right") else -2
        if len(shape) < -axis:
            raise ValueError(f"events of shape {shape} have no {observed} half: take 'left' or 'right'")
        first = torch.arange(shape[axis]) < shape[axis] // 2
        seen = first if observed in ("top", "left") else ~first
        return cls(shape, seen if axis == -1 else seen.unsqueeze(-1))

    @classmethod
    def random(cls, event_shape: Sequence[int], keep: float, *, seed: int = 0) -> Mask:
        """Shows each place with probability `keep`, the same places in all channels of an image (channels, ...)."""
        if not 0 < keep <= 1:
            raise ValueError(f"keep is a probability in (0, 1], got {keep}")
        shape = tuple(event_shape)
        places = shape[1:] if len(shape) > 1 else shape
        return cls(shape, torch.rand(places, generator=torch.Generator().manual_seed(seed)) < keep)

    def _apply(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, self._copies.like(x)["index"]]

    def _transpose(self, y: Tensor) -> Tensor:
        index = self._copies.like(y)["index"]
        empty = torch.zeros(len(y), math.prod(self.input_shape), dtype=y.dtype, device=y.device)
        return empty.index_copy(1, index, y).view(-1, *self.input_shape)


class Grey(_Isometric):
    """The weighted mean of the channels of x (channels, ...): y = sum_c w_c x_c, one channel.

    Args:
        event_shape: (channels, ...).
        weights: one per channel; by default the luminance of ITU-R BT.601.
    """

    def __init__(self, event_shape: Sequence[int], weights: Sequence[float] = (0.299, 0.587, 0.114)) -> None:
        self.input_shape = tuple(event_shape)
        self.weights = torch.tensor([number("weight", weight) for weight in weights], dtype=torch.float64)
        if len(self.input_shape) < 2 or self.input_shape[0] != len(self.weights):
            raise ValueError(f"{len(self.weights)} channel weights do not fit x of shape {self.input_shape}: "
                             "x is (channels, height, width), with one weight per channel")  # fmt: skip
        self.output_shape = (1, *self.input_shape[1:])
        self.scale, self._copies = self.weights.square().sum().item(), Copies(weights=self.weights)

    def _apply(self, x: Tensor) -> Tensor:
        return (x * self._column(x)).sum(1, keepdim=True)

    def _transpose(self, y: Tensor) -> Tensor:
        return y * self._column(y)

    def _column(self, like: Tensor) -> Tensor:
        return self._copies.like(like)["weights"].view(-1, *[1] * (like.ndim - 2))


class Downsample(_Isometric):
    """The mean over blocks of `factor` places along every dimension but the first (channels): average pooling.

    Args:
        event_shape: (channels, ...), with every side but the channels a multiple of the factor.
        factor: 2 or more.
    """

    def __init__(self, event_shape: Sequence[int], factor: int = 2) -> None:
        self.input_shape, self.factor = tuple(event_shape), whole("factor", factor, 2)
        places = self.input_shape[1:]
        if not places or any(side % self.factor for side in places):
            raise ValueError(f"downsampling by {factor} needs x of shape (channels, ...) whose sides are multiples of "
                             f"a factor >= 2, got {self.input_shape}")  # fmt: skip
        self.output_shape = (self.input_shape[0], *(side // factor for side in places))
        self.scale = float(factor) ** -len(places)

    def _apply(self, x: Tensor) -> Tensor:
        for axis in range(2, x.ndim):
            x = x.unflatten(axis, (-1, self.factor)).mean(axis + 1)
        return x

    def _transpose(self, y: Tensor) -> Tensor:
        for axis in range(2, y.ndim):
            y = y.repeat_interleave(self.factor, axis)
        return y * self.scale


class Blur(LinearOperator):
    """Convolution of every channel of x (channels, ...) with a kernel, wrapping around at the edges.

    In Fourier space A = diag(k), so that s^2 = |k|^2.

    Args:
        event_shape: (channels, ...).
        kernel: one dimension for each of x but the channels; sides are odd, and none is longer than x's.
    """

    def __init__(self, event_shape: Sequence[int], kernel: Tensor) -> None:
        self.input_shape = self.output_shape = tuple(event_shape)
        self._places = self.input_shape[1:]
        kernel = torch.as_tensor(kernel, dtype=torch.float64)
        fits = kernel.ndim == len(self._places) > 0 and all(
            k % 2 and k <= n for k, n in zip(kernel.shape, self._places, strict=True)
        )
        if not fits:
            raise ValueError(f"a kernel has odd sides within x's {self._places}, got {tuple(kernel.shape)} for x of "
                             f"shape (channels, ...) = {self.input_shape}")  # fmt: skip
        full = torch.zeros(self._places, dtype=torch.float64)
        full[tuple(slice(k) for k in kernel.shape)] = kernel
        centred = full.roll([-(k // 2) for k in kernel.shape], tuple(range(kernel.ndim)))
        spectrum = torch.fft.rfftn(centred)
        self._spectrum = Copies(real=spectrum.real, imaginary=spectrum.imag)
        self._axes = tuple(range(2, 2 + kernel.ndim))

    @classmethod
    def gaussian(cls, event_shape: Sequence[int], std: float) -> Blur:
        """exp(-d^2 / (2 std^2)), d in pixels, normalised, and cut off at four standard deviations or x's side."""
        std = number("std", std, above=0)
        kernel = torch.ones((), dtype=torch.float64)
        for side in tuple(event_shape)[1:]:
            radius = min(math.ceil(4 * std), (side - 1) // 2)
            line = (-(torch.arange(-radius, radius + 1, dtype=torch.float64) ** 2) / (2 * std**2)).exp()
            kernel = kernel.unsqueeze(-1) * (line / line.sum())
        return cls(event_shape, kernel)

    @classmethod
    def motion(cls, event_shape: Sequence[int], length: int, angle: float = 0.0) -> Blur:
        """The mean along a line of `length` pixels at `angle` degrees from the last axis, linearly interpolated."""
        sides = tuple(event_shape)[1:]
        if len(sides) != 2 or not 1 <= length <= min(sides):
            raise ValueError(f"motion blur takes images (channels, height, width) and a length of 1 to their side, "
                             f"got {tuple(event_shape)} and length={length}")  # fmt: skip
        radius = (min(sides) - 1) // 2
        place = torch.linspace(-1, 1, 8 * length + 1, dtype=torch.float64) * min(length / 2, radius)
        rows, columns = -place * math.sin(math.radians(angle)), place * math.cos(math.radians(angle))
        axis = torch.arange(-radius, radius + 1, dtype=torch.float64)
        tents = [(1 - (axis - v.unsqueeze(-1)).abs()).clamp_min(0) for v in (rows, columns)]
        kernel = tents[0].T @ tents[1]
        return cls(event_shape, kernel / kernel.sum())

    def _apply(self, x: Tensor) -> Tensor:
        return self._filtered(x, torch.complex)

    def _transpose(self, y: Tensor) -> Tensor:
        return self._filtered(y, lambda real, imaginary: torch.complex(real, -imaginary))

    def _gram(self, y: Tensor, function: Spectral) -> Tensor:
        return self._filtered(y, lambda real, imaginary: function(real**2 + imaginary**2))

    def _filtered(self, x: Tensor, response: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """x with its Fourier coefficients multiplied by a function of the kernel's, in single precision at least."""
        if len(x) == 0:
            return x
        fine = x.to(at_least_single(x.dtype))
        seen = torch.fft.rfftn(fine, dim=self._axes) * response(*self._spectrum.like(fine).values())
        return torch.fft.irfftn(seen, s=self._places, dim=self._axes).to(x.dtype)


class FourierSubsample(_Isometric):
    """Some Fourier coefficients of every channel of x (channels, ...), as in magnetic resonance imaging.

    They are taken in the Hartley basis, H x = Re F x - Im F x with F the orthonormal Fourier transform: H is real,
    orthonormal and its own inverse. For real x the H at k and -k together determine F at k, so the mask is made even.

    Args:
        event_shape: (channels, ...).
        observed: boolean, of x's shape without channels, True at the observed frequencies, in the order of
            `torch.fft.fftn`.

    Raises:
        ValueError: the mask is not boolean, has another shape, or is False everywhere.
    """

    def __init__(self, event_shape: Sequence[int], observed: Tensor) -> None:
        self.input_shape = tuple(event_shape)
        places = self.input_shape[1:]
        observed = torch.as_tensor(observed)
        if not places or observed.dtype != torch.bool or tuple(observed.shape) != places:
            raise ValueError(f"observed is a boolean mask of shape {places}, one entry for each frequency of a channel; got "
                             f"{observed.dtype} of shape {tuple(observed.shape)}")  # fmt: skip
        axes = tuple(range(observed.ndim))
        self.observed = observed | observed.flip(axes).roll((1,) * observed.ndim, axes)
        index = self.observed.flatten().nonzero().squeeze(-1)
        self.output_shape, self._copies = (self.input_shape[0], len(index)), Copies(index=index)
        if len(index) == 0:
            raise ValueError("this mask shows no frequency: set it to True where x's transform is observed")

    @classmethod
    def lines(
        cls, event_shape: Sequence[int], centre: float = 0.08, keep: float = 0.25, *, seed: int = 0
    ) -> FourierSubsample:
        """Lines of the last axis: the lowest fraction `centre` of its frequencies, and each other with probability `keep`."""
        places = tuple(event_shape)[1:]
        if not places or not (0 < centre <= 1 and 0 <= keep <= 1):
            raise ValueError(f"lines need x of shape (channels, ...), 0 < centre <= 1 and 0 <= keep <= 1, got "
                             f"{tuple(event_shape)}, {centre=}, {keep=}")  # fmt: skip
        low = torch.fft.fftfreq(places[-1]).abs() <= centre / 2
        some = torch.rand(places[-1], generator=torch.Generator().manual_seed(seed)) < keep
        return cls(event_shape, (low | some).expand(places))

    def _apply(self, x: Tensor) -> Tensor:
        return self._hartley(x).flatten(2)[..., self._copies.like(x)["index"]]

    def _transpose(self, y: Tensor) -> Tensor:
        index = self._copies.like(y)["index"]
        empty = torch.zeros(*y.shape[:2], self.observed.numel(), dtype=y.dtype, device=y.device)
        return self._hartley(empty.index_copy(2, index, y).view(-1, *self.input_shape))

    def _hartley(self, x: Tensor) -> Tensor:
        if len(x) == 0:
            return x
        f = torch.fft.fftn(x.to(at_least_single(x.dtype)), dim=tuple(range(2, x.ndim)), norm="ortho")
        return (f.real - f.imag).to(x.dtype)


TASKS: dict[str, Callable[..., LinearOperator]] = {
    "inpaint": Mask.half,
    "colorize": Grey,
    "superres": Downsample,
    "deblur": Blur.gaussian,
}


def task_operator(task: str, event_shape: Sequence[int], **options: Any) -> LinearOperator:
    """The operator of a named task on images (channels, height, width); `options` are those of the operator.

    By default "inpaint" shows the upper half, "colorize" the luminance, "superres" the means of 2 x 2 pixels, and "deblur" a
    Gaussian blur with a standard deviation of one pixel.

    Raises:
        ValueError: the task is unknown, or does not fit the images, or an option is not one of its operator's.
    """
    operator = TASKS[one_of("task", task, TASKS)]
    if len(event_shape) != 3:
        raise ValueError(f"task {task!r} is for images (channels, height, width), these events have shape "
                         f"{tuple(event_shape)}: give an operator such as Matrix or Mask instead")  # fmt: skip
    defaults: dict[str, dict[str, Any]] = {"deblur": {"std": 1.0}}
    _, *known = inspect.signature(operator).parameters
    for name in options:
        one_of(f"the operator's option for task={task}", name, known)
    return operator(tuple(event_shape), **(defaults.get(task, {}) | options))

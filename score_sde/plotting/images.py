"""Sheets of images, and noise becoming data as a GIF."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection
from matplotlib.image import AxesImage
from PIL import Image
from torch import Tensor

from score_sde.plotting.canvas import INK, panels
from score_sde.plotting.planes import limits_of, plane, samples


def image_grid(ax: Axes, images: Tensor, *, columns: int | None = None, names: Sequence[object] = ()) -> AxesImage:
    """Images (n, 1 or 3, height, width) in [-1, 1] as one mosaic, row by row; values beyond are clipped.

    `names` are written over the columns.

    Raises:
        ValueError: the images have another shape.
    """
    mosaic = _mosaic(images, columns)
    ax.set(xticks=[], yticks=[], aspect="equal")
    ax.set_xticks([(images.shape[-1] + 1) * (i + 0.5) - 1 for i in range(len(names))], [*map(str, names)])
    ax.tick_params(top=False, bottom=False, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    return ax.imshow(mosaic, interpolation="nearest")


def animation(
    trajectory: Tensor,
    path: str | Path,
    *,
    levels: Sequence[str] | None = None,
    frames: int = 50,
    fps: int = 20,
    hold: float = 1.0,
) -> Path:
    """Noise becoming data, as a GIF.

    Args:
        trajectory: states (steps, batch, 2), or images (steps, batch, channels, height, width). The last images are shown
            from -1 to 1, with values beyond clipped; noisier ones are scaled down to the same contrast.
        path: of the file to write.
        levels: a caption for each state.
        frames: the most states to show, evenly spaced and including the last.
        fps: frames per second.
        hold: further seconds for which the last state is shown.
    """
    chosen = torch.linspace(0, len(trajectory) - 1, min(frames, len(trajectory))).round().long().tolist()
    states = trajectory[chosen].detach().float().cpu()
    figure, axes = panels(1, width=3.6, height=3.8)
    figure.set_layout_engine("none")  # a layout engine would move the axes whenever a tick label grows
    ax = axes[0, 0]
    ax.set_position((0.13, 0.07, 0.84, 0.84))
    draw = _image_frames(ax, states) if states.ndim == 5 else _point_frames(ax, states)
    caption = ax.set_title(" ", fontsize=10, color=INK)
    figure.set_dpi(110)
    canvas, pages = FigureCanvasAgg(figure), []
    for index, step in enumerate(chosen):
        caption.set_text(levels[step] if levels else f"step {step} of {len(trajectory) - 1}")
        draw(index)
        canvas.draw()
        pages.append(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"))
    milliseconds = [1000 / fps] * (len(pages) - 1) + [1000 / fps + 1000 * hold]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=milliseconds, loop=0)
    return Path(path)


def _point_frames(ax: Axes, states: Tensor) -> Any:
    """A function that draws state i; the view shrinks with the cloud of points to that of the last state, and never grows."""
    dots = samples(ax, states[-1])
    frame = torch.tensor(limits_of(states[-1]))
    centre = frame.unflatten(0, (2, 2)).mean(dim=1, keepdim=True)
    size = torch.tensor([right - left for left, right, _, _ in map(limits_of, states)])
    zoom = (size / size[-1]).cummin(dim=0).values.clamp_min(1)

    def draw(index: int) -> PathCollection:
        dots.set_offsets(states[index].numpy())
        view = centre + zoom[index] * (frame.unflatten(0, (2, 2)) - centre)
        plane(ax, tuple(view.flatten().tolist()))
        return dots

    return draw


def _image_frames(ax: Axes, states: Tensor) -> Any:
    """A function that draws state i, scaled to the last one's contrast if it has more, by a factor that never grows back."""
    image = image_grid(ax, states[-1])
    size = states.flatten(1).square().mean(1).sqrt()
    fade = (size / size[-1]).cummin(dim=0).values.clamp_min(1)

    def draw(index: int) -> AxesImage:
        image.set_data(_mosaic(states[index] / fade[index], None))
        return image

    return draw


def _mosaic(images: Tensor, columns: int | None) -> np.ndarray:
    """The RGBA mosaic, with transparent gaps of one pixel."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images have shape (n, 1 or 3, height, width), got {tuple(images.shape)}")
    count, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    colour = ((images.detach().float().cpu() + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)
    tiles = torch.zeros(rows * columns, 4, height + 1, width + 1)
    tiles[:count, :3, :-1, :-1], tiles[:count, 3, :-1, :-1] = colour, 1
    mosaic = tiles.reshape(rows, columns, 4, height + 1, width + 1).permute(0, 3, 1, 4, 2)
    return mosaic.reshape(rows * (height + 1), columns * (width + 1), 4)[:-1, :-1].numpy()

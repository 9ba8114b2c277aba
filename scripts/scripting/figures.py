"""The figures that scripts draw of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from score_sde import ExactScore, LearnedScore, ProbabilityFlowODE, Sampler, ScoreModel, grid, plotting
from score_sde.data import Data
from score_sde.evaluation import Diagnosis, Evaluation, starts
from score_sde.guidance import LinearOperator
from score_sde.progress import tqdm
from score_sde.run import Run
from score_sde.steps import EulerMaruyama
from score_sde.targets import Target

Drawing = Callable[[Path], Path]
"""A function that draws a figure into a file and returns its path."""


@dataclass(frozen=True)
class Subject:
    """What the figures of a run show.

    Attributes:
        model: the run's model, which can be called without conditions (`conditions.of_examples`).
        found: the evaluation of its samples.
        sampler: draws the GIF of images.
        seed: of starting points.
    """

    run: Run
    model: ScoreModel
    data: Data
    found: Evaluation
    sampler: Any
    seed: int


def all_of(shown: Subject) -> dict[str, Drawing]:
    """Every figure that fits the data: densities, score fields, trajectories, sample sheets, losses, a GIF."""
    model, data, seed = shown.model, shown.data, shown.seed
    drawings = evaluation_sheets(data, shown.found)
    if in_plane(data):
        drawings["densities.png"] = _png(plotting.density_comparison, law_of(data), shown.found.samples)
    if in_plane(data) and data.target is not None:
        exact = ExactScore(data.target, model.sde)
        drawings["score_field.png"] = _png(plotting.score_field_comparison, model, exact, field_times(exact))
        drawings["trajectories.png"] = _png(trajectories, model, data.target, seed)
    if len(shown.run.metrics()):
        drawings |= of_losses(shown.run)
    if in_plane(data) or is_image(data):
        drawings["noise_to_data.gif"] = partial(animate, model, shown.sampler, data, seed)
    return drawings


def write(drawings: Mapping[str, Drawing], folder: Path, progress: bool = True) -> list[Path]:
    """Draws the files one by one, with a bar."""
    folder.mkdir(exist_ok=True)
    bar = tqdm(drawings.items(), desc="figures", delay=2, disable=not progress)
    return [draw_into(folder / name) for name, draw_into in bar]


def _png(make: Callable[..., Figure], *arguments: Any) -> Drawing:
    return lambda path: save(make(*arguments), path)


def evaluation_sheets(data: Data, evaluation: Evaluation) -> dict[str, Drawing]:
    """A sheet of each sampler's samples, unless they are points in the plane; for images also of the nearest training ones."""
    if in_plane(data):
        return {}
    law = law_of(data)
    sheets = {f"samples_{name}.png": _png(plotting.sheet, x, law) for name, x in evaluation.samples.items()}
    if not is_image(data):
        return sheets
    return sheets | {f"nearest_{name}.png": _png(pairs, *both) for name, both in evaluation.nearest.items()}


def pairs(samples: Tensor, nearest: Tensor) -> Figure:
    """A row of samples above the training images nearest to them."""
    figure, axes = plotting.panels(1, width=6, height=2)
    plotting.image_grid(axes[0, 0], torch.cat([samples, nearest]), columns=len(samples))
    axes[0, 0].set_title("samples nearest to a training image (above), and that image (below)")
    return figure


def columns(images: Mapping[str, Tensor]) -> Figure:
    """Images (n, channels, height, width) side by side: a column for each name, a row for each image."""
    return mosaics({"": images}, 1)


def visible(operator: LinearOperator, y: Tensor) -> Tensor:
    """Observations as images: as they are if they have the images' height and width, else their pseudo-inverse."""
    return y if operator.output_shape[-2:] == operator.input_shape[-2:] else operator.pseudo_inverse(y)


def mosaics(rows: Mapping[str, Mapping[str, Tensor]], columns: int) -> Figure:
    """Named rows of named mosaics side by side, each of images (n, channels, height, width) in `columns` columns."""
    lines = -(-max(len(x) for row in rows.values() for x in row.values()) // columns)
    longest = max(map(len, rows.values()))
    figure, axes = plotting.panels(longest, len(rows), width=1.2, height=1.2 * lines / columns + 0.2)
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        line[0].set_ylabel(name)
        for ax, (title, x) in zip(line, row.items(), strict=False):
            plotting.image_grid(ax, x, columns=columns)
            ax.set_title(title)
        for ax in line[len(row) :]:
            ax.set_axis_off()
    return figure


def losses(run: Run) -> Figure:
    """The loss and, if the target is known, the error of the predicted noise, by noise quartile.

    The loss is weighted as in training, the error is not: at each noise level it shows what is left to learn (`fisher`) and
    what no network can reduce (`irreducible`).
    """
    metrics = run.metrics()
    excess = [name for name in metrics if str(name).startswith("fisher") or name == "irreducible"]
    figure, axes = plotting.panels(2 if excess else 1, width=7, height=4)
    plotting.loss_curves(axes[0, 0], metrics)
    axes[0, 0].set_title("loss, weighted as in training")
    if excess:
        plotting.loss_curves(axes[0, 1], metrics, columns=excess)
        axes[0, 1].set(title="unweighted: excess over the exact score (fisher), irreducible part",
                       ylabel="squared error of the noise per dimension")  # fmt: skip
    return figure


def of_diagnosis(model: ScoreModel, data: Data, found: Diagnosis) -> dict[str, Drawing]:
    """The figures of the `evaluation.diagnose` of a model on closed-form data."""
    drawings = {"diagnosis.png": _png(plotting.diagnosis, found)}
    if in_plane(data):
        exact = ExactScore(data.target, model.sde)
        drawings["score_error.png"] = _png(plotting.score_error_field, model, exact, field_times(exact))
    return drawings


def of_losses(run: Run) -> dict[str, Drawing]:
    return {"losses.png": _png(losses, run)}


def of_accuracy(table: pd.DataFrame, labels: Tensor) -> dict[str, Drawing]:
    return {"accuracy.png": _png(accuracy, table, labels)}


def accuracy(table: pd.DataFrame, labels: Tensor) -> Figure:
    """A noisy classifier's accuracy and cross-entropy at each noise level, and those of chance."""
    figure, axes = plotting.panels(2, width=4, height=3.5)
    shares = labels.bincount().double() / len(labels)
    chance = {"accuracy": shares.max(), "cross_entropy": torch.special.entr(shares).sum()}
    for ax, name, unit in zip(axes[0], ("accuracy", "cross_entropy"), ("on held-out examples", "in nats"), strict=True):
        ax.plot(table["level"], table[name], "o-", markersize=4, clip_on=False, zorder=3)
        ax.axhline(float(chance[name]), color=plotting.INK, linestyle="--", linewidth=1,
                   label="chance: the labels' shares")  # fmt: skip
        ax.set(xscale="log", ylim=(0, None))
        plotting.curves(ax, plotting.NOISE_LEVEL, f"{name.replace('_', '-')} {unit}", legend=None)
    axes[0, 0].set_ylim(top=1.02)
    plotting.legend_below(figure)
    return figure


def field_times(exact: ExactScore) -> list[float]:
    """Four times at which the noise is 1.5, 0.5, 0.15 and 0.05 of the data's standard deviation."""
    levels = exact.target.std * torch.tensor([1.5, 0.5, 0.15, 0.05], dtype=torch.float64)
    return exact.sde.time_at(-levels.log()).clamp(exact.sde.t_min, exact.sde.t_max).tolist()


def trajectories(model: ScoreModel, target: Target, seed: int, count: int = 300) -> Figure:
    """Paths of the reverse SDE and of the probability-flow ODE from the same starting points."""
    x = starts(model, count, seed).to(model.device)
    sde = Sampler(EulerMaruyama(), partial(grid.log_snr, steps=400))
    paths = {"reverse-time SDE": sde, "probability-flow ODE": ProbabilityFlowODE()}
    return plotting.trajectory_comparison(
        {name: _path(sampler, model, x, seed) for name, sampler in paths.items()}, target=target
    )


def animate(model: ScoreModel, sampler: Any, data: Data, seed: int, path: Path) -> Path:
    """Noise becoming data, as a GIF: images by the run's sampler, points along the reverse-time SDE."""
    points = len(model.event_shape) == 1
    sampler = Sampler(EulerMaruyama(), partial(grid.log_snr, steps=200)) if points else sampler
    x = starts(model, 1500 if points else 16, seed).to(model.device)
    scale = 1.0 if points else max(1.0, float(data.reference(5000).x.abs().max()))  # as in sheets of samples
    return plotting.animation(_path(sampler, model, x, seed) / scale, path)


def _path(sampler: Any, model: ScoreModel, x: Tensor, seed: int) -> Tensor:
    """All states of the sampler's path from x."""
    return sampler.sample(model, tuple(x.shape), seed=seed, x_init=x, trajectory=True).trajectory.cpu()


def save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    return path


def law_of(data: Data) -> Target | Tensor:
    """The data to draw next to samples: their law if it is known, else held-out examples."""
    return data.target if data.target is not None else data.reference(20_000).x


def in_plane(data: Data) -> bool:
    return tuple(data.event_shape) == (2,)


def is_image(of: Data | LearnedScore) -> bool:
    """Whether an example is an image in grey or in colour."""
    return len(of.event_shape) == 3 and of.event_shape[0] in (1, 3)

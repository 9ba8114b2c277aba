"""Edits images with a trained model, and imputes missing entries of examples of any shape.

python scripts/edit.py run=<dir> task=inpaint mask=<image> input=<image>
python scripts/edit.py run=<dir> task=inpaint input=<array with NaN where entries are missing>
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from scripting import conditions, configs, entry, figures, guiding, output
from scripting.command_line import idle, listed, typed
from torch import Tensor

from score_sde import LearnedScore, ProbabilityFlowODE, SampleNoise, ScoreModel
from score_sde.build import build
from score_sde.checks import one_of, whole
from score_sde.data import load_images, measure_data_std
from score_sde.data.files import SUFFIXES, image_files
from score_sde.evaluation.restoration import psnr
from score_sde.guidance import (
    TASKS,
    ClassifierFree,
    LinearOperator,
    Mask,
    Observed,
    PiGDM,
    interpolate,
    sdedit,
    task_operator,
)
from score_sde.progress import tqdm
from score_sde.run import Run
from score_sde.solver import SampleResult

OPTIONS = {
    **dict.fromkeys(TASKS, ("sampler", "guidance", "degraded", "noise_std", "operator", "mask", "label", "context")),
    "class": ("sampler", "label", "context", "scale", "time"),
    "interpolate": ("label", "context"),
}
"""The options that each task takes, of those that not all tasks take."""

Edited = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Inputs (n, ...), results (n, draws, ...), and the columns of the sheet by name."""


@entry.main("edit")
def main(config: DictConfig) -> None:
    run_task(config, typed())


def check_options(task: str, overrides: Sequence[str]) -> None:
    """Raises ValueError for an unknown task and for options of other tasks."""
    own = OPTIONS[one_of("task", task, OPTIONS)]
    others = {name for options in OPTIONS.values() for name in options if name not in own}
    idle(overrides, others, f"in task={task}, which takes {', '.join(own)}")


def run_task(config: DictConfig, overrides: Sequence[str] = ()) -> Path:
    """Carries out the task, checked against the command line's `overrides`, and returns the folder of its results."""
    check_options(config.task, overrides)
    for name in ("count", "draws"):
        whole(name, config[name])
    run = configs.open_run(config)
    model = configs.model_of(run, config)
    node = configs.sampler_config(config.sampler, run.path, config.step, conditions.asked_for(config, run))
    sampler = build(node, run.trust)
    sampler.check(model.sde)
    edit = {"class": relabelled, "interpolate": interpolated}.get(config.task, restored)
    before, after, columns = edit(config, run, model, sampler)
    folder = output.folder_of(configs.recorded(config), Path(config.output or run.path / "edits" / config.task))
    output.save_samples(folder, {"before": before, "after": after})
    if figures.is_image(model):
        output.save_images(folder, after, names_of(config))
        figures.save(figures.columns(columns), folder / "sheet.png")
    inputs = "pairs" if config.task == "interpolate" else "inputs"
    print(f"{output.member()}{config.task}: {after.shape[1]} results for each of {len(after)} {inputs}; in {folder}")
    return folder


def restored(config: DictConfig, run: Run, model: LearnedScore, sampler: Any) -> Edited:
    """Draws of the posterior for degraded images; the sheet shows the input, what is seen of it, and the draws.

    An input with missing entries (NaN) is taken as an observation. Inputs that miss the same entries are drawn together.
    """
    conditioned, method = conditions.conditioned(model, run, config), method_of(config, run, model)
    before = inputs(config, run, observed_shape(config, model))
    patterns, pattern_of = before.isnan().unique(dim=0, return_inverse=True)
    incomplete = bool(patterns.any())
    observed = config.degraded or incomplete
    parts = []
    for i, missing in enumerate(tqdm(patterns, desc="missing entries", disable=len(patterns) == 1, delay=2)):
        rows = (pattern_of == i).nonzero().flatten()
        hidden = missing if incomplete and config.task == "inpaint" else None
        operator = operator_of(config, model.event_shape, hidden)
        y = observation(config, operator, before[rows], observed)
        y_of_draws = y.repeat_interleave(config.draws, 0).to(model.device)
        guided = method(conditioned, operator, y_of_draws, config.noise_std)
        drawn = draws_of(config, sampler, guided, rows, progress=len(patterns) == 1)
        parts.append(Restored(drawn.nfe, drawn.seconds, rows, drawn.x.cpu().unflatten(0, (len(rows), config.draws)),
                              operator.pseudo_inverse(y), figures.visible(operator, y)))  # fmt: skip
    found, name = Restored.joined(parts), method.func.__name__
    print(f"{name}: {found.nfe} network calls per draw, {found.seconds:.1f} s")
    print_quality(name, found.after, before, None if observed else found.seen)
    first = before.where(~before.isnan(), found.seen) if before.shape == found.seen.shape else found.shown
    return before, found.after, {"input": first, "seen": found.shown} | numbered("draw", found.after)


@dataclass(frozen=True)
class Restored:
    """Draws for the inputs that are seen through one operator.

    Attributes:
        nfe, seconds: network calls per draw, and seconds for all draws.
        rows: (n,), the indices of these inputs.
        after: (n, draws, *event_shape), the draws.
        seen: (n, *event_shape), the observations' pseudo-inverse.
        shown: the observations as images.
    """

    nfe: int
    seconds: float
    rows: Tensor
    after: Tensor
    seen: Tensor
    shown: Tensor

    @classmethod
    def joined(cls, parts: Sequence[Restored]) -> Restored:
        """All parts as one, in the order of the inputs."""
        rows, *columns = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "after", "seen", "shown")
        )
        nfe, seconds = max(part.nfe for part in parts), sum(part.seconds for part in parts)
        return cls(nfe, seconds, rows.sort().values, *(column[rows.argsort()] for column in columns))


def observed_shape(config: DictConfig, model: LearnedScore) -> tuple[int, ...]:
    """The shape of an input: the model's event shape, or an observation's if it is one of another task than inpainting."""
    if config.degraded and config.task != "inpaint":
        return operator_of(config, model.event_shape).output_shape
    return model.event_shape


def observation(config: DictConfig, operator: LinearOperator, x: Tensor, observed: bool) -> Tensor:
    """The observations of clean inputs x, with noise; inputs that are `observed` already get no more noise."""
    if not observed:
        return operator.observe(x, config.noise_std, generator=torch.Generator().manual_seed(config.seed))
    return operator(x) if config.task == "inpaint" else x


def draws_of(
    config: DictConfig, sampler: Any, guided: ScoreModel, rows: Tensor, *, progress: bool
) -> SampleResult:  # fmt: skip
    """The draws of each row, one row after the other, from noise that depends on the row alone."""
    samples = (rows[:, None] * config.draws + torch.arange(config.draws)).flatten()
    noise = SampleNoise.of_run(config.seed, samples)
    return sampler.sample(guided, (len(samples), *guided.event_shape), noise=noise, progress=progress)


def print_quality(name: str, after: Tensor, before: Tensor, seen: Tensor | None) -> None:
    """Warns of draws (n, draws, ...) that have diverged; prints the PSNR to inputs that were degraded to `seen`."""
    far = (~(after.abs().flatten(2).amax(2) <= 10 * max(1.0, float(before.nan_to_num().abs().max())))).sum()
    if far:
        print(f"warning: {far} of {len(after) * after.shape[1]} draws are far beyond the data: {name} has diverged; take "
              "weaker guidance, more steps (sampler.grid.steps=500), or guidance=mmps")  # fmt: skip
    if seen is not None:
        named = {"draws": after.flatten(0, 1), "their mean": after.mean(1), "pseudo-inverse": seen}
        for title, x in named.items():
            print(f"  PSNR of {title}: {psnr(x, before.repeat_interleave(len(x) // len(before), 0)):.2f} dB")


def method_of(config: DictConfig, run: Run, model: ScoreModel) -> partial[Any]:
    """The guidance that restores images; PiGDM with the standard deviation of the run's data.

    Raises ValueError for guidance that does not restore observations.
    """
    method = build(config.guidance, (*run.trust, "score_sde.guidance"))
    if not issubclass(method.func, Observed):
        raise ValueError(f"{method.func.__name__} restores no observations: task={config.task} takes guidance=mmps, pigdm, "
                         "dps, diffpir or replacement")  # fmt: skip
    if method.func is PiGDM and config.guidance.get("data_std") is None:
        try:
            method = partial(method, data_std=measure_data_std(run.data()))
        except FileNotFoundError:
            print(f"the data of {run.path} are missing: PiGDM takes the model's data_std={model.data_std:.3g}")
    return method


def relabelled(config: DictConfig, run: Run, model: LearnedScore, sampler: Any) -> Edited:
    """Inputs noised up to `time` and sampled from there under the label."""
    if config.label is None:
        raise ValueError("task=class needs the label to change the input to: give label=<number>")
    given = conditions.shared(model, run, config)
    guiding.check_unconditional(run, config.scale)
    before = inputs(config, run, model.event_shape)
    start = before.repeat_interleave(config.draws, 0).to(model.device)
    condition = {name: value.to(model.device).expand(len(start), *value.shape) for name, value in given.items()}
    guided = ClassifierFree(model, config.scale)
    result = sdedit(sampler, guided, start, config.time, seed=config.seed, condition=condition)
    after = result.x.cpu().unflatten(0, (len(before), config.draws))
    return before, after, {"input": before} | numbered("draw", after)


def interpolated(config: DictConfig, run: Run, model: LearnedScore, sampler: Any) -> Edited:
    """`draws` images between each input and the next, equally spaced along a path through their latent codes."""
    conditioned = conditions.conditioned(model, run, config)
    before = inputs(config, run, model.event_shape)
    if len(before) < 2:
        raise ValueError("task=interpolate needs two inputs or more")
    x = before.to(model.device)
    shares = torch.linspace(0, 1, config.draws + 2)[1:-1].tolist()
    frames = interpolate(ProbabilityFlowODE(), conditioned, x[:-1], x[1:], shares).transpose(0, 1).cpu()
    return before, frames, {"from": before[:-1]} | numbered("step", frames) | {"to": before[1:]}


def operator_of(config: DictConfig, event_shape: tuple[int, ...], missing: Tensor | None = None) -> LinearOperator:
    """The task's operator; for inpainting, the mask given, without the entries that are `missing`.

    Raises ValueError for a mask with another task or of another size, for an option that the operator does not have, and
    for events that are not images if there is neither a mask nor missing entries.
    """
    if config.mask is not None and config.task != "inpaint":
        raise ValueError(f"mask= belongs to task=inpaint, not to task={config.task}")
    if config.mask is not None or missing is not None:
        seen = torch.ones(event_shape, dtype=torch.bool) if config.mask is None else read_mask(Path(config.mask))
        mask = Mask(event_shape, seen)
        return mask if missing is None else Mask(event_shape, mask.observed & ~missing)
    if len(event_shape) != 3:
        raise ValueError(f"task={config.task} knows what is seen of images, not of events of shape {event_shape}: take "
                         "task=inpaint mask=<.npy>, True where they are seen, or an input with NaN where not")  # fmt: skip
    return task_operator(config.task, event_shape, **config.operator)


def read_mask(path: Path) -> Tensor:
    """A .npy array as it is, or an image as True where it is lighter than middle grey."""
    from PIL import Image

    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path, allow_pickle=False))
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image.convert("L")) > 127)


def inputs(config: DictConfig, run: Run, shape: tuple[int, ...]) -> Tensor:
    """The inputs given, or held-out examples of the run's own data, of the given label unless task=class changes it."""
    if config.input is None:
        if config.degraded:
            raise ValueError("degraded=true says that the input is an observation: give input=<image, folder or .npy>")
        data, labels = run.data(), [] if config.task == "class" else conditions.labels_of(config.label, run)
        if labels and data.num_classes is not None:
            data = data.of_classes(labels)
        return data.reference(config.count).x
    paths = listed(config.input)
    if config.degraded and config.task != "inpaint":
        for path in paths:
            check_observed(Path(path), config.task, shape)
    x = torch.cat([torch.from_numpy(load_images(path, shape)) for path in paths])
    if len(x) > config.count:
        print(f"the first {config.count} of {len(x)} inputs: count={len(x)} takes all")
    return x[: config.count]


def files_of(given: Any) -> list[Path]:
    """The file itself, or the image files in a folder."""
    return [path] if (path := Path(given)).is_file() else image_files(path)


def names_of(config: DictConfig) -> list[str]:
    """Names for the inputs, or pairs of them, from their image files; none for arrays and held-out examples."""
    files = [file for given in (listed(config.input) if config.input else []) for file in files_of(given)]
    names = [file.stem for file in files][: config.count]
    if any(file.suffix == ".npy" for file in files):
        return []
    return [f"{a}-{b}" for a, b in pairwise(names)] if config.task == "interpolate" else names


def check_observed(path: Path, task: str, shape: tuple[int, ...]) -> None:
    """Raises ValueError for image files that cannot be observations of the task, and are probably clean images.

    These are of another size, or in colour where one channel is observed.
    """
    from PIL import Image

    for file in files_of(path):
        if file.suffix.lower() not in SUFFIXES:
            continue
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        size, coloured = pixels.shape[:2], bool((pixels != pixels[..., :1]).any())
        if size != tuple(shape[-2:]) or (shape[0] == 1 and coloured):
            given = f"{size[0]}x{size[1]}{' in colour' if coloured else ''}"
            wanted = f"{shape[-2]}x{shape[-1]}{' in grey' if shape[0] == 1 else ''}"
            raise ValueError(f"{file} is {given}, an observation of task={task} is {wanted}: leave degraded=false "
                             "if it is a clean image, to be degraded here")  # fmt: skip


def numbered(name: str, x: Tensor) -> dict[str, Tensor]:
    """x of shape (inputs, count, *event_shape) as `count` columns of a sheet, "<name> 1", "<name> 2", ..."""
    return {f"{name} {i + 1}": part for i, part in enumerate(x.unbind(1))}


if __name__ == "__main__":
    main()

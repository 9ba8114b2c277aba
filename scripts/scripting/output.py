"""Output of scripts: folders that record their settings, samples, and printed tables."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from torch import Tensor

from score_sde.progress import tqdm
from score_sde.training import write_array, write_atomically
from scripting.command_line import typed

RATIOS = ("nfe: network calls per sample; ratio: value over floor, the same distance between two sets of this many exact "
          "samples: about 1 is as good as exact samples")  # fmt: skip

FEW = 100
"""Fewer samples than this are said to tell little: by chance, good and bad samplers may have the same ratio."""


def folder_of(settings: Mapping[str, Any], home: Path) -> Path:
    """A folder for results of these settings, recorded in it: `home`, or home-2, ... if that has results of others."""
    own, folder, others = json.loads(json.dumps(settings)), home, itertools.count(2)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "settings.json"
        with suppress(FileExistsError):  # another process may write it first
            write_atomically(record, json.dumps(own, indent=2) + "\n", new=True)
        if json.loads(record.read_text()) == own:
            return folder
        folder = home.with_name(f"{home.name}-{next(others)}")


def member() -> str:
    """The overrides of this job of a sweep, to print before the folder of its results; empty if there is no sweep."""
    in_sweep = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return f"{' '.join(typed())}: " if in_sweep else ""


def content_of(file: Any) -> str | None:
    """A hash of a file's content; None for an option that is not the name of a file."""
    return hashlib.blake2b(Path(file).read_bytes()).hexdigest()[:32] if isinstance(file, str) else None


def save_samples(folder: Path, samples: Mapping[str, Any]) -> None:
    """Writes <folder>/<name>.npy for each set of samples."""
    for name, x in samples.items():
        write_array(folder / f"{name}.npy", x.numpy())


def save_images(folder: Path, x: Tensor, names: Sequence[str] = ()) -> None:
    """Writes images in [-1, 1], clipped, as uint8 into <folder>/images.npz and <folder>/png/00000.png, 00001.png, ...

    x has shape (n, channels, height, width) or (n, draws, ...); the files of draws are 00000-1.png, 00000-2.png, ..., with
    `names` 00000-<name>-1.png. `arr_0` of the archive has the channels last, three equal ones for grey images: evaluators of
    FID take no others.
    """
    import numpy as np
    from PIL import Image

    from score_sde.evaluation.extractors import quantized

    pixels = quantized(x).movedim(-3, -1).numpy()
    archive, pictures = (folder / f".partial-{os.getpid()}{name}" for name in (".npz", "-png"))
    np.savez(archive, np.broadcast_to(pixels, (*pixels.shape[:-1], 3)))
    pictures.mkdir(exist_ok=True)
    shown = pixels if pixels.shape[-1] == 3 else pixels[..., 0]
    for i, *draw in tqdm([*np.ndindex(x.shape[:-3])], desc="png", delay=2):
        name = "-".join([f"{i:05d}", *names[i : i + 1], *(str(j + 1) for j in draw)])
        Image.fromarray(shown[i, *draw]).save(pictures / f"{name}.png")
    archive.replace(folder / "images.npz")
    shutil.rmtree(folder / "png", ignore_errors=True)
    pictures.rename(folder / "png")


def show(table: Any, note: str = "") -> None:
    """Prints a table, and below it a note on its columns."""
    print("\n" + table.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    if note:
        print(note)
    if {"count", "ratio"} <= {*table} and (few := int(table["count"].min())) < FEW:
        print(f"{few} samples tell little, whatever the ratio: give num_samples=2000 or more")

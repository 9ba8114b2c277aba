"""Checkpoints that stay intact if the process is killed at any instant.

    checkpoints/step-000001000/   weights.safetensors  ema.safetensors  [ema-<name>.safetensors]  state.pt

A checkpoint is written under a hidden name, flushed to disk and renamed, so a folder named step-* is always complete.
Weights are safetensors, and the training state is read with `weights_only=True`: neither can execute code.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Checkpoints", "write_array", "write_atomically", "write_weights"]

T = TypeVar("T")


class Checkpoints:
    """The checkpoints in a folder. Saving keeps the last `keep` (None: all). Only one process may write at a time."""

    def __init__(self, folder: str | Path, keep: int | None = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in increasing order."""
        names = (re.fullmatch(r"step-(\d{9,})", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in names if match)

    def latest(self) -> int | None:
        """Step of the latest checkpoint, None if there is none."""
        return max(self.steps(), default=None)

    def path(self, step: int | None = None) -> Path:
        """Folder of a checkpoint, the latest by default. Raises FileNotFoundError if there is none."""
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            has = f"has checkpoints of the steps {steps}" if steps else "has no checkpoint yet"
            wanted = "" if step is None else f", none of step {step}"
            raise FileNotFoundError(f"{self.folder} {has}{wanted}: train further, or choose another")
        return self.folder / f"step-{steps[-1] if step is None else step:09d}"

    def weights(self, step: int | None = None, *, ema: bool | str = True) -> dict[str, Tensor]:
        """Averaged weights, raw ones (`ema=False`), or those of the average called `ema`.

        Raises FileNotFoundError if that step or average was not saved.
        """
        folder, name = self.path(step), ema if isinstance(ema, str) else "ema" if ema else "weights"
        if not (folder / f"{name}.safetensors").exists():
            held = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors")))
            raise FileNotFoundError(f"{folder} has no {name}.safetensors: choose one of {held}")
        return self._read(folder / f"{name}.safetensors", load_file)

    def state(self, step: int | None = None) -> dict[str, Any]:
        """The training state beside the weights, as `save` was given it."""
        return self._read(self.path(step) / "state.pt", partial(torch.load, map_location="cpu", weights_only=True))

    def _read(self, file: Path, read: Callable[[Path], T]) -> T:
        """The content of a file. Raises ValueError if it is damaged, naming the previous checkpoint to go back to."""
        try:
            return read(file)
        except (SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
            before = [step for step in self.steps() if self.path(step) < file.parent]
            left = f", which leaves step {before[-1]}" if before else ""
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"{file} is damaged: remove {file.parent}{left} ({reason})") from error

    def save(
        self, step: int, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any] | None = None
    ) -> None:
        """Writes a checkpoint: a file for each entry of `weights`, and the state. An existing one of that step is kept.

        Also removes checkpoints older than the last `keep`, and what a killed process left half-written.
        """
        if step not in self.steps():
            unfinished = self.folder / f".partial-{step}"
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for name, tensors in weights.items():
                write_weights(unfinished / f"{name}.safetensors", tensors)
            if state is not None:
                with _writing(unfinished / "state.pt"):
                    torch.save(dict(state), unfinished / "state.pt")
            for path in (*unfinished.iterdir(), unfinished):
                _flush(path)
            unfinished.rename(self.folder / f"step-{step:09d}")
            _flush(self.folder)
        self._remove(self.steps()[: -self.keep] if self.keep else [])

    def remove_after(self, step: int) -> None:
        """Removes the checkpoints of later steps."""
        self._remove([later for later in self.steps() if later > step])

    def _remove(self, steps: Sequence[int]) -> None:
        for old in steps:
            self.path(old).rename(self.folder / f".partial-{old}")
        for leftover in self.folder.glob(".partial-*"):
            shutil.rmtree(leftover)


def write_atomically(path: Path, text: str, new: bool = False) -> None:
    """Replaces the content of a file atomically. With `new`, raises FileExistsError if the file exists."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}" if new else f".partial-{path.name}")
    partial.write_text(text)
    _flush(partial)
    if new:
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with path.open("x") as file:
                file.write(text)
        finally:
            partial.unlink()
    else:
        partial.replace(path)
    _flush(path.parent)


def write_array(path: Path, array: np.ndarray) -> None:
    """Replaces a .npy file atomically; several processes may do so at once."""
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    np.save(partial, array)
    partial.replace(path)


def write_weights(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors, some of which may share memory, as safetensors. Raises OSError if the write fails."""
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with _writing(file):
        save_file(copies, file)


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    """Turns the errors that safetensors and torch raise for a failed write into OSError."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OSError(f"{file} could not be written: is the disk full? ({reason})") from error


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

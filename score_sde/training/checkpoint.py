"""Checkpoints that a kill at any instant cannot spoil.

    checkpoints/step-000001000/   weights.safetensors  ema.safetensors  state.pt

A checkpoint is written under a hidden name, flushed to the disk and renamed: a folder called step-* is complete.
Weights are safetensors, the state of training is read with `weights_only=True`; neither can execute code.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["Checkpoints", "write_atomically"]


class Checkpoints:
    """The checkpoints in a folder, of which the last `keep` stay. One process writes at a time."""

    def __init__(self, folder: str | Path, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in increasing order."""
        names = (re.fullmatch(r"step-(\d{9,})", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in names if match)

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def path(self, step: int | None = None) -> Path:
        """Folder of a checkpoint, the latest by default; FileNotFoundError where there is none."""
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            has = f"has checkpoints of the steps {steps}" if steps else "has no checkpoint yet"
            raise FileNotFoundError(f"{self.folder} {has}, none of step {step or 'any'}: train on, or choose another")
        return self.folder / f"step-{steps[-1] if step is None else step:09d}"

    def weights(self, step: int | None = None, *, ema: bool = True) -> dict[str, Tensor]:
        return load_file(self.path(step) / ("ema.safetensors" if ema else "weights.safetensors"))

    def state(self, step: int | None = None) -> dict[str, Any]:
        return torch.load(self.path(step) / "state.pt", map_location="cpu", weights_only=True)

    def save(
        self, step: int, weights: Mapping[str, Tensor], ema: Mapping[str, Tensor], state: Mapping[str, Any]
    ) -> None:
        """Writes a checkpoint, unless that step has one, and removes old ones and what a kill left half-written."""
        if step not in self.steps():
            partial = self.folder / f".partial-{step}"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            save_file(_plain(weights), partial / "weights.safetensors")
            save_file(_plain(ema), partial / "ema.safetensors")
            torch.save(dict(state), partial / "state.pt")
            for path in (*partial.iterdir(), partial):
                _flush(path)
            partial.rename(self.folder / f"step-{step:09d}")
            _flush(self.folder)
        for old in self.steps()[: -self.keep]:
            self.path(old).rename(self.folder / f".partial-{old}")
        for leftover in self.folder.glob(".partial-*"):
            shutil.rmtree(leftover)


def write_atomically(path: Path, text: str) -> None:
    """Replaces the content of a file in one instant."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text)
    _flush(partial)
    partial.replace(path)
    _flush(path.parent)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that share no memory, which safetensors asks for."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

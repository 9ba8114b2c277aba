"""What scripts leave and print: folders that record their settings, samples, tables."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from score_sde.training import write_atomically

RATIOS = ("nfe: network calls a sample; ratio: value over floor, the same distance between two sets of exact samples of this "
          "number: about 1 is as good as exact samples")  # fmt: skip


def folder_of(settings: Mapping[str, Any], home: Path) -> Path:
    """A folder for results of these settings, which it records: `home`, or home-2, ... where that has those of others."""
    own, folder, others = json.loads(json.dumps(settings)), home, itertools.count(2)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "settings.json"
        with suppress(FileExistsError):  # of two processes one comes first
            write_atomically(record, json.dumps(own, indent=2) + "\n", new=True)
        if json.loads(record.read_text()) == own:
            return folder
        folder = home.with_name(f"{home.name}-{next(others)}")


def content_of(file: Any) -> str | None:
    """A hash of a file's content; None where an option is null or no name of a file."""
    return hashlib.blake2b(Path(file).read_bytes()).hexdigest()[:32] if isinstance(file, str) else None


def save_samples(folder: Path, samples: Mapping[str, Any]) -> None:
    """<folder>/<sampler>.npy for each set of samples."""
    import numpy as np

    for name, x in samples.items():
        partial = folder / f".partial-{os.getpid()}-{name}.npy"
        np.save(partial, x.numpy())
        partial.replace(folder / f"{name}.npy")


def show(table: Any, note: str = "") -> None:
    """Prints a table of figures, and under it what its columns are."""
    print("\n" + table.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    if note:
        print(note)

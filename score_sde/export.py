"""A trained model as a folder of two files, from which it is rebuilt without Hydra and without its run.

    config.json          sde, parameterization, network, event_shape, seed: the parts of a run's config that make the model
    model.safetensors    its weights

`Run.export` writes the folder, `score_sde.load` reads it. As in a run, a `_target_` is called only if it is trusted (see
`score_sde.build`), so that reading executes no code from the files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from score_sde.build import build_model
from score_sde.score import LearnedScore

__all__ = ["PARTS", "differing", "load", "save"]

PARTS = ("sde", "parameterization", "network", "event_shape", "seed")
CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save(model: nn.Module, config: Mapping[str, Any], path: str | Path) -> Path:
    """Writes a model and the config that rebuilds it to a new folder, atomically.

    Raises ValueError if the folder exists, or the config lacks a part or holds values that JSON cannot represent.
    """
    from score_sde.training.checkpoint import write_weights  # loading does not need it

    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists: export to a new folder")
    absent = [name for name in PARTS if name not in config]
    if absent:
        raise ValueError(f"the config lacks {absent[0]!r}: a model is made of {', '.join(PARTS)}")
    try:
        text = json.dumps({name: config[name] for name in PARTS}, indent=2) + "\n"
    except TypeError as error:
        raise ValueError(f"the config is not plain numbers, names and lists: {error}") from None
    partial = path.with_name(f".partial-{path.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / CONFIG).write_text(text)
    write_weights(partial / WEIGHTS, model.state_dict())
    for file in (partial / CONFIG, partial / WEIGHTS):
        with file.open("rb") as written:
            os.fsync(written.fileno())
    return partial.rename(path)


def load(path: str | Path, trust: Sequence[str] = ()) -> LearnedScore:
    """The model that `Run.export` wrote to a folder, on the CPU, frozen and in evaluation mode, with bitwise equal weights.

    `trust` lists your own modules whose classes config.json may name, e.g. ("my_sde",).

    Raises:
        FileNotFoundError: the folder or one of its two files does not exist.
        ValueError: a file is damaged, the weights are not those of the config, or a `_target_` is not trusted.
    """
    path = Path(path)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path} has no {name}: give a folder that Run.export wrote")
    try:
        config = json.loads((path / CONFIG).read_text())
        if not isinstance(config, dict) or not set(PARTS) <= config.keys():
            raise ValueError(f"it must hold {', '.join(PARTS)}")
    except ValueError as error:
        raise ValueError(f"{path / CONFIG} is no config of a model: {error}") from None
    model = build_model(config, trust)
    try:
        weights = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is damaged: {error}") from None
    if wrong := differing(model.state_dict(), weights):
        raise ValueError(
            f"{path / WEIGHTS} has other weights than the model of {CONFIG}: {wrong[0]}, one of {len(wrong)}"
        )
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def differing(known: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """The names at which given weights do not fit the known ones, each with both shapes."""
    names = dict.fromkeys([*known, *given])
    held = (given, known)
    shapes = {name: [tuple(part[name].shape) if name in part else "missing" for part in held] for name in names}
    return [f"{name} is {there} there, {here} here" for name, (there, here) in shapes.items() if there != here]

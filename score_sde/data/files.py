"""Finite sets from files: scikit-learn's digits, .npy and .npz arrays, folders of images. No file can execute code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from score_sde.data.tensor import TensorData

__all__ = ["digits", "image_folder", "load_file", "load_images"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}


def digits(*, labels: bool = False, dequantize: bool = False, held_out: float = 0.2, seed: int = 0) -> TensorData:
    """The 1,797 handwritten digits of scikit-learn, (1, 8, 8), 17 grey levels scaled to [-1, 1].

    With the default 359 images are held out, always the same ones. `labels` gives each batch the class 0..9 as `label`.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[:, None]
    classes = bunch.target if labels else None
    return TensorData(images, classes, seed=seed, dequantize=dequantize, levels=17, held_out=held_out)


def load_file(
    path: str | Path,
    *,
    x: str = "x",
    labels: str | None = None,
    dequantize: bool | None = None,
    levels: int = 256,
    held_out: float = 0.0,
    seed: int = 0,
) -> TensorData:
    """Examples (N, *event) from a .npy file, or from the array `x` (and `labels`) of a .npz file.

    Raises ValueError for other files, missing arrays, and what `TensorData` refuses; FileNotFoundError for no file.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".npz"):
        raise ValueError(f"{path} is no .npy or .npz file: save the array with numpy.save or numpy.savez")
    loaded = np.load(path, allow_pickle=False)
    arrays = {x: loaded} if path.suffix == ".npy" else dict(loaded)
    missing = [name for name in (x, labels) if name is not None and name not in arrays]
    if missing:
        raise ValueError(f"{path} has no array {', '.join(missing)}, only {', '.join(arrays)}: set x= and labels=")
    classes = arrays[labels] if labels else None
    return TensorData(arrays[x], classes, dequantize=dequantize, levels=levels, held_out=held_out, seed=seed)


def image_folder(
    path: str | Path,
    size: int,
    *,
    channels: int = 3,
    labels: bool = False,
    dequantize: bool = False,
    held_out: float = 0.0,
    seed: int = 0,
) -> TensorData:
    """Every image under a folder, cropped to its central square and resized to (channels, size, size), in [-1, 1].

    With `labels` the class of an image is its first folder below `path`, numbered in alphabetical order.
    Raises ValueError where there are no images, or channels is neither 1 nor 3.
    """
    root = Path(path)
    paths = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"{root} holds no images: give a folder with {', '.join(sorted(SUFFIXES))} files")
    if channels not in (1, 3):
        raise ValueError(f"channels={channels}: 1 for grey, 3 for colour")
    images = np.stack([_square(file, size, channels) for file in paths])
    folders = [file.relative_to(root).parts[0] for file in paths]
    classes = np.unique(folders, return_inverse=True)[1] if labels else None
    return TensorData(images, classes, dequantize=dequantize, held_out=held_out, seed=seed)


def load_images(path: str | Path, event_shape: Sequence[int]) -> np.ndarray:
    """Float32 examples (n, *event_shape): an image or a folder of them by name, in [-1, 1], or a .npy array as it is.

    Raises ValueError for events that are no square images, or where nothing fits; FileNotFoundError for no file.
    """
    path, shape = Path(path), tuple(event_shape)
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False).astype(np.float32)
        array = array[None] if array.shape == shape else array
        if array.shape[1:] != shape or len(array) == 0:
            raise ValueError(f"{path} holds an array of shape {array.shape}, events of shape (n, {shape}) are needed")
        return array
    if len(shape) != 3 or shape[0] not in (1, 3) or shape[1] != shape[2]:
        raise ValueError(f"events of shape {shape} are no square images: give a .npy array")
    if not path.exists():
        raise FileNotFoundError(f"no image and no folder at {path}")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files or files[0].suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} holds no images: give {', '.join(sorted(SUFFIXES))} files")
    return np.stack([_square(file, shape[1], shape[0]) for file in files]).astype(np.float32) * np.float32(2 / 255) - 1


def _square(path: Path, size: int, channels: int) -> np.ndarray:
    """The central square of an image as uint8 (channels, size, size)."""
    from PIL import Image

    with Image.open(path) as image:
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        square = image.convert("L" if channels == 1 else "RGB").crop((left, top, left + side, top + side))
    resized = square.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(resized, dtype=np.uint8).reshape(size, size, channels).transpose(2, 0, 1)

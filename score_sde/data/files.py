"""Finite sets from files: scikit-learn's digits, .npy and .npz arrays, folders of images. No file can execute code."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from score_sde.data.augment import Augment
from score_sde.data.cache import Stored, content, mapped, stored
from score_sde.data.decode import SUFFIXES, Decoder, Images, Size, image_data
from score_sde.data.tensor import Examples, TensorData

__all__ = ["digits", "image_folder", "load_file", "load_images"]


def digits(*, labels: bool = False, dequantize: bool = False, held_out: float = 0.2, seed: int = 0) -> TensorData:
    """The 1,797 handwritten digits of scikit-learn, (1, 8, 8), 17 grey levels scaled to [-1, 1].

    By default 359 images are held out, always the same ones. With `labels`, batches have the class 0..9 as `label`.
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
    context: str | None = None,
    test: str | None = None,
    test_labels: str | None = None,
    test_context: str | None = None,
    channels_last: bool = False,
    dequantize: bool | None = None,
    levels: int = 256,
    held_out: float | None = 0.0,
    flip: bool = False,
    augment: Augment | None = None,
    seed: int = 0,
) -> TensorData:
    """Examples (N, *event) from a .npy file, or from arrays of a .npz file.

    A .npy file is memory-mapped; the first call for a .npz file unpacks it into the cache.

    Args:
        path: the file.
        x, labels, context: names of the arrays of a .npz file: examples, classes (N,), and what each example depends on,
            (N, width) or tokens (N, tokens, width).
        test, test_labels, test_context: names of the arrays of held-out examples, e.g. x_test; or
        held_out: the fraction of the examples set aside; None: a tenth, unless there is `test`.
        channels_last: images are (N, height, width, channels).
        dequantize, levels, flip, augment, seed: see `TensorData`.

    Raises:
        ValueError: another or a damaged file, missing arrays, or what `TensorData` does not take.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".npz"):
        hint = (
            "images in a folder are data=folder" if path.is_dir() else "save the array with numpy.save or numpy.savez"
        )
        raise ValueError(f"{path} is not a .npy or .npz file: {hint}")
    wanted = [name for name in (x, labels, context, test, test_labels, test_context) if name is not None]
    moved = (x, test) if channels_last else ()
    arrays = _unpacked(path, wanted, moved) if path.suffix == ".npz" else _mapped(path, x, wanted, moved)

    def examples(images: str, *conditions: str | None) -> Examples:
        classes, tokens = (arrays[name].x if name else None for name in conditions)
        return Examples(arrays[images].x, classes, arrays[images].fingerprint, tokens)

    train = examples(x, labels, context)
    held = examples(test, test_labels, test_context) if test else None
    return TensorData(train.x, train.labels, context=train.context, test=held, dequantize=dequantize, levels=levels,
                      held_out=held_out, flip=flip, augment=augment, seed=seed,
                      fingerprint=train.fingerprint)  # fmt: skip


def _mapped(path: Path, x: str, wanted: Sequence[str], moved: Sequence[str | None]) -> dict[str, Stored]:
    """The array of a .npy file; if its name is in `moved`, with the last axis moved to the second place."""
    _check_names(path, wanted, [x])
    try:
        array = mapped(path)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} holds no array of numbers, or is damaged: save it again ({error})") from error
    return {x: Stored(array.movedim(-1, 1) if x in moved else array, None)}


def _unpacked(path: Path, wanted: Sequence[str], moved: Sequence[str | None]) -> dict[str, Stored]:
    """The wanted arrays of a .npz file, from the cache; those in `moved` with the last axis moved to the second place."""

    def write(folder: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            _check_names(path, wanted, arrays.files)
            for i, name in enumerate(wanted):
                array = np.moveaxis(arrays[name], -1, 1) if name in moved else arrays[name]
                np.save(folder / f"{i}.npy", np.ascontiguousarray(array))

    try:
        found = stored("npz", {"file": content([path]), "arrays": wanted, "moved": moved}, write)
    except (BadZipFile, zlib.error, TypeError) as error:
        raise ValueError(f"{path} holds no arrays of numbers, or is damaged: save it again ({error})") from error
    return {name: found[str(i)] for i, name in enumerate(wanted)}


def _check_names(path: Path, wanted: Sequence[str], known: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in known]:
        raise ValueError(
            f"{path} has no array {', '.join(map(str, missing))}, only {', '.join(known)}: name its arrays x=, labels="
        )


def image_folder(
    path: str | Path,
    size: Size = None,
    *,
    channels: int = 3,
    fit: str = "crop",
    labels: bool = False,
    dequantize: bool = False,
    test: str | Path | None = None,
    held_out: float | None = 0.0,
    flip: bool = False,
    augment: Augment | None = None,
    seed: int = 0,
) -> TensorData:
    """Every image under a folder as (channels, height, width) in [-1, 1], by the rules of `score_sde.data.decode`.

    The first call decodes them into the cache. With `labels`, the class of an image is its top-level folder below `path`,
    numbered in alphabetical order; `class_names` has the names.

    Args:
        path: the folder; images may be at any depth.
        size: an edge for squares, [height, width], or None for the images' own size, which all must share.
        channels: 1 for grey, 3 for colour.
        fit: "crop" the central part of the target's aspect ratio, "stretch" the whole image, or "exact".
        test: a folder of held-out images, with folders of the same names; or
        held_out: the fraction of the images set aside; None: a tenth, unless there is `test`.
        flip: mirror half of the training images at random.
        augment: see `Augment`.

    Raises:
        ValueError: there are no images, one cannot be read, their sizes differ, or one is in no class.
    """
    train = _folder(Path(path), labels)
    held = _folder(Path(test), labels, train.names) if test else None
    return image_data("folder", train, held, size, channels, fit, dequantize=dequantize, held_out=held_out, flip=flip,
                      augment=augment, seed=seed)  # fmt: skip


def _folder(root: Path, labels: bool, classes: Sequence[str] | None = None) -> Images:
    """The images of a folder, with its classes, or, for a test set, the given `classes` of the training set."""
    paths = image_files(root)
    if labels and (loose := [file for file in paths if file.parent == root]):
        raise ValueError(f"{loose[0]} lies in no folder below {root}, but the folder is the class of an image: "
                         "move it into one, or leave out labels")  # fmt: skip
    folders = [file.relative_to(root).parts[0] for file in paths]
    names = list(classes) if classes is not None else sorted(set(folders)) if labels else []
    if labels and (unknown := set(folders) - set(names)):
        raise ValueError(f"{root} has the folder {min(unknown)}, which the training images have not: rename it")
    number = {name: i for i, name in enumerate(names)}
    given = np.array([number[folder] for folder in folders]) if labels else None
    pairs = [(file, str(file)) for file in paths]
    return Images(str(root), len(paths), lambda: pairs, given, {"files": content(paths)}, names or None)


def load_images(path: str | Path, event_shape: Sequence[int]) -> np.ndarray:
    """Float32 examples (n, *event_shape): an image or a folder of them in order of names, in [-1, 1], or a .npy array.

    Images are cropped and resized by the rules of `score_sde.data.decode`; an array is not scaled.
    Raises ValueError if events are not images, or the file does not hold such examples; FileNotFoundError if there is none.
    """
    path, shape = Path(path), tuple(event_shape)
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False).astype(np.float32)
        array = array[None] if array.shape == shape else array
        if array.shape[1:] != shape or len(array) == 0:
            raise ValueError(
                f"{path} holds an array of shape {array.shape}, but it must be (n, {', '.join(map(str, shape))})"
            )
        return array
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"events of shape {shape} are not images: give a .npy array")
    if not path.exists():
        raise FileNotFoundError(f"no image and no folder at {path}")
    files = [path] if path.is_file() else image_files(path)
    if files[0].suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path} holds no images: give {', '.join(sorted(SUFFIXES))} files")
    decoder = Decoder(shape[1], shape[2], shape[0])
    return np.stack([decoder(file, str(file))[0] for file in files]).astype(np.float32) * np.float32(2 / 255) - 1


def image_files(root: Path) -> list[Path]:
    """The images in a folder at any depth, without hidden ones, such as macOS's ._001.png or those in .ipynb_checkpoints."""
    files = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES)
    paths = [file for file in files if not any(part.startswith(".") for part in file.relative_to(root).parts)]
    if not paths:
        reason = "holds no images" if root.is_dir() else "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{root} {reason}: give a folder with {', '.join(sorted(SUFFIXES))} files")
    return paths

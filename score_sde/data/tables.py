"""Images and labels from parquet files and Hugging Face datasets on disk (extra `hf`); nothing is downloaded."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from score_sde.data.augment import Augment
from score_sde.data.cache import content
from score_sde.data.decode import Images, Size, Source, image_data
from score_sde.data.tensor import TensorData

__all__ = ["huggingface", "parquet"]


def parquet(
    path: str | Path,
    size: Size = None,
    *,
    image: str = "image",
    label: str | None = None,
    test: str | Path | None = None,
    channels: int = 3,
    fit: str = "crop",
    dequantize: bool = False,
    held_out: float | None = 0.0,
    flip: bool = False,
    augment: Augment | None = None,
    seed: int = 0,
) -> TensorData:
    """Encoded images (PNG, JPEG, ...) from a column of parquet files, in [-1, 1], decoded once into the cache.

    Args:
        path: a .parquet file, or a folder of them, read in order of their names.
        image: the column of images: bytes, or a struct with `bytes`, as Hugging Face writes them.
        label: the column of classes 0, 1, ..., or None.
        test: a file or folder of held-out images; or
        held_out: the fraction of the images set aside; None: a tenth, unless there is `test`.
        size, channels, fit, flip, augment: see `image_folder`.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: there are no such files or columns, a file is damaged, labels are not integers, or an image cannot be
            read.
    """
    train = _parquet_images(Path(path), image, label)
    held = None if test is None else _parquet_images(Path(test), image, label)
    return image_data("parquet", train, held, size, channels, fit, dequantize=dequantize, held_out=held_out, flip=flip,
                      augment=augment, seed=seed)  # fmt: skip


def huggingface(
    path: str | Path,
    size: Size = None,
    *,
    image: str = "image",
    label: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    channels: int = 3,
    fit: str = "crop",
    dequantize: bool = False,
    held_out: float | None = 0.0,
    flip: bool = False,
    augment: Augment | None = None,
    seed: int = 0,
) -> TensorData:
    """Images, in [-1, 1], of a dataset written by `save_to_disk`, or of a folder in the layout of `imagefolder`.

    Args:
        path: the folder.
        image, label: names of the columns.
        train_split, test_split: names of the splits, if the dataset has any.
        size, channels, fit, held_out, flip, augment: see `image_folder`.

    Raises:
        ImportError: datasets is not installed.
        ValueError: there is no such folder, split or column, or an image cannot be read.
    """
    dataset = _dataset(Path(path))

    def images(split: str) -> Images:
        return _dataset_images(_split(dataset, split, Path(path)), image, label, f"{path} {split}")

    train, held = images(train_split), None if test_split is None else images(test_split)
    return image_data("huggingface", train, held, size, channels, fit, dequantize=dequantize, held_out=held_out, flip=flip,
                      augment=augment, seed=seed)  # fmt: skip


def _parquet_images(path: Path, image: str, label: str | None) -> Images:
    parquet = _needed("pyarrow.parquet")
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files:
        raise ValueError(f"{path} {'holds no' if path.is_dir() else 'is no folder of'} .parquet files: set data.path")
    tables = [_readable(parquet, file, [image, *([label] if label else [])]) for file in files]

    def read() -> Iterator[tuple[Source, str]]:
        for file, table in zip(files, tables, strict=True):
            row = 0
            for batch in table.iter_batches(256, columns=[image]):
                for value in batch.column(0).to_pylist():
                    yield _encoded(value, f"{file} row {row}"), f"{file} row {row}"
                    row += 1

    classes = None
    if label:
        classes = np.concatenate([table.read([label]).column(0).to_numpy() for table in tables])
    count = sum(table.metadata.num_rows for table in tables)
    return Images(str(path), count, read, _integers(classes, label, path), {"files": content(files), "image": image})


def _readable(parquet: Any, file: Path, columns: list[str]) -> Any:
    """The opened file. Raises ValueError if it is damaged or lacks a column."""
    try:
        table = parquet.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged, or not a parquet file ({str(error).splitlines()[0]})") from error
    _check_columns(columns, table.schema_arrow.names, file)
    return table


def _check_columns(wanted: list[str], known: list[str], where: object) -> None:
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ValueError(f"{where} has no column {missing[0]!r}, only {', '.join(known)}: set data.image, data.label")


def _encoded(value: Any, name: str) -> bytes:
    """The bytes of an encoded image, given as such or in Hugging Face's struct."""
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ValueError(
            f"{name} holds no encoded image but {type(data).__name__}: store the bytes of PNG or JPEG files"
        )
    return data


def _integers(classes: Any, label: str | None, where: object) -> np.ndarray[Any, Any] | None:
    if classes is not None and not np.issubdtype(np.asarray(classes).dtype, np.integer):
        raise ValueError(
            f"{where}: the column {label!r} does not hold integers, but classes are 0, 1, ...: leave out label"
        )
    return None if classes is None else np.asarray(classes)


def _dataset(path: Path) -> Any:
    """The dataset, or mapping of splits, in a folder."""
    datasets = _needed("datasets")
    if not path.is_dir():
        raise ValueError(f"{path} does not exist: set data.path to the folder of a dataset")
    if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset("imagefolder", data_dir=str(path))


def _split(dataset: Any, split: str, path: Path) -> Any:
    if not isinstance(dataset, dict):
        return dataset
    if split not in dataset:
        raise ValueError(f"{path} has no split {split!r}, only {', '.join(dataset)}: set data.train_split, test_split")
    return dataset[split]


def _dataset_images(dataset: Any, image: str, label: str | None, title: str) -> Images:
    datasets = _needed("datasets")
    _check_columns([image, *([label] if label else [])], dataset.column_names, title)
    if not isinstance(dataset.features[image], datasets.Image):
        raise ValueError(f"{title}: the column {image!r} is not an Image feature but {dataset.features[image]}")
    encoded = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False))

    def read() -> Iterator[tuple[Source, str]]:
        for row, value in enumerate(encoded):
            given = value[image]
            yield (given["bytes"] or Path(given["path"])), f"{title} row {row}"

    classes = dataset.with_format("numpy")[label][:] if label else None
    made_of = {
        "fingerprint": dataset._fingerprint,
        "files": content([Path(f["filename"]) for f in dataset.cache_files]),
    }
    names = getattr(dataset.features[label], "names", None) if label else None
    return Images(title, len(dataset), read, _integers(classes, label, title), {**made_of, "image": image}, names)


def _needed(module: str) -> Any:
    """The imported module. Raises ImportError with the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed: pip install 'score_sde[hf]'") from error

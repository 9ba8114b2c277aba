"""Every file of conf/data composes and gives batches; those that read files read small ones made here."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import hydra
import numpy as np
import pytest
from omegaconf import DictConfig
from PIL import Image
from test_sets import cifar_arrays, write_binary, write_idx

from score_sde.build import build
from score_sde.keyed import Draws, generator

CONF = Path(__file__).resolve().parents[2] / "conf"


def folder(path: Path) -> Path:
    for i in range(6):
        Image.new("RGB", (10 + i, 9), (40 * i, 0, 0)).save(path / f"{i}.png")
    return path


def array(path: Path) -> Path:
    np.save(path / "x.npy", np.zeros((6, 1, 4, 4), np.float32))
    return path / "x.npy"


def parquet(path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'score_sde[hf]'")
    import pyarrow.parquet as pq

    images = [io.BytesIO() for _ in range(4)]
    for image in images:
        Image.new("RGB", (5, 5)).save(image, "PNG")
    pq.write_table(pyarrow.table({"image": [image.getvalue() for image in images]}), path / "a.parquet")
    return path


def huggingface(path: Path) -> Path:
    datasets = pytest.importorskip("datasets", reason="pip install 'score_sde[hf]'")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": [Image.new("RGB", (5, 5)) for _ in range(4)]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(path / "set")
    return path / "set"


def idx(path: Path) -> Path:
    write_idx(path)
    return path


def cifar(path: Path) -> Path:
    write_binary(path, *cifar_arrays())
    return path


FILES: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "mnist": (idx, []),
    "fashion_mnist": (idx, ["data/augment=edm", "data.flip=false"]),
    "cifar10": (cifar, ["data.labels=true"]),
    "folder": (folder, ["data.size=[4,6]"]),
    "file": (array, []),
    "parquet": (parquet, []),
    "huggingface": (huggingface, ["data/augment=edm", "data.flip=false"]),
}


def composed(name: str, *overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("train", overrides=[f"data={name}", "data.seed=0", *overrides])


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "data").glob("*.yaml")))
def test_every_option_gives_batches(name: str, tmp_path: Path) -> None:
    if "path:" in (CONF / "data" / f"{name}.yaml").read_text():
        make, overrides = FILES[name]
        overrides = [f"data.path={make(tmp_path)}", *overrides]
    else:
        overrides = []
    data = build(composed(name, *overrides).data)
    batch = data.prepare(data.batch(1, 4), Draws(generator(0, "prepare"), 4))
    assert batch.x.shape == (4, *data.event_shape)
    assert batch.x.is_floating_point()
    assert batch.x.isfinite().all()
    assert ("augment" in batch.condition) == ("data/augment=edm" in overrides)
    assert data.reference(2).x.shape[1:] == data.event_shape


@pytest.mark.parametrize("name", ["file", "folder", "huggingface", "parquet"])
def test_beside_a_test_set_nothing_is_held_out(name: str, tmp_path: Path) -> None:
    path = FILES[name][0](tmp_path)
    test = {"file": "data.test=x", "huggingface": "data.test_split=train"}.get(name, f"data.test={path}")
    given = [f"data.path={path}", test, *FILES[name][1]]
    data = build(composed(name, *given).data)
    assert data.size == data.count("test") >= 4
    with pytest.raises(ValueError, match=r"held_out=0.1 beside a test set: give one of them"):
        build(composed(name, *given, "data.held_out=0.1").data)

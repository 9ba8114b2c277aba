"""Parquet files and Hugging Face datasets give the images that were put into them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from score_sde.data import huggingface, parquet

pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'score_sde[hf]'")
import pyarrow.parquet as pq  # noqa: E402

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 5, 7, 3), dtype=np.uint8)
LABELS = [0, 1, 2, 0, 1, 2]


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def assert_these(batch, chosen) -> None:
    """A batch holds the images of the given numbers, each with its label, in any order."""
    known = {tuple(IMAGES[i].transpose(2, 0, 1).ravel().tolist()): LABELS[i] for i in chosen}
    pixels = ((batch.x + 1) * 127.5).round().int().flatten(1).tolist()
    assert {tuple(p): label for p, label in zip(pixels, batch.condition["label"].tolist(), strict=True)} == known


def write(file: Path, chosen, struct: bool) -> None:
    encoded = [{"bytes": png(IMAGES[i]), "path": None} if struct else png(IMAGES[i]) for i in chosen]
    pq.write_table(pyarrow.table({"image": encoded, "label": [LABELS[i] for i in chosen]}), file)


@pytest.mark.parametrize("struct", [False, True])
def test_parquet(tmp_path, struct):
    write(tmp_path / "train-0.parquet", [0, 1], struct)
    write(tmp_path / "train-1.parquet", [2, 3], struct)
    data = parquet(tmp_path, label="label", held_out=0.25)
    assert (data.event_shape, data.size, data.num_classes) == ((3, 5, 7), 3, 3)
    everything = torch.cat([data.examples().x, data.reference(9).x])
    labels = torch.cat([data.examples().condition["label"], data.reference(9).condition["label"]])
    assert_these(type(data.examples())(everything, {"label": labels}), range(4))
    (tmp_path / "held").mkdir()
    write(tmp_path / "held/test.parquet", [4, 5], struct)
    (tmp_path / "train").mkdir()
    write(tmp_path / "train/all.parquet", range(4), struct)
    split = parquet(tmp_path / "train", label="label", test=tmp_path / "held")
    assert_these(split.reference(9), [4, 5])
    assert parquet(tmp_path / "train-0.parquet", 3, channels=1).event_shape == (1, 3, 3)


def test_what_parquet_does_not_hold_is_named(tmp_path):
    write(tmp_path / "a.parquet", [0, 1], False)
    with pytest.raises(ValueError, match="has no column 'img', only image, label"):
        parquet(tmp_path, image="img")
    with pytest.raises(ValueError, match="row 0 holds no encoded image but int"):
        parquet(tmp_path, image="label")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.parquet files"):
        parquet(tmp_path / "empty")
    (tmp_path / "empty/b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"b\.parquet is damaged"):
        parquet(tmp_path / "empty")
    table = pyarrow.table({"image": [png(IMAGES[0]), b"no image"], "label": ["cat", "dog"]})
    pq.write_table(table, tmp_path / "empty/b.parquet")
    with pytest.raises(ValueError, match="'label' does not hold integers"):
        parquet(tmp_path / "empty", label="label")
    with pytest.raises(ValueError, match=r"b\.parquet row 1 cannot be read as an image"):
        parquet(tmp_path / "empty")


def test_hugging_face_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'score_sde[hf]'")
    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})

    def dataset(chosen):
        rows = {
            "image": [{"bytes": png(IMAGES[i]), "path": None} for i in chosen],
            "label": [LABELS[i] for i in chosen],
        }
        return datasets.Dataset.from_dict(rows, features=features)

    datasets.DatasetDict(train=dataset([0, 1, 2, 3]), test=dataset([4, 5])).save_to_disk(tmp_path / "saved")
    data = huggingface(tmp_path / "saved", label="label", test_split="test")
    assert_these(data.examples(), range(4))
    assert_these(data.reference(9), [4, 5])
    again = huggingface(tmp_path / "saved", label="label", test_split="test")
    assert again.fingerprint == data.fingerprint
    assert data.class_names == ["a", "b", "c"]
    dataset([0, 1]).save_to_disk(tmp_path / "single")
    assert_these(huggingface(tmp_path / "single", label="label").examples(), [0, 1])
    with pytest.raises(ValueError, match="has no split 'validation', only train, test"):
        huggingface(tmp_path / "saved", test_split="validation")
    with pytest.raises(ValueError, match="has no column 'img'"):
        huggingface(tmp_path / "saved", image="img")
    with pytest.raises(ValueError, match="none does not exist"):
        huggingface(tmp_path / "none")


def test_hugging_face_image_folders(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="datasets is not installed: pip install 'score_sde[hf]'")
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    for i in range(6):
        folder = tmp_path / "images" / ("train" if i < 3 else "test") / "abc"[LABELS[i]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[i]).save(folder / f"{i}.png")
    data = huggingface(tmp_path / "images", label="label", test_split="test")
    assert_these(data.examples(), [0, 1, 2])
    assert_these(data.reference(9), [3, 4, 5])


def test_without_the_extra_the_message_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'score_sde\[hf\]'"):
        huggingface("anywhere")

"""Entries are decoded once, appear whole or not at all, and outlive neither a failure nor a kill."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from score_sde.data import Decoder, image_folder, load_file
from score_sde.data.cache import cached, mapped
from score_sde.evaluation import Pixels, Reference


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pictures(folder: Path, count: int = 5) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(count):
        noise = np.random.default_rng(i).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return folder


def test_an_entry_is_written_once_and_keyed_by_what_made_it():
    calls = []

    def write(folder: Path) -> None:
        calls.append(folder)
        np.save(folder / "x.npy", np.arange(4))

    first, again, other = (cached("test", {"of": of}, write) for of in ("a", "a", "b"))
    assert first == again != other
    assert len(calls) == 2
    assert torch.equal(mapped(first / "x.npy"), torch.arange(4))


def test_a_failure_leaves_nothing_and_the_next_call_tries_again(cache):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        cached("test", {}, fail)
    assert not [entry for entry in (cache / "test").iterdir() if entry.is_dir()]
    assert cached("test", {}, lambda folder: None).is_dir()


def test_a_changed_image_or_setting_is_another_entry(tmp_path, cache):
    folder = pictures(tmp_path / "pictures")
    first = image_folder(folder, 6).fingerprint
    assert image_folder(folder, 6).fingerprint == first
    settings = [{"channels": 1}, {"size": 3}, {"size": [6, 3]}, {"size": [6, 3], "fit": "stretch"}]
    others = {image_folder(folder, **{"size": 6, **setting}).fingerprint for setting in settings}
    assert len({first, *others}) == 5
    Image.new("RGB", (6, 6), "red").save(folder / "0.png")
    os.utime(folder / "0.png", (1, 1))
    changed = image_folder(folder, 6)
    assert changed.fingerprint != first
    assert (changed.examples().x[:, 0].amin((1, 2)) == 1).sum() == 1


def test_a_copied_or_touched_folder_is_not_decoded_again(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "pictures")
    first = image_folder(folder, 6).fingerprint
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy)
    os.utime(folder / "0.png", (1, 1))
    monkeypatch.setattr(Decoder, "__call__", lambda *_: pytest.fail("decoded again"))
    assert image_folder(folder, 6).fingerprint == image_folder(copy, 6).fingerprint == first


def test_a_fingerprint_is_of_the_content_wherever_it_came_from(tmp_path, monkeypatch):
    """A reference stored on one machine serves on another, whose folder has another path and other times."""
    folder = pictures(tmp_path / "pictures", 12)
    data = image_folder(folder)
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path / "of another machine"))
    copied = image_folder(shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copy))
    arrays = np.stack([np.asarray(Image.open(folder / f"{i}.png")) for i in sorted(range(12), key=str)])
    np.savez_compressed(tmp_path / "a.npz", x=arrays)
    np.save(tmp_path / "a.npy", arrays.transpose(0, 3, 1, 2))
    same = [image_folder(folder), load_file(tmp_path / "a.npz", channels_last=True, dequantize=False),
            load_file(tmp_path / "a.npy", dequantize=False)]  # fmt: skip
    assert {other.fingerprint for other in (copied, *same)} == {data.fingerprint}
    Reference.of(data, Pixels(), 6).save(tmp_path / "reference")
    assert len(Reference.of(copied, Pixels(), 6, path=tmp_path / "reference").train) == 6


def test_an_npz_file_is_unpacked_once_and_a_changed_one_again(tmp_path, monkeypatch):
    x = np.arange(24, dtype=np.uint8).reshape(6, 4)
    np.savez_compressed(tmp_path / "a.npz", x=x, y=np.arange(6), other=x)
    first = load_file(tmp_path / "a.npz", labels="y", dequantize=False)
    with monkeypatch.context() as patch:
        patch.setattr(np.lib.npyio.NpzFile, "__getitem__", lambda *_: pytest.fail("unpacked again"))
        again = load_file(tmp_path / "a.npz", labels="y", dequantize=False)
    assert torch.equal(again.plain("train").x, first.plain("train").x)
    assert sorted(again.batch(0, 6).x[:, 0].tolist()) == x[:, 0].tolist()
    np.savez_compressed(tmp_path / "a.npz", x=x + 100, y=np.arange(6))
    os.utime(tmp_path / "a.npz", (1, 1))
    assert load_file(tmp_path / "a.npz", labels="y", dequantize=False).fingerprint != first.fingerprint


def test_a_folder_that_cannot_be_written_says_so(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValueError, match="set SCORE_SDE_CACHE"):
        cached("test", {}, lambda folder: None)


SLOW = """
import sys, time
from pathlib import Path
import numpy as np
from score_sde.data.cache import cached
def write(folder):
    (folder / "begun").write_text("")
    time.sleep(float(sys.argv[2]))
    np.save(folder / "x.npy", np.full(1000, int(sys.argv[1])))
entry = cached("test", {}, write)
print(np.load(entry / "x.npy").min(), np.load(entry / "x.npy").max())
"""


def start(name: int, seconds: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SLOW, str(name), str(seconds)], stdout=subprocess.PIPE, text=True)


def test_of_processes_at_once_one_writes_and_a_killed_one_leaves_no_trace(cache):
    killed = start(0, 600)
    deadline = time.monotonic() + 60
    while not list((cache / "test").glob("*/begun")) and time.monotonic() < deadline:
        time.sleep(0.02)
    waiting = [start(1, 0.2), start(2, 0.2)]
    killed.kill()
    killed.wait()
    said = {process.communicate(timeout=60)[0].strip() for process in waiting}
    assert said in ({"1 1"}, {"2 2"})  # one of the two wrote the entry, and both read that one
    assert len([entry for entry in (cache / "test").iterdir() if entry.is_dir()]) == 1

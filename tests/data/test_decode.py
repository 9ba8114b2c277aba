"""The rules by which any image becomes uint8 of one shape, each against its own arithmetic; and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from score_sde.data import Decoder, TensorData, image_folder, load_file, load_images


def saved(folder, name: str, image: Image.Image, **options):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, **options)
    return folder / name


def decode(path, *arguments, **options):
    return Decoder(*arguments, **options)(path, str(path))


def test_transparency_is_composited_on_white(tmp_path):
    file = saved(tmp_path, "a.png", Image.new("RGBA", (4, 4), (200, 0, 100, 51)))
    pixels, notes = decode(file, 4, 4)
    np.testing.assert_allclose(pixels[:, 0, 0], 255 + (np.array([200, 0, 100]) - 255) * 51 / 255, atol=1)
    assert notes == ["transparency on white"]
    clear = Image.new("P", (4, 4), 0)
    clear.putpalette([10, 20, 30])
    pixels, _ = decode(saved(tmp_path, "b.png", clear, transparency=0), 4, 4)
    assert (pixels == 255).all()
    grey = saved(tmp_path, "c.png", Image.new("LA", (4, 4), (0, 0)))
    assert (decode(grey, 4, 4, 1)[0] == 255).all()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_become_their_high_byte(tmp_path, suffix):
    values = np.array([[0, 255, 256], [32768, 65280, 65535]], dtype=np.uint16)
    file = saved(tmp_path, f"a.{suffix}", Image.fromarray(values))
    pixels, notes = decode(file, 2, 3, 1)
    assert np.array_equal(pixels[0], values >> 8)
    assert notes == ["16 bits to 8, by the high byte"]


def test_grey_and_colour_become_each_other(tmp_path):
    colour = saved(tmp_path, "colour.png", Image.new("RGB", (2, 2), (255, 0, 0)))
    grey = saved(tmp_path, "grey.png", Image.new("L", (2, 2), 77))
    pixels, notes = decode(colour, 2, 2, 1)
    assert pixels.shape == (1, 2, 2)
    assert abs(int(pixels[0, 0, 0]) - 0.299 * 255) <= 1
    assert notes == ["colour to grey"]
    pixels, notes = decode(grey, 2, 2, 3)
    assert (pixels == 77).all()
    assert notes == ["grey to colour"]
    assert decode(grey, 2, 2, 1)[1] == decode(colour, 2, 2, 3)[1] == []


def test_a_camera_s_orientation_is_applied(tmp_path):
    picture = Image.fromarray(np.array([[0, 0, 255, 255]] * 2, dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    file = saved(tmp_path, "a.png", picture, exif=exif)
    assert decode(file, 2, 4, 1)[0][0, 0].tolist() == [255, 255, 0, 0]


@pytest.mark.parametrize(
    ("size", "box"), [((6, 6), (6, 0, 30, 24)), ((4, 8), (0, 3, 36, 21)), ((8, 3), (13, 0, 22, 24))]
)
def test_the_central_part_of_the_target_s_aspect_ratio_is_cropped(tmp_path, size, box):
    noise = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
    file = saved(tmp_path, "a.png", Image.fromarray(noise))
    expected = Image.fromarray(noise).crop(box).resize(size[::-1], Image.Resampling.LANCZOS)
    assert np.array_equal(decode(file, *size)[0], np.asarray(expected).transpose(2, 0, 1))
    whole = Image.fromarray(noise).resize(size[::-1], Image.Resampling.LANCZOS)
    assert np.array_equal(decode(file, *size, fit="stretch")[0], np.asarray(whole).transpose(2, 0, 1))


def test_images_of_one_size_need_none_and_mixed_ones_are_named(tmp_path):
    for i in range(3):
        saved(tmp_path, f"{i}.png", Image.new("RGB", (6, 4), (i, 0, 0)))
    data = image_folder(tmp_path)
    assert data.event_shape == (3, 4, 6)
    saved(tmp_path, "z.png", Image.new("RGB", (4, 6)))
    with pytest.raises(ValueError, match=r"z\.png is 6x4, not 4x6 as the first image: set size"):
        image_folder(tmp_path)
    assert image_folder(tmp_path, [2, 3]).event_shape == (3, 2, 3)


def test_test_folder_and_classes(tmp_path):
    for name in ("cat", "dog"):
        saved(tmp_path, f"train/{name}/0.png", Image.new("RGB", (4, 4)))
    saved(tmp_path, "test/dog/1.png", Image.new("RGB", (8, 8), "white"))
    data = image_folder(tmp_path / "train", 4, labels=True, test=tmp_path / "test")
    assert (data.size, data.count("test")) == (2, 1)
    assert (data.class_names, image_folder(tmp_path / "train", 4).class_names) == (["cat", "dog"], None)
    assert data.reference(5).condition["label"].tolist() == [1]
    assert (data.reference(5).x == 1).all()
    saved(tmp_path, "test/cow/1.png", Image.new("RGB", (8, 8)))
    with pytest.raises(ValueError, match="folder cow, which the training images have not"):
        image_folder(tmp_path / "train", 4, labels=True, test=tmp_path / "test")


def test_with_labels_an_image_beside_the_folders_of_classes_is_refused(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "loose.png")
    (tmp_path / "cats").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "cats" / "a.png")
    with pytest.raises(ValueError, match=r"loose\.png lies in no folder below"):
        image_folder(tmp_path, 4, labels=True)
    assert image_folder(tmp_path, 4).size == 2


def test_what_is_hidden_is_no_image(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "001.png")
    (tmp_path / "._001.png").write_bytes(b"what macOS keeps of a file on other disks")
    saved(tmp_path, ".ipynb_checkpoints/001-checkpoint.png", Image.new("L", (4, 4)))
    assert image_folder(tmp_path, 4).size == len(load_images(tmp_path, (1, 4, 4))) == 1


def test_pictures_for_editing_may_be_oblong(tmp_path):
    file = saved(tmp_path, "a.png", Image.new("RGB", (40, 20), "white"))
    assert load_images(file, (3, 4, 8)).shape == (1, 3, 4, 8)


def test_conversions_are_reported_once(tmp_path, caplog):
    for i in range(3):
        saved(tmp_path, f"{i}.png", Image.new("RGBA", (4, 4)))
    image_folder(tmp_path)
    assert f"{tmp_path}: 3 of 3 images: transparency on white" in caplog.text
    caplog.clear()
    image_folder(tmp_path)
    assert not caplog.text


def broken(folder):
    file = saved(folder, "a/b.png", Image.new("RGB", (64, 64)))
    file.write_bytes(file.read_bytes()[:70])
    return image_folder(folder, 8)


def text(folder):
    (folder / "a.jpg").write_text("no image")
    return image_folder(folder, 8)


def floats(folder):
    saved(folder, "a.tif", Image.fromarray(np.zeros((4, 4), np.float32)))
    return image_folder(folder, 4)


def deep(folder):
    saved(folder, "a.tif", Image.fromarray(np.full((4, 4), 70_000, np.int32)))
    return image_folder(folder, 4)


def half_zip(folder):
    np.savez(folder / "a.npz", x=np.zeros((50, 3)))
    (folder / "a.npz").write_bytes((folder / "a.npz").read_bytes()[:100])
    return load_file(folder / "a.npz")


def words(folder):
    np.savez(folder / "a.npz", x=np.array(["a", "b"]))
    return load_file(folder / "a.npz")


def switched_on(folder):
    np.savez(folder / "a.npz", x=np.zeros((50, 3)), y=np.zeros(50, int))
    return load_file(folder / "a.npz", labels=True)


def other_shape(folder):
    np.save(folder / "x.npy", np.zeros((5, 3)))
    load_images(folder / "x.npy", (2,))


REFUSED = {
    "truncated": (broken, r"b\.png cannot be read as an image: remove or replace it"),
    "no image": (text, r"a\.jpg cannot be read as an image"),
    "floats": (floats, r"a\.tif holds 32-bit floats"),
    "32 bits": (deep, r"a\.tif holds 32-bit integers up to 70000"),
    "damaged npz": (half_zip, r"a\.npz holds no arrays of numbers, or is damaged"),
    "npz of words": (words, r"a\.npz holds no arrays of numbers"),
    "labels without a name": (switched_on, r"a\.npz has no array True, only x, y: name its arrays x=, labels="),
    "no folder": (lambda folder: image_folder(folder / "none", 8), "none does not exist"),
    "a file for a folder": (lambda folder: image_folder(__file__, 8), r"test_decode\.py is a file: give a folder with"),
    "a folder for a file": (
        lambda folder: load_file(folder),
        "is not a .npy or .npz file: images in a folder are data=folder",
    ),
    "another shape": (other_shape, r"shape \(5, 3\), but it must be \(n, 2\)"),
    "channels": (lambda folder: Decoder(4, 4, 2), "channels=2"),
    "fit": (lambda folder: Decoder(4, 4, fit="pad"), "fit is one of crop, stretch, exact; got 'pad'"),
    "size": (lambda folder: Decoder.of([4]), r"size=\[4\] must be an edge"),
    "zero": (lambda folder: Decoder.of(0), "a whole number size >= 1, got size=0"),
    "text": (lambda folder: Decoder.of("16"), "a whole number size >= 1, got size='16'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named_and_leaves_no_cache_entry(case, tmp_path, monkeypatch):
    monkeypatch.setenv("SCORE_SDE_CACHE", str(tmp_path / "cache"))
    build, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        build(tmp_path)
    assert "\n" not in str(caught.value)
    entries = [entry for entry in (tmp_path / "cache").glob("*/*") if entry.is_dir()]
    assert {entry.parent.name for entry in entries} <= {"contents"}  # hashes of files


def test_channels_last_arrays(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=x)
    data = load_file(tmp_path / "a.npz", x="images", channels_last=True, dequantize=False)
    assert data.event_shape == (3, 4, 6)
    same = TensorData(x.transpose(0, 3, 1, 2), dequantize=False)
    assert data.fingerprint == same.fingerprint
    assert (data.examples().x == same.examples().x).all()


def test_arrays_of_a_test_set(tmp_path):
    rng = np.random.default_rng(0)
    x, held = (rng.integers(0, 256, (count, 2, 2), dtype=np.uint8) for count in (6, 3))
    np.savez(tmp_path / "a.npz", x_train=x, y_train=np.arange(6) % 2, x_test=held, y_test=[0, 1, 1])
    names = {"x": "x_train", "labels": "y_train", "test": "x_test", "test_labels": "y_test"}
    data = load_file(tmp_path / "a.npz", **names, dequantize=False)
    assert (data.size, data.count("test"), data.num_classes) == (6, 3, 2)
    assert sorted(data.reference(5).condition["label"].tolist()) == [0, 1, 1]
    assert {tuple(row) for row in data.reference(5).x.flatten(1).tolist()} == {
        tuple(row) for row in (torch.from_numpy(held).float() * (2 / 255) - 1).flatten(1).tolist()
    }
    with pytest.raises(ValueError, match="both have labels, or neither"):
        load_file(tmp_path / "a.npz", x="x_train", labels="y_train", test="x_test", dequantize=False)
    with pytest.raises(ValueError, match="beside a test set"):
        load_file(tmp_path / "a.npz", **names, dequantize=False, held_out=0.5)

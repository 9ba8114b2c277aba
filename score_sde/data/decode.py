"""Image files as uint8 (channels, height, width), by fixed rules that are stored beside the result.

In this order: the orientation in the EXIF data is applied; 16 bits become 8 by their high byte; transparency is
composited on white; colours become grey by ITU-R 601 luma, or grey becomes three equal channels; the central part of the
target's aspect ratio is cropped (or the image stretched); Lanczos resampling. An animation gives its first frame.
"""

from __future__ import annotations

import json
import logging
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from score_sde.checks import one_of, whole
from score_sde.data.cache import stored
from score_sde.data.tensor import Examples, TensorData
from score_sde.progress import tqdm

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["SUFFIXES", "Decoder", "Images", "Size", "decoded", "image_data"]

log = logging.getLogger(__name__)

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"}
Size = int | Sequence[int] | None
Source = Path | bytes
T = TypeVar("T")


@dataclass(frozen=True)
class Decoder:
    """Decodes a file, or its bytes, by the rules above; its name is for error messages.

    Args:
        height, width: of the result; None means those of the first image, which all others must share.
        channels: 1 for grey, 3 for colour.
        fit: "crop" the central part of the target's aspect ratio, "stretch" the whole image, or "exact", which raises
            ValueError for another size.

    Raises:
        ValueError: a setting is outside its range.
    """

    height: int | None
    width: int | None
    channels: int = 3
    fit: str = "crop"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels}: 1 for grey, 3 for colour")
        one_of("fit", self.fit, ("crop", "stretch", "exact"))
        for length in (self.height, self.width):
            if length is not None:
                whole("size", length)

    @classmethod
    def of(cls, size: Size, channels: int = 3, fit: str = "crop") -> Decoder:
        """A decoder for a size: an edge for squares, [height, width], or None for the size that all images share."""
        if not isinstance(size, Sequence) or isinstance(size, str):
            return cls(size, size, channels, fit)
        if len(size) != 2:
            raise ValueError(f"size={list(size)} must be an edge, [height, width], or null for the images' own")
        return cls(size[0], size[1], channels, fit)

    def settled(self, first: Source, name: str) -> Decoder:
        """This decoder, with the size of the first image if it has none."""
        if self.height is not None:
            return self
        width, height = _opened(first, name).size
        return replace(self, height=height, width=width, fit="exact")

    def stated(self) -> dict[str, Any]:
        """The key of a cache entry: the settings, and a version, to be raised with any change of the rules."""
        return {**asdict(self), "rules": 1}

    def __call__(self, source: Source, name: str) -> tuple[np.ndarray[Any, Any], list[str]]:
        """uint8 (channels, height, width), and the names of the conversions made.

        Raises ValueError if it is not an image, holds 32-bit values or, with fit "exact", has another size.
        """
        notes: list[str] = []
        image = _flattened(_eight_bit(_opened(source, name), name, notes), notes)
        mode = "L" if self.channels == 1 else "RGB"
        if (image.mode in ("1", "L")) != (mode == "L"):
            notes.append("colour to grey" if mode == "L" else "grey to colour")
        image = self._fitted(image.convert(mode), name)
        pixels = np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, self.channels)
        return pixels.transpose(2, 0, 1), notes

    def _fitted(self, image: Image.Image, name: str) -> Image.Image:
        """The image in the decoder's size, by its `fit`."""
        from PIL import Image

        width, height = image.size
        if (self.width, self.height) == (width, height):
            return image
        if self.fit == "exact" or self.width is None or self.height is None:
            raise ValueError(f"{name} is {height}x{width}, not {self.height}x{self.width} as the first image: "
                             "set size, and fit=crop or stretch, to resize all of them")  # fmt: skip
        box = (0, 0, width, height)
        if self.fit == "crop":
            # The largest part of the target's aspect ratio, in whole pixels, as central as these allow.
            part_width = min(width, max(1, round(height * self.width / self.height)))
            part_height = min(height, max(1, round(width * self.height / self.width)))
            left, top = (width - part_width) // 2, (height - part_height) // 2
            box = (left, top, left + part_width, top + part_height)
        return image.crop(box).resize((self.width, self.height), Image.Resampling.LANCZOS)


def _opened(source: Source, name: str) -> Image.Image:
    """The image, turned as its EXIF data say. Raises ValueError if it cannot be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as an image: remove or replace it ({error})") from error


def _eight_bit(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """The image with 16-bit values cut to their high byte. Raises ValueError for 32-bit values."""
    from PIL import Image

    if image.mode == "F":
        raise ValueError(f"{name} holds 32-bit floats, which have no fixed scale: convert it to 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"{name} holds 32-bit integers up to {values.max()}: convert it to 8 or 16 bits")
    notes.append("16 bits to 8, by the high byte")
    return Image.fromarray((values.astype(np.uint32) >> 8).astype(np.uint8))


def _flattened(image: Image.Image, notes: list[str]) -> Image.Image:
    """The image, composited on white if it has transparency."""
    from PIL import Image

    if "transparency" not in image.info and "A" not in image.getbands() and "a" not in image.getbands():
        return image
    notes.append("transparency on white")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


@dataclass(frozen=True)
class Images:
    """A set of undecoded images.

    Args:
        title: the name of the set in error messages and the progress bar.
        count: number of images.
        read: returns (source, name) of each image, in order.
        labels: the class of each image, or None.
        made_of: the key of the cache entry besides the decoder, e.g. the hash of the files.
        names: of the classes, or None.
    """

    title: str
    count: int
    read: Callable[[], Iterable[tuple[Source, str]]]
    labels: np.ndarray[Any, Any] | None
    made_of: Any
    names: Sequence[str] | None = None


def image_data(
    kind: str, train: Images, test: Images | None, size: Size, channels: int, fit: str, **options: Any
) -> TensorData:
    """`TensorData(**options)` of training images, and of held-out ones in the same size; see `decoded`."""
    known = decoded(kind, train, Decoder.of(size, channels, fit))
    held = None if test is None else decoded(kind, test, Decoder.of(known.x.shape[-2:], channels, fit))
    data = TensorData(known.x, known.labels, test=held, fingerprint=known.fingerprint, **options)
    data.class_names = train.names
    return data


def decoded(kind: str, images: Images, decoder: Decoder) -> Examples:
    """The images as uint8 (count, channels, height, width), mapped from the cache, where the first call puts them.

    Raises ValueError for a set without images, and for the first image that the decoder cannot read.
    """
    if images.count == 0:
        raise ValueError(f"{images.title} holds no images")
    settled = decoder.settled(*next(iter(images.read())))
    made_of = {"images": images.made_of, "decoder": settled.stated()}
    array = stored(kind, made_of, lambda folder: _decode(images, settled, folder))["images"]
    labels = None if images.labels is None else torch.from_numpy(images.labels.astype(np.int64))
    return Examples(array.x, labels, array.fingerprint)


def _decode(images: Images, decoder: Decoder, folder: Path) -> None:
    """Decodes on all cores into images.npy; the counts of conversions are written to conversions.json."""
    shape = (images.count, decoder.channels, decoder.height or 0, decoder.width or 0)
    array = np.lib.format.open_memmap(folder / "images.npy", "w+", np.uint8, shape)
    notes = Counter[str]()
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=images.count, desc=f"decoding {images.title[-40:]}", unit="image", delay=2) as bar,
    ):
        for i, (pixels, noted) in enumerate(_in_order(pool, lambda pair: decoder(*pair), images.read())):
            array[i] = pixels
            notes.update(noted)
            bar.update()
    array.flush()
    (folder / "conversions.json").write_text(json.dumps(notes) + "\n")
    for note, times in notes.items():
        log.warning("%s: %d of %d images: %s", images.title, times, images.count, note)


def _in_order(pool: ThreadPoolExecutor, work: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
    """`pool.map` over an iterable of any length, holding only 1,024 items at a time."""
    remaining = iter(items)
    while block := list(islice(remaining, 1024)):
        yield from pool.map(work, block)

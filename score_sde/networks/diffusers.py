"""Diffusers' `UNet2DModel` as a network F(x, c_noise, label) on images in [-1, 1]; extra `diffusers`.

    positional embedding (google/ddpm-*):   F = unet(x, c_noise), the noise, c_noise the step 0..999
    fourier embedding (google/ncsnpp-*):    F = sigma unet((x + 1) / 2, sigma) = -noise, sigma = exp(c_noise)

The latter is a score over data in [0, 1]. `parameterization.PublishedNoise` says both; `convert.diffusers` reads folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from score_sde.networks.embedding import check_shape

__all__ = ["DiffusersUNet"]


class DiffusersUNet(nn.Module):
    """A `UNet2DModel` built from its config, a mapping as in its config.json.

    A network with classes needs a label for every sample: it has no null class.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: the config has no sample_size, another number of channels out than in, or an embedding by table.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._take(_model_class().from_config(dict(config)))

    @classmethod
    def load(cls, folder: str | Path) -> DiffusersUNet:
        """The network of a folder with config.json and weights; ValueError where keys are left over or missing."""
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        try:
            unet, info = _model_class().from_pretrained(
                str(folder), local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{folder}: its weights do not fit its config: {str(error).splitlines()[0]}") from None
        wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        if wrong:
            raise ValueError(f"{folder}: {len(wrong)} weights are missing or left over, {wrong[0]} among them")
        network._take(unet)
        return network

    def _take(self, unet: Any) -> None:
        config = unet.config
        size, channels = config.sample_size, config.in_channels
        if size is None or config.out_channels != channels or config.time_embedding_type == "learned":
            raise ValueError(f"a UNet2DModel with sample_size={size}, {channels} channels in, {config.out_channels} out "
                             f"and {config.time_embedding_type} embedding does not say the noise of an image of known "
                             "size: its sample_size and equal channels are needed, and a continuous embedding")  # fmt: skip
        self.unet = unet
        self.score = config.time_embedding_type == "fourier"
        self.num_classes: int | None = config.num_class_embeds
        self.event_shape = (channels, size, size) if isinstance(size, int) else (channels, *size)

    def forward(self, x: Tensor, c_noise: Tensor, label: Tensor | None = None) -> Tensor:
        check_shape(x, self.event_shape)
        if not self.score:
            return self.unet(x, c_noise, class_labels=label).sample
        sigma = c_noise.exp()
        score = self.unet((x + 1) / 2, sigma, class_labels=label).sample
        return sigma[:, None, None, None].to(score) * score


def _model_class() -> Any:
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError("diffusers is not installed: pip install 'score_sde[diffusers]'") from error
    return UNet2DModel

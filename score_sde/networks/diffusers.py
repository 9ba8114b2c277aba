"""Diffusers' `UNet2DModel` as a network F(x, c_noise, label) on images in [-1, 1]; extra `diffusers`.

    positional embedding (google/ddpm-*):   F = unet(x, c_noise), c_noise the timestep; its scheduler says what F predicts
    fourier embedding (google/ncsnpp-*):    F = sigma unet((x + 1) / 2, sigma) = -noise, sigma = exp(c_noise)

The latter unet gives the score of data in [0, 1]. `parameterization.Published` describes both; `convert.diffusers` makes
score models of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from score_sde.networks.embedding import check_shape

__all__ = ["DiffusersUNet"]


class DiffusersUNet(nn.Module):
    """A new `UNet2DModel` from its config, a mapping as in config.json; `of` wraps an existing one, `load` reads a folder.

    A network with classes has no null class: it needs a label for every sample.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: the config is of another class, has no sample_size, has different numbers of channels in and out, or
            has a learned embedding of the timestep or a `class_embed_type`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        _check_class(config)
        self._take(_model_class().from_config(dict(config)))

    @classmethod
    def of(cls, unet: Any) -> DiffusersUNet:
        """Wraps a `UNet2DModel`, neither copied nor changed. Raises TypeError for another class."""
        if not isinstance(unet, _model_class()):
            raise TypeError(_refusal(type(unet).__name__))
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        network._take(unet)
        return network

    @classmethod
    def load(cls, folder: str | Path) -> DiffusersUNet:
        """The network of a folder with config.json and weights, frozen and in evaluation mode.

        Raises ValueError if the config is of another class, or weights are missing or left over.
        """
        known = _model_class()
        _check_class(known.load_config(str(folder), local_files_only=True))
        try:
            unet, info = known.from_pretrained(
                str(folder), local_files_only=True, output_loading_info=True, low_cpu_mem_usage=False
            )
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{folder}: its weights do not fit its config: {str(error).splitlines()[0]}") from None
        wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
        if wrong:
            raise ValueError(f"{folder}: {len(wrong)} weights are missing or left over, {wrong[0]} among them")
        return cls.of(unet.eval().requires_grad_(False))

    def _take(self, unet: Any) -> None:
        """Holds the network. Raises ValueError for a config that `forward` does not support."""
        config = unet.config
        size, channels, labels = config.sample_size, config.in_channels, config.class_embed_type
        if size is None or config.out_channels != channels or config.time_embedding_type == "learned" or labels:
            raise ValueError(f"a UNet2DModel with sample_size={size}, {channels} channels in, {config.out_channels} out, "
                             f"{config.time_embedding_type} embedding and class_embed_type={labels} is not supported: "
                             "it needs a sample_size, equal channels, a fixed embedding and no class_embed_type")  # fmt: skip
        self.unet = unet
        self.score = config.time_embedding_type == "fourier"
        self.num_classes: int | None = config.num_class_embeds
        self.event_shape = (channels, size, size) if isinstance(size, int) else (channels, *size)
        self.training = unet.training

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


def _check_class(config: Mapping[str, Any]) -> None:
    name = config.get("_class_name", "UNet2DModel")
    if name != "UNet2DModel":
        raise ValueError(_refusal(name))


def _refusal(name: str) -> str:
    return (f"{name} is not supported: give a UNet2DModel with its scheduler, a pipeline whose unet is one, or a folder of "
            "either; wrap another network in a module (x, c_noise, **condition) for LearnedScore")  # fmt: skip

"""Weights that others have trained, as score models on images in [-1, 1].

`score_sde_pytorch` reads checkpoints of https://github.com/yang-song/score_sde_pytorch, whose `model` holds

    module.all_modules.N.<name>      N counts the layers in the order of its forward pass, `docs/checkpoints.md`

and whose `ema` holds `shadow_params`, the list of the trained parameters in that order. `diffusers` reads folders that
`UNet2DModel.save_pretrained` wrote. Nothing is left over and nothing missing, or ValueError. No code in a file is run.
A VE network of data y in [0, 1] becomes one of x = 2 y - 1 with noise of 2 sigma; it is told the same sigma.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from score_sde.networks.blocks import Block, Resample
from score_sde.networks.unet import UNet
from score_sde.parameterization import Parameterization, PublishedNoise
from score_sde.score import LearnedScore
from score_sde.sde import SDE, VESDE, VPSDE, DiscreteSDE, SubVPSDE

__all__ = ["CONFIGS", "SongConfig", "diffusers", "score_sde_pytorch"]

# A name of ours, the names in all_modules that it is made of, and how.
Pair = tuple[str, tuple[str, ...], Callable[[list[Tensor]], Tensor]]


@dataclass(frozen=True)
class SongConfig:
    """What a config file of score_sde_pytorch says of a network and its SDE, by the names it has there.

    `network` is "ddpm" or "ncsnpp" (its `resblock_type` "biggan"); `sde` "vp", "subvp" or "ve", `continuous` as it was
    trained, `num_scales` the length of its ladder where not. The defaults are vp/cifar10_ddpmpp_continuous.
    Raises ValueError for what was never published so: `progressive='residual'`, `progressive_combine='cat'`.
    """

    network: str = "ncsnpp"
    sde: str = "vp"
    continuous: bool = True
    image_size: int = 32
    num_channels: int = 3
    nf: int = 128
    ch_mult: Sequence[int] = (1, 2, 2, 2)
    num_res_blocks: int = 4
    attn_resolutions: Sequence[int] = (16,)
    dropout: float = 0.1
    embedding_type: str = "positional"
    fir: bool = False
    fir_kernel: Sequence[int] = (1, 3, 3, 1)
    skip_rescale: bool = True
    progressive: str = "none"
    progressive_input: str = "none"
    progressive_combine: str = "sum"
    beta_min: float = 0.1
    beta_max: float = 20.0
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    num_scales: int = 1000

    def __post_init__(self) -> None:
        known: dict[str, tuple[object, ...]] = {
            "network": ("ddpm", "ncsnpp"), "sde": ("vp", "subvp", "ve"), "embedding_type": ("positional", "fourier"),
            "progressive": ("none", "output_skip"), "progressive_input": ("none", "input_skip", "residual"),
            "progressive_combine": ("sum",),
        }  # fmt: skip
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(str, allowed))}")
        if self.progressive_input == "residual" and not self.fir:
            raise ValueError("progressive_input='residual' is only known with fir=True")
        if (self.embedding_type == "fourier") != (self.sde == "ve" and self.continuous and self.network == "ncsnpp"):
            raise ValueError(f"embedding_type={self.embedding_type!r} does not go with sde={self.sde!r}, "
                             f"continuous={self.continuous}: 'fourier' is that of continuous VE alone")  # fmt: skip

    def unet(self) -> UNet:
        """Our network with the same function."""
        plus = self.network == "ncsnpp"
        return UNet(
            (self.num_channels, self.image_size, self.image_size), self.nf, tuple(self.ch_mult), self.num_res_blocks,
            tuple(self.attn_resolutions), self.dropout,
            frequencies=self.nf if self.embedding_type == "fourier" else self.nf // 2,
            embedding=self.embedding_type, modulation="shift", resample="residual" if plus else "strided",
            filter=tuple(self.fir_kernel) if plus and self.fir else (1, 1), project_skip=True,
            rescale=plus and self.skip_rescale, head_channels=None, attend_once=True, middle_attention=True,
            norm_groups=32, epsilon=1e-6,
            progressive_input={"none": None, "input_skip": "skip", "residual": "residual"}[self.progressive_input],
            progressive_output={"none": None, "output_skip": "skip"}[self.progressive],
        )  # fmt: skip

    def process(self) -> tuple[SDE, Parameterization]:
        """The SDE on data in [-1, 1], and what the network is told and says."""
        if self.sde == "ve":
            low, high, last = 2 * self.sigma_min, 2 * self.sigma_max, self.num_scales - 1
            if self.embedding_type == "fourier":
                return VESDE(low, high), PublishedNoise("log_sigma", scale=1, shift=-math.log(2), sign=-1)
            ladder = DiscreteSDE.geometric(low, high, self.num_scales)
            # Its index counts from the greatest noise level down.
            return ladder, PublishedNoise("time", scale=-1, shift=last, sign=-1)
        if self.sde == "vp" and not self.continuous:
            per_step = 1000 / self.num_scales
            betas = torch.linspace(self.beta_min / 1000 * per_step, self.beta_max / 1000 * per_step, self.num_scales,
                                   dtype=torch.float64)  # fmt: skip
            return DiscreteSDE.from_betas(betas), PublishedNoise("time", scale=1)
        kind = VPSDE if self.sde == "vp" else SubVPSDE
        return kind(self.beta_min, self.beta_max), PublishedNoise("time", scale=999)


_DDPM = SongConfig("ddpm", num_res_blocks=2, continuous=False)
_PLUS = SongConfig()
_VE = SongConfig(
    sde="ve", embedding_type="fourier", fir=True, progressive_input="residual", sigma_max=50.0
)  # fmt: skip
CONFIGS: dict[str, SongConfig] = {
    "vp/cifar10_ddpm": _DDPM,
    "vp/cifar10_ddpm_continuous": replace(_DDPM, continuous=True),
    "vp/cifar10_ddpmpp": replace(_PLUS, continuous=False),
    "vp/cifar10_ddpmpp_continuous": _PLUS,
    "vp/cifar10_ddpmpp_deep_continuous": replace(_PLUS, num_res_blocks=8),
    "subvp/cifar10_ddpmpp_continuous": replace(_PLUS, sde="subvp"),
    "subvp/cifar10_ddpmpp_deep_continuous": replace(_PLUS, sde="subvp", num_res_blocks=8),
    "ve/cifar10_ncsnpp": replace(_VE, continuous=False, embedding_type="positional"),
    "ve/cifar10_ncsnpp_continuous": _VE,
    "ve/cifar10_ncsnpp_deep_continuous": replace(_VE, num_res_blocks=8),
}


def score_sde_pytorch(path: str | Path, config: str | SongConfig, *, ema: bool = True) -> LearnedScore:
    """The model of a checkpoint of score_sde_pytorch, in evaluation mode, on images in [-1, 1].

    Args:
        path: the .pth file.
        config: its name in CONFIGS, which are the published CIFAR-10 ones, or a `SongConfig` with what its file says.
        ema: averaged weights, else the raw ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such checkpoint, or its keys or shapes are not those of the config's network.
    """
    if isinstance(config, str):
        if config not in CONFIGS:
            raise ValueError(f"unknown config {config!r}: give a SongConfig, or one of {', '.join(CONFIGS)}")
        config = CONFIGS[config]
    state = _song_state(Path(path), ema)
    network = config.unet()
    network.load_state_dict(_converted(state, network, config))
    sde, parameterization = config.process()
    model = LearnedScore(network, sde, parameterization, network.event_shape)
    return model.eval().requires_grad_(False)


def _song_state(path: Path, ema: bool) -> dict[str, Tensor]:
    """all_modules' parameters by name, averaged or raw."""
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of weights: {str(error).splitlines()[0]}") from None
    if not isinstance(file, Mapping) or not isinstance(file.get("model"), Mapping):
        raise ValueError(f"{path} is no checkpoint of score_sde_pytorch: it holds no `model`")
    # Noise levels that NCSN++ keeps beside its weights follow from the config.
    state = {name.removeprefix("module."): tensor for name, tensor in file["model"].items()}
    state = {name.removeprefix("all_modules."): tensor for name, tensor in state.items() if name != "sigmas"}
    if not ema:
        return state
    trained = [name for name in state if name != "0.W"]  # the random frequencies are not trained
    shadow = file.get("ema", {}).get("shadow_params", [])
    if [tuple(state[name].shape) for name in trained] != [tuple(average.shape) for average in shadow]:
        raise ValueError(f"{path} has {len(shadow)} averaged parameters which do not match its {len(trained)} "
                         "parameters one by one: use ema=False")  # fmt: skip
    return state | dict(zip(trained, shadow, strict=True))


def _converted(state: Mapping[str, Tensor], network: UNet, config: SongConfig) -> dict[str, Tensor]:
    """The state dict of `network`; ValueError where a key of `state` is left over, missing, or of another shape."""
    wanted, result = network.state_dict(), {}
    used: set[str] = set()
    for ours, theirs, how in _pairs(network, config):
        absent = [name for name in theirs if name not in state]
        if absent:
            raise ValueError(f"the checkpoint lacks all_modules.{absent[0]}: is it another config's?")
        tensor = how([state[name] for name in theirs])
        if tensor.shape != wanted[ours].shape:
            raise ValueError(f"all_modules.{theirs[0]} has shape {tuple(state[theirs[0]].shape)}, which does not fit "
                             f"{ours} of shape {tuple(wanted[ours].shape)}: is it another config's?")  # fmt: skip
        used.update(theirs)
        result[ours] = tensor
    left = sorted(state.keys() - used)
    if left:
        raise ValueError(f"the checkpoint has {len(left)} keys more than the config, all_modules.{left[0]} among them")
    return result


def _as_is(tensors: list[Tensor]) -> Tensor:
    return tensors[0]


def _dense_to_conv(tensors: list[Tensor]) -> Tensor:
    """NIN's (inward, outward) matrices, one below the other, as the kernel of a 1x1 convolution."""
    return torch.cat([w.T for w in tensors])[..., None, None]


def _pairs(network: UNet, config: SongConfig) -> Iterator[Pair]:
    """What each of our tensors is made of, in the order of the original's layers."""
    layers = _Layers()
    if config.embedding_type == "fourier":
        yield "embedding.frequencies", (f"{layers.next()}.W",), lambda w: 2 * math.pi * w[0]
    # Their features are [sin, cos], ours [cos, sin].
    first = layers.next()
    yield "embedding.noise.0.weight", (f"{first}.weight",), lambda w: torch.cat(w[0].chunk(2, dim=1)[::-1], dim=1)
    yield "embedding.noise.0.bias", (f"{first}.bias",), _as_is
    yield from layers.plain("embedding.noise.2")
    yield from layers.plain("first")
    for i, layer in enumerate(network.down):
        yield from layers.block(f"down.{i}", layer)
        if config.progressive_input == "input_skip" and str(i) in network.inward:
            layers.next()  # the halving has a number, and no parameters
            yield from layers.plain(f"inward.{i}.conv", inner="Conv.")
        elif str(i) in network.inward:
            yield from layers.plain(f"inward.{i}.shrink.conv", inner="Conv2d_0.")
    for i, layer in enumerate(network.middle):
        yield from layers.block(f"middle.{i}", layer)
    for i, layer in enumerate(network.up):
        yield from layers.block(f"up.{i}", layer)
        if str(i) in network.outward:
            if not network.outward[str(i)].first:
                layers.next()  # the doubling
            yield from layers.plain(f"outward.{i}.head.0")
            yield from layers.plain(f"outward.{i}.head.2")
    if network.last is not None:
        yield from layers.plain("last.0")
        yield from layers.plain("last.2")


@dataclass
class _Layers:
    """Counts the original's layers."""

    count: int = field(default=0)

    def next(self) -> int:
        self.count += 1
        return self.count - 1

    def plain(self, ours: str, inner: str = "") -> Iterator[Pair]:
        """A layer with weight and bias."""
        n = self.next()
        for part in ("weight", "bias"):
            yield f"{ours}.{part}", (f"{n}.{inner}{part}",), _as_is

    def block(self, ours: str, layer: torch.nn.Module) -> Iterator[Pair]:
        """A residual block, then its attention, which has a number of its own; or DDPM's resampling."""
        if isinstance(layer, Resample):
            yield from self.plain(f"{ours}.conv", inner="Conv_0.")
            return
        assert isinstance(layer, Block)
        n, convolution = self.next(), len(layer.begin) - 1
        names = {"begin.0": "GroupNorm_0", f"begin.{convolution}": "Conv_0", "modulation": "Dense_0",
                 "norm": "GroupNorm_1", "end.2": "Conv_1"}  # fmt: skip
        biggan = layer.style.resample == "residual"
        if biggan and not isinstance(layer.skip, torch.nn.Identity):
            names["skip"] = "Conv_2"
        for mine, its in names.items():
            for part in ("weight", "bias"):
                yield f"{ours}.{mine}.{part}", (f"{n}.{its}.{part}",), _as_is
        if not biggan and not isinstance(layer.skip, torch.nn.Identity):
            yield f"{ours}.skip.weight", (f"{n}.NIN_0.W",), _dense_to_conv
            yield f"{ours}.skip.bias", (f"{n}.NIN_0.b",), _as_is
        if layer.attention is not None:
            yield from self.attention(f"{ours}.attention")

    def attention(self, ours: str) -> Iterator[Pair]:
        n = self.next()
        for part in ("weight", "bias"):
            yield f"{ours}.norm.{part}", (f"{n}.GroupNorm_0.{part}",), _as_is
        yield f"{ours}.qkv.weight", tuple(f"{n}.NIN_{i}.W" for i in range(3)), _dense_to_conv
        yield f"{ours}.qkv.bias", tuple(f"{n}.NIN_{i}.b" for i in range(3)), torch.cat
        yield f"{ours}.project.weight", (f"{n}.NIN_3.W",), _dense_to_conv
        yield f"{ours}.project.bias", (f"{n}.NIN_3.b",), _as_is


def diffusers(path: str | Path) -> LearnedScore:
    """The model of a folder that diffusers saved, in evaluation mode, on images in [-1, 1]; extra `diffusers`.

    The folder is a pipeline's, with `unet/` and `scheduler/` in it or, as google/ddpm-* and google/ncsnpp-* have it, all
    in one place. Noise prediction on a ladder of betas (DDPMScheduler and its kin) gives a `DiscreteSDE`, the score on VE
    (ScoreSdeVeScheduler) a `VESDE`.

    Raises:
        FileNotFoundError: the folder has no config.json or no scheduler_config.json.
        ValueError: the scheduler predicts something else or ends at zero signal, or the weights do not fit.
        ImportError: diffusers is not installed.
    """
    from score_sde.networks.diffusers import DiffusersUNet

    folder = Path(path)
    root = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
    scheduler = _json(folder, "scheduler_config.json", "scheduler")
    _json(root, "config.json")
    network = DiffusersUNet.load(root)
    sde, parameterization = _diffusers_process(scheduler, network.score)
    return LearnedScore(network, sde, parameterization, network.event_shape).eval().requires_grad_(False)


def _json(folder: Path, name: str, inner: str = ".") -> dict[str, Any]:
    found = next((path for path in (folder / inner / name, folder / name) if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} has no {name}: give a folder that diffusers' save_pretrained wrote")
    return json.loads(found.read_text())


def _diffusers_process(scheduler: Mapping[str, Any], score: bool) -> tuple[SDE, Parameterization]:
    """The SDE on data in [-1, 1] of a scheduler's config, and what a network is told and says."""
    if score:
        low, high = 2 * scheduler.get("sigma_min", 0.01), 2 * scheduler.get("sigma_max", 1348.0)
        return VESDE(low, high), PublishedNoise("log_sigma", scale=1, shift=-math.log(2), sign=-1)
    from diffusers import DDPMScheduler

    predicts = scheduler.get("prediction_type", "epsilon")
    if predicts != "epsilon":
        raise ValueError(f"prediction_type={predicts!r}: only networks that predict the noise, 'epsilon', are read")
    if scheduler.get("rescale_betas_zero_snr"):
        raise ValueError("rescale_betas_zero_snr=true: its last level has no signal at all, from which noise prediction says "
                         "nothing of the data; such a ladder is not read")  # fmt: skip
    known = {name: scheduler[name] for name in ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule",
                                                "trained_betas") if name in scheduler}  # fmt: skip
    betas: Tensor = vars(DDPMScheduler(**known))["betas"]
    return DiscreteSDE.from_betas(betas.double()), PublishedNoise("time", scale=1)

"""Published weights of other libraries as score models on images in [-1, 1].

`score_sde_pytorch` reads checkpoints of https://github.com/yang-song/score_sde_pytorch, whose `model` holds

    module.all_modules.N.<name>      N counts the layers in the order of the forward pass, see `docs/checkpoints.md`

and whose `ema` holds `shadow_params`, the averaged parameters as a list in that order. `diffusers` reads folders, pipelines
and networks of that library. Both raise ValueError if weights are missing or left over, and run no code from a file.
A VE network for data y in [0, 1] with noise sigma becomes one for x = 2 y - 1 with noise 2 sigma; its input is still sigma.
"""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from score_sde.checks import one_of
from score_sde.networks.blocks import Block, Resample
from score_sde.networks.unet import UNet
from score_sde.parameterization import Parameterization, Published
from score_sde.score import LearnedScore
from score_sde.sde import SDE, VESDE, VPSDE, DiscreteSDE, RectifiedFlow, SubVPSDE

__all__ = ["CONFIGS", "SongConfig", "diffusers", "score_sde_pytorch"]

# (our name of a tensor, the names in all_modules that it is made from, the function that makes it).
Pair = tuple[str, tuple[str, ...], Callable[[list[Tensor]], Tensor]]


@dataclass(frozen=True)
class SongConfig:
    """The settings of network and SDE in a config file of score_sde_pytorch, with the names they have there.

    `network` is "ddpm" or "ncsnpp" (with `resblock_type` "biggan"), `sde` is "vp", "subvp" or "ve", `continuous` says
    whether training times were continuous, and `num_scales` is the length of the ladder if not. The defaults are those of
    vp/cifar10_ddpmpp_continuous.
    Raises ValueError for settings that no published model has, e.g. `progressive='residual'`, `progressive_combine='cat'`.
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
        known = {
            "network": ("ddpm", "ncsnpp"), "sde": ("vp", "subvp", "ve"), "embedding_type": ("positional", "fourier"),
            "progressive": ("none", "output_skip"), "progressive_input": ("none", "input_skip", "residual"),
            "progressive_combine": ("sum",),
        }  # fmt: skip
        for name, allowed in known.items():
            one_of(name, getattr(self, name), allowed)
        if self.progressive_input == "residual" and not self.fir:
            raise ValueError("progressive_input='residual' is only known with fir=True")
        if (self.embedding_type == "fourier") != (self.sde == "ve" and self.continuous and self.network == "ncsnpp"):
            raise ValueError(f"embedding_type={self.embedding_type!r} does not go with sde={self.sde!r}, "
                             f"continuous={self.continuous}: 'fourier' is that of continuous VE alone")  # fmt: skip

    def unet(self) -> UNet:
        """The equivalent network of this package."""
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
        """The SDE on data in [-1, 1], and the network's parameterization."""
        if self.sde == "ve":
            if self.embedding_type == "fourier":
                return _variance_exploding(self.sigma_min, self.sigma_max)
            ladder = DiscreteSDE.geometric(2 * self.sigma_min, 2 * self.sigma_max, self.num_scales)
            # The original's index counts down from the greatest noise level.
            return ladder, Published("time", scale=-1, shift=self.num_scales - 1, sign=-1)
        if self.sde == "vp" and not self.continuous:
            per_step = 1000 / self.num_scales
            betas = torch.linspace(self.beta_min / 1000 * per_step, self.beta_max / 1000 * per_step, self.num_scales,
                                   dtype=torch.float64)  # fmt: skip
            return DiscreteSDE.from_betas(betas), Published("time", scale=1)
        kind = VPSDE if self.sde == "vp" else SubVPSDE
        return kind(self.beta_min, self.beta_max), Published("time", scale=999)


_DDPM = SongConfig("ddpm", num_res_blocks=2, continuous=False)
_PLUS = SongConfig()
_VE = SongConfig(sde="ve", embedding_type="fourier", fir=True, progressive_input="residual")
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
        config: the name of a published CIFAR-10 config in `CONFIGS`, or a `SongConfig` with the settings of another.
        ema: whether to read averaged weights or raw ones.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a checkpoint, or its keys or shapes are not those of the config's network.
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
    """The parameters of all_modules by name, averaged or raw."""
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of weights: {str(error).splitlines()[0]}") from None
    if not isinstance(file, Mapping) or not isinstance(file.get("model"), Mapping):
        raise ValueError(f"{path} is no checkpoint of score_sde_pytorch: it holds no `model`")
    # `sigmas`, NCSN++'s noise levels, is left out: it follows from the config.
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
    """The state dict of `network`. Raises ValueError if a key of `state` is left over, missing or of another shape."""
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
    """The (inward, outward) matrices of NINs, stacked along the outputs, as the kernel of a 1x1 convolution."""
    return torch.cat([w.T for w in tensors])[..., None, None]


def _pairs(network: UNet, config: SongConfig) -> Iterator[Pair]:
    """For each tensor of `network`, what it is made from, in the order of the original's layers."""
    layers = _Layers()
    if config.embedding_type == "fourier":
        yield "embedding.frequencies", (f"{layers.next()}.W",), lambda w: 2 * math.pi * w[0]
    # The original's features are [sin, cos], ours [cos, sin].
    first = layers.next()
    yield "embedding.noise.0.weight", (f"{first}.weight",), lambda w: torch.cat(w[0].chunk(2, dim=1)[::-1], dim=1)
    yield "embedding.noise.0.bias", (f"{first}.bias",), _as_is
    yield from layers.plain("embedding.noise.2")
    yield from layers.plain("first")
    for i, layer in enumerate(network.down):
        yield from layers.block(f"down.{i}", layer)
        if config.progressive_input == "input_skip" and str(i) in network.inward:
            layers.next()  # the halving has a number but no parameters
            yield from layers.plain(f"inward.{i}.conv", inner="Conv.")
        elif str(i) in network.inward:
            yield from layers.plain(f"inward.{i}.shrink.conv", inner="Conv2d_0.")
    for i, layer in enumerate(network.middle):
        yield from layers.block(f"middle.{i}", layer)
    for i, layer in enumerate(network.up):
        yield from layers.block(f"up.{i}", layer)
        if str(i) in network.outward:
            if not network.outward[str(i)].first:
                layers.next()  # the doubling has none either
            yield from layers.plain(f"outward.{i}.head.0")
            yield from layers.plain(f"outward.{i}.head.2")
    if network.last is not None:
        yield from layers.plain("last.0")
        yield from layers.plain("last.2")


@dataclass
class _Layers:
    """Counts the original's layers."""

    count: int = 0

    def next(self) -> int:
        self.count += 1
        return self.count - 1

    def plain(self, ours: str, inner: str = "") -> Iterator[Pair]:
        """A layer with weight and bias."""
        n = self.next()
        for part in ("weight", "bias"):
            yield f"{ours}.{part}", (f"{n}.{inner}{part}",), _as_is

    def block(self, ours: str, layer: torch.nn.Module) -> Iterator[Pair]:
        """A residual block and its attention, which is a layer of its own; or DDPM's resampling."""
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


def diffusers(source: Any, scheduler: Any = None) -> LearnedScore:
    """The score model, on images in [-1, 1], of a model that diffusers saved or holds in memory; extra `diffusers`.

    The scheduler determines what a network F with positional embedding predicts (see `docs/checkpoints.md`):

        ladder of betas     x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, t = 0..N-1; F(x, t) is eps ("epsilon"),
                            sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 ("v_prediction") or x_0 ("sample")
        flow matching       x_t = (1 - t) x_0 + t eps, t in (0, 1); F(x, N t) is eps - x_0 ("flow_prediction")

    A network with Fourier embedding gives the score under the VE SDE of `ScoreSdeVeScheduler`. How a scheduler steps,
    spaces or shifts its steps is left to the samplers here, and x_0 is not clipped; if the scheduler clips it, this warns.

    Args:
        source: a pipeline's folder, with `unet/` and `scheduler/` or, like google/ddpm-* and google/ncsnpp-*, with all
            files in one place, whose network becomes frozen and in evaluation mode; or a pipeline or a `UNet2DModel` in
            memory, which is neither copied nor changed.
        scheduler: a scheduler of diffusers, or its config with `_class_name`, to use instead of the source's.

    Raises:
        FileNotFoundError: the folder has no config.json or no scheduler_config.json.
        TypeError: the object is neither a `UNet2DModel` nor a pipeline with one.
        ValueError: the network or the scheduler is of an unsupported class, the two do not go together, or the weights do
            not fit.
        ImportError: diffusers is not installed.
    """
    from score_sde.networks.diffusers import DiffusersUNet

    if isinstance(source, str | PathLike):
        folder = Path(source)
        root = folder / "unet" if (folder / "unet" / "config.json").is_file() else folder
        _found(root, "config.json")
        if scheduler is None:
            scheduler = json.loads(_found(folder, "scheduler_config.json", "scheduler").read_text())
        network = DiffusersUNet.load(root)
    else:
        network = DiffusersUNet.of(getattr(source, "unet", source))
        scheduler = getattr(source, "scheduler", None) if scheduler is None else scheduler
    scheduler = _scheduler(scheduler)
    sde, parameterization = _diffusers_process(scheduler, network.score)
    _warn_of_clipping(scheduler)
    return LearnedScore(network, sde, parameterization, network.event_shape).train(network.training)


def _found(folder: Path, name: str, inner: str = ".") -> Path:
    found = next((path for path in (folder / inner / name, folder / name) if path.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} has no {name}: give a folder that save_pretrained of a diffusers pipeline with a "
                                "UNet2DModel wrote, or the model with scheduler=")  # fmt: skip
    return found


_LADDERS = (
    "DDPM", "DDPMParallel", "DDIM", "DDIMParallel", "PNDM", "DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE",
    "UniPCMultistep", "DEISMultistep", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "LMSDiscrete",
    "KDPM2Discrete", "KDPM2AncestralDiscrete",
)  # fmt: skip
_FLOWS = ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete")
_VARIANCE_EXPLODING = "ScoreSdeVe"
_OF_LADDERS = {"epsilon": "noise", "v_prediction": "velocity", "sample": "denoised"}
_OF_FLOWS = {"flow_prediction": "flow"}


def _scheduler(given: Any) -> Any:
    """The scheduler, or one made from its config. Raises ValueError for an unsupported class."""
    name = given.get("_class_name") if isinstance(given, Mapping) else type(given).__name__
    if given is None or name is None:
        raise ValueError(f"{'a network alone' if given is None else 'a config without _class_name'} does not say which "
                         "scheduler it goes with: give scheduler=, as an object or as the config it saved")  # fmt: skip
    if name not in [f"{kind}Scheduler" for kind in (*_LADDERS, *_FLOWS, _VARIANCE_EXPLODING)]:
        raise ValueError(f"scheduler {name} is not supported; supported are those of ladders of betas "
                         f"({', '.join(_LADDERS)}), of flow matching ({', '.join(_FLOWS)}) and "
                         f"{_VARIANCE_EXPLODING}")  # fmt: skip
    import diffusers as library

    return getattr(library, name).from_config(dict(given)) if isinstance(given, Mapping) else given


def _diffusers_process(scheduler: Any, score: bool) -> tuple[SDE, Parameterization]:
    """A scheduler's SDE on data in [-1, 1], and the parameterization of its network; `score`: with Fourier embedding."""
    config, name = scheduler.config, type(scheduler).__name__
    kind = name.removesuffix("Scheduler")
    if score != (kind == _VARIANCE_EXPLODING):
        raise ValueError(f"{name} does not go with a {'fourier' if score else 'positional'} embedding: a fourier one goes "
                         f"with {_VARIANCE_EXPLODING}Scheduler, a positional one with every other")  # fmt: skip
    if score:
        return _variance_exploding(config.sigma_min, config.sigma_max)
    flow = kind in _FLOWS or config.get("use_flow_sigmas", False)
    known = _OF_FLOWS if flow else _OF_LADDERS
    predicts = config.get("prediction_type", "flow_prediction")  # flow-matching schedulers have no such key
    if predicts not in known:
        raise ValueError(f"{name} with prediction_type={predicts!r} is not supported: "
                         f"{'flow matching' if flow else 'a ladder of betas'} takes {', '.join(known)}")  # fmt: skip
    timesteps, inverted = config.get("timestep_type", "discrete"), config.get("invert_sigmas", False)
    if timesteps != "discrete" or inverted:
        raise ValueError(f"{name} with timestep_type={timesteps!r} and invert_sigmas={inverted} is not supported: it must be "
                         "'discrete' and False: networks are given a ladder's step or the share of noise")  # fmt: skip
    if flow:
        return RectifiedFlow(), Published("time", scale=config.num_train_timesteps, prediction="flow")
    betas = scheduler.betas.double()
    if not (betas < 1).all():
        raise ValueError(f"{name} with a beta of 1 (rescale_betas_zero_snr=True) is not supported: such a level has no "
                         "signal at all, and every level of a DiscreteSDE has some")  # fmt: skip
    return DiscreteSDE.from_betas(betas), Published("time", scale=1, prediction=known[predicts])


def _variance_exploding(sigma_min: float, sigma_max: float) -> tuple[SDE, Parameterization]:
    """The SDE on data in [-1, 1], and the parameterization, of a Fourier network for VE noise on data in [0, 1]."""
    return VESDE(2 * sigma_min, 2 * sigma_max), Published("log_sigma", scale=1, shift=-math.log(2), sign=-1)


def _warn_of_clipping(scheduler: Any) -> None:
    """Warns if diffusers' sampling clips x_0, as score models do not."""
    config = scheduler.config
    if config.get("thresholding", False):
        option, wrapped = "thresholding", f"DynamicThreshold(model, {config.dynamic_thresholding_ratio:g})"
    elif config.get("clip_sample", False):
        option, wrapped = "clip_sample", f"StaticThreshold(model, {config.clip_sample_range:g})"
    else:
        return
    warnings.warn(f"{type(scheduler).__name__} clips x_0 at every step ({option}=True) and the converted score model does "
                  f"not: to do the same, wrap it in score_sde.guidance.{wrapped}", stacklevel=3)  # fmt: skip

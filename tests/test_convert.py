"""Other people's weights: the layout of score_sde_pytorch against a restated forward pass, diffusers against itself."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import few_steps

from score_sde import DDIM, Ancestral, BatchNoise, RectifiedFlow, Sampler, convert, grid, guidance
from score_sde.convert import CONFIGS, SongConfig
from score_sde.networks import UNet

sys.path.insert(0, str(Path(__file__).parent / "networks"))
from references import Song

TINY = {"image_size": 8, "nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,), "dropout": 0.1}
LAYOUTS = {name: replace(config, **TINY) for name, config in CONFIGS.items() if "deep" not in name}
LAYOUTS["high resolution"] = replace(
    LAYOUTS["ve/cifar10_ncsnpp_continuous"],
    progressive="output_skip",
    progressive_input="input_skip",
    ch_mult=(1, 1, 2),
)
LAYOUTS["grey, no rescaling"] = replace(LAYOUTS["vp/cifar10_ddpmpp"], num_channels=1, skip_rescale=False)


def told(config: SongConfig, t: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """What the original's score function tells its network at our time t, where our noise level is sigma."""
    if config.embedding_type == "fourier":
        return sigma / 2  # of data in [0, 1]
    if config.sde == "ve":
        return config.num_scales - 1 - t  # the ladder falls
    return 999 * t if config.continuous else t


def written(path: Path, config: SongConfig, change=lambda file: file) -> tuple[Song, Song]:
    """A checkpoint with random weights, and the networks of its raw and averaged ones."""
    raw, averaged = Song(config, seed=0), Song(config, seed=1)
    x, c = torch.zeros(1, config.num_channels, 8, 8, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    raw(x, c)
    averaged(x, c)
    fourier = "module.all_modules.0.W"
    if fourier in raw.state:
        averaged.state[fourier] = raw.state[fourier]  # not trained: not averaged
    shadow = [value for name, value in averaged.state.items() if name != fourier]
    file = {
        "optimizer": {"state": {}, "param_groups": [{"lr": 2e-4}]},
        "model": {"module.sigmas": torch.ones(10), **raw.state},
        "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": shadow},
        "step": 7,
    }
    torch.save(change(file), path)
    return raw, averaged


@pytest.mark.parametrize("config", LAYOUTS.values(), ids=LAYOUTS)
def test_converted_weights_say_what_the_original_says(config, tmp_path) -> None:
    raw, averaged = written(tmp_path / "checkpoint.pth", config)
    x = torch.randn(3, config.num_channels, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    for ema, original in ((True, averaged), (False, raw)):
        model = convert.score_sde_pytorch(tmp_path / "checkpoint.pth", config, ema=ema).double()
        sde = model.sde
        t = torch.tensor([0.1, 0.5, 1.0]).double() * sde.t_max
        t = t if config.continuous else t.round()
        sigma = sde.sigma(t)
        output = original(x, told(config, t, sigma))
        # VE's output over sigma is the score of data in [0, 1], half of that of data in [-1, 1] per half the noise;
        # VP's output is the noise.
        score = (output if config.sde == "ve" else -output) / sigma[:, None, None, None]
        said = model(x, t)
        torch.testing.assert_close(said.score, score, rtol=1e-5, atol=1e-5 * score.abs().max().item())
        assert not model.training


def test_the_processes_are_the_published_ones() -> None:
    # score_sde_pytorch's sde_lib: alpha_bar from linear betas; the marginals of VP, sub-VP and VE at t = 1.
    sde, _ = CONFIGS["vp/cifar10_ddpm"].process()
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    torch.testing.assert_close(sde.alpha(torch.arange(1000.0).double()) ** 2, alpha_bar)
    log_mean = -(20 - 0.1) / 4 - 0.1 / 2
    for name, std in (("vp/cifar10_ddpmpp_continuous", 0.5), ("subvp/cifar10_ddpmpp_continuous", 1.0)):
        sde, _ = CONFIGS[name].process()
        assert float(sde.sigma(1.0)) == pytest.approx((1 - math.exp(2 * log_mean)) ** std, rel=1e-9)
    for name in ("ve/cifar10_ncsnpp", "ve/cifar10_ncsnpp_continuous"):
        sde, _ = CONFIGS[name].process()
        assert float(sde.sigma(sde.t_max)) == pytest.approx(2 * 50.0)
        assert float(sde.sigma(torch.zeros((), dtype=torch.float64))) == pytest.approx(2 * 0.01)


def test_published_configs_have_the_parameters_of_our_presets() -> None:
    with torch.device("meta"):
        for name, preset in (
            ("vp/cifar10_ddpmpp_continuous", UNet.ddpmpp((3, 32, 32))),
            ("ve/cifar10_ncsnpp_deep_continuous", UNet.ncsnpp((3, 32, 32), blocks=8)),
        ):
            theirs = {k: v.shape for k, v in CONFIGS[name].unet().state_dict().items()}
            assert theirs == {k: v.shape for k, v in preset.state_dict().items()}


CONFIG = LAYOUTS["ve/cifar10_ncsnpp_continuous"]


def without(file: dict, key: str) -> dict:
    return file | {"model": {k: v for k, v in file["model"].items() if k != key}}


@pytest.mark.parametrize(
    ("change", "ema", "message"),
    [
        (lambda f: without(f, "module.all_modules.4.Conv_0.bias"), False, r"lacks all_modules\.4\.Conv_0\.bias"),
        (lambda f: f | {"model": f["model"] | {"module.all_modules.99.weight": torch.ones(1)}}, False, "1 keys more"),
        (
            lambda f: f | {"model": f["model"] | {"module.all_modules.3.bias": torch.ones(5)}},
            False,
            r"has shape \(5,\)",
        ),
        (
            lambda f: f | {"ema": f["ema"] | {"shadow_params": f["ema"]["shadow_params"][1:]}},
            True,
            "averaged parameters",
        ),
        (lambda f: f | {"ema": {}}, True, "has 0 averaged parameters"),
        (lambda f: {"state_dict": f["model"]}, True, "holds no `model`"),
        (lambda f: f | {"step": Path("code")}, True, "cannot be read as a checkpoint of weights"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(change, ema, message, tmp_path) -> None:
    written(tmp_path / "checkpoint.pth", CONFIG, change)
    with pytest.raises(ValueError, match=message) as refusal:
        convert.score_sde_pytorch(tmp_path / "checkpoint.pth", CONFIG, ema=ema)
    assert "\n" not in str(refusal.value)


def test_files_and_configs_that_are_none_are_refused(tmp_path) -> None:
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read"):
        convert.score_sde_pytorch(tmp_path / "text.pth", CONFIG)
    with pytest.raises(FileNotFoundError):
        convert.score_sde_pytorch(tmp_path / "missing.pth", CONFIG)
    with pytest.raises(ValueError, match="unknown config 'cifar'"):
        convert.score_sde_pytorch(tmp_path / "text.pth", "cifar")
    with pytest.raises(ValueError, match="progressive is one of none, output_skip; got 'residual'"):
        SongConfig(progressive="residual")
    with pytest.raises(ValueError, match="'fourier' is that of continuous VE alone"):
        SongConfig(embedding_type="fourier")
    with pytest.raises(ValueError, match="only known with fir=True"):
        SongConfig(progressive_input="residual")


# diffusers


BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": None}
DDPM = BLOCKS | {
    "sample_size": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "freq_shift": 1, "flip_sin_to_cos": False,
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "downsample_padding": 0, "norm_eps": 1e-6,
}  # fmt: skip
NCSNPP = BLOCKS | {
    "sample_size": 8, "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"), "time_embedding_type": "fourier",
    "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"), "mid_block_scale_factor": math.sqrt(2),
    "block_out_channels": (32, 32), "norm_num_groups": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("diffusers", reason="the extra `diffusers` is not installed")


def network(library, config: dict):
    torch.manual_seed(0)
    return library.UNet2DModel(**config).eval()


def saved(library, folder: Path, config: dict, scheduler, flat: bool = True):
    """A folder as on the hub: google's have everything in one place, a pipeline's have unet/ and scheduler/."""
    unet = network(library, config)
    unet.save_pretrained(folder if flat else folder / "unet")
    scheduler.save_pretrained(folder if flat else folder / "scheduler")
    return unet


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("flat", [True, False])
@torch.no_grad()
def test_a_ddpm_folder_says_its_noise_at_its_step(library, tmp_path, flat) -> None:
    unet = saved(library, tmp_path, DDPM, library.DDPMScheduler(clip_sample=False), flat)
    model, x = convert.diffusers(tmp_path), images()
    for step in (0, 400, 999):
        torch.testing.assert_close(model(x, float(step)).noise, unet(x, step).sample, rtol=1e-5, atol=1e-5)
    steps = torch.tensor([0, 400, 999])
    torch.testing.assert_close(model(x, steps.double()).noise, unet(x, steps).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@torch.no_grad()
def test_one_step_is_the_step_of_diffusers_own_schedulers(library, tmp_path, schedule) -> None:
    options = {"beta_schedule": schedule, "clip_sample": False}
    unet = saved(library, tmp_path, DDPM, library.DDPMScheduler(**options))
    model, x = convert.diffusers(tmp_path), images()
    ddim = library.DDIMScheduler(**options, set_alpha_to_one=False)
    ddim.set_timesteps(10)
    here, there = 500, 400
    ours = Sampler(DDIM(), lambda sde: torch.tensor([here, there], dtype=torch.float64), final="none")
    theirs = ddim.step(unet(x, here).sample, here, x).prev_sample
    # Their ladder and arithmetic are in float32.
    torch.testing.assert_close(ours.sample(model, x.shape, x_init=x, seed=0).x, theirs, rtol=1e-4, atol=1e-4)
    # An ancestral step between neighbours, with the noise that the scheduler draws.
    ddpm = library.DDPMScheduler(**options)
    theirs = ddpm.step(unet(x, here).sample, here, x, generator=torch.Generator().manual_seed(5)).prev_sample
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    t, s = torch.tensor([here, here - 1], dtype=torch.float64).split(1)
    a, (b,), c = (part for part in Ancestral().coefficients(model.sde, t, s))
    step = float(a) * x + float(b) * model(x, float(here)).denoised + float(c) * z
    torch.testing.assert_close(step, theirs, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_ncsnpp_folder_is_a_score_of_images_in_minus_one_to_one(library, tmp_path) -> None:
    scheduler = library.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=348.0)
    unet = saved(library, tmp_path, NCSNPP, scheduler)
    model, x = convert.diffusers(tmp_path), images()
    assert float(model.sde.sigma(1.0)) == pytest.approx(2 * 348.0)
    for t in (0.2, 0.7, 1.0):
        sigma = 0.01 * 34800**t  # of y = (x + 1) / 2
        there = unet((x + 1) / 2, torch.full((3,), sigma)).sample
        torch.testing.assert_close(model(x, t).score, there / 2, rtol=2e-4, atol=1e-5 * there.abs().max().item())


@torch.no_grad()
def test_one_prediction_step_on_ve_is_that_of_diffusers(library, tmp_path) -> None:
    scheduler = library.ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    unet = saved(library, tmp_path, NCSNPP, scheduler)
    model, x = convert.diffusers(tmp_path), images()
    scheduler.set_timesteps(1000)
    scheduler.set_sigmas(1000)
    t = scheduler.timesteps[300]
    # The scheduler's sigmas: its step 300 from above goes from sigma_699 to its neighbour below.
    sigma = scheduler.discrete_sigmas[699]
    y, z = (x + 1) / 2, torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    score = unet(y, torch.full((3,), float(sigma))).sample
    theirs = scheduler.step_pred(score, t, y, generator=torch.Generator().manual_seed(5)).prev_sample
    below = scheduler.discrete_sigmas[698]
    at, to = (model.sde.time_at(-torch.log(2 * level.double())) for level in (sigma, below))
    std = (sigma.double() ** 2 - below.double() ** 2).sqrt()
    ours = x + 4 * float(std**2) * model(x, float(at)).score + 2 * float(std) * z
    torch.testing.assert_close((ours + 1) / 2, theirs, rtol=1e-3, atol=1e-3)
    assert float(model.sde.sigma(at)) > float(model.sde.sigma(to))


def options(scheduler: str, **others) -> dict:
    """A scheduler's config, its defaults left out."""
    return {"_class_name": f"{scheduler}Scheduler", **others}


def exact(scheduler):
    """The scheduler with the ladder of its betas in double precision, which in single is off by 1e-5."""
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    return scheduler


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
@torch.no_grad()
def test_ten_ddim_steps_are_those_of_diffusers_whatever_is_predicted(library, tmp_path, predicts) -> None:
    scheduler = exact(library.DDIMScheduler(prediction_type=predicts, clip_sample=False))
    unet = saved(library, tmp_path, DDPM, scheduler).double()
    model, x = convert.diffusers(tmp_path).double(), images().double()
    scheduler.set_timesteps(10)
    theirs = x
    for step in scheduler.timesteps:
        theirs = scheduler.step(unet(theirs, step).sample, step, theirs).prev_sample
    ours = Sampler(DDIM(), partial(grid.respaced, steps=9, spacing="leading")).sample(model, x.shape, x_init=x).x
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


@pytest.mark.parametrize(("theirs", "ours"), [("fixed_small", "posterior"), ("fixed_large", "forward")])
@torch.no_grad()
def test_a_whole_ddpm_chain_is_that_of_diffusers(library, theirs, ours) -> None:
    scheduler = exact(library.DDPMScheduler(num_train_timesteps=20, clip_sample=False, variance_type=theirs))
    scheduler.betas, scheduler.one = scheduler.betas.double(), scheduler.one.double()
    unet = network(library, DDPM).double()
    model, x = convert.diffusers(unet, scheduler=scheduler), images().double()
    start, z = x, torch.Generator().manual_seed(5)
    for step in scheduler.timesteps:
        x = scheduler.step(unet(x, step).sample, step, x, generator=z).prev_sample

    # Batches of noise from one generator are theirs, for theirs begins at x_init and draws none at the last level.
    sampler = Sampler(Ancestral(ours), partial(grid.uniform, steps=19))
    result = sampler.sample(model, start.shape, x_init=start, noise=BatchNoise(5))
    torch.testing.assert_close(result.x, x, rtol=1e-9, atol=1e-9 * x.abs().max().item())


@torch.no_grad()
def test_euler_steps_of_flow_matching_are_those_of_diffusers(library) -> None:
    scheduler, unet = library.FlowMatchEulerDiscreteScheduler(shift=3.0), network(library, DDPM)
    model, x = convert.diffusers(unet, scheduler=scheduler), images()
    assert isinstance(model.sde, RectifiedFlow)
    scheduler.set_timesteps(sigmas=[0.97, 0.7, 0.4, 0.2])
    theirs = x
    for step in scheduler.timesteps:  # 1000 sigma, sigma shifted
        theirs = scheduler.step(unet(theirs, step).sample, step, theirs).prev_sample
    # The last of their steps ends at sigma = 0, which Tweedie's formula does.
    ours = Sampler(DDIM(), lambda sde: scheduler.sigmas[:-1].double()).sample(model, x.shape, x_init=x).x
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    # Other schedulers know flow matching too, by options.
    scheduler = library.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(5)
    scheduler._step_index = 2
    t = float(scheduler.sigmas[2])
    model = convert.diffusers(unet, scheduler=scheduler)
    theirs = scheduler.convert_model_output(unet(x, torch.tensor(1000 * t)).sample, sample=x)
    torch.testing.assert_close(model(x, t).denoised, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # numpy, of diffusers
@pytest.mark.parametrize("name", convert._LADDERS)
def test_each_scheduler_has_its_own_ladder_and_defaults(library, name) -> None:
    if name == "DPMSolverSDE":
        pytest.importorskip("torchsde", reason="diffusers needs it for DPMSolverSDEScheduler")
    unet = network(library, DDPM)
    model = convert.diffusers(unet, options(name, clip_sample=False, num_train_timesteps=100))
    theirs = getattr(library, f"{name}Scheduler")(num_train_timesteps=100).alphas_cumprod
    torch.testing.assert_close(model.sde.alpha(torch.arange(100)) ** 2, theirs.double(), rtol=1e-5, atol=0)
    assert model.parameterization.prediction == "noise"
    assert float(model.parameterization.row(model.sde, 70.0).c_noise) == 70


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        *[(options(name), f"scheduler {name}Scheduler is not supported; .*DDIM.*FlowMatchEulerDiscrete.*ScoreSdeVe")
          for name in ("EDMEuler", "EDMDPMSolverMultistep", "LCM", "TCD", "CMStochasticIterative", "FlowMatchLCM", "UnCLIP")],
        ({"beta_start": 0.1}, "a config without _class_name does not say .* give scheduler="),
        (options("ScoreSdeVe"), "ScoreSdeVeScheduler does not go with a positional"),
        (options("EulerDiscrete", timestep_type="continuous"), "timestep_type='continuous'"),
        (options("FlowMatchEulerDiscrete", invert_sigmas=True), "invert_sigmas=True"),
        (options("DDIM", prediction_type="flow_prediction"), "a ladder of betas takes epsilon, v_prediction, sample"),
        (options("UniPCMultistep", use_flow_sigmas=True), "'epsilon' is not supported: flow matching takes flow_prediction"),
        (options("DDIM", rescale_betas_zero_snr=True, prediction_type="v_prediction"), "has no signal at all"),
        (None, "a network alone does not say .* give scheduler="),
    ],
)  # fmt: skip
def test_schedulers_that_are_not_read_are_refused_by_name(library, scheduler, message) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        convert.diffusers(network(library, DDPM), scheduler)
    assert "\n" not in str(refusal.value)


def test_a_fourier_network_goes_with_variance_exploding_alone(library) -> None:
    with pytest.raises(ValueError, match="DDPMScheduler does not go with a fourier embedding"):
        convert.diffusers(network(library, NCSNPP), library.DDPMScheduler())


@torch.no_grad()
def test_clipping_is_warned_of_with_the_wrapper_that_does_it(library) -> None:
    unet, x = network(library, DDPM).double(), images().double()
    dynamic = library.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9)
    with pytest.warns(
        UserWarning, match=r"DDIMScheduler.*thresholding=True.*guidance\.DynamicThreshold\(model, 0\.9\)$"
    ):
        convert.diffusers(unet, dynamic)
    static = exact(library.DDIMScheduler(clip_sample_range=0.5))
    with pytest.warns(UserWarning, match=r"DDIMScheduler.*clip_sample=True.*guidance\.StaticThreshold\(model, 0\.5\)$"):
        model = convert.diffusers(unet, static)
    static.set_timesteps(10)
    theirs = x
    for step in static.timesteps:
        predicted = unet(theirs, step).sample
        theirs = static.step(predicted, step, theirs, use_clipped_model_output=True).prev_sample
    sampler = Sampler(DDIM(), partial(grid.respaced, steps=9, spacing="leading"))
    ours = sampler.sample(guidance.StaticThreshold(model, 0.5), x.shape, x_init=x).x
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_what_does_not_clip_is_not_warned_of(library, recwarn) -> None:
    for scheduler in (library.DDPMScheduler(clip_sample=False), library.PNDMScheduler()):
        convert.diffusers(network(library, DDPM), scheduler)
    assert not recwarn.list


@torch.no_grad()
def test_pipelines_and_networks_in_memory_are_taken_as_they_are(library, tmp_path) -> None:
    scheduler, x = library.DDIMScheduler(clip_sample=False, prediction_type="v_prediction", beta_end=0.01), images()
    unet = saved(library, tmp_path, DDPM, scheduler)
    folder = convert.diffusers(tmp_path)
    assert not folder.network.unet.training
    assert not any(parameter.requires_grad for parameter in folder.parameters())
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    pipeline = library.DDIMPipeline(unet, scheduler)  # it rebuilds the scheduler
    for model in (
        convert.diffusers(pipeline),
        convert.diffusers(unet, scheduler=scheduler),
        convert.diffusers(unet, scheduler=config),
        convert.diffusers(str(tmp_path), scheduler=config),
    ):
        torch.testing.assert_close(model(x, 300.0).denoised, folder(x, 300.0).denoised)
    for training in (True, False):
        model = convert.diffusers(unet.train(training), scheduler=scheduler)
        assert model.network.unet is unet
        assert model.training == unet.training == training
        assert all(parameter.requires_grad for parameter in model.parameters())
    # The given scheduler is in the place of the folder's.
    other = convert.diffusers(tmp_path, scheduler=library.DDIMScheduler(clip_sample=False))
    assert other.parameterization.prediction == "noise"


def test_other_classes_are_refused_by_name(library, tmp_path) -> None:
    conditional = library.UNet2DConditionModel(
        **BLOCKS | {"attention_head_dim": 4}, sample_size=8, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    dit = library.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, sample_size=8, num_layers=1, patch_size=2
    )
    scheduler = library.DDPMScheduler(clip_sample=False)
    for other in (conditional, dit):
        message = f"^{type(other).__name__} is not supported: give a UNet2DModel"
        with pytest.raises(TypeError, match=message):
            convert.diffusers(other, scheduler)
        other.save_pretrained(tmp_path / "unet")
        scheduler.save_pretrained(tmp_path / "scheduler")
        with pytest.raises(ValueError, match=message):
            convert.diffusers(tmp_path)
    with pytest.raises(TypeError, match="dict is not supported"):
        convert.diffusers(DDPM, scheduler)  # no network of random weights


@few_steps
def test_folders_are_sampled_by_our_samplers(library, tmp_path) -> None:
    for config, scheduler in (
        (DDPM, library.DDPMScheduler(clip_sample=False)),
        (NCSNPP, library.ScoreSdeVeScheduler(sigma_max=50.0)),
    ):
        saved(library, tmp_path, config, scheduler)
        model = convert.diffusers(tmp_path)
        result = Sampler(DDIM(), partial(grid.log_snr, steps=3)).sample(model, (2, 3, 8, 8), seed=0)
        assert result.x.isfinite().all()


def test_folders_that_do_not_fit_are_refused(library, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        convert.diffusers(tmp_path)
    network(library, DDPM).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no scheduler_config\.json"):
        convert.diffusers(tmp_path)
    unet = saved(library, tmp_path, DDPM, library.DDPMScheduler())
    weights = unet.state_dict()
    weights.pop("conv_in.bias")
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"missing or left over, conv_in\.bias"):
        convert.diffusers(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="its weights do not fit"):
        convert.diffusers(tmp_path)


def test_a_network_of_unknown_size_is_refused(library) -> None:
    from score_sde.networks.diffusers import DiffusersUNet

    for option in ({"sample_size": None}, {"out_channels": 6}, {"class_embed_type": "timestep"}):
        with pytest.raises(ValueError, match="it needs a sample_size"):
            DiffusersUNet(DDPM | option)

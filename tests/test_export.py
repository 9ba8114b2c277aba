"""An exported model is the run's, to the last bit; it needs no Hydra, executes no code, and says what is wrong with it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import hydra
import pytest
import torch
from omegaconf import OmegaConf

import score_sde
from score_sde import DiscreteSDE, LearnedScore
from score_sde.build import build, build_model
from score_sde.data import TensorData
from score_sde.export import PARTS, save
from score_sde.networks import UNet
from score_sde.run import Run
from score_sde.training import DenoisingScoreMatching, Trainer, UniformTimes

CONFIG = {
    "seed": 3,
    "event_shape": [1, 4, 4],
    "sde": {"_target_": "score_sde.sde.DiscreteSDE.ddpm", "num_steps": 100},
    "parameterization": {"_target_": "score_sde.parameterization.Noise"},
    "network": {
        "_target_": "score_sde.networks.unet.UNet.ncsnpp",
        "event_shape": "${event_shape}",
        "width": 8,
        "multipliers": [1, 2],
        "blocks": 1,
        "attention": [],
        "num_classes": 2,
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    run = Run.create(tmp_path_factory.mktemp("run"), OmegaConf.create(CONFIG))
    data = TensorData(torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    settings = Trainer(steps=4, batch_size=8, device="cpu", progress=False, checkpoint_every=2, power_emas=(0.05, 0.1),
                       snapshot_every=1)  # fmt: skip
    settings.fit(build_model(run.config), data, DenoisingScoreMatching(), UniformTimes(), run.path, seed=3)
    return run


def question() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([3.0, 50.0, 99.0])


@pytest.mark.parametrize("ema", [False, 0.07])
def test_raw_weights_and_those_averaged_over_another_width_are_exported_too(run, tmp_path, ema) -> None:
    model = score_sde.load(run.export(tmp_path / "model", ema=ema))
    assert torch.equal(model(*question()).score, run.model(ema)(*question()).score)
    assert not torch.equal(model(*question()).score, run.model()(*question()).score)


def test_the_exported_model_is_the_averaged_one_bit_for_bit(run, tmp_path) -> None:
    folder = run.export(tmp_path / "model")
    model, label = score_sde.load(folder), torch.tensor([0, 1, -1])
    assert torch.equal(model(*question(), label=label).score, run.model()(*question(), label=label).score)
    assert not torch.equal(model(*question()).score, run.model(ema=False)(*question()).score)
    assert isinstance(model, LearnedScore)
    assert isinstance(model.sde, DiscreteSDE)
    assert isinstance(model.network, UNet)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
    early = score_sde.load(run.export(tmp_path / "early", step=2))
    assert not torch.equal(early(*question()).score, model(*question()).score)


def test_it_is_read_where_hydra_and_omegaconf_are_not_installed(run, tmp_path) -> None:
    folder = run.export(tmp_path / "model")
    code = f"""
        import sys
        sys.modules["hydra"] = sys.modules["omegaconf"] = None
        import torch, score_sde
        x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
        torch.set_num_threads(1)
        score = score_sde.load({str(folder)!r})(x, torch.tensor([3.0, 50.0, 99.0])).score
        torch.save(score, {str(tmp_path / "score.pt")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    there = torch.load(tmp_path / "score.pt", weights_only=True)
    torch.testing.assert_close(there, run.model()(*question()).score, rtol=1e-6, atol=1e-6)


def test_build_makes_what_hydra_makes(run) -> None:
    node = {
        "_target_": "score_sde.sampler.Sampler",
        "predictor": {"_target_": "score_sde.steps.DDIM", "eta": 0.5},
        "grid": {"_target_": "score_sde.grid.log_snr", "_partial_": True, "steps": 3},
    }
    ours, hydras = build(node), hydra.utils.instantiate(node, _convert_="all")
    assert ours.predictor.eta == hydras.predictor.eta == 0.5
    assert torch.equal(ours.grid(run.model().sde), hydras.grid(run.model().sde))


def edited(folder, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


NETWORK = CONFIG["network"] | {"event_shape": [1, 4, 4]}


@pytest.mark.parametrize(
    ("harm", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), FileNotFoundError, r"has no config\.json"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, r"has no model\.safetensors"),
        (lambda f: (f / "config.json").write_text("{"), ValueError, "is no config of a model"),
        (lambda f: (f / "config.json").write_text("[]"), ValueError, "it must hold sde, parameterization"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no weights"), ValueError, "is damaged"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-7]),
            ValueError,
            "is damaged",
        ),
        (lambda f: edited(f, network=NETWORK | {"width": 16}), ValueError, "has other weights"),
        (lambda f: edited(f, network=NETWORK | {"blocks": 2}), ValueError, "has other weights"),
        (lambda f: edited(f, sde={"_target_": "os.system", "command": "true"}), ValueError, "is refused"),
        (lambda f: edited(f, sde={"_target_": "score_sde.run.Run.open", "path": "."}), ValueError, "is refused"),
        (
            lambda f: edited(f, network=NETWORK | {"_target_": "score_sde.networks.Unet"}),
            ImportError,
            "nothing of that",
        ),
    ],
)
def test_damaged_exports_are_refused_in_one_line(run, tmp_path, harm, error, message) -> None:
    folder = run.export(tmp_path / "model")
    harm(folder)
    with pytest.raises(error, match=message) as refusal:
        score_sde.load(folder)
    assert "\n" not in str(refusal.value)


def test_exports_that_cannot_be_are_refused(run, tmp_path) -> None:
    run.export(tmp_path / "model")
    with pytest.raises(ValueError, match="exists: export to a new folder"):
        run.export(tmp_path / "model")
    with pytest.raises(ValueError, match="the config lacks 'seed'"):
        save(run.model(), {name: 0 for name in PARTS if name != "seed"}, tmp_path / "other")
    with pytest.raises(ValueError, match="not plain numbers"):
        save(run.model(), dict.fromkeys(PARTS, object()), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_module_of_ones_own_is_read_where_it_is_trusted(run, tmp_path, monkeypatch) -> None:
    (tmp_path / "my_networks.py").write_text("from score_sde.networks import UNet\n\n\nclass Mine(UNet):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = run.export(tmp_path / "model")
    edited(folder, network=NETWORK | {"_target_": "my_networks.Mine.ncsnpp"})
    with pytest.raises(ValueError, match=r"trust its module: trust=\['my_networks'\]"):
        score_sde.load(folder)
    # The class method is inherited: its home is score_sde.
    model = score_sde.load(folder, trust=("my_networks",))
    assert type(model.network).__name__ == "Mine"
    assert torch.equal(model(*question()).score, run.model()(*question()).score)

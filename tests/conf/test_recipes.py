"""What every file of conf/experiment owes: a sampler that ends where it denoises, and for images its numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_conf import CONF, SMALL, compose, configs, names, trained_for_two_steps

from score_sde import Sampler, grid
from score_sde.build import build


def recipe(name: str):
    config = compose(f"experiment={name}")
    if config.sde.get("sigma_max") == "auto":
        config.sde.sigma_max = 50.0
    config.event_shape = [3, 32, 32]
    return config


@pytest.mark.parametrize("name", names("experiment"))
def test_the_last_move_adds_no_more_noise_than_the_last_denoising_removes(name: str) -> None:
    """A uniform grid down to t = 1e-5 on VP left 0.011, three grey levels, in every sample."""
    config = recipe(name)
    sde, sampler = build(config.sde), build(configs.sampler_config(config.sampler))
    assert isinstance(sampler, Sampler)
    if sampler.predictor is None:
        return
    times = grid.check(sampler.grid(sde), sde)
    added = getattr(sampler.predictor.plan(sde, times[-2:-1], times[-1:])[0], "c", 0.0)
    assert added < max(3 * sde.sigma(times[-1]).item(), 1 / 255)


@pytest.mark.parametrize("name", names("experiment"))
def test_a_recipe_of_images_names_its_source_and_what_was_reported_and_measured(name: str) -> None:
    if recipe(name).data._target_.endswith("TargetStream"):
        return
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert "https://arxiv.org/abs/" in header
    assert "The paper: " in header or "o paper reports" in header
    assert "not run" in header or "Measured" in header


@pytest.mark.parametrize("network", ["unet", "dit_s"])
def test_a_context_goes_from_a_file_to_the_network(network: str, tmp_path: Path) -> None:
    source = np.random.default_rng(0)
    images, tokens = source.normal(size=(24, 1, 8, 8)), source.normal(size=(24, 3, 5))
    np.savez(tmp_path / "a.npz", x=images, tokens=tokens)
    small = [f"network.{key}={value}" for key, value in SMALL.items() if key in compose(f"network={network}").network]
    config = compose(
        f"network={network}", *small, "network.context_width=5", "data=file", f"data.path={tmp_path / 'a.npz'}",
        "data.context=tokens", "objective.label_dropout=0.5", "trainer.steps=2", "trainer.batch_size=8",
        "trainer.progress=false",
    )  # fmt: skip
    model = trained_for_two_steps(config, tmp_path)
    x, context = torch.zeros(2, 1, 8, 8), torch.tensor(tokens[:2]).float()
    with torch.no_grad():
        assert not torch.equal(model(x, 0.5, context=context).denoised, model(x, 0.5).denoised)

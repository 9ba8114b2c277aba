"""What every file of conf/experiment owes: a sampler that ends where it denoises, and for images its numbers."""

from __future__ import annotations

import pytest
from test_conf import CONF, common, compose, names

from score_sde import Sampler, grid
from score_sde.run import instantiate


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
    sde, sampler = instantiate(config.sde), instantiate(common.sampler_config(config.sampler))
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

"""Draws samples from a trained model: python scripts/sample.py run=<dir> sampler=heun num_samples=1000

On several GPUs, to the same samples: torchrun --nproc-per-node 2 scripts/sample.py run=<dir> num_samples=50000
"""

from __future__ import annotations

from pathlib import Path

import common
import figures
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from score_sde import distributed, plotting
from score_sde.run import instantiate


@common.main("sample")
def main(config: DictConfig) -> None:
    run = common.open_run(config)
    if config.num_samples < 1 or config.batch_size < 1:
        raise ValueError(f"num_samples and batch_size are at least 1, got {config.num_samples} and {config.batch_size}")
    model = run.model(ema=config.ema, step=config.step).to(common.device_of(config.device))
    sampler = instantiate(common.sampler_config(config.sampler), run.trust)
    sampler.check(model.sde)
    names = {} if config.label is None else {"label": config.label}
    model.check((config.num_samples, *model.event_shape), names)

    name = HydraConfig.get().runtime.choices.sampler
    condition = {key: torch.full((config.num_samples,), value) for key, value in names.items()}
    samples, nfe, seconds = distributed.sample(
        sampler, model, config.num_samples, seed=config.seed, batch_size=config.batch_size, condition=condition,
        progress=name,
    )  # fmt: skip
    if not distributed.is_main():
        return
    folder = Path(config.output) if config.output else run.samples / name
    folder.mkdir(parents=True, exist_ok=True)
    common.save_samples(folder, {"samples": samples})
    if samples[0].shape == (2,):
        figure, axes = plotting.panels(1, width=5, height=5)
        plotting.samples(axes[0, 0], samples)
        figures.save(figure, folder / "samples.png")
    elif samples.ndim == 4:
        figures.save(figures.sheet(samples), folder / "samples.png")
    print(f"{len(samples)} samples of {name}: {nfe} network calls each, {seconds:.2f} s; in {folder}")


if __name__ == "__main__":
    main()

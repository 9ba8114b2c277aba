"""Compares a training step with forward, backward and AdamW of its network alone, and measures how well it uses the device.

python scripts/benchmark_training.py network.width=64                          a U-Net of 3.9 M parameters on 32x32 images
python scripts/benchmark_training.py network=dit_b device=cuda trainer.precision=bf16-mixed trainer.compile=true
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from scripting import configs, entry

from score_sde.build import build, build_model
from score_sde.checks import whole
from score_sde.data import Data, TensorData
from score_sde.evaluation.benchmark import machine
from score_sde.training import write_atomically
from score_sde.training.benchmark import training_overhead


@entry.main("benchmark_training")
def main(config: DictConfig) -> None:
    whole("rounds", config.rounds, 2)
    choices = HydraConfig.get().runtime.choices
    data: Data = random_images(config.images) if config.images else build(config.data, config.trust)
    configs.fill_in(config, data, choices)
    config.trainer.device = config.device
    parts = {name: build(config[name], config.trust) for name in ("objective", "time_sampler", "trainer")}
    found = training_overhead(
        parts["trainer"], build_model(config, config.trust), data, parts["objective"], parts["time_sampler"],
        rounds=config.rounds, steps=config.steps, progress=True,
    )  # fmt: skip
    record = {"network": choices.network, **machine(configs.device_of(config.device)), **found}
    for name, value in record.items():
        print(f"{name:>20}  {value:.4g}" if isinstance(value, float) else f"{name:>20}  {value}")
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "benchmark_training.json", json.dumps(record, indent=1) + "\n")
    print(f"\n{folder}: benchmark_training.json")


def random_images(event_shape: list[int]) -> TensorData:
    """1000 images of random bytes, which cost as much as real ones."""
    source = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (1000, *event_shape), generator=source, dtype=torch.uint8)
    return TensorData(x, dequantize=False)


if __name__ == "__main__":
    main()

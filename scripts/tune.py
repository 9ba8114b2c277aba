"""Fits a solver of few network calls to a model: python scripts/tune.py run=<dir> | target=<name> steps=6"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import torch
from compare import model_and_reference
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from score_sde.data import generator
from score_sde.tuning import TunedTable, tune, tune_spectrum


@common.main("tune")
def main(config: DictConfig) -> None:
    if bool(config.run) == bool(config.target):
        raise ValueError("tune for what? give either run=<directory> or target=<name>, e.g. target=ring")
    model, reference = model_and_reference(config)
    if config.spectrum:
        table = tune_spectrum(spectrum_of(reference, config), config.steps, sde=model.sde, iterations=config.iterations)
    else:
        table = tune(model, config.steps, method=config.method, samples=config.samples, iterations=config.iterations,
                     seed=config.seed, robust=config.robust, batch_size=config.batch_size)  # fmt: skip
    path = Path(config.output or default_output(config))
    path.parent.mkdir(parents=True, exist_ok=True)
    table.save(path)
    report(table)
    print(f"\n{path}: use it with sampler=tuned sampler.table={path}")


def spectrum_of(reference: Any, config: DictConfig) -> torch.Tensor:
    """Eigenvalues of the data's covariance, of draws of the law or examples; none below a millionth of the mean."""
    x = reference if isinstance(reference, torch.Tensor) else reference.sample(
        (2 * config.num_samples,), generator=generator(config.seed, "spectrum"))  # fmt: skip
    values = torch.linalg.eigvalsh(torch.cov(x.double().flatten(1).T).reshape(x[0].numel(), -1))
    return values.clamp_min(1e-6 * values.mean())


def default_output(config: DictConfig) -> Path:
    name = f"{'spectrum' if config.spectrum else 'tuned'}-{config.steps}.json"
    return Path(config.run) / name if config.run else Path("outputs", "tuned", f"{_target(config)}-{name}")


def _target(config: DictConfig) -> str:
    return str(HydraConfig.get().runtime.choices.target)


def report(table: TunedTable) -> None:
    """The chosen table beside the best untuned solvers, by their loss on starting points that the fit did not see."""
    losses = table.record["validation"]
    for name in sorted(losses, key=losses.__getitem__)[:5]:
        print(f"{losses[name]:10.4g}  {name}{'  <- chosen' if name == table.record['chosen'] else ''}")


if __name__ == "__main__":
    main()

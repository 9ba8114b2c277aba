"""Certifies solvers: measures each on models with known answers. python scripts/certify.py

Writes certificates.csv and certificates.png into `output`, prints the table, and exits with status 1 if a step contradicts
what its class declares.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import DictConfig
from scripting import configs, entry, figures, output
from scripting.command_line import listed

from score_sde import plotting
from score_sde.build import build
from score_sde.checks import one_of
from score_sde.evaluation import certify_all
from score_sde.evaluation.certify import discover
from score_sde.steps import Step
from score_sde.training import write_atomically

SHOWN = ["step", "noise", "order", "measured order", "calls", "point mass", "exact in", "exact degree",
         "std bias 10", "std bias 100", "stationary variance"]  # fmt: skip

COLUMNS = (
    "point mass: relative error of a step on data at one point; exact in, exact degree: the prediction and the clock in which "
    "polynomials up to that degree are solved exactly (-1: none); std bias n: relative error of the standard deviation after "
    "n steps, on data of mean 1 and standard deviation 0.5; stationary variance: of a corrector, over the exact one"
)


@entry.main("certify")
def main(config: DictConfig) -> None:
    steps = steps_of(config)
    result = certify_all(configs.sde_of(config), steps, list(config.budgets), progress=True)
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "certificates.csv", result.table.to_csv(index=False))
    figures.save(plotting.certificates(result), folder / "certificates.png")
    output.show(result.table[[name for name in SHOWN if name in result.table]], COLUMNS)
    for name, faults in result.faults.items():
        print(f"FAULT {name}: {'; '.join(faults)}")
    print(f"\nsteps: {len(steps)}, with faults: {len(result.faults)}; {folder}: certificates.csv, certificates.png")
    sys.exit(1 if result.faults else 0)


def steps_of(config: DictConfig) -> dict[str, Step]:
    """The steps to certify, by name: your own `step`, the package's steps named in `steps`, or all of the package's.

    Raises ValueError for an unknown name, for a `step` that is not a config, and if both are given.
    """
    if config.step is None:
        known = discover()
        names = known if config.steps is None else listed(config.steps)
        return {one_of("a step", name, known): known[name] for name in names}
    if isinstance(config.step, str):
        raise ValueError(f"step={config.step!r} must be a config, of conf/sampler/predictor or corrector: give "
                         f"+sampler/predictor@step={config.step}, or +step._target_=<a class>")  # fmt: skip
    if config.steps is not None:
        raise ValueError(f"steps={config.steps} does nothing beside a step of your own: leave one of them out")
    return {str(config.step.get("_target_")): build(config.step, config.trust)}


if __name__ == "__main__":
    main()

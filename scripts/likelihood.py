"""Log-likelihoods of held-out data, and of your own files, under a trained model.

python scripts/likelihood.py run=<dir> count=200
python scripts/likelihood.py run=<dir> input=[mine.npy,photos]

In likelihood.csv, `index` is an example's row in its source array; out of distribution, the row it was made from.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig
from scripting import configs, entry, figures, output
from scripting.command_line import listed
from torch import Tensor

from score_sde import LearnedScore, Run, plotting
from score_sde.checks import one_of, whole
from score_sde.data import Data, TensorData, load_images
from score_sde.evaluation import continuous_bound
from score_sde.likelihood import GaussianDequantizer, bits_per_dim, dequantize, discrete_log_likelihood, log_likelihood
from score_sde.progress import tqdm
from score_sde.run import needed
from score_sde.training import DiscretisedDecoder, write_atomically

TWO_LAWS = ("bound_... is for the law of the reverse-time SDE, the other columns for that of the probability-flow ODE; these "
            "are two laws, so the bound may lie on either side of the others")  # fmt: skip


@entry.main("likelihood")
def main(config: DictConfig) -> None:
    run = configs.open_run(config)
    for name, least in (("count", 2), ("draws", 1), ("bound", 0), ("probes", 1)):
        whole(name, config[name], least)
    one_of("dequantization", config.dequantization, ("uniform", "variational"))
    data, model = run.data(), configs.model_of(run, config)
    sets, places = sets_of(config, data)
    condition = conditions_of(run, data, config.count)
    if condition and config.input is not None:
        raise ValueError(f"the network of {run.path} needs each example's {' and '.join(condition)}, which your own files do "
                         "not give: leave input out")  # fmt: skip
    bins = lattice(data)
    if not bins and (config.dequantization, config.draws) != ("uniform", 1):
        raise ValueError(f"dequantization and draws are for data that were integers, those of {run.path} are not: "
                         "leave them out")  # fmt: skip
    dequantizer = fitted(model, data, condition, config.seed) if config.dequantization == "variational" else None
    measure = Measure(model, data, options_of(config, data), config.draws, dequantizer, config.bound)
    table = pd.concat(
        [part for name, x in sets.items() for part in rows_of(name, x, places[name], condition, measure, config)],
        ignore_index=True,
    )
    folder = output.folder_of(configs.recorded(config), Path(config.output or run.path / "likelihood"))
    write_atomically(folder / "likelihood.csv", table.to_csv(index=False))
    column, label = ("bits_per_dim", "bits per dimension") if bins else ("log_prob", "log-density in nats")
    figures.save(histogram(table, column, label), folder / "likelihood.png")
    output.show(summary(table), TWO_LAWS if config.bound else "")
    if bins and not data.dequantize:  # type: ignore[attr-defined]
        print("\nthe run was trained without dequantisation: its density has a spike at each grey level, and bits_per_dim is "
              "loose; take bound=64, or train with data.dequantize=true, as experiment=digits_likelihood does")  # fmt: skip
    print(f"\n{folder}: likelihood.csv, likelihood.png")


def rows_of(
    name: str, x: Tensor, places: Tensor, condition: Mapping[str, Tensor], measure: Measure, config: DictConfig
) -> Iterator[pd.DataFrame]:
    """Yields the table of a set, batch by batch."""
    for i, part in enumerate(tqdm(x.split(config.batch_size), desc=name, delay=2)):
        rows = slice(i * config.batch_size, i * config.batch_size + len(part))
        given = {key: value[rows].to(measure.model.device) for key, value in condition.items()}
        found = measure(part.to(measure.model.device), config.seed * 1_000_003 + i, given)
        columns = {"index": places[rows]} | found
        yield pd.DataFrame({"set": name, **{key: value.cpu().numpy() for key, value in columns.items()}})


@dataclass(frozen=True)
class Measure:
    """Computes the columns of a batch of examples: (x, seed, condition) -> columns.

    Attributes:
        options: of `log_likelihood`.
        draws: number of draws of the dequantisation noise; variational if there is a `dequantizer`, else uniform.
        bound_draws: number of draws for the variational bound; 0 for none.
    """

    model: LearnedScore
    data: Data
    options: Mapping[str, Any]
    draws: int
    dequantizer: GaussianDequantizer | None
    bound_draws: int

    def __call__(self, x: Tensor, seed: int, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        options = {**self.options, "seed": seed, "condition": condition}
        found = self.discrete(x, options) if lattice(self.data) else self.real(x, options)
        return found | self.bound(x, seed, condition) if self.bound_draws else found

    def real(self, x: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
        """Densities of real-valued data, and the true ones if they are known."""
        found = log_likelihood(self.model, x, **options)
        row = {"log_prob": found.log_prob, "std_error": found.std_error, "truncation": found.truncation}
        law = self.data.target
        return row if law is None else {**row, "true_log_prob": law.log_prob(x.cpu().double())}

    def discrete(self, codes: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
        """Bounds on the log-probability of integers, by uniform or variational dequantisation."""
        options |= lattice(self.data) | {"draws": self.draws, "dequantizer": self.dequantizer}
        nats = discrete_log_likelihood(self.model, codes, **options)
        return {"log_prob": nats, "bits_per_dim": bits_per_dim(nats, codes.shape[1:], 1.0)}

    def bound(self, x: Tensor, seed: int, condition: dict[str, Tensor]) -> dict[str, Tensor]:
        """The variational bound in continuous time, for densities or, if the data were integers, for their probabilities.

        A model trained on dequantised data is bounded by the density of such data. One trained on the bare lattice is
        bounded by the mass of a bin, since it has nothing to learn below the bins' width.
        """
        bins, options = lattice(self.data), {"draws": self.bound_draws, "seed": seed, "condition": condition}
        if bins is None:
            return {"bound_log_prob": -continuous_bound(self.model, x, **options).total}
        width, size = bins["bin_width"], x[0].numel()
        if self.data.dequantize:  # type: ignore[attr-defined]
            points = dequantize(x, torch.Generator(x.device).manual_seed(seed), **bins)
            nats = size * math.log(width) - continuous_bound(self.model, points, **options).total
        else:
            first = bins["low"] + width / 2
            decoder = DiscretisedDecoder(width, first, -first)
            nats = -continuous_bound(self.model, (first + width * x).float(), decoder=decoder, **options).total
        return {"bound_log_prob": nats, "bound_bits_per_dim": bits_per_dim(nats, x.shape[1:], 1.0)}


def sets_of(config: DictConfig, data: Data) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Examples by the name of their set, your own files among them, and their rows in their source arrays."""
    files = [] if config.input is None else [Path(str(name)) for name in listed(config.input)]
    usual = [] if files else ["shuffled", "inverted", "uniform"] if len(data.event_shape) == 3 else ["uniform"]
    ood = usual if config.ood is None else listed(config.ood)
    sets = examples(data, config.count, ood, torch.Generator().manual_seed(config.seed))
    places = dict.fromkeys(sets, data.places("test") if isinstance(data, TensorData) else torch.arange(config.count))
    stems = [file.stem for file in files]
    mine = {file.stem if stems.count(file.stem) == 1 else str(file): own(file, data) for file in files}
    return sets | mine, places | {name: torch.arange(len(x)) for name, x in mine.items()}


def options_of(config: DictConfig, data: Data) -> dict[str, Any]:
    """The options of `log_likelihood`; by default the divergence is exact in up to 16 dimensions."""
    names = ("divergence", "probes", "method", "rtol", "atol", "steps", "truncation")
    options = {name: config[name] for name in names}
    if config.divergence is None:
        options["divergence"] = "exact" if math.prod(data.event_shape) <= 16 else "hutchinson"
    return options


def fitted(model: Any, data: Any, condition: dict[str, Tensor], seed: int) -> GaussianDequantizer:
    """The dequantizer fitted to the first training examples, with their conditions of the names in `condition`."""
    first = data.plain("train", slice(256))
    codes, given = integers(first.x, data.levels).to(model.device), {name: first.condition[name] for name in condition}
    dequantizer = GaussianDequantizer(data.event_shape).to(model.device)
    return dequantizer.fit(model, codes, **lattice(data), seed=seed, condition=given)


def histogram(table: pd.DataFrame, column: str, label: str) -> Figure:
    """Histograms of a column of the table, one per set."""
    figure, axes = plotting.panels(1, width=7.5, height=4)
    values = {name: torch.tensor(v.to_numpy()) for name, v in table.groupby("set", sort=False)[column]}
    plotting.likelihood_histogram(axes[0, 0], values, label)
    return figure


def lattice(data: Data) -> dict[str, float] | None:
    """Bin width and lower edge of data that were integers, in the scale of the model; None for real-valued data."""
    dequantize, levels = getattr(data, "dequantize", None), getattr(data, "levels", None)
    if dequantize is None or levels is None:
        return None
    return {"bin_width": 2 / levels, "low": -1.0} if dequantize else \
           {"bin_width": 2 / (levels - 1), "low": -1.0 - 1 / (levels - 1)}  # fmt: skip


def examples(data: Data, count: int, ood: list[str], generator: torch.Generator) -> dict[str, Tensor]:
    """Held-out examples (training examples if none are held out), and sets out of distribution; integers stay integers."""
    bins = lattice(data)
    x = integers(data.plain("test", slice(count)).x, data.levels) if bins else data.reference(count).x  # type: ignore[attr-defined]
    sets = {"held out" if data.has_test else "training": x}
    for name in ood:
        if name == "shuffled":
            order = torch.rand(x.flatten(1).shape, generator=generator).argsort(1)
            sets[name] = x.flatten(1).gather(1, order).view_as(x)
        elif name == "inverted":
            sets[name] = x.max() - x + x.min()
        elif name == "uniform":
            u = torch.rand(x.shape, generator=generator)
            low, high = x.amin(0), x.amax(0)
            sets[name] = torch.randint(0, data.levels, x.shape, generator=generator) if bins else low + (high - low) * u  # type: ignore[attr-defined]
        else:
            raise ValueError(f"ood is a list of 'shuffled', 'inverted' and 'uniform', got {name!r}")
    return sets


def own(file: Path, data: Any) -> Tensor:
    """Examples from your own file or folder of images; as integers if the data were integers.

    Raises ValueError for other shapes, and for values that such data cannot have.
    """
    x = torch.from_numpy(load_images(file, data.event_shape))
    if not lattice(data):
        return x
    whole = file.suffix == ".npy" and np.load(file, mmap_mode="r").dtype.kind in "iu"
    codes = x.long() if whole else integers(x, data.levels)
    if not 0 <= codes.min() <= codes.max() < data.levels:
        raise ValueError(f"{file} holds values from {x.min():g} to {x.max():g}: give integers from 0 to {data.levels - 1}, "
                         "or floats from -1 to 1")  # fmt: skip
    return codes


def integers(x: Tensor, levels: int) -> Tensor:
    """The integers 0 to levels - 1 that x, in [-1, 1], was scaled from."""
    return ((x + 1) * ((levels - 1) / 2)).round().long()


def conditions_of(run: Run, data: Data, count: int) -> dict[str, Tensor]:
    """The conditions of these examples if the network needs any; sets made from the examples have the same conditions."""
    names = needed(run.config)
    if not names:
        return {}
    print(f"densities given each example's {' and '.join(names)}, which this network needs")
    given = data.plain("test", slice(count)) if lattice(data) else data.reference(count)  # type: ignore[attr-defined]
    return {name: given.condition[name] for name in names}


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard error of every column, for each set."""
    columns = [name for name in table.columns if name not in ("set", "index")]
    groups = table.groupby("set", sort=False)[columns]
    parts = {}
    for name in columns:
        parts[name], parts[f"{name} ±"] = groups.mean()[name], groups.sem()[name]
    return pd.DataFrame(parts).reset_index()


if __name__ == "__main__":
    main()

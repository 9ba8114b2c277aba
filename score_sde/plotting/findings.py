"""Figures of the results of evaluations: diagnoses, certificates, bounds and likelihoods."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from score_sde.evaluation.bounds import Bound
from score_sde.evaluation.certify import Certificates
from score_sde.evaluation.diagnostics import Diagnosis
from score_sde.plotting.canvas import INK, LINES, NOISE_LEVEL, TIME, curves, legend_below, panels


def diagnosis(found: Diagnosis) -> Figure:
    """Four panels by noise level: a score model's loss and its irreducible part, calibration, variance and consistency."""
    figure, grid = panels(2, 2, width=4.6, height=3.6)
    (loss, slope), (spread, law) = grid
    table = found.table
    _by_noise(loss, table, {"loss": "loss", "irreducible": "irreducible part", "fisher": "excess: Fisher divergence"})
    loss.set(title="Is the score right?", ylabel="squared error of the noise")
    known = table[table["slope_error"] < 0.2]
    low, high = (known["slope"] + 2 * sign * known["slope_error"] for sign in (-1, 1))
    slope.fill_between(known["noise"], low, high, color=LINES[0], alpha=0.2, linewidth=0, label="two standard errors")
    slope.plot(known["noise"], known["slope"], color=LINES[0], marker="o", markersize=3,
               label="slope of $x_0$ on the denoiser $D$")  # fmt: skip
    slope.axhline(1, color=INK, linewidth=1, linestyle="--", label="posterior mean")
    slope.set_xscale("log")
    slope.set_xlim(loss.get_xlim())
    curves(slope, NOISE_LEVEL, "slope")
    slope.set(ylim=(min(0.8, low.min() - 0.05), max(1.2, high.max() + 0.05)),
              title="Is the denoiser calibrated?\n(left out: standard errors above 0.2)")  # fmt: skip
    _by_noise(spread, table, {"mse": "squared error of the denoiser $D$", "predicted_mse": "what its Jacobian says"})
    spread.set(title="Does it know its own error?", ylabel="posterior variance")
    _by_noise(law, table, {"residual": "Fokker-Planck residual", "asymmetry": "asymmetry of the Jacobian of $D$"})
    law.set(title="Is it the score of any law?\n(both are 0 for every true score)", ylabel="relative size")
    return figure


def _by_noise(ax: Axes, table: pd.DataFrame, names: Mapping[str, str]) -> None:
    for (name, label), colour, style in zip(names.items(), LINES, ("-", "--", "-."), strict=False):
        values = table[name].where(table[name] >= 0).clip(lower=1e-12)
        ax.plot(table["noise"], values, style, color=colour, label=label, marker="o", markersize=3)
    ax.set(xscale="log", yscale="log")
    curves(ax, NOISE_LEVEL, "")


def certificates(found: Certificates) -> Figure:
    """Measured and declared order of each step, and the exact bias of the standard deviation by number of steps.

    Rows are in the order of `Certificates.table`.
    """
    table = found.table
    by_name = {c.name: c for c in found.certificates}
    predictors = [by_name[name] for name in table.loc[table["role"] == "predictor", "step"]]
    rows = np.arange(len(predictors))
    figure, axes = panels(2, width=6, height=1.5 + 0.24 * len(rows), sharey=True)
    order, bias = axes[0]
    wrong = np.array([any("order" in fault for fault in c.faults) for c in predictors], dtype=bool)
    measured = np.array([c.measured for c in predictors])
    order.plot([c.declared for c in predictors], rows, "|", markersize=11, color=INK, label="declared")
    order.scatter(measured[~wrong], rows[~wrong], s=22, color=LINES[0], label="measured")
    order.scatter(measured[wrong], rows[wrong], s=22, color=LINES[1], label="measured, not as declared")
    steps = predictors[0].bias["steps"] if predictors else []
    for i, colour in enumerate(TIME(np.linspace(1, 0, len(steps)))):
        errors = [abs(c.bias["std"].iloc[i]) for c in predictors]
        bias.plot(errors, rows, "o", markersize=5, color=colour, label=f"{steps[i]} steps")
    order.set_yticks(rows, [c.name + (" (noise)" if c.stochastic else "") for c in predictors])
    order.set_ylim(len(rows), -1)
    bias.set_xscale("log")
    curves(order, "order of convergence: global (ODE), weak (noise)", "", legend=None)
    curves(bias, "|relative error of the standard deviation|, exact,\non data of mean 1 and standard deviation 0.5", "",
           legend=None)  # fmt: skip
    legend_below(figure)
    return figure


def bound_terms(ax: Axes, bounds: Mapping[str, Bound]) -> None:
    """The posterior KL of each step of a variational bound, mean over the data in nats, at the step's noisier time.

    The legend has the mean of the whole bound with its standard error, and its decoder and prior terms.
    """
    for (name, bound), colour in zip(bounds.items(), LINES, strict=False):
        ends = f"decoder {bound.decoder.mean():.2g}, prior {bound.prior.mean():.1g}"
        label = f"{name}: {bound.mean:.4g} ± {bound.std_error:.1g} nats ({ends})"
        ax.plot(bound.times[1:], bound.steps.mean(1).clamp_min(1e-12).cpu(), color=colour, linewidth=1.4, label=label)
    ax.set_yscale("log")
    curves(ax, "time $t$", "nats of the step")


def likelihood_histogram(ax: Axes, values: Mapping[str, Tensor], label: str) -> None:
    """Histograms of per-sample likelihoods of several sets in common bins; means are dashed lines, and in the legend.

    Bins leave out half a per cent of all values at either end; values beyond are counted in the outermost bins.
    """
    everything = torch.cat([v.double() for v in values.values()]).cpu()
    low, high = everything.quantile(torch.tensor([0.005, 0.995], dtype=torch.float64)).tolist()
    bins = np.linspace(low, high + 1e-9, 41).tolist()
    for (name, v), colour in zip(values.items(), LINES, strict=False):
        mean, inside = v.double().mean().item(), v.double().cpu().clamp(low, high).numpy()
        heights, _ = np.histogram(inside, bins, density=True)
        ax.stairs(heights, bins, color=colour, linewidth=1.5, label=f"{name}: {mean:.4g}")
        ax.axvline(mean, color=colour, linestyle="--", linewidth=1.2)
    curves(ax, label, "density", legend="beside", title="means (dashed)")

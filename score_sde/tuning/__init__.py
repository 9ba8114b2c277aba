"""Tuned solvers: a sampler is a table of scalars, so fit it.

`tune` fits a table to a model's converged probability-flow ODE; `tune_spectrum` needs no model, only the data's covariance.
`table` defines what a table is, `untuned` has the published solvers as tables.
"""

from score_sde.tuning.fitting import EARLIER, METHODS, check, tune
from score_sde.tuning.pairs import CONVERGED, Pairs, Teacher, converged_pairs
from score_sde.tuning.span import Span
from score_sde.tuning.spectrum import tune_spectrum
from score_sde.tuning.table import TunedSampler, TunedTable
from score_sde.tuning.untuned import GRIDS, RULES, as_table, begun_late, untuned

__all__ = [
    "CONVERGED", "EARLIER", "GRIDS", "METHODS", "RULES", "Pairs", "Span", "Teacher", "TunedSampler", "TunedTable",
    "as_table", "begun_late", "check", "converged_pairs", "tune", "tune_spectrum", "untuned",
]  # fmt: skip

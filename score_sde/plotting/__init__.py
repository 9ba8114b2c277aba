"""Pictures of densities, score fields, trajectories, images and comparisons.

Functions that take matplotlib axes draw into them and return the artists; the others return a new Figure. Figures are
objects, never pyplot's current one, so that drawing works without a display and in any thread. Panels to be compared
share their limits and colour scale. Limits leave out the farthest samples, so that one outlier does not set the scale.
"""

from score_sde.plotting.canvas import (
    INK,
    LEGEND,
    LINES,
    NOISE_LEVEL,
    RULE,
    TIME,
    Limits,
    LogNumbers,
    LogTicks,
    Panel,
    colour_scale,
    crosses,
    curves,
    legend_below,
    look,
    note,
    panels,
)
from score_sde.plotting.comparisons import (
    AGAINST,
    METRIC_NAMES,
    comparison_multiples,
    means_with_errors,
    quality_against_nfe,
    ratio_table,
    sample_panels,
    solvers_against_calls,
)
from score_sde.plotting.findings import bound_terms, certificates, diagnosis, likelihood_histogram
from score_sde.plotting.images import animation, image_grid
from score_sde.plotting.losses import QUARTILES, loss_curves
from score_sde.plotting.planes import (
    NATS,
    contours,
    density,
    density_comparison,
    limits_of,
    samples,
    score_error_field,
    score_field,
    score_field_comparison,
    trajectories,
    trajectory_comparison,
)
from score_sde.plotting.sheets import frames, pair_plot, sheet, signals

__all__ = [
    "AGAINST",
    "INK",
    "LEGEND",
    "LINES",
    "METRIC_NAMES",
    "NATS",
    "NOISE_LEVEL",
    "QUARTILES",
    "RULE",
    "TIME",
    "Limits",
    "LogNumbers",
    "LogTicks",
    "Panel",
    "animation",
    "bound_terms",
    "certificates",
    "colour_scale",
    "comparison_multiples",
    "contours",
    "crosses",
    "curves",
    "density",
    "density_comparison",
    "diagnosis",
    "frames",
    "image_grid",
    "legend_below",
    "likelihood_histogram",
    "limits_of",
    "look",
    "loss_curves",
    "means_with_errors",
    "note",
    "pair_plot",
    "panels",
    "quality_against_nfe",
    "ratio_table",
    "sample_panels",
    "samples",
    "score_error_field",
    "score_field",
    "score_field_comparison",
    "sheet",
    "signals",
    "solvers_against_calls",
    "trajectories",
    "trajectory_comparison",
]

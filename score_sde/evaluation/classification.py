"""How well a classifier of noisy data predicts the label at each noise level.

At low noise a good classifier is right. At high noise it can only tell how frequent each class is, and its cross-entropy
tends to the entropy of the labels; a higher one is overconfidence, which guidance would follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from score_sde.classifier import NoisyClassifier

LEVELS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@torch.no_grad()
def accuracy_by_noise(
    classifier: NoisyClassifier, x: Tensor, labels: Tensor, *, generator: torch.Generator,
    levels: Sequence[float] = LEVELS,
) -> pd.DataFrame:  # fmt: skip
    """Accuracy and cross-entropy of a classifier on noisy examples.

    Args:
        classifier: a trained classifier.
        x, labels: clean examples (n, *event_shape) and their labels (n,), preferably held out.
        generator: source of the noise.
        levels: noise levels sigma / alpha; those outside the SDE's range are left out.

    Returns:
        A row per level: level, accuracy in [0, 1], cross_entropy in nats.
    """
    rows, sde = [], classifier.sde
    high, low = sde.noise_level_range
    for level in (level for level in levels if low <= level <= high):
        t = float(sde.time_at_noise_level(level))
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        log_probs = classifier.log_probs(sde.perturb(x, t, noise).to(classifier.device), t).double().cpu()
        right = (log_probs.argmax(1) == labels).double().mean().item()
        rows.append({"level": level, "accuracy": right,
                     "cross_entropy": -log_probs.gather(1, labels[:, None]).mean().item()})  # fmt: skip
    return pd.DataFrame(rows)

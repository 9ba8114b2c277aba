r"""Nearest-neighbour metrics of n samples Y and m real examples X in a feature space.

With B_k(x) the ball about x that reaches its k-th nearest neighbour in its own set:

    precision = share of y in some B_k(x)           recall   = share of x in some B_k(y)               (k = 3)
    density   = mean_y #{x : y in B_k(x)} / k       coverage = share of x with some y in B_k(x)        (k = 5)

Kynkäänniemi et al. 2019, https://arxiv.org/abs/1904.06991, eq. 1 and 2; Naeem et al. 2020,
https://arxiv.org/abs/2002.09797, eq. 3 and 4. A sample counts as memorised if its nearest training example is three times
nearer than the second nearest (Yoon et al. 2023, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from score_sde.checks import whole
from score_sde.data import TensorData
from score_sde.evaluation.metrics import pair
from score_sde.progress import tqdm

CANDIDATES = 8
"""Number of nearest examples among which two different pictures are looked for."""

__all__ = ["Nearest", "density_coverage", "nearest", "neighbour_metrics", "precision_recall", "radii"]


def neighbour_metrics(
    samples: Tensor, real: Tensor, k: int = 3, k_density: int = 5, *, reach: Sequence[Tensor] | None = None
) -> dict[str, float]:
    """Precision, recall, density and coverage by name, in three passes over the distances: within each set, and between.

    Args:
        samples, real: (n, *event) and (m, *event), examples or features.
        k: for precision and recall, both in [0, 1].
        k_density: for coverage, in [0, 1], and density, whose mean is 1 for exact samples and more if samples crowd.
        reach: `radii(real, k, k_density)`, where it is known.

    Raises:
        ValueError: a set has no more than k points, or points that are not finite or of another event shape.
    """
    samples, real = pair(samples, real)
    inside, dense = (each.to(real.device) for each in reach or radii(real, k, k_density))
    tests = _balls_of_both(inside, *radii(samples, k)), _balls_of_real(dense)
    (precision, recall), (density, coverage) = _shares(samples, real, *tests)
    return {"precision": precision, "recall": recall, "density": density / k_density, "coverage": coverage}


def precision_recall(samples: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall alone, see `neighbour_metrics`."""
    samples, real = pair(samples, real)
    return _shares(samples, real, _balls_of_both(*radii(real, k), *radii(samples, k)))[0]


def density_coverage(samples: Tensor, real: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage alone, see `neighbour_metrics`; they need no neighbours of the samples, of which one is enough."""
    samples, real = pair(samples, real)
    density, coverage = _shares(samples, real, _balls_of_real(*radii(real, k)))[0]
    return density / k, coverage


Test = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""(rows, their distances from all real examples) -> a count for each row, and the real examples that are counted in any."""


def _balls_of_both(inside: Tensor, around: Tensor) -> Test:
    """Samples in a ball of some real example, and real examples in one of some sample."""
    return lambda rows, distance: ((distance <= inside).any(dim=1), (distance <= around[rows, None]).any(dim=0))


def _balls_of_real(inside: Tensor) -> Test:
    """The number of real examples whose ball holds a sample, and those whose ball holds some sample."""

    def test(rows: slice, distance: Tensor) -> tuple[Tensor, Tensor]:
        balls = distance < inside
        return balls.sum(dim=1), balls.any(dim=0)

    return test


def _shares(samples: Tensor, real: Tensor, *tests: Test) -> list[tuple[float, float]]:
    """For each test the mean count of a sample, and the share of real examples that are counted."""
    counts = torch.zeros(len(tests), dtype=torch.long, device=real.device)
    held = torch.zeros(len(tests), len(real), dtype=torch.bool, device=real.device)
    for rows, distance in _blocks(samples, real):
        for i, test in enumerate(tests):
            of_samples, of_real = test(rows, distance)
            counts[i] += of_samples.sum()
            held[i] |= of_real
    shares = held.double().mean(dim=1)
    return [(count / len(samples), share) for count, share in zip(counts.tolist(), shares.tolist(), strict=True)]


def radii(x: Tensor, *ks: int) -> list[Tensor]:
    """For each k the distance of each point to its k-th nearest neighbour, (n,)."""
    if len(x) <= (most := max(whole("k", k) for k in ks)):
        raise ValueError(f"{len(x)} points have no {most}-th nearest neighbours: take more samples, or a smaller k")
    parts = []
    for rows, distance in _blocks(x, x):
        distance[:, rows].fill_diagonal_(torch.inf)
        parts.append(distance.topk(most, largest=False).values)
    nearest_first = torch.cat(parts)
    return [nearest_first[:, k - 1] for k in ks]


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Distances between rows of x and all of y, in blocks of bounded memory; y is centred first, or digits would be lost."""
    size, center = max(1, 2**24 // len(y)), y.double().mean(0)
    x, y = x.double() - center, y.double() - center
    for start in range(0, len(x), size):
        yield slice(start, start + size), torch.cdist(x[start : start + size], y)


@dataclass(frozen=True)
class Nearest:
    """The two nearest training examples of each sample: distances (n, 2), ascending, and rows of `data.plain("train")`.

    The second is a different picture from the first: repeated examples count once.
    """

    distance: Tensor
    index: Tensor

    @property
    def memorised(self) -> Tensor:
        """Whether the nearest is three times nearer than the second, (n,)."""
        return self.distance[:, 0] < self.distance[:, 1] / 3


@torch.no_grad()
def nearest(samples: Tensor, data: TensorData, *, device: torch.device | str = "cpu", progress: bool = True) -> Nearest:
    """Nearest training examples by root mean square difference over the components, in the units of the data.

    If training mirrors its images, the nearer of an example and its mirror image counts. Cost: n N D multiplications, twice
    that with mirroring, in blocks of the training set.

    Args:
        samples: (n, *event_shape), in the scale of the data.
        data: with at least two training examples, read in the order of `data.plain("train")`.
    """
    ways = [samples, samples.flip(-1)] if data.mirrors else [samples]
    x = torch.stack(ways).to(device).float().flatten(2)
    best = torch.full((len(samples), CANDIDATES), torch.inf, device=device)
    index = torch.zeros(best.shape, dtype=torch.long, device=device)
    starts = range(0, data.size, 4096)
    for start in tqdm(starts, desc="nearest training examples", delay=2, disable=not progress, leave=False):
        y = data.plain("train", slice(start, start + 4096)).x.to(device).flatten(1)
        block, place = torch.cdist(x, y).amin(0).topk(min(CANDIDATES, len(y)), largest=False)
        merged, order = torch.cat([best, block], 1).topk(CANDIDATES, largest=False)
        best, index = merged, torch.cat([index, place + start], 1).gather(1, order)
    # Computed anew without |x|^2 + |y|^2 - 2 xy, whose cancellation would be all that is left of the distance to a copy.
    rows = zip(x.split(256, dim=1), index.split(256), strict=True)
    parts = [_two_pictures(part, place, data) for part, place in rows]
    distance, index = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Nearest(distance, index)


def _two_pictures(x: Tensor, index: Tensor, data: TensorData) -> tuple[Tensor, Tensor]:
    """Distances and indices of the nearest to x (orientations, n, D) of the candidates `index` (n, k), and of the nearest
    one that differs from it."""
    found = torch.stack([data.plain("train", column).x for column in index.T.cpu()], dim=1).to(x.device)
    y = found.flatten(2).double()
    order = (y - x[:, :, None].double()).square().mean(dim=3).sqrt().amin(0).sort(dim=1)
    distance, places = order
    y = y.gather(1, places[:, :, None].expand_as(y))
    same = (y == y[:, :1]).all(2)
    if data.mirrors:
        same |= (y.view_as(found).flip(-1).flatten(2) == y[:, :1]).all(2)
    second = same.long().argmin(1).where(~same.all(1), 1)  # the first that is another picture
    chosen = torch.stack([torch.zeros_like(second), second], 1)
    return distance.gather(1, chosen), index.gather(1, places).gather(1, chosen)

r"""Averaged weights of any width, after training, from a few stored averages.

Snapshot i is the average of the trajectory theta(tau) under p_i(tau) = (g_i + 1) / n_i^(g_i + 1) tau^g_i on [0, n_i]. Of
all combinations sum_i x_i p_i with sum_i x_i = 1, the one nearest in L2 to a wanted profile p solves

    A x + mu 1 = b,   1^T x = 1,   A_ij = <p_i, p_j>,   b_i = <p_i, p>,
    <p_a, p_b> = (a + 1)(b + 1) / (a + b + 1) (n_a / n_b)^b / n_b  for n_a <= n_b,

and sum_i x_i theta_i approximates the average under p. Karras et al. 2024, https://arxiv.org/abs/2312.02696, appendix C;
the constraint is ours: it makes weights that never changed come out exactly.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from score_sde.training.checkpoint import Checkpoints
from score_sde.training.ema import power_exponent

__all__ = ["combination", "reconstruct"]


def combination(steps: Tensor, stds: Tensor, step: float, std: float) -> Tensor:
    """The coefficients x (n,), float64, of snapshots at `steps` with widths `stds`, for relative width `std` at `step`."""
    known = torch.stack([steps.double(), torch.tensor([power_exponent(float(s)) for s in stds])], 1)
    wanted = torch.tensor([[float(step), power_exponent(std)]], dtype=torch.float64)
    count = len(steps)
    system, right = torch.ones(count + 1, count + 1, dtype=torch.float64), torch.ones(count + 1, 1, dtype=torch.float64)
    system[:count, :count], right[:count] = _product(known, known), _product(known, wanted)
    system[count, count] = 0
    return torch.linalg.lstsq(system, right, driver="gelsd").solution[:count, 0]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """<p_a, p_b> of profiles given as rows (n, gamma)."""
    (n, g), (m, h) = a.double().T.unsqueeze(2), b.double().T.unsqueeze(1)
    ratio = torch.where(n < m, (n / m) ** h, (m / n) ** g)
    return (g + 1) * (h + 1) / (g + h + 1) * ratio / torch.maximum(n, m)


def reconstruct(run: str | Path, std: float, step: int | None = None) -> dict[str, Tensor]:
    """Weights of a run directory averaged with relative width `std`, as of a step (by default the last snapshot's).

    `std` is in units of the length of the run. The reconstruction is best for widths near or between the tracked ones.

    Raises:
        FileNotFoundError: the run stored no snapshots, or none at that step.
        ValueError: `std` is outside (0, 0.288).
    """
    folder = Checkpoints(Path(run) / "snapshots", keep=None)
    if not folder.steps():
        raise FileNotFoundError(f"{run} stored no power-function averages to make one of width {std:g} from: train it "
                                "with trainer.power_emas=[0.05,0.1] and trainer.snapshot_every")  # fmt: skip
    last = folder.path(step)
    taken = [folder.path(known) for known in folder.steps()]
    files = [file for path in taken for file in path.glob("ema-*.safetensors") if path.name <= last.name]
    steps, stds = torch.tensor([_profile(file) for file in files], dtype=torch.float64).T
    shares = combination(steps, stds, float(steps.max()), std).tolist()
    total: dict[str, Tensor] = {}
    for file, share in zip(files, shares, strict=True):
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point():
                total[name] = total.get(name, torch.zeros_like(tensor, dtype=torch.float64)) + share * tensor.double()
            else:
                total[name] = tensor
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in total.items()}


def _profile(file: Path) -> tuple[float, float]:
    """The step and the relative width that a snapshot's path names."""
    return float(file.parent.name.removeprefix("step-")), float(re.findall(r"ema-(.+)\.safetensors", file.name)[0])

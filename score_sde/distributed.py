"""Several processes that work as one, started by `torchrun` or SLURM; in a single process everything here is trivial.

    torchrun --nproc-per-node 8 scripts/train.py ...        srun --ntasks-per-node 8 python scripts/train.py ...

The rule of the package: random numbers are drawn for the whole batch from a keyed generator, of which each process takes
its rows, or are keyed by sample, so that results depend on the number of processes only by rounding. This includes the
masks of `networks.Dropout`, but not those of `torch.nn.Dropout` in custom networks, which each process draws for itself.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from score_sde.checks import one_of
from score_sde.noise import SampleNoise
from score_sde.progress import tqdm
from score_sde.score import ScoreModel, in_rows

__all__ = ["agree", "count", "device", "gather", "greatest", "is_main", "mean", "rank", "sample", "share", "start"]

T = TypeVar("T")


def start() -> None:
    """Joins the processes that the launcher's environment names; does nothing if it names one, or if it is done already.

    A SLURM step counts only if `srun` started it: a script in the allocation's own shell stays a single process.
    """
    if not dist.is_available() or dist.is_initialized():
        return
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "WORLD_SIZE" not in os.environ:
        _read_slurm()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        # Imported before the group exists: its functions' default arguments would keep the group for ever.
        import torch.distributed.nn.functional

        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        atexit.register(_end)


def _end() -> None:
    """Leaves the group before the interpreter shuts down.

    Otherwise a thread of gloo may release the last reference to a tensor during shutdown, which aborts the process
    ("terminate called without an active exception"). Destroying a group joins its threads unless something still refers to
    it, as the caches of DTensor (FSDP) do: hence the pause.
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.2)


def _read_slurm() -> None:
    """Sets the variables that torch.distributed reads from SLURM's."""
    first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1"))
    assert first is not None
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "WORLD_SIZE": os.environ["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": first[1] + (first[2] or ""),  # node07 of node[07-12,20]
        "MASTER_PORT": str(15000 + int(os.environ["SLURM_JOB_ID"]) % 10000),
    }


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if _several() else 1


def rank() -> int:
    """The index of this process, 0 to count() - 1."""
    return dist.get_rank() if _several() else 0


def is_main() -> bool:
    """Whether this is the process that writes files, logs and shows progress."""
    return rank() == 0


def device(name: str) -> torch.device:
    """This process's device for "auto" (CUDA if available), "cpu" or "cuda"; several processes have a GPU each.

    Raises ValueError for another name, and for "cuda" if there is none.
    """
    one_of("device", name, ("auto", "cpu", "cuda"))
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch sees no CUDA device: use device='auto' or 'cpu'")
    local = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()  # SLURM may show each process only its own
    chosen = torch.device("cuda", local if _several() else torch.cuda.current_device())
    torch.cuda.set_device(chosen)
    return chosen


def share(total: int) -> slice:
    """This process's contiguous rows of `total`, split as evenly as possible."""
    return slice(total * rank() // count(), total * (rank() + 1) // count())


def agree(value: T) -> T:
    """The main process's value, on every process."""
    held = [value]
    if _several():
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    return held[0]


def greatest(value: int) -> int:
    """The greatest of all processes' values."""
    if not _several():
        return value
    held = torch.tensor(int(value))
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return int(held)


def mean(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, in place."""
    if _several():
        dist.all_reduce(x)
        x /= count()
    return x


def gather(x: Tensor) -> Tensor:
    """The tensors (n, ...) of all processes, concatenated in the order of ranks; n may differ between processes."""
    if not _several():
        return x
    lengths = [torch.zeros((), dtype=torch.long, device=x.device) for _ in range(count())]
    dist.all_gather(lengths, torch.tensor(len(x), device=x.device))
    longest = max(int(n) for n in lengths)
    padded = x.new_zeros((longest, *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)])


def sample(
    sampler: Any, model: ScoreModel, total: int, *, seed: int = 0, batch_size: int = 1000,
    condition: Mapping[str, Tensor] | None = None, progress: str | None = None, noise: type[SampleNoise] = SampleNoise,
) -> tuple[Tensor, int, float]:  # fmt: skip
    """Draws `total` samples on all processes together and returns all of them on each; sample i is keyed by (seed, i).

    Processes take whole batches in turn, so that samples are bitwise the same for any number of processes, even by solvers
    that choose one step size for a batch.

    Args:
        sampler: an object with the `sample` method of `Sampler`.
        model: the score model.
        total: number of samples.
        seed: of the noise.
        batch_size: samples per call of the sampler.
        condition: tensors (total, ...) by name.
        progress: the label of a progress bar on the main process; None for no bar.
        noise: its type, e.g. `BrownianNoise`.

    Returns:
        The samples on the CPU (total, *event), the greatest number of network calls of a batch, and the wall-clock seconds
        of the slowest process.
    """
    conditions = in_rows(model, total, condition)
    batches = torch.arange(total).split(batch_size)
    parts, nfe, seconds = [torch.empty(0, *model.event_shape, dtype=model.dtype)], 0, 0.0
    for indices in _mine(batches, progress):
        named = {name: value[indices.to(value.device)] for name, value in conditions.items()}
        source, shape = noise.of_run(seed, indices), (len(indices), *model.event_shape)
        bar = progress is not None and is_main() and len(batches) == 1
        result = sampler.sample(model, shape, noise=source, condition=named, progress=bar)
        parts.append(result.x.cpu())
        nfe, seconds = max(nfe, result.nfe), seconds + result.seconds
    work = gather(torch.tensor([[nfe, seconds]], dtype=torch.float64)).amax(0)
    order = torch.cat([torch.cat(batches[r :: count()] or [batches[0][:0]]) for r in range(count())])
    return gather(torch.cat(parts))[order.argsort()], int(work[0]), float(work[1])


def _mine(batches: Sequence[Tensor], progress: str | None) -> Iterator[Tensor]:
    """This process's batches, with a progress bar if there are several."""
    mine = batches[rank() :: count()]
    bar = progress is not None and is_main() and len(mine) > 1
    return iter(tqdm(mine, desc=progress, disable=not bar, delay=2))


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()

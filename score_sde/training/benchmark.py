"""What a training step costs beside the network's own work, and how well it uses the device.

    overhead = (data + noise + loss + forward + backward + clipping + optimiser + averages + metrics)
             / (forward + backward + AdamW of the same network, precision and layout, on inputs already in memory)

Both run alternately in one process, so that other load on the machine affects both; figures are medians over rounds.
Both use the same network object: a copy at other memory addresses can differ in speed by a few per cent.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import mse_loss

from score_sde.checks import whole
from score_sde.data import Batch, Data
from score_sde.progress import tqdm
from score_sde.score import LearnedScore
from score_sde.training.objective import Objective
from score_sde.training.precision import PRECISIONS
from score_sde.training.state import TrainingState
from score_sde.training.throughput import flops_per_example
from score_sde.training.times import TimeSampler
from score_sde.training.trainer import Trainer, own_global_generator

__all__ = ["training_overhead"]


def training_overhead(
    trainer: Trainer, model: LearnedScore, data: Data, objective: Objective, time_sampler: TimeSampler, *,
    rounds: int = 9, steps: int = 3, seed: int = 0, progress: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Times training steps, which train `model`, against bare ones: `rounds` rounds with 2 `steps` of each.

    Returns:
        ratio, ratio_low, ratio_high: the overhead, its median and quartiles over rounds.
        cpu_ratio: on a CPU, the same ratio of the process's CPU time; with one thread, other processes do not affect it.
        step_seconds, bare_seconds: medians of the seconds per step.
        examples_per_second, gflops_per_example, parameters: of the training step and the network.
        mfu, mfu_bare: model-FLOPs utilisation of both, where the device's peak is known.
        peak_memory_gib: on CUDA, of both together.
    """
    rounds, steps = whole("rounds", rounds), whole("steps", steps)
    trainer.check(model, data, time_sampler)
    state = TrainingState(trainer, model, objective, time_sampler, seed)
    with own_global_generator(state.device), state.feed(data) as batches:
        ready = batches(state.step)
        bare = _bare_step(trainer, model.network, ready, state.device)

        def step() -> None:
            state.advance(batches(state.step))
            if state.due(trainer.log_every):
                state.report()

        for contender in (bare, step, bare, step):
            contender()
        seconds: dict[str, list[tuple[float, float]]] = {"bare": [], "step": []}
        contenders = {"bare": bare, "step": step}
        for _ in tqdm(range(rounds), desc="training", disable=not progress, delay=2, leave=False):
            # Forward, then reversed: neither gains from the memory and caches that the other leaves behind.
            turn = [(name, _timed(contenders[name], steps, state.device)) for name in ("bare", "step", "step", "bare")]
            for name in contenders:
                pair = [took for at, took in turn if at == name]
                seconds[name].append((sum(clock for clock, _ in pair) / 2, sum(cpu for _, cpu in pair) / 2))
    return _summary(trainer, model, state, ready[0], seconds)


def _bare_step(
    trainer: Trainer, network: torch.nn.Module, ready: list[Batch], device: torch.device
) -> Callable[[], None]:
    """Forward, backward and AdamW written out, on prepared micro-batches; the tiny rate leaves the weights as they are."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-9, fused=True)
    run = torch.compile(network) if trainer.compile else network
    dtype = PRECISIONS[trainer.precision]
    levels = [torch.linspace(-1, 1, len(batch.x), device=device) for batch in ready]

    def step() -> None:
        for batch, c_noise in zip(ready, levels, strict=True):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = mse_loss(run(batch.x, c_noise, **batch.condition).float(), batch.x)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(step: Callable[[], None], steps: int, device: torch.device) -> tuple[float, float]:
    """Seconds per step: wall clock, and CPU time of this process."""
    began, worked = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / steps, (time.process_time() - worked) / steps


def _summary(
    trainer: Trainer,
    model: LearnedScore,
    state: TrainingState,
    batch: Batch,
    seconds: dict[str, list[tuple[float, float]]],
) -> dict[str, Any]:
    turns = list(zip(seconds["step"], seconds["bare"], strict=True))
    low, ratio, high = statistics.quantiles([step[0] / bare[0] for step, bare in turns], n=4, method="inclusive")
    step, bare = (statistics.median(clock for clock, _ in seconds[name]) for name in ("step", "bare"))
    flops = flops_per_example(model, batch.to(model.device))
    found = {"ratio": ratio, "ratio_low": low, "ratio_high": high, "step_seconds": step, "bare_seconds": bare,
             "examples_per_second": trainer.batch_size / step, "gflops_per_example": flops / 1e9,
             "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip
    if state.device.type == "cpu":
        found["cpu_ratio"] = statistics.median(step[1] / bare[1] for step, bare in turns)
    if state.peak:
        found |= {
            f"mfu{name}": flops * trainer.batch_size / took / state.peak for name, took in (("", step), ("_bare", bare))
        }
    if state.device.type == "cuda":
        found["peak_memory_gib"] = torch.cuda.max_memory_allocated(state.device) / 2**30
    return found

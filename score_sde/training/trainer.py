"""The training loop.

    theta <- AdamW(theta, clip(grad mean_i L_i)),   rate(n) = learning_rate min(1, (n + 1) / warmup) [cosine decay]

What step n draws (data, times, noise, dropout) is keyed by (seed, n) alone: a run resumed from a checkpoint continues
to the weights of an uninterrupted one, bit for bit on one CPU type and thread count. Device and precision are
Lightning Fabric's. Between two lines of metrics.jsonl nothing waits for the device.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from score_sde.data import Batch, Data, Draws, generator, key
from score_sde.score import LearnedScore
from score_sde.training.checkpoint import Checkpoints
from score_sde.training.ema import EMA
from score_sde.training.interrupt import interrupts
from score_sde.training.metrics import MetricsLog, Window
from score_sde.training.objective import Objective
from score_sde.training.times import TimeSampler

__all__ = ["DivergenceError", "Trainer", "TrainingResult"]

log = logging.getLogger(__name__)

SampleHook = Callable[[int, LearnedScore, LearnedScore], None]
PRECISIONS = ("32-true", "bf16-mixed")


class DivergenceError(RuntimeError):
    """More non-finite losses than `max_nonfinite`; the last checkpoint is intact."""


@dataclass(frozen=True)
class TrainingResult:
    """The averaged model, the step reached, and the signal that ended the run early, else None."""

    model: LearnedScore
    step: int
    interrupted: signal.Signals | None


@dataclass(kw_only=True)
class Trainer:
    """Settings of a training run; `fit` trains.

    Args:
        steps: optimiser steps, of `batch_size` examples each.
        learning_rate, weight_decay, betas: AdamW's.
        warmup: steps over which the rate rises linearly.
        schedule: "constant", or "cosine" down to 0 at the last step.
        gradient_clip: greatest norm of the gradient, or None.
        ema_half_life, ema_ramp: half-life of the averaged weights in images, at most that share of the images seen.
        log_every, checkpoint_every, sample_every: in steps; sample_every = 0 never samples.
        keep_checkpoints: how many of the last checkpoints stay.
        max_nonfinite: how many steps of a run may have a non-finite loss or gradient; they are skipped and counted.
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        precision: "32-true", or "bf16-mixed" (weights stay in float32).
        tensorboard: also write TensorBoard's event files.
        progress: show a progress bar.

    Raises:
        ValueError: a setting outside its range.
    """

    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 100
    schedule: str = "cosine"
    gradient_clip: float | None = 1.0
    ema_half_life: float = 500_000
    ema_ramp: float = 0.05
    log_every: int = 50
    checkpoint_every: int = 1000
    sample_every: int = 0
    keep_checkpoints: int = 2
    max_nonfinite: int = 10
    device: str = "auto"
    precision: str = "32-true"
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            _require(name, getattr(self, name), isinstance(getattr(self, name), int) and getattr(self, name) >= 1,
                     "a positive integer")  # fmt: skip
        for name in ("warmup", "sample_every", "max_nonfinite", "weight_decay"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("learning_rate", "ema_half_life", "ema_ramp"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "positive")
        _require("gradient_clip", self.gradient_clip, self.gradient_clip is None or self.gradient_clip > 0,
                 "positive, or null for no clipping")  # fmt: skip
        for name, allowed in (("schedule", ("constant", "cosine")), ("device", ("auto", "cpu", "cuda")),
                              ("precision", PRECISIONS)):  # fmt: skip
            _require(name, getattr(self, name), getattr(self, name) in allowed, f"one of {', '.join(allowed)}")
        self.betas = (float(self.betas[0]), float(self.betas[1]))  # plain numbers, whatever list a config gives
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device='cuda', but torch sees no CUDA device: use device='auto' or 'cpu'")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("tensorboard=True, but tensorboard is not installed: pip install 'score_sde[tracking]'")

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        decay = (1 + math.cos(math.pi * step / self.steps)) / 2 if self.schedule == "cosine" else 1.0
        return self.learning_rate * rise * decay

    def check(self, model: LearnedScore, data: Data, time_sampler: TimeSampler) -> None:
        """Refuses, with ValueError, a model, data and times that do not fit together."""
        time_sampler.check(model.sde)
        if tuple(data.event_shape) != model.event_shape:
            raise ValueError(
                f"the data have event shape {tuple(data.event_shape)}, the model {model.event_shape}: make them equal"
            )
        known = getattr(model.network, "num_classes", data.num_classes) if "label" in model.condition_names else None
        if data.num_classes is not None and (known is None or known < data.num_classes):
            raise ValueError(
                f"the data have labels of {data.num_classes} classes, the network knows {known or 0}: "
                f"set network.num_classes={data.num_classes}, or use the data without labels"
            )

    def fit(
        self,
        model: LearnedScore,
        data: Data,
        objective: Objective,
        time_sampler: TimeSampler,
        directory: str | Path,
        *,
        seed: int = 0,
        resume: bool = False,
        on_sample: SampleHook | None = None,
    ) -> TrainingResult:
        """Trains `model` in place, leaving metrics.jsonl and checkpoints in `directory`.

        Every `sample_every` steps `on_sample(step, model, averaged_model)` is called, both models in evaluation mode.
        SIGTERM and Ctrl-C end the run after the step at hand, with a checkpoint; a second one ends it at once. With
        `resume` the run continues from the latest checkpoint, or starts where none was written yet.

        Raises:
            ValueError: model, data and times do not fit; the directory has checkpoints and `resume` is False; the
                checkpoint is of another seed or batch size.
            DivergenceError: more than `max_nonfinite` non-finite steps. No checkpoint is written of that state.
        """
        self.check(model, data, time_sampler)
        directory = Path(directory)
        checkpoints = Checkpoints(directory / "checkpoints", self.keep_checkpoints)
        run = _Run(self, model, objective, time_sampler, seed)
        last = checkpoints.latest()
        if resume and last is not None:
            run.restore(checkpoints)
        elif last is not None:
            raise ValueError(f"{directory} has checkpoints up to step {last}: resume it, or choose a new directory")
        directory.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=self.steps, initial=run.step, disable=not self.progress, unit="step", dynamic_ncols=True)
        with (
            MetricsLog(directory, run.step, self.tensorboard) as metrics,
            bar,
            interrupts() as received,
            _own_global_generator(run.device),
        ):
            while run.step < self.steps and not received:
                run.advance(run.prepared(data))
                bar.update()
                if run.step % self.log_every == 0 or run.step == self.steps:
                    self._report(run, metrics, bar, checkpoints)
                with run.window.paused():
                    if run.step % self.checkpoint_every == 0:
                        run.save(checkpoints)
                    if on_sample is not None and self.sample_every and run.step % self.sample_every == 0:
                        run.show(on_sample)
            run.save(checkpoints)
        return TrainingResult(run.ema.module, run.step, received[0] if run.step < self.steps else None)

    def _report(self, run: _Run, metrics: MetricsLog, bar: Any, checkpoints: Checkpoints) -> None:
        row = run.report()
        metrics.write(row)
        bar.set_postfix_str(f"loss {row['loss']:.4g}, {row['examples_per_second']:.0f} examples/s")
        if row["nonfinite"] > self.max_nonfinite:
            last = checkpoints.latest()
            raise DivergenceError(
                f"{row['nonfinite']} non-finite losses by step {run.step}, max_nonfinite={self.max_nonfinite} are "
                "allowed: lower learning_rate or check the data; the last good checkpoint is "
                f"{'none' if last is None else checkpoints.path(last)}"
            )


class _Run:
    """What changes while a run goes on: model, averaged model, optimiser, step, and counts since the last report."""

    def __init__(
        self,
        trainer: Trainer,
        model: LearnedScore,
        objective: Objective,
        time_sampler: TimeSampler,
        seed: int,
    ) -> None:
        from lightning_fabric import Fabric  # half a second, which importing score_sde shall not cost

        accelerator = ("cuda" if torch.cuda.is_available() else "cpu") if trainer.device == "auto" else trainer.device
        self.fabric = Fabric(accelerator=accelerator, devices=1, precision=trainer.precision)  # type: ignore[arg-type]
        self.device = self.fabric.device
        self.trainer, self.objective, self.time_sampler = trainer, objective, time_sampler
        self.seed, self.step = seed, 0
        self.model = model.train()
        self.fabric.to_device(model)
        self.parameters = list(model.parameters())
        self.ema = EMA(model, trainer.ema_half_life, trainer.ema_ramp)
        self.optimizer = torch.optim.AdamW(
            self.parameters, betas=trainer.betas, weight_decay=trainer.weight_decay, fused=True
        )
        self.nonfinite, self.reported = 0, 0
        self.window = Window(self.device)

    def prepared(self, data: Data) -> Batch:
        """The batch of this step on the device, as the model sees it."""
        draws = Draws(generator(self.seed, "prepare", self.step, device=self.device), self.trainer.batch_size)
        return data.prepare(data.batch(self.step, self.trainer.batch_size).to(self.device), draws)

    def advance(self, batch: Batch) -> None:
        """One optimiser step."""
        source = generator(self.seed, "step", self.step, device=self.device)
        torch.manual_seed(key(self.seed, "dropout", self.step))
        times = self.time_sampler(self.model.sde, self.trainer.batch_size, source)
        with self.fabric.autocast():
            found = self.objective(self.model, batch, times, source)
        losses = found.loss
        self.optimizer.zero_grad()
        self.fabric.backward(losses.mean())
        norm = nn.utils.clip_grad_norm_(self.parameters, self.trainer.gradient_clip or math.inf)
        good = torch.isfinite(losses.detach().mean()) & torch.isfinite(norm)
        # The fused step skips itself where `found_inf` is 1, so that nothing has to wait for the device.
        self.optimizer.found_inf = (~good).float()  # type: ignore[attr-defined]
        for group in self.optimizer.param_groups:
            group["lr"] = self.trainer.rate(self.step)
        self.optimizer.step()
        self.ema.update(self.trainer.batch_size, self.step * self.trainer.batch_size)
        self.time_sampler.update(times, losses.detach())
        self.window.add(losses.detach(), times.u, norm, good, found.diagnostics)
        self.step += 1

    def report(self) -> dict[str, Any]:
        """The line of metrics.jsonl for the steps since the last one."""
        row = self.window.read((self.step - self.reported) * self.trainer.batch_size)
        if row["nonfinite"]:
            log.warning("%d non-finite losses up to step %d: steps skipped", row["nonfinite"], self.step)
        self.nonfinite, self.reported = self.nonfinite + row["nonfinite"], self.step
        return {"step": self.step, **row, "nonfinite": self.nonfinite, "lr": self.trainer.rate(self.step - 1)}

    def save(self, checkpoints: Checkpoints) -> None:
        state = {
            "step": self.step,
            "seed": self.seed,
            "batch_size": self.trainer.batch_size,
            "nonfinite": self.nonfinite + self.window.nonfinite,
            "optimizer": self.optimizer.state_dict(),
            "times": self.time_sampler.state_dict(),
        }
        checkpoints.save(self.step, self.model.state_dict(), self.ema.module.state_dict(), state)

    def restore(self, checkpoints: Checkpoints) -> None:
        state = checkpoints.state()
        for name, given in (("seed", self.seed), ("batch_size", self.trainer.batch_size)):
            if state[name] != given:
                raise ValueError(
                    f"{name}={given}, but the run was started with {state[name]}: resume it with that value"
                )
        self.model.load_state_dict(checkpoints.weights(ema=False))
        self.ema.module.load_state_dict(checkpoints.weights(ema=True))
        self.optimizer.load_state_dict(state["optimizer"])
        self.time_sampler.load_state_dict(state.get("times", {}))
        self.step = self.reported = state["step"]
        self.nonfinite = state["nonfinite"]

    def show(self, on_sample: SampleHook) -> None:
        """Calls the hook with both models in evaluation mode."""
        self.model.eval()
        with torch.no_grad():
            on_sample(self.step, self.model, self.ema.module)
        self.model.train()


@contextmanager
def _own_global_generator(device: torch.device) -> Iterator[None]:
    """Dropout draws from torch's global generator, which each step seeds: the caller's is restored afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _require(name: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={value!r} must be {allowed}")

"""The training loop.

    theta <- AdamW(theta, clip(grad mean_i L_i)),   rate(n) = learning_rate min(1, (n + 1) / warmup) [cosine decay]

All random numbers of step n (data, times, noise, dropout) are keyed by (seed, n) alone, so a run resumed from a checkpoint
ends with the weights of an uninterrupted one: bit for bit on one CPU type and thread count. Any number of processes
(started by `torchrun` or SLURM) and any `accumulate` give the same weights up to rounding (see `distributed`, `draws`).
Between two lines of metrics.jsonl nothing waits for the device.
"""

from __future__ import annotations

import importlib.util
import math
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from score_sde import distributed
from score_sde.brief import Brief
from score_sde.checks import number, one_of, whole
from score_sde.data import Batch, Data
from score_sde.progress import tqdm
from score_sde.score import LearnedScore
from score_sde.training.checkpoint import Checkpoints
from score_sde.training.classification import UNLABELLED
from score_sde.training.ema import decays
from score_sde.training.interrupt import interrupts
from score_sde.training.metrics import MetricsLog
from score_sde.training.objective import Objective
from score_sde.training.optimizers import OPTIMIZERS
from score_sde.training.precision import PRECISIONS
from score_sde.training.sample_warnings import warn_of_samples
from score_sde.training.state import TrainingState
from score_sde.training.strategy import STRATEGIES
from score_sde.training.times import TimeSampler

__all__ = ["DivergenceError", "Trainer", "TrainingResult"]

SampleHook = Callable[[int, LearnedScore, LearnedScore], Mapping[str, Path] | None]
EvaluateHook = Callable[[int, LearnedScore, LearnedScore], Mapping[str, float]]


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0, "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2
}  # fmt: skip


COUNTS = {"steps": 1, "batch_size": 1, "accumulate": 1, "log_every": 1, "checkpoint_every": 1, "keep_checkpoints": 1,
          "warmup": 0, "test_every": 0, "sample_every": 0, "evaluate_every": 0, "snapshot_every": 0,
          "max_nonfinite": 0}  # fmt: skip
"""The settings that are whole numbers, with the least value of each."""

CHOICES = {"device": ("auto", "cpu", "cuda"), "precision": PRECISIONS, "optimizer": OPTIMIZERS, "strategy": STRATEGIES}


class DivergenceError(RuntimeError):
    """More than `max_nonfinite` steps had a non-finite loss or gradient; the last checkpoint is intact."""


@dataclass(frozen=True, repr=False)
class TrainingResult(Brief):
    """What `Trainer.fit` returns.

    Attributes:
        model: the averaged model.
        step: the last step taken.
        interrupted: the signal that ended the run, else None.
        metrics: the rows of metrics.jsonl.
    """

    model: LearnedScore
    step: int
    interrupted: signal.Signals | None
    metrics: Sequence[Mapping[str, Any]] = ()


@dataclass(kw_only=True)
class Trainer:
    """Settings of a training run; `fit` trains.

    Args:
        steps: optimiser steps, of `batch_size` examples each.
        learning_rate, weight_decay, betas: of AdamW; Muon shares the first two.
        warmup: steps over which the rate rises linearly.
        schedule: "constant", "cosine" (to 0 at the last step), or a function from the fraction of the run that is done, in
            [0, 1), to a factor of the learning rate.
        gradient_clip: the norm that a gradient is scaled down to if it is larger, or None.
        optimizer: "adamw", or "muon" for the hidden matrices (see `optimizers`).
        accumulate: number of micro-batches that a batch is cut into, to save memory; their gradients add up to the batch's.
        ema_half_life, ema_ramp: half-life of the averaged weights in images, at most the fraction `ema_ramp` of the images
            seen. Given several half-lives, all are tracked; the model has the first.
        power_emas: relative widths of power-function averages to track, e.g. (0.05, 0.1); see `posthoc`.
        snapshot_every: steps between stored power-function averages; 0 stores none.
        log_every, checkpoint_every: steps between rows of metrics, and between checkpoints.
        sample_every, evaluate_every: steps between calls of `on_sample` and of `on_evaluate`; 0 for none.
        test_every: steps between held-out losses, `loss_held_out` in the next row of metrics: the averaged model's on up to
            four batches of `Data.reference`, with the same noise each time (and the same times, unless the time sampler
            learns). None if 0, or if no data are held out.
        patience: stop once this many held-out losses in a row are not below the least before them. Use it with
            schedule="constant", as "cosine" learns most at the end. None trains all steps.
        keep_checkpoints: how many of the last checkpoints to keep.
        max_nonfinite: how many steps of a run may have a non-finite loss or gradient; they are skipped and counted.
        device: "auto" (CUDA if available), "cpu" or "cuda"; on CUDA, each of several processes has its own GPU.
        precision: "32-true", "bf16-mixed", or on CUDA "16-mixed" with a loss scale; weights stay in float32.
        strategy: on several processes, "ddp" (whole weights on each) or "fsdp" (shards).
        compile: run the network through `torch.compile`.
        channels_last: keep convolution weights in that memory format, which is faster on tensor cores.
        peak_flops: peak FLOP/s of one device, for the utilisation in the log; by default from a table of GPUs.
        tensorboard: also write TensorBoard's event files, with the pictures that `on_sample` returns.
        progress: show a progress bar.

    Raises:
        ValueError: a setting is outside its range, or this machine does not support it.
    """

    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 100
    schedule: str | Callable[[float], float] = "cosine"
    gradient_clip: float | None = 1.0
    optimizer: str = "adamw"
    accumulate: int = 1
    ema_half_life: float | Sequence[float] = 500_000
    ema_ramp: float = 0.05
    power_emas: Sequence[float] = ()
    snapshot_every: int = 0
    log_every: int = 50
    test_every: int = 500
    patience: int | None = None
    checkpoint_every: int = 1000
    sample_every: int = 0
    evaluate_every: int = 0
    keep_checkpoints: int = 2
    max_nonfinite: int = 10
    device: str = "auto"
    precision: str = "32-true"
    strategy: str = "ddp"
    compile: bool = False
    channels_last: bool = False
    peak_flops: float | None = None
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in COUNTS.items():
            setattr(self, name, whole(name, getattr(self, name), least))
        for name, known in CHOICES.items():
            one_of(name, getattr(self, name), known)
        number("learning_rate", self.learning_rate, above=0)
        number("weight_decay", self.weight_decay, 0)
        for name in ("gradient_clip", "peak_flops"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), above=0)
        if callable(self.schedule):
            self.rate(0)
        else:
            one_of("schedule", self.schedule, SCHEDULES)
        pair = isinstance(self.betas, Sequence) and len(self.betas) == 2
        if not pair or not all(0 <= number("betas", beta) < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas!r} must be two numbers in [0, 1)")
        self.betas = (float(self.betas[0]), float(self.betas[1]))  # plain floats, whatever sequence a config gives
        if self.evaluate_every % self.log_every:
            raise ValueError(f"evaluate_every={self.evaluate_every} must be a multiple of log_every={self.log_every}, whose "
                             "rows it joins")  # fmt: skip
        if self.patience is not None:
            self.patience = whole("patience", self.patience)
            if not self.test_every:
                raise ValueError("patience needs held-out losses, and test_every=0 computes none: give test_every=500")
        self._check_averages()
        self._check_machine()

    def _check_averages(self) -> None:
        number("ema_ramp", self.ema_ramp, above=0)
        if not self.half_lives:
            raise ValueError(f"ema_half_life={self.ema_half_life!r} must be one number or more")
        for half_life in self.half_lives:
            number("ema_half_life", half_life, above=0)
        if self.snapshot_every and not self.power_emas:
            raise ValueError(
                f"snapshot_every={self.snapshot_every} stores power_emas, and there are none: give e.g. [0.05, 0.1]"
            )
        decays(self.half_lives, self.ema_ramp, self.power_emas)  # raises for widths and names that cannot be

    def _check_machine(self) -> None:
        """Raises ValueError for what this machine lacks, and for options that exclude each other."""
        cuda = torch.cuda.is_available()
        if self.device == "cuda" and not cuda:
            raise ValueError("device='cuda', but torch sees no CUDA device: use device='auto' or 'cpu'")
        if self.precision == "16-mixed" and (self.device == "cpu" or not cuda):
            raise ValueError("precision='16-mixed' needs a CUDA device: use 'bf16-mixed' or '32-true' on a CPU")
        if self.strategy == "fsdp" and self.optimizer == "muon":
            raise ValueError("optimizer='muon' needs whole matrices, strategy='fsdp' cuts them: use 'ddp' or 'adamw'")
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError("tensorboard=True, but tensorboard is not installed: pip install 'score_sde[tracking]'")

    @property
    def half_lives(self) -> list[float]:
        """`ema_half_life` as a list."""
        given = self.ema_half_life
        return list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        decay = self.schedule if callable(self.schedule) else SCHEDULES[self.schedule]
        return self.learning_rate * rise * number("the schedule's factor", decay(step / self.steps), 0)

    def check(self, model: LearnedScore, data: Data, time_sampler: TimeSampler) -> None:
        """Raises ValueError or TypeError if model, data, times and number of processes do not fit together."""
        _check_kinds(model, data, time_sampler)
        _check_trained(model)
        parts = distributed.count() * self.accumulate
        if self.batch_size % parts:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of {parts}, {distributed.count()} processes times "
                f"accumulate={self.accumulate}: it is the batch of all processes together"
            )
        if self.patience is not None and not data.has_test:
            raise ValueError("patience needs held-out losses, and the data hold nothing out: give them held_out=0.1")
        _check_times(model, time_sampler)
        _check_data(model, data)

    def fit(
        self,
        model: LearnedScore,
        data: Data,
        objective: Objective,
        time_sampler: TimeSampler,
        directory: str | Path | None = None,
        *,
        seed: int = 0,
        resume: bool = False,
        on_start: Callable[[], None] | None = None,
        on_sample: SampleHook | None = None,
        on_evaluate: EvaluateHook | None = None,
    ) -> TrainingResult:
        """Trains `model` in place and returns its average.

        SIGTERM, Ctrl-C, SIGUSR1 and SIGUSR2 end the run after the current step, with a checkpoint; a second signal has its
        usual effect. With several processes, all train and call the hooks; the main one writes.

        Args:
            model: the model, whose parameters with `requires_grad` are trained.
            data: where examples come from.
            objective: the loss of each example.
            time_sampler: draws the times of the examples.
            directory: where metrics.jsonl and checkpoints are written; nothing is if None.
            seed: of all random numbers.
            resume: continue from the latest checkpoint in `directory`, if there is one.
            on_start: called after all checks, before the first step and before anything is written.
            on_sample: (step, model, averaged model) -> picture files by name, or None, every `sample_every` steps, with
                both models in evaluation mode; TensorBoard shows the pictures if it is on.
            on_evaluate: (step, model, averaged model) -> numbers by name for the row of metrics, every `evaluate_every`
                steps.

        Raises:
            ValueError: model, data and times do not fit; a hook would never be called; the directory has checkpoints and
                `resume` is False; the checkpoint is of another seed, batch size, SDE, parameterization, network or number
                of examples, or of more than `steps` steps.
            TypeError: an argument, a batch of the data or what the objective returns is of the wrong type.
            DivergenceError: more than `max_nonfinite` non-finite steps. No checkpoint is written of that state.
        """
        distributed.start()
        self.check(model, data, time_sampler)
        warn_of_samples(model, data, self.batch_size)
        if isinstance(objective, type) or not callable(objective):
            raise TypeError(f"objective is an Objective, such as DenoisingScoreMatching(), got {objective!r}")
        if hasattr(objective, "check"):
            objective.check(model, time_sampler)
        for name, hook, every in (("sample", on_sample, self.sample_every),
                                  ("evaluate", on_evaluate, self.evaluate_every)):  # fmt: skip
            if hook is not None and not every:
                raise ValueError(f"on_{name} is never called with {name}_every=0: give Trainer({name}_every=...) too")
        state = TrainingState(self, model, objective, time_sampler, seed, data.size)
        outputs = _Outputs(None if directory is None else Path(directory), self.keep_checkpoints)
        self._restore(state, outputs, resume)
        if on_start is not None:
            on_start()
        outputs.open(state.step)
        rows, stopped = self._run(state, outputs, data, on_sample, on_evaluate)
        if stopped is not None:
            warnings.warn(
                f"training was interrupted ({stopped.name}) at step {state.step} of {self.steps}", stacklevel=2
            )
        trained = state.shown()[1]
        # Without label dropout the network has only learnt to predict under a condition, so calls must give it.
        if getattr(getattr(objective, "label_dropout", None), "share", 1.0) == 0:
            trained.needed = trained.condition_names & (data.batch(0, 1).condition.keys() - {"augment"})
        return TrainingResult(trained, state.step, stopped, rows)

    def _restore(self, state: TrainingState, outputs: _Outputs, resume: bool) -> None:
        """Restores the last checkpoint, if there is one."""
        last = outputs.latest()
        if last is None or outputs.checkpoints is None:
            return
        if not resume:
            raise ValueError(
                f"{outputs.folder} has checkpoints up to step {last}: resume it, or choose a new directory"
            )
        if last > self.steps:
            raise ValueError(
                f"steps={self.steps}, but {outputs.folder} has been trained for {last}: give steps >= {last}"
            )
        state.restore(outputs.checkpoints, last)

    def _run(
        self, state: TrainingState, outputs: _Outputs, data: Data, on_sample: SampleHook | None,
        on_evaluate: EvaluateHook | None,
    ) -> tuple[list[dict[str, Any]], signal.Signals | None]:  # fmt: skip
        """Takes the remaining steps; returns the rows logged, and the signal that ended the run early, if any."""
        main = distributed.is_main()
        quiet = not self.progress or not main
        with (
            MetricsLog(outputs.folder if main else None, state.step, self.tensorboard) as metrics,
            tqdm(total=self.steps, initial=state.step, disable=quiet, unit="step", dynamic_ncols=True) as bar,
            interrupts() as received,
            own_global_generator(state.device),
            state.feed(data) as batches,
        ):

            def signalled() -> int:
                return distributed.greatest(received[0] if received else 0)

            held_out, stalled = self._held_out(data), self._has_stalled(metrics.rows)
            while state.step < self.steps and not stalled and not signalled():
                state.advance(batches(state.step))
                bar.update()
                if state.due(self.log_every) or state.step == self.steps:
                    self._report(state, metrics, bar, outputs, held_out, on_evaluate)
                    stalled = self._has_stalled(metrics.rows)
                with state.window.paused():
                    # Snapshots before the checkpoint: a killed run retakes those after the checkpoint it resumes from.
                    if state.due(self.snapshot_every):
                        outputs.snapshot(state)
                    if state.due(self.checkpoint_every):
                        outputs.checkpoint(state)
                    if on_sample is not None and state.due(self.sample_every):
                        pictures = state.show(on_sample)
                        metrics.show(state.step, pictures or {})
            stopped = signalled()
            if self.snapshot_every and (stalled or state.step == self.steps):
                outputs.snapshot(state)
            outputs.checkpoint(state)
        state.strategy.disconnect()
        return metrics.rows, signal.Signals(stopped) if stopped else None

    def _held_out(self, data: Data) -> Batch | None:
        """Up to four batches of examples that training does not see, at most 256 MiB; None if there are none."""
        if not self.test_every or not data.has_test:
            return None
        return data.reference(min(4 * self.batch_size, max(1, 2**26 // math.prod(data.event_shape))))

    def _has_stalled(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the run has used up its patience, as the main process finds it. All processes call it."""
        if self.patience is None:
            return False
        losses = [loss for row in rows if (loss := row.get("loss_held_out")) is not None]
        return distributed.agree(has_stalled(losses, self.patience))

    def _report(
        self, state: TrainingState, metrics: MetricsLog, bar: Any, outputs: _Outputs, held_out: Batch | None,
        on_evaluate: EvaluateHook | None,
    ) -> None:  # fmt: skip
        """Writes a row of metrics, with held-out loss and evaluation if due; raises DivergenceError."""
        row, last_row = state.report(), (state.step - 1) // self.log_every * self.log_every
        if held_out is not None and state.step // self.test_every > last_row // self.test_every:
            with state.window.paused():
                row["loss_held_out"] = state.held_out_loss(held_out)
        if on_evaluate is not None and state.due(self.evaluate_every):
            with state.window.paused():
                row |= state.show(on_evaluate)
        metrics.write(row)
        bar.set_postfix_str(f"loss {row['loss']:.4g}, {row['examples_per_second']:.0f} examples/s", refresh=False)
        if row["nonfinite"] > self.max_nonfinite:
            last = None if outputs.checkpoints is None else outputs.checkpoints.latest()
            raise DivergenceError(
                f"{row['nonfinite']} non-finite losses by step {state.step}, max_nonfinite={self.max_nonfinite} are "
                "allowed: lower learning_rate or check the data; the last good checkpoint is "
                f"{'none' if outputs.checkpoints is None or last is None else outputs.checkpoints.path(last)}"
            )


def has_stalled(losses: Sequence[float], patience: int) -> bool:
    """Whether none of the last `patience` losses is below the least of those before; NaN counts as infinite."""
    known = [math.inf if math.isnan(loss) else loss for loss in losses]
    before, last = known[:-patience], known[-patience:]
    return bool(before) and min(last) >= min(before)


def _check_kinds(model: LearnedScore, data: Data, time_sampler: TimeSampler) -> None:
    given = (("model", model, LearnedScore), ("data", data, Data), ("time_sampler", time_sampler, TimeSampler))
    for name, part, kind in given:
        if not isinstance(part, kind):
            fix = ": wrap a tensor of examples as TensorData(x), or derive a class from Data" if kind is Data else ""
            raise TypeError(f"{name} is a {kind.__name__}, got {part if isinstance(part, type) else type(part)!r}{fix}")


def _check_trained(model: LearnedScore) -> None:
    learnt = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not learnt:
        raise ValueError("no parameter of the model is trained: call model.requires_grad_(True), as the models of Run.model "
                         "and load are frozen")  # fmt: skip
    outside = [name for name in learnt if not name.startswith("network.")]
    if outside and distributed.count() > 1:
        raise ValueError(f"{outside[0]} is learnt outside the network, and several processes share the gradients of the "
                         "network alone: train on one, or freeze it, .requires_grad_(False)")  # fmt: skip


def _check_times(model: LearnedScore, time_sampler: TimeSampler) -> None:
    sde = model.sde
    time_sampler.check(sde)
    drawn = time_sampler(sde, 64, torch.Generator().manual_seed(0)).t
    slack = 1e-9 * (sde.t_max - sde.t_min)
    if not ((drawn >= sde.t_min - slack) & (drawn <= sde.t_max + slack)).all():
        raise ValueError(f"{type(time_sampler).__name__} draws times from {drawn.min():g} to {drawn.max():g}, those of "
                         f"{sde!r} are {sde.t_min:g} to {sde.t_max:g}")  # fmt: skip


def _check_data(model: LearnedScore, data: Data) -> None:
    shape, names = tuple(data.event_shape), model.condition_names
    if shape != model.event_shape:
        last = (*shape[-1:], *shape[:-1]) == model.event_shape
        fix = "put channels first, x.movedim(-1, 1)" if last else "make them equal"
        raise ValueError(f"the data have event shape {shape}, the model {model.event_shape}: {fix}")
    if data.num_classes is not None and "label" not in names and not hasattr(model.network, "num_classes"):
        raise ValueError(f"the data have labels, and {type(model.network).__name__}.forward has no argument `label`: name it "
                         "so, or use the data without labels")  # fmt: skip
    known = getattr(model.network, "num_classes", data.num_classes) if "label" in names else None
    if data.num_classes is not None and (known is None or known < data.num_classes):
        raise ValueError(
            f"the data have labels of {data.num_classes} classes, the network knows {known or 0}: "
            f"set network.num_classes={data.num_classes}, or use the data without labels"
        )
    if not model.predicts and data.num_classes is None:
        raise ValueError(UNLABELLED)


class _Outputs:
    """A run's directory with its checkpoints and snapshots; if None, nothing is written."""

    def __init__(self, folder: Path | None, keep: int) -> None:
        self.folder = folder
        self.checkpoints = None if folder is None else Checkpoints(folder / "checkpoints", keep)
        self.snapshots = None if folder is None else Checkpoints(folder / "snapshots", keep=None)

    def latest(self) -> int | None:
        """The step of the last checkpoint, the same on every process."""
        return None if self.checkpoints is None else distributed.agree(self.checkpoints.latest())

    def open(self, step: int) -> None:
        """Creates the directory, and removes snapshots that a killed run took after `step`."""
        if self.folder is not None and self.snapshots is not None and distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            self.snapshots.remove_after(step)

    def checkpoint(self, state: TrainingState) -> None:
        if self.checkpoints is not None:
            state.save(self.checkpoints)

    def snapshot(self, state: TrainingState) -> None:
        if self.snapshots is not None:
            state.snapshot(self.snapshots)


@contextmanager
def own_global_generator(device: torch.device) -> Iterator[None]:
    """Restores torch's global generators afterwards: dropout draws from them, and each step seeds them."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield

"""The state of a training run: one optimiser step, and how it is saved and restored.

Each process holds some rows of a global batch of B examples, cut into micro-batches. The gradient is that of

    1/B sum_{i <= B} L_i,     L_i the loss of example i at its time and noise, which follow from (seed, step, i).
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from score_sde import distributed
from score_sde.data import Batch, Data
from score_sde.keyed import generator, key
from score_sde.memory import keep_freed_memory
from score_sde.networks.dropout import Dropout, keyed
from score_sde.score import LearnedScore
from score_sde.training.checkpoint import Checkpoints
from score_sde.training.draws import rows_of
from score_sde.training.ema import EMA, PowerFunction, decays
from score_sde.training.feed import feed
from score_sde.training.metrics import Window
from score_sde.training.objective import Losses, Objective
from score_sde.training.optimizers import Optimizer, hidden_matrices
from score_sde.training.precision import PRECISIONS, LossScale
from score_sde.training.strategy import strategy, with_network
from score_sde.training.throughput import flops_per_example, peak_flops
from score_sde.training.times import Times, TimeSampler

if TYPE_CHECKING:
    from score_sde.training.trainer import Trainer

__all__ = ["TrainingState", "channels_last"]

T = TypeVar("T")

log = logging.getLogger(__name__)


def channels_last(module: nn.Module) -> None:
    """Converts the weights of 2-D and 3-D convolutions to the channels-last memory format."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in module.parameters():
        if weight.ndim in formats:
            weight.data = weight.data.contiguous(memory_format=formats[weight.ndim])


@torch.no_grad()
def _coefficients(model: LearnedScore) -> Tensor:
    """alpha, sigma, c_in, c_skip, c_out and c_noise at nine times, (6, 9), by which a checkpoint knows its process."""
    sde = model.sde
    t = sde.t_min + (sde.t_max - sde.t_min) * torch.linspace(0, 1, 9, dtype=torch.float64)
    return torch.stack(
        [sde.alpha(t), sde.sigma(t), *(part.expand(t.shape) for part in model.parameterization.row(sde, t))]
    )


class TrainingState:
    """Model, averages, optimiser, step count and metrics of a run, and the operations on them.

    Attributes:
        step: number of steps taken.
        strategy: how weights are placed on processes.
        view: the model that objectives call, its network wrapped and compiled; None before the first step.
        averages: the averaged weights by name, "ema" first.
        window: metrics since the last report.
        nonfinite, reported: non-finite steps in all, and the step, as of the last report.
        peak, flops: the device's peak FLOP/s, if known, and the FLOPs of an example, from the first step on.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: LearnedScore,
        objective: Objective,
        time_sampler: TimeSampler,
        seed: int,
        examples: int | None = None,
    ) -> None:
        keep_freed_memory()
        self.device = distributed.device(trainer.device)
        self.trainer, self.objective, self.time_sampler = trainer, objective, time_sampler
        self.seed, self.examples, self.step, self.model = seed, examples, 0, model.train()
        if trainer.channels_last:
            channels_last(model)
        hidden = hidden_matrices(model, model.event_shape[0])
        self.strategy = strategy(trainer.strategy, model, self.device)
        self.view: LearnedScore | None = None
        self.optimizer = Optimizer(trainer.optimizer, self.strategy.held, hidden, trainer.betas, trainer.weight_decay)
        kept = decays(trainer.half_lives, trainer.ema_ramp, trainer.power_emas)
        self.averages = {name: EMA(self.strategy.held, decay) for name, decay in kept.items()}
        self.loss_scale = LossScale(self.device) if trainer.precision == "16-mixed" else None
        self.dropouts = [module for module in self.strategy.network.modules() if isinstance(module, Dropout)]
        self.window = Window(self.device)
        self.nonfinite, self.reported, self.flops = 0, 0, 0
        self.peak = trainer.peak_flops or peak_flops(self.device, trainer.precision)
        self._averaged: LearnedScore | None = None

    def due(self, every: int) -> bool:
        """Whether an action done every `every` steps is due after this one; never if `every` is 0."""
        return bool(every) and self.step % every == 0

    def micro_batches(self) -> list[slice]:
        """This process's rows of the global batch, cut into `accumulate` parts."""
        mine, parts = distributed.share(self.trainer.batch_size), self.trainer.accumulate
        size = (mine.stop - mine.start) // parts
        return [slice(mine.start + i * size, mine.start + (i + 1) * size) for i in range(parts)]

    def feed(self, data: Data) -> AbstractContextManager[Callable[[int], list[Batch]]]:
        """A function from a step to this process's micro-batches, on the device and prepared."""
        return feed(data, self.micro_batches(), self.trainer.batch_size, self.seed, self.device)

    def advance(self, batches: Sequence[Batch]) -> None:
        """Takes one optimiser step on the micro-batches of this process."""
        size = self.trainer.batch_size
        if self.peak and not self.flops:
            self.flops = flops_per_example(self.model, batches[0].to(self.model.device))
        source = generator(self.seed, "step", self.step, device=self.device)
        times = self.time_sampler(self.model.sde, size, source)
        found = self._gradient(batches, times, source)
        self._update(found, times.u[distributed.share(size)])
        if type(self.time_sampler).update is not TimeSampler.update:  # gathering waits for the device
            self.time_sampler.update(times, distributed.gather(found.loss))
        for average in self.averages.values():
            average.update(self.strategy.held, size, self.step * size)
        self.step += 1

    def _gradient(self, batches: Sequence[Batch], times: Times, source: torch.Generator) -> Losses:
        """Computes the gradient of the global batch's mean loss; returns the losses of this process's examples."""
        for parameter in self.strategy.parameters:
            parameter.grad = None
        micro_batches = self.micro_batches()
        if self.view is None:
            self.view = self._connected(batches[0], micro_batches[0], times, source)
        self._seed_dropout()
        keys = self._dropout_keys()
        losses = []
        for batch, rows in zip(batches, micro_batches, strict=True):
            with keyed(self.dropouts, keys[:, rows]):
                losses.append(self._differentiated(batch, rows, times, source, last=rows is micro_batches[-1]))
        return Losses.joined(losses)

    def _seed_dropout(self) -> None:
        """Seeds torch's global generators, for `torch.nn.Dropout`, by (seed, step), and by the process after the first."""
        process = [distributed.rank()] if distributed.rank() else []
        seed = key(self.seed, "dropout", self.step, *process)
        # Of the host and this device alone: torch.manual_seed would look for every other one.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _dropout_keys(self) -> Tensor:
        """Keys of this step's dropout masks for each layer and example of the global batch, int32 (layers, batch)."""
        whole, shape = torch.iinfo(torch.int32), (len(self.dropouts), self.trainer.batch_size)
        source = generator(self.seed, "dropout", self.step, device=self.device)  # a copy from the host would wait
        return torch.randint(whole.min, whole.max, shape, generator=source, dtype=torch.int32, device=self.device)

    def _connected(self, batch: Batch, rows: slice, times: Times, source: torch.Generator) -> LearnedScore:
        """The model that objectives call: its network wrapped for several processes and compiled, where asked for."""
        network = self.strategy.connect(lambda: self._loss(self.model, batch, rows, times, source).loss.mean())
        network = torch.compile(network) if self.trainer.compile else network  # type: ignore[assignment]
        return self.model if network is self.model.network else with_network(self.model, network)

    def _loss(self, model: LearnedScore, batch: Batch, rows: slice, times: Times, source: torch.Generator) -> Losses:
        """The losses of `batch`, which is `rows` of the global batch."""
        dtype = PRECISIONS[self.trainer.precision]
        drawn = Times(times.t[rows], times.u[rows], times.weight[rows])
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            try:
                found = self.objective(model, batch, drawn, rows_of(source, self.trainer.batch_size, rows))
            except (IndexError, RuntimeError) as error:
                self._explain(error, batch)
                raise
        if not isinstance(found, Losses) or found.loss.shape != (len(batch.x),):
            given = f"a loss of shape {tuple(found.loss.shape)}" if isinstance(found, Losses) else type(found).__name__
            raise TypeError(f"{type(self.objective).__name__} returns Losses(loss) with one number for each of "
                            f"{len(batch.x)} examples, got {given}")  # fmt: skip
        return found

    def _explain(self, error: Exception, batch: Batch) -> None:
        """Raises ValueError for an error of a network's table that is indexed by the noise level, or by -1 for no class."""
        name, said = type(self.model.network).__name__, str(error)
        if "indices" in said:
            raise ValueError(
                f"{name} fails ({said}): if it looks up the noise level c_noise, that is a real number; on a DiscreteSDE with "
                "Published('time', scale=1) it is the step, c_noise.long()"
            ) from error
        share = getattr(getattr(self.objective, "label_dropout", None), "share", 0)
        if share and "label" in batch.condition and ("out of range" in said or "must be non-negative" in said):
            raise ValueError(
                f"{name} fails ({said}), and label_dropout={share} gives it label -1 for no class: let it embed one class "
                "more, label % (num_classes + 1), or give nulls={'label': num_classes}"
            ) from error

    def _differentiated(self, batch: Batch, rows: slice, times: Times, source: torch.Generator, last: bool) -> Losses:
        """Adds the gradient of a micro-batch; returns its losses."""
        assert self.view is not None
        with self.strategy.collecting(last):
            found = self._loss(self.view, batch, rows, times, source)
            mean = found.loss.mean() / self.trainer.accumulate
            (mean if self.loss_scale is None else mean * self.loss_scale.scale).backward()
        return Losses(found.loss.detach(), found.diagnostics)

    def _update(self, found: Losses, u: Tensor) -> None:
        """Clips the gradient and takes the step, unless the loss or the gradient is not finite on some process."""
        gradients = self.strategy.gradients()
        if self.loss_scale is not None:
            torch._foreach_mul_(gradients, 1 / self.loss_scale.scale)
        norm = self.strategy.clip(self.trainer.gradient_clip or math.inf)
        finite_loss = torch.isfinite(distributed.mean(found.loss.mean()))
        good = finite_loss & torch.isfinite(norm)
        self.optimizer.step(self.trainer.rate(self.step), good)
        counted = ~good
        if self.loss_scale is not None:  # an overflow only lowers the scale, and is no fault
            counted = counted & ~(finite_loss & (self.loss_scale.scale > 1))
            self.loss_scale.update(good)
        self.window.add(found.loss, u, norm, good, counted, found.diagnostics)

    def report(self) -> dict[str, Any]:
        """The row of metrics.jsonl for the steps since the last one."""
        row = self.window.read((self.step - self.reported) * self.trainer.batch_size)
        if row["nonfinite"]:
            log.warning("%d non-finite losses up to step %d: steps skipped", row["nonfinite"], self.step)
        self.nonfinite, self.reported = self.nonfinite + row["nonfinite"], self.step
        more: dict[str, Any] = {"nonfinite": self.nonfinite, "lr": self.trainer.rate(self.step - 1)}
        if self.peak:
            rate = row["examples_per_second"] * self.flops / distributed.count()
            more |= {"tflops": rate / 1e12, "mfu": rate / self.peak}
        if self.device.type == "cuda":
            more["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if self.loss_scale is not None:
            more["loss_scale"] = float(self.loss_scale.scale)
        return {"step": self.step, **row, **more}

    def held_out_loss(self, batch: Batch) -> float:
        """Mean loss of the first averaged model on these examples, batched as in training, with the same noise at each call.

        Times are the same too, unless the time sampler learns. All processes call it and share the examples as in training.
        """

        def mean(step: int, raw: LearnedScore, averaged: LearnedScore) -> float:
            size, found = self.trainer.batch_size, torch.zeros(2, dtype=torch.float64, device=self.device)
            for first in range(0, len(batch.x), size):
                source = generator(self.seed, "held out", first, device=self.device)
                times = self.time_sampler(self.model.sde, size, source)
                for rows in self.micro_batches():
                    part = batch.rows(slice(first + rows.start, first + rows.stop)).to(self.device)
                    if count := len(part.x):
                        with torch.enable_grad():  # some objectives differentiate by x; these weights need no gradient
                            losses = self._loss(averaged, part, slice(rows.start, rows.start + count), times, source)
                        loss = losses.loss.detach()
                        found += torch.stack([loss.sum().double(), found.new_tensor(count)])
            total, count = distributed.mean(found).tolist()
            return total / count

        return self.show(mean)

    def save(self, checkpoints: Checkpoints) -> None:
        """Writes a checkpoint of whole tensors, which any number of processes can resume. All processes call it."""
        state: dict[str, Any] = {
            "step": self.step,
            "seed": self.seed,
            "batch_size": self.trainer.batch_size,
            "examples": self.examples,
            "process": (repr(self.model.sde), repr(self.model.parameterization)),
            "coefficients": _coefficients(self.model),
            "nonfinite": self.nonfinite + self.window.nonfinite,
            "window": self.window.state_dict(),
            "times": self.time_sampler.state_dict(),
            **{name: self.strategy.whole_moments(part.state_dict()) for name, part in self.optimizer.parts.items()},
        }
        if self.loss_scale is not None:
            state |= {"loss_scale": float(self.loss_scale.scale), "good_steps": float(self.loss_scale.good_steps)}
        weights = {"weights": self.strategy.state_dict(self.strategy.held)}
        weights |= {name: self.strategy.state_dict(average.tensors) for name, average in self.averages.items()}
        if distributed.is_main():
            checkpoints.save(self.step, weights, state)

    def snapshot(self, snapshots: Checkpoints) -> None:
        """Stores the power-function averages, from which `posthoc` reconstructs others. All processes call it."""
        known = {name: average for name, average in self.averages.items() if isinstance(average.decay, PowerFunction)}
        weights = {name: self.strategy.state_dict(average.tensors) for name, average in known.items()}
        if distributed.is_main():
            snapshots.save(self.step, weights)

    def restore(self, checkpoints: Checkpoints, step: int) -> None:
        """Loads a checkpoint.

        Raises ValueError if the run was started with another seed, batch size, number of examples, SDE, parameterization,
        optimiser or network, and FileNotFoundError if it lacks one of the averages.
        """
        state = checkpoints.state(step)
        for name, given in (("seed", self.seed), ("batch_size", self.trainer.batch_size), ("examples", self.examples)):
            if state.get(name, given) != given:
                raise ValueError(
                    f"{name}={given}, but the run was started with {state[name]}: resume it with that value"
                )
        if ("muon" in state) != (self.optimizer.muon is not None):
            was = "muon" if "muon" in state else "adamw"
            raise ValueError(f"optimizer={self.trainer.optimizer}, but the run was started with {was}: resume it so")
        for name, average in self.averages.items():
            self.strategy.load_state_dict(average.tensors, checkpoints.weights(step, ema=name))
        self.strategy.load_state_dict(
            self.strategy.held, checkpoints.weights(step, ema=False)
        )  # last: it fills the model
        own = _coefficients(self.model)  # after loading, as the SDE may be learnt
        if not torch.allclose(state.get("coefficients", own), own, rtol=1e-6, atol=0):
            was, now = " and ".join(state["process"]), f"{self.model.sde!r} and {self.model.parameterization!r}"
            raise ValueError(f"the run was started with {was}, not with {now}: resume it so, or choose a new directory")
        for name, part in self.optimizer.parts.items():
            part.load_state_dict(self.strategy.own_moments(state[name]))
        if self.loss_scale is not None and "loss_scale" in state:
            self.loss_scale.scale.fill_(state["loss_scale"])
            self.loss_scale.good_steps.fill_(state["good_steps"])
        self.time_sampler.load_state_dict(state.get("times", {}))
        if "window" in state:  # older checkpoints do not have it
            self.window.load_state_dict(state["window"])
        self.step = self.reported = state["step"]
        self.nonfinite = state["nonfinite"]

    def shown(self) -> tuple[LearnedScore, LearnedScore]:
        """The model and its first averaged model, with whole weights, in evaluation mode. All processes call it."""
        if self._averaged is None:
            self._averaged = copy.deepcopy(self.model).requires_grad_(False)
        average = next(iter(self.averages.values()))
        self.strategy.fill(self.model, self.strategy.held)
        self.strategy.fill(self._averaged, average.tensors)
        for shown, current in zip(self._averaged.buffers(), self.model.buffers(), strict=True):
            shown.copy_(current)
        return self.model.to(self.device).eval(), self._averaged.to(self.device).eval()

    def show(self, hook: Callable[[int, LearnedScore, LearnedScore], T]) -> T:
        """Calls hook(step, model, averaged model), both in evaluation mode, without gradients. All processes call it."""
        with torch.no_grad():
            answer = hook(self.step, *self.shown())
        self.model.train()
        return answer

r"""What a sampler costs besides its network calls.

The contenders take turns in every round, in one process, so that a disturbance of the machine affects all of them. Results
are medians over the rounds of a ratio of times, with quartiles. A sampler of n calls and m noise draws is compared with

    loop:     n (x <- a x + b D) + m (x <- x + c z), written by hand with the same raw model function,
    network:  n calls of the bare network, timed just before the run and, as `inside`, during the run itself.

CUDA work is timed by CUDA events, everything else by the wall clock.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from score_sde import grid as grids
from score_sde import targets
from score_sde.adaptive import AdaptiveODE
from score_sde.checks import one_of, whole
from score_sde.evaluation.certify import discover
from score_sde.networks import UNet
from score_sde.noise import BatchNoise, NoiseSource, SampleNoise
from score_sde.ode import ProbabilityFlowODE
from score_sde.parameterization import Noise
from score_sde.prediction import Prediction
from score_sde.progress import tqdm
from score_sde.sampler import Sampler
from score_sde.score import ExactScore, LearnedScore, ScoreModel, WrappedScore
from score_sde.sde import SDE, VPSDE, Time
from score_sde.steps import (
    DDIM,
    Ancestral,
    DPMSolverSDE,
    DPMSolverSinglestep,
    EulerMaruyama,
    ExponentialAdams,
    Heun,
    KineticLangevin,
    LangevinCorrector,
    ProbabilityFlowEuler,
    RungeKutta,
    SASolver,
    Step,
    UniPC,
)
from score_sde.steps.multistep import AdamsBashforth


@dataclass(frozen=True)
class Sizes:
    """The sizes of what is measured; `quick()` is for tests."""

    loop: tuple[int, ...] = (64, 3, 32, 32)
    steps: int = 100
    network: tuple[int, ...] = (16, 3, 32, 32)
    width: int = 32
    multipliers: tuple[int, ...] = (1, 2, 4, 6)  # 9.6 M parameters
    network_steps: int = 10
    table: int = 1000
    ode: tuple[int, ...] = (4096, 65_536)
    rounds: int = 9

    def __post_init__(self) -> None:
        whole("rounds", self.rounds)

    @property
    def few_rounds(self) -> int:
        """Rounds of the slow parts: the network and the ODE solvers."""
        return max(1, self.rounds // 3)

    @classmethod
    def quick(cls) -> Sizes:
        return cls((2, 3, 8, 8), 5, (2, 3, 8, 8), 8, (1, 2), 2, 50, (64,), 2)


# --- timing -----------------------------------------------------------------------------------------------------------


def elapsed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that `work` takes, on CUDA the time between two events."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1000


def race(
    contenders: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, progress: bool = False
) -> pd.DataFrame:
    """Seconds of each contender (a column) in each round (a row), after one round of warming up.

    Every round has another random order, so that nobody gains by always running after the same contender (its caches, its
    sleeping threads).
    """
    rows, order = [], random.Random(0)
    for _ in tqdm(range(rounds + 1), desc="rounds", disable=not progress, delay=1.0, leave=False):
        turn = order.sample(list(contenders), len(contenders))
        rows.append({name: elapsed(contenders[name], device) for name in turn})
    return pd.DataFrame(rows[1:], columns=list(contenders))


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = pd.Series(list(values)).quantile([0.25, 0.5, 0.75])
    return {"ratio": middle, "low": low, "high": high}


# --- models -----------------------------------------------------------------------------------------------------------


class Trivial(ScoreModel):
    """D(x, t) = x / 2: a model that costs one pass over its input.

    Attributes:
        function: x -> D alone, for a loop written by hand.
    """

    def __init__(self, sde: SDE, event_shape: Sequence[int], device: torch.device) -> None:
        self.sde, self.event_shape, self._device = sde, tuple(event_shape), device
        self.levels: dict[float, tuple[float, float]] = {}

    @property
    def device(self) -> torch.device:
        return self._device

    def prepare(self, times: Iterable[float]) -> None:
        t = torch.tensor(list(times), dtype=torch.float64)
        levels = zip(self.sde.alpha(t).tolist(), self.sde.sigma(t).tolist(), strict=True)
        self.levels |= dict(zip(t.tolist(), levels, strict=True))

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        if t not in self.levels:
            self.prepare([float(t)])
        return Prediction(x, self.function(x), *self.levels[float(t)])

    @staticmethod
    def function(x: Tensor) -> Tensor:
        return 0.5 * x


class Timed(WrappedScore):
    """A model that sums the seconds spent in its calls (on a CPU) and the samples that these were given."""

    def __init__(self, model: ScoreModel) -> None:
        super().__init__(model)
        self.seconds, self.samples = 0.0, 0

    def __call__(self, x: Tensor, t: Time, **condition: Any) -> Prediction:
        start = time.perf_counter()
        prediction = self.model(x, t, **condition)
        self.seconds += time.perf_counter() - start
        self.samples += len(x)
        return prediction


# --- fixed grids ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A sampler in the tables, and how many outputs its step combines."""

    sampler: Sampler
    outputs: int = 1


def entries(steps: int, **options: Any) -> dict[str, Entry]:
    """One sampler of each family, with `steps` moves."""
    grid = partial(grids.log_snr, steps=steps)
    churned = partial(grids.churn, base=partial(grids.karras, steps=steps), S_churn=0.3 * steps)
    predictors: dict[str, Step] = {
        "Euler": ProbabilityFlowEuler(), "DDIM": DDIM(),
        **{f"ExponentialAdams {k}": ExponentialAdams(k) for k in (2, 3, 4)},
        **{f"AdamsBashforth {k}": AdamsBashforth(k) for k in (3, 4)},
        "UniPC 3": UniPC(3), "Heun": Heun(), "DPM-Solver++ 2S": DPMSolverSinglestep(2), "RK4": RungeKutta(),
        "EulerMaruyama": EulerMaruyama(), "Ancestral": Ancestral(), "SDE ExponentialAdams 2": ExponentialAdams(2, 1.0),
        "DPM-Solver++ SDE": DPMSolverSDE(), "SA-Solver 3 3": SASolver(3, 3),
    }  # fmt: skip
    found = {name: Entry(Sampler(step, grid, final="none", **options), getattr(step, "memory", 1))
             for name, step in predictors.items()}  # fmt: skip
    found["Heun, churned"] = Entry(Sampler(Heun(), churned, final="none", **options))
    for name, corrector in (("Langevin", LangevinCorrector()), ("kinetic Langevin", KineticLangevin(steps=1))):
        found[f"Ancestral + {name}"] = Entry(Sampler(Ancestral(), grid, corrector, final="none", **options))
    return found


class Counting(BatchNoise):
    """A `BatchNoise` that counts its draws."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.draws = 0

    def open(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Any:
        stream = super().open(shape, dtype, device)

        def counted(step: int, draw: int) -> Tensor:
            self.draws += 1
            return stream(step, draw)

        return counted


def hand_loop(model: Callable[[Tensor], Tensor], x: Tensor, calls: int, outputs: int = 1, noise: bool = False) -> None:
    """x <- a x + sum_k b_k D_k (+ c z), as written by hand."""
    generator = torch.Generator(x.device).manual_seed(0)
    a, b, c = 0.9, (0.1, 0.05, -0.03, 0.01)[:outputs], 0.3
    past: list[Tensor] = []
    for _ in range(calls):
        past = [model(x), *past][:outputs]
        x = a * x
        for weight, output in zip(b, past, strict=False):
            x = x + weight * output
        if noise:
            x = x + c * torch.randn(x.shape, generator=generator, device=x.device)


def against_a_loop(sizes: Sizes, device: torch.device, progress: bool = False) -> pd.DataFrame:
    """Each sampler's time over that of a loop written by hand, with a trivial model.

    Columns: sampler, calls, draws, us (microseconds per call), ratio with its quartiles low and high, and `own`, the ratio
    to a loop that combines as many outputs as the step does.
    """
    model, x = Trivial(VPSDE(), sizes.loop[1:], device), _images(sizes.loop, device)
    found = entries(sizes.steps)
    if device.type == "cuda":
        found |= {f"{name}, CUDA graph": entry for name, entry in entries(sizes.steps, cuda_graph=True).items()}
    loops = {f"loop {k}": partial(hand_loop, model.function, x, sizes.steps, outputs=k) for k in (1, 2, 3, 4)}
    loops["noisy"] = partial(hand_loop, model.function, x, sizes.steps, noise=True)
    runs = {name: partial(entry.sampler.sample, model, x.shape, x_init=x, seed=0) for name, entry in found.items()}
    seconds = race({**loops, **runs}, sizes.rounds, device, progress) / sizes.steps
    rows = []
    for name, entry in found.items():
        noise = Counting(0)
        calls = entry.sampler.sample(model, x.shape, x_init=x, noise=noise).nfe
        draws = (seconds["noisy"] - seconds["loop 1"]) * noise.draws
        plain, own = (calls * seconds[f"loop {k}"] + draws for k in (1, min(entry.outputs, 4)))
        taken = seconds[name] * sizes.steps
        row = {"sampler": name, "calls": calls, "draws": noise.draws, "us": taken.median() / calls * 1e6}
        rows.append(row | spread(taken / plain) | {"own": (taken / own).median()})
    return pd.DataFrame(rows)


class Stopwatch:
    """Seconds spent in a module's forward, on a CPU."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.seconds, self.begun = 0.0, 0.0
        self.hooks = [module.register_forward_pre_hook(self.begin), module.register_forward_hook(self.end)]

    def begin(self, *_: Any) -> None:
        self.begun = time.perf_counter()

    def end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self.begun

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def against_the_network(sizes: Sizes, device: torch.device, progress: bool = False) -> pd.DataFrame:
    """Each sampler's time over that of as many calls of the bare network, a U-Net of ten million parameters.

    Columns: sampler, calls, ms (per bare call), ratio to the bare calls timed just before each run, with its quartiles, and
    `inside`, the ratio to the time spent in the network during the same run, so that drift between two runs does not count
    (CPU only).
    """
    network = UNet(sizes.network[1:], sizes.width, sizes.multipliers).to(device).eval()
    model = LearnedScore(network, VPSDE(), Noise(), sizes.network[1:])
    x = _images(sizes.network, device)
    rows, found = [], entries(sizes.network_steps)
    if device.type == "cuda":
        longer = entries(4 * sizes.network_steps)  # past the moves during which a graph is captured
        graphed = entries(4 * sizes.network_steps, cuda_graph=True)
        found = longer | {f"{name}, CUDA graph": entry for name, entry in graphed.items()}
    for name, entry in tqdm(found.items(), desc="network", disable=not progress, leave=False):
        rows.append({"sampler": name} | _beside_network(entry.sampler, model, x, sizes.few_rounds, device))
    return pd.DataFrame(rows)


@torch.no_grad()
def _beside_network(
    sampler: Sampler, model: LearnedScore, x: Tensor, rounds: int, device: torch.device
) -> dict[str, float]:
    run = partial(sampler.sample, model, x.shape, x_init=x, seed=0)
    level, calls = x.new_zeros(len(x)), run().nfe
    bare, taken, inside = [], [], []
    for _ in range(rounds):
        bare.append(elapsed(lambda: [model.network(x, level) for _ in range(calls)], device))
        watch = Stopwatch(model.network)
        taken.append(elapsed(run, device))
        watch.remove()
        inside.append(taken[-1] / watch.seconds)
    ratios = [one / other for one, other in zip(taken, bare, strict=True)]
    row = {"calls": calls, "ms": statistics.median(bare) / calls * 1e3} | spread(ratios)
    return row | {"inside": statistics.median(inside) if device.type == "cpu" else math.nan}


def tables(sizes: Sizes, device: torch.device, progress: bool = False) -> pd.DataFrame:
    """Milliseconds to build each predictor's table of coefficients; columns predictor, steps, ms."""
    sde, rows = VPSDE(), list[dict[str, Any]]()
    times = grids.log_snr(sde, sizes.table)
    found = {name: step for name, step in discover().items() if step.role == "predictor"}
    for name, step in tqdm(found.items(), desc="tables", disable=not progress, delay=1.0, leave=False):
        build = partial(step.plan, sde, times[:-1], times[1:])
        ms = race({"ms": build}, sizes.rounds, torch.device("cpu"))["ms"].median() * 1e3
        rows.append({"predictor": name, "steps": sizes.table, "ms": ms})
    return pd.DataFrame(rows)


# --- adaptive solvers -------------------------------------------------------------------------------------------------

Solver = Callable[[ScoreModel, Tensor], Tensor]
"""(model, x(t_max)) -> x(t_min)."""


def torchdiffeq_solver(rtol: float, atol: float) -> Solver:
    """torchdiffeq's dopri5 on the probability-flow ODE in x and t, kept from stepping past t_min."""
    from torchdiffeq import odeint

    def solve(model: ScoreModel, x: Tensor) -> Tensor:
        sde = model.sde

        def velocity(t: Tensor, state: Tensor) -> Tensor:
            at = float(t)
            return float(sde.drift(at)) * state - float(sde.diffusion(at)) ** 2 / 2 * model(state, at).score

        ends = torch.tensor([sde.t_max, sde.t_min], dtype=torch.float64, device=x.device)
        with torch.no_grad():
            return odeint(velocity, x, ends, rtol=rtol, atol=atol, method="dopri5", options={"step_t": ends[-1:]})[-1]

    return solve


def ode_solvers(rtol: float = 1e-5, atol: float = 1e-5) -> dict[str, Solver]:
    """AdaptiveODE, scipy's RK45 and, if installed, torchdiffeq's dopri5."""

    def of(solver: AdaptiveODE | ProbabilityFlowODE) -> Solver:
        return lambda model, x: solver.sample(model, x.shape, x_init=x).x

    found = {f"AdaptiveODE {method}": of(AdaptiveODE(method, rtol, atol)) for method in ("dopri5", "tsit5")}
    found["scipy RK45"] = of(ProbabilityFlowODE("RK45", rtol, atol))
    if importlib.util.find_spec("torchdiffeq") is not None:
        found["torchdiffeq dopri5"] = torchdiffeq_solver(rtol, atol)
    return found


def against_the_model(sizes: Sizes, device: torch.device, progress: bool = False) -> pd.DataFrame:
    """ODE solvers at rtol = atol = 1e-5 on the ring of eight Gaussians (weights 1 to 8, exact score, VP, float32).

    Columns: solver, batch, calls (mean per sample), rms (endpoint error against DOP853 at 1e-10, in data std), seconds,
    ratio (wall time over the time spent in the model) with its quartiles, and `batch_ratio`, wall time over `calls` times
    that of one model call with the whole batch, each sample at its own t.
    """
    model = ExactScore(targets.make("ring", weights=list(range(1, 9))), VPSDE())
    generator = torch.Generator().manual_seed(0)
    x = model.start(torch.randn(max(sizes.ode), 2, generator=generator))
    fewest = x[: min(sizes.ode)].double()
    known = ProbabilityFlowODE("DOP853", 1e-10, 1e-10).sample(model, fewest.shape, x_init=fewest).x
    return pd.DataFrame([
        row for batch in sizes.ode
        for row in _solved(model, x[:batch].to(device), known, sizes.few_rounds, progress)
    ])  # fmt: skip


def _solved(model: ScoreModel, x: Tensor, known: Tensor, rounds: int, progress: bool) -> list[dict[str, Any]]:
    solvers, found = ode_solvers(), []
    t = torch.linspace(model.sde.t_min, model.sde.t_max, len(x), dtype=torch.float64, device=x.device)
    for turn in tqdm(range(rounds + 1), desc=f"batch {len(x)}", disable=not progress, delay=1.0, leave=False):
        call = elapsed(lambda: model(x, t).denoised, x.device)
        for name, solver in solvers.items():
            found.append({"solver": name, "turn": turn, "call": call} | _attempt(solver, model, x, known))
    rows, frame = [], pd.DataFrame(found).query("turn > 0")
    for name, part in frame.groupby("solver", sort=False):
        row = {"solver": name, "batch": len(x), **part[["calls", "rms", "seconds"]].median()}
        rows.append(row | spread(part.ratio) | {"batch_ratio": (part.seconds / (part.calls * part.call)).median()})
    return rows


def _attempt(solver: Solver, model: ScoreModel, x: Tensor, known: Tensor) -> dict[str, float]:
    timed, ends = Timed(model), list[Tensor]()
    seconds = elapsed(lambda: ends.append(solver(timed, x)), x.device)
    rms = (ends[0][: len(known)].cpu() - known).square().mean().sqrt().item() / model.data_std
    inside = timed.seconds if x.device.type == "cpu" else math.nan
    return {"seconds": seconds, "ratio": seconds / inside, "calls": timed.samples / len(x), "rms": rms}


def against_batch_noise(sizes: Sizes, device: torch.device, progress: bool = False) -> pd.DataFrame:
    """The time of one draw over that of one of BatchNoise; columns noise, ms, ratio with its quartiles."""
    sources: dict[str, NoiseSource] = {"BatchNoise": BatchNoise(0), "SampleNoise": SampleNoise(range(sizes.loop[0]))}
    streams = {name: source.open(sizes.loop, torch.float32, device) for name, source in sources.items()}
    seconds = race({name: partial(stream, 1, 0) for name, stream in streams.items()}, 3 * sizes.rounds, device)
    return pd.DataFrame([
        {"noise": name, "ms": seconds[name].median() * 1e3} | spread(seconds[name] / seconds["BatchNoise"])
        for name in streams
    ])  # fmt: skip


# --- all of it --------------------------------------------------------------------------------------------------------


PARTS: Mapping[str, Callable[[Sizes, torch.device, bool], pd.DataFrame]] = {
    "loop": against_a_loop, "network": against_the_network, "tables": tables, "ode": against_the_model,
    "noise": against_batch_noise,
}  # fmt: skip


def benchmark(
    parts: Sequence[str] = tuple(PARTS), device: str = "cpu", sizes: Sizes | None = None, progress: bool = False
) -> dict[str, pd.DataFrame]:
    """The tables named in `parts`, of "loop", "network", "tables", "ode" and "noise".

    Raises:
        ValueError: a part is unknown, or there is none.
    """
    for part in parts:
        one_of("part", part, PARTS)
    if not parts:
        raise ValueError(f"parts is empty: give some of {', '.join(PARTS)}")
    return {part: PARTS[part](sizes or Sizes(), torch.device(device), progress) for part in parts}


def machine(device: str = "cpu") -> dict[str, Any]:
    """The machine on which the figures were measured."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _processor()
    return {"device": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
            "python": platform.python_version(), "system": platform.platform(), "load": os.getloadavg()[0]}  # fmt: skip


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _images(shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator(device).manual_seed(0), device=device)

"""The trainer: resume is exact, kills lose nothing, non-finite steps are skipped, metrics mean what they say."""

from __future__ import annotations

import io
import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image
from torch import nn

from score_sde import grid
from score_sde import sde as sdes
from score_sde.classifier import NoisyClassifier
from score_sde.data import Batch, Data, TensorData, measure_sigma_data
from score_sde.keyed import generator
from score_sde.networks import MLP
from score_sde.parameterization import Denoised, Karras, Noise
from score_sde.sampler import Sampler
from score_sde.score import LearnedScore
from score_sde.steps import RectifiedAdams
from score_sde.training import (
    Checkpoints,
    DenoisingScoreMatching,
    DivergenceError,
    ImportanceTimes,
    LadderTimes,
    Losses,
    NoisyCrossEntropy,
    Times,
    Trainer,
    UniformTimes,
    VariationalObjective,
    checkpoint,
)
from score_sde.training.draws import rows_of
from score_sde.training.interrupt import NOTED, hand_on


def weights(directory: Path, step: int | None = None, ema: bool = True) -> dict[str, torch.Tensor]:
    return Checkpoints(directory / "checkpoints").weights(step, ema=ema)


def rows(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(one: Path, other: Path) -> None:
    for ema in (False, True):
        first, second = weights(one, ema=ema), weights(other, ema=ema)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    tiny.train(directory)
    return directory


class Interrupting(Data):
    """Data that send the process a signal, or raise, when a certain step's batch is asked for."""

    def __init__(self, step: int, signals: int = 0) -> None:
        self.inner, self.step, self.signals = tiny.data(), step, signals
        self.event_shape, self.size = self.inner.event_shape, self.inner.size

    def batch(self, step: int, batch_size: int) -> Batch:
        if step == self.step and not self.signals:
            raise KeyboardInterrupt
        if step == self.step:
            os.kill(os.getpid(), self.signals)
        return self.inner.batch(step, batch_size)

    def reference(self, count: int) -> Batch:
        return self.inner.reference(count)


@pytest.mark.parametrize("dies_at", [3, 7, 18, 39])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, uninterrupted, dies_at):
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tmp_path, data=Interrupting(dies_at))
    torch.manual_seed(dies_at)  # the global generator must not matter
    result = tiny.train(tmp_path, model=tiny.model(seed=0 if dies_at == 3 else 9), resume=True)
    assert result.step == 40
    assert_same_weights(tmp_path, uninterrupted)
    resumed, whole = ([{**row, "examples_per_second": 0} for row in rows(run)] for run in (tmp_path, uninterrupted))
    assert resumed == whole  # also the means of a row that the kill cut in two


def test_a_network_in_half_precision_resumes_with_every_digit_of_its_average(tmp_path):
    """The average is kept in single precision, which the network itself cannot hold."""
    half = {"model": tiny.model().to(torch.bfloat16), "data": Interrupting(18)}
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tmp_path / "killed", **half)
    for name, resume in (("killed", True), ("whole", False)):
        tiny.train(tmp_path / name, model=tiny.model().to(torch.bfloat16), resume=resume)
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:training was interrupted")
@pytest.mark.parametrize("number", NOTED)
def test_a_signal_writes_a_checkpoint_and_ends_the_run(tmp_path, uninterrupted, number):
    before = signal.getsignal(number)
    result = tiny.train(tmp_path, data=Interrupting(17, signals=number))
    assert (result.step, result.interrupted) == (18, number)
    assert Checkpoints(tmp_path / "checkpoints").latest() == 18
    assert signal.getsignal(number) is before
    assert tiny.train(tmp_path, resume=True).interrupted is None
    assert_same_weights(tmp_path, uninterrupted)


@pytest.mark.filterwarnings("ignore:training was interrupted")
def test_a_launcher_s_own_handler_has_its_signal_once_the_run_has_ended(tmp_path):
    heard, usual = [], signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        result = tiny.train(tmp_path, data=Interrupting(17, signals=signal.SIGUSR2))
        assert heard == []
        hand_on(result.interrupted)
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, usual)
    hand_on(signal.SIGUSR2)  # the system's, which would end this process, is left alone


def test_what_follows_a_refusal_has_not_begun(tmp_path):
    begun = []
    tiny.train(tmp_path, on_start=lambda: begun.append(1))
    assert begun == [1]
    for options in ({}, {"resume": True, "seed": 1}):
        with pytest.raises(ValueError, match=r"checkpoints up to step 40|seed=1"):
            tiny.train(tmp_path, on_start=lambda: begun.append(2), **options)
    assert begun == [1]


@pytest.mark.filterwarnings("ignore:training was interrupted")
def test_a_signal_while_samples_are_drawn_also_writes_a_checkpoint(tmp_path):
    result = tiny.train(
        tmp_path,
        tiny.trainer(sample_every=10),
        on_sample=lambda step, raw, averaged: os.kill(os.getpid(), signal.SIGTERM),
    )
    assert (result.step, Checkpoints(tmp_path / "checkpoints").latest()) == (10, 10)


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_instants_and_resumed_to_identical_weights(tmp_path, kills):
    chance = random.Random(kills)
    killed, whole, steps = tmp_path / "killed", tmp_path / "whole", 200 * kills
    saved = Checkpoints(killed / "checkpoints")
    reference = start(whole, steps)
    for _ in range(kills):
        process, before, deadline = start(killed, steps), saved.latest() or 0, time.monotonic() + 60
        while (saved.latest() or 0) <= before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert before < (saved.latest() or 0) < steps
    assert start(killed, steps).wait() == 0
    assert reference.wait() == 0
    assert_same_weights(killed, whole)
    assert [row["step"] for row in rows(killed)] == list(range(5, steps + 1, 5))


def start(directory: Path, steps: int) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, tiny.__file__, str(directory), str(steps)], env=environment)


def test_a_half_written_checkpoint_is_never_picked_up(tmp_path, monkeypatch, uninterrupted):
    real = checkpoint.save_file
    calls = []

    def dying(tensors, path):
        calls.append(path)
        if len(calls) == 6:  # the averaged weights of the third checkpoint
            raise KeyboardInterrupt
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", dying)
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tmp_path)
    folder = tmp_path / "checkpoints"
    assert Checkpoints(folder).steps() == [7, 14]
    assert any(path.name.startswith(".partial") for path in folder.iterdir())
    tiny.train(tmp_path, resume=True)
    assert_same_weights(tmp_path, uninterrupted)
    assert sorted(path.name for path in folder.iterdir()) == ["step-000000035", "step-000000040"]


@pytest.mark.parametrize("kind", ["weights", "state"])
def test_a_disk_that_is_full_is_an_error_of_the_system(tmp_path, kind):
    large = torch.zeros(10_000)
    parts = ({"ema": {"w": large}}, None) if kind == "weights" else ({}, {"w": large})
    own = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, own[1]))
    try:
        with pytest.raises(OSError, match="could not be written: is the disk full"):
            Checkpoints(tmp_path).save(3, *parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, own)
    assert Checkpoints(tmp_path).latest() is None
    Checkpoints(tmp_path).save(3, *parts)
    assert Checkpoints(tmp_path).latest() == 3


def test_metrics_cut_short_by_a_kill_are_repaired(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        tiny.train(tmp_path, data=Interrupting(33))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    tiny.train(tmp_path, resume=True)
    assert [row["step"] for row in rows(tmp_path)] == [5, 10, 15, 20, 25, 30, 35, 40]
    names = {"step", "loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "lr", "grad_norm", "examples_per_second"}
    assert all(names <= row.keys() for row in rows(tmp_path))


class Level(nn.Module):
    """A network whose output is constant."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x, c_noise):
        return x * 0 + self.shift


def test_quartiles_of_the_loss_are_those_of_the_noise_level(tmp_path):
    # x_0 = 0, F = shift = 0 under Denoised-like weights: with the noise parameterization the loss is |eps|^2, so the
    # weight alone tells the levels apart. A weighting that returns 1 + the quartile of t must come back as 1, 2, 3, 4.
    class Stairs:
        def __call__(self, sde, t):
            snr = (2 * sde.half_log_snr(t)).exp()
            return snr * (1 + (4 * (t - sde.t_min) / (sde.t_max - sde.t_min)).floor())

    model = LearnedScore(Level(), sdes.VPSDE(), Noise(), (500,))
    settings = tiny.trainer(steps=10, log_every=10, learning_rate=1e-12, batch_size=64)
    zeros = TensorData(torch.zeros(64, 500))
    tiny.train(tmp_path, settings, model=model, data=zeros, objective=DenoisingScoreMatching(Stairs()))
    (row,) = rows(tmp_path)
    for quartile in (1, 2, 3, 4):  # 80,000 squared normals: relative standard error 0.005
        assert row[f"loss_q{quartile}"] == pytest.approx(quartile, rel=0.025)
    assert row["loss"] == pytest.approx(2.5, rel=0.02)


class Poisoned(Interrupting):
    """Batches of NaN at the given steps."""

    def __init__(self, *steps: int, interrupted_at: int = -1) -> None:
        super().__init__(interrupted_at, signal.SIGTERM)
        self.steps = steps

    def batch(self, step: int, batch_size: int) -> Batch:
        batch = super().batch(step, batch_size)
        return Batch(batch.x * math.nan) if step in self.steps else batch


def test_a_non_finite_step_is_skipped_counted_and_survived(tmp_path):
    settings = tiny.trainer(steps=12, log_every=4, checkpoint_every=1, keep_checkpoints=12)
    tiny.train(tmp_path, settings, data=Poisoned(5))
    assert [row["nonfinite"] for row in rows(tmp_path)] == [0, 1, 1]
    assert all(math.isfinite(row[name]) for row in rows(tmp_path) for name in ("loss", "loss_q1", "grad_norm"))
    before, after, later = (weights(tmp_path, step, ema=False) for step in (5, 6, 7))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(after[name], later[name]) for name in before)
    states = [Checkpoints(tmp_path / "checkpoints").state(step) for step in (5, 6)]
    moments = [state["optimizer"]["state"][0] for state in states]
    assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


def test_too_many_non_finite_steps_stop_the_run_with_the_last_checkpoint_kept(tmp_path):
    poison = Poisoned(*range(16, 40))
    with pytest.raises(DivergenceError, match=r"4 non-finite losses by step 20, max_nonfinite=3 .*step-000000014"):
        tiny.train(tmp_path, tiny.trainer(max_nonfinite=3), data=poison)
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path).values())
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.filterwarnings("ignore:training was interrupted")
def test_the_count_of_non_finite_steps_survives_a_resume(tmp_path):
    poison = Poisoned(4, 12, interrupted_at=13)
    tiny.train(tmp_path, data=poison)
    tiny.train(tmp_path, data=tiny.data(), resume=True)
    assert rows(tmp_path)[-1]["nonfinite"] == 2


@pytest.mark.parametrize(
    ("sde", "parameterization"),
    [(sdes.CosineSDE(), Noise()), (sdes.VPSDE(beta_max=19.0), Noise()), (sdes.VPSDE(), Denoised())],
)
def test_a_run_of_another_process_is_not_resumed(tmp_path, sde, parameterization):
    tiny.train(tmp_path, tiny.trainer(8))
    network = tiny.model().network
    with pytest.raises(ValueError, match=r"the run was started with VPSDE\(.*\) and Noise\(.*, not with"):
        tiny.train(tmp_path, model=LearnedScore(network, sde, parameterization, (2,)), resume=True)
    assert tiny.train(tmp_path, model=LearnedScore(network, sdes.VPSDE(), Noise(), (2,)), resume=True).step == 40


def test_hooks_that_would_never_be_called_are_refused(tmp_path):
    for name in ("sample", "evaluate"):
        with pytest.raises(ValueError, match=f"on_{name} is never called with {name}_every=0"):
            tiny.train(tmp_path, **{f"on_{name}": lambda step, raw, averaged: {}})


def test_times_that_the_process_does_not_have_are_refused(tmp_path):
    class Beyond(UniformTimes):
        def quantile(self, sde, u):
            return 3 * u

    with pytest.raises(ValueError, match="Beyond draws times from"):
        tiny.train(tmp_path, time_sampler=Beyond())


def test_learning_rate_rises_then_follows_its_schedule():
    cosine = Trainer(steps=100, batch_size=1, warmup=10, learning_rate=2.0)
    constant = Trainer(steps=100, batch_size=1, warmup=10, learning_rate=2.0, schedule="constant")
    assert [constant.rate(n) for n in (0, 4, 9, 10, 99)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])
    assert cosine.rate(50) == pytest.approx(1.0)
    assert cosine.rate(75) == pytest.approx(1 - math.sqrt(0.5))
    assert cosine.rate(99) == pytest.approx(1 - math.cos(math.pi / 100), rel=1e-6)
    own = Trainer(steps=100, batch_size=1, warmup=0, learning_rate=2.0, schedule=lambda done: 1 - done)
    assert [own.rate(step) for step in (0, 25, 75)] == [2.0, 1.5, 0.5]


def test_gradients_are_clipped_and_the_logged_norm_is_the_one_before(tmp_path):
    settings = tiny.trainer(steps=1, gradient_clip=1e-3)
    model = tiny.model()
    tiny.train(tmp_path, settings, model=model)
    clipped = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert clipped.item() == pytest.approx(1e-3, rel=1e-3)
    assert rows(tmp_path)[0]["grad_norm"] > 1e-2


def test_samples_are_asked_for_from_raw_and_averaged_models_in_evaluation_mode(tmp_path):
    calls = []

    def hook(step, raw, averaged):
        assert not raw.training
        assert not averaged.training
        different = any((a != b).any() for a, b in zip(raw.parameters(), averaged.parameters(), strict=True))
        calls.append((step, different))
        torch.manual_seed(0)  # must not disturb the run

    tiny.train(tmp_path / "a", tiny.trainer(sample_every=10), on_sample=hook)
    tiny.train(tmp_path / "b")
    assert calls == [(step, True) for step in (10, 20, 30, 40)]
    assert_same_weights(tmp_path / "a", tmp_path / "b")


def test_each_step_has_a_dropout_mask_of_its_own(tmp_path):
    masks = []
    model = tiny.model()
    dropout = model.network.blocks[0].branch[1]
    dropout.register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    tiny.train(tmp_path, tiny.trainer(steps=5), model=model)
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 5


def test_the_callers_global_generator_is_left_alone(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    tiny.train(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_it_learns(tmp_path):
    # The exact noise predictor of N(0, I) has loss E alpha^2 = 0.2; F = 0 has 1.
    settings = tiny.trainer(steps=200, batch_size=64, learning_rate=3e-3, log_every=100)
    tiny.train(tmp_path, settings, data=TensorData(torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))))
    assert rows(tmp_path)[-1]["loss"] < 0.5


def test_mixed_precision_keeps_weights_in_float32(tmp_path):
    result = tiny.train(tmp_path, tiny.trainer(precision="bf16-mixed"))
    assert all(p.dtype == torch.float32 for p in result.model.parameters())
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path))


def test_tensorboard_files_are_written_on_demand(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    colour = (10, 200, 30)
    Image.new("RGB", (6, 4), colour).save(tmp_path / "sheet.png")
    trainer = tiny.trainer(steps=10, tensorboard=True, sample_every=5)
    tiny.train(tmp_path, trainer, on_sample=lambda step, raw, averaged: {"samples": tmp_path / "sheet.png"})
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(board.Tags()["scalars"]) == rows(tmp_path)[0].keys() - {"step"}
    assert [event.step for event in board.Scalars("loss")] == [5, 10]
    pictures = board.Images("samples")
    assert [event.step for event in pictures] == [5, 10]
    shown = Image.open(io.BytesIO(pictures[0].encoded_image_string))
    assert shown.size == (6, 4)
    assert shown.getpixel((3, 2)) == colour


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps >= 1, got steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"learning_rate": -1.0}, "learning_rate > 0, got learning_rate=-1.0"),
        ({"schedule": "linear"}, "schedule is one of constant, cosine; got 'linear'"),
        ({"device": "tpu"}, "device is one of auto, cpu, cuda; got 'tpu'"),
        ({"precision": "fp16"}, "precision is one of 32-true, bf16-mixed, 16-mixed; got 'fp16'"),
        ({"gradient_clip": 0.0}, "gradient_clip=0.0"),
        ({"max_nonfinite": -1}, "max_nonfinite=-1"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(**({"steps": 1, "batch_size": 1} | options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="use device='auto' or 'cpu'"):
        Trainer(steps=1, batch_size=1, device="cuda")


def on_ladder() -> LearnedScore:
    return LearnedScore(MLP((2,)), sdes.DiscreteSDE.ddpm(100), Noise(), (2,))


def labelled() -> TensorData:
    return TensorData(torch.randn(30, 2), torch.arange(30) % 3)


def classifier() -> NoisyClassifier:
    network = nn.Linear(2, 3)
    network.num_classes = 3
    network.forward = lambda x, c_noise: x
    return NoisyClassifier(network, sdes.VPSDE(), Noise(), (2,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": TensorData(torch.zeros(4, 3))}, r"event shape \(3,\), the model \(2,\)"),
        ({"data": labelled()}, "labels of 3 classes, the network knows 0: set network.num_classes=3"),
        (
            {
                "data": labelled(),
                "model": LearnedScore(MLP((2,), num_classes=2), sdes.VPSDE(), Noise(), (2,)),
            },
            "the network knows 2",
        ),
        ({"model": classifier(), "objective": NoisyCrossEntropy()}, "trained on labelled data: set data.labels=true"),
        ({"time_sampler": LadderTimes()}, "VPSDE has no ladder"),
        ({"objective": VariationalObjective()}, "VPSDE has no ladder: take a DiscreteSDE"),
        (
            {"objective": VariationalObjective(), "model": on_ladder()},
            "the times drawn are not its indices: use time_sampler=ladder",
        ),
        (
            {"objective": VariationalObjective(), "model": on_ladder(), "time_sampler": LadderTimes()},
            "variance='learned' needs a network with a variance head",
        ),
        ({"objective": NoisyCrossEntropy()}, "trains a classifier, and this model is a score model"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        tiny.train(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_directory_with_checkpoints_is_not_overwritten(tmp_path):
    tiny.train(tmp_path)
    with pytest.raises(ValueError, match="checkpoints up to step 40: resume it, or choose a new directory"):
        tiny.train(tmp_path)
    with pytest.raises(ValueError, match="seed=1, but the run was started with 0"):
        tiny.train(tmp_path, resume=True, seed=1)
    with pytest.raises(ValueError, match="examples=70, but the run was started with 50"):
        tiny.train(tmp_path, resume=True, data=TensorData(torch.zeros(70, 2)))
    wider = LearnedScore(MLP((2,), width=32, depth=2, frequencies=4), sdes.VPSDE(), Noise(), (2,))
    wider.network.blocks[0].branch.insert(1, torch.nn.Dropout(0.2))
    with pytest.raises(
        ValueError, match=r"of another network than this model's: size mismatch for network\."
    ) as refusal:
        tiny.train(tmp_path, resume=True, model=wider)
    assert "\n" not in str(refusal.value)


def test_labels_reach_the_network(tmp_path):
    model = LearnedScore(MLP((2,), width=8, depth=1, num_classes=3), sdes.VPSDE(), Noise(), (2,))
    start = model.network.embedding.label.weight.detach().clone()
    objective = DenoisingScoreMatching(label_dropout=0.5)
    tiny.train(tmp_path, data=labelled(), model=model, objective=objective, time_sampler=UniformTimes())
    assert ((model.network.embedding.label.weight - start).abs().amax(1) > 0).all()


def test_missing_checkpoints_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        Checkpoints(tmp_path).path()
    tiny.train(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"\[35, 40\], none of step 3"):
        Checkpoints(tmp_path / "checkpoints").weights(3)


def test_a_start_that_is_narrower_than_the_data_is_said_before_training():
    """Data of standard deviation 50 have a spread of 70.7 at VE's greatest noise level of 50."""
    data, wide = tiny.data(), LearnedScore(MLP((2,)), sdes.VESDE(), Karras(50.0), (2,))
    with pytest.warns(
        UserWarning,
        match=r"spread of 50 at t_max, .* deviation 50 \(the model's data_std\) have 70.7",
    ):
        tiny.trainer(1).fit(wide, data, DenoisingScoreMatching(), UniformTimes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        usual = LearnedScore(MLP((2,)), sdes.VESDE(), Karras(10.0), (2,))
        tiny.trainer(1).fit(usual, data, DenoisingScoreMatching(), UniformTimes())


def test_data_narrower_than_the_least_noise_are_said_before_training():
    """Tweedie's formula at s leaves v / sqrt(v + s^2) of a spread sqrt(v): VE's 0.01 over data of 0.01 leaves 1 / sqrt(2)."""
    data, narrow = tiny.data(), LearnedScore(MLP((2,)), sdes.VESDE(), Karras(0.01), (2,))
    with pytest.warns(
        UserWarning, match=r"is 0.01, where data have a standard deviation of 0.01: samples will be 1.41 times"
    ):
        tiny.trainer(1).fit(narrow, data, DenoisingScoreMatching(), UniformTimes())


@pytest.mark.parametrize(
    ("event", "scales", "says"),
    [
        ((4,), [2, 0.002, 0.5, 0], r"coordinates \[1\] vary .*\(standard deviation 0\.00\d+ beside [12].*x\.std\(0\)"),
        ((3, 4, 4), [0.1, 3, 0.2], r"channels \[0\] vary .* / x\.std\(\(0, 2, 3\), keepdims=True\)"),
        ((10,), [100, *[1] * 9], r"coordinates \[1, 2, 3, 4, 5, 6, 7, 8\] and 1 more vary"),
        ((4,), [1, 0.1, 1, 0], None),
        ((3, 4), [1, 0.1, 0], None),
    ],
)
def test_scales_that_are_far_apart_are_said_before_training(event, scales, says):
    scale = torch.tensor(scales, dtype=torch.float32).view(-1, *[1] * (len(event) - 1))
    x = scale * torch.randn(300, *event, generator=torch.Generator().manual_seed(0)) + 5
    model = LearnedScore(MLP(event, width=8), sdes.VPSDE(), Karras(1.0), event)
    said = pytest.warns(UserWarning, match=says) if says else warnings.catch_warnings(action="error")
    with said:
        tiny.trainer(1).fit(model, TensorData(x), DenoisingScoreMatching(), UniformTimes())


@pytest.mark.parametrize(
    ("scale", "says"), [(100, r"square of \d+\S*, the model a data_std of 1,"), (1, None), (0.01, "square of 0.0")]
)
def test_data_of_another_size_than_the_models_are_said_before_training(scale, says):
    """Pixels 0..255 as floats, say, which nothing brings to [-1, 1], under a parameterization left at sigma_data=1."""
    x = scale * torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    model = LearnedScore(MLP((2,), width=8), sdes.VPSDE(), Noise(), (2,))
    fit = partial(
        tiny.trainer(1).fit, data=TensorData(x), objective=DenoisingScoreMatching(), time_sampler=UniformTimes()
    )
    with pytest.warns(UserWarning, match=says) if says else warnings.catch_warnings(action="error"):
        fit(model)
    model.parameterization = Noise(measure_sigma_data(TensorData(x)))
    with warnings.catch_warnings(action="error"):
        warnings.filterwarnings("ignore", message="where samples start|sampling starts|the least noise")
        fit(model)


def test_the_default_network_learns_the_sides_of_a_square():
    """Behind a LayerNorm its output told directions alone: one sample in thirty lay beyond, as those of a Gaussian do."""
    x = (2 * torch.rand(20_000, 2, generator=torch.Generator().manual_seed(0)) - 1) * 3**0.5
    torch.manual_seed(0)
    model = LearnedScore(MLP((2,), width=64, depth=3), sdes.VPSDE(), Karras(1.0), (2,))
    settings = Trainer(steps=800, batch_size=256, learning_rate=2e-3, ema_half_life=10_000, progress=False)
    trained = settings.fit(model, TensorData(x), DenoisingScoreMatching(), ImportanceTimes()).model
    sampler = Sampler(RectifiedAdams(3), partial(grid.hyperbolic, steps=15), final="none")
    samples = sampler.sample(trained, (4000, 2), seed=0).x
    assert (samples.abs() > 1.1 * 3**0.5).float().mean() < 0.02


# --- held-out examples ------------------------------------------------------------------------------------------------


def held_out(**options) -> TensorData:
    return TensorData(torch.randn(70, 2, generator=torch.Generator().manual_seed(0)), held_out=0.3, **options)


def losses(rows: list[dict]) -> dict[int, float]:
    return {row["step"]: row["loss_held_out"] for row in rows if "loss_held_out" in row}


def test_the_held_out_loss_is_that_of_the_average_on_what_training_does_not_see():
    data, settings = held_out(), tiny.trainer(20, test_every=10, batch_size=16)
    result = tiny.train(None, settings, data=data)
    x, found = data.reference(64).x, []
    assert len(x) == 21
    for first in (0, 16):
        source = generator(0, "held out", first)
        times = UniformTimes()(result.model.sde, 16, source)
        part = Batch(x[first : first + 16])
        rows = slice(0, len(part.x))
        times = Times(times.t[rows], times.u[rows], times.weight[rows])
        with torch.no_grad():
            found.append(DenoisingScoreMatching()(result.model, part, times, rows_of(source, 16, rows)).loss)
    known = losses(result.metrics)
    assert list(known) == [10, 20]
    assert known[20] == pytest.approx(torch.cat(found).mean().item(), rel=1e-6)
    assert known[10] != known[20]


def test_the_next_row_has_the_held_out_loss_and_other_rows_and_data_have_none():
    assert list(losses(tiny.train(None, tiny.trainer(40, log_every=9, test_every=10), data=held_out()).metrics)) == [
        18, 27, 36, 40,
    ]  # fmt: skip
    assert not losses(tiny.train(None, tiny.trainer(20, test_every=0), data=held_out()).metrics)
    assert not losses(tiny.train(None, tiny.trainer(20, test_every=5)).metrics)


def test_looking_at_held_out_examples_changes_no_weight_and_micro_batches_no_loss():
    settings = [tiny.trainer(20), tiny.trainer(20, test_every=5), tiny.trainer(20, test_every=5, accumulate=2)]
    plain, tested, parted = (tiny.train(None, each, data=held_out()) for each in settings)
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, tested.model.state_dict()[name])
    assert losses(parted.metrics) == pytest.approx(losses(tested.metrics), rel=1e-3)


def test_an_objective_may_differentiate_by_held_out_examples():
    def hyvarinen(model, batch, times, generator) -> Losses:
        x = batch.x.clone().requires_grad_()
        score = model(x, times.t).score
        curvature = torch.autograd.grad(score.sum(), x, create_graph=True)[0].sum(1)
        return Losses(score.square().sum(1) / 2 + curvature)

    result = tiny.train(None, tiny.trainer(10, test_every=5), data=held_out(), objective=hyvarinen)
    assert list(losses(result.metrics)) == [5, 10]


def test_patience_ends_a_run_whose_held_out_loss_falls_no_more(tmp_path):
    options = {"learning_rate": 1e-30, "test_every": 5, "patience": 3}  # whatever the loss is, it stays so
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ended = tiny.train(tmp_path, tiny.trainer(400, **options), data=held_out())
    known = losses(rows(tmp_path))
    assert ended.step == max(known) < 400
    assert min(list(known.values())[-3:]) >= min(list(known.values())[:-3])
    assert not ended.interrupted
    again = tiny.train(tmp_path, tiny.trainer(400, **options), data=held_out(), resume=True)
    assert again.step == ended.step
    assert len(losses(tiny.train(None, tiny.trainer(60, test_every=5, patience=50), data=held_out()).metrics)) == 12


def test_patience_without_anything_held_out_is_refused():
    with pytest.raises(ValueError, match="test_every=0 computes none"):
        tiny.trainer(40, patience=2, test_every=0)
    with pytest.raises(ValueError, match="hold nothing out"):
        tiny.train(None, tiny.trainer(40, patience=2))

"""What the trainer offers beyond one float32 loop: micro-batches, Muon, loss scales, layouts, utilisation, no folder."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from torch import nn

from score_sde.data import Batch, TensorData
from score_sde.networks import MLP, NCSN, Dropout, UNet
from score_sde.parameterization import Noise
from score_sde.score import LearnedScore
from score_sde.sde import VPSDE
from score_sde.training import Checkpoints, DenoisingScoreMatching, Trainer, UniformTimes, draw
from score_sde.training.draws import rows_of
from score_sde.training.optimizers import Optimizer, hidden_matrices
from score_sde.training.precision import LossScale
from score_sde.training.state import channels_last
from score_sde.training.throughput import flops_per_example, peak_flops


def images() -> LearnedScore:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = NCSN((2, 8, 8), width=8, frequencies=4)
    return LearnedScore(network, VPSDE(), Noise(), (2, 8, 8))


def pictures() -> TensorData:
    return TensorData(torch.randn(32, 2, 8, 8, generator=torch.Generator().manual_seed(0)))


def plain() -> LearnedScore:
    """The tiny model, whose dropout has a mask for each example instead of torch's."""
    model = tiny.model()
    model.network.blocks[0].branch[1] = Dropout(0.2)
    return model


def fitted(model: LearnedScore, data: TensorData, **options) -> list[torch.Tensor]:
    tiny.trainer(**({"steps": 8} | options)).fit(model, data, DenoisingScoreMatching(), UniformTimes())
    return [p.detach() for p in model.parameters()]


def test_draws_of_rows_are_the_rows_of_the_draw():
    source = torch.Generator().manual_seed(5)
    whole = draw(torch.randn, (6, 3), torch.Generator().manual_seed(5))
    probes = draw(torch.randn, (2, 6, 3), torch.Generator().manual_seed(5))
    for rows in (slice(0, 2), slice(2, 5), slice(5, 6)):
        size = rows.stop - rows.start
        assert torch.equal(draw(torch.randn, (size, 3), rows_of(source, 6, rows)), whole[rows])
        assert torch.equal(draw(torch.randn, (2, size, 3), rows_of(source, 6, rows), dim=1), probes[:, rows])


@pytest.mark.parametrize("parts", [2, 16])
def test_micro_batches_give_the_weights_of_the_whole_batch(parts):
    whole, cut = (fitted(plain(), tiny.data(), accumulate=k) for k in (1, parts))
    assert max((a - b).abs().max() for a, b in zip(whole, cut, strict=True)) < 1e-6


def test_training_without_a_directory_writes_nothing_and_returns_its_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = tiny.trainer(10).fit(tiny.model(), tiny.data(), DenoisingScoreMatching(), UniformTimes())
    assert [row["step"] for row in result.metrics] == [5, 10]
    assert list(tmp_path.iterdir()) == []


def test_the_rows_of_a_training_that_goes_on_begin_with_the_old_ones(tmp_path):
    for steps, expected in ((10, [5, 10]), (20, [5, 10, 15, 20]), (20, [5, 10, 15, 20])):
        result = tiny.train(tmp_path, tiny.trainer(steps), resume=True)
        assert [row["step"] for row in result.metrics] == expected


def test_evaluations_join_the_rows_of_metrics():
    def measure(step: int, raw: LearnedScore, averaged: LearnedScore) -> dict[str, float]:
        assert not raw.training
        return {"eval/twice": 2.0 * step}

    trainer = tiny.trainer(20, evaluate_every=10)
    result = trainer.fit(
        tiny.model(), tiny.data(), DenoisingScoreMatching(), UniformTimes(), on_evaluate=measure
    )  # fmt: skip
    assert [row.get("eval/twice") for row in result.metrics] == [None, 20.0, None, 40.0]


def test_the_loss_scale_halves_at_an_overflow_and_doubles_after_an_interval():
    scale = LossScale(torch.device("cpu"), start=8.0, interval=3)
    seen = []
    for good in (True, True, False, True, True, True, True, False, False, False, False, False, False):
        scale.update(torch.tensor(good))
        seen.append(float(scale.scale))
    assert seen == [8, 8, 4, 4, 4, 8, 8, 4, 2, 1, 1, 1, 1]


def test_muon_takes_hidden_matrices_and_leaves_what_faces_the_data():
    network = MLP((2,), width=16, depth=1, frequencies=4, num_classes=3)
    taken = {
        n for (n, p), hidden in zip(network.named_parameters(), hidden_matrices(network, 2), strict=True) if hidden
    }
    names = {name for name, p in network.named_parameters() if p.ndim > 1}
    first = {f"first.{part}.weight" for part in ("linear", "wave", "gain", "out")}
    assert names - taken == {"embedding.label.weight", "last.weight"} | first
    convolutions = images().network
    hidden = hidden_matrices(convolutions, 2)
    assert not any(h for h, p in zip(hidden, convolutions.parameters(), strict=True) if 2 in p.shape[:2])
    assert any(h for h, p in zip(hidden, convolutions.parameters(), strict=True) if p.ndim == 4)
    for whole in (
        MLP((1, 8, 8)),
        UNet((3, 8, 8), width=16, learned_variance=True),
        UNet.edm2((3, 8, 8), width=16, attention=()),
    ):
        names = [
            n for (n, _), hidden in zip(whole.named_parameters(), hidden_matrices(whole, 3), strict=True) if hidden
        ]
        assert names
        assert not [n for n in names if n.partition(".")[0] in ("first", "last")]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_muon_step_has_orthogonal_direction_and_the_size_of_an_adamw_step(layout):
    # The factor of a matrix (out, in) with singular values about 1 has root mean square max(out, in)^(-1/2), and the
    # update 0.2 rate; a momentum that has seen one gradient points along it.
    weight = nn.Parameter(torch.zeros(6, 4, 3, 3).to(memory_format=layout))
    optimizer = Optimizer("muon", [weight, nn.Parameter(torch.zeros(3))], [True, False], (0.9, 0.999), 0.0)
    gradient = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    weight.grad = gradient.to(memory_format=layout)
    optimizer.step(0.1, torch.tensor(True))
    update = weight.detach().flatten(1).double()
    assert update.square().mean().sqrt().item() == pytest.approx(0.2 * 0.1, rel=0.25)
    singular = torch.linalg.svdvals(update)
    assert singular.max() / singular.min() < 1.8
    u, _, v = torch.linalg.svd(gradient.flatten(1).double(), full_matrices=False)
    exact = -(u @ v)
    assert torch.cosine_similarity(update.flatten(), exact.flatten(), dim=0) > 0.98
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, torch.nan)
    optimizer.step(0.1, torch.tensor(False))
    assert torch.equal(weight, before)
    assert all(state["momentum_buffer"].isfinite().all() for state in optimizer.muon.state.values())


def test_muon_learns_and_resumes_exactly(tmp_path):
    options = {"optimizer": "muon", "schedule": "constant", "steps": 12}
    tiny.train(tmp_path / "whole", tiny.trainer(**options))
    tiny.train(tmp_path / "cut", tiny.trainer(**(options | {"steps": 5})))
    tiny.train(tmp_path / "cut", tiny.trainer(**options), resume=True)
    first, second = (Checkpoints(tmp_path / name / "checkpoints").weights(ema=False) for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ValueError, match="the run was started with muon"):
        tiny.train(tmp_path / "cut", tiny.trainer(steps=20), resume=True)


def test_channels_last_changes_the_layout_and_not_the_weights():
    usual, last = images(), images()
    first = fitted(usual, pictures())
    second = fitted(last, pictures(), channels_last=True)
    assert any(p.ndim == 4 and not p.is_contiguous() for p in second)
    assert max((a - b).abs().max() for a, b in zip(first, second, strict=True)) < 1e-4


def test_channels_last_of_a_video_network_keeps_its_output():
    network = UNet((2, 4, 4, 4), width=8, multipliers=(1,), blocks=1, attention=()).eval()
    x, c_noise = torch.randn(2, 2, 4, 4, 4), torch.zeros(2)
    nn.init.normal_(network.last[-1].weight)
    before = network(x, c_noise)
    channels_last(network)
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in network.parameters() if p.ndim == 5)
    assert any(not p.is_contiguous() for p in network.parameters())
    torch.testing.assert_close(network(x, c_noise), before, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_and_eager_training_agree():
    eager, compiled = (fitted(plain(), tiny.data(), compile=flag) for flag in (False, True))
    assert max((a - b).abs().max() for a, b in zip(eager, compiled, strict=True)) < 1e-4


def test_flops_are_those_of_forward_and_both_backward_products():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 50), nn.Linear(50, 3)

        def forward(self, x, c_noise):
            return self.two(self.one(x))

    model = LearnedScore(Product(), VPSDE(), Noise(), (3,))
    # Forward 2 * 3 * 50 for each layer; backward twice that, but for the gradient of the input, which nobody asks for.
    assert flops_per_example(model, Batch(torch.zeros(7, 3))) == 300 * (3 + 2)
    assert all(p.grad is None for p in model.parameters())


def test_flops_are_those_of_the_model_with_or_without_checkpointing():
    options = {"width": 8, "multipliers": (1,), "blocks": 1, "attention": ()}
    plain, again = (UNet((1, 4, 4), **options, checkpointing=flag).train() for flag in (False, True))
    batch = Batch(torch.zeros(1, 1, 4, 4))
    counts = [flops_per_example(LearnedScore(n, VPSDE(), Noise(), (1, 4, 4)), batch) for n in (plain, again)]
    assert counts[0] == counts[1] > 0
    assert again.checkpointing


@pytest.mark.parametrize(
    ("name", "half", "tf32", "single"),
    [
        ("NVIDIA L40S", 362, 183, 91.6),
        ("NVIDIA L40", 181, 90.5, 90.5),
        ("NVIDIA L4", 121, 60, 30.3),
        ("NVIDIA H100 80GB HBM3", 989, 495, 67),
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
    ],
)
def test_peaks_are_those_of_the_device_at_the_arithmetic_in_use(monkeypatch, name, half, tf32, single):
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(device, "bf16-mixed") == 1e12 * half
    for allowed, peak in ((True, tf32), (False, single)):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
        assert peak_flops(device, "32-true") == 1e12 * peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A10G")  # another chip than the A10
    assert peak_flops(device, "32-true") is None


def test_utilisation_is_logged_where_the_peak_is_known():
    trainer = tiny.trainer(10, peak_flops=1e9)
    rows = trainer.fit(tiny.model(), tiny.data(), DenoisingScoreMatching(), UniformTimes()).metrics
    per_example = flops_per_example(tiny.model(), tiny.data().batch(0, 4))
    for row in rows:
        assert row["mfu"] == pytest.approx(row["examples_per_second"] * per_example / 1e9)
        assert row["tflops"] == pytest.approx(row["mfu"] * 1e-3)
    assert peak_flops(torch.device("cpu"), "32-true") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "zero"}, "strategy is one of ddp, fsdp; got 'zero'"),
        ({"optimizer": "lion"}, "optimizer is one of adamw, muon; got 'lion'"),
        ({"precision": "16-mixed", "device": "cpu"}, "precision='16-mixed' needs a CUDA device: use 'bf16-mixed'"),
        ({"strategy": "fsdp", "optimizer": "muon"}, "strategy='fsdp' cuts them"),
        ({"accumulate": 0}, "accumulate >= 1, got accumulate=0"),
        ({"evaluate_every": 7, "log_every": 5}, "evaluate_every=7 must be a multiple of log_every=5"),
        ({"snapshot_every": 5}, "there are none: give e.g."),
        ({"power_emas": [0.4]}, r"lies in \(0, 0.288\), got 0.4"),
        ({"ema_half_life": [100, 0]}, "ema_half_life > 0, got"),
        ({"peak_flops": 0.0}, "peak_flops > 0, got peak_flops=0.0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(**({"steps": 1, "batch_size": 1} | options))


def test_muon_without_hidden_matrices_and_batches_that_do_not_divide_are_refused():
    class Level(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, x, c_noise):
            return x * 0 + self.shift

    model = LearnedScore(Level(), VPSDE(), Noise(), (2,))
    with pytest.raises(ValueError, match="this one has none: use 'adamw'"):
        fitted(model, tiny.data(), optimizer="muon")
    with pytest.raises(ValueError, match="batch_size=16 must be a multiple of 3, 1 processes times accumulate=3"):
        fitted(plain(), tiny.data(), accumulate=3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_every_precision_learns_on_cuda_and_resumes_exactly(tmp_path, precision):
    settings = {"steps": 60, "device": "cuda", "precision": precision, "channels_last": True, "schedule": "constant"}
    whole = tiny.trainer(**settings)
    for folder, trainer in (("whole", whole), ("cut", tiny.trainer(**(settings | {"steps": 21}))), ("cut", whole)):
        result = tiny.train(tmp_path / folder, trainer, model=images(), data=pictures(), resume=True)
    first, second = (Checkpoints(tmp_path / name / "checkpoints").weights(ema=False) for name in ("whole", "cut"))
    assert max((first[name] - second[name]).abs().max() for name in first) < 1e-4
    assert all(math.isfinite(row["loss"]) and row["peak_memory_gib"] > 0 for row in result.metrics)

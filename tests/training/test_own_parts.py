"""What is wrong with a user's own step, model, data or objective is said in one line, before it ends in torch's depths."""

from __future__ import annotations

import math
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from score_sde import DDIM, AdaptiveODE, ExactScore, LearnedScore, Sampler, grid
from score_sde.data import Batch, Data, TargetStream, TensorData
from score_sde.guidance import MMPS, ClassifierFree, Matrix
from score_sde.networks import MLP
from score_sde.parameterization import Noise, Velocity
from score_sde.score import ScoreModel
from score_sde.sde import VPSDE, DiscreteSDE
from score_sde.steps import LinearStep, Stage, StagedStep, Step
from score_sde.targets import make
from score_sde.training import DenoisingScoreMatching, Losses, UniformTimes

RING = make("ring")
MODEL = ExactScore(RING, VPSDE())
FIVE = partial(grid.log_snr, steps=5)


class Own(LinearStep):
    def __init__(self, given: Any) -> None:
        self.given = given

    def coefficients(self, sde, times, s):
        return self.given(sde, times, s)


class OwnStage(StagedStep):
    def __init__(self, given: Any) -> None:
        self.given = given

    def stages(self, sde, t, s):
        return [self.given(s)]


class Moves(Step):
    def __init__(self, rows: int, moved: Any) -> None:
        self.rows, self.moved = rows, moved

    def plan(self, sde, t, s):
        return [None] * (len(t) + self.rows)

    def advance(self, row, x, history, evaluate, draw):
        return self.moved(x)


class Answering(ScoreModel):
    def __init__(self, answer: Any, **known: Any) -> None:
        self.answer = answer
        vars(self).update(known)

    def __call__(self, x, t, **condition):
        return self.answer(x)


class Bad(Data):
    event_shape, size, num_classes, target = (2,), None, None, None

    def __init__(self, made: Any) -> None:
        self.made = made

    def batch(self, step, batch_size, rows=None):
        return self.made(batch_size)

    def reference(self, count):
        raise NotImplementedError


def draw(step: Any = None, model: ScoreModel = MODEL, **options: Any) -> Any:
    return Sampler(step or DDIM(), FIVE).sample(model, (3, 2), seed=0, **options)


def two(model, batch, times, source):
    return batch.x


def scalar(model, batch, times, source):
    return Losses(batch.x.mean() + 0 * model(batch.x, times.t).raw.sum())


WRONG = {
    "two of five": (lambda: draw(Own(lambda sde, t, s: (torch.ones(2), [], s * 0))), ValueError, r"shape \(2,\)"),
    "two things": (lambda: draw(Own(lambda sde, t, s: (s, [s]))), ValueError, "gives three things"),
    "math": (lambda: draw(Own(lambda sde, t, s: (math.exp(t[0]), [s], s))), ValueError, "Own.coefficients fails .*torch.exp"),
    "numbers": (lambda: draw(Own(lambda sde, t, s: (torch.exp(2.0), [s], s))), ValueError, "Own.coefficients fails .*float"),
    "if": (lambda: draw(Own(lambda sde, t, s: (s, [s] if s > 0 else [], s))), ValueError, "Own.coefficients fails .*Boolean"),
    "stages": (lambda: draw(OwnStage(lambda s: Stage(s, math.exp(s), [s]))), ValueError, "OwnStage.stages fails .*torch.exp"),
    "its own error": (lambda: draw(Own(lambda sde, t, s: int("seven"))), ValueError, "^invalid literal for int"),
    "too few rows": (lambda: draw(Moves(-1, lambda x: (x, ()))), ValueError, "a row for each of 5 moves, got 4"),
    "no history": (lambda: draw(Moves(0, lambda x: x)), TypeError, r"Moves.advance returns \(x, history\), got Tensor"),
    "a tensor": (
        lambda: draw(model=Answering(lambda x: x, sde=VPSDE(), event_shape=(2,))), TypeError,
        "returns a Prediction, got Tensor",
    ),
    "no shape": (lambda: draw(model=Answering(lambda x: x, sde=VPSDE())), TypeError, "has no event_shape"),
    "numpy": (lambda: MODEL([[0.0, 0.0]], 0.5), TypeError, "x is a tensor, got list"),
    "dtype": (lambda: draw(dtype="float64"), TypeError, "such as torch.float64"),
    "a dtype of integers": (lambda: draw(dtype=torch.int64), TypeError, "floating-point types, such as torch.float64"),
    "a function as network": (lambda: LearnedScore(max, VPSDE(), Noise(), (2,)), TypeError, "takes a torch.nn.Module"),
    "an int as shape": (lambda: LearnedScore(MLP((2,)), VPSDE(), Noise(), 2), TypeError, "a tuple such as"),
    "nothing to guide towards": (lambda: ClassifierFree(MODEL, 2.0), ValueError, "this model takes none"),
    "a list as y": (lambda: MMPS(MODEL, Matrix([[1.0, 0.0]]), [4.0], 0.1), TypeError, "y is a tensor, got list"),
    "a matrix as operator": (lambda: RING.condition(torch.eye(2), torch.zeros(2), 0.1), TypeError, "guidance.Matrix"),
    "a number of samples": (lambda: RING.sample(10), TypeError, r"a tuple, such as \(10,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named(case: str) -> None:
    make_it, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        make_it()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": torch.zeros(5, 2)}, "data is a Data, got <class 'torch.Tensor'>"),
        ({"model": MLP((2,))}, "model is a LearnedScore"),
        ({"time_sampler": tiny.UniformTimes}, "time_sampler is a TimeSampler, got <class .*UniformTimes'>"),
        ({"objective": tiny.DenoisingScoreMatching}, "objective is an Objective"),
        (
            {"data": Bad(lambda size: torch.zeros(size, 2))},
            r"Bad.batch returns Batch\(x\), x a tensor of 16 examples here, got Tensor",
        ),
        ({"data": Bad(lambda size: Batch(torch.zeros(size // 2, 2)))}, "got 8 examples"),
        ({"data": Bad(lambda size: Batch(np.zeros((size, 2))))}, "x a tensor of 16 examples here, got ndarray"),
        (
            {"data": Bad(lambda size: Batch(torch.zeros(size, 2).byte()))},
            r"gives torch.uint8, .*prepare\(batch, draws\)",
        ),
        ({"objective": two}, r"returns Losses\(loss\) with one number for each of 16 examples, got Tensor"),
        ({"objective": scalar}, r"got a loss of shape \(\)"),
    ],
)
def test_what_cannot_be_trained_with_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        tiny.train(None, **options)


def test_coefficients_may_be_plain_numbers() -> None:
    class Halving(LinearStep):
        def coefficients(self, sde, times, s):
            return 0.5, [0.0], 0.0

    x = torch.ones(3, 2)
    assert torch.equal(Sampler(Halving(), FIVE, final="none").sample(MODEL, (3, 2), x_init=x).x, x / 32)


def test_tolerances_below_the_rounding_are_warned_of() -> None:
    for dtype, warned in ((torch.bfloat16, True), (torch.float32, False)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            AdaptiveODE(rtol=1e-4, atol=1e-4).sample(MODEL, (2, 2), seed=0, dtype=dtype)
        assert any("below what torch.bfloat16 resolves" in str(warning.message) for warning in said) == warned


def test_a_prediction_that_says_nothing_of_the_data_where_samples_start_is_warned_of() -> None:
    ladder = DiscreteSDE.cosine(1000)
    hopeless, good, mild = (LearnedScore(MLP((2,)), sde, kind, (2,))
                            for sde, kind in ((ladder, Noise()), (ladder, Velocity()), (VPSDE(), Noise())))  # fmt: skip

    def fit(model: LearnedScore) -> None:
        tiny.trainer(1).fit(model, TargetStream(make("ring")), DenoisingScoreMatching(), UniformTimes())

    with pytest.warns(
        UserWarning, match=r"alpha=4\.9e-05 at t_max\) an error of the Noise prediction is 20,291 times as"
    ):
        fit(hopeless)
    with warnings.catch_warnings(action="error"):
        fit(good)
        fit(mild)


def test_numbers_that_are_none_are_named() -> None:
    for build in (lambda: AdaptiveODE(rtol="a"), lambda: partial(grid.karras, steps=5, rho="a")(VPSDE())):
        with pytest.raises(ValueError, match="give a number"):
            build()


def test_a_seed_is_a_whole_number() -> None:
    fit = partial(tiny.trainer(1).fit, tiny.model(), tiny.data(), DenoisingScoreMatching(), UniformTimes())
    for seed in (None, 1.5, "7"):
        with pytest.raises(ValueError, match=rf"a whole number seed, got seed={seed!r}"):
            fit(seed=seed)


def test_training_a_frozen_model_is_refused(tmp_path: Path) -> None:
    """`Run.model` and `load` give one: for fine-tuning, requires_grad_ thaws it."""
    with pytest.raises(ValueError, match="no parameter of the model is trained"):
        tiny.train(tmp_path, model=tiny.model().requires_grad_(False))


class Table(torch.nn.Module):
    """A network that looks up what it is given in a table of ten rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Embedding(10, 2)


class Steps(Table):
    def forward(self, x, c_noise):
        return x + self.rows(c_noise)


class Classes(Table):
    def forward(self, x, c_noise, label):
        return x + self.rows(label)


class OneHot(Table):
    def forward(self, x, c_noise, label):
        return x + torch.nn.functional.one_hot(label, 10) @ self.rows.weight


class Renamed(Table):
    def forward(self, x, c_noise, y):
        return x + self.rows(y)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (Steps, r"Steps fails .*c_noise, that is a real number; .* c_noise\.long\(\)"),
        (Classes, r"label_dropout=0.5 gives it label -1 for no class: .* nulls=\{'label': num_classes\}"),
        (OneHot, r"label_dropout=0.5 gives it label -1"),
        (Renamed, r"the data have labels, and Renamed.forward has no argument `label`: name it so"),
    ],
)
def test_what_a_table_within_a_network_is_not_made_for_is_said(network: type[Table], says: str) -> None:
    model = LearnedScore(network(), VPSDE(), Noise(), (2,))
    data = TensorData(torch.randn(40, 2), None if network is Steps else torch.arange(40) % 10)
    objective = DenoisingScoreMatching(label_dropout=0 if network is Steps else 0.5)
    with pytest.raises(ValueError, match=says):
        tiny.trainer(1).fit(model, data, objective, UniformTimes())


def test_images_whose_channels_are_last_are_told_how_to_move_them() -> None:
    model = LearnedScore(MLP((3, 4, 4), width=8), VPSDE(), Noise(), (3, 4, 4))
    for event, fix in (((4, 4, 3), r"put channels first, x\.movedim\(-1, 1\)"), ((3, 4, 5), "make them equal")):
        with pytest.raises(ValueError, match=fix):
            tiny.trainer(1).fit(model, TensorData(torch.randn(40, *event)), DenoisingScoreMatching(), UniformTimes())


def test_latents_that_carry_their_encoders_graph_are_data() -> None:
    encoder = torch.nn.Linear(3, 2)
    data = TensorData(encoder(torch.randn(40, 3)), context=encoder(torch.randn(40, 3)))
    model = LearnedScore(MLP((2,), width=8, context_width=2), VPSDE(), Noise(), (2,))
    assert tiny.trainer(2).fit(model, data, DenoisingScoreMatching(), UniformTimes()).step == 2
    assert encoder.weight.grad is None

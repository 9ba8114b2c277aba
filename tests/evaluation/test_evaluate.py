"""What `evaluate` reports of samplers whose samples are known: real images, copies of training images, noise."""

from __future__ import annotations

import json
import math
from functools import partial

import pytest
import torch

from score_sde import VPSDE, ExactScore, Sampler, grid, targets
from score_sde.data import Batch, Data, TargetStream, TensorData
from score_sde.evaluation import PCA, check_counts, evaluate
from score_sde.solver import SampleResult
from score_sde.steps import DDIM


class Given:
    """A sampler that gives rows of fixed images, by the seeds of the samples asked for."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x

    def sample(self, model, shape, *, noise, **_) -> SampleResult:
        return SampleResult(self.x[noise.seeds % len(self.x)], 7, 0.5, None, torch.zeros(2))


def images(count: int, seed: int) -> torch.Tensor:
    """Smooth random images."""
    coarse = torch.randn(count, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    x = torch.nn.functional.interpolate(coarse, (8, 8), mode="bilinear", align_corners=True)
    return (x.clamp(-2, 2) / 2).float()


class Model:
    event_shape, device, dtype, num_classes = (1, 8, 8), torch.device("cpu"), torch.float32, None


@pytest.fixture(scope="module")
def evaluation():
    data = TensorData(images(400, 0), held_out=0.25)
    samplers = {
        "fresh": images(90, 1),
        "copies": data.plain("train", slice(90)).x,
        "noise": 0.6 + 0.2 * images(90, 2),
    }
    return data, evaluate(
        Model(), data, {name: Given(x) for name, x in samplers.items()}, num_samples=90, metrics=["sliced_w2"],
        features={"pca": PCA(6)}, batch_size=40, progress=False,
    )  # fmt: skip


def of(evaluation, sampler: str, metric: str):
    table = evaluation.table.set_index(["sampler", "metric"])
    return table.loc[(sampler, metric)]


def test_every_sampler_has_every_metric_beside_its_floor(evaluation):
    _, found = evaluation
    assert (found.table.groupby("sampler").size() == 1 + 6 + 2).all()
    assert (found.table["nfe"] == 7).all()
    for metric in ("sliced_w2", "FD (6 principal components)", "coverage (6 principal components)"):
        fresh, noise = of(found, "fresh", metric), of(found, "noise", metric)
        assert 0.6 < fresh["ratio"] < 1.7
        assert abs(math.log(noise["ratio"])) > 1
        assert fresh["floor"] == noise["floor"]


def test_copies_are_told_from_fresh_images(evaluation):
    data, found = evaluation
    assert of(found, "copies", "memorised")["value"] == 1
    assert of(found, "fresh", "memorised")["value"] == of(found, "fresh", "memorised")["floor"] == 0
    assert of(found, "copies", "nearest training image")["value"] == 0
    assert 0.7 < of(found, "fresh", "nearest training image")["ratio"] < 1.4
    above, below = found.nearest["copies"]
    assert torch.equal(above, below)
    assert (found.nearest["fresh"][1][:, None] == data.plain("train").x[None]).flatten(2).all(2).any(1).all()


def test_the_report_is_json_and_names_what_made_the_references(evaluation):
    data, found = evaluation
    report = json.loads(json.dumps(found.report(), allow_nan=False))
    assert report["samplers"]["fresh"]["metrics"]["KID (6 principal components)"]["ratio"] is None
    assert report["references"][0]["data"] == data.fingerprint
    assert report["references"][0]["count"] == 90
    assert report["samplers"]["fresh"]["metrics"]["sliced_w2"]["count"] == 50  # two disjoint draws of 100 held out


def test_a_ratio_is_taken_where_value_and_floor_have_one_count():
    data = TensorData(images(100, 0), held_out=0.2)
    found = evaluate(Model(), data, {"fresh": Given(images(60, 1))}, num_samples=60, metrics=["sliced_w2"],
                     features={"pca": PCA(6)}, progress=False)  # fmt: skip
    metric = "FD (6 principal components)"
    beside = of(found, "fresh", f"{metric} @ 20")
    assert found.mean_ratio(metric) == beside["value"] / beside["floor"]
    flat = found.flat()
    assert f"fresh/{metric}/floor" not in flat
    assert flat[f"fresh/{metric} @ 20/floor"] == beside["floor"]
    assert json.loads(json.dumps(found.report()))["samplers"]["fresh"]["metrics"][metric]["count"] == 60


def test_dequantised_data_are_measured_on_the_scale_of_their_images():
    codes = ((images(400, 0) + 1) * 2).round().long()  # five grey levels, where the two scales are far apart
    data = TensorData(codes, dequantize=True, levels=5, held_out=0.25)
    samples = data.examples().x[:90]
    torch.testing.assert_close(data.as_plain(data.examples().x), data.plain("train").x)
    found = evaluate(Model(), data, {"copies": Given(samples)}, num_samples=90, metrics=["energy", "w2"],
                     features={"pca": PCA(6)}, progress=False)  # fmt: skip
    assert of(found, "copies", "nearest training image")["value"] == 0
    assert of(found, "copies", "memorised")["value"] == 1
    assert of(found, "copies", "FD (6 principal components)")["value"] < 1e-6


def test_metrics_say_how_many_points_they_took():
    target = targets.make("ring")
    data = TargetStream(target)
    sampler = Given(target.sample((2500,), generator=torch.Generator().manual_seed(0)))

    class Plane:
        event_shape, device, dtype = (2,), torch.device("cpu"), torch.float32

    found = evaluate(
        Plane(), data, {"exact": sampler}, num_samples=2500, metrics=["sliced_w2", "w2", "energy"], progress=False
    )
    assert found.table.set_index("metric")["count"].to_dict() == {"sliced_w2": 2500, "w2": 1000, "energy": 2000}


def test_a_sample_that_is_lost_costs_its_sampler_alone():
    data = TensorData(images(400, 0), held_out=0.25)
    broken = images(90, 2).index_fill(0, torch.tensor([3]), math.nan)
    found = evaluate(Model(), data, {"good": Given(images(90, 1)), "bad": Given(broken)}, num_samples=90,
                     metrics=["sliced_w2"], features={"pca": PCA(6)}, progress=False)  # fmt: skip
    assert 0.6 < of(found, "good", "sliced_w2")["ratio"] < 1.7
    assert math.isnan(of(found, "bad", "sliced_w2")["value"])
    assert found.mean_ratio("sliced_w2") == math.inf
    assert found.flat()["bad/sliced_w2"] is None
    json.dumps(found.report(), allow_nan=False)


def test_no_accuracy_is_said_to_be_held_out_where_nothing_is():
    x, labels = images(300, 0), torch.arange(300) % 3
    for held_out, seen in ((0.0, False), (0.3, True)):
        data = TensorData(x, labels, held_out=held_out)
        found = evaluate(Model(), data, {"fresh": Given(images(60, 1))}, num_samples=60, metrics=["sliced_w2"],
                         classifier_data=data, memorization=False, progress=False)  # fmt: skip
        assert math.isfinite(of(found, "fresh", "classifier accuracy on held-out")["value"]) == seen


class OwnData(Data):
    """Labelled data of a user's own, which read others."""

    def __init__(self, data: TensorData) -> None:
        self.data, self.event_shape, self.num_classes = data, data.event_shape, data.num_classes

    def batch(self, step, batch_size, rows=slice(None)) -> Batch:
        return self.data.batch(step, batch_size, rows)

    def reference(self, count) -> Batch:
        return self.data.reference(count)


@pytest.mark.parametrize("own", [False, True])
def test_samples_of_one_class_are_held_against_that_class(own):
    """Classes that a shift tells apart: fresh images of class 1 are at the floor, and far from the whole."""
    x, labels = images(600, 0), torch.arange(600) % 2
    data = TensorData((x + labels.float()[:, None, None, None]) / 2, labels, held_out=0.4)
    fresh = {"fresh": Given((images(60, 1) + 1) / 2)}
    named = ["energy"] if own else ["energy", "FD (3 principal components)"]

    def ratios(label: torch.Tensor | None) -> list[float]:
        found = evaluate(Model(), OwnData(data) if own else data, fresh, num_samples=60, metrics=["energy"],
                         features={} if own else {"pca": PCA(3)}, progress=False,
                         condition=None if label is None else {"label": label})  # fmt: skip
        return [of(found, "fresh", metric)["ratio"] for metric in named]

    assert max(ratios(torch.ones(60, dtype=torch.long))) < 1.7
    for label in (None, torch.zeros(60, dtype=torch.long), torch.arange(60) % 2, torch.arange(60) % 3 - 1):
        assert min(ratios(label)) > 3


def test_nothing_to_measure_is_refused():
    with pytest.raises(ValueError, match="one sampler or more"):
        evaluate(Model(), TensorData(images(60, 0)), {}, num_samples=9)


@pytest.mark.parametrize(
    ("held_out", "count", "features", "says"),
    [(0.05, 10, {}, "there are 3: raise held_out"), (0.0, 1, {}, "num_samples >= 2, not 1"),
     (0.09, 10, {"pca": PCA()}, "not 5: raise held_out"), (0.5, 5, {"pca": PCA()}, "not 5: draw more")],
)  # fmt: skip
def test_too_few_to_compare_is_said_before_anything_is_drawn(held_out, count, features, says):
    data = TensorData(images(60, 0), held_out=held_out)
    with pytest.raises(ValueError, match=says):
        check_counts(data, count, features)
    with pytest.raises(ValueError, match=says):
        evaluate(Model(), data, {"never drawn": None}, num_samples=count, features=features)
    check_counts(TensorData(images(60, 0), held_out=0.1), 6, features)


def test_wrong_inputs_are_refused_before_anything_is_drawn():
    model, data, never = ExactScore(targets.make("ring"), VPSDE()), TensorData(torch.zeros(9, 2)), {"never drawn": None}
    with pytest.raises(ValueError, match=r"the data have event shape \(1, 8, 8\), the model \(2,\)"):
        evaluate(model, TensorData(images(60, 0)), never, num_samples=9)
    with pytest.raises(ValueError, match="condition 'y' has 4 rows, for num_samples=9"):
        evaluate(model, data, never, num_samples=9, condition={"y": torch.zeros(4, 1)})
    with pytest.raises(ValueError, match="samplers are a mapping from names to one sampler or more, got Sampler"):
        evaluate(model, data, Sampler(DDIM(), partial(grid.log_snr, steps=2)), num_samples=9)


def test_one_label_is_for_all_samples():
    class Labelled(Given):
        def sample(self, model, shape, *, condition, **options) -> SampleResult:
            assert torch.equal(condition["label"], torch.ones(shape[0], dtype=torch.int64))
            return super().sample(model, shape, **options)

    data = TensorData(images(60, 0), torch.arange(60) % 2, held_out=0.5)
    options = {"num_samples": 9, "metrics": ["energy"], "memorization": False, "progress": False, "batch_size": 4}
    one, rows = (evaluate(Model(), data, {"s": Labelled(images(9, 1))}, condition={"label": label}, **options).table
                 for label in (1, torch.ones(9, dtype=torch.int64)))  # fmt: skip
    assert one["value"].tolist() == rows["value"].tolist()


def test_samples_do_not_depend_on_the_batches():
    model, data = ExactScore(targets.make("ring"), VPSDE()), TargetStream(targets.make("ring"))
    sampler = {"ddim": Sampler(DDIM(eta=1.0), partial(grid.log_snr, steps=5))}
    one, other = (evaluate(model, data, sampler, num_samples=50, metrics=["energy"], batch_size=size, progress=False)
                  for size in (50, 7))  # fmt: skip
    assert torch.equal(one.samples["ddim"], other.samples["ddim"])
    assert one.nearest == {}


def test_features_of_points_are_refused():
    with pytest.raises(ValueError, match="'pca' are for finite sets of images"):
        evaluate(ExactScore(targets.make("ring"), VPSDE()), TargetStream(targets.make("ring")), {"ddim": None}, num_samples=20,
                 features={"pca": PCA(2)})  # fmt: skip

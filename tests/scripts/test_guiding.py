"""Labels and guidance of scripts/sample.py on tiny runs of digits, and wrong inputs in one line."""

from __future__ import annotations

import sys
from pathlib import Path

import cloudpickle
import hydra
import numpy as np
import pandas as pd
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from score_sde import targets
from score_sde.build import build_model
from score_sde.classifier import NoisyClassifier
from score_sde.data import Batch, Data, TargetStream, TensorData, load_images
from score_sde.guidance import Autoguidance, Classifier, ClassifierFree, ClassifierFreePlusPlus, DynamicThreshold
from score_sde.run import Run
from score_sde.training import DenoisingScoreMatching, NoisyCrossEntropy, Trainer, UniformTimes

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import sample  # noqa: E402
from scripting import conditions, figures, guiding, output  # noqa: E402
from typed import script  # noqa: E402

NETWORKS = {
    "labelled": {"_target_": "score_sde.networks.MLP", "event_shape": [1, 8, 8], "width": 16, "depth": 1,
                 "num_classes": 10},
    "plain": {"_target_": "score_sde.networks.MLP", "event_shape": [1, 8, 8], "width": 16, "depth": 1},
    "classifier": {"_target_": "score_sde.networks.Encoder", "event_shape": [1, 8, 8], "num_classes": 10, "width": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A labelled and an unlabelled score model and a classifier, each trained for two steps, and one on another SDE."""
    return {
        name: trained(tmp_path_factory.mktemp(name), network, "score_sde.sde.VPSDE")
        for name, network in NETWORKS.items()
    } | {
        "elsewhere": trained(tmp_path_factory.mktemp("ve"), NETWORKS["classifier"], "score_sde.sde.VESDE"),
        "always labelled": trained(tmp_path_factory.mktemp("all"), NETWORKS["labelled"], "score_sde.sde.VPSDE", 0.0),
    }


def trained(folder: Path, network: dict, sde: str, dropout: float = 0.1) -> str:
    config = OmegaConf.create({
        "data": {"_target_": "score_sde.data.digits", "labels": "num_classes" in network}, "network": network,
        "sde": {"_target_": sde}, "parameterization": {"_target_": "score_sde.parameterization.Karras"},
        "event_shape": [1, 8, 8], "seed": 0, "objective": {"label_dropout": dropout},
    })  # fmt: skip
    run, model = Run.create(folder, config), build_model(config)
    objective = NoisyCrossEntropy() if isinstance(model, NoisyClassifier) else DenoisingScoreMatching()
    trainer = Trainer(steps=2, batch_size=8, device="cpu", progress=False, checkpoint_every=1, log_every=1)
    trainer.fit(model, run.data(), objective, UniformTimes(), folder, seed=0)
    return str(folder)


def guided(runs: dict[str, str], name: str, *arguments: str):
    arguments = tuple(a.format(**runs) for a in arguments)
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra.compose("sample", [f"run={runs[name]}", *arguments])
    run = Run.open(runs[name])
    return guiding.guided(config, run, run.model())


@pytest.mark.parametrize(
    ("name", "arguments", "kind", "settings"),
    [
        ("labelled", ["label=3", "guidance.scale=2"], ClassifierFree, {"scale": 2.0}),
        ("labelled", ["label=3", "guidance.interval=[0.2,2]", "guidance.rescale=0.5", "guidance.negative=5"],
         ClassifierFree, {"interval": (0.2, 2.0), "rescale": 0.5, "negative": {"label": 5}}),
        ("plain", ["label=3", "guidance=classifier", "guidance.run={classifier}", "guidance.scale=4"], Classifier,
         {"scale": 4.0}),
        ("labelled", ["guidance=autoguidance", "guidance.run={labelled}", "guidance.step=1"], Autoguidance, {}),
        ("labelled", ["guidance=classifier_free_plus_plus", "label=3"], ClassifierFreePlusPlus, {"scale": 0.6}),
        ("labelled", ["label=[0,3]", "threshold=0.9"], DynamicThreshold, {"quantile": 0.9}),
    ],
)  # fmt: skip
def test_options_reach_the_guidance(runs, name, arguments, kind, settings):
    model = guided(runs, name, *arguments)
    assert type(model) is kind
    assert {key: getattr(model, key) for key in settings} == settings
    condition = {"label": torch.tensor([3, 3])} if "label" in model.condition_names else {}
    assert model(torch.zeros(2, 1, 8, 8), 0.5, **condition).denoised.isfinite().all()


def test_a_label_given_once_is_the_condition_of_every_sample(runs):
    model = guided(runs, "labelled", "label=3", "guidance.negative=5", "guidance.scale=3")
    base, x = model.model, torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    toward, away = (base(x, 0.4, label=torch.full((3,), k)).denoised for k in (3, 5))
    torch.testing.assert_close(model(x, 0.4, label=torch.full((3,), 3)).denoised, 3 * toward - 2 * away)


WRONG = {
    "unknown label": ("labelled", ["label=12"], "label=12, but the run's network knows the classes 0 to 9"),
    "unknown negative label": ("labelled", ["label=1", "guidance.negative=10"], "knows the classes 0 to 9"),
    "unknown label of a classifier": (
        "plain", ["label=-1", "guidance=classifier", "guidance.run={classifier}"], "label=-1, but"),
    "no classes": ("plain", ["label=3"], "knows no classes"),
    "a word": ("labelled", ["label=three"], "label='three' is not a class"),
    "guidance towards nothing": ("labelled", ["guidance.scale=2"], "give label=<number>"),
    "no classifier": ("plain", ["label=3", "guidance=classifier"], "give guidance.run=<directory>"),
    "not a classifier": ("plain", ["label=3", "guidance=classifier", "guidance.run={plain}"], "Classifier takes a classifier"),
    "a classifier to move away from": (
        "labelled", ["label=3", "guidance=autoguidance", "guidance.run={classifier}"], "Autoguidance takes a score model"),
    "no label of several": ("labelled", ["label=[]"], "label=[] names no class"),
    "an interval of nothing": ("plain", ["guidance.interval=[0.2,2]"], "give label=<number>"),
    "a classifier of another process": (
        "plain", ["label=3", "guidance=classifier", "guidance.run={elsewhere}"], "one process, got"),
    "a posterior sampler": ("plain", ["label=3", "guidance=mmps"], "use scripts/edit.py"),
    "a network that knows nothing without labels": ("always labelled", [], "give label=<number>"),
    "bad interval": ("labelled", ["label=3", "guidance.interval=[2,1]"], "0 <= low < high"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_refused_in_one_line(runs, case):
    name, arguments, message = WRONG[case]
    with pytest.raises((ValueError, TypeError)) as refusal:
        guided(runs, name, *arguments)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_threshold_is_for_data_in_its_range(tmp_path):
    config = OmegaConf.create({
        "target": {"_target_": "score_sde.targets.ring"}, "sde": {"_target_": "score_sde.sde.VPSDE"},
        "data": {"_target_": "score_sde.data.base.TargetStream", "target": "${target}"}, "event_shape": [2], "seed": 0,
        "network": {"_target_": "score_sde.networks.MLP", "event_shape": [2]},
        "parameterization": {"_target_": "score_sde.parameterization.Karras"},
    })  # fmt: skip
    Run.create(tmp_path, config)
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        asked = hydra.compose("sample", [f"run={tmp_path}", "threshold=0.9"])
    with pytest.raises(ValueError, match=r"threshold=0.9 is for data in \[-1, 1\]"):
        guiding.guided(asked, Run.open(tmp_path), build_model(config))


def test_as_a_user_types_it(runs, tmp_path):
    few = ["num_samples=4", "sampler.grid.steps=2"]
    out = script(
        "sample", f"run={runs['labelled']}", "label=[3,4]", "guidance.scale=2", "batch_size=3", *few, cwd=tmp_path
    )
    assert "4 network calls each" in out
    folder = Path(runs["labelled"]) / "samples/default-labels"
    assert np.load(folder / "samples.npy").shape == (4, 1, 8, 8)
    assert np.load(folder / "label.npy").tolist() == [3, 4, 3, 4]
    assert len(list((folder / "png").iterdir())) == len(np.load(folder / "images.npz")["arr_0"]) == 4
    error = script("sample", f"run={runs['classifier']}", *few, cwd=tmp_path, code=1)
    assert "is a classifier of noisy data, which has no samples: give it as guidance.run=" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_saved_as_their_pixels(tmp_path, channels):
    levels = torch.arange(256).repeat(channels).view(4, channels, 8, 8)
    x = levels / 127.5 - 1 + 0.003 * (torch.rand(levels.shape, generator=torch.Generator().manual_seed(0)) - 0.5)
    x[0, 0, 0, 0], x[-1, -1, -1, -1] = -1.5, 1.5
    pixels = levels.movedim(1, -1).numpy()
    for _ in range(2):  # over what another command left
        output.save_images(tmp_path, x)
    assert {file.name for file in tmp_path.iterdir()} == {"images.npz", "png"}
    saved = np.load(tmp_path / "images.npz")["arr_0"]
    assert saved.dtype == np.uint8
    np.testing.assert_array_equal(saved, np.repeat(pixels, 3 // channels, 3))  # FID's networks take three channels
    read = [np.asarray(Image.open(tmp_path / f"png/0000{i}.png")) for i in range(4)]
    np.testing.assert_array_equal(np.reshape(read, pixels.shape), pixels)
    np.testing.assert_allclose(load_images(tmp_path / "png", x.shape[1:]), levels / 127.5 - 1, atol=1e-6)


def test_nothing_lies_over_a_classifiers_accuracy():
    table = pd.DataFrame({"level": [0.1, 1.0, 10.0], "accuracy": [0.9, 0.6, 0.1], "cross_entropy": [0.3, 1.1, 2.3]})
    left, right = figures.accuracy(table, torch.tensor([0] * 5 + [1] * 3 + [2] * 2)).axes
    assert [ax.get_ylabel() for ax in (left, right)] == ["accuracy on held-out examples", "cross-entropy in nats"]
    assert [ax.lines[0].get_ydata().tolist() for ax in (left, right)] == [[0.9, 0.6, 0.1], [0.3, 1.1, 2.3]]
    chance = [ax.lines[1].get_ydata()[0] for ax in (left, right)]
    assert chance == pytest.approx([0.5, -0.5 * np.log(0.5) - 0.3 * np.log(0.3) - 0.2 * np.log(0.2)])
    assert left.get_legend() is right.get_legend() is None
    assert not any(ax.lines[0].get_clip_on() for ax in (left, right))  # whole dots at 0 and 1


class Striped(Data):
    """Data of a user's own, of which one in ten examples has label 1, one in 100 label 2 and none label 3."""

    event_shape, num_classes, class_names = (2,), 4, ("a", "b", "c", "d")

    def batch(self, step, batch_size, rows=slice(None)):
        at = step * batch_size + torch.arange(batch_size)[rows]
        return Batch(at[:, None].expand(-1, 2).float(), {"label": (at % 10 == 0).long() + (at % 100 == 0).long()})

    def reference(self, count):
        return self.batch(0, min(count, 1000))


def test_labels_to_be_measured_have_the_shares_of_the_data():
    x, labels = torch.zeros(200, 2), (torch.arange(200) % 10 == 0).long()
    for data, ones in ((TensorData(x, labels), 20), (Striped(), 18)):
        assert conditions.natural([0, 1], data, 200).sum() == ones
        assert conditions.natural([1], data, 50).tolist() == [1] * 50
    assert conditions.natural([0, 1], TensorData(x), 6).tolist() == [0, 1] * 3


def test_of_data_of_ones_own_the_examples_of_some_classes_are_picked():
    part = Striped().of_classes([2])
    assert (part.num_classes, part.class_names) == (4, ("a", "b", "c", "d"))
    assert part.reference(20).x[:, 0].tolist() == list(range(0, 1000, 100))
    assert part.batch(1, 3, slice(1, None)).x.shape == (2, 2)
    with pytest.raises(ValueError, match="too few training examples have label 3"):
        part.of_classes([3]).batch(0, 1)
    with pytest.raises(ValueError, match="have no labels"):
        TargetStream(targets.make("ring")).of_classes([0])


def test_a_launcher_can_send_what_the_script_does_to_another_process():
    cloudpickle.register_pickle_by_value(sample)  # as it is where the script is __main__
    try:
        assert cloudpickle.loads(cloudpickle.dumps(sample.agreement)).__name__ == "agreement"
        assert cloudpickle.dumps(sample.main)
    finally:
        cloudpickle.unregister_pickle_by_value(sample)


def test_labels_go_by_the_names_of_the_runs_classes(tmp_path):
    run = Run.create(tmp_path / "animals", {"class_names": ["cat", "dog", "10"]})
    assert conditions.labels_of(OmegaConf.create(["dog", 0, "10"]), run) == [1, 0, 2]
    for label, message in (("dgo", "unknown label 'dgo': did you mean 'dog'"), (10, "label=10 is the name of class 2")):
        with pytest.raises(ValueError, match=message):
            conditions.labels_of(label, run)
    nameless = Run.create(tmp_path / "digits", {"class_names": None})
    with pytest.raises(ValueError, match="label='dog' is not a class: give a whole number"):
        conditions.labels_of("dog", nameless)


def test_results_of_other_settings_take_another_folder(tmp_path):
    home = tmp_path / "heun"
    assert output.folder_of({"seed": 0}, home) == home
    assert output.folder_of({"seed": 1}, home) == tmp_path / "heun-2"
    assert output.folder_of({"seed": 0}, home) == home
    assert output.folder_of({"seed": 1}, home) == tmp_path / "heun-2"
    assert not list(tmp_path.rglob(".partial*"))

"""Scripts on runs whose networks have not learnt to do without their conditions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typed import script

from score_sde import VPSDE, LearnedScore, Run
from score_sde.likelihood import log_likelihood
from score_sde.parameterization import Noise

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from scripting import conditions  # noqa: E402

SHORT = ["trainer.steps=300", "trainer.batch_size=256", "trainer.log_every=100", "trainer.progress=false", "figures=false",
         "evaluation.samplers=[ddim]", "evaluation.metrics=[sliced_w2]", "num_samples=400", "network.width=32",
         "network.depth=1", "data=file", "data.held_out=0.5", "trainer.learning_rate=5e-3"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four narrow Gaussians at distance 4 from the origin, the place of each its label and its context."""
    g = np.random.default_rng(0)
    labels = g.integers(0, 4, 2000)
    places = 4 * np.stack([np.cos(np.pi * labels / 2), np.sin(np.pi * labels / 2)], 1)
    file = tmp_path_factory.mktemp("data") / "four.npz"
    np.savez(file, x=(places + 0.3 * g.normal(size=places.shape)).astype(np.float32), y=labels,
             c=(places / 4).astype(np.float32))  # fmt: skip
    return file


def trained(data: Path, *own: str) -> Path:
    run = data.parent / own[0].replace("=", "-")
    script("train", f"hydra.run.dir={run}", f"data.path={data}", *own, *SHORT, cwd=data.parent)
    return run


@pytest.fixture(scope="module")
def by_context(data: Path) -> Path:
    return trained(data, "data.context=c", "network.context_width=2")


@pytest.fixture(scope="module")
def by_label(data: Path) -> Path:
    return trained(data, "data.labels=y", "network.num_classes=4")


def test_a_model_of_contexts_is_measured_and_sampled_under_those_of_its_data(by_context: Path) -> None:
    """Without one, samples lie between the modes, at five times the noise floor."""
    own = json.loads((by_context / "result.json").read_text())["metric"]
    script("evaluate", f"run={by_context}", "sampler=ddim", "figures=false", cwd=by_context)
    ratio = pd.read_csv(by_context / "evaluation/evaluation.csv")["ratio"].item()
    assert own < 2 > ratio
    for samples in (by_context / "samples", by_context / "evaluation/samples"):
        context, x = (np.load(samples / f"{name}.npy") for name in ("context", "ddim"))
        assert len(x) == len(context)
        assert np.median(np.abs(x - 4 * context)) < 0.5
    said = script("sample", f"run={by_context}", "sampler=ddim", "num_samples=100", cwd=by_context)
    assert "contexts of the first training examples" in said
    script(
        "sample",
        f"run={by_context}",
        "sampler=ddim",
        "num_samples=100",
        "context=[0,-1]",
        "output=down",
        cwd=by_context,
    )
    x = np.load(by_context / "down/samples.npy")
    assert np.abs(x.mean(0) - [0, -4]).max() < 0.5
    np.save(by_context / "two.npy", np.array([[1.0, 0.0], [-1.0, 0.0]]))
    asked = ["sampler=ddim", "num_samples=100", f"context={by_context / 'two.npy'}", "output=both"]
    script("sample", f"run={by_context}", *asked, cwd=by_context)
    x = np.load(by_context / "both/samples.npy")
    assert np.abs(x[::2].mean(0) - [4, 0]).max() < 0.5 > np.abs(x[1::2].mean(0) - [-4, 0]).max()


@pytest.mark.parametrize("name", ["by_context", "by_label"])
def test_densities_are_given_each_example_s_conditions(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    said = script("likelihood", f"run={folder}", "count=20", cwd=folder)
    assert "densities given each example's" in said
    run = Run.open(folder)
    held = run.data().reference(20)
    wanted = log_likelihood(run.model(), held.x, condition=held.condition, rtol=1e-4, atol=1e-4).log_prob
    table = pd.read_csv(folder / "likelihood/likelihood.csv")
    found = torch.tensor(table.loc[table["set"] == "held out", "log_prob"].to_numpy())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-2)


def test_what_only_an_unconditional_score_can_do_is_refused(by_label: Path) -> None:
    asked = ["sampler=ddim", "num_samples=10", "label=2"]
    script("sample", f"run={by_label}", *asked, cwd=by_label)
    refused = script("sample", f"run={by_label}", *asked, "guidance.scale=3", cwd=by_label, code=1)
    assert "has not learnt to do without" in refused
    refused = script("tune", f"run={by_label}", cwd=by_label, code=1)
    assert "has not learnt to do without its label" in refused


@pytest.mark.parametrize(("name", "condition"), [("by_label", "label=1"), ("by_context", "context=[0,1]")])
def test_a_table_is_fitted_under_one_condition(name: str, condition: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    quick = ["steps=3", "iterations=3", "starts=2", "samples=64", "report=false", "output=tables"]
    script("tune", f"run={folder}", condition, *quick, cwd=folder)
    table = folder / "tables/tuned-3.json"
    settings = json.loads(table.read_text())["record"]["settings"]
    assert {name: settings[name] for name in ("label", "context") if name in settings} in (
        {"label": 1},
        {"context": [0, 1]},
    )
    asked = ["sampler=tuned", f"sampler.table={table}", condition, "num_samples=200", "output=tuned"]
    assert "fitted" not in script("sample", f"run={folder}", *asked, cwd=folder)
    other = ["sampler=tuned", f"sampler.table={table}", {"label=1": "label=2"}.get(condition, "context=[1,0]")]
    said = script("sample", f"run={folder}", *other, "num_samples=5", "output=other", cwd=folder)
    assert f"fitted under {name[3:]}=" in said
    assert np.abs(np.load(folder / "tuned/samples.npy").mean(0) - [0, 4]).max() < 0.5
    measured = [f"run={folder}", "sampler=tuned", f"sampler.table={table}", "num_samples=20", "figures=false"]
    other, drawn = (["label=2"], "label=2") if name == "by_label" else ([], "context=<of each training example>")
    said = script("evaluate", *measured, *other, "output=measured", cwd=folder)
    assert f"fitted under {condition.replace(',', ', ')}, not under {drawn}, as these samples are drawn" in said
    if name == "by_label":
        assert "fitted" not in script("evaluate", *measured, condition, "output=same", cwd=folder)
        assert "give one, which all samples share" in script("tune", f"run={folder}", "label=[0,1]", cwd=folder, code=1)


@pytest.mark.parametrize("name", ["by_context", "by_label"])
def test_samplers_are_compared_under_the_conditions_of_the_data(name: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(name)
    quick = ["samplers=[heun,adaptive_ode]", "budgets=[25]", "seeds=[0]", "num_samples=300", "metrics=[sliced_w2]"]
    said = script("compare", f"run={folder}", *quick, "pairs=100", "output=compared", cwd=folder)
    assert f"samples have the {name[3:]} of the first training examples\n" in said
    table = pd.read_csv(folder / "compared/comparison.csv")
    assert (table["sliced_w2"] < 2 * table["sliced_w2_floor"]).all()
    assert (table["endpoint_error"] < 0.05).all()


def test_samplers_are_compared_on_the_labels_that_are_asked_for(by_label: Path, by_context: Path) -> None:
    quick = ["samplers=[heun]", "budgets=[15]", "seeds=[0]", "num_samples=100", "metrics=[sliced_w2]", "pairs=0"]
    said = script("compare", f"run={by_label}", *quick, "label=[0,2]", "output=two", cwd=by_label)
    assert "label of the first training examples, of label 0 or 2" in said
    table = pd.read_csv(by_label / "two/comparison.csv")
    assert table["sliced_w2"].item() < 2 * table["sliced_w2_floor"].item()
    x = np.load(by_label / "two/samples" / f"{table['cell'].item()}.npy")
    assert np.quantile(np.abs(x[:, 1]), 0.9) < 2
    for run, label, message in ((by_label, 7, "knows the classes 0 to 3"), (by_context, 1, "knows no classes")):
        assert message in script("compare", f"run={run}", f"label={label}", cwd=by_label, code=1)


class Labelled(torch.nn.Module):
    def forward(self, x, c_noise, label=None):
        return x


def test_a_network_of_ones_own_that_takes_labels_need_not_say_how_many_there_are() -> None:
    model = LearnedScore(Labelled(), VPSDE(), Noise(), (2,))
    conditions.check_labels([0, 7], model)
    with pytest.raises(ValueError, match="label=-1"):
        conditions.check_labels([-1], model)
    model = LearnedScore(torch.nn.Bilinear(2, 1, 2), VPSDE(), Noise(), (2,))
    with pytest.raises(ValueError, match="knows no classes"):
        conditions.check_labels([0], model)


def test_a_damaged_checkpoint_is_named_with_what_is_left(by_label: Path) -> None:
    checkpoints = Run.open(by_label).checkpoints
    file = checkpoints.path() / "ema.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:1000])
    refused = script("sample", f"run={by_label}", "label=2", cwd=by_label, code=1)
    file.write_bytes(whole)
    assert "ema.safetensors is damaged: remove" in refused
    assert "Traceback" not in refused


OWN = """
import torch
from torch import nn
from score_sde.data import Batch, Data
from score_sde.keyed import ALL, generator


class Hot(Data):
    event_shape = (2,)

    def batch(self, step, batch_size, rows=ALL):
        batch = self.draw(batch_size, generator(0, step))
        return Batch(batch.x[rows], {"temperature": batch.condition["temperature"][rows]})

    def reference(self, count):
        return self.draw(count, generator(0, "reference"))

    def draw(self, count, source):
        temperature = 0.1 + 2 * torch.rand(count, generator=source)
        return Batch(temperature[:, None] * torch.randn(count, 2, generator=source), {"temperature": temperature})


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 32), nn.SiLU(), nn.Linear(32, 2))

    def forward(self, x, c_noise, temperature=None):
        temperature = torch.zeros(len(x)) if temperature is None else temperature
        return self.layers(torch.cat([x, c_noise[:, None], temperature[:, None]], 1))


def gap(x, y):
    return (x.std() - y.std()).abs().item()
"""


def test_a_condition_of_ones_own_name_is_told_and_a_metric_of_ones_own_measured(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "hot.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    own = ["~data", "+data={_target_: hot.Hot}", "~network", "+network={_target_: hot.Network}", "trust=[hot]"]
    options = [one for one in SHORT if not one.startswith(("network", "data"))] + ["evaluation.metrics=[hot.gap]"]
    script("train", f"hydra.run.dir={tmp_path / 'run'}", *own, *options, cwd=tmp_path)
    asked = ["run=run", "sampler=ddim", "trust=[hot]"]
    said = script("sample", *asked, cwd=tmp_path)
    assert "temperatures of the first training examples: give +condition.temperature=" in said
    np.save(tmp_path / "two.npy", np.array([0.1, 2.0]))
    script("sample", *asked, "+condition.temperature=two.npy", "num_samples=1000", "output=two", cwd=tmp_path)
    x = np.load(tmp_path / "two/samples.npy")
    assert x[::2].std() < 0.75 * x[1::2].std()
    for temperature, name in ((0.1, "low"), (2.0, "high")):
        script("sample", *asked, f"+condition.temperature={temperature}", f"output={name}", cwd=tmp_path)
    low, high = (np.load(tmp_path / name / "samples.npy").std() for name in ("low", "high"))
    assert low < 0.75 * high
    assert "temperatures of the first" in script("evaluate", *asked, "figures=false", cwd=tmp_path)
    assert json.loads((tmp_path / "run/result.json").read_text())["ddim/gap"] < 0.5
    assert pd.read_csv(tmp_path / "run/evaluation/evaluation.csv")["metric"].tolist() == ["gap"]
    few = ["samplers=[ddim]", "budgets=[5]", "seeds=[0]", "num_samples=20", "pairs=0", "trust=[hot]", "output=compared"]
    script("compare", "target=ring", "metrics=[sliced_w2,hot.gap]", *few, cwd=tmp_path)
    assert {"sliced_w2", "gap", "gap_floor"} <= {*pd.read_csv(tmp_path / "compared/comparison.csv")}
    assert Run.open(tmp_path / "run", "hot").model().needed == {"temperature"}

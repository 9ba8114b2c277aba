"""scripts/tune.py as a user types it: on a target, on a run directory, in a sweep, and wrong inputs."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from omegaconf import OmegaConf
from typed import script

from score_sde.tuning import TunedTable

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import tune  # noqa: E402
from scripting import configs, tuned_tables  # noqa: E402

QUICK = ["iterations=10", "starts=2", "samples=64", "num_samples=50", "seeds=[0,1]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ring was tuned, and what was said."""
    home = tmp_path_factory.mktemp("home")
    (home / "said.txt").write_text(script("tune", "target=ring", "steps=[2,3]", *QUICK, cwd=home))
    return home


def test_a_target_is_tuned_and_measured_beside_spectrum_and_untuned(home: Path) -> None:
    said, folder = (home / "said.txt").read_text(), home / "outputs/tuned/ring/vp"
    assert {f"{kind}-{n}.json" for kind in ("tuned", "spectrum") for n in (2, 3)} < set(os.listdir(folder))
    table = pd.read_csv(folder / "tuning.csv")
    assert set(zip(table["kind"], table["calls"], strict=True)) == {
        ("converged", 0), ("tuned", 2), ("tuned", 3), ("spectrum", 2), ("spectrum", 3), ("untuned", 2), ("untuned", 3),
        ("untuned", 6), ("late", 2), ("late", 3), ("late", 6)}  # fmt: skip
    assert set(table["seed"]) == {0, 1}
    assert (folder / "tuning.png").exists()
    assert "tuning.csv" in said
    quick = ["budgets=[2,4]", "seeds=0", "num_samples=40", "metrics=[sliced_w2]", "pairs=0", "output=compared"]
    script("compare", "target=ring", "samplers=[tuned,spectrum]", *quick, cwd=home)
    compared = pd.read_csv(home / "compared/comparison.csv")
    assert sorted(zip(compared["sampler"], compared["nfe"], strict=True)) == [
        ("spectrum", 2), ("spectrum", 3), ("tuned", 2), ("tuned", 3)]  # fmt: skip


def test_figures_of_earlier_calls_are_kept(tmp_path: Path, capsys) -> None:
    rows = [("tuned", 2, 0.5), ("untuned", 2, 0.6), ("untuned", 4, 0.7)]

    def figures(rows: list, **made_with: int) -> pd.DataFrame:
        table = pd.DataFrame(rows, columns=["kind", "calls", "endpoint"])
        return table.assign(**{"seed": 0, "step": 20, "num_samples": 100} | made_with)

    old, new = figures(rows), [("tuned", 4, 0.1), ("untuned", 4, 0.2)]
    assert tune.merged(tmp_path / "tuning.csv", old) is old
    old.to_csv(tmp_path / "tuning.csv", index=False)
    both = tune.merged(tmp_path / "tuning.csv", figures(new))
    assert both.equals(figures([*rows[:2], *new]))
    assert capsys.readouterr().out == ""
    for other in ({"seed": 1}, {"step": 40}, {"num_samples": 1000}):
        table = figures(new, **other)
        assert tune.merged(tmp_path / "tuning.csv", table) is table
        assert "written anew" in capsys.readouterr().out


def test_a_run_is_tuned_and_sampled_with_its_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["trainer.steps=2", "trainer.batch_size=16", "num_samples=20", "trainer.progress=false",
            "trainer.sample_every=0", "evaluation.samplers=[ddim]", "evaluation.metrics=[sliced_w2]", "figures=false",
            "network.width=32", "network.depth=1"]  # fmt: skip
    run = tmp_path / "run"
    script("train", f"hydra.run.dir={run}", *tiny, cwd=tmp_path)
    script("tune", f"run={run}", "steps=2", *QUICK, cwd=tmp_path)
    assert len(TunedTable.load(run / "tuned-2.json").noise) == 2
    assert "2 network calls each" in script("sample", f"run={run}", "sampler=tuned", "num_samples=5", cwd=tmp_path)
    numbers = ["samplers=[tuned,spectrum]", "num_samples=20", "figures=false"]
    said = script("evaluate", f"run={run}", *numbers, cwd=tmp_path)
    assert set(pd.read_csv(run / "evaluation/evaluation.csv")["sampler"]) == {"tuned", "spectrum"}
    assert "fitted to" not in said
    script("train", f"resume={run}", "trainer.steps=4", cwd=tmp_path)
    said = script("sample", f"run={run}", "sampler=tuned", "num_samples=5", cwd=tmp_path)
    assert "fitted to the weights of step 2, not to step 4 of this run: fit one" in said

    def of(step: int | None = None, name: str = "tuned", **given: object) -> str:
        configs.sampler_config(OmegaConf.merge(configs.named("sampler", name), given), run, step)
        return capsys.readouterr().out

    for given in ({}, {"calls": 2}, {"table": str(run / "tuned-2.json")}):
        assert "fitted to the weights of step 2, not to step 4" in of(**given)
        assert of(step=2, **given) == ""
    assert of(name="spectrum") == ""
    other = tmp_path / "other"
    other.mkdir()
    for name in ("config.yaml", "tuned-2.json"):
        shutil.copy(run / name, other)
    assert "fitted to another run" in of(table=str(other / "tuned-2.json"))
    with pytest.raises(ValueError, match=r"has tuned-\*.json for 2 calls, not for calls=3"):
        of(calls=3)


def test_help_says_what_the_script_and_its_keys_are_for(tmp_path: Path) -> None:
    said = script("tune", "--help", cwd=tmp_path)
    assert said.startswith("# Fits solvers of few network calls")
    assert "candidates that are fitted" in said
    assert "== Configuration groups ==" in said


def test_a_better_table_is_kept_and_the_same_one_not_fitted_again(home: Path, tmp_path: Path) -> None:
    given = ["target=ring", "steps=2", "report=false", *QUICK]
    path = tmp_path / "outputs/tuned/ring/vp/tuned-2.json"
    shutil.copytree(home / "outputs", tmp_path / "outputs")
    text, good = path.read_text(), TunedTable.load(path)
    said = script("tune", *given, cwd=tmp_path)
    assert all(f"{kind}-2.json: fitted with these settings already" in said for kind in ("tuned", "spectrum"))
    assert path.read_text() == text
    assert "the table that was there is kept" in script("tune", *given, "iterations=1", cwd=tmp_path)
    kept = TunedTable.load(path)
    assert kept.contents() | {"record": None} == good.contents() | {"record": None}
    assert kept.record["chosen"] == "the earlier table"


def test_tables_of_one_folder_are_of_one_condition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"tuned-6.json was fitted under label=3: .* for tables under label=4"):
        tuned_tables.check_conditions(left(tmp_path, {"label": 3}), {"label": 4})
    with pytest.raises(
        ValueError, match=r"tuned-6.json was fitted without a label or context: give output=<another folder>"
    ):
        tuned_tables.check_conditions(left(tmp_path, {}), {"context": [1.0]})
    tuned_tables.check_conditions(left(tmp_path, {"label": 3}), {"label": 3})
    tuned_tables.check_conditions(left(tmp_path, None), {"label": 3})  # of before tables said so
    (left(tmp_path, {}) / "spectrum-6.json").write_text("[]")
    (tmp_path / "tuned-6.json").write_text("damaged")
    tuned_tables.check_conditions(tmp_path, {"label": 3})
    (tmp_path / "spectrum-6.json").unlink()
    for given, said in (({"label": 3}, "fitted under label=3, and only for such samples"), ({}, "")):
        node = OmegaConf.create({"table": str(left(tmp_path, given) / "tuned-6.json")})
        tuned_tables.take_table(node, tmp_path, None)
        assert said in (out := capsys.readouterr().out)
        assert bool(said) == bool(out)
    for given, asked, said in (({"label": 3}, {"label": 3}, ""), ({}, {}, ""), (None, {"label": 3}, ""),
                               ({"label": 3}, {"label": 5}, "fitted under label=3, not under label=5"),
                               ({}, {"label": 5}, "fitted without a label or context, not under label=5"),
                               ({"context": [0, 1]}, {"context": [0.0, 1.0]}, "")):  # fmt: skip
        node = OmegaConf.create({"table": str(left(tmp_path, given) / "tuned-6.json")})
        tuned_tables.take_table(node, tmp_path, None, asked)
        assert said in (out := capsys.readouterr().out)
        assert bool(said) == bool(out)


def left(folder: Path, settings: dict | None) -> Path:
    record = {"record": {} if settings is None else {"settings": {"seed": 0, **settings}}}
    (folder / "tuned-6.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "tune for what?"), (["target=ring", "run=x"], "tune for what?"), (["target=ring", "steps=0"], "steps >= 1"),
     (["target=ring", "steps=[3,2.5]"], "steps >= 1, got steps=2.5"),
     (["target=ring", "method=magic"], "coefficients, grid"),
     (["target=ring", "label=3"], "label=3 does nothing with a target"),
     (["target=ring", "context=[1]"], "context=[1] does nothing with a target"),
     (["target=ring", "spectrum=true", "method=grid"], "method=grid does nothing with spectrum=true")],
)  # fmt: skip
def test_wrong_inputs_end_in_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    said = script("tune", *arguments, *QUICK, cwd=tmp_path, code=1)
    assert message in said
    assert said.strip().count("\n") == 0

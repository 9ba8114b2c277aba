"""scripts/compare.py as a user types it: one page with everything, resumed where it was, and wrong inputs in one line."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import hydra
import pandas as pd
import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from score_sde import VPSDE, LearnedScore, networks, targets
from score_sde.evaluation import judge
from score_sde.parameterization import Noise
from score_sde.tuning import untuned

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
import compare  # noqa: E402
from scripting import comparison_report, configs, html_page, restoring, subjects  # noqa: E402
from typed import script  # noqa: E402

QUICK = ["target=ring", "budgets=[5,12]", "seeds=[0,1]", "num_samples=60", "metrics=[sliced_w2,mode_spread]"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("compared")
    for name, table in untuned(VPSDE(), 5).items():
        if name == "exponential Adams 2 on karras":
            table.save(home / "tuned-5.json")
    own = [
        "+own.broken._target_=score_sde.sampler.Sampler",
        "+own.broken.predictor=euler_maruyama",
        "+own.broken.grid=churn",
    ]
    samplers = "samplers=[ddim,heun,ancestral,annealed_langevin,adaptive_ode,tuned]"
    said = script("compare", *QUICK, samplers, *own, f"tables={home}", "output=out", cwd=home)
    (home / "said.txt").write_text(said)
    return home / "out"


def test_the_table_holds_every_run(compared: Path) -> None:
    table = pd.read_csv(compared / "comparison.csv")
    assert table.groupby("sampler").size().to_dict() == {
        "ddim": 4, "heun": 4, "ancestral": 4, "annealed_langevin": 4, "adaptive_ode": 2, "tuned": 4, "broken": 4,
    }  # fmt: skip
    ran = table[(table["budget"] > 0) & table["nfe"].notna()]
    assert (ran["nfe"] <= ran["budget"]).all()
    assert set(table.loc[table["sampler"] == "tuned", "nfe"]) == {5}
    assert (
        table.loc[(table["sampler"] == "annealed_langevin") & (table["budget"] == 5), "status"]
        .str.startswith("refused")
        .all()
    )
    deterministic = set(table.loc[table["endpoint_error"].notna(), "sampler"])
    assert deterministic == {"ddim", "heun", "adaptive_ode", "tuned"}
    summary = pd.read_csv(compared / "summary.csv")
    assert len(summary) == 6 * 2 + 1
    assert {"sliced_w2_ratio", "mode_spread_error", "excess", "worst"} <= set(summary)


def test_the_closing_line_names_what_is_there(compared: Path) -> None:
    folder, _, names = (compared.parent / "said.txt").read_text().splitlines()[-1].partition(": ")
    named = {re.sub(r" \(.*\)|/", "", name) for name in names.split(", ")}
    there = {file.name for file in (compared.parent / folder).iterdir()}
    assert named == there - {"cells.jsonl", "limits"}  # what a killed comparison is taken up from


@pytest.mark.parametrize("path", ["README.md", "docs/choosing_a_sampler.md", "conf/compare.yaml"])
def test_the_numbers_told_are_those_of_the_config(path: str) -> None:
    config = OmegaConf.load(ROOT / "conf/compare.yaml")
    numbers = len(set(config.samplers) - {"tuned"}), len(config.budgets), len(config.seeds)  # tuned needs tables
    told = re.findall(r"(\d+) samplers, (\d+) budgets, (\d+) seeds", (ROOT / path).read_text())
    assert [tuple(map(int, found)) for found in told] == [numbers]


def test_the_page_stands_alone(compared: Path) -> None:
    html = (compared / "report.html").read_text()
    figures = {file.name for file in compared.glob("*.png")}
    assert figures == {"ratios.png", "sliced_w2_calls.png", "mode_spread_calls.png", "sliced_w2_seconds.png",
                       "mode_spread_seconds.png", "endpoint_error.png", "samples.png"}  # fmt: skip
    assert html.count("src=") == html.count('src="data:image/png;base64,') == len(figures)
    bare = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//\w+\.|@import|<link|<script src", bare)
    for needed in (
        "What to take",
        "<th",
        "onclick",
        "python scripts/compare.py target=ring",
        "torch",
        "annealed_langevin",
    ):
        assert needed in bare
    assert len(re.findall("<table", bare)) == len(re.findall("</table", bare)) == 4


def test_advice_says_where_none_is_near_the_noise_floor(compared: Path) -> None:
    table = pd.read_csv(compared / "comparison.csv")
    good = table.assign(**{metric: table[f"{metric}_floor"] for metric in ("sliced_w2", "mode_spread")})
    assert comparison_report.advice(good)[0].startswith("at the goal with the fewest calls: ")
    far = good.assign(sliced_w2=good["sliced_w2_floor"] * (9 + good["budget"]))
    first, second = comparison_report.advice(far[far["sampler"].isin(["heun", "ddim"])])[:2]
    assert re.fullmatch(
        r"no sampler is near the noise floor: the nearest, \w+ with 5 calls, is at 14 floors by sliced_w2.", first
    )
    assert second.startswith("within 1.25 times the best of them with the fewest calls: ")
    first, second = comparison_report.advice(far[far["sampler"] == "heun"])[:2]
    assert "heun with 5 calls" in first
    assert "best of" not in second


def test_a_sampler_that_was_lost_at_every_budget_stays_in_the_figures(compared: Path) -> None:
    table = pd.read_csv(compared / "comparison.csv").query("budget > 0")
    lost, refused = table["sampler"] == "ddim", table["sampler"] == "heun"
    figures = [name for name in table if table[name].dtype == float and "floor" not in name]
    table.loc[lost | refused, figures] = float("nan")
    table.loc[refused, "status"] = "refused: x"
    table.loc[lost, "status"] = [f"diverged: {i} samples are not finite" for i in range(lost.sum())]
    faults = comparison_report.faults(table[lost])
    assert faults[["sampler", "budget", "seeds"]].values.tolist() == [["ddim", 5, 2], ["ddim", 12, 2]]
    metrics = ["sliced_w2", "mode_spread"]
    shown = {one.stem: one.figure for _, one in comparison_report.pictures(table, judge(table), metrics)}
    rows = [label.get_text() for label in shown["ratios"].axes[0].get_yticklabels()]
    assert rows[-2:] == ["ddim", "heun"]  # those without a good run, in the table's order
    crossed = next(ax for ax in shown["sliced_w2_calls"].axes if ax.get_title() == "ddim")
    assert [list(line.get_xdata()) for line in crossed.lines if line.get_marker() == "x"] == [[5, 12]]
    assert "heun" not in {ax.get_title() for ax in shown["sliced_w2_calls"].axes}


def test_a_killed_run_is_taken_up_where_it_was(compared: Path, tmp_path: Path) -> None:
    cells = compared / "cells.jsonl"
    lines = cells.read_text().splitlines()
    ddim = next(i for i, line in enumerate(lines) if json.loads(line).get("nfe") == 5)
    cells.write_text("\n".join(lines[:ddim] + lines[ddim + 1 :]) + "\n" + '{"key": "cut')
    said = script("compare", *QUICK, "samplers=[ddim,heun,tuned]", f"output={compared}", cwd=tmp_path)
    assert "tuned is left out: outputs/tuned/ring/vp holds no tables" in said
    again = cells.read_text().splitlines()
    assert len(again) == len(lines) + 1
    timeless = [{k: v for k, v in json.loads(line).items() if "seconds" not in k} for line in (again[-1], lines[ddim])]
    assert timeless[0] == timeless[1]


def test_a_report_gives_way_to_one_of_more_runs_alone(tmp_path: Path) -> None:
    quick = ["target=ring", "num_samples=40", "metrics=[sliced_w2]", "pairs=0", "output=out"]
    for samplers, budgets, seeds in ("ddim", "5", "0"), ("ddim,heun", "5,9", "0,1"):
        options = [f"samplers=[{samplers}]", f"budgets=[{budgets}]", f"seeds=[{seeds}]"]
        said = script("compare", *quick, *options, cwd=tmp_path)
        assert said.splitlines()[-1].startswith("out: report.html")
    assert os.listdir(tmp_path) == ["out"]
    cells, report = (tmp_path / "out/cells.jsonl").read_text(), (tmp_path / "out/report.html").read_text()
    said = script("compare", *quick, "samplers=[heun]", "budgets=[5]", "seeds=[0]", cwd=tmp_path)
    assert said.splitlines()[-2].startswith("out-2: report.html")
    assert (tmp_path / "out/cells.jsonl").read_text() == cells  # all had been computed
    assert (tmp_path / "out/report.html").read_text() == report
    assert (tmp_path / "out-2/samples.png").exists()
    assert set(pd.read_csv(tmp_path / "out-2/comparison.csv")["sampler"]) == {"heun"}


WRONG = {
    "no tables": (["target=ring", "samplers=[tuned]"], "outputs/tuned/ring/vp holds no tables tuned-<calls>.json"),
    "idle tables": (
        ["target=ring", "samplers=[ddim]", "tables=here"],
        "tables=here does nothing without tuned or spectrum",
    ),
    "a mapping of no tables": (["target=ring", "samplers=[tuned]", "tables={}"], "tables={} has no table: give"),
    "unknown metric": (["target=ring", "metrics=[fid]"], "unknown metric 'fid'"),
    "posteriors without images": (
        ["task=superres", "restoration.draws=2"],
        "restoration.draws=2 does nothing",
    ),
    "images without a law": (
        ["task=superres", "run=x", "restoration.prior=ring"],
        "does nothing with run=x, whose images",
    ),
    "nothing can run": (["target=ring", "samplers=annealed_langevin", "budgets=3"], "no sampler could run"),
    "untrusted code": (["target=ring", "+own.x._target_=os.system"], "is refused"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_ends_in_one_line_and_leaves_nothing(case: str, tmp_path: Path) -> None:
    arguments, message = WRONG[case]
    error = script("compare", *arguments, "num_samples=40", cwd=tmp_path, code=1)
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert os.listdir(tmp_path) == []


def composed(*arguments: str) -> DictConfig:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose("compare", list(arguments))


def test_a_law_and_an_sde_of_the_user_s_own_are_trusted_by_name(tmp_path: Path, monkeypatch) -> None:
    code = """\
from score_sde import RectifiedFlow, targets
def law(): return targets.make("ring")
class Own(RectifiedFlow): pass
class Half(targets.GaussianMixture):
    def __init__(self): super().__init__([1.0], [[1.0, 2.0]], [[[1.0, 0.0], [0.0, 1.0]]])
    def denoise(self, x, alpha, sigma): return super().denoise(x, alpha, sigma) / 2
"""
    (tmp_path / "own_law.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    own = ["~sde", "+sde={_target_: own_law.Own}", "~target", "+target={_target_: own_law.law}"]
    with pytest.raises(ValueError, match=r"trust=\['own_law'\]"):
        subjects.of_target(composed(*own))
    subject = subjects.of_target(composed(*own, "trust=[own_law]"))
    assert (type(subject.model.sde).__name__, subject.model.target) == ("Own", subject.reference)
    half = ["~target", "+target={_target_: own_law.Half}", "trust=[own_law]"]
    for name in ("train", "compare"):
        assert "Half.denoise contradicts" in script(name, *half, cwd=tmp_path, code=1)
    options = ["task=linear", "restoration.prior=ring", "restoration.methods=[exact]", "restoration.samplers=[ddim]"]
    few = ["budgets=[3]", "seeds=[0]", "num_samples=50", f"output={tmp_path / 'out'}"]
    restoring.run_task(composed(*own, "trust=[own_law]", *options, *few))


def test_tables_are_of_the_weights_that_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoints/step-000000040").mkdir(parents=True)
    table = untuned(VPSDE(), 5)["exponential Adams 2 on karras"]
    table.record.update(step=20)
    table.save(tmp_path / "tuned-5.json")
    for step, told in (20, ""), (40, "fitted to the weights of step 20, not to step 40"):
        config = composed(f"run={tmp_path}", "samplers=[tuned]", f"step={step}")
        assert compare.contestants(config)[0]["tuned"].keys() == {5}
        assert told in (said := capsys.readouterr().out)
        assert bool(told) == bool(said)


def test_samples_are_as_many_as_the_held_out_examples_allow(capsys: pytest.CaptureFixture[str]) -> None:
    config = OmegaConf.create({"run": "runs/few", "num_samples": 2000})
    compare.fit_to(config, targets.make("ring"))
    assert config.num_samples == 2000
    compare.fit_to(config, torch.zeros(301, 2))
    assert config.num_samples == 150
    assert capsys.readouterr().out == "num_samples=150, not 2000: runs/few has 301 held-out examples\n"
    with pytest.raises(ValueError, match=r"runs/few has 3 held-out examples, .* greater data\.held_out"):
        compare.fit_to(config, torch.zeros(3, 2))


def test_labels_of_a_run_are_said_to_be_left_out(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = LearnedScore(networks.MLP(event_shape=(2,), width=8, depth=1, num_classes=3), VPSDE(), Noise(), (2,))
    data, config = SimpleNamespace(target="law"), OmegaConf.create({"objective": {"label_dropout": 0.1}})
    last = SimpleNamespace(latest=lambda: 7)
    run = SimpleNamespace(
        path="runs/labelled", config=config, data=lambda: data, model=lambda **_: model, checkpoints=last
    )
    monkeypatch.setattr(configs, "open_run", lambda config: run)
    subjects.of_run(composed("run=runs/labelled", "device=cpu"))
    assert "runs/labelled knows 3 labels: sampled without, and compared with data of all" in capsys.readouterr().out


def test_cells_of_a_table_are_escaped_and_sorted_by_value() -> None:
    frame = pd.DataFrame({"name": ["<b>", "a & b"], "value": [0.00012345, float("nan")], "count": [3, 20]})
    html = html_page.table(frame, {"value": "Value <1>"})
    assert "&lt;b&gt;" in html
    assert "a &amp; b" in html
    assert 'data-value="0.00012345">0.000123</td>' in html
    assert '<td class="number">–</td>' in html
    assert "Value &lt;1&gt;</th>" in html
    assert 'data-value="20.0">20</td>' in html

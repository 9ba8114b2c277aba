"""What the command line gives, held against the config files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from scripting import command_line, entry

DEFAULT = {"steps": 6, "seeds": [0], "report": True, "run": None, "own": {}, "sigma_max": "auto", "scale": "???",
           "evaluation": {"metrics": None, "references": {}},
           "sampler": {"_target_": "Sampler", "grid": {"_target_": "karras", "steps": 20}}}  # fmt: skip


def checked(*overrides: str, **more: Any) -> Any:
    default = OmegaConf.create(DEFAULT)
    given = OmegaConf.from_dotlist([override.lstrip("+") for override in overrides if override[0] != "~"])
    config = OmegaConf.merge(default, given, more)
    command_line.check_values(overrides, default, config)
    return config


@pytest.mark.parametrize(
    "override",
    ["steps=8", "steps=[3,4]", "steps=2.5", "steps=auto", "run=null", "report=false", "report=0.1", "run=nowhere",
     "sigma_max=50", "scale=abc", "sampler.grid=karras", "sampler.grid.steps=3", "+sampler.grid.rho=7", "+own.mine=heun",
     "+evaluation.references.pca=here", "+run.new=3", "~sampler.grid",
     "sampler.grid.steps=null"],
)  # fmt: skip
def test_values_of_the_kind_that_the_config_files_have_pass(override: str) -> None:
    checked(override)


def test_one_value_for_a_list_becomes_a_list() -> None:
    assert checked("seeds=3").seeds == [3]
    assert checked("seeds=[3,4]").seeds == [3, 4]


def test_a_name_of_ones_own_is_for_other_values() -> None:
    checked("+width=3", "steps=${width}")
    checked("+width=3", "steps=${oc.select:width}")
    for other in ("steps=3", "run=${widths}", "run=${of.width}"):
        with pytest.raises(ValueError, match="unknown key 'width'"):
            checked("+width=3", other, widths=1, of={"width": 1})
    default = OmegaConf.create(DEFAULT)
    named = OmegaConf.merge(default, {"tag": "foo"})
    command_line.check_values(["+tag=foo"], default, named, ["hydra.run.dir=runs/${tag}"])


def test_a_mapping_of_ones_own_is_open() -> None:
    default = OmegaConf.create({**DEFAULT, "notes": {"who": "me"}})
    command_line.check_values(["+notes.new=5"], default, OmegaConf.merge(default, {"notes": {"new": 5}}))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=many", "steps='many' is no number: give one such as 6"),
        ("steps=[3,many]", "is no number"),
        ("steps=null", "steps=null is no number: give one such as 6"),
        ("steps=true", "steps=True is no number"),
        ("sampler.grid.steps=many", "such as 20"),
        ("report=maybe", "report='maybe' is neither true nor false"),
        ("report=[true]", "neither true nor false"),
        ("own=heun", r"no mapping from names to values: give \+own.<name>=<value>"),
        ("+step=3", "unknown key 'step': did you mean 'steps'"),
        ("++step=3", "unknown key 'step': did you mean 'steps'"),
        ("+evaluation.metric=w2", "unknown key 'evaluation.metric': did you mean 'evaluation.metrics'"),
        ("+evaluation.steps=3", "unknown key 'evaluation.steps': did you mean 'steps' or 'sampler.grid.steps'"),
    ],
)
def test_others_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(override)


def test_a_key_is_sought_beside_the_wrong_one_and_elsewhere_and_by_its_initials() -> None:
    config = OmegaConf.create({"step": None, "grid": {"steps": 20}, "trainer": {"learning_rate": 1e-3}})
    for key, meant in {
        "grid.step": "'grid.steps' or 'step'",
        "lr": "'trainer.learning_rate'",
        "trainer.lr": "'trainer.learning_rate'",
        "trainer.rate": "'trainer.learning_rate'",
    }.items():
        home = key.rpartition(".")[0]
        line = command_line.unknown_key(key, OmegaConf.select(config, home) if home else config)
        assert line.startswith(f"unknown key {key!r}: did you mean {meant}? known: ")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("runs/base", "a run's folder is given as run=runs/base, to train.py as resume=runs/base"),
        ("run=rüns/mine", """quote the value, 'run="rüns/mine"'"""),
        ("output=runs/a=b", """quote the value, 'output="runs/a=b"'"""),
        ("output=[a", "no viable alternative"),
        ("+sampler/grid=karras", "sampler/grid has a choice already: give sampler/grid=<name> in its place, without +"),
        ("sampler/corrector=null", "~sampler/corrector to leave it out; known: annealed_langevin, "),
        ("sampler=null", "give sampler=<name>, or ~sampler to leave it out; known: "),
        ("~sampler", "this configuration has no sampler: give '+sampler={_target_: ...}'"),
    ],
)
def test_what_hydra_does_not_take_is_told_with_what_to_type(argument: str, message: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py", "run=null", argument])
    with pytest.raises(entry.REFUSALS) as caught, hydra.initialize_config_dir(str(entry.CONF), version_base="1.3"):
        print(hydra.compose("sample", ["sampler=heun", argument]).sampler)
    assert message in entry.one_line(caught.value)


def test_an_argument_that_a_config_does_not_name_is_given_with_a_plus() -> None:
    with hydra.initialize_config_dir(str(entry.CONF), version_base="1.3"):
        with pytest.raises(entry.REFUSALS) as caught:
            hydra.compose("sample", ["guidance.point=[3,0]"])
        assert hydra.compose("sample", ["+guidance.point=[3,0]"]).guidance.point == [3, 0]
        with pytest.raises(entry.REFUSALS) as of_no_class:
            hydra.compose("train", ["evaluation.foo=7"])
    assert "; another argument of ClassifierFree is given as +guidance.point=<value>" in entry.one_line(caught.value)
    assert "argument" not in entry.one_line(of_no_class.value)


def test_the_configs_there_are_are_named() -> None:
    with pytest.raises(entry.REFUSALS) as caught, hydra.initialize_config_dir(str(entry.CONF), version_base="1.3"):
        hydra.compose("trian")
    assert entry.one_line(caught.value).startswith("unknown config 'trian': did you mean 'train'? known: benchmark, ")


def test_a_run_that_goes_on_may_have_keys_of_its_own() -> None:
    assert checked("+other=3", resume="there").other == 3


def test_options_that_do_nothing_are_refused_by_their_first_part() -> None:
    for override in ("target=ring", "target.std=1", "+target.x=1", "target/part=a", "~target"):
        with pytest.raises(ValueError, match="does nothing here: leave it out"):
            command_line.idle([override], ["target"], "here")
    command_line.idle(["targets=1", "evaluation.target=1"], ["target"], "here")


def test_help_that_nobody_reads_ends_without_a_word() -> None:
    end, pipe = os.pipe()
    os.close(end)  # as `| head` does once it has its lines
    command = [sys.executable, "-u", str(Path(entry.__file__).parents[1] / "sample.py"), "--help"]
    done = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")

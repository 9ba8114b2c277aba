"""What the scripts share: Hydra's entry with one-line errors, named config files, and folders of results."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import command_line
import hydra
from command_line import idle, listed, misread, unknown, unknown_key
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from score_sde import SDE, LearnedScore, distributed
from score_sde.build import build
from score_sde.checks import whole
from score_sde.classifier import NoisyClassifier
from score_sde.data import Data, measure_sigma_data, measure_sigma_max
from score_sde.run import Run
from score_sde.training import DivergenceError, write_atomically

CONF = Path(__file__).resolve().parent.parent / "conf"
# What a wrong input raises; anything else is a bug of ours and keeps its traceback.
REFUSALS = (ValueError, TypeError, OSError, ImportError, DivergenceError, HydraException, OmegaConfBaseException)


def main(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """`hydra.main` over conf/<config_name>.yaml; a wrong input ends in one line on stderr and exit status 1.

    --help shows the file, whose comments say what each key is. HYDRA_FULL_ERROR=1 shows the traceback instead. In a sweep
    a failed job says its line at once, and leaves it in its result.json. Ctrl-C ends in a line and status 130.
    """
    full_error = os.environ.setdefault("HYDRA_FULL_ERROR", "0") == "1"

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def job(config: DictConfig) -> Any:
            join()  # a job that a launcher has sent to SLURM begins here
            output = Path(HydraConfig.get().runtime.output_dir)
            own = bool(config.get("resume")) or not (output / "config.yaml").exists()
            try:
                command_line.check(config)
                check_values(config)
                return task(config)
            except REFUSALS as error:
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    if distributed.is_main():
                        print(f"{output} failed: {one_line(error)}", file=sys.stderr, flush=True)
                        if own:
                            record_failure(output, error, config)
                    if full_error:
                        raise
                    report = f"python scripts/report.py {HydraConfig.get().sweep.dir}"
                    raise ValueError(f"jobs of this sweep failed, as said above: {report} lists them") from None
                leave(output)
                if full_error:
                    raise
                sys.exit(refusal(error))
            except KeyboardInterrupt:
                leave(output)
                again = f"; go on with: python scripts/train.py resume={output}"
                sys.exit(interrupted(again if Run(output).checkpoints.latest() is not None else ""))

        def run() -> None:
            if {"-h", "--help"} & {*sys.argv[1:]}:
                print((CONF / f"{config_name}.yaml").read_text())
            before = dict(os.environ)
            os.environ["HYDRA_FULL_ERROR"] = "1"
            # A job that submitit starts elsewhere finds these scripts' own modules.
            os.environ["PYTHONPATH"] = os.pathsep.join(
                filter(None, [str(Path(__file__).parent), before.get("PYTHONPATH")])
            )
            logging.getLogger("matplotlib").setLevel(logging.WARNING)
            join()
            try:
                if {"-m", "--multirun"} & {*sys.argv[1:]}:
                    idle(sys.argv[1:], ["hydra.run.dir"], "in a sweep, whose folder is hydra.sweep.dir")
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
            except REFUSALS as error:
                if full_error:
                    raise
                if isinstance(error, OSError) and error.filename:  # not the job's own, which has ended in its line
                    error = ValueError(f"{error.filename} cannot be created: {error.strerror}")
                sys.exit(refusal(error))
            finally:
                os.environ.clear()
                os.environ.update(before)

        return run

    return decorate


def record_failure(output: Path, error: BaseException, config: DictConfig) -> None:
    """result.json of a job that failed; the numbers of one that had finished stand."""
    result = output / "result.json"
    if not result.exists() or json.loads(result.read_text()).get("status") != "finished":
        Run(output).save_result({"status": "failed", "error": one_line(error), "seed": config.get("seed"),
                                 "overrides": command_line.typed()})  # fmt: skip


def leave(output: Path) -> None:
    """Removes the folder of a run that has not come to write anything."""
    if distributed.is_main() and output != Path.cwd() and output.is_dir() and not any(output.iterdir()):
        output.rmdir()


def interrupted(again: str = "") -> int:
    """The exit status of Ctrl-C, once it is said."""
    print(f"\ninterrupted{again}", file=sys.stderr)
    return 128 + signal.SIGINT


def check_values(config: DictConfig) -> None:
    """Refuses, with ValueError, a seed or counts that are no whole numbers, and folders that are no names.

    What is right but for its kind (1.0 for 1, a number for a folder's name) becomes what it means, in `config` itself.
    """
    for name in ("run", "output", "folder"):
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            config[name] = str(value)
        elif not (value is None or isinstance(value, str)):
            raise ValueError(f"{name}={value} is no folder: give the name of one")
    for name, least in (("seed", -math.inf), ("num_samples", 1), ("batch_size", 1)):
        if config.get(name) is not None:
            config[name] = whole(name, config[name], least)


def plain(node: DictConfig) -> Any:
    """A config as nested dicts and lists; what has no value yet is ???."""
    return OmegaConf.to_container(node, resolve=True)


def join() -> None:
    """Joins the processes of a launcher, of which the main one alone prints."""
    distributed.start()
    if not distributed.is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def refusal(error: BaseException) -> str | int:
    """The line on stderr for a wrong input; of several processes the main one comes first, and `torchrun` ends them.

    Where nobody reads stdout any more, as after `| head`, there is nothing to say: the shell's status for that.
    """
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 128 + signal.SIGPIPE
    if not distributed.is_main():
        time.sleep(5)
    return f"error: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """The innermost reason of an error, on one line, with the nearest known key for a misspelt one."""
    if isinstance(error, MissingConfigException):
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return unknown(group or "config", name, error.options or sorted(file.stem for file in CONF.glob("*.yaml")))
    if line := misread(error, CONF):
        return line
    if isinstance(error, MissingMandatoryValue) and error.full_key:
        return f"{error.full_key} has no value yet: give {error.full_key}=<value>"
    if isinstance(error, InterpolationKeyError):
        missing = next(iter(re.findall("'(.*?)'", str(error))), "")
        return (f"{error.full_key} is taken from {missing}, which this configuration lacks: choose another "
                f"{missing.partition('.')[0]}, or give {error.full_key}=<value>")  # fmt: skip
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} does not exist"
    if isinstance(error, ConfigAttributeError | ConfigKeyError) and error.full_key:
        value = "{_target_: ...}" if (CONF / str(error.full_key)).is_dir() else "<value>"
        return f"this configuration has no {error.full_key}: give '+{error.full_key}={value}'"
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and cause.parent_node is not None:
        return unknown_key(cause.full_key, cause.parent_node)
    return " ".join(str(error).split()) or type(error).__name__


def named(group: str, name: str) -> DictConfig:
    """The config of file `name` in a config group, e.g. named("sampler", "heun"); the job's own --config-dir is searched too.

    Raises ValueError with the known names where there is none.
    """
    own = own_folders()
    known = sorted({file.stem for folder in (str(CONF), *own) for file in Path(folder, group).glob("*.yaml")})
    if name not in known:
        raise ValueError(unknown(group, name, known))
    with _separate_hydra():
        quoted = (folder.replace("\\", "\\\\").replace("'", "\\'") for folder in own)  # as Hydra reads it
        path = ",".join(f"'file://{folder}'" for folder in quoted)
        config = hydra.compose(overrides=[f"hydra.searchpath=[{path}]", f"+{group}={name}"])
    for part in group.split("/"):
        config = config[part]
    OmegaConf.set_struct(config, False)  # open to the names that a user adds
    return config


def own_folders() -> list[str]:
    """The folders of configs beside conf/ that the job was given, by --config-dir or hydra.searchpath."""
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    return [source.path for source in sources if source.schema == "file" and Path(source.path) != CONF]


@contextmanager
def _separate_hydra() -> Iterator[None]:
    """Composes beside the application's own Hydra, which is put back afterwards."""
    instance = GlobalHydra.instance()
    own, instance.hydra = instance.hydra, None
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = own  # which may be another instance by now


class NoTablesError(ValueError):
    """A folder holds no tables of the pattern that a sampler names."""


def sampler_config(node: str | DictConfig, folder: Path | None = None, step: int | None = None) -> DictConfig:
    """A sampler's config from its name or its node, whose parts may be names too, and its `table` a pattern in a folder.

    Of the pattern's files that of `calls` is taken, or of the most. Prints where a table was fitted to other weights than
    those of the run in the folder at `step`, by default its last. Raises ValueError for a name that is unknown and a
    pattern that fits no file.
    """
    node = (
        named("sampler", node) if isinstance(node, str) else OmegaConf.create(plain(node))
    )  # with names of its config
    for part in ("predictor", "corrector", "corrector_where", "grid"):
        if isinstance(node.get(part), str):
            node[part] = named(f"sampler/{part}", node[part])
    calls = node.pop("calls", None)
    if is_pattern(node.get("table")):
        tables = tables_of(folder, node.table)
        if calls is not None and calls not in tables:
            raise ValueError(
                f"{folder} has {node.table} for {', '.join(map(str, tables))} calls, not for calls={calls}"
            )
        node.table = str(tables[calls or max(tables)])
    elif calls is not None:
        raise ValueError(f"calls={calls} does nothing with the file table={node.table}: leave one of them out")
    if folder is not None and isinstance(node.get("table"), str) and Path(node.table).is_file():
        _warn_of_other_weights(Path(node.table), folder, step)
    return node


def content_of(table: Any) -> str | None:
    """A hash of a table's file, None where a sampler has none."""
    return hashlib.blake2b(Path(table).read_bytes()).hexdigest()[:32] if isinstance(table, str) else None


def _warn_of_other_weights(table: Path, folder: Path, step: int | None) -> None:
    """Prints where a table was fitted to other weights than those of the run in the folder at `step`, or its last."""
    step = Run(folder).checkpoints.latest() if step is None else step
    fitted = json.loads(table.read_text()).get("record", {}).get("step", step) if table.suffix == ".json" else step
    if (table.parent / "config.yaml").is_file() and table.parent.resolve() != folder.resolve():
        print(f"{table}: fitted to another run")
    elif fitted != step:
        what = "an exact target" if fitted is None else f"the weights of step {fitted}"
        print(f"{table}: fitted to {what}, not to step {step} of this run: fit one with "
              f"python scripts/tune.py run={folder}")  # fmt: skip


def is_pattern(table: Any) -> bool:
    """Whether a sampler's table is found in a folder, as tuned-*.json is."""
    return isinstance(table, str) and "*" in table


def tables_of(folder: Path | None, pattern: str) -> dict[int, Path]:
    """{calls: file} of the tables that scripts/tune.py left in a folder under names such as tuned-<calls>.json.

    Raises NoTablesError where there are none, ValueError where there is no folder.
    """
    name = pattern.replace("*", "<calls>")
    if folder is None:
        raise ValueError(f"a sampler's table {name} needs a run that was tuned: give sampler.table=<file>")
    found = {file.stem.rpartition("-")[2]: file for file in folder.glob(pattern)}
    tables = {int(calls): file for calls, file in found.items() if calls.isdigit()}
    if not tables:
        of = f"run={folder}" if (folder / "config.yaml").is_file() else "target=<name> sde=<name>"
        spectrum = " spectrum=true" if pattern.startswith("spectrum") else ""
        raise NoTablesError(
            f"{folder} holds no tables {name}: make one with python scripts/tune.py {of} steps=6{spectrum}"
        )
    return dict(sorted(tables.items()))


def tuned_folder(config: DictConfig) -> Path:
    """Where scripts/tune.py leaves its tables: the run's directory, or outputs/tuned/<target>/<sde>."""
    if config.run:
        return Path(config.run)
    return Path("outputs", "tuned", *(chosen(config, group) for group in ("target", "sde")))


def chosen(config: DictConfig, group: str) -> str:
    """The name of what a run, or else this job, chose in a group; the last part of its `_target_` where it is one's own."""
    choices = config.get("choices") or HydraConfig.get().runtime.choices
    return choices.get(group) or config[group]._target_.rpartition(".")[2]


def sampler_nodes(config: DictConfig, folder: Path | None = None, step: int | None = None) -> dict[str, DictConfig]:
    """name -> config: those that `evaluation.samplers` names in conf/sampler, or the run's own `sampler` for null."""
    names = config.evaluation.samplers
    if OmegaConf.is_list(names) and len({*names}) < len(names):
        raise ValueError(f"evaluation.samplers={list(names)} names one twice: name each once")
    nodes = {chosen(config, "sampler"): config.sampler} if names is None else {name: name for name in listed(names)}
    return {name: sampler_config(node, folder, step) for name, node in nodes.items()}


def samplers_of(config: DictConfig, trust: Sequence[str] = ()) -> dict[str, Any]:
    """name -> sampler, likewise."""
    return {name: build(node, trust) for name, node in sampler_nodes(config).items()}


def fill_auto(config: DictConfig, data: Data) -> None:
    """Writes the scales that the config leaves `auto` into it, measured from the data."""
    measures = {
        ("sde", "sigma_max"): functools.partial(measure_sigma_max, quantile=config.get("sigma_max_quantile", 1.0)),
        ("parameterization", "sigma_data"): measure_sigma_data,
    }
    for (group, name), measure in measures.items():
        if config.get(group, {}).get(name) == "auto":
            config[group][name] = round(measure(data), 4)
            print(f"{group}.{name}: auto is {config[group][name]:g}, measured from the data")


def sde_of(config: DictConfig, data: Data | None = None) -> SDE:
    """The SDE of a config, its `sigma_max: auto` written into it: measured from the data, as in training; 50 without."""
    if data is not None:
        fill_auto(config, data)
    elif config.sde.get("sigma_max") == "auto":
        config.sde.sigma_max = 50.0
        print("sde.sigma_max: auto is 50, as nothing is trained here")
    return build(config.sde, config.trust)


def views_of(settings: DictConfig, trust: Sequence[str] = ()) -> dict[str, Any]:
    """What an `evaluation` config adds to the metrics, as arguments of `score_sde.evaluation.evaluate`."""
    own = plain(settings)  # while it stands in its config, whose values it may name
    settings = OmegaConf.merge(named("evaluation", "default"), own)  # runs of before have fewer keys
    labelled = settings.classifier_data
    return {
        "classifier_data": build(labelled, trust) if labelled else None,
        "features": {name: build(named("extractor", name), trust) for name in listed(settings.features)},
        "references": dict(settings.references),
        "memorization": settings.memorization,
        "batch_size": settings.batch_size,
    }


def open_run(config: DictConfig) -> Run:
    """The run that `run=` names.

    Raises ValueError where it is missing, FileNotFoundError where it is no run.
    """
    if not config.run:
        raise ValueError("which run? give run=<directory>, a folder that scripts/train.py wrote")
    return Run.open(config.run, trust=tuple(config.trust))


def model_of(run: Run, config: DictConfig) -> LearnedScore:
    """The run's score model with the weights that `ema` and `step` name, on `device`; `step` becomes that of the weights.

    Raises ValueError for a run of a classifier, and what `Run.model` refuses.
    """
    if config.step is None:  # read once: a run that still trains may have another before the work is done
        config.step = run.checkpoints.latest()
    model = run.model(ema=config.ema, step=config.step).to(device_of(config.device))
    if isinstance(model, NoisyClassifier):
        raise ValueError(f"{run.path} is a classifier of noisy data, which has no samples: give it as guidance.run= with "
                         "guidance=classifier, and a score model as run=")  # fmt: skip
    return model


def device_of(name: str) -> str:
    """ "auto" as this process's CUDA device where there is one, else "cpu"."""
    return str(distributed.device(name))


def _run_directory(resume: str | None, experiment: str | None) -> str:
    """The run's folder, the same in every process; a run to resume that does not exist is not made."""
    if resume:
        return resume if isinstance(resume, str) and Path(resume).is_dir() else "."
    return f"outputs/{experiment or 'train'}/{_started()}"


def _started() -> str:
    """The date and time of the main process."""
    return distributed.agree(f"{datetime.now():%Y-%m-%d_%H-%M-%S}")


OmegaConf.register_new_resolver("run_directory", _run_directory, use_cache=True, replace=True)
OmegaConf.register_new_resolver("started", _started, use_cache=True, replace=True)


def folder_of(settings: Mapping[str, Any], home: Path) -> Path:
    """A folder for results of these settings, which it records: `home`, or home-2, ... where that has those of others."""
    own, folder, others = json.loads(json.dumps(settings)), home, itertools.count(2)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / "settings.json"
        with suppress(FileExistsError):  # of two processes one comes first
            write_atomically(record, json.dumps(own, indent=2) + "\n", new=True)
        if json.loads(record.read_text()) == own:
            return folder
        folder = home.with_name(f"{home.name}-{next(others)}")


def save_samples(folder: Path, samples: Mapping[str, Any]) -> None:
    """<folder>/<sampler>.npy for each set of samples."""
    import numpy as np

    for name, x in samples.items():
        partial = folder / f".partial-{os.getpid()}-{name}.npy"
        np.save(partial, x.numpy())
        partial.replace(folder / f"{name}.npy")


RATIOS = ("nfe: network calls a sample; ratio: value over floor, the same distance between two sets of exact samples of this "
          "number: about 1 is as good as exact samples")  # fmt: skip


def show(table: Any, note: str = "") -> None:
    """Prints a table of figures, and under it what its columns are."""
    print("\n" + table.to_string(index=False, float_format=lambda v: f"{v:.4g}"))
    if note:
        print(note)

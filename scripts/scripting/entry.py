"""How every script is entered: `hydra.main` with one-line errors, in one process or several."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
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

from score_sde import distributed
from score_sde.checks import SolverError, whole
from score_sde.run import Run
from score_sde.training import DivergenceError
from scripting import command_line
from scripting.command_line import CONF, idle, misread, unknown, unknown_key

# What a wrong input raises, or a solver that fails; anything else is a bug of ours and keeps its traceback.
REFUSALS = (ValueError, TypeError, OSError, ImportError, FloatingPointError, SolverError, DivergenceError, HydraException,
            OmegaConfBaseException)  # fmt: skip


def main(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """`hydra.main` over conf/<config_name>.yaml; a wrong input ends in one line on stderr and exit status 1.

    --help shows the file, whose comments say what each key is. HYDRA_FULL_ERROR=1 shows the traceback instead. In a sweep
    a failed job says its line at once, and leaves it in its result.json. Ctrl-C ends in a line and status 130.
    """
    full_error = os.environ.setdefault("HYDRA_FULL_ERROR", "0") == "1"

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def job(config: DictConfig) -> Any:
            return _carried_out(task, config, full_error)

        return functools.partial(_start, job, config_name, full_error)

    return decorate


def _start(job: Callable[[DictConfig], Any], config_name: str, full_error: bool) -> None:
    """Hydra over the job, or over each job of a sweep."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        with _environment():
            join()
            if {"-h", "--help"} & {*sys.argv[1:]}:
                print((CONF / f"{config_name}.yaml").read_text())
            if {"-m", "--multirun"} & {*sys.argv[1:]}:
                idle(sys.argv[1:], ["hydra.run.dir"], "in a sweep, whose folder is hydra.sweep.dir")
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
    except REFUSALS as error:
        if full_error:
            raise
        if isinstance(error, OSError) and error.filename:  # not the job's own, which has ended in its line
            error = ValueError(f"{error.filename} cannot be created: {error.strerror}")
        sys.exit(refusal(error))


@contextmanager
def _environment() -> Iterator[None]:
    """Lets Hydra raise what goes wrong, and a job that submitit starts elsewhere find these scripts' own modules."""
    before = dict(os.environ)
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), before.get("PYTHONPATH")]))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _carried_out(task: Callable[[DictConfig], Any], config: DictConfig, full_error: bool) -> Any:
    """What a job returns; it ends the program where an input is wrong, in a sweep once all jobs have run."""
    join()  # a job that a launcher has sent to SLURM begins here
    output, in_sweep = Path(HydraConfig.get().runtime.output_dir), HydraConfig.get().mode == RunMode.MULTIRUN
    own = bool(config.get("resume")) or not (output / "config.yaml").exists()
    try:
        command_line.check(config)
        check_shared(config)
        return task(config)
    except REFUSALS as error:
        if not in_sweep:
            leave(output)
        elif distributed.is_main():
            print(f"{output} failed: {one_line(error)}", file=sys.stderr, flush=True)
            if own:
                record_failure(output, error, config)
        if full_error:
            raise
        if in_sweep:
            report = f"python scripts/report.py {HydraConfig.get().sweep.dir}"
            raise ValueError(f"jobs of this sweep failed, as said above: {report} lists them") from None
        sys.exit(refusal(error))
    except KeyboardInterrupt:
        leave(output)
        again = f"; go on with: python scripts/train.py resume={output}"
        sys.exit(interrupted(again if Run(output).checkpoints.latest() is not None else ""))


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


def check_shared(config: DictConfig) -> None:
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
        if isinstance(error, BrokenPipeError):  # of a stdout without a buffer
            raise error
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
    if line := misread(error):
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

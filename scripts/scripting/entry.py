"""The entry point of every script: `hydra.main` with one-line errors, in one process or several."""

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
from score_sde.checks import whole
from score_sde.embedded import SolverError
from score_sde.run import Run
from score_sde.training import DivergenceError
from scripting import command_line
from scripting.command_line import CONF, idle, misread, unknown, unknown_key

# Errors of a wrong input or a failed solver, shown in one line; anything else is a bug and keeps its traceback.
REFUSALS = (ValueError, TypeError, OSError, ImportError, FloatingPointError, SolverError, DivergenceError, HydraException,
            OmegaConfBaseException)  # fmt: skip


def main(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """`hydra.main` with conf/<config_name>.yaml; a wrong input ends in one line on stderr and exit status 1.

    --help prints the file, whose comments explain each key. HYDRA_FULL_ERROR=1 shows the traceback instead of the line. In a
    sweep a failed job prints its line at once, and writes it to its result.json. Ctrl-C ends in a line and status 130.
    """
    full_error = os.environ.setdefault("HYDRA_FULL_ERROR", "0") == "1"

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def job(config: DictConfig) -> Any:
            return _carried_out(task, config, full_error)

        return functools.partial(_start, job, config_name, full_error)

    return decorate


def _start(job: Callable[[DictConfig], Any], config_name: str, full_error: bool) -> None:
    """Runs Hydra with the job, or with each job of a sweep."""
    started: list[DictConfig] = []

    @functools.wraps(job)
    def noted(config: DictConfig) -> Any:
        started.append(config)
        return job(config)

    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        with _environment():
            join()
            if {"-h", "--help"} & {*sys.argv[1:]}:
                print((CONF / f"{config_name}.yaml").read_text())
            if {"-m", "--multirun"} & {*sys.argv[1:]}:
                idle(sys.argv[1:], ["hydra.run.dir"], "in a sweep, whose folder is hydra.sweep.dir")
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(noted)()
            if not started:
                command_line.check_globs(sys.argv[1:])
    except REFUSALS as error:
        if full_error:
            raise
        if isinstance(error, OSError) and error.filename:  # an error of Hydra's: those of the job have been handled
            error = ValueError(f"{error.filename} cannot be created: {error.strerror}")
        sys.exit(refusal(error))


@contextmanager
def _environment() -> Iterator[None]:
    """Makes Hydra raise its errors, and lets jobs that submitit starts elsewhere import `scripting`."""
    before = dict(os.environ)
    os.environ["HYDRA_FULL_ERROR"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), before.get("PYTHONPATH")]))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _carried_out(task: Callable[[DictConfig], Any], config: DictConfig, full_error: bool) -> Any:
    """The job's result. A wrong input ends the program, in a sweep after all jobs have run."""
    join()  # jobs that a launcher sent to SLURM begin here
    output, in_sweep = Path(HydraConfig.get().runtime.output_dir), HydraConfig.get().mode == RunMode.MULTIRUN
    own = bool(config.get("resume")) or not (output / "config.yaml").exists()
    try:
        command_line.check(config)
        check_shared(config)
        return task(config)
    except REFUSALS as error:
        if not in_sweep:
            leave(output)
        else:
            note_failure(output, one_line(error), config, own)
        if full_error:
            raise
        if in_sweep:
            report = f"python scripts/report.py {HydraConfig.get().sweep.dir}"
            raise ValueError(f"jobs of this sweep failed, see above: {report} lists them") from None
        sys.exit(refusal(error))
    except KeyboardInterrupt:
        leave(output)
        again = f"; continue with: python scripts/train.py resume={output}"
        sys.exit(interrupted(again if Run(output).checkpoints.latest() is not None else ""))
    except Exception as error:
        if in_sweep:
            note_failure(output, f"{type(error).__name__}: {one_line(error)}", config, own)
        raise


def note_failure(output: Path, error: str, config: DictConfig, own: bool) -> None:
    """Prints that a sweep's job failed; if the folder is its own, writes result.json, unless that is of a finished run."""
    if not distributed.is_main():
        return
    print(f"{output} failed: {error}", file=sys.stderr, flush=True)
    result = output / "result.json"
    if own and (not result.exists() or json.loads(result.read_text()).get("status") != "finished"):
        Run(output).save_result({"status": "failed", "error": error, "seed": config.get("seed"),
                                 "overrides": command_line.typed()})  # fmt: skip


def leave(output: Path) -> None:
    """Removes the folder of a run that has written nothing."""
    if distributed.is_main() and output != Path.cwd() and output.is_dir() and not any(output.iterdir()):
        output.rmdir()


def interrupted(again: str = "") -> int:
    """Prints that the script was interrupted; returns the exit status of Ctrl-C."""
    print(f"\ninterrupted{again}", file=sys.stderr)
    return 128 + signal.SIGINT


def check_shared(config: DictConfig) -> None:
    """Raises ValueError for a seed or counts that are not whole numbers, and for folders that are not names.

    Values of the wrong type with a clear meaning (1.0 for 1, a number for a folder's name) are converted, in `config` itself.
    """
    for name in ("run", "output", "folder"):
        value = config.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            config[name] = str(value)
        elif not (value is None or isinstance(value, str)):
            raise ValueError(f"{name}={value} is not a folder: give the name of one")
    for name, least in (("seed", -math.inf), ("num_samples", 1), ("batch_size", 1)):
        if config.get(name) is not None:
            config[name] = whole(name, config[name], least)


def join() -> None:
    """Joins the processes of a launcher; only the main one prints."""
    distributed.start()
    if not distributed.is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def refusal(error: BaseException) -> str | int:
    """The line on stderr for a wrong input, as the argument of `sys.exit`; if stdout is closed, as by `| head`, its status.

    Other processes than the main one wait, so that its line comes first and `torchrun` ends them.
    """
    try:
        if isinstance(error, BrokenPipeError):  # from an unbuffered stdout
            raise error
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit does not fail
        return 128 + signal.SIGPIPE
    if not distributed.is_main():
        time.sleep(5)
    return f"error: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """The innermost cause of an error in one line, with the nearest known key for a misspelt one."""
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
    """The run's folder, the same in every process; the folder of a run to resume is not created if it does not exist."""
    if resume:
        return resume if isinstance(resume, str) and Path(resume).is_dir() else "."
    return f"outputs/{experiment or 'train'}/{_started()}"


def _started() -> str:
    """The date and time at which the main process started."""
    return distributed.agree(f"{datetime.now():%Y-%m-%d_%H-%M-%S}")


OmegaConf.register_new_resolver("run_directory", _run_directory, use_cache=True, replace=True)
OmegaConf.register_new_resolver("started", _started, use_cache=True, replace=True)

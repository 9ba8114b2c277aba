"""Scripts as a user types them, each in a process of its own that finds its libraries imported."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STARTS = multiprocessing.get_context("forkserver")
STARTS.set_forkserver_preload(["score_sde.evaluation", "score_sde.training", "score_sde.plotting", "hydra.main"])


def script(name: str, *arguments: str, cwd: Path, processes: int = 1, code: int = 0) -> str:
    """What scripts/<name>.py prints; where it is to end with a `code`, what stderr says."""
    command = [str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)]
    returned, out, err = _alone(command, cwd) if processes == 1 else _several(command, cwd, processes)
    assert returned == code, out + err
    return out if code == 0 else err


def _alone(command: Sequence[str], cwd: Path) -> tuple[int, str, str]:
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("out", "err")]
        process = STARTS.Process(target=_begin, args=(command, cwd, dict(os.environ), streams))
        process.start()
        process.join(600)
        if process.is_alive():
            process.kill()
            process.join()
        out, err = (stream.read_text() for stream in streams)
    return process.exitcode or 0, out, err


def _begin(command: Sequence[str], cwd: Path, environment: Mapping[str, str], streams: Sequence[Path]) -> None:
    for number, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    own = [str(Path(command[0]).parent), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:0], sys.argv = own, list(command)
    runpy.run_path(command[0], run_name="__main__")


def _several(command: Sequence[str], cwd: Path, processes: int) -> tuple[int, str, str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run([sys.executable, *launcher, *command], cwd=cwd, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr

"""The tables that scripts/tune.py leaves, and which of them a sampler's config takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from score_sde.run import Run
from scripting.command_line import chosen

CONDITIONS = ("label", "context")
"""What a run's tables may be fitted under."""


class NoTablesError(ValueError):
    """A folder holds no tables of the pattern that a sampler names."""


def tuned_folder(config: DictConfig) -> Path:
    """Where scripts/tune.py leaves its tables: the run's directory, or outputs/tuned/<target>/<sde>."""
    if config.run:
        return Path(config.run)
    return Path("outputs", "tuned", *(chosen(config, group) for group in ("target", "sde")))


def is_pattern(table: Any) -> bool:
    """Whether a sampler's table is found in a folder, as tuned-*.json is."""
    return isinstance(table, str) and "*" in table


def tables_of(folder: Path | None, pattern: str) -> dict[int, Path]:
    """{calls: file} of the tables that scripts/tune.py left in a folder, e.g. for the pattern tuned-*.json.

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


def take_table(node: DictConfig, folder: Path | None, step: int | None) -> None:
    """Replaces a pattern in a sampler's `table` by one of the folder's files, and drops `calls`, which chooses it.

    Without `calls` it is the table of the most. Prints a warning where the table was fitted to other weights than those of
    the folder's run at `step` (by default its latest), and a note where it is for samples of one label or context alone.

    Raises ValueError where no file matches, or `calls` stands beside a file.
    """
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
        if given := fitted_under(Path(node.table)):
            print(f"{node.table}: fitted {_words(given)}, and for samples of that alone")


def check_conditions(folder: Path, own: Mapping[str, Any]) -> None:
    """Refuses, with ValueError, a folder whose tables were fitted under other conditions than `own`."""
    for table in sorted(file for kind in ("tuned", "spectrum") for file in folder.glob(f"{kind}-*.json")):
        if (given := fitted_under(table)) not in (None, own):
            raise ValueError(
                f"{table} was fitted {_words(given)}: give output=<another folder> for tables {_words(own)}"
            )


def fitted_under(table: Path) -> dict[str, Any] | None:
    """The label and context, by name, that a table was fitted under; None for a file that does not say."""
    settings = _record(table).get("settings")
    return None if settings is None else {name: settings[name] for name in CONDITIONS if name in settings}


def _words(given: Mapping[str, Any]) -> str:
    return f"under {' '.join(f'{name}={value}' for name, value in given.items())}" if given else "without a label"


def _record(table: Path) -> dict[str, Any]:
    """The `record` of a table, how it was made; empty where the file is no table."""
    with suppress(ValueError):
        if isinstance(read := json.loads(table.read_text()), dict):
            return dict(read.get("record") or {})
    return {}


def _warn_of_other_weights(table: Path, folder: Path, step: int | None) -> None:
    """Prints where a table was fitted to other weights than those of the run in the folder at `step`, or its last."""
    step = Run(folder).checkpoints.latest() if step is None else step
    fitted = _record(table).get("step", step)
    if (table.parent / "config.yaml").is_file() and table.parent.resolve() != folder.resolve():
        print(f"{table}: fitted to another run")
    elif fitted != step:
        what = "an exact target" if fitted is None else f"the weights of step {fitted}"
        print(f"{table}: fitted to {what}, not to step {step} of this run: fit one with "
              f"python scripts/tune.py run={folder}")  # fmt: skip

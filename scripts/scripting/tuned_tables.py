"""The tables that scripts/tune.py writes, and which of them a sampler's config uses."""

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
"""The conditions under which a run's tables may be fitted."""


class NoTablesError(ValueError):
    """A folder holds no tables of the pattern that a sampler names."""


def tuned_folder(config: DictConfig) -> Path:
    """The folder of scripts/tune.py's tables: the run's directory, or outputs/tuned/<target>/<sde>."""
    if config.run:
        return Path(config.run)
    return Path("outputs", "tuned", *(chosen(config, group) for group in ("target", "sde")))


def is_pattern(table: Any) -> bool:
    """Whether a sampler's table is a pattern for files in a folder, such as tuned-*.json."""
    return isinstance(table, str) and "*" in table


def tables_of(folder: Path | None, pattern: str) -> dict[int, Path]:
    """{calls: file} of the tables in a folder that match a pattern, e.g. tuned-*.json.

    Raises NoTablesError if there are none, ValueError if there is no folder.
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


def take_table(
    node: DictConfig, folder: Path | None, step: int | None, asked: Mapping[str, Any] | None = None
) -> None:  # fmt: skip
    """Replaces a pattern in a sampler's `table` by one of the folder's files, and drops `calls`, which chooses it.

    Without `calls` it is the table with the most calls. Prints a warning if the table was fitted to other weights than those
    of the folder's run at `step` (by default its latest), or under another label or context than the samples are `asked`
    for; if that is None, a note that it is only for samples of the label or context it was fitted under.

    Raises ValueError if no file matches, or if `calls` is given with a file.
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
        given = fitted_under(Path(node.table))
        if given and asked is None:
            print(f"{node.table}: fitted {_words(given)}, and only for such samples")
        elif asked is not None and given not in (None, asked):
            print(f"{node.table}: fitted {_words(given)}, not {_words(asked)}, as these samples are drawn")


def check_conditions(folder: Path, own: Mapping[str, Any]) -> None:
    """Raises ValueError for a folder whose tables were fitted under other conditions than `own`."""
    for table in sorted(file for kind in ("tuned", "spectrum") for file in folder.glob(f"{kind}-*.json")):
        if (given := fitted_under(table)) not in (None, own):
            raise ValueError(
                f"{table} was fitted {_words(given)}: give output=<another folder> for tables {_words(own)}"
            )


def fitted_under(table: Path) -> dict[str, Any] | None:
    """The label and context, by name, under which a table was fitted; None if the file does not record them."""
    settings = _record(table).get("settings")
    return None if settings is None else {name: settings[name] for name in CONDITIONS if name in settings}


def _words(given: Mapping[str, Any]) -> str:
    if not given:
        return "without a label or context"
    return f"under {' '.join(f'{name}={value}' for name, value in given.items())}"


def _record(table: Path) -> dict[str, Any]:
    """The `record` of a table, of how it was made; empty if the file is not a table."""
    with suppress(ValueError):
        if isinstance(read := json.loads(table.read_text()), dict):
            return dict(read.get("record") or {})
    return {}


def _warn_of_other_weights(table: Path, folder: Path, step: int | None) -> None:
    """Prints a line if a table was fitted to other weights than those of the folder's run at `step`, or its latest."""
    step = Run(folder).checkpoints.latest() if step is None else step
    fitted = _record(table).get("step", step)
    if (table.parent / "config.yaml").is_file() and table.parent.resolve() != folder.resolve():
        print(f"{table}: fitted to another run")
    elif fitted != step:
        what = "an exact target" if fitted is None else f"the weights of step {fitted}"
        print(f"{table}: fitted to {what}, not to step {step} of this run: fit one with "
              f"python scripts/tune.py run={folder}")  # fmt: skip

"""Collects a sweep's runs, failed ones too, into one table and one figure: python scripts/report.py <multirun folder>"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig
from scripting import entry, figures, output
from scripting.command_line import key_of, unknown

from score_sde import Run, plotting


@entry.main("report")
def main(config: DictConfig) -> None:
    folder = Path(config.folder or "")
    if not config.folder or not folder.is_dir():
        missing = f"folder {config.folder!r} does not exist" if config.folder else "no folder is given"
        raise ValueError(f"{missing}: give the folder of a sweep, python scripts/report.py multirun/<date>")
    table = collect(folder, config.metric)
    summary = summarise(table)
    table.to_csv(folder / "runs.csv", index=False)
    summary.to_csv(folder / "report.csv", index=False)
    meanings = list(summary["meaning"].dropna().unique())
    several = len(meanings) > 1
    print_means(
        summary if several else summary.drop(columns="meaning"),
        "what the column meaning says" if several else meanings[0],
    )
    for row in table[table["status"] != "finished"].to_dict("records"):
        print(f"{row['status']}: {row['run']} ({row['setting']}, seed {row['seed']}): {row['error']}")
    pictures = ["report.png"] if draw(summary, folder / "report.png") else []
    print(f"\n{folder}: {', '.join(['report.csv (means)', 'runs.csv (every run)', *pictures])}")


def with_folder(argv: Sequence[str]) -> list[str]:
    """The arguments, with a bare one as folder=<argument>; one that follows an option is that option's value."""
    return [given if "=" in given or given.startswith("-") or before.startswith("-") else f"folder={given}"
            for before, given in itertools.pairwise(argv)]  # fmt: skip


def print_means(summary: pd.DataFrame, label: str) -> None:
    """Prints the table, a setting by its keys, without empty columns, such as the standard error for one seed."""
    keys = swept(summary, "mean")
    shown = summary.assign(**summary[keys].fillna("")).drop(columns="setting" if keys else [])
    shown = shown.dropna(axis="columns", how="all")
    error = ", with its standard error" if "standard_error" in shown else ""
    output.show(shown, f"mean over seeds{error}, of: {label}" if "mean" in shown else "")


def draw(summary: pd.DataFrame, file: Path) -> bool:
    """Draws the figure, a panel for each meaning of the metric; returns False if there is no mean to draw.

    Settings without a finished run are left out if there are several meanings.
    """
    if summary["mean"].isna().all():
        return False
    named = summary.assign(setting=[with_lost(row) for row in summary.to_dict("records")])
    parts = dict(list(named.groupby("meaning", sort=False)))
    floors = {meaning: 1.0 for meaning in parts if "noise floor" in meaning}
    figures.save(plotting.means_with_errors(parts, references=floors), file)
    return True


def collect(folder: Path, metric: str) -> pd.DataFrame:
    """A row per run: run (its folder), setting (the overrides in which runs differ, without the seed), a column for each
    key of these, seed, status, value, error, meaning, and the other numbers of result.json.

    Raises ValueError if the folder holds no run, or if runs have finished but none with a number of this name.
    """
    homes = sorted(
        {file.parent for name in ("result.json", "config.yaml") for file in folder.rglob(name)}, key=_natural
    )
    results = {str(home.relative_to(folder)): _result(home) for home in homes}
    if not results:
        raise ValueError(f"{folder} holds no runs (no result.json below it): give the folder of a sweep")
    numbers = {key: None for result in results.values() if result["status"] == "finished" for key in _numbers(result)}
    if numbers and metric not in numbers:
        raise ValueError(unknown("metric", metric, [*numbers], [key for key in numbers if key.endswith(f"/{metric}")]))
    given = {run: [pair for pair in result.get("overrides") or [] if not pair.startswith("seed=")]
             for run, result in results.items()}  # fmt: skip
    known = [set(pairs) for pairs in given.values() if pairs]  # a run killed early may have written none
    shared = set.intersection(*known) if known else set()
    own = {run: [pair for pair in pairs if pair not in shared] for run, pairs in given.items()}
    keys = dict.fromkeys(key_of(pair) for pairs in own.values() for pair in pairs if "=" in pair)
    return pd.DataFrame([_row(run, result, metric, own[run], [*keys]) for run, result in results.items()])


def swept(table: pd.DataFrame, end: str) -> list[str]:
    """The keys in which runs differ: the columns between `setting` and `end`."""
    return [*table.loc[:, "setting":end].columns[1:-1]]  # type: ignore[misc]


def _result(home: Path) -> dict[str, Any]:
    path = home / "result.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    config = Run.open(home).config
    return {"status": "unfinished", "error": "no result.json yet", "seed": config.get("seed"),
            "overrides": config.get("overrides")}  # fmt: skip


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    return {key: value for key, value in result.items() if isinstance(value, int | float)}


def _row(
    run: str, result: Mapping[str, Any], metric: str, setting: Sequence[str], keys: Sequence[str]
) -> dict[str, Any]:
    meaning = result.get("metric_meaning") if metric == "metric" else metric
    values = {key_of(pair): pair.partition("=")[2] for pair in setting if "=" in pair}
    row = {"run": run, "setting": ", ".join(setting) or "all", **{key: values.get(key) for key in keys},
           "seed": result.get("seed"), "status": result["status"], "value": result.get(metric),
           "error": result.get("error", ""), "meaning": meaning}  # fmt: skip
    return row | {key: number for key, number in _numbers(result).items() if key not in row}


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard error of the metric over the finished seeds of each setting, and the number of runs by status.

    `meaning` says what the metric is. If it is the same in all finished runs, settings without one have it too.
    """
    counts = pd.get_dummies(table["status"], dtype=int).reindex(
        columns=["finished", "unfinished", "failed"], fill_value=0
    )
    groups = table.assign(value=table["value"].astype(float), **counts).groupby("setting", sort=False)
    figures = groups["value"].agg(mean="mean", standard_error="sem")
    figures.insert(0, "meaning", groups["meaning"].first())
    keys = groups[swept(table, "seed")].first()
    if figures["meaning"].nunique() < 2:
        figures["meaning"] = next(iter(figures["meaning"].dropna()), "metric")
    return keys.join(figures).join(groups[[*counts]].sum()).reset_index()


def with_lost(row: dict[str, Any]) -> str:
    """A setting, and how many of its seeds are missing from its mean."""
    lost = [f"{row[status]} {status}" for status in ("failed", "unfinished") if row[status]]
    return f"{row['setting']} ({', '.join(lost)})" if lost else row["setting"]


def _natural(path: Path) -> tuple[int, str]:
    return (int(path.name) if path.name.isdigit() else 0, str(path))


if __name__ == "__main__":
    sys.argv[1:] = with_folder(sys.argv)
    main()

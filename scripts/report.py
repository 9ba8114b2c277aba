"""Collects a sweep's runs, failed ones too, into one table and one figure: python scripts/report.py <multirun folder>"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import common
import figures
import pandas as pd
from omegaconf import DictConfig

from score_sde import Run, plotting


@common.main("report")
def main(config: DictConfig) -> None:
    folder = Path(config.folder or "")
    if not config.folder or not folder.is_dir():
        missing = f"folder {config.folder!r} does not exist" if config.folder else "no folder is given"
        raise ValueError(f"{missing}: give the folder of a sweep, python scripts/report.py multirun/<date>")
    table = collect(folder, config.metric)
    summary = summarise(table)
    table.to_csv(folder / "runs.csv", index=False)
    summary.to_csv(folder / "report.csv", index=False)
    label = table["meaning"].dropna().iloc[0] if config.metric == "metric" and table["meaning"].any() else config.metric
    shown = summary.assign(setting=[with_lost(row) for row in summary.to_dict("records")])
    floor = 1.0 if "noise floor" in label else None
    figures.save(plotting.means_with_errors(shown, label=label, reference=floor), folder / "report.png")
    common.show(summary, f"mean over seeds, with its standard error, of: {label}")
    for row in table[table["status"] != "finished"].to_dict("records"):
        print(f"{row['status']}: {row['run']} ({row['setting']}, seed {row['seed']}): {row['error']}")
    print(f"\n{folder}: report.csv (means), runs.csv (every run), report.png")


def collect(folder: Path, metric: str) -> pd.DataFrame:
    """One row a run: folder, setting (the overrides in which runs differ, but the seed), seed, metric, status, reason.

    Raises ValueError where the folder holds no run.
    """
    homes = sorted(
        {file.parent for name in ("result.json", "config.yaml") for file in folder.rglob(name)}, key=_natural
    )
    rows = [_row(home, folder, metric) for home in homes]
    if not rows:
        raise ValueError(f"{folder} holds no runs (no result.json below it): give the folder of a sweep")
    known = [set(row["setting"]) for row in rows if row["setting"]]  # but of what was killed before it wrote any
    shared = set.intersection(*known) if known else set()
    for row in rows:
        row["setting"] = ", ".join(pair for pair in row["setting"] if pair not in shared) or "all"
    return pd.DataFrame(rows)


def _row(home: Path, folder: Path, metric: str) -> dict[str, Any]:
    path = home / "result.json"
    if path.exists():
        result = json.loads(path.read_text())
    else:
        config = Run.open(home).config
        result = {"status": "unfinished", "error": "no result.json yet", "seed": config.get("seed"),
                  "overrides": config.get("overrides")}  # fmt: skip
    if result["status"] == "finished" and metric not in result:
        raise ValueError(f"{path} has no {metric!r}; it has: {', '.join(result)}")
    if isinstance(result.get(metric), str):
        raise ValueError(f"{metric} is no figure of {path}, but {result[metric]!r}: give the key of a number")
    setting = [override for override in result.get("overrides") or [] if not override.startswith("seed=")]
    return {"run": str(home.relative_to(folder)), "setting": setting, "seed": result.get("seed"),
            "status": result["status"], "value": result.get(metric), "error": result.get("error", ""),
            "meaning": result.get("metric_meaning")}  # fmt: skip


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard error of the metric over the finished seeds of each setting, and how many ended in what."""
    counts = pd.get_dummies(table["status"], dtype=int).reindex(
        columns=["finished", "unfinished", "failed"], fill_value=0
    )
    groups = table.assign(value=table["value"].astype(float), **counts).groupby("setting", sort=False)
    figures = groups["value"].agg(mean="mean", standard_error="sem")
    return figures.join(groups[[*counts]].sum()).reset_index()


def with_lost(row: dict[str, Any]) -> str:
    """A setting, and how many of its seeds its mean is without."""
    lost = [f"{row[status]} {status}" for status in ("failed", "unfinished") if row[status]]
    return f"{row['setting']} ({', '.join(lost)})" if lost else row["setting"]


def _natural(path: Path) -> tuple[int, str]:
    return (int(path.name) if path.name.isdigit() else 0, str(path))


if __name__ == "__main__":
    sys.argv[1:] = [a if "=" in a or a.startswith("-") else f"folder={a}" for a in sys.argv[1:]]
    main()

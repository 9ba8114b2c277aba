"""scripts/benchmark.py as a user types it, at sizes that say nothing."""

from __future__ import annotations

import json
from pathlib import Path

from test_scripts import script


def test_every_part_is_printed_and_written(tmp_path: Path) -> None:
    printed = script("benchmark", "quick=true", f"output={tmp_path}", cwd=tmp_path)
    record = json.loads((tmp_path / "benchmark.json").read_text())
    assert set(record) == {"machine", "loop", "network", "tables", "ode", "noise"}
    assert record["machine"]["threads"] == 1
    assert "ExponentialAdams 4" in printed
    solvers = {row["solver"]: row for row in record["ode"]}
    assert solvers["AdaptiveODE dopri5"]["rms"] < solvers["scipy RK45"]["rms"] < 1e-3


def test_a_wrong_part_is_one_line(tmp_path: Path) -> None:
    message = script("benchmark", "parts=[speed]", cwd=tmp_path, code=1)
    assert "a part is one of loop, network, tables, ode, noise; got" in message
    assert message.count("\n") == 1

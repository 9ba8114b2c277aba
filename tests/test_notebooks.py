"""The notebooks run from top to bottom; the committed ones hold the figures that a reader sees without running them."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def images(cells: list[dict[str, Any]]) -> list[bytes]:
    """The PNGs among the cells' outputs."""
    outputs = [output.get("data", {}) for cell in cells for output in cell["outputs"]]
    return [base64.b64decode(data["image/png"]) for data in outputs if "image/png" in data]


def test_each_has_a_number_of_its_own() -> None:
    numbers = [int(path.stem.split("_")[0]) for path in NOTEBOOKS]
    assert len(numbers) >= 4
    assert numbers == sorted(set(numbers))


@each_notebook
def test_runs_from_top_to_bottom_in_fast_mode(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nbclient = pytest.importorskip(
        "nbclient", reason="notebooks are executed with nbclient: pip install nbclient ipykernel"
    )
    pytest.importorskip("ipykernel", reason="notebooks need a Python kernel: pip install ipykernel")
    nbformat = pytest.importorskip("nbformat")
    monkeypatch.setenv("SCORE_SDE_FAST", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep))
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises CellExecutionError, with the cell and its traceback, at the first cell that fails
    executed = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(images(executed)) == len(images(code_cells(path)))


@each_notebook
def test_was_committed_in_one_run_without_errors(path: Path) -> None:
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {(output["output_type"], output.get("name")) for cell in cells for output in cell["outputs"]}
    assert not any(kind == "error" or name == "stderr" for kind, name in kinds)


@each_notebook
def test_was_committed_with_its_figures(path: Path) -> None:
    pictures = [np.asarray(Image.open(io.BytesIO(png)).convert("L"), dtype=float) for png in images(code_cells(path))]
    assert len(pictures) >= 4
    assert all(min(picture.shape) >= 200 and picture.std() > 5 for picture in pictures)  # none is blank
    assert path.stat().st_size < 1.5e6


@each_notebook
def test_uses_public_names_only(path: Path) -> None:
    source = "\n".join("".join(cell["source"]) for cell in code_cells(path))
    private = re.findall(
        r"^\s*(?:from|import)\s+(?:scripts|score_sde\S*\._)\S*|\b(?:plotting|grid|targets)\._\w+", source, re.MULTILINE
    )
    assert private == []

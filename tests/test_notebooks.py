"""The notebooks run from top to bottom, and each .ipynb is its script without outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("jupytext", reason="needs the extra mini_distill[dev]")
pytest.importorskip("nbclient", reason="needs the extra mini_distill[dev]")

from docs_site import cells
from make_notebooks import FIGURES, FOLDER, as_ipynb, execute, scripts

SMALL = {"STEPS": 2, "BATCHES": 1, "ROWS": 5, "TEMPERATURES": (1,), "KINDS": ("forward_kl",)}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of two tests at a time would wait for each other's threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.parametrize("script", scripts(), ids=lambda script: script.stem)
def test_the_notebook_is_its_script_without_outputs(script: Path) -> None:
    text = script.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert text == as_ipynb(script), "run: python scripts/make_notebooks.py sync"
    cells = json.loads(text)["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    assert all("".join(cell["source"]).strip() for cell in cells)  # no empty one
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == {path.stem for path in scripts()}


@pytest.mark.parametrize("script", scripts(), ids=lambda script: script.stem)
def test_what_the_site_shows_belongs_to_a_cell_of_code(script: Path) -> None:
    """Figures are kept under the number of their cell: after a cell is added, the notebook has to be run again."""
    whole = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    assert len(cells(script)) == len(whole)
    kept = {int(path.stem.rpartition("_")[2]) for path in FIGURES.glob(f"{script.stem}_*")}
    assert kept and all(whole[number]["cell_type"] == "code" for number in kept), "run: python scripts/make_notebooks.py run " + script.stem
    plotted = {number for number, cell in enumerate(whole) if cell["cell_type"] == "code" and "plt.subplots(" in "".join(cell["source"])}
    assert plotted <= kept


@pytest.mark.parametrize("script", scripts(), ids=lambda script: script.stem)
def test_a_notebook_runs_with_few_steps(script: Path, tmp_path: Path) -> None:
    """Every cell as it stands, but for the parameters: as little training and measuring as can be."""
    small = {name: value for name, value in SMALL.items() if f"\n{name} = " in script.read_text(encoding="utf-8")}
    notebook = execute(script, tmp_path, **small)
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
    assert len(shown) >= 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("script", scripts(), ids=lambda script: script.stem)
def test_a_notebook_runs_as_its_reader_runs_it(script: Path, tmp_path: Path) -> None:
    execute(script, tmp_path)

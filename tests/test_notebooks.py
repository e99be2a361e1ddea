"""The notebooks run from top to bottom, and each .ipynb is its script without outputs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jupytext", reason="needs the extra mini_distill[dev]")
pytest.importorskip("nbclient", reason="needs the extra mini_distill[dev]")

from docs_site import cells
from jupyter_client.manager import KernelManager
from make_notebooks import FIGURES, FOLDER, as_ipynb, execute, processor_time, scripts
from nbformat import NotebookNode

SMALL = {"STEPS": 2, "BATCHES": 1, "ROWS": 5, "TEMPERATURES": (1,), "KINDS": ("forward_kl",)}


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


@pytest.fixture(scope="session")
def kernel() -> Iterator[KernelManager]:
    """One for several notebooks: to start it and to import all takes longer than they do."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(env={**os.environ, "OMP_NUM_THREADS": "1"})
    tell(manager, IN_SMALL)
    yield manager
    manager.shutdown_kernel(now=True)


def tell(kernel: KernelManager, code: str) -> None:
    """Let it run this, which prints nothing."""
    client = kernel.blocking_client()
    client.start_channels()
    client.wait_for_ready(timeout=60)
    said: list[Any] = []
    client.execute_interactive(code, output_hook=lambda message: said.append((message["msg_type"], message["content"])))
    client.stop_channels()
    assert not [content for kind, content in said if kind in ("stream", "error", "display_data")], said


IN_SMALL = """
def begin():
    from functools import partial
    from mini_distill import cli, result, run
    plain, sizes, rows = cli.load_config, ["trainer.micro_batch_size=2", "evaluation.batch_size=2"], ["data.max_rows=60", "data.eval_fraction=0.2"]
    def load_config(overrides=(), name="train", schema=cli.Config):
        given = " ".join(overrides)
        fewer = [*sizes, *(text for text in rows if text.partition("=")[0] not in given)]
        return plain([*overrides, *(fewer if name == "train" else [])], name, schema)
    cli.load_config = run.load_config = load_config
    result.forward_tokens_per_second = partial(result.forward_tokens_per_second, seconds=0.0)  # two seconds otherwise
begin()
"""
AFRESH = "%reset -f\nimport os; os.chdir({folder!r}); del os"


@pytest.mark.parametrize("script", scripts(), ids=lambda script: script.stem)
def test_a_notebook_runs_with_few_steps(script: Path, tmp_path: Path, kernel: KernelManager) -> None:
    """Every cell as it stands, but for the parameters: as little training and measuring as can be."""
    small = {name: value for name, value in SMALL.items() if f"\n{name} = " in script.read_text(encoding="utf-8")}
    tell(kernel, AFRESH.format(folder=str(tmp_path)))
    check_outputs(execute(script, tmp_path, kernel, **small))


def check_outputs(notebook: NotebookNode) -> None:
    """Two figures at least; of a training its line and its table, and nothing on red."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    of_runs = [output for cell in notebook.cells if "md.train(" in cell.source for output in cell.outputs]
    assert not [output for output in of_runs if output.get("name") == "stderr"]
    lines = [output["data"]["text/plain"] for output in outputs if set(output.get("data", {})) == {"text/plain"}]
    assert any(line.startswith("train |") for line in lines) and not any("\n" in line for line in lines if "|" in line)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("script", scripts(), ids=lambda script: script.stem)
def test_a_notebook_takes_its_reader_less_than_two_minutes_on_two_cores(script: Path, tmp_path: Path) -> None:
    """Of both cores together that is four minutes of processor time, which other work on the machine does not lengthen."""
    before = processor_time()
    check_outputs(execute(script, tmp_path))
    assert processor_time() - before < 2 * 120

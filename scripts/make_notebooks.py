"""Keep the notebooks in step with their scripts, and run them.

python scripts/make_notebooks.py sync                     write each .ipynb from its .py, without outputs
python scripts/make_notebooks.py run temperature …        run them, and keep their figures in docs/images/notebooks (none named: all)
"""

from __future__ import annotations

import argparse
import base64
import resource
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from jupyter_client.manager import KernelManager
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
FIGURES = ROOT / "docs" / "images" / "notebooks"
WIDGET = "application/vnd.jupyter.widget-view+json"  # bars of other libraries


def scripts() -> list[Path]:
    """The notebooks as scripts in the percent format, of which the .ipynb files are made."""
    return sorted(FOLDER.glob("*.py"))


def as_ipynb(script: Path) -> str:
    """The text of the .ipynb file: no outputs, and the same cell ids each time."""
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
    notebook.metadata.pop("jupytext", None)
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT) + "\n"


def execute(script: Path, folder: Path, kernel: KernelManager | None = None, **parameters: object) -> NotebookNode:
    """Run a notebook.

    Args:
        script: The notebook.
        folder: Where a kernel of its own runs and leaves its files.
        kernel: To run in, wherever that is, instead of one of its own.
        parameters: Values in place of those of the cell tagged `parameters`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    from nbclient import NotebookClient

    notebook = jupytext.read(script)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            assert all(f"{name} = " in cell.source for name in parameters), f"{script.name} has other parameters"
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    NotebookClient(notebook, kernel, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def keep_outputs(notebook: NotebookNode, name: str) -> int:
    """Write figures, tables and texts beside the documentation, each named for the number of its cell; how many figures."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for old in FIGURES.glob(f"{name}_*"):
        old.unlink()
    count = 0
    for number, cell in enumerate(notebook.cells):
        shown = [output["data"] for output in cell.get("outputs", []) if "data" in output and WIDGET not in output["data"]]
        printed = "".join(output["text"] for output in cell.get("outputs", []) if output.get("name") == "stdout")
        pictures = [data["image/png"] for data in shown if "image/png" in data]
        texts = [data["text/plain"] for data in shown if "image/png" not in data]
        tables = [data.get("text/html", data.get("text/markdown")) for data in shown if {"text/html", "text/markdown"} & set(data)]
        if pictures:
            (FIGURES / f"{name}_{number}.png").write_bytes(base64.b64decode(pictures[-1]))
            count += 1
        elif tables:
            (FIGURES / f"{name}_{number}.html").write_text(tables[-1] + "\n", encoding="utf-8")
        elif (texts or printed) and "md.train(" not in cell.source:  # whose table, samples and last line of progress are long
            (FIGURES / f"{name}_{number}.txt").write_text((printed + "".join(texts)).rstrip() + "\n", encoding="utf-8")
    return count


def processor_time() -> float:
    """Seconds of the kernels that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("sync", "run"))
    parser.add_argument("names", nargs="*", help="notebooks, without .py; none: all")
    given = parser.parse_args()
    for script in scripts():
        if given.names and script.stem not in given.names:
            continue
        if given.action == "sync":
            script.with_suffix(".ipynb").write_text(as_ipynb(script), encoding="utf-8")
            continue
        started, before = time.monotonic(), processor_time()
        with tempfile.TemporaryDirectory() as folder:
            count = keep_outputs(execute(script, Path(folder)), script.stem)
        spent, used = time.monotonic() - started, processor_time() - before
        print(f"{script.stem}: {spent:.0f} s, {used:.0f} s of processor time, {count} figures", flush=True)


if __name__ == "__main__":
    main()

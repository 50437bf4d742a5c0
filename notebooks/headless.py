"""Run a notebook without a browser and keep what it shows: `python notebooks/headless.py NOTEBOOK FOLDER`.

The folder gets the page as HTML, the executed notebook, and the Parquet files that the notebook writes.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter


def run(notebook: Path, folder: Path) -> None:
    """Execute every cell, with a line of progress each; an error in a cell is raised."""
    trace = folder / f"{notebook.stem}_trace"
    shutil.rmtree(trace, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["NOTEBOOK_TRACE"] = str(trace.resolve())
    page = nbformat.read(notebook, as_version=4)
    cells = [cell for cell in page.cells if cell.cell_type == "code"]
    began = time.monotonic()

    def show(cell: nbformat.NotebookNode, **_: object) -> None:
        number = cells.index(cell) + 1
        print(f"[{number:2}/{len(cells)}] {time.monotonic() - began:5.1f} s  {cell.source.splitlines()[0]}", flush=True)

    client = NotebookClient(page, timeout=600, on_cell_execute=show, resources={"metadata": {"path": notebook.parent}})
    client.execute()
    nbformat.write(page, folder / notebook.name)
    html, _ = HTMLExporter(embed_images=True).from_notebook_node(page)
    (folder / f"{notebook.stem}.html").write_text(html, encoding="utf-8")
    parts = sorted(trace.glob("*.parquet"))
    print(f"{folder / notebook.stem}.html\n" + "\n".join(map(str, parts)))


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))

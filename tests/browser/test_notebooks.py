"""The notebooks that come with the project, in a real JupyterLab."""

import shutil

import polars as pl
import pytest

import expert_lens
from laboratory import ROOT, Lab, Notebook
from test_heatmap import View, wait_for

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

NOTEBOOKS = ROOT / "notebooks"


def code_cells(notebook: Notebook) -> list[int]:
    """Where a notebook's code cells are among all of its cells."""
    types = notebook.page.evaluate(
        "() => window.jupyterapp.shell.currentWidget.content.widgets.map(cell => cell.model.type)"
    )
    return [at for at, kind in enumerate(types) if kind == "code"]


def test_a_recorded_server_plays_in_the_heatmap_and_is_all_there(lab: Lab) -> None:
    shutil.copy(NOTEBOOKS / "sglang_live.ipynb", lab.root)
    shutil.copytree(NOTEBOOKS / "traces", lab.root / "traces")
    notebook = lab.open("sglang_live.ipynb", height=1400)
    try:
        cells = code_cells(notebook)
        notebook.run(cells[0])
        view = View(notebook)
        notebook.activate(cells[0])
        seen = set()

        def moves() -> bool:
            seen.add(view.pixels())
            return len(seen) >= 10

        wait_for(moves, notebook, 20)
        notebook.picture("sglang-live-light")
        notebook.command_done("apputils:change-theme", theme="JupyterLab Dark")
        notebook.page.locator(".xl[data-theme=dark]").wait_for()
        notebook.page.wait_for_timeout(300)
        notebook.picture("sglang-live-dark")
        notebook.command_done("apputils:change-theme", theme="JupyterLab Light")
        for cell in cells[1:3]:
            notebook.run(cell)
        notebook.activate(cells[0])
        rows = expert_lens.scan(NOTEBOOKS / "traces" / "sglang_live").select(pl.len()).collect().item()
        view.wait_for_tokens(rows)
        for cell in cells[3:]:
            notebook.run(cell)
        assert notebook.output(cells[5]).count("of an equal share") == 8  # a line a layer
        notebook.picture("sglang-live-end")
    finally:
        notebook.page.context.close()
        lab.shut_kernels()

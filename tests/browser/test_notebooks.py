"""The notebooks that come with the project, in a real JupyterLab."""

import json
import shutil

import nbformat
import polars as pl
import pytest

import expert_lens
from children import hear, say, start
from expert_lens import demo
from laboratory import ROOT, Lab, Notebook
from serving import SERVER
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


def test_a_running_server_is_watched_by_its_name(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notebook in which only the name is filled in, and two lines of this test's before those of its last cell."""
    page = nbformat.read(NOTEBOOKS / "sglang_live.ipynb", as_version=4)
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    assert code[0].source.count("\nSERVER = None ") == 1
    code[0].source = code[0].source.replace("\nSERVER = None ", '\nSERVER = "served" ')
    code[-1].source = "import json\nprint(json.dumps(lens.counts().tolist()))\n" + code[-1].source
    nbformat.write(page, lab.root / "by_name.ipynb")
    monkeypatch.setenv("EXPERT_LENS_DIR", str(lab.root.parent / "arenas"))
    with start(SERVER, "64", *list(demo.prompts())[:6]) as server:
        try:
            assert hear(server) == "ready"
            notebook = lab.open("by_name.ipynb", height=1400)
            cells = code_cells(notebook)
            notebook.run(cells[0])
            view = View(notebook)
            notebook.run(cells[1])
            assert "served" in notebook.output(cells[1])
            notebook.activate(cells[0])
            say(server)
            seen = set()

            def moves() -> bool:
                seen.add(view.pixels())
                return len(seen) >= 5

            wait_for(moves, notebook, 20)
            theirs = json.loads(hear(server))
            view.wait_for_tokens(theirs["tokens"])
            notebook.picture("sglang-live-by-name")
            say(server)
            for cell in cells[2:]:
                notebook.run(cell)
            assert json.loads(notebook.output(cells[-1])) == theirs["counts"]
            assert "uint8" in notebook.output(cells[4])  # the experts of a request that is whole
        finally:
            server.kill()
            for context in lab.browser.contexts:
                context.close()
            lab.shut_kernels()

"""One JupyterLab and one browser for all tests of this folder; pages and kernels are each test's own."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, sync_playwright

from laboratory import ARTIFACTS, CHROMIUM_FLAGS, Lab, Notebook, find_chromium, running_lab


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    executable = find_chromium()
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory, browser: Browser) -> Iterator[Lab]:
    base = tmp_path_factory.mktemp("jupyter")
    root = base / "notebooks"
    root.mkdir()
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with running_lab(base, root) as (url, token):
        yield Lab(url, token, root, browser)


@pytest.fixture
def open_notebook(lab: Lab) -> Iterator[Callable[..., Notebook]]:
    """Write cells into a notebook and open it; pages and kernels end with the test."""
    opened: list[Notebook] = []

    def make(cells: list[str], **options: Any) -> Notebook:
        notebook = lab.open(lab.write(cells), **options)
        opened.append(notebook)
        return notebook

    yield make
    for notebook in opened:
        notebook.page.context.close()
    lab.shut_kernels()

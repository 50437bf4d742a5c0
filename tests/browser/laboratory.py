"""A real JupyterLab and a real Chromium, for the tests in this folder and the benchmark of the heatmap.

The server runs on a loopback port with folders of its own, so that nothing of the user's is read or written. Pictures
that the tests take go to build/screenshots/, for people to look at.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import Browser, Page

import expert_lens

ROOT = Path(__file__).parents[2]
ARTIFACTS = ROOT / "build" / "screenshots"
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--js-flags=--expose-gc",
]


def find_chromium() -> str:
    """Path of the browser. Raises FileNotFoundError when there is none: no test is skipped for want of it."""
    for name in (os.environ.get("EXPERT_LENS_CHROMIUM"), "chromium", "chromium-browser", "google-chrome"):
        if name and (path := shutil.which(name)):
            return path
    raise FileNotFoundError("no Chromium: apt-get install chromium, or name one in EXPERT_LENS_CHROMIUM")


class Notebook:
    """One notebook, open in one page of the running JupyterLab."""

    def __init__(self, lab: "Lab", page: Page, name: str) -> None:
        self.lab = lab
        self.page = page
        self.name = name

    @property
    def path(self) -> Path:
        return self.lab.root / self.name

    @property
    def artifacts(self) -> Path:
        return ARTIFACTS

    def command(self, name: str, **args: Any) -> None:
        self.page.evaluate("([name, args]) => { void window.jupyterapp.commands.execute(name, args); }", [name, args])

    def command_done(self, name: str, **args: Any) -> None:
        self.page.evaluate("([n, args]) => window.jupyterapp.commands.execute(n, args).then(() => 0)", [name, args])

    def status(self) -> str:
        return str(
            self.page.evaluate(
                "() => window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status ?? 'none'"
            )
        )

    def wait_for_status(self, status: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while (now := self.status()) != status:
            assert time.monotonic() < deadline, f"kernel is {now}, expected {status}"
            self.page.wait_for_timeout(50)

    def activate(self, cell: int) -> None:
        """Bring the notebook to the front, and its cell to the keys."""
        self.page.evaluate(
            """([name, cell]) => {
                const panel = [...window.jupyterapp.shell.widgets("main")].find(one => one.context?.path === name);
                window.jupyterapp.shell.activateById(panel.id);
                panel.content.deselectAll();
                panel.content.activeCellIndex = cell;
            }""",
            [self.name, cell],
        )

    def runs(self, cell: int) -> bool:
        """Whether the cell runs. The kernel's status would not tell: messages of widgets make JupyterLab say idle."""
        return self.page.locator(".jp-Notebook .jp-InputPrompt").nth(cell).inner_text() == "[*]:"

    def run(self, cell: int, wait: bool = True) -> None:
        """Run one cell; unless wait is false, until the kernel has answered."""
        self.activate(cell)
        ran = """async (wait) => {
            const done = window.jupyterapp.commands.execute("notebook:run-cell");
            const late = new Promise((_, fail) => setTimeout(fail, 60_000, new Error("the cell runs after 60 s")));
            if (wait) await Promise.race([done, late]);
        }"""
        self.page.evaluate(ran, wait)

    def output(self, cell: int) -> str:
        """Text of a cell's outputs, as the page shows it."""
        return str(
            self.page.evaluate(
                """cell => [...window.jupyterapp.shell.currentWidget.content.widgets[cell].outputArea.node
                    .querySelectorAll("pre")].map(pre => pre.textContent).join("")""",
                cell,
            )
        ).strip()

    def restart(self) -> None:
        """Restart the kernel, and wait until it is there again."""
        restarted = "() => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart().then(() => 0)"
        self.page.evaluate(restarted)
        self.wait_for_status("idle")

    def save(self) -> None:
        self.command_done("docmanager:save")

    def reload(self) -> None:
        self.page.reload()
        self.ready()
        self.wait_for_status("idle")

    def ready(self) -> None:
        self.page.wait_for_selector(".jp-NotebookPanel .jp-Notebook .jp-Cell", timeout=60_000)
        self.page.wait_for_function("() => !!window.jupyterapp?.shell?.currentWidget?.sessionContext", timeout=60_000)

    def picture(self, name: str, selector: str | None = None, index: int = 0) -> Path:
        """Screenshot of the page, or of the index-th element that matches, as build/screenshots/<name>.png."""
        path = ARTIFACTS / f"{name}.png"
        if selector is None:
            self.page.screenshot(path=path)
        else:
            self.page.locator(selector).nth(index).screenshot(path=path)
        return path


class Lab:
    """The running JupyterLab server."""

    def __init__(self, url: str, token: str, root: Path, browser: Browser) -> None:
        self.url = url
        self.token = token
        self.root = root
        self.browser = browser
        self._count = 0

    def request(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.url}{path}", data=data, method=method, headers={"Authorization": f"token {self.token}"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def write(self, cells: list[str], kernel: str | None = "python3") -> str:
        """Write a notebook of code cells, return its file name."""
        self._count += 1
        name = f"notebook-{self._count}.ipynb"
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        if kernel:
            notebook.metadata["kernelspec"] = {"name": kernel, "display_name": "Python 3", "language": "python"}
        nbformat.write(notebook, self.root / name)
        return name

    def open(
        self,
        name: str,
        *,
        width: int = 1400,
        height: int = 900,
        scale: float = 1,
        kernel: bool = True,
        **context: Any,
    ) -> Notebook:
        """Open a notebook in a fresh page, and wait for its kernel unless kernel is false."""
        browser_context = self.browser.new_context(
            viewport={"width": width, "height": height}, device_scale_factor=scale, **context
        )
        page = browser_context.new_page()
        page.set_default_timeout(20_000)
        page.goto(f"{self.url}/lab/workspaces/w{secrets.token_hex(4)}/tree/{name}?token={self.token}")
        notebook = Notebook(self, page, name)
        notebook.ready()
        if kernel:
            notebook.wait_for_status("idle")
        return notebook

    def shut_kernels(self) -> None:
        for session in self.request("GET", "/api/sessions"):
            with contextlib.suppress(OSError):
                self.request("DELETE", f"/api/sessions/{session['id']}")


@contextlib.contextmanager
def running_lab(base: Path, root: Path) -> Iterator[tuple[str, str]]:
    """Start JupyterLab with folders below base; yields its address and token."""
    token = secrets.token_hex(16)
    package = Path(expert_lens.__path__[0]).parent
    settings = base / "settings" / "@jupyterlab" / "docmanager-extension"
    settings.mkdir(parents=True)
    (settings / "plugin.jupyterlab-settings").write_text('{"autosave": false}')
    notification = base / "settings" / "@jupyterlab" / "apputils-extension"
    notification.mkdir(parents=True)
    (notification / "notification.jupyterlab-settings").write_text('{"fetchNews": "false", "checkForUpdates": false}')
    environment = os.environ | {
        "HOME": str(base),
        "JUPYTER_CONFIG_DIR": str(base / "config"),
        "JUPYTER_DATA_DIR": str(base / "data"),
        "JUPYTER_RUNTIME_DIR": str(base / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(base / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(base / "workspaces"),
        "IPYTHONDIR": str(base / "ipython"),
        "EXPERT_LENS_DIR": str(base / "arenas"),
        "PYTHONPATH": os.pathsep.join([str(package), str(Path(__file__).parent)]),
    }
    log = (base / "jupyter.log").open("wb")
    arguments = [
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port=0",
        f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={root}",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=",
    ]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *arguments],
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield wait_for_server(server, base, log.name), token
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        log.close()


def wait_for_server(server: "subprocess.Popen[bytes]", base: Path, log: str) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for info in (base / "runtime").glob("jpserver-*.json"):
            with contextlib.suppress(ValueError, KeyError, OSError):
                url = str(json.loads(info.read_text())["url"]).rstrip("/")
                with urllib.request.urlopen(f"{url}/api", timeout=5):
                    return url
        assert server.poll() is None, f"JupyterLab ended:\n{Path(log).read_text()[-4000:]}"
        time.sleep(0.1)
    raise TimeoutError(f"JupyterLab did not answer within 60 s:\n{Path(log).read_text()[-4000:]}")

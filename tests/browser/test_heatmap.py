"""The heatmap in a real JupyterLab, in a real browser."""

import base64
import re
import time
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import nbformat
import numpy as np
import pytest

from expert_lens.widgets.frames import Snapshot
from expert_lens.widgets.still import draw
from laboratory import Notebook
from sources import Phase, Router

pytestmark = [pytest.mark.browser, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

Open = Callable[..., Notebook]

SETUP = """
import time
from expert_lens.widgets import Heatmap
from sources import Replay, Router
"""


def routed() -> Router:
    """The source that `ROUTED` makes in a kernel: the same seed, so the same tokens."""
    router = Router(layers=6, experts=16, top_k=2, first_layer=3)
    router.route(40, "prefill")
    router.route(600, "decode")
    return router


ROUTED = SETUP + (
    "router = Router(layers=6, experts=16, top_k=2, first_layer=3)\n"
    "router.route(40, 'prefill'); router.route(600, 'decode')\n"
    "heatmap = Heatmap(router)\n"
    "heatmap\n"
)


class View:
    """The index-th heatmap that a page shows."""

    def __init__(self, notebook: Notebook, index: int = 0) -> None:
        self.page = notebook.page
        self.root = self.page.locator(".xl").nth(index)
        self.map = self.root.locator(".xl-map")

    def state(self) -> str:
        return self.root.locator(".xl-state").inner_text()

    def wait_for_state(self, state: str) -> None:
        self.root.locator(".xl-state", has_text=re.compile(f"^\\s*{re.escape(state)}\\s*$")).wait_for()

    def wait_for_note(self, text: str) -> None:
        self.root.locator(".xl-note", has_text=text).wait_for()

    def wait_for_tokens(self, tokens: int) -> None:
        self.root.locator(".xl-status [data-key=tokens] b", has_text=re.compile(f"^{tokens:,}$")).wait_for()

    def frames(self) -> int:
        """Frames drawn by this view so far."""
        return int(self.map.locator("canvas").evaluate("canvas => canvas.dataset.drawn ?? 0"))

    def pixels(self) -> str:
        return str(self.map.locator("canvas").evaluate("canvas => canvas.toDataURL()"))

    def hover(self, layer: int, expert: int, layers: int = 6, experts: int = 16) -> None:
        self.map.scroll_into_view_if_needed()
        box = self.map.bounding_box()
        assert box is not None
        self.page.mouse.move(
            box["x"] + box["width"] * (expert + 0.5) / experts, box["y"] + box["height"] * (layer + 0.5) / layers
        )

    def readout(self) -> list[str]:
        """Cell, tokens, times uniform load, share: as the tip says them."""
        return self.root.locator(".xl-tip > span").all_inner_texts()


def words(source: Router, layer: int, expert: int, phase: Phase | None = None, last: int | None = None) -> list[str]:
    """What the tip must say of a cell, from a count of the tokens themselves."""
    counts = source.recount(phase, last)
    tokens, share = int(counts[layer, expert]), counts[layer, expert] / counts[layer].sum()
    relative = share * source.num_experts

    def digits(value: float) -> str:
        places = "1" if value >= 100 else "0.1" if value >= 10 else "0.01" if value >= 0.1 else "0.001"
        return f"{Decimal(value).quantize(Decimal(places), ROUND_HALF_UP):,}"

    return [
        f"Layer {source.layers[layer]} · expert {expert}",
        f"{tokens:,} token{'' if tokens == 1 else 's'}",
        f"{digits(relative) if tokens else 0}\N{MULTIPLICATION SIGN} uniform",
        f"{digits(100 * share) if tokens else 0} % of the layer",
    ]


def wait_for(condition: Callable[[], bool], notebook: Notebook, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        notebook.page.wait_for_timeout(50)


@pytest.mark.parametrize("work", ["time.sleep(0.02)", "sum(range(10_000))"])
def test_pixels_change_while_the_cell_that_shows_the_map_blocks(open_notebook: Open, work: str) -> None:
    shows = f"{SETUP}import os\nrouter = Router(rate=200).start()\ndisplay(Heatmap(router))\n"
    notebook = open_notebook([f"{shows}while not os.path.exists('end'): {work}"])
    end = notebook.path.parent / "end"
    notebook.run(0, wait=False)
    view = View(notebook)
    try:
        wait_for(lambda: view.root.count() > 0 and view.frames() > 0, notebook)
        seen, first = set(), view.frames()

        def moves() -> bool:
            seen.add(view.pixels())
            return len(seen) >= 5 and view.frames() - first >= 5

        wait_for(moves, notebook)
        assert notebook.runs(0)
        assert view.state() == "running"
    finally:
        end.touch()
        wait_for(lambda: not notebook.runs(0), notebook)
        end.unlink()


def test_hover_and_keys_tell_the_numbers_of_an_independent_count(open_notebook: Open) -> None:
    source = routed()
    notebook = open_notebook([ROUTED], scale=2)
    notebook.run(0)
    view = View(notebook)
    view.wait_for_tokens(640)
    for layer, expert in [(0, 0), (5, 15), (2, 7), (4, 5)]:
        view.hover(layer, expert)
        assert view.readout() == words(source, layer, expert)
    notebook.picture("hover", ".xl")

    # By keys from control to map, and then to each corner and some cells between.
    notebook.page.mouse.move(5, 5)
    view.root.locator(".xl-pause").focus()
    notebook.page.keyboard.press("Tab")
    assert view.readout() == words(source, 0, 0)
    layer = expert = 0
    moves = {"ArrowRight": (0, 1), "ArrowDown": (1, 0), "ArrowLeft": (0, -1), "ArrowUp": (-1, 0)}
    for key in ["ArrowRight", "ArrowDown", "ArrowRight", "ArrowRight", "ArrowUp", "ArrowUp", "ArrowLeft", "ArrowDown"]:
        notebook.page.keyboard.press(key)
        layer, expert = max(0, layer + moves[key][0]), max(0, expert + moves[key][1])
        assert view.readout() == words(source, layer, expert)
    for key, cell in {"Control+End": (5, 15), "Home": (5, 0), "Control+Home": (0, 0), "End": (0, 15)}.items():
        notebook.page.keyboard.press(key)
        assert view.readout() == words(source, *cell)
    assert view.root.locator("[aria-live=polite]").inner_text() == ", ".join(words(source, 0, 15))
    assert notebook.page.evaluate("window.jupyterapp.shell.currentWidget.content.activeCellIndex") == 0


def test_controls_choose_phase_and_window_also_while_a_cell_blocks(open_notebook: Open) -> None:
    source = routed()
    notebook = open_notebook([ROUTED, "time.sleep(6)", "(heatmap.phase, heatmap.window)"])
    notebook.run(0)
    view = View(notebook)
    view.wait_for_tokens(640)

    def shows(phase: Phase | None, last: int | None) -> None:
        def agrees() -> bool:
            view.hover(2, 7)
            if view.readout() != words(source, 2, 7, phase, last):
                return False
            view.hover(3, 1)
            return view.readout() == words(source, 3, 1, phase, last)

        wait_for(agrees, notebook)

    select = view.root.locator("select")
    view.root.get_by_role("radio", name="Prefill").click()
    shows("prefill", None)
    view.root.get_by_role("radio", name="Decode").click()
    shows("decode", None)
    notebook.run(1, wait=False)
    select.select_option("256")
    shows("decode", 256)
    view.root.get_by_role("radio", name="Both").click()
    shows(None, 256)
    select.select_option("other")
    field = view.root.locator("input[type=number]")
    field.fill("620")
    field.press("Enter")
    shows(None, 620)
    view.root.get_by_role("radio", name="Prefill").click()
    shows("prefill", 620)
    assert notebook.runs(1)
    notebook.run(2)
    assert notebook.output(2) == "('prefill', 620)"

    # A window that the source cannot look back on is said, not drawn; the next one is drawn again.
    field.fill("99999")
    field.press("Enter")
    view.wait_for_state("failed")
    view.wait_for_note("this source keeps the last 16384")
    select.select_option("")
    view.wait_for_state("running")
    shows("prefill", None)
    assert view.root.locator(".xl-note").inner_text() == ""


def test_views_of_one_map_agree_and_come_back_after_a_reload(open_notebook: Open) -> None:
    source = routed()
    notebook = open_notebook([ROUTED, "display(heatmap)", "router.route(50, 'decode')"])
    notebook.run(0)
    notebook.run(1)
    notebook.page.locator(".xl").nth(1).wait_for()
    notebook.activate(0)
    notebook.command_done("notebook:create-output-view")
    notebook.page.locator(".xl").nth(2).wait_for()
    views = [View(notebook, index) for index in range(3)]
    views[0].root.get_by_role("radio", name="Decode").click()
    notebook.run(2)
    source.route(50, "decode")
    for view in views:
        view.wait_for_tokens(690)
        assert view.root.get_by_role("radio", name="Decode").get_attribute("aria-checked") == "true"
    views[1].hover(1, 4)
    assert views[1].readout() == words(source, 1, 4, "decode")
    notebook.save()

    notebook.reload()
    notebook.run(2)
    source.route(50, "decode")
    view = View(notebook)
    view.wait_for_tokens(740)
    view.wait_for_state("running")
    view.hover(1, 4)
    assert view.readout() == words(source, 1, 4, "decode")


def saved_pictures(path: Path) -> list[bytes]:
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    return [base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]


def rows(picture: bytes) -> bytes:
    """A picture's pixels, compressed: what is left of the file without the mark of whose it is."""
    return picture[picture.index(b"PLTE") :]


def test_a_saved_notebook_keeps_the_last_picture_without_a_kernel(open_notebook: Open, tmp_path: Path) -> None:
    notebook = open_notebook([ROUTED, "router.route(160, 'decode')\nrouter.end()"])
    notebook.run(0)
    View(notebook).wait_for_tokens(640)
    still = notebook.page.locator(".jp-RenderedImage img")
    assert still.count() == 1
    assert not still.is_visible()
    notebook.run(1)
    notebook.save()
    source = routed()
    source.route(160, "decode")
    snapshot = Snapshot({"both": source.recount(None, None)}, {"tokens": 800, "state": "ended"})
    expected = draw(snapshot, title=source.title, layers=source.layers)
    [picture] = saved_pictures(notebook.path)
    assert rows(picture) == rows(expected.png)
    notebook.page.context.close()
    notebook.lab.shut_kernels()

    alone = notebook.lab.open(notebook.name, kernel=False)
    still = alone.page.locator(".jp-RenderedImage img")
    still.wait_for()
    assert still.evaluate("image => image.naturalWidth / image.width") == 2
    alone.wait_for_status("idle")
    shown = alone.page.locator(".jp-Notebook").inner_text()
    assert "Loading widget" not in shown
    assert "Error displaying" not in shown
    alone.picture("saved-without-kernel")
    alone.page.context.close()

    from nbconvert import HTMLExporter

    page_html, _ = HTMLExporter().from_filename(str(notebook.path))
    (tmp_path / "notebook.html").write_text(page_html)
    page = notebook.lab.browser.new_page()
    page.goto(f"file://{tmp_path}/notebook.html", wait_until="domcontentloaded")
    images = page.locator(".jp-OutputArea img")
    assert images.count() == 1
    assert images.is_visible()
    assert "Heatmap(" not in page.locator(".jp-OutputArea").inner_text()
    page.screenshot(path=notebook.artifacts / "nbconvert.png")
    page.close()


# A thread that has handed over to another is still seen for as long as it takes to end.
THREADS = """
import threading
[thread.name for thread in threading.enumerate() if "heatmap" in thread.name]
""".strip()


def has_threads(notebook: Notebook, cell: int, names: str) -> bool:
    """Asks anew each time: that a view is gone the kernel hears between two cells, and not while one waits for it."""
    notebook.run(cell)
    return notebook.output(cell) == names


def test_nobody_looks_and_nothing_is_asked_or_sent(open_notebook: Open) -> None:
    notebook = open_notebook(
        [
            ROUTED.removesuffix("heatmap\n") + "router.start()\nheatmap",
            "\n".join(f"# {line}" for line in range(80)),
            "before, sent = router.asked, heatmap._audience._sent\ntime.sleep(1)\n"
            "(router.asked - before, heatmap._audience._sent - sent)",
            THREADS,
        ]
    )
    notebook.run(0)
    view = View(notebook)
    wait_for(lambda: view.frames() > 5, notebook)
    notebook.run(2)  # It scrolls to its cell, far below the map.
    notebook.page.wait_for_timeout(300)
    notebook.run(2)
    assert notebook.output(2) == "(0, 0)"
    notebook.page.locator(".jp-NotebookPanel .jp-Cell").first.scroll_into_view_if_needed()
    drawn = view.frames()
    wait_for(lambda: view.frames() > drawn + 5, notebook)

    # Shown anew and anew in the same place, there is still but one view and one thread.
    for _ in range(4):
        notebook.run(0)
    wait_for(lambda: notebook.page.locator(".xl").count() == 1, notebook)
    wait_for(lambda: has_threads(notebook, 3, "['expert-lens-heatmap']"), notebook)
    notebook.activate(0)
    notebook.command_done("notebook:clear-cell-output")
    wait_for(lambda: has_threads(notebook, 3, "[]"), notebook)


def test_what_ends_the_source_is_said_and_the_last_picture_stays(open_notebook: Open) -> None:
    source = routed()
    notebook = open_notebook(
        [
            ROUTED,
            "router.failure = RuntimeError('the disk is on fire'); router.route(1)",
            "import warnings\n"
            "with warnings.catch_warnings(record=True) as caught:\n    warnings.simplefilter('always')\n"
            "    heatmap.close()\nprint(*[warning.message for warning in caught])",
            "router = Router(8, 16, 2)\nheatmap = Heatmap(router)\nheatmap",
            "router.route(30); router.dropped = 7",
            "router.end('closed')",
            ROUTED,
        ]
    )
    notebook.run(0)
    view = View(notebook)
    view.wait_for_tokens(640)
    notebook.run(1)
    view.wait_for_state("failed")
    view.wait_for_note("RuntimeError: the disk is on fire")
    view.hover(2, 7)
    assert view.readout() == words(source, 2, 7)
    notebook.run(2)
    assert "missed frames: RuntimeError: the disk is on fire" in notebook.output(2)
    assert notebook.page.locator(".xl").count() == 0
    assert notebook.page.locator(".jp-RenderedImage img").is_visible()

    notebook.run(3)
    view = View(notebook)
    view.root.locator(".xl-nothing", has_text="No tokens yet").wait_for()
    assert view.frames() == 0
    notebook.picture("no-tokens-yet", ".xl")
    notebook.run(4)
    view.wait_for_tokens(30)
    view.root.locator(".xl-warning", has_text="dropped 7").wait_for()
    notebook.run(5)
    view.wait_for_state("closed")
    assert view.frames() > 0

    notebook.run(6)
    view = View(notebook, 1)
    view.wait_for_tokens(640)
    notebook.restart()
    view.wait_for_state("closed: no kernel")
    view.hover(2, 7)
    assert view.readout() == words(source, 2, 7)
    notebook.picture("kernel-restarted", ".xl", 1)


def luminance(colour: str) -> float:
    channels = np.array([int(part) for part in re.findall(r"\d+", colour)[:3]]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


GROUND = """node => {
    for (; node; node = node.parentElement) {
        const colour = getComputedStyle(node).backgroundColor;
        if (!/, 0\\)$|transparent/.test(colour)) return colour;
    }
}"""


TEXTS = [".xl-title", ".xl-state", ".xl-segments button", "select", ".xl-pause", ".xl-x span", ".xl-y span"]
TEXTS += [".xl-caption", ".xl-marks span", ".xl-empty", ".xl-status b", ".xl-status small"]


@pytest.mark.parametrize("theme", ["Light", "Dark"])
def test_text_is_readable_and_cells_are_crisp_in_every_theme(open_notebook: Open, theme: str) -> None:
    notebook = open_notebook(
        [
            SETUP + "router = Router(); router.route(600, 'prefill'); router.route(2400); router.dropped = 3\n"
            "Heatmap(router)",
            "replay = Replay()\nHeatmap(replay)",
            "tiny = Router(1, 8, 2, title='One layer', first_layer=0); tiny.route(50)\nHeatmap(tiny)",
        ],
        scale=2,
        height=1000,
    )
    notebook.run(0)
    view = View(notebook)
    view.wait_for_tokens(3000)
    # Themes are changed while the map is there: it must follow.
    notebook.command_done("apputils:change-theme", theme=f"JupyterLab {theme}")
    notebook.page.locator(f".xl[data-theme={theme.lower()}]").wait_for()
    notebook.run(1)
    notebook.run(2)
    for index, name in enumerate(("24x64", "94x384", "1x8")):
        shown = View(notebook, index)
        shown.root.scroll_into_view_if_needed()
        wait_for(lambda shown=shown: shown.frames() > 0, notebook)
        layers, experts = map(int, name.split("x"))
        shown.hover(layers // 2, experts // 3, layers, experts)
        notebook.page.wait_for_timeout(200)
        notebook.picture(f"heatmap-{name}-{theme.lower()}", ".xl", index)
        # Every cell is a whole number of the screen's pixels.
        width = shown.map.locator("canvas").evaluate("canvas => canvas.width")
        assert width % experts == 0
    for selector in TEXTS:
        for node in view.root.locator(selector).all():
            ink = node.evaluate("node => getComputedStyle(node).color")
            assert contrast(ink, node.evaluate(GROUND)) >= 4.5, selector
    notebook.command_done("apputils:change-theme", theme="JupyterLab Light")


def test_a_narrow_page_and_a_changed_width_keep_the_whole_map(open_notebook: Open) -> None:
    notebook = open_notebook([ROUTED])
    notebook.run(0)
    view = View(notebook)
    view.wait_for_tokens(640)
    for width in (760, 1100, 700):
        notebook.page.set_viewport_size({"width": width, "height": 900})
        notebook.page.wait_for_timeout(300)
        box, root = view.map.bounding_box(), view.root.bounding_box()
        assert box is not None
        assert root is not None
        assert box["x"] + box["width"] <= root["x"] + root["width"]
        view.hover(5, 15)
        assert view.readout()[0] == "Layer 8 · expert 15"
    notebook.picture("narrow", ".xl")


GENERATE = """
import os
import numpy as np, torch
import expert_lens
from expert_lens import demo

torch.set_num_threads(1)
model, tokenizer = demo.load()
expected = np.zeros((8, 16), int)
for index, layer in enumerate(model.model.layers):
    def count(module, args, output, index=index):
        expected[index] += np.bincount(output[2].flatten().numpy(), minlength=16)
    layer.mlp.gate.register_forward_hook(count)
lens = expert_lens.attach(model)
display(lens)
prompt = tokenizer(demo.prompts()["french"][0], return_tensors="pt")
while not os.path.exists("end"):
    model.generate(**prompt, max_new_tokens=64, min_new_tokens=64)
layer, expert = np.unravel_index(expected.argmax(), expected.shape)
print(layer, expert, expected[layer, expert], expected[layer].sum(), lens.stats["tokens"])
"""


def test_the_map_of_a_real_model_moves_while_it_generates(open_notebook: Open) -> None:
    notebook = open_notebook([GENERATE, "lens.close()"])
    end = notebook.path.parent / "end"
    notebook.run(0, wait=False)
    view = View(notebook)
    try:
        wait_for(lambda: view.root.count() > 0 and view.frames() > 0, notebook, 30)
        seen: set[str] = set()

        def has_moved() -> bool:
            seen.add(view.pixels())
            return len(seen) >= 8

        wait_for(has_moved, notebook, 20)
        assert notebook.runs(0)
        notebook.picture("generate")
    finally:
        end.touch()
        wait_for(lambda: not notebook.runs(0), notebook, 30)
        end.unlink()
    layer, expert, tokens, total, all_tokens = map(int, notebook.output(0).split())
    view.wait_for_tokens(all_tokens)
    view.hover(layer, expert, 8, 16)
    relative = f"{16 * tokens / total:.2f}\N{MULTIPLICATION SIGN} uniform"
    assert view.readout()[:3] == [f"Layer {layer} · expert {expert}", f"{tokens:,} tokens", relative]
    assert int(view.root.locator(".xl-status [data-key=dropped] b").inner_text()) == 0
    notebook.run(1)
    view.wait_for_state("ended")

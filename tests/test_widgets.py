"""The widget's Python side, without a browser; tests/browser has the rest."""

import base64
import gc
import json
import re
import subprocess
import sys
import threading
import time
import warnings
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from expert_lens.types import Phase
from expert_lens.widgets import Heatmap
from expert_lens.widgets import audience as audiences
from expert_lens.widgets.audience import Audience
from expert_lens.widgets.bundle import MODULES, javascript
from expert_lens.widgets.camera import Camera
from expert_lens.widgets.frames import MAGIC, Snapshot
from expert_lens.widgets.palette import STATIC, balance, colours, relative_load
from expert_lens.widgets.still import Still, draw, mark

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Source:
    """Two layers of four experts; the counts are set by hand."""

    def __init__(self) -> None:
        self.layers = [3, 7]
        self.num_experts = 4
        self.top_k = 2
        self.title = "Source"
        self.both = np.array([[4, 0, 2, 2], [1, 1, 3, 3]], np.uint64)
        self.stats: dict[str, Any] = {
            "tokens": 4,
            "steps": 2,
            "dropped_tokens": 0,
            "missing_tokens": 0,
            "lag_s": 0.001,
            "state": "running",
        }
        self.failure: Exception | None = None

    def tokens_seen(self) -> int:
        return int(self.stats["tokens"])

    def counts(self, phase: Phase | None = None, last: int | None = None) -> npt.NDArray[np.uint64]:
        if self.failure:
            raise self.failure
        if last is not None and last > 100:
            raise ValueError(f"only the last 100, not {last}")
        return {None: self.both, "prefill": self.both // 2, "decode": self.both - self.both // 2}[phase].copy()


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What the heatmaps of a test send, to a page that draws it at once: the message, and the header of the frame."""
    messages: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def send(heatmap: Heatmap, content: dict[str, Any], buffers: list[Any]) -> None:
        messages.append((content, header(bytes(buffers[0]))))
        if content["ask"]:
            heatmap._hear({"page": "page", "kind": "drawn", "number": content["number"]})

    monkeypatch.setattr(Heatmap, "send", send)
    return messages


@pytest.fixture
def heatmap(source: Source, sent: list[Any]) -> Iterator[Heatmap]:
    del sent
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        shown = Heatmap(source)
        yield shown
        shown.close()


def header(frame: bytes) -> dict[str, Any]:
    assert frame[:4] == MAGIC
    facts: dict[str, Any] = json.loads(frame[8 : 8 + int.from_bytes(frame[4:8], "little")])
    return facts


def wait_for(condition: Any, seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.005)


def look(heatmap: Heatmap, page: str = "page", looks: bool = True) -> None:
    heatmap._hear({"page": page, "kind": "look", "looks": looks})


# Frames.


@pytest.mark.parametrize(("highest", "dtype"), [(0, "u2"), (65535, "u2"), (65536, "u4"), (1 << 32, "f8")])
def test_a_frame_keeps_every_count_in_the_smallest_format(highest: int, dtype: str) -> None:
    plane = np.arange(6, dtype=np.uint64).reshape(2, 3)
    plane[1, 2] = highest
    frame = bytes(Snapshot({"decode": plane, "both": plane + np.uint64(0)}, {"tokens": 5}).encode())
    facts = header(frame)
    assert facts == {"dtype": dtype, "planes": ["decode", "both"], "shape": [2, 2, 3], "tokens": 5}
    offset = 8 + int.from_bytes(frame[4:8], "little")
    assert offset % 8 == 0
    counts = np.frombuffer(frame, f"<{dtype}", offset=offset).reshape(2, 2, 3)
    assert np.array_equal(counts, [plane, plane])


def test_planes_of_different_shapes_are_no_frame() -> None:
    planes = {"prefill": np.zeros((2, 3), np.uint64), "decode": np.zeros((3, 2), np.uint64)}
    with pytest.raises(ValueError, match=r"prefill \(2, 3\), decode \(3, 2\)"):
        Snapshot(planes).encode()


# The camera.


def test_a_camera_takes_what_is_asked_and_keeps_the_last_picture_of_a_source_that_is_gone() -> None:
    source = Source()
    camera = Camera(source)
    assert set(camera.take(None).snapshot.planes) == {"both", "prefill", "decode"}
    moment, snapshot = camera.take(50, "decode")
    assert list(snapshot.planes) == ["decode"]
    assert snapshot.facts["window"] == 50
    assert camera.take_unless(moment, 50, "decode") is None
    assert camera.take_unless(moment, 51, "decode") is not None
    assert camera.running
    counts = source.counts("decode")
    del source
    gc.collect()
    assert not camera.running
    _, snapshot = camera.take(None)
    assert snapshot.facts["state"] == "closed"
    assert np.array_equal(snapshot.planes["decode"], counts)


def test_a_camera_whose_source_was_never_seen_shows_nothing() -> None:
    camera = Camera(Source())
    gc.collect()
    snapshot = camera.take(None).snapshot
    assert (snapshot.facts["state"], snapshot.facts["tokens"]) == ("closed", 0)
    assert not snapshot.planes["both"].any()


# The audience.

BIG = audiences.SMALL_FRAME + 1


def test_at_most_two_frames_go_unacknowledged_to_a_page_that_does_not_answer() -> None:
    audience = Audience()
    audience.hear({"page": "a", "kind": "look", "looks": True}, 0.0, False)
    asks = []
    for number in (1, 2):
        assert audience.wait(0.0, False) == 0
        asks.append(audience.sends(BIG, 0.0, False))
        assert asks[-1][0] == number
    assert any(ask for _, ask in asks)
    assert 0 < audience.wait(0.0, False) <= audiences.PROBE
    audience.hear({"page": "a", "kind": "drawn", "number": 2}, 0.1, False)
    assert audience.wait(0.1, False) == 0


def test_the_window_grows_with_quick_answers_and_shrinks_with_slow_ones() -> None:
    audience = Audience()
    audience.hear({"page": "a", "kind": "look", "looks": True}, 0.0, False)

    def fill(answer_after: float) -> int:
        now, frames, asked = 0.0, 0, None
        while audience.wait(now, False) == 0:
            number, ask = audience.sends(BIG, now, False)
            asked = number if ask else asked
            frames += 1
        audience.hear({"page": "a", "kind": "drawn", "number": number}, answer_after, False)
        return frames

    sizes = [fill(0.01) for _ in range(8)]
    assert sizes == [2, 4, 8, 16, 32, 64, 64, 64]
    assert [fill(1.0) for _ in range(7)] == [64, 32, 16, 8, 4, 2, 2]


def test_a_page_that_never_answers_is_probed_and_then_left_alone_until_it_speaks() -> None:
    audience = Audience()
    audience.hear({"page": "a", "kind": "look", "looks": True}, 0.0, False)
    now, probes = 0.0, 0
    while audience.wait(now, False) < audiences.RARELY:
        if audience.wait(now, False) == 0:
            audience.sends(BIG, now, False)
            probes += 1
        now += 0.5
        assert now < 60
    assert probes <= 2 + audiences.PROBES
    assert audience.present
    audience.hear({"page": "a", "kind": "look", "looks": True}, now, False)
    assert audience.wait(now, False) == 0


@pytest.mark.parametrize("frame_bytes", [BIG, audiences.SMALL_FRAME])
def test_a_kernel_that_cannot_hear_sends_at_the_full_rate(frame_bytes: int) -> None:
    audience = Audience()
    audience.hear({"page": "a", "kind": "look", "looks": True}, 0.0, False)
    for step in range(100):
        assert audience.wait(step / 60, True) == 0
        assert not audience.sends(frame_bytes, step / 60, True)[1]
    # And when it can, nothing is owed.
    assert audience.wait(2.0, False) == 0


def test_a_kernel_that_hears_while_busy_waits_for_acknowledgements_of_large_frames() -> None:
    audience = Audience()
    audience.hear({"page": "a", "kind": "look", "looks": True}, 0.0, True)
    audience.sends(BIG, 0.0, True)
    audience.sends(BIG, 0.0, True)
    assert audience.wait(0.0, True) > 0


def test_hidden_and_absent_pages_get_nothing() -> None:
    audience = Audience()
    assert not audience.present
    assert audience.left(0.0, True)
    assert audience.wait(0.0, False) == audiences.RARELY
    audience.expect(0.0)
    assert audience.present
    assert not audience.left(audiences.UNHEARD + 1, True)
    assert not audience.left(audiences.GREETING - 1, False)
    assert audience.left(audiences.GREETING + 1, False)
    assert audience.wait(1.0, False) == 0
    assert audience.wait(audiences.GREETING + 1, False) == audiences.RARELY
    assert audience.wait(audiences.UNHEARD - 1, True) == 0
    audience.sends(BIG, audiences.UNHEARD, True)
    assert audience.wait(audiences.UNHEARD, True) == audiences.UNHEARD_INTERVAL
    audience.hear({"page": "a", "kind": "look", "looks": True}, 100.0, False)
    audience.hear({"page": "a", "kind": "look", "looks": False}, 100.0, False)
    assert audience.wait(100.0, False) == audiences.RARELY
    assert audience.present
    assert not audience.left(200.0, False)
    audience.hear({"page": "a", "kind": "gone"}, 100.0, False)
    assert not audience.present
    assert audience.left(100.0, True)


@pytest.mark.parametrize(
    "message",
    [{}, {"page": 3, "kind": "look"}, {"page": "a", "kind": "shout"}, {"page": "a", "kind": "drawn", "number": "x"}],
)
def test_messages_that_no_page_of_ours_sends_do_no_harm(message: dict[str, Any]) -> None:
    audience = Audience()
    audience.hear(message, 0.0, False)
    audience.hear({"page": "b", "kind": "drawn", "number": 10**9}, 0.0, False)
    assert audience.sends(BIG, 0.0, False)[0] == 1


def test_pages_beyond_the_limit_replace_the_oldest() -> None:
    audience = Audience()
    for page in range(audiences.MAX_PAGES + 5):
        audience.hear({"page": str(page), "kind": "look", "looks": True}, 0.0, False)
    assert len(audience._pages) == audiences.MAX_PAGES
    assert "0" not in audience._pages


# The widget and its thread.


def test_frames_follow_the_source_and_stop_with_it(source: Source, heatmap: Heatmap, sent: list[Any]) -> None:
    look(heatmap)
    wait_for(lambda: sent)
    assert (sent[0][0]["kind"], sent[0][1]["planes"], sent[0][1]["tokens"]) == ("frame", ["both"], 4)
    time.sleep(0.1)
    assert len(sent) == 1
    source.stats = source.stats | {"tokens": 9}
    wait_for(lambda: sent[-1][1]["tokens"] == 9)
    heatmap.phase = "prefill"
    wait_for(lambda: sent[-1][1]["planes"] == ["prefill"])
    heatmap.window = 30
    wait_for(lambda: sent[-1][1]["window"] == 30)
    source.stats = source.stats | {"state": "ended"}
    wait_for(lambda: sent[-1][1]["state"] == "ended")
    wait_for(lambda: heatmap._pusher._thread is None)
    # A page that comes later still gets the picture.
    count = len(sent)
    look(heatmap, "other")
    wait_for(lambda: len(sent) == count + 1)


def test_the_thread_ends_when_the_last_page_is_gone_and_comes_back_with_the_next(heatmap: Heatmap) -> None:
    look(heatmap)
    wait_for(lambda: heatmap._pusher._thread is not None)
    heatmap._hear({"page": "page", "kind": "gone"})
    wait_for(lambda: heatmap._pusher._thread is None)
    look(heatmap)
    wait_for(lambda: heatmap._pusher._thread is not None)


def test_no_more_frames_than_were_asked_for(source: Source, sent: list[Any]) -> None:
    heatmap = Heatmap(source, max_fps=20)
    look(heatmap)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        source.stats = source.stats | {"tokens": source.stats["tokens"] + 1}
        time.sleep(0.005)
    heatmap.close()
    assert 10 <= len(sent) <= 21


def test_an_error_of_the_source_is_shown_tried_again_and_told_at_the_end(
    source: Source, heatmap: Heatmap, sent: list[Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expert_lens.widgets.pusher.RETRY", 0.05)
    source.failure = OSError("disk on fire")
    look(heatmap)
    wait_for(lambda: heatmap.failure == "OSError: disk on fire")
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    source.failure = None
    wait_for(lambda: sent and heatmap.failure == "")
    with pytest.warns(RuntimeWarning, match="Source.*missed frames: OSError: disk on fire"):
        heatmap.close()
    heatmap.close()


def test_a_window_that_the_source_cannot_look_back_on_is_shown_but_no_fault(
    heatmap: Heatmap, sent: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    look(heatmap)
    heatmap.window = 1000
    wait_for(lambda: heatmap.failure == "ValueError: only the last 100, not 1000")
    heatmap.window = 100
    wait_for(lambda: heatmap.failure == "" and sent and sent[-1][1]["window"] == 100)
    assert not caplog.records
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        heatmap.close()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"phase": "all"}, "phase must be one of both, prefill, decode, not 'all'"),
        ({"window": 0}, "window must be None .* not 0"),
        ({"window": 1 << 53}, "window must be"),
        ({"max_fps": 0}, "max_fps must be"),
        ({"max_load": 1.5}, "max_load is"),
    ],
)
def test_options_out_of_range_are_errors(source: Source, options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        Heatmap(source, **options)


def test_unknown_options_are_errors(source: Source) -> None:
    with pytest.raises(TypeError, match="colour"):
        Heatmap(source, colour="red")  # type: ignore[call-arg]


def test_neither_widget_nor_thread_keeps_a_source_or_a_closed_widget_alive(sent: list[Any]) -> None:
    source = Source()
    heatmap = Heatmap(source)
    gone, shown = weakref.ref(source), weakref.ref(heatmap)
    look(heatmap)
    wait_for(lambda: sent)
    del source
    wait_for(lambda: gone() is None)
    wait_for(lambda: sent[-1][1]["state"] == "closed")
    heatmap.close()
    wait_for(lambda: not any(thread.name == "expert-lens-heatmap" for thread in threading.enumerate()))
    del heatmap
    gc.collect()
    assert shown() is None


def test_the_mime_bundle_holds_view_and_picture(heatmap: Heatmap) -> None:
    data, metadata = heatmap._repr_mimebundle_()
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == heatmap.model_id
    assert data["text/plain"] == "Heatmap('Source', 2 layers x 4 experts)"
    picture = base64.b64decode(data["image/png"])
    assert (metadata["image/png"]["width"], metadata["image/png"]["height"]) == tuple(
        size // 2 for size in indices(picture).shape[::-1]
    )
    assert heatmap._facts["mark"] in data["image/png"]
    heatmap.close()
    data, _ = heatmap._repr_mimebundle_()
    assert set(data) == {"image/png", "text/plain"}


# The picture.


def indices(png: bytes) -> npt.NDArray[np.uint8]:
    """[height, width]: the palette's indices of a PNG file of ours, with every checksum tried."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        kind, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + size]
        assert zlib.crc32(kind + data) == int.from_bytes(png[at + 8 + size : at + 12 + size], "big")
        chunks[kind] = data
        at += 12 + size
    width, height = int.from_bytes(chunks[b"IHDR"][:4], "big"), int.from_bytes(chunks[b"IHDR"][4:8], "big")
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert not rows[:, 0].any()
    return rows[:, 1:]


def still(counts: npt.NDArray[np.uint64], **facts: Any) -> Still:
    layers = range(len(counts))
    return draw(Snapshot({"both": counts}, {"state": "running", **facts}), title="A title", layers=layers)


@pytest.mark.parametrize("shape", [(1, 8), (24, 64), (94, 384), (3, 8)])
def test_a_picture_is_small_and_shows_each_load_in_its_colour(shape: tuple[int, int]) -> None:
    counts = np.random.default_rng(0).poisson(100, shape).astype(np.uint64)
    counts[0, :2] = 0, 10_000
    drawn = still(counts, tokens=100)
    image = indices(drawn.png)
    assert len(drawn.png) < 150_000
    # The first row of cells: nothing, then as much as the scale has, each of its size.
    cells = image[42 + 104 :, 100:]
    assert cells[0, 0] >= 160
    width = int(np.clip(1400 // shape[1], 2, 3 * np.clip(840 // shape[0], 6, 44)))
    assert cells[0, width] == 159


def test_without_tokens_the_picture_says_so_and_shows_no_map() -> None:
    nothing = indices(still(np.zeros((94, 384), np.uint64)).png)
    assert nothing.shape[0] < 260
    assert not ((nothing < 160) & (nothing != 255)).any()


def test_the_mark_of_a_picture_is_in_its_base64_and_in_no_other() -> None:
    counts = np.ones((2, 2), np.uint64)
    snapshot = Snapshot({"both": counts})
    ours, other = "a" * 32, "b" * 32
    picture = base64.b64encode(draw(snapshot, title="", layers=[0, 1], identity=ours).png).decode()
    assert mark(ours) in picture
    assert mark() in picture
    assert mark(other) not in picture
    assert re.fullmatch(r"[A-Za-z0-9+/]+", mark(ours))


def test_a_title_that_is_too_long_or_in_other_letters_is_drawn_as_far_as_possible() -> None:
    snapshot = Snapshot({"both": np.ones((2, 2), np.uint64)})
    image = indices(draw(snapshot, title="専門家 ✓ " + "long " * 100, layers=[0, 1]).png)
    assert (image[20:56, :-30] != 255).any()
    assert (image[20:56, -30:] == 255).all()


# Load, balance, colours.


def test_load_and_balance_of_known_layers() -> None:
    counts = np.array([[5, 5, 5, 5], [8, 0, 0, 0], [4, 4, 0, 0], [0, 0, 0, 0]], np.uint64)
    assert np.array_equal(relative_load(counts), [[1, 1, 1, 1], [4, 0, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0]])
    assert np.allclose(balance(counts), [1, 0.25, 0.5, 0])


TO_LMS = np.array([[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
                   [0.0883024619, 0.2817188376, 0.6299787005]])  # fmt: skip
TO_LAB = np.array([[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
                   [0.0259040371, 0.7827717662, -0.8086757660]])  # fmt: skip
# Linear RGB as people without one kind of cones see it: Machado, Oliveira and Fernandes, 2009, severity 1.
BLIND = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def oklab(rgb: npt.NDArray[np.uint8], blind: str | None = None) -> npt.NDArray[np.float64]:
    """[n, 3]: lightness, green to red, blue to yellow."""
    channels = rgb / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    if blind:
        linear = np.clip(linear @ np.array(BLIND[blind]).T, 0, 1)
    lab: npt.NDArray[np.float64] = np.cbrt(linear @ TO_LMS.T) @ TO_LAB.T
    return lab


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lightness_runs_one_way_on_each_side_of_uniform_load(theme: str) -> None:
    lightness = oklab(colours(theme, 65))[:, 0]
    if theme == "dark":
        lightness = -lightness
    assert (np.diff(lightness[:33]) > 0).all()
    assert (np.diff(lightness[32:]) < 0).all()


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("blind", [None, *BLIND])
def test_more_and_less_than_uniform_load_are_told_apart_by_all_eyes(theme: str, blind: str | None) -> None:
    lab = oklab(colours(theme, 65), blind)
    less, more = lab[:25], lab[:-26:-1]  # Up to 2 ** 0.5 times off; both from far to near.
    assert np.linalg.norm(less - more, axis=1).min() > 0.05
    # And so are neighbours four steps of 65 apart.
    assert np.linalg.norm(lab[4:] - lab[:-4], axis=1).min() > 0.02


# The parts.


def test_the_bundle_holds_every_module_and_no_name_twice() -> None:
    assert sorted(MODULES) == sorted(path.stem for path in STATIC.glob("*.js"))
    names = re.findall(r"^(?:async )?(?:function|class|const|let|var) (\w+)", javascript(), re.MULTILINE)
    assert len(names) == len(set(names))
    assert not re.search(r"^(import|export (?!default))", javascript(), re.MULTILINE)


def test_importing_the_widgets_imports_no_notebook() -> None:
    code = "import sys, expert_lens.widgets; print({'IPython', 'anywidget', 'ipywidgets'} & set(sys.modules))"
    package = Path(STATIC).parents[2]
    told = subprocess.run([sys.executable, "-c", code], cwd=package, capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "set()"

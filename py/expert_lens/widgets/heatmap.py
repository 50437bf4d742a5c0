"""The live heatmap: layers by experts, moving while a cell blocks.

One thread of ours for each widget asks the source for counts and sends them as binary messages. It sends nothing that
did not change, nothing that nobody looks at, and never more than its window: the page acknowledges a frame when it
has drawn it, and the window of unacknowledged frames grows from 2 while answers come quickly and shrinks when they
do not. Frames that open half a window ask for the acknowledgement, because each one makes JupyterLab's kernel
indicator blink. A kernel whose front-end sends comm messages to the main shell cannot hear while a cell runs; then the
rate limit alone holds.

Nothing here keeps a source alive: the widget, its thread and the hooks in IPython hold weak references.
"""

import base64
import html
import logging
import re
import sys
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import anywidget
import numpy as np
import traitlets

from expert_lens.widgets import still
from expert_lens.widgets.frames import Snapshot
from expert_lens.widgets.palette import STATIC
from expert_lens.widgets.source import HeatmapSource

__all__ = ["Heatmap"]

log = logging.getLogger(__name__)

PHASES: Final = ("both", "prefill", "decode")
Phase = Literal["both", "prefill", "decode"]

SMALLEST_WINDOW, LARGEST_WINDOW = 2, 128
WINDOW_BYTES = 16 << 20
"""Most bytes on their way to a page that hears nothing."""
QUICK, SLOW = 0.25, 0.6
"""Seconds to an acknowledgement: below the first the window grows, above the second it shrinks."""
PROBE = 1.0
"""Seconds after which one frame is sent although the window is full: a page that lives answers it."""
PROBES = 8
"""Unanswered probes after which a page counts as gone, until it speaks again."""
UNHEARD, UNHEARD_RATE = 10.0, 4.0
"""A page that was never heard gets full rate for so many seconds, then so many frames a second."""
STATS_EVERY = 0.2
STILL_EVERY = 10.0
"""Seconds between pictures for the saved notebook while tokens go on coming; one more follows when they stop."""
QUIET = 0.5
RARELY = 10.0
"""Seconds between looks at the source while nobody looks at the picture."""
MAX_PAGES = 16


def bundle_javascript() -> str:
    """The widget's one module, as anywidget wants it, made of small ones that tests can import each by itself."""
    parts = [f"const PALETTE = {(STATIC / 'palette.json').read_text(encoding='utf-8')};\n"]
    for name in ("codec", "scale", "store", "view", "heatmap"):
        text = (STATIC / f"{name}.js").read_text(encoding="utf-8")
        text = re.sub(r"^import\b[^;]*;\n", "", text, flags=re.MULTILINE)
        parts.append(re.sub(r"^export (?!default)", "", text, flags=re.MULTILINE))
    return "\n".join(parts)


@dataclass
class Page:
    """One browser page that shows the widget: what it looks at and how fast it answers."""

    looks: bool = True
    acknowledged: int = 0
    window: int = SMALLEST_WINDOW
    asked: dict[int, float] = field(default_factory=dict)
    probes: int = 0

    def room(self, sent: int, frame_bytes: int) -> bool:
        return sent - self.acknowledged < self.limit(frame_bytes)

    def limit(self, frame_bytes: int) -> int:
        return max(SMALLEST_WINDOW, min(self.window, WINDOW_BYTES // max(frame_bytes, 1)))

    def answer(self, number: int, now: float) -> None:
        """Take an acknowledgement and size the window by the time that it took."""
        self.acknowledged = max(self.acknowledged, number)
        self.probes = 0
        took = None
        for asked in [asked for asked in self.asked if asked <= number]:
            took = now - self.asked.pop(asked)
        if took is not None and took < QUICK:
            self.window = min(self.window * 2, LARGEST_WINDOW)
        elif took is not None and took > SLOW:
            self.window = max(self.window // 2, SMALLEST_WINDOW)


class Heatmap(anywidget.AnyWidget):
    """Layers by experts, coloured by load relative to uniform load, live while the source counts.

    phase: "both", "prefill" or "decode". window: None for all tokens, or how many of the last ones. Both can be
    set later, here or in the page. max_fps: most frames a second. max_load: most of one core's time that the frames
    may take in this process; slower sources get fewer frames. It holds for the long run, not for each frame.

    ValueError for a phase, window or limit outside its range; TypeError for an option that does not exist.
    """

    _esm = bundle_javascript()
    _css = (STATIC / "heatmap.css").read_text(encoding="utf-8")

    phase = traitlets.Unicode("both").tag(sync=True)
    window = traitlets.Int(None, allow_none=True).tag(sync=True)
    _facts = traitlets.Dict().tag(sync=True)
    _frame = traitlets.Bytes(b"").tag(sync=True)

    def __init__(
        self,
        source: HeatmapSource,
        *,
        phase: Phase | None = None,
        window: int | None = None,
        max_fps: float = 60.0,
        max_load: float = 0.03,
    ) -> None:
        self._closing, self._wake = False, threading.Event()
        if not 0 < max_fps <= 240:
            raise ValueError(f"max_fps must be above 0 and at most 240, not {max_fps}")
        if not 0 < max_load <= 1:
            raise ValueError(f"max_load is a part of one core, above 0 and at most 1, not {max_load}")
        self._source: Callable[[], HeatmapSource | None] = weakref.ref(source)
        self._layers = [int(layer) for layer in source.layers]
        self._num_experts = int(source.num_experts)
        self._title = str(source.title)
        self._fastest, self._max_load = 1 / max_fps, max_load
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._pages: dict[str, Page] = {}
        self._heard = self._heard_while_busy = False
        self._display_ids: list[str] = []
        self._displayed_at = 0.0
        self._asked = True
        self._sent = self._sent_bytes = 0
        self._sent_at = self._changed_at = self._began_at = 0.0
        self._cost = 0.0
        self._seen: Any = None
        self._still_of: Any = None
        self._still_at = 0.0
        self._stats: Mapping[str, Any] = {}
        self._stats_at = -1.0
        self._failure = ""
        self._snapshot: Snapshot | None = None
        self._identity = uuid.uuid4().hex
        super().__init__(
            model_id=self._identity,
            phase="both" if phase is None else phase,
            window=window,
            _facts={
                "id": self._identity,
                "title": self._title,
                "layers": self._layers,
                "num_experts": self._num_experts,
                "top_k": int(source.top_k),
            },
        )
        self.on_msg(_receive)

    @traitlets.validate("phase")
    def _check_phase(self, proposal: Mapping[str, Any]) -> str:
        phase = str(proposal["value"])
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, not {phase!r}")
        return phase

    @traitlets.validate("window")
    def _check_window(self, proposal: Mapping[str, Any]) -> int | None:
        window: int | None = proposal["value"]
        if window is not None and not 1 <= window < 1 << 53:
            raise ValueError(f"window must be None (all tokens) or a positive number of tokens, not {window}")
        return window

    @traitlets.observe("window", "phase")
    def _changed_option(self, _change: object) -> None:
        self._still_of = None
        _ask(weakref.ref(self))

    # Display.

    def _ipython_display_(self, **_options: object) -> None:
        """Show the live view, and below it the picture that only a page without the view shows."""
        from IPython.display import publish_display_data

        text = repr(self)
        if not self._closing:
            _watch_cells()
            _shown.add(self)
            self._displayed_at = time.monotonic()
            self.take()
            view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
            # The comment keeps converters that know no widgets from showing the line of text.
            nothing = "<!-- expert_lens heatmap: see the picture in the next output -->"
            publish_display_data(
                {"application/vnd.jupyter.widget-view+json": view, "text/html": nothing, "text/plain": text}
            )
        display_id = f"expert-lens-{self._identity}-{len(self._display_ids)}"
        data, metadata = self._still_bundle()
        publish_display_data(data, metadata, transient={"display_id": display_id})
        self._display_ids = [*self._display_ids, display_id][-MAX_PAGES:]
        self._start()

    def _repr_mimebundle_(self, **_options: object) -> tuple[dict[str, Any], dict[str, Any]]:
        """The view and, for a front-end that shows no widgets, the picture of this moment: one output in all."""
        self.take()
        data, metadata = self._still_bundle()
        if self._closing:
            return data, metadata
        _watch_cells()
        _shown.add(self)
        self._displayed_at = time.monotonic()
        self._start()
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        return {"application/vnd.jupyter.widget-view+json": view, **data}, metadata

    def __repr__(self) -> str:
        return f"Heatmap({self._title!r}, {len(self._layers)} layers x {self._num_experts} experts)"

    @property
    def picture(self) -> bytes:
        """The picture of the last frame, as a PNG file, as a saved notebook keeps it."""
        return self._draw().png

    def _draw(self) -> still.Still:
        snapshot = self._snapshot or self.take()
        phase = self.phase if self.phase == "both" or self.phase in snapshot.planes else "both"
        return still.draw(snapshot, title=self._title, layers=self._layers, phase=phase)

    def _still_bundle(self) -> tuple[dict[str, Any], dict[str, Any]]:
        drawn = self._draw()
        self._still_of, self._still_at = self._seen, time.monotonic()
        image = base64.b64encode(drawn.png).decode()
        alternative = html.escape(f"Heatmap of {self._title}: load of each expert in each layer")
        # Scripts in the live view hide this by its class. The size is that of half the pixels: crisp on any screen.
        markup = (
            f'<div class="expert-lens-still expert-lens-still-{self._identity}">'
            f'<img alt="{alternative}" width="{drawn.width}" style="max-width:100%;height:auto" '
            f'src="data:image/png;base64,{image}"></div>'
        )
        data = {"text/html": markup, "image/png": image, "text/plain": repr(self)}
        return data, {"image/png": {"width": drawn.width, "height": drawn.height}}

    def refresh_picture(self) -> None:
        """Replace the picture in the notebook by that of this moment, if it changed."""
        with self._lock:
            self.take()
            if self._still_of == self._seen or self._closing:
                return
            self._keep()
            if self._display_ids:
                from IPython.display import publish_display_data

                data, metadata = self._still_bundle()
                for display_id in self._display_ids:
                    publish_display_data(data, metadata, transient={"display_id": display_id}, update=True)
            self._still_of, self._still_at = self._seen, time.monotonic()

    def _keep(self) -> None:
        """Put the last frame into the widget's state, where a saved notebook and a reloaded page find it."""
        if self._snapshot is not None:
            self._frame = self._snapshot.encode()

    # Frames.

    def take(self) -> Snapshot:
        """The counts and facts of this moment, from the source; the last known ones when it is gone."""
        with self._lock:
            source = self._source()
            last = self._snapshot
            if source is None:
                if last is None:
                    nothing = np.zeros((len(self._layers), self._num_experts), np.uint64)
                    last = Snapshot({"prefill": nothing, "decode": nothing}, {"window": self.window})
                if last.facts.get("state") != "ended":
                    last = Snapshot(last.planes, {**last.facts, "state": "ended"})
                self._snapshot = last
                return last
            window = self.window
            self._seen = (source.tokens_seen(), self._urgent(self._read_stats(source)), window, self.phase)
            wanted = ("prefill", "decode") if window is None else PHASES
            planes = {name: source.counts(None if name == "both" else name, window) for name in wanted}
            stats = self._stats
            facts = {
                "window": window,
                "tokens": int(stats["tokens"]),
                "steps": int(stats["steps"]),
                "dropped": int(stats["dropped_tokens"]),
                "missing": int(stats["missing_tokens"]),
                "lag": round(float(stats["lag_s"]), 6),
                "state": str(stats["state"]),
                "seconds": round(time.monotonic(), 4),
            }
            self._snapshot = Snapshot(planes, facts)
            return self._snapshot

    def _read_stats(self, source: HeatmapSource) -> Mapping[str, Any]:
        now = time.monotonic()
        if now - self._stats_at >= STATS_EVERY or not self._stats:
            self._stats, self._stats_at = source.stats, now
        return self._stats

    @staticmethod
    def _urgent(stats: Mapping[str, Any]) -> tuple[Any, ...]:
        """What makes a frame worth sending although no token came."""
        return stats["dropped_tokens"], stats["missing_tokens"], stats["state"]

    def _start(self) -> None:
        with self._lock:
            if self._closing or (self._thread is not None and self._thread.is_alive()):
                self._wake.set()
                return
            self._thread = threading.Thread(
                target=_push, args=(weakref.ref(self), self._wake), name="expert-lens-heatmap", daemon=True
            )
            self._thread.start()

    def _step(self) -> float | None:
        """Do what is due; seconds until the next look, or None when this widget needs no thread any more."""
        now = time.monotonic()
        with self._lock:
            if self._closing:
                return None
            wait = self._wait_for_audience(now)
            source = self._source()
            if source is None:
                return self._finish()
            if wait > 0:
                if now - self._still_at > STILL_EVERY:
                    self.refresh_picture()
                return wait
            seen = (source.tokens_seen(), self._urgent(self._read_stats(source)), self.window, self.phase)
            if seen != self._seen or self._asked:
                if seen != self._seen:
                    self._changed_at = now
                self._asked = False
                self._send_frame(now)
            elif self._stats["state"] == "ended":
                return self._finish()
            stale = self._still_of != self._seen
            if stale and (now - self._still_at > STILL_EVERY or now - self._changed_at > QUIET):
                self.refresh_picture()
            return self._pace(now)

    def _pace(self, now: float) -> float:
        """Seconds until the next look at the source."""
        if now - self._changed_at > 1:
            return 0.1
        return max(self._fastest, self._cost / self._max_load) - (time.monotonic() - now)

    def _wait_for_audience(self, now: float) -> float:
        """0 if a frame may be sent now, else seconds until that may have changed."""
        if not self._heard:
            if now - self._displayed_at < UNHEARD:
                return 0
            return max(0.0, self._sent_at + 1 / UNHEARD_RATE - now)
        looking = [page for page in self._pages.values() if page.looks and page.probes < PROBES]
        if not looking:
            return RARELY
        deaf = _cell_runs() and not self._heard_while_busy
        if deaf or any(page.room(self._sent, self._sent_bytes) for page in looking):
            return 0
        wait = self._sent_at + PROBE - now
        if wait <= 0:
            for page in looking:
                page.probes += 1
        return max(wait, 0)

    def _send_frame(self, now: float) -> None:
        began = time.thread_time()
        data = self.take().encode()
        self._sent += 1
        self._sent_bytes, self._sent_at = len(data), now
        ask = False
        for page in self._pages.values():
            if page.looks and self._sent - page.acknowledged >= page.limit(len(data)) // 2 and not page.asked:
                page.asked[self._sent] = now
                ask = True
        self.send({"kind": "frame", "number": self._sent, "ask": ask}, [data])
        # As much again goes to the kernel's own sending thread.
        self._cost += 0.2 * (1.5 * (time.thread_time() - began) - self._cost)
        self._failure = ""

    def _finish(self) -> None:
        """The source has ended: show it, keep the picture, let the thread go."""
        if (self._snapshot is None or self._snapshot.facts.get("state") != "ended") or self._asked:
            self._asked = False
            self._send_frame(time.monotonic())
            self._still_of = None
        if self._still_of is None or self._still_of != self._seen:
            self._still_of = None
            self.refresh_picture()
        if self._heard and not self._pages:
            self.close()

    def _failed(self, error: Exception) -> float:
        """Say in the page that the source failed; it is asked again after a while."""
        text = f"{type(error).__name__}: {error}"
        if text != self._failure:
            self._failure = text
            log.error("The heatmap's source failed", exc_info=error)
            self.send({"kind": "failure", "text": text})
        return 1.0

    # Messages from the page.

    def open(self) -> None:
        """Open the channel to the page, and let its messages be handled where the page sends them."""
        super().open()
        if self.comm is not None:
            _tune(self.comm)

    def _receive(self, content: Mapping[str, Any]) -> None:
        """A message from a page: it looks, looks away, has drawn a frame, or is gone."""
        name, kind = str(content.get("page", "")), content.get("kind")
        now = time.monotonic()
        with self._lock:
            self._heard = True
            if _cell_runs() and threading.current_thread() is not threading.main_thread():
                self._heard_while_busy = True
            if kind == "gone":
                self._pages.pop(name, None)
                if not self._pages and (self._source() is None or self._stats.get("state") == "ended"):
                    self.close()
                return
            if kind not in ("look", "drawn") or not name:
                return
            while len(self._pages) >= MAX_PAGES and name not in self._pages:
                del self._pages[next(iter(self._pages))]
            page = self._pages.setdefault(name, Page(acknowledged=self._sent))
            was_full = not page.room(self._sent, self._sent_bytes)
            if kind == "drawn":
                page.answer(min(int(content.get("number", 0)), self._sent), now)
                if was_full:
                    self._wake.set()
                return
            page.looks, page.acknowledged, page.probes = bool(content.get("looks")), self._sent, 0
            page.asked.clear()
        if page.looks:
            _ask(weakref.ref(self))

    def close(self) -> None:
        """End the thread and remove the views. The picture stays in the notebook. Safe to call twice."""
        self._closing = True
        self._wake.set()
        super().close()
        if "_repr_mimebundle_" in self.__dict__:
            del self.__dict__["_repr_mimebundle_"]


def _receive(widget: Heatmap, content: Any, _buffers: object) -> None:
    if isinstance(content, Mapping):
        widget._receive(content)


def _ask(ref: "weakref.ref[Heatmap]") -> None:
    """Have the thread make a frame although nothing changed, if anybody looks."""
    widget = ref()
    if widget is not None and not widget._closing and (widget._heard or widget._displayed_at):
        widget._asked = True
        widget._start()


def _push(ref: "weakref.ref[Heatmap]", wake: threading.Event) -> None:
    """Body of a widget's thread. Between two steps it holds neither the widget nor its source."""
    wait: float | None = 0.0
    while wait is not None:
        if wait > 0:
            wake.wait(wait)
        wake.clear()
        widget = ref()
        if widget is None:
            return
        try:
            wait = widget._step()
        except Exception as error:  # A thread that dies leaves a picture that lies.
            wait = widget._failed(error)
        del widget


def _tune(comm: Any) -> None:
    """Let this comm be heard while a cell runs, and its messages disturb no cell.

    JupyterLab 4.4 sends comm messages to a subshell, another thread. ipykernel 7.4 sends them on to the shell that
    last published on the comm, the busy one: here they stay where they were addressed. And our messages, many and
    none of a user's, do not fire IPython's pre_execute and post_execute, on which matplotlib shows half-drawn figures.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda _data, default: default
    if not hasattr(comm, "handle_msg"):
        return
    handle, ref = comm.handle_msg, weakref.ref(comm)

    def handle_msg(message: dict[str, Any]) -> None:
        comm = ref()
        if comm is not None and message["content"]["data"].get("method") == "custom":
            comm._msg_callback(message)
        else:
            handle(message)

    comm.handle_msg = handle_msg


# What IPython tells us. The hooks are module functions over weak references, registered once in a shell.

_shown: "weakref.WeakSet[Heatmap]" = weakref.WeakSet()
_running = threading.Event()
_watched: "weakref.WeakSet[Any]" = weakref.WeakSet()


def _cell_runs() -> bool:
    return _running.is_set()


def _watch_cells() -> None:
    """Learn from IPython when cells begin and end."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None else None
    if shell is None or shell in _watched:
        return
    _watched.add(shell)
    shell.events.register("pre_run_cell", _cell_began)
    shell.events.register("post_run_cell", _cell_ended)
    _running.set()


def _cell_began(_info: object) -> None:
    _running.set()


def _cell_ended(_result: object) -> None:
    _running.clear()
    for widget in list(_shown):
        try:
            widget.refresh_picture()
        except Exception as error:  # A failing source must not fail the user's cell.
            widget._failed(error)

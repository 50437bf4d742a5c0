"""The thread that sends a heatmap's frames."""

import logging
import threading
import time
import weakref
from typing import TYPE_CHECKING, Final

from expert_lens.widgets.audience import Audience
from expert_lens.widgets.camera import Camera, Moment, Shot
from expert_lens.widgets.kernel import cell_runs

if TYPE_CHECKING:
    from expert_lens.widgets.heatmap import Heatmap

__all__ = ["Pusher"]

log = logging.getLogger("expert_lens.widgets")

PICTURE_EVERY: Final = 10.0
"""Seconds between pictures for the saved notebook while tokens go on coming; one more follows when they stop."""
QUIET: Final = 0.5
"""Seconds without change after which that one is drawn."""
IDLE_AFTER, IDLE_INTERVAL = 1.0, 0.1
"""Seconds without change after which the source is asked less often, and how often then."""
SENDING: Final = 0.55
"""What ipykernel's sending thread and the waiting of ours cost, as a part of what a step does."""
RETRY: Final = 1.0
"""Seconds until a source that failed is asked again."""


class Pusher:
    """Sends what changed, to those who look, no faster than the limits allow.

    The thread starts when it is asked for a frame, and ends when the widget is closed or gone, nobody shows it any
    more or ever did, or no token will come. Between two steps it holds no reference to the widget.
    """

    def __init__(self, widget: "Heatmap", camera: Camera, audience: Audience, max_fps: float, max_load: float) -> None:
        self._widget = weakref.ref(widget)
        self._camera = camera
        self._audience = audience
        self._interval, self._max_load = 1 / max_fps, max_load
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._asked = self._due = self._stopped = False
        self._sent: Moment | None = None
        self._sent_at = self._changed_at = 0.0
        self._cost = 0.0
        self._failure = ""
        self.error: Exception | None = None
        """The last error of the source, if it ever failed."""

    def ask(self) -> None:
        """Send a frame although nothing changed, if anybody looks."""
        with self._lock:
            if self._stopped:
                return
            self._asked = True
            self._wake.set()
            if self._thread is None:
                self._thread = threading.Thread(
                    target=_run, args=(weakref.ref(self), self._wake), name="expert-lens-heatmap", daemon=True
                )
                self._thread.start()

    def wake(self) -> None:
        """Look now whether a frame may be sent, rather than when the time is over."""
        self._wake.set()

    def stop(self) -> None:
        """End the thread, for good."""
        with self._lock:
            self._stopped = True
        self._wake.set()

    def step(self) -> float | None:
        """Do what is due. Seconds until the next step, or None when the thread has ended."""
        with self._lock:
            self._due |= self._asked
            self._asked = False
        try:
            wait = self._step()
        except Exception as error:  # A thread that dies leaves a picture that lies.
            self.fail(error)
            wait = RETRY
        with self._lock:
            if self._stopped or (wait is None and not self._asked):
                self._thread = None
                return None
        return wait or 0.0

    def _step(self) -> float | None:
        widget = self._widget()
        if widget is None:
            return None
        now, began = time.monotonic(), time.thread_time()
        busy = cell_runs()
        wait = self._audience.wait(now, busy)
        if wait > 0:
            if self._audience.left(now, busy):
                return None
            if now - widget.picture_at > PICTURE_EVERY:
                widget.refresh_picture()
            return wait
        early = self._sent_at + self._pace() - now
        if early > 0:
            return early
        shot = self._camera.take_unless(None if self._due else self._sent, widget.window, widget.phase)
        if shot is not None:
            if shot.moment != self._sent:
                self._changed_at = now
            self._send(widget, shot, now)
            self._cost += 0.2 * ((1 + SENDING) * (time.thread_time() - began) - self._cost)
        elif not self._camera.running:
            widget.refresh_picture()
            return None
        quiet_for = now - self._changed_at
        if now - widget.picture_at > PICTURE_EVERY or quiet_for > QUIET:
            widget.refresh_picture()
        return IDLE_INTERVAL if quiet_for > IDLE_AFTER else max(0.0, now + self._pace() - time.monotonic())

    def _pace(self) -> float:
        """Least seconds between two frames."""
        return max(self._interval, self._cost / self._max_load)

    def _send(self, widget: "Heatmap", shot: Shot, now: float) -> None:
        frame = shot.snapshot.encode()
        number, ask = self._audience.sends(frame.size, now, cell_runs())
        widget.send({"kind": "frame", "number": number, "ask": ask}, [frame])
        self._sent, self._sent_at, self._due = shot.moment, now, False
        if self._failure:
            self._failure = widget.failure = ""

    def fail(self, error: Exception) -> None:
        """Say in the page what failed; the source is asked again after a while, or when the window changes."""
        widget, text = self._widget(), f"{type(error).__name__}: {error}"
        self._due = True
        if widget is None or text == self._failure:
            return
        # A window that is too long for the source is the user's to change, and no fault of the source.
        if widget.window is None or not isinstance(error, ValueError):
            self.error = error
            log.error("The heatmap's source failed; it is asked again every %g s", RETRY, exc_info=error)
        self._failure = widget.failure = text


def _run(ref: "weakref.ref[Pusher]", wake: threading.Event) -> None:
    wait: float | None = 0.0
    while wait is not None:
        if wait > 0:
            wake.wait(wait)
        wake.clear()
        pusher = ref()
        if pusher is None:
            return
        wait = pusher.step()
        del pusher

"""Who looks at a heatmap, and how many frames may be on their way to them.

A page acknowledges a frame when it has drawn it. Every acknowledgement is a message that makes JupyterLab's kernel
indicator blink, so a page is asked for one only when half of its window is used up; the window of unacknowledged
frames grows from 2 while answers come quickly, and shrinks when they do not. So a slow page or link never has more
than about half a second of pictures on the way to it.

While a cell runs, the rate limit alone holds for a kernel that cannot hear then (its front-end sends comm messages to
the main shell), and for small frames: an acknowledgement then makes JupyterLab show the kernel as idle.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = ["Audience"]

SMALLEST_WINDOW, LARGEST_WINDOW = 2, 64
WINDOW_BYTES: Final = 16 << 20
"""Most bytes on their way to a page, whatever its window, as long as the smallest window holds."""
QUICK, SLOW = 0.25, 0.5
"""Seconds to an acknowledgement: below the first the window grows, above the second it shrinks."""
SMALL_FRAME: Final = 32 << 10
"""Bytes of a frame that any link takes at full rate."""
PROBE: Final = 1.0
"""Seconds after which one frame is sent although the window is full: a page that lives answers it."""
PROBES: Final = 8
"""Unanswered probes after which a page counts as gone, until it speaks again."""
UNHEARD: Final = 60.0
"""Seconds for which frames go to pages of which none ever spoke: they may wait behind the cell that shows the map."""
UNHEARD_INTERVAL: Final = 0.25
"""Seconds between frames after that, while the cell still runs; a page that does not speak to a free kernel is none."""
GREETING: Final = 5.0
"""Seconds that a page has to speak to a free kernel."""
RARELY: Final = 10.0
"""Seconds between looks while nobody looks."""
MAX_PAGES: Final = 16


@dataclass
class Page:
    """One browser page that shows the widget: whether it looks, and how fast it answers."""

    looks: bool
    acknowledged: int
    window: int = SMALLEST_WINDOW
    asked: tuple[int, float] | None = None
    """The frame that it was asked to acknowledge, and when."""
    probes: int = 0

    def limit(self, frame_bytes: int) -> int:
        return max(SMALLEST_WINDOW, min(self.window, WINDOW_BYTES // max(frame_bytes, 1)))

    def answer(self, number: int, now: float) -> None:
        self.acknowledged = max(self.acknowledged, number)
        self.probes = 0
        if self.asked is None or number < self.asked[0]:
            return
        took = now - self.asked[1]
        self.asked = None
        if took < QUICK:
            self.window = min(self.window * 2, LARGEST_WINDOW)
        elif took > SLOW:
            self.window = max(self.window // 2, SMALLEST_WINDOW)


@dataclass
class Audience:
    """The pages that show one widget. Any thread may use it; times are those of `time.monotonic`."""

    _pages: dict[str, Page] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _displayed_at: float | None = None
    _heard: bool = False
    _heard_while_busy: bool = False
    _sent: int = 0
    _sent_at: float = 0.0
    _frame_bytes: int = 0

    def expect(self, now: float) -> None:
        """A view was put into a notebook: until a page speaks, assume that somebody looks."""
        with self._lock:
            self._displayed_at = now

    @property
    def present(self) -> bool:
        """Whether a page shows the widget, looking or not, as far as one can tell."""
        with self._lock:
            return self._present()

    def _present(self) -> bool:
        return bool(self._pages) if self._heard else self._displayed_at is not None

    def left(self, now: float, busy: bool) -> bool:
        """Whether nobody will look until a page speaks: all are gone, or none spoke to a free kernel when it should
        have, because its cell was run anew before it drew anything, say.
        """
        with self._lock:
            unheard = 0.0 if self._heard or self._displayed_at is None else now - self._displayed_at
            return not self._present() or (not busy and unheard >= GREETING)

    def wait(self, now: float, busy: bool) -> float:
        """0 if a frame may be sent now, else the seconds until that may have changed.

        busy: whether a cell runs, so that pages may not be heard.
        """
        with self._lock:
            if not self._heard:
                return self._wait_for_the_first(now, busy)
            looking = [page for page in self._pages.values() if page.looks and page.probes < PROBES]
            if not looking:
                return RARELY
            if self._deaf(busy) or any(
                self._sent - page.acknowledged < page.limit(self._frame_bytes) for page in looking
            ):
                return 0.0
            wait = self._sent_at + PROBE - now
            if wait <= 0:
                for page in looking:
                    page.probes += 1
            return max(wait, 0.0)

    def _wait_for_the_first(self, now: float, busy: bool) -> float:
        if self._displayed_at is None:
            return RARELY
        since = now - self._displayed_at
        if since < (UNHEARD if busy else GREETING):
            return 0.0
        return max(0.0, self._sent_at + UNHEARD_INTERVAL - now) if busy else RARELY

    def _deaf(self, busy: bool) -> bool:
        return busy and (not self._heard_while_busy or self._frame_bytes <= SMALL_FRAME)

    def sends(self, frame_bytes: int, now: float, busy: bool) -> tuple[int, bool]:
        """A frame is about to be sent: its number, and whether pages are to acknowledge it."""
        with self._lock:
            self._sent += 1
            self._sent_at, self._frame_bytes = now, frame_bytes
            ask = False
            for page in self._pages.values():
                if self._deaf(busy):
                    page.acknowledged, page.asked = self._sent, None
                used = self._sent - page.acknowledged
                if page.looks and page.asked is None and used >= page.limit(frame_bytes) // 2:
                    page.asked = self._sent, now
                    ask = True
            return self._sent, ask

    def hear(self, content: Mapping[str, Any], now: float, busy: bool) -> bool:
        """A message from a page: it looks, looks away, has drawn a frame, or is gone. Whether it may want a frame now.

        Messages that no page of ours would send are ignored.
        """
        name, kind = content.get("page"), content.get("kind")
        if not isinstance(name, str) or kind not in ("look", "drawn", "gone"):
            return False
        with self._lock:
            self._heard = True
            self._heard_while_busy |= busy
            if kind == "gone":
                self._pages.pop(name, None)
                return False
            page = self._pages.get(name)
            if page is None:
                while len(self._pages) >= MAX_PAGES:
                    del self._pages[next(iter(self._pages))]
                page = self._pages[name] = Page(looks=kind == "drawn", acknowledged=self._sent)
            if kind == "drawn":
                number = content.get("number")
                if isinstance(number, int):
                    page.answer(min(number, self._sent), now)
            else:
                page.looks, page.acknowledged, page.asked, page.probes = bool(content.get("looks")), self._sent, None, 0
            return page.looks

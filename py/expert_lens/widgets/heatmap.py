"""The live heatmap: layers by experts, moving while a cell blocks."""

import base64
import threading
import time
import uuid
import warnings
from collections.abc import Mapping
from typing import Any, Final, Literal

import anywidget
import traitlets

from expert_lens.widgets import kernel, still
from expert_lens.widgets.audience import Audience
from expert_lens.widgets.bundle import javascript
from expert_lens.widgets.camera import Camera, Moment
from expert_lens.widgets.palette import STATIC
from expert_lens.widgets.pusher import Pusher
from expert_lens.widgets.source import HeatmapSource

__all__ = ["Heatmap"]

PHASES: Final = ("both", "prefill", "decode")
MAX_PICTURES: Final = 8
"""How many displays of one widget have their picture refreshed: the newest."""
NO_WIDGET: Final = f"""<style class="xl-style">
.jp-OutputArea-child:has(style.xl-style),
.jp-OutputArea-child:not(:has(.xl)):has(+ .jp-OutputArea-child img[src*="{still.mark()}"]) {{ display: none; }}
</style>"""
"""Where the picture is all there is, JupyterLab would say above it that it has no widget."""


class Heatmap(anywidget.AnyWidget):  # type: ignore[misc]  # anywidget has no types.
    """Layers by experts, coloured by load relative to uniform load, live while the source counts.

    phase: "both", "prefill" or "decode". window: None for all tokens, or how many of the last ones. Both can be
    set later, here or in the page. max_fps: most frames a second. max_load: most of one core's time that the frames
    may take in this process, in the long run; a costlier source gets fewer frames.

    The source is held weakly, and shown as "closed" with its last counts once it is gone.

    What a saved notebook keeps: displayed as the last expression of a cell or by `display`, the widget leaves two
    outputs, the live view and a PNG picture, which a page hides while it has the view. The picture is that of the end
    of the last cell that ran, and besides, while tokens come, at most ten seconds old; half a second after they stop
    it is the last state. Only the page in which the cell ran takes these updates: after a reload it keeps the
    picture that was saved, until the widget is displayed anew. If the notebook is saved with its widget state, the
    view itself, with hover and phases, comes back without a kernel too.

    Raises ValueError for a phase, window or limit outside its range; TypeError for an option that does not exist.
    """

    _esm = javascript()
    _css = (STATIC / "heatmap.css").read_text(encoding="utf-8")

    phase = traitlets.Unicode("both").tag(sync=True)
    window = traitlets.Int(None, allow_none=True).tag(sync=True)
    failure = traitlets.Unicode("").tag(sync=True)
    """Why there is no new frame, in words for the status line; empty while all is well."""
    _facts = traitlets.Dict().tag(sync=True)
    _frame = traitlets.Bytes(b"").tag(sync=True)
    """The frame that a page begins with."""
    _closed = True  # Until there is something to close.

    def __init__(
        self,
        source: HeatmapSource,
        *,
        phase: Literal["both", "prefill", "decode"] = "both",
        window: int | None = None,
        max_fps: float = 60.0,
        max_load: float = 0.03,
    ) -> None:
        if not 0 < max_fps <= 240:
            raise ValueError(f"max_fps must be above 0 and at most 240, not {max_fps}")
        if not 0 < max_load <= 1:
            raise ValueError(f"max_load is a part of one core, above 0 and at most 1, not {max_load}")
        self._camera = Camera(source)
        self._audience = Audience()
        self._pusher = Pusher(self, self._camera, self._audience, max_fps, max_load)
        self._refreshing = threading.Lock()
        self._identity = uuid.uuid4().hex
        self._display_ids: list[str] = []
        self.displayed_at = self.picture_at = 0.0
        self._picture_of: tuple[Moment, str] | None = None
        super().__init__(
            model_id=self._identity,
            phase=phase,
            window=window,
            _facts={
                "id": self._identity,
                "mark": still.mark(self._identity),
                "title": self._camera.title,
                "layers": self._camera.layers,
                "num_experts": self._camera.num_experts,
                "top_k": self._camera.top_k,
            },
        )
        self._closed = False
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

    @traitlets.observe("phase", "window")
    def _changed_choice(self, _change: object) -> None:
        if not self._closed and self._audience.present:
            self._pusher.ask()

    def __repr__(self) -> str:
        camera = self._camera
        return f"Heatmap({camera.title!r}, {len(camera.layers)} layers x {camera.num_experts} experts)"

    # Display.

    def _ipython_display_(self, **_options: object) -> None:
        """Show the live view, and below it the picture that only a page without the view shows."""
        picture, metadata = self._picture_bundle()
        if not self._closed:
            kernel.publish({"text/html": NO_WIDGET}, {})
            # The comment keeps converters that know no widgets from showing the line of text above the picture.
            kernel.publish(
                {**self._view_bundle(), "text/html": "<!-- expert_lens: the picture is the next output -->"}, {}
            )
        display_id = f"expert-lens-{self._identity}-{len(self._display_ids)}"
        kernel.publish(picture, metadata, display_id)
        self._display_ids = [*self._display_ids, display_id][-MAX_PICTURES:]

    def _repr_mimebundle_(self, **_options: object) -> tuple[dict[str, Any], dict[str, Any]]:
        """View and picture in one output, for callers that cannot make two. The picture stays that of this moment."""
        picture, metadata = self._picture_bundle()
        if self._closed:
            return {**picture, "text/plain": repr(self)}, metadata
        return {**self._view_bundle(), **picture}, metadata

    def _view_bundle(self) -> dict[str, Any]:
        kernel.refresh_after_cells(self)
        self.displayed_at = time.monotonic()
        self._audience.expect(self.displayed_at)
        self._pusher.ask()
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        return {"application/vnd.jupyter.widget-view+json": view, "text/plain": repr(self)}

    # The picture.

    @property
    def picture(self) -> bytes:
        """The picture of this moment as a PNG file, as a saved notebook keeps it."""
        return self._draw()[1].png

    def refresh_picture(self) -> None:
        """Replace the picture in the notebook by that of this moment, if it changed and a page shows it."""
        if self._closed or not self._audience.present:
            return
        try:
            with self._refreshing:
                if (self._camera.moment(self.window), self.phase) != self._picture_of:
                    data, metadata = self._picture_bundle()
                    for display_id in self._display_ids:
                        kernel.publish(data, metadata, display_id, update=True)
        except Exception as error:  # It runs at the end of a user's cell, which must not fail for it.
            self._pusher.fail(error)
        self.picture_at = time.monotonic()

    def _picture_bundle(self) -> tuple[dict[str, Any], dict[str, Any]]:
        moment, drawn = self._draw()
        self._picture_of, self.picture_at = (moment, self.phase), time.monotonic()
        data = {"image/png": base64.b64encode(drawn.png).decode()}
        # The size is that of half the pixels: crisp on any screen.
        return data, {"image/png": {"width": drawn.width, "height": drawn.height}}

    def _draw(self) -> tuple[Moment, still.Still]:
        """Draw this moment, and keep its frame in the widget's state for pages that come or come back."""
        moment, snapshot = self._camera.take(self.window)
        if not self._closed:
            self._frame = snapshot.encode().tobytes()
        drawn = still.draw(
            snapshot,
            title=self._camera.title,
            layers=self._camera.layers,
            phase=self.phase if self.phase in snapshot.planes else next(iter(snapshot.planes)),
            identity=self._identity,
        )
        return moment, drawn

    # Messages from the page, and the end.

    def open(self) -> None:
        """Open the channel to the page, and let its messages be handled where the page sends them."""
        super().open()
        if self.comm is not None:
            kernel.tune(self.comm)

    def _hear(self, content: Mapping[str, Any]) -> None:
        wanted = self._audience.hear(content, time.monotonic(), kernel.cell_runs())
        if content.get("kind") == "look" and wanted:
            self._pusher.ask()
        else:
            self._pusher.wake()

    def close(self) -> None:
        """End the thread and remove the views; the picture takes their place. Safe to call twice.

        Warns with the source's last error, if it ever failed.
        """
        if self._closed:
            return
        self.refresh_picture()
        self._closed = True
        self._pusher.stop()
        super().close()
        # ipywidgets puts None there, and the picture can still be shown.
        self.__dict__.pop("_repr_mimebundle_", None)
        if (error := self._pusher.error) is not None:
            message = f"The heatmap of {self._camera.title!r} missed frames: {type(error).__name__}: {error}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)


def _receive(widget: Heatmap, content: object, _buffers: object) -> None:
    if isinstance(content, Mapping):
        widget._hear(content)

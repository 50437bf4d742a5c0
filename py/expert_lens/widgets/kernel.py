"""What the widgets learn from IPython and ask of ipykernel. Without either, nothing here does anything."""

import sys
import threading
import time
import weakref
from typing import Any, Final, Protocol

__all__ = ["cell_runs", "publish", "refresh_after_cells", "tune"]

REFRESH_SECONDS: Final = 0.25
"""Most time at the end of a cell for the pictures of all widgets; those left over follow from their threads."""


class Refreshable(Protocol):
    """What has a picture in the notebook."""

    def refresh_picture(self) -> None:
        """Replace the picture by that of this moment."""


# Hooks stay registered as long as the kernel lives, so they are functions of this module and hold widgets weakly.
_shown: "weakref.WeakSet[Any]" = weakref.WeakSet()
_watched: "weakref.WeakSet[Any]" = weakref.WeakSet()
_running = threading.Event()


def cell_runs() -> bool:
    """Whether a cell runs now, as far as one knows: the main shell hears no message then."""
    return _running.is_set()


def refresh_after_cells(widget: Refreshable) -> None:
    """Have the widget's picture refreshed whenever a cell ends, the newest widget first."""
    _shown.discard(widget)
    _shown.add(widget)
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
    began = time.monotonic()
    for widget in sorted(_shown, key=lambda widget: -widget.displayed_at):
        if time.monotonic() - began > REFRESH_SECONDS:
            break
        widget.refresh_picture()


def publish(
    data: dict[str, Any], metadata: dict[str, Any], display_id: str | None = None, update: bool = False
) -> None:
    """Show a MIME bundle as an output of the cell that runs, or in place of the one with the same display_id."""
    from IPython.core.interactiveshell import InteractiveShell

    if not InteractiveShell.initialized():
        return
    transient = {} if display_id is None else {"display_id": display_id}
    InteractiveShell.instance().display_pub.publish(data, metadata, transient=transient, update=update)


def tune(comm: Any) -> None:
    """Let this comm be heard while a cell runs, and its messages disturb no cell.

    JupyterLab 4.4 sends comm messages to a subshell, another thread. ipykernel 7.4 sends them on to the shell that
    last published on the comm, the busy one: here they stay where they were addressed. And our messages, many and
    none of a user's, do not fire IPython's pre_execute and post_execute, on which matplotlib shows half-drawn figures.
    """
    if hasattr(comm, "_reply_subshell_for"):
        comm._reply_subshell_for = lambda _data, default: default
    if not hasattr(comm, "handle_msg"):
        return
    handle, ref = type(comm).handle_msg, weakref.ref(comm)

    def handle_msg(message: dict[str, Any]) -> None:
        comm = ref()
        if comm is None:
            return
        if message["content"]["data"].get("method") == "custom":
            comm._msg_callback(message)
        else:
            handle(comm, message)

    comm.handle_msg = handle_msg

"""A writer that waits for room in its arena."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from expert_lens._core import RowStream, Writer
from publishing import make_writer, publish

SPAN = (1, "a", 0, 1, 1, "prefill")
WAITING: dict[str, Callable[[Writer], object]] = {
    "rows": lambda writer: publish(writer, [(1, "a", [9])]),
    "a prefix": lambda writer: writer.publish_prefix([SPAN], np.zeros(1, np.uint32)),
    "an end": lambda writer: writer.finish(1, "a", 1),
    "dropped rows, behind an end": lambda writer: writer.drop_step(1),
}


@contextmanager
def unread(**options: object) -> Iterator[Writer]:
    """A writer with a reader that takes nothing."""
    writer = make_writer("unread", arena_bytes=1 << 16, kv_slots=10, **options)
    reader = RowStream("unread")
    yield writer
    reader.close()
    writer.close()


@pytest.mark.parametrize("what", WAITING)
def test_other_threads_run_meanwhile(what: str) -> None:
    steps = 0
    with unread() as writer:
        while publish(writer, [(1, "a", [0])]):
            steps += 1
    turns, over = 0, threading.Event()

    def run() -> None:
        nonlocal turns
        while not over.wait(0.01):
            turns += 1

    thread = threading.Thread(target=run)
    with unread(on_full="wait", wait_timeout=0.5) as writer:
        for _ in range(steps):
            assert publish(writer, [(1, "a", [0])])
        if "behind an end" in what:
            writer.finish(1, "a", 1)
        thread.start()
        before = turns
        WAITING[what](writer)
        over.set()
        thread.join()
    assert turns - before > 10

"""Who may use a writer: one thread at a time, without waiting, and never nobody for good."""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable

import pytest

from expert_lens._core import Turn


def elsewhere(look: Callable[[], bool]) -> bool:
    """What another thread sees."""
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(look()))
    thread.start()
    thread.join()
    return seen[0]


def test_one_has_it_at_a_time() -> None:
    turn = Turn()

    def get() -> bool:
        with turn as held:
            return held

    assert not turn.is_mine
    with turn as held:
        assert held
        assert turn.is_mine
        assert not elsewhere(lambda: turn.is_mine)
        assert not elsewhere(get)
        assert not get(), "it is had already"
        assert not elsewhere(get), "and not given back by that"
    assert elsewhere(get)
    with pytest.raises(ValueError, match="inside"), turn:
        raise ValueError("inside")
    assert get()


def test_of_many_threads_one_has_it() -> None:
    turn, inside, most, had = Turn(), 0, 0, 0
    noting, start = threading.Lock(), threading.Barrier(8)

    def run() -> None:
        nonlocal inside, most, had
        start.wait()
        for _ in range(2000):
            with turn as held:
                if held:
                    with noting:
                        inside, had = inside + 1, had + 1
                        most = max(most, inside)
                    with noting:
                        inside -= 1

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert had > 0


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="CPython 3.14 may lose any lock so")
def test_interrupts_do_not_lose_it() -> None:
    """As many as come, at whatever place."""
    turn, interrupts = Turn(), 0

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        while interrupts < 300:
            with contextlib.suppress(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, 0.0003)
                while True:
                    with turn as held:
                        assert held
            interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with turn as held:
        assert held

"""A CUDA graph that another thread captures."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def another_thread_captures() -> Iterator[None]:
    """Meanwhile; and what it has captured runs."""
    x, graph = torch.ones(64, device="cuda"), torch.cuda.CUDAGraph()
    capturing, done, failed = threading.Event(), threading.Event(), []

    def capture() -> None:
        try:
            with torch.cuda.graph(graph, capture_error_mode="global"):
                y = x * 2
                capturing.set()
                assert done.wait(30)
                x.copy_(y)
        except BaseException as error:
            failed.append(error)
            capturing.set()

    gc.collect()  # a graph that is freed while another one is captured spoils the capture
    gc.disable()
    torch.cuda.synchronize()
    thread = threading.Thread(target=capture)
    thread.start()
    assert capturing.wait(30)
    try:
        yield
    finally:
        done.set()
        thread.join()
        gc.enable()
    assert failed == []
    graph.replay()
    assert x.sum().item() == 128

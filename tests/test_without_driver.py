"""What asks for a GPU where there is no driver of one."""

import ctypes

import numpy as np
import pytest

from expert_lens._core import Writer, exchange_capture_mode
from expert_lens.errors import CudaError


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(has_driver(), reason="there is a driver here; the tests in tests/gpu see what it says")
def test_it_is_an_error_that_says_so_and_the_writer_goes_on() -> None:
    writer = Writer("without", layers=[0], num_experts=4, top_k=1)
    for ask in (
        lambda: writer.prepare(0),
        lambda: writer.mailbox(0, [0]),
        lambda: writer.publish_device(0, 1, np.zeros(1, np.uint32), device=0, stream=0),
        lambda: exchange_capture_mode(2),
    ):
        with pytest.raises(CudaError, match=r"cannot load libcuda\.so\.1"):
            ask()
    assert writer.publish(np.zeros((1, 1, 1), np.uint8), None, np.zeros(1, np.uint32))
    assert (writer.steps, writer.publisher) == (1, "host")
    writer.close()

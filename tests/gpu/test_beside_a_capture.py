"""What we ask of a device while another thread captures a CUDA graph: it is answered, and the capture goes on."""

import numpy as np
import torch
from capturing import another_thread_captures
from graph_forward import make_tap
from patterns import K, L

from expert_lens._core import RowStream
from expert_lens.engines.transformers.requests import real_tokens
from expert_lens.steps import Rows
from expert_lens.streams import sent
from expert_lens.tap import Tap


def publish_padded(tap: Tap, ids: torch.Tensor) -> None:
    """A step of nine rows, ids [L, 9, K], of which four are kept."""
    tap.begin()
    for slot, one in enumerate(ids):
        tap.layer(slot, one)
    step = tap.end()
    assert step is not None
    experts, _ = tap.pack(step, 9)
    positions = np.arange(4, dtype=np.uint32)
    tap.publish(experts, None, Rows([(1, "a", 0, 4, 4, "prefill")], positions, None, np.array([0, 2, 3, 8])))


def test_the_first_step_is_looked_at_padding_left_out_and_the_rest_published() -> None:
    first, second = make_tap("first"), make_tap("second")
    stream = RowStream("second")
    with torch.cuda.stream(torch.cuda.Stream()):
        ids = torch.arange(L * 9 * K, device="cuda").reshape(L, 9, K) % 128
        publish_padded(first, ids)  # torch takes the memory that it needs here, as it cannot beside a capture
        torch.cuda.current_stream().synchronize()
        with another_thread_captures():
            publish_padded(second, ids)
            block = stream.take(4, 10.0)
    assert second.error is None
    np.testing.assert_array_equal(block["experts"], ids.cpu().numpy()[:, [0, 2, 3, 8]].transpose(1, 0, 2))
    first.close()
    second.close()


def test_a_mask_is_looked_at() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], device="cuda")
        real_tokens(mask, 2, 3)
        with another_thread_captures():
            told = real_tokens(mask, 2, 3)
    assert told is not None
    before, real = told
    assert before is not None
    assert real is not None
    assert (before.tolist(), real.tolist()) == ([0, 2], [[True] * 3] * 2)


def test_indices_are_sent() -> None:
    indices = np.array([5, 2, 9])
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.zeros(3, dtype=torch.int64, device="cuda")
        with another_thread_captures():
            there = sent(indices, torch.device("cuda"))
        assert there.tolist() == [5, 2, 9]

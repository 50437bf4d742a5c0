"""Devices that lack what a publisher needs: which one is taken then, and what is said where none is left.

No device at hand lacks any of it, so a driver that does stands in for libcuda.so.1 (`lacking_driver.c`).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOURCE = Path(__file__).parent / "lacking_driver.c"
PUBLISH = """
import ctypes
import time
import numpy as np
from expert_lens._core import Collector, Writer
from expert_lens.errors import CudaError

writer = Writer("lacking", layers=[0, 1], num_experts=4, top_k=1)
collector = Collector("lacking")
experts = np.array([[[3], [1]], [[0], [2]]], np.uint8)
try:
    for step in range(3):
        writer.set_batch([(1, "a", 0, 2, 2, "prefill")])
        positions = np.arange(2, dtype=np.uint32) + 2 * step
        writer.publish_device(experts.ctypes.data, 2, positions, device=0, stream=0)
        assert collector.sync(10.0)
    rows = collector.rows("a")["experts"]
    assert np.array_equal(rows, np.concatenate([experts] * 3)), rows
    if REFUSED:
        writer.publish_device(64, 2, positions, device=0, stream=0)  # 64 is no address
except CudaError as error:
    print(error)
assert collector.stats()["publisher"] == writer.publisher
print(writer.publisher)
if RESET:
    ctypes.CDLL("libcuda.so.1").reset()
began = time.monotonic()
writer.close()
assert time.monotonic() - began < 3
"""


def compiled(folder: Path, *options: str) -> Path:
    always = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror"]
    subprocess.run(["cc", *always, *options, "-o", folder / "libcuda.so.1", SOURCE], check=True)
    return folder


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("driver"))


STREAMS = """
import ctypes
from expert_lens._core import Writer

def stream_of(writer):
    found = writer.stream(0)
    if RESET:
        ctypes.CDLL("libcuda.so.1").reset()
    return found

facts = {"layers": [0], "num_experts": 4, "top_k": 1}
first, beside = Writer("first", **facts), Writer("beside", **facts)
streams = [stream_of(first), stream_of(first), stream_of(beside)]
first.close()
streams.append(stream_of(beside))
beside.close()
behind = Writer("behind", **facts)
streams.append(stream_of(behind))
behind.close()
print(streams)
"""


RESET_ON_ITS_WAY = """
import ctypes
import time
import numpy as np
from expert_lens._core import Writer

writer = Writer("reset", layers=[0], num_experts=4, top_k=1)
writer.set_batch([(1, "a", 0, 1, 1, "prefill")])
expert = np.zeros((1, 1, 1), np.uint8)
writer.publish_device(expert.ctypes.data, 1, np.zeros(1, np.uint32), device=0, stream=0)
time.sleep(0.01)
ctypes.CDLL("libcuda.so.1").reset()
time.sleep(0.1)
writer.close()
"""


POSTED = """
import ctypes
import numpy as np
from expert_lens._core import Writer

writer = Writer("posted", layers=[0], num_experts=4, top_k=1)
path = writer.path
writer.set_batch([(1, "a", 0, 1, 1, "prefill")])
mailbox = writer.mailbox(0, [], entries=2)
try:
    mailbox.set_rows(2, token_ids=False, positions=np.zeros(1, np.uint32), kv_slots=False)
except ValueError as error:
    print(error)
mailbox.set_rows(1, token_ids=False, positions=np.zeros(1, np.uint32), kv_slots=False)
assert writer.publish_graph(mailbox)
ctypes.CDLL("libcuda.so.1").reset()
writer.close()
print(any(path in line for line in open("/proc/self/maps")))
"""


VOID_BEHIND_A_STREAM_THAT_HANGS = """
import ctypes
import numpy as np
from expert_lens._core import Collector, Writer

writer = Writer("void", layers=[0], num_experts=4, top_k=1)
collector = Collector("void")
writer.set_batch([(1, "a", 0, 1, 1, "prefill")])
mailbox = writer.mailbox(0, [], entries=2)
mailbox.set_rows(1, token_ids=False, positions=np.zeros(1, np.uint32), kv_slots=False)
assert writer.publish_graph(mailbox)
*_, sequence, value, _, _, _ = (ctypes.c_uint64 * 8).from_address(mailbox.entries + 64)
writer.void(0, 0, 0)
ctypes.c_uint64.from_address(sequence).value = value  # the replay ran all the same
assert collector.sync(10.0)
writer.close()
"""


NEVER = """
import threading
import time
import numpy as np
from expert_lens._core import Writer

writer = Writer("never", layers=[0], num_experts=4, top_k=1)
writer.set_batch([(1, "a", 0, 1, 1, "prefill")])
expert = np.zeros((1, 1, 1), np.uint8)
writer.publish_device(expert.ctypes.data, 1, np.zeros(1, np.uint32), device=0, stream=0)
turns = 0

def run():
    global turns
    while True:
        time.sleep(0.01)
        turns += 1

threading.Thread(target=run, daemon=True).start()
time.sleep(0.1)
before = turns
del writer
print(turns - before)
"""


GRAPHS = """
import ctypes
import numpy as np
from expert_lens._core import Collector, Writer

writer = Writer("graphs", layers=[0, 1], num_experts=4, top_k=1)
collector = Collector("graphs")
mailbox = writer.mailbox(0, [], entries=2)
experts = np.array([[[3], [1]], [[0], [2]]], np.uint8)

def word(address):
    return ctypes.c_uint64.from_address(address)

def replay(number):
    \"\"\"What a graph's kernels do, on a device whose memory is this process's.\"\"\"
    entry = (ctypes.c_uint64 * 8).from_address(mailbox.entries + number % 2 * 64)
    word(mailbox.taken).value = number
    replay, rows, payload, sequence, value, *_ = entry
    assert (replay, rows) == (number, 2)
    ctypes.memmove(payload, experts[:, ::-1].tobytes(), 4)
    word(sequence).value = value

writer.set_batch([(1, "a", 0, 2, 2, "prefill")])
publishers = []
for step in range(6):
    positions = np.arange(2, dtype=np.uint32) + 2 * step
    if step % 2:
        mailbox.set_rows(2, token_ids=False, positions=positions, kv_slots=False)
        assert writer.publish_graph(mailbox)
        replay(step // 2 + 1)
    else:
        assert writer.publish_device(experts.ctypes.data, 2, positions, device=0, stream=0)
    publishers.append(writer.publisher)
assert collector.sync(10.0)
rows = collector.rows("a")["experts"]
assert np.array_equal(rows, np.concatenate([experts, experts[:, ::-1]] * 3)), rows
assert collector.stats()["publisher"] == writer.publisher
writer.close()
print(publishers[0], publishers[1:], sep="; ")
"""


RETRACTED = """
import ctypes
import numpy as np
from expert_lens._core import Collector, Writer
from expert_lens.errors import CudaError

writer = Writer("retracted", layers=[0], num_experts=4, top_k=1)
collector = Collector("retracted")
writer.set_batch([(1, "a", 0, 1, 1, "decode")])
mailbox = writer.mailbox(0, [], entries=2)

def post(position):
    mailbox.set_rows(1, token_ids=False, positions=np.array([position], np.uint32), kv_slots=False)
    assert writer.publish_graph(mailbox)

def word(address):
    return ctypes.c_uint64.from_address(address)

def replay(expert):
    \"\"\"What a graph's kernels do: they take the post of the replay that their own count says.\"\"\"
    word(mailbox.state).value += 1
    number = word(mailbox.state).value
    entry = (ctypes.c_uint64 * 8).from_address(mailbox.entries + number % 2 * 64)
    word(mailbox.taken).value = number
    replay, rows, payload, sequence, value, *_ = entry
    if (replay, rows) == (number, 1):
        ctypes.c_uint8.from_address(payload).value = expert
        word(sequence).value = value

post(0)
replay(3)
post(1)
if RAN:
    word(mailbox.state).value += 1  # the replay has failed behind what counts it
try:
    record = mailbox.retract(0)
except CudaError as error:
    print(error)
else:
    assert record == 1, record
    writer.void(record, 0, 0)
    post(2)
    replay(2)
    assert collector.sync(10.0)
    rows = collector.rows("a")
    print(rows["experts"].ravel().tolist(), rows["phases"].tolist(), collector.stats()["dropped_tokens"])
writer.close()
"""


def run(libraries: Path, lacks: str, code: str) -> Any:
    """The process that ran the code with a device that lacks this."""
    env = {**os.environ, "LD_LIBRARY_PATH": str(libraries), "LACKS": lacks}
    env.pop("EXPERT_LENS_PUBLISHER", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done


def publish(
    libraries: Path,
    lacks: str,
    *,
    refused: bool = False,
    reset: bool = False,
    left: str = "0 pinned, 0 retained, 0 events, 0 late",
) -> Any:
    """The publisher of a process with a device that lacks this, and the error that it got.

    `refused`: whether its last record is one that the driver refuses. `reset`: whether its context is reset before it
    closes. `left`: what there is of it when it ends.
    """
    done = run(libraries, lacks, f"REFUSED, RESET = {refused}, {reset}\n{PUBLISH}")
    assert re.search(f"left: {left}$", done.stderr, re.MULTILINE), done.stderr
    said, _, publisher = done.stdout.strip().rpartition("\n")
    return publisher, said


def test_the_stream_publishes_where_a_device_has_all(libraries: Path) -> None:
    assert publish(libraries, "") == ("stream", "")


def test_an_event_publishes_where_a_stream_cannot_store(libraries: Path) -> None:
    assert publish(libraries, "122") == ("event", "")


@pytest.mark.parametrize(("lacks", "eager", "both"), [("", "stream", "graph"), ("122", "event", "graph and event")])
def test_graphs_publish_there_too_and_what_runs_in_none_goes_as_before(
    libraries: Path, lacks: str, eager: str, both: str
) -> None:
    assert run(libraries, lacks, GRAPHS).stdout == f"{eager}; {[both] * 5}\n"


def test_an_event_publishes_with_an_older_driver(tmp_path: Path) -> None:
    assert publish(compiled(tmp_path, "-DOLD"), "") == ("event", "")


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("99", "device 0 cannot register memory of the host"),
        ("cuMemHostRegister", "cannot pin the arena of 268435456 bytes: .*NOT_SUPPORTED; it must lie on a tmpfs"),
        ("cuMemHostGetDevicePointer", "cuMemHostGetDevicePointer failed: CUDA_ERROR_NOT_SUPPORTED"),
    ],
)
def test_a_device_that_cannot_is_named_and_holds_nothing(libraries: Path, lacks: str, says: str) -> None:
    publisher, said = publish(libraries, lacks)
    assert publisher == "host"
    assert re.search(says, said), said


@pytest.mark.parametrize("ran", [False, True])
def test_a_replay_that_failed_is_taken_back_be_it_counted_or_not(libraries: Path, ran: bool) -> None:
    """The next one finds its own post, and the row of this one is missing and counted."""
    assert run(libraries, "", f"RAN = {ran}\n{RETRACTED}").stdout == "[3, 0, 2] [1, 255, 1] 1\n"


def test_a_replay_that_cannot_be_taken_back_is_told(libraries: Path) -> None:
    said = run(libraries, "cuMemsetD32Async", f"RAN = False\n{RETRACTED}").stdout
    assert said == "cuMemsetD32Async failed: CUDA_ERROR_NOT_SUPPORTED\n"


@pytest.mark.parametrize("lacks", ["", "122"])
def test_a_record_that_is_refused_keeps_nobody_from_closing(libraries: Path, lacks: str) -> None:
    publisher, said = publish(libraries, lacks, refused=True)
    assert publisher == ("event" if lacks else "stream")
    assert said == "cuMemcpyDtoHAsync failed: CUDA_ERROR_NOT_SUPPORTED"


@pytest.mark.parametrize("lacks", ["", "another context"])
def test_of_a_context_that_was_reset_nothing_is_given_back(libraries: Path, lacks: str) -> None:
    """What was pinned and made in it is gone; to name it once more would name something else, in the next one."""
    left = "1 pinned, 0 retained, [1-3] events, 0 late"
    assert publish(libraries, f"122 {lacks}", reset=True, left=left) == ("event", "")


@pytest.mark.parametrize("lacks", ["", "another context"])
def test_a_record_on_its_way_in_a_context_that_was_reset_comes_no_more(libraries: Path, lacks: str) -> None:
    """So the arena is given back: no device knows it any more."""
    done = run(libraries, lacks, POSTED)
    assert done.stdout == "1 positions, and 2 rows need 2\nFalse\n"
    left = "2 pinned, 0 retained, 0 events, 0 late"  # the arena and the mailbox, which the reset took
    assert re.search(f"left: {left}$", done.stderr, re.MULTILINE), done.stderr


@pytest.mark.parametrize("lacks", ["", "another context"])
def test_an_event_of_a_context_that_was_reset_is_asked_for_no_more(libraries: Path, lacks: str) -> None:
    done = run(libraries, f"122 cuEventQuery {lacks}", RESET_ON_ITS_WAY)
    found = re.search(r"left: 1 pinned, [01] retained, 1 events, (\d+) late$", done.stderr, re.MULTILINE)
    assert found is not None, done.stderr
    assert int(found[1]) <= 50, "it would be asked for every 20 us"


def test_closing_waits_not_for_ever_for_a_stream_behind_which_a_record_was_made_void(libraries: Path) -> None:
    """What may still be written to stays as it is."""
    done = run(libraries, "cuEventQuery", VOID_BEHIND_A_STREAM_THAT_HANGS)
    assert "left: 1 pinned" in done.stderr


def test_a_writer_that_is_dropped_waits_for_its_device_and_keeps_no_other_thread_waiting(libraries: Path) -> None:
    assert int(run(libraries, "122 cuEventQuery", NEVER).stdout) > 100


def test_a_stream_and_its_context_outlive_who_asked_for_it(libraries: Path) -> None:
    """One for all writers on a device; when all of them are closed, its context is retained once, by the stream."""
    done = run(libraries, "", f"RESET = False\n{STREAMS}")
    streams = json.loads(done.stdout)
    assert streams == [streams[0]] * 5
    assert re.search("left: 0 pinned, 1 retained, 0 events, 0 late$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("lacks", ["", "another context"])
def test_a_stream_of_a_context_that_was_reset_is_not_given_out_again(libraries: Path, lacks: str) -> None:
    streams = json.loads(run(libraries, lacks, f"RESET = True\n{STREAMS}").stdout)
    assert streams == [streams[0] + made for made in range(5)]

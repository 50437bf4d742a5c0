"""What a branch in a CUDA graph costs beside NCCL's collectives, on two GPUs: `python benchmarks/gpu_collectives.py`.

A graph as of a decode step, of small kernels in a row, with an all-reduce by NCCL behind every sixth, as SGLang calls
it, or without; beside it two kernels on a branch of their own, as the lens records them: `from the beginning on`, `from
the last layer on`, or none beside it and both `at the end`. What a replay takes longer than without a branch, of graphs
that take turns; with NCCL's support for graphs beside other collectives on, as it is by itself, and off.

Needs two GPUs and SGLang, whose communicator it borrows.
"""

import itertools
import os
import random
import socket
from typing import Any

import torch
import torch.distributed as dist
from figures import show
from torch import multiprocessing

LAYERS, KERNELS = 48, 6
ROUNDS, REPLAYS, WARM_UPS = 12, 50, 5
BRANCHES = (None, "from the beginning on", "from the last layer on", "at the end")


class Forward:
    """The kernels of a step on this rank, in a graph with or without collectives, and with one of BRANCHES."""

    def __init__(self, communicator: Any) -> None:
        self.communicator = communicator
        self.x = torch.zeros(64, 2048, dtype=torch.bfloat16, device="cuda")
        self.rows, self.copied = torch.zeros(2, 512, device="cuda")
        self.stream, self.beside = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(self.stream):  # what is launched first is loaded, which no capture allows
            self.run(collectives=True)
            torch.add(self.rows, 1, out=self.copied.add_(1))

    def run(self, collectives: bool) -> torch.cuda.Event:
        """Launch the kernels; gives where the last layer begins."""
        for _ in range(LAYERS):
            last = torch.cuda.current_stream().record_event()
            for _ in range(2):
                for _ in range(KERNELS):
                    self.x.mul_(1)
                if collectives:
                    self.communicator.all_reduce(self.x)
        return last

    def capture(self, collectives: bool, branch: str | None) -> torch.cuda.CUDAGraph:
        """The graph of it."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        dist.barrier()
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            begun = self.stream.record_event()
            last = self.run(collectives)
            end = self.stream.record_event()
            if branch is not None:
                first, then = {BRANCHES[1]: (begun, last), BRANCHES[2]: (last, last), BRANCHES[3]: (end, end)}[branch]
                with torch.cuda.stream(self.beside):
                    self.beside.wait_event(first)
                    self.copied.add_(1)
                    self.beside.wait_event(then)
                    torch.add(self.rows, 1, out=self.copied)
                self.stream.wait_stream(self.beside)
        return graph


def time_replays(graph: torch.cuda.CUDAGraph) -> float:
    """Microseconds a replay, which both ranks make at once."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    dist.barrier()
    for _ in range(WARM_UPS):
        graph.replay()
    begun.record()
    for _ in range(REPLAYS):
        graph.replay()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) * 1e3 / REPLAYS


def measure(rank: int, port: int, support: str) -> None:
    """What one rank does; the first one tells."""
    from sglang.srt.distributed.device_communicators.pynccl import PyNcclCommunicator

    torch.cuda.set_device(rank)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    communicator = PyNcclCommunicator(dist.group.WORLD, torch.device("cuda", rank))
    communicator.disabled = False
    forward, order = Forward(communicator), random.Random(0)  # both ranks replay the same
    ways = list(itertools.product((False, True), BRANCHES))
    graphs = {way: forward.capture(*way) for way in ways}
    took: dict[tuple[bool, str | None], list[float]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way in order.sample(ways, len(ways)):
            took[way].append(time_replays(graphs[way]))
    if rank == 0:
        for collectives in (False, True):
            what = f"{2 * LAYERS if collectives else 'no'} collectives, support {support}"
            alone = took[collectives, None]
            show(f"{what}: no branch", "µs a replay", alone, digits=2)
            for branch in BRANCHES[1:]:
                added = [with_it - without for with_it, without in zip(took[collectives, branch], alone, strict=True)]
                show(f"{what}: a branch {branch}, added", "µs a replay", added, digits=2)
    dist.barrier()


def main() -> None:
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, NCCL {torch.cuda.nccl.version()}", flush=True)
    for support in ("on", "off"):
        os.environ["NCCL_GRAPH_MIXING_SUPPORT"] = str(int(support == "on"))
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        multiprocessing.spawn(measure, (port, support), nprocs=2)


if __name__ == "__main__":
    main()

"""A plugin of SGLang for tests alone: looks at what is used and what is taken, in the scheduler's process.

`install(folder)` makes an entry point of it. Loaded, it has each layer of a model with dummy weights route in a way of
its own (`routers`): SGLang gives all layers the same; and SGLang's own capture right where there is no GPU
(`without_a_gpu`). SGLANG_SPY names what it does beside:

* `consumed:FILE`: appends to FILE.DEVICE, a forward behind the other, the experts whose weights the MoE kernel
  multiplies each row with, as told by its tables `sorted_token_ids` and `expert_ids`: int32 n, L, K, then [n, L, K].
  In a CUDA graph copies of the tables are recorded, and read after each replay. On a CPU, what the function is given
  that goes through the experts; DEVICE is 0.
* `altered`: gives expert_lens one id that is not the one chosen, in the second forward of prompts.
* `altered_in_graphs`: the same in every replay of a decode graph, for its first row.
* `numbered`: sees that every layer's `TopK` has the number that its experts were told when the model was made.
* `followed`: makes SGLang's own capture right for drafted tokens, whose rows it never keeps if they come by n-grams,
  and of a tree leaves in the KV slots that their tokens are moved away from.
* `in_graphs_of:ROWS`: makes SGLang's own capture right for prompts in graphs of so many rows a data-parallel rank: it
  cuts this rank's out where they are in a decode graph.
* `moved`: takes the names of its arguments from what a request's end is told by, as another release may.
* `loaded`: when a request has ended, prints which modules of expert_lens have hooked something, or hold a step.
* `timed:FILE`: appends what expert_lens takes of the scheduler's thread in each decode step by graph, but for the
  launch: "ROWS MICROSECONDS" a line. In every second step what the clocks take that tell it, around nothing, before
  ours comes: "ROWS MICROSECONDS clocks".
"""

import inspect
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

NAME = "expert_lens_spy"


def install(folder: Path) -> None:
    """Make `folder`, put on PYTHONPATH, bring this plugin."""
    shutil.copy(__file__, folder / "sglang_spy.py")
    info = folder / f"{NAME}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{NAME} = sglang_spy:register\n")


def register() -> None:
    import multiprocessing

    what, _, file = os.environ.get("SGLANG_SPY", "").partition(":")
    if multiprocessing.current_process().name == "MainProcess":
        return
    routers()
    without_a_gpu()
    spies = (consumed, altered, altered_in_graphs, numbered, followed, in_graphs_of, moved, loaded, timed)
    if what:
        {spy.__name__: spy for spy in spies}[what](file)


def routers() -> None:
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def draw(_: Any, model: Any, *__: Any, **___: Any) -> None:
        """Weights of each router by its name, which is the same on every rank and in every engine."""
        for name, weight in model.state_dict().items():
            if name.endswith(".gate.weight"):
                drawn = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
                weight.copy_(drawn.uniform_(-1, 1, generator=torch.Generator("cpu").manual_seed(crc32(name.encode()))))

    HookRegistry.register("sglang.srt.model_loader.weight_utils.initialize_dummy_weights", draw, HookType.AFTER)


def without_a_gpu() -> None:
    """SGLang's own capture pins its memory; and what it gives of a forward lies where the next one writes, if nothing
    copies it from a device.
    """
    import torch

    if torch.cuda.is_available():
        return
    zeros = torch.zeros

    def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:  # noqa: ARG001
        return zeros(*args, **kwargs)

    torch.zeros = unpinned
    with suppress(ImportError):
        from sglang.srt.mem_cache.pool_host import common

        common._cuda_host_register = lambda *_, **__: None  # in newer releases
    try:
        from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer as Native
    except ImportError:  # before 0.5.15
        from sglang.srt.layers.moe.routed_experts_capturer import _RoutedExpertsCapturerReal as Native
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    for name in ("get_cuda_graph_seq_len_fill_value", "get_cpu_graph_seq_len_fill_value"):
        setattr(TorchNativeAttnBackend, name, lambda _: 1)  # data-parallel attention pads with it, graph or not
    on_forward_end = Native.on_forward_end

    def copied(*args: Any, **kwargs: Any) -> Any:
        output = on_forward_end(*args, **kwargs)
        for name, value in vars(output).items() if output is not None else ():
            if isinstance(value, torch.Tensor):
                setattr(output, name, value.clone())
        return output

    Native.on_forward_end = copied


def consumed(file: str) -> None:
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    num_layers = int(os.environ["SGLANG_SPY_LAYERS"])
    layers: list[Any] = []
    recorded: list[Any] = []
    calls = 0

    def consumed_rows(sorted_ids: Any, expert_ids: Any, num_padded: Any, block: int, shape: tuple[int, int]) -> Any:
        rows, experts, padded = sorted_ids.cpu().numpy(), expert_ids.cpu().numpy(), int(num_padded.item())
        found = np.full(shape[0] * shape[1], -1, np.int32)
        places = rows[:padded]
        chosen = np.repeat(experts[: -(-padded // block)], block)[:padded]
        real = places < len(found)
        found[places[real]] = chosen[real]
        return found.reshape(shape)

    def write(of_layers: list[Any]) -> None:
        rows = np.stack(of_layers, axis=1)
        device = torch.cuda.current_device() if torch.cuda.is_available() else 0
        with open(f"{file}.{device}", "ab") as out:
            out.write(np.array(rows.shape, np.int32).tobytes() + rows.tobytes())

    def add(layer: Any) -> None:
        layers.append(layer)
        if len(layers) == num_layers:
            write(layers)
            layers.clear()

    def around_experts(original: Any, layer: Any, x: Any, topk_output: Any, *more: Any) -> Any:
        add(topk_output[1].numpy().astype(np.int32))
        return original(layer, x, topk_output, *more)

    if not torch.cuda.is_available():
        target = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"
        HookRegistry.register(target, around_experts, HookType.AROUND)
        return

    def around(original: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        named = inspect.signature(original).bind(*args, **kwargs).arguments
        calls += 1
        if calls % 2:  # the second one multiplies with the other weights of the same experts
            tables = [named[name] for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")]
            more = (named["config"]["BLOCK_SIZE_M"], tuple(named["topk_ids"].shape))
            if torch.cuda.is_current_stream_capturing():
                recorded.append((*(table.clone() for table in tables), *more))
            else:
                add(consumed_rows(*tables, *more))
        return original(*args, **kwargs)

    begin, replay = torch.cuda.CUDAGraph.capture_begin, torch.cuda.CUDAGraph.replay

    def begin_capture(graph: Any, *args: Any, **kwargs: Any) -> None:
        nonlocal recorded
        graph.consumed = recorded = []
        begin(graph, *args, **kwargs)

    def replay_and_read(graph: Any) -> None:
        replay(graph)
        if consumed := getattr(graph, "consumed", []):
            torch.cuda.synchronize()
            write([consumed_rows(*one) for one in consumed])

    torch.cuda.CUDAGraph.capture_begin = begin_capture  # type: ignore[method-assign]
    torch.cuda.CUDAGraph.replay = replay_and_read  # type: ignore[method-assign]

    target = "sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe_triton_kernels.invoke_fused_moe_kernel"
    HookRegistry.register(target, around, HookType.AROUND)


def read_consumed(file: Path) -> Any:
    """What `consumed` has written of a device, all rows one behind the other: [n, L, K]."""
    data = np.frombuffer(file.read_bytes(), np.int32)
    found = []
    at = 0
    while at < len(data):
        shape = data[at : at + 3]
        size = int(shape.prod())
        found.append(data[at + 3 : at + 3 + size].reshape(shape))
        at += 3 + size
    return np.concatenate(found)


def altered(_: str) -> None:
    from expert_lens.tap import Tap

    layer, calls = Tap.layer, 0

    def changed(tap: Tap, slot: int, ids: Any, weights: Any = None) -> None:
        nonlocal calls
        calls += slot == 3 and tap._current.step is not None
        if slot == 3 and calls == 2:
            ids = ids.clone()
            ids[0, 0] = (ids[0, 0] + 1) % tap.num_experts
        layer(tap, slot, ids, weights)

    Tap.layer = changed  # type: ignore[method-assign]


def altered_in_graphs(_: str) -> None:
    from expert_lens.engines.sglang.capturer import _DecodeGraph

    take = _DecodeGraph.take

    def changed(graph: Any, slot: int, ids: Any) -> None:
        if slot == 3:
            ids = ids.clone()
            ids[:1, :1] = (ids[:1, :1] + 1) % graph._tap.num_experts
        take(graph, slot, ids)

    _DecodeGraph.take = changed  # type: ignore[method-assign]


def numbered(_: str) -> None:
    from expert_lens.engines.sglang import model

    facts = model.facts

    def checked(runner: Any) -> dict[str, Any]:
        found = facts(runner)
        modules = dict(runner.model.named_modules())
        topks = [name for name in modules if name.endswith(".topk")]
        numbers = [(modules[name].layer_id, modules[name.removesuffix("topk") + "experts"].layer_id) for name in topks]
        assert len(numbers) == len(found["layers"])
        assert all(told == made for told, made in numbers), numbers
        print(f"{len(numbers)} layers are numbered as their experts", flush=True)
        return found

    model.facts = checked


def followed(_: str) -> None:
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer, get_global_experts_capturer

    on_forward_end, move = RoutedExpertsCapturer.on_forward_end, MHATokenToKVPool.move_kv_cache

    def kept(capturer: Any, *args: Any, **kwargs: Any) -> None:
        on_forward_end(capturer, *args, **{**kwargs, "no_copy_to_cpu": False})

    def moved(pool: Any, target: Any, source: Any) -> None:
        move(pool, target, source)
        rows = get_global_experts_capturer().host_cache.buffer
        rows[target.cpu()] = rows[source.cpu()]

    RoutedExpertsCapturer.on_forward_end = kept
    MHATokenToKVPool.move_kv_cache = moved


def in_graphs_of(rows: str) -> None:
    from sglang.srt.state_capturer.routed_experts import RoutedExpertsCapturer

    on_forward_end = RoutedExpertsCapturer.on_forward_end

    def cut(capturer: Any, *, forward_batch: Any, can_run_graph: bool, **kwargs: Any) -> Any:
        if can_run_graph and forward_batch.forward_mode.is_extend():
            kwargs["cuda_graph_batch"] = int(rows)
        return on_forward_end(capturer, forward_batch=forward_batch, can_run_graph=can_run_graph, **kwargs)

    RoutedExpertsCapturer.on_forward_end = cut


def moved(_: str) -> None:
    from sglang.srt.mem_cache import common

    original = common.release_kv_cache
    common.release_kv_cache = lambda *args, **kwargs: original(*args, **kwargs)


def loaded(_: str) -> None:
    import sys

    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def tell(*_: Any, **__: Any) -> None:
        hooks = {hook.__module__ for hooks in HookRegistry._hooks.values() for _, hook, *_ in hooks}
        found = {name for name in (*hooks, *({"expert_lens.tap"} & sys.modules.keys())) if "expert_lens" in name}
        print(f"of expert_lens: {sorted(found)}", flush=True)

    HookRegistry.register("sglang.srt.mem_cache.common.release_kv_cache", tell, HookType.AFTER)


def timed(file: str) -> None:
    from expert_lens.engines.sglang.capturer import Capturer

    clock = time.perf_counter_ns
    spent = alone = entered = rows = steps = 0
    lines: list[str] = []

    def nothing(*_: Any, **__: Any) -> None:
        nonlocal alone
        alone += clock() - entered

    def run(capturer: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """The runner's forward, ours around it, and a clock on both sides of ours."""
        nonlocal entered

        def theirs(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            spent += clock() - entered
            return forward(*args, **kwargs)

        if steps % 2:
            entered = clock()
            nothing(*args, **kwargs)
        entered = clock()
        return ran(capturer, theirs, *args, **kwargs)

    def replay(capturer: Any, recorded: Any, launch: Any) -> None:
        nonlocal spent, rows, alone
        rows = len(capturer._batch.rids) if capturer._batch is not None else 0

        def launch_nothing() -> None:
            nonlocal alone
            began = clock()
            alone -= clock() - began

        def timed_launch() -> None:
            nonlocal spent
            began = clock()
            launch()
            spent -= clock() - began

        if steps % 2:
            began = clock()
            launch_nothing()
            alone += clock() - began
        began = clock()
        replayed(capturer, recorded, timed_launch)
        spent += clock() - began

    def on_forward_end(capturer: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal spent, rows, alone, steps
        native, capturer.native = capturer.native, None
        if steps % 2:
            began = clock()
            alone += clock() - began
        began = clock()
        ended(capturer, *args, **kwargs)
        spent += clock() - began
        capturer.native = native
        if rows:
            lines.append(f"{rows} {alone / 1e3} clocks\n" if steps % 2 else f"{rows} {spent / 1e3}\n")
            if len(lines) == 100:
                with open(file, "a") as out:
                    out.writelines(lines)
                lines.clear()
            steps += 1
        spent = rows = alone = 0
        return None if native is None else native.on_forward_end(*args, **kwargs)

    ran, replayed, ended = Capturer.run, Capturer._replay, Capturer.on_forward_end
    Capturer.run = run  # type: ignore[method-assign]
    Capturer._replay = replay  # type: ignore[method-assign]
    Capturer.on_forward_end = on_forward_end  # type: ignore[method-assign]

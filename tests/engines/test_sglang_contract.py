"""Whether SGLang's releases have what expert_lens holds on to: looked for in their sources, not in our own code's way.

All of them from the oldest that is known on, and the newest that the registry has, so that one which breaks us is seen
when it comes out.
"""

import ast
import inspect
import re

import pytest

from expert_lens.engines.sglang import contract, layout, model, requests
from expert_lens.engines.sglang.contract import NEWEST, OLDEST
from sglang_sources import Sources, download, number

RELEASED = (
    OLDEST, "0.5.12", "0.5.13.post1", "0.5.14", "0.5.15", "0.5.16", "0.5.17", "0.5.18", "0.5.19", "0.5.20", "0.5.21",
    "0.5.22", NEWEST,
)  # fmt: skip


@pytest.fixture(scope="module", params=[*RELEASED, None], ids=[*RELEASED, "newest"])
def sources(request: pytest.FixtureRequest) -> Sources:
    return download(request.param)


def first(sources: Sources, *paths: str) -> str:
    """The first of these classes that the release has."""
    found = next((path for path in paths if sources.find(path) is not None), None)
    assert found is not None, f"SGLang {sources.version} has none of {', '.join(paths)}"
    return found


def needs(sources: Sources, what: str, needed: set[str], found: set[str] | None) -> None:
    lacking = needed - (found or set())
    assert not lacking, f"SGLang {sources.version}: {what} has no {', '.join(sorted(lacking))}"


def test_every_place_is_there(sources: Sources) -> None:
    for place in contract.PLACES:
        found = [path for path in place.paths if sources.parameters(path) is not None]
        assert found, f"SGLang {sources.version} has moved where {place.purpose}: none of {', '.join(place.paths)}"
        needs(sources, f"what {found[0]} is called with", set(place.parameters), sources.parameters(found[0]))


CAPTURERS = ("sglang.srt.state_capturer.routed_experts", "sglang.srt.layers.moe.routed_experts_capturer")


def test_the_capturer_is_called_as_ours_can_be(sources: Sources) -> None:
    from expert_lens.engines.sglang.capturer import Capturer

    captures = sources.calls("sglang.srt.layers.moe.topk", "capture")
    assert captures, f"in SGLang {sources.version} no layer calls the capturer"
    for keywords in captures:
        needs(sources, "our capture, as it is called,", keywords, set(inspect.signature(Capturer.capture).parameters))
    ends = sources.calls("sglang.srt.model_executor.model_runner", "on_forward_end")
    assert ends, f"in SGLang {sources.version} nobody tells the capturer of a forward's end"
    ours = set(inspect.signature(Capturer.on_forward_end).parameters)
    for keywords in ends:
        needs(sources, "our on_forward_end, as it is called,", keywords, ours)


MAPPINGS = {"topk_ids_logical_to_physical", "_mask_topk_ids_padded_region", "_biased_grouped_topk_postprocess"}


def test_ids_are_captured_before_they_are_mapped_to_physical_experts(sources: Sources) -> None:
    tree = sources.tree("sglang.srt.layers.moe.topk")
    assert tree is not None
    found = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        calls = [(ast.unparse(node.func), node.lineno) for node in ast.walk(function) if isinstance(node, ast.Call)]
        captured = [line for name, line in calls if name.endswith((".capture", "capture_routed_experts_if_allowed"))]
        mapped = [line for name, line in calls if name in MAPPINGS]
        if captured and mapped:
            found.append(function.name)
            assert max(captured) < min(mapped), f"in SGLang {sources.version} {function.name} captures mapped ids"
    assert found, f"in SGLang {sources.version} ids are captured or mapped elsewhere than in one function"


def test_its_own_capturer_takes_what_ours_hands_on(sources: Sources) -> None:
    module = next(module for module in CAPTURERS if sources.tree(module) is not None)
    name = "RoutedExpertsCapturer" if module == CAPTURERS[0] else "_RoutedExpertsCapturerReal"
    parameters = sources.parameters(f"{module}:{name}.capture")
    assert parameters is not None
    assert len(parameters) == 3, f"SGLang {sources.version}: {name}.capture takes more than the layer and its ids"
    base = "sglang.srt.state_capturer.base:BaseTopkCapturer" if module == CAPTURERS[0] else f"{module}:{name}"
    keywords = {"forward_batch", "can_run_graph", "cuda_graph_batch", "no_copy_to_cpu"}
    needs(sources, f"{base}.on_forward_end", keywords, sources.parameters(f"{base}.on_forward_end"))


def test_a_batch_says_whose_rows_it_holds(sources: Sources) -> None:
    info = "sglang.srt.model_executor.forward_batch_info"
    needed = {
        "forward_mode", "rids", "input_ids", "positions", "out_cache_loc", "seq_lens_cpu", "req_pool_indices",
        "extend_prefix_lens_cpu", "extend_seq_lens_cpu", "global_num_tokens_cpu", "batch_size", "spec_info",
    }  # fmt: skip
    needs(sources, "ForwardBatch", needed, sources.fields(f"{info}:ForwardBatch"))
    modes = {"DECODE", "EXTEND", "MIXED", "IDLE", "TARGET_VERIFY", "is_decode"}
    needs(sources, "ForwardMode", modes, sources.fields(f"{info}:ForwardMode"))


def test_a_request_says_when_it_ends(sources: Sources) -> None:
    batch = "sglang.srt.managers.schedule_batch"
    needed = {"rid", "origin_input_ids", "output_ids", "output_ids_through_stop", "finished_reason"}
    needs(sources, "Req", needed, sources.fields(f"{batch}:Req"))
    assert sources.find(f"{batch}:FINISH_ABORT") is not None, f"SGLang {sources.version} tells no abort by FINISH_ABORT"
    needs(sources, "ScheduleBatch", {"reqs"}, sources.fields(f"{batch}:ScheduleBatch"))


def test_a_decode_graph_has_its_inputs_and_can_be_found(sources: Sources) -> None:
    runner = first(
        sources,
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner",
        "sglang.srt.model_executor.cuda_graph_runner:CudaGraphRunner",
    )
    module, _, name = runner.partition(":")
    inputs = {"input_ids", "positions", "out_cache_loc"}
    if sources.find(f"{module}:_allocate_decode_buffers") is not None:  # 0.5.13 alone, in a namespace
        given = re.findall(r"(\w+)=", sources.unparsed(f"{module}:_allocate_decode_buffers").rpartition("return")[2])
        needs(sources, "what it allocates", inputs, set(given))
    else:
        buffers = first(
            sources,
            "sglang.srt.model_executor.runner_utils.buffers:DecodeInputBuffers",
            "sglang.srt.model_executor.cuda_graph_runner:DecodeInputBuffers",
        )
        needs(sources, buffers, inputs, sources.fields(buffers))
    backend = {"backend"} if name == "DecodeCudaGraphRunner" else set()
    needs(sources, runner, {"buffers", "capture_forward_mode"} | backend, sources.fields(runner))
    told = sources.text(module) + sources.text("sglang.srt.model_executor.runner.base_runner")
    assert "self.model_runner = " in told
    width = {"num_tokens_per_bs", "captured_req_width"}  # else a request is thought to have one row
    assert width & (sources.fields(runner) | {each for each in width if f"self.{each}" in sources.text(module)})
    method = "capture_one_shape" if name == "DecodeCudaGraphRunner" else "capture_one_batch_size"
    assert sources.calls(module, method), f"in SGLang {sources.version} nobody calls {method}"
    function = sources.find(f"{runner}.{method}")
    assert isinstance(function, ast.FunctionDef)
    places = [argument.arg for argument in function.args.args]
    assert places[1] in ("size", "bs"), f"SGLang {sources.version}: {method} takes {places[1]} first, and no size"
    if "DecodeCudaGraphRunner" in runner:
        backend = "sglang.srt.model_executor.runner_backend.full_cuda_graph_backend:FullCudaGraphBackend"
        assert {"_graphs", "capture_one", "replay"} <= sources.fields(backend)
        assert re.search(r"self\._graphs\[\w+\] = graph\b", sources.unparsed(f"{backend}.capture_one"))
        assert re.search(r"self\._graphs\[\w+\]\.replay\(\)", sources.unparsed(f"{backend}.replay"))
    else:
        assert "return (graph, " in sources.unparsed(f"{runner}.capture_one_batch_size")
        assert re.search(r"self\.graphs\[\w+\]\.replay\(\)", sources.unparsed(f"{runner}.replay"))


def test_drafted_tokens_are_judged_where_we_listen(sources: Sources) -> None:
    """Older releases judge them elsewhere: there, their rows count as dropped."""
    path = contract.VERIFY.paths[0]
    if number(sources.version) < (0, 5, 14):
        assert sources.find(path) is None
        return
    assert set(contract.VERIFY.parameters) <= (sources.parameters(path) or set())
    judge = sources.find(path)
    assert judge is not None
    returned = [node.value for node in ast.walk(judge) if isinstance(node, ast.Return)]
    assert returned
    for value in returned:
        assert isinstance(value, ast.Tuple)
        assert [getattr(each, "id", "") for each in value.elts][-1] == "accept_index"
        assert len(value.elts) == 3
    for name in ("eagle_info:EagleVerifyInput", "ngram_info:NgramVerifyInput"):
        assert "draft_token_num" in sources.fields(f"sglang.srt.speculative.{name}")


def test_the_runner_says_what_the_model_is(sources: Sources) -> None:
    needed = {
        "is_draft_worker", "model_config", "server_args", "req_to_token_pool", "max_total_num_tokens", "page_size",
        "max_running_requests", "device", "gpu_id", "model", "spec_algorithm",
    }  # fmt: skip
    algorithm = "sglang.srt.speculative.spec_info:SpeculativeAlgorithm"
    needs(sources, algorithm, {"is_none"}, sources.fields(algorithm))
    runner = "sglang.srt.model_executor.model_runner"
    found = sources.fields(f"{runner}:ModelRunner")
    mixin = "sglang.srt.model_executor.model_runner_kv_cache_mixin"
    if sources.tree(mixin) is not None:
        found |= sources.fields(f"{mixin}:ModelRunnerKVCacheMixin")
    needs(sources, "ModelRunner", needed, found)
    config = "sglang.srt.configs.model_config:ModelConfig"
    needs(sources, config, {"hf_text_config", "model_path"}, sources.fields(config))
    for name in ("is_dp_attention_enabled", "get_local_dp_buffer_len", "is_dp_max_padding"):
        assert sources.find(f"sglang.srt.layers.dp_attention:{name}") is not None
    here = {"pp_size", "pp_rank", "attn_tp_size", "attn_tp_rank", "attn_dp_size", "attn_dp_rank", "attn_cp_size"}
    context = "sglang.srt.runtime_context"
    if sources.find(f"{context}:get_parallel") is not None:
        told = set(re.findall(r"\w+", sources.text(context)))
        needs(sources, context, here, told)
        assert _tells_its_replica(sources, runner, context), f"SGLang {sources.version} does not tell dp_rank"
    else:
        needs(sources, "ModelRunner", {"pp_size", "pp_rank"}, found)
        for name in ("get_attention_tp_size", "get_attention_tp_rank", "get_attention_dp_rank"):
            assert sources.find(f"sglang.srt.layers.dp_attention:{name}") is not None
    assert sources.find("sglang.srt.layers.moe.utils:MoeA2ABackend") is not None
    group = "sglang.srt.distributed.parallel_state"
    for name in ("get_tp_group", "get_moe_ep_group", "get_moe_tp_group"):
        assert sources.find(f"{group}:{name}") is not None
    needs(sources, "GroupCoordinator", {"ca_comm", "world_size"}, sources.fields(f"{group}:GroupCoordinator"))
    communicators = "sglang.srt.distributed.device_communicators.custom_all_reduce"
    for own in (f"{communicators}:CustomAllreduce", f"{communicators}_v2:CustomAllReduceV2"):
        if sources.find(own) is not None:
            needs(sources, own, {"disabled"}, sources.fields(own))


def _tells_its_replica(sources: Sources, runner: str, context: str) -> bool:
    """Whether the runner has the rank of a data-parallel replica, or has it in its `ps`, or the context has it."""
    found = sources.fields(f"{runner}:ModelRunner")
    state = "sglang.srt.distributed.parallel_state_wrapper:ParallelState"
    if "dp_rank" in found:
        return True
    if "ps" in found and sources.find(state) is not None:
        return "dp_rank" in sources.fields(state)
    return re.search(r"""["']dp_rank["']""", sources.text(context)) is not None


def test_a_layer_says_how_many_experts_it_chooses(sources: Sources) -> None:
    fields = sources.fields("sglang.srt.layers.moe.topk:TopKConfig")
    needs(sources, "TopKConfig", {"top_k"}, fields)
    shared = {"num_shared_topk_slots", "num_fused_shared_experts"}
    assert fields & shared, f"SGLang {sources.version}: TopKConfig does not tell how many of them are shared experts"
    needs(sources, "TopK", {"topk_config", "layer_id"}, sources.fields("sglang.srt.layers.moe.topk:TopK"))


def test_what_else_is_asked_by_its_name(sources: Sources) -> None:
    assert "get_moe_a2a_backend" in sources.text("sglang.srt.layers.moe")
    kinds = sources.fields("sglang.srt.plugins.hook_registry:HookType")
    needs(sources, "HookType", {"BEFORE", "AFTER", "AROUND"}, kinds)
    pool = sources.fields("sglang.srt.mem_cache.memory_pool:ReqToTokenPool")
    needs(sources, "ReqToTokenPool", {"req_to_token"}, pool)
    assert sources.tree("sglang.srt.managers.scheduler") is not None  # by which a scheduler's process is known
    health_check = re.search(r'HEALTH_CHECK_RID_PREFIX = "(\w+)"', sources.text("sglang.srt.constants"))
    assert health_check is not None
    assert health_check[1].startswith(requests.HEALTH_CHECK)
    runner = "sglang.srt.model_executor.model_runner"
    if "kv_index_translator" in sources.text(runner):
        translator = "sglang.srt.mem_cache.kv_index_translator:KVIndexTranslator"
        needs(sources, translator, {"is_translating"}, sources.fields(translator))
        if "capture_token_capacity" not in sources.fields(translator):
            assert "num_tokens=self.max_token_pool_size + self.page_size" in sources.text(runner)
        needs(sources, "ModelRunner", {"max_token_pool_size"}, sources.fields(f"{runner}:ModelRunner"))


def test_an_engine_tells_its_processes_and_how_many_publish(sources: Sources) -> None:
    engine = "sglang.srt.entrypoints.engine:Engine"
    assert sources.parameters(f"{engine}.get_all_child_pids") == {"self"}
    needs(sources, engine, {"server_args"}, sources.fields(engine))
    has = sources.fields("sglang.srt.server_args:ServerArgs") | sources.annotated("sglang/srt/arg_groups/fields/")
    needs(sources, "ServerArgs", {"dp_size", "pp_size", "nnodes"}, has)
    assert sources.find("sglang.srt.plugins:load_plugins") is not None


SINCE = {
    "radix_cache_backend": (0, 5, 13),
    "enable_flexkv": (0, 5, 16),
    "enable_unified_cache_external_linker": (0, 5, 20),
}
"""The first releases that have these options."""


def test_the_options_that_are_asked_for_are_those_that_it_has(sources: Sources) -> None:
    """Of one that goes by another name now it would be thought that it is off."""
    askers = (layout.refuse_unknown, layout.graphs_fork, model.facts, model.largest_forward, model._slots_are_lasting)
    text = "".join(inspect.getsource(asker) for asker in askers)
    asked = {*re.findall(r'getattr\((?:runner\.server_)?args, "(\w+)"', text), "attn_cp_size", *model.CACHES_ELSEWHERE}
    assert len(asked) >= 14
    has = sources.fields("sglang.srt.server_args:ServerArgs") | sources.annotated("sglang/srt/arg_groups/fields/")
    lacking = asked - has - {option for option, since in SINCE.items() if number(sources.version) < since}
    assert not lacking, f"SGLang {sources.version} has no option {', '.join(sorted(lacking))}"

"""The hooks in a scheduler's process, called as SGLang calls them; what they hold on to is looked up in its sources by
`test_sglang_contract.py`.
"""

import logging
import multiprocessing
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from expert_lens.engines.sglang import contract, plugin, scheduler
from expert_lens.engines.sglang.capturer import _is_one_graph
from expert_lens.engines.sglang.scheduler import SchedulerHooks
from stand_ins import stand_in


class NotingCapturer:
    """Stands in for the capturer: notes what the hooks hand on."""

    def __init__(self) -> None:
        self.noted: list[Any] = []
        self.tap = SimpleNamespace(guard=lambda work, *args: work(*args))
        self.requests = SimpleNamespace(
            admit=lambda reqs: self.noted.append(("admit", reqs)),
            release=lambda req: self.noted.append(("release", req)),
        )

    def capturing(self, runner: Any, size: int, forward: Any) -> Any:
        return _Within(self, runner, size, forward)

    def follow(self, graph: Any) -> None:
        self.noted.append(("follow", graph))

    def accept(self, accepted: Any) -> None:
        self.noted.append(("accept", accepted))


class _Within:
    def __init__(self, capturer: NotingCapturer, runner: Any, size: int, forward: Any) -> None:
        self.capturer, self.what = capturer, (runner, size, forward)

    def __enter__(self) -> Any:
        self.capturer.noted.append(("capturing", *self.what[1:]))
        return "ours"

    def __exit__(self, *_: Any) -> None:
        self.capturer.noted.append(("captured",))


@pytest.fixture
def hooks() -> Any:
    made: Any = SchedulerHooks({})
    made._runner, made._capturer = object(), NotingCapturer()
    return made


def test_the_newest_graph_of_the_backend_is_followed(hooks: Any) -> None:
    backend = SimpleNamespace(_graphs={4: "of 4"})
    runner = SimpleNamespace(model_runner=hooks._runner, backend=backend)

    def capture(_: Any, size: int, forward: Any, *more: Any, label: Any) -> str:
        assert (forward, more, label) == ("ours", (0,), None)
        backend._graphs[size] = f"of {size}"
        return "result"

    assert hooks.around_decode_capture(capture, runner, 2, "the model's", 0, label=None) == "result"
    assert hooks._capturer.noted == [("capturing", 2, "the model's"), ("follow", "of 2"), ("captured",)]


def test_older_releases_return_the_graph(hooks: Any) -> None:
    runner = SimpleNamespace(model_runner=hooks._runner)
    result = hooks.around_decode_capture(lambda _, size, forward: ("graph", size, forward), runner, 2, "the model's")
    assert result == ("graph", 2, "ours")
    assert ("follow", "graph") in hooks._capturer.noted


def test_arguments_by_name_are_found_too(hooks: Any) -> None:
    def capture(_: Any, size: int, *, forward: Any, label: Any = None) -> Any:
        return "graph", size, forward, label

    runner = SimpleNamespace(model_runner=hooks._runner)
    assert hooks.around_decode_capture(capture, runner, forward="the model's", size=7) == ("graph", 7, "ours", None)
    assert hooks._capturer.noted[0] == ("capturing", 7, "the model's")


@pytest.mark.parametrize(("wrong", "error"), [(None, "not subscriptable"), ((1, 2), "tuple index out of range")])
def test_what_is_not_as_known_is_no_error_of_the_engine(hooks: Any, wrong: Any, error: str) -> None:
    failed: list[str] = []
    hooks._capturer.tap.guard = partial(_noted, failed)
    hooks.after_verify(wrong)
    hooks.after_prompts(None, object())
    assert error in failed[0]
    assert "no attribute 'reqs'" in failed[1]


def _noted(failed: list[str], work: Any, *args: Any) -> None:
    try:
        work(*args)
    except Exception as problem:
        failed.append(str(problem))


def test_graphs_of_a_draft_model_are_left_alone(hooks: Any) -> None:
    runner = SimpleNamespace(model_runner=object())
    assert hooks.around_decode_capture(lambda _, size, forward: (size, forward), runner, 2, "theirs") == (2, "theirs")
    assert hooks._capturer.noted == []


def test_what_the_other_hooks_hand_on(hooks: Any) -> None:
    hooks.after_prompts(None, SimpleNamespace(reqs=["a"]))
    hooks.after_verify(("predicted", "lengths", "which"), "verify input", batch=None)
    hooks.before_release("a", "cache")
    assert hooks._capturer.noted == [("admit", ["a"]), ("accept", "which"), ("release", "a")]
    hooks._capturer = None  # another rank publishes
    hooks.after_prompts(None, SimpleNamespace(reqs=["a"]))
    hooks.after_verify((0, 1, 2))
    hooks.before_release("a")
    assert hooks.around_decode_capture(lambda _, *what: what, None, 2, "theirs") == (2, "theirs")


def test_behind_a_draft_models_runner_the_targets_capturer_stands_again(
    hooks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[Any] = []
    monkeypatch.setattr(SchedulerHooks, "_set", put.append)
    hooks.after_init(None, SimpleNamespace(is_draft_worker=True))
    assert put == [hooks._capturer]


def test_what_cannot_be_captured_is_told_and_serving_goes_on(
    hooks: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sglang", None)
    hooks.after_init(None, SimpleNamespace(is_draft_worker=False))
    [record] = caplog.records
    assert record.getMessage().startswith("expert_lens captures nothing: ModuleNotFoundError")


def test_hooks_are_registered_where_the_release_has_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, Any] = {}
    registry = ModuleType("sglang.srt.plugins.hook_registry")
    registry.HookRegistry = SimpleNamespace(  # type: ignore[attr-defined]
        register=lambda target, hook, kind: registered.__setitem__(target, (hook.__name__, kind))
    )
    registry.HookType = SimpleNamespace(AFTER="after", AROUND="around", BEFORE="before")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    monkeypatch.setattr(contract.Place, "find", lambda place: None if place is contract.VERIFY else place.paths[-1])
    SchedulerHooks({}).register()
    names = {target.rpartition(".")[2]: hook for target, hook in registered.items()}
    assert names == {
        "init_routed_experts_capturer": ("after_init", "after"),
        "prepare_for_extend": ("after_prompts", "after"),
        "capture_one_batch_size": ("around_decode_capture", "around"),
        "release_kv_cache": ("before_release", "before"),
    }


def test_a_release_that_has_moved_the_places_is_told_by_name_and_serving_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    moved = ModuleType("sglang")
    moved.__version__ = "0.9.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang", moved)
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.scheduler", ModuleType("scheduler"))
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(name="sglang::scheduler"))
    monkeypatch.setenv("EXPERT_LENS_ENABLE", "1")
    with caplog.at_level(logging.ERROR):
        plugin.register()
    [record] = caplog.records
    said = record.getMessage()
    assert said.startswith(
        "expert_lens captures nothing: SGLang 0.9.0 has moved what it holds on to. It knows releases"
    )
    assert contract.RELEASES in said
    assert "a decode step is captured in a CUDA graph: no sglang.srt.model_executor.runner" in said


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.5.11", True), ("0.5.23", True), ("0.5.15.post1", True), ("0.5.10", False), ("0.5.24", False), ("0.6", False)],
)
def test_a_release_that_nobody_has_looked_into_is_told_to_be_one(version: str, known: bool) -> None:
    assert contract.knows(version) is known


@pytest.mark.parametrize(
    ("backend", "breakable", "one"),
    [
        ("FullCudaGraphBackend", "0", True),
        ("BreakableCudaGraphBackend", "0", False),
        (None, "", True),
        (None, "TRUE", False),
    ],
)
def test_a_decode_step_is_one_graph_or_several(
    monkeypatch: pytest.MonkeyPatch, backend: str | None, breakable: str, one: bool
) -> None:
    monkeypatch.setenv("SGLANG_USE_BREAKABLE_CUDA_GRAPH", breakable)
    made = None if backend is None else type(backend, (), {})()
    assert _is_one_graph(SimpleNamespace(backend=made)) is one


def test_a_rank_that_publishes_nothing_has_its_layers_told_their_numbers_all_the_same(
    hooks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are asked for something else than by whom they are captured, so ranks must not differ in it."""
    stand_in(monkeypatch, "sglang.srt.layers.moe", get_moe_a2a_backend=lambda: SimpleNamespace(value="none"))
    asked: list[Any] = []
    monkeypatch.setattr(scheduler.Layout, "of", lambda _: SimpleNamespace(publishing_rank=None))
    monkeypatch.setattr(scheduler, "refuse_unknown", lambda *_: None)
    monkeypatch.setattr(scheduler.model, "facts", asked.append)
    runner, hooks._capturer = SimpleNamespace(server_args=None, is_draft_worker=False), None
    hooks.after_init(None, runner)
    assert asked == [runner]
    assert hooks._capturer is None

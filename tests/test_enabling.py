"""Enabling engines that run their model in processes of their own, and finding what those publish."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import expert_lens
from children import hear, start
from expert_lens.enabling import ENVIRONMENT, enabled, remember_name
from expert_lens.engines import sglang
from expert_lens.engines.sglang import plugin
from expert_lens.errors import CaptureNotFoundError, EngineHookError, OptionError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "")


def test_nothing_is_enabled_unless_asked() -> None:
    assert enabled() is None
    os.environ[ENVIRONMENT] = "0"
    assert enabled() is None


def test_processes_inherit_the_options(tmp_path: Path) -> None:
    expert_lens.enable("server", arena="1MiB", on_full="wait", wait_timeout=2, directory=tmp_path)
    code = "import json; from expert_lens.enabling import enabled; print(json.dumps(enabled()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == {
        "name": "server", "arena_bytes": 1 << 20, "on_full": "wait", "wait_timeout": 2.0, "directory": str(tmp_path),
    }  # fmt: skip


def test_one_means_the_defaults() -> None:
    os.environ[ENVIRONMENT] = "1"
    assert enabled() == {
        "name": None, "arena_bytes": 256 << 20, "on_full": "drop", "wait_timeout": 1.0, "directory": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "a/b"}, "'a/b' cannot name a capture"),
        ({"arena": "much"}, "arena is 'much'"),
        ({"on_full": "sleep"}, "on_full is 'sleep'"),
        ({"wait_timeout": -1}, "wait_timeout is -1"),
        ({"directory": ""}, "directory is ''"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        expert_lens.enable(**options)
    assert enabled() is None
    os.environ[ENVIRONMENT] = json.dumps(options)
    with pytest.raises(OptionError, match=message):
        enabled()


@pytest.mark.parametrize(
    ("value", "message"),
    [("yes", "set it to 1, or to options as JSON"), ("[1]", "set it to 1"), ('{"weights": true}', "no option weights")],
)
def test_a_variable_that_means_nothing(value: str, message: str) -> None:
    os.environ[ENVIRONMENT] = value
    with pytest.raises(OptionError, match=message):
        enabled()


def test_the_first_process_names_the_capture_unless_the_user_has() -> None:
    plugin.register()
    assert os.environ[ENVIRONMENT] == ""
    os.environ[ENVIRONMENT] = "1"
    plugin.register()
    options = enabled()
    assert options is not None
    assert options["name"] == f"sglang-{os.getpid()}"
    remember_name("sglang-1")  # as a server that is started by this process names its own
    options = enabled()
    assert options is not None
    assert options["name"] == "sglang-1"
    expert_lens.enable("mine", arena="1MiB")
    remember_name("other")
    options = enabled()
    assert options is not None
    assert (options["name"], options["arena_bytes"]) == ("mine", 1 << 20)


def test_the_entry_point_is_where_sglang_looks() -> None:
    from importlib.metadata import entry_points

    (point,) = [point for point in entry_points(group="sglang.srt.plugins") if point.name == "expert_lens"]
    assert point.load() is plugin.register


PUBLISHER = """
import sys
from expert_lens._core import Writer
writer = Writer('scheduled', layers=[0], num_experts=4, top_k=1)
print('ready', flush=True)
sys.stdin.read()
"""
SCHEDULER = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[1]])"


class Engine:
    """What `find_capture` asks of an sglang.Engine, whose package needs a GPU to be imported."""

    def __init__(self, pids: list[int], dp_size: int = 1, pp_size: int = 1, nnodes: int = 1) -> None:
        self.pids = pids
        self.server_args = types.SimpleNamespace(dp_size=dp_size, pp_size=pp_size, nnodes=nnodes)

    def get_all_child_pids(self) -> list[int]:
        return self.pids


@pytest.fixture
def sglang_engine_class(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("sglang.srt.entrypoints.engine")
    module.Engine = Engine  # type: ignore[attr-defined]
    package = types.ModuleType("sglang")
    package.__version__ = "9.9.9"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sglang", package)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.usefixtures("sglang_engine_class")
def test_an_engine_is_found_by_its_processes() -> None:
    """Also where the one that publishes is a child of the engine's child."""
    with start(SCHEDULER, PUBLISHER) as process:
        assert hear(process) == "ready"
        with expert_lens.attach(Engine([os.getpid() + 10**7, process.pid])) as lens:
            assert lens.name == "scheduled"
        with pytest.raises(EngineHookError, match=r"1 of the engine's 2 data-parallel .*attach\('scheduled'\)"):
            expert_lens.attach(Engine([process.pid], dp_size=2))
        with pytest.raises(EngineHookError, match="1 of the engine's 6 data-parallel ranks and pipeline stages"):
            expert_lens.attach(Engine([process.pid], dp_size=2, pp_size=3))
        expert_lens.attach(Engine([process.pid], dp_size=2, nnodes=2)).close()  # the other rank is elsewhere
        with pytest.raises(OptionError, match="arena cannot be chosen"):
            expert_lens.attach(Engine([process.pid]), arena="1GiB")
        with pytest.raises(EngineHookError, match=r"Call expert_lens\.enable\(\) before"):
            expert_lens.attach(Engine([10**7]))
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.usefixtures("sglang_engine_class")
def test_an_engine_that_was_enabled_and_publishes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    expert_lens.enable()
    with pytest.raises(EngineHookError) as moved:
        expert_lens.attach(Engine([10**7]))
    assert "SGLang 9.9.9 has moved what expert_lens holds on to" in str(moved.value)
    assert "no sglang.srt.mem_cache.common:release_kv_cache with req, tree_cache" in str(moved.value)
    monkeypatch.setattr(sglang.contract, "problems", list)
    with pytest.raises(CaptureNotFoundError, match="Their log says why"):
        expert_lens.attach(Engine([10**7]))

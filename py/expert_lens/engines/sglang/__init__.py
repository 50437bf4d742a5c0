"""SGLang: the experts that a server's or an `sglang.Engine`'s tokens go to, while its scheduler overlaps with the GPU.

SGLang runs the model in scheduler processes. There `plugin` is its entry point, `contract` says what it holds on to,
`scheduler` has the hooks, `capturer` takes the experts and publishes them (`static` where no Python runs), `requests`
knows whose they are, `model` what the model is, `layout` which rows are this process's. In the process of whoever
attaches there is only this: finding their capture.
"""

import sys
from typing import Any

from expert_lens import _core
from expert_lens.enabling import ENVIRONMENT, enabled
from expert_lens.errors import CaptureNotFoundError, EngineHookError

__all__ = ["find_capture", "matches"]


def matches(obj: object) -> bool:
    """Whether the object is an `sglang.Engine`. Imports nothing: without SGLang there is none."""
    module = sys.modules.get("sglang.srt.entrypoints.engine")
    engine_class = getattr(module, "Engine", None)
    return engine_class is not None and isinstance(obj, engine_class)


def find_capture(engine: Any, directory: str | None) -> str:
    """The name of the capture that the engine's schedulers publish.

    Raises EngineHookError if they publish none: the engine was not enabled, or this release of SGLang is not known;
    and if some of them do not.
    """
    schedulers = set(engine.get_all_child_pids())
    found = [
        facts["capture"]
        for facts in _core.captures(directory)
        if facts["alive"] and not schedulers.isdisjoint(_ancestors(facts["pid"]))
    ]
    if found:
        _expect_every_rank(engine.server_args, found)
        return found[0]
    if enabled() is None:
        raise EngineHookError(
            "this sglang.Engine was started without expert_lens. Call expert_lens.enable() before sglang.Engine(...), "
            f"or set {ENVIRONMENT}=1 in the environment of a server, and start it again."
        )
    from expert_lens.engines.sglang import contract

    if problems := contract.problems():
        import sglang

        raise EngineHookError(
            f"SGLang {sglang.__version__} has moved what expert_lens holds on to; it knows releases "
            f"{contract.RELEASES}. Missing: {'; '.join(problems)}."
        )
    raise CaptureNotFoundError(
        "the engine's schedulers publish no capture. Their log says why, in a line with 'expert_lens'; without one, "
        "expert_lens.enable() was called too late, or SGLANG_PLUGINS is set and does not name expert_lens."
    )


def _expect_every_rank(args: Any, found: list[str]) -> None:
    """Raise EngineHookError where fewer processes publish than do if all is well: nothing would be seen of the others'
    requests.
    """
    ranks = args.dp_size * args.pp_size
    if args.nnodes == 1 and len(found) < ranks:
        raise EngineHookError(
            f"{len(found)} of the engine's {ranks} data-parallel ranks and pipeline stages publish capture {found[0]}: "
            "of the others nothing would be seen. The engine's log says why, in a line with 'expert_lens captures "
            f"nothing'. To look at those that publish all the same: expert_lens.attach({found[0]!r})."
        )


def _ancestors(pid: int) -> list[int]:
    """The process, its parent, and so on."""
    found = []
    while pid > 1:
        found.append(pid)
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                pid = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
    return found

"""SGLang's entry point: loaded in each of its processes, it hooks the scheduler's, and only where that was enabled."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys

from expert_lens.enabling import enabled, remember_name

__all__ = ["register"]

log = logging.getLogger(__name__)


def register() -> None:
    """Hook this process if it is a scheduler's and `expert_lens.enable` was called; else do nothing.

    Raises OptionError for options that cannot be used, which SGLang logs and survives.
    """
    options = enabled()
    if options is None:
        return
    if multiprocessing.current_process().name == "MainProcess":
        remember_name(f"sglang-{os.getpid()}")
        return
    if "sglang.srt.managers.scheduler" not in sys.modules:
        return
    import sglang

    from expert_lens.engines.sglang import contract

    if problems := contract.problems():
        log.error(
            "expert_lens captures nothing: SGLang %s has moved what it holds on to. It knows releases %s. Missing: %s",
            sglang.__version__,
            contract.RELEASES,
            "; ".join(problems),
        )
        return
    if not contract.knows(sglang.__version__):
        log.warning(
            "expert_lens knows SGLang %s, and this is %s: what it holds on to is there, but nobody has tried it.",
            contract.RELEASES,
            sglang.__version__,
        )
    from expert_lens.engines.sglang.scheduler import SchedulerHooks

    SchedulerHooks(options).register()

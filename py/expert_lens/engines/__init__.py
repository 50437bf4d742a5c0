"""The engines that expert_lens can see into.

Each is a module with `matches`, and with `attach` for an engine that runs its model in this process, or `find_capture`
for one that runs it in processes of its own.
"""

import importlib
from types import ModuleType

__all__ = ["find_engine"]

ENGINES = ("transformers", "sglang")


def find_engine(obj: object) -> ModuleType | None:
    """The engine module whose `matches(obj)` is true, or None.

    Imports neither torch nor an engine: an object of an engine exists only where that engine was imported.
    """
    for name in ENGINES:
        module = importlib.import_module(f"expert_lens.engines.{name}")
        if module.matches(obj):
            return module
    return None

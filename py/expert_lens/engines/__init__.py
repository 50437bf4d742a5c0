"""The engines that expert_lens can see into; each is a module with `matches` and `attach`."""

import importlib
from types import ModuleType

__all__ = ["find_engine"]

ENGINES = ("transformers",)


def find_engine(obj: object) -> ModuleType | None:
    """The engine module whose `matches(obj)` is true, or None.

    Imports neither torch nor an engine: an object of an engine exists only where that engine was imported.
    """
    for name in ENGINES:
        module = importlib.import_module(f"expert_lens.engines.{name}")
        if module.matches(obj):
            return module
    return None

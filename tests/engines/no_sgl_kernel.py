"""In place of `sgl_kernel` where there is no GPU: SGLang imports names from it there that it has no use for."""

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"sgl_kernel.{name} was called, and there is none without a GPU")

    return fail

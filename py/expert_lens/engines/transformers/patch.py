"""Standing in for methods of the engine's objects, without a trace when taken off again.

Both the model's methods (`generate` and four beside it) and the forwards of its decoder and experts are replaced
on the one instance. For the forwards torch has hooks, but a module with a hook takes the long way through torch: on
the demo model (8 layers, 5 ms a step) ten hooks that do nothing cost 55 to 90 µs a step, ten forwards that only pass
on cost 16 µs. What hooks give for that, a stand-in must give, too:

* other people's hooks run as before, and what they change in the arguments is seen, as the forward is called last;
* a class whose method is patched later, or an instance whose method was replaced before, is called as it is then;
* if someone has wrapped the stand-in when it is taken off, it stays inside their wrapper and only passes on;
* a deep copy, or a pickle, of the object has its own method again;
* torch.compile does not trace what has effects outside its graph, but for lists that it sets behind that.
"""

import copy
import functools
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from expert_lens.errors import EngineHookError

__all__ = ["MISSING", "Patch", "StandIn", "forget_compiled_code", "uncompiled"]

MISSING = object()
"""In `StandIn.replaced`: nothing was put on the instance before; the method is the class's."""


class StandIn:
    """Called in place of `owner.name`; a subclass says what it does beside `call_original`.

    Raises EngineHookError if there is no such method.
    """

    def __init__(self, owner: Any, name: str) -> None:
        method = getattr(owner, name, None)
        if not callable(method):
            raise EngineHookError(
                f"{type(owner).__module__}.{type(owner).__name__} has no method {name!r} to follow; this release of "
                "transformers is not known to expert_lens. Use a release from 5.16 to 5.23, or a newer expert_lens."
            )
        functools.update_wrapper(self, method)
        self.owner = owner
        self.name = name
        self.removed = False
        self.replaced: Any = vars(owner).get(name, MISSING)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the owner would do; a subclass does more."""
        return self.call_original(*args, **kwargs)

    def call_original(self, *args: Any, **kwargs: Any) -> Any:
        """What the owner would do without us: its class's method, as it is now, or the one put on it before us."""
        if self.replaced is MISSING:
            return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)
        return self.replaced(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.replaced is not MISSING:
            return copy.deepcopy(self.replaced, memo)
        return types.MethodType(getattr(type(self.owner), self.name), memo.get(id(self.owner), self.owner))

    def __reduce__(self) -> tuple[Any, ...]:
        if self.replaced is not MISSING:
            return (_same, (self.replaced,))
        return (getattr, (self.owner, self.name))


class Patch:
    """A stand-in in its place, until `remove()`; it does not keep the object alive."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = weakref.ref(stand_in)
        object.__setattr__(stand_in.owner, stand_in.name, stand_in)

    @property
    def alive(self) -> bool:
        """Whether the object still exists."""
        return self._stand_in() is not None

    def remove(self) -> None:
        """Put back what was there."""
        stand_in = self._stand_in()
        if stand_in is None:
            return
        stand_in.removed = True
        owner, name = stand_in.owner, stand_in.name
        if vars(owner).get(name) is not stand_in:
            return
        if stand_in.replaced is MISSING:
            object.__delattr__(owner, name)
        else:
            object.__setattr__(owner, name, stand_in.replaced)


def uncompiled(function: Callable[..., None]) -> Callable[..., None]:
    """The function as torch.compile must call it: outside its graphs, without a look inside."""
    reason = "expert_lens captures here; compile without fullgraph, or close the capture first"
    disabled: Callable[..., None] = torch.compiler.disable(function, reason=reason)  # type: ignore[no-untyped-call]
    return disabled


def forget_compiled_code() -> None:
    """Drop what torch.compile has compiled so far, if anything: it would run past what stands in from now on.

    The next call compiles anew.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["stats"]:
        torch.compiler.reset()


def _same(value: Any) -> Any:
    return value

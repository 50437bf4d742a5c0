"""See a mixture-of-experts model's routing live, bit-exact, while its inference engine runs at full speed.

    import expert_lens

    lens = expert_lens.attach(model)          # a transformers model, an sglang.Engine (call enable() before it starts),
                                              # or the name of a running capture
    lens                                      # in a notebook: the live heatmap
    lens.counts()                             # tokens by layer and expert
    lens.routed_experts("0.0")                # every token's experts, bit-exact
    lens.to_parquet("run/")                   # expert_lens.scan("run/") reads it, open_trace("run/") plays it

Importing this imports numpy and the extension; polars and the notebook's parts come with the first use.
"""

from typing import TYPE_CHECKING, Any

from expert_lens import errors
from expert_lens._core import __version__
from expert_lens.enabling import enable
from expert_lens.errors import ExpertLensError, MissingRowsError
from expert_lens.lens import Lens, attach, captures, open_trace

if TYPE_CHECKING:
    from expert_lens.trace import scan

__all__ = [
    "ExpertLensError",
    "Lens",
    "MissingRowsError",
    "__version__",
    "attach",
    "captures",
    "enable",
    "errors",
    "open_trace",
    "scan",
]


def __getattr__(name: str) -> Any:
    if name == "scan":  # brings polars
        from expert_lens.trace import scan

        return scan
    raise AttributeError(f"module 'expert_lens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

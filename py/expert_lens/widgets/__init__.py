"""What people look at: the live heatmap."""

from typing import TYPE_CHECKING, Any

from expert_lens.widgets.source import HeatmapSource

if TYPE_CHECKING:
    from expert_lens.widgets.heatmap import Heatmap

__all__ = ["Heatmap", "HeatmapSource"]


def __getattr__(name: str) -> Any:
    """Import the widget when somebody asks for it: ipywidgets takes a quarter of a second, and engines need none."""
    if name == "Heatmap":
        from expert_lens.widgets.heatmap import Heatmap

        return Heatmap
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

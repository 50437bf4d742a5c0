"""What people look at: the live heatmap."""

from expert_lens.widgets.heatmap import Heatmap
from expert_lens.widgets.source import HeatmapSource

__all__ = ["Heatmap", "HeatmapSource"]

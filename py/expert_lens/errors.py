"""The errors of expert_lens: one base class, one class a cause.

Each message says what failed, the values that disagree, and what to do next.
"""

from expert_lens._core import (
    ArenaCorruptError,
    ArenaError,
    ArenaPermissionError,
    ArenaSpaceError,
    ArenaVersionError,
    CaptureInUseError,
    CaptureNotFoundError,
    CudaError,
    ExpertLensError,
    ReaderTableFullError,
)

__all__ = [
    "ArenaCorruptError",
    "ArenaError",
    "ArenaPermissionError",
    "ArenaSpaceError",
    "ArenaVersionError",
    "CaptureInUseError",
    "CaptureNotFoundError",
    "CudaError",
    "EngineHookError",
    "ExpertLensError",
    "MissingRowsError",
    "NotMoEError",
    "OptionError",
    "ReaderTableFullError",
    "RecordingError",
    "SilentTapError",
    "UnknownRequestError",
    "UnsupportedModelError",
]


class OptionError(ExpertLensError, ValueError):
    """An option has a value that cannot be used, or is unknown."""


class NotMoEError(ExpertLensError):
    """The model has no routed experts: there is nothing to see."""


class UnsupportedModelError(ExpertLensError):
    """The model routes tokens to experts in a way that this version cannot capture exactly."""


class SilentTapError(ExpertLensError):
    """A routed layer did not hand over its experts in the first forward after attaching.

    `layers` holds the indices of the silent layers.
    """

    def __init__(self, message: str, layers: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.layers = layers


class EngineHookError(ExpertLensError):
    """A place of the engine that expert_lens holds on to is gone, taken, or behaves differently."""


class MissingRowsError(ExpertLensError):
    """Rows of a request were dropped, or computed before attaching: they are missing, not zero.

    `positions` holds the missing positions.
    """

    def __init__(self, message: str, positions: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.positions = positions


class RecordingError(ExpertLensError):
    """A recording stopped: its rows could not be written. What was written before stays readable."""


class UnknownRequestError(ExpertLensError, KeyError):
    """No request of that id is held: it was never seen, or it had to make room for newer ones."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""

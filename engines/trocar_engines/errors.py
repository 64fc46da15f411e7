"""Expected failures of the model side.

    TrocarError
    ├── InvalidPromptError      a prompt that cannot be applied; the stream goes on
    │   └── FrameNotKeptError   its frame is too old, or was never tracked
    ├── UnknownObjectError      an object_id that the stream does not track
    ├── CapacityError           every memory row is taken
    ├── StreamLimitError        as many streams as the scheduler admits
    ├── UnknownModelError       no model of that name
    ├── CheckpointError         weights that are unreadable or belong to another network
    ├── EngineMismatchError     an exported engine that belongs to other weights, device or version
    ├── DeviceFaultError        the device failed; nothing that it says can be trusted
    ├── PlanBuildError          a graph of which TensorRT makes no plan
    └── RuntimeUnavailableError a runtime that is not installed, or a device that is absent or too small

Anything else is a defect of ours.
"""

__all__ = [
    "CapacityError",
    "CheckpointError",
    "DeviceFaultError",
    "EngineMismatchError",
    "FrameNotKeptError",
    "InvalidPromptError",
    "PlanBuildError",
    "RuntimeUnavailableError",
    "StreamLimitError",
    "TrocarError",
    "UnknownModelError",
    "UnknownObjectError",
]


class TrocarError(Exception):
    """Base of every expected failure; the message says what was received, what was expected, the remedy."""


class InvalidPromptError(TrocarError):
    """A prompt that cannot be applied to its frame."""


class FrameNotKeptError(InvalidPromptError):
    """A prompt on a frame that the tracker does not keep."""


class UnknownObjectError(TrocarError):
    """An object_id that the stream does not track."""


class CapacityError(TrocarError):
    """No memory row is free for another object."""


class StreamLimitError(TrocarError):
    """The scheduler already serves as many streams as it admits."""


class UnknownModelError(TrocarError):
    """No model of that name is known."""


class CheckpointError(TrocarError):
    """Weights that cannot be read or do not fit the network."""


class EngineMismatchError(TrocarError):
    """An exported engine made for other weights, another device or another runtime version."""


class RuntimeUnavailableError(TrocarError):
    """A runtime that this machine cannot offer: a package, a device or memory is missing."""


class PlanBuildError(TrocarError):
    """TensorRT cannot make a plan of a graph."""


class DeviceFaultError(TrocarError):
    """The device failed earlier; the server has to be started anew."""

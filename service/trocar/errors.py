"""Expected failures of the network side.

    TrocarError (trocar_engines.errors)
    ├── InvalidPromptError (trocar_engines.errors)
    │   └── UnknownFrameError   a prompt on a frame that is not at hand
    ├── ContractError           a client broke trocar.v1; ends its stream
    ├── MaskDataError           coded pixels that do not describe a mask
    ├── ConfigError             settings that make no sense
    ├── ServerNotReadyError     warming up or shutting down
    ├── SourceError             INPUT that cannot be read as video
    ├── ResultError             results that cannot be written
    └── ConnectionFailedError   a server that cannot be reached, or ended the call

The model side adds its own (see `trocar_engines.errors`). Anything else is a defect of ours.
"""

from trocar_engines.errors import InvalidPromptError, TrocarError

__all__ = [
    "ConfigError",
    "ConnectionFailedError",
    "ContractError",
    "MaskDataError",
    "ResultError",
    "ServerNotReadyError",
    "SourceError",
    "TrocarError",
    "UnknownFrameError",
]


class UnknownFrameError(InvalidPromptError):
    """A prompt on a frame that was never received, was lost, or is too old."""


class ContractError(TrocarError):
    """A client broke the contract; its stream ends with INVALID_ARGUMENT."""


class MaskDataError(TrocarError):
    """Coded pixels that do not describe a mask of the stated size."""


class ConfigError(TrocarError):
    """A setting outside what makes sense."""


class ServerNotReadyError(TrocarError):
    """The server is warming up or shutting down."""


class SourceError(TrocarError):
    """An input that is missing, is no video, or has no frames."""


class ResultError(TrocarError):
    """Results that cannot be written."""


class ConnectionFailedError(TrocarError):
    """A server that cannot be reached, or that ended the call."""

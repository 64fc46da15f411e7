"""Expected failures of the network side.

    TrocarError (trocar_engines.errors)
    ├── InvalidPromptError (trocar_engines.errors)
    │   └── UnknownFrameError   a prompt on a frame that is not at hand
    ├── ContractError           a client broke trocar.v1; ends its stream
    ├── MaskDataError           coded pixels that do not describe a mask
    ├── ConfigError             settings that make no sense
    ├── ServerNotReadyError     warming up or shutting down
    ├── NotAdmittedError        a peer that the server does not know
    ├── ForbiddenError          a client that may not open what it asked for
    ├── LimitError              a stream beyond one of the server's limits
    │   └── UnreadError         a client that does not read
    ├── DecoderHungError        decoding or coding that does not end
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
    "DecoderHungError",
    "ForbiddenError",
    "LimitError",
    "MaskDataError",
    "NotAdmittedError",
    "ResultError",
    "ServerNotReadyError",
    "SourceError",
    "TrocarError",
    "UnknownFrameError",
    "UnreadError",
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


class NotAdmittedError(TrocarError):
    """A peer that the server does not know; the text is for the server's log only.

    Args:
        reason: why, for the log.
        is_known: it has shown who it is, and is not on the list.
    """

    def __init__(self, reason: str, *, is_known: bool) -> None:
        super().__init__(reason)
        self.is_known = is_known


class ForbiddenError(TrocarError):
    """A client that is admitted, but not to what it asked for."""


class LimitError(TrocarError):
    """A stream beyond one of the server's limits.

    Args:
        limit: its name in `ServerConfig`, or in the clients file.
        message: what was received, and the remedy.
    """

    def __init__(self, limit: str, message: str) -> None:
        super().__init__(f"limit {limit}: {message}")
        self.limit = limit


class UnreadError(LimitError):
    """A client that does not read its results; it cannot be told why its stream ends."""


class DecoderHungError(TrocarError):
    """Decoding, reading a prompt or coding masks that does not end; the stream is given up."""


class SourceError(TrocarError):
    """An input that is missing, is no video, or has no frames."""


class ResultError(TrocarError):
    """Results that cannot be written."""


class ConnectionFailedError(TrocarError):
    """A server that cannot be reached, or that ended the call."""

"""What a server writes down: log lines as JSON, and one audit line for each stream and prompt.

No line holds a pixel, a mask, the place of a prompt, or a name that a client sent: stream ids, client names
from certificates, counts and codes are all there is.
"""

import json
import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from trocar.errors import ConfigError

AUDIT_LOGGER = "trocar.audit"
FIELDS = "fields"
"""Attribute of a log record that holds its fields, such as stream_id."""

audit_log = logging.getLogger(AUDIT_LOGGER)

Fields = dict[str, str | int | float | bool | None]


class JsonFormatter(logging.Formatter):
    """One JSON object for each line."""

    def format(self, record: logging.LogRecord) -> str:
        """Write time (UTC), level, logger, message, the record's fields, and a traceback if there is one."""
        line: dict[str, object] = {
            "time": _write_time(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class ClientWords(logging.Filter):
    """Drops what gRPC and asyncio log of bytes that are no text: they show them, and they are a client's."""

    LOGGERS = ("grpc._cython.cygrpc", "asyncio")
    """A logger's filter sees only what is logged to that very logger."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep a line that is of another failure, or of none."""
        error = record.msg if isinstance(record.msg, BaseException) else (record.exc_info or (None, None))[1]
        return not isinstance(error, UnicodeDecodeError)


class AuditLog:
    """Takes audit lines: into a file that only its owner reads, or into the log.

    Args:
        path: appended to; None for the log, at level INFO.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(self, path: Path | None) -> None:
        self._file: IO[str] | None = None
        if path is not None:
            try:
                self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w")
            except OSError as error:
                raise ConfigError(f"audit log {path}: {error.strerror}") from error

    def write(self, event: str, fields: Fields) -> None:
        """Write one line; it is in the file when this returns."""
        if self._file is None:
            audit_log.info("%s", event, extra={FIELDS: fields})
            return
        line = {"time": _write_time(time.time()), "event": event, **fields}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        failure: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _write_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{int(seconds % 1 * 1_000):03}Z"

"""`trocar serve` as a child process: a server whose CPU time and memory are its own."""

import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, Self

from trocar.cli import EXIT_EXPECTED_FAILURE, EngineOptions
from trocar.config import ServerConfig
from trocar_engines.errors import TrocarError

SERVING = re.compile(r"trocar serve: serving on (\S+);")
PROGRESS = "trocar: "
"""Begins what the model side tells while engines are exported."""
LAST_LINES = 50
STOP_TIMEOUT_S = 15.0
"""Streams that are still open get some seconds before the server ends."""


class RunningServer(Protocol):
    """A server that takes streams."""

    @property
    def address(self) -> str:
        """host:port."""

    @property
    def pid(self) -> int:
        """Of its process."""


@dataclass(frozen=True, kw_only=True)
class ServerRequest:
    """What server to start.

    Args:
        engine: the model side.
        max_objects: per stream.
        on_line: called with what it prints of its progress, and with everything when it breaks.
    """

    engine: EngineOptions
    max_objects: int
    on_line: Callable[[str], None]


StartServer = Callable[[ServerRequest], AbstractContextManager[RunningServer]]


class ServeProcess:
    """Runs for as long as the context lasts, on a free loopback port.

    Entering waits until it serves, which takes minutes where engines are exported first.
    """

    def __init__(self, request: ServerRequest) -> None:
        self._request = request
        self._lines: deque[str] = deque(maxlen=LAST_LINES)
        self._spoken = threading.Condition()
        self._is_silent = False
        self.address = ""

    @property
    def pid(self) -> int:
        """See `RunningServer.pid`."""
        return self._process.pid

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "trocar.cli", "serve", *write_arguments(self._request)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read_lines, name="bench-serve", daemon=True)
        self._reader.start()
        try:
            with self._spoken:
                self._spoken.wait_for(lambda: self.address or self._is_silent)
            if not self.address:
                raise TrocarError(f"the server did not start: {self._last_words()}")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def _read_lines(self) -> None:
        """Read on while it runs: a full pipe would stop it at its next word."""
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._take_line(line.rstrip())
        with self._spoken:
            self._is_silent = True
            self._spoken.notify_all()

    def _take_line(self, line: str) -> None:
        self._lines.append(line)
        serving = SERVING.match(line)
        with self._spoken:
            if serving:
                self.address = serving[1]
                self._spoken.notify_all()
        if line.startswith(PROGRESS):
            self._request.on_line(line)

    def _last_words(self) -> str:
        """Why it ended: one line where it expected that, else the traceback goes before."""
        code = self._process.wait()
        said = [line for line in self._lines if line]
        if not said or code != EXIT_EXPECTED_FAILURE:
            for line in said:
                self._request.on_line(line)
            return f"exit code {code}"
        return said[-1].removeprefix("trocar serve: ")


def write_arguments(request: ServerRequest) -> list[str]:
    """Flags of `trocar serve`."""
    engine = request.engine
    arguments = ["--address", "127.0.0.1:0", "--runtime", engine.runtime]
    arguments += ["--max-streams", str(engine.max_streams)]
    arguments += ["--max-objects", str(max(request.max_objects, ServerConfig().max_objects))]
    for flag, value in (
        ("--model", engine.model),
        ("--memory", engine.memory),
        ("--weights", engine.weights),
    ):
        if value:
            arguments += [flag, str(value)]
    return arguments

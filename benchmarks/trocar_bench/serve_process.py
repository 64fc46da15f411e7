"""`trocar serve` as a child process: a server whose CPU time and memory are its own."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, Self

from trocar.cli import EXIT_EXPECTED_FAILURE, EXIT_INTERRUPTED, EngineOptions
from trocar.config import ServerConfig
from trocar_engines.errors import TrocarError

SERVING = re.compile(r"trocar serve: serving on (\S+);")
PROGRESS = "trocar: "
"""Begins what the model side tells while engines are exported."""
LAST_LINES = 50
STOP_TIMEOUT_S = 15.0
"""Streams that are still open get some seconds before the server ends."""


@dataclass(frozen=True, kw_only=True)
class ServerStart:
    """How a server started.

    Args:
        seconds: from the start of its process until it took streams.
        has_exported: it made engines first.
    """

    seconds: float
    has_exported: bool


class RunningServer(Protocol):
    """A server that takes streams."""

    @property
    def address(self) -> str:
        """host:port."""

    @property
    def pid(self) -> int:
        """Of its process."""

    @property
    def start(self) -> ServerStart | None:
        """None of a server that ran already."""


@dataclass(frozen=True, kw_only=True)
class ServerRequest:
    """What server to start.

    Args:
        engine: the model side.
        max_objects: per stream.
        on_line: called with what it prints of its progress, and with everything when it breaks.
        address: host:port; port 0 takes a free one.
        module: whose `serve` it is.
        flags: further ones.
    """

    engine: EngineOptions
    max_objects: int
    on_line: Callable[[str], None]
    address: str = "127.0.0.1:0"
    module: str = "trocar.cli"
    flags: tuple[str, ...] = ()


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
        self.start: ServerStart | None = None

    @property
    def pid(self) -> int:
        """See `RunningServer.pid`."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Of its process, negative for a signal; None while it runs."""
        return self._process.poll()

    @property
    def is_running(self) -> bool:
        """Whether its process has not ended."""
        return self.exit_code is None

    def __enter__(self) -> Self:
        self._began_s = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._request.module, "serve", *write_arguments(self._request)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # Ctrl-C is for whoever started it: he still needs the server to come to an end in good order.
            process_group=0,
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
        self.stop()

    def kill(self) -> None:
        """End it as a power cut would: no farewell to anybody."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def stop(self) -> None:
        """End it in good order, if it has not ended."""
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
                self.start = ServerStart(
                    seconds=time.perf_counter() - self._began_s,
                    has_exported=any(said.startswith(PROGRESS) for said in self._lines),
                )
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


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does: a server of ours must not outlive us."""
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def run_bench(
    name: str,
    measure: Callable[[Callable[[str], None]], dict[str, Any]],
    is_good: Callable[[dict[str, Any]], bool],
) -> int:
    """Measure, and print the figures as the last line on stdout.

    Args:
        name: of the bench, for its one line about a failure.
        measure: handed what takes lines for people.
        is_good: of the figures.

    Returns:
        the exit code: 0; 1 when the figures are not good; 2 after an expected failure; 130 when interrupted.
    """
    try:
        with stop_on_sigterm():
            figures = measure(lambda text: print(text, file=sys.stderr))
    except TrocarError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_EXPECTED_FAILURE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    print(json.dumps(figures))
    return 0 if is_good(figures) else 1


def write_arguments(request: ServerRequest) -> list[str]:
    """Flags of `trocar serve`."""
    engine = request.engine
    arguments = ["--compile" if engine.is_compiled else "--no-compile"]
    arguments += ["--address", request.address, "--runtime", engine.runtime]
    arguments += ["--max-streams", str(engine.max_streams)]
    arguments += ["--max-objects", str(max(request.max_objects, ServerConfig().max_objects))]
    # A stream may begin before the rows of the one before are free again.
    arguments += ["--max-objects-total", str(engine.max_objects + request.max_objects)]
    for flag, value in (
        ("--model", engine.model),
        ("--memory", engine.memory),
        ("--weights", engine.weights),
        ("--threads", engine.threads),
    ):
        if value:
            arguments += [flag, str(value)]
    return [*arguments, *request.flags]
